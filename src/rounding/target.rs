//! Target correction: what a layer should be so that its output from rounded inputs is that of the float model.
//!
//! With `x` the input in the float model and `x̂` in the rounded one, `‖W x − Ŵ x̂‖²` over the tokens is least where `Ŵ`
//! is nearest, in the norm of `Ĥ = E[x̂ x̂ᵀ]`, to `W + W E[(x − x̂) x̂ᵀ] Ĥ⁻¹` (the idea of GPTAQ, Li et al. 2025: asymmetric
//! calibration). The inverse is damped strongly: the correction must not chase the noise of the calibration text.

use faer::Par;

use super::factor::mean_diagonal;
use super::{RoundingError, dense};
use crate::linalg;

/// Damping of the inverse, as a part of the mean of the diagonal.
pub const DAMPING: f64 = 0.5;

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
    let square = |rows| dense::View { at: 0, rows, columns: n, stride: n };
    dense::add_product((&mut product, square(m)), (w, square(m)), (c, square(n)), 1.0);
    let mut x: Vec<f64> = product.into_iter().map(f64::from).collect();
    dense::solve(l, &mut x, n, par);
    w.iter().zip(x).map(|(w, x)| (f64::from(*w) + x) as f32).collect()
}
