//! `config.json`: hyper-parameters with the defaults of the transformers config classes filled in.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::CheckpointError;

/// The hyper-parameters of a checkpoint. `text_config` (and its other spellings) is merged into the root.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that was read, for messages.
    pub file: PathBuf,
    /// The merged object; keys keep the order of the file.
    pub values: Map<String, Json>,
}

impl Config {
    /// Reads `config.json` of `folder`.
    pub fn load(folder: &Path) -> Result<Config, CheckpointError> {
        let file = folder.join("config.json");
        let text = std::fs::read_to_string(&file).map_err(|e| CheckpointError::io(&file, e))?;
        let json: Json =
            serde_json::from_str(&text).map_err(|e| CheckpointError::file(&file, format!("not valid JSON: {e}")))?;
        match json {
            Json::Object(values) => Ok(Config { file, values }),
            _ => Err(CheckpointError::file(&file, "not a JSON object")),
        }
    }

    /// The first of `names` that is present and not null.
    pub fn get(&self, names: &[&str]) -> Option<&Json> {
        names.iter().filter_map(|n| self.values.get(*n)).find(|v| !v.is_null())
    }
}
