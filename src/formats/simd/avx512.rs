//! AVX-512: sixteen lanes.

use super::super::iq4::{BORDERS, VALUES};
use super::vector::{Mask, ROUNDER, Vector};
use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, Div, Mul, Sub};

super::entry_points!("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c", Avx512);

/// Sixteen lanes. Values exist only inside the entry points, which enable AVX-512.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// One bit per lane.
#[derive(Clone, Copy)]
pub(super) struct Avx512Mask(__mmask16);

/// Evaluates intrinsics that touch registers only.
macro_rules! avx512 {
    ($e:expr) => {
        // SAFETY: the intrinsics need AVX-512 F and DQ or less, and vectors of this module are used only by its entry
        // points, which run after these were detected.
        unsafe { $e }
    };
}

impl BitAnd for Avx512Mask {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Avx512Mask(self.0 & other.0)
    }
}

impl Mask for Avx512Mask {
    #[inline(always)]
    fn any(self) -> bool {
        self.0 != 0
    }

    #[inline(always)]
    fn all(self) -> bool {
        self.0 == 0xffff
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for Avx512 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Avx512(avx512!($intrinsic(self.0, other.0)))
            }
        }
    };
}

operator!(Add, add, _mm512_add_ps);
operator!(Sub, sub, _mm512_sub_ps);
operator!(Mul, mul, _mm512_mul_ps);
operator!(Div, div, _mm512_div_ps);

impl Vector for Avx512 {
    const LANES: usize = 16;
    type Mask = Avx512Mask;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Avx512(avx512!(_mm512_set1_ps(v)))
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..16];
        // SAFETY: AVX-512 as in `avx512!`; the slice holds sixteen values.
        Avx512(unsafe { _mm512_loadu_ps(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..16];
        // SAFETY: AVX-512 as in `avx512!`; the slice holds sixteen values.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u16]) {
        let dst = &mut dst[..16];
        // SAFETY: AVX-512 as in `avx512!`; the slice holds sixteen values.
        unsafe {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0);
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), halves);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: AVX-512 as in `avx512!`; the slice holds sixteen bytes.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0))) };
    }

    #[inline(always)]
    fn fifth_bits(levels: &[u8; 32]) -> u32 {
        super::avx2::Avx2::fifth_bits(levels)
    }

    /// Two transpositions of 8 × 8 values, of the first and of the last eight rows.
    #[inline(always)]
    fn load_columns(src: &[f32], stride: usize) -> [Self; 8] {
        let low = super::avx2::Avx2::load_columns(src, stride);
        let high = super::avx2::Avx2::load_columns(&src[8 * stride..], stride);
        let mut out = [Self::zero(); 8];
        let mut i = 0;
        while i < 8 {
            let low = avx512!(_mm512_castps256_ps512(low[i].register()));
            out[i] = Avx512(avx512!(_mm512_insertf32x8::<1>(low, high[i].register())));
            i += 1;
        }
        out
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Avx512(avx512!(_mm512_sqrt_ps(self.0)))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Avx512(avx512!(_mm512_andnot_ps(_mm512_set1_ps(-0.0), self.0)))
    }

    #[inline(always)]
    fn neg(self) -> Self {
        Avx512(avx512!(_mm512_xor_ps(_mm512_set1_ps(-0.0), self.0)))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn nearest(self) -> Self {
        avx512!({
            let bits = _mm512_castps_si512(_mm512_add_ps(self.0, _mm512_set1_ps(ROUNDER)));
            let mantissa = _mm512_and_si512(bits, _mm512_set1_epi32(0x007f_ffff));
            Avx512(_mm512_cvtepi32_ps(_mm512_sub_epi32(mantissa, _mm512_set1_epi32(0x0040_0000))))
        })
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        avx512!({
            let byte = _mm512_and_si512(_mm512_cvttps_epi32(self.0), _mm512_set1_epi32(0xff));
            Avx512(_mm512_cvtepi32_ps(byte))
        })
    }

    #[inline(always)]
    fn iq4_value(self) -> Self {
        const VALUE: [f32; 16] = {
            let mut out = [0.0; 16];
            let mut k = 0;
            while k < 16 {
                out[k] = VALUES[k] as f32;
                k += 1;
            }
            out
        };
        let value = Self::load(&VALUE);
        // The lookup takes the low four bits.
        Avx512(avx512!(_mm512_permutexvar_ps(iq4_search(self.0), value.0)))
    }

    #[inline(always)]
    fn iq4_level(self) -> Self {
        Avx512(avx512!(_mm512_cvtepi32_ps(_mm512_sub_epi32(iq4_search(self.0), _mm512_set1_epi32(16)))))
    }

    #[inline(always)]
    fn gt(self, other: Self) -> Avx512Mask {
        Avx512Mask(avx512!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0)))
    }

    #[inline(always)]
    fn ne(self, other: Self) -> Avx512Mask {
        Avx512Mask(avx512!(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self.0, other.0)))
    }

    #[inline(always)]
    fn replace(self, mask: Avx512Mask, set: Self) -> Self {
        Avx512(avx512!(_mm512_mask_blend_ps(mask.0, self.0, set.0)))
    }
}

/// The nearest IQ4 level plus 16.
///
/// A binary search in four steps that looks up each border by the bits found so far.
#[inline(always)]
fn iq4_search(v: __m512) -> __m512i {
    /// Entry 2^s + i is the border that step s compares with after finding the bits i.
    const TREE: [f32; 16] = {
        let mut out = [0.0; 16];
        let mut step = 0;
        while step < 4 {
            let mut i = 0;
            while i < 1 << step {
                // Levels from (2·i + 1) · 2^(3 − step) on are above.
                out[(1 << step) + i] = BORDERS[((2 * i + 1) << (3 - step)) - 1];
                i += 1;
            }
            step += 1;
        }
        out
    };
    let tree = Avx512::load(&TREE);
    // The position in the tree: a leading one and the bits found.
    let mut at = avx512!(_mm512_set1_epi32(1));
    let mut step = 0;
    while step < 4 {
        avx512!({
            let border = _mm512_permutexvar_ps(at, tree.0);
            // "Not less" is true for NaN.
            let upper = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(v, border);
            at = _mm512_add_epi32(at, at);
            at = _mm512_mask_add_epi32(at, upper, at, _mm512_set1_epi32(1));
        });
        step += 1;
    }
    at
}
