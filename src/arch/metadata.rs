//! All keys of a GGUF file from a checkpoint folder, in the order in which the reference writes them.
//!
//! Source: `ModelBase.prepare_metadata`, `TextModel.set_gguf_parameters` in `conversion/base.py` and
//! `LlamaModel.set_gguf_parameters` in `conversion/llama.py` of llama.cpp b11434. Integers are u32, other numbers f32. Where
//! the reference takes any field that `config.json` happens to hold, so does this.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::Architecture;
use crate::checkpoint::general::{General, Naming};
use crate::checkpoint::naming::ParamCount;
use crate::checkpoint::rope::RopeScaling;
use crate::checkpoint::{CheckpointError, Config, Hparams, json};
use crate::gguf::{Array, Metadata, Value, value};
use crate::tokenizer::{self, Request};

pub use crate::checkpoint::rope::rope_freqs;

/// `GGML_QNT_VERSION`.
const QUANTIZATION_VERSION: u32 = 2;

/// What the caller knows and the user wants.
#[derive(Clone, Debug, Default)]
pub struct MetadataOptions {
    /// `--model-name`: `general.name`.
    pub model_name: Option<String>,
    /// `--metadata`: a JSON file of keys that go before all other sources.
    pub metadata_file: Option<PathBuf>,
    /// `--chat-template`: a file that takes the place of the folder's template.
    pub chat_template: Option<PathBuf>,
    /// `--pre`: `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `general.file_type` (`llama_ftype`).
    pub file_type: u32,
    /// `--vocab-only`: no tensors are written, so they do not count for size labels.
    pub vocab_only: bool,
    /// The tensors that will be written, for the size label.
    pub params: ParamCount,
    /// Rows of `model.embed_tokens.weight`, to check the vocabulary against.
    pub embedding_rows: Option<u64>,
}

/// The keys, and what to tell the user.
#[derive(Clone, Debug)]
pub struct Built {
    pub metadata: Metadata,
    pub warnings: Vec<String>,
    /// Label and text: tokenizer, pre-tokenizer, bos, eos, eot, chat template.
    pub summary: Vec<(String, String)>,
    /// Parts for the name of the output file.
    pub stem: OutputName,
}

/// The name of the output file without its encoding (see [`OutputName::stem`]).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutputName {
    name: Option<String>,
    basename: Option<String>,
    finetune: Option<String>,
    version: Option<String>,
    size_label: Option<String>,
}

impl OutputName {
    /// `Name-7B-Finetune-v1-Q8_0`, as the reference names its files. `encoding`: the type; `None` for `--vocab-only`.
    pub fn stem(&self, encoding: Option<&str>) -> String {
        crate::checkpoint::naming::file_stem(
            self.name.as_deref(),
            self.basename.as_deref(),
            self.finetune.as_deref(),
            self.version.as_deref(),
            self.size_label.as_deref().filter(|_| encoding.is_some()),
            encoding,
            encoding.is_none(),
        )
    }
}

/// Builds all keys of a file. Keys of a split file are the writer's business.
pub fn build(
    folder: &Path,
    config: &Config,
    hp: &Hparams,
    arch: &Architecture,
    options: &MetadataOptions,
) -> Result<Built, CheckpointError> {
    let mut metadata = Metadata::new();
    let mut warnings = hp.rope.warnings.clone();
    value::set(&mut metadata, "general.architecture", arch.gguf.into());
    value::set(&mut metadata, "general.type", "model".into());
    let naming = Naming { model_name: options.model_name.as_deref(), metadata_file: options.metadata_file.as_deref() };
    let params = if options.vocab_only { ParamCount::default() } else { options.params };
    let general = General::gather(folder, config, naming, &params, &mut warnings)?;
    general.write(&mut metadata, &mut warnings);
    Keys { config, prefix: arch.gguf, metadata: &mut metadata }.write(hp, arch, options.file_type)?;
    value::set(&mut metadata, "general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    let request = Request {
        folder,
        config,
        order: arch.vocab,
        class: arch.hf,
        vocab_size: hp.vocab_size,
        embedding_rows: options.embedding_rows,
        pre: options.pre.as_deref(),
        chat_template: options.chat_template.as_deref(),
    };
    let report = tokenizer::write(&mut metadata, &request)?;
    warnings.extend(report.warnings);
    let text = |key: &str| general.text(key).map(str::to_string);
    let stem = OutputName {
        name: text("name"),
        basename: text("basename"),
        finetune: text("finetune"),
        version: text("version"),
        size_label: text("size_label"),
    };
    Ok(Built { metadata, warnings, summary: report.summary, stem })
}

/// Writes the keys that begin with the architecture's name.
struct Keys<'a> {
    config: &'a Config,
    prefix: &'a str,
    metadata: &'a mut Metadata,
}

