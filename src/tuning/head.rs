//! The loss: Kullback-Leibler divergence of the rounded model's predictions from the float model's, and its gradient. Where
//! transforms are learned, other losses too.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::blocks::{Adam, Parameters};
use crate::forward::backward::kernels::{rms_norm_back, soft_cap_back};
use crate::forward::kernels::{self, vectorized};
use crate::forward::run::Head;
use crate::forward::{Activations, ForwardError, Model};
use crate::linalg::{add_cross, product, product_back};

/// Positions whose logits are in memory at a time.
const ROWS: usize = 512;
/// What the float model's head may take as f32; where it takes more, it is read part by part.
const BYTES: u64 = 1 << 30;

/// What is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    /// Σ p (log p − log q) over the vocabulary, p the float model's.
    #[default]
    Kl,
    /// The same sum over the k words that the float model finds most likely; neither side is normalised anew (KL-Top,
    /// OSTQuant, arXiv 2501.13987, section 4.2, as its code computes it).
    KlTop(usize),
    /// −log q of the word that follows; the last position of a window has none.
    CrossEntropy,
}

/// The final norm of the rounded model and the float model's head.
pub struct LossHead<'a> {
    model: &'a Model<'a>,
    teacher: Head<'a>,
    pub norm: Parameters,
}

/// What a step's loss is taken of.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub loss: Loss,
    /// The float model's last stream \[tokens, embed\].
    pub last: &'a [f32],
    /// The tokens, in windows of `length`; only for [`Loss::CrossEntropy`].
    pub tokens: &'a [u32],
    pub length: usize,
}

impl<'a> Target<'a> {
    /// The divergence from the model whose last stream is `last`.
    pub fn divergence(last: &'a [f32]) -> Target<'a> {
        Target { loss: Loss::Kl, last, tokens: &[], length: 1 }
    }

    /// The word that follows position `i`.
    fn next(&self, i: usize) -> Option<usize> {
        (!(i + 1).is_multiple_of(self.length)).then(|| self.tokens.get(i + 1).map(|t| *t as usize)).flatten()
    }
}

/// Buffers.
#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    logits: Vec<f32>,
    wanted: Vec<f32>,
    d_normed: Vec<f32>,
}

