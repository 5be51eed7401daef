//! Opening the input: a folder or a GGUF file becomes a [`TensorSource`], the keys of the output and a few facts.

use std::path::Path;
use std::sync::Arc;

use super::mix::ModelFacts;
use super::options::{Options, OutType, Target, Via};
use crate::arch::metadata::{self, MetadataOptions};
use crate::checkpoint::naming::ParamCount;
use crate::checkpoint::{CheckpointError, Config, Weights, rope};
use crate::gguf::{self, GgmlType, Metadata, Value};
use crate::source::{CheckpointSource, GgufSource, MapOptions, TensorSource};
use crate::transform::{TransformError, TransformedSource, Transforms};

/// An opened input.
pub struct Input {
    pub source: Box<dyn TensorSource>,
    /// Keys as the converter writes them, before quantization adds its own.
    pub metadata: Metadata,
    pub warnings: Vec<String>,
    /// What was found, to be shown: tokenizer, special tokens, chat template.
    pub summary: Vec<(String, String)>,
    /// The input is a GGUF file.
    pub is_gguf: bool,
    /// The type that `auto` stands for.
    pub auto: OutType,
    /// Transforms that it was made with: its name and the pairs in it.
    pub transform: Option<(String, Vec<String>)>,
}

/// Keys of transformed files; a file made from one keeps them.
pub const TRANSFORM_KEY: &str = "ostq.transform";
/// The kinds of pairs, as a transforms file names them.
pub const PAIRS_KEY: &str = "ostq.transform.pairs";

impl Input {
    /// Opens a folder with config.json or a GGUF file.
    pub fn open(path: &Path, options: &Options) -> Result<Input, CheckpointError> {
        let meta = std::fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?;
        if meta.is_dir() { open_folder(path, options) } else { open_file(path, options) }
    }

    /// Puts transforms between the weights and everybody who reads them.
    pub fn transform(&mut self, path: &Path, transforms: Arc<Transforms>) -> Result<(), TransformError> {
        let source = std::mem::replace(&mut self.source, Box::new(NoWeights));
        self.source = Box::new(TransformedSource::new(path, source, &self.metadata, transforms)?);
        Ok(())
    }

    /// What the type mix needs to know, from the keys.
    pub fn facts(&self, metadata: &Metadata) -> ModelFacts {
        let arch = gguf::value::get(metadata, "general.architecture").and_then(Value::as_str).unwrap_or("").to_string();
        let number = |key: &str| match gguf::value::get(metadata, &format!("{arch}.{key}")) {
            Some(Value::Array(gguf::Array::I32(v))) => v.first().map_or(0, |&n| n.max(0) as u64),
            Some(Value::Array(gguf::Array::U32(v))) => v.first().map_or(0, |&n| n.into()),
            Some(v) => v.as_u64().unwrap_or(0),
            None => 0,
        };
        let heads = number("attention.head_count");
        let kv = format!("{arch}.attention.head_count_kv");
        ModelFacts {
            layers: number("block_count"),
            heads,
            kv_heads: if gguf::value::get(metadata, &kv).is_some() { number("attention.head_count_kv") } else { heads },
            experts: number("expert_count"),
            arch,
        }
    }
}

fn open_folder(path: &Path, options: &Options) -> Result<Input, CheckpointError> {
    let config = Config::load(path)?;
    let arch = config.architecture()?;
    let hp = config.hparams(arch)?;
    let r = &options.recipe;
    if let Some(q) = hp.quantization.as_ref().filter(|q| q.method != "fp8") {
        return Err(CheckpointError::key(
            &hp.file,
            "quantization_config.quant_method",
            format!("`{}` checkpoints cannot be read; take the original 16-bit checkpoint (fp8 can be read)", q.method),
        ));
    }
    let mut params = ParamCount::default();
    let mut embedding_rows = None;
    let (source, auto): (Box<dyn TensorSource>, OutType) = if r.vocab_only {
        // the type is named after the weights all the same
        let auto = Weights::open(path)
            .ok()
            .and_then(|w| CheckpointSource::new(w, arch, &hp, Vec::new(), MapOptions::default()).ok())
            .map_or(OutType::F16, |s| s.auto_type());
        (Box::new(NoWeights), auto)
    } else {
        let weights = Weights::open(path)?;
        let computed = rope::rope_freqs(&hp).filter(|_| arch.rope_freqs).map(|v| ("rope_freqs.weight".to_string(), v));
        let map = MapOptions { fuse_qkv: r.fuse_qkv };
        let source = CheckpointSource::new(weights, arch, &hp, computed.into_iter().collect(), map)?;
        for t in source.tensors() {
            let shape: Vec<u64> = t.dims.iter().rev().copied().collect();
            params.add(&t.name, &shape);
            if t.name == "token_embd.weight" {
                embedding_rows = Some(t.rows());
            }
        }
        let auto = source.auto_type();
        (Box::new(source), auto)
    };
    let file_type = match options.target {
        Target::Outtype(Some(o)) => o.file_type() as u32,
        Target::Outtype(None) => auto.file_type() as u32,
        Target::Quantize(_) | Target::Copy if r.vocab_only => auto.file_type() as u32,
        Target::Quantize(_) | Target::Copy => via_type(options.via, &*source) as u32,
    };
    let built = metadata::build(
        path,
        &config,
        &hp,
        arch,
        &MetadataOptions {
            model_name: r.model_name.clone(),
            metadata_file: r.metadata.clone(),
            chat_template: r.chat_template.clone(),
            pre: r.pre.clone(),
            file_type,
            vocab_only: r.vocab_only,
            embedding_rows,
            params,
        },
    )?;
    Ok(Input {
        source,
        metadata: built.metadata,
        warnings: built.warnings,
        summary: built.summary,
        is_gguf: false,
        auto,
        transform: None,
    })
}

