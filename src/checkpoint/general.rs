//! The `general.*` keys: who made the model, under which name and licence, from what.
//!
//! Source: `Metadata.load` and `apply_metadata_heuristic` in `gguf-py/gguf/metadata.py` of llama.cpp b11434. For every field
//! the first of these that has it: model card, `_name_or_path` of config.json, name of the folder; a `--metadata` file and
//! `--model-name` go before all. Values that are no text where text belongs are left out with a warning.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use fancy_regex::Regex;
use serde_json::{Map, Value as Json};

use super::card::Card;
use super::generation::Sampling;
use super::naming::{self, IdParts, ParamCount};
use super::yaml::Yaml;
use super::{CheckpointError, Config, json};
use crate::gguf::{Metadata, Value, value};

/// Fields that are one text, in the order of the file, with the names that cards give them (besides the field's own name
/// and that name after `model_`, which apply where `from_card` is set).
const TEXTS: &[Text] = &[
    Text { key: "name", card: &["name", "model_name"] },
    Text { key: "author", card: &["author", "model_author", "model_creator"] },
    Text { key: "version", card: &["version", "model_version"] },
    Text { key: "organization", card: &["organization", "model_organization"] },
    Text { key: "finetune", card: &["finetune", "model_finetune"] },
    Text { key: "basename", card: &["basename", "model_basename", "model_type"] },
    Text { key: "description", card: &["description", "model_description"] },
    Text { key: "quantized_by", card: &[] },
    Text { key: "size_label", card: &["size_label", "model_size_label"] },
    Text { key: "license", card: &["license"] },
    Text { key: "license.name", card: &["license_name"] },
    Text { key: "license.link", card: &["license_link"] },
    Text { key: "url", card: &[] },
    Text { key: "doi", card: &[] },
    Text { key: "uuid", card: &[] },
    Text { key: "repo_url", card: &[] },
    Text { key: "source.url", card: &["url", "model_url"] },
    Text { key: "source.doi", card: &["doi", "model_doi"] },
    Text { key: "source.uuid", card: &["uuid", "model_uuid"] },
    Text { key: "source.repo_url", card: &["repo_url", "model_repo_url"] },
];

struct Text {
    /// After `general.`.
    key: &'static str,
    card: &'static [&'static str],
}

/// What is written about a base model or a dataset, in order.
const SOURCE_FIELDS: &[&str] =
    &["name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url"];

type Source = Vec<(String, String)>;

/// What the user says about the model.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naming<'a> {
    /// `--model-name`.
    pub model_name: Option<&'a str>,
    /// `--metadata`: a JSON file with GGUF keys.
    pub metadata_file: Option<&'a Path>,
}

/// The `general.*` keys of a model before they are written.
pub struct General {
    texts: Vec<(&'static str, String)>,
    sampling: Sampling,
    base_models: Option<Vec<Source>>,
    datasets: Option<Vec<Source>>,
    tags: Vec<String>,
    languages: Vec<String>,
}

impl General {
    /// Gathers everything that `folder` and the user say.
    pub fn gather(
        folder: &Path,
        config: &Config,
        naming: Naming<'_>,
        params: &ParamCount,
        warnings: &mut Vec<String>,
    ) -> Result<General, CheckpointError> {
        let card = Card::load(folder, warnings)?;
        let total = params.total();
        let mut reader = CardReader { file: folder.join("README.md"), card: &card, total, warnings };
        let mut general = General {
            texts: reader.texts(),
            base_models: reader.sources(&["base_model", "base_models", "base_model_sources"]),
            datasets: reader.sources(&["datasets", "dataset", "dataset_sources"]),
            tags: reader.lists(&["tags", "pipeline_tag"]),
            languages: reader.lists(&["languages", "language"]),
            sampling: Sampling::load(folder, warnings),
        };
        if let Some(id) = config.raw.get("_name_or_path").and_then(Json::as_str)
            && id.matches('/').count() <= 1
        {
            general.complete(naming::components(id, total));
        }
        let folder_name = folder_name(folder);
        general.complete(naming::components(&folder_name, total));
        if let Some(file) = naming.metadata_file {
            general.override_with(file, warnings)?;
        }
        if let Some(name) = naming.model_name {
            general.set("name", Some(name.to_string()));
        }
        if general.text("name").is_none() {
            general.set("name", Some(folder_name));
        }
        if general.text("size_label").is_none() {
            general.set("size_label", params.size_label());
        }
        Ok(general)
    }

