//! AVX2 kernels of the IQ1 split search (`formats::iq::split`): eight `i2` per vector, in ascending order.
//!
//! A vector of trials is compared with the best so far at once; only if a lane is better are its lanes offered one by
//! one, in the order of the scalar loops. If none is better than the best so far, none would have been taken.
//!
//! To have few such vectors the search starts from a bar a little lower than the best score of a few rows, instead of
//! from nothing. That gives the same split if the first trial taken clears the bar by much more than rounding: all
//! trials before it were below the bar, so it would have been taken whichever of them was the best, and from then on
//! both searches go the same way. If it does not (or the sums are too small or large for relative rounding), the search
//! is done again without a bar.

use super::iq_scan::{Avx2, load, store};
use crate::formats::iq::split::{Best, SHIFTED, SQUARE_STEPS, Split, Sums16, Sums32};
use std::arch::x86_64::*;

impl Avx2 {
    /// `split::best_split_32_scalar`.
    pub fn best_split_32(self, s: &Sums32) -> Option<Split> {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { best_split_32(s) }
    }

    /// `split::best_split_16_scalar`.
    pub fn best_split_16(self, s: &Sums16) -> Option<Split> {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { best_split_16(s) }
    }
}

/// Eight values from `i` on, NaN past the end.
#[inline]
#[target_feature(enable = "avx2")]
fn from<const N: usize>(a: &[f32; N], i: usize) -> __m256 {
    load(a[i..].first_chunk().expect("padded"))
}

/// Offers the lanes of all combinations, lane by lane, if one is better than the best.
#[inline]
#[target_feature(enable = "avx2")]
fn offer<const C: usize>(best: &mut Best, i1: usize, i2: usize, qx: [__m256; C], q2: [__m256; C]) {
    let score = _mm256_set1_ps(best.score);
    let mut any = _mm256_setzero_ps();
    for c in 0..C {
        let more = _mm256_cmp_ps::<_CMP_GT_OQ>(_mm256_mul_ps(qx[c], qx[c]), _mm256_mul_ps(score, q2[c]));
        let valid = _mm256_cmp_ps::<_CMP_GT_OQ>(q2[c], _mm256_setzero_ps());
        any = _mm256_or_ps(any, _mm256_and_ps(more, valid));
    }
    let mut lanes = _mm256_movemask_ps(any) as u32;
    if lanes == 0 {
        return;
    }
    let (mut qx_of, mut q2_of) = ([[0.0; 8]; C], [[0.0; 8]; C]);
    for c in 0..C {
        (qx_of[c], q2_of[c]) = (store(qx[c]), store(q2[c]));
    }
    while lanes != 0 {
        let lane = lanes.trailing_zeros() as usize & 7;
        for c in 0..C {
            best.offer(i1, i2 + lane, c, qx_of[c][lane], q2_of[c][lane]);
        }
        lanes &= lanes - 1;
    }
}

/// A bar for the scores: a little lower than the best of the rows given, if all that is compared is far from the ends
/// of the range of f32. `total` is the sum of the weights (not negative, as imatrix values are);
/// every sum of squares is between 1/65 and 1.3 times that.
fn bar(scores: [f32; 8], total: f32) -> Option<f32> {
    let bar = scores.into_iter().fold(0.0, f32::max) * 0.9999;
    let usable = |v: f32| v > 1e-28 && v < 1e28;
    (usable(total) && usable(bar) && usable(bar * total)).then_some(bar)
}

/// Does the first score taken clear the bar beyond doubt?
fn clears(first: f32, bar: f32) -> bool {
    first > bar * 1.00001
}

/// Greatest score per lane (trials past the end and sums of squares that are not positive count as 0).
#[inline]
#[target_feature(enable = "avx2")]
fn raise<const C: usize>(mut top: __m256, qx: [__m256; C], q2: [__m256; C]) -> __m256 {
    for c in 0..C {
        // `max_ps` gives its second operand if the first is NaN.
        top = _mm256_max_ps(_mm256_div_ps(_mm256_mul_ps(qx[c], qx[c]), q2[c]), top);
    }
    top
}

/// The sums of 32 elements, with the terms that depend on `i2` alone, per shift.
struct Terms32<'a> {
    s: &'a Sums32,
    qx_end: [[f32; 40]; 2],
    q2_end: [[f32; 40]; 2],
}

impl Terms32<'_> {
    /// `sumqx` and `sumq2` of both shifts for eight `i2`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn at(&self, i1: usize, i2: usize) -> ([__m256; 2], [__m256; 2]) {
        let s = self.s;
        let dx = _mm256_sub_ps(from(&s.x, i2), _mm256_set1_ps(s.x[i1]));
        let dw = _mm256_sub_ps(from(&s.w, i2), _mm256_set1_ps(s.w[i1]));
        let (mut qx, mut q2) = ([dx; 2], [dw; 2]);
        for (c, v) in SHIFTED.iter().enumerate() {
            let v1 = _mm256_set1_ps(v[1]);
            let first = _mm256_set1_ps((s.x[i1] - s.x[0]) * v[0]);
            qx[c] = _mm256_add_ps(_mm256_add_ps(first, _mm256_mul_ps(dx, v1)), from(&self.qx_end[c], i2));
            let first = _mm256_set1_ps((s.w[i1] - s.w[0]) * v[0] * v[0]);
            let second = _mm256_mul_ps(_mm256_mul_ps(dw, v1), v1);
            q2[c] = _mm256_add_ps(_mm256_add_ps(first, second), from(&self.q2_end[c], i2));
        }
        (qx, q2)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn search(&self, score: f32) -> Best {
        let mut best = Best::from_score(score);
        for i1 in 0..=32 {
            for i2 in (i1..=32).step_by(8) {
                let (qx, q2) = self.at(i1, i2);
                offer(&mut best, i1, i2, qx, q2);
            }
        }
        best
    }
}

