//! AVX2 kernel of `make_qp_quants` for IQ2_XXS (`formats::iq::qp`).
//!
//! The eight trial scales are one lane each. In the passes over the coordinates eight elements are tried against the
//! current sums at once; the first that improves is taken and the rest of the eight tried again with the new sums, which
//! is what the loop over elements does.

use super::iq_scan::{Avx2, load, store};
use crate::formats::iq::qp::{self, NMAX};
use std::arch::x86_64::*;

impl Avx2 {
    /// `qp::best_iscale`.
    pub fn best_iscale(self, x: &[f32; 32], w: &[f32; 32], max: f32) -> f32 {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { best_iscale(x, w, max) }
    }

    /// `qp::refine`.
    pub fn refine(self, x: &[f32; 32], w: &[f32; 32], iscale: f32) -> f32 {
        // SAFETY: `self` proves that the processor has AVX2.
        unsafe { refine(x, w, iscale) }
    }
}

/// `min(nearest_int(v), NMAX)`.
#[inline]
#[target_feature(enable = "avx2")]
fn code(v: __m256) -> __m256i {
    let bits = _mm256_castps_si256(_mm256_add_ps(v, _mm256_set1_ps(12_582_912.0)));
    let l = _mm256_sub_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff)), _mm256_set1_epi32(0x0040_0000));
    _mm256_min_epi32(l, _mm256_set1_epi32(NMAX))
}

#[target_feature(enable = "avx2")]
fn best_iscale(x: &[f32; 32], w: &[f32; 32], max: f32) -> f32 {
    let iscales = qp::TRIALS.map(|is| (0.1f32 * is as f32 + NMAX as f32) / max);
    let (iscale, scale) = (load(&iscales), load(&iscales.map(|i| 1.0 / i)));
    let mut mse = _mm256_setzero_ps();
    for (&x, &w) in x.iter().zip(w) {
        let (x, w) = (_mm256_set1_ps(x), _mm256_set1_ps(w));
        let l = _mm256_cvtepi32_ps(code(_mm256_mul_ps(iscale, x)));
        let diff = _mm256_sub_ps(x, _mm256_mul_ps(scale, l));
        mse = _mm256_add_ps(mse, _mm256_mul_ps(_mm256_mul_ps(w, diff), diff));
    }
    qp::choose(x, w, max, &iscales, &store(mse))
}

#[target_feature(enable = "avx2")]
fn refine(x: &[f32; 32], w: &[f32; 32], iscale: f32) -> f32 {
    let (mut codes, mut sumlx, mut suml2) = qp::first_codes(x, w, iscale);
    let zero = _mm256_setzero_ps();
    for _ in 0..qp::PASSES {
        let mut changed = false;
        for first in (0..32).step_by(8) {
            let (x8, w8): (&[f32; 8], &[f32; 8]) =
                (x[first..].first_chunk().expect("whole"), w[first..].first_chunk().expect("whole"));
            let (vx, vw) = (load(x8), load(w8));
            let wx = _mm256_mul_ps(vw, vx);
            // Elements of the eight that are still to be tried.
            let mut todo = 0xffu32;
            while todo != 0 {
                let codes8: &[i32; 8] = codes[first..].first_chunk().expect("whole");
                // SAFETY: `codes8` is 32 readable bytes; the load needs no alignment.
                let old = unsafe { _mm256_loadu_si256(codes8.as_ptr().cast()) };
                let l = _mm256_cvtepi32_ps(old);
                let slx = _mm256_sub_ps(_mm256_set1_ps(sumlx), _mm256_mul_ps(wx, l));
                let sl2 = _mm256_sub_ps(_mm256_set1_ps(suml2), _mm256_mul_ps(_mm256_mul_ps(vw, l), l));
                let positive =
                    _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(slx, zero), _mm256_cmp_ps::<_CMP_GT_OQ>(sl2, zero));
                let new = code(_mm256_div_ps(_mm256_mul_ps(vx, sl2), slx));
                let n = _mm256_cvtepi32_ps(new);
                let slx = _mm256_add_ps(slx, _mm256_mul_ps(wx, n));
                let sl2 = _mm256_add_ps(sl2, _mm256_mul_ps(_mm256_mul_ps(vw, n), n));
                let better = _mm256_cmp_ps::<_CMP_GT_OQ>(
                    _mm256_mul_ps(_mm256_mul_ps(slx, slx), _mm256_set1_ps(suml2)),
                    _mm256_mul_ps(_mm256_set1_ps(sumlx * sumlx), sl2),
                );
                let same = _mm256_castsi256_ps(_mm256_cmpeq_epi32(new, old));
                let take = _mm256_andnot_ps(same, _mm256_and_ps(positive, better));
                let take = _mm256_movemask_ps(take) as u32 & todo;
                if take == 0 {
                    break;
                }
                let lane = take.trailing_zeros() as usize & 7;
                let mut news = [0i32; 8];
                // SAFETY: `news` is 32 writable bytes; the store needs no alignment.
                unsafe { _mm256_storeu_si256(news.as_mut_ptr().cast(), new) };
                codes[first + lane] = i32::from(news[lane] as u8);
                (sumlx, suml2) = (store(slx)[lane], store(sl2)[lane]);
                changed = true;
                todo = 0xfe << lane & 0xff;
            }
        }
        if !changed {
            break;
        }
    }
    qp::ratio(sumlx, suml2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_to_scalar() {
        let Some(isa) = Avx2::get() else { return };
        let mut state = 1u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0
        };
        for case in 0..3000 {
            // Mostly positive, as IQ2_XXS has it; weights with holes and of many sizes.
            let mut x: [f32; 32] = std::array::from_fn(|_| next() - if case % 2 == 0 { 0.02 } else { 0.3 });
            x[case % 32] = 1.0;
            let w: [f32; 32] = std::array::from_fn(|_| (next() - 0.2).max(0.0).powi(1 + case as i32 % 9));
            let max = x.iter().fold(0.0f32, |m, &v| m.max(v));
            let iscale = qp::best_iscale(&x, &w, max);
            assert_eq!(isa.best_iscale(&x, &w, max).to_bits(), iscale.to_bits());
            assert_eq!(isa.refine(&x, &w, iscale).to_bits(), qp::refine(&x, &w, iscale).to_bits());
        }
    }
}
