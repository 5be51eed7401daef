//! Precision that no stock type has, simulated on the way: integers by row for weights, by token for the inputs of linears, by
//! head for keys and values. What published figures for W4A8 and W4A4KV4 are measured with.
//!
//! Values are rounded and stay where they are: `Q(x H) Hᵀ` with an online Hadamard rotation, `Q(x)` without. A runtime that
//! leaves both sides of a product rotated computes the same.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use super::kernels::vectorized;
use crate::linalg::hadamard::Fast;

/// Widths in bits; 16: as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simulation {
    /// Of the weights of the layers' linears: symmetric, one scale for each row.
    pub weights: u8,
    /// Of the inputs of the layers' linears: asymmetric, one scale and offset for each token.
    pub inputs: u8,
    /// Of keys and values: asymmetric, one scale and offset for each head and token.
    pub cache: u8,
    /// Hadamard rotations while it runs: of queries and keys, and of the input of the down matrix (R3 and R4 of SpinQuant).
    pub online: bool,
}

/// A word that is no simulation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no precision like w4a8, w4a4kv4 or w16a4: widths are 2 to 8, or 16")]
pub struct NoSimulation(String);

impl FromStr for Simulation {
    type Err = NoSimulation;

    fn from_str(word: &str) -> Result<Simulation, NoSimulation> {
        let parse = || {
            let lower = word.to_ascii_lowercase();
            let (weights, rest) = lower.strip_prefix('w')?.split_once('a')?;
            let (inputs, cache) = rest.split_once("kv").unwrap_or((rest, "16"));
            let bits = |text: &str| text.parse::<u8>().ok().filter(|b| (2..=8).contains(b) || *b == 16);
            Some(Simulation { weights: bits(weights)?, inputs: bits(inputs)?, cache: bits(cache)?, online: false })
        };
        parse().ok_or_else(|| NoSimulation(word.to_string()))
    }
}

impl fmt::Display for Simulation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}a{}", self.weights, self.inputs)?;
        if self.cache < 16 {
            write!(f, "kv{}", self.cache)?;
        }
        f.write_str(if self.online { " with online Hadamard rotations" } else { "" })
    }
}

impl Simulation {
    /// Inputs `x` \[tokens, columns\] of a linear; `down`: of the down matrix.
    pub fn inputs(&self, x: &mut [f32], columns: usize, down: bool) {
        if self.inputs < 16 {
            rotated(x, columns, self.online && down, |row| asymmetric(self.inputs, row));
        }
    }

    /// Keys or values `x`, heads of `width`.
    pub fn heads(&self, x: &mut [f32], width: usize, keys: bool) {
        if self.cache < 16 {
            rotated(x, width, self.online && keys, |head| asymmetric(self.cache, head));
        }
    }

    /// The weight `w` \[outputs, columns\] of a layer's linear; `down`: of the down matrix.
    pub fn weights(&self, w: &mut [f32], columns: usize, down: bool) {
        if self.weights < 16 {
            rotated(w, columns, self.online && down, |row| symmetric(self.weights, row));
        }
    }
}

/// `round` on every row, behind a Hadamard rotation if that is wanted.
fn rotated(x: &mut [f32], columns: usize, rotate: bool, round: impl Fn(&mut [f32]) + Sync) {
    let fast = rotate.then(|| Fast::new(columns));
    x.par_chunks_mut(columns * 16).for_each(|rows| {
        for row in rows.chunks_exact_mut(columns) {
            if let Some(fast) = &fast {
                fast.apply(row);
            }
            round(row);
            if let Some(fast) = &fast {
                fast.undo(row);
            }
        }
    });
}

vectorized! {
    /// Integers from the smallest to the largest value, 0 among them (QuaRot, SpinQuant: per-token asymmetric).
    pub fn asymmetric(bits: u8, x: &mut [f32]) {
        let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for i in 0..LANES {
                low[i] = low[i].min(x[i]);
                high[i] = high[i].max(x[i]);
            }
        }
        let low = rest.iter().chain(&low).fold(0f32, |a, b| a.min(*b));
        let high = rest.iter().chain(&high).fold(0f32, |a, b| a.max(*b));
        let most = ((1u32 << bits) - 1) as f32;
        let scale = (high - low) / most;
        if scale == 0.0 {
            return;
        }
        let (inverse, zero) = (1.0 / scale, nearest(-low / scale));
        x.iter_mut().for_each(|v| *v = ((nearest(*v * inverse) + zero).max(0.0).min(most) - zero) * scale);
    }
}