#[target_feature(enable = "avx2")]
fn best_split_32(s: &Sums32) -> Option<Split> {
    let mut terms = Terms32 { s, qx_end: [[0.0; 40]; 2], q2_end: [[0.0; 40]; 2] };
    for (c, v) in SHIFTED.iter().enumerate() {
        for i in 0..40 {
            terms.qx_end[c][i] = (s.x[32] - s.x[i]) * v[2];
            terms.q2_end[c][i] = (s.w[32] - s.w[i]) * v[2] * v[2];
        }
    }
    let mut top = _mm256_setzero_ps();
    for (i1, i2) in [(7, 16), (7, 24), (9, 16), (9, 24), (11, 16), (11, 24)] {
        let (qx, q2) = terms.at(i1, i2);
        top = raise(top, qx, q2);
    }
    if let Some(bar) = bar(store(top), s.w[32]) {
        let best = terms.search(bar);
        if clears(best.first, bar) {
            return best.split;
        }
    }
    terms.search(-f32::MAX).split
}

/// The sums of 16 elements, with the terms that depend on `i2` alone, per half and shift.
struct Terms16<'a> {
    s: &'a Sums16,
    q2_end: [[[f32; 24]; 2]; 2],
}

impl Terms16<'_> {
    /// `sumqx` and `sumq2` of the four combinations for eight `i2`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn at(&self, i1: usize, i2: usize) -> ([__m256; 4], [__m256; 4]) {
        let (mut qx, mut q2) = ([[_mm256_setzero_ps(); 2]; 2], [[_mm256_setzero_ps(); 2]; 2]);
        for h in 0..2 {
            let (x, w) = (&self.s.x[h], &self.s.w[h]);
            let sx = _mm256_add_ps(_mm256_set1_ps(x[i1]), from(x, i2));
            for (v, (values, steps)) in SHIFTED.iter().zip(&SQUARE_STEPS).enumerate() {
                qx[h][v] = _mm256_sub_ps(_mm256_set1_ps(x[16] * values[2]), sx);
                let first = _mm256_set1_ps(w[16] * values[2] * values[2] + w[i1] * steps[0]);
                q2[h][v] = _mm256_add_ps(first, from(&self.q2_end[h][v], i2));
            }
        }
        (pairs(qx), pairs(q2))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn search(&self, score: f32) -> Best {
        let mut best = Best::from_score(score);
        for i1 in 0..=16 {
            for i2 in (i1..=16).step_by(8) {
                let (qx, q2) = self.at(i1, i2);
                offer(&mut best, i1, i2, qx, q2);
            }
        }
        best
    }
}

/// Sums of one shift of the first half and one of the second: ++, +−, −+, −−.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(q: [[__m256; 2]; 2]) -> [__m256; 4] {
    let [[a, b], [c, d]] = q;
    [_mm256_add_ps(a, c), _mm256_add_ps(a, d), _mm256_add_ps(b, c), _mm256_add_ps(b, d)]
}

#[target_feature(enable = "avx2")]
fn best_split_16(s: &Sums16) -> Option<Split> {
    let mut terms = Terms16 { s, q2_end: [[[0.0; 24]; 2]; 2] };
    for h in 0..2 {
        for (v, steps) in SQUARE_STEPS.iter().enumerate() {
            for i in 0..24 {
                terms.q2_end[h][v][i] = s.w[h][i] * steps[1];
            }
        }
    }
    let mut top = _mm256_setzero_ps();
    for i1 in 3..=5 {
        let (qx, q2) = terms.at(i1, 8);
        top = raise(top, qx, q2);
    }
    if let Some(bar) = bar(store(top), s.w[0][16] + s.w[1][16]) {
        let best = terms.search(bar);
        if clears(best.first, bar) {
            return best.split;
        }
    }
    terms.search(-f32::MAX).split
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::iq::split::{best_split_16_scalar, best_split_32_scalar, order};

    /// Values on grids of several finenesses (so that there are ties), weights with holes, many magnitudes.
    fn inputs<const N: usize>(case: usize, state: &mut u32) -> ([f32; N], [f32; N]) {
        let mut next = || {
            *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*state >> 8) as f32 / 16_777_216.0
        };
        let steps = [3.0f32, 16.0, 1e6][case % 3];
        let size = [1.0, 1e-20, 1e12, 1e-38, 1e18][case / 3 % 5];
        let x = std::array::from_fn(|_| ((next() + next() - 1.0) * steps).round() / steps * size);
        let w = std::array::from_fn(|_| (next() - [0.0, 0.3, 1.0][case / 15 % 3]).max(0.0) * size);
        (x, w)
    }

    #[test]
    fn splits_are_those_of_the_scalar_search() {
        let Some(isa) = Avx2::get() else { return };
        let mut state = 7;
        let (mut found, mut none) = (0, 0);
        for case in 0..4000 {
            let (x, w) = inputs::<32>(case, &mut state);
            let sums = Sums32::new(&x, &w, &order(&x));
            let split = best_split_32_scalar(&sums);
            assert_eq!(isa.best_split_32(&sums), split, "case {case}");
            let (x, w) = inputs::<16>(case, &mut state);
            let sums = Sums16::new(&x, &w, &order(&x));
            assert_eq!(isa.best_split_16(&sums), best_split_16_scalar(&sums), "case {case}");
            *if split.is_some() { &mut found } else { &mut none } += 1;
        }
        assert!(found > 1000 && none > 100);
    }
}
