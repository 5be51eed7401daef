//! IQ4_NL and IQ4_XS: levels index a fixed table of sixteen values that are denser near zero.
//!
//! IQ4_NL is a 32-element block of 18 bytes (f16 `d`, nibbles as in Q4_0). IQ4_XS is a super-block of 256 with eight
//! sub-blocks of 32 whose scales have six bits; its 136 bytes are f16 `d`, 2 bytes of high scale bits, 4 bytes of low
//! scale bits, 128 bytes of nibbles.

use super::kquant::{OneByOne, QK_K, Rounding, importance, sum_of_squares, super_blocks};
use super::search::{MAX_EPS, from_f16_bits, nearest_int, signed_max, to_f16_bits};
use super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use crate::gguf::GgmlType;

/// Values per sub-block.
const SUB: usize = 32;

/// `kvalues_iq4nl`.
pub(crate) const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The borders between neighbours of [`VALUES`]: level k + 1 starts at border k.
pub(crate) const BORDERS: [f32; 15] = {
    let mut borders = [0.0; 15];
    let mut k = 0;
    while k < 15 {
        borders[k] = (VALUES[k] as f32 + VALUES[k + 1] as f32) / 2.0;
        k += 1;
    }
    borders
};

/// Candidates of the search on each side (`ntry`).
pub(crate) const TRIES: i32 = 7;

/// `best_index_int8` for [`VALUES`]: the level whose value is nearest; a tie goes up, NaN to the last.
///
/// The source compares `x − low < high − x`. Both differences are exact close to the border, and rounding cannot swap
/// them elsewhere, so this is the number of borders that are not above x (the test below goes through all floats
/// around each border).
#[inline(always)]
pub(crate) fn nearest_level(x: f32) -> u8 {
    let mut level = 0;
    for border in BORDERS {
        // NaN is on the upper side of every border, hence not `x >= border`.
        level += if x < border { 0 } else { 1 };
    }
    level
}

/// The search of `quantize_row_iq4_nl_impl` for one sub-block: the scale, 0 if all values are.
fn search(x: &[f32], w: &[f32]) -> f32 {
    let (max, amax) = signed_max(x);
    if amax < MAX_EPS {
        return 0.0;
    }
    let lowest = VALUES[0] as f32;
    let sums = |id: f32| {
        let (mut sumqx, mut sumq2) = (0.0f32, 0.0f32);
        for (&x, &w) in x.iter().zip(w) {
            let q = VALUES[nearest_level(id * x) as usize] as f32;
            sumqx += w * q * x;
            sumq2 += w * q * q;
        }
        (sumqx, sumq2)
    };
    let (sumqx, sumq2) = sums(1.0 / (-max / lowest));
    let mut d = if sumq2 > 0.0 { sumqx / sumq2 } else { 0.0 };
    let mut best = d * sumqx;
    for itry in -TRIES..=TRIES {
        let (sumqx, sumq2) = sums((itry as f32 + lowest) / max);
        if sumq2 > 0.0 && sumqx * sumqx > best * sumq2 {
            d = sumqx / sumq2;
            best = d * sumqx;
        }
    }
    d
}

/// Importance of a sub-block: with weights as in the k-quants, else x².
fn weigh(x: &[f32], qw: Option<&[f32]>, sigma2: f32, w: &mut [f32]) {
    match qw {
        Some(qw) => importance(x, qw, sigma2, w),
        None => w.iter_mut().zip(x).for_each(|(w, x)| *w = x * x),
    }
}

/// Levels of a sub-block at scale 1 / `id`, packed into nibbles.
#[inline(always)]
fn pack<R: Rounding>(x: &[f32], id: f32, qs: &mut [u8]) {
    let mut levels = [0u8; SUB];
    R::iq4_levels(x, id, &mut levels);
    for i in 0..SUB / 2 {
        qs[i] = levels[i] | (levels[i + SUB / 2] << 4);
    }
}

#[inline(always)]
fn reciprocal(d: f32) -> f32 {
    if d != 0.0 { 1.0 / d } else { 0.0 }
}

#[inline(always)]
fn unpack(qs: &[u8], d: f32, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * VALUES[((qs[i % 16] >> (4 * (i / 16))) & 0xf) as usize] as f32;
    }
}

/// Writes an IQ4_NL block from the scale that the search found.
#[inline(always)]
pub(crate) fn finish_nl<R: Rounding>(x: &[f32], scale: f32, out: &mut [u8]) {
    out[..2].copy_from_slice(&to_f16_bits(scale).to_le_bytes());
    pack::<R>(x, reciprocal(scale), &mut out[2..]);
}