    /// A text field by its key after `general.`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.texts.iter().find(|(k, _)| *k == key).map(|(_, v)| v.as_str())
    }

    /// Writes the keys. Empty texts and lists are not written.
    pub fn write(&self, metadata: &mut Metadata, warnings: &mut Vec<String>) {
        self.sampling.write(metadata, warnings);
        for Text { key, .. } in TEXTS {
            if let Some(text) = self.text(key) {
                set_text(metadata, format!("general.{key}"), text);
            }
        }
        for (kind, sources) in [("base_model", &self.base_models), ("dataset", &self.datasets)] {
            let Some(sources) = sources else { continue };
            value::set(metadata, &format!("general.{kind}.count"), Value::U32(sources.len() as u32));
            for (i, source) in sources.iter().enumerate() {
                for field in SOURCE_FIELDS {
                    if let Some((_, text)) = source.iter().find(|(k, _)| k == field) {
                        set_text(metadata, format!("general.{kind}.{i}.{field}"), text);
                    }
                }
            }
        }
        for (key, list) in [("general.tags", &self.tags), ("general.languages", &self.languages)] {
            if !list.is_empty() {
                value::set(metadata, key, Value::strs(list));
            }
        }
    }

    fn set(&mut self, key: &'static str, text: Option<String>) {
        self.texts.retain(|(k, _)| *k != key);
        self.texts.extend(text.map(|t| (key, t)));
    }

    /// Fills fields that are still open from the parts of a name.
    fn complete(&mut self, parts: IdParts) {
        let title = |s: Option<String>| s.map(|s| naming::title(&s));
        for (key, text) in [
            ("name", title(parts.name)),
            ("organization", title(parts.organization)),
            ("basename", parts.basename),
            ("finetune", parts.finetune),
            ("version", parts.version),
            ("size_label", parts.size_label),
        ] {
            if text.is_some() && self.text(key).is_none() {
                self.set(key, text);
            }
        }
    }

    fn override_with(&mut self, file: &Path, warnings: &mut Vec<String>) -> Result<(), CheckpointError> {
        let object = json::read_object(file)?;
        self.sampling.override_with(file, &object);
        for (key, value) in &object {
            let short = key.strip_prefix("general.").unwrap_or_default();
            // The reference takes every field but the licence itself.
            match TEXTS.iter().find(|t| t.key == short && short != "license") {
                Some(text) => self.set(text.key, json_text(file, key, value)?),
                None if key == "general.tags" => self.tags = json_list(file, key, value)?,
                None if key == "general.languages" => self.languages = json_list(file, key, value)?,
                None if key == "general.base_models" => self.base_models = json_sources(file, key, value)?,
                None if key == "general.datasets" => self.datasets = json_sources(file, key, value)?,
                None if short.starts_with("sampling.") => {}
                None => {
                    warnings.push(format!("{}: key `{key}` is none that --metadata can set; left out", file.display()))
                }
            }
        }
        Ok(())
    }
}

fn set_text(metadata: &mut Metadata, key: String, text: &str) {
    if !text.is_empty() {
        value::set(metadata, &key, text.into());
    }
}

/// The last part of the path; for `.` and the like that of the folder they stand for.
fn folder_name(folder: &Path) -> String {
    let own = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
    own(folder).or_else(|| folder.canonicalize().ok().and_then(|p| own(&p))).unwrap_or_else(|| "model".into())
}

struct CardReader<'a> {
    file: PathBuf,
    card: &'a Card,
    total: u128,
    warnings: &'a mut Vec<String>,
}

