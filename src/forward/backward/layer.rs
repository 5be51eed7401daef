//! Backward of one decoder layer for a batch of windows.
//!
//! The forward pass is that of [`Layer::run`] (f32, no rounding of activations) and leaves what the backward pass needs in a
//! [`Kept`]. A simulated precision ([`crate::forward::Simulation`]) rounds inputs, keys and values; gradients pass that as
//! if it were not there (straight-through). The stream passes each branch by: its gradient is that of the output plus what comes
//! back through the norm before the branch.

use rayon::prelude::*;

use super::attention::{Heads, attend_back};
use super::experts;
use super::kernels::{
    activate, activate_back, add_all, add_squares, copy, rms_norm_rows, rms_norm_rows_back, scaled, scaled_to,
};
use crate::forward::attention::attend;
use crate::forward::gemm::{Product, product_back, products};
use crate::forward::layer::{FeedForward, Layer, Linear, Pass};
use crate::forward::rope::RopeTable;
use crate::forward::spec::Spec;
use crate::forward::{ForwardError, Model, kernels};

/// What is said of models that only [`LayerBack::dense`] refuses.
const EXPERTS: &str = "mixtures of experts are neither tuned nor learned for yet";

/// The linears of a dense layer, in the order of its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Slot {
    pub const ALL: [Slot; 7] = [Slot::Q, Slot::K, Slot::V, Slot::O, Slot::Gate, Slot::Up, Slot::Down];
}

/// The norms of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    Attention,
    Q,
    K,
    AfterAttention,
    FeedForward,
    AfterFeedForward,
}

/// What becomes of the gradients that a layer's backward pass finds.
///
/// `linear` and `norm` are called when the gradient has been led through the weight: it may change.
pub trait Sink {
    /// `dy` \[tokens, outputs\] is the gradient at the outputs of `linear`, `x` \[tokens, inputs\] its input.
    fn linear(&mut self, slot: Slot, linear: &mut Linear, x: &[f32], dy: &[f32]);

    /// The same for expert `e` of a mixture and the tokens that are routed to it.
    fn expert(&mut self, _slot: Slot, _e: usize, _linear: &Linear, _x: &[f32], _dy: &[f32]) {}

    /// Rows `x` were normed with `weight`; `dy` is the gradient of the result.
    fn norm(&mut self, _norm: Norm, _weight: &mut [f32], _x: &[f32], _dy: &[f32]) {}
}

/// Sums of the squares of the gradients at the outputs of a layer's linears.
pub struct Squares(Vec<(String, Vec<f64>)>);

impl Squares {
    pub fn new(layer: &LayerBack, model: &Model<'_>) -> Result<Squares, ForwardError> {
        let of = |slot: Slot| match (&layer.ffn, slot) {
            (Branch::Experts { .. }, Slot::Gate | Slot::Up | Slot::Down) => {
                let (name, outputs) = model.stack(layer.index, slot)?;
                Ok((name, vec![0.0; model.spec.experts * outputs]))
            }
            _ => Ok((layer.linear(slot).name.clone(), vec![0.0; layer.linear(slot).outputs()])),
        };
        Slot::ALL.into_iter().map(of).collect::<Result<_, _>>().map(Squares)
    }

    /// The sums by weight, in the order of the layer; parts of one fused weight (equal names) are joined.
    pub fn joined(self) -> Vec<(String, Vec<f64>)> {
        let mut all: Vec<(String, Vec<f64>)> = Vec::new();
        for (name, squares) in self.0 {
            match all.last_mut() {
                Some((last, sums)) if *last == name => sums.extend(squares),
                _ => all.push((name, squares)),
            }
        }
        all
    }
}

impl Sink for Squares {
    fn linear(&mut self, slot: Slot, _: &mut Linear, _: &[f32], dy: &[f32]) {
        add_squares(&mut self.0[slot as usize].1, dy);
    }

    fn expert(&mut self, slot: Slot, e: usize, linear: &Linear, _: &[f32], dy: &[f32]) {
        let outputs = linear.outputs();
        add_squares(&mut self.0[slot as usize].1[e * outputs..][..outputs], dy);
    }
}

/// The feed-forward branch.
enum Branch {
    /// Gate, up and down.
    Dense([Linear; 3]),
    /// Experts are loaded when their turn comes.
    Experts { router: Linear },
}

