//! One decoder layer: its weights as f32, and what it does to the residual stream of a batch of windows.
//!
//! Source: the graphs of llama.cpp b11434 (`src/models/*.cpp`, `build_moe_ffn`). Norms before a branch, after it, or both
//! are told apart by the tensors that are there.

use rayon::prelude::*;

use super::attention::attend;
use super::gemm::{Product, products};
use super::model::Model;
use super::rope::RopeTable;
use super::rounding::{Activations, Rounding, to_f16};
use super::spec::Activation;
use super::{ForwardError, Observer, kernels};

/// A weight matrix, dequantized.
pub struct Linear {
    /// GGUF name of the tensor that it is (part of).
    pub name: String,
    /// `[outputs, inputs]`.
    pub weight: Vec<f32>,
    pub inputs: usize,
    pub bias: Option<Vec<f32>>,
    /// Of its input.
    pub rounding: Rounding,
}

impl Linear {
    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.weight.len() / self.inputs
    }

    /// `out = x Wᵀ + b`; `x` is `[tokens, inputs]`.
    fn run(&self, x: &mut Input<'_>, out: &mut Vec<f32>) {
        run_all([(self, out)], x);
    }
}

/// Linears of one input; side by side if they want it rounded alike.
fn run_all<'a, const N: usize>(mut linears: [(&'a Linear, &'a mut Vec<f32>); N], x: &mut Input<'_>) {
    for (l, out) in &mut linears {
        out.resize(x.x.len() / l.inputs * l.outputs(), 0.0);
    }
    let mut rest = &mut linears[..];
    while let Some((first, _)) = rest.first() {
        let rounding = first.rounding;
        let alike = rest.iter().take_while(|(l, _)| l.rounding == rounding).count();
        let (now, later) = rest.split_at_mut(alike);
        rest = later;
        let x = x.rounded(rounding, now[0].0.inputs);
        products(now.iter_mut().map(|(l, out)| Product { a: x, b: &l.weight, k: l.inputs, out }));
    }
    for (l, out) in linears {
        if let Some(bias) = &l.bias {
            out.par_chunks_mut(l.outputs()).for_each(|row| kernels::add(row, bias));
        }
    }
}

/// The input of some linears, rounded once for all that want it rounded alike.
struct Input<'a> {
    x: &'a [f32],
    rounded: &'a mut Vec<f32>,
    rounding: Rounding,
}

impl<'a> Input<'a> {
    fn new(x: &'a [f32], rounded: &'a mut Vec<f32>) -> Input<'a> {
        Input { x, rounded, rounding: Rounding::None }
    }

    fn rounded(&mut self, rounding: Rounding, columns: usize) -> &[f32] {
        if rounding == Rounding::None {
            return self.x;
        }
        if self.rounding != rounding {
            self.rounded.clear();
            self.rounded.extend_from_slice(self.x);
            rounding.apply(self.rounded, columns);
            self.rounding = rounding;
        }
        self.rounded
    }
}

/// The feed-forward branch.
pub enum FeedForward {
    Dense {
        gate: Linear,
        up: Linear,
        down: Linear,
    },
    /// Experts are loaded when their turn comes: from the model, or those of `rounded`.
    Experts {
        router: Linear,
        rounded: Option<Box<dyn Experts>>,
    },
}

/// Where a layer's experts come from, if not from the model.
pub trait Experts: Send + Sync {
    /// Gate, up and down of expert `e`.
    fn expert(&self, e: usize) -> Result<[Linear; 3], ForwardError>;
}

/// Weights of a layer.
pub struct Layer {
    pub index: usize,
    pub attn_norm: Option<Vec<f32>>,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub attn_post_norm: Option<Vec<f32>>,
    pub ffn_norm: Option<Vec<f32>>,
    pub ffn: FeedForward,
    pub ffn_post_norm: Option<Vec<f32>>,
}

/// Buffers of a layer's run, `[tokens, ...]`, kept from layer to layer.
#[derive(Default)]
pub struct Scratch {
    /// Input of a branch.
    pub normed: Vec<f32>,
    rounded: Vec<f32>,
    /// `[tokens, heads x head_dim]`; keys and values `[tokens, kv_heads x head_dim]`.
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// Input of the output matrix of attention.
    pub attended: Vec<f32>,
    branch: Vec<f32>,
    /// Input of the down matrix.
    pub gate: Vec<f32>,
    up: Vec<f32>,
}

