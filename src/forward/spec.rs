//! What the forward pass must know of a model, from the GGUF keys (a checkpoint has them too: the plan makes them).
//!
//! One row of `TRAITS` per architecture says what the keys leave unsaid; everything else is read off keys and the
//! tensors that are there. Source: `load_arch_hparams` and the graphs in `src/models/*.cpp` of llama.cpp b11434.

use super::ForwardError;
use super::rope::RopeScale;
use crate::gguf::{self, Array, Metadata, Value};

/// Which elements of a head rotary embedding pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// 2i and 2i + 1 (`LLAMA_ROPE_TYPE_NORM`).
    Interleaved,
    /// i and i + n/2 (`LLAMA_ROPE_TYPE_NEOX`).
    Halves,
}

/// Activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// tanh form.
    Gelu,
}

/// What an architecture does that no key says.
struct Traits {
    arch: &'static str,
    rope: RopeStyle,
    activation: Activation,
    /// Embeddings are multiplied by sqrt(width).
    embedding_by_width: bool,
    /// Every n-th layer sees everything, the others a window (`load_swa_pattern`).
    window_pattern: u64,
    /// Window where the key is missing.
    default_window: Option<u64>,
    /// Rotary base of windowed layers where the key is missing; `None`: as the others.
    window_rope_base: Option<f64>,
    /// Every n-th layer has no rotary embedding.
    no_rope_step: Option<u64>,
}

const PLAIN: Traits = Traits {
    arch: "llama",
    rope: RopeStyle::Interleaved,
    activation: Activation::Silu,
    embedding_by_width: false,
    window_pattern: 0,
    default_window: None,
    window_rope_base: None,
    no_rope_step: None,
};
const HALVES: Traits = Traits { rope: RopeStyle::Halves, ..PLAIN };
const GEMMA: Traits = Traits { activation: Activation::Gelu, embedding_by_width: true, ..HALVES };

/// Architectures that can be run. Phi-3's window is off in llama.cpp.
static TRAITS: &[Traits] = &[
    PLAIN,
    Traits { arch: "granite", ..PLAIN },
    Traits { arch: "smollm3", no_rope_step: Some(4), ..PLAIN },
    Traits { arch: "qwen2", ..HALVES },
    Traits { arch: "qwen3", ..HALVES },
    Traits { arch: "qwen3moe", ..HALVES },
    Traits { arch: "olmo2", window_pattern: 4, ..HALVES },
    Traits { arch: "phi3", ..HALVES },
    Traits { arch: "gemma2", window_pattern: 2, default_window: Some(4096), ..GEMMA },
    Traits { arch: "gemma3", window_pattern: 6, window_rope_base: Some(10000.0), ..GEMMA },
];

/// A decoder. Lengths in elements.
#[derive(Clone, Debug)]
pub struct Spec {
    pub arch: String,
    pub layers: usize,
    /// Width of the residual stream.
    pub embed: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_eps: f32,
    pub rope_style: RopeStyle,
    /// Rotated elements of a head.
    pub rope_dims: usize,
    pub rope: RopeScale,
    /// Of windowed layers.
    pub window_rope: RopeScale,
    pub activation: Activation,
    /// Multiplies the embeddings.
    pub embedding_scale: f32,
    /// Multiplies what a branch adds to the stream.
    pub residual_scale: f32,
    /// Multiplies q·k.
    pub attention_scale: f32,
    /// Multiplies the logits.
    pub logit_scale: f32,
    pub attention_soft_cap: Option<f32>,
    pub final_soft_cap: Option<f32>,
    /// Tokens that a windowed layer sees, itself included.
    pub window: Option<usize>,
    windowed: Vec<bool>,
    no_rope_step: Option<u64>,
    /// Experts in all and per token; 0: dense.
    pub experts: usize,
    pub experts_used: usize,
    /// Multiplies the experts' sum (`expert_weights_scale`).
    pub expert_scale: f32,
    /// Words of the vocabulary, where the keys name them.
    pub vocab: Option<usize>,
    /// `context_length`.
    pub context: usize,
}

