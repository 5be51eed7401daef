//! Quantization Space Utilization Rate: which share of a quantization grid the data can reach.
//!
//! From OSTQuant (arXiv 2501.13987, section 3): samples `x` of `d` values with covariance Σ fill an ellipsoid, the grid is
//! the box around it, QSUR is the quotient of the two volumes. Volumes over- and underflow, so everything is `^(1/d)`, a
//! number that does not shrink with the dimension, by way of `ln det Σ` from a Cholesky factor.
//!
//! The paper's form ([`Qsur::paper`], eq. 7) puts the corners of its cube at the ends of the longest axis of the ellipsoid.
//! That is not where the coordinates are largest, and one cube for all axes is the grid of one scale per tensor. The exact
//! forms use that the extreme on axis `j` is `√(c Σ_jj)` (Cauchy and Schwarz), drop the constant volume of the ball, and
//! differ in who shares a scale:
//!
//! | grid | utilisation |
//! |---|---|
//! | one scale for the tensor | `(det Σ)^(1/2d) / max_j √Σ_jj` |
//! | a scale for each channel | `(det Σ / Π_j Σ_jj)^(1/2d)`, the determinant of the correlations |
//! | a scale for each block of B | `(det Σ)^(1/2d) / Π_b (max_{j in b} √Σ_jj)^(B/d)` |
//!
//! By Hadamard's inequality each is at most 1. A rotation keeps `det Σ` and `tr Σ`, so by tensor it reaches at most
//! `√(GM/AM)` of the eigenvalues ([`Qsur::rotation`]), with equal diagonals. Scaling changes nothing by channel.
//!
//! **Regularisation.** With fewer samples than dimensions Σ is singular and every figure is 0. Figures are therefore those of
//! `Σ + ε (tr Σ / d) I`, noise of ε times the mean variance ([`Options::damping`]), on both sides of the quotient; by channel,
//! where figures must not depend on scale, those of `(Corr + ε I) / (1 + ε)`. It is a diagnostic: what is learned is never
//! QSUR, and it takes the data to be Gaussian.

use std::f64::consts::PI;

use super::spread::Spread;
use crate::linalg::{self, LinalgError, Par};

/// Why there are no figures.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QsurError {
    #[error("{values} values are no {what} of {d} dimensions")]
    Shape { what: &'static str, values: usize, d: usize },
    #[error("second moments are needed, these are sums by column only; collect with second moments")]
    NoSecond,
    #[error("there are no samples")]
    Empty,
    #[error("all samples are alike: the data has no volume")]
    NoSpread,
    #[error("a damping of {0} is negative or no number")]
    Damping(f64),
    #[error("blocks of 0")]
    Block,
    #[error("{0}")]
    Linalg(#[from] LinalgError),
}

/// How figures are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// ε: noise as a share of the mean variance. 1e-4 is above the rounding of f32 second moments.
    pub damping: f64,
    /// B: values that share a scale, along the input dimension. 32 for most GGUF types, 16 for some.
    pub block: usize,
    /// Whether the paper's form is computed too: it needs eigenvectors, 20 times the work.
    pub paper: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { damping: 1e-4, block: 32, paper: false }
    }
}

/// The figures of one distribution, all `^(1/d)`.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Qsur {
    /// d.
    pub dimension: usize,
    /// B of `block`.
    pub block_len: usize,
    /// Eq. 7 of the paper, with the volume of the ball; may be above what is possible, see the module.
    pub paper: Option<f64>,
    /// One scale for the tensor.
    pub tensor: f64,
    /// A scale for each channel.
    pub channel: f64,
    /// A scale for each block of `block_len` channels.
    pub block: f64,
    /// The most that a rotation can make of `tensor`.
    pub rotation: f64,
}

