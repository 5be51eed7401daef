//! The inputs of the linears that share one: sums of both paths, and some windows that the sums do not see.

use rayon::prelude::*;

use super::{Factor, RoundingError, target};
use crate::calibration::moments::{self, MomentsError};
use crate::forward::gemm::product;
use crate::linalg;

/// One window of this many is held out.
const HELD_OUT_EVERY: usize = 16;
/// Most tokens that are held out.
const HELD_OUT_MOST: usize = 4096;
/// Rows of a weight that choose the damping of its correction.
const CHOICE_ROWS: usize = 256;
/// Tokens that are summed in one go: a fixed number, so that the sums do not depend on how many windows are in memory.
const RUN: usize = 1024;
/// An input of so many columns or more is wide: its sums cost more than what makes it, and where there are [`ENOUGH`] tokens for
/// each column every second one does (neighbours are alike).
const WIDE: usize = 1024;
const ENOUGH: usize = 40;
/// Outputs whose errors are in memory at a time.
const OUTPUTS: usize = 2048;

/// Whether window `w` of `windows` is held out of the sums.
pub fn is_held_out(w: usize, windows: usize, length: usize) -> bool {
    let every = HELD_OUT_EVERY.max((windows * length).div_ceil(HELD_OUT_MOST));
    windows >= HELD_OUT_EVERY && w % every == every / 2
}

/// Bytes that the sums and the factors of `n` inputs take at most: the packed sums in f64, `Σ (x − x̂) x̂ᵀ` in f32 until targets
/// are corrected, one triangular factor in f64, and what GPTQ needs in f32 ([`super::Factor`]).
pub fn memory(n: u64, two_paths: bool) -> u64 {
    let summing = if two_paths { 4 * n * n + 2 * RUN as u64 * n * 4 } else { RUN as u64 * n * 4 };
    4 * n * n + summing.max(12 * n * n) + 2 * HELD_OUT_MOST as u64 * n * 4
}

/// Sums over the input of a site.
pub struct Site {
    n: usize,
    /// Σ x̂ x̂ᵀ, the packed lower triangle.
    second: Vec<f64>,
    /// Σ (x − x̂) x̂ᵀ; none in one pass.
    cross: Option<Vec<f32>>,
    /// Tokens that are summed or in the run.
    count: u64,
    /// One token of so many is summed.
    every: usize,
    /// Tokens until the next that is.
    skip: usize,
    /// `x̂` of tokens that are not summed yet, and `x − x̂`; [`RUN`] rows.
    run: [Vec<f32>; 2],
    /// Rows of it that are filled.
    filled: usize,
    /// Held-out inputs in the float model.
    float: Vec<f32>,
    /// And in the rounded one; empty in one pass.
    rounded: Vec<f32>,
}

impl Site {
    /// `n` inputs; `two_paths`: of the float and of the rounded model; about `tokens` tokens will come.
    pub fn new(n: usize, two_paths: bool, tokens: usize) -> Result<Site, MomentsError> {
        let packed = linalg::packed_len(n).ok_or(MomentsError::Memory { columns: n })?;
        Ok(Site {
            n,
            second: vec![0.0; packed],
            cross: two_paths.then(|| vec![0f32; n * n]),
            count: 0,
            every: if n >= WIDE && tokens / 2 >= ENOUGH * n { 2 } else { 1 },
            skip: 0,
            run: [vec![0.0; RUN * n], vec![0.0; if two_paths { RUN * n } else { 0 }]],
            filled: 0,
            float: Vec::new(),
            rounded: Vec::new(),
        })
    }

    /// Adds one window of `x` and, on two paths, `x̂`; without its first token, which has no context (it is BOS, whose
    /// activations are like no others).
    pub fn add(&mut self, x: &[f32], rounded: Option<&[f32]>, held_out: bool) -> Result<(), MomentsError> {
        let n = self.n;
        self.add_rows(&x[n..], rounded.map(|r| &r[n..]), held_out)
    }

    /// Adds rows of `x` and, on two paths, of `x̂`.
    pub fn add_rows(&mut self, mut x: &[f32], mut rounded: Option<&[f32]>, held_out: bool) -> Result<(), MomentsError> {
        let n = self.n;
        moments::check(x, n, true)?;
        rounded.map_or(Ok(()), |r| moments::check(r, n, true))?;
        if held_out {
            self.float.extend_from_slice(x);
            self.rounded.extend_from_slice(rounded.unwrap_or_default());
            return Ok(());
        }
        let (every, tokens) = (self.every, x.len() / n);
        let first = self.skip.min(tokens);
        (x, rounded) = (&x[first * n..], rounded.map(|r| &r[first * n..]));
        let summed = (tokens - first).div_ceil(every);
        self.skip = self.skip + summed * every - tokens;
        while !x.is_empty() {
            let rows = (x.len() / n).div_ceil(every).min(RUN - self.filled);
            let [run, difference] = &mut self.run;
            let place = self.filled * n..(self.filled + rows) * n;
            // a task: so many rows, and what lies between them
            let (into, from) = (16 * n, 16 * n * every);
            let (now, later) = x.split_at((rows * every * n).min(x.len()));
            x = later;
            match &mut rounded {
                None => run[place].par_chunks_mut(into).zip(now.par_chunks(from)).for_each(|(o, x)| {
                    o.chunks_exact_mut(n).zip(x.chunks(n * every)).for_each(|(o, x)| o.copy_from_slice(&x[..n]));
                }),
                Some(r) => {
                    let (r, later) = r.split_at(now.len());
                    rounded = Some(later);
                    let tasks = run[place.clone()].par_chunks_mut(into).zip(difference[place].par_chunks_mut(into));
                    tasks.zip(now.par_chunks(from).zip(r.par_chunks(from))).for_each(|((o, d), (x, r))| {
                        let rows = x.chunks(n * every).zip(r.chunks(n * every));
                        for ((o, d), (x, r)) in o.chunks_exact_mut(n).zip(d.chunks_exact_mut(n)).zip(rows) {
                            o.copy_from_slice(&r[..n]);
                            d.iter_mut().zip(x.iter().zip(r)).for_each(|(d, (x, r))| *d = x - r);
                        }
                    });
                }
            }
            self.filled += rows;
            self.count += rows as u64;
            if self.filled == RUN {
                self.flush();
            }
        }
        Ok(())
    }

