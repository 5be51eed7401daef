//! The 32-element formats Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: one scale (and minimum) per block.
//!
//! Without importance weights the scale comes from the extreme value of the block; with them from a search whose
//! weights depend on the mean square of the whole row. Q8_0 ignores weights.
//!
//! Layout: f16 `d`, for the `_1` formats f16 `m`, for the five-bit formats 4 bytes of high bits, then 16 bytes of
//! nibbles (value `j` low, `j + 16` high), or 32 signed bytes for Q8_0.

use super::search::{Affine, from_f16_bits, make_qkx_quants, make_qx_quants, round_away, to_f16_bits, truncate};
use super::{BlockFormat, FormatError, check_decode, check_encode, simd, validate_f16_fields};
use crate::gguf::GgmlType;

/// Values per block.
pub(crate) const QK: usize = 32;

/// A four- or five-bit format.
pub(crate) struct Small {
    pub ty: GgmlType,
    /// Four or five.
    pub bits: u32,
    /// The block has a minimum (`_1`).
    pub min: bool,
}

impl Small {
    pub(crate) const Q4_0: Small = Small { ty: GgmlType::Q4_0, bits: 4, min: false };
    pub(crate) const Q4_1: Small = Small { ty: GgmlType::Q4_1, bits: 4, min: true };
    pub(crate) const Q5_0: Small = Small { ty: GgmlType::Q5_0, bits: 5, min: false };
    pub(crate) const Q5_1: Small = Small { ty: GgmlType::Q5_1, bits: 5, min: true };

    /// The search of the importance-weighted formats with a minimum.
    #[inline(always)]
    pub(crate) const fn affine(&self) -> Affine {
        Affine { nmax: (1 << self.bits) - 1, rmin: -0.9, rdelta: 0.05, nstep: 36, mad: false, guarded: true }
    }

    /// Half the number of levels: the level of zero in the formats without minimum.
    #[inline(always)]
    pub(crate) const fn half(&self) -> i32 {
        1 << (self.bits - 1)
    }

    /// Writes a block: `d`, `m` (for `_1`) as f32, and levels.
    #[inline(always)]
    fn write(&self, d: f32, m: f32, levels: &[u8; QK], out: &mut [u8]) {
        self.write_bits(to_f16_bits(d), to_f16_bits(m), levels, fifth_bits(levels), out);
    }

    /// Writes a block: f16 `d`, f16 `m` (for `_1`), levels and their [`fifth_bits`].
    #[inline(always)]
    pub(crate) fn write_bits(&self, d: u16, m: u16, levels: &[u8; QK], high: u32, out: &mut [u8]) {
        let (head, qs) = out.split_at_mut(out.len() - QK / 2);
        head[..2].copy_from_slice(&d.to_le_bytes());
        let mut at = 2;
        if self.min {
            head[2..4].copy_from_slice(&m.to_le_bytes());
            at = 4;
        }
        if self.bits == 5 {
            head[at..at + 4].copy_from_slice(&high.to_le_bytes());
        }
        for j in 0..QK / 2 {
            qs[j] = (levels[j] & 0xf) | (levels[j + QK / 2] << 4);
        }
    }

    /// `dequantize_row_q4_0`, `_q4_1`, `_q5_0`, `_q5_1`.
    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ty, blocks, out);
        for (b, y) in blocks.chunks_exact(self.ty.block_bytes()).zip(out.as_chunks_mut::<QK>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[0], b[1]]));
            let m = if self.min { from_f16_bits(u16::from_le_bytes([b[2], b[3]])) } else { 0.0 };
            let (head, qs) = b.split_at(b.len() - QK / 2);
            let high = if self.bits == 5 { head.last_chunk().map_or(0, |h| u32::from_le_bytes(*h)) } else { 0 };
            for (j, y) in y.iter_mut().enumerate() {
                let low = (qs[j % 16] >> (4 * (j / 16))) & 0xf;
                let q = (low as u32 | ((high >> j) & 1) << 4) as i32;
                *y = if self.min { q as f32 * d + m } else { (q - self.half()) as f32 * d };
            }
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ty, rows, n, w, out);
        simd::encode(self.ty, rows, n, w, out, |rows, n, w, out| match w {
            None => {
                for (x, out) in rows.as_chunks::<QK>().0.iter().zip(out.chunks_exact_mut(self.ty.block_bytes())) {
                    self.plain(x, out);
                }
            }
            Some(w) => self.weighted(rows, n, w, out),
        })
    }

    /// `quantize_row_q4_0_ref`, `_q4_1_ref`, `_q5_0_ref`, `_q5_1_ref`, one block.
    #[inline(never)]
    pub(crate) fn plain(&self, x: &[f32; QK], out: &mut [u8]) {
        let top = (1 << self.bits) - 1;
        let reciprocal = |d: f32| if d != 0.0 { 1.0 / d } else { 0.0 };
        if self.min {
            let (mut min, mut max) = (f32::MAX, -f32::MAX);
            for &v in x {
                if v < min {
                    min = v;
                }
                if v > max {
                    max = v;
                }
            }
            let d = (max - min) / top as f32;
            let id = reciprocal(d);
            let levels = x.map(|v| {
                let l = truncate((v - min) * id + 0.5);
                // Q5_1 converts to an unsigned byte and does not clamp.
                if self.bits == 5 { l as u8 } else { (l as i8 as i32).min(top) as u8 }
            });
            self.write(d, min, &levels, out);
        } else {
            let max = super::search::signed_max(x).0;
            let d = max / -self.half() as f32;
            let id = reciprocal(d);
            let shift = self.half() as f32 + 0.5;
            let levels = x.map(|v| (truncate(v * id + shift) as i8 as i32).min(top) as u8);
            self.write(d, 0.0, &levels, out);
        }
    }

    /// `quantize_row_q4_0_impl`, `_q4_1_impl`, `_q5_0_impl`, `_q5_1_impl`.
    fn weighted(&self, rows: &[f32], n: usize, qw: &[f32], out: &mut [u8]) {
        let row_bytes = n / QK * self.ty.block_bytes();
        if row_bytes == 0 {
            return;
        }
        let mut w = [0.0f32; QK];
        for (row, out) in rows.chunks_exact(n).zip(out.chunks_exact_mut(row_bytes)) {
            let sigma2 = super::kquant::sum_of_squares(row) / n as f32;
            let blocks = row.as_chunks::<QK>().0.iter().zip(qw.as_chunks::<QK>().0);
            for ((x, qw), out) in blocks.zip(out.chunks_exact_mut(self.ty.block_bytes())) {
                super::kquant::importance(x, qw, sigma2, &mut w);
                if self.min {
                    let mut levels = [0u8; QK];
                    let (d, the_min) = make_qkx_quants(&self.affine(), x, &w, &mut levels);
                    self.write(d, -the_min, &levels, out);
                } else {
                    let mut levels = [0i8; QK];
                    let d = make_qx_quants(self.half(), x, &w, &mut levels);
                    self.write(d, 0.0, &levels.map(|l| l as u8), out);
                }
            }
        }
    }
}

