//! What the transforms of a model do to each tensor: `W' = B_out W B_in⁻¹` as operations on columns and on rows, in the GGUF
//! layout.
//!
//! `y = x Wᵀ`. Readers of the stream get `W diag(γ) R diag(S)`, writers `Rᵀ W`; v gets `R_gᵀ diag(S)⁻¹ W`, o `W diag(S) R_g` in the
//! columns of each head; k gets `diag(S) W`, q `diag(S)⁻¹ W` with equal S in a rotary pair; up gets `diag(S)⁻¹ W`, down
//! `W diag(S)`. γ are the weights of the norm before a reader: folded where the stream is rotated, left where it is not.

use super::anatomy::{Anatomy, Pair};
use super::product::add_product;
use super::set::Transforms;

/// A rotation of columns.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rotation {
    None,
    /// All columns by `R_res`.
    Stream,
    /// The columns of every query head by the `R_ov` of its KV head.
    Heads,
}

/// The weights of norms that a rotation of the stream folds into what reads them.
#[derive(Clone, Debug, Default)]
pub(super) struct Gammas {
    /// By layer; `None`: nothing to fold.
    pub attention: Vec<Option<Vec<f64>>>,
    pub feed_forward: Vec<Option<Vec<f64>>>,
    pub output: Option<Vec<f64>>,
}

/// What happens to one tensor.
#[derive(Clone, Debug)]
pub(super) struct Ops {
    pub layer: usize,
    /// Of columns, before the rotation: as many as there are, or those of every expert.
    before: Option<Vec<f64>>,
    rotation: Rotation,
    /// Of columns, after it.
    after: Option<Vec<f64>>,
    /// Of rows, over all experts; before rotations of rows.
    pub rows: Option<Vec<f64>>,
    /// The rows from this one on are heads of v, rotated by `R_ovᵀ`.
    pub heads: Option<u64>,
    /// All rows are rotated by `R_resᵀ`.
    pub stream: bool,
}

impl Ops {
    fn new(layer: usize) -> Ops {
        let (before, after, rows, heads) = (None, None, None, None);
        Ops { layer, before, rotation: Rotation::None, after, rows, heads, stream: false }
    }

    /// The identity.
    pub fn none() -> Ops {
        Ops::new(0)
    }

    /// True if nothing happens.
    pub fn is_identity(&self) -> bool {
        self.before.is_none() && self.after.is_none() && self.rotation == Rotation::None && !self.moves_rows()
    }

    fn moves_rows(&self) -> bool {
        self.rows.is_some() || self.heads.is_some() || self.stream
    }

    fn reader(mut self, t: &Transforms, gamma: &Option<Vec<f64>>, scales: Option<&[f64]>) -> Ops {
        if t.r_res.is_some() {
            (self.before, self.rotation) = (gamma.clone(), Rotation::Stream);
        }
        self.after = scales.map(<[f64]>::to_vec);
        self
    }

