//! The grids of the scalar block formats, for rounding that chooses codes and scales itself (`rounding`).
//!
//! In a block of every one of these formats a value is `scale · level(code) + offset`, with one scale and offset for each
//! sub-block. [`Grid`] says which levels there are and how scales and offsets are stored; [`pack`] writes a block from its
//! [`Parts`], which the format's decoder reads back. Formats with vector codebooks (IQ1, IQ2, IQ3) have no such grid.

use super::iq4;
use super::kquant::pack_pairs_of_bits;
use super::legacy::fifth_bits;
use super::low::{e8m0_half, pack_trits};
use super::search::from_f16_bits;
use crate::gguf::GgmlType;

/// The values that codes stand for, in the order of the codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// `lo..=hi`.
    Range { lo: i32, hi: i32 },
    /// Ascending.
    Table(&'static [i8]),
}

/// How the scale of a sub-block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// One f16, the block being its only sub-block.
    F16,
    /// A power of two, likewise.
    E8M0,
    /// An integer `lo..=hi` times the f16 of the block.
    Ints { lo: i32, hi: i32 },
}

/// How the offset of a sub-block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offsets {
    None,
    /// One f16, added.
    F16,
    /// An integer `0..=hi` times another f16 of the block, subtracted.
    Ints {
        hi: i32,
    },
}

/// What can be said in a block of a format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    pub ty: GgmlType,
    /// Values of a block.
    pub block: usize,
    /// Values that share a scale.
    pub sub: usize,
    pub levels: Levels,
    pub scales: Scales,
    pub offsets: Offsets,
    /// All blocks of a row have the same scale.
    pub row: bool,
}

/// Twice the values of E2M1, ascending (`kvalues_fp4` of ggml-common.h).
const FP4: [i8; 15] = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12];

impl Grid {
    /// The grid of a type; `None` for floats and vector codebooks.
    pub fn of(ty: GgmlType) -> Option<Grid> {
        use GgmlType::*;
        use Levels::{Range, Table};
        const SIX_BITS: Scales = Scales::Ints { lo: -32, hi: 31 };
        let (block, sub, levels, scales, offsets) = match ty {
            Q4_0 => (32, 32, Range { lo: -8, hi: 7 }, Scales::F16, Offsets::None),
            Q4_1 => (32, 32, Range { lo: 0, hi: 15 }, Scales::F16, Offsets::F16),
            Q5_0 => (32, 32, Range { lo: -16, hi: 15 }, Scales::F16, Offsets::None),
            Q5_1 => (32, 32, Range { lo: 0, hi: 31 }, Scales::F16, Offsets::F16),
            Q8_0 => (32, 32, Range { lo: -127, hi: 127 }, Scales::F16, Offsets::None),
            Q2_K => (256, 16, Range { lo: 0, hi: 3 }, Scales::Ints { lo: 0, hi: 15 }, Offsets::Ints { hi: 15 }),
            Q3_K => (256, 16, Range { lo: -4, hi: 3 }, SIX_BITS, Offsets::None),
            Q4_K => (256, 32, Range { lo: 0, hi: 15 }, Scales::Ints { lo: 0, hi: 63 }, Offsets::Ints { hi: 63 }),
            Q5_K => (256, 32, Range { lo: 0, hi: 31 }, Scales::Ints { lo: 0, hi: 63 }, Offsets::Ints { hi: 63 }),
            Q6_K => (256, 16, Range { lo: -32, hi: 31 }, Scales::Ints { lo: -128, hi: 127 }, Offsets::None),
            IQ4_NL => (32, 32, Table(&iq4::VALUES), Scales::F16, Offsets::None),
            IQ4_XS => (256, 32, Table(&iq4::VALUES), SIX_BITS, Offsets::None),
            MXFP4 => (32, 32, Table(&FP4), Scales::E8M0, Offsets::None),
            TQ1_0 | TQ2_0 => (256, 256, Range { lo: -1, hi: 1 }, Scales::F16, Offsets::None),
            _ => return None,
        };
        Some(Grid { ty, block, sub, levels, scales, offsets, row: false })
    }

