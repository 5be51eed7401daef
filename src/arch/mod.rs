//! Architectures as tables: names, shapes, data transforms, metadata. Adding one touches one file here and its golden.
//!
//! Facts: `conversion/*.py` and `gguf-py/gguf/tensor_mapping.py` of llama.cpp b11434.

mod llama;
pub mod metadata;
mod qwen;

/// A dimension of an expected tensor shape, by name in the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// `vocab_size` or more rows than that are refused.
    Vocab,
    /// `hidden_size`.
    Embed,
    /// `intermediate_size`.
    FeedForward,
    /// heads x head dimension.
    Query,
    /// KV heads x head dimension.
    KeyValue,
    /// Head dimension.
    Head,
}

/// What happens to a tensor's values on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// Bytes as they are (but for the type).
    None,
    /// Rows of each query head from half-split to interleaved rotary order (`LlamaModel.permute`), `num_attention_heads`.
    PermuteQuery,
    /// The same for `num_key_value_heads`.
    PermuteKey,
}

/// One tensor kind. `{}` stands for the layer number. `.weight` or `.bias` is part of the name.
#[derive(Clone, Copy, Debug)]
pub struct TensorRule {
    pub hf: &'static str,
    pub gguf: &'static str,
    /// Row-major, outermost first (as in the checkpoint).
    pub shape: &'static [Dim],
    pub transform: Transform,
    pub presence: Presence,
}

/// A tensor that must be there and stays as it is.
const fn rule(hf: &'static str, gguf: &'static str, shape: &'static [Dim]) -> TensorRule {
    TensorRule { hf, gguf, shape, transform: Transform::None, presence: Presence::Required }
}

/// A tensor that may be there and stays as it is.
const fn optional(hf: &'static str, gguf: &'static str, shape: &'static [Dim]) -> TensorRule {
    TensorRule { presence: Presence::Optional, ..rule(hf, gguf, shape) }
}

/// Whether a checkpoint must hold the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Required,
    /// Taken where it is there (biases, `lm_head` of tied models).
    Optional,
}

/// Which vocabulary readers are tried, in order (`set_vocab` of the model class).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VocabOrder {
    /// SentencePiece, then LlamaHf (byte-fallback BPE), then byte-level BPE.
    Llama,
    /// SentencePiece, then byte-level BPE.
    Qwen,
}

/// A value that transformers' config class supplies when `config.json` leaves the field out (transformers 5.23).
#[derive(Clone, Copy, Debug)]
pub enum Default {
    Int(u64),
    Float(f64),
    Bool(bool),
    /// `num_attention_heads`.
    SameAsHeads,
    /// `hidden_size / num_attention_heads`.
    HiddenOverHeads,
}

/// A model class of `transformers` and what becomes of it.
#[derive(Debug)]
pub struct Architecture {
    /// `architectures[0]` of config.json.
    pub hf: &'static str,
    /// `general.architecture`.
    pub gguf: &'static str,
    pub tensors: &'static [TensorRule],
    pub vocab: VocabOrder,
    pub defaults: &'static [(&'static str, Default)],
    /// `LlamaModel` writes `vocab_size` and `rope.dimension_count` after the base keys.
    pub llama_tail: bool,
    /// `rope_type` llama3 adds the tensor `rope_freqs.weight`.
    pub rope_freqs: bool,
}

/// Every architecture that can be converted.
pub static ARCHITECTURES: &[&Architecture] = &[&llama::LLAMA, &llama::MISTRAL, &qwen::QWEN2, &qwen::QWEN3];

/// The table of an `architectures[0]`.
pub fn find(hf: &str) -> Option<&'static Architecture> {
    // The spelling of the first LLaMA conversions.
    let hf = if hf == "LLaMAForCausalLM" { "LlamaForCausalLM" } else { hf };
    ARCHITECTURES.iter().copied().find(|a| a.hf == hf)
}
