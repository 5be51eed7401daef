//! IQ1_S and IQ1_M: ternary groups of eight on one grid of 2048 points, shifted by ±1/8.

use super::grids::{GRID1_2048, VALUES_IQ1};
use super::neighbours::{self, Lattice};
use super::search::nearest;
use super::split::{SHIFTED, Split, Sums16, Sums32, best_split_16, best_split_32, order};
use super::util::{
    c_max, decode_blocks, each_block, f16_at, f16_bytes, importance, scale_index, sub, sum_of_squares, validate_scales,
};
#[cfg(target_arch = "x86_64")]
use crate::formats::simd::iq_scan::Avx2;
use crate::formats::{BlockFormat, FormatError, validate_f16_fields};
use crate::gguf::GgmlType;

/// Sub-blocks whose largest magnitude is less than this are zero (`GROUP_MAX_EPS_IQ1_S`, `GROUP_MAX_EPS_IQ1_M`).
const EPS_S: f32 = 1e-12;
const EPS_M: f32 = 1e-7;

/// `dl·(grid + delta)` for a grid point.
fn decode_point(index: usize, dl: f32, minus: bool, y: &mut [f32]) {
    let delta = if minus { -0.125 } else { 0.125 };
    let code = GRID1_2048[index];
    for (i, y) in y.iter_mut().enumerate() {
        *y = dl * (VALUES_IQ1[usize::from(code >> (2 * i) & 3)] + delta);
    }
}

/// max |x|, `MAX` from element 0 on.
fn abs_max(x: &[f32]) -> f32 {
    x[1..].iter().fold(x[0].abs(), |m, x| c_max(m, x.abs()))
}

/// `iq1_find_best_neighbour2`. Where ggml finds no neighbour it reads past its arrays or aborts: sums overflowed.
fn nearest_point(
    lattice: &Lattice,
    code: u32,
    x: &[f32; 8],
    w: &[f32; 8],
    scale: f32,
    values: &[f32; 3],
) -> Result<u32, FormatError> {
    let v = values.map(|v| scale * v);
    let scaled = [v[0], v[1], v[2], f32::NAN, v[0], v[1], v[2], f32::NAN];
    let entry = lattice.entry(code);
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = Avx2::get() {
        return isa.nearest_of_eight(lattice, entry, x, w, &scaled).ok_or(FormatError::Overflow);
    }
    nearest(2, lattice, entry, x, w, &scaled).ok_or(FormatError::Overflow)
}

/// A sub-block on the grid: the scale (never negative), shifts and codes.
struct Placed {
    scale: f32,
    combo: usize,
    codes: [u32; 4],
}

/// Turns a split into grid points and fits the scale again if a point had to move. A negative scale mirrors codes and
/// shifts: of `combos` combinations of shifts, the opposite of `c` is `combos − 1 − c`. `shift(c, k)` is that of group `k`.
fn place<const N: usize>(
    lattice: &Lattice,
    x: &[f32; N],
    w: &[f32; N],
    order: &[u8; N],
    split: Split,
    combos: usize,
    shift: impl Fn(usize, usize) -> usize,
) -> Result<Placed, FormatError> {
    let Split { i1, i2, mut combo, mut scale } = split;
    let mut digits = [2u32; N];
    for (j, &i) in order.iter().enumerate().take(i2) {
        digits[usize::from(i)] = u32::from(j >= i1);
    }
    if scale < 0.0 {
        digits = digits.map(|l| 2 - l);
        scale = -scale;
        combo = combos - 1 - combo;
    }
    let mut codes = [0; 4];
    let mut moved = false;
    for (k, code) in codes.iter_mut().enumerate().take(N / 8) {
        *code = (0..8).fold(0, |code, j| code | digits[8 * k + j] << (2 * j));
        if !lattice.entry(*code).on_grid() {
            moved = true;
            *code = nearest_point(lattice, *code, sub(x, k), sub(w, k), scale, &SHIFTED[shift(combo, k)])?;
        }
    }
    if moved {
        let (mut sumqx, mut sumq2) = (0.0, 0.0);
        for i in 0..N {
            let q = SHIFTED[shift(combo, i / 8)][(codes[i / 8] >> (2 * (i % 8)) & 3) as usize];
            sumqx += w[i] * q * x[i];
            sumq2 += w[i] * q * q;
        }
        if sumqx > 0.0 && sumq2 > 0.0 {
            scale = sumqx / sumq2;
        }
    }
    if scale.is_nan() {
        return Err(FormatError::Overflow);
    }
    Ok(Placed { scale, combo, codes })
}

