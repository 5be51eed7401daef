//! Attention of one new token of each of many sequences over the keys and values of those before it.
//!
//! All sequences are equally long. Every step reads the whole cache once, which is what it costs; a product library has
//! nothing to win at a few queries per head, so the two loops are plain ones, the same bits on every instruction set.

use rayon::prelude::*;

use super::kernels::{self, vectorized};
use super::spec::Spec;

/// Positions whose keys lie interleaved: the lanes of a sum of scores.
const LANES: usize = 32;

/// Keys and values of one layer, of a batch of sequences.
pub struct KvCache {
    /// `[sequences, kv_heads, length / 32, head_dim, 32]`.
    keys: Vec<f32>,
    /// `[sequences, kv_heads, length, head_dim]`.
    values: Vec<f32>,
    /// Positions, a multiple of [`LANES`].
    length: usize,
}

impl KvCache {
    /// Room for `length` positions.
    pub fn new(spec: &Spec, sequences: usize, length: usize) -> KvCache {
        let length = length.next_multiple_of(LANES);
        let n = sequences * spec.kv_heads * spec.head_dim * length;
        KvCache { keys: vec![0.0; n], values: vec![0.0; n], length }
    }

    /// Bytes of one sequence.
    pub fn bytes(spec: &Spec, length: usize) -> u64 {
        (8 * spec.kv_heads * spec.head_dim * length.next_multiple_of(LANES)) as u64
    }

    /// Keeps `k` and `v` (`[sequences, kv_heads x head_dim]`) as those of `position`; `out = softmax(scale · q kᵀ) v` over the
    /// positions up to it. `q` and `out` are `[sequences, heads x head_dim]`; `window` as in [`super::attention::attend`].
    pub fn attend(
        &mut self,
        spec: &Spec,
        position: usize,
        window: Option<usize>,
        (q, k, v): (&[f32], &[f32], &[f32]),
        out: &mut [f32],
    ) {
        let (hd, kv_heads, group) = (spec.head_dim, spec.kv_heads, spec.heads / spec.kv_heads);
        let one = hd * self.length;
        let tasks = self.keys.par_chunks_mut(one).zip(self.values.par_chunks_mut(one));
        let rows = (q.par_chunks(group * hd), k.par_chunks(hd), v.par_chunks(hd), out.par_chunks_mut(group * hd));
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        // whole blocks of keys from the one that holds the first
        let from = first / LANES * LANES;
        tasks.zip(rows).with_min_len(kv_heads).for_each_init(Vec::new, |scores: &mut Vec<f32>, task| {
            let ((keys, values), (q, k, v, out)) = task;
            let block = position / LANES * LANES * hd;
            for (lane, k) in keys[block..block + LANES * hd].chunks_exact_mut(LANES).zip(k) {
                lane[position % LANES] = *k;
            }
            values[position * hd..(position + 1) * hd].copy_from_slice(v);
            let keys = &keys[from * hd..block + LANES * hd];
            scores.resize(keys.len() / hd, 0.0);
            for (q, out) in q.chunks_exact(hd).zip(out.chunks_exact_mut(hd)) {
                score(q, keys, spec.attention_scale, scores);
                let seen = &mut scores[first - from..position + 1 - from];
                if let Some(cap) = spec.attention_soft_cap {
                    kernels::soft_cap(seen, cap);
                }
                kernels::softmax(seen);
                mix(seen, &values[first * hd..(position + 1) * hd], out);
            }
        });
    }
}

vectorized! {
    /// `out = scale · q · key` for keys in blocks `[head_dim, 32]`.
    pub fn score(q: &[f32], keys: &[f32], scale: f32, out: &mut [f32]) {
        for (block, out) in keys.chunks_exact(q.len() * LANES).zip(out.as_chunks_mut::<LANES>().0) {
            let mut sums = [0.0f32; LANES];
            for (q, keys) in q.iter().zip(block.as_chunks::<LANES>().0) {
                for (s, k) in sums.iter_mut().zip(keys) {
                    *s += q * k;
                }
            }
            for (o, s) in out.iter_mut().zip(sums) {
                *o = s * scale;
            }
        }
    }
}

vectorized! {
    /// `out = Σ p[i] values[i]`, rows of `values` as long as `out`.
    pub fn mix(p: &[f32], values: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        let n = out.len();
        let (four, rest) = p.as_chunks::<4>();
        let (rows, tail) = values.split_at(four.len() * 4 * n);
        for (p, rows) in four.iter().zip(rows.chunks_exact(4 * n)) {
            let (a, b) = rows.split_at(2 * n);
            let ((a, b), (c, d)) = (a.split_at(n), b.split_at(n));
            for ((((o, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *o += (p[0] * a + p[1] * b) + (p[2] * c + p[3] * d);
            }
        }
        for (p, row) in rest.iter().zip(tail.chunks_exact(n)) {
            for (o, v) in out.iter_mut().zip(row) {
                *o += p * v;
            }
        }
    }
}
