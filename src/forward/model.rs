//! A model to run: its [`Spec`], and its weights one layer at a time as f32 from any [`TensorSource`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::backward::layer::Slot;
use super::layer::{FeedForward, Layer, Linear};
use super::rope::RopeTable;
use super::rounding::{Activations, Rounding};
use super::spec::Spec;
use super::{ForwardError, kernels};
use crate::gguf::{GgmlType, Metadata};
use crate::source::TensorSource;

/// Values that one task of a load decodes at a time.
const CHUNK: usize = 1 << 18;

/// Tensors of a layer that the pass understands, without `blk.N.`.
const KNOWN: &[&str] = &[
    "attn_norm.weight",
    "attn_q.weight",
    "attn_q.bias",
    "attn_k.weight",
    "attn_k.bias",
    "attn_v.weight",
    "attn_v.bias",
    "attn_qkv.weight",
    "attn_qkv.bias",
    "attn_output.weight",
    "attn_output.bias",
    "attn_q_norm.weight",
    "attn_k_norm.weight",
    "post_attention_norm.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_gate.bias",
    "ffn_up.weight",
    "ffn_up.bias",
    "ffn_down.weight",
    "ffn_down.bias",
    "post_ffw_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_exps.weight",
    "ffn_up_exps.weight",
    "ffn_down_exps.weight",
];
/// And outside the layers.
const GLOBAL: &[&str] = &[
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// A model and where its weights are.
pub struct Model<'a> {
    pub spec: Spec,
    /// Words of the vocabulary: rows of the embedding.
    pub vocab: usize,
    path: PathBuf,
    source: &'a dyn TensorSource,
    index: HashMap<&'a str, usize>,
}

impl<'a> Model<'a> {
    /// Reads the keys and checks that every tensor is there, has its shape, and is understood.
    pub fn new(path: &Path, source: &'a dyn TensorSource, metadata: &Metadata) -> Result<Model<'a>, ForwardError> {
        let spec = Spec::read(metadata).map_err(|e| e.of(path))?;
        let index = source.tensors().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let mut model = Model { spec, vocab: 0, path: path.to_path_buf(), source, index };
        model.check().map_err(|e| e.of(path))?;
        Ok(model)
    }

    fn check(&mut self) -> Result<(), ForwardError> {
        for t in self.source.tensors() {
            let known = match t.name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
                Some((n, rest)) => n.parse::<usize>().is_ok_and(|n| n < self.spec.layers) && KNOWN.contains(&rest),
                None => GLOBAL.contains(&t.name.as_str()),
            };
            if !known {
                return Err(ForwardError::tensor(&t.name, "the forward pass does not know what it is for"));
            }
            if crate::formats::format(t.stored).is_none() {
                return Err(ForwardError::tensor(&t.name, format!("its type {} cannot be decoded", t.stored)));
            }
        }
        let s = self.spec.clone();
        let embedding = self.tensor("token_embd.weight")?;
        self.vocab = embedding.rows() as usize;
        self.shape("token_embd.weight", &[s.embed, self.vocab])?;
        if self.has("output.weight") {
            self.shape("output.weight", &[s.embed, self.vocab])?;
        }
        self.shape("output_norm.weight", &[s.embed])?;
        for l in 0..s.layers {
            self.check_layer(l)?;
        }
        Ok(())
    }

