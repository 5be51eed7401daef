//! Blocks taken apart: the inverse of [`super::grid::pack`], for what goes on from stored blocks (`tuning`).

use super::grid::Grid;
use super::search::from_f16_bits;
use crate::gguf::GgmlType;

/// A block, apart, in buffers of its own; as [`super::grid::Parts`].
#[derive(Clone, Debug, PartialEq)]
pub struct OwnedParts {
    pub d: u16,
    pub m: u16,
    pub scales: Vec<i16>,
    pub offsets: Vec<i16>,
    pub codes: Vec<u8>,
}

impl OwnedParts {
    /// Buffers for a block of `g`. Formats without integer scales have ones, without integer offsets zeros.
    pub fn new(g: &Grid) -> OwnedParts {
        OwnedParts { d: 0, m: 0, scales: vec![1; g.subs()], offsets: vec![0; g.subs()], codes: vec![0; g.block] }
    }
}

/// Reads a block of a [`Grid`]'s type.
///
/// # Panics
/// If the type has no grid, or a length is not that of a block.
pub fn unpack(ty: GgmlType, block: &[u8], p: &mut OwnedParts) {
    use GgmlType::*;
    assert_eq!(block.len(), ty.block_bytes(), "one block of {ty}");
    let f16 = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    match ty {
        Q4_0 | IQ4_NL => {
            p.d = f16(0);
            nibbles(&block[2..], 32, &mut p.codes);
        }
        Q4_1 => {
            (p.d, p.m) = (f16(0), f16(2));
            nibbles(&block[4..], 32, &mut p.codes);
        }
        Q5_0 | Q5_1 => {
            let at = if ty == Q5_0 { 2 } else { 4 };
            p.d = f16(0);
            p.m = if ty == Q5_0 { 0 } else { f16(2) };
            nibbles(&block[at + 4..], 32, &mut p.codes);
            for (j, c) in p.codes.iter_mut().enumerate() {
                *c |= (block[at + j / 8] >> (j % 8) & 1) << 4;
            }
        }
        Q8_0 => {
            p.d = f16(0);
            // code 0 is -127; -128, which ggml never writes, is taken for it
            p.codes.iter_mut().zip(&block[2..]).for_each(|(c, b)| *c = (*b as i8).max(-127).wrapping_add(127) as u8);
        }
        MXFP4 => {
            p.d = u16::from(block[0]);
            nibbles(&block[1..], 32, &mut p.codes);
            p.codes.iter_mut().for_each(|c| {
                *c = if *c > 8 {
                    15 - *c
                } else if *c == 8 {
                    7
                } else {
                    *c + 7
                }
            });
        }
        Q2_K => {
            for (j, b) in block[..16].iter().enumerate() {
                (p.scales[j], p.offsets[j]) = (i16::from(b & 15), i16::from(b >> 4));
            }
            pairs_of_bits(&block[16..80], &mut p.codes);
            (p.d, p.m) = (f16(80), f16(82));
        }
        Q3_K => {
            pairs_of_bits(&block[32..96], &mut p.codes);
            for (i, c) in p.codes.iter_mut().enumerate() {
                *c |= (block[i % 32] >> (i / 32) & 1) << 2;
            }
            for (j, s) in p.scales.iter_mut().enumerate() {
                let low = block[96 + j % 8] >> (4 * (j / 8)) & 15;
                let high = block[104 + j % 4] >> (2 * (j / 4)) & 3;
                *s = i16::from(low | high << 4) - 32;
            }
            p.d = f16(108);
        }
        Q4_K | Q5_K => {
            (p.d, p.m) = (f16(0), f16(2));
            for j in 0..4 {
                let (s, o, both) = (block[4 + j], block[8 + j], block[12 + j]);
                (p.scales[j], p.offsets[j]) = (i16::from(s & 63), i16::from(o & 63));
                p.scales[j + 4] = i16::from(both & 15 | s >> 6 << 4);
                p.offsets[j + 4] = i16::from(both >> 4 | o >> 6 << 4);
            }
            let high = &block[16..block.len() - 128];
            nibbles(&block[16 + high.len()..], 64, &mut p.codes);
            if !high.is_empty() {
                for (i, c) in p.codes.iter_mut().enumerate() {
                    *c |= (high[i % 32] >> (i / 32) & 1) << 4;
                }
            }
        }
        Q6_K => {
            for half in 0..2 {
                let (low, high) = (&block[64 * half..], &block[128 + 32 * half..]);
                let codes = &mut p.codes[128 * half..][..128];
                for i in 0..32 {
                    codes[i] = low[i] & 15 | (high[i] & 3) << 4;
                    codes[i + 32] = low[i + 32] & 15 | (high[i] >> 2 & 3) << 4;
                    codes[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                    codes[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
                }
            }
            p.scales.iter_mut().zip(&block[192..208]).for_each(|(s, b)| *s = i16::from(*b as i8));
            p.d = f16(208);
        }
        IQ4_XS => {
            p.d = f16(0);
            let high = f16(2);
            for (j, s) in p.scales.iter_mut().enumerate() {
                let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
                *s = i16::from(low | ((high >> (2 * j) & 3) as u8) << 4) - 32;
            }
            nibbles(&block[8..], 32, &mut p.codes);
        }
        TQ1_0 | TQ2_0 => {
            p.d = f16(block.len() - 2);
            let mut values = [0f32; 256];
            super::format(ty).expect("it has a decoder").decode(block, &mut values);
            let positive = from_f16_bits(p.d) > 0.0;
            let trit = |v: f32| if v == 0.0 { 1 } else { 2 * u8::from((v > 0.0) == positive) };
            p.codes.iter_mut().zip(values).for_each(|(c, v)| *c = trit(v));
        }
        _ => panic!("{ty} has no grid"),
    }
}

/// As `nibbles` of [`super::grid`], back.
fn nibbles(bytes: &[u8], run: usize, codes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact_mut(run).zip(bytes.chunks_exact(run / 2)) {
        let (low, high) = codes.split_at_mut(run / 2);
        for ((l, h), b) in low.iter_mut().zip(high).zip(bytes) {
            (*l, *h) = (b & 15, b >> 4);
        }
    }
}

/// Four codes of two bits a byte: value `128 h + 32 k + i` in bits `2 k` of byte `32 h + i`.
fn pairs_of_bits(bytes: &[u8], codes: &mut [u8]) {
    for (i, c) in codes.iter_mut().enumerate() {
        *c = bytes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::grid::{Levels, Offsets, Parts, Scales, pack};

    #[test]
    fn what_was_packed_is_read_back() {
        let mut seed = 3u64;
        let mut next = |n: i32| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((seed >> 33) % n as u64) as i32
        };
        let grids: Vec<Grid> = GgmlType::ALL.iter().filter_map(|&t| Grid::of(t)).collect();
        assert_eq!(grids.len(), 15);
        for g in grids {
            for _ in 0..40 {
                let codes = match g.levels {
                    Levels::Range { lo, hi } => hi - lo + 1,
                    Levels::Table(t) => t.len() as i32,
                };
                let mut want = OwnedParts::new(&g);
                want.codes.fill_with(|| next(codes) as u8);
                if let Scales::Ints { lo, hi } = g.scales {
                    want.scales.fill_with(|| (lo + next(hi - lo + 1)) as i16);
                }
                if let Offsets::Ints { hi } = g.offsets {
                    want.offsets.fill_with(|| next(hi + 1) as i16);
                }
                want.d = if g.scales == Scales::E8M0 { 120 + next(9) as u16 } else { 0x2c00 + next(0x400) as u16 };
                want.m = if g.offsets == Offsets::None { 0 } else { 0xac00 + next(0x400) as u16 };
                let OwnedParts { d, m, scales, offsets, codes } = &want;
                let mut block = vec![0; g.ty.block_bytes()];
                pack(g.ty, &Parts { d: *d, m: *m, scales, offsets, codes }, &mut block);
                let mut got = OwnedParts::new(&g);
                unpack(g.ty, &block, &mut got);
                assert_eq!(got, want, "{}", g.ty);
            }
        }
    }
}
