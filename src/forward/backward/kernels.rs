//! Steps that work element by element or row by row.
//!
//! Of a backward step each takes what the forward step was given and the gradient of the loss with respect to its output, and gives the
//! gradient with respect to its input. Derivatives are written out beside each function; `mod tests` holds them against
//! finite differences.

use rayon::prelude::*;

use crate::forward::kernels::{self, exp, tanh};
use crate::forward::spec::Activation;

/// Columns that one task sums, and values of a row that one task adds.
const COLUMNS: usize = 64;
/// Values that one task of an element-wise step works on.
const PIECE: usize = 1 << 14;

/// RMSNorm of one row, `y = x · r · w` with `r = 1 / sqrt(mean(x²) + eps)`: `dx = r · w · dy - x · r³ / n · Σ x w dy`.
pub fn rms_norm_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut [f32]) {
    let (mut squares, mut dot) = (0.0f64, 0.0f64);
    for ((x, w), d) in x.iter().zip(weight).zip(dy) {
        squares += f64::from(*x) * f64::from(*x);
        dot += f64::from(x * w) * f64::from(*d);
    }
    let n = x.len() as f64;
    let r = 1.0 / (squares / n + f64::from(eps)).sqrt();
    let (scale, along) = (r as f32, (r * r * r / n * dot) as f32);
    for (((o, x), w), d) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
        *o = scale * w * d - x * along;
    }
}

/// [`rms_norm_back`] of every run of `weight.len()` values of `x` and `dy`.
pub fn rms_norm_rows_back(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut Vec<f32>) {
    dx.resize(x.len(), 0.0);
    let n = weight.len();
    dx.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).zip(dy.par_chunks(n * 16)).for_each(|((dx, x), dy)| {
        for ((dx, x), dy) in dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(dy.chunks_exact(n)) {
            rms_norm_back(x, weight, eps, dy, dx);
        }
    });
}

/// `act(gate) * up`, whose output has the gradient `d`: overwrites `gate` and `up` with their gradients.
pub fn activate_back(activation: Activation, gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(d.par_chunks(PIECE));
    pieces.for_each(|((gate, up), d)| match activation {
        Activation::Silu => gated_back(gate, up, d, silu_and_slope),
        Activation::Gelu => gated_back(gate, up, d, gelu_and_slope),
    });
}

#[inline(always)]
fn gated_back(gate: &mut [f32], up: &mut [f32], d: &[f32], of: impl Fn(f32) -> (f32, f32)) {
    for ((g, u), d) in gate.iter_mut().zip(up).zip(d) {
        let (value, slope) = of(*g);
        (*g, *u) = (d * *u * slope, d * value);
    }
}

/// x σ(x), and σ(x) (1 + x (1 - σ(x))).
#[inline(always)]
fn silu_and_slope(x: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp(-x));
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// The tanh form: with `t = tanh(c x (1 + a x²))`, x (1 + t) / 2 and (1 + t) / 2 + x (1 - t²) c (1 + 3 a x²) / 2.
#[inline(always)]
fn gelu_and_slope(x: f32) -> (f32, f32) {
    const C: f32 = 0.797_884_6;
    const A: f32 = 0.044_715;
    let t = tanh(C * x * (1.0 + A * x * x));
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * C * (1.0 + 3.0 * A * x * x))
}

/// Softmax of a row: `d` is the gradient of the probabilities `p` and becomes that of their logits, `p (d - Σ p d)`.
pub fn softmax_back(p: &[f32], d: &mut [f32]) {
    let dot: f64 = p.iter().zip(&*d).map(|(p, d)| f64::from(*p) * f64::from(*d)).sum();
    for (d, p) in d.iter_mut().zip(p) {
        *d = p * (*d - dot as f32);
    }
}

/// Soft-capping: `capped = cap · tanh(x / cap)`; `d` becomes `d (1 - (capped / cap)²)`.
pub fn soft_cap_back(capped: &[f32], cap: f32, d: &mut [f32]) {
    for (d, c) in d.iter_mut().zip(capped) {
        let t = c / cap;
        *d *= 1.0 - t * t;
    }
}

/// `x += y`, by all threads.
pub fn add_all(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(PIECE).zip(y.par_chunks(PIECE)).for_each(|(x, y)| crate::forward::kernels::add(x, y));
}

/// Adds the squares of every column of `g`, `[tokens, sums.len()]`, to `sums`: token after token, so that batches and
/// threads change nothing.
pub fn add_squares(sums: &mut [f64], g: &[f32]) {
    let n = sums.len();
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
        for row in g.chunks_exact(n) {
            for (s, v) in sums.iter_mut().zip(&row[i * COLUMNS..]) {
                *s += f64::from(*v) * f64::from(*v);
            }
        }
    });
}

