//! Mean and covariance: of activations, from the sums of a forward pass, and of weights, whose rows are the samples. Linear
//! maps of them are those of the covariance, no sample is needed again.

use super::qsur::QsurError;
use crate::calibration::moments::Moments;
use crate::linalg::{self, Par};

/// Mean and covariance of samples.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// E\[x\], d values.
    pub mean: Vec<f64>,
    /// Σ \[d, d\], symmetric.
    pub covariance: Vec<f64>,
}

impl Spread {
    /// From Σxxᵀ \[d, d\] (full), Σx and the number of samples, as a [`crate::calibration::hessian_file`] gives them.
    pub fn of_sums(second: Vec<f64>, sum: &[f64], count: u64) -> Result<Spread, QsurError> {
        let d = sum.len();
        if d.checked_mul(d) != Some(second.len()) {
            return Err(QsurError::Shape { what: "second moment", values: second.len(), d });
        }
        if count == 0 || d == 0 {
            return Err(QsurError::Empty);
        }
        let mean: Vec<f64> = sum.iter().map(|s| s / count as f64).collect();
        let mut covariance = second;
        for i in 0..d {
            for j in 0..d {
                let v = &mut covariance[i * d + j];
                *v = *v / count as f64 - mean[i] * mean[j];
            }
            // a channel that hardly varies about a large mean may round below 0
            covariance[i * d + i] = covariance[i * d + i].max(0.0);
        }
        Ok(Spread { mean, covariance })
    }

    /// Of activations, from the sums of a forward pass.
    pub fn of_moments(m: &Moments) -> Result<Spread, QsurError> {
        let (packed, d) = (m.second().ok_or(QsurError::NoSecond)?, m.columns());
        let mut full = vec![0.0; d * d];
        for i in 0..d {
            full[i * d..][..=i].copy_from_slice(&packed[i * (i + 1) / 2..][..=i]);
        }
        linalg::mirror(&mut full, d);
        Spread::of_sums(full, m.sum(), m.count())
    }

