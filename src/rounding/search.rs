//! Scales and offsets of a block, searched for the least weighted square error.
//!
//! A sub-block is tried with a grid of scales (of both signs) or of ranges, each refitted by least squares and coded again
//! (as `make_qx_quants` and `make_qkx3_quants` of ggml do, over more candidates). Where sub-blocks share an f16, that f16 is
//! searched with the integers: every sub-block takes the best of the integers around, by its true error, and the f16 is
//! refitted to the codes (least squares over the block), three rounds from several starts. All sums are in a fixed order.

use super::levels::{LANES, Levels, total};
use crate::formats::grid::{self, Grid, Offsets, Scales};
use crate::formats::search::{from_f16_bits, to_f16_bits};

pub use crate::formats::grid::Head;

/// Most sub-blocks of a block.
const SUBS: usize = 16;

impl Head {
    /// Scale and offset of a sub-block.
    #[inline(always)]
    pub fn line(&self, g: &Grid, sub: usize) -> (f32, f32) {
        let d = g.scale_of(self.d);
        let scale = match g.scales {
            Scales::Ints { .. } => d * f32::from(self.scales[sub]),
            _ => d,
        };
        let offset = match g.offsets {
            Offsets::None => 0.0,
            Offsets::F16 => from_f16_bits(self.m),
            Offsets::Ints { .. } => -(from_f16_bits(self.m) * f32::from(self.offsets[sub])),
        };
        (scale, offset)
    }
}

/// Weighted sums of a sub-block coded on a line: of levels, levels squared, levels times values; and the error.
#[derive(Clone, Copy, Default)]
struct Sums {
    l: f32,
    ll: f32,
    xl: f32,
    error: f32,
}

/// Codes `x` on the line and sums.
#[inline(always)]
fn sums<L: Levels>(l: L, x: &[f32], w: &[f32], scale: f32, offset: f32) -> Sums {
    let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
    let (mut sl, mut sll, mut sxl, mut se) = ([0f32; LANES], [0f32; LANES], [0f32; LANES], [0f32; LANES]);
    for (x, w) in x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            let level = l.level((x[i] - offset) * inverse);
            let e = x[i] - (scale * level + offset);
            let wl = w[i] * level;
            sl[i] += wl;
            sll[i] += wl * level;
            sxl[i] += wl * x[i];
            se[i] += w[i] * e * e;
        }
    }
    Sums { l: total(sl), ll: total(sll), xl: total(sxl), error: total(se) }
}

/// Σ w, Σ w x.
#[inline(always)]
fn moments(x: &[f32], w: &[f32]) -> (f32, f32) {
    let (mut sw, mut sx) = ([0f32; LANES], [0f32; LANES]);
    for (x, w) in x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            sw[i] += w[i];
            sx[i] += w[i] * x[i];
        }
    }
    (total(sw), total(sx))
}

#[inline(always)]
fn ends(x: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([f32::MAX; LANES], [f32::MIN; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            lo[i] = lo[i].min(x[i]);
            hi[i] = hi[i].max(x[i]);
        }
    }
    (lo.iter().fold(f32::MAX, |a, b| a.min(*b)), hi.iter().fold(f32::MIN, |a, b| a.max(*b)))
}

/// Codes on `candidate` and refits; takes the scale where that explains more than `best`. No closure: those are compiled without
/// the instructions of what they stand in where they are not inlined.
#[inline(always)]
fn fit<L: Levels>(l: L, x: &[f32], w: &[f32], candidate: f32, best: &mut f32, scale: &mut f32) {
    let s = sums(l, x, w, candidate, 0.0);
    if s.ll > 0.0 && s.xl * s.xl > *best * s.ll {
        *best = s.xl * s.xl / s.ll;
        *scale = s.xl / s.ll;
    }
}

