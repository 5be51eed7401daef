//! Passes over rows of logits: the largest, the sum of exponentials, and the sums that a KL divergence is made of.
//!
//! One body is the definition, in plain Rust with sixteen lanes, and is compiled once for each instruction set. Every
//! operation rounds once (products and sums that should round together are written `mul_add`), and lanes and blocks are
//! added up in a fixed order, so that all of them give the same bits. Exponentials are f32, good to 2 ulp; sums over a
//! block of 512 words are f32 per lane, everything beyond is f64.

use crate::formats::simd::{self, Isa};

/// Words at a time.
const LANES: usize = 16;
/// Words whose sums are held in f32.
const BLOCK: usize = 512;

/// e^x underflows here.
const LOWEST: f32 = -87.0;
/// |u| up to which [`phi`] is a polynomial.
const NEAR: f32 = 0.5;

/// Sums over all words i, with `d = a[i] - b[i]`, `u = d - shift`, `ea = e^(a[i] - a_max)`, `eb = e^(b[i] - b_max)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sums {
    /// Of `ea`.
    pub a: f64,
    /// Of `eb`.
    pub b: f64,
    /// Of `ea u`.
    pub u: f64,
    /// Of `ea (e^-u - 1 + u)` where |u| <= 1/2, of `ea (u - 1)` elsewhere.
    pub near: f64,
    /// Of `eb` where |u| > 1/2.
    pub far: f64,
}

/// e^x for x <= 0; 0 below -87.
///
/// x = n ln 2 + r with |r| <= ln(2)/2; e^r by its series up to r^7 (the rest is below 6e-9); 2^n by its bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding this rounds to an integer, which then stands in the lowest bits.
    const ROUNDER: f32 = 12582912.0;
    const LN_2_HIGH: f32 = std::f32::consts::LN_2;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
    let t = x.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let n = t - ROUNDER;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut p = 1.0 / 5040.0;
    p = r.mul_add(p, 1.0 / 720.0);
    p = r.mul_add(p, 1.0 / 120.0);
    p = r.mul_add(p, 1.0 / 24.0);
    p = r.mul_add(p, 1.0 / 6.0);
    p = r.mul_add(p, 0.5);
    p = r.mul_add(p, 1.0);
    p = r.mul_add(p, 1.0);
    let scale = f32::from_bits((t.to_bits() << 23).wrapping_add(127 << 23));
    if x < LOWEST { 0.0 } else { p * scale }
}

/// e^-u - 1 + u for |u| <= 1/2, by its series up to u^9: without the cancellation of the formula.
#[inline(always)]
fn phi(u: f32) -> f32 {
    let v = -u;
    let mut p = 1.0 / 362_880.0;
    p = v.mul_add(p, 1.0 / 40320.0);
    p = v.mul_add(p, 1.0 / 5040.0);
    p = v.mul_add(p, 1.0 / 720.0);
    p = v.mul_add(p, 1.0 / 120.0);
    p = v.mul_add(p, 1.0 / 24.0);
    p = v.mul_add(p, 1.0 / 6.0);
    p = v.mul_add(p, 0.5);
    p * (u * u)
}

/// Lanes of f32 sums over a block.
#[derive(Clone, Copy)]
struct Lanes {
    a: [f32; LANES],
    b: [f32; LANES],
    u: [f32; LANES],
    near: [f32; LANES],
    far: [f32; LANES],
}

impl Lanes {
    const ZERO: Lanes =
        Lanes { a: [0.0; LANES], b: [0.0; LANES], u: [0.0; LANES], near: [0.0; LANES], far: [0.0; LANES] };

    #[inline(always)]
    fn step(&mut self, a: &[f32; LANES], b: &[f32; LANES], top: &Tops) {
        for k in 0..LANES {
            let ea = exp(a[k] - top.a);
            let eb = exp(b[k] - top.b);
            let u = (a[k] - b[k]) - top.shift;
            let is_near = u.abs() <= NEAR;
            let value = if is_near { phi(u) } else { u - 1.0 };
            self.a[k] += ea;
            self.b[k] += eb;
            self.u[k] = ea.mul_add(u, self.u[k]);
            self.near[k] = ea.mul_add(value, self.near[k]);
            self.far[k] += if is_near { 0.0 } else { eb };
        }
    }
}

/// The largest logits, and what is taken from every difference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tops {
    pub a: f32,
    pub b: f32,
    pub shift: f32,
}

/// Adds lanes to f64 sums of the same lanes.
#[inline(always)]
fn flush(total: &mut [f64; LANES], lanes: &[f32; LANES]) {
    for k in 0..LANES {
        total[k] += f64::from(lanes[k]);
    }
}

/// Lane 0 to 15 in this order.
#[inline(always)]
fn add_up(lanes: &[f64; LANES]) -> f64 {
    lanes.iter().fold(0.0, |s, v| s + v)
}

/// The last words of a row, filled up with words of probability zero.
#[inline(always)]
fn pad(rest: &[f32], max: f32) -> [f32; LANES] {
    let mut out = [max - 1000.0; LANES];
    for (o, v) in out.iter_mut().zip(rest) {
        *o = *v;
    }
    out
}

#[inline(always)]
fn compare_body(a: &[f32], b: &[f32], top: &Tops) -> Sums {
    let mut total = [[0.0f64; LANES]; 5];
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut lanes = Lanes::ZERO;
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        for (a, b) in a.iter().zip(b) {
            lanes.step(a, b, top);
        }
        if !a_rest.is_empty() {
            lanes.step(&pad(a_rest, top.a), &pad(b_rest, top.b), top);
        }
        flush(&mut total[0], &lanes.a);
        flush(&mut total[1], &lanes.b);
        flush(&mut total[2], &lanes.u);
        flush(&mut total[3], &lanes.near);
        flush(&mut total[4], &lanes.far);
    }
    let [a, b, u, near, far] = total.map(|t| add_up(&t));
    Sums { a, b, u, near, far }
}

