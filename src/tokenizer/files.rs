//! The tokenizer files of a folder, read once.
//!
//! Added tokens are spread over three of them. transformers lets `added_tokens_decoder` of tokenizer_config.json speak last
//! about the flags of a token, tokenizer.json about its id.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::checkpoint::{CheckpointError, json};

/// A token added to the vocabulary after training.
#[derive(Clone, Debug, PartialEq)]
pub struct Added {
    pub id: u64,
    pub content: String,
    pub special: bool,
    pub normalized: bool,
}

/// What there is.
#[derive(Debug)]
pub struct Files {
    pub folder: PathBuf,
    /// tokenizer.json.
    pub tokenizer: Option<Map<String, Json>>,
    /// The text of tokenizer.json, for the `tokenizers` library.
    pub tokenizer_text: Option<String>,
    /// tokenizer_config.json.
    pub config: Option<Map<String, Json>>,
    /// added_tokens.json: text to id.
    pub added_tokens: Option<Map<String, Json>>,
    /// special_tokens_map.json.
    pub special_map: Option<Map<String, Json>>,
}

impl Files {
    /// Reads those that are there.
    pub fn load(folder: &Path) -> Result<Files, CheckpointError> {
        let file = folder.join("tokenizer.json");
        let tokenizer_text = if json::exists(&file)? { Some(json::read_text(&file)?) } else { None };
        let tokenizer = match tokenizer_text.as_deref().map(|t| json::parse(&file, t)).transpose()? {
            None => None,
            Some(Json::Object(o)) => Some(o),
            Some(other) => {
                return Err(CheckpointError::file(
                    file,
                    format!("{}, where an object was expected", json::kind(&other)),
                ));
            }
        };
        let side = |name: &str| json::read_object_if_present(&folder.join(name));
        Ok(Files {
            folder: folder.to_path_buf(),
            tokenizer,
            tokenizer_text,
            config: side("tokenizer_config.json")?,
            added_tokens: side("added_tokens.json")?,
            special_map: side("special_tokens_map.json")?,
        })
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// True if the folder holds `name`.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).is_file()
    }

    /// A boolean of tokenizer_config.json.
    pub fn config_bool(&self, key: &str) -> Option<bool> {
        self.config.as_ref()?.get(key)?.as_bool()
    }

    /// `model.vocab` of a BPE tokenizer.json as (text, id).
    pub fn bpe_vocab(&self) -> Result<Vec<(&str, u64)>, CheckpointError> {
        let file = self.path("tokenizer.json");
        let model = self.tokenizer.as_ref().and_then(|t| t.get("model"));
        let Some(Json::Object(vocab)) = model.and_then(|m| m.get("vocab")) else {
            return Err(CheckpointError::key(file, "model.vocab", "missing or not an object of ids"));
        };
        let entry = |(text, id): (&'_ String, &'_ Json)| match json::as_integer(id) {
            Some(n) if (0..1 << 32).contains(&n) => Ok(n as u64),
            _ => Err(CheckpointError::key(
                &file,
                "model.vocab",
                format!("the id of `{text}` is {id}, not a whole number below 2^32"),
            )),
        };
        vocab.iter().map(|(text, id)| Ok((text.as_str(), entry((text, id))?))).collect()
    }

    /// The number of tokens in tokenizer.json, for messages.
    pub fn token_count(&self) -> Option<usize> {
        let vocab = self.tokenizer.as_ref()?.get("model")?.get("vocab")?;
        let base = vocab.as_object().map(Map::len).or_else(|| vocab.as_array().map(Vec::len))?;
        let inside = |a: &Added| vocab.as_object().is_some_and(|v| v.contains_key(&a.content));
        Some(base + self.added(&mut Vec::new()).ok()?.iter().filter(|a| !inside(a)).count())
    }

    /// All added tokens, by id.
    pub fn added(&self, warnings: &mut Vec<String>) -> Result<Vec<Added>, CheckpointError> {
        let mut out: Vec<Added> = Vec::new();
        let file = self.path("tokenizer.json");
        match self.tokenizer.as_ref().and_then(|t| t.get("added_tokens")) {
            None | Some(Json::Null) => {}
            Some(Json::Array(entries)) => {
                for entry in entries {
                    out.push(added(&file, "added_tokens", entry.get("id").and_then(json::as_integer), entry)?);
                }
            }
            Some(_) => return Err(CheckpointError::key(file, "added_tokens", "not a list")),
        }
        for own in self.decoder()? {
            place(&mut out, own, &self.path("tokenizer_config.json"), warnings);
        }
        if self.tokenizer.is_some() {
            for (content, id) in self.added_tokens.iter().flatten() {
                let id = plain_id(&self.path("added_tokens.json"), content, id)?;
                if !out.iter().any(|a| a.content == *content) {
                    let own = Added { id, content: content.clone(), special: false, normalized: false };
                    place(&mut out, own, &self.path("added_tokens.json"), warnings);
                }
            }
        }
        out.sort_by_key(|a| a.id);
        Ok(out)
    }