/// IQ1_S: f16 d, 32 low bytes of grid indices, 8 u16 of high bits (four times three), a 3-bit scale and the shift.
pub struct Iq1S;

impl BlockFormat for Iq1S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ1_S
    }

    /// `dequantize_row_iq1_s`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ1_S, blocks, out, |b, y| {
            let d = f16_at(b, 0);
            for (i, y) in y.chunks_exact_mut(8).enumerate() {
                let qh = u16::from_le_bytes([b[34 + i / 4 * 2], b[35 + i / 4 * 2]]);
                let index = usize::from(b[2 + i]) | usize::from(qh >> (3 * (i % 4)) & 7) << 8;
                let dl = d * f32::from(2 * (qh >> 12 & 7) + 1);
                decode_point(index, dl, qh & 0x8000 != 0, y);
            }
        });
    }

    /// `quantize_row_iq1_s_impl`.
    fn encode(
        &self,
        rows: &[f32],
        n_per_row: usize,
        weights: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let ty = GgmlType::IQ1_S;
        let weights = weights.ok_or(FormatError::NeedsWeights(ty))?;
        let lattice = neighbours::iq1();
        each_block(ty, rows, n_per_row, Some(weights), out, |x, qw, b| {
            let qw = qw.expect("weights were given");
            b.fill(0);
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut scales = [0.0; 8];
            let mut minus = [0u16; 8];
            let mut max_scale = 0.0;
            for ib in 0..8 {
                let x = sub::<32>(x, ib);
                let w = importance(x, sub(qw, ib), sigma2);
                if abs_max(x) < EPS_S {
                    continue;
                }
                let order = order(x);
                let Some(split) = best_split_32(&Sums32::new(x, &w, &order)) else { continue };
                let placed = place(lattice, x, &w, &order, split, 2, |combo, _| combo)?;
                let mut h = 0;
                for k in 0..4 {
                    let index = lattice.index(placed.codes[k]);
                    b[2 + 4 * ib + k] = index as u8;
                    h |= ((index >> 8) << (3 * k)) as u16;
                }
                b[34 + 2 * ib..][..2].copy_from_slice(&h.to_le_bytes());
                scales[ib] = placed.scale;
                minus[ib] = placed.combo as u16;
                max_scale = c_max(max_scale, placed.scale);
            }
            if max_scale == 0.0 {
                return Ok(());
            }
            let d = max_scale / 15.0;
            b[..2].copy_from_slice(&f16_bytes(d * 1.125));
            let id = 1.0 / d;
            for ib in 0..8 {
                let l = scale_index(id, scales[ib], 7) as u8 | (minus[ib] as u8) << 3;
                b[34 + 2 * ib + 1] |= l << 4;
            }
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(GgmlType::IQ1_S, blocks, &[0])
    }
}

/// The four u16 of an IQ1_M block: four 3-bit scales each, and in the top four bits a quarter of the f16 d.
fn scale_words(b: &[u8]) -> [u16; 4] {
    std::array::from_fn(|i| u16::from_le_bytes([b[48 + 2 * i], b[49 + 2 * i]]))
}

/// The f16 d of an IQ1_M block.
fn gathered_f16(b: &[u8]) -> u16 {
    let sc = scale_words(b);
    sc[0] >> 12 | (sc[1] >> 8 & 0xf0) | (sc[2] >> 4 & 0xf00) | (sc[3] & 0xf000)
}

/// The shift of half `k` of an IQ1_M sub-block.
fn half_shift(combo: usize, k: usize) -> usize {
    if k == 0 { combo / 2 } else { combo % 2 }
}

/// IQ1_M: 32 low bytes of grid indices, 16 bytes of two times three high bits and a shift, 8 bytes of scales and d.
pub struct Iq1M;

impl BlockFormat for Iq1M {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ1_M
    }

    /// `dequantize_row_iq1_m`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        decode_blocks(GgmlType::IQ1_M, blocks, out, |b, y| {
            let d = half::f16::from_bits(gathered_f16(b)).to_f32();
            let sc = scale_words(b);
            for (i, y) in y.chunks_exact_mut(8).enumerate() {
                let qh = b[32 + i / 2] >> (i % 2 * 4);
                let index = usize::from(b[i]) | usize::from(qh & 7) << 8;
                let dl = d * f32::from(2 * (sc[i / 8] >> (3 * (i / 2 % 4)) & 7) + 1);
                decode_point(index, dl, qh & 8 != 0, y);
            }
        });
    }

    /// `quantize_row_iq1_m_impl`.
    fn encode(&self, rows: &[f32], n_per_row: usize, qw: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        let lattice = neighbours::iq1();
        each_block(GgmlType::IQ1_M, rows, n_per_row, qw, out, |x, qw, b| {
            b.fill(0);
            let sigma2 = 2.0 * sum_of_squares(x) / 256.0;
            let mut weights = [[0.0; 16]; 16];
            // A sub-block without a search keeps grid index 0 in both halves.
            let mut codes = [[u32::from(GRID1_2048[0]); 2]; 16];
            let mut scales = [0.0; 16];
            let mut combos = [0; 16];
            let mut max_scale = 0.0;
            for ib in 0..16 {
                let x = sub::<16>(x, ib);
                weights[ib] = match qw {
                    Some(qw) => importance(x, sub(qw, ib), sigma2),
                    None => x.map(|x| x * x),
                };
                let w = &weights[ib];
                if abs_max(x) < EPS_M {
                    continue;
                }
                let order = order(x);
                let Some(split) = best_split_16(&Sums16::new(x, w, &order)) else { continue };
                let placed = place(lattice, x, w, &order, split, 4, half_shift)?;
                for k in 0..2 {
                    codes[ib][k] = placed.codes[k];
                    let index = lattice.index(placed.codes[k]);
                    b[2 * ib + k] = index as u8;
                    b[32 + ib] |= ((index >> 8) << (4 * k)) as u8;
                }
                scales[ib] = placed.scale;
                combos[ib] = placed.combo;
                max_scale = c_max(max_scale, placed.scale);
            }
            if max_scale == 0.0 {
                return Ok(());
            }
            let mut sc = [0u16; 4];
            let mut d = max_scale / 15.0;
            let id = 1.0 / d;
            let (mut sumqx, mut sumq2) = (0.0, 0.0);
            for ib in 0..16 {
                let l = scale_index(id, scales[ib], 7);
                sc[ib / 4] |= (l << (3 * (ib % 4))) as u16;
                b[32 + ib] |= [0x00, 0x80, 0x08, 0x88][combos[ib]];
                let (x, w) = (sub::<16>(x, ib), &weights[ib]);
                let step = (2 * l + 1) as f32;
                for i in 0..16 {
                    let digit = codes[ib][i / 8] >> (2 * (i % 8)) & 3;
                    let q = SHIFTED[half_shift(combos[ib], i / 8)][digit as usize] * step;
                    sumqx += w[i] * q * x[i];
                    sumq2 += w[i] * q * q;
                }
            }
            if sumq2 > 0.0 {
                d = sumqx / sumq2;
            }
            let bits = u16::from_le_bytes(f16_bytes(d * 1.1125));
            for (i, sc) in sc.into_iter().enumerate() {
                let word = sc | (bits >> (4 * i) & 15) << 12;
                b[48 + 2 * i..][..2].copy_from_slice(&word.to_le_bytes());
            }
            Ok(())
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_scales(GgmlType::IQ1_M, blocks, gathered_f16)
    }
}
