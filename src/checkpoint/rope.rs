//! Rotary position embedding: base, scaling, and the factors of Llama 3.
//!
//! Reading follows `standardize_rope_params` of transformers 5.23 (what `to_dict` hands to the converter) and
//! `TextModel.__init__` in `conversion/base.py` of llama.cpp b11434.

use serde_json::{Map, Value as Json};

use super::hparams::float;
use super::{CheckpointError, Config, Hparams, json};

/// Rotary base and scaling of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// Things to tell the user: odd but usable settings.
    pub warnings: Vec<String>,
}

/// `rope_type` and what belongs to it.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Written as nothing: llama.cpp has no counterpart.
    Dynamic,
    Yarn(Yarn),
    Llama3(Llama3),
    LongRope,
}

/// YaRN (Peng et al. 2023); `None` where the file is silent.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_context: u64,
    pub ext_factor: Option<f64>,
    pub attention_factor: Option<f64>,
    pub beta_fast: Option<f64>,
    pub beta_slow: Option<f64>,
}

/// The frequency-dependent scaling of Llama 3.1 and later.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_context: u64,
}

impl Rope {
    /// `default_theta`: of the config class. `context`: `max_position_embeddings`.
    pub fn read(config: &Config, default_theta: f64, context: u64, head_dim: u64) -> Result<Rope, CheckpointError> {
        let mut r = Reader { config, key: "rope_parameters", values: Map::new(), warnings: Vec::new() };
        // transformers 5: a `rope_scaling` that is there takes the place of `rope_parameters`.
        for key in ["rope_scaling", "rope_parameters"] {
            match config.get(&[key]) {
                None => {}
                Some(Json::Object(values)) if values.is_empty() => {}
                Some(Json::Object(values)) => {
                    // Per kind of attention layer: the converter reads that of full attention.
                    let flat = values.get("full_attention").and_then(Json::as_object).unwrap_or(values);
                    (r.key, r.values) = (key, flat.clone());
                    break;
                }
                Some(other) => {
                    return Err(CheckpointError::key(
                        &config.file,
                        key,
                        format!("{}, not an object", json::kind(other)),
                    ));
                }
            }
        }
        let theta = match r.float("rope_theta")? {
            Some(theta) => theta,
            None => match config.find(&["global_rope_theta", "rope_theta", "rotary_emb_base"]) {
                Some((key, value)) => float(&config.file, key, value)?,
                None => default_theta,
            },
        };
        let scaling = r.scaling(context)?;
        if matches!(scaling, RopeScaling::Llama3(_)) && head_dim > 1 << 16 {
            return Err(CheckpointError::key(&config.file, "head_dim", "too long for rotary factors"));
        }
        Ok(Rope { theta, scaling, warnings: r.warnings })
    }
}

struct Reader<'a> {
    config: &'a Config,
    /// `rope_scaling` or `rope_parameters`.
    key: &'static str,
    values: Map<String, Json>,
    warnings: Vec<String>,
}

impl Reader<'_> {
    fn refuse(&self, field: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::key(&self.config.file, format!("{}.{field}", self.key), reason)
    }

    fn get(&self, field: &str) -> Option<&Json> {
        self.values.get(field).filter(|v| !v.is_null())
    }

    fn float(&self, field: &str) -> Result<Option<f64>, CheckpointError> {
        let name = format!("{}.{field}", self.key);
        self.get(field).map(|v| float(&self.config.file, &name, v)).transpose()
    }

    fn required(&self, field: &str) -> Result<f64, CheckpointError> {
        self.float(field)?.ok_or_else(|| self.refuse(field, "missing; this rope_type needs it"))
    }

    fn kind(&self) -> Result<Option<String>, CheckpointError> {
        let text = |field: &str| match self.get(field) {
            None => Ok(None),
            Some(Json::String(s)) => Ok(Some(s.clone())),
            Some(other) => Err(self.refuse(field, format!("{}, where a string was expected", json::kind(other)))),
        };
        match (text("rope_type")?, text("type")?) {
            (Some(a), Some(b)) if a != b => {
                Err(self.refuse("rope_type", format!("`{a}`, but `type` beside it is `{b}`: keep one of them")))
            }
            (a, b) => Ok(a.or(b)),
        }
    }

    /// The context that the model was trained with before scaling. transformers takes the present one if it is missing.
    fn original_context(&mut self, context: u64) -> Result<u64, CheckpointError> {
        const FIELD: &str = "original_max_position_embeddings";
        let root = self.config.get(&[FIELD]);
        match root.or(self.get(FIELD)).map(json::as_integer) {
            Some(Some(n)) if n >= 1 && n <= u32::MAX.into() => Ok(n as u64),
            Some(_) => Err(self.refuse(FIELD, "not a whole number between 1 and 4294967295")),
            None => {
                let (file, key) = (self.config.file.display(), self.key);
                self.warnings.push(format!(
                    "{file}: {key} has no {FIELD}; max_position_embeddings ({context}) is taken, as transformers does"
                ));
                Ok(context)
            }
        }
    }

    fn scaling(&mut self, context: u64) -> Result<RopeScaling, CheckpointError> {
        let Some(kind) = self.kind()? else { return Ok(RopeScaling::None) };
        let without_counterpart = |what: &str| {
            format!(
                "{}: rope_type `{kind}` {what}; contexts longer than the trained one will be worse",
                self.config.file.display()
            )
        };
        Ok(match kind.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: self.required("factor")? },
            "yarn" => RopeScaling::Yarn(Yarn {
                factor: self.required("factor")?,
                original_context: self.original_context(context)?,
                ext_factor: self.float("extrapolation_factor")?,
                attention_factor: self.float("attention_factor")?.or(self.float("attn_factor")?),
                beta_fast: self.float("beta_fast")?,
                beta_slow: self.float("beta_slow")?,
            }),
            "llama3" => {
                let llama3 = Llama3 {
                    factor: self.float("factor")?.unwrap_or(8.0),
                    low_freq_factor: self.float("low_freq_factor")?.unwrap_or(1.0),
                    high_freq_factor: self.float("high_freq_factor")?.unwrap_or(4.0),
                    original_context: self.original_context(context)?,
                };
                if llama3.low_freq_factor >= llama3.high_freq_factor {
                    return Err(self.refuse("high_freq_factor", "must be above low_freq_factor"));
                }
                RopeScaling::Llama3(llama3)
            }
            "su" | "longrope" => {
                let note = without_counterpart("is written without its factors, which llama.cpp takes for Phi-3 only");
                self.warnings.push(note);
                RopeScaling::LongRope
            }
            "dynamic" => {
                let note = without_counterpart("has no counterpart in llama.cpp and is not written");
                self.warnings.push(note);
                RopeScaling::Dynamic
            }
            _ => {
                return Err(self.refuse(
                    "rope_type",
                    format!("`{kind}` is unknown (default, linear, dynamic, yarn, longrope, llama3)"),
                ));
            }
        })
    }
}