    /// `added_tokens_decoder` of tokenizer_config.json, in the order of the file.
    pub fn decoder(&self) -> Result<Vec<Added>, CheckpointError> {
        const KEY: &str = "added_tokens_decoder";
        let file = self.path("tokenizer_config.json");
        match self.config.as_ref().and_then(|c| c.get(KEY)) {
            None | Some(Json::Null) => Ok(Vec::new()),
            Some(Json::Object(entries)) => {
                entries.iter().map(|(id, entry)| added(&file, KEY, id.trim().parse().ok(), entry)).collect()
            }
            Some(_) => Err(CheckpointError::key(file, KEY, "not an object")),
        }
    }
}

/// The id of an entry of added_tokens.json.
pub fn plain_id(file: &Path, content: &str, id: &Json) -> Result<u64, CheckpointError> {
    match json::as_integer(id) {
        Some(n) if (0..1 << 32).contains(&n) => Ok(n as u64),
        _ => Err(CheckpointError::key(file, content, format!("{id} is not a token id"))),
    }
}

fn added(file: &Path, key: &str, id: Option<i128>, entry: &Json) -> Result<Added, CheckpointError> {
    let content = entry.get("content").and_then(Json::as_str);
    let (Some(id @ 0..=0xffff_ffff), Some(content)) = (id, content) else {
        return Err(CheckpointError::key(
            file,
            key,
            format!("an entry without a valid id or without content: {entry:.200}"),
        ));
    };
    let flag = |name: &str| entry.get(name).and_then(Json::as_bool);
    let special = flag("special").unwrap_or(false);
    Ok(Added { id: id as u64, content: content.into(), special, normalized: flag("normalized").unwrap_or(!special) })
}

/// Adds a token or, if its text is there already, takes its flags.
fn place(out: &mut Vec<Added>, own: Added, file: &Path, warnings: &mut Vec<String>) {
    let file = file.display();
    if let Some(there) = out.iter_mut().find(|a| a.content == own.content) {
        if there.id != own.id {
            warnings.push(format!(
                "{file}: `{}` has the id {} here and {} in tokenizer.json, which counts",
                own.content, own.id, there.id
            ));
        }
        (there.special, there.normalized) = (own.special, own.normalized);
    } else if let Some(there) = out.iter().find(|a| a.id == own.id) {
        warnings.push(format!(
            "{file}: id {} is `{}` here and `{}` in tokenizer.json, which counts",
            own.id, own.content, there.content
        ));
    } else {
        out.push(own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> Files {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Files::load(dir.path()).unwrap()
    }

    #[test]
    fn added_tokens_of_three_files() {
        let files = folder(&[
            (
                "tokenizer.json",
                r#"{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 2, "content": "<x>", "special": true}]}"#,
            ),
            (
                "tokenizer_config.json",
                r#"{"added_tokens_decoder": {"2": {"content": "<x>", "special": false}, "1": {"content": "<y>"}, "5": {"content": "<y>"}}}"#,
            ),
            ("added_tokens.json", r#"{"<z>": 3, "<y>": 9}"#),
        ]);
        let mut warnings = Vec::new();
        let added = files.added(&mut warnings).unwrap();
        let shown: Vec<_> = added.iter().map(|a| (a.id, a.content.as_str(), a.special, a.normalized)).collect();
        assert_eq!(shown, [(1, "<y>", false, true), (2, "<x>", false, true), (3, "<z>", false, false)]);
        assert_eq!(warnings.len(), 1);
        assert_eq!(files.token_count(), Some(4));
    }

    #[test]
    fn malformed_entries_name_file_and_key() {
        for (name, text) in [
            ("tokenizer.json", r#"{"added_tokens": [{"id": -1, "content": "x"}]}"#),
            ("tokenizer.json", r#"{"added_tokens": [{"id": 1}]}"#),
            ("tokenizer.json", r#"{"added_tokens": 7}"#),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "y"}}}"#),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": [1]}"#),
        ] {
            let message = folder(&[(name, text)]).added(&mut Vec::new()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("added_tokens"), "{message}");
        }
        let vocab = folder(&[("tokenizer.json", r#"{"model": {"vocab": {"a": 1.5}}}"#)]);
        assert!(vocab.bpe_vocab().is_err());
    }
}
