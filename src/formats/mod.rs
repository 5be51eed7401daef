//! Block formats: how a row of numbers becomes blocks of bytes, and back.
//!
//! Each format is a unit struct that implements [`BlockFormat`]; [`format()`] is the table. Encoders give the bytes of
//! `ggml_quantize_chunk` (llama.cpp b11434, built for baseline x86-64: plain f32, left to right, no fused multiply-add).
//! The scalar code is the definition; `simd` holds kernels that do the same operations in the same order, one block
//! (or sub-block) per lane.

pub mod float;
pub mod grid;
pub mod iq;
pub mod iq4;
pub mod kquant;
pub mod legacy;
pub mod low;
pub mod search;
pub mod simd;
pub mod unpack;

use crate::gguf::GgmlType;

/// Why a row could not be encoded, or a block is not valid.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FormatError {
    #[error("{0} needs importance weights (an imatrix entry for this tensor)")]
    NeedsWeights(GgmlType),
    #[error("{0} cannot be encoded by this program, only copied")]
    DecodeOnly(GgmlType),
    #[error("block {block}: the scale is not finite")]
    BadScale { block: usize },
    #[error("element {index} is {value}")]
    NotFinite { index: usize, value: f32 },
    #[error("the search for a scale met values that are too large (sum of squares overflows f32)")]
    Overflow,
}

/// One block format.
///
/// Lengths are the caller's promise: `rows.len()` is a multiple of `n_per_row`, `n_per_row` of
/// [`GgmlType::block_len`], and byte slices hold exactly the blocks of the elements (checked with `assert!`).
pub trait BlockFormat: Sync {
    /// The type that this format is.
    fn ggml_type(&self) -> GgmlType;

    /// Blocks to f32 (`dequantize_row_*`).
    fn decode(&self, blocks: &[u8], out: &mut [f32]);

    /// Rows of f32 to blocks. `weights` is one row of importance (`n_per_row` values), used for every row.
    fn encode(
        &self,
        rows: &[f32],
        n_per_row: usize,
        weights: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), FormatError>;

    /// `ggml_validate_row_data`: no NaN or infinity among the values or scales.
    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError>;
}

/// The format of a type; `None` for the integer types and the activation types Q8_1, Q8_K, F64.
pub fn format(ty: GgmlType) -> Option<&'static dyn BlockFormat> {
    use GgmlType::*;
    Some(match ty {
        F32 => &float::F32,
        F16 => &float::F16,
        BF16 => &float::Bf16,
        Q4_0 => &legacy::Q4_0,
        Q4_1 => &legacy::Q4_1,
        Q5_0 => &legacy::Q5_0,
        Q5_1 => &legacy::Q5_1,
        Q8_0 => &legacy::Q8_0,
        Q2_K => &kquant::Q2K,
        Q3_K => &kquant::Q3K,
        Q4_K => &kquant::Q4K,
        Q5_K => &kquant::Q5K,
        Q6_K => &kquant::Q6K,
        IQ4_NL => &iq4::Iq4Nl,
        IQ4_XS => &iq4::Iq4Xs,
        IQ2_XXS => &iq::Iq2Xxs,
        IQ2_XS => &iq::Iq2Xs,
        IQ2_S => &iq::Iq2S,
        IQ3_XXS => &iq::Iq3Xxs,
        IQ3_S => &iq::Iq3S,
        IQ1_S => &iq::Iq1S,
        IQ1_M => &iq::Iq1M,
        TQ1_0 => &low::Tq1_0,
        TQ2_0 => &low::Tq2_0,
        MXFP4 => &low::Mxfp4,
        NVFP4 => &low::Nvfp4,
        Q1_0 => &low::Q1_0,
        Q2_0 => &low::Q2_0,
        Q8_1 | Q8_K | I8 | I16 | I32 | I64 | F64 => return None,
    })
}

/// The caller's promise about [`BlockFormat::encode`].
#[inline]
fn check_encode(ty: GgmlType, rows: &[f32], n_per_row: usize, weights: Option<&[f32]>, out: &[u8]) {
    assert!(n_per_row.is_multiple_of(ty.block_len()), "a row of {ty} holds whole blocks");
    assert!(rows.is_empty() || n_per_row > 0 && rows.len().is_multiple_of(n_per_row), "whole rows");
    assert!(weights.is_none_or(|w| w.len() == n_per_row), "one weight per column");
    assert_eq!(out.len(), rows.len() / ty.block_len() * ty.block_bytes(), "room for the blocks");
}

/// The caller's promise about [`BlockFormat::decode`].
#[inline]
fn check_decode(ty: GgmlType, blocks: &[u8], out: &[f32]) {
    assert!(out.len().is_multiple_of(ty.block_len()), "whole blocks of {ty}");
    assert_eq!(blocks.len(), out.len() / ty.block_len() * ty.block_bytes(), "the blocks of the values");
}

/// `ggml_validate_row_data` for formats whose only floats are f16 fields at `offsets` of each block.
fn validate_f16_fields(ty: GgmlType, blocks: &[u8], offsets: &[usize]) -> Result<(), FormatError> {
    assert!(blocks.len().is_multiple_of(ty.block_bytes()), "whole blocks of {ty}");
    for (block, bytes) in blocks.chunks_exact(ty.block_bytes()).enumerate() {
        if offsets.iter().any(|&at| bytes[at + 1] & 0x7c == 0x7c) {
            return Err(FormatError::BadScale { block });
        }
    }
    Ok(())
}
