//! The plan: every decision of a conversion, made before the first weight is read.
//!
//! [`Plan::new`] takes the opened input and the options and lists what will be written: order, names, types, offsets,
//! keys, sizes, memory. It is pure: `plan`, `--dry-run` and `convert` all read the same plan.

mod ftype;
pub mod input;
pub mod memory;
pub mod mix;
pub mod options;
pub mod quality;
pub mod recipe;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

pub use ftype::FileType;
pub use input::{Input, PAIRS_KEY, TRANSFORM_KEY};
pub use options::{Budget, Options, OutType, Rounding, Target, Via};
pub use recipe::{BUILT_IN, OWN, Recipe};

use crate::calibration::imatrix::Imatrix;
use crate::checkpoint::CheckpointError;
use crate::gguf::{self, GgmlType, GgufError, Layout, Metadata, TensorSpec, Value};
use crate::source::SourceTensor;
use mix::{MixError, MixOptions, MixTensor};

/// One tensor of the output.
#[derive(Clone, Debug)]
pub struct PlannedTensor {
    pub name: String,
    /// `ne`: fastest dimension first.
    pub dims: Vec<u64>,
    pub ty: GgmlType,
    /// Index in the source.
    pub source: usize,
    /// Type in the file that the two-step way goes through: values are rounded to it first.
    pub via: GgmlType,
    /// In the output file.
    pub offset: u64,
    pub bytes: u64,
    /// The type that the mix wanted, where the row length did not allow it.
    pub fallback_from: Option<GgmlType>,
    /// Entry of the imatrix that weights its rounding.
    pub importance: Option<String>,
}

impl PlannedTensor {
    /// Elements.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Elements of a row.
    pub fn row_len(&self) -> u64 {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Rows over all outer dimensions.
    pub fn rows(&self) -> u64 {
        self.dims.iter().skip(1).product()
    }
}

/// A conversion, decided.
#[derive(Debug)]
pub struct Plan {
    pub tensors: Vec<PlannedTensor>,
    pub metadata: Metadata,
    pub layout: Layout,
    pub warnings: Vec<String>,
    /// Name of what is written, for messages and the default file name.
    pub type_name: String,
    pub big_endian: bool,
}

/// What makes a plan impossible.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Mix(#[from] MixError),
    #[error("the output cannot be laid out: {0}")]
    Layout(#[from] GgufError),
    #[error(
        "{count} tensors need an imatrix for {ty} (the first is `{first}`): give one with --imatrix, let one be made with --calibrate TEXT (or `builtin`), or take another type"
    )]
    NeedsImatrix { count: usize, first: String, ty: String },
    #[error(
        "imatrix: no entry for {count} tensors whose type needs one (the first is `{first}`); was it made from this model?"
    )]
    MissingEntries { count: usize, first: String },
    #[error(
        "imatrix: entry `{tensor}` has {found} values, the tensor has {expected} columns: it belongs to another model"
    )]
    EntryLength { tensor: String, found: usize, expected: u64 },
    #[error(
        "tensor `{tensor}` is already quantized ({from}); converting it to {to} loses twice: --allow-requantize does it all the same"
    )]
    Requantize { tensor: String, from: GgmlType, to: GgmlType },
    #[error("--tensor-type: no tensor matches `{0}`")]
    UnusedPattern(String),
    #[error("--prune-layers: {0}")]
    Prune(String),
}

/// Keys that this program adds of its own.
pub const PROVENANCE_PREFIX: &str = "ostq.";

