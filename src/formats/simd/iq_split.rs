//! AVX2 kernels of the IQ1 split search (`formats::iq::split`): eight `i2` per vector, in ascending order.
//!
//! A vector of trials is compared with the best so far at once; only if a lane is better are its lanes offered one by
//! one, in the order of the scalar loops. If none is better than the best so far, none would have been taken.

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

#[target_feature(enable = "avx2")]
fn best_split_32(s: &Sums32) -> Option<Split> {
    let mut best = Best::new();
    // The third terms, which depend on i2 alone.
    let (mut qx_end, mut q2_end) = ([[0.0f32; 40]; 2], [[0.0f32; 40]; 2]);
    for (c, v) in SHIFTED.iter().enumerate() {
        for i in 0..40 {
            qx_end[c][i] = (s.x[32] - s.x[i]) * v[2];
            q2_end[c][i] = (s.w[32] - s.w[i]) * v[2] * v[2];
        }
    }
    for i1 in 0..=32 {
        let (x1, w1) = (_mm256_set1_ps(s.x[i1]), _mm256_set1_ps(s.w[i1]));
        for i2 in (i1..=32).step_by(8) {
            let (dx, dw) = (_mm256_sub_ps(from(&s.x, i2), x1), _mm256_sub_ps(from(&s.w, i2), w1));
            let (mut qx, mut q2) = ([dx; 2], [dw; 2]);
            for (c, v) in SHIFTED.iter().enumerate() {
                let v1 = _mm256_set1_ps(v[1]);
                let first = _mm256_set1_ps((s.x[i1] - s.x[0]) * v[0]);
                qx[c] = _mm256_add_ps(_mm256_add_ps(first, _mm256_mul_ps(dx, v1)), from(&qx_end[c], i2));
                let first = _mm256_set1_ps((s.w[i1] - s.w[0]) * v[0] * v[0]);
                let second = _mm256_mul_ps(_mm256_mul_ps(dw, v1), v1);
                q2[c] = _mm256_add_ps(_mm256_add_ps(first, second), from(&q2_end[c], i2));
            }
            offer(&mut best, i1, i2, qx, q2);
        }
    }
    best.split
}

#[target_feature(enable = "avx2")]
fn best_split_16(s: &Sums16) -> Option<Split> {
    let mut best = Best::new();
    // [half][shift]: the terms that depend on i2 alone.
    let mut q2_end = [[[0.0f32; 24]; 2]; 2];
    for h in 0..2 {
        for (v, steps) in SQUARE_STEPS.iter().enumerate() {
            for i in 0..24 {
                q2_end[h][v][i] = s.w[h][i] * steps[1];
            }
        }
    }
    for i1 in 0..=16 {
        for i2 in (i1..=16).step_by(8) {
            let (mut qx, mut q2) = ([[_mm256_setzero_ps(); 2]; 2], [[_mm256_setzero_ps(); 2]; 2]);
            for h in 0..2 {
                let (x, w) = (&s.x[h], &s.w[h]);
                let sx = _mm256_add_ps(_mm256_set1_ps(x[i1]), from(x, i2));
                for (v, (values, steps)) in SHIFTED.iter().zip(&SQUARE_STEPS).enumerate() {
                    qx[h][v] = _mm256_sub_ps(_mm256_set1_ps(x[16] * values[2]), sx);
                    let first = _mm256_set1_ps(w[16] * values[2] * values[2] + w[i1] * steps[0]);
                    q2[h][v] = _mm256_add_ps(first, from(&q2_end[h][v], i2));
                }
            }
            let pairs = |q: [[__m256; 2]; 2]| -> [__m256; 4] {
                std::array::from_fn(|c| _mm256_add_ps(q[0][c / 2], q[1][c % 2]))
            };
            offer(&mut best, i1, i2, pairs(qx), pairs(q2));
        }
    }
    best.split
}