impl Keys<'_> {
    fn set(&mut self, key: &str, value: Value) {
        value::set(self.metadata, &format!("{}.{key}", self.prefix), value);
    }

    fn int(&mut self, key: &str, n: u64) {
        // Hparams are at most 2^32 - 1.
        self.set(key, Value::U32(u32::try_from(n).unwrap_or(u32::MAX)));
    }

    fn float(&mut self, key: &str, f: f64) {
        self.set(key, Value::F32(f as f32));
    }

    fn float_if(&mut self, key: &str, f: Option<f64>) {
        if let Some(f) = f {
            self.float(key, f);
        }
    }

    /// A whole number that the file may hold under one of `names`.
    fn int_of(&mut self, key: &str, names: &[&str]) -> Result<(), CheckpointError> {
        let Some((name, value)) = self.config.find(names) else { return Ok(()) };
        match json::as_integer(value).and_then(|n| u32::try_from(n).ok()) {
            Some(n) => {
                self.set(key, Value::U32(n));
                Ok(())
            }
            None => Err(CheckpointError::key(
                &self.config.file,
                name,
                format!("{value:.100} is not a whole number of 32 bits"),
            )),
        }
    }

    fn write(&mut self, hp: &Hparams, arch: &Architecture, file_type: u32) -> Result<(), CheckpointError> {
        self.int("block_count", hp.layers);
        self.int("context_length", hp.context_length);
        self.int("embedding_length", hp.embed);
        self.int("feed_forward_length", hp.feed_forward);
        self.int("attention.head_count", hp.heads);
        self.int("attention.head_count_kv", hp.kv_heads);
        if self.config.get(&["is_causal"]) == Some(&Json::Bool(false)) {
            self.set("attention.causal", Value::Bool(false));
        }
        self.rope(hp)?;
        self.float("attention.layer_norm_rms_epsilon", hp.rms_eps);
        self.layer_norm()?;
        self.experts()?;
        if let Some(dim) = hp.explicit_head_dim {
            self.int("attention.key_length", dim);
            self.int("attention.value_length", dim);
        }
        value::set(self.metadata, "general.file_type", Value::U32(file_type));
        if arch.llama_tail {
            self.int("vocab_size", hp.vocab_size);
            self.int("rope.dimension_count", hp.head_dim);
        }
        Ok(())
    }

    fn rope(&mut self, hp: &Hparams) -> Result<(), CheckpointError> {
        match &hp.rope.scaling {
            RopeScaling::None | RopeScaling::Dynamic | RopeScaling::Llama3(_) => {}
            RopeScaling::Linear { factor } => {
                self.set("rope.scaling.type", "linear".into());
                self.float("rope.scaling.factor", *factor);
            }
            RopeScaling::Yarn(yarn) => {
                self.set("rope.scaling.type", "yarn".into());
                self.float("rope.scaling.factor", yarn.factor);
                self.int("rope.scaling.original_context_length", yarn.original_context);
                self.float_if("rope.scaling.yarn_ext_factor", yarn.ext_factor);
                self.float_if("rope.scaling.yarn_attn_factor", yarn.attention_factor);
                self.float_if("rope.scaling.yarn_beta_fast", yarn.beta_fast);
                self.float_if("rope.scaling.yarn_beta_slow", yarn.beta_slow);
            }
            RopeScaling::LongRope => self.set("rope.scaling.type", "longrope".into()),
        }
        if let Some(sections) = self.sections()? {
            self.set("rope.dimension_sections", Value::Array(Array::I32(sections)));
        }
        self.float("rope.freq_base", hp.rope.theta);
        Ok(())
    }

    /// `mrope_section`, filled up to four.
    fn sections(&self) -> Result<Option<Vec<i32>>, CheckpointError> {
        let scaling = self.config.get(&["rope_scaling"]).or_else(|| self.config.get(&["rope_parameters"]));
        let Some(list) = scaling.and_then(|s| s.get("mrope_section")) else { return Ok(None) };
        let numbers = list.as_array().map(|l| l.iter().map(|n| json::as_integer(n).and_then(|n| n.try_into().ok())));
        let Some(mut sections) = numbers.and_then(|n| n.collect::<Option<Vec<i32>>>()) else {
            return Err(CheckpointError::key(
                &self.config.file,
                "rope_scaling.mrope_section",
                "not a list of whole numbers",
            ));
        };
        sections.resize(4, 0);
        Ok(Some(sections))
    }

    fn layer_norm(&mut self) -> Result<(), CheckpointError> {
        let Some((name, value)) = self.config.find(&["layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"]) else {
            return Ok(());
        };
        match value.as_f64() {
            Some(f) => self.float("attention.layer_norm_epsilon", f),
            None => return Err(CheckpointError::key(&self.config.file, name, "not a number")),
        }
        Ok(())
    }

    fn experts(&mut self) -> Result<(), CheckpointError> {
        self.int_of("expert_count", &["num_local_experts", "num_experts", "n_routed_experts"])?;
        self.int_of("expert_used_count", &["num_experts_per_tok", "num_experts_per_token", "top_k_experts"])?;
        self.int_of("expert_group_count", &["n_group"])?;
        self.int_of("expert_group_used_count", &["topk_group"])?;
        const SCORES: &[&str] = &[
            "score_function",
            "scoring_func",
            "score_func",
            "moe_router_activation",
            "moe_router_activation_func",
            "expert_selection_fn",
        ];
        let Some((name, value)) = self.config.find(SCORES) else { return Ok(()) };
        let id = match value.as_str() {
            Some("softmax") => 1,
            Some("sigmoid") => 2,
            Some("sqrtsoftplus") => 4,
            _ => {
                return Err(CheckpointError::key(
                    &self.config.file,
                    name,
                    format!("{value:.100} is not a known gating function"),
                ));
            }
        };
        self.set("expert_gating_func", Value::U32(id));
        Ok(())
    }
}
