//! IQ3_XXS and IQ3_S: groups of four on grids of 256 and 512 points, sub-blocks of 32.

use super::grids::{GRID3_256, GRID3_512, VALUES_IQ3_S, VALUES_IQ3_XXS};
use super::neighbours;
use super::search::{Again, Scan, Sub, Trials, search};
use super::signs::{apply, apply_even, largest, split_even_signs, split_signs};
use super::util::{
    c_max, decode_blocks, each_block, f16_at, f16_bytes, importance, scale_index, sub, sum_of_squares, u32_at,
};
use crate::formats::{BlockFormat, FormatError, validate_f16_fields};
use crate::gguf::GgmlType;

/// Sub-blocks of IQ3_XXS whose largest magnitude is less than this are zero (`GROUP_MAX_EPS_IQ3_XXS`).
const EPS_XXS: f32 = 1e-8;

/// A grid point times a scale, signs not yet applied.
fn decode_point(code: u16, values: &[f32; 8], scale: f32, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = scale * values[usize::from(code >> (3 * i) & 7)];
    }
}

/// Weights of the sums: with importance, or x².
fn weights(x: &[f32; 32], qw: Option<&[f32; 32]>, sigma2: f32) -> [f32; 32] {
    match qw {
        Some(qw) => importance(x, qw, sigma2),
        None => x.map(|x| x * x),
    }
}

/// IQ3_XXS: f16 d, 64 grid indices (bytes), then per 32 elements a u32 of four 7-bit signs and a 4-bit scale.
pub struct Iq3Xxs;

impl BlockFormat for Iq3Xxs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ3_XXS
    }

    /// `dequantize_row_iq3_xxs`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ3_XXS, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (i, y) in y.chunks_exact_mut(8).enumerate() {
                let signs = u32_at(b, 66 + i / 4 * 4);
                let scale = d * (0.5 + (signs >> 28) as f32) * 0.5;
                for (&q, y) in b[2 + 2 * i..].iter().zip(y.chunks_exact_mut(4)) {
                    decode_point(GRID3_256[usize::from(q)], &VALUES_IQ3_XXS, scale, y);
                }
                apply_even(signs >> (7 * (i % 4)), y);
            }
        });
    }

    /// `quantize_row_iq3_xxs_impl` with a grid of 256.
    fn encode(&self, rows: &[f32], n_per_row: usize, qw: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        let lattice = neighbours::iq3_xxs();
        let mut scan = Scan::NEW;
        each_block(GgmlType::IQ3_XXS, rows, n_per_row, qw, out, |x, qw, b| {
            b.fill(0);
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 8];
            let mut max_scale = 0.0;
            for ib in 0..8 {
                let x = sub::<32>(x, ib);
                let w = weights(x, qw.map(|qw| sub(qw, ib)), sigma2);
                let (mags, mut signs) = split_even_signs(x, &w);
                let max = largest(&mags);
                if max < EPS_XXS {
                    continue;
                }
                let sb = Sub { x: mags, w, w_root: w.map(f32::sqrt) };
                let trials = Trials::new(15.0, 15, 0.2, max);
                let mut found = search::<3, 4, 32>(lattice, &sb, &trials, max / 15.0, Again::OffGrid, &mut scan)?;
                if found.scale < 0.0 {
                    found.scale = -found.scale;
                    signs = signs.map(|s| !s & 127);
                }
                scales[ib] = found.scale;
                max_scale = c_max(max_scale, found.scale);
                for (q, code) in b[2 + 8 * ib..].iter_mut().zip(found.codes) {
                    *q = lattice.index(code) as u8;
                }
                let signs = (0..4).fold(0, |all, k| all | u32::from(signs[k]) << (7 * k));
                b[66 + 4 * ib..][..4].copy_from_slice(&signs.to_le_bytes());
            }
            if max_scale == 0.0 {
                b.fill(0);
                return Ok(());
            }
            let d = max_scale / 31.0;
            b[..2].copy_from_slice(&f16_bytes(d * 1.0125));
            let id = 1.0 / d;
            for (ib, scale) in scales.into_iter().enumerate() {
                b[66 + 4 * ib + 3] |= (scale_index(id, scale, 15) << 4) as u8;
            }
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ3_XXS, blocks, &[0])
    }
}

/// IQ3_S: f16 d, 64 low bytes of grid indices, 8 bytes of high bits, 32 sign bytes, 8 nibbles of scales.
pub struct Iq3S;

impl BlockFormat for Iq3S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ3_S
    }

    /// `dequantize_row_iq3_s`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ3_S, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (i, y) in y.chunks_exact_mut(8).enumerate() {
                let nibble = b[106 + i / 8] >> (i / 4 % 2 * 4) & 15;
                let scale = d * f32::from(1 + 2 * nibble);
                for (j, y) in y.chunks_exact_mut(4).enumerate() {
                    let k = 2 * i + j;
                    let high = usize::from(b[66 + k / 8] >> (k % 8) & 1);
                    decode_point(GRID3_512[usize::from(b[2 + k]) | high << 8], &VALUES_IQ3_S, scale, y);
                }
                apply(b[74 + i], y);
            }
        });
    }

    /// `quantize_row_iq3_s_impl` with sub-blocks of 32.
    ///
    /// Where a sub-block is all zero ggml does not move on in `qs` and `signs` (it does in `qh` and the scales): the
    /// low index bytes and signs of the later sub-blocks of the block come one place early and the last places stay 0.
    /// Such a block does not decode to what was encoded. The bytes are ggml's, so this is done here, too.
    fn encode(&self, rows: &[f32], n_per_row: usize, qw: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        let lattice = neighbours::iq3_s();
        let mut scan = Scan::NEW;
        each_block(GgmlType::IQ3_S, rows, n_per_row, qw, out, |x, qw, b| {
            b.fill(0);
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 8];
            let mut max_scale = 0.0;
            let mut place = 0;
            for ib in 0..8 {
                let x = sub::<32>(x, ib);
                let w = weights(x, qw.map(|qw| sub(qw, ib)), sigma2);
                let (mags, mut signs) = split_signs(x);
                let max = largest(&mags);
                if max == 0.0 {
                    continue;
                }
                let sb = Sub { x: mags, w, w_root: w.map(f32::sqrt) };
                let trials = Trials::new(15.0, 9, 0.2, max);
                let mut found = search::<3, 4, 32>(lattice, &sb, &trials, max / 15.0, Again::AllIfAnyOff, &mut scan)?;
                if found.scale < 0.0 {
                    found.scale = -found.scale;
                    signs = signs.map(|s| !s);
                }
                scales[ib] = found.scale;
                max_scale = c_max(max_scale, found.scale);
                for (k, code) in found.codes.into_iter().enumerate() {
                    let index = lattice.index(code);
                    b[2 + 8 * place + k] = index as u8;
                    b[66 + ib] |= ((index >> 8) << k) as u8;
                }
                b[74 + 4 * place..][..4].copy_from_slice(&signs);
                place += 1;
            }
            if max_scale == 0.0 {
                return Ok(());
            }
            let d = max_scale / 31.0;
            b[..2].copy_from_slice(&f16_bytes(d * 1.033));
            let id = 1.0 / d;
            for (pair, out) in scales.chunks_exact(2).zip(&mut b[106..]) {
                *out = (scale_index(id, pair[0], 15) | scale_index(id, pair[1], 15) << 4) as u8;
            }
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ3_S, blocks, &[0])
    }
}
