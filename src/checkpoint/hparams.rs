//! The hyper-parameters as typed values. Fields that `config.json` leaves out get the defaults of the transformers 5.23
//! config class (from the architecture's table); what cannot be right is refused with the file and the key.
//!
//! Both spellings are read: `torch_dtype` and `rope_scaling` + `rope_theta` (transformers 4), `dtype` and `rope_parameters`
//! (transformers 5).

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::rope::{Rope, RopeScaling};
use super::{CheckpointError, Config, json};
use crate::arch::{Architecture, Default as ClassDefault};

/// `LLAMA_MAX_LAYERS` of llama.cpp.
const MAX_LAYERS: u64 = 512;
/// No model is near this; it keeps every product of two dimensions inside u64 and every allocation sane.
const MAX_WIDTH: u64 = 1 << 24;
/// Four times the largest vocabulary published: a token list is filled up to this size.
const MAX_VOCAB: u64 = 1 << 22;

/// The hyper-parameters that shape tensors and metadata. All dimensions are at least 1 and at most 2^24.
#[derive(Clone, Debug)]
pub struct Hparams {
    /// The file they come from, for messages.
    pub file: PathBuf,
    /// `num_hidden_layers`.
    pub layers: u64,
    /// `hidden_size`.
    pub embed: u64,
    /// `intermediate_size`.
    pub feed_forward: u64,
    /// `num_attention_heads`.
    pub heads: u64,
    /// `num_key_value_heads`; divides `heads`.
    pub kv_heads: u64,
    /// Length of a head: `head_dim`, else hidden_size / heads.
    pub head_dim: u64,
    /// `head_dim` as the config class has it: `None` where neither the file nor the class does (then no key is written).
    pub explicit_head_dim: Option<u64>,
    /// Rows of the token embedding.
    pub vocab_size: u64,
    /// `max_position_embeddings`.
    pub context_length: u64,
    /// `rms_norm_eps`.
    pub rms_eps: f64,
    /// Rotary base and scaling.
    pub rope: Rope,
    /// `lm_head` is the token embedding.
    pub tie_word_embeddings: bool,
    /// Attention window in tokens, where the model has one.
    pub sliding_window: Option<u64>,
    /// `dtype` or `torch_dtype`, as written.
    pub dtype: Option<String>,
    /// How the stored weights are quantized, if they are.
    pub quantization: Option<Quantization>,
}

/// `quantization_config`.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// `quant_method`: fp8, gptq, compressed-tensors, mxfp4 ...
    pub method: String,
    /// `weight_block_size` (rows, columns) of fp8; `None`: one scale per tensor.
    pub weight_block_size: Option<(u64, u64)>,
}

impl Quantization {
    /// True for 8-bit float weights with `weight_scale_inv` or `weight_scale` tensors.
    pub fn is_fp8(&self) -> bool {
        self.method == "fp8"
    }
}

impl Hparams {
    /// Reads, completes and checks.
    pub fn read(config: &Config, arch: &Architecture) -> Result<Hparams, CheckpointError> {
        let r = Reader { config, arch };
        let layers = r.required(&["n_layers", "num_hidden_layers", "n_layer", "num_layers"], MAX_LAYERS)?;
        let embed = r.required(&["hidden_size", "n_embd", "dim"], MAX_WIDTH)?;
        let heads = r.required(&["num_attention_heads", "n_head", "n_heads"], MAX_WIDTH)?;
        let kv_heads = match config.values.get("num_key_value_heads") {
            // The config classes read an explicit null as "as many as heads", whatever their default is.
            Some(Json::Null) => heads,
            _ => {
                r.optional(&["num_key_value_heads", "n_kv_heads"], MAX_WIDTH, Shape { embed, heads })?.unwrap_or(heads)
            }
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(
                r.refuse("num_key_value_heads", format!("{kv_heads} does not divide num_attention_heads ({heads})"))
            );
        }
        let explicit_head_dim = r.optional(&["head_dim"], MAX_WIDTH, Shape { embed, heads })?;
        let head_dim = match explicit_head_dim {
            Some(dim) => dim,
            None => divided(embed, heads).ok_or_else(|| r.heads_do_not_divide(embed, heads))?,
        };
        if !head_dim.is_multiple_of(2) {
            return Err(r.refuse("head_dim", format!("{head_dim} is odd; rotary position embedding needs pairs")));
        }
        if heads.checked_mul(head_dim).is_none_or(|n| n > MAX_WIDTH) {
            return Err(r.refuse("head_dim", format!("{heads} heads of {head_dim} are more than {MAX_WIDTH} columns")));
        }
        let context_length = r
            .optional(&["max_position_embeddings", "n_ctx", "n_positions"], u32::MAX.into(), Shape { embed, heads })?
            .ok_or_else(|| r.missing("max_position_embeddings"))?;
        Ok(Hparams {
            file: config.file.clone(),
            layers,
            embed,
            feed_forward: r.required(&["intermediate_size", "n_inner", "hidden_dim"], MAX_WIDTH)?,
            heads,
            kv_heads,
            head_dim,
            explicit_head_dim,
            vocab_size: r.required(&["vocab_size"], MAX_VOCAB)?,
            context_length,
            rms_eps: r.positive_float(&["rms_norm_eps", "norm_eps"])?,
            rope: Rope::read(config, r.default_float("rope_theta").unwrap_or(10000.0), context_length, head_dim)?,
            tie_word_embeddings: r.boolean("tie_word_embeddings")?.unwrap_or(false),
            sliding_window: r.optional(&["sliding_window"], u32::MAX.into(), Shape { embed, heads })?,
            dtype: config.get(&["dtype", "torch_dtype"]).and_then(Json::as_str).map(str::to_string),
            quantization: r.quantization()?,
        })
    }

