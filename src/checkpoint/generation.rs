//! Recommended sampling: `generation_config.json` as `general.sampling.*`.
//!
//! Source: `Metadata.load` and `set_gguf_meta_model` in `gguf-py/gguf/metadata.py` of llama.cpp b11434. Values of a wrong type
//! are left out with a warning (the reference stops in `struct.pack`).

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::json;
use crate::gguf::{Metadata, Value, value};

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Int,
    Float,
}

/// Key after `general.sampling.`, names in generation_config.json (the first one that is there), type.
const FIELDS: &[(&str, &[&str], Kind)] = &[
    ("sequence", &["sequence"], Kind::Text),
    ("top_k", &["top_k"], Kind::Int),
    ("top_p", &["top_p"], Kind::Float),
    ("min_p", &["min_p"], Kind::Float),
    ("xtc_probability", &["xtc_probability"], Kind::Float),
    ("xtc_threshold", &["xtc_threshold"], Kind::Float),
    ("temp", &["temperature"], Kind::Float),
    ("penalty_last_n", &["penalty_last_n"], Kind::Int),
    ("penalty_repeat", &["penalty_repeat", "repetition_penalty"], Kind::Float),
    ("mirostat", &["mirostat"], Kind::Int),
    ("mirostat_tau", &["mirostat_tau"], Kind::Float),
    ("mirostat_eta", &["mirostat_eta"], Kind::Float),
];

/// The sampling keys of a folder, and those of a `--metadata` file over them.
pub struct Sampling {
    values: Vec<(&'static str, Kind, Json, String)>,
}

impl Sampling {
    /// Reads generation_config.json of `folder`; a file that is not JSON is left out, as by the reference.
    pub fn load(folder: &Path, warnings: &mut Vec<String>) -> Sampling {
        let file = folder.join("generation_config.json");
        let object = json::read_object_if_present(&file).unwrap_or_else(|e| {
            warnings.push(format!("{e}; left out"));
            None
        });
        let object = object.unwrap_or_default();
        let values = FIELDS.iter().filter_map(|(key, names, kind)| {
            let (name, value) = names.iter().find_map(|n| Some((n, object.get(*n)?)))?;
            Some((*key, *kind, value.clone(), format!("{}: key `{name}`", file.display())))
        });
        Sampling { values: values.collect() }
    }

    /// Takes the `general.sampling.*` keys of a `--metadata` file.
    pub fn override_with(&mut self, file: &Path, object: &Map<String, Json>) {
        for (key, _, kind) in FIELDS {
            let full = format!("general.sampling.{key}");
            if let Some(value) = object.get(&full) {
                self.values.retain(|(k, ..)| k != key);
                self.values.push((key, *kind, value.clone(), format!("{}: key `{full}`", file.display())));
            }
        }
    }

    /// Writes the keys in their fixed order.
    pub fn write(&self, metadata: &mut Metadata, warnings: &mut Vec<String>) {
        for (key, ..) in FIELDS {
            let Some((_, kind, json, place)) = self.values.iter().find(|(k, ..)| k == key) else { continue };
            if json.is_null() {
                continue;
            }
            match typed(*kind, json) {
                Some(Value::Str(s)) if s.is_empty() => {}
                Some(v) => value::set(metadata, &format!("general.sampling.{key}"), v),
                None => warnings.push(format!("{place}: {json} is not of the type that GGUF wants; left out")),
            }
        }
    }
}

fn typed(kind: Kind, json: &Json) -> Option<Value> {
    match kind {
        Kind::Text => json.as_str().map(Value::from),
        Kind::Int => {
            let whole = json.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 1e9).map(|f| f as i128);
            json::as_integer(json).or(whole)?.try_into().ok().map(Value::I32)
        }
        Kind::Float => json.as_f64().map(|f| f as f32).filter(|f| f.is_finite()).map(Value::F32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(generation: &str, metadata: &str) -> (Metadata, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
        let (mut out, mut warnings) = (Metadata::new(), Vec::new());
        let mut sampling = Sampling::load(dir.path(), &mut warnings);
        let Json::Object(over) = serde_json::from_str(metadata).unwrap() else { panic!() };
        sampling.override_with(Path::new("m.json"), &over);
        sampling.write(&mut out, &mut warnings);
        (out, warnings)
    }

    #[test]
    fn order_types_and_overrides() {
        let (out, warnings) = write(
            r#"{"temperature": 1, "top_k": 50.0, "repetition_penalty": 1.1, "top_p": null, "min_p": "x"}"#,
            r#"{"general.sampling.temp": 0.5}"#,
        );
        let want = [("top_k", Value::I32(50)), ("temp", Value::F32(0.5)), ("penalty_repeat", Value::F32(1.1))];
        assert_eq!(out, want.map(|(k, v)| (format!("general.sampling.{k}"), v)));
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("key `min_p`"), "{warnings:?}");
    }

    #[test]
    fn a_broken_file_is_left_out() {
        let (out, warnings) = write("{", "{}");
        assert!(out.is_empty());
        assert_eq!(warnings.len(), 1);
    }
}
