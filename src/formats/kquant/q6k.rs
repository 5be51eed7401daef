//! Q6_K: sixteen sub-blocks of 16, levels −32..=31 with a scale of eight bits.
//!
//! Layout of 210 bytes: 128 bytes of low nibbles, 64 bytes of high bits, 16 signed scales, f16 `d`.

use super::super::search::{MAX_EPS, from_f16_bits, make_qx_quants, nearest_int, to_f16_bits};
use super::super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use super::{OneByOne, QK_K, Rounding, super_blocks};
use crate::gguf::GgmlType;

const SUB: usize = 16;

/// Q6_K (`quantize_row_q6_K_ref`, `quantize_row_q6_K_impl`, `dequantize_row_q6_K`).
pub struct Q6K;

impl BlockFormat for Q6K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q6_K
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<210>().0.iter().zip(out.as_chunks_mut::<QK_K>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[208], b[209]]));
            for (half, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (ql, qh) = (&b[64 * half..][..64], &b[128 + 32 * half..][..32]);
                for (i, y) in y.iter_mut().enumerate() {
                    let (k, l) = (i / 32, i % 32);
                    let low = (ql[32 * (k % 2) + l] >> (4 * (k / 2))) & 0xf;
                    let high = (qh[l] >> (2 * k)) & 3;
                    let scale = b[192 + 8 * half + i / SUB] as i8;
                    *y = d * scale as f32 * ((low | (high << 4)) as i32 - 32) as f32;
                }
            }
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, encode_scalar)
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[208])
    }
}

/// Importance weights are used as they are, without the factor √(σ² + x²) of the other k-quants.
fn encode_scalar(rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) {
    super_blocks(rows, n, w, out, GgmlType::Q6_K.block_bytes(), |x, qw, out| {
        let mut levels = [0i8; QK_K];
        let (mut scales, mut squares) = ([0.0; 16], [0.0; SUB]);
        for (j, (x, l)) in x.chunks_exact(SUB).zip(levels.chunks_exact_mut(SUB)).enumerate() {
            let weights = match qw {
                Some(qw) => &qw[SUB * j..SUB * (j + 1)],
                None => {
                    squares.iter_mut().zip(x).for_each(|(w, x)| *w = x * x);
                    &squares
                }
            };
            scales[j] = make_qx_quants(32, x, weights, l);
        }
        finish::<OneByOne>(x, &scales, |j, l| (0..SUB).for_each(|i| l[i] = levels[SUB * j + i] as u8), out);
    });
}

/// Quantizes the scales, rounds the values and writes the block; see [`super::q2k::finish`].
#[inline(always)]
pub(crate) fn finish<R: Rounding>(
    x: &[f32; QK_K],
    scales: &[f32; 16],
    searched: impl Fn(usize, &mut [u8]),
    out: &mut [u8],
) {
    let (mut max_scale, mut amax) = (0.0f32, 0.0f32);
    for &s in scales {
        if s.abs() > amax {
            (max_scale, amax) = (s, s.abs());
        }
    }
    if amax < MAX_EPS {
        out.fill(0);
        return;
    }
    let iscale = -128.0 / max_scale;
    let d_bits = to_f16_bits(1.0 / iscale);
    let d = from_f16_bits(d_bits);
    let scales = scales.map(|s| nearest_int(iscale * s).min(127) as i8);
    let mut levels = [0u8; QK_K];
    for (j, l) in levels.chunks_exact_mut(SUB).enumerate() {
        let dl = d * scales[j] as f32;
        if dl == 0.0 {
            searched(j, l);
        } else {
            R::requantize(&x[SUB * j..], 0.0, dl, -32, 31, l);
        }
    }
    let (ql, rest) = out.split_at_mut(128);
    let (qh, rest) = rest.split_at_mut(64);
    let halves = ql.chunks_exact_mut(64).zip(qh.chunks_exact_mut(32)).zip(levels.chunks_exact(128));
    for ((ql, qh), l) in halves {
        for i in 0..32 {
            ql[i] = (l[i] & 0xf) | ((l[i + 64] & 0xf) << 4);
            ql[i + 32] = (l[i + 32] & 0xf) | ((l[i + 96] & 0xf) << 4);
            qh[i] = (l[i] >> 4) | ((l[i + 32] >> 4) << 2) | ((l[i + 64] >> 4) << 4) | ((l[i + 96] >> 4) << 6);
        }
    }
    rest[..16].iter_mut().zip(scales).for_each(|(b, s)| *b = s as u8);
    rest[16..18].copy_from_slice(&d_bits.to_le_bytes());
}
