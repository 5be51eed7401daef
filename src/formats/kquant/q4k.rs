//! Q4_K and Q5_K: eight sub-blocks of 32, levels of four or five bits with a scale and a minimum of six bits each.
//!
//! Layout of 144 or 176 bytes: f16 `d`, f16 `dmin`, 12 bytes of scales and minima, for Q5_K 32 bytes of high bits,
//! 128 bytes of nibbles.

use super::super::search::{Affine, from_f16_bits, make_qkx_quants, make_qp_quants, nearest_int, to_f16_bits};
use super::super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use super::{OneByOne, QK_K, Rounding, importance, sum, sum_of_squares, super_blocks};
use crate::gguf::GgmlType;

const SUB: usize = 32;

/// What tells Q4_K from Q5_K.
pub(crate) struct Nibbles {
    pub ty: GgmlType,
    /// Search of `quantize_row_q4_K_ref`, `quantize_row_q5_K_ref`.
    pub plain: Affine,
    /// Search of `quantize_row_q4_K_impl`, `quantize_row_q5_K_impl`.
    pub weighted: Affine,
    /// Whether quantized scales above 63 (negative ones that wrapped) are clamped.
    pub clamps: bool,
}

impl Nibbles {
    pub(crate) const Q4_K: Nibbles = Nibbles {
        ty: GgmlType::Q4_K,
        plain: Affine { nmax: 15, rmin: -1.0, rdelta: 0.1, nstep: 20, mad: false, guarded: false },
        weighted: Affine { nmax: 15, rmin: -0.9, rdelta: 0.05, nstep: 36, mad: false, guarded: true },
        clamps: false,
    };
    pub(crate) const Q5_K: Nibbles = Nibbles {
        ty: GgmlType::Q5_K,
        plain: Affine { nmax: 31, rmin: -0.5, rdelta: 0.1, nstep: 15, mad: false, guarded: false },
        weighted: Affine { nmax: 31, rmin: -0.9, rdelta: 0.05, nstep: 36, mad: false, guarded: true },
        clamps: true,
    };

    /// Bytes before the nibbles: header, and for Q5_K the high bits.
    #[inline(always)]
    const fn nibbles_at(&self) -> usize {
        self.ty.block_bytes() - QK_K / 2
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ty, blocks, out);
        for (b, y) in blocks.chunks_exact(self.ty.block_bytes()).zip(out.as_chunks_mut::<QK_K>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[0], b[1]]));
            let dmin = from_f16_bits(u16::from_le_bytes([b[2], b[3]]));
            let (head, qs) = b.split_at(self.nibbles_at());
            for (j, y) in y.chunks_exact_mut(SUB).enumerate() {
                let (sc, m) = scale_min(&head[4..16], j);
                let (d, m) = (d * sc as f32, dmin * m as f32);
                for (i, y) in y.iter_mut().enumerate() {
                    let mut q = (qs[32 * (j / 2) + i] >> (4 * (j % 2))) & 0xf;
                    if let Some(high) = head.get(16 + i) {
                        q |= ((high >> j) & 1) << 4;
                    }
                    *y = d * q as f32 - m;
                }
            }
        }
    }

    fn encode_scalar(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) {
        super_blocks(rows, n, w, out, self.ty.block_bytes(), |x, qw, out| {
            let mut levels = [0u8; QK_K];
            let (mut scales, mut mins, mut sums, mut weights) = ([0.0; 8], [0.0; 8], [0.0; 8], [0.0; SUB]);
            let sigma2 = qw.map_or(0.0, |_| 2.0 * sum_of_squares(x) / QK_K as f32);
            for (j, (x, l)) in x.chunks_exact(SUB).zip(levels.chunks_exact_mut(SUB)).enumerate() {
                let search = match qw {
                    Some(qw) => {
                        importance(x, &qw[SUB * j..], sigma2, &mut weights);
                        sums[j] = sum(&weights);
                        &self.weighted
                    }
                    None => {
                        let av_x = (sum_of_squares(x) / SUB as f32).sqrt();
                        weights.iter_mut().zip(x).for_each(|(w, x)| *w = av_x + x.abs());
                        &self.plain
                    }
                };
                (scales[j], mins[j]) = make_qkx_quants(search, x, &weights, l);
            }
            let quantized = match qw {
                Some(_) => {
                    let (mut ls, mut lm) = ([0; 8], [0; 8]);
                    let d = make_qp_quants(63, &scales, &mut ls, &sums);
                    let dmin = make_qp_quants(63, &mins, &mut lm, &sums);
                    (ls, lm, d, dmin)
                }
                None => scales_plain(&scales, &mins),
            };
            finish::<OneByOne>(self, x, quantized, |j, l| l.copy_from_slice(&levels[SUB * j..SUB * (j + 1)]), out);
        });
    }
}

