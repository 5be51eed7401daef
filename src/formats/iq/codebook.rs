//! What a block of IQ2 and IQ3 can say, for rounding that chooses points, signs and scales itself (`rounding`).
//!
//! A value is `d · step · (2 s + 1) · sign · magnitude`: `d` the f16 of the block, `s` the four bits of the sub-block, the
//! magnitudes those of a grid point of four or eight values. Where only seven of eight signs are stored, the number of minus
//! signs is even. [`Codebook::pack`] writes what the format's decoder reads; the layouts are those of ggml-common.h.

use std::sync::OnceLock;

use super::grids::{GRID2_256, GRID2_512, GRID2_1024, GRID3_256, GRID3_512, VALUES_IQ2, VALUES_IQ3_S, VALUES_IQ3_XXS};
use crate::gguf::GgmlType;

/// Values of a block.
pub const BLOCK: usize = 256;
/// Points of a [`Codebook::points`] entry.
pub const LANES: usize = 16;

/// A codebook and how its scales are stored.
pub struct Codebook {
    pub ty: GgmlType,
    /// Values of a point: 4 or 8.
    pub dim: usize,
    /// Values that share a scale.
    pub sub: usize,
    /// The number of minus signs among eight values is even.
    pub even: bool,
    /// What an odd number times `d` is multiplied by.
    pub step: f32,
    /// Magnitudes by sixteen points, `[dim][LANES]` of each; places above `dim` are zero.
    pub points: Vec<[[f32; LANES]; 8]>,
}

/// Everything in a block but its `d`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parts {
    /// `0..16` by sub-block.
    pub scales: [u8; 16],
    /// Grid indices, `256 / dim`.
    pub points: [u16; 64],
    /// Bit `i` of byte `k`: value `8 k + i` is below zero.
    pub signs: [u8; 32],
}

impl Default for Parts {
    fn default() -> Parts {
        Parts { scales: [0; 16], points: [0; 64], signs: [0; 32] }
    }
}

impl Codebook {
    /// The codebook of a type; `None` for IQ1 and all that have none.
    pub fn of(ty: GgmlType) -> Option<&'static Codebook> {
        static ALL: OnceLock<Vec<Codebook>> = OnceLock::new();
        ALL.get_or_init(all).iter().find(|c| c.ty == ty)
    }

    /// The scale of a sub-block.
    #[inline]
    pub fn scale(&self, d: f32, s: u8) -> f32 {
        d * (f32::from(2 * s + 1) * self.step)
    }

    /// Magnitudes of a point, the first `dim` of them.
    #[inline]
    pub fn magnitudes(&self, point: u16) -> [f32; 8] {
        let (block, lane) = (usize::from(point) / LANES, usize::from(point) % LANES);
        self.points[block].map(|m| m[lane])
    }

    /// Bits of the f16 and the scales of a block.
    pub fn head(&self, block: &[u8]) -> (u16, [u8; 16]) {
        let mut scales = [0; 16];
        for (sub, s) in scales[..BLOCK / self.sub].iter_mut().enumerate() {
            *s = match self.ty {
                GgmlType::IQ3_XXS => block[69 + 4 * sub] >> 4,
                GgmlType::IQ2_XXS => block[9 + 8 * sub] >> 4,
                _ => block[self.scales_at() + sub / 2] >> (sub % 2 * 4) & 15,
            };
        }
        (u16::from_le_bytes([block[0], block[1]]), scales)
    }

    /// Where the nibbles of the scales stand.
    fn scales_at(&self) -> usize {
        match self.ty {
            GgmlType::IQ3_S => 106,
            GgmlType::IQ2_XS => 66,
            _ => 74,
        }
    }

    /// Writes a block.
    pub fn pack(&self, d: u16, p: &Parts, out: &mut [u8]) {
        assert_eq!(out.len(), self.ty.block_bytes(), "one block of {}", self.ty);
        out.fill(0);
        out[..2].copy_from_slice(&d.to_le_bytes());
        let low = |out: &mut [u8]| out.iter_mut().zip(&p.points).for_each(|(o, p)| *o = *p as u8);
        // four times seven signs and the scale of 32 values
        let word = |sub: usize| {
            let signs = (0..4).fold(0, |all, k| all | u32::from(p.signs[4 * sub + k] & 127) << (7 * k));
            (signs | u32::from(p.scales[sub]) << 28).to_le_bytes()
        };
        match self.ty {
            GgmlType::IQ3_XXS => {
                low(&mut out[2..66]);
                (0..8).for_each(|sub| out[66 + 4 * sub..][..4].copy_from_slice(&word(sub)));
            }
            GgmlType::IQ2_XXS => {
                for sub in 0..8 {
                    out[2 + 8 * sub..][..4].iter_mut().zip(&p.points[4 * sub..]).for_each(|(o, p)| *o = *p as u8);
                    out[6 + 8 * sub..][..4].copy_from_slice(&word(sub));
                }
            }
            GgmlType::IQ2_XS => {
                for (i, out) in out[2..66].chunks_exact_mut(2).enumerate() {
                    out.copy_from_slice(&(p.points[i] | u16::from(p.signs[i] & 127) << 9).to_le_bytes());
                }
            }
            GgmlType::IQ3_S => {
                low(&mut out[2..66]);
                p.points.iter().enumerate().for_each(|(k, p)| out[66 + k / 8] |= ((p >> 8) << (k % 8)) as u8);
                out[74..106].copy_from_slice(&p.signs);
            }
            _ => {
                low(&mut out[2..34]);
                out[34..66].copy_from_slice(&p.signs);
                p.points[..32]
                    .iter()
                    .enumerate()
                    .for_each(|(i, p)| out[66 + i / 4] |= ((p >> 8) << (2 * (i % 4))) as u8);
            }
        }
        if !matches!(self.ty, GgmlType::IQ3_XXS | GgmlType::IQ2_XXS) {
            let at = self.scales_at();
            for (sub, s) in p.scales[..BLOCK / self.sub].iter().enumerate() {
                out[at + sub / 2] |= s << (sub % 2 * 4);
            }
        }
    }
}

