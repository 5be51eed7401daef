//! Backward of one dense decoder layer for a batch of windows.
//!
//! Of the forward pass only the layer's input is kept; everything between is computed again here, as [`Layer::run`] does
//! (f32, no rounding of activations). The stream passes each branch by: its gradient is that of the output plus what comes
//! back through the norm before the branch.

use rayon::prelude::*;

use super::attention::{Heads, attend_back};
use super::kernels::{activate_back, add_all, add_squares, rms_norm_rows_back, transpose};
use crate::forward::attention::attend;
use crate::forward::gemm::{Product, product, products};
use crate::forward::layer::{FeedForward, Layer, Linear, Pass};
use crate::forward::rope::RopeTable;
use crate::forward::spec::{Activation, Spec};
use crate::forward::{ForwardError, kernels};

/// A linear with its transpose and the sums of squares of its outputs' gradients.
struct Both {
    linear: Linear,
    /// `[inputs, outputs]`.
    transposed: Vec<f32>,
    squares: Vec<f64>,
}

impl Both {
    fn new(linear: Linear) -> Both {
        let mut transposed = Vec::new();
        transpose(&linear.weight, linear.inputs, &mut transposed);
        let squares = vec![0.0; linear.outputs()];
        Both { linear, transposed, squares }
    }
}

/// A layer set up for the backward pass.
pub struct LayerBack {
    index: usize,
    attn_norm: Option<Vec<f32>>,
    q: Both,
    k: Both,
    v: Both,
    o: Both,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    attn_post_norm: Option<Vec<f32>>,
    ffn_norm: Option<Vec<f32>>,
    gate: Both,
    up: Both,
    down: Both,
    ffn_post_norm: Option<Vec<f32>>,
}

/// Buffers of a layer's backward pass, `[tokens, ...]`, kept from batch to batch.
#[derive(Default)]
pub struct Scratch {
    normed: Vec<f32>,
    /// Heads before their norm and rotation, where they have a norm.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    branch: Vec<f32>,
    /// The stream between attention and feed-forward.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
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
    /// Takes the weights of `layer`; experts are refused.
    pub fn new(layer: Layer, spec: &Spec) -> Result<LayerBack, ForwardError> {
        let FeedForward::Dense { gate, up, down } = layer.ffn else {
            return Err(ForwardError::NoBackward { arch: spec.arch.clone(), why: "it has experts".into() });
        };
        Ok(LayerBack {
            index: layer.index,
            attn_norm: layer.attn_norm,
            q: Both::new(layer.q),
            k: Both::new(layer.k),
            v: Both::new(layer.v),
            o: Both::new(layer.o),
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            attn_post_norm: layer.attn_post_norm,
            ffn_norm: layer.ffn_norm,
            gate: Both::new(gate),
            up: Both::new(up),
            down: Both::new(down),
            ffn_post_norm: layer.ffn_post_norm,
        })
    }

    /// The sums of squares by weight, in the order of the layer; parts of one fused weight (equal names) are joined.
    pub fn into_squares(self) -> Vec<(String, Vec<f64>)> {
        let mut all: Vec<(String, Vec<f64>)> = Vec::new();
        for Both { linear, squares, .. } in [self.q, self.k, self.v, self.o, self.gate, self.up, self.down] {
            match all.last_mut() {
                Some((name, sums)) if *name == linear.name => sums.extend(squares),
                _ => all.push((linear.name, squares)),
            }
        }
        all
    }

    /// `d`, the gradient at the layer's output, becomes that at its input `x`; both `[tokens, embed]`, whole windows.
    pub fn run(&mut self, pass: &Pass<'_>, x: &[f32], d: &mut [f32], s: &mut Scratch) {
        self.attention(pass, x, s);
        self.feed_forward(pass, s);
        self.feed_forward_back(pass, d, s);
        self.attention_back(pass, x, d, s);
    }

    /// Up to the stream after attention, `s.middle`.
    fn attention(&self, pass: &Pass<'_>, x: &[f32], s: &mut Scratch) {
        let spec = &pass.model.spec;
        let input = normed(x, &self.attn_norm, spec.rms_eps, &mut s.normed);
        forward([(&self.q, &mut s.q), (&self.k, &mut s.k), (&self.v, &mut s.v)], input);
        let rope = self.rope(pass);
        finish(spec, &mut s.q, &mut s.raw_q, &self.q_norm, (self.q.linear.outputs(), pass.length), rope);
        finish(spec, &mut s.k, &mut s.raw_k, &self.k_norm, (self.k.linear.outputs(), pass.length), rope);
        s.attended.resize(s.q.len(), 0.0);
        attend(spec, &s.q, &s.k, &s.v, pass.length, spec.window_of(self.index), &mut s.attended);
        forward([(&self.o, &mut s.branch)], &s.attended);
        s.middle.clear();
        s.middle.extend_from_slice(x);
        let added = match &self.attn_post_norm {
            Some(w) => {
                rms_norm_rows(&s.branch, w, spec.rms_eps, &mut s.part);
                &s.part
            }
            None => &s.branch,
        };
        let n = spec.embed * 16;
        let pieces = s.middle.par_chunks_mut(n).zip(added.par_chunks(n));
        pieces.for_each(|(x, b)| kernels::add_scaled(x, b, spec.residual_scale));
    }

    /// Gate and up, before the activation.
    fn feed_forward(&self, pass: &Pass<'_>, s: &mut Scratch) {
        let input = normed(&s.middle, &self.ffn_norm, pass.model.spec.rms_eps, &mut s.normed);
        forward([(&self.gate, &mut s.gate), (&self.up, &mut s.up)], input);
    }