/// Keys of one architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        gguf::value::get(self.metadata, &format!("{}.{key}", self.arch))
    }

    fn bad(&self, key: &str, why: impl Into<String>) -> ForwardError {
        ForwardError::Key { key: format!("{}.{key}", self.arch), why: why.into() }
    }

    /// A length; an array counts if all its values are equal.
    fn opt(&self, key: &str) -> Result<Option<usize>, ForwardError> {
        let n = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(Array::I32(v))) if !v.is_empty() && v.iter().all(|x| *x == v[0]) => {
                u64::try_from(v[0]).ok()
            }
            Some(Value::Array(Array::U32(v))) if !v.is_empty() && v.iter().all(|x| *x == v[0]) => Some(v[0].into()),
            Some(Value::Array(_)) => {
                return Err(self.bad(key, "values that differ from layer to layer cannot be run yet"));
            }
            Some(v) => v.as_u64(),
        };
        // nothing is near these; products of two stay far below 2^64
        let most = match key {
            "block_count" => 1 << 12,
            k if k.contains("context_length") || k.contains("window") => 1 << 32,
            _ => 1 << 24,
        };
        match n {
            Some(n) if n <= most => Ok(Some(n as usize)),
            Some(n) => Err(self.bad(key, format!("{n} is more than {most}"))),
            None => Err(self.bad(key, "not a length")),
        }
    }

    fn int(&self, key: &str) -> Result<usize, ForwardError> {
        match self.opt(key)? {
            Some(n) if n > 0 => Ok(n),
            Some(_) => Err(self.bad(key, "is 0")),
            None => Err(self.bad(key, "missing")),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ForwardError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(f)) if f.is_finite() => Ok(Some(f64::from(*f))),
            Some(Value::F64(f)) if f.is_finite() => Ok(Some(*f)),
            Some(_) => Err(self.bad(key, "not a finite number")),
        }
    }

    fn str(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }
}