/// RMSNorm of every run of `weight.len()` values.
pub fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let n = weight.len();
    out.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).for_each(|(out, x)| {
        for (o, x) in out.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            kernels::rms_norm(x, weight, eps, o);
        }
    });
}

/// The gated activation: `gate` becomes the input of the down matrix.
pub fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE)).for_each(|(g, u)| match activation {
        Activation::Silu => kernels::silu_mul(g, u),
        Activation::Gelu => kernels::gelu_mul(g, u),
    });
}

/// `x` in `out`, by all threads.
pub fn copy(x: &[f32], out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    out.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(out, x)| out.copy_from_slice(x));
}

/// `d · factor` in `out`.
pub fn scaled_to(d: &[f32], factor: f32, out: &mut Vec<f32>) {
    copy(d, out);
    if factor != 1.0 {
        out.par_chunks_mut(PIECE).for_each(|x| kernels::scale(x, factor));
    }
}

/// The same, without a copy where there is nothing to scale.
pub fn scaled<'a>(d: &'a [f32], factor: f32, out: &'a mut Vec<f32>) -> &'a [f32] {
    if factor == 1.0 {
        return d;
    }
    scaled_to(d, factor, out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::kernels;

    fn wave(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i + seed) * 7919 % 1013) as f32 / 506.5 - 1.0).collect()
    }

    /// The gradient `got` of `loss` at `x` against central differences in f64 of an f32 step.
    fn check(x: &[f32], got: &[f32], loss: impl Fn(&[f32]) -> f64) {
        let largest = got.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        for (i, got) in got.iter().enumerate() {
            let at = |by: f32| {
                let mut x = x.to_vec();
                x[i] += by;
                loss(&x)
            };
            let h = 1.0 / 256.0;
            // fourth order
            let slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
            assert!((slope - f64::from(*got)).abs() < 1e-3 * f64::from(largest), "{i}: {slope} {got}");
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    #[test]
    fn norms_agree_with_finite_differences() {
        for n in [5, 16, 33] {
            let (x, w, dy) = (wave(n, 3), wave(n, 50), wave(n, 91));
            let mut dx = vec![0.0; n];
            rms_norm_back(&x, &w, 1e-2, &dy, &mut dx);
            check(&x, &dx, |x| {
                let mut y = vec![0.0; n];
                kernels::rms_norm(x, &w, 1e-2, &mut y);
                dot(&y, &dy)
            });
        }
    }

    #[test]
    fn gates_agree_with_finite_differences() {
        for (kind, run) in [
            (Activation::Silu, kernels::silu_mul as fn(&mut [f32], &[f32])),
            (Activation::Gelu, kernels::gelu_mul as fn(&mut [f32], &[f32])),
        ] {
            let n = 40;
            let gate: Vec<f32> = wave(n, 7).iter().map(|v| v * 3.0).collect();
            let (up, d) = (wave(n, 300), wave(n, 400));
            let (mut dg, mut du) = (gate.clone(), up.clone());
            activate_back(kind, &mut dg, &mut du, &d);
            let loss = |g: &[f32], u: &[f32]| {
                let mut y = g.to_vec();
                run(&mut y, u);
                dot(&y, &d)
            };
            check(&gate, &dg, |g| loss(g, &up));
            check(&up, &du, |u| loss(&gate, u));
        }
    }

    #[test]
    fn softmax_and_caps_agree_with_finite_differences() {
        let (n, cap) = (19, 1.5);
        let (x, dy) = (wave(n, 11), wave(n, 23));
        let (mut p, mut d) = (x.clone(), dy.clone());
        kernels::soft_cap(&mut p, cap);
        let capped = p.clone();
        kernels::softmax(&mut p);
        softmax_back(&p, &mut d);
        soft_cap_back(&capped, cap, &mut d);
        check(&x, &d, |x| {
            let mut p = x.to_vec();
            kernels::soft_cap(&mut p, cap);
            kernels::softmax(&mut p);
            dot(&p, &dy)
        });
    }

    #[test]
    fn squares_are_exact() {
        for (rows, columns) in [(1, 1), (33, 70), (100, 3), (64, 129)] {
            let w = wave(rows * columns, 1);
            let mut sums = vec![0.0; columns];
            add_squares(&mut sums, &w);
            for c in 0..columns {
                let column: Vec<f32> = (0..rows).map(|r| w[r * columns + c]).collect();
                assert_eq!(sums[c], dot(&column, &column));
            }
        }
    }
}