impl Spread {
    /// The figures. Takes memory of 2 d² values beside its own, with the paper's form 4 d².
    pub fn qsur(&self, options: &Options, par: Par) -> Result<Qsur, QsurError> {
        let (d, damping) = (self.dimension(), options.damping);
        if !(damping >= 0.0 && damping.is_finite()) {
            return Err(QsurError::Damping(damping));
        }
        if options.block == 0 {
            return Err(QsurError::Block);
        }
        if d == 0 {
            return Err(QsurError::Empty);
        }
        let trace: f64 = (0..d).map(|i| self.covariance[i * d + i]).sum();
        if trace == 0.0 {
            return Err(QsurError::NoSpread);
        }
        let mut sigma = self.covariance.clone();
        (0..d).for_each(|i| sigma[i * d + i] += damping * trace / d as f64);
        let variance: Vec<f64> = (0..d).map(|i| sigma[i * d + i]).collect();
        let paper = if options.paper { Some(longest_axis(&sigma, d, par)?) } else { None };
        // ln (det Σ)^(1/2d)
        let volume = linalg::cholesky(&mut sigma, d, par)? / (2 * d) as f64;
        drop(sigma);
        let deviation = |v: &[f64]| v.iter().copied().fold(0.0, f64::max).sqrt();
        let blocks = variance.chunks(options.block);
        let in_blocks: f64 = blocks.map(|b| b.len() as f64 / d as f64 * deviation(b).ln()).sum();
        let rms = (variance.iter().sum::<f64>() / d as f64).sqrt();
        Ok(Qsur {
            dimension: d,
            block_len: options.block,
            paper: paper.map(|edge| (ln_ball(d) + volume).exp() / edge),
            tensor: (volume - deviation(&variance).ln()).exp(),
            channel: self.correlation(damping, par)?,
            block: (volume - in_blocks).exp(),
            rotation: (volume - rms.ln()).exp(),
        })
    }

    /// `det(Corr)^(1/2d)`, damped. A channel that does not vary correlates with nothing; its variance is rounding where it
    /// is below 1e-12 of the mean variance, or below the 1e-6 of its squared mean that f32 sums resolve.
    fn correlation(&self, damping: f64, par: Par) -> Result<f64, QsurError> {
        let d = self.dimension();
        let trace: f64 = (0..d).map(|i| self.covariance[i * d + i]).sum();
        let inverse: Vec<f64> = (0..d)
            .map(|i| match self.covariance[i * d + i] {
                v if v > 1e-12 * trace / d as f64 && v > 1e-6 * self.mean[i] * self.mean[i] => v.sqrt().recip(),
                _ => 0.0,
            })
            .collect();
        let mut corr = self.covariance.clone();
        for i in 0..d {
            for j in 0..i {
                corr[i * d + j] *= inverse[i] * inverse[j] / (1.0 + damping);
            }
            corr[i * d + i] = 1.0;
        }
        Ok((linalg::cholesky(&mut corr, d, par)? / (2 * d) as f64).exp())
    }
}

/// The edge of the paper's cube, `2 √λ₁ max_j |q₁_j|` of the longest axis.
fn longest_axis(sigma: &[f64], d: usize, par: Par) -> Result<f64, QsurError> {
    let (values, vectors) = linalg::eigen(sigma, d, par)?;
    let axis = &vectors[(d - 1) * d..];
    Ok(2.0 * values[d - 1].sqrt() * axis.iter().fold(0.0, |m, q| q.abs().max(m)))
}

