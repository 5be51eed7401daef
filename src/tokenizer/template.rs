//! Chat templates, from all the places where a folder may keep them.
//!
//! Order of the reference (`gguf-py/gguf/vocab.py` of llama.cpp b11434): `chat_template` of tokenizer_config.json before
//! chat_template.jinja (with additional_chat_templates/*.jinja) before chat_template.json; without tokenizer_config.json none
//! of them counts. transformers prefers the .jinja file, so a difference between the two is told.

use std::path::Path;

use serde_json::Value as Json;

use super::Report;
use super::files::Files;
use crate::checkpoint::{CheckpointError, json};
use crate::gguf::{Metadata, Value, value};

/// One template or several with names.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    default: Option<String>,
    named: Vec<(String, String)>,
    source: String,
}

/// The template in a file that the user names.
pub fn from_file(file: &Path) -> Result<Template, CheckpointError> {
    let text = json::read_text(file)?;
    if text.trim().is_empty() {
        return Err(CheckpointError::file(file, "an empty chat template"));
    }
    Ok(Template { default: Some(text), named: Vec::new(), source: file.display().to_string() })
}

/// The template of a folder.
pub fn load(files: &Files, report: &mut Report) -> Result<Option<Template>, CheckpointError> {
    let Some(config) = files.config.as_ref().filter(|c| !c.is_empty()) else { return Ok(None) };
    let beside = beside(files, report)?;
    let own = match config.get("chat_template") {
        None | Some(Json::Null) => None,
        Some(value) => match from_json(value, "tokenizer_config.json", report) {
            Some(template) => Some(template),
            None => {
                report.warn(format!("tokenizer_config.json: chat_template is {}; left out", json::kind(value)));
                // As in the reference, a bad one also hides those beside it.
                return Ok(None);
            }
        },
    };
    if let (Some(own), Some(other)) = (&own, &beside)
        && own.default.as_deref().map(str::trim_end) != other.default.as_deref().map(str::trim_end)
    {
        report.warn(format!(
            "the chat template of tokenizer_config.json differs from {}; the first is written, as llama.cpp's converter does. \
             --chat-template {} takes the other",
            other.source, other.source
        ));
    }
    Ok(own.or(beside))
}

/// chat_template.jinja and its additions, else chat_template.json.
fn beside(files: &Files, report: &mut Report) -> Result<Option<Template>, CheckpointError> {
    let jinja = files.path("chat_template.jinja");
    if json::exists(&jinja)? {
        let default = Some(json::read_text(&jinja)?);
        let mut named = Vec::new();
        let folder = files.path("additional_chat_templates");
        let mut paths: Vec<_> =
            std::fs::read_dir(&folder).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
        paths.sort();
        for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "jinja")) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            add(&mut named, &name, json::read_text(path)?, report);
        }
        return Ok(Some(Template { default, named, source: "chat_template.jinja".into() }));
    }
    let file = files.path("chat_template.json");
    match json::read_object_if_present(&file)?.and_then(|mut o| o.remove("chat_template")) {
        None | Some(Json::Null) => Ok(None),
        Some(value) => {
            let template = from_json(&value, "chat_template.json", report);
            if template.is_none() {
                report.warn(format!("chat_template.json: chat_template is {}; left out", json::kind(&value)));
            }
            Ok(template)
        }
    }
}

/// A text, or a list of `{name, template}`.
fn from_json(value: &Json, source: &str, report: &mut Report) -> Option<Template> {
    let mut template = Template { default: None, named: Vec::new(), source: source.into() };
    match value {
        Json::String(text) => template.default = Some(text.clone()),
        Json::Array(choices) => {
            for choice in choices {
                let text = |key: &str| choice.get(key).and_then(Json::as_str);
                match (text("name"), text("template")) {
                    (Some("default"), Some(t)) => template.default = Some(t.to_string()),
                    (Some(name), Some(t)) => add(&mut template.named, name, t.to_string(), report),
                    _ => report.warn(format!("{source}: a chat template without a name or without a text is left out")),
                }
            }
        }
        _ => return None,
    }
    Some(template)
}

/// Names are keys: anything but ASCII letters and digits becomes `_`.
fn add(named: &mut Vec<(String, String)>, name: &str, text: String, report: &mut Report) {
    let key: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if key.is_empty() {
        return;
    }
    match named.iter_mut().find(|(k, _)| *k == key) {
        Some(slot) => {
            report.warn(format!(
                "two chat templates have the key `{key}` (one is named `{name}`); the later one is written"
            ));
            slot.1 = text;
        }
        None => named.push((key, text)),
    }
}

impl Template {
    /// Writes `tokenizer.chat_template` and, for named ones, `.NAME` and the list of names before it.
    pub fn write(&self, metadata: &mut Metadata, report: &mut Report) {
        for (name, text) in self.named.iter().filter(|(_, t)| !t.is_empty()) {
            value::set(metadata, &format!("tokenizer.chat_template.{name}"), text.as_str().into());
        }
        if !self.named.is_empty() {
            value::set(metadata, "tokenizer.chat_templates", Value::strs(self.named.iter().map(|(n, _)| n)));
        }
        if let Some(text) = self.default.as_ref().filter(|t| !t.is_empty()) {
            value::set(metadata, "tokenizer.chat_template", text.as_str().into());
        }
        let more = match self.named.len() {
            0 => String::new(),
            n => format!(" and {n} named"),
        };
        report.say("chat template", format!("from {}{more}", self.source));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_with(files: &[(&str, &str)]) -> (Option<Template>, Report) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let mut report = Report::default();
        (load(&Files::load(dir.path()).unwrap(), &mut report).unwrap(), report)
    }

    #[test]
    fn the_order_of_places() {
        let default = |files: &[(&str, &str)]| load_with(files).0.and_then(|t| t.default);
        let config = ("tokenizer_config.json", r#"{"chat_template": "C"}"#);
        let bare = ("tokenizer_config.json", r#"{"chat_template": null, "x": 1}"#);
        let jinja = ("chat_template.jinja", "J");
        let json = ("chat_template.json", r#"{"chat_template": "S"}"#);
        assert_eq!(default(&[config, jinja, json]).as_deref(), Some("C"));
        assert_eq!(default(&[bare, jinja, json]).as_deref(), Some("J"));
        assert_eq!(default(&[bare, json]).as_deref(), Some("S"));
        assert_eq!(default(&[jinja, json]), None);
        assert_eq!(load_with(&[config, jinja]).1.warnings.len(), 1);
        let odd = ("tokenizer_config.json", r#"{"chat_template": 7}"#);
        let (template, report) = load_with(&[odd, jinja]);
        assert!(template.is_none() && report.warnings.len() == 1);
    }

    #[test]
    fn named_templates() {
        let list = r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool-use", "template": "T"},
                       {"name": "tool use", "template": "U"}, {"name": "x"}]}"#;
        let (template, mut report) = load_with(&[("tokenizer_config.json", list)]);
        assert_eq!(report.warnings.len(), 2);
        let mut metadata = Metadata::new();
        template.unwrap().write(&mut metadata, &mut report);
        let keys: Vec<&str> = metadata.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, ["tokenizer.chat_template.tool_use", "tokenizer.chat_templates", "tokenizer.chat_template"]);
        let (jinja, _) = load_with(&[
            ("tokenizer_config.json", r#"{"x": 1}"#),
            ("chat_template.jinja", "D"),
            ("additional_chat_templates/rag.jinja", "R"),
        ]);
        assert_eq!(jinja.unwrap().named, [("rag".to_string(), "R".to_string())]);
    }
}