/// `general.file_type` of the file between the two steps; `auto` is named after its first matrix.
fn via_type(via: Via, source: &dyn TensorSource) -> super::FileType {
    match via {
        Via::Auto => match source.tensors().iter().find(|t| t.dims.len() >= 2).map(|t| t.stored) {
            Some(GgmlType::BF16) => super::FileType::BF16,
            Some(GgmlType::F16) => super::FileType::F16,
            _ => super::FileType::F32,
        },
        Via::F32 => OutType::F32.file_type(),
        Via::F16 => OutType::F16.file_type(),
        Via::BF16 => OutType::BF16.file_type(),
    }
}

fn open_file(path: &Path, options: &Options) -> Result<Input, CheckpointError> {
    let source = GgufSource::open(path)?;
    if let Target::Outtype(_) = options.target {
        return Err(CheckpointError::file(path, "--outtype converts a checkpoint folder; for a GGUF file say --type"));
    }
    let r = &options.recipe;
    let checkpoint_only = [
        ("--model-name", r.model_name.is_some()),
        ("--metadata", r.metadata.is_some()),
        ("--chat-template", r.chat_template.is_some()),
        ("--pre", r.pre.is_some()),
        ("--vocab-only", r.vocab_only),
        ("--fuse-qkv", r.fuse_qkv),
        ("--fp8-as-q8", r.fp8_as_q8),
        ("--via", options.via != Via::Auto),
    ];
    if let Some((flag, _)) = checkpoint_only.iter().find(|(_, given)| *given) {
        let reason = format!("{flag} is for a checkpoint folder, this is a GGUF file; --override-kv sets single keys");
        return Err(CheckpointError::file(path, reason));
    }
    let mut metadata = source.header.metadata.clone();
    // the output is laid out at the default alignment, is one file, and says itself what it was made from
    let stale =
        |k: &str| k == "general.alignment" || k.starts_with("split.") || k.starts_with(super::PROVENANCE_PREFIX);
    // what was done to the weights stays true of what is made from them
    let kept = |k: &str| k.starts_with(TRANSFORM_KEY) && !r.no_provenance;
    let transform = gguf::value::get(&metadata, TRANSFORM_KEY).and_then(Value::as_str).map(|name| {
        let pairs = match gguf::value::get(&metadata, PAIRS_KEY) {
            Some(Value::Array(gguf::Array::Str(v))) => {
                v.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect()
            }
            _ => Vec::new(),
        };
        (name.to_string(), pairs)
    });
    metadata.retain(|(k, _)| !stale(k) || kept(k));
    if gguf::value::get(&metadata, "general.architecture").and_then(Value::as_str).is_none() {
        return Err(CheckpointError::file(path, "key `general.architecture` is missing: not a model"));
    }
    let unreadable = source.tensors().iter().find(|t| crate::formats::format(t.stored).is_none());
    if let Some(t) = unreadable.filter(|_| options.target != Target::Copy) {
        return Err(CheckpointError::tensor(path, &t.name, format!("{} can only be copied (--type copy)", t.stored)));
    }
    let has_bf16 = source.tensors().iter().any(|t| t.stored == GgmlType::BF16);
    Ok(Input {
        source: Box::new(source),
        metadata,
        warnings: Vec::new(),
        summary: Vec::new(),
        is_gguf: true,
        auto: if has_bf16 { OutType::BF16 } else { OutType::F16 },
        transform,
    })
}

/// `--vocab-only`.
struct NoWeights;

impl TensorSource for NoWeights {
    fn tensors(&self) -> &[crate::source::SourceTensor] {
        &[]
    }
    fn files(&self) -> &[crate::mapped::MappedFile] {
        &[]
    }
    fn read_rows(&self, _: usize, _: std::ops::Range<u64>, _: &mut [f32]) {}
    fn copy_rows(&self, _: usize, _: std::ops::Range<u64>, _: &mut [u8]) {}
    fn release(&self, _: usize, _: std::ops::Range<u64>) {}
}
