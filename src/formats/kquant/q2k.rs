//! Q2_K: sixteen sub-blocks of 16, levels 0..=3 with a scale and a minimum of four bits each.
//!
//! Layout of 84 bytes: 16 bytes of scales (low nibble) and minima (high nibble), 64 bytes of levels, f16 `d`, f16
//! `dmin`.

use super::super::search::{Affine, from_f16_bits, make_qkx_quants, make_qp_quants, nearest_int, to_f16_bits};
use super::super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use super::{
    OneByOne, QK_K, Rounding, importance, pack_pairs_of_bits, sum, sum_of_squares, super_blocks, unpack_pairs_of_bits,
};
use crate::gguf::GgmlType;

const SUB: usize = 16;

/// Search of `quantize_row_q2_K_ref`.
pub(crate) const AFFINE: Affine = Affine { nmax: 3, rmin: -0.5, rdelta: 0.1, nstep: 15, mad: true, guarded: false };
/// Search of `quantize_row_q2_K_impl`.
pub(crate) const AFFINE_WEIGHTED: Affine =
    Affine { nmax: 3, rmin: -0.9, rdelta: 0.05, nstep: 36, mad: false, guarded: true };

/// Q2_K (`quantize_row_q2_K_ref`, `quantize_row_q2_K_impl`, `dequantize_row_q2_K`).
pub struct Q2K;

impl BlockFormat for Q2K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q2_K
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<84>().0.iter().zip(out.as_chunks_mut::<QK_K>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[80], b[81]]));
            let dmin = from_f16_bits(u16::from_le_bytes([b[82], b[83]]));
            unpack_pairs_of_bits(&b[16..80], |i, q| {
                let sc = b[i / SUB];
                y[i] = d * (sc & 0xf) as f32 * q as f32 - dmin * (sc >> 4) as f32;
            });
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, encode_scalar)
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[80, 82])
    }
}

fn encode_scalar(rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) {
    super_blocks(rows, n, w, out, GgmlType::Q2_K.block_bytes(), |x, qw, out| {
        let mut levels = [0u8; QK_K];
        let (mut scales, mut mins, mut sums, mut weights) = ([0.0; 16], [0.0; 16], [0.0; 16], [0.0; SUB]);
        let sigma2 = qw.map_or(0.0, |_| sum_of_squares(x) / QK_K as f32);
        for (j, (x, l)) in x.chunks_exact(SUB).zip(levels.chunks_exact_mut(SUB)).enumerate() {
            let search = match qw {
                Some(qw) => {
                    importance(x, &qw[SUB * j..], sigma2, &mut weights);
                    sums[j] = sum(&weights);
                    &AFFINE_WEIGHTED
                }
                None => {
                    weights.iter_mut().zip(x).for_each(|(w, x)| *w = x.abs());
                    &AFFINE
                }
            };
            (scales[j], mins[j]) = make_qkx_quants(search, x, &weights, l);
        }
        let quantized = match qw {
            Some(_) => {
                let (mut ls, mut lm) = ([0; 16], [0; 16]);
                let d = make_qp_quants(15, &scales, &mut ls, &sums);
                let dmin = make_qp_quants(15, &mins, &mut lm, &sums);
                (std::array::from_fn(|j| ls[j] | (lm[j] << 4)), d, dmin)
            }
            None => scales_plain(&scales, &mins),
        };
        finish::<OneByOne>(x, quantized, |j, l| l.copy_from_slice(&levels[SUB * j..SUB * (j + 1)]), out);
    });
}

/// The scale bytes, `d` and `dmin` of `quantize_row_q2_K_ref`.
#[inline(always)]
pub(crate) fn scales_plain(scales: &[f32; 16], mins: &[f32; 16]) -> ([u8; 16], f32, f32) {
    let mut bytes = [0u8; 16];
    let highest = |v: &[f32; 16]| v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    let (mut d, mut dmin) = (0.0, 0.0);
    let max_scale = highest(scales);
    if max_scale > 0.0 {
        let iscale = 15.0 / max_scale;
        bytes.iter_mut().zip(scales).for_each(|(b, s)| *b = nearest_int(iscale * s) as u8);
        d = max_scale / 15.0;
    }
    let max_min = highest(mins);
    if max_min > 0.0 {
        let iscale = 15.0 / max_min;
        bytes.iter_mut().zip(mins).for_each(|(b, m)| *b |= (nearest_int(iscale * m) << 4) as u8);
        dmin = max_min / 15.0;
    }
    (bytes, d, dmin)
}

/// Rounds the values with the quantized scales and writes the block. Sub-blocks whose scale became zero keep the
/// levels of the search, `searched(sub-block, levels)`.
#[inline(always)]
pub(crate) fn finish<R: Rounding>(
    x: &[f32; QK_K],
    (scales, d, dmin): ([u8; 16], f32, f32),
    searched: impl Fn(usize, &mut [u8]),
    out: &mut [u8],
) {
    let (d_bits, dmin_bits) = (to_f16_bits(d), to_f16_bits(dmin));
    let (d, dmin) = (from_f16_bits(d_bits), from_f16_bits(dmin_bits));
    let mut levels = [0u8; QK_K];
    for (j, l) in levels.chunks_exact_mut(SUB).enumerate() {
        let dl = d * (scales[j] & 0xf) as f32;
        if dl == 0.0 {
            searched(j, l);
        } else {
            R::requantize(&x[SUB * j..], dmin * (scales[j] >> 4) as f32, dl, 0, 3, l);
        }
    }
    out[..16].copy_from_slice(&scales);
    pack_pairs_of_bits(&levels, &mut out[16..80]);
    out[80..82].copy_from_slice(&d_bits.to_le_bytes());
    out[82..84].copy_from_slice(&dmin_bits.to_le_bytes());
}