impl CardReader<'_> {
    fn warn(&mut self, field: &str, what: &str) {
        self.warnings.push(format!("{}: key `{field}`: {what}; left out", self.file.display()));
    }

    fn texts(&mut self) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        for text in TEXTS {
            // A field that is there, be it null, ends the search only if it has a value (as `getattr(...) is None` does).
            for name in text.card {
                match self.card.get(name).cloned() {
                    None => continue,
                    Some(Yaml::Scalar(s)) => out.push((text.key, s)),
                    Some(Yaml::List(items)) if text.key == "license" => {
                        out.push((text.key, self.scalars(name, items).join(",")));
                    }
                    Some(_) => {
                        self.warn(name, "not a text");
                        continue;
                    }
                }
                break;
            }
        }
        out
    }

    fn lists(&mut self, names: &[&str]) -> Vec<String> {
        let mut out = Vec::new();
        for name in names {
            match self.card.get(name).cloned() {
                None => {}
                Some(Yaml::Scalar(s)) => out.push(s),
                Some(Yaml::List(items)) => out.extend(self.scalars(name, items)),
                Some(_) => self.warn(name, "neither a text nor a list"),
            }
        }
        out
    }

    fn scalars(&mut self, name: &str, items: Vec<Yaml>) -> Vec<String> {
        let mut out = Vec::new();
        for item in items {
            match item {
                Yaml::Scalar(s) => out.push(s),
                _ => self.warn(name, "an entry that is not a text"),
            }
        }
        out
    }

    /// Base models or datasets; `None` if the card does not speak of them.
    fn sources(&mut self, names: &[&'static str]) -> Option<Vec<Source>> {
        let name = names.iter().find(|n| self.card.has(n))?;
        let entries = match self.card.get(name).cloned() {
            None => Vec::new(),
            Some(Yaml::List(items)) => items,
            Some(scalar @ Yaml::Scalar(_)) => vec![scalar],
            Some(_) => {
                self.warn(name, "neither a text nor a list");
                Vec::new()
            }
        };
        let mut out = Vec::new();
        for entry in entries {
            match entry {
                Yaml::Scalar(id) => out.push(source_of_id(&id, self.total)),
                Yaml::Map(fields) => out.push(
                    fields
                        .into_iter()
                        .filter_map(|(k, v)| if let Yaml::Scalar(s) = v { Some((k, s)) } else { None })
                        .collect(),
                ),
                _ => {
                    self.warn(name, "an entry that is neither a name nor a mapping");
                    out.push(Source::new());
                }
            }
        }
        Some(out)
    }
}

/// A Hugging Face id or a URL as name, organization, version and `repo_url`.
fn source_of_id(id: &str, total: u128) -> Source {
    static HUB: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^https?://huggingface.co/([^/]+/[^/]+)$").expect("a constant pattern"));
    let url = ["http://", "https://", "ssh://"].iter().any(|s| id.starts_with(s));
    let on_hub = || HUB.captures(id).ok().flatten().and_then(|c| c.get(1)).map(|m| m.as_str().to_string());
    let mut out = Source::new();
    let id_on_hub = if url { on_hub() } else { Some(id.to_string()) };
    if let Some(hub) = id_on_hub {
        let parts = naming::components(&hub, total);
        let mut add = |key: &str, text: Option<String>| out.extend(text.map(|t| (key.to_string(), t)));
        add("name", parts.name.as_deref().map(naming::title));
        add("organization", parts.organization.as_deref().map(naming::title));
        add("version", parts.version);
        if let (false, Some(org), Some(name)) = (url, parts.organization, parts.name) {
            add("repo_url", Some(format!("https://huggingface.co/{org}/{name}")));
        }
    }
    if url {
        out.push(("repo_url".into(), id.into()));
    }
    out
}

fn json_text(file: &Path, key: &str, value: &Json) -> Result<Option<String>, CheckpointError> {
    match value {
        Json::Null => Ok(None),
        Json::String(s) => Ok(Some(s.clone())),
        other => Err(CheckpointError::key(file, key, format!("{}, where a string was expected", json::kind(other)))),
    }
}

fn json_list(file: &Path, key: &str, value: &Json) -> Result<Vec<String>, CheckpointError> {
    match value {
        Json::Null => Ok(Vec::new()),
        Json::Array(items) => items
            .iter()
            .map(|i| i.as_str().map(str::to_string))
            .collect::<Option<_>>()
            .ok_or_else(|| CheckpointError::key(file, key, "not a list of strings")),
        _ => Err(CheckpointError::key(file, key, "not a list of strings")),
    }
}

