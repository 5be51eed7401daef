//! Coordinate descent on everything a block stores, in the Hessian norm.
//!
//! GPTQ decides each column once, with what it knew then. Here `(v − t)ᵀ H (v − t)` of each row (`v` what is stored, `t` the
//! target) falls step by step: a code moves to the level nearest to the minimum along its column; the integers of a sub-block
//! move by one, with the codes as they are or coded anew; an f16 moves to its least-squares place. Only what lowers the error
//! is taken. `G = (V − T) H` is kept up to date from the first round to the last: inside a panel by rows of `H`, outside it once
//! per panel, by a product of the rows that moved or, where little did, by rows of `H` too.

use super::factor::Factor;
use super::gptq::{PANEL, Tile};
use super::levels::{LANES, Levels, total};
use super::search::Head;
use crate::formats::grid::{Grid, Offsets, Scales};
use crate::formats::search::{from_f16_bits, to_f16_bits};
use crate::linalg::{View, ViewMut, times};

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
    let rows = values.chunks_exact(n).zip(target.chunks_exact(n)).zip(gradient.chunks_exact(n));
    rows.map(|((v, t), g)| error(v, t, g)).collect()
}

/// `Σ (v − t) g`, of a row or of several. By a gradient that was kept up to date it is near enough to decide whether to go on.
#[inline(always)]
pub(super) fn error(values: &[f32], target: &[f32], gradient: &[f32]) -> f64 {
    let terms = values.iter().zip(target).zip(gradient);
    terms.map(|((v, t), g)| f64::from(v - t) * f64::from(*g)).sum()
}

/// Descends until a round brings little. Returns the errors by row.
#[inline(always)]
pub fn refine<L: Levels>(g: &Grid, l: L, f: &Factor, t: &mut Tile, target: &[f32]) -> Vec<f64> {
    let (rows, n) = (t.rows, t.n);
    let blocks = n / g.block;
    let mut gradient = Vec::new();
    let mut before: f64 = errors(f, &t.values, target, &mut gradient).iter().sum();
    let mut done = false;
    let (mut moves, mut before_row) = (Moves::default(), [0f32; PANEL]);
    for round in 0..=ROUNDS {
        // the last round moves codes only, so that each is the best for what is stored beside it
        let last = round == ROUNDS || done;
        for p0 in (0..n).step_by(PANEL) {
            let p1 = (p0 + PANEL).min(n);
            let width = p1 - p0;
            moves.clear();
            for r in 0..rows {
                let mut row = Row {
                    f,
                    p0,
                    width,
                    gradient: &mut gradient[r * n + p0..][..width],
                    values: &mut t.values[r * n + p0..][..width],
                };
                before_row[..width].copy_from_slice(row.values);
                for b0 in (0..width).step_by(g.block) {
                    let codes = &mut t.codes[r * n + p0 + b0..][..g.block];
                    let head = &mut t.heads[r * blocks + (p0 + b0) / g.block];
                    row.block(g, l, head, codes, b0, last);
                }
                moves.add(r, &before_row[..width], row.values);
            }
            moves.spread(f, &mut gradient, (p0, p1));
        }
        if last {
            break;
        }
        let now = error(&t.values, target, &gradient);
        done = now > before * (1.0 - ENOUGH);
        before = now;
    }
    // rounding adds up in what was kept up to date
    errors(f, &t.values, target, &mut gradient)
}

/// What moved in a panel. Most rows do in the first rounds, few in the last ones.
#[derive(Default)]
pub(super) struct Moves {
    rows: Vec<usize>,
    /// `[rows, width]`.
    by: Vec<f32>,
    product: Vec<f32>,
}

/// Where fewer than one of so many values of the rows moved, they are led on one by one.
const SPARSE: usize = 8;

impl Moves {
    pub fn clear(&mut self) {
        self.rows.clear();
        self.by.clear();
    }

    /// Row `r` went from `before` to `after`.
    #[inline(always)]
    pub fn add(&mut self, r: usize, before: &[f32], after: &[f32]) {
        if before != after {
            self.rows.push(r);
            self.by.extend(before.iter().zip(after).map(|(b, a)| a - b));
        }
    }

