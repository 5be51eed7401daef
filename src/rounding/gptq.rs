//! GPTQ on block formats: column by column, with the format's own grid.
//!
//! Frantar et al. 2023, algorithm 1, for a tile of rows. When the first column of a block is reached, everything that the
//! block stores is searched on the weights as the errors so far have moved them ([`super::search`]); the integers of a
//! sub-block once more when its own first column is reached. Columns of a sub-block go one by one, sixteen rows at a time;
//! what their errors do to the rest of the panel, and a panel's to the rest of the row, are products of matrices. Weights and
//! errors stand column by column meanwhile: what is moved is then one run of memory, and lanes are rows.

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
    /// `[n, rows]`: the weights, column by column; after [`gptq`] as the errors moved them.
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

/// Rounds the tile; with `search`, finds the scales as well.
#[inline(always)]
pub fn gptq<L: Levels>(g: &Grid, l: L, f: &Factor, t: &mut Tile, search: bool) {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    // column by column, as the weights
    let mut errors = vec![0f32; PANEL * rows];
    let mut x = [[0f32; PANEL]; LANES];
    for p0 in (0..n).step_by(PANEL) {
        let p1 = (p0 + PANEL).min(n);
        for b0 in (p0..p1).step_by(g.block) {
            let costs = &f.costs[b0..b0 + g.block];
            for r in (0..rows).step_by(LANES).filter(|_| search) {
                gather(&t.w, (rows, r), b0, g.block, &mut x);
                for (i, x) in x.iter().enumerate() {
                    t.heads[(r + i) * blocks + b0 / g.block] = search::search(g, l, &x[..g.block], costs);
                }
            }
            for sub in 0..g.subs() {
                let c0 = b0 + sub * g.sub;
                let costs = &f.costs[c0..c0 + g.sub];
                let again = search && sub > 0 && matches!(g.scales, Scales::Ints { .. });
                for r in (0..rows).step_by(LANES).filter(|_| again) {
                    gather(&t.w, (rows, r), c0, g.sub, &mut x);
                    for (i, x) in x.iter().enumerate() {
                        let head = &mut t.heads[(r + i) * blocks + b0 / g.block];
                        search::again(g, l, head, sub, &x[..g.sub], costs);
                    }
                }
                for r in (0..rows).step_by(LANES) {
                    let lines: [(f32, f32); LANES] =
                        std::array::from_fn(|i| t.heads[(r + i) * blocks + b0 / g.block].line(g, sub));
                    columns(g, l, f, t, &mut errors, (r, c0, p0), &lines);
                }
                let c1 = c0 + g.sub;
                carry(f, &mut t.w, &errors[(c0 - p0) * rows..], rows, (c0, c1), (c1, p1));
            }
        }
        carry(f, &mut t.w, &errors, rows, (p0, p1), (p1, n));
    }
}

/// What the errors of the columns `own` do to the columns `rest`: `w −= Uᵀ e`.
#[inline(always)]
fn carry(f: &Factor, w: &mut [f32], errors: &[f32], rows: usize, own: (usize, usize), rest: (usize, usize)) {
    let (width, columns) = (own.1 - own.0, rest.1 - rest.0);
    let u = View::new(&f.u, f.n, f.n).part((own.0, rest.0), width, columns);
    let moved = ViewMut::new(&mut w[rest.0 * rows..rest.1 * rows], columns, rows);
    add_times_whole(moved, u.transpose(), View::new(&errors[..width * rows], width, rows), -1.0);
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

/// The columns of one sub-block for sixteen rows.
#[inline(always)]
fn columns<L: Levels>(
    g: &Grid,
    l: L,
    f: &Factor,
    t: &mut Tile,
    errors: &mut [f32],
    (r, c0, p0): (usize, usize, usize),
    lines: &[(f32, f32); LANES],
) {
    let (rows, n) = (t.rows, t.n);
    let mut w = [[0f32; LANES]; PANEL];
    let w = &mut w[..g.sub];
    for (j, w) in w.iter_mut().enumerate() {
        w.copy_from_slice(&t.w[(c0 + j) * rows + r..][..LANES]);
    }
    let scale: [f32; LANES] = std::array::from_fn(|i| lines[i].0);
    let offset: [f32; LANES] = std::array::from_fn(|i| lines[i].1);
    let inverse: [f32; LANES] = std::array::from_fn(|i| if scale[i] != 0.0 { 1.0 / scale[i] } else { 0.0 });
    for j in 0..g.sub {
        let u = &f.u[(c0 + j) * n + c0..][..g.sub];
        let cost = 1.0 / u[j];
        let own = w[j];
        let (mut level, mut error) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            level[i] = l.level((own[i] - offset[i]) * inverse[i]);
            error[i] = (own[i] - (scale[i] * level[i] + offset[i])) * cost;
        }
        for (w, u) in w[j + 1..].iter_mut().zip(&u[j + 1..]) {
            for i in 0..LANES {
                w[i] -= error[i] * u;
            }
        }
        // from here on the level in place of the weight
        w[j] = level;
        errors[(c0 - p0 + j) * rows + r..][..LANES].copy_from_slice(&error);
    }
    for i in 0..LANES {
        let at = (r + i) * n + c0;
        let places = t.codes[at..][..g.sub].iter_mut().zip(&mut t.values[at..][..g.sub]);
        for ((code, value), w) in places.zip(&*w) {
            *code = l.code(w[i]);
            *value = scale[i] * w[i] + offset[i];
        }
    }
}