/// A layer set up for the backward pass.
pub struct LayerBack {
    index: usize,
    pub attn_norm: Option<Vec<f32>>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub attn_post_norm: Option<Vec<f32>>,
    pub ffn_norm: Option<Vec<f32>>,
    ffn: Branch,
    pub ffn_post_norm: Option<Vec<f32>>,
}

/// What a layer's forward pass leaves to its backward pass, `[tokens, ...]`.
#[derive(Default)]
pub struct Kept {
    /// Heads before their norm and rotation, where they have a norm.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// The output of attention, where a norm follows.
    branch: Vec<f32>,
    /// The stream between attention and feed-forward.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// Buffers of a layer's passes, `[tokens, ...]`, kept from batch to batch.
#[derive(Default)]
pub struct Scratch {
    normed: Vec<f32>,
    hidden: Vec<f32>,
    /// Of the branch's output, and of whatever a product gives.
    d_branch: Vec<f32>,
    d_wide: Vec<f32>,
    d_q: Vec<f32>,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
    d_input: Vec<f32>,
    part: Vec<f32>,
}

impl LayerBack {
    /// Takes the weights of `layer`; a norm behind experts is refused.
    pub fn new(layer: Layer, spec: &Spec) -> Result<LayerBack, ForwardError> {
        let ffn = match layer.ffn {
            FeedForward::Dense { gate, up, down } => Branch::Dense([gate, up, down]),
            FeedForward::Experts { .. } if layer.ffn_post_norm.is_some() => {
                let why = "there is no backward pass through a norm behind experts".into();
                return Err(ForwardError::NoBackward { arch: spec.arch.clone(), why });
            }
            FeedForward::Experts { router, .. } => Branch::Experts { router },
        };
        Ok(LayerBack {
            index: layer.index,
            attn_norm: layer.attn_norm,
            q: layer.q,
            k: layer.k,
            v: layer.v,
            o: layer.o,
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            attn_post_norm: layer.attn_post_norm,
            ffn_norm: layer.ffn_norm,
            ffn,
            ffn_post_norm: layer.ffn_post_norm,
        })
    }

    /// The norms that are there, in the order of [`Norm`].
    pub fn norms(&self) -> [Option<&[f32]>; 6] {
        let LayerBack { attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm, .. } = self;
        [attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm].map(Option::as_deref)
    }

    /// [`LayerBack::new`] for a dense layer alone: experts are refused.
    pub fn dense(layer: Layer, spec: &Spec) -> Result<LayerBack, ForwardError> {
        match layer.ffn {
            FeedForward::Dense { .. } => LayerBack::new(layer, spec),
            FeedForward::Experts { .. } => {
                Err(ForwardError::NoBackward { arch: spec.arch.clone(), why: EXPERTS.into() })
            }
        }
    }

    /// The same, to write.
    pub fn norms_mut(&mut self) -> [Option<&mut Vec<f32>>; 6] {
        let LayerBack { attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm, .. } = self;
        [attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm].map(Option::as_mut)
    }

    /// A linear; of the feed-forward branch only in a dense layer.
    pub fn linear(&self, slot: Slot) -> &Linear {
        match (slot, &self.ffn) {
            (Slot::Q, _) => &self.q,
            (Slot::K, _) => &self.k,
            (Slot::V, _) => &self.v,
            (Slot::O, _) => &self.o,
            (_, Branch::Dense(ffn)) => &ffn[slot as usize - Slot::Gate as usize],
            (_, Branch::Experts { .. }) => unreachable!("{slot:?} of a mixture"),
        }
    }

    pub fn linear_mut(&mut self, slot: Slot) -> &mut Linear {
        match (slot, &mut self.ffn) {
            (Slot::Q, _) => &mut self.q,
            (Slot::K, _) => &mut self.k,
            (Slot::V, _) => &mut self.v,
            (Slot::O, _) => &mut self.o,
            (_, Branch::Dense(ffn)) => &mut ffn[slot as usize - Slot::Gate as usize],
            (_, Branch::Experts { .. }) => unreachable!("{slot:?} of a mixture"),
        }
    }