    /// Columns of the query projection's output.
    pub fn query_width(&self) -> u64 {
        self.heads * self.head_dim
    }

    /// Columns of the key and value projections' output.
    pub fn kv_width(&self) -> u64 {
        self.kv_heads * self.head_dim
    }

    /// Rotary scaling, for short.
    pub fn rope_scaling(&self) -> &RopeScaling {
        &self.rope.scaling
    }
}

fn divided(embed: u64, heads: u64) -> Option<u64> {
    embed.is_multiple_of(heads).then(|| embed / heads)
}

/// What defaults may refer to.
#[derive(Clone, Copy)]
struct Shape {
    embed: u64,
    heads: u64,
}

struct Reader<'a> {
    config: &'a Config,
    arch: &'a Architecture,
}

impl Reader<'_> {
    fn file(&self) -> &Path {
        &self.config.file
    }

    fn refuse(&self, key: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::key(self.file(), key, reason)
    }

    fn missing(&self, key: &str) -> CheckpointError {
        self.refuse(key, format!("missing; {} needs it", self.arch.hf))
    }

    fn heads_do_not_divide(&self, embed: u64, heads: u64) -> CheckpointError {
        self.refuse(
            "hidden_size",
            format!("{embed} is no multiple of num_attention_heads ({heads}), and there is no head_dim"),
        )
    }

    fn checked(&self, key: &str, value: &Json, max: u64) -> Result<u64, CheckpointError> {
        match json::as_integer(value) {
            Some(n) if n >= 1 && n <= i128::from(max) => Ok(n as u64),
            Some(n) => Err(self.refuse(key, format!("{n} is not between 1 and {max}"))),
            None => {
                let shown = if value.is_number() { value.to_string() } else { json::kind(value).to_string() };
                Err(self.refuse(key, format!("{shown}, where a whole number was expected")))
            }
        }
    }

    /// A number that the file must hold.
    fn required(&self, names: &[&str], max: u64) -> Result<u64, CheckpointError> {
        let (key, value) = self.config.find(names).ok_or_else(|| {
            let usual = names.iter().find(|n| n.starts_with("num_")).unwrap_or(&names[0]);
            self.missing(usual)
        })?;
        self.checked(key, value, max)
    }

    /// A number that may be missing; then the class's default, if it has one.
    fn optional(&self, names: &[&str], max: u64, shape: Shape) -> Result<Option<u64>, CheckpointError> {
        if let Some((key, value)) = self.config.find(names) {
            return self.checked(key, value, max).map(Some);
        }
        // A null stands for "none" where the class does not fill it in itself.
        let null = names.iter().any(|n| self.config.values.get(*n).is_some_and(Json::is_null));
        match self.default(names[0]) {
            Some(ClassDefault::SameAsHeads) => Ok(Some(shape.heads)),
            Some(ClassDefault::HiddenOverHeads) => divided(shape.embed, shape.heads)
                .map(Some)
                .ok_or_else(|| self.heads_do_not_divide(shape.embed, shape.heads)),
            Some(ClassDefault::Int(n)) if !null => Ok(Some(n)),
            _ => Ok(None),
        }
    }

    fn default(&self, key: &str) -> Option<ClassDefault> {
        self.arch.defaults.iter().find(|(k, _)| *k == key).map(|(_, d)| *d)
    }

    fn default_float(&self, key: &str) -> Option<f64> {
        match self.default(key)? {
            ClassDefault::Float(f) => Some(f),
            _ => None,
        }
    }

    fn positive_float(&self, names: &[&str]) -> Result<f64, CheckpointError> {
        let Some((key, value)) = self.config.find(names) else {
            return self.default_float(names[0]).ok_or_else(|| self.missing(names[0]));
        };
        float(self.file(), key, value)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        match self.config.get(&[key]) {
            Some(Json::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.refuse(key, format!("{}, where true or false was expected", json::kind(other)))),
            None => Ok(match self.default(key) {
                Some(ClassDefault::Bool(b)) => Some(b),
                _ => None,
            }),
        }
    }

    fn quantization(&self) -> Result<Option<Quantization>, CheckpointError> {
        const KEY: &str = "quantization_config";
        let Some(value) = self.config.get(&[KEY]) else { return Ok(None) };
        let Json::Object(q) = value else {
            return Err(self.refuse(KEY, format!("{}, where an object was expected", json::kind(value))));
        };
        let method = match q.get("quant_method") {
            Some(Json::String(method)) => method.clone(),
            _ => return Err(self.refuse("quantization_config.quant_method", "missing or not a string")),
        };
        const BLOCK: &str = "quantization_config.weight_block_size";
        let weight_block_size = match q.get("weight_block_size") {
            None | Some(Json::Null) => None,
            Some(Json::Array(sizes)) if sizes.len() == 2 => {
                Some((self.checked(BLOCK, &sizes[0], MAX_WIDTH)?, self.checked(BLOCK, &sizes[1], MAX_WIDTH)?))
            }
            Some(_) => return Err(self.refuse(BLOCK, "not a list of two whole numbers")),
        };
        Ok(Some(Quantization { method, weight_block_size }))
    }
}