    /// The same with one scale for each row; `None` where there is more to a block than an f16.
    pub fn by_row(self) -> Option<Grid> {
        let plain = self.scales == Scales::F16 && self.offsets == Offsets::None && self.block == 32;
        plain.then_some(Grid { row: true, ..self })
    }

    /// Sub-blocks of a block.
    pub fn subs(&self) -> usize {
        self.block / self.sub
    }

    /// The value of a code.
    pub fn level(&self, code: u8) -> f32 {
        match self.levels {
            Levels::Range { lo, .. } => (lo + i32::from(code)) as f32,
            Levels::Table(values) => f32::from(values[usize::from(code)]),
        }
    }

    /// The scale that a block's `d` stands for.
    pub fn scale_of(&self, d: u16) -> f32 {
        match self.scales {
            Scales::E8M0 => e8m0_half(d as u8),
            _ => from_f16_bits(d),
        }
    }
}

/// A block, apart.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Bits of the f16, or the exponent ([`Scales::E8M0`]).
    pub d: u16,
    /// Bits of the f16 of the offsets.
    pub m: u16,
    /// Integer scales of the sub-blocks.
    pub scales: &'a [i16],
    /// Integer offsets of the sub-blocks.
    pub offsets: &'a [i16],
    /// One code per value.
    pub codes: &'a [u8],
}

/// Writes the block of a [`Grid`]'s type.
///
/// # Panics
/// If the type has no grid, or a length is not that of a block.
pub fn pack(ty: GgmlType, p: &Parts<'_>, out: &mut [u8]) {
    use GgmlType::*;
    assert_eq!(out.len(), ty.block_bytes(), "one block of {ty}");
    assert_eq!(p.codes.len(), ty.block_len(), "the codes of a block of {ty}");
    let (d, m) = (p.d.to_le_bytes(), p.m.to_le_bytes());
    match ty {
        Q4_0 | IQ4_NL => {
            out[..2].copy_from_slice(&d);
            nibbles(p.codes, 32, &mut out[2..]);
        }
        Q4_1 => {
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&m);
            nibbles(p.codes, 32, &mut out[4..]);
        }
        Q5_0 | Q5_1 => {
            let at = if ty == Q5_0 { 2 } else { 4 };
            out[2..4].copy_from_slice(&m);
            out[..2].copy_from_slice(&d);
            let codes: &[u8; 32] = p.codes.try_into().expect("32 codes");
            out[at..at + 4].copy_from_slice(&fifth_bits(codes).to_le_bytes());
            nibbles(&codes.map(|c| c & 15), 32, &mut out[at + 4..]);
        }
        Q8_0 => {
            out[..2].copy_from_slice(&d);
            // code 0 is −127
            out[2..].iter_mut().zip(p.codes).for_each(|(o, c)| *o = c.wrapping_sub(127));
        }
        MXFP4 => {
            out[0] = p.d as u8;
            // sign and magnitude: the seven magnitudes below zero descend
            let mut codes = [0u8; 32];
            codes.iter_mut().zip(p.codes).for_each(|(o, &c)| *o = if c < 7 { 15 - c } else { c - 7 });
            nibbles(&codes, 32, &mut out[1..]);
        }
        Q2_K => {
            for (o, (s, m)) in out.iter_mut().zip(p.scales.iter().zip(p.offsets)) {
                *o = *s as u8 | (*m as u8) << 4;
            }
            pack_pairs_of_bits(p.codes.try_into().expect("256 codes"), &mut out[16..80]);
            out[80..82].copy_from_slice(&d);
            out[82..84].copy_from_slice(&m);
        }
        Q3_K => q3_k(p, d, out),
        Q4_K | Q5_K => q45_k(p, d, m, out),
        Q6_K => q6_k(p, d, out),
        IQ4_XS => {
            out[..2].copy_from_slice(&d);
            out[2..8].fill(0);
            let mut high = 0u16;
            for (j, s) in p.scales.iter().enumerate() {
                let s = (s + 32) as u16;
                out[4 + j / 2] |= ((s & 15) as u8) << (4 * (j % 2));
                high |= (s >> 4) << (2 * j);
            }
            out[2..4].copy_from_slice(&high.to_le_bytes());
            nibbles(p.codes, 32, &mut out[8..]);
        }
        TQ1_0 | TQ2_0 => pack_trits(ty, p.codes, d, out),
        _ => panic!("{ty} has no grid"),
    }
}

