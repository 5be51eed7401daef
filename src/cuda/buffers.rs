//! Buffers of passes on the device, for a batch of windows, and how much of its memory all takes.

use super::DeviceError;
use super::device::{Buffer, Cuda};
use crate::forward::Model;

/// Positions whose logits are on the device at a time.
pub const ROWS: usize = 1024;

/// What buffers are measured by: tokens of a batch and of a window, widths.
#[derive(Clone, Copy)]
pub struct Sizes {
    tokens: usize,
    length: usize,
    embed: usize,
    heads: usize,
    head_dim: usize,
    q: usize,
    kv: usize,
    ff: usize,
    vocab: usize,
}

impl Sizes {
    /// For `tokens` tokens in windows of `length`.
    pub fn of(model: &Model<'_>, tokens: usize, length: usize) -> Sizes {
        let s = &model.spec;
        let (embed, heads, head_dim, vocab) = (s.embed, s.heads, s.head_dim, model.vocab);
        let (q, kv, ff) = (heads * head_dim, s.kv_heads * head_dim, model.feed_forward());
        Sizes { tokens, length, embed, heads, head_dim, q, kv, ff, vocab }
    }

    /// Values of the largest weight of a layer.
    fn widest(&self) -> usize {
        self.embed * self.q.max(self.ff)
    }
}

/// Bytes of the device that both models and a step take, besides what the step moves; `again`: with one layer's activations at
/// a time.
pub fn memory(model: &Model<'_>, s: Sizes, again: bool) -> u64 {
    let kept = s.tokens * (3 * s.q + 3 * s.kv + s.length * s.heads + s.embed + 2 * s.ff);
    let wide = s.q.max(s.ff) + s.q + 2 * s.kv + s.ff + s.length * s.heads;
    let scratch = s.tokens * (6 * s.embed + s.embed.max(s.q) + wide) + 2 * ROWS * s.vocab + s.widest();
    let layers = model.spec.layers;
    let kept = kept * if again { 2 } else { layers + 1 } + layers * s.tokens * s.embed;
    let floats = kept + scratch + 4 * s.vocab * s.embed;
    (256 << 20) + 2 * layers as u64 * model.layer_weights() + 4 * floats as u64
}

/// What a layer's forward pass leaves to its backward pass, besides its output.
pub struct Kept {
    pub raw_q: Buffer,
    pub raw_k: Buffer,
    pub q: Buffer,
    pub k: Buffer,
    pub v: Buffer,
    pub p: Buffer,
    pub attended: Buffer,
    pub middle: Buffer,
    pub gate: Buffer,
    pub up: Buffer,
}

impl Kept {
    pub fn new(gpu: &Cuda, s: Sizes) -> Result<Kept, DeviceError> {
        let Sizes { tokens, length, embed: n, q, kv, ff, .. } = s;
        let z = |n: usize| gpu.zeros(n);
        Ok(Kept {
            raw_q: z(tokens * q)?,
            raw_k: z(tokens * kv)?,
            q: z(tokens * q)?,
            k: z(tokens * kv)?,
            v: z(tokens * kv)?,
            p: z(tokens * length * s.heads)?,
            attended: z(tokens * q)?,
            middle: z(tokens * n)?,
            gate: z(tokens * ff)?,
            up: z(tokens * ff)?,
        })
    }
}

/// Buffers that are used again and again.
pub struct Scratch {
    pub tokens: Buffer,
    pub x: Buffer,
    pub normed: Buffer,
    pub hidden: Buffer,
    pub branch: Buffer,
    pub d: Buffer,
    pub d_branch: Buffer,
    pub d_wide: Buffer,
    pub d_q: Buffer,
    pub d_k: Buffer,
    pub d_v: Buffer,
    pub d_input: Buffer,
    pub d_p: Buffer,
    pub inverse: Buffer,
    pub teacher: Buffer,
    pub logits: Buffer,
    pub wanted: Buffer,
    pub sums: Buffer,
    /// Of a weight, and of a norm's.
    pub gradient: Buffer,
    pub norm_gradient: Buffer,
}

impl Scratch {
    pub fn new(gpu: &Cuda, s: Sizes) -> Result<Scratch, DeviceError> {
        let Sizes { tokens, length, embed: n, q, kv, ff, vocab, .. } = s;
        let z = |n: usize| gpu.zeros(n);
        Ok(Scratch {
            tokens: z(tokens)?,
            x: z(tokens * n)?,
            normed: z(tokens * n)?,
            hidden: z(tokens * ff)?,
            branch: z(tokens * n)?,
            d: z(tokens * n)?,
            d_branch: z(tokens * n)?,
            d_wide: z(tokens * q.max(ff))?,
            d_q: z(tokens * q)?,
            d_k: z(tokens * kv)?,
            d_v: z(tokens * kv)?,
            d_input: z(tokens * n.max(q))?,
            d_p: z(tokens * length * s.heads)?,
            inverse: z(tokens * s.heads)?,
            teacher: z(tokens * n)?,
            logits: z(ROWS * vocab)?,
            wanted: z(ROWS * vocab)?,
            sums: z(2 * tokens)?,
            gradient: z(s.widest())?,
            norm_gradient: z(n.max(s.head_dim))?,
        })
    }
}
