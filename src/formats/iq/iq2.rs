//! IQ2_XXS, IQ2_XS and IQ2_S: groups of eight on grids of 256, 512 and 1024 points.

use super::grids::{GRID2_256, GRID2_512, GRID2_1024, VALUES_IQ2};
use super::neighbours;
use super::qp::qp_scale;
use super::search::{Again, Scan, Sub, Trials, search};
use super::signs::{apply, apply_even, largest, split_even_signs, split_signs};
use super::util::{
    c_max, decode_blocks, each_block, f16_at, f16_bytes, importance, scale_index, sub, sum_of_squares, u32_at,
};
use crate::formats::{BlockFormat, FormatError, validate_f16_fields};
use crate::gguf::GgmlType;

/// Sub-blocks whose largest magnitude is less than this are zero (`GROUP_MAX_EPS`, `GROUP_MAX_EPS_IQ2_S`).
const EPS: f32 = 1e-15;
const EPS_S: f32 = 1e-8;

/// Scale of a sub-block as decoded: `(d·(0.5 + s))·0.25`.
fn sub_scale(d: f32, s: u32) -> f32 {
    d * (0.5 + s as f32) * 0.25
}

/// A grid point times a scale, signs not yet applied.
fn decode_point(code: u16, scale: f32, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = scale * VALUES_IQ2[usize::from(code >> (2 * i) & 3)];
    }
}

/// IQ2_XXS: f16 d, then per 32 elements four grid indices (bytes) and a u32 of four 7-bit signs and a 4-bit scale.
pub struct Iq2Xxs;

impl BlockFormat for Iq2Xxs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_XXS
    }

    /// `dequantize_row_iq2_xxs`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ2_XXS, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (b, y) in b[2..].chunks_exact(8).zip(y.chunks_exact_mut(32)) {
                let signs = u32_at(b, 4);
                let scale = sub_scale(d, signs >> 28);
                for (l, y) in y.chunks_exact_mut(8).enumerate() {
                    decode_point(GRID2_256[usize::from(b[l])], scale, y);
                    apply_even(signs >> (7 * l), y);
                }
            }
        });
    }

    /// `quantize_row_iq2_xxs_impl`.
    fn encode(
        &self,
        rows: &[f32],
        n_per_row: usize,
        weights: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let ty = GgmlType::IQ2_XXS;
        let weights = weights.ok_or(FormatError::NeedsWeights(ty))?;
        let lattice = neighbours::iq2_xxs();
        let mut scan = Scan::NEW;
        each_block(ty, rows, n_per_row, Some(weights), out, |x, qw, b| {
            let qw = qw.expect("weights were given");
            b.fill(0);
            let sigma2 = sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 8];
            let mut max_scale = 0.0;
            for ib in 0..8 {
                let x = sub::<32>(x, ib);
                let w = importance(x, sub(qw, ib), sigma2);
                let (mags, mut signs) = split_even_signs(x, &w);
                if largest(&mags) < EPS {
                    continue;
                }
                let first = qp_scale(&mags, &w);
                let eff_max = first * 3.0;
                if eff_max <= 0.0 {
                    continue;
                }
                let sb = Sub { x: mags, w, w_root: w.map(f32::sqrt) };
                let trials = Trials::new(5.0, 6, 0.1, eff_max);
                let mut found = search::<2, 8, 32>(lattice, &sb, &trials, first, Again::All, &mut scan)?;
                if found.scale < 0.0 {
                    found.scale = -found.scale;
                    signs = signs.map(|s| !s & 127);
                }
                scales[ib] = found.scale;
                max_scale = c_max(max_scale, found.scale);
                let b = &mut b[2 + 8 * ib..][..8];
                for (q, code) in b[..4].iter_mut().zip(found.codes) {
                    *q = lattice.index(code) as u8;
                }
                let signs = (0..4).fold(0, |all, k| all | u32::from(signs[k]) << (7 * k));
                b[4..].copy_from_slice(&signs.to_le_bytes());
            }
            if max_scale == 0.0 {
                b.fill(0);
                return Ok(());
            }
            let d = max_scale / 31.0;
            b[..2].copy_from_slice(&f16_bytes(d));
            let id = 1.0 / d;
            for (ib, scale) in scales.into_iter().enumerate() {
                b[2 + 8 * ib + 7] |= (scale_index(id, scale, 15) << 4) as u8;
            }
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ2_XXS, blocks, &[0])
    }
}

/// The scale search that IQ2_XS and IQ2_S share: 19 trials around `5/max`, groups of eight, 16 elements.
fn search_16(
    lattice: &neighbours::Lattice,
    mags: [f32; 16],
    w: [f32; 16],
    max: f32,
    scan: &mut Scan,
) -> Result<super::search::Found, FormatError> {
    let sb = Sub { x: mags, w, w_root: w.map(f32::sqrt) };
    search::<2, 8, 16>(lattice, &sb, &Trials::new(5.0, 9, 0.1, max), max / 5.0, Again::OffGrid, scan)
}