    /// Of the weight or bias `name`: all that is done to its rows, and for weights to its columns. `rows`: of one matrix.
    pub fn of(name: &str, rows: usize, m: &Anatomy, t: &Transforms, gammas: &Gammas) -> Ops {
        let (layer, part) = match name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((layer, part)) => (layer.parse().unwrap_or(usize::MAX), part),
            None => (0, name),
        };
        let own = Ops::new(layer);
        if layer >= m.spec.layers {
            return own;
        }
        let (stem, is_weight) = match (part.strip_suffix(".weight"), part.strip_suffix(".bias")) {
            (Some(stem), _) => (stem, true),
            (_, Some(stem)) => (stem, false),
            _ => return own,
        };
        let mut ops = own.clone();
        ops.rows = row_scales(stem, rows, m, t, layer);
        ops.heads = match stem {
            "attn_v" => Some(0),
            "attn_qkv" => Some(((m.spec.heads + m.spec.kv_heads) * m.spec.head_dim) as u64),
            _ => None,
        }
        .filter(|_| t.layers[layer].r_ov.is_some());
        ops.stream = t.r_res.is_some() && matches!(stem, "attn_output" | "ffn_down" | "ffn_down_exps");
        if !is_weight {
            return ops;
        }
        let l = &t.layers[layer];
        match stem {
            "token_embd" if t.r_res.is_some() => Ops { rotation: Rotation::Stream, ..own },
            "output" => own.reader(t, &gammas.output, None),
            "attn_q" | "attn_k" | "attn_v" | "attn_qkv" => {
                ops.reader(t, gammas.attention.get(layer).unwrap_or(&None), l.s_attn.as_deref())
            }
            "ffn_gate" | "ffn_up" | "ffn_gate_inp" | "ffn_gate_exps" | "ffn_up_exps" => {
                ops.reader(t, gammas.feed_forward.get(layer).unwrap_or(&None), l.s_ffn.as_deref())
            }
            "attn_output" => {
                ops.before = l.s_ov.as_ref().map(|s| expand(s, m));
                if l.r_ov.is_some() {
                    ops.rotation = Rotation::Heads;
                }
                ops
            }
            "ffn_down" | "ffn_down_exps" => Ops { before: l.s_ud.clone(), ..ops },
            _ => ops,
        }
    }

    /// Columns of `x` \[rows, columns\], rows of the matrix of expert `expert`.
    pub fn columns(&self, x: &mut Vec<f64>, columns: usize, expert: usize, m: &Anatomy, t: &Transforms) {
        if columns == 0 {
            return;
        }
        scale_columns(x, columns, &self.before, expert);
        let rows = x.len() / columns;
        match self.rotation {
            Rotation::None => {}
            Rotation::Stream => {
                let mut out = vec![0.0; x.len()];
                let r = t.r_res.as_deref().expect("ops of these transforms");
                add_product(&mut out, x, (columns, 1), r, (rows, columns, columns));
                *x = out;
            }
            Rotation::Heads => {
                let (n, group) = (m.spec.head_dim, m.spec.heads / m.spec.kv_heads);
                let r = t.layers[self.layer].r_ov.as_deref().expect("ops of these transforms");
                let mut out = vec![0.0; rows * n];
                for head in 0..columns / n {
                    let r = &r[head / group * n * n..][..n * n];
                    out.fill(0.0);
                    add_product(&mut out, &x[head * n..], (columns, 1), r, (rows, n, n));
                    for (row, out) in x.chunks_exact_mut(columns).zip(out.chunks_exact(n)) {
                        row[head * n..][..n].copy_from_slice(out);
                    }
                }
            }
        }
        scale_columns(x, columns, &self.after, expert);
    }

    /// The same for the map of the input: `x' = x A`, `W' = W A⁻ᵀ`. Scales are inverted, rotations are not.
    fn inputs(&self) -> Option<Ops> {
        let invert = |s: &Option<Vec<f64>>| match s {
            Some(s) if s.contains(&0.0) => None,
            s => Some(s.as_ref().map(|s| s.iter().map(|v| 1.0 / v).collect())),
        };
        Some(Ops {
            before: invert(&self.before)?,
            after: invert(&self.after)?,
            rows: None,
            heads: None,
            stream: false,
            ..*self
        })
    }
}

fn scale_columns(x: &mut [f64], columns: usize, scales: &Option<Vec<f64>>, expert: usize) {
    let Some(s) = scales else { return };
    let s = if s.len() > columns { &s[expert * columns..][..columns] } else { &s[..] };
    for row in x.chunks_exact_mut(columns) {
        row.iter_mut().zip(s).for_each(|(x, s)| *x *= s);
    }
}

/// Values by KV head and element as values by query head and element.
fn expand(s: &[f64], m: &Anatomy) -> Vec<f64> {
    let (n, group) = (m.spec.head_dim, m.spec.heads / m.spec.kv_heads);
    (0..m.spec.heads * n).map(|c| s[c / n / group * n + c % n]).collect()
}