/// What a block stores beside its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Head {
    /// Bits of the f16, or the exponent.
    pub d: u16,
    /// Bits of the f16 of the offsets.
    pub m: u16,
    pub scales: [i16; 16],
    pub offsets: [i16; 16],
}

/// The head of a block of a [`Grid`]'s type: what [`pack`] wrote.
///
/// # Panics
/// If the type has no grid, or the length is not that of a block.
pub fn head(ty: GgmlType, block: &[u8]) -> Head {
    use GgmlType::*;
    assert_eq!(block.len(), ty.block_bytes(), "one block of {ty}");
    let word = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let mut h = Head::default();
    match ty {
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL => h.d = word(0),
        Q4_1 | Q5_1 => (h.d, h.m) = (word(0), word(2)),
        MXFP4 => h.d = block[0].into(),
        TQ1_0 | TQ2_0 => h.d = word(block.len() - 2),
        Q2_K => {
            (h.d, h.m) = (word(80), word(82));
            for (j, b) in block[..16].iter().enumerate() {
                (h.scales[j], h.offsets[j]) = ((b & 15).into(), (b >> 4).into());
            }
        }
        Q3_K => {
            h.d = word(108);
            for j in 0..16 {
                let s = block[96 + j % 8] >> (4 * (j / 8)) & 15 | (block[104 + j % 4] >> (2 * (j / 4)) & 3) << 4;
                h.scales[j] = i16::from(s) - 32;
            }
        }
        Q4_K | Q5_K => {
            (h.d, h.m) = (word(0), word(2));
            let b = &block[4..16];
            for j in 0..4 {
                (h.scales[j], h.offsets[j]) = ((b[j] & 63).into(), (b[j + 4] & 63).into());
                h.scales[j + 4] = (b[j + 8] & 15 | b[j] >> 6 << 4).into();
                h.offsets[j + 4] = (b[j + 8] >> 4 | b[j + 4] >> 6 << 4).into();
            }
        }
        Q6_K => {
            h.d = word(208);
            h.scales.iter_mut().zip(&block[192..208]).for_each(|(s, b)| *s = (*b as i8).into());
        }
        IQ4_XS => {
            h.d = word(0);
            for j in 0..8 {
                let s = u16::from(block[4 + j / 2] >> (4 * (j % 2)) & 15) | (word(2) >> (2 * j) & 3) << 4;
                h.scales[j] = s as i16 - 32;
            }
        }
        _ => panic!("{ty} has no grid"),
    }
    h
}

/// Nibbles of runs of `run` codes: value `j` low, `j + run / 2` high.
fn nibbles(codes: &[u8], run: usize, out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(run).zip(out.chunks_exact_mut(run / 2)) {
        let (low, high) = codes.split_at(run / 2);
        out.iter_mut().zip(low.iter().zip(high)).for_each(|(o, (l, h))| *o = l | h << 4);
    }
}

fn q3_k(p: &Parts<'_>, d: [u8; 2], out: &mut [u8]) {
    let mut low = [0u8; 256];
    out[..32].fill(0);
    for (i, &c) in p.codes.iter().enumerate() {
        out[i % 32] |= (c >> 2) << (i / 32);
        low[i] = c & 3;
    }
    pack_pairs_of_bits(&low, &mut out[32..96]);
    out[96..108].fill(0);
    for (j, s) in p.scales.iter().enumerate() {
        let s = (s + 32) as u8;
        out[96 + j % 8] |= (s & 15) << (4 * (j / 8));
        out[104 + j % 4] |= (s >> 4) << (2 * (j / 4));
    }
    out[108..].copy_from_slice(&d);
}