    /// Leads the moves of panel `p0..p1` on to the gradient `[.., n]` outside of it.
    #[inline(always)]
    pub fn spread(&mut self, f: &Factor, gradient: &mut [f32], (p0, p1): (usize, usize)) {
        let (n, width, rows) = (f.n, p1 - p0, self.rows.len());
        if rows == 0 {
            return;
        }
        let sparse = SPARSE * self.by.iter().filter(|v| **v != 0.0).count() < self.by.len();
        for (from, to) in [(0, p0), (p1, n)].into_iter().filter(|(from, to)| from < to) {
            if sparse {
                for (r, by) in self.rows.iter().zip(self.by.chunks_exact(width)) {
                    let row = &mut gradient[r * n..][from..to];
                    for (j, by) in by.iter().enumerate().filter(|(_, by)| **by != 0.0) {
                        row.iter_mut().zip(&f.h[(p0 + j) * n..][from..to]).for_each(|(g, h)| *g += by * h);
                    }
                }
                continue;
            }
            self.product.resize(rows * (to - from), 0.0);
            let h = View::new(&f.h, n, n).part((p0, from), width, to - from);
            times(ViewMut::new(&mut self.product, rows, to - from), View::new(&self.by, rows, width), h, 1.0);
            for (r, product) in self.rows.iter().zip(self.product.chunks_exact(to - from)) {
                gradient[r * n..][from..to].iter_mut().zip(product).for_each(|(g, p)| *g += p);
            }
        }
    }
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

    /// Moves the values from `at` on.
    #[inline(always)]
    pub fn steps(&mut self, at: usize, delta: &[f32]) {
        for (i, d) in delta.iter().enumerate() {
            if *d != 0.0 {
                self.step(at + i, *d);
            }
        }
    }