impl Spec {
    /// Reads the keys; what cannot be run is refused with the key.
    pub fn read(metadata: &Metadata) -> Result<Spec, ForwardError> {
        let arch = gguf::value::get(metadata, "general.architecture")
            .and_then(Value::as_str)
            .ok_or_else(|| ForwardError::Key { key: "general.architecture".into(), why: "missing".into() })?;
        let traits = TRAITS.iter().find(|t| t.arch == arch).ok_or_else(|| ForwardError::Architecture {
            arch: arch.to_string(),
            known: TRAITS.iter().map(|t| t.arch).collect::<Vec<_>>().join(", "),
        })?;
        let k = Keys { metadata, arch };
        let (layers, embed, heads) =
            (k.int("block_count")?, k.int("embedding_length")?, k.int("attention.head_count")?);
        let kv_heads = k.opt("attention.head_count_kv")?.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(k.bad("attention.head_count_kv", format!("{kv_heads} does not divide {heads} heads")));
        }
        let head_dim = match k.opt("attention.key_length")? {
            Some(n) => n,
            None if embed.is_multiple_of(heads) => embed / heads,
            None => return Err(k.bad("attention.key_length", "missing, and the heads do not divide the width")),
        };
        if k.opt("attention.value_length")?.is_some_and(|n| n != head_dim) {
            return Err(k.bad("attention.value_length", "differs from the key length: cannot be run yet"));
        }
        let rope_dims = k.opt("rope.dimension_count")?.unwrap_or(head_dim);
        if head_dim == 0 || rope_dims > head_dim || !rope_dims.is_multiple_of(2) {
            return Err(k.bad("rope.dimension_count", format!("{rope_dims} of a head of {head_dim}")));
        }
        let context = k.int("context_length")?;
        let rope = read_rope(&k, context)?;
        let window = match k.opt("attention.sliding_window")? {
            _ if traits.window_pattern == 0 => None,
            found => found.or(traits.default_window.map(|n| n as usize)).filter(|&n| n > 0),
        };
        let mut window_rope = rope.clone();
        if let Some(base) = traits.window_rope_base {
            window_rope.base = k.float("rope.freq_base_swa")?.unwrap_or(base);
        }
        if window.is_some() && traits.arch != "gemma2" {
            // windowed layers of Gemma 3 and OLMo 3 know no scaling
            (window_rope.freq_scale, window_rope.ext_factor, window_rope.attn_factor) = (1.0, 0.0, 1.0);
        }
        let windowed = window_pattern(&k, traits, layers)?;
        let positive = |key: &str| k.float(key).map(|f| f.filter(|&f| f != 0.0).map(|f| f as f32));
        // gemma2, gemma3 of 27B: the scale of the width per head instead of that of the head
        let by_width = matches!((arch, layers), ("gemma2", 46) | ("gemma3", 62));
        let per_head = if by_width { embed / heads } else { head_dim };
        let experts = k.opt("expert_count")?.unwrap_or(0);
        let experts_used = k.opt("expert_used_count")?.unwrap_or(0);
        if experts > 0 && (experts_used == 0 || experts_used > experts) {
            return Err(k.bad("expert_used_count", format!("{experts_used} of {experts} experts")));
        }
        if let Some(f) = k.opt("expert_gating_func")?.filter(|&f| f > 1) {
            return Err(k.bad("expert_gating_func", format!("{f}: only softmax gating can be run yet")));
        }
        Ok(Spec {
            layers,
            embed,
            heads,
            kv_heads,
            head_dim,
            rms_eps: k
                .float("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| k.bad("attention.layer_norm_rms_epsilon", "missing"))? as f32,
            rope_style: traits.rope,
            rope_dims,
            rope,
            window_rope,
            activation: traits.activation,
            embedding_scale: match positive("embedding_scale")? {
                Some(f) => f,
                None if traits.embedding_by_width => (embed as f32).sqrt(),
                None => 1.0,
            },
            residual_scale: positive("residual_scale")?.unwrap_or(1.0),
            attention_scale: positive("attention.scale")?.unwrap_or(1.0 / (per_head as f32).sqrt()),
            logit_scale: positive("logit_scale")?.map_or(1.0, |f| 1.0 / f),
            attention_soft_cap: positive("attn_logit_softcapping")?.or((arch == "gemma2").then_some(50.0)),
            final_soft_cap: positive("final_logit_softcapping")?.or((arch == "gemma2").then_some(30.0)),
            window,
            windowed,
            no_rope_step: traits.no_rope_step,
            experts,
            experts_used,
            expert_scale: positive("expert_weights_scale")?.unwrap_or(1.0),
            vocab: k.opt("vocab_size")?,
            context,
            arch: arch.to_string(),
        })
    }

    /// The window of a layer, `None` where it sees everything.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| self.windowed.get(layer).copied().unwrap_or(false))
    }

    /// True if a layer rotates its heads.
    pub fn has_rope(&self, layer: usize) -> bool {
        self.no_rope_step.is_none_or(|n| !(layer as u64 + 1).is_multiple_of(n))
    }
}

fn window_pattern(k: &Keys<'_>, traits: &Traits, layers: usize) -> Result<Vec<bool>, ForwardError> {
    const KEY: &str = "attention.sliding_window_pattern";
    let period = match k.get(KEY) {
        Some(Value::Array(Array::Bool(v))) if v.len() >= layers => return Ok(v.clone()),
        Some(Value::Array(_)) => return Err(k.bad(KEY, "not one truth value per layer")),
        Some(_) => k.int(KEY)? as u64,
        None => traits.window_pattern,
    };
    Ok((0..layers as u64).map(|l| period > 0 && l % period < period - 1).collect())
}

