//! Causal attention of grouped queries over whole windows (Vaswani et al. 2017; GQA: Ainslie et al. 2023).
//!
//! One task is a block of queries of one head; it looks at the keys up to its last query only.

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::gemm::times;
use super::kernels;
use super::spec::Spec;

/// Queries of a task.
const BLOCK: usize = 128;

/// `out[t, h] = softmax(scale · q kᵀ) v` for every window of `length` tokens.
///
/// `q` and `out` are `[tokens, heads x head_dim]`, `k` and `v` `[tokens, kv_heads x head_dim]`. `window`: how many tokens a
/// query sees, itself included.
pub fn attend(spec: &Spec, q: &[f32], k: &[f32], v: &[f32], length: usize, window: Option<usize>, out: &mut [f32]) {
    let (hd, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
    let tokens = q.len() / (heads * hd);
    let q = MatRef::from_row_major_slice(q, tokens, heads * hd);
    let k = MatRef::from_row_major_slice(k, tokens, kv_heads * hd);
    let v = MatRef::from_row_major_slice(v, tokens, kv_heads * hd);
    let mut tasks = Vec::new();
    let mut rest = MatMut::from_row_major_slice_mut(out, tokens, heads * hd);
    for start in (0..tokens).step_by(length) {
        for first in (0..length).step_by(BLOCK) {
            let rows = BLOCK.min(length - first);
            let (mut band, below) = rest.split_at_row_mut(rows);
            rest = below;
            for head in 0..heads {
                let (block, right) = band.split_at_col_mut(hd);
                band = right;
                tasks.push((start, first, head, block));
            }
        }
    }
    tasks.into_par_iter().for_each_init(Vec::new, |scores: &mut Vec<f32>, (start, first, head, block)| {
        let rows = block.nrows();
        let kv = head / (heads / kv_heads) * hd;
        // the first key that the first query of the block sees
        let from = window.map_or(0, |w| (first + 1).saturating_sub(w));
        let keys = first + rows - from;
        scores.resize(rows * keys, 0.0);
        let q = q.submatrix(start + first, head * hd, rows, hd);
        let k = k.submatrix(start + from, kv, keys, hd);
        let v = v.submatrix(start + from, kv, keys, hd);
        times(MatMut::from_row_major_slice_mut(scores, rows, keys), q, k.transpose(), spec.attention_scale);
        for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
            let end = first + i + 1 - from;
            let begin = window.map_or(0, |w| (first + i + 1).saturating_sub(w).saturating_sub(from));
            if let Some(cap) = spec.attention_soft_cap {
                kernels::soft_cap(&mut row[begin..end], cap);
            }
            kernels::softmax(&mut row[begin..end]);
            row[..begin].fill(0.0);
            row[end..].fill(0.0);
        }
        times(block, MatRef::from_row_major_slice(scores, rows, keys), v, 1.0);
    });
}

/// Floating-point operations of [`attend`] for one window of `length` tokens, counting what causality needs.
pub fn flops(spec: &Spec, length: usize) -> u64 {
    // q·k and p·v, two operations each, over length (length + 1) / 2 pairs
    (4 * spec.heads * spec.head_dim) as u64 * (length * (length + 1) / 2) as u64
}
