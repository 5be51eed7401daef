//! Type mixes: which tensor of a file gets which type, as `llama-quantize` decides it.
//!
//! Source: `src/llama-quant.cpp` of llama.cpp b11434 (`tensor_allows_quantization`, `llama_tensor_get_type`,
//! `llama_tensor_get_type_impl`, `tensor_type_fallback`, `tensor_requires_imatrix`). Pure: names, shapes and a few
//! hyper-parameters in, one type per tensor out. Tensors must be given in the order that llama-quantize takes them
//! (see [`processing_order`]), as the rules count.

mod names;
mod rules;

use super::FileType;
use crate::gguf::GgmlType;

/// What the mix needs to know of a model.
#[derive(Clone, Debug, Default)]
pub struct ModelFacts {
    /// `general.architecture`.
    pub arch: String,
    /// `block_count`.
    pub layers: u64,
    /// `attention.head_count` of layer 0.
    pub heads: u64,
    /// `attention.head_count_kv` of layer 0.
    pub kv_heads: u64,
    /// `expert_count`, 0 for dense models.
    pub experts: u64,
}

/// One tensor as the mix sees it.
#[derive(Clone, Debug)]
pub struct MixTensor<'a> {
    pub name: &'a str,
    /// `ne`: fastest dimension first.
    pub dims: &'a [u64],
    /// Type before quantization.
    pub source: GgmlType,
}

/// A `--tensor-type` pattern.
#[derive(Clone, Debug)]
pub struct TensorTypeRule {
    pub pattern: fancy_regex::Regex,
    pub ty: GgmlType,
}

impl TensorTypeRule {
    /// `REGEX=TYPE`. The pattern is lower-cased and searched anywhere in the name, as in llama-quantize.
    pub fn parse(text: &str) -> Result<TensorTypeRule, String> {
        let (re, ty) = text
            .rsplit_once('=')
            .filter(|(re, ty)| !re.is_empty() && !ty.is_empty())
            .ok_or_else(|| format!("`{text}` is not of the form REGEX=TYPE"))?;
        let ty = GgmlType::from_name(ty).ok_or_else(|| format!("`{ty}` in `{text}` is no tensor type"))?;
        if crate::formats::format(ty).is_none() || ty == GgmlType::NVFP4 {
            return Err(format!("`{ty}` in `{text}` is no type that weights can be quantized to"));
        }
        let pattern = fancy_regex::Regex::new(&re.to_lowercase()).map_err(|e| format!("`{re}`: {e}"))?;
        Ok(TensorTypeRule { pattern, ty })
    }

    /// True if the pattern is found in `name`.
    pub fn matches(&self, name: &str) -> bool {
        self.pattern.is_match(name).unwrap_or(false)
    }
}

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct MixOptions {
    pub ftype: FileType,
    /// `COPY`: every tensor keeps its type.
    pub copy: bool,
    pub pure: bool,
    pub leave_output_tensor: bool,
    pub output_tensor_type: Option<GgmlType>,
    pub token_embedding_type: Option<GgmlType>,
    pub tensor_types: Vec<TensorTypeRule>,
    /// An imatrix with at least one entry was given.
    pub has_imatrix: bool,
}

/// The decision for one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub ty: GgmlType,
    /// The type that was wanted, where the row length did not allow it.
    pub fallback_from: Option<GgmlType>,
    /// Cannot be encoded without importance weights.
    pub requires_imatrix: bool,
}

/// A tensor for which no type is possible.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum MixError {
    #[error(
        "tensor `{tensor}`: its row length {ne0} is no multiple of the block of {ty}, and {ty} has no fallback type"
    )]
    NoFallback { tensor: String, ne0: u64, ty: GgmlType },
    #[error("tensor `{tensor}`: the type {ty} was asked for, but its row length {ne0} is no multiple of {block}")]
    ForcedShape { tensor: String, ne0: u64, ty: GgmlType, block: usize },
    #[error(
        "tensor `{tensor}`: its name has no layer number below {layers} (`blk.N.`), the mix of a model with experts needs it"
    )]
    NoLayer { tensor: String, layers: u64 },
}

/// Indices of `names` in the order in which llama-quantize takes and writes them: by layer (none first), then name.
pub fn processing_order(names: &[&str]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..names.len()).collect();
    order.sort_by_key(|&i| (layer_of(names[i]).map_or(-1, |l| l as i64), names[i]));
    order
}

/// The N of `blk.N.`.
pub fn layer_of(name: &str) -> Option<u64> {
    let rest = name.strip_prefix("blk.")?;
    rest[..rest.find('.')?].parse().ok()
}

/// Chooses the type of every tensor; `tensors` in [`processing_order`].
pub fn choose(facts: &ModelFacts, o: &MixOptions, tensors: &[MixTensor]) -> Result<Vec<Choice>, MixError> {
    let mut mix = rules::Mix::new(facts, o, tensors);
    tensors.iter().map(|t| mix.target(t)).collect()
}