impl Plan {
    /// Decides everything. `provenance` are the `ostq.*` keys, already complete or with values of the final length.
    pub fn new(
        input: &Input,
        options: &Options,
        imatrix: Option<&Imatrix>,
        provenance: Metadata,
    ) -> Result<Plan, PlanError> {
        let mut warnings = input.warnings.clone();
        let metadata = metadata(input, options, imatrix);
        let facts = input.facts(&metadata);
        let selected = select(input, &options.recipe.prune_layers, facts.layers)?;
        let order = match options.target {
            Target::Outtype(_) => (0..selected.len()).collect(),
            _ => mix::processing_order(&selected.iter().map(|(_, n)| n.as_str()).collect::<Vec<_>>()),
        };
        let sources: Vec<(usize, &SourceTensor, &str)> = order
            .iter()
            .map(|&i| (selected[i].0, &input.source.tensors()[selected[i].0], selected[i].1.as_str()))
            .collect();
        let vias: Vec<GgmlType> = sources.iter().map(|(_, t, name)| via(t, name, input, options)).collect();
        let choices = choose(&sources, &vias, &facts, input, options, imatrix)?;
        let mut tensors = Vec::with_capacity(sources.len());
        for (((source, t, name), choice), via) in sources.iter().zip(&choices).zip(&vias) {
            tensors.push(PlannedTensor {
                name: name.to_string(),
                dims: t.dims.clone(),
                ty: choice.ty,
                source: *source,
                via: *via,
                offset: 0,
                bytes: 0,
                fallback_from: choice.fallback_from,
                importance: importance(t, choice.ty, imatrix, &mut warnings)?,
            });
        }
        check_imatrix(&tensors, &choices, options, imatrix, &mut warnings)?;
        check_requantize(&tensors, input, options)?;
        check_patterns(&tensors, options, &mut warnings)?;
        let mut metadata = metadata;
        if !options.recipe.prune_layers.is_empty() {
            let left = facts.layers - options.recipe.prune_layers.iter().collect::<HashSet<_>>().len() as u64;
            gguf::value::replace(&mut metadata, &format!("{}.block_count", facts.arch), Value::U32(left as u32));
        }
        metadata.extend(provenance);
        let layout = lay_out(&metadata, &tensors, options.recipe.bigendian)?;
        for (t, (offset, bytes)) in tensors.iter_mut().zip(&layout.tensors) {
            (t.offset, t.bytes) = (*offset, *bytes);
        }
        Ok(Plan {
            tensors,
            metadata,
            layout,
            warnings,
            type_name: type_name(input, options),
            big_endian: options.recipe.bigendian,
        })
    }

    /// Gives tensors other types and lays the file out anew.
    pub fn retype(&mut self, types: &BTreeMap<String, GgmlType>) -> Result<(), GgufError> {
        for t in &mut self.tensors {
            if let Some(&ty) = types.get(&t.name) {
                (t.ty, t.fallback_from) = (ty, None);
            }
        }
        self.layout = lay_out(&self.metadata, &self.tensors, self.big_endian)?;
        for (t, (offset, bytes)) in self.tensors.iter_mut().zip(&self.layout.tensors) {
            (t.offset, t.bytes) = (*offset, *bytes);
        }
        Ok(())
    }

    /// Lays the header out anew after a key got another value.
    pub fn refresh_header(&mut self) -> Result<(), GgufError> {
        self.layout = lay_out(&self.metadata, &self.tensors, self.big_endian)?;
        Ok(())
    }

    /// Weights of the model.
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(PlannedTensor::elements).sum()
    }

    /// Bits per weight over all tensors.
    pub fn bits_per_weight(&self) -> f64 {
        self.tensors.iter().map(|t| t.bytes).sum::<u64>() as f64 * 8.0 / self.elements().max(1) as f64
    }
}

fn lay_out(metadata: &Metadata, tensors: &[PlannedTensor], big_endian: bool) -> Result<Layout, GgufError> {
    let spec = |t: &PlannedTensor| TensorSpec { name: t.name.clone(), dims: t.dims.clone(), ty: t.ty };
    gguf::layout(metadata, &tensors.iter().map(spec).collect::<Vec<_>>(), big_endian)
}

