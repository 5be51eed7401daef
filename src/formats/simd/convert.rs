//! Slice conversions between the float types, and the search for values that are not finite.
//!
//! The 16-bit side is little-endian bytes of any alignment, as files are mapped.

use super::super::search::{from_f16_bits, to_f16_bits};

/// bf16 to f32, exact.
pub fn bf16_to_f32(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), 2 * dst.len());
    for (v, b) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = f32::from_bits((u16::from_le_bytes(*b) as u32) << 16);
    }
}

/// f16 to f32, exact.
pub fn f16_to_f32(src: &[u8], dst: &mut [f32]) {
    assert_eq!(src.len(), 2 * dst.len());
    for (v, b) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *v = from_f16_bits(u16::from_le_bytes(*b));
    }
}

/// f32 to bf16 (`ggml_fp32_to_bf16_row_ref`): nearest even, subnormals kept, NaN made quiet.
pub fn f32_to_bf16(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), 2 * src.len());
    for (b, v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        let bits = v.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
        let quiet = (bits >> 16) | 64;
        *b = (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded } as u16).to_le_bytes();
    }
}

/// f32 to f16 (`ggml_fp32_to_fp16_row`): nearest even, overflow to infinity.
pub fn f32_to_f16(src: &[f32], dst: &mut [u8]) {
    assert_eq!(dst.len(), 2 * src.len());
    for (b, v) in dst.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        *b = to_f16_bits(*v).to_le_bytes();
    }
}

/// The index of the first NaN or infinity.
pub fn find_non_finite(values: &[f32]) -> Option<usize> {
    const STRETCH: usize = 256;
    let bad = |v: &f32| v.to_bits() & 0x7f80_0000 == 0x7f80_0000;
    for (i, stretch) in values.chunks(STRETCH).enumerate() {
        if stretch.iter().fold(false, |any, v| any | bad(v)) {
            return stretch.iter().position(bad).map(|at| i * STRETCH + at);
        }
    }
    None
}