/// `ln` of the volume of the unit ball in `d` dimensions, to the power of `1/d`: `(d/2 ln π - ln Γ(d/2 + 1)) / d`.
fn ln_ball(d: usize) -> f64 {
    // V_d = V_{d-2} · 2π/d, V_0 = 1, V_1 = 2
    let start = if d.is_multiple_of(2) { 0.0 } else { 2f64.ln() };
    let steps = (1..=d).rev().step_by(2).filter(|&n| n >= 2);
    (start + steps.map(|n| (2.0 * PI / n as f64).ln()).sum::<f64>()) / d as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXACT: Options = Options { damping: 0.0, block: 2, paper: true };

    fn spread(covariance: &[f64]) -> Spread {
        let d = covariance.len().isqrt();
        Spread { mean: vec![0.0; d], covariance: covariance.to_vec() }
    }

    fn diagonal(values: &[f64]) -> Spread {
        let d = values.len();
        spread(&(0..d * d).map(|at| if at / d == at % d { values[at / d] } else { 0.0 }).collect::<Vec<_>>())
    }

    fn values(n: usize, seed: u64) -> Vec<f64> {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// Of random rows with scales that differ by a factor of `d`.
    fn random(d: usize, seed: u64) -> Spread {
        let mut w = values(4 * d * d, seed);
        w.iter_mut().enumerate().for_each(|(at, v)| *v *= (1 + at % d) as f64);
        Spread::of_rows(&w, d, Par::Seq).unwrap()
    }

    /// Normalised Hadamard matrix of a power of two: the sign of (i, j) is the parity of the bits they share.
    fn hadamard(d: usize) -> Vec<f64> {
        let sign = |at: usize| if ((at / d) & (at % d)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        (0..d * d).map(|at| sign(at) / (d as f64).sqrt()).collect()
    }

    /// By cofactors.
    fn determinant(a: &[f64]) -> f64 {
        let d = a.len().isqrt();
        if d == 1 {
            return a[0];
        }
        let minor = |j: usize| {
            let cells = (d..d * d).filter(|at| at % d != j);
            cells.map(|at| a[at]).collect::<Vec<_>>()
        };
        (0..d).map(|j| if j % 2 == 0 { 1.0 } else { -1.0 } * a[j] * determinant(&minor(j))).sum()
    }

    #[track_caller]
    fn near(a: f64, b: f64) {
        assert!((a / b - 1.0).abs() < 1e-10, "{a} is not {b}");
    }

    #[test]
    fn the_definitions_in_two_dimensions() {
        let q = spread(&[4.0, 2.0, 2.0, 9.0]).qsur(&EXACT, Par::Seq).unwrap();
        near(q.tensor, 32f64.powf(0.25) / 3.0);
        near(q.channel, (32f64 / 36.0).powf(0.25));
        near(q.block, q.tensor);
        near(q.rotation, 32f64.powf(0.25) / 6.5f64.sqrt());
        // λ₁ = 6.5 + √(2.5² + 2²), q₁ along (2, λ₁ - 4)
        let lambda = 6.5 + 10.25f64.sqrt();
        let largest = (lambda - 4.0) / (4.0 + (lambda - 4.0) * (lambda - 4.0)).sqrt();
        near(q.paper.unwrap(), (PI * 32f64.sqrt()).sqrt() / (2.0 * lambda.sqrt() * largest));
        let by_one = Options { block: 1, ..EXACT };
        near(spread(&[4.0, 2.0, 2.0, 9.0]).qsur(&by_one, Par::Seq).unwrap().block, q.channel);
    }

    #[test]
    fn determinants_are_those_by_cofactors() {
        for (d, seed) in [(3, 1), (5, 2), (6, 3)] {
            let s = random(d, seed);
            let q = s.qsur(&EXACT, Par::Seq).unwrap();
            let root = determinant(&s.covariance).powf(0.5 / d as f64);
            let deviation: Vec<f64> = (0..d).map(|i| s.covariance[i * d + i].sqrt()).collect();
            near(q.tensor, root / deviation.iter().copied().fold(0.0, f64::max));
            near(q.channel, root / deviation.iter().product::<f64>().powf(1.0 / d as f64));
            let blocks = deviation.chunks(2).map(|b| b.iter().copied().fold(0.0, f64::max).powi(b.len() as i32));
            near(q.block, root / blocks.product::<f64>().powf(1.0 / d as f64));
            assert!(q.tensor <= q.block && q.block <= q.channel && q.channel <= 1.0, "{q:?}");
        }
    }

    #[test]
    fn the_volume_of_the_ball() {
        for (d, volume) in [(1, 2.0), (2, PI), (3, 4.0 / 3.0 * PI), (4, PI * PI / 2.0)] {
            near((ln_ball(d) * d as f64).exp(), volume);
        }
        assert!(ln_ball(11008).is_finite());
    }

    #[test]
    fn hadamard_reaches_the_optimum_of_a_rotation() {
        let lambda = [9.0, 4.0, 1.0, 0.25, 2.0, 3.0, 0.5, 1.5];
        let before = diagonal(&lambda).qsur(&EXACT, Par::Seq).unwrap();
        let after = diagonal(&lambda).map(&hadamard(8), Par::Seq).unwrap().qsur(&EXACT, Par::Seq).unwrap();
        let (gm, am) = (lambda.iter().product::<f64>().powf(1.0 / 8.0), lambda.iter().sum::<f64>() / 8.0);
        near(before.tensor, gm.sqrt() / 3.0);
        near(before.rotation, (gm / am).sqrt());
        near(after.tensor, before.rotation);
        near(after.rotation, before.rotation);
        // equal diagonals: neither blocks nor channels have anything left to gain over the tensor
        near(after.block, after.tensor);
        near(after.channel, after.tensor);
        near(before.channel, 1.0);
        // the paper's cube shrinks by √8
        near(after.paper.unwrap() / before.paper.unwrap(), 8f64.sqrt());
    }

    #[test]
    fn the_paper_misses_the_largest_coordinates() {
        // nearly a ball: a cube around it must have the edge of its diameter, the paper's has less
        let s = diagonal(&[1.0, 0.999]).map(&hadamard(2), Par::Seq).unwrap();
        let q = s.qsur(&EXACT, Par::Seq).unwrap();
        let possible = PI.sqrt() / 2.0 * q.tensor;
        assert!(q.paper.unwrap() > 1.4 * possible, "{q:?}");
        assert!(q.paper.unwrap() > 1.0);
    }

    #[test]
    fn whitened_data_fills_the_grid() {
        let q = diagonal(&[1.0; 8]).map(&hadamard(8), Par::Seq).unwrap().qsur(&EXACT, Par::Seq).unwrap();
        for figure in [q.tensor, q.channel, q.block, q.rotation] {
            near(figure, 1.0);
        }
    }

    #[test]
    fn what_must_not_change_does_not() {
        let options = Options { damping: 1e-3, ..EXACT };
        let s = random(8, 4);
        let q = s.qsur(&options, Par::Seq).unwrap();
        let scaled = s.scale(&[1.0, 2.0, 0.1, 5.0, 1.0, 30.0, 1.0, 0.7]).unwrap().qsur(&options, Par::Seq).unwrap();
        near(scaled.channel, q.channel);
        assert!((scaled.tensor / q.tensor - 1.0).abs() > 0.1);
        let rotated = s.map(&hadamard(8), Par::Seq).unwrap().qsur(&options, Par::Seq).unwrap();
        near(rotated.rotation, q.rotation);
        assert!(rotated.tensor <= q.rotation && q.tensor <= q.rotation);
        let larger = s.scale(&[1000.0; 8]).unwrap().qsur(&options, Par::Seq).unwrap();
        for (a, b) in [(larger.tensor, q.tensor), (larger.block, q.block), (larger.paper.unwrap(), q.paper.unwrap())] {
            near(a, b);
        }
    }

    #[test]
    fn fewer_samples_than_dimensions_need_damping() {
        let s = Spread::of_rows(&values(3 * 8, 5), 8, Par::Seq).unwrap();
        let q = s.qsur(&Options::default(), Par::Seq).unwrap();
        assert!(q.tensor > 0.0 && q.tensor < 0.1, "{q:?}");
        assert!(matches!(s.qsur(&EXACT, Par::Seq), Err(QsurError::Linalg(_))));
        assert_eq!(diagonal(&[0.0; 2]).qsur(&EXACT, Par::Seq), Err(QsurError::NoSpread));
        assert!(s.qsur(&Options { block: 0, ..EXACT }, Par::Seq).is_err());
        assert!(s.qsur(&Options { damping: f64::NAN, ..EXACT }, Par::Seq).is_err());
        // dead channels, and what rounding leaves of them
        let noise = spread(&[1.0, 0.0, 0.0, 0.0, -1e-19, 5e-20, 0.0, 5e-20, 1e-20]);
        near(noise.qsur(&Options::default(), Par::Seq).unwrap().channel, 1.0);
        let far = Spread { mean: vec![0.0, 1e4], covariance: vec![1.0, 0.1, 0.1, 0.1] };
        near(far.qsur(&Options::default(), Par::Seq).unwrap().channel, 1.0);
        let q = diagonal(&[1.0, 0.0]).qsur(&Options { block: 1, ..Options::default() }, Par::Seq).unwrap();
        near(q.channel, 1.0);
        near(q.block, 1.0);
    }
}