/// Stores the scales of 16 sub-blocks as nibbles.
fn store_scales(id: f32, scales: &[f32; 16], out: &mut [u8]) {
    for (pair, out) in scales.chunks_exact(2).zip(out) {
        *out = (scale_index(id, pair[0], 15) | scale_index(id, pair[1], 15) << 4) as u8;
    }
}

/// IQ2_XS: f16 d, 32 u16 of a 9-bit grid index and seven signs, then 16 nibbles of scales.
pub struct Iq2Xs;

impl BlockFormat for Iq2Xs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_XS
    }

    /// `dequantize_row_iq2_xs`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ2_XS, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (i, (q, y)) in b[2..66].chunks_exact(2).zip(y.chunks_exact_mut(8)).enumerate() {
                let q = u16::from_le_bytes([q[0], q[1]]);
                let scale = sub_scale(d, u32::from(b[66 + i / 4] >> (i / 2 % 2 * 4) & 15));
                decode_point(GRID2_512[usize::from(q & 511)], scale, y);
                apply_even(u32::from(q >> 9), y);
            }
        });
    }

    /// `quantize_row_iq2_xs_impl`.
    fn encode(
        &self,
        rows: &[f32],
        n_per_row: usize,
        weights: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let ty = GgmlType::IQ2_XS;
        let weights = weights.ok_or(FormatError::NeedsWeights(ty))?;
        let lattice = neighbours::iq2_xs();
        let mut scan = Scan::NEW;
        each_block(ty, rows, n_per_row, Some(weights), out, |x, qw, b| {
            let qw = qw.expect("weights were given");
            b.fill(0);
            let sigma2 = sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 16];
            let mut max_scale = 0.0;
            for ib in 0..16 {
                let x = sub::<16>(x, ib);
                let w = importance(x, sub(qw, ib), sigma2);
                let (mags, mut signs) = split_even_signs(x, &w);
                let max = largest(&mags);
                if max < EPS {
                    continue;
                }
                let mut found = search_16(lattice, mags, w, max, &mut scan)?;
                if found.scale < 0.0 {
                    found.scale = -found.scale;
                    signs = signs.map(|s| !s & 127);
                }
                scales[ib] = found.scale;
                max_scale = c_max(max_scale, found.scale);
                for k in 0..2 {
                    let q = lattice.index(found.codes[k]) as u16 | u16::from(signs[k]) << 9;
                    b[2 + 4 * ib + 2 * k..][..2].copy_from_slice(&q.to_le_bytes());
                }
            }
            if max_scale == 0.0 {
                b.fill(0);
                return Ok(());
            }
            let d = max_scale / 31.0;
            b[..2].copy_from_slice(&f16_bytes(d));
            store_scales(1.0 / d, &scales, &mut b[66..]);
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ2_XS, blocks, &[0])
    }
}

/// IQ2_S: f16 d, 32 low bytes of grid indices, 32 sign bytes, 8 bytes of high bits, 16 nibbles of scales.
pub struct Iq2S;

impl BlockFormat for Iq2S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_S
    }

    /// `dequantize_row_iq2_s`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ2_S, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (i, y) in y.chunks_exact_mut(8).enumerate() {
                let high = usize::from(b[66 + i / 4] >> (2 * (i % 4)) & 3);
                let scale = sub_scale(d, u32::from(b[74 + i / 4] >> (i / 2 % 2 * 4) & 15));
                decode_point(GRID2_1024[usize::from(b[2 + i]) | high << 8], scale, y);
                apply(b[34 + i], y);
            }
        });
    }

    /// `quantize_row_iq2_s_impl`.
    fn encode(
        &self,
        rows: &[f32],
        n_per_row: usize,
        weights: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let lattice = neighbours::iq2_s();
        let mut scan = Scan::NEW;
        each_block(GgmlType::IQ2_S, rows, n_per_row, weights, out, |x, qw, b| {
            b.fill(0);
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 16];
            let mut max_scale = 0.0;
            for (ib, place) in scales.iter_mut().enumerate() {
                let x = sub::<16>(x, ib);
                let w = match qw {
                    Some(qw) => importance(x, sub(qw, ib), sigma2),
                    None => x.map(|x| 0.25 * sigma2 + x * x),
                };
                let (mags, mut signs) = split_signs(x);
                let max = largest(&mags);
                if max < EPS_S {
                    continue;
                }
                let mut found = search_16(lattice, mags, w, max, &mut scan)?;
                if found.scale < 0.0 {
                    found.scale = -found.scale;
                    signs = signs.map(|s| !s);
                }
                *place = found.scale;
                max_scale = c_max(max_scale, found.scale);
                for (k, sign) in signs.into_iter().enumerate().take(2) {
                    let i = 2 * ib + k;
                    let index = lattice.index(found.codes[k]);
                    b[2 + i] = index as u8;
                    b[66 + i / 4] |= ((index >> 8) << (2 * (i % 4))) as u8;
                    b[34 + i] = sign;
                }
            }
            if max_scale == 0.0 {
                return Ok(());
            }
            let d = max_scale / 31.0;
            b[..2].copy_from_slice(&f16_bytes(d * 0.9875));
            store_scales(1.0 / d, &scales, &mut b[74..]);
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ2_S, blocks, &[0])
    }
}