fn json_sources(file: &Path, key: &str, value: &Json) -> Result<Option<Vec<Source>>, CheckpointError> {
    let refuse = || CheckpointError::key(file, key, "not a list of objects with string values");
    let object = |o: &Map<String, Json>| {
        o.iter().map(|(k, v)| Some((k.clone(), v.as_str()?.to_string()))).collect::<Option<Source>>()
    };
    match value {
        Json::Null => Ok(None),
        Json::Array(items) => items
            .iter()
            .map(|i| i.as_object().and_then(object))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(refuse)
            .map(Some),
        _ => Err(refuse()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn general(card: &str, config: &str, naming: Naming<'_>) -> (Metadata, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("folder-7B-chat");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("README.md"), card).unwrap();
        let Json::Object(raw) = serde_json::from_str(config).unwrap() else { panic!() };
        let config = Config::from_object(Path::new("config.json"), raw).unwrap();
        let (mut out, mut warnings) = (Metadata::new(), Vec::new());
        let gathered = General::gather(&folder, &config, naming, &ParamCount::default(), &mut warnings).unwrap();
        gathered.write(&mut out, &mut warnings);
        (out, warnings)
    }

    fn texts(metadata: &Metadata) -> Vec<(&str, &str)> {
        metadata.iter().filter_map(|(k, v)| Some((k.strip_prefix("general.")?, v.as_str()?))).collect()
    }

    #[test]
    fn card_before_config_before_folder() {
        let (out, warnings) = general(
            "---\nlicense: [mit, other]\nmodel_creator: Me\nversion: 1.0\ntags: {a: 1}\n---\n",
            r#"{"_name_or_path": "some-org/Base-3B"}"#,
            Naming::default(),
        );
        let want = [
            ("name", "Base 3B"),
            ("author", "Me"),
            ("version", "1.0"),
            ("organization", "Some Org"),
            ("finetune", "chat"),
            ("basename", "Base"),
            ("size_label", "3B"),
            ("license", "mit,other"),
        ];
        assert_eq!(texts(&out), want);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }

    #[test]
    fn sources_from_ids_urls_and_maps() {
        let card = "---\nbase_model:\n- a/B-7B-v2\n- https://huggingface.co/c/d\n- https://example.org/x\n- name: N\n  doi: D\n\
                    datasets: null\n---\n";
        let (out, _) =
            general(card, r#"{"_name_or_path": "/a/path/"}"#, Naming { model_name: Some("X"), metadata_file: None });
        let want = [
            ("name", "X"),
            ("finetune", "chat"),
            ("basename", "folder"),
            ("size_label", "7B"),
            ("base_model.0.name", "B 7B v2"),
            ("base_model.0.version", "v2"),
            ("base_model.0.organization", "A"),
            ("base_model.0.repo_url", "https://huggingface.co/a/B-7B-v2"),
            ("base_model.1.name", "D"),
            ("base_model.1.organization", "C"),
            ("base_model.1.repo_url", "https://huggingface.co/c/d"),
            ("base_model.2.repo_url", "https://example.org/x"),
            ("base_model.3.name", "N"),
            ("base_model.3.doi", "D"),
        ];
        assert_eq!(texts(&out), want);
        assert_eq!(value::get(&out, "general.base_model.count"), Some(&Value::U32(4)));
        assert_eq!(value::get(&out, "general.dataset.count"), Some(&Value::U32(0)));
    }

    #[test]
    fn a_metadata_file_goes_before_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = r#"{"general.name": "Y", "general.finetune": null, "general.tags": ["t"], "general.license": "no",
                       "general.base_models": [{"name": "B"}]}"#;
        std::fs::write(file.path(), text).unwrap();
        let (out, warnings) = general("", "{}", Naming { model_name: None, metadata_file: Some(file.path()) });
        assert_eq!(
            texts(&out),
            [("name", "Y"), ("basename", "folder"), ("size_label", "7B"), ("base_model.0.name", "B")]
        );
        assert_eq!(warnings.len(), 1);
        std::fs::write(file.path(), r#"{"general.name": 7}"#).unwrap();
        let config = Config::from_object(Path::new("c"), Map::new()).unwrap();
        let naming = Naming { model_name: None, metadata_file: Some(file.path()) };
        assert!(General::gather(Path::new("x"), &config, naming, &ParamCount::default(), &mut Vec::new()).is_err());
    }
}
