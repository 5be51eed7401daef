//! AVX2: eight lanes.

use super::super::iq4::{BORDERS, VALUES};
use super::vector::{Mask, ROUNDER, Vector, Wide};
use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, Div, Mul, Sub};

/// Sixteen lanes: sixteen sub-blocks, or the sub-blocks of two super-blocks.
type Lanes = Wide<Avx2, 2>;

super::entry_points!("avx2,f16c", Lanes);

/// Eight lanes. Values exist only inside the entry points, which enable AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

/// All bits of a lane are set or none.
#[derive(Clone, Copy)]
pub(super) struct Avx2Mask(__m256);

/// Evaluates intrinsics that touch registers only.
macro_rules! avx2 {
    ($e:expr) => {
        // SAFETY: the intrinsics need AVX2 or F16C, and vectors of this module are used only by its entry points, which run
        // after both were detected.
        unsafe { $e }
    };
}
impl Avx2 {
    /// For vectors that are made of two.
    #[inline(always)]
    pub(super) fn register(self) -> __m256 {
        self.0
    }
}

impl BitAnd for Avx2Mask {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Avx2Mask(avx2!(_mm256_and_ps(self.0, other.0)))
    }
}

impl Mask for Avx2Mask {
    #[inline(always)]
    fn any(self) -> bool {
        avx2!(_mm256_movemask_ps(self.0)) != 0
    }

    #[inline(always)]
    fn all(self) -> bool {
        avx2!(_mm256_movemask_ps(self.0)) == 0xff
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for Avx2 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Avx2(avx2!($intrinsic(self.0, other.0)))
            }
        }
    };
}

operator!(Add, add, _mm256_add_ps);
operator!(Sub, sub, _mm256_sub_ps);
operator!(Mul, mul, _mm256_mul_ps);
operator!(Div, div, _mm256_div_ps);

impl Vector for Avx2 {
    const LANES: usize = 8;
    type Mask = Avx2Mask;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Avx2(avx2!(_mm256_set1_ps(v)))
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..8];
        // SAFETY: AVX2 as in `avx2!`; the slice holds eight values.
        Avx2(unsafe { _mm256_loadu_ps(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..8];
        // SAFETY: AVX2 as in `avx2!`; the slice holds eight values.
        unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u16]) {
        let dst = &mut dst[..8];
        // SAFETY: AVX2 and F16C as in `avx2!`; the slice holds eight values.
        unsafe {
            let halves = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0);
            _mm_storeu_si128(dst.as_mut_ptr().cast(), halves);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let dst = &mut dst[..8];
        // SAFETY: AVX2 as in `avx2!`; the slice holds eight bytes.
        unsafe {
            let wide = _mm256_cvttps_epi32(self.0);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storel_epi64(dst.as_mut_ptr().cast(), _mm_packus_epi16(words, words));
        }
    }

    #[inline(always)]
    fn fifth_bits(levels: &[u8; 32]) -> u32 {
        // SAFETY: AVX2 as in `avx2!`; the array holds 32 bytes.
        unsafe {
            let levels = _mm256_loadu_si256(levels.as_ptr().cast());
            // Bit 4 becomes the sign of each byte.
            _mm256_movemask_epi8(_mm256_slli_epi16::<3>(levels)) as u32
        }
    }

    /// A transposition of 8 × 8 values: pairs, fours, halves.
    #[inline(always)]
    fn load_columns(src: &[f32], stride: usize) -> [Self; 8] {
        let mut r = [Self::zero(); 8];
        let mut k = 0;
        while k < 8 {
            r[k] = Self::load(&src[k * stride..]);
            k += 1;
        }
        let [r0, r1, r2, r3, r4, r5, r6, r7] = r;
        avx2!({
            let (a0, a1) = (_mm256_unpacklo_ps(r0.0, r1.0), _mm256_unpackhi_ps(r0.0, r1.0));
            let (a2, a3) = (_mm256_unpacklo_ps(r2.0, r3.0), _mm256_unpackhi_ps(r2.0, r3.0));
            let (a4, a5) = (_mm256_unpacklo_ps(r4.0, r5.0), _mm256_unpackhi_ps(r4.0, r5.0));
            let (a6, a7) = (_mm256_unpacklo_ps(r6.0, r7.0), _mm256_unpackhi_ps(r6.0, r7.0));
            let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xee>(a0, a2));
            let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xee>(a1, a3));
            let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xee>(a4, a6));
            let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xee>(a5, a7));
            [
                Avx2(_mm256_permute2f128_ps::<0x20>(b0, b4)),
                Avx2(_mm256_permute2f128_ps::<0x20>(b1, b5)),
                Avx2(_mm256_permute2f128_ps::<0x20>(b2, b6)),
                Avx2(_mm256_permute2f128_ps::<0x20>(b3, b7)),
                Avx2(_mm256_permute2f128_ps::<0x31>(b0, b4)),
                Avx2(_mm256_permute2f128_ps::<0x31>(b1, b5)),
                Avx2(_mm256_permute2f128_ps::<0x31>(b2, b6)),
                Avx2(_mm256_permute2f128_ps::<0x31>(b3, b7)),
            ]
        })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Avx2(avx2!(_mm256_sqrt_ps(self.0)))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Avx2(avx2!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)))
    }

    #[inline(always)]
    fn neg(self) -> Self {
        Avx2(avx2!(_mm256_xor_ps(_mm256_set1_ps(-0.0), self.0)))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_min_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_max_ps(self.0, other.0)))
    }

    #[inline(always)]
    fn nearest(self) -> Self {
        avx2!({
            let bits = _mm256_castps_si256(_mm256_add_ps(self.0, _mm256_set1_ps(ROUNDER)));
            let mantissa = _mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff));
            Avx2(_mm256_cvtepi32_ps(_mm256_sub_epi32(mantissa, _mm256_set1_epi32(0x0040_0000))))
        })
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        avx2!({
            let byte = _mm256_and_si256(_mm256_cvttps_epi32(self.0), _mm256_set1_epi32(0xff));
            Avx2(_mm256_cvtepi32_ps(byte))
        })
    }

    #[inline(always)]
    fn iq4_value(self) -> Self {
        const EVEN: [f32; 8] = iq4_values(0);
        const ODD: [f32; 8] = iq4_values(1);
        let (pair, upper) = iq4_search(self.0);
        let (even, odd) = (Self::load(&EVEN), Self::load(&ODD));
        avx2!({
            let low = _mm256_permutevar8x32_ps(even.0, pair);
            let high = _mm256_permutevar8x32_ps(odd.0, pair);
            Avx2(_mm256_blendv_ps(low, high, upper))
        })
    }

    #[inline(always)]
    fn iq4_level(self) -> Self {
        let (pair, upper) = iq4_search(self.0);
        // A set mask is −1.
        avx2!({
            let level = _mm256_sub_epi32(_mm256_add_epi32(pair, pair), _mm256_castps_si256(upper));
            Avx2(_mm256_cvtepi32_ps(level))
        })
    }

    #[inline(always)]
    fn gt(self, other: Self) -> Avx2Mask {
        Avx2Mask(avx2!(_mm256_cmp_ps::<_CMP_GT_OQ>(self.0, other.0)))
    }

    #[inline(always)]
    fn ne(self, other: Self) -> Avx2Mask {
        Avx2Mask(avx2!(_mm256_cmp_ps::<_CMP_NEQ_UQ>(self.0, other.0)))
    }

    #[inline(always)]
    fn replace(self, mask: Avx2Mask, set: Self) -> Self {
        Avx2(avx2!(_mm256_blendv_ps(self.0, set.0, mask.0)))
    }
}