fn type_name(input: &Input, options: &Options) -> String {
    match options.target {
        Target::Quantize(f) => f.name().to_string(),
        Target::Copy => "COPY".to_string(),
        Target::Outtype(o) => o.unwrap_or(input.auto).file_type().name().to_string(),
    }
}

/// The keys as llama-quantize (or, for an outtype, the converter) leaves them.
fn metadata(input: &Input, options: &Options, imatrix: Option<&Imatrix>) -> Metadata {
    use gguf::value::replace;
    /// `llama_model_kv_override`: strings are cut.
    const MAX: usize = 127;
    let mut m = input.metadata.clone();
    let quantizing = !matches!(options.target, Target::Outtype(_));
    if quantizing && !options.recipe.vocab_only {
        replace(&mut m, "general.quantization_version", Value::U32(2));
        let file_type = match options.target {
            Target::Quantize(f) => Some(f as u32),
            _ => gguf::value::get(&input.metadata, "general.file_type").and_then(Value::as_u64).map(|n| n as u32),
        };
        if let Some(n) = file_type {
            replace(&mut m, "general.file_type", Value::U32(n));
        }
    }
    for o in &options.override_kv {
        replace(&mut m, &o.key, o.value.clone());
    }
    if let Some(i) = imatrix.filter(|i| quantizing && !i.entries.is_empty()) {
        let cut = |s: &str| Value::Str(s.as_bytes()[..s.len().min(MAX)].to_vec());
        if let Some(name) = options.recipe.imatrix.as_deref().and_then(Path::file_name) {
            replace(&mut m, "quantize.imatrix.file", cut(&name.to_string_lossy()));
        }
        if let Some(first) = i.datasets.first() {
            replace(&mut m, "quantize.imatrix.dataset", cut(first));
        }
        replace(&mut m, "quantize.imatrix.entries_count", Value::U32(i.entries.len() as u32));
        if i.chunks > 0 {
            replace(&mut m, "quantize.imatrix.chunks_count", Value::U32(i.chunks));
        }
    }
    m
}

/// Source indices and output names: `--prune-layers` drops layers and renumbers the later ones.
fn select(input: &Input, prune: &[u64], layers: u64) -> Result<Vec<(usize, String)>, PlanError> {
    let dropped: HashSet<u64> = prune.iter().copied().collect();
    if let Some(l) = prune.iter().find(|&&l| l >= layers) {
        return Err(PlanError::Prune(format!("there is no layer {l}, the model has {layers}")));
    }
    if !dropped.is_empty() && dropped.len() as u64 == layers {
        return Err(PlanError::Prune("no layer would be left".into()));
    }
    let mut out = Vec::new();
    for (i, t) in input.source.tensors().iter().enumerate() {
        match mix::layer_of(&t.name) {
            Some(l) if dropped.contains(&l) => {}
            Some(l) if !dropped.is_empty() => {
                let before = dropped.iter().filter(|&&d| d < l).count() as u64;
                let tail = &t.name[format!("blk.{l}").len()..];
                out.push((i, format!("blk.{}{tail}", l - before)));
            }
            _ => out.push((i, t.name.clone())),
        }
    }
    Ok(out)
}

/// Tensors that the converter keeps in F32 (`prepare_tensors`).
fn stays_f32(name: &str, dims: &[u64]) -> bool {
    const PARTS: &[&str] = &[
        "ffn_gate_inp.weight",
        "ffn_gate_inp_shexp.weight",
        "position_embd.weight",
        "token_types.weight",
        "ssm_conv1d",
        "shortconv.conv.weight",
        "time_mix_first.weight",
        "time_mix_w1.weight",
        "time_mix_w2.weight",
        "time_mix_decay_w1.weight",
        "time_mix_decay_w2.weight",
        "time_mix_lerp_fused.weight",
        "indexer.proj.weight",
    ];
    dims.len() <= 1
        || name.ends_with("_norm.weight")
        || PARTS.iter().any(|p| name.ends_with(p))
        || !(name.ends_with(".weight") || name.ends_with(".lora_a") || name.ends_with(".lora_b"))
}

