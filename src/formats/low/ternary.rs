//! TQ1_0 (five trits per byte) and TQ2_0 (four per byte), 256 elements per block, the f16 scale last.
//!
//! Both store `round(x / max|x|) + 1`. TQ1_0 writes a byte as a fixed-point fraction of 256: the trits are the base-3
//! digits of `q/243`, so a decoder multiplies by a power of three and takes the top digit.

use super::abs_max;
use crate::formats::search::{f16_at, f16_bytes};
use crate::formats::{BlockFormat, FormatError, check_decode, check_encode, validate_f16_fields};
use crate::gguf::GgmlType;

/// `lroundf(v) + 1` for |v| < 1.5; C converts a NaN or infinity (d subnormal, 1/d infinite) to a long whose low word
/// is 0, hence 1.
fn trit(v: f32) -> u8 {
    if !v.is_finite() || v.abs() < 0.5 {
        1
    } else if v > 0.0 {
        2
    } else {
        0
    }
}

/// max |x| and its reciprocal (0 for 0), from the unrounded f32.
fn scales(x: &[f32]) -> (f32, f32) {
    let d = abs_max(x);
    (d, if d != 0.0 { 1.0 / d } else { 0.0 })
}

/// The runs of bytes of a TQ1_0 block: first byte, first element, bytes in the run, trits per byte. Trit `n` of byte
/// `m` is element `first + n·bytes + m`.
const TQ1_RUNS: [(usize, usize, usize, usize); 3] = [(0, 0, 32, 5), (32, 160, 16, 5), (48, 240, 4, 4)];

/// The block of 256 values.
fn encode_block(ty: GgmlType, x: &[f32], b: &mut [u8]) {
    let (d, id) = scales(x);
    let mut trits = [1u8; 256];
    trits.iter_mut().zip(x).for_each(|(t, x)| *t = trit(x * id));
    pack_trits(ty, &trits, f16_bytes(d), b);
}

/// Writes a block of either type from trits and the bytes of its scale.
pub(in crate::formats) fn pack_trits(ty: GgmlType, trits: &[u8], d: [u8; 2], b: &mut [u8]) {
    let end = b.len() - 2;
    b[end..].copy_from_slice(&d);
    if ty == GgmlType::TQ2_0 {
        for (x, qs) in trits.chunks_exact(128).zip(b.chunks_exact_mut(32)) {
            for (m, q) in qs.iter_mut().enumerate() {
                *q = (0..4).fold(0, |q, n| q | x[32 * n + m] << (2 * n));
            }
        }
    } else {
        for (at, first, bytes, per_byte) in TQ1_RUNS {
            for m in 0..bytes {
                let digits = (0..per_byte).map(|n| trits[first + n * bytes + m]);
                // A byte of four trits has 0 for its last digit.
                let q = digits.chain(std::iter::repeat_n(0, 5 - per_byte)).fold(0u16, |q, t| q * 3 + u16::from(t));
                b[at + m] = (q * 256).div_ceil(243) as u8;
            }
        }
    }
}

/// TQ1_0: 48 bytes of five trits, 4 bytes of four, f16 d.
#[allow(non_camel_case_types)]
pub struct Tq1_0;

impl BlockFormat for Tq1_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::TQ1_0
    }

    /// `dequantize_row_tq1_0`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::TQ1_0, blocks, out);
        for (b, y) in blocks.chunks_exact(54).zip(out.chunks_exact_mut(256)) {
            let d = f16_at(b, 52);
            for (at, first, bytes, trits) in TQ1_RUNS {
                let mut pow3 = 1u8;
                for n in 0..trits {
                    let y = &mut y[first + n * bytes..][..bytes];
                    for (y, &q) in y.iter_mut().zip(&b[at..]) {
                        let digit = (u16::from(q.wrapping_mul(pow3)) * 3) >> 8;
                        *y = (f32::from(digit) - 1.0) * d;
                    }
                    pow3 = pow3.wrapping_mul(3);
                }
            }
        }
    }

    /// `quantize_row_tq1_0_ref`.
    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(GgmlType::TQ1_0, rows, n, w, out);
        for (x, b) in rows.chunks_exact(256).zip(out.chunks_exact_mut(54)) {
            encode_block(GgmlType::TQ1_0, x, b);
        }
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[52])
    }
}

/// TQ2_0: 64 bytes of four 2-bit codes (element `128·half + 32·n + m` is code `n` of byte `32·half + m`), f16 d.
#[allow(non_camel_case_types)]
pub struct Tq2_0;

impl BlockFormat for Tq2_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::TQ2_0
    }

    /// `dequantize_row_tq2_0`; code 3, which no encoder writes, is 2.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(GgmlType::TQ2_0, blocks, out);
        for (b, y) in blocks.chunks_exact(66).zip(out.chunks_exact_mut(256)) {
            let d = f16_at(b, 64);
            for (y, qs) in y.chunks_exact_mut(128).zip(b.chunks_exact(32)) {
                for (n, y) in y.chunks_exact_mut(32).enumerate() {
                    for (y, &q) in y.iter_mut().zip(qs) {
                        *y = (f32::from(q >> (2 * n) & 3) - 1.0) * d;
                    }
                }
            }
        }
    }

    /// `quantize_row_tq2_0_ref`.
    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(GgmlType::TQ2_0, rows, n, w, out);
        for (x, b) in rows.chunks_exact(256).zip(out.chunks_exact_mut(66)) {
            encode_block(GgmlType::TQ2_0, x, b);
        }
        Ok(())
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[64])
    }
}