/// The best scale of a sub-block without offset.
#[inline(always)]
fn symmetric<L: Levels>(l: L, x: &[f32], w: &[f32]) -> f32 {
    let (lo, hi) = ends(x);
    let extreme = if -lo > hi { lo } else { hi };
    if extreme.abs() < 1e-15 {
        return 0.0;
    }
    let (bottom, top) = l.ends();
    // coarse grids gain from clipping, fine ones do not
    let span: &[f32] = match top as i32 {
        ..2 => &[0.7, 0.85, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0],
        2..8 => &[0.7, 0.78, 0.84, 0.88, 0.92, 0.96, 1.0, 1.05, 1.1, 1.16, 1.24, 1.32, 1.4],
        8..30 => &[0.84, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.15],
        30..100 => &[0.93, 0.95, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03, 1.05],
        _ if bottom == -top => &[0.985, 0.99, 0.995, 1.0, 1.004, 1.008, 1.012],
        _ => &[0.7, 0.75, 0.8, 0.85, 0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2],
    };
    let (mut best, mut scale) = (-1.0f32, 0.0f32);
    for end in [bottom, top] {
        for f in span {
            fit(l, x, w, extreme / (end * f), &mut best, &mut scale);
        }
        if bottom == -top {
            break;
        }
    }
    for _ in 0..2 {
        fit(l, x, w, scale, &mut best, &mut scale);
    }
    scale
}

/// The best scale and offset of a sub-block; `below`: the offset must not be above zero.
#[inline(always)]
fn affine<L: Levels>(l: L, x: &[f32], w: &[f32], below: bool) -> (f32, f32) {
    let (mut lo, hi) = ends(x);
    if below {
        lo = lo.min(0.0);
    }
    let range = hi - lo;
    if range < 1e-15 {
        return (0.0, lo);
    }
    let (sw, sx) = moments(x, w);
    let top = l.ends().1;
    let shrinks: &[f32] = match top as i32 {
        // two free f16s and one sub-block: here a finer grid finds more
        4..16 if !below => &[-0.03, -0.015, 0.0, 0.015, 0.03, 0.045, 0.06, 0.08, 0.1],
        16.. if !below => &[-0.015, -0.0075, 0.0, 0.0075, 0.015, 0.0225, 0.03, 0.04, 0.05],
        ..4 => &[-0.04, 0.0, 0.06, 0.12, 0.18, 0.26],
        4..16 => &[-0.02, 0.0, 0.03, 0.06, 0.1],
        _ => &[-0.01, 0.0, 0.015, 0.03, 0.05],
    };
    let of = Affine { x, w, sw, sx, below };
    let mut best = (f32::MAX, (0.0f32, 0.0f32));
    let mut tried = (f32::MAX, (0.0f32, 0.0f32));
    for a in shrinks {
        let from = lo + a * range;
        let from = if below { from.min(0.0) } else { from };
        for b in shrinks {
            let to = hi - b * range;
            let fit = of.fit(l, ((to - from) / top, from), &mut best);
            let s = sums(l, x, w, fit.0, fit.1);
            if s.error < tried.0 {
                tried = (s.error, fit);
            }
        }
    }
    let mut fit = tried.1;
    for _ in 0..4 {
        fit = of.fit(l, fit, &mut best);
    }
    best.1
}

/// A sub-block that gets scale and offset.
struct Affine<'a> {
    x: &'a [f32],
    w: &'a [f32],
    /// Σ w, Σ w x.
    sw: f32,
    sx: f32,
    /// The offset must not be above zero.
    below: bool,
}

impl Affine<'_> {
    /// Codes on the line, which is taken where its error is less than that of `best`; refitted.
    #[inline(always)]
    fn fit<L: Levels>(&self, l: L, (scale, offset): (f32, f32), best: &mut (f32, (f32, f32))) -> (f32, f32) {
        let s = sums(l, self.x, self.w, scale, offset);
        if s.error < best.0 {
            *best = (s.error, (scale, offset));
        }
        let det = self.sw * s.ll - s.l * s.l;
        let mut fit = (scale, offset);
        if det > 0.0 {
            fit = ((self.sw * s.xl - self.sx * s.l) / det, (s.ll * self.sx - s.l * s.xl) / det);
        }
        if self.below && fit.1 > 0.0 && s.ll > 0.0 {
            fit = (s.xl / s.ll, 0.0);
        }
        if fit.0 > 0.0 { fit } else { (scale, offset) }
    }
}

/// Searches everything that a block of `g` stores: `x` and weights `w` are its values. Not worse than what ggml finds.
#[inline(always)]
pub fn search<L: Levels>(g: &Grid, l: L, x: &[f32], w: &[f32]) -> Head {
    let own = own(g, l, x, w);
    match ggml(g, x, w) {
        Some(theirs) if error(g, l, &theirs, x, w) < error(g, l, &own, x, w) => theirs,
        _ => own,
    }
}