fn read_rope(k: &Keys<'_>, context: usize) -> Result<RopeScale, ForwardError> {
    let kind = k.str("rope.scaling.type").unwrap_or("none");
    let factor = match k.float("rope.scaling.factor")? {
        Some(f) if f > 0.0 => f,
        Some(f) if f < 0.0 => return Err(k.bad("rope.scaling.factor", "is negative")),
        _ => k.float("rope.scale_linear")?.filter(|&f| f > 0.0).unwrap_or(1.0),
    };
    let freq_scale = if kind == "none" { 1.0 } else { 1.0 / factor };
    let ext_factor = match k.float("rope.scaling.yarn_ext_factor")? {
        Some(f) if f >= 0.0 => f,
        _ if kind == "yarn" => 1.0,
        _ => 0.0,
    };
    let mut attn_factor = 1.0;
    if ext_factor != 0.0 {
        // `llama_context`: YaRN's own factor cancels that of `rope_yarn`; what is left is the key's
        let ln = (1.0 / freq_scale).ln();
        let mscale = |m: f64| if freq_scale >= 1.0 { 1.0 } else { 0.1 * m * ln + 1.0 };
        attn_factor = match k.float("rope.scaling.yarn_log_multiplier")?.filter(|&f| f != 0.0) {
            Some(all) => mscale(1.0) / mscale(all),
            None => mscale(1.0),
        } / (1.0 + 0.1 * ln);
    }
    let base = k.float("rope.freq_base")?.unwrap_or(10000.0);
    if base <= 1.0 {
        return Err(k.bad("rope.freq_base", format!("{base} is no base")));
    }
    Ok(RopeScale {
        base,
        freq_scale,
        ext_factor,
        attn_factor: attn_factor * k.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
        beta_fast: k.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: k.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        original_context: k.opt("rope.scaling.original_context_length")?.unwrap_or(context) as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(extra: &[(&str, Value)]) -> Metadata {
        let mut m: Metadata = vec![("general.architecture".into(), Value::from("llama"))];
        for (k, v) in [
            ("block_count", 2),
            ("embedding_length", 64),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("context_length", 128),
        ] {
            m.push((format!("llama.{k}"), Value::U32(v)));
        }
        m.push(("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5)));
        for (k, v) in extra {
            gguf::value::set(&mut m, k, v.clone());
        }
        m
    }

    #[test]
    fn keys_become_a_decoder() {
        let s = Spec::read(&keys(&[])).unwrap();
        assert_eq!((s.layers, s.heads, s.kv_heads, s.head_dim, s.rope_dims), (2, 4, 2, 16, 16));
        assert_eq!((s.attention_scale, s.logit_scale, s.rope.base), (0.25, 1.0, 10000.0));
        assert!(s.window_of(0).is_none() && s.has_rope(1));
        let yarn = [
            ("llama.rope.scaling.type", Value::from("yarn")),
            ("llama.rope.scaling.factor", Value::F32(4.0)),
            ("llama.rope.scaling.original_context_length", Value::U32(32)),
        ];
        let s = Spec::read(&keys(&yarn)).unwrap();
        assert_eq!((s.rope.freq_scale, s.rope.ext_factor, s.rope.original_context), (0.25, 1.0, 32.0));
        // 0.1 ln 4 + 1, which `rope_yarn` applies itself
        assert!((s.rope.attn_factor - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        for (key, value, why) in [
            ("general.architecture", Value::from("mamba"), "`mamba` cannot be run yet"),
            ("llama.block_count", Value::U32(1 << 30), "is more than 4096"),
            ("llama.embedding_length", Value::U64(u64::MAX), "is more than"),
            ("llama.attention.head_count", Value::U32(0), "is 0"),
            ("llama.attention.head_count_kv", Value::U32(3), "3 does not divide 4"),
            ("llama.rope.dimension_count", Value::U32(17), "17 of a head of 16"),
            ("llama.rope.freq_base", Value::F32(f32::NAN), "not a finite number"),
            ("llama.attention.layer_norm_rms_epsilon", Value::from("small"), "not a finite number"),
            ("llama.expert_count", Value::U32(4), "0 of 4 experts"),
        ] {
            let message = Spec::read(&keys(&[(key, value)])).expect_err(key).to_string();
            assert!(message.contains(why), "{key}: {message}");
        }
    }
}