/// A finite number above zero that is still one as f32 (GGUF stores f32).
pub(super) fn float(file: &Path, key: &str, value: &Json) -> Result<f64, CheckpointError> {
    match value.as_f64() {
        Some(f) if f > 0.0 && (f as f32).is_finite() && f as f32 > 0.0 => Ok(f),
        Some(f) => Err(CheckpointError::key(file, key, format!("{f} is not a positive number of single precision"))),
        None => Err(CheckpointError::key(file, key, format!("{}, where a number was expected", json::kind(value)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 100"#;

    fn read(extra: &str) -> Result<Hparams, CheckpointError> {
        // As in every JSON reader the last of equal keys counts.
        let Json::Object(raw) = serde_json::from_str(&format!("{LLAMA}{extra}}}")).unwrap() else { panic!() };
        let config = Config::from_object(Path::new("config.json"), raw)?;
        config.hparams(config.architecture()?)
    }

    #[test]
    fn class_defaults_fill_in() {
        let hp = read("").unwrap();
        assert_eq!((hp.kv_heads, hp.head_dim, hp.explicit_head_dim), (4, 16, Some(16)));
        assert_eq!((hp.context_length, hp.rms_eps, hp.rope.theta), (2048, 1e-6, 10000.0));
        assert!(!hp.tie_word_embeddings);
        let qwen = read(r#", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": null"#).unwrap();
        assert_eq!((qwen.kv_heads, qwen.head_dim, qwen.explicit_head_dim), (4, 16, None));
        let mistral =
            read(r#", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": null"#);
        assert_eq!(mistral.unwrap().sliding_window, None);
    }

    #[test]
    fn impossible_values_are_refused_by_key() {
        for (extra, key) in [
            (r#", "hidden_size": 0"#, "hidden_size"),
            (r#", "hidden_size": -64"#, "hidden_size"),
            (r#", "hidden_size": 64.0"#, "hidden_size"),
            (r#", "hidden_size": 66"#, "hidden_size"),
            (r#", "hidden_size": 184467440737095516160"#, "hidden_size"),
            (r#", "vocab_size": 4294967296"#, "vocab_size"),
            (r#", "num_hidden_layers": 1000000"#, "num_hidden_layers"),
            (r#", "num_key_value_heads": 3"#, "num_key_value_heads"),
            (r#", "num_key_value_heads": "2""#, "num_key_value_heads"),
            (r#", "head_dim": 15"#, "head_dim"),
            (r#", "head_dim": 16777216"#, "head_dim"),
            (r#", "rms_norm_eps": 0"#, "rms_norm_eps"),
            (r#", "rms_norm_eps": 1e-60"#, "rms_norm_eps"),
            (r#", "tie_word_embeddings": 1"#, "tie_word_embeddings"),
            (r#", "quantization_config": {}"#, "quantization_config.quant_method"),
            (
                r#", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}"#,
                "quantization_config.weight_block_size",
            ),
        ] {
            let message = read(extra).expect_err(extra).to_string();
            assert!(message.starts_with(&format!("config.json: key `{key}`: ")), "{extra}: {message}");
        }
    }
}