impl<'a> LossHead<'a> {
    pub fn new(model: &'a Model<'a>) -> Result<LossHead<'a>, ForwardError> {
        let norm = super::layer::norm_parameters(model.output_norm()?);
        Ok(LossHead { model, teacher: Head::new(model, Activations::F32, BYTES)?, norm })
    }

    /// Σ KL over the rows of `x` \[rows, embed\], the rounded model's last stream, with the head `weight` \[vocab, embed\];
    /// `last` is the float model's.
    pub fn loss(&mut self, x: &[f32], last: &[f32], weight: &[f32]) -> Result<f64, ForwardError> {
        let n = self.model.spec.embed * ROWS;
        let mut s = Scratch::default();
        let mut sum = 0.0;
        for (x, last) in x.chunks(n).zip(last.chunks(n)) {
            self.predictions(x, last, weight, &mut s)?;
            sum += self.losses(&mut s, 0, &Target::divergence(last), 0.0);
        }
        Ok(sum)
    }

    /// The mean loss; its gradient at `x` in `d`, at the head's weight added to `d_weight` (where it is wanted), at the norm
    /// as a step of it.
    pub fn back(
        &mut self,
        x: &[f32],
        target: &Target<'_>,
        weight: &[f32],
        d: &mut [f32],
        mut d_weight: Option<&mut [f32]>,
        adam: &Adam,
    ) -> Result<f64, ForwardError> {
        let (embed, vocab) = (self.model.spec.embed, self.model.vocab);
        let n = embed * ROWS;
        let count = x.len() / embed;
        let mut s = Scratch::default();
        let mut sum = 0.0;
        let mut d_norm = vec![0f32; embed];
        for (i, ((x, last), d)) in x.chunks(n).zip(target.last.chunks(n)).zip(d.chunks_mut(n)).enumerate() {
            self.predictions(x, last, weight, &mut s)?;
            sum += self.losses(&mut s, i * ROWS, target, 1.0 / count as f32);
            s.d_normed.resize(x.len(), 0.0);
            product_back(&s.logits, weight, vocab, &mut s.d_normed);
            if let Some(d_weight) = &mut d_weight {
                add_cross(d_weight, &s.logits, &s.normed, x.len() / embed, embed);
            }
            let (norm, eps) = (&self.norm.values, self.model.spec.rms_eps);
            d.par_chunks_mut(embed)
                .zip(x.par_chunks(embed))
                .zip(s.d_normed.par_chunks(embed))
                .for_each(|((d, x), dy)| rms_norm_back(x, norm, eps, dy, d));
            add_norm_gradient(x, eps, &s.d_normed, &mut d_norm);
        }
        d_norm.iter().enumerate().for_each(|(i, g)| self.norm.step(i, *g, adam));
        Ok(sum / count as f64)
    }

    /// Logits of both models; of the rounded one the head's input as well.
    fn predictions(&mut self, x: &[f32], last: &[f32], weight: &[f32], s: &mut Scratch) -> Result<(), ForwardError> {
        let spec = &self.model.spec;
        s.wanted.clear();
        let mut rows = last.to_vec();
        self.teacher.logits(&mut rows, &mut s.wanted, &mut ())?;
        s.normed.resize(x.len(), 0.0);
        let n = spec.embed;
        s.normed
            .par_chunks_mut(n)
            .zip(x.par_chunks(n))
            .for_each(|(out, x)| kernels::rms_norm(x, &self.norm.values, spec.rms_eps, out));
        s.logits.resize(x.len() / n * self.model.vocab, 0.0);
        product(&s.normed, weight, n, &mut s.logits);
        if spec.logit_scale != 1.0 || spec.final_soft_cap.is_some() {
            s.logits.par_chunks_mut(self.model.vocab).for_each(|row| {
                if spec.logit_scale != 1.0 {
                    kernels::scale(row, spec.logit_scale);
                }
                if let Some(cap) = spec.final_soft_cap {
                    kernels::soft_cap(row, cap);
                }
            });
        }
        Ok(())
    }

    /// The sum of the losses of the rows, the first of them position `first`; logits become the gradients of `weight` times it
    /// at the outputs of the head's product.
    fn losses(&self, s: &mut Scratch, first: usize, target: &Target<'_>, weight: f32) -> f64 {
        let spec = &self.model.spec;
        let vocab = self.model.vocab;
        let rows = s.logits.par_chunks_mut(vocab).zip(s.wanted.par_chunks_mut(vocab)).enumerate();
        let sums: Vec<f64> = rows
            .map_init(Vec::new, |capped, (i, (row, wanted))| {
                if spec.final_soft_cap.is_some() {
                    capped.clear();
                    capped.extend_from_slice(row);
                }
                let loss = match target.loss {
                    Loss::Kl => divergence(row, wanted),
                    Loss::KlTop(k) => top_divergence(row, wanted, k),
                    Loss::CrossEntropy => surprise(row, wanted, target.next(first + i)),
                };
                if weight != 0.0 {
                    row.iter_mut().zip(&*wanted).for_each(|(q, p)| *q = (*q - p) * weight);
                    if let Some(cap) = spec.final_soft_cap {
                        soft_cap_back(capped, cap, row);
                    }
                    if spec.logit_scale != 1.0 {
                        kernels::scale(row, spec.logit_scale);
                    }
                }
                loss
            })
            .collect();
        sums.iter().sum()
    }
}

