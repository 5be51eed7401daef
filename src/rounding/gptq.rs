//! GPTQ on block formats: column by column, with the format's own grid.
//!
//! Frantar et al. 2023, algorithm 1, for a tile of rows. When the first column of a block is reached, everything that the
//! block stores is searched on the weights as the errors so far have moved them ([`super::search`]); the integers of a
//! sub-block once more when its own first column is reached. Eight columns at a time stay in registers; before they do, they
//! take what the errors of the panel's earlier columns do to them, and a panel's errors go to the rest of the row as one product
//! of matrices. Weights and errors stand column by column meanwhile: what is moved is then one run of memory, and lanes are rows.
//! Multiplications and additions are fused on every processor, so that all round alike.

use super::carry::{self, Errors};
use super::factor::Factor;
use super::levels::{AnyLevels, LANES, Levels};
use super::search::{self, Head};
use crate::formats::grid::{Grid, Scales};
use crate::forward::kernels::vectorized;
use crate::linalg::{View, ViewMut, add_times_whole};

/// Columns of a panel: a super-block.
pub const PANEL: usize = 256;

/// Rows of a matrix in work: `rows` is a multiple of [`LANES`], the last ones may be zero.
pub struct Tile {
    pub rows: usize,
    pub n: usize,
    /// `[n, rows]`: the weights, column by column; spent by [`gptq_tile`].
    pub w: Vec<f32>,
    /// `[rows, n]`.
    pub codes: Vec<u8>,
    /// `[rows, blocks]`.
    pub heads: Vec<Head>,
    /// `[rows, n]`: what the codes stand for.
    pub values: Vec<f32>,
}

impl Tile {
    /// A tile of the weights `w` \[rows, n\].
    pub fn new(g: &Grid, w: &[f32], n: usize) -> Tile {
        let rows = (w.len() / n).next_multiple_of(LANES);
        let mut across = vec![0.0; rows * n];
        for (first, w) in w.chunks(LANES * n).enumerate() {
            for (j, column) in across.chunks_exact_mut(rows).enumerate() {
                let column = column[first * LANES..].iter_mut();
                column.zip(w[j..].iter().step_by(n)).for_each(|(c, v)| *c = *v);
            }
        }
        Tile {
            rows,
            n,
            w: across,
            codes: vec![0; rows * n],
            heads: vec![Head::default(); rows * (n / g.block)],
            values: vec![0.0; rows * n],
        }
    }
}

vectorized! {
    /// Rounds the tile; with `search`, finds the scales as well, otherwise it takes those of the tile's heads.
    pub fn gptq_tile(g: &Grid, levels: &AnyLevels, f: &Factor, t: &mut Tile, search: bool) {
        match *levels {
            AnyLevels::Range(l) => gptq(g, l, f, t, search),
            AnyLevels::Table(l) => gptq(g, l, f, t, search),
        }
    }
}

/// Columns that are in work at a time.
const STEP: usize = 8;