/// Lanes of a sum.
const LANES: usize = 16;

/// The nearest integer, ties to even; right below 2²².
#[inline(always)]
fn nearest(v: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (v + MAGIC) - MAGIC
}

/// Clips of a row that are tried: parts of its largest value, from 1 down to a half.
const CLIPS: usize = 16;

vectorized! {
    /// Integers `-2^(bits-1)` to `2^(bits-1) - 1` with the scale, clipped to parts of the largest value, that errs least.
    pub fn symmetric(bits: u8, x: &mut [f32]) {
        let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        if largest == 0.0 {
            return;
        }
        let most = ((1u32 << (bits - 1)) - 1) as f32;
        let mut best = (f32::INFINITY, largest / most);
        for i in 0..CLIPS {
            let scale = largest / most * (1.0 - i as f32 * 0.5 / (CLIPS - 1) as f32);
            let inverse = 1.0 / scale;
            let mut sums = [0f32; LANES];
            let (whole, rest) = x.as_chunks::<LANES>();
            let error = |v: f32| nearest(v * inverse).max(-most - 1.0).min(most) * scale - v;
            for x in whole {
                for i in 0..LANES {
                    let e = error(x[i]);
                    sums[i] += e * e;
                }
            }
            let error = sums.iter().sum::<f32>() + rest.iter().map(|v| error(*v) * error(*v)).sum::<f32>();
            if error < best.0 {
                best = (error, scale);
            }
        }
        let (scale, inverse) = (best.1, 1.0 / best.1);
        x.iter_mut().for_each(|v| *v = nearest(*v * inverse).max(-most - 1.0).min(most) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let all = |w, a, k| Simulation { weights: w, inputs: a, cache: k, online: false };
        assert_eq!("W4A8".parse(), Ok(all(4, 8, 16)));
        assert_eq!("w4a4kv4".parse(), Ok(all(4, 4, 4)));
        assert_eq!("w16a16kv3".parse::<Simulation>().unwrap().to_string(), "w16a16kv3");
        for bad in ["", "w4", "a8", "w1a8", "w4a9", "w4a4kv", "q4_0"] {
            assert!(bad.parse::<Simulation>().unwrap_err().to_string().contains("w4a8"), "{bad}");
        }
    }

    #[test]
    fn values_stay_within_half_a_step() {
        let x: Vec<f32> = (0..40).map(|i| ((i * 37) % 41) as f32 / 7.0 - 1.5).collect();
        for bits in [4, 8] {
            let mut y = x.clone();
            asymmetric(bits, &mut y);
            let step = 40.0 / 7.0 / ((1u32 << bits) - 1) as f32;
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= step * 0.501), "{bits}");
            let distinct: std::collections::BTreeSet<u32> = y.iter().map(|v| v.to_bits()).collect();
            assert!(distinct.len() <= 1 << bits);
            let mut w = x.clone();
            symmetric(bits, &mut w);
            // never worse than without a clip
            let most = ((1u32 << (bits - 1)) - 1) as f32;
            let scale = x.iter().fold(0f32, |m, v| m.max(v.abs())) / most;
            let plain: f32 = x.iter().map(|v| ((v / scale).round_ties_even() * scale - v).powi(2)).sum();
            let own: f32 = x.iter().zip(&w).map(|(a, b)| (a - b).powi(2)).sum();
            assert!(own <= plain * 1.0001, "{own} {plain}");
        }
        let mut zeros = [0f32; 8];
        asymmetric(4, &mut zeros);
        symmetric(4, &mut zeros);
        assert_eq!(zeros, [0.0; 8]);
    }

    #[test]
    fn a_rotation_tames_an_outlier() {
        let s = |online| Simulation { weights: 4, inputs: 4, cache: 4, online };
        let x: Vec<f32> = (0..64).map(|i| if i == 5 { 10.0 } else { ((i * 29) % 31) as f32 / 31.0 }).collect();
        let error = |online: bool| -> f32 {
            let mut y = x.clone();
            s(online).inputs(&mut y, 64, true);
            x.iter().zip(&y).map(|(x, y)| (x - y).powi(2)).sum()
        };
        assert!(error(true) < error(false), "{} {}", error(true), error(false));
    }
}
