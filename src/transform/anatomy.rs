//! What of a model transforms must know: widths, which pairs its structure admits, and why it does not admit the others.

use std::path::{Path, PathBuf};

use super::TransformError;
use crate::forward::spec::RopeStyle;
use crate::forward::{Model, Spec};
use crate::gguf::Metadata;
use crate::source::TensorSource;

/// A pair of maps that cancel: one on what is written, its inverse on what is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pair {
    /// `R_res`: rotation of the residual stream, one for the model.
    Stream,
    /// `R_ov`: rotation of the values of a KV head.
    Values,
    /// `S_attn`: scales between the norm of attention and q, k, v.
    Attention,
    /// `S_ffn`: scales between the norm of the feed-forward branch and gate, up, router.
    FeedForward,
    /// `S_ov`: scales between v and o.
    ValueScales,
    /// `S_qk`: scales between q and k, one per rotary pair.
    QueryKey,
    /// `S_ud`: scales between up and down.
    UpDown,
}

impl Pair {
    /// All of them.
    pub const ALL: [Pair; 7] = [
        Pair::Stream,
        Pair::Values,
        Pair::Attention,
        Pair::FeedForward,
        Pair::ValueScales,
        Pair::QueryKey,
        Pair::UpDown,
    ];

    /// Its name in a transforms file.
    pub fn name(self) -> &'static str {
        match self {
            Pair::Stream => "r_res",
            Pair::Values => "r_ov",
            Pair::Attention => "s_attn",
            Pair::FeedForward => "s_ffn",
            Pair::ValueScales => "s_ov",
            Pair::QueryKey => "s_qk",
            Pair::UpDown => "s_ud",
        }
    }
}

/// A model as transforms see it.
#[derive(Clone, Debug)]
pub struct Anatomy {
    /// The input, for messages.
    pub path: PathBuf,
    pub spec: Spec,
    pub vocab: usize,
    /// Inputs of the down matrix, by layer.
    pub feed_forward: Vec<usize>,
    /// The head is the embedding.
    pub tied: bool,
    void: Vec<(Pair, String)>,
}

impl Anatomy {
    /// Of the model in `source`. Refused where the forward pass does not know every tensor: what it does not know might read
    /// the stream or write to it.
    pub fn new(path: &Path, source: &dyn TensorSource, metadata: &Metadata) -> Result<Anatomy, TransformError> {
        let model = Model::new(path, source, metadata).map_err(TransformError::Model)?;
        let (spec, vocab) = (model.spec.clone(), model.vocab);
        let has = |name: &str| source.tensors().iter().any(|t| t.name == name);
        let width = |l: usize| {
            let of = |part: &str| source.tensors().iter().find(|t| t.name == format!("blk.{l}.{part}.weight"));
            of("ffn_down").or_else(|| of("ffn_down_exps")).map_or(0, |t| t.row_len() as usize)
        };
        let layers = 0..spec.layers;
        let any = |part: &str| layers.clone().find(|l| has(&format!("blk.{l}.{part}.weight")));
        let lacks = |part: &str| layers.clone().find(|l| !has(&format!("blk.{l}.{part}.weight")));
        let mut void = Vec::new();
        if let Some((l, part)) = ["post_attention_norm", "post_ffw_norm"].iter().find_map(|p| Some((any(p)?, p))) {
            let why = format!("a norm on the branch's output (`blk.{l}.{part}.weight`) cannot absorb a rotation");
            void.push((Pair::Stream, why));
        }
        for (pair, part) in [(Pair::Attention, "attn_norm"), (Pair::FeedForward, "ffn_norm")] {
            if let Some(l) = lacks(part) {
                void.push((pair, format!("there is no `blk.{l}.{part}.weight` to hold the inverse")));
                if void[0].0 != Pair::Stream {
                    void.insert(0, (Pair::Stream, format!("there is no `blk.{l}.{part}.weight`")));
                }
            }
        }
        if let Some((l, part)) = ["attn_q_norm", "attn_k_norm"].iter().find_map(|p| Some((any(p)?, p))) {
            void.push((Pair::QueryKey, format!("q and k are normalised (`blk.{l}.{part}.weight`)")));
        }
        Ok(Anatomy {
            path: path.to_path_buf(),
            vocab,
            feed_forward: layers.clone().map(width).collect(),
            tied: !has("output.weight"),
            void,
            spec,
        })
    }

    /// Why the model does not admit `pair`; `None` if it does.
    pub fn refusal(&self, pair: Pair) -> Option<&str> {
        self.void.iter().find(|(p, _)| *p == pair).map(|(_, why)| why.as_str())
    }

    /// True if the model admits `pair`.
    pub fn admits(&self, pair: Pair) -> bool {
        self.refusal(pair).is_none()
    }

    /// The shape of a pair's tensor in layer `layer`.
    pub fn shape(&self, pair: Pair, layer: usize) -> Vec<usize> {
        let s = &self.spec;
        match pair {
            Pair::Stream => vec![s.embed, s.embed],
            Pair::Values => vec![s.kv_heads, s.head_dim, s.head_dim],
            Pair::Attention | Pair::FeedForward => vec![s.embed],
            Pair::ValueScales => vec![s.kv_heads * s.head_dim],
            Pair::QueryKey => vec![s.kv_heads, s.head_dim / 2],
            Pair::UpDown if s.experts > 0 => vec![s.experts, self.feed_forward[layer]],
            Pair::UpDown => vec![self.feed_forward[layer]],
        }
    }

    /// The rotary pair that element `i` of a head, as GGUF stores it, belongs to. Elements without rotation are paired with
    /// their neighbours behind the rotary ones.
    pub fn rotary_pair(&self, i: usize) -> usize {
        let n = self.spec.rope_dims;
        match self.spec.rope_style {
            RopeStyle::Halves if i < n => i % (n / 2),
            _ => i / 2,
        }
    }
}