    #[inline(always)]
    fn block<L: Levels>(&mut self, g: &Grid, l: L, head: &mut Head, codes: &mut [u8], b0: usize, only_codes: bool) {
        for sub in 0..g.subs() {
            let at = sub * g.sub;
            self.codes(l, head.line(g, sub), &mut codes[at..at + g.sub], b0 + at);
            if !only_codes && matches!(g.scales, Scales::Ints { .. }) {
                let codes = &mut codes[at..at + g.sub];
                match g.sub {
                    16 => self.ints::<L, 16>(g, l, head, sub, codes, b0 + at),
                    32 => self.ints::<L, 32>(g, l, head, sub, codes, b0 + at),
                    n => unreachable!("sub-blocks with integer scales have 16 or 32 weights, not {n}"),
                }
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

    /// Each code of a sub-block to the level nearest to the minimum along its column. Sixteen are looked at side by side, until
    /// one moves; those behind it are looked at again.
    #[inline(always)]
    fn codes<L: Levels>(&mut self, l: L, (scale, offset): (f32, f32), codes: &mut [u8], at: usize) {
        if scale == 0.0 {
            return;
        }
        let inverse = 1.0 / scale;
        for (c, codes) in codes.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let at = at + c * LANES;
            let h: [f32; LANES] = self.diagonal(at);
            let mut from = 0;
            while from < LANES {
                let (values, gradient): ([f32; LANES], [f32; LANES]) =
                    (array(self.values, at), array(self.gradient, at));
                let (mut delta, mut new, mut moves) = ([0f32; LANES], [0u8; LANES], [0u8; LANES]);
                for i in 0..LANES {
                    let level = l.level((values[i] - gradient[i] / h[i] - offset) * inverse);
                    new[i] = l.code(level);
                    delta[i] = scale * level + offset - values[i];
                    // not at a tie, nor where a minimum between two levels is nearer to the old one by rounding alone
                    let lower = delta[i] * (2.0 * gradient[i] + delta[i] * h[i]) < 0.0;
                    moves[i] = u8::from(new[i] != codes[i]) & u8::from(lower);
                }
                let ahead = u128::from_le_bytes(moves) >> (8 * from);
                if ahead == 0 {
                    break;
                }
                let i = from + ahead.trailing_zeros() as usize / 8;
                codes[i] = new[i];
                self.step(at + i, delta[i]);
                from = i + 1;
            }
        }
    }

    /// The diagonal of the Hessian from column `at` of the panel on.
    #[inline(always)]
    fn diagonal<const S: usize>(&self, at: usize) -> [f32; S] {
        array(&self.f.diagonal, self.p0 + at)
    }

    /// The integers of a sub-block by one, with the codes as they are or anew.
    #[inline(always)]
    fn ints<L: Levels, const S: usize>(
        &mut self,
        g: &Grid,
        l: L,
        head: &mut Head,
        sub: usize,
        codes: &mut [u8],
        at: usize,
    ) {
        let Scales::Ints { lo, hi } = g.scales else { return };
        let most = match g.offsets {
            Offsets::Ints { hi } => hi,
            _ => 0,
        };
        let (values, gradient, diagonal): ([f32; S], [f32; S], [f32; S]) =
            (array(self.values, at), array(self.gradient, at), self.diagonal(at));
        let mut h = [[0f32; S]; S];
        for (i, h) in h.iter_mut().enumerate() {
            *h = array(self.h(at + i), at);
        }
        // the levels that are there, and where each column alone would go
        let (mut old, mut least) = ([0f32; S], [0f32; S]);
        for i in 0..S {
            old[i] = l.value(codes[i]);
            least[i] = values[i] - gradient[i] / diagonal[i];
        }
        let (mut best, mut chosen) = (0f32, None);
        let (mut best_delta, mut best_levels) = ([0f32; S], [0f32; S]);
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
                let (mut delta, mut levels) = ([0f32; S], old);
                if anew {
                    for i in 0..S {
                        levels[i] = l.level((least[i] - offset) * inverse);
                    }
                }
                for i in 0..S {
                    delta[i] = scale * levels[i] + offset - values[i];
                }
                let gain = gain(&delta, &gradient, &h);
                if gain < best {
                    (best, chosen) = (gain, Some((s as i16, o as i16)));
                    (best_delta, best_levels) = (delta, levels);
                }
            }
        }
        if let Some(chosen) = chosen {
            (head.scales[sub], head.offsets[sub]) = chosen;
            for (code, level) in codes.iter_mut().zip(best_levels) {
                *code = l.code(level);
            }
            self.steps(at, &best_delta);
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
        // four rows at a time: what they move is loaded and stored once
        for (i, a) in along.as_chunks::<4>().0.iter().enumerate() {
            let first = b0 + 4 * i;
            let [h0, h1, h2, h3] = [self.h(first), self.h(first + 1), self.h(first + 2), self.h(first + 3)];
            let h = [h0.as_chunks::<LANES>().0, h1.as_chunks().0, h2.as_chunks().0, h3.as_chunks().0];
            for (c, m) in moved.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                for j in 0..4 {
                    for k in 0..LANES {
                        m[k] += a[j] * h[j][c][k];
                    }
                }
            }
        }
        let slope = dot(along, &self.gradient[b0..]);
        let curve = dot(along, &moved[b0..]);
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

/// `S` values from `at` on.
#[inline(always)]
fn array<const S: usize>(x: &[f32], at: usize) -> [f32; S] {
    x[at..].first_chunk().copied().expect("a panel holds whole sub-blocks")
}

/// `Σ a b` over whole [`LANES`] of `a`, in a fixed order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for k in 0..LANES {
            lanes[k] += a[k] * b[k];
        }
    }
    total(lanes)
}

/// `dᵀ (2 g + H d)`: what moving values by `d` does to the error.
#[inline(always)]
fn gain<const S: usize>(d: &[f32; S], gradient: &[f32; S], h: &[[f32; S]; S]) -> f32 {
    let mut along = [0f32; S];
    for (d, h) in d.iter().zip(h) {
        for k in 0..S {
            along[k] += d * h[k];
        }
    }
    for k in 0..S {
        along[k] += 2.0 * gradient[k];
    }
    dot(d, &along)
}