    /// Computes what [`LayerBack::back`] goes back through; `x` is `[tokens, embed]`, whole windows.
    pub fn forward(&self, pass: &Pass<'_>, x: &[f32], k: &mut Kept, s: &mut Scratch) {
        self.attention(pass, x, k, s);
        self.feed_forward(pass, k, s);
    }

    /// The output of a dense layer, from what [`LayerBack::forward`] left.
    pub fn output(&self, pass: &Pass<'_>, k: &Kept, s: &mut Scratch, out: &mut Vec<f32>) {
        let spec = &pass.model.spec;
        let down = self.linear(Slot::Down);
        hidden(pass, down.inputs, k, s);
        forward([(down, &mut s.d_branch)], &s.hidden);
        copy(&k.middle, out);
        add_branch(spec, out, &s.d_branch, &self.ffn_post_norm, &mut s.part);
    }

    /// `d`, the gradient at the layer's output, becomes that at its input `x`; both `[tokens, embed]`. Uses up what is kept.
    pub fn back(
        &mut self,
        pass: &Pass<'_>,
        x: &[f32],
        d: &mut [f32],
        k: &mut Kept,
        s: &mut Scratch,
        sink: &mut dyn Sink,
    ) -> Result<(), ForwardError> {
        self.feed_forward_back(pass, d, k, s, sink)?;
        self.attention_back(pass, x, d, k, s, sink);
        Ok(())
    }

    /// Up to the stream after attention, `k.middle`.
    fn attention(&self, pass: &Pass<'_>, x: &[f32], k: &mut Kept, s: &mut Scratch) {
        let spec = &pass.model.spec;
        let input = input_of(pass, x, &self.attn_norm, &mut s.normed);
        forward([(&self.q, &mut k.q), (&self.k, &mut k.k), (&self.v, &mut k.v)], input);
        let rope = self.rope(pass);
        finish(spec, &mut k.q, &mut k.raw_q, &self.q_norm, (self.q.outputs(), pass.length), rope);
        finish(spec, &mut k.k, &mut k.raw_k, &self.k_norm, (self.k.outputs(), pass.length), rope);
        let simulated = pass.activations.simulated();
        if let Some(s) = simulated {
            s.heads(&mut k.k, spec.head_dim, true);
            s.heads(&mut k.v, spec.head_dim, false);
        }
        k.attended.resize(k.q.len(), 0.0);
        attend(spec, &k.q, &k.k, &k.v, pass.length, spec.window_of(self.index), &mut k.attended);
        if let Some(s) = simulated {
            s.inputs(&mut k.attended, self.o.inputs, false);
        }
        forward([(&self.o, &mut s.d_branch)], &k.attended);
        copy(x, &mut k.middle);
        add_branch(spec, &mut k.middle, &s.d_branch, &self.attn_post_norm, &mut s.part);
        if self.attn_post_norm.is_some() {
            std::mem::swap(&mut k.branch, &mut s.d_branch);
        }
    }

    /// Gate and up, before the activation; experts compute theirs on the way back.
    fn feed_forward(&self, pass: &Pass<'_>, k: &mut Kept, s: &mut Scratch) {
        if let Branch::Dense([gate, up, _]) = &self.ffn {
            let input = input_of(pass, &k.middle, &self.ffn_norm, &mut s.normed);
            forward([(gate, &mut k.gate), (up, &mut k.up)], input);
        }
    }