    fn check_layer(&self, l: usize) -> Result<(), ForwardError> {
        let s = &self.spec;
        let name = |part: &str| format!("blk.{l}.{part}");
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        if self.has(&name("attn_qkv.weight")) {
            self.shape(&name("attn_qkv.weight"), &[s.embed, q + 2 * kv])?;
        } else {
            self.shape(&name("attn_q.weight"), &[s.embed, q])?;
            self.shape(&name("attn_k.weight"), &[s.embed, kv])?;
            self.shape(&name("attn_v.weight"), &[s.embed, kv])?;
        }
        self.shape(&name("attn_output.weight"), &[q, s.embed])?;
        for part in ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"] {
            let part = name(&format!("{part}.weight"));
            if self.has(&part) {
                self.shape(&part, &[s.embed])?;
            }
        }
        for (part, width) in [("attn_q_norm", q), ("attn_k_norm", kv)] {
            let part = name(&format!("{part}.weight"));
            if self.has(&part) && self.shape(&part, &[s.head_dim]).is_err() {
                self.shape(&part, &[width])?;
            }
        }
        if s.experts > 0 {
            self.shape(&name("ffn_gate_inp.weight"), &[s.embed, s.experts])?;
            let ff = self.tensor(&name("ffn_up_exps.weight"))?.dims.get(1).copied().unwrap_or(0) as usize;
            self.shape(&name("ffn_up_exps.weight"), &[s.embed, ff, s.experts])?;
            self.shape(&name("ffn_gate_exps.weight"), &[s.embed, ff, s.experts])?;
            self.shape(&name("ffn_down_exps.weight"), &[ff, s.embed, s.experts])?;
        } else {
            let ff = self.tensor(&name("ffn_down.weight"))?.row_len() as usize;
            self.shape(&name("ffn_down.weight"), &[ff, s.embed])?;
            if self.has(&name("ffn_gate.weight")) {
                self.shape(&name("ffn_gate.weight"), &[s.embed, ff])?;
                self.shape(&name("ffn_up.weight"), &[s.embed, ff])?;
            } else {
                self.shape(&name("ffn_up.weight"), &[s.embed, 2 * ff])?;
            }
        }
        Ok(())
    }

    fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<&'a crate::source::SourceTensor, ForwardError> {
        match self.index.get(name) {
            Some(&i) => Ok(&self.source.tensors()[i]),
            None => Err(ForwardError::tensor(name, "missing")),
        }
    }

    fn shape(&self, name: &str, dims: &[usize]) -> Result<(), ForwardError> {
        let t = self.tensor(name)?;
        let want: Vec<u64> = dims.iter().map(|&n| n as u64).collect();
        if t.dims != want {
            return Err(ForwardError::tensor(name, format!("is {:?}, where {want:?} was expected", t.dims)));
        }
        Ok(())
    }

    /// The file or folder, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the weights come from.
    pub fn source(&self) -> &'a dyn TensorSource {
        self.source
    }

    /// Rows of a tensor, decoded by all threads of the pool; its pages are let go.
    fn rows(&self, name: &str, from: usize, to: usize, out: &mut [f32]) -> Result<(), ForwardError> {
        let index = self.index[name];
        let columns = self.source.tensors()[index].row_len() as usize;
        let group = self.source.tensors()[index].row_group.max(1) as usize;
        let step = (CHUNK / columns.max(1)).max(1).next_multiple_of(group);
        out.par_chunks_mut(step * columns).enumerate().for_each(|(i, out)| {
            let first = from + i * step;
            let rows = first as u64..(first + out.len() / columns) as u64;
            debug_assert!(rows.end <= to as u64);
            self.source.read_rows(index, rows.clone(), out);
            self.source.release(index, rows);
        });
        let bad = out.par_chunks(CHUNK).position_first(|c| !kernels::all_finite(c));
        match bad.and_then(|i| out[i * CHUNK..].iter().position(|v| !v.is_finite()).map(|j| i * CHUNK + j)) {
            Some(at) => {
                let (row, column) = (from + at / columns, at % columns);
                Err(ForwardError::tensor(name, format!("{} at row {row}, column {column}", out[at])).of(&self.path))
            }
            None => Ok(()),
        }
    }

    /// A vector of the model, if it is there.
    fn vector(&self, name: &str) -> Result<Option<Vec<f32>>, ForwardError> {
        let Some(&i) = self.index.get(name) else { return Ok(None) };
        let t = &self.source.tensors()[i];
        let mut out = vec![0.0; t.elements() as usize];
        self.rows(name, 0, t.rows() as usize, &mut out)?;
        Ok(Some(out))
    }

    /// Rows `from..to` of a weight and of the bias beside it.
    fn linear(&self, name: &str, from: usize, to: usize, activations: Activations) -> Result<Linear, ForwardError> {
        let t = self.tensor(name).map_err(|e| e.of(&self.path))?;
        let inputs = t.row_len() as usize;
        let mut weight = vec![0.0; (to - from) * inputs];
        self.rows(name, from, to, &mut weight)?;
        let bias = match name.strip_suffix(".weight") {
            Some(stem) => self.vector(&format!("{stem}.bias"))?,
            None => None,
        };
        let bias = match bias {
            Some(b) if b.len() < to => {
                return Err(ForwardError::tensor(name, "its bias is too short").of(&self.path));
            }
            b => b.map(|b| b[from..to].to_vec()),
        };
        let mut rounding = Rounding::of(t.stored, activations);
        // embedding, head and routers stay as they are
        if let Some(s) = activations.simulated().filter(|_| name.starts_with("blk.") && !name.contains("ffn_gate_inp"))
        {
            let down = name.contains(".ffn_down");
            s.weights(&mut weight, inputs, down);
            rounding = Rounding::Simulated(s, down);
        }
        Ok(Linear { name: name.to_string(), weight, inputs, bias, rounding })
    }

    fn whole(&self, name: &str, activations: Activations) -> Result<Linear, ForwardError> {
        let rows = self.tensor(name).map_err(|e| e.of(&self.path))?.rows() as usize;
        self.linear(name, 0, rows, activations)
    }

    /// Reads layer `l`.
    pub fn layer(&self, l: usize, activations: Activations) -> Result<Layer, ForwardError> {
        let name = |part: &str| format!("blk.{l}.{part}.weight");
        let s = &self.spec;
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let fused = name("attn_qkv");
        let [q, k, v] = if self.has(&fused) {
            [(0, q), (q, q + kv), (q + kv, q + 2 * kv)].map(|(from, to)| self.linear(&fused, from, to, activations))
        } else {
            ["attn_q", "attn_k", "attn_v"].map(|n| self.whole(&name(n), activations))
        };
        let ffn = if s.experts > 0 {
            FeedForward::Experts { router: self.whole(&name("ffn_gate_inp"), activations)?, rounded: None }
        } else {
            let down = self.whole(&name("ffn_down"), activations)?;
            let (gate, up) = if self.has(&name("ffn_gate")) {
                (self.whole(&name("ffn_gate"), activations)?, self.whole(&name("ffn_up"), activations)?)
            } else {
                let (up, ff) = (name("ffn_up"), down.inputs);
                (self.linear(&up, 0, ff, activations)?, self.linear(&up, ff, 2 * ff, activations)?)
            };
            FeedForward::Dense { gate, up, down }
        };
        Ok(Layer {
            index: l,
            attn_norm: self.vector(&name("attn_norm"))?,
            q: q?,
            k: k?,
            v: v?,
            o: self.whole(&name("attn_output"), activations)?,
            q_norm: self.vector(&name("attn_q_norm"))?,
            k_norm: self.vector(&name("attn_k_norm"))?,
            attn_post_norm: self.vector(&name("post_attention_norm"))?,
            ffn_norm: self.vector(&name("ffn_norm"))?,
            ffn,
            ffn_post_norm: self.vector(&name("post_ffw_norm"))?,
        })
    }

    /// Name and outputs of the stack of experts of a layer that `slot` is part of.
    pub(super) fn stack(&self, l: usize, slot: Slot) -> Result<(String, usize), ForwardError> {
        let part = match slot {
            Slot::Gate => "ffn_gate_exps",
            Slot::Up => "ffn_up_exps",
            Slot::Down => "ffn_down_exps",
            _ => unreachable!("{slot:?} has no experts"),
        };
        let name = format!("blk.{l}.{part}.weight");
        let outputs = self.tensor(&name)?.dims[1] as usize;
        Ok((name, outputs))
    }

    /// Gate, up and down of one expert.
    pub fn expert(&self, l: usize, e: usize, activations: Activations) -> Result<[Linear; 3], ForwardError> {
        let one = |slot: Slot| {
            let (name, rows) = self.stack(l, slot)?;
            self.linear(&name, e * rows, (e + 1) * rows, activations)
        };
        Ok([one(Slot::Gate)?, one(Slot::Up)?, one(Slot::Down)?])
    }

    /// Embeddings of `tokens`, `[tokens, embed]`. Tokens must be below [`Model::vocab`].
    pub fn embed(&self, tokens: &[u32], out: &mut [f32]) -> Result<(), ForwardError> {
        let index = self.index["token_embd.weight"];
        let n = self.spec.embed;
        if let Some(&bad) = tokens.iter().find(|&&t| t as usize >= self.vocab) {
            return Err(ForwardError::Token { token: bad, vocab: self.vocab });
        }
        out.par_chunks_mut(n).zip(tokens).for_each(|(row, &t)| {
            self.source.read_rows(index, u64::from(t)..u64::from(t) + 1, row);
            if self.spec.embedding_scale != 1.0 {
                kernels::scale(row, self.spec.embedding_scale);
            }
        });
        self.source.release(index, 0..self.vocab as u64);
        match out.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(ForwardError::tensor(
                "token_embd.weight",
                format!("{} at row {}, column {}", out[i], tokens[i / n], i % n),
            )
            .of(&self.path)),
            None => Ok(()),
        }
    }

    /// `output_norm.weight`.
    pub fn output_norm(&self) -> Result<Vec<f32>, ForwardError> {
        Ok(self.vector("output_norm.weight")?.expect("checked when the model was opened"))
    }

    /// The head's tensor: `output.weight`, or the embedding of a tied model.
    pub fn head_name(&self) -> &'static str {
        if self.tied() { "token_embd.weight" } else { "output.weight" }
    }

    /// True if the embedding is the head as well.
    pub fn tied(&self) -> bool {
        !self.has("output.weight")
    }

    /// The stored type of the head.
    pub fn head_type(&self) -> GgmlType {
        self.source.tensors()[self.index[self.head_name()]].stored
    }

    /// The head as a linear.
    pub fn head(&self, activations: Activations) -> Result<Linear, ForwardError> {
        self.whole(self.head_name(), activations)
    }

    /// Rows of the embedding as they are stored, as f32.
    pub fn embedding_rows(&self, from: usize, to: usize, out: &mut [f32]) -> Result<(), ForwardError> {
        self.rows("token_embd.weight", from, to, out)
    }

    /// Rows of the head as f32.
    pub fn head_rows(&self, from: usize, to: usize, out: &mut [f32]) -> Result<(), ForwardError> {
        self.rows(self.head_name(), from, to, out)
    }

    /// Rotary tables of ordinary and of windowed layers, for windows of `length` tokens.
    pub fn rope_tables(&self, length: usize) -> Result<(RopeTable, RopeTable), ForwardError> {
        let s = &self.spec;
        // `llama_model::get_rope_factors`
        let factors = if self.has("rope_freqs.weight") {
            self.vector("rope_freqs.weight")?
        } else if length as f64 > s.rope.original_context {
            self.vector("rope_factors_long.weight")?
        } else {
            self.vector("rope_factors_short.weight")?
        };
        if let Some(f) = factors.as_ref().filter(|f| f.len() < s.rope_dims / 2 || f.iter().any(|v| *v <= 0.0)) {
            return Err(
                ForwardError::tensor("rope factors", format!("{} values, not one per pair", f.len())).of(&self.path)
            );
        }
        Ok((RopeTable::new(s, &s.rope, factors.as_deref(), length), RopeTable::new(s, &s.window_rope, None, length)))
    }

    /// Bytes of the largest layer in memory: [`Model::layer_weights`], and what the source keeps.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_weights() + self.source.resident()
    }

    /// Bytes of the weights of the largest layer as f32, of one expert's matrices where there are any.
    pub fn layer_weights(&self) -> u64 {
        let mut largest = 0;
        for l in 0..self.spec.layers {
            let prefix = format!("blk.{l}.");
            let bytes: u64 = self
                .source
                .tensors()
                .iter()
                .filter(|t| t.name.starts_with(&prefix))
                .map(|t| t.elements() * 4 / if t.name.contains("_exps.") { self.spec.experts.max(1) as u64 } else { 1 })
                .sum();
            largest = largest.max(bytes);
        }
        largest
    }

    /// Inputs of the widest `ffn_down`.
    pub fn feed_forward(&self) -> usize {
        let widths = self
            .source
            .tensors()
            .iter()
            .filter(|t| t.dims.len() > 1 && t.name.contains(".ffn_down"))
            .map(|t| t.row_len());
        widths.max().unwrap_or(0) as usize
    }

    /// Multiplications and additions of the linears of all layers for one token.
    pub fn linear_flops(&self) -> u64 {
        let of = |t: &crate::source::SourceTensor| match t.name.as_str() {
            n if !n.starts_with("blk.") || t.dims.len() < 2 => 0,
            n if n.contains("_exps.") => t.elements() / self.spec.experts as u64 * self.spec.experts_used as u64,
            _ => t.elements(),
        };
        2 * self.source.tensors().iter().map(of).sum::<u64>()
    }
}
