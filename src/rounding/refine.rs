//! Coordinate descent on everything a block stores, in the Hessian norm.
//!
//! GPTQ decides each column once, with what it knew then. Here `(v − t)ᵀ H (v − t)` of each row (`v` what is stored, `t` the
//! target) falls step by step: a code moves to the level nearest to the minimum along its column; the integers of a sub-block
//! move by one, with the codes as they are or coded anew; an f16 moves to its least-squares place. Only what lowers the error
//! is taken. `G = (V − T) H` is kept up to date: inside a panel by rows of `H`, outside it by a product once per panel.

use super::factor::Factor;
use super::gptq::{PANEL, Tile};
use super::levels::Levels;
use super::search::Head;
use crate::formats::grid::{Grid, Offsets, Scales};
use crate::formats::search::{from_f16_bits, to_f16_bits};
use crate::linalg::{View, ViewMut, add_times, times};

/// Most rounds over a tile.
const ROUNDS: usize = 6;
/// The part by which a round must lower the error for there to be another.
const ENOUGH: f64 = 2e-3;

/// Errors `(v − t)ᵀ H (v − t)` by row, and `G` in `gradient` \[rows, n\].
pub fn errors(f: &Factor, values: &[f32], target: &[f32], gradient: &mut Vec<f32>) -> Vec<f64> {
    let n = f.n;
    let rows = values.len() / n;
    let difference: Vec<f32> = values.iter().zip(target).map(|(v, t)| v - t).collect();
    gradient.clear();
    gradient.resize(rows * n, 0.0);
    times(ViewMut::new(gradient, rows, n), View::new(&difference, rows, n), View::new(&f.h, n, n), 1.0);
    let row = |(d, g): (&[f32], &[f32])| d.iter().zip(g).map(|(d, g)| f64::from(*d) * f64::from(*g)).sum::<f64>();
    difference.chunks_exact(n).zip(gradient.chunks_exact(n)).map(row).collect()
}

/// Descends until a round brings little. Returns the errors by row.
#[inline(always)]
pub fn refine<L: Levels>(g: &Grid, l: L, f: &Factor, t: &mut Tile, target: &[f32]) -> Vec<f64> {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    let mut gradient = Vec::new();
    let mut before: f64 = errors(f, &t.values, target, &mut gradient).iter().sum();
    let mut done = false;
    for round in 0..=ROUNDS {
        // the last round moves codes only, so that each is the best for what is stored beside it
        let last = round == ROUNDS || done;
        for p0 in (0..n).step_by(PANEL) {
            let p1 = (p0 + PANEL).min(n);
            let width = p1 - p0;
            let mut moved = vec![0f32; rows * width];
            for r in 0..rows {
                let mut row = Row {
                    f,
                    p0,
                    width,
                    gradient: &mut gradient[r * n + p0..][..width],
                    values: &mut t.values[r * n + p0..][..width],
                };
                let moved = &mut moved[r * width..][..width];
                moved.copy_from_slice(row.values);
                for b0 in (0..width).step_by(g.block) {
                    let codes = &mut t.codes[r * n + p0 + b0..][..g.block];
                    let head = &mut t.heads[r * blocks + (p0 + b0) / g.block];
                    row.block(g, l, head, codes, b0, last);
                }
                moved.iter_mut().zip(&*row.values).for_each(|(m, v)| *m = v - *m);
            }
            for (from, to) in [(0, p0), (p1, n)] {
                let rest = ViewMut::new(&mut gradient, rows, n).part((0, from), rows, to - from);
                let h = View::new(&f.h, n, n).part((p0, from), width, to - from);
                add_times(rest, View::new(&moved, rows, width), h, 1.0);
            }
        }
        // not the sum that was kept up to date: its rounding adds up
        let now = errors(f, &t.values, target, &mut gradient);
        if last {
            return now;
        }
        let sum: f64 = now.iter().sum();
        done = sum > before * (1.0 - ENOUGH);
        before = sum;
    }
    errors(f, &t.values, target, &mut gradient)
}

/// One row of a panel.
pub(super) struct Row<'a> {
    pub f: &'a Factor,
    pub p0: usize,
    pub width: usize,
    pub gradient: &'a mut [f32],
    pub values: &'a mut [f32],
}