/// What a run needs beside the weights.
pub struct Pass<'a> {
    pub model: &'a Model<'a>,
    pub rope: &'a RopeTable,
    pub window_rope: &'a RopeTable,
    pub activations: Activations,
    /// Tokens of a window.
    pub length: usize,
}

/// RMSNorm of every row of `columns`, or of every head.
fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let n = weight.len();
    out.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).for_each(|(out, x)| {
        for (o, x) in out.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            kernels::rms_norm(x, weight, eps, o);
        }
    });
}

impl Layer {
    /// Runs the layer: `x` is `[tokens, embed]`, whole windows.
    pub fn run(
        &self,
        pass: &Pass<'_>,
        x: &mut [f32],
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        self.attention(pass, x, s, observer)?;
        self.add_branch(pass, x, s, &self.attn_post_norm);
        self.feed_forward(pass, x, s, observer)?;
        self.add_branch(pass, x, s, &self.ffn_post_norm);
        Ok(())
    }

    /// `x += scale · norm(branch)`.
    fn add_branch(&self, pass: &Pass<'_>, x: &mut [f32], s: &mut Scratch, norm: &Option<Vec<f32>>) {
        let spec = &pass.model.spec;
        let branch = match norm {
            Some(w) => {
                norm_rows(&s.branch, w, spec.rms_eps, &mut s.normed);
                &s.normed
            }
            None => &s.branch,
        };
        let n = spec.embed * 16;
        x.par_chunks_mut(n).zip(branch.par_chunks(n)).for_each(|(x, b)| {
            if spec.residual_scale == 1.0 {
                kernels::add(x, b);
            } else {
                kernels::add_scaled(x, b, spec.residual_scale);
            }
        });
    }

    fn attention(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let input = self.attention_input(pass, x, s);
        show(observer, &[&self.q.name, &self.k.name, &self.v.name], &input, (pass.length, self.q.inputs))?;
        self.attend(pass, &input, s);
        s.normed = input;
        show(observer, &[&self.o.name], &s.attended, (pass.length, self.o.inputs))?;
        self.o.run(&mut Input::new(&s.attended, &mut s.rounded), &mut s.branch);
        Ok(())
    }

    /// The input of q, k and v, in a buffer of `s`.
    pub fn attention_input(&self, pass: &Pass<'_>, x: &[f32], s: &mut Scratch) -> Vec<f32> {
        pre_norm(x, &self.attn_norm, pass.model.spec.rms_eps, std::mem::take(&mut s.normed))
    }

    /// Attention over `input`, up to the input of the output matrix: [`Scratch::attended`].
    pub fn attend(&self, pass: &Pass<'_>, input: &[f32], s: &mut Scratch) {
        self.project(pass, input, s, |t| t % pass.length);
        s.attended.resize(s.q.len(), 0.0);
        let spec = &pass.model.spec;
        attend(spec, &s.q, &s.k, &s.v, pass.length, spec.window_of(self.index), &mut s.attended);
    }

    /// Queries, keys and values of `input`, normed and rotated: [`Scratch::q`] and its fellows. `position`: of a row.
    pub fn project(&self, pass: &Pass<'_>, input: &[f32], s: &mut Scratch, position: impl Fn(usize) -> usize + Sync) {
        let spec = &pass.model.spec;
        let mut input = Input::new(input, &mut s.rounded);
        run_all([(&self.q, &mut s.q), (&self.k, &mut s.k), (&self.v, &mut s.v)], &mut input);
        let table = if spec.window_of(self.index).is_some() { pass.window_rope } else { pass.rope };
        let rope = spec.has_rope(self.index).then_some(table);
        let finish = |heads: &mut [f32], norm: &Option<Vec<f32>>, width: usize, cached: bool| {
            heads.par_chunks_mut(width).enumerate().for_each_init(Vec::new, |normed: &mut Vec<f32>, (t, row)| {
                if let Some(w) = norm {
                    // per head (Qwen 3), or over all heads (OLMo 2)
                    normed.resize(row.len(), 0.0);
                    for (x, o) in row.chunks_exact(w.len()).zip(normed.chunks_exact_mut(w.len())) {
                        kernels::rms_norm(x, w, spec.rms_eps, o);
                    }
                    row.copy_from_slice(normed);
                }
                if let Some(rope) = rope {
                    rope.apply(row, spec.head_dim, position(t));
                }
                if cached && pass.activations == Activations::Ggml {
                    to_f16(row);
                }
            });
        };
        finish(&mut s.q, &self.q_norm, self.q.outputs(), false);
        finish(&mut s.k, &self.k_norm, self.k.outputs(), true);
        if pass.activations == Activations::Ggml {
            s.v.par_chunks_mut(self.v.outputs()).for_each(to_f16);
        }
        if let Some(simulated) = pass.activations.simulated() {
            simulated.heads(&mut s.k, spec.head_dim, true);
            simulated.heads(&mut s.v, spec.head_dim, false);
        }
    }