/// What `ggml_quantize_chunk` stores; `None` where its sums overflow.
fn ggml(g: &Grid, x: &[f32], w: &[f32]) -> Option<Head> {
    let mut block = [0u8; 256];
    let block = &mut block[..g.ty.block_bytes()];
    let format = crate::formats::format(g.ty).expect("it has a grid");
    format.encode(x, g.block, Some(w), block).ok()?;
    format.validate(block).ok()?;
    Some(grid::head(g.ty, block))
}

/// The weighted square error of a block with the nearest codes.
#[inline(always)]
fn error<L: Levels>(g: &Grid, l: L, head: &Head, x: &[f32], w: &[f32]) -> f32 {
    let mut sum = 0.0;
    for sub in 0..g.subs() {
        let (scale, offset) = head.line(g, sub);
        sum += sums(l, part(g, x, sub), part(g, w, sub), scale, offset).error;
    }
    sum
}

#[inline(always)]
fn own<L: Levels>(g: &Grid, l: L, x: &[f32], w: &[f32]) -> Head {
    match (g.scales, g.offsets) {
        (Scales::E8M0, _) => exponent(g, l, x, w),
        (Scales::F16, Offsets::None) => Head { d: to_f16_bits(symmetric(l, x, w)), ..Head::default() },
        (Scales::F16, _) => {
            let (scale, offset) = affine(l, x, w, false);
            Head { d: to_f16_bits(scale), m: to_f16_bits(offset), ..Head::default() }
        }
        (Scales::Ints { .. }, _) => super_block(g, l, x, w),
    }
}

/// The best scale of a whole row ([`Grid::row`]): `x` and weights `w` are its values. Outliers of a row are farther out than those
/// of a block, so more of them may be clipped.
#[inline(always)]
pub fn row<L: Levels>(l: L, x: &[f32], w: &[f32]) -> Head {
    let (lo, hi) = ends(x);
    let most = hi.max(-lo);
    let top = l.ends().1;
    let (mut best, mut scale) = (f32::MAX, 0f32);
    for step in 0..60 {
        for sign in [1.0, -1.0] {
            // from nothing clipped to four times the range of the levels
            let start = sign * most / (top * (1.0 + 0.05 * step as f32));
            let first = sums(l, x, w, start, 0.0);
            let fitted = if first.ll > 0.0 { first.xl / first.ll } else { start };
            for s in [start, fitted] {
                let s = from_f16_bits(to_f16_bits(s));
                let error = sums(l, x, w, s, 0.0).error;
                if error < best {
                    (best, scale) = (error, s);
                }
            }
        }
    }
    Head { d: to_f16_bits(scale), ..Head::default() }
}

#[inline(always)]
fn exponent<L: Levels>(g: &Grid, l: L, x: &[f32], w: &[f32]) -> Head {
    let (lo, hi) = ends(x);
    let most = hi.max(-lo);
    if most < 1e-30 {
        return Head::default();
    }
    // twice the levels, half the power: the largest level is 12
    let middle = (most / 6.0).log2().round() as i32 + 127;
    let (mut best, mut head) = (f32::MAX, Head::default());
    for e in middle - 2..=middle + 2 {
        let d = e.clamp(0, 254) as u16;
        let s = sums(l, x, w, g.scale_of(d), 0.0);
        if s.error < best {
            best = s.error;
            head.d = d;
        }
    }
    head
}

/// `sub` of a block.
#[inline(always)]
fn part<'a>(g: &Grid, v: &'a [f32], sub: usize) -> &'a [f32] {
    &v[sub * g.sub..][..g.sub]
}

/// The integers of one sub-block, around `(scale, offset)` and those that are there, by true error. Returns the sums.
#[inline(always)]
fn choose<L: Levels>(
    g: &Grid,
    l: L,
    (x, w): (&[f32], &[f32]),
    (d, m): (f32, f32),
    around: &[(f32, f32)],
    (scale, offset): (&mut i16, &mut i16),
) -> Sums {
    let Scales::Ints { lo, hi } = g.scales else { return Sums::default() };
    let most = match g.offsets {
        Offsets::Ints { hi } => hi,
        _ => 0,
    };
    let (mut best, mut chosen) = (Sums { error: f32::MAX, ..Sums::default() }, (0i32, 0i32));
    let mut seen = [(i32::MIN, 0i32); 32];
    let mut count = 0;
    for &(s, o) in around {
        let near = if d != 0.0 { (s / d).round() as i32 } else { 0 };
        let near_offset = if m != 0.0 { (-o / m).round() as i32 } else { 0 };
        for a in -1..=1 {
            for b in -1..=1 {
                let at = ((near + a).clamp(lo, hi), (near_offset + b).clamp(0, most));
                if (most == 0 && b != 0) || seen[..count].contains(&at) || count == seen.len() {
                    continue;
                }
                seen[count] = at;
                count += 1;
                let sums = sums(l, x, w, d * at.0 as f32, -(m * at.1 as f32));
                if sums.error < best.error {
                    (best, chosen) = (sums, at);
                }
            }
        }
    }
    (*scale, *offset) = (chosen.0 as i16, chosen.1 as i16);
    best
}