impl Row<'_> {
    /// Row `j` of the panel's Hessian.
    #[inline(always)]
    pub fn h(&self, j: usize) -> &[f32] {
        &self.f.h[(self.p0 + j) * self.f.n + self.p0..][..self.width]
    }

    /// Moves a value.
    #[inline(always)]
    pub fn step(&mut self, j: usize, delta: f32) {
        self.values[j] += delta;
        let h = &self.f.h[(self.p0 + j) * self.f.n + self.p0..][..self.width];
        self.gradient.iter_mut().zip(h).for_each(|(g, h)| *g += delta * h);
    }

    #[inline(always)]
    fn block<L: Levels>(&mut self, g: &Grid, l: L, head: &mut Head, codes: &mut [u8], b0: usize, only_codes: bool) {
        for sub in 0..g.subs() {
            let at = sub * g.sub;
            self.codes(l, head.line(g, sub), &mut codes[at..at + g.sub], b0 + at);
            if !only_codes && matches!(g.scales, Scales::Ints { .. }) {
                self.ints(g, l, head, sub, &mut codes[at..at + g.sub], b0 + at);
            }
        }
        if only_codes {
            return;
        }
        if g.scales != Scales::E8M0 && !g.row {
            self.shared(g, l, head, codes, b0, false);
        }
        if g.offsets != Offsets::None {
            self.shared(g, l, head, codes, b0, true);
        }
    }

    /// Each code of a sub-block to the level nearest to the minimum along its column.
    #[inline(always)]
    fn codes<L: Levels>(&mut self, l: L, (scale, offset): (f32, f32), codes: &mut [u8], at: usize) {
        if scale == 0.0 {
            return;
        }
        let inverse = 1.0 / scale;
        for (i, code) in codes.iter_mut().enumerate() {
            let j = at + i;
            let best = self.values[j] - self.gradient[j] / self.h(j)[j];
            let level = l.level((best - offset) * inverse);
            let new = l.code(level);
            if new != *code {
                let delta = scale * level + offset - self.values[j];
                // a tie, or a minimum between two levels that is nearer to the old one by rounding alone
                if delta * (2.0 * self.gradient[j] + delta * self.h(j)[j]) < 0.0 {
                    *code = new;
                    self.step(j, delta);
                }
            }
        }
    }

    /// What moving the values of a sub-block by `delta` does to the error.
    #[inline(always)]
    fn gain(&self, at: usize, delta: &[f32]) -> f32 {
        let mut sum = 0.0;
        for (i, d) in delta.iter().enumerate() {
            if *d != 0.0 {
                let h = &self.h(at + i)[at..at + delta.len()];
                let mut lanes = [0f32; 16];
                for (h, e) in h.as_chunks::<16>().0.iter().zip(delta.as_chunks::<16>().0) {
                    for k in 0..16 {
                        lanes[k] += h[k] * e[k];
                    }
                }
                sum += d * (2.0 * self.gradient[at + i] + super::levels::total(lanes));
            }
        }
        sum
    }

    /// The integers of a sub-block by one, with the codes as they are or anew.
    #[inline(always)]
    fn ints<L: Levels>(&mut self, g: &Grid, l: L, head: &mut Head, sub: usize, codes: &mut [u8], at: usize) {
        let Scales::Ints { lo, hi } = g.scales else { return };
        let most = match g.offsets {
            Offsets::Ints { hi } => hi,
            _ => 0,
        };
        let (mut best, mut chosen) = (0f32, None);
        let mut best_delta = [0f32; 32];
        let mut best_codes = [0u8; 32];
        for (a, b) in [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1)] {
            let (s, o) = (i32::from(head.scales[sub]) + a, i32::from(head.offsets[sub]) + b);
            if s < lo || s > hi || o < 0 || o > most {
                continue;
            }
            let mut tried = *head;
            (tried.scales[sub], tried.offsets[sub]) = (s as i16, o as i16);
            let (scale, offset) = tried.line(g, sub);
            let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
            for anew in [false, true] {
                let (mut delta, mut new) = ([0f32; 32], [0u8; 32]);
                for (i, code) in codes.iter().enumerate() {
                    let j = at + i;
                    let level = if anew {
                        l.level((self.values[j] - self.gradient[j] / self.h(j)[j] - offset) * inverse)
                    } else {
                        l.value(*code)
                    };
                    new[i] = l.code(level);
                    delta[i] = scale * level + offset - self.values[j];
                }
                let gain = self.gain(at, &delta[..g.sub]);
                if gain < best {
                    (best, chosen) = (gain, Some(tried));
                    (best_delta, best_codes) = (delta, new);
                }
            }
        }
        if let Some(tried) = chosen {
            *head = tried;
            codes.copy_from_slice(&best_codes[..g.sub]);
            for (i, d) in best_delta[..g.sub].iter().enumerate() {
                if *d != 0.0 {
                    self.step(at + i, *d);
                }
            }
        }
    }

    /// The f16 of the scales (or of the offsets) of a block to its least-squares place.
    #[inline(always)]
    fn shared<L: Levels>(&mut self, g: &Grid, l: L, head: &mut Head, codes: &[u8], b0: usize, offsets: bool) {
        let mut along = [0f32; 256];
        let along = &mut along[..g.block];
        for (i, (a, code)) in along.iter_mut().zip(codes).enumerate() {
            let sub = i / g.sub;
            *a = match (offsets, g.scales, g.offsets) {
                (true, _, Offsets::Ints { .. }) => -f32::from(head.offsets[sub]),
                (true, ..) => 1.0,
                (false, Scales::Ints { .. }, _) => f32::from(head.scales[sub]) * l.value(*code),
                (false, ..) => l.value(*code),
            };
        }
        let signed = !(offsets && matches!(g.offsets, Offsets::Ints { .. }));
        let place = if offsets { &mut head.m } else { &mut head.d };
        self.line(place, b0, along, signed);
    }

    /// The f16 whose multiples `along` are part of the values from `b0` to its least-squares place; `signed`: it may be below
    /// zero.
    #[inline(always)]
    pub fn line(&mut self, place: &mut u16, b0: usize, along: &[f32], signed: bool) {
        let mut moved = [0f32; 256];
        let moved = &mut moved[..self.width];
        for (i, a) in along.iter().enumerate() {
            if *a != 0.0 {
                moved.iter_mut().zip(self.h(b0 + i)).for_each(|(m, h)| *m += a * h);
            }
        }
        let slope: f32 = along.iter().zip(&self.gradient[b0..]).map(|(a, g)| a * g).sum();
        let curve: f32 = along.iter().zip(&moved[b0..]).map(|(a, m)| a * m).sum();
        if curve.is_nan() || curve <= 0.0 {
            return;
        }
        let old = from_f16_bits(*place);
        let bits = to_f16_bits(old - slope / curve);
        let new = from_f16_bits(bits);
        let delta = new - old;
        if new.is_finite() && delta != 0.0 && (signed || new >= 0.0) && delta * (2.0 * slope + delta * curve) < 0.0 {
            *place = bits;
            self.gradient.iter_mut().zip(&*moved).for_each(|(g, m)| *g += delta * m);
            self.values[b0..].iter_mut().zip(along).for_each(|(v, a)| *v += delta * a);
        }
    }
}
