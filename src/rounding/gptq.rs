//! GPTQ on block formats: column by column, with the format's own grid.
//!
//! Frantar et al. 2023, algorithm 1, for a tile of rows. When the first column of a block is reached, everything that the
//! block stores is searched on the weights as the errors so far have moved them ([`super::search`]); the integers of a
//! sub-block once more when its own first column is reached. Columns of a sub-block go one by one, sixteen rows at a time;
//! what their errors do to the rest of the panel, and a panel's to the rest of the row, are products of matrices.

use super::factor::Factor;
use super::levels::{LANES, Levels};
use super::search::{self, Head};
use crate::formats::grid::{Grid, Scales};
use crate::linalg::{View, ViewMut, add_times};

/// Columns of a panel: a super-block.
pub const PANEL: usize = 256;

/// Rows of a matrix in work: `rows` is a multiple of [`LANES`], the last ones may be zero.
pub struct Tile {
    pub rows: usize,
    pub n: usize,
    /// `[rows, n]`: the weights; after [`gptq`] as the errors moved them.
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
        let mut padded = w.to_vec();
        padded.resize(rows * n, 0.0);
        Tile {
            rows,
            n,
            w: padded,
            codes: vec![0; rows * n],
            heads: vec![Head::default(); rows * (n / g.block)],
            values: vec![0.0; rows * n],
        }
    }
}

/// Rounds the tile; with `search`, finds the scales as well.
#[inline(always)]
pub fn gptq<L: Levels>(g: &Grid, l: L, f: &Factor, t: &mut Tile, search: bool) {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    let mut errors = vec![0f32; rows * PANEL];
    for p0 in (0..n).step_by(PANEL) {
        let p1 = (p0 + PANEL).min(n);
        for b0 in (p0..p1).step_by(g.block) {
            for r in (0..rows).filter(|_| search) {
                let x = &t.w[r * n + b0..][..g.block];
                t.heads[r * blocks + b0 / g.block] = search::search(g, l, x, &f.costs[b0..b0 + g.block]);
            }
            for sub in 0..g.subs() {
                let c0 = b0 + sub * g.sub;
                if search && sub > 0 && matches!(g.scales, Scales::Ints { .. }) {
                    for r in 0..rows {
                        let x = &t.w[r * n + c0..][..g.sub];
                        let head = &mut t.heads[r * blocks + b0 / g.block];
                        search::again(g, l, head, sub, x, &f.costs[c0..c0 + g.sub]);
                    }
                }
                for r in (0..rows).step_by(LANES) {
                    let lines: [(f32, f32); LANES] =
                        std::array::from_fn(|i| t.heads[(r + i) * blocks + b0 / g.block].line(g, sub));
                    columns(g, l, f, t, &mut errors, (r, c0, p0), &lines);
                }
                let c1 = c0 + g.sub;
                let rest = ViewMut::new(&mut t.w, rows, n).part((0, c1), rows, p1 - c1);
                let own = View::new(&errors, rows, PANEL).part((0, c0 - p0), rows, g.sub);
                add_times(rest, own, View::new(&f.u, n, n).part((c0, c1), g.sub, p1 - c1), -1.0);
            }
        }
        let rest = ViewMut::new(&mut t.w, rows, n).part((0, p1), rows, n - p1);
        let own = View::new(&errors, rows, PANEL).part((0, 0), rows, p1 - p0);
        add_times(rest, own, View::new(&f.u, n, n).part((p0, p1), p1 - p0, n - p1), -1.0);
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
    let n = t.n;
    let mut w = [[0f32; LANES]; 256];
    let w = &mut w[..g.sub];
    for i in 0..LANES {
        for (j, w) in w.iter_mut().enumerate() {
            w[i] = t.w[(r + i) * n + c0 + j];
        }
    }
    let scale: [f32; LANES] = std::array::from_fn(|i| lines[i].0);
    let offset: [f32; LANES] = std::array::from_fn(|i| lines[i].1);
    let inverse: [f32; LANES] = std::array::from_fn(|i| if scale[i] != 0.0 { 1.0 / scale[i] } else { 0.0 });
    for j in 0..g.sub {
        let u = &f.u[(c0 + j) * n + c0..][..g.sub];
        let cost = 1.0 / u[j];
        let (mut level, mut error) = ([0f32; LANES], [0f32; LANES]);
        let mut value = [0f32; LANES];
        for i in 0..LANES {
            level[i] = l.level((w[j][i] - offset[i]) * inverse[i]);
            value[i] = scale[i] * level[i] + offset[i];
            error[i] = (w[j][i] - value[i]) * cost;
        }
        for (w, u) in w[j + 1..].iter_mut().zip(&u[j + 1..]) {
            for i in 0..LANES {
                w[i] -= error[i] * u;
            }
        }
        for i in 0..LANES {
            let at = (r + i) * n + c0 + j;
            t.codes[at] = l.code(level[i]);
            t.values[at] = value[i];
            errors[(r + i) * PANEL + c0 - p0 + j] = error[i];
        }
    }
}