    fn feed_forward_back(
        &mut self,
        pass: &Pass<'_>,
        d: &mut [f32],
        k: &mut Kept,
        s: &mut Scratch,
        sink: &mut dyn Sink,
    ) -> Result<(), ForwardError> {
        let spec = &pass.model.spec;
        match &mut self.ffn {
            Branch::Dense([gate, up, down]) => {
                hidden(pass, down.inputs, k, s);
                if let Some(w) = &mut self.ffn_post_norm {
                    forward([(down, &mut s.part)], &s.hidden);
                    let scaled = scaled(d, spec.residual_scale, &mut s.d_input);
                    rms_norm_rows_back(&s.part, w, spec.rms_eps, scaled, &mut s.d_branch);
                    sink.norm(Norm::AfterFeedForward, w, &s.part, scaled);
                } else {
                    scaled_to(d, spec.residual_scale, &mut s.d_branch);
                }
                back(down, &s.d_branch, &mut s.d_wide);
                sink.linear(Slot::Down, down, &s.hidden, &s.d_branch);
                activate_back(spec.activation, &mut k.gate, &mut k.up, &s.d_wide);
                back(gate, &k.gate, &mut s.d_input);
                back(up, &k.up, &mut s.part);
                add_all(&mut s.d_input, &s.part);
                let input = input_of(pass, &k.middle, &self.ffn_norm, &mut s.normed);
                sink.linear(Slot::Gate, gate, input, &k.gate);
                sink.linear(Slot::Up, up, input, &k.up);
            }
            Branch::Experts { router } => {
                scaled_to(d, spec.residual_scale, &mut s.d_branch);
                let input = input_of(pass, &k.middle, &self.ffn_norm, &mut s.normed);
                experts::back(pass, self.index, router, input, &s.d_branch, &mut s.d_input, sink)?;
            }
        }
        through_norm(&k.middle, &self.ffn_norm, spec.rms_eps, &s.d_input, &mut s.part, d);
        if let Some(w) = &mut self.ffn_norm {
            sink.norm(Norm::FeedForward, w, &k.middle, &s.d_input);
        }
        Ok(())
    }

    fn attention_back(
        &mut self,
        pass: &Pass<'_>,
        x: &[f32],
        d: &mut [f32],
        k: &mut Kept,
        s: &mut Scratch,
        sink: &mut dyn Sink,
    ) {
        let spec = &pass.model.spec;
        let rope = self.rope(pass).map(RopeTable::reversed);
        if let Some(w) = &mut self.attn_post_norm {
            let scaled = scaled(d, spec.residual_scale, &mut s.d_input);
            rms_norm_rows_back(&k.branch, w, spec.rms_eps, scaled, &mut s.d_branch);
            sink.norm(Norm::AfterAttention, w, &k.branch, scaled);
        } else {
            scaled_to(d, spec.residual_scale, &mut s.d_branch);
        }
        back(&self.o, &s.d_branch, &mut s.d_wide);
        sink.linear(Slot::O, &mut self.o, &k.attended, &s.d_branch);
        for (d, x) in [(&mut s.d_q, &k.q), (&mut s.d_k, &k.k), (&mut s.d_v, &k.v)] {
            d.resize(x.len(), 0.0);
        }
        let heads = Heads { q: &k.q[..], k: &k.k[..], v: &k.v[..] };
        let d_heads = Heads { q: &mut s.d_q[..], k: &mut s.d_k[..], v: &mut s.d_v[..] };
        attend_back(spec, heads, pass.length, spec.window_of(self.index), &s.d_wide, d_heads);
        for (d, raw, norm, (which, width)) in [
            (&mut s.d_q, &k.raw_q, &mut self.q_norm, (Norm::Q, self.q.outputs())),
            (&mut s.d_k, &k.raw_k, &mut self.k_norm, (Norm::K, self.k.outputs())),
        ] {
            if let Some(rope) = &rope {
                rotate(spec, d, (width, pass.length), rope);
            }
            if let Some(w) = norm {
                rms_norm_rows_back(raw, w, spec.rms_eps, d, &mut s.part);
                sink.norm(which, w, raw, d);
                d.copy_from_slice(&s.part);
            }
        }
        back(&self.q, &s.d_q, &mut s.d_input);
        back(&self.k, &s.d_k, &mut s.part);
        add_all(&mut s.d_input, &s.part);
        back(&self.v, &s.d_v, &mut s.part);
        add_all(&mut s.d_input, &s.part);
        let input = input_of(pass, x, &self.attn_norm, &mut s.normed);
        sink.linear(Slot::Q, &mut self.q, input, &s.d_q);
        sink.linear(Slot::K, &mut self.k, input, &s.d_k);
        sink.linear(Slot::V, &mut self.v, input, &s.d_v);
        through_norm(x, &self.attn_norm, spec.rms_eps, &s.d_input, &mut s.part, d);
        if let Some(w) = &mut self.attn_norm {
            sink.norm(Norm::Attention, w, x, &s.d_input);
        }
    }

