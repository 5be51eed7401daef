//! Backward of [`crate::forward::attention::attend`]: causal attention of grouped queries over whole windows.
//!
//! With S = scale · Q Kᵀ, P = softmax(S) and O = P V: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(P ∘ dP)), dQ = scale · dS K,
//! dK = scale · dSᵀ Q (as in FlashAttention, Dao et al. 2022, appendix B.2). P is computed again, block by block of queries.
//! One task is the heads of one window that share a key, so that the sums over queries in dK and dV have one order.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::kernels::{soft_cap_back, softmax_back};
use crate::forward::kernels;
use crate::forward::spec::Spec;

/// Queries of a step, of each head.
const BLOCK: usize = 96;

/// What attention is given, `[tokens, heads x head_dim]` or `[tokens, kv_heads x head_dim]`: values, or their gradients.
pub struct Heads<T> {
    pub q: T,
    pub k: T,
    pub v: T,
}

/// Gradients of `x` (the rotated and normed heads) from `d_out`, that of the output, `[tokens, heads x head_dim]`.
///
/// Windows are `length` tokens; `window`: how many tokens a query sees, itself included.
pub fn attend_back(
    spec: &Spec,
    x: Heads<&[f32]>,
    length: usize,
    window: Option<usize>,
    d_out: &[f32],
    d: Heads<&mut [f32]>,
) {
    let (hd, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
    let (tokens, group) = (x.q.len() / (heads * hd), heads / kv_heads);
    let (wide, narrow) = (heads * hd, kv_heads * hd);
    let of = |x, columns| MatRef::from_row_major_slice(x, tokens, columns);
    let (q, k, v, d_out) = (of(x.q, wide), of(x.k, narrow), of(x.v, narrow), of(d_out, wide));
    let mut tasks = Vec::new();
    let mut rest = Heads {
        q: MatMut::from_row_major_slice_mut(d.q, tokens, wide),
        k: MatMut::from_row_major_slice_mut(d.k, tokens, narrow),
        v: MatMut::from_row_major_slice_mut(d.v, tokens, narrow),
    };
    for start in (0..tokens).step_by(length) {
        let rows = length.min(tokens - start);
        let (mut dq, below_q) = rest.q.split_at_row_mut(rows);
        let (mut dk, below_k) = rest.k.split_at_row_mut(rows);
        let (mut dv, below_v) = rest.v.split_at_row_mut(rows);
        rest = Heads { q: below_q, k: below_k, v: below_v };
        for kv in 0..kv_heads {
            let (q0, right_q) = dq.split_at_col_mut(group * hd);
            let (k0, right_k) = dk.split_at_col_mut(hd);
            let (v0, right_v) = dv.split_at_col_mut(hd);
            (dq, dk, dv) = (right_q, right_k, right_v);
            tasks.push((start, kv, Heads { q: q0, k: k0, v: v0 }));
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each_init(Scratch::default, |s, (start, kv, mut d)| {
        let rows = d.q.nrows();
        let (q, d_out) = (
            q.submatrix(start, kv * group * hd, rows, group * hd),
            d_out.submatrix(start, kv * group * hd, rows, group * hd),
        );
        let (k, v) = (k.submatrix(start, kv * hd, rows, hd), v.submatrix(start, kv * hd, rows, hd));
        d.k.fill(0.0);
        d.v.fill(0.0);
        for head in 0..group {
            let (q, d_out) = (q.subcols(head * hd, hd), d_out.subcols(head * hd, hd));
            for first in (0..rows).step_by(BLOCK) {
                let n = BLOCK.min(rows - first);
                // the keys that the block sees
                let from = window.map_or(0, |w| (first + 1).saturating_sub(w));
                let keys = first + n - from;
                let (q, d_out) = (q.subrows(first, n), d_out.subrows(first, n));
                let (k, v) = (k.subrows(from, keys), v.subrows(from, keys));
                s.p.resize(n * keys, 0.0);
                s.d.resize(n * keys, 0.0);
                times(MatMut::from_row_major_slice_mut(&mut s.p, n, keys), q, k.transpose(), spec.attention_scale);
                times(MatMut::from_row_major_slice_mut(&mut s.d, n, keys), d_out, v.transpose(), 1.0);
                for (i, (p, d)) in s.p.chunks_exact_mut(keys).zip(s.d.chunks_exact_mut(keys)).enumerate() {
                    let end = first + i + 1 - from;
                    let begin = window.map_or(0, |w| (first + i + 1).saturating_sub(w).saturating_sub(from));
                    let seen = begin..end;
                    if let Some(cap) = spec.attention_soft_cap {
                        kernels::soft_cap(&mut p[seen.clone()], cap);
                        s.capped.clear();
                        s.capped.extend_from_slice(&p[seen.clone()]);
                    }
                    kernels::softmax(&mut p[seen.clone()]);
                    softmax_back(&p[seen.clone()], &mut d[seen.clone()]);
                    if let Some(cap) = spec.attention_soft_cap {
                        soft_cap_back(&s.capped, cap, &mut d[seen]);
                    }
                    for row in [p, d] {
                        row[..begin].fill(0.0);
                        row[end..].fill(0.0);
                    }
                }
                let p = MatRef::from_row_major_slice(&s.p, n, keys);
                let ds = MatRef::from_row_major_slice(&s.d, n, keys);
                times(d.q.as_mut().submatrix_mut(first, head * hd, n, hd), ds, k, spec.attention_scale);
                add_times(d.k.as_mut().subrows_mut(from, keys), ds.transpose(), q, spec.attention_scale);
                add_times(d.v.as_mut().subrows_mut(from, keys), p.transpose(), d_out, 1.0);
            }
        }
    });
}

/// `out = alpha · a · b` on this thread.
#[inline(never)]
fn times(out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, alpha: f32) {
    matmul(out, Accum::Replace, a, b, alpha, Par::Seq);
}

/// `out += alpha · a · b` on this thread, through a buffer: see [`crate::linalg::add_times`].
fn add_times(mut out: MatMut<'_, f32>, a: MatRef<'_, f32>, b: MatRef<'_, f32>, alpha: f32) {
    let (m, n) = (out.nrows(), out.ncols());
    let mut product = vec![0f32; m * n];
    times(MatMut::from_row_major_slice_mut(&mut product, m, n), a, b, alpha);
    out += MatRef::from_row_major_slice(&product, m, n);
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// Probabilities of a block, `[queries, keys]`.
    p: Vec<f32>,
    /// Their gradients, then those of the scores.
    d: Vec<f32>,
    capped: Vec<f32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::attention::attend;
    use crate::gguf::{Metadata, Value};

    fn spec(heads: u32, kv_heads: u32, head_dim: u32) -> Spec {
        let mut m: Metadata = vec![("general.architecture".into(), Value::from("llama"))];
        for (key, v) in [
            ("block_count", 1),
            ("embedding_length", heads * head_dim),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
            ("context_length", 512),
        ] {
            m.push((format!("llama.{key}"), Value::U32(v)));
        }
        m.push(("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)));
        Spec::read(&m).unwrap()
    }

    fn wave(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i + seed) * 7919 % 1013) as f32 / 506.5 - 1.0).collect()
    }

    /// Slopes along a few directions and single values, by central differences.
    fn check(spec: &Spec, length: usize, windows: usize, window: Option<usize>) {
        let tokens = length * windows;
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let x = [wave(tokens * wide, 1), wave(tokens * narrow, 77), wave(tokens * narrow, 401)];
        let d_out = wave(tokens * wide, 555);
        let mut d = [vec![f32::NAN; tokens * wide], vec![f32::NAN; tokens * narrow], vec![f32::NAN; tokens * narrow]];
        let [dq, dk, dv] = &mut d;
        attend_back(
            spec,
            Heads { q: &x[0], k: &x[1], v: &x[2] },
            length,
            window,
            &d_out,
            Heads { q: dq, k: dk, v: dv },
        );
        let loss = |x: &[Vec<f32>; 3]| -> f64 {
            let mut out = vec![0.0; tokens * wide];
            attend(spec, &x[0], &x[1], &x[2], length, window, &mut out);
            out.iter().zip(&d_out).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let mut random = 12345usize;
        for (part, d) in d.iter().enumerate() {
            let largest = d.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for _ in 0..24 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (random >> 33) % d.len();
                let moved = |by: f32| {
                    let mut x = x.clone();
                    x[part][at] += by;
                    loss(&x)
                };
                let h = 1.0 / 64.0;
                let slope = (8.0 * (moved(h) - moved(-h)) - (moved(2.0 * h) - moved(-2.0 * h))) / (12.0 * f64::from(h));
                let error = (slope - f64::from(d[at])).abs();
                assert!(error < 1e-3 * f64::from(largest), "part {part} at {at}: {slope} {}", d[at]);
            }
        }
    }

    #[test]
    fn agrees_with_finite_differences() {
        check(&spec(4, 2, 6), 7, 2, None);
        check(&spec(3, 3, 8), 9, 1, Some(4));
        // more than one block of queries
        check(&spec(2, 1, 4), 130, 1, None);
        check(&spec(2, 1, 4), 130, 2, Some(20));
        let mut capped = spec(2, 1, 4);
        capped.attention_soft_cap = Some(0.7);
        check(&capped, 11, 1, None);
    }
}
