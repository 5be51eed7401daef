//! What GPTQ needs of a Hessian: itself, damped, and the upper Cholesky factor of its inverse.
//!
//! Frantar et al. 2023 (GPTQ), algorithm 1. With `U` upper triangular and `UᵀU = H⁻¹`, rounding column `j` with error `e`
//! moves the later columns by `−e / U_jj · U_j,later`, and `e² / U_jj²` is what the error costs when they do. `U` comes from
//! one factorisation and one triangular inverse: with `P` the reversal of the order and `P H P = L Lᵀ`, `U = P L⁻¹ P`.

use super::RoundingError;
use crate::calibration::moments::Moments;
use crate::linalg::{self, Par};

/// A damped Hessian and its factor.
pub struct Factor {
    /// Columns.
    pub n: usize,
    /// `E[x xᵀ]`, damped, `[n, n]`.
    pub h: Vec<f32>,
    /// `[n, n]`, upper triangular.
    pub u: Vec<f32>,
    /// `1 / U_jj²`: what a square error in a column costs.
    pub costs: Vec<f32>,
    /// `E[x²]`, as an importance matrix has it.
    pub importance: Vec<f32>,
    /// Damping that was needed, as a part of the mean of the diagonal.
    pub damping: f64,
}

/// `E[x xᵀ]` in full, `[n, n]`.
pub fn mean_second(m: &Moments) -> Option<Vec<f64>> {
    let count = (m.count() > 0).then_some(m.count() as f64)?;
    let mut h = linalg::unpack(m.second()?, m.columns());
    h.iter_mut().for_each(|v| *v /= count);
    Some(h)
}

/// Mean of the diagonal.
pub fn mean_diagonal(h: &[f64], n: usize) -> f64 {
    (0..n).map(|i| h[i * n + i]).sum::<f64>() / n.max(1) as f64
}

impl Factor {
    /// Damps `h` \[n, n\] with `damping` of the mean of its diagonal, ten times more as often as it has no factor.
    pub fn new(mut h: Vec<f64>, n: usize, damping: f64, par: Par) -> Result<Factor, RoundingError> {
        let mean = mean_diagonal(&h, n);
        if !(mean.is_finite() && mean > 0.0) {
            return Err(RoundingError::Hessian(format!("the mean of its diagonal is {mean}")));
        }
        let importance: Vec<f32> = (0..n).map(|i| h[i * n + i] as f32).collect();
        let mut damping = damping;
        let mut damped = 0.0;
        loop {
            let add = damping * mean - damped;
            (0..n).for_each(|i| h[i * n + i] += add);
            damped = damping * mean;
            let mut l = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..=i {
                    l[i * n + j] = h[(n - 1 - i) * n + (n - 1 - j)];
                }
            }
            match linalg::cholesky(&mut l, n, par) {
                Ok(_) => {
                    let l = linalg::invert_lower(&l, n, par);
                    let mut u = vec![0f32; n * n];
                    for i in 0..n {
                        for j in i..n {
                            u[i * n + j] = l[(n - 1 - i) * n + (n - 1 - j)] as f32;
                        }
                    }
                    if u.iter().all(|v| v.is_finite()) {
                        let costs = (0..n).map(|j| 1.0 / (u[j * n + j] * u[j * n + j])).collect();
                        let h = h.iter().map(|v| *v as f32).collect();
                        return Ok(Factor { n, h, u, costs, importance, damping });
                    }
                }
                Err(linalg::LinalgError::NotPositiveDefinite { .. }) => {}
                Err(e) => return Err(RoundingError::Hessian(e.to_string())),
            }
            damping *= 10.0;
            if damping > 10.0 {
                return Err(RoundingError::Hessian("it has no factor even with damping".into()));
            }
        }
    }
}