/// Rounds the tile; with `search`, finds the scales as well.
#[inline(always)]
fn gptq<L: Levels>(g: &Grid, l: L, f: &Factor, t: &mut Tile, search: bool) {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    // column by column, as the weights: errors, and levels, which are integers of a byte in every grid
    let mut errors = vec![0f32; PANEL * rows];
    let mut levels = vec![0i8; PANEL * rows];
    let [mut scales, mut offsets, mut inverses] = [(); 3].map(|()| vec![0f32; rows]);
    let mut x = [[0f32; PANEL]; LANES];
    if g.row && search {
        let mut row = vec![0f32; n];
        for (r, heads) in t.heads.chunks_exact_mut(blocks).enumerate() {
            row.iter_mut().zip(t.w[r..].iter().step_by(rows)).for_each(|(x, w)| *x = *w);
            heads.fill(search::row(l, &row, &f.costs));
        }
    }
    for p0 in (0..n).step_by(PANEL) {
        let p1 = (p0 + PANEL).min(n);
        for c0 in (p0..p1).step_by(g.sub) {
            let (block, sub) = (c0 / g.block, c0 % g.block / g.sub);
            take(f, &mut t.w, &errors, rows, (p0, p0), (c0, c0 + g.sub));
            // a block of several sub-blocks is a panel: there is nothing yet that its later columns would have to take
            let width = if sub == 0 { g.block } else { g.sub };
            let anew = search && !g.row && (sub == 0 || matches!(g.scales, Scales::Ints { .. }));
            let costs = &f.costs[c0..c0 + width];
            for r in (0..rows).step_by(LANES).filter(|_| anew) {
                gather(&t.w, (rows, r), c0, width, &mut x);
                for (i, x) in x.iter().enumerate() {
                    let head = &mut t.heads[(r + i) * blocks + block];
                    match sub {
                        0 => *head = search::search(g, l, &x[..width], costs),
                        _ => search::again(g, l, head, sub, &x[..width], costs),
                    }
                }
            }
            for r in 0..rows {
                (scales[r], offsets[r]) = t.heads[r * blocks + block].line(g, sub);
                inverses[r] = if scales[r] != 0.0 { 1.0 / scales[r] } else { 0.0 };
            }
            for c in (c0..c0 + g.sub).step_by(STEP) {
                take(f, &mut t.w, &errors, rows, (p0, c0), (c, c + STEP));
                let mut r = 0;
                while r < rows {
                    let work = Columns { f, rows, r, c, p0, lines: [&scales[r..], &offsets[r..], &inverses[r..]] };
                    r += match rows - r {
                        LANES => work.round::<L, 1>(l, &t.w, &mut errors, &mut levels),
                        _ => work.round::<L, 2>(l, &t.w, &mut errors, &mut levels),
                    };
                }
            }
        }
        place(g, l, t, &levels, (p0, p1));
        carry(f, &mut t.w, &errors, rows, (p0, p1), (p1, n));
    }
}

/// What the errors of a panel's columns do to those right of it: `w −= Uᵀ e`.
#[inline(always)]
fn carry(f: &Factor, w: &mut [f32], errors: &[f32], rows: usize, own: (usize, usize), rest: (usize, usize)) {
    let (width, columns) = (own.1 - own.0, rest.1 - rest.0);
    let u = View::new(&f.u, f.n, f.n).part((own.0, rest.0), width, columns);
    let moved = ViewMut::new(&mut w[rest.0 * rows..rest.1 * rows], columns, rows);
    add_times_whole(moved, u.transpose(), View::new(&errors[..width * rows], width, rows), -1.0);
}

/// The same for the columns `own` of a panel that starts at `p0`: they take the errors of its columns from `first` to their own
/// first.
#[inline(always)]
fn take(f: &Factor, w: &mut [f32], errors: &[f32], rows: usize, (p0, first): (usize, usize), own: (usize, usize)) {
    let errors = &errors[(first - p0) * rows..(own.0 - p0) * rows];
    let u = &f.u[first * f.n + own.0..];
    carry::take(&Errors { errors, rows, u, n: f.n }, &mut w[own.0 * rows..own.1 * rows]);
}

/// `width` columns from `c0` on of sixteen rows, as rows.
#[inline(always)]
fn gather(w: &[f32], (rows, r): (usize, usize), c0: usize, width: usize, x: &mut [[f32; PANEL]; LANES]) {
    for j in 0..width {
        let column = &w[(c0 + j) * rows + r..][..LANES];
        for i in 0..LANES {
            x[i][j] = column[i];
        }
    }
}

/// [`STEP`] columns from `c` on, for some rows from `r` on.
struct Columns<'a> {
    f: &'a Factor,
    rows: usize,
    r: usize,
    c: usize,
    /// The panel's first column.
    p0: usize,
    /// Scales, offsets and inverse scales of the rows from `r` on.
    lines: [&'a [f32]; 3],
}

/// Some rows' numbers in work.
type Rows<const G: usize> = [[f32; LANES]; G];