/// Quantizes the scales of a super-block and writes it. The levels are taken with the scale before it is rounded to
/// f16.
#[inline(always)]
pub(crate) fn finish_xs<R: Rounding>(x: &[f32; QK_K], scales: &[f32; 8], out: &mut [u8]) {
    let (max_scale, _) = signed_max(scales);
    let d = -max_scale / 32.0;
    let id = reciprocal(d);
    let (head, qs) = out.split_at_mut(8);
    head[..2].copy_from_slice(&to_f16_bits(d).to_le_bytes());
    head[4..8].fill(0);
    let mut high = 0u16;
    for (j, ((x, qs), scale)) in x.chunks_exact(SUB).zip(qs.chunks_exact_mut(SUB / 2)).zip(scales).enumerate() {
        let l = nearest_int(id * scale).clamp(-32, 31);
        pack::<R>(x, reciprocal(d * l as f32), qs);
        let l = (l + 32) as u8;
        head[4 + j / 2] |= (l & 0xf) << (4 * (j % 2));
        high |= ((l >> 4) as u16) << (2 * j);
    }
    head[2..4].copy_from_slice(&high.to_le_bytes());
}

/// IQ4_NL (`quantize_iq4_nl`, `dequantize_row_iq4_nl`).
pub struct Iq4Nl;

impl BlockFormat for Iq4Nl {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ4_NL
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<SUB>().0) {
            unpack(&b[2..], from_f16_bits(u16::from_le_bytes([b[0], b[1]])), y);
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, |rows, n, qw, out| {
            let mut w = [0.0f32; SUB];
            for (i, (x, out)) in rows.as_chunks::<SUB>().0.iter().zip(out.as_chunks_mut::<18>().0).enumerate() {
                let column = i % (n / SUB) * SUB;
                let sigma2 = sum_of_squares(x) * (2.0 / SUB as f32);
                weigh(x, qw.map(|qw| &qw[column..column + SUB]), sigma2, &mut w);
                finish_nl::<OneByOne>(x, search(x, &w), out);
            }
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0])
    }
}

/// IQ4_XS (`quantize_iq4_xs`, `dequantize_row_iq4_xs`).
pub struct Iq4Xs;

impl BlockFormat for Iq4Xs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ4_XS
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<136>().0.iter().zip(out.as_chunks_mut::<QK_K>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[0], b[1]]));
            let high = u16::from_le_bytes([b[2], b[3]]);
            for (j, (y, qs)) in y.chunks_exact_mut(SUB).zip(b[8..].chunks_exact(SUB / 2)).enumerate() {
                let low = (b[4 + j / 2] >> (4 * (j % 2))) & 0xf;
                let l = low as i32 | ((high >> (2 * j)) as i32 & 3) << 4;
                unpack(qs, d * (l - 32) as f32, y);
            }
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, |rows, n, w, out| {
            super_blocks(rows, n, w, out, GgmlType::IQ4_XS.block_bytes(), |x, qw, out| {
                let mut w = [0.0f32; SUB];
                let mut scales = [0.0f32; 8];
                let sigma2 = sum_of_squares(x) * (2.0 / QK_K as f32);
                for (j, (x, scale)) in x.chunks_exact(SUB).zip(&mut scales).enumerate() {
                    weigh(x, qw.map(|qw| &qw[SUB * j..SUB * (j + 1)]), sigma2, &mut w);
                    *scale = search(x, &w);
                }
                finish_xs::<OneByOne>(x, &scales, out);
            })
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `best_index_int8` as its source has it.
    fn by_search(x: f32) -> u8 {
        if x <= VALUES[0] as f32 {
            return 0;
        }
        if x >= VALUES[15] as f32 {
            return 15;
        }
        let (mut low, mut high) = (0usize, 15usize);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if x < VALUES[middle] as f32 { high = middle } else { low = middle }
        }
        (if x - (VALUES[high - 1] as f32) < VALUES[high] as f32 - x { high - 1 } else { high }) as u8
    }

    #[test]
    fn nearest_level_is_the_binary_search() {
        for border in BORDERS.into_iter().chain(VALUES.map(f32::from)).chain([0.0, 1e-30, 500.0, -500.0]) {
            for step in -20_000i32..=20_000 {
                let x = f32::from_bits(border.to_bits().wrapping_add_signed(step));
                assert_eq!(nearest_level(x), by_search(x), "{x}");
            }
        }
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0] {
            assert_eq!(nearest_level(special), by_search(special), "{special}");
        }
    }
}
