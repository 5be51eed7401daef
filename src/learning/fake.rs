//! Weights as the target format would hold them, and the way back through that.
//!
//! Rounding is passed straight through; the scale that it hangs on is not: with `W̃ = s q + m` and `q` the code,
//! `∂W̃/∂s = q`, and straight through `W̃ = W + (q − (W − m) / s) s`, so that the largest weight of a run (the smallest too,
//! where there is an offset), which sets `s`, gets `Σ G (W̃ − W)` over what it is in units of. Searches of ggml move the scale a
//! little away from that; the gradient does not see it.

use rayon::prelude::*;

use crate::formats;
use crate::formats::grid::{Grid, Offsets};
use crate::forward::Simulation;
use crate::gguf::GgmlType;

/// How the weight of a linear is rounded while transforms are learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fake {
    /// To a block format, nearest.
    Type(GgmlType),
    /// To integers by row; of the down matrix or of another.
    Rows(Simulation, bool),
}

/// Rows of a task.
const ROWS: usize = 16;

/// True if weights can be rounded to `ty`: a block format that can be written.
pub fn can_round(ty: GgmlType) -> bool {
    let Some(format) = formats::format(ty).filter(|_| ty.is_quantized()) else { return false };
    let (n, ones) = (ty.block_len(), vec![1f32; ty.block_len()]);
    format.encode(&ones, n, Some(&ones), &mut vec![0; ty.block_bytes()]).is_ok()
}

impl Fake {
    /// Rounds `w` \[rows, columns\] in place.
    pub fn apply(self, w: &mut [f32], columns: usize) {
        match self {
            Fake::Rows(s, down) => s.weights(w, columns, down),
            Fake::Type(ty) => {
                let format = formats::format(ty).expect("types that can be encoded");
                let row = columns / ty.block_len() * ty.block_bytes();
                // some types want to know which columns matter: all alike
                let ones = vec![1f32; columns];
                w.par_chunks_mut(ROWS * columns).for_each_init(Vec::new, |bytes: &mut Vec<u8>, w| {
                    bytes.resize(w.len() / columns * row, 0);
                    let plain = format.encode(w, columns, None, bytes);
                    // what cannot be encoded is not finite, and the loss will say so
                    if plain.or_else(|_| format.encode(w, columns, Some(&ones), bytes)).is_ok() {
                        format.decode(bytes, w);
                    }
                });
            }
        }
    }

    /// Values that share a scale, and what offset they share; `None`: the scale is not followed.
    pub(super) fn run(self, columns: usize) -> Option<(usize, Offsets)> {
        match self {
            Fake::Rows(s, down) if s.online && down => None,
            Fake::Rows(..) => Some((columns, Offsets::None)),
            Fake::Type(ty) => Grid::of(ty).map(|g| (g.sub, g.offsets)),
        }
    }

    /// The gradient `g` at the rounded `made` becomes that at `w`, which it was made from.
    pub fn back(self, w: &[f32], made: &[f32], g: &mut [f32], columns: usize) {
        let Some((run, offset)) = self.run(columns) else { return };
        g.par_chunks_mut(run).zip(w.par_chunks(run)).zip(made.par_chunks(run)).for_each(|((g, w), made)| {
            let along: f32 = g.iter().zip(w).zip(made).map(|((g, w), made)| g * (made - w)).sum();
            let index =
                |better: fn(f32, f32) -> bool| (1..w.len()).fold(0, |b, i| if better(w[i], w[b]) { i } else { b });
            if offset != Offsets::None {
                let (low, high) = (index(|a, b| a < b), index(|a, b| a > b));
                // an integer offset is never above 0
                let free = w[low] < 0.0 || offset == Offsets::F16;
                let range = w[high] - if free { w[low] } else { 0.0 };
                if range > 0.0 {
                    g[high] += along / range;
                    g[low] -= if free { along / range } else { 0.0 };
                }
            } else {
                let largest = index(|a, b| a.abs() > b.abs());
                if w[largest] != 0.0 {
                    g[largest] += along / w[largest];
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest weight moved a little moves all of its run as the gradient says, where no code changes.
    #[test]
    fn the_scale_is_in_the_graph() {
        // codes of Q4_0: d = max / -8; values in the middle of their cells but for a tenth of a step
        let d = 0.25f32;
        let mut w: Vec<f32> = (0..32).map(|i| ((i % 15) as f32 - 7.0 + 0.1) * d).collect();
        w[3] = -8.0 * d;
        let direction: Vec<f32> = (0..32).map(|i| ((i * 13) % 7) as f32 - 3.0).collect();
        let loss = |w: &[f32]| -> f64 {
            let mut made = w.to_vec();
            Fake::Type(GgmlType::Q4_0).apply(&mut made, 32);
            made.iter().zip(&direction).map(|(m, d)| f64::from(m * d)).sum()
        };
        let mut made = w.clone();
        Fake::Type(GgmlType::Q4_0).apply(&mut made, 32);
        let mut g = direction.clone();
        Fake::Type(GgmlType::Q4_0).back(&w, &made, &mut g, 32);
        // f16 scales have eleven bits: a step of d that they hold
        let h = 1.0 / 64.0;
        let moved = |by: f32| {
            let mut w = w.clone();
            w[3] += by;
            loss(&w)
        };
        let measured = (moved(h) - moved(-h)) / f64::from(2.0 * h);
        // what all codes together do when the scale moves; straight through, W itself stays
        let straight: f64 = (0..32).filter(|i| *i != 3).map(|i| f64::from(direction[i] * w[i] / w[3])).sum();
        assert!((measured - (f64::from(g[3]) + straight)).abs() < 1e-2, "{measured} {} {straight}", g[3]);
    }

    #[test]
    fn offsets_move_both_ends() {
        let w = [0.9f32, -0.3, 0.1, 0.2];
        let made = [0.85f32, -0.25, 0.15, 0.2];
        let mut g = [1.0f32, 2.0, 3.0, 4.0];
        let w32: Vec<f32> = w.iter().copied().cycle().take(32).collect();
        let made32: Vec<f32> = made.iter().copied().cycle().take(32).collect();
        let mut g32: Vec<f32> = g.iter().copied().cycle().take(32).collect();
        Fake::Type(GgmlType::Q4_1).back(&w32, &made32, &mut g32, 32);
        let along = 8.0 * (-0.05 + 2.0 * 0.05 + 3.0 * 0.05);
        g[0] += along / 1.2;
        g[1] -= along / 1.2;
        assert!((g32[0] - g[0]).abs() < 1e-5 && (g32[1] - g[1]).abs() < 1e-5 && g32[2..4] == g[2..4]);
        assert_eq!(g32[4], 1.0);
    }
}