    /// Sums the run.
    fn flush(&mut self) {
        let (rows, n) = (std::mem::take(&mut self.filled), self.n);
        let [run, difference] = &self.run;
        let cross = self.cross.as_mut().map(|c| (&mut c[..], &difference[..rows * n]));
        linalg::add_sums(&mut self.second, cross, &run[..rows * n], rows, n);
    }

    /// No more windows will come: sums what is left, and frees the run.
    pub fn close(&mut self) -> Result<(), RoundingError> {
        self.flush();
        self.run = [Vec::new(), Vec::new()];
        match self.count {
            0 => Err(RoundingError::Hessian("it saw no token".into())),
            _ => Ok(()),
        }
    }

    /// Tokens in the sums.
    pub fn tokens(&self) -> u64 {
        self.count
    }

    /// The factor of the mean second moment, whose sums are given up.
    pub fn factor(&mut self, damping: f64) -> Result<Factor, RoundingError> {
        Factor::new(&std::mem::take(&mut self.second), self.count, self.n, damping)
    }

    /// The targets of weights \[m, n\] ([`target`]), none in one pass. Of the dampings that are tried each takes the one with
    /// which the outputs of some of its rows, from the rounded inputs, are nearest to the float ones on the held-out windows.
    pub fn targets(&mut self, weights: &[&[f32]]) -> Result<Option<Vec<Vec<f32>>>, RoundingError> {
        let Some(mut cross) = self.cross.take() else { return Ok(None) };
        let (n, count) = (self.n, self.count);
        cross.par_iter_mut().for_each(|v| *v /= count as f32);
        let moves: Vec<Vec<f32>> = weights.iter().map(|w| target::moves(w, &cross, n)).collect();
        drop(cross);
        let mut best = vec![(f64::INFINITY, target::DAMPING); weights.len()];
        if !self.float.is_empty() {
            for damping in target::DAMPINGS {
                let factor = target::factor(&self.second, count, n, damping)?;
                for ((w, moves), best) in weights.iter().zip(&moves).zip(&mut best) {
                    let (w, moves) = (sample(w, n), sample(moves, n));
                    let error = self.error(&w, &target::corrected(&w, moves, &factor, n));
                    if error < best.0 {
                        *best = (error, damping);
                    }
                }
            }
        }
        let mut targets: Vec<Vec<f32>> = moves;
        for damping in target::DAMPINGS {
            if best.iter().all(|b| b.1 != damping) {
                continue;
            }
            let factor = target::factor(&self.second, count, n, damping)?;
            for (i, w) in weights.iter().enumerate().filter(|(i, _)| best[*i].1 == damping) {
                targets[i] = target::corrected(w, std::mem::take(&mut targets[i]), &factor, n);
            }
        }
        Ok(Some(targets))
    }

    /// Whether there are held-out windows.
    pub fn holds_out(&self) -> bool {
        !self.float.is_empty()
    }

    /// Square error of the outputs of `values` from the rounded inputs, against those of `weight` from the float ones, on the
    /// held-out windows.
    pub fn error(&self, weight: &[f32], values: &[f32]) -> f64 {
        self.errors(weight, [values])[0]
    }

    /// The same for several.
    pub fn errors<const N: usize>(&self, weight: &[f32], values: [&[f32]; N]) -> [f64; N] {
        let n = self.n;
        let rounded = if self.rounded.is_empty() { &self.float } else { &self.rounded };
        let (mut want, mut got) = (Vec::new(), Vec::new());
        let mut sums = [0f64; N];
        for (i, w) in weight.chunks(OUTPUTS * n).enumerate() {
            let size = self.float.len() / n * (w.len() / n);
            want.resize(size, 0.0);
            got.resize(size, 0.0);
            product(&self.float, w, n, &mut want);
            for (sum, values) in sums.iter_mut().zip(values) {
                product(rounded, &values[i * OUTPUTS * n..][..w.len()], n, &mut got);
                // pieces of a fixed size, added in order
                let piece =
                    |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                let parts: Vec<f64> = want.par_chunks(1 << 14).zip(got.par_chunks(1 << 14)).map(piece).collect();
                *sum += parts.iter().sum::<f64>();
            }
        }
        sums
    }
}

/// At most [`CHOICE_ROWS`] rows of a matrix, spread over it.
fn sample(w: &[f32], n: usize) -> Vec<f32> {
    let rows = w.len() / n;
    let some = rows.min(CHOICE_ROWS);
    (0..some).flat_map(|i| &w[i * rows / some * n..][..n]).copied().collect()
}
