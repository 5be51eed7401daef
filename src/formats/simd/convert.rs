//! Slice conversions between the float types, and the search for values that are not finite.
//!
//! The 16-bit side is little-endian bytes of any alignment, as files are mapped. The loops are plain; on x86-64 they
//! are compiled a second time for AVX2, where f16 has instructions of its own.

use super::super::search::{from_f16_bits, to_f16_bits};
#[cfg(target_arch = "x86_64")]
use super::{Isa, isa};

/// Defines a public function that runs `$body` for AVX2 where it can, else as the compiler's target has it.
macro_rules! for_avx2 {
    ($(#[$doc:meta])* $name:ident($src:ident: $src_ty:ty, $dst:ident: $dst_ty:ty), $check:expr, $plain:expr, $avx2:expr) => {
        $(#[$doc])*
        pub fn $name($src: $src_ty, $dst: $dst_ty) {
            $check;
            #[cfg(target_arch = "x86_64")]
            if matches!(isa(), Isa::Avx2 | Isa::Avx512) {
                #[target_feature(enable = "avx2,f16c")]
                fn avx2($src: $src_ty, $dst: $dst_ty) {
                    $avx2
                }
                // SAFETY: `isa` gives only instruction sets that this machine has, and AVX-512 comes with AVX2, F16C.
                return unsafe { avx2($src, $dst) };
            }
            $plain
        }
    };
}

for_avx2!(
    /// bf16 to f32, exact.
    bf16_to_f32(src: &[u8], dst: &mut [f32]),
    assert_eq!(src.len(), 2 * dst.len()),
    widen_bf16(src, dst),
    widen_bf16(src, dst)
);

for_avx2!(
    /// f32 to bf16 (`ggml_fp32_to_bf16_row_ref`): nearest even, subnormals kept, NaN made quiet.
    f32_to_bf16(src: &[f32], dst: &mut [u8]),
    assert_eq!(dst.len(), 2 * src.len()),
    narrow_bf16(src, dst),
    narrow_bf16(src, dst)
);

for_avx2!(
    /// f16 to f32, exact.
    f16_to_f32(src: &[u8], dst: &mut [f32]),
    assert_eq!(src.len(), 2 * dst.len()),
    widen_f16(src, dst),
    {
        use std::arch::x86_64::*;
        let (halves, rest) = src.as_chunks::<16>();
        let (wide, tail) = dst.as_chunks_mut::<8>();
        for (v, b) in wide.iter_mut().zip(halves) {
            // SAFETY: both sides hold eight values, at any alignment.
            unsafe { _mm256_storeu_ps(v.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(b.as_ptr().cast()))) };
        }
        widen_f16(rest, tail);
    }
);

for_avx2!(
    /// f32 to f16 (`ggml_fp32_to_fp16_row`): nearest even, overflow to infinity. NaN stays NaN.
    f32_to_f16(src: &[f32], dst: &mut [u8]),
    assert_eq!(dst.len(), 2 * src.len()),
    narrow_f16(src, dst),
    {
        use std::arch::x86_64::*;
        let (wide, rest) = src.as_chunks::<8>();
        let (halves, tail) = dst.as_chunks_mut::<16>();
        for (b, v) in halves.iter_mut().zip(wide) {
            // SAFETY: both sides hold eight values, at any alignment.
            unsafe {
                let half = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(_mm256_loadu_ps(v.as_ptr()));
                _mm_storeu_si128(b.as_mut_ptr().cast(), half);
            }
        }
        narrow_f16(rest, tail);
    }
);

#[inline(always)]
fn widen_bf16(src: &[u8], dst: &mut [f32]) {
    for (v, b) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = f32::from_bits((u16::from_le_bytes(*b) as u32) << 16);
    }
}

#[inline(always)]
fn narrow_bf16(src: &[f32], dst: &mut [u8]) {
    for (b, v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        let bits = v.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 64;
        *b = (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded } as u16).to_le_bytes();
    }
}

#[inline(always)]
fn widen_f16(src: &[u8], dst: &mut [f32]) {
    for (v, b) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = from_f16_bits(u16::from_le_bytes(*b));
    }
}

#[inline(always)]
fn narrow_f16(src: &[f32], dst: &mut [u8]) {
    for (b, v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        *b = to_f16_bits(*v).to_le_bytes();
    }
}

/// The index of the first NaN or infinity.
pub fn find_non_finite(values: &[f32]) -> Option<usize> {
    const STRETCH: usize = 256;
    let bad = |v: &f32| v.to_bits() & 0x7f80_0000 == 0x7f80_0000;
    // A stretch is tested without branches, which the compiler vectorizes.
    for (i, stretch) in values.chunks(STRETCH).enumerate() {
        if stretch.iter().fold(false, |any, v| any | bad(v)) {
            return stretch.iter().position(bad).map(|at| i * STRETCH + at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::simd::{Isa, with_isa};

    #[test]
    fn every_half_survives_on_every_isa() {
        let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let finite = |b: &[u8], exponent| u16::from_le_bytes([b[0], b[1]]) & exponent != exponent;
        for isa in Isa::available() {
            with_isa(isa, || {
                let (mut wide, mut back) = (vec![0.0; 65536], vec![0; 131072]);
                f16_to_f32(&bits, &mut wide);
                f32_to_f16(&wide, &mut back);
                let halves = bits.chunks(2).zip(back.chunks(2)).filter(|(b, _)| finite(b, 0x7c00));
                assert_eq!(halves.map(|(b, c)| assert_eq!(b, c)).count(), 65536 - 2048);
                assert_eq!(wide[0x3555], half::f16::from_bits(0x3555).to_f32());
                bf16_to_f32(&bits, &mut wide);
                f32_to_bf16(&wide, &mut back);
                let halves = bits.chunks(2).zip(back.chunks(2)).filter(|(b, _)| finite(b, 0x7f80));
                assert_eq!(halves.map(|(b, c)| assert_eq!(b, c)).count(), 65536 - 256);
            });
        }
    }

    #[test]
    fn narrowing_rounds_alike_on_every_isa() {
        // Steps through all floats; the prime keeps the low bits varied. The length leaves a tail.
        let values: Vec<f32> = (0..1_000_003u32).map(|i| f32::from_bits(i.wrapping_mul(4_294_967))).collect();
        let values: Vec<f32> = values.into_iter().filter(|v| !v.is_nan()).collect();
        let mut want = vec![0; 2 * values.len()];
        narrow_f16(&values, &mut want);
        for isa in Isa::available() {
            let mut got = vec![0; want.len()];
            with_isa(isa, || f32_to_f16(&values, &mut got));
            assert!(got == want, "{}", isa.name());
            with_isa(isa, || f32_to_bf16(&values, &mut got));
            let all_equal = values.iter().zip(got.chunks(2)).all(|(v, b)| half::bf16::from_f32(*v).to_le_bytes() == b);
            assert!(all_equal, "{}", isa.name());
        }
    }

    #[test]
    fn the_first_bad_value_is_found() {
        let mut values = vec![f32::MAX; 1000];
        assert_eq!(find_non_finite(&values), None);
        for at in [999, 512, 255, 0] {
            values[at] = if at % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY };
            assert_eq!(find_non_finite(&values), Some(at));
        }
    }
}