/// The values of the even or odd IQ4 levels.
const fn iq4_values(odd: usize) -> [f32; 8] {
    let mut out = [0.0; 8];
    let mut k = 0;
    while k < 8 {
        out[k] = VALUES[2 * k + odd] as f32;
        k += 1;
    }
    out
}

/// The borders between the two levels of each pair.
const fn iq4_pair_borders() -> [f32; 8] {
    let mut out = [0.0; 8];
    let mut k = 0;
    while k < 8 {
        out[k] = BORDERS[2 * k];
        k += 1;
    }
    out
}

/// The nearest IQ4 level as a pair of neighbours, 0..8, and whether it is the upper one.
///
/// A binary search in four steps. The second chooses its border by blending, the third and fourth look it up.
#[inline(always)]
fn iq4_search(v: __m256) -> (__m256i, __m256) {
    const PAIRS: [f32; 8] = iq4_pair_borders();
    /// Borders between pairs within each four, for both halves of the vector.
    const FOURS: [f32; 8] =
        [BORDERS[1], BORDERS[5], BORDERS[9], BORDERS[13], BORDERS[1], BORDERS[5], BORDERS[9], BORDERS[13]];
    // "Not less" is true for NaN.
    const NLT: i32 = _CMP_NLT_UQ;
    /// One bit where the mask is set.
    #[inline(always)]
    fn bit(mask: __m256, bit: i32) -> __m256i {
        avx2!(_mm256_and_si256(_mm256_castps_si256(mask), _mm256_set1_epi32(bit)))
    }
    let (pairs, fours) = (Avx2::load(&PAIRS), Avx2::load(&FOURS));
    avx2!({
        let upper_half = _mm256_cmp_ps::<NLT>(v, _mm256_set1_ps(BORDERS[7]));
        let border = _mm256_blendv_ps(_mm256_set1_ps(BORDERS[3]), _mm256_set1_ps(BORDERS[11]), upper_half);
        let upper_four = _mm256_cmp_ps::<NLT>(v, border);
        let four = _mm256_or_si256(bit(upper_half, 2), bit(upper_four, 1));
        let border = _mm256_permutevar_ps(fours.0, four);
        let upper_pair = _mm256_cmp_ps::<NLT>(v, border);
        let pair = _mm256_or_si256(_mm256_add_epi32(four, four), bit(upper_pair, 1));
        let border = _mm256_permutevar8x32_ps(pairs.0, pair);
        (pair, _mm256_cmp_ps::<NLT>(v, border))
    })
}
