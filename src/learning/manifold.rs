//! Steps of Adam on orthogonal matrices, and on scales.
//!
//! A rotation moves as `R ← C R` with `C = (I + B)⁻¹ (I − B)`, the Cayley map of a skew `B`: orthogonal whatever `B` is. `B` is
//! half a step of Adam on the skew part of `G Rᵀ` (G the gradient by R), the gradient in the frame that moves with R (Li,
//! Li and Todorovic 2020, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform"; Adam's moments
//! stay in that frame, so that none has to be carried over). The inverse is exact: `(I + B)⁻¹ = (I − B²)⁻¹ (I − B)`, and
//! `I − B²` is symmetric and positive definite. Scales move by their logarithms.

use super::LearningError;
use crate::linalg;

/// Rates of one step of Adam, and what it knows of its number.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// The step, from 1 on.
    pub step: usize,
    /// Of rotations: about the angle by which an element moves.
    pub rotation: f64,
    /// Of the logarithms of scales.
    pub scale: f64,
}

const BETA: (f64, f64) = (0.9, 0.999);
/// Gradients of single elements are as small as 1e-7.
const EPSILON: f64 = 1e-14;

impl Rates {
    /// The direction for gradient `g`, of about size 1.
    fn direction(&self, g: f64, m: &mut f64, v: &mut f64) -> f64 {
        *m = BETA.0 * *m + (1.0 - BETA.0) * g;
        *v = BETA.1 * *v + (1.0 - BETA.1) * g * g;
        let left = |beta: f64| 1.0 - beta.powi(self.step as i32);
        (*m / left(BETA.0)) / ((*v / left(BETA.1)).sqrt() + EPSILON)
    }
}

/// An orthogonal matrix `[n, n]` that learns.
#[derive(Clone, Debug)]
pub struct Rotation {
    pub n: usize,
    pub values: Vec<f64>,
    /// The same for products.
    pub single: Vec<f32>,
    /// Summed over a step: by the elements.
    pub gradient: Vec<f32>,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl Rotation {
    pub fn new(values: Vec<f64>, n: usize) -> Rotation {
        let single = values.iter().map(|v| *v as f32).collect();
        let zeros = || vec![0.0; n * n];
        Rotation { n, values, single, gradient: vec![0.0; n * n], m: zeros(), v: zeros() }
    }

    /// Moves against the gradient, which is 0 then.
    pub fn step(&mut self, rates: &Rates) -> Result<(), LearningError> {
        let n = self.n;
        let g: Vec<f64> = self.gradient.iter().map(|v| f64::from(*v)).collect();
        self.gradient.fill(0.0);
        let mut b = vec![0.0; n * n];
        linalg::gemm_f64(&mut b, &g, &self.values, (n, n, n), linalg::all_threads());
        for i in 0..n {
            b[i * n + i] = 0.0;
            for j in 0..i {
                let skew = 0.5 * (b[i * n + j] - b[j * n + i]);
                let at = i * n + j;
                let half = 0.5 * rates.rotation * rates.direction(skew, &mut self.m[at], &mut self.v[at]);
                (b[at], b[j * n + i]) = (half, -half);
            }
        }
        cayley(&mut self.values, &b, n)?;
        self.single.iter_mut().zip(&self.values).for_each(|(s, v)| *s = *v as f32);
        Ok(())
    }

    /// What a run must keep to go on.
    pub fn state(&mut self) -> [&mut Vec<f64>; 3] {
        [&mut self.values, &mut self.m, &mut self.v]
    }

    /// Takes up values that were written to [`Rotation::state`].
    pub fn refresh(&mut self) {
        self.single.iter_mut().zip(&self.values).for_each(|(s, v)| *s = *v as f32);
    }
}

/// `R ← (I + B)⁻¹ (I − B) R` for a skew `b`.
fn cayley(r: &mut Vec<f64>, b: &[f64], n: usize) -> Result<(), LearningError> {
    let transposed = |x: &[f64]| -> Vec<f64> { (0..n * n).map(|at| x[at % n * n + at / n]).collect() };
    let par = linalg::all_threads();
    // I - B² = I + B Bᵀ
    let mut square = vec![0.0; n * n];
    linalg::gemm_f64(&mut square, b, b, (n, n, n), par);
    (0..n).for_each(|i| square[i * n + i] += 1.0);
    linalg::factor_upper(&mut square, n).map_err(|e| LearningError::Rotation(e.to_string()))?;
    // by rows: Rᵀ (I + B)² (I - B²)⁻¹, where X B = -X Bᵀ
    let mut x = transposed(r);
    let mut product = vec![0.0; n * n];
    for _ in 0..2 {
        linalg::gemm_f64(&mut product, &x, b, (n, n, n), par);
        x.iter_mut().zip(&product).for_each(|(x, p)| *x -= p);
    }
    linalg::solve(&square, &mut x, n);
    *r = transposed(&x);
    Ok(())
}

/// Positive scales that learn.
#[derive(Clone, Debug)]
pub struct Scales {
    pub log: Vec<f64>,
    /// The scales.
    pub single: Vec<f32>,
    /// Summed over a step: by the logarithms.
    pub gradient: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
}

impl Scales {
    pub fn new(values: &[f64]) -> Scales {
        let log: Vec<f64> = values.iter().map(|v| v.ln()).collect();
        let zeros = || vec![0.0; log.len()];
        let (gradient, m, v) = (zeros(), zeros(), zeros());
        Scales { single: values.iter().map(|v| *v as f32).collect(), log, gradient, m, v }
    }