/// The values of `rope_freqs.weight`: one divisor for every rotary frequency, `head_dim / 2` of them, for rope_type llama3.
///
/// To the bit those of `LlamaModel.generate_extra_tensors`, which works on torch float32 tensors: every step is rounded
/// to f32, and `number / tensor` is the reciprocal of the tensor times the number.
pub fn rope_freqs(hp: &Hparams) -> Option<Vec<f32>> {
    let RopeScaling::Llama3(Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) = hp.rope.scaling
    else {
        return None;
    };
    let old = original_context as f64;
    let (low_wavelen, high_wavelen) = ((old / low_freq_factor) as f32, (old / high_freq_factor) as f32);
    let (old, factor, low) = (old as f32, factor as f32, low_freq_factor as f32);
    let span = (high_freq_factor - low_freq_factor) as f32;
    let base = f64::from(hp.rope.theta as f32);
    let one = |i: u64| {
        let exponent = (2 * i) as f32 / hp.head_dim as f32;
        // The f64 power rounded to f32 is the correctly rounded f32 power, which torch gives here.
        let freq = 1.0 / (base.powf(f64::from(exponent)) as f32);
        let wavelen = (1.0 / freq) * (2.0 * std::f64::consts::PI) as f32;
        if wavelen < high_wavelen {
            1.0
        } else if wavelen > low_wavelen {
            factor
        } else {
            let smooth = ((1.0 / wavelen) * old - low) / span;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..hp.head_dim / 2).map(one).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(extra: &str) -> Result<Rope, CheckpointError> {
        let Json::Object(raw) = serde_json::from_str(&format!("{{{extra}}}")).unwrap() else { panic!() };
        Rope::read(&Config::from_object(Path::new("config.json"), raw)?, 10000.0, 4096, 64)
    }

    #[test]
    fn both_spellings() {
        let four = read(r#""rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}"#).unwrap();
        let five = read(r#""rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}"#).unwrap();
        assert_eq!(four, five);
        assert_eq!(four.scaling, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(read("\"rope_scaling\": null").unwrap().theta, 10000.0);
        assert_eq!(read(r#""rope_parameters": {"rope_type": "default"}"#).unwrap().scaling, RopeScaling::None);
    }

    #[test]
    fn malformed_scaling_is_refused() {
        for (extra, field) in [
            (r#""rope_scaling": {"type": "linear"}"#, "rope_scaling.factor"),
            (r#""rope_scaling": {"type": "linear", "factor": 0}"#, "rope_scaling.factor"),
            (r#""rope_scaling": {"type": "linear", "factor": 1e400}"#, "rope_scaling.factor"),
            (r#""rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}"#, "rope_scaling.rope_type"),
            (r#""rope_scaling": {"type": 3}"#, "rope_scaling.type"),
            (r#""rope_scaling": {"type": "sideways"}"#, "rope_scaling.rope_type"),
            (r#""rope_scaling": []"#, "rope_scaling"),
            (
                r#""rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}"#,
                "rope_scaling.high_freq_factor",
            ),
            (
                r#""rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}"#,
                "rope_scaling.original_max_position_embeddings",
            ),
        ] {
            // 1e400 is no number for serde_json unless arbitrary_precision is on; either way it must not pass.
            let Ok(Json::Object(_)) = serde_json::from_str(&format!("{{{extra}}}")) else { continue };
            let message = read(extra).expect_err(extra).to_string();
            assert!(message.starts_with(&format!("config.json: key `{field}`: ")), "{extra}: {message}");
        }
        assert_eq!(read(r#""rope_scaling": {"rope_type": "yarn", "factor": 4}"#).unwrap().warnings.len(), 1);
    }
}
