//! F32, F16, BF16: one value is one block.
//!
//! Encoding F16 turns magnitudes from 65520 up into infinity, as ggml does; [`BlockFormat::validate`] of the output
//! tells. The work is done by the slice conversions of [`simd::convert`](mod@super::simd::convert).

use super::{BlockFormat, FormatError, check_decode, check_encode, simd};
use crate::gguf::GgmlType;

/// F32: the bytes of the values (`ggml_quantize_chunk` copies).
pub struct F32;

impl BlockFormat for F32 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F32
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (out, bytes) in out.iter_mut().zip(blocks.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*bytes);
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        for (bytes, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(rows) {
            *bytes = v.to_le_bytes();
        }
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        let bad = |b: &[u8; 4]| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000;
        first_bad(blocks.as_chunks::<4>().0, bad, |b| f32::from_le_bytes(*b))
    }
}

/// F16 (`ggml_fp32_to_fp16_row`).
pub struct F16;

impl BlockFormat for F16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F16
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        simd::convert::f16_to_f32(blocks, out);
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::convert::f32_to_f16(rows, out);
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        let bad = |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7c00 == 0x7c00;
        first_bad(blocks.as_chunks::<2>().0, bad, |b| half::f16::from_le_bytes(*b).to_f32())
    }
}

/// BF16 (`ggml_fp32_to_bf16_row_ref`): rounds to nearest even and keeps subnormals.
pub struct Bf16;

impl BlockFormat for Bf16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::BF16
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        simd::convert::bf16_to_f32(blocks, out);
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::convert::f32_to_bf16(rows, out);
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        let bad = |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7f80 == 0x7f80;
        first_bad(blocks.as_chunks::<2>().0, bad, |b| half::bf16::from_le_bytes(*b).to_f32())
    }
}

/// The first value that is not finite. Whole stretches are tested without a branch per value, so that the compiler
/// vectorizes the test.
fn first_bad<const N: usize>(
    values: &[[u8; N]],
    bad: impl Fn(&[u8; N]) -> bool,
    value: impl Fn(&[u8; N]) -> f32,
) -> Result<(), FormatError> {
    const STRETCH: usize = 256;
    for (i, stretch) in values.chunks(STRETCH).enumerate() {
        if stretch.iter().fold(false, |any, v| any | bad(v)) {
            let at = stretch.iter().position(&bad).expect("the fold saw one");
            return Err(FormatError::NotFinite { index: i * STRETCH + at, value: value(&stretch[at]) });
        }
    }
    Ok(())
}
