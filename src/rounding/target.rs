//! Target correction: what a layer should be so that its output from rounded inputs is that of the float model.
//!
//! With `x` the input in the float model and `x̂` in the rounded one, `‖W x − Ŵ x̂‖²` over the tokens is least where `Ŵ`
//! is nearest, in the norm of `Ĥ = E[x̂ x̂ᵀ]`, to `W + W E[(x − x̂) x̂ᵀ] Ĥ⁻¹` (the idea of GPTAQ, Li et al. 2025: asymmetric
//! calibration). The inverse is damped strongly: the correction must not chase the noise of the calibration text. How strongly,
//! windows decide that the sums did not see.

use rayon::prelude::*;

use super::RoundingError;
use super::factor::mean_diagonal;
use crate::linalg::{self, Par, View, ViewMut, times};

/// Rows of a task.
const ROWS: usize = 64;

/// Dampings of the inverse that are tried, as parts of the mean of the diagonal. The second is taken without held-out windows.
pub const DAMPINGS: [f64; 3] = [0.1, 0.5, 2.0];

/// The Cholesky factor of `Ĥ` \[n, n\] damped by `damping`.
pub fn factor(h: &[f64], n: usize, damping: f64, par: Par) -> Result<Vec<f64>, RoundingError> {
    let mut l = h.to_vec();
    let add = damping * mean_diagonal(h, n);
    (0..n).for_each(|i| l[i * n + i] += add);
    linalg::cholesky(&mut l, n, par).map_err(|e| RoundingError::Hessian(e.to_string()))?;
    Ok(l)
}

/// `W + W C (Ĥ + damping)⁻¹`: `w` \[m, n\], `c = E[(x − x̂) x̂ᵀ]` \[n, n\], `l` of [`factor`].
pub fn corrected(w: &[f32], c: &[f32], l: &[f64], n: usize, par: Par) -> Vec<f32> {
    let m = w.len() / n;
    let mut product = vec![0f32; m * n];
    product.par_chunks_mut(ROWS * n).zip(w.par_chunks(ROWS * n)).for_each(|(product, w)| {
        let rows = w.len() / n;
        times(ViewMut::new(product, rows, n), View::new(w, rows, n), View::new(c, n, n), 1.0);
    });
    let mut x: Vec<f64> = product.into_iter().map(f64::from).collect();
    linalg::solve(l, &mut x, n, par);
    w.iter().zip(x).map(|(w, x)| (f64::from(*w) + x) as f32).collect()
}
