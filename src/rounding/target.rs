//! Target correction: what a layer should be so that its output from rounded inputs is that of the float model.
//!
//! With `x` the input in the float model and `x̂` in the rounded one, `‖W x − Ŵ x̂‖²` over the tokens is least where `Ŵ`
//! is nearest, in the norm of `Ĥ = E[x̂ x̂ᵀ]`, to `W + W E[(x − x̂) x̂ᵀ] Ĥ⁻¹` (the idea of GPTAQ, Li et al. 2025: asymmetric
//! calibration). The inverse is damped strongly: the correction must not chase the noise of the calibration text. How strongly,
//! windows decide that the sums did not see.

use rayon::prelude::*;

use super::RoundingError;
use super::factor::mean_diagonal;
use crate::linalg::{self, View, ViewMut, times};

/// Rows of a task.
const ROWS: usize = 64;
/// Rows that are in f64 at a time.
const SOLVED: usize = 1024;

/// Dampings of the inverse that are tried, as parts of the mean of the diagonal.
pub const DAMPINGS: [f64; 3] = [0.1, DAMPING, 2.0];
/// The one that is taken without held-out windows.
pub const DAMPING: f64 = 0.5;

/// The factor ([`linalg::factor_upper`]) of `Ĥ = second / count`, damped by `damping` of the mean of its diagonal.
pub fn factor(second: &[f64], count: u64, n: usize, damping: f64) -> Result<Vec<f64>, RoundingError> {
    let scale = 1.0 / count as f64;
    let add = damping * mean_diagonal(second, n) * scale;
    let mut r = vec![0.0; n * n];
    // the upper triangle, of which a row is a column of the packed lower one
    linalg::fill(&mut r, n, |i, j| match j {
        _ if j < i => 0.0,
        _ if j == i => second[linalg::packed_at(j, i)] * scale + add,
        _ => second[linalg::packed_at(j, i)] * scale,
    });
    linalg::factor_upper(&mut r, n).map_err(|e| RoundingError::Hessian(e.to_string()))?;
    Ok(r)
}

/// `W C`: `w` \[m, n\], `c = E[(x − x̂) x̂ᵀ]` \[n, n\].
pub fn moves(w: &[f32], c: &[f32], n: usize) -> Vec<f32> {
    let mut product = vec![0f32; w.len()];
    product.par_chunks_mut(ROWS * n).zip(w.par_chunks(ROWS * n)).with_max_len(1).for_each(|(product, w)| {
        let rows = w.len() / n;
        times(ViewMut::new(product, rows, n), View::new(w, rows, n), View::new(c, n, n), 1.0);
    });
    product
}

/// `W + W C (Ĥ + damping)⁻¹`: `w` and `moves = W C` \[m, n\], `r` of [`factor`].
pub fn corrected(w: &[f32], mut moves: Vec<f32>, r: &[f64], n: usize) -> Vec<f32> {
    let mut x = Vec::new();
    for (moves, w) in moves.chunks_mut(SOLVED * n).zip(w.chunks(SOLVED * n)) {
        moves.par_iter().map(|v| f64::from(*v)).collect_into_vec(&mut x);
        linalg::solve(r, &mut x, n);
        moves.par_iter_mut().zip(w.par_iter().zip(&x)).for_each(|(m, (w, x))| *m = (f64::from(*w) + x) as f32);
    }
    moves
}
