//! Labels from the model's own predictions, and the backward of the head and the final norm.
//!
//! The loss of a position is -log p(label); its gradient with respect to the logits is p - onehot(label). A label drawn
//! from p makes the mean of the squared gradients the true Fisher information, not the "empirical" one of the text's own
//! next token (Kunstner et al. 2019).

use rayon::prelude::*;

use super::kernels::{add_squares, rms_norm_rows_back, soft_cap_back};
use crate::forward::gemm::product_back;
use crate::forward::run::Head;
use crate::forward::sample::{draw, uniform};
use crate::forward::{Activations, ForwardError, Model, kernels};
use crate::linalg;

/// What the head's rows may take as f32, twice.
const BYTES: u64 = 256 << 20;
/// Positions whose logits are in memory at a time.
const ROWS: usize = 512;

/// The label of every position.
#[derive(Clone, Copy, Debug)]
pub enum Labels<'a> {
    /// Drawn from the model's softmax; a position's draw depends on this seed and the position alone.
    Sampled(u64),
    /// One per token.
    Given(&'a [u32]),
}

impl Labels<'_> {
    fn of(self, position: usize, p: &[f32]) -> usize {
        match self {
            Labels::Sampled(seed) => draw(p, uniform(seed, position as u64)),
            Labels::Given(labels) => labels[position] as usize,
        }
    }
}

/// The head set up for the backward pass.
pub struct HeadBack<'a> {
    model: &'a Model<'a>,
    head: Head<'a>,
    norm: Vec<f32>,
    /// Rows of the head that are in memory at a time.
    most: usize,
    /// `[rows, embed]`: kept if it is all of the head.
    rows: Vec<f32>,
    /// Sums of squares of the gradients at its outputs.
    pub squares: Vec<f64>,
    /// Σ x xᵀ of its input, packed.
    pub second: Vec<f64>,
}

impl<'a> HeadBack<'a> {
    pub fn new(model: &'a Model<'a>) -> Result<HeadBack<'a>, ForwardError> {
        HeadBack::within(model, BYTES)
    }

    /// `bytes`: what its rows may take.
    fn within(model: &'a Model<'a>, bytes: u64) -> Result<HeadBack<'a>, ForwardError> {
        Ok(HeadBack {
            model,
            head: Head::new(model, Activations::F32, bytes)?,
            norm: model.output_norm()?,
            most: (bytes / (model.spec.embed as u64 * 4)).clamp(1, model.vocab as u64) as usize,
            rows: Vec::new(),
            squares: vec![0.0; model.vocab],
            second: vec![0.0; model.spec.embed * (model.spec.embed + 1) / 2],
        })
    }

    /// Gradients at the stream before the final norm: `x` and `d` are `[positions.len(), embed]`, `positions` the places of
    /// the rows among all tokens.
    pub fn run(
        &mut self,
        x: &[f32],
        positions: &[usize],
        labels: Labels<'_>,
        d: &mut [f32],
    ) -> Result<(), ForwardError> {
        let n = self.model.spec.embed * ROWS;
        let (mut normed, mut logits, mut d_normed, mut d_x) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for ((x, positions), d) in x.chunks(n).zip(positions.chunks(ROWS)).zip(d.chunks_mut(n)) {
            normed.clear();
            normed.extend_from_slice(x);
            self.head.logits(&mut normed, &mut logits, &mut ())?;
            let embed = self.model.spec.embed;
            linalg::syrk_packed(&mut self.second, &normed, normed.len() / embed, embed, linalg::all_threads());
            self.loss_back(&mut logits, positions, labels);
            add_squares(&mut self.squares, &logits);
            self.product_back(&logits, &mut d_normed)?;
            rms_norm_rows_back(x, &self.norm, self.model.spec.rms_eps, &d_normed, &mut d_x);
            d.copy_from_slice(&d_x);
        }
        Ok(())
    }

    /// Logits become the gradients at the outputs of the head's product, before scale and cap.
    fn loss_back(&self, logits: &mut [f32], positions: &[usize], labels: Labels<'_>) {
        let s = &self.model.spec;
        logits.par_chunks_mut(self.model.vocab).zip(positions).for_each_init(Vec::new, |capped, (row, &position)| {
            if s.final_soft_cap.is_some() {
                capped.clear();
                capped.extend_from_slice(row);
            }
            kernels::softmax(row);
            let label = labels.of(position, row);
            row[label] -= 1.0;
            if let Some(cap) = s.final_soft_cap {
                soft_cap_back(capped, cap, row);
            }
            if s.logit_scale != 1.0 {
                kernels::scale(row, s.logit_scale);
            }
        });
    }

    /// `out = d W`, `d` of shape `[rows, vocab]`: a part of the head's rows at a time.
    fn product_back(&mut self, d: &[f32], out: &mut Vec<f32>) -> Result<(), ForwardError> {
        let (n, vocab) = (self.model.spec.embed, self.model.vocab);
        out.resize(d.len() / vocab * n, 0.0);
        if self.most >= vocab {
            if self.rows.is_empty() {
                self.part(0, vocab)?;
            }
            product_back(d, &self.rows, vocab, out);
            return Ok(());
        }
        out.fill(0.0);
        let (mut columns, mut sum) = (Vec::new(), vec![0.0; out.len()]);
        for from in (0..vocab).step_by(self.most) {
            let to = (from + self.most).min(vocab);
            self.part(from, to)?;
            columns.clear();
            d.chunks_exact(vocab).for_each(|row| columns.extend_from_slice(&row[from..to]));
            product_back(&columns, &self.rows, to - from, &mut sum);
            super::kernels::add_all(out, &sum);
        }
        Ok(())
    }

    fn part(&mut self, from: usize, to: usize) -> Result<(), ForwardError> {
        let n = self.model.spec.embed;
        self.rows.resize((to - from) * n, 0.0);
        self.model.head_rows(from, to, &mut self.rows)
    }
}