    /// `x += o(attended)`.
    pub fn attention_output(&self, pass: &Pass<'_>, attended: &[f32], x: &mut [f32], s: &mut Scratch) {
        self.o.run(&mut Input::new(attended, &mut s.rounded), &mut s.branch);
        self.add_branch(pass, x, s, &self.attn_post_norm);
    }

    /// The input of the feed-forward branch, in a buffer of `s`.
    pub fn feed_forward_input(&self, pass: &Pass<'_>, x: &[f32], s: &mut Scratch) -> Vec<f32> {
        pre_norm(x, &self.ffn_norm, pass.model.spec.rms_eps, std::mem::take(&mut s.normed))
    }

    /// `x += down(hidden)` of a dense layer.
    pub fn feed_forward_output(&self, pass: &Pass<'_>, hidden: &[f32], x: &mut [f32], s: &mut Scratch) {
        if let FeedForward::Dense { down, .. } = &self.ffn {
            down.run(&mut Input::new(hidden, &mut s.rounded), &mut s.branch);
            self.add_branch(pass, x, s, &self.ffn_post_norm);
        }
    }

    fn feed_forward(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let input = self.feed_forward_input(pass, x, s);
        match &self.ffn {
            FeedForward::Dense { gate, up, down } => {
                show(observer, &[&gate.name, &up.name], &input, (pass.length, gate.inputs))?;
                gated(pass, (gate, up), &input, s);
                show(observer, &[&down.name], &s.gate, (pass.length, down.inputs))?;
                down.run(&mut Input::new(&s.gate, &mut s.rounded), &mut s.branch);
            }
            FeedForward::Experts { router, rounded } => {
                self.experts(pass, (router, rounded.as_deref()), &input, s, observer)?;
            }
        }
        s.normed = input;
        Ok(())
    }

    /// `x += feed_forward(x)`.
    pub fn add_feed_forward(&self, pass: &Pass<'_>, x: &mut [f32], s: &mut Scratch) -> Result<(), ForwardError> {
        self.feed_forward(pass, x, s, &mut ())?;
        self.add_branch(pass, x, s, &self.ffn_post_norm);
        Ok(())
    }

    /// The experts of every token of `input`, `experts_used` each, with their weights; none for a dense layer.
    pub fn routes(&self, pass: &Pass<'_>, input: &[f32], s: &mut Scratch) -> Vec<(usize, f32)> {
        let FeedForward::Experts { router, .. } = &self.ffn else { return Vec::new() };
        let spec = &pass.model.spec;
        router.run(&mut Input::new(input, &mut s.rounded), &mut s.gate);
        route(&s.gate, spec.experts, spec.experts_used, spec.expert_scale)
    }