/// Σ p (log p - log q) over the `k` largest p of the softmaxes of two rows of logits. The rows become what the gradient is the
/// difference of: q times the mass of these p, and these p.
fn top_divergence(student: &mut [f32], teacher: &mut [f32], k: usize) -> f64 {
    let (lse_q, lse_p) = (log_sum_exp(student), log_sum_exp(teacher));
    let mut order = teacher.to_vec();
    let least = match k {
        0 => f32::INFINITY,
        k if k >= order.len() => f32::NEG_INFINITY,
        k => *order.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1,
    };
    let (mut mass, mut loss) = (0.0, 0.0);
    for (t, s) in teacher.iter().zip(&*student).filter(|(t, _)| **t >= least) {
        let p = (f64::from(*t) - lse_p).exp();
        mass += p;
        loss += p * (f64::from(*t) - lse_p - f64::from(*s) + lse_q);
    }
    for (s, t) in student.iter_mut().zip(teacher) {
        *t = if *t >= least { (f64::from(*t) - lse_p).exp() as f32 } else { 0.0 };
        *s = (mass * (f64::from(*s) - lse_q).exp()) as f32;
    }
    loss
}

/// -log q of `label`; the rows become q and what it should be, all of both 0 where there is no label.
fn surprise(student: &mut [f32], wanted: &mut [f32], label: Option<usize>) -> f64 {
    wanted.fill(0.0);
    let Some(label) = label else {
        student.fill(0.0);
        return 0.0;
    };
    let loss = log_sum_exp(student) - f64::from(student[label]);
    kernels::softmax(student);
    wanted[label] = 1.0;
    loss
}

/// Σ p (log p - log q) of the softmaxes of two rows of logits, which both rows become.
fn divergence(student: &mut [f32], teacher: &mut [f32]) -> f64 {
    let (most_q, most_p) = (largest(student), largest(teacher));
    let [sum_q, sum_p, along] = exponentials(student, teacher, most_q, most_p);
    kernels::scale(student, (1.0 / sum_q) as f32);
    kernels::scale(teacher, (1.0 / sum_p) as f32);
    along / sum_p - f64::from(most_p) - sum_p.ln() + f64::from(most_q) + sum_q.ln()
}

fn largest(row: &[f32]) -> f32 {
    row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v))
}

/// log Σ exp.
fn log_sum_exp(row: &[f32]) -> f64 {
    let most = largest(row);
    f64::from(most) + sum_exp(row, most).ln()
}