fn all() -> Vec<Codebook> {
    use GgmlType::{IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
    let two = |ty, codes, sub, even| make(ty, codes, &VALUES_IQ2, (8, 2), sub, even, 0.125);
    vec![
        two(IQ2_XXS, &GRID2_256[..], 32, true),
        two(IQ2_XS, &GRID2_512, 16, true),
        two(IQ2_S, &GRID2_1024, 16, false),
        make(IQ3_XXS, &GRID3_256, &VALUES_IQ3_XXS, (4, 3), 32, true, 0.25),
        make(IQ3_S, &GRID3_512, &VALUES_IQ3_S, (4, 3), 32, false, 1.0),
    ]
}

fn make(
    ty: GgmlType,
    codes: &[u16],
    values: &[f32],
    (dim, bits): (usize, usize),
    sub: usize,
    even: bool,
    step: f32,
) -> Codebook {
    let mut points = vec![[[0f32; LANES]; 8]; codes.len() / LANES];
    for (i, code) in codes.iter().enumerate() {
        for j in 0..dim {
            points[i / LANES][j][i % LANES] = values[usize::from(code >> (bits * j)) & ((1 << bits) - 1)];
        }
    }
    Codebook { ty, dim, sub, even, step, points }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::search::from_f16_bits;

    /// What is packed is what the format's decoder reads, and the head is found again.
    #[test]
    fn blocks_decode_to_scale_times_sign_times_magnitude() {
        let mut seed = 7u64;
        let mut next = |n: usize| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as usize % n
        };
        for ty in [GgmlType::IQ2_XXS, GgmlType::IQ2_XS, GgmlType::IQ2_S, GgmlType::IQ3_XXS, GgmlType::IQ3_S] {
            let c = Codebook::of(ty).unwrap();
            for _ in 0..40 {
                let mut p = Parts::default();
                p.scales[..BLOCK / c.sub].fill_with(|| next(16) as u8);
                p.points[..BLOCK / c.dim].fill_with(|| next(c.points.len() * LANES) as u16);
                p.signs.fill_with(|| next(256) as u8);
                if c.even {
                    p.signs.iter_mut().for_each(|s| *s ^= (s.count_ones() as u8 & 1) << 7);
                }
                let d = 0x2c00 + next(0x400) as u16;
                let mut block = vec![0xff; ty.block_bytes()];
                c.pack(d, &p, &mut block);
                assert_eq!(c.head(&block), (d, p.scales));
                let mut values = vec![0.0; BLOCK];
                crate::formats::format(ty).unwrap().decode(&block, &mut values);
                for (i, v) in values.iter().enumerate() {
                    let magnitude = c.magnitudes(p.points[i / c.dim])[i % c.dim];
                    let sign = if p.signs[i / 8] >> (i % 8) & 1 == 1 { -1.0 } else { 1.0 };
                    let want = c.scale(from_f16_bits(d), p.scales[i / c.sub]) * magnitude * sign;
                    assert!((v - want).abs() <= 1e-6 * want.abs(), "{ty}: {i}: {v} {want}");
                }
            }
        }
        assert!(Codebook::of(GgmlType::IQ1_S).is_none() && Codebook::of(GgmlType::Q4_K).is_none());
    }
}