    fn experts(
        &self,
        pass: &Pass<'_>,
        (router, rounded): (&Linear, Option<&dyn Experts>),
        input: &[f32],
        s: &mut Scratch,
        observer: &mut dyn Observer,
    ) -> Result<(), ForwardError> {
        let spec = &pass.model.spec;
        show(observer, &[&router.name], input, (pass.length, spec.embed))?;
        let chosen = self.routes(pass, input, s);
        s.branch.clear();
        s.branch.resize(input.len(), 0.0);
        let (mut rows, mut out) = (Vec::new(), Vec::new());
        for e in 0..spec.experts {
            let mine: Vec<(usize, f32)> = chosen
                .chunks_exact(spec.experts_used)
                .enumerate()
                .filter_map(|(t, c)| c.iter().find(|(i, _)| *i == e).map(|(_, w)| (t, *w)))
                .collect();
            if mine.is_empty() {
                continue;
            }
            let [gate, up, down] = match rounded {
                Some(rounded) => rounded.expert(e)?,
                None => pass.model.expert(self.index, e, pass.activations)?,
            };
            rows.clear();
            for &(t, _) in &mine {
                rows.extend_from_slice(&input[t * spec.embed..(t + 1) * spec.embed]);
            }
            let by_window = mine.chunk_by(|a, b| a.0 / pass.length == b.0 / pass.length).map(<[_]>::len);
            let counts: Vec<usize> = by_window.collect();
            let which = (e, spec.experts);
            show_expert(observer, &[&gate.name, &up.name], which, &rows, (&counts, spec.embed))?;
            gated(pass, (&gate, &up), &rows, s);
            show_expert(observer, &[&down.name], which, &s.gate, (&counts, down.inputs))?;
            down.run(&mut Input::new(&s.gate, &mut s.rounded), &mut out);
            for (row, &(t, w)) in out.chunks_exact(spec.embed).zip(&mine) {
                kernels::add_scaled(&mut s.branch[t * spec.embed..(t + 1) * spec.embed], row, w);
            }
        }
        Ok(())
    }
}

/// The gated activation of `input`, up to the input of the down matrix: [`Scratch::gate`].
pub fn gated(pass: &Pass<'_>, (gate, up): (&Linear, &Linear), input: &[f32], s: &mut Scratch) {
    let mut input = Input::new(input, &mut s.rounded);
    run_all([(gate, &mut s.gate), (up, &mut s.up)], &mut input);
    activate(pass.model.spec.activation, &mut s.gate, &s.up, gate.outputs());
}

/// Shows `x` to the observer window by window, so that what it sums does not depend on the batch.
fn show(
    observer: &mut dyn Observer,
    names: &[&str],
    x: &[f32],
    (length, columns): (usize, usize),
) -> Result<(), ForwardError> {
    x.chunks(length * columns).try_for_each(|x| observer.input(names, None, x))
}

/// The same for the rows of one expert, `counts` of them in each window.
fn show_expert(
    observer: &mut dyn Observer,
    names: &[&str],
    expert: (usize, usize),
    x: &[f32],
    (counts, columns): (&[usize], usize),
) -> Result<(), ForwardError> {
    let mut rest = x;
    for n in counts {
        let (rows, tail) = rest.split_at(n * columns);
        observer.input(names, Some(expert), rows)?;
        rest = tail;
    }
    Ok(())
}

/// The input of a branch, in `out`: normed, or the stream itself where the norm comes after.
fn pre_norm(x: &[f32], norm: &Option<Vec<f32>>, eps: f32, mut out: Vec<f32>) -> Vec<f32> {
    match norm {
        Some(w) => norm_rows(x, w, eps, &mut out),
        None => {
            out.clear();
            out.extend_from_slice(x);
        }
    }
    out
}

fn activate(activation: Activation, gate: &mut [f32], up: &[f32], columns: usize) {
    let n = columns * 8;
    gate.par_chunks_mut(n).zip(up.par_chunks(n)).for_each(|(g, u)| match activation {
        Activation::Silu => kernels::silu_mul(g, u),
        Activation::Gelu => kernels::gelu_mul(g, u),
    });
}

/// Experts and weights of every token: softmax over all, the largest, normalised (`build_moe_ffn`).
pub(super) fn route(logits: &[f32], experts: usize, used: usize, scale: f32) -> Vec<(usize, f32)> {
    let mut chosen = Vec::with_capacity(logits.len() / experts * used);
    for row in logits.chunks_exact(experts) {
        let mut p = row.to_vec();
        kernels::softmax(&mut p);
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
        let sum: f32 = order[..used].iter().map(|&e| p[e]).sum();
        let sum = sum.max(6.103_515_6e-5);
        chosen.extend(order[..used].iter().map(|&e| (e, p[e] / sum * scale)));
    }
    chosen
}
