//! The FP4 (E2M1) block formats: MXFP4 (E8M0 scale, 32 elements) and NVFP4 (four UE4M3 scales, 64 elements).
//!
//! ggml keeps the E2M1 values doubled, as integers, and halves the scale instead.

use crate::formats::{BlockFormat, FormatError, check_decode, check_encode};
use crate::gguf::GgmlType;

/// Twice the E2M1 values (`kvalues_fp4`, ggml-common.h).
const VALUES: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// Decodes a run of nibbles: the low ones are the first half of `y`, the high ones the second.
fn decode_nibbles(qs: &[u8], d: f32, y: &mut [f32]) {
    let (lo, hi) = y.split_at_mut(qs.len());
    for ((&q, lo), hi) in qs.iter().zip(lo).zip(hi) {
        *lo = VALUES[usize::from(q & 15)] * d;
        *hi = VALUES[usize::from(q >> 4)] * d;
    }
}

/// Half of 2^(e−127) (`ggml_e8m0_to_fp32_half`); e = 255 is not special.
pub(in crate::formats) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

/// `floorf(log2f(v))` for a finite v > 0.
///
/// log2f rounds, so a value just below a power of two gives that power: it does when
/// `log2(2^k) − log2(v)` is less than half of the distance from k to the next f32 below it.
fn floor_log2(v: f32) -> i32 {
    let wide = f64::from(v).to_bits();
    let floor = (wide >> 52) as i32 - 1023;
    let k = floor + 1;
    if k == 0 {
        return floor; // log2f(v) is a small negative number, never −0
    }
    let mantissa = f64::from_bits(wide & ((1 << 52) - 1) | 1023 << 52);
    let below = (2.0 - mantissa) / 2.0 * std::f64::consts::LOG2_E;
    let kf = k as f32;
    let gap = f64::from(kf) - f64::from(kf.next_down());
    if below < gap / 2.0 { k } else { floor }
}

/// `best_index_mxfp4` for eight values: the first of the 16 values times d with the least error.
///
/// A value of the other sign is never less wrong than 0, so the search is one of magnitudes, and 0 has code 0.
fn nearest_codes(x: &[f32; 8], d: f32) -> [u8; 8] {
    let mut code = [0u32; 8];
    let mut best = x.map(f32::abs);
    for c in 1..8 {
        let v = VALUES[c as usize] * d;
        for i in 0..8 {
            let err = (v - x[i].abs()).abs();
            let less = err < best[i];
            code[i] = if less { c } else { code[i] };
            best[i] = if less { err } else { best[i] };
        }
    }
    std::array::from_fn(|i| code[i] as u8 | if code[i] != 0 && x[i] < 0.0 { 8 } else { 0 })
}

/// MXFP4: E8M0 exponent, then 16 bytes of two codes.
pub struct Mxfp4;

impl BlockFormat for Mxfp4 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::MXFP4
    }

    /// `dequantize_row_mxfp4`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::MXFP4, blocks, out);
        for (b, y) in blocks.chunks_exact(17).zip(out.chunks_exact_mut(32)) {
            decode_nibbles(&b[1..], e8m0_half(b[0]), y);
        }
    }

    /// `quantize_row_mxfp4_ref`: the exponent of max |x| less 2, wrapped to a byte, then the nearest of the 16 values,
    /// the lowest code of equals.
    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(GgmlType::MXFP4, rows, n, w, out);
        for (x, b) in rows.as_chunks::<32>().0.iter().zip(out.chunks_exact_mut(17)) {
            let amax = super::abs_max(x);
            let e = if amax > 0.0 { (floor_log2(amax) - 2 + 127) as u8 } else { 0 };
            let d = e8m0_half(e);
            let mut code = [0u8; 32];
            for (x, code) in x.as_chunks::<8>().0.iter().zip(code.as_chunks_mut::<8>().0) {
                *code = nearest_codes(x, d);
            }
            b[0] = e;
            for (j, q) in b[1..].iter_mut().enumerate() {
                *q = code[j] | code[j + 16] << 4;
            }
        }
        Ok(())
    }

    /// Exponent 255 is not valid.
    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        assert!(blocks.len().is_multiple_of(17), "whole blocks");
        match blocks.iter().step_by(17).position(|&e| e == 255) {
            Some(block) => Err(FormatError::BadScale { block }),
            None => Ok(()),
        }
    }
}

/// Half of an unsigned E4M3 number with bias 7 (`ggml_ue4m3_to_fp32`); the top bit is ignored, 0x7F is 0.
fn ue4m3_half(x: u8) -> f32 {
    let (exp, man) = (x >> 3 & 15, f32::from(x & 7));
    match (x, exp) {
        (0 | 0x7f, _) => 0.0,
        (_, 0) => man * 2f32.powi(-10),
        _ => (1.0 + man / 8.0) * f32::from_bits((u32::from(exp) + 127 - 8) << 23),
    }
}

/// NVFP4: four UE4M3 scales, then four runs of 8 bytes of two codes. Decoded and copied, not encoded.
pub struct Nvfp4;

impl BlockFormat for Nvfp4 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::NVFP4
    }

    /// `dequantize_row_nvfp4`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::NVFP4, blocks, out);
        for (b, y) in blocks.chunks_exact(36).zip(out.chunks_exact_mut(64)) {
            for (s, y) in y.chunks_exact_mut(16).enumerate() {
                decode_nibbles(&b[4 + 8 * s..][..8], ue4m3_half(b[s]), y);
            }
        }
    }

    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        Err(FormatError::DecodeOnly(GgmlType::NVFP4))
    }

    /// Every byte is a valid scale.
    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        assert!(blocks.len().is_multiple_of(36), "whole blocks");
        Ok(())
    }
}