/// Bit 4 of each level, the first lowest.
#[inline(always)]
pub(crate) fn fifth_bits(levels: &[u8; QK]) -> u32 {
    let mut high = 0;
    for (k, levels) in levels.as_chunks::<8>().0.iter().enumerate() {
        // The product moves bit 0 of byte j to bit 56 + j; no two terms meet.
        let bits = (u64::from_le_bytes(*levels) >> 4) & 0x0101_0101_0101_0101;
        high |= ((bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32) << (8 * k);
    }
    high
}

macro_rules! small_format {
    ($(#[$doc:meta])* $name:ident, $fields:expr) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub struct $name;

        impl BlockFormat for $name {
            fn ggml_type(&self) -> GgmlType {
                Small::$name.ty
            }

            fn decode(&self, blocks: &[u8], out: &mut [f32]) {
                Small::$name.decode(blocks, out);
            }

            fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
                Small::$name.encode(rows, n, w, out)
            }

            fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
                validate_f16_fields(self.ggml_type(), blocks, $fields)
            }
        }
    };
}

small_format!(
    /// Q4_0 (`quantize_row_q4_0_ref`, `quantize_row_q4_0_impl`, `dequantize_row_q4_0`).
    Q4_0,
    &[0]
);
small_format!(
    /// Q4_1 (`quantize_row_q4_1_ref`, `quantize_row_q4_1_impl`, `dequantize_row_q4_1`).
    Q4_1,
    &[0, 2]
);
small_format!(
    /// Q5_0 (`quantize_row_q5_0_ref`, `quantize_row_q5_0_impl`, `dequantize_row_q5_0`).
    Q5_0,
    &[0]
);
small_format!(
    /// Q5_1 (`quantize_row_q5_1_ref`, `quantize_row_q5_1_impl`, `dequantize_row_q5_1`).
    Q5_1,
    &[0, 2]
);

/// Q8_0 (`quantize_row_q8_0_ref`, `dequantize_row_q8_0`).
#[allow(non_camel_case_types)]
pub struct Q8_0;

impl BlockFormat for Q8_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q8_0
    }

    fn decode(&self, blocks: &[u8], out: &mut [f32]) {
        check_decode(self.ggml_type(), blocks, out);
        for (b, y) in blocks.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<QK>().0) {
            let d = from_f16_bits(u16::from_le_bytes([b[0], b[1]]));
            for (y, q) in y.iter_mut().zip(&b[2..]) {
                *y = (*q as i8) as f32 * d;
            }
        }
    }

    fn encode(&self, rows: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) -> Result<(), FormatError> {
        check_encode(self.ggml_type(), rows, n, w, out);
        simd::encode(self.ggml_type(), rows, n, w, out, |rows, _, _, out| {
            for (x, out) in rows.as_chunks::<QK>().0.iter().zip(out.as_chunks_mut::<34>().0) {
                q8_0_block(x, out);
            }
        })
    }

    fn validate(&self, blocks: &[u8]) -> Result<(), FormatError> {
        validate_f16_fields(self.ggml_type(), blocks, &[0])
    }
}

/// `quantize_row_q8_0_ref`, one block.
#[inline(never)]
pub(crate) fn q8_0_block(x: &[f32; QK], out: &mut [u8; 34]) {
    let amax = x.iter().fold(0.0f32, |a, v| if a > v.abs() { a } else { v.abs() });
    let d = amax / 127.0;
    let id = if d != 0.0 { 1.0 / d } else { 0.0 };
    out[..2].copy_from_slice(&to_f16_bits(d).to_le_bytes());
    out[2..].iter_mut().zip(x).for_each(|(q, v)| *q = round_away(v * id) as u8);
}
