//! What GPTQ needs of a Hessian: itself, damped, and the upper Cholesky factor of its inverse.
//!
//! Frantar et al. 2023 (GPTQ), algorithm 1. With `U` upper triangular and `UᵀU = H⁻¹`, rounding column `j` with error `e`
//! moves the later columns by `−e / U_jj · U_j,later`, and `e² / U_jj²` is what the error costs when they do. `U` comes from
//! one factorisation and one triangular inverse: with `P` the reversal of the order and `P H P = L Lᵀ`, `U = P L⁻¹ P`.

use rayon::prelude::*;

use super::RoundingError;
use crate::calibration::moments::Moments;
use crate::linalg::{self, packed_at};

/// A damped Hessian and its factor.
pub struct Factor {
    /// Columns.
    pub n: usize,
    /// `E[x xᵀ]`, damped, `[n, n]`.
    pub h: Vec<f32>,
    /// Its diagonal.
    pub diagonal: Vec<f32>,
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

/// Mean of the diagonal of a packed lower triangle.
pub fn mean_diagonal(second: &[f64], n: usize) -> f64 {
    (0..n).map(|i| second[packed_at(i, i)]).sum::<f64>() / n.max(1) as f64
}

impl Factor {
    /// Of the packed lower triangle `second` of `count` times the Hessian; damped with `damping` of the mean of its diagonal,
    /// ten times more as often as it has no factor. Beside `second` it takes `12 n²` bytes, `8 n²` stay.
    pub fn new(second: &[f64], count: u64, n: usize, damping: f64) -> Result<Factor, RoundingError> {
        let scale = 1.0 / count as f64;
        let mean = mean_diagonal(second, n) * scale;
        if !(mean.is_finite() && mean > 0.0) {
            return Err(RoundingError::Hessian(format!("the mean of its diagonal is {mean}")));
        }
        let importance: Vec<f32> = (0..n).map(|i| (second[packed_at(i, i)] * scale) as f32).collect();
        let mut damping = damping;
        loop {
            let add = damping * mean;
            let at = |i: usize, j: usize| second[packed_at(i, j)] * scale + if i == j { add } else { 0.0 };
            let mut r = vec![0.0; n * n];
            linalg::fill(&mut r, n, |i, j| if j < i { 0.0 } else { at(n - 1 - i, n - 1 - j) });
            match linalg::factor_upper(&mut r, n) {
                Ok(()) => {
                    linalg::invert_upper(&mut r, n);
                    let mut u = vec![0f32; n * n];
                    linalg::fill(&mut u, n, |i, j| if j < i { 0.0 } else { r[(n - 1 - j) * n + n - 1 - i] as f32 });
                    drop(r);
                    if u.par_chunks(1 << 16).all(|u| u.iter().all(|v| v.is_finite())) {
                        let costs = (0..n).map(|j| 1.0 / (u[j * n + j] * u[j * n + j])).collect();
                        let mut h = vec![0f32; n * n];
                        linalg::fill(&mut h, n, |i, j| at(i.max(j), i.min(j)) as f32);
                        let diagonal = (0..n).map(|j| h[j * n + j]).collect();
                        return Ok(Factor { n, h, diagonal, u, costs, importance, damping });
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