#[inline(always)]
fn super_block<L: Levels>(g: &Grid, l: L, x: &[f32], w: &[f32]) -> Head {
    let Scales::Ints { lo, hi } = g.scales else { return Head::default() };
    let subs = g.subs();
    let mut lines = [(0f32, 0f32); SUBS];
    for (j, line) in lines[..subs].iter_mut().enumerate() {
        *line = match g.offsets {
            Offsets::None => (symmetric(l, part(g, x, j), part(g, w, j)), 0.0),
            _ => affine(l, part(g, x, j), part(g, w, j), true),
        };
    }
    let lines = &lines[..subs];
    let extreme = lines.iter().fold(0f32, |a, b| if b.0.abs() > a.abs() { b.0 } else { a });
    let lowest = lines.iter().fold(0f32, |a, b| a.min(b.1));
    // the largest scale takes the end of the integers that is farthest from zero
    let first = if lo < 0 { extreme / lo as f32 } else { extreme / hi as f32 };
    let first_m = match g.offsets {
        Offsets::Ints { hi } => -lowest / hi as f32,
        _ => 0.0,
    };
    let (mut best, mut head) = (f32::MAX, Head::default());
    let starts: &[f32] = if hi < 20 { &[1.0, 1.04, 1.09, 1.15] } else { &[1.0, 1.03] };
    for start in starts {
        let (mut d, mut m) = (first * start, first_m * start);
        for _ in 0..3 {
            let mut now = Head { d: to_f16_bits(d), m: to_f16_bits(m), ..Head::default() };
            let (df, mf) = (from_f16_bits(now.d), from_f16_bits(now.m));
            let mut error = 0f32;
            // normal equations of x = d · (scale · level) − m · offset
            let (mut a, mut b, mut c, mut p, mut q) = (0f32, 0f32, 0f32, 0f32, 0f32);
            for (j, line) in lines.iter().enumerate() {
                let (xs, ws) = (part(g, x, j), part(g, w, j));
                let ints = (&mut now.scales[j], &mut now.offsets[j]);
                let s = choose(g, l, (xs, ws), (df, mf), &[*line], ints);
                error += s.error;
                let (sc, mn) = (f32::from(now.scales[j]), f32::from(now.offsets[j]));
                a += sc * sc * s.ll;
                p += sc * s.xl;
                if first_m != 0.0 {
                    let (sw, sx) = moments(xs, ws);
                    b += sc * mn * s.l;
                    c += mn * mn * sw;
                    q += mn * sx;
                }
            }
            if error < best {
                best = error;
                head = now;
            }
            let det = a * c - b * b;
            if det > 1e-6 * a * c {
                // [a −b; −b c] [d; m] = [p; −q]
                d = (p * c - q * b) / det;
                m = (b * p - a * q) / det;
                m = m.max(0.0);
            } else if a > 0.0 {
                d = (p + m * b) / a;
            }
        }
    }
    head
}

/// Chooses the integers of sub-block `sub` again, its f16s staying as they are.
#[inline(always)]
pub fn again<L: Levels>(g: &Grid, l: L, head: &mut Head, sub: usize, x: &[f32], w: &[f32]) {
    let old = head.line(g, sub);
    let new = match g.offsets {
        Offsets::None => (symmetric(l, x, w), 0.0),
        _ => affine(l, x, w, true),
    };
    let (d, m) = (from_f16_bits(head.d), from_f16_bits(head.m));
    let ints = (&mut head.scales[sub], &mut head.offsets[sub]);
    choose(g, l, (x, w), (d, m), &[old, new], ints);
}
