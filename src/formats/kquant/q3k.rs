//! Q3_K: sixteen sub-blocks of 16, levels −4..=3 with a scale of six bits.
//!
//! Layout of 110 bytes: 32 bytes of high bits, 64 bytes of low bits, 12 bytes of scales, f16 `d`.

use super::super::search::{from_f16_bits, make_q3_quants, make_qx_quants, nearest_int, to_f16_bits};
use super::super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use super::{
    OneByOne, QK_K, Rounding, importance, pack_pairs_of_bits, sum, sum_of_squares, super_blocks, unpack_pairs_of_bits,
};
use crate::gguf::GgmlType;

const SUB: usize = 16;

/// Q3_K (`quantize_row_q3_K_ref`, `quantize_row_q3_K_impl`, `dequantize_row_q3_K`).
pub struct Q3K;

impl BlockFormat for Q3K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q3_K
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<110>().0.iter().zip(out.as_chunks_mut::<QK_K>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[108], b[109]]));
            let scales: [f32; 16] = std::array::from_fn(|j| d * scale(&b[96..108], j) as f32);
            unpack_pairs_of_bits(&b[32..96], |i, q| {
                let high = (b[i % 32] >> (i / 32)) & 1;
                y[i] = scales[i / SUB] * (q as i32 - if high == 0 { 4 } else { 0 }) as f32;
            });
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, encode_scalar)
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[108])
    }
}

fn encode_scalar(rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) {
    super_blocks(rows, n, w, out, GgmlType::Q3_K.block_bytes(), |x, qw, out| {
        let mut levels = [0i8; QK_K];
        let (mut scales, mut sums, mut weights) = ([0.0; 16], [0.0; 16], [0.0; SUB]);
        let sigma2 = qw.map_or(0.0, |_| 2.0 * sum_of_squares(x) / QK_K as f32);
        for (j, (x, l)) in x.chunks_exact(SUB).zip(levels.chunks_exact_mut(SUB)).enumerate() {
            scales[j] = match qw {
                Some(qw) => {
                    importance(x, &qw[SUB * j..], sigma2, &mut weights);
                    sums[j] = sum(&weights);
                    make_qx_quants(4, x, &weights, l)
                }
                None => make_q3_quants(4, x, l),
            };
        }
        let quantized = match qw {
            Some(_) => {
                let mut ls = [0i8; 16];
                let d = make_qx_quants(32, &scales, &sums, &mut ls);
                (ls.map(|l| l as u8), d)
            }
            None => scales_plain(&scales),
        };
        finish::<OneByOne>(x, quantized, |j, l| (0..SUB).for_each(|i| l[i] = levels[SUB * j + i] as u8), out);
    });
}

/// The scales (0..=63, 32 is zero) and `d` of `quantize_row_q3_K_ref`.
#[inline(always)]
pub(crate) fn scales_plain(scales: &[f32; 16]) -> ([u8; 16], f32) {
    let (mut max_scale, mut amax) = (0.0f32, 0.0f32);
    for &s in scales {
        if s.abs() > amax {
            (max_scale, amax) = (s, s.abs());
        }
    }
    if max_scale == 0.0 {
        return ([0; 16], 0.0);
    }
    let iscale = -32.0 / max_scale;
    let level = |s: f32| ((nearest_int(iscale * s) as i8).clamp(-32, 31) + 32) as u8;
    (scales.map(level), 1.0 / iscale)
}

/// Scale `j`, −32..=31, of the 12 bytes.
#[inline(always)]
fn scale(bytes: &[u8], j: usize) -> i32 {
    let low = if j < 8 { bytes[j] & 0xf } else { bytes[j - 8] >> 4 };
    let high = (bytes[8 + j % 4] >> (2 * (j / 4))) & 3;
    (low | (high << 4)) as i32 - 32
}

/// Rounds the values with the quantized scales and writes the block; see [`super::q2k::finish`].
#[inline(always)]
pub(crate) fn finish<R: Rounding>(
    x: &[f32; QK_K],
    (scales, d): ([u8; 16], f32),
    searched: impl Fn(usize, &mut [u8]),
    out: &mut [u8],
) {
    let d_bits = to_f16_bits(d);
    let d = from_f16_bits(d_bits);
    let mut levels = [0u8; QK_K];
    for (j, l) in levels.chunks_exact_mut(SUB).enumerate() {
        let dl = d * (scales[j] as i32 - 32) as f32;
        if dl == 0.0 {
            searched(j, l);
        } else {
            R::requantize(&x[SUB * j..], 0.0, dl, -4, 3, l);
        }
    }
    let (hmask, rest) = out.split_at_mut(32);
    hmask.fill(0);
    for (bit, l) in levels.chunks_exact_mut(32).enumerate() {
        for (h, l) in hmask.iter_mut().zip(l) {
            *h |= (*l >> 2) << bit;
            *l &= 3;
        }
    }
    pack_pairs_of_bits(&levels, &mut rest[..64]);
    let packed = &mut rest[64..76];
    packed.fill(0);
    for (j, l) in scales.iter().enumerate() {
        if j < 8 {
            packed[j] = l & 0xf;
        } else {
            packed[j - 8] |= (l & 0xf) << 4;
        }
        packed[8 + j % 4] |= (l >> 4) << (2 * (j / 4));
    }
    rest[76..78].copy_from_slice(&d_bits.to_le_bytes());
}