/// What the rows of a weight (elements of a bias) are multiplied with. `rows`: of one matrix.
fn row_scales(stem: &str, rows: usize, m: &Anatomy, t: &Transforms, layer: usize) -> Option<Vec<f64>> {
    let get = |pair: Pair| t.get(pair, layer);
    let invert = |s: &[f64]| s.iter().map(|v| 1.0 / v).collect::<Vec<f64>>();
    let heads = |count: usize, inverse: bool| {
        let (n, pairs) = (m.spec.head_dim, m.spec.head_dim / 2);
        let s = get(Pair::QueryKey)?;
        let group = count / m.spec.kv_heads;
        let value = |r: usize| s[r / n / group * pairs + m.rotary_pair(r % n)];
        Some((0..count * n).map(|r| if inverse { 1.0 / value(r) } else { value(r) }).collect::<Vec<f64>>())
    };
    match stem {
        "attn_q" => heads(m.spec.heads, true),
        "attn_k" => heads(m.spec.kv_heads, false),
        "attn_v" => get(Pair::ValueScales).map(invert),
        "attn_qkv" => {
            let ones = |n: usize| vec![1.0; n * m.spec.head_dim];
            let v = get(Pair::ValueScales).map(invert);
            let (q, k) = (heads(m.spec.heads, true), heads(m.spec.kv_heads, false));
            if v.is_none() && q.is_none() {
                return None;
            }
            let parts = [
                q.unwrap_or_else(|| ones(m.spec.heads)),
                k.unwrap_or_else(|| ones(m.spec.kv_heads)),
                v.unwrap_or_else(|| ones(m.spec.kv_heads)),
            ];
            Some(parts.concat())
        }
        "ffn_up" | "ffn_up_exps" => {
            let s = invert(get(Pair::UpDown)?);
            // a gate in the same tensor stands before it
            let gate = if stem == "ffn_up" { rows.saturating_sub(s.len()) } else { 0 };
            Some([vec![1.0; gate], s].concat())
        }
        _ => None,
    }
}

/// The map of a linear's input under transforms, `x' = x A`: what is known of inputs is carried over, not collected again.
#[derive(Debug)]
pub struct InputMap<'a> {
    pub(super) ops: Ops,
    pub(super) model: &'a Anatomy,
    pub(super) transforms: &'a Transforms,
}

impl<'a> InputMap<'a> {
    pub(super) fn new(ops: &Ops, model: &'a Anatomy, transforms: &'a Transforms) -> Option<InputMap<'a>> {
        Some(InputMap { ops: ops.inputs()?, model, transforms })
    }

    /// True if no column is mixed with another.
    pub fn is_diagonal(&self) -> bool {
        self.ops.rotation == Rotation::None
    }

    /// Rows of inputs `[tokens, columns]` (of expert `expert`).
    pub fn inputs(&self, x: &mut Vec<f64>, columns: usize, expert: usize) {
        self.ops.columns(x, columns, expert, self.model, self.transforms);
    }

    /// Second moments `[columns, columns]`: `H' = Aᵀ H A`.
    pub fn hessian(&self, h: &mut Vec<f64>, columns: usize, expert: usize) {
        for _ in 0..2 {
            self.inputs(h, columns, expert);
            for i in 0..columns {
                for j in 0..i {
                    h.swap(i * columns + j, j * columns + i);
                }
            }
        }
    }

    /// An importance row (mean squares by column); `None` where columns are mixed: their correlations would be needed.
    pub fn importance(&self, values: &[f32], expert: usize) -> Option<Vec<f32>> {
        if !self.is_diagonal() {
            return None;
        }
        let mut x = vec![1.0; values.len()];
        self.inputs(&mut x, values.len(), expert);
        Some(x.iter().zip(values).map(|(a, v)| (a * a * f64::from(*v)) as f32).collect())
    }
}
