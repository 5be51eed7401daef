//! `config.json`: which architecture, and the raw fields. The typed and checked view of them is [`Hparams`].
//!
//! Sub-configurations are merged into the root as `ModelBase.load_hparams` and `TextModel.__init__` do
//! (`conversion/base.py` of llama.cpp b11434).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::hparams::Hparams;
use super::nearest::nearest;
use super::{CheckpointError, json};
use crate::arch::{self, Architecture};

/// The names under which multimodal checkpoints keep the configuration of their language model; the last that is there wins.
const TEXT_CONFIGS: &[&str] = &["text_config", "llm_config", "lm_config", "language_config", "lfm"];

/// The hyper-parameters of a checkpoint. `text_config` (and its other spellings) is merged into the root.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that was read, for messages.
    pub file: PathBuf,
    /// The merged object; keys keep the order of the file.
    pub values: Map<String, Json>,
    /// The object as it stands in the file: special token ids and `_name_or_path` are looked up here.
    pub raw: Map<String, Json>,
}

impl Config {
    /// Reads `config.json` of `folder`.
    pub fn load(folder: &Path) -> Result<Config, CheckpointError> {
        let file = folder.join("config.json");
        if !json::exists(&file)? {
            return Err(CheckpointError::file(&file, format!("missing: {}", what_else(folder))));
        }
        Config::from_object(&file, json::read_object(&file)?)
    }

    /// The configuration in `raw`, which was read from `file`.
    pub fn from_object(file: &Path, raw: Map<String, Json>) -> Result<Config, CheckpointError> {
        let mut values = raw.clone();
        let thinker = raw.get("thinker_config").and_then(|t| t.get("text_config"));
        let text = TEXT_CONFIGS.iter().rev().filter_map(|name| raw.get(*name)).find(|v| !v.is_null()).or(thinker);
        match text {
            Some(Json::Object(text)) => values.extend(text.iter().map(|(k, v)| (k.clone(), v.clone()))),
            None => {}
            Some(other) => {
                return Err(CheckpointError::key(file, "text_config", format!("{}, not an object", json::kind(other))));
            }
        }
        if raw.contains_key("quantization") && !raw.contains_key("quantization_config") {
            return Err(CheckpointError::key(
                file,
                "quantization",
                "an MLX-quantized checkpoint: its weights are packed integers. Convert the original checkpoint instead",
            ));
        }
        Ok(Config { file: file.to_path_buf(), values, raw })
    }

    /// The first of `names` that is present and not null.
    pub fn get(&self, names: &[&str]) -> Option<&Json> {
        self.find(names).map(|(_, value)| value)
    }

    /// The first of `names` that is present and not null, with the name it has.
    pub fn find<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &Json)> {
        names.iter().filter_map(|n| Some((*n, self.values.get(*n)?))).find(|(_, v)| !v.is_null())
    }

    /// The table of `architectures[0]`.
    pub fn architecture(&self) -> Result<&'static Architecture, CheckpointError> {
        let refuse = |reason: String| CheckpointError::key(&self.file, "architectures", reason);
        let name = match self.values.get("architectures") {
            Some(Json::Array(names)) if !names.is_empty() => match &names[0] {
                Json::String(name) => name,
                other => return Err(refuse(format!("holds {}, where a class name was expected", json::kind(other)))),
            },
            None | Some(Json::Null | Json::Array(_)) => {
                return Err(refuse(format!("missing or empty: it must name the model class. {}", supported())));
            }
            Some(other) => {
                return Err(refuse(format!("{}, where a list of class names was expected", json::kind(other))));
            }
        };
        arch::find(name).ok_or_else(|| refuse(unknown_architecture(name, self.values.get("model_type"))))
    }

    /// The typed and checked hyper-parameters, with the defaults of the architecture filled in.
    pub fn hparams(&self, arch: &Architecture) -> Result<Hparams, CheckpointError> {
        Hparams::read(self, arch)
    }
}

fn supported() -> String {
    let names: Vec<&str> = arch::ARCHITECTURES.iter().map(|a| a.hf).collect();
    format!("Supported: {}", names.join(", "))
}

fn unknown_architecture(name: &str, model_type: Option<&Json>) -> String {
    let family = |s: &str| s.to_lowercase().chars().take_while(char::is_ascii_alphabetic).collect::<String>();
    let wanted = family(model_type.and_then(Json::as_str).unwrap_or(name));
    let known = || arch::ARCHITECTURES.iter().map(|a| a.hf);
    let relatives: Vec<&str> = known()
        .filter(|k| !wanted.is_empty() && wanted.starts_with(&family(k.trim_end_matches("ForCausalLM"))))
        .collect();
    let near = nearest(name, relatives).or_else(|| nearest(name, known())).unwrap_or("none");
    format!("`{name}` is not supported; the nearest that is: {near}. {}", supported())
}

/// What a folder without `config.json` seems to be.
fn what_else(folder: &Path) -> &'static str {
    let has = |name: &str| folder.join(name).exists();
    let ends = |suffix: &str| {
        std::fs::read_dir(folder)
            .map(|d| d.flatten().any(|e| e.file_name().to_string_lossy().ends_with(suffix)))
            .unwrap_or(false)
    };
    if !folder.is_dir() {
        "there is no such folder"
    } else if has("adapter_config.json") {
        "this is a LoRA adapter, not a model. Merge it into its base model first"
    } else if has("model_index.json") {
        "this is a diffusers pipeline, not a language model"
    } else if has("params.json") {
        "params.json is the original layout of Meta or Mistral: take the Hugging Face form of the model"
    } else if ends(".gguf") {
        "this folder holds GGUF files, which are converted already"
    } else if ends(".onnx") {
        "this folder holds an ONNX model: take the checkpoint in safetensors"
    } else {
        "a Hugging Face checkpoint has one beside its safetensors files"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, CheckpointError> {
        let Json::Object(raw) = serde_json::from_str(text).unwrap() else { panic!("an object") };
        Config::from_object(Path::new("config.json"), raw)
    }

    fn message(text: &str) -> String {
        config(text).and_then(|c| c.architecture().map(|a| a.hf)).unwrap_err().to_string()
    }

    #[test]
    fn unknown_architectures_name_a_relative_and_the_list() {
        let m = message(r#"{"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}"#);
        assert!(m.contains("`Qwen3NextForCausalLM` is not supported; the nearest that is: Qwen3ForCausalLM"), "{m}");
        assert!(m.contains("Supported: LlamaForCausalLM, "), "{m}");
        for bad in ["{}", r#"{"architectures": []}"#, r#"{"architectures": [1]}"#, r#"{"architectures": "Llama"}"#] {
            assert!(message(bad).contains("key `architectures`"), "{bad}");
        }
    }

    #[test]
    fn text_config_is_merged_over_the_root() {
        let c = config(
            r#"{"architectures": ["X"], "hidden_size": 1, "text_config": {"hidden_size": 2, "architectures": ["LlamaForCausalLM"]}}"#,
        )
        .unwrap();
        assert_eq!(c.values["hidden_size"], 2);
        assert_eq!(c.raw["hidden_size"], 1);
        assert_eq!(c.architecture().unwrap().hf, "LlamaForCausalLM");
        assert!(config(r#"{"text_config": 3}"#).is_err());
    }
}
