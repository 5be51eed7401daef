//! Formats of one to four bits without a codebook: ternary, binary, quaternary and the two FP4 block formats.
//!
//! None of them uses importance weights; an encoder ignores those given to it. Sources: `quantize_row_*_ref` and
//! `dequantize_row_*` in ggml-quants.c, block structs in ggml-common.h (llama.cpp b11434).

mod binary;
mod fp4;
mod ternary;

pub(super) use fp4::e8m0_half;
pub(super) use ternary::pack_trits;

pub use binary::{Q1_0, Q2_0};
pub use fp4::{Mxfp4, Nvfp4};
pub use ternary::{Tq1_0, Tq2_0};

/// `MAX` over absolute values, starting at 0.
fn abs_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, v| if m > v.abs() { m } else { v.abs() })
}