    pub fn step(&mut self, rates: &Rates) {
        for (((log, g), m), v) in self.log.iter_mut().zip(&mut self.gradient).zip(&mut self.m).zip(&mut self.v) {
            *log -= rates.scale * rates.direction(std::mem::take(g), m, v);
        }
        self.refresh();
    }

    pub fn values(&self) -> Vec<f64> {
        self.log.iter().map(|l| l.exp()).collect()
    }

    pub fn state(&mut self) -> [&mut Vec<f64>; 3] {
        [&mut self.log, &mut self.m, &mut self.v]
    }

    pub fn refresh(&mut self) {
        self.single.iter_mut().zip(&self.log).for_each(|(s, l)| *s = l.exp() as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::hadamard;
    use crate::linalg::random::Random;
    use crate::transform::set::off_orthogonal;

    #[test]
    fn a_cayley_step_solves_its_equation() {
        let n = 7;
        let mut random = Random::new(4);
        let mut b = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..i {
                b[i * n + j] = random.uniform() - 0.5;
                b[j * n + i] = -b[i * n + j];
            }
        }
        let old = hadamard::rotation(n, &mut random);
        let mut new = old.clone();
        cayley(&mut new, &b, n).unwrap();
        // (I + B) R' = (I - B) R
        for (i, j) in (0..n * n).map(|at| (at / n, at % n)) {
            let times = |r: &[f64]| (0..n).map(|k| b[i * n + k] * r[k * n + j]).sum::<f64>();
            let (left, right) = (new[i * n + j] + times(&new), old[i * n + j] - times(&old));
            assert!((left - right).abs() < 1e-12, "{i} {j}: {left} {right}");
        }
        assert!(off_orthogonal(&new, n) < 1e-12);
    }

    /// The nearest rotation to a matrix is found (orthogonal Procrustes), and stays orthogonal over many steps.
    #[test]
    fn rotations_go_downhill_and_stay_orthogonal() {
        let n = 12;
        let mut random = Random::new(9);
        let wanted = hadamard::rotation(n, &mut random);
        let mut r = Rotation::new(hadamard::rotation(n, &mut random), n);
        let distance = |r: &[f64]| r.iter().zip(&wanted).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        let before = distance(&r.values);
        for step in 1..=500 {
            r.gradient.iter_mut().zip(&r.values).zip(&wanted).for_each(|((g, a), b)| *g = (2.0 * (a - b)) as f32);
            let rotation = 0.03 * (1.0 - (step as f64 - 1.0) / 500.0);
            r.step(&Rates { step, rotation, scale: 0.0 }).unwrap();
        }
        assert!(off_orthogonal(&r.values, n) < 1e-11, "{}", off_orthogonal(&r.values, n));
        let after = distance(&r.values);
        // two components of the orthogonal group: where the determinants differ, one direction is left over (distance 4)
        let left = if after > 3.0 { 4.0 } else { 0.0 };
        assert!(before > 10.0 && (after - left).abs() < 0.05, "{before} {after}");
    }

    #[test]
    fn scales_stay_positive_and_go_downhill() {
        let mut s = Scales::new(&[1.0, 1.0, 1.0]);
        let wanted = [0.25f64, 1.0, 4.0];
        for step in 1..=400 {
            s.gradient.iter_mut().zip(&s.log).zip(&wanted).for_each(|((g, l), w)| *g = 2.0 * (l - w.ln()));
            s.step(&Rates { step, rotation: 0.0, scale: 0.03 * (1.0 - (step as f64 - 1.0) / 400.0) });
        }
        for (s, w) in s.values().iter().zip(&wanted) {
            assert!((s / w - 1.0).abs() < 0.02, "{s} {w}");
        }
    }
}
