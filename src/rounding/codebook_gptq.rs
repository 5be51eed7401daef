//! GPTQ on vector codebooks: unit by unit, each point chosen in the norm of its own columns ([`super::codebook`]).
//!
//! As [`super::gptq`], with units of four or eight columns in place of columns: what a unit's error does to later columns
//! goes through its rows of the factor. The `d` of a block and first scales of its sub-blocks come from ggml's search on the
//! weights as the errors so far moved them; when a sub-block is reached, its scale climbs down from there: the next lower
//! and the next higher are tried with all points of the sub-block chosen anew, as long as that costs less.

use super::RoundingError;
use super::codebook::{Chosen, Norms, UNIT, nearest, unit};
use super::factor::Factor;
use crate::formats::iq::codebook::{BLOCK, Codebook, Parts};
use crate::formats::search::from_f16_bits;
use crate::linalg::{View, ViewMut, add_times};

/// Most units of a sub-block.
pub const UNITS: usize = 8;
/// Most columns of a sub-block.
pub const SUB: usize = 32;
/// The highest scale.
pub const TOP: u8 = 15;

/// Rows in work.
pub struct Tile {
    pub rows: usize,
    pub n: usize,
    /// `[rows, n]`: the weights; after [`gptq`] as the errors moved them.
    pub w: Vec<f32>,
    /// Bits of the f16 of blocks, `[rows, blocks]`.
    pub d: Vec<u16>,
    pub parts: Vec<Parts>,
    /// `[rows, n]`: what is stored.
    pub values: Vec<f32>,
}

impl Tile {
    pub fn new(w: &[f32], n: usize) -> Tile {
        let blocks = w.len() / BLOCK;
        Tile {
            rows: w.len() / n,
            n,
            w: w.to_vec(),
            d: vec![0; blocks],
            parts: vec![Parts::default(); blocks],
            values: vec![0.0; w.len()],
        }
    }
}

/// Stores a choice for the unit whose first value is value `at` of the block.
#[inline(always)]
pub fn store(c: &Codebook, p: &mut Parts, at: usize, chosen: &Chosen) {
    let k = unit(c);
    for part in 0..k / c.dim {
        p.points[at / c.dim + part] = chosen.points[part];
    }
    let mask = if k == UNIT { 0xff } else { 0x0f << (at % UNIT) };
    let signs = &mut p.signs[at / UNIT];
    *signs = *signs & !mask | (chosen.signs << (at % UNIT)) & mask;
}

/// The units of a sub-block from column `c0` at a scale, each error carried to the later ones. Returns the cost.
#[inline(always)]
fn units<const K: usize, const EVEN: bool>(
    (c, norms, f): (&Codebook, &Norms, &Factor),
    c0: usize,
    w: &[f32],
    scale: f32,
    out: &mut [Chosen; UNITS],
) -> f32 {
    let k = unit(c);
    let mut w: [f32; SUB] = std::array::from_fn(|i| if i < c.sub { w[i] } else { 0.0 });
    let mut cost = 0.0;
    for (at, out) in (0..c.sub).step_by(k).zip(out) {
        *out = nearest::<K, EVEN>(c, &norms.later[(c0 + at) / k], &w[at..at + k], scale);
        cost += out.cost;
        for i in 0..k {
            let u = &f.u[(c0 + at + i) * f.n + c0..][..c.sub];
            for j in at + k..c.sub {
                w[j] -= out.z[i] * u[j];
            }
        }
    }
    cost
}

/// Rounds the tile.
#[inline(always)]
pub fn gptq<const K: usize, const EVEN: bool>(
    c: &Codebook,
    norms: &Norms,
    f: &Factor,
    t: &mut Tile,
) -> Result<(), RoundingError> {
    let (rows, n, k) = (t.rows, t.n, unit(c));
    let blocks = n / BLOCK;
    let format = crate::formats::format(c.ty).expect("it has a codebook");
    let mut errors = vec![0f32; rows * BLOCK];
    let mut coded = vec![0u8; c.ty.block_bytes()];
    for (b, p0) in (0..n).step_by(BLOCK).enumerate() {
        for r in 0..rows {
            let x = &t.w[r * n + p0..][..BLOCK];
            format.encode(x, BLOCK, Some(&f.costs[p0..p0 + BLOCK]), &mut coded)?;
            (t.d[r * blocks + b], t.parts[r * blocks + b].scales) = c.head(&coded);
        }
        for sub in 0..BLOCK / c.sub {
            let c0 = p0 + sub * c.sub;
            for r in 0..rows {
                let d = from_f16_bits(t.d[r * blocks + b]);
                let parts = &mut t.parts[r * blocks + b];
                let w = &t.w[r * n + c0..][..c.sub];
                let mut best = [Chosen::default(); UNITS];
                let mut s = parts.scales[sub];
                let mut cost = units::<K, EVEN>((c, norms, f), c0, w, c.scale(d, s), &mut best);
                for up in [false, true] {
                    let from = s;
                    loop {
                        let next = if up { s + 1 } else { s.wrapping_sub(1) };
                        if next > TOP {
                            break;
                        }
                        let mut tried = [Chosen::default(); UNITS];
                        let now = units::<K, EVEN>((c, norms, f), c0, w, c.scale(d, next), &mut tried);
                        if now >= cost {
                            break;
                        }
                        (cost, s, best) = (now, next, tried);
                    }
                    if s != from {
                        break;
                    }
                }
                parts.scales[sub] = s;
                for (i, chosen) in best[..c.sub / k].iter().enumerate() {
                    let at = c0 + i * k;
                    store(c, parts, at - p0, chosen);
                    t.values[r * n + at..][..k].copy_from_slice(&chosen.values[..k]);
                    errors[r * BLOCK + at - p0..][..k].copy_from_slice(&chosen.z[..k]);
                }
            }
            let (c1, p1) = (c0 + c.sub, p0 + BLOCK);
            let rest = ViewMut::new(&mut t.w, rows, n).part((0, c1), rows, p1 - c1);
            let own = View::new(&errors, rows, BLOCK).part((0, c0 - p0), rows, c.sub);
            add_times(rest, own, View::new(&f.u, n, n).part((c0, c1), c.sub, p1 - c1), -1.0);
        }
        let p1 = p0 + BLOCK;
        let rest = ViewMut::new(&mut t.w, rows, n).part((0, p1), rows, n - p1);
        let u = View::new(&f.u, n, n).part((p0, p1), BLOCK, n - p1);
        add_times(rest, View::new(&errors, rows, BLOCK), u, -1.0);
    }
    Ok(())
}