/// Q4_K (`quantize_row_q4_K_ref`, `quantize_row_q4_K_impl`, `dequantize_row_q4_K`).
pub struct Q4K;

impl BlockFormat for Q4K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q4_K
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        Nibbles::Q4_K.decode(blocks, out);
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, |rows, n, w, out| Nibbles::Q4_K.encode_scalar(rows, n, w, out))
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0, 2])
    }
}

/// Q5_K (`quantize_row_q5_K_ref`, `quantize_row_q5_K_impl`, `dequantize_row_q5_K`).
pub struct Q5K;

impl BlockFormat for Q5K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q5_K
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        Nibbles::Q5_K.decode(blocks, out);
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, |rows, n, w, out| Nibbles::Q5_K.encode_scalar(rows, n, w, out))
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0, 2])
    }
}

/// Scales, minima (six bits), `d` and `dmin` of `quantize_row_q4_K_ref`.
#[inline(always)]
pub(crate) fn scales_plain(scales: &[f32; 8], mins: &[f32; 8]) -> ([u8; 8], [u8; 8], f32, f32) {
    let highest = |v: &[f32; 8]| v.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    let levels = |v: &[f32; 8], max: f32| {
        let inverse = if max > 0.0 { 63.0 / max } else { 0.0 };
        v.map(|v| (nearest_int(inverse * v) as u8).min(63))
    };
    let (max_scale, max_min) = (highest(scales), highest(mins));
    (levels(scales, max_scale), levels(mins, max_min), max_scale / 63.0, max_min / 63.0)
}

/// `get_scale_min_k4`.
#[inline(always)]
fn scale_min(q: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        ((q[j + 4] & 0xf) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4))
    }
}

/// Rounds the values with the quantized scales and writes the block; see [`super::q2k::finish`].
#[inline(always)]
pub(crate) fn finish<R: Rounding>(
    format: &Nibbles,
    x: &[f32; QK_K],
    (mut ls, mut lm, d, dmin): ([u8; 8], [u8; 8], f32, f32),
    searched: impl Fn(usize, &mut [u8]),
    out: &mut [u8],
) {
    if format.clamps {
        ls = ls.map(|l| l.min(63));
        lm = lm.map(|l| l.min(63));
    }
    let mut packed = [0u8; 12];
    packed[..4].copy_from_slice(&ls[..4]);
    packed[4..8].copy_from_slice(&lm[..4]);
    for j in 4..8 {
        // Levels above 63 spill into the neighbours' bits in Q4_K, as in the source.
        packed[j + 4] = (ls[j] & 0xf) | ((lm[j] & 0xf) << 4);
        packed[j - 4] |= (ls[j] >> 4) << 6;
        packed[j] |= (lm[j] >> 4) << 6;
    }
    let (d_bits, dmin_bits) = (to_f16_bits(d), to_f16_bits(dmin));
    let (d, dmin) = (from_f16_bits(d_bits), from_f16_bits(dmin_bits));
    let mut levels = [0u8; QK_K];
    for (j, l) in levels.chunks_exact_mut(SUB).enumerate() {
        let (sc, m) = scale_min(&packed, j);
        let dl = d * sc as f32;
        if dl == 0.0 {
            searched(j, l);
        } else {
            R::requantize(&x[SUB * j..], dmin * m as f32, dl, 0, format.plain.nmax, l);
        }
    }
    let (head, qs) = out.split_at_mut(format.nibbles_at());
    head[..2].copy_from_slice(&d_bits.to_le_bytes());
    head[2..4].copy_from_slice(&dmin_bits.to_le_bytes());
    head[4..16].copy_from_slice(&packed);
    let high = &mut head[16..];
    if !high.is_empty() {
        high.fill(0);
        for (bit, l) in levels.chunks_exact_mut(SUB).enumerate() {
            for (h, l) in high.iter_mut().zip(l) {
                *h |= (*l >> 4) << bit;
                *l &= 0xf;
            }
        }
    }
    for (q, l) in qs.chunks_exact_mut(32).zip(levels.chunks_exact(64)) {
        for i in 0..32 {
            q[i] = l[i] | (l[i + 32] << 4);
        }
    }
}
