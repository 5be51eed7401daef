//! Formats of one to four bits without a codebook: ternary, binary, quaternary and the two FP4 block formats.
//!
//! None of them uses importance weights; an encoder ignores those given to it. Sources: `quantize_row_*_ref` and
//! `dequantize_row_*` in ggml-quants.c, block structs in ggml-common.h (llama.cpp b11434).

mod binary;
mod fp4;
mod ternary;

pub use binary::{Q1_0, Q2_0};
pub use fp4::{Mxfp4, Nvfp4};
pub use ternary::{Tq1_0, Tq2_0};

use super::FormatError;

/// The f16 scale at byte offset `at` of a block, as f32.
fn scale_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `GGML_FP32_TO_FP16` as little-endian bytes; too large a value becomes infinity (found by validation).
fn f16_bytes(v: f32) -> [u8; 2] {
    half::f16::from_f32(v).to_le_bytes()
}

/// Checks that the f16 at byte offset `at` of each block is finite.
fn validate_f16(blocks: &[u8], block_bytes: usize, at: usize) -> Result<(), FormatError> {
    assert!(blocks.len().is_multiple_of(block_bytes), "whole blocks");
    let bad = |b: &[u8]| b[at + 1] & 0x7c == 0x7c;
    match blocks.chunks_exact(block_bytes).position(bad) {
        Some(block) => Err(FormatError::BadScale { block }),
        None => Ok(()),
    }
}

/// `MAX` over absolute values, starting at 0.
fn abs_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, v| if m > v.abs() { m } else { v.abs() })
}

/// Panics unless `blocks` holds the blocks of exactly `n` elements.
fn check_lengths(ty: crate::gguf::GgmlType, n: usize, bytes: usize) {
    assert_eq!(ty.row_bytes(n as u64), Some(bytes as u64), "{ty}: {n} elements and {bytes} bytes");
}