/// Type in the intermediate file.
fn via(t: &SourceTensor, name: &str, input: &Input, options: &Options) -> GgmlType {
    if input.is_gguf {
        return t.stored;
    }
    if stays_f32(name, &t.dims) {
        return GgmlType::F32;
    }
    match (options.target, options.via) {
        (Target::Outtype(_), _) | (_, Via::Auto) => t.stored,
        (_, Via::F32) => GgmlType::F32,
        (_, Via::F16) => GgmlType::F16,
        (_, Via::BF16) => GgmlType::BF16,
    }
}

fn choose(
    sources: &[(usize, &SourceTensor, &str)],
    vias: &[GgmlType],
    facts: &mix::ModelFacts,
    input: &Input,
    options: &Options,
    imatrix: Option<&Imatrix>,
) -> Result<Vec<mix::Choice>, PlanError> {
    let r = &options.recipe;
    let ftype = match options.target {
        Target::Outtype(o) => {
            let o = o.unwrap_or(input.auto);
            return Ok(sources.iter().map(|(_, t, name)| converter_choice(o, t, name, r.fp8_as_q8)).collect());
        }
        Target::Copy => FileType::F32,
        Target::Quantize(f) => f,
    };
    let mix_options = MixOptions {
        ftype,
        copy: options.target == Target::Copy,
        pure: r.pure,
        leave_output_tensor: r.leave_output_tensor,
        output_tensor_type: options.output_tensor_type,
        token_embedding_type: options.token_embedding_type,
        tensor_types: options.tensor_types.clone(),
        has_imatrix: imatrix.is_some_and(|i| !i.entries.is_empty()),
    };
    let tensors: Vec<MixTensor> =
        sources.iter().zip(vias).map(|((_, t, name), via)| MixTensor { name, dims: &t.dims, source: *via }).collect();
    Ok(mix::choose(facts, &mix_options, &tensors)?)
}

/// `ModelBase.prepare_tensors`: the type that `convert_hf_to_gguf.py --outtype` gives a tensor.
fn converter_choice(o: OutType, t: &SourceTensor, name: &str, fp8_as_q8: bool) -> mix::Choice {
    let ternary = matches!(o, OutType::TQ1_0 | OutType::TQ2_0);
    let wanted = if t.is_fp8 && fp8_as_q8 {
        GgmlType::Q8_0
    } else if stays_f32(name, &t.dims) {
        GgmlType::F32
    } else if ternary && matches!(name, "token_embd.weight" | "per_layer_token_embd.weight" | "output.weight") {
        GgmlType::F16
    } else {
        o.ggml_type()
    };
    let fits = t.row_len().is_multiple_of(wanted.block_len() as u64);
    mix::Choice {
        ty: if fits { wanted } else { GgmlType::F16 },
        fallback_from: (!fits).then_some(wanted),
        requires_imatrix: false,
    }
}

/// True where `ggml_quantize_chunk` looks at importance weights.
fn uses_weights(ty: GgmlType) -> bool {
    use GgmlType::*;
    ty.is_quantized() && !matches!(ty, Q8_0 | MXFP4 | NVFP4 | TQ1_0 | TQ2_0 | Q1_0 | Q2_0)
}

/// The imatrix entry of a tensor, checked for its length. Lookup is by the name before pruning.
fn importance(
    t: &SourceTensor,
    ty: GgmlType,
    imatrix: Option<&Imatrix>,
    warnings: &mut Vec<String>,
) -> Result<Option<String>, PlanError> {
    let Some(values) = imatrix.and_then(|i| i.entries.get(&t.name)).filter(|_| uses_weights(ty)) else {
        return Ok(None);
    };
    let expected = t.row_len() * t.dims.get(2).copied().unwrap_or(1);
    if values.len() as u64 == expected {
        return Ok(Some(t.name.clone()));
    }
    if matches!(t.name.as_str(), "token_embd.weight" | "per_layer_token_embd.weight") {
        warnings.push(format!("imatrix: entry `{}` has {} values, not {expected}: not used", t.name, values.len()));
        return Ok(None);
    }
    Err(PlanError::EntryLength { tensor: t.name.clone(), found: values.len(), expected })
}