fn q45_k(p: &Parts<'_>, d: [u8; 2], m: [u8; 2], out: &mut [u8]) {
    let high_bytes = out.len() - 16 - 128;
    out[..2].copy_from_slice(&d);
    out[2..4].copy_from_slice(&m);
    for j in 0..4 {
        let (s, o) = (p.scales[j] as u8, p.offsets[j] as u8);
        let (s4, o4) = (p.scales[j + 4] as u8, p.offsets[j + 4] as u8);
        out[4 + j] = s | (s4 >> 4) << 6;
        out[8 + j] = o | (o4 >> 4) << 6;
        out[12 + j] = s4 & 15 | (o4 & 15) << 4;
    }
    let mut low = [0u8; 256];
    out[16..16 + high_bytes].fill(0);
    for (i, &c) in p.codes.iter().enumerate() {
        low[i] = c & 15;
        if high_bytes > 0 {
            out[16 + i % 32] |= (c >> 4) << (i / 32);
        }
    }
    nibbles(&low, 64, &mut out[16 + high_bytes..]);
}

fn q6_k(p: &Parts<'_>, d: [u8; 2], out: &mut [u8]) {
    for (half, l) in p.codes.chunks_exact(128).enumerate() {
        for i in 0..32 {
            out[64 * half + i] = l[i] & 15 | (l[i + 64] & 15) << 4;
            out[64 * half + 32 + i] = l[i + 32] & 15 | (l[i + 96] & 15) << 4;
            out[128 + 32 * half + i] =
                l[i] >> 4 | (l[i + 32] >> 4) << 2 | (l[i + 64] >> 4) << 4 | (l[i + 96] >> 4) << 6;
        }
    }
    out[192..208].iter_mut().zip(p.scales).for_each(|(o, s)| *o = *s as u8);
    out[208..].copy_from_slice(&d);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every type with a grid: what is packed is what the format's decoder reads.
    #[test]
    fn blocks_decode_to_scale_times_level_plus_offset() {
        let mut seed = 7u64;
        let mut next = |n: i32| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((seed >> 33) % n as u64) as i32
        };
        let types = GgmlType::ALL.iter().filter_map(|&t| Grid::of(t));
        assert_eq!(types.clone().count(), 15);
        for g in types {
            for _ in 0..50 {
                let codes = match g.levels {
                    Levels::Range { lo, hi } => hi - lo + 1,
                    Levels::Table(t) => t.len() as i32,
                };
                let codes: Vec<u8> = (0..g.block).map(|_| next(codes) as u8).collect();
                let (mut scales, mut offsets) = (vec![1i16; g.subs()], vec![0i16; g.subs()]);
                if let Scales::Ints { lo, hi } = g.scales {
                    scales.fill_with(|| (lo + next(hi - lo + 1)) as i16);
                }
                if let Offsets::Ints { hi } = g.offsets {
                    offsets.fill_with(|| next(hi + 1) as i16);
                }
                let d = if g.scales == Scales::E8M0 { 120 + next(9) as u16 } else { 0x2c00 + next(0x400) as u16 };
                let m = if g.offsets == Offsets::None { 0 } else { 0xac00 + next(0x400) as u16 };
                let parts = Parts { d, m, scales: &scales, offsets: &offsets, codes: &codes };
                let mut block = vec![0xff; g.ty.block_bytes()];
                pack(g.ty, &parts, &mut block);
                let h = head(g.ty, &block);
                assert_eq!((h.d, h.m), (d, m), "{}", g.ty);
                if let Scales::Ints { .. } = g.scales {
                    assert_eq!(h.scales[..g.subs()], scales, "{}", g.ty);
                    assert_eq!(h.offsets[..g.subs()], offsets, "{}", g.ty);
                }
                let mut values = vec![0.0; g.block];
                let format = crate::formats::format(g.ty).unwrap();
                format.decode(&block, &mut values);
                for (i, v) in values.iter().enumerate() {
                    let (s, o) = (f32::from(scales[i / g.sub]), f32::from(offsets[i / g.sub]));
                    let offset = match g.offsets {
                        Offsets::None => 0.0,
                        Offsets::F16 => from_f16_bits(m),
                        Offsets::Ints { .. } => -(from_f16_bits(m) * o),
                    };
                    let want = g.scale_of(d) * s * g.level(codes[i]) + offset;
                    assert!((v - want).abs() <= 1e-6 * want.abs().max(1e-3), "{}: {i}: {v} {want}", g.ty);
                }
            }
        }
    }
}