impl Columns<'_> {
    /// Rounds them for `G` times sixteen rows; returns how many rows.
    #[inline(always)]
    fn round<L: Levels, const G: usize>(&self, l: L, w: &[f32], errors: &mut [f32], levels: &mut [i8]) -> usize {
        let mut x = [[[0f32; LANES]; G]; STEP];
        for (j, x) in x.iter_mut().enumerate() {
            x.as_flattened_mut().copy_from_slice(&w[(self.c + j) * self.rows + self.r..][..G * LANES]);
        }
        let lines = self.lines.map(|l| l.as_chunks().0[..G].try_into().expect("so many rows are left"));
        // written out, so that the columns stay in registers
        self.one::<L, G, 0>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 1>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 2>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 3>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 4>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 5>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 6>(l, &lines, &mut x, errors, levels);
        self.one::<L, G, 7>(l, &lines, &mut x, errors, levels);
        G * LANES
    }

    /// Column `J` of them; the later ones take its error.
    #[inline(always)]
    fn one<L: Levels, const G: usize, const J: usize>(
        &self,
        l: L,
        [scale, offset, inverse]: &[&Rows<G>; 3],
        x: &mut [Rows<G>; STEP],
        errors: &mut [f32],
        levels: &mut [i8],
    ) {
        let u = &self.f.u[(self.c + J) * self.f.n + self.c..][..STEP];
        let cost = 1.0 / u[J];
        let at = (self.c - self.p0 + J) * self.rows + self.r;
        let errors = errors[at..].as_chunks_mut::<LANES>().0;
        let levels = levels[at..].as_chunks_mut::<LANES>().0;
        for h in 0..G {
            let (own, mut level, mut error) = (x[J][h], [0f32; LANES], [0f32; LANES]);
            for i in 0..LANES {
                level[i] = l.level((own[i] - offset[h][i]) * inverse[h][i]);
                error[i] = (own[i] - (scale[h][i] * level[i] + offset[h][i])) * cost;
            }
            for k in J + 1..STEP {
                for i in 0..LANES {
                    x[k][h][i] = (-error[i]).mul_add(u[k], x[k][h][i]);
                }
            }
            errors[h] = error;
            for i in 0..LANES {
                // SAFETY: levels are integers of a byte, none is NaN.
                levels[h][i] = unsafe { level[i].to_int_unchecked::<i32>() } as i8;
            }
        }
    }
}

/// Codes and values of a panel's columns from their levels, which stand column by column.
#[inline(always)]
fn place<L: Levels>(g: &Grid, l: L, t: &mut Tile, levels: &[i8], (p0, p1): (usize, usize)) {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    for r in (0..rows).step_by(LANES) {
        for c in (p0..p1).step_by(LANES) {
            let square: [[i8; LANES]; LANES] =
                std::array::from_fn(|j| levels[(c - p0 + j) * rows + r..].as_chunks().0[0]);
            for (i, row) in transpose(square).iter().enumerate() {
                let (scale, offset) = t.heads[(r + i) * blocks + c / g.block].line(g, c % g.block / g.sub);
                let at = (r + i) * n + c;
                let codes = &mut t.codes[at..].as_chunks_mut::<LANES>().0[0];
                let values = &mut t.values[at..].as_chunks_mut::<LANES>().0[0];
                for j in 0..LANES {
                    let level = f32::from(row[j]);
                    codes[j] = l.code(level);
                    values[j] = scale * level + offset;
                }
            }
        }
    }
}

/// Rows for columns: four times, each row of the lower half goes between those of the upper.
#[inline(always)]
fn transpose(mut square: [[i8; LANES]; LANES]) -> [[i8; LANES]; LANES] {
    for _ in 0..4 {
        square = std::array::from_fn(|i| {
            let (a, b, half) = (&square[i / 2], &square[i / 2 + LANES / 2], i % 2 * (LANES / 2));
            std::array::from_fn(|k| if k % 2 == 0 { a[half + k / 2] } else { b[half + k / 2] })
        });
    }
    square
}