#[inline(always)]
fn sum_body(x: &[f32], max: f32) -> f64 {
    let mut total = [0.0f64; LANES];
    let step = |lanes: &mut [f32; LANES], x: &[f32; LANES]| {
        for k in 0..LANES {
            lanes[k] += exp(x[k] - max);
        }
    };
    for block in x.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for x in whole {
            step(&mut lanes, x);
        }
        if !rest.is_empty() {
            step(&mut lanes, &pad(rest, max));
        }
        flush(&mut total, &lanes);
    }
    add_up(&total)
}

#[inline(always)]
fn peak_body(x: &[f32]) -> (f32, usize) {
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let (mut max, mut at) = (f32::NEG_INFINITY, 0);
    for (i, block) in x.chunks(BLOCK).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for x in whole {
            for k in 0..LANES {
                lanes[k] = larger(lanes[k], x[k]);
            }
        }
        let most = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| larger(m, v));
        if most > max {
            (max, at) = (most, i);
        }
    }
    let first = x.chunks(BLOCK).nth(at).and_then(|b| b.iter().position(|&v| v == max)).unwrap_or(0);
    (max, at * BLOCK + first)
}

/// The bodies, compiled with the features of an instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled {
    ($name:ident, $features:literal) => {
        mod $name {
            use super::{Sums, Tops};

            #[target_feature(enable = $features)]
            pub(super) fn compare(a: &[f32], b: &[f32], top: &Tops) -> Sums {
                super::compare_body(a, b, top)
            }

            #[target_feature(enable = $features)]
            pub(super) fn sum(x: &[f32], max: f32) -> f64 {
                super::sum_body(x, max)
            }

            #[target_feature(enable = $features)]
            pub(super) fn peak(x: &[f32]) -> (f32, usize) {
                super::peak_body(x)
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
compiled!(avx2, "avx2,fma");
#[cfg(target_arch = "x86_64")]
compiled!(avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");

/// Calls a body by the instruction set in use. NEON is part of every AArch64, so there the plain one has it already.
macro_rules! dispatch {
    ($name:ident, $body:ident, ($($arg:expr),*)) => {
        match with_fma() {
            // SAFETY: `with_fma` gives only instruction sets that this machine has, with FMA.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::$name($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::$name($($arg),*) },
            _ => $body($($arg),*),
        }
    };
}

/// The instruction set in use, [`Isa::Scalar`] if it has no FMA.
fn with_fma() -> Isa {
    match simd::isa() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 if !is_x86_feature_detected!("fma") => Isa::Scalar,
        isa => isa,
    }
}

/// The sums of two rows of the same length. NaN where there is a NaN or an infinity.
pub(super) fn compare(a: &[f32], b: &[f32], top: &Tops) -> Sums {
    dispatch!(compare, compare_body, (a, b, top))
}

/// Sum of e^(x - max).
pub(super) fn sum(x: &[f32], max: f32) -> f64 {
    dispatch!(sum, sum_body, (x, max))
}

/// The largest value and the first place where it stands; NaN are passed over. (-inf, 0) for an empty row.
pub(super) fn peak(x: &[f32]) -> (f32, usize) {
    dispatch!(peak, peak_body, (x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_good_to_two_ulp() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -(i as f32) * (87.0 / 2e6);
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / want - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!((exp(0.0), exp(-87.5), exp(-1e30)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn phi_keeps_its_digits_near_zero() {
        for i in -5000..=5000 {
            let u = i as f32 / 10000.0;
            for u in [u, u * 1e-3, u * 1e-6] {
                let x = f64::from(u);
                // the series in f64; the formula itself has no digits left at 1e-9
                let want: f64 =
                    (2..20).rev().fold(0.0, |s, k| s + (-x).powi(k) / (1..=k).map(f64::from).product::<f64>());
                let got = f64::from(phi(u));
                assert!((got - want).abs() <= 4e-7 * want, "{u}: {got:e}, {want:e}");
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / 16777216.0
        };
        for n in [1, 15, 16, 17, 511, 512, 513, 5000, 8192] {
            let a: Vec<f32> = (0..n).map(|_| 30.0 * next() - 20.0).collect();
            let b: Vec<f32> = a.iter().map(|v| v + next() - 0.5).collect();
            let all = || {
                let (pa, pb) = (peak(&a), peak(&b));
                let top = Tops { a: pa.0, b: pb.0, shift: a[pa.1] - b[pa.1] };
                (pa, pb, compare(&a, &b, &top), sum(&a, pa.0))
            };
            let scalar = simd::with_isa(Isa::Scalar, all);
            assert_eq!(scalar.0.1, (0..n).rev().max_by(|&i, &j| a[i].total_cmp(&a[j])).unwrap());
            assert_eq!(scalar.2.a, scalar.3);
            for isa in Isa::available() {
                assert_eq!(simd::with_isa(isa, all), scalar, "{n} words, {}", isa.name());
            }
        }
    }

    #[test]
    fn the_first_of_equals_and_no_nan() {
        let mut x = vec![0.0; 2000];
        (x[700], x[1900]) = (5.0, 5.0);
        x[3] = f32::NAN;
        assert_eq!(peak(&x), (5.0, 700));
        assert_eq!(peak(&[]), (f32::NEG_INFINITY, 0));
    }
}