fn check_imatrix(
    tensors: &[PlannedTensor],
    choices: &[mix::Choice],
    options: &Options,
    imatrix: Option<&Imatrix>,
    warnings: &mut Vec<String>,
) -> Result<(), PlanError> {
    let forced = |ty| matches!(ty, GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ1_S);
    let bare: Vec<&PlannedTensor> = tensors
        .iter()
        .zip(choices)
        .filter(|(t, c)| (c.requires_imatrix || (forced(t.ty) && t.via != t.ty)) && t.importance.is_none())
        .map(|(t, _)| t)
        .collect();
    if let Some(first) = bare.first() {
        let (count, name) = (bare.len(), first.name.clone());
        return Err(if imatrix.is_some() {
            PlanError::MissingEntries { count, first: name }
        } else {
            let ty = match options.target {
                Target::Quantize(f) => f.name().to_string(),
                _ => first.ty.to_string(),
            };
            PlanError::NeedsImatrix { count, first: name, ty }
        });
    }
    if let Some(i) = imatrix {
        let used = tensors.iter().filter(|t| t.importance.is_some()).count();
        let wanted = tensors.iter().filter(|t| uses_weights(t.ty)).count();
        if used == 0 && wanted > 0 {
            warnings.push(format!("imatrix: none of its {} entries fits a tensor to be quantized", i.entries.len()));
        } else if used < wanted {
            let bare: Vec<&str> = tensors
                .iter()
                .filter(|t| uses_weights(t.ty) && t.importance.is_none())
                .map(|t| t.name.as_str())
                .filter(|n| !matches!(*n, "token_embd.weight" | "output.weight"))
                .collect();
            if !bare.is_empty() {
                warnings.push(format!("imatrix: no entry for {} tensors, `{}` the first", bare.len(), bare[0]));
            }
        }
    }
    Ok(())
}

fn check_requantize(tensors: &[PlannedTensor], input: &Input, options: &Options) -> Result<(), PlanError> {
    if !input.is_gguf || options.recipe.allow_requantize {
        return Ok(());
    }
    match tensors.iter().find(|t| t.via.is_quantized() && t.ty != t.via) {
        Some(t) => Err(PlanError::Requantize { tensor: t.name.clone(), from: t.via, to: t.ty }),
        None => Ok(()),
    }
}

fn check_patterns(tensors: &[PlannedTensor], options: &Options, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    let unquantized = match options.target {
        Target::Quantize(f) => !f.default_type().is_quantized(),
        _ => true,
    };
    if unquantized && !options.tensor_types.is_empty() {
        warnings.push("--tensor-type has no effect on a file that is not quantized (as in llama-quantize)".into());
    }
    for (rule, text) in options.tensor_types.iter().zip(&options.recipe.tensor_type) {
        if !tensors.iter().any(|t| rule.matches(&t.name)) {
            return Err(PlanError::UnusedPattern(text.clone()));
        }
    }
    let fallen = tensors.iter().filter(|t| t.fallback_from.is_some()).count();
    if let Some(t) = tensors.iter().find(|t| t.fallback_from.is_some()) {
        warnings.push(format!(
            "{fallen} of {} tensors have rows that the wanted type does not divide and get another; the first: `{}`, \
             {} columns, {} instead of {}",
            tensors.len(),
            t.name,
            t.row_len(),
            t.ty,
            t.fallback_from.expect("just found")
        ));
    }
    Ok(())
}