    /// Of a weight, whose rows are the samples: `w` row-major \[rows, d\].
    pub fn of_rows(w: &[f64], d: usize, par: Par) -> Result<Spread, QsurError> {
        if d == 0 || !w.len().is_multiple_of(d) {
            return Err(QsurError::Shape { what: "rows", values: w.len(), d });
        }
        let rows = w.len() / d;
        let mut sum = vec![0.0; d];
        for row in w.chunks_exact(d) {
            sum.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        let mut second = vec![0.0; d * d];
        linalg::syrk_f64(&mut second, w, rows, d, par);
        linalg::mirror(&mut second, d);
        Spread::of_sums(second, &sum, rows as u64)
    }

    /// Number of dimensions.
    pub fn dimension(&self) -> usize {
        self.mean.len()
    }

    /// With the second moment about zero instead of the covariance: for grids that have no offset, where a mean costs range.
    pub fn about_zero(mut self) -> Spread {
        let d = self.dimension();
        for i in 0..d {
            for j in 0..d {
                self.covariance[i * d + j] += self.mean[i] * self.mean[j];
            }
        }
        self.mean.fill(0.0);
        self
    }

    /// After the linear map `x → xA`: mean `μA`, covariance `AᵀΣA`. `a` is \[d, d\], row-major.
    ///
    /// A pair that leaves a layer's output alone maps activations by `A` and the rows of the weight by `A⁻ᵀ` (the same
    /// matrix for a rotation).
    pub fn map(&self, a: &[f64], par: Par) -> Result<Spread, QsurError> {
        let d = self.dimension();
        if d * d != a.len() {
            return Err(QsurError::Shape { what: "map", values: a.len(), d });
        }
        let t: Vec<f64> = (0..d * d).map(|at| a[at % d * d + at / d]).collect();
        let (mut left, mut covariance) = (vec![0.0; d * d], vec![0.0; d * d]);
        linalg::gemm_f64(&mut left, &t, &self.covariance, (d, d, d), par);
        linalg::gemm_f64(&mut covariance, &left, &t, (d, d, d), par);
        linalg::mirror(&mut covariance, d);
        let mean = t.chunks_exact(d).map(|row| row.iter().zip(&self.mean).map(|(a, m)| a * m).sum()).collect();
        Ok(Spread { mean, covariance })
    }

    /// After `x_j → x_j s_j`: [`Spread::map`] of a diagonal.
    pub fn scale(&self, s: &[f64]) -> Result<Spread, QsurError> {
        let d = self.dimension();
        if s.len() != d {
            return Err(QsurError::Shape { what: "scale", values: s.len(), d });
        }
        let covariance = (0..d * d).map(|at| self.covariance[at] * s[at / d] * s[at % d]).collect();
        Ok(Spread { mean: self.mean.iter().zip(s).map(|(m, s)| m * s).collect(), covariance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_give_mean_and_covariance() {
        let rows = [[1.0, 10.0], [3.0, 10.0], [2.0, 13.0]];
        let x: Vec<f32> = rows.iter().flatten().map(|&v| v as f32).collect();
        let mut m = Moments::new(2, true).unwrap();
        m.add(&x, 3).unwrap();
        let s = Spread::of_moments(&m).unwrap();
        let same = Spread::of_rows(&rows.concat(), 2, Par::Seq).unwrap();
        for (a, b) in s.covariance.iter().zip([2.0 / 3.0, 0.0, 0.0, 2.0]).chain(s.mean.iter().zip([2.0, 11.0])) {
            assert!((a - b).abs() < 1e-12, "{s:?}");
        }
        assert_eq!(s, same);
        assert!((s.about_zero().covariance[3] - 123.0).abs() < 1e-12);
        assert_eq!(Spread::of_moments(&Moments::new(2, false).unwrap()), Err(QsurError::NoSecond));
        assert_eq!(Spread::of_moments(&Moments::new(2, true).unwrap()), Err(QsurError::Empty));
    }

    #[test]
    fn a_diagonal_map_is_a_scale() {
        let rows: Vec<f64> = (0..40).map(|i| f64::from(i * i % 17) - f64::from(i % 5)).collect();
        let s = Spread::of_rows(&rows, 4, Par::Seq).unwrap();
        let scales = [3.0, 1.0, -0.5, 7.0];
        let matrix: Vec<f64> = (0..16).map(|at| if at / 4 == at % 4 { scales[at / 4] } else { 0.0 }).collect();
        let (a, b) = (s.map(&matrix, Par::Seq).unwrap(), s.scale(&scales).unwrap());
        for (a, b) in a.covariance.iter().zip(&b.covariance).chain(a.mean.iter().zip(&b.mean)) {
            assert!((a - b).abs() < 1e-9);
        }
        // a map of the rows and then their covariance: x (1, 2; 0, 1) adds twice the first column to the second
        let s = Spread::of_rows(&[1.0, 5.0, 4.0, 2.0, 0.0, 1.0], 2, Par::Seq).unwrap();
        let mapped = Spread::of_rows(&[1.0, 7.0, 4.0, 10.0, 0.0, 1.0], 2, Par::Seq).unwrap();
        let again = s.map(&[1.0, 2.0, 0.0, 1.0], Par::Seq).unwrap();
        for (a, b) in again.covariance.iter().zip(&mapped.covariance).chain(again.mean.iter().zip(&mapped.mean)) {
            assert!((a - b).abs() < 1e-12, "{again:?} is not {mapped:?}");
        }
        assert!(s.map(&[1.0], Par::Seq).unwrap_err().to_string().contains("1 values are no map of 2 dimensions"));
        assert!(s.scale(&[1.0]).is_err() && Spread::of_rows(&[1.0; 3], 2, Par::Seq).is_err());
    }
}
