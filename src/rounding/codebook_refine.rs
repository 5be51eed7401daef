//! Coordinate descent on vector codebooks, in the Hessian norm.
//!
//! As [`super::refine`], with units in place of codes: a unit goes to the point nearest to its minimum with all others as they
//! are; the scale of a sub-block moves by one, with the points as they are or chosen anew; `d` goes to its least-squares
//! place. Only what lowers the error is taken.

use super::codebook::{Chosen, Norms, UNIT, nearest, unit};
use super::codebook_gptq::{SUB, TOP, Tile, UNITS, store};
use super::factor::Factor;
use super::refine::{Moves, Row, error, errors};
use crate::formats::iq::codebook::{BLOCK, Codebook, Parts};
use crate::formats::search::from_f16_bits;

/// Most rounds over a tile.
const ROUNDS: usize = 4;
/// The part by which a round must lower the error for there to be another.
const ENOUGH: f64 = 4e-3;

/// Descends until a round brings little. Returns the errors by row.
#[inline(always)]
pub fn refine<const K: usize, const EVEN: bool>(
    c: &Codebook,
    norms: &Norms,
    f: &Factor,
    t: &mut Tile,
    target: &[f32],
) -> Vec<f64> {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / BLOCK;
    let mut gradient = Vec::new();
    let mut before: f64 = errors(f, &t.values, target, &mut gradient).iter().sum();
    let (mut moves, mut before_row) = (Moves::default(), [0f32; BLOCK]);
    for round in 0..=ROUNDS {
        for (b, p0) in (0..n).step_by(BLOCK).enumerate() {
            moves.clear();
            for r in 0..rows {
                let mut row = Row {
                    f,
                    p0,
                    width: BLOCK,
                    gradient: &mut gradient[r * n + p0..][..BLOCK],
                    values: &mut t.values[r * n + p0..][..BLOCK],
                };
                before_row.copy_from_slice(row.values);
                let i = r * blocks + b;
                block::<K, EVEN>(&mut row, (c, norms), &mut t.d[i], &mut t.parts[i], round < ROUNDS);
                moves.add(r, &before_row, row.values);
            }
            moves.spread(f, &mut gradient, (p0, p0 + BLOCK));
        }
        let now = error(&t.values, target, &gradient);
        if now > before * (1.0 - ENOUGH) {
            break;
        }
        before = now;
    }
    // rounding adds up in what was kept up to date
    errors(f, &t.values, target, &mut gradient)
}

#[inline(always)]
fn block<const K: usize, const EVEN: bool>(
    row: &mut Row<'_>,
    (c, norms): (&Codebook, &Norms),
    d: &mut u16,
    parts: &mut Parts,
    all: bool,
) {
    let k = unit(c);
    for sub in 0..BLOCK / c.sub {
        let at = sub * c.sub;
        let scale = c.scale(from_f16_bits(*d), parts.scales[sub]);
        for u in (at..at + c.sub).step_by(k) {
            let chosen = best::<K, EVEN>(row, (c, norms), u, &row.gradient[u..u + k], scale);
            let delta: [f32; UNIT] =
                std::array::from_fn(|i| if i < k { chosen.values[i] - row.values[u + i] } else { 0.0 });
            if gain(row, u, &delta[..k]) < 0.0 {
                store(c, parts, u, &chosen);
                row.steps(u, &delta[..k]);
            }
        }
        if all {
            rescale::<K, EVEN>(row, (c, norms), *d, parts, sub);
        }
    }
    if all {
        shared(row, d, c, parts);
    }
}

/// The choice nearest to the minimum of unit `u` (its first column in the panel) with gradient `g`.
#[inline(always)]
fn best<const K: usize, const EVEN: bool>(
    row: &Row<'_>,
    (c, norms): (&Codebook, &Norms),
    u: usize,
    g: &[f32],
    scale: f32,
) -> Chosen {
    let i = (row.p0 + u) / unit(c);
    let mut to = [0f32; UNIT];
    for (j, to) in to[..g.len()].iter_mut().enumerate() {
        let step: f32 = g.iter().zip(&norms.inverse[i]).map(|(g, h)| g * h[j]).sum();
        *to = row.values[u + j] - step;
    }
    nearest::<K, EVEN>(c, &norms.alone[i], &to, scale)
}

/// What moving the values from `at` by `delta` does to the error.
#[inline(always)]
fn gain(row: &Row<'_>, at: usize, delta: &[f32]) -> f32 {
    let mut sum = 0.0;
    for (i, d) in delta.iter().enumerate() {
        let h = &row.h(at + i)[at..at + delta.len()];
        let along: f32 = h.iter().zip(delta).map(|(h, e)| h * e).sum();
        sum += d * (2.0 * row.gradient[at + i] + along);
    }
    sum
}

/// The scale of a sub-block by one, with the points as they are or anew.
#[inline(always)]
fn rescale<const K: usize, const EVEN: bool>(
    row: &mut Row<'_>,
    (c, norms): (&Codebook, &Norms),
    d: u16,
    parts: &mut Parts,
    sub: usize,
) {
    let (at, k, old) = (sub * c.sub, unit(c), parts.scales[sub]);
    let (mut least, mut moves, mut to, mut anew) = (0f32, [0f32; SUB], old, None);
    for s in [old.wrapping_sub(1), old + 1] {
        if s > TOP {
            continue;
        }
        let scale = c.scale(from_f16_bits(d), s);
        let by = f32::from(2 * s + 1) / f32::from(2 * old + 1) - 1.0;
        let delta: [f32; SUB] = std::array::from_fn(|i| if i < c.sub { by * row.values[at + i] } else { 0.0 });
        let same = gain(row, at, &delta[..c.sub]);
        if same < least {
            (least, moves, to, anew) = (same, delta, s, None);
        }
        let mut g: [f32; SUB] = std::array::from_fn(|i| if i < c.sub { row.gradient[at + i] } else { 0.0 });
        let mut delta = [0f32; SUB];
        let mut chosen = [Chosen::default(); UNITS];
        for (u, chosen) in (0..c.sub).step_by(k).zip(&mut chosen) {
            *chosen = best::<K, EVEN>(row, (c, norms), at + u, &g[u..u + k], scale);
            for i in 0..k {
                delta[u + i] = chosen.values[i] - row.values[at + u + i];
                let h = &row.h(at + u + i)[at..at + c.sub];
                g.iter_mut().zip(h).for_each(|(g, h)| *g += delta[u + i] * h);
            }
        }
        let new = gain(row, at, &delta[..c.sub]);
        if new < least {
            (least, moves, to, anew) = (new, delta, s, Some(chosen));
        }
    }
    if to == old {
        return;
    }
    parts.scales[sub] = to;
    if let Some(chosen) = anew {
        (0..c.sub).step_by(k).zip(&chosen).for_each(|(u, chosen)| store(c, parts, at + u, chosen));
    }
    row.steps(at, &moves[..c.sub]);
}

/// `d` of a block to its least-squares place.
#[inline(always)]
fn shared(row: &mut Row<'_>, d: &mut u16, c: &Codebook, parts: &Parts) {
    let mut along = [0f32; BLOCK];
    for (at, along) in along.chunks_exact_mut(c.dim).enumerate() {
        let magnitudes = c.magnitudes(parts.points[at]);
        for (i, a) in along.iter_mut().enumerate() {
            let at = at * c.dim + i;
            let scale = c.scale(1.0, parts.scales[at / c.sub]);
            *a = if parts.signs[at / 8] >> (at % 8) & 1 == 1 { -scale * magnitudes[i] } else { scale * magnitudes[i] };
        }
    }
    row.line(d, 0, &along, false);
}