    fn rope<'a>(&self, pass: &Pass<'a>) -> Option<&'a RopeTable> {
        let spec = &pass.model.spec;
        let table = if spec.window_of(self.index).is_some() { pass.window_rope } else { pass.rope };
        spec.has_rope(self.index).then_some(table)
    }
}

/// The input of down, `s.hidden`.
fn hidden(pass: &Pass<'_>, columns: usize, k: &Kept, s: &mut Scratch) {
    copy(&k.gate, &mut s.hidden);
    activate(pass.model.spec.activation, &mut s.hidden, &k.up);
    if let Some(simulated) = pass.activations.simulated() {
        simulated.inputs(&mut s.hidden, columns, true);
    }
}

/// `out = x Wᵀ + b` of linears of one input.
pub(super) fn forward<'a, const N: usize>(mut all: [(&'a Linear, &'a mut Vec<f32>); N], x: &[f32]) {
    for (l, out) in &mut all {
        out.resize(x.len() / l.inputs * l.outputs(), 0.0);
    }
    products(all.iter_mut().map(|(l, out)| Product { a: x, b: &l.weight, k: l.inputs, out }));
    for (l, out) in all {
        if let Some(bias) = &l.bias {
            out.par_chunks_mut(bias.len()).for_each(|row| kernels::add(row, bias));
        }
    }
}

/// `dx = dy W`.
pub(super) fn back(l: &Linear, dy: &[f32], dx: &mut Vec<f32>) {
    let outputs = l.outputs();
    dx.resize(dy.len() / outputs * l.inputs, 0.0);
    product_back(dy, &l.weight, outputs, dx);
}

/// `x += scale · norm(branch)`.
fn add_branch(spec: &Spec, x: &mut [f32], branch: &[f32], norm: &Option<Vec<f32>>, part: &mut Vec<f32>) {
    let added = normed(branch, norm, spec.rms_eps, part);
    let n = spec.embed * 16;
    let pieces = x.par_chunks_mut(n).zip(added.par_chunks(n));
    pieces.for_each(|(x, b)| kernels::add_scaled(x, b, spec.residual_scale));
}

/// The input of a branch: normed, and rounded where a precision is simulated.
fn input_of<'a>(pass: &Pass<'_>, x: &'a [f32], norm: &Option<Vec<f32>>, out: &'a mut Vec<f32>) -> &'a [f32] {
    let spec = &pass.model.spec;
    let Some(simulated) = pass.activations.simulated() else { return normed(x, norm, spec.rms_eps, out) };
    match norm {
        Some(w) => rms_norm_rows(x, w, spec.rms_eps, out),
        None => copy(x, out),
    }
    simulated.inputs(out, spec.embed, false);
    out
}

/// Rows normed, or as they are where there is no norm.
fn normed<'a>(x: &'a [f32], norm: &Option<Vec<f32>>, eps: f32, out: &'a mut Vec<f32>) -> &'a [f32] {
    match norm {
        Some(w) => {
            rms_norm_rows(x, w, eps, out);
            out
        }
        None => x,
    }
}

/// `d +=` the gradient at `x`, from `dy`, that of the normed rows.
fn through_norm(x: &[f32], norm: &Option<Vec<f32>>, eps: f32, dy: &[f32], part: &mut Vec<f32>, d: &mut [f32]) {
    match norm {
        Some(w) => {
            rms_norm_rows_back(x, w, eps, dy, part);
            add_all(d, part);
        }
        None => add_all(d, dy),
    }
}

/// Norm and rotation of heads; `raw` keeps them as they were before a norm.
fn finish(
    spec: &Spec,
    heads: &mut Vec<f32>,
    raw: &mut Vec<f32>,
    norm: &Option<Vec<f32>>,
    shape: (usize, usize),
    rope: Option<&RopeTable>,
) {
    if let Some(w) = norm {
        std::mem::swap(heads, raw);
        rms_norm_rows(raw, w, spec.rms_eps, heads);
    }
    if let Some(rope) = rope {
        rotate(spec, heads, shape, rope);
    }
}

/// Rotates heads of `width` values a token, in windows of `length` tokens.
fn rotate(spec: &Spec, heads: &mut [f32], (width, length): (usize, usize), rope: &RopeTable) {
    heads.par_chunks_mut(width).enumerate().for_each(|(t, row)| rope.apply(row, spec.head_dim, t % length));
}