vectorized! {
    /// Σ exp(x - largest).
    pub fn sum_exp(row: &[f32], largest: f32) -> f64 {
        let mut lanes = [0f64; 16];
        let (whole, rest) = row.as_chunks::<16>();
        for x in whole {
            for i in 0..16 {
                lanes[i] += f64::from(kernels::exp(x[i] - largest));
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|x| f64::from(kernels::exp(x - largest))).sum::<f64>()
    }
}

vectorized! {
    /// Makes two rows their exponentials, less their largest values; the sums of both, and Σ exp(p) (p - q) of the rows as they were.
    pub fn exponentials(q: &mut [f32], p: &mut [f32], most_q: f32, most_p: f32) -> [f64; 3] {
        let mut lanes = [[0f64; 16]; 3];
        let mut rest = [0f64; 3];
        let ((q16, q1), (p16, p1)) = (q.as_chunks_mut::<16>(), p.as_chunks_mut::<16>());
        for (q, p) in q16.iter_mut().zip(p16) {
            for i in 0..16 {
                let difference = p[i] - q[i];
                (q[i], p[i]) = (kernels::exp(q[i] - most_q), kernels::exp(p[i] - most_p));
                lanes[0][i] += f64::from(q[i]);
                lanes[1][i] += f64::from(p[i]);
                lanes[2][i] += f64::from(p[i]) * f64::from(difference);
            }
        }
        for (q, p) in q1.iter_mut().zip(p1) {
            let difference = *p - *q;
            (*q, *p) = (kernels::exp(*q - most_q), kernels::exp(*p - most_p));
            rest[0] += f64::from(*q);
            rest[1] += f64::from(*p);
            rest[2] += f64::from(*p) * f64::from(difference);
        }
        [0, 1, 2].map(|k| lanes[k].iter().sum::<f64>() + rest[k])
    }
}

/// Adds the gradient of a norm's weight, Σ_t dy_t x_t / rms(x_t), to `out`; rows of `out.len()` values.
pub fn add_norm_gradient(x: &[f32], eps: f32, dy: &[f32], out: &mut [f32]) {
    let n = out.len();
    let inverse: Vec<f32> = x
        .par_chunks(n)
        .map(|row| {
            let squares: f64 = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            (1.0 / (squares / n as f64 + f64::from(eps)).sqrt()) as f32
        })
        .collect();
    const COLUMNS: usize = 64;
    out.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, out)| {
        for ((x, dy), r) in x.chunks_exact(n).zip(dy.chunks_exact(n)).zip(&inverse) {
            let from = i * COLUMNS;
            for ((o, x), dy) in out.iter_mut().zip(&x[from..]).zip(&dy[from..]) {
                *o += dy * x * r;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_the_textbook_one() {
        let a: Vec<f32> = (0..37).map(|i| ((i * 7919) % 101) as f32 / 20.0).collect();
        let b: Vec<f32> = (0..37).map(|i| ((i * 104_729) % 97) as f32 / 25.0).collect();
        let soft = |x: &[f32]| -> Vec<f64> {
            let e: Vec<f64> = x.iter().map(|v| f64::from(*v).exp()).collect();
            let s: f64 = e.iter().sum();
            e.iter().map(|v| v / s).collect()
        };
        let (q, p) = (soft(&a), soft(&b));
        let want: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let (mut student, mut teacher) = (a.clone(), b.clone());
        let got = divergence(&mut student, &mut teacher);
        assert!((got - want).abs() < 1e-5 * want, "{got} {want}");
        assert!(student.iter().zip(&q).all(|(s, q)| (f64::from(*s) - q).abs() < 1e-6));
        let mut same = b.clone();
        assert!(divergence(&mut same, &mut b.clone()).abs() < 1e-6);
    }

    /// Gradients of the other losses are their finite differences.
    #[test]
    fn gradients_of_every_loss_are_finite_differences() {
        let a: Vec<f32> = (0..37).map(|i| ((i * 7919) % 101) as f32 / 20.0).collect();
        let b: Vec<f32> = (0..37).map(|i| ((i * 104_729) % 97) as f32 / 25.0).collect();
        let top = |a: &[f32]| top_divergence(&mut a.to_vec(), &mut b.clone(), 9);
        let label = |a: &[f32]| surprise(&mut a.to_vec(), &mut b.clone(), Some(5));
        for is_top in [true, false] {
            let loss = |x: &[f32]| if is_top { top(x) } else { label(x) };
            let (mut q, mut p) = (a.clone(), b.clone());
            if is_top {
                top_divergence(&mut q, &mut p, 9);
            } else {
                surprise(&mut q, &mut p, Some(5));
            }
            for i in 0..37 {
                let moved = |by: f32| {
                    let mut x = a.clone();
                    x[i] += by;
                    loss(&x)
                };
                let h = 1.0 / 128.0;
                let slope = (moved(h) - moved(-h)) / f64::from(2.0 * h);
                assert!((slope - f64::from(q[i] - p[i])).abs() < 1e-4, "{i}: {slope} {}", q[i] - p[i]);
            }
        }
        // all words: the divergence itself
        let all = top_divergence(&mut a.clone(), &mut b.clone(), 37);
        assert!((all - divergence(&mut a.clone(), &mut b.clone())).abs() < 1e-5);
        assert_eq!(surprise(&mut a.clone(), &mut b.clone(), None), 0.0);
        let target = Target { loss: Loss::CrossEntropy, last: &[], tokens: &[1, 2, 3, 4], length: 2 };
        assert_eq!([0, 1, 2, 3].map(|i| target.next(i)), [Some(2), None, Some(4), None]);
    }
}