    fn feed_forward_back(&mut self, pass: &Pass<'_>, d: &mut [f32], s: &mut Scratch) {
        let spec = &pass.model.spec;
        if let Some(w) = &self.ffn_post_norm {
            // only the norm's backward asks for the branch's output; that of attention is done with until then
            s.d_wide.clear();
            s.d_wide.extend_from_slice(&s.gate);
            activate(spec.activation, &mut s.d_wide, &s.up);
            forward([(&self.down, &mut s.part)], &s.d_wide);
            rms_norm_rows_back(&s.part, w, spec.rms_eps, d, &mut s.d_branch);
        } else {
            s.d_branch.clear();
            s.d_branch.extend_from_slice(d);
        }
        scale(&mut s.d_branch, spec.residual_scale);
        back(&mut self.down, &s.d_branch, &mut s.d_wide);
        activate_back(spec.activation, &mut s.gate, &mut s.up, &s.d_wide);
        back(&mut self.gate, &s.gate, &mut s.d_input);
        back(&mut self.up, &s.up, &mut s.part);
        add_all(&mut s.d_input, &s.part);
        through_norm(&s.middle, &self.ffn_norm, spec.rms_eps, &s.d_input, &mut s.part, d);
    }

    fn attention_back(&mut self, pass: &Pass<'_>, x: &[f32], d: &mut [f32], s: &mut Scratch) {
        let spec = &pass.model.spec;
        if let Some(w) = &self.attn_post_norm {
            rms_norm_rows_back(&s.branch, w, spec.rms_eps, d, &mut s.d_branch);
        } else {
            s.d_branch.clear();
            s.d_branch.extend_from_slice(d);
        }
        scale(&mut s.d_branch, spec.residual_scale);
        back(&mut self.o, &s.d_branch, &mut s.d_wide);
        for (d, x) in [(&mut s.d_q, &s.q), (&mut s.d_k, &s.k), (&mut s.d_v, &s.v)] {
            d.resize(x.len(), 0.0);
        }
        let heads = Heads { q: &s.q[..], k: &s.k[..], v: &s.v[..] };
        let d_heads = Heads { q: &mut s.d_q[..], k: &mut s.d_k[..], v: &mut s.d_v[..] };
        attend_back(spec, heads, pass.length, spec.window_of(self.index), &s.d_wide, d_heads);
        let rope = self.rope(pass).map(RopeTable::reversed);
        for (d, raw, norm, width) in [
            (&mut s.d_q, &s.raw_q, &self.q_norm, self.q.linear.outputs()),
            (&mut s.d_k, &s.raw_k, &self.k_norm, self.k.linear.outputs()),
        ] {
            if let Some(rope) = &rope {
                rotate(spec, d, (width, pass.length), rope);
            }
            if let Some(w) = norm {
                rms_norm_rows_back(raw, w, spec.rms_eps, d, &mut s.part);
                d.copy_from_slice(&s.part);
            }
        }
        back(&mut self.q, &s.d_q, &mut s.d_input);
        back(&mut self.k, &s.d_k, &mut s.part);
        add_all(&mut s.d_input, &s.part);
        back(&mut self.v, &s.d_v, &mut s.part);
        add_all(&mut s.d_input, &s.part);
        through_norm(x, &self.attn_norm, spec.rms_eps, &s.d_input, &mut s.part, d);
    }

    fn rope<'a>(&self, pass: &Pass<'a>) -> Option<&'a RopeTable> {
        let spec = &pass.model.spec;
        let table = if spec.window_of(self.index).is_some() { pass.window_rope } else { pass.rope };
        spec.has_rope(self.index).then_some(table)
    }
}

/// `out = x Wᵀ + b` of linears of one input.
fn forward<'a, const N: usize>(mut all: [(&'a Both, &'a mut Vec<f32>); N], x: &[f32]) {
    for (l, out) in &mut all {
        out.resize(x.len() / l.linear.inputs * l.linear.outputs(), 0.0);
    }
    products(all.iter_mut().map(|(l, out)| Product { a: x, b: &l.linear.weight, k: l.linear.inputs, out }));
    for (l, out) in all {
        if let Some(bias) = &l.linear.bias {
            out.par_chunks_mut(bias.len()).for_each(|row| kernels::add(row, bias));
        }
    }
}

/// Adds the squares of `dy` to the linear's sums; `dx = dy W`.
fn back(l: &mut Both, dy: &[f32], dx: &mut Vec<f32>) {
    let outputs = l.linear.outputs();
    add_squares(&mut l.squares, dy);
    dx.resize(dy.len() / outputs * l.linear.inputs, 0.0);
    product(dy, &l.transposed, outputs, dx);
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

/// RMSNorm of every run of `weight.len()` values.
fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let n = weight.len();
    out.par_chunks_mut(n * 16).zip(x.par_chunks(n * 16)).for_each(|(out, x)| {
        for (o, x) in out.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            kernels::rms_norm(x, weight, eps, o);
        }
    });
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

fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    const PIECE: usize = 1 << 14;
    gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE)).for_each(|(g, u)| match activation {
        Activation::Silu => kernels::silu_mul(g, u),
        Activation::Gelu => kernels::gelu_mul(g, u),
    });
}

fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.par_chunks_mut(1 << 14).for_each(|x| kernels::scale(x, factor));
    }
}
