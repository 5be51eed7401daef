//! Causal attention of grouped queries over whole windows (Vaswani et al. 2017; GQA: Ainslie et al. 2023).
//!
//! One task is a block of queries of the heads that share a key; it looks at the keys up to its last query only.

use rayon::prelude::*;

use super::kernels;
use super::spec::Spec;
use crate::linalg::{View, ViewMut, times};

/// Queries of a task, of each head: a multiple of the microkernels' heights.
const BLOCK: usize = 96;

/// `out[t, h] = softmax(scale · q kᵀ) v` for every window of `length` tokens.
///
/// `q` and `out` are `[tokens, heads x head_dim]`, `k` and `v` `[tokens, kv_heads x head_dim]`. `window`: how many tokens a
/// query sees, itself included.
pub fn attend(spec: &Spec, q: &[f32], k: &[f32], v: &[f32], length: usize, window: Option<usize>, out: &mut [f32]) {
    let (hd, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
    let (tokens, group) = (q.len() / (heads * hd), heads / kv_heads);
    let k = View::new(k, tokens, kv_heads * hd);
    let v = View::new(v, tokens, kv_heads * hd);
    let mut tasks = Vec::new();
    let mut rest = ViewMut::new(out, tokens, heads * hd);
    for start in (0..tokens).step_by(length) {
        for first in (0..length).step_by(BLOCK) {
            let rows = BLOCK.min(length - first);
            let (mut band, below) = rest.split_rows(rows);
            rest = below;
            for kv in 0..kv_heads {
                let (block, right) = band.split_columns(group * hd);
                band = right;
                tasks.push((start, first, kv, block));
            }
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |s, (start, first, kv, mut block)| {
        let rows = block.rows();
        // the first key that the first query of the block sees
        let from = window.map_or(0, |w| (first + 1).saturating_sub(w));
        let keys = first + rows - from;
        // the heads of a group share keys: their queries are stacked
        s.queries.resize(group * rows * hd, 0.0);
        for (head, queries) in s.queries.chunks_exact_mut(rows * hd).enumerate() {
            for (i, row) in queries.chunks_exact_mut(hd).enumerate() {
                let at = (start + first + i) * heads * hd + (kv * group + head) * hd;
                row.copy_from_slice(&q[at..at + hd]);
            }
        }
        s.scores.resize(group * rows * keys, 0.0);
        s.mixed.resize(group * rows * hd, 0.0);
        let k = k.part((start + from, kv * hd), keys, hd);
        let v = v.part((start + from, kv * hd), keys, hd);
        let queries = View::new(&s.queries, group * rows, hd);
        let scores = ViewMut::new(&mut s.scores, group * rows, keys);
        times(scores, queries, k.transpose(), spec.attention_scale);
        for (i, row) in s.scores.chunks_exact_mut(keys).enumerate() {
            let query = first + i % rows;
            let end = query + 1 - from;
            let begin = window.map_or(0, |w| (query + 1).saturating_sub(w).saturating_sub(from));
            if let Some(cap) = spec.attention_soft_cap {
                kernels::soft_cap(&mut row[begin..end], cap);
            }
            kernels::softmax(&mut row[begin..end]);
            row[..begin].fill(0.0);
            row[end..].fill(0.0);
        }
        let scores = View::new(&s.scores, group * rows, keys);
        times(ViewMut::new(&mut s.mixed, group * rows, hd), scores, v, 1.0);
        let mixed = View::new(&s.mixed, group * rows, hd);
        for head in 0..group {
            block.set_columns(head * hd, mixed.part((head * rows, 0), rows, hd));
        }
    });
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// `[group x rows, head_dim]`, as `mixed`.
    queries: Vec<f32>,
    /// `[group x rows, keys]`.
    scores: Vec<f32>,
    mixed: Vec<f32>,
}

/// Floating-point operations of [`attend`] for one window of `length` tokens, counting what causality needs.
pub fn flops(spec: &Spec, length: usize) -> u64 {
    // q·k and p·v, two operations each, over length (length + 1) / 2 pairs
    (4 * spec.heads * spec.head_dim) as u64 * (length * (length + 1) / 2) as u64
}
