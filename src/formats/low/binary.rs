//! Q1_0 (sign and a mean, 128 per block) and Q2_0 (four levels −1, 0, 1, 2, 64 per block).

use super::abs_max;
use crate::formats::search::{f16_at, f16_bytes};
use crate::formats::{BlockFormat, FormatError, check_decode, check_encode, validate_f16_fields};
use crate::gguf::GgmlType;

/// Q1_0: f16 d, then one bit per element (1 = +d, 0 = −d), low bit first.
#[allow(non_camel_case_types)]
pub struct Q1_0;

impl BlockFormat for Q1_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q1_0
    }

    /// `dequantize_row_q1_0`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::Q1_0, blocks, out);
        for (b, y) in blocks.chunks_exact(18).zip(out.chunks_exact_mut(128)) {
            let d = f16_at(b, 0);
            for (&bits, y) in b[2..].iter().zip(y.chunks_exact_mut(8)) {
                for (j, y) in y.iter_mut().enumerate() {
                    *y = if bits >> j & 1 == 1 { d } else { -d };
                }
            }
        }
    }

    /// `quantize_row_q1_0_ref`: d is the mean of |x|, summed in order; −0 counts as positive.
    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(GgmlType::Q1_0, rows, n, w, out);
        for (x, b) in rows.chunks_exact(128).zip(out.chunks_exact_mut(18)) {
            let sum = x.iter().fold(0.0f32, |s, v| s + v.abs());
            b[..2].copy_from_slice(&f16_bytes(sum / 128.0));
            for (x, bits) in x.chunks_exact(8).zip(&mut b[2..]) {
                *bits = x.iter().enumerate().fold(0, |bits, (j, &v)| bits | u8::from(v >= 0.0) << j);
            }
        }
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0])
    }
}

/// Q2_0: f16 d, then two bits per element, low bits first; the code minus 1 times d is the value.
#[allow(non_camel_case_types)]
pub struct Q2_0;

impl BlockFormat for Q2_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q2_0
    }

    /// `dequantize_row_q2_0`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::Q2_0, blocks, out);
        for (b, y) in blocks.chunks_exact(18).zip(out.chunks_exact_mut(64)) {
            let d = f16_at(b, 0);
            for (&bits, y) in b[2..].iter().zip(y.chunks_exact_mut(4)) {
                for (j, y) in y.iter_mut().enumerate() {
                    *y = (f32::from(bits >> (2 * j) & 3) - 1.0) * d;
                }
            }
        }
    }

    /// `quantize_row_q2_0_ref`: d is max |x|, so of the four codes only 0, 1 and 2 occur.
    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(GgmlType::Q2_0, rows, n, w, out);
        for (x, b) in rows.chunks_exact(64).zip(out.chunks_exact_mut(18)) {
            let d = abs_max(x);
            let id = if d > 0.0 { 1.0 / d } else { 0.0 };
            b[..2].copy_from_slice(&f16_bytes(d));
            for (x, bits) in x.chunks_exact(4).zip(&mut b[2..]) {
                *bits = x.iter().enumerate().fold(0, |bits, (j, &v)| bits | code(v * id) << (2 * j));
            }
        }
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0])
    }
}

/// `clamp((int)roundf(v) + 1, 0, 3)` for |v| < 1.5. A NaN or infinity (d subnormal, 1/d infinite) converts to
/// `INT_MIN` in C and so clamps to 0.
fn code(v: f32) -> u8 {
    if !v.is_finite() || v <= -0.5 {
        0
    } else if v >= 0.5 {
        2
    } else {
        1
    }
}
