//! A checkpoint folder: which files hold the weights, and which tensor is where.
//!
//! Files as `convert_hf_to_gguf.py` takes them: names that start with `model` and end in `.safetensors`, sorted; with an
//! index, exactly the index's files and tensors. Everything else that a folder can be is recognised and refused by name.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::CheckpointError;
use super::json;
use super::safetensors::{self, Entry};
use crate::mapped::MappedFile;

const INDEX: &str = "model.safetensors.index.json";

/// The weight files of a checkpoint, mapped, and their tensors in the order of files and headers.
#[derive(Debug)]
pub struct Weights {
    pub folder: PathBuf,
    pub files: Vec<MappedFile>,
    /// (index into `files`, entry).
    pub tensors: Vec<(usize, Entry)>,
}

impl Weights {
    /// Opens every weight file of `folder` and checks the headers against each other and the index.
    pub fn open(folder: &Path) -> Result<Weights, CheckpointError> {
        let names = list_files(folder)?;
        let index = read_index(folder)?;
        let names = match &index {
            Some(index) => index.files.iter().cloned().collect(),
            None if names.len() > 1 => {
                return Err(CheckpointError::file(
                    folder,
                    format!(
                        "{} weight files ({}, ...) but no {INDEX}: which of them belong together is not known",
                        names.len(),
                        names[0]
                    ),
                ));
            }
            None => names,
        };
        let mut w = Weights { folder: folder.to_path_buf(), files: Vec::new(), tensors: Vec::new() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (i, name) in names.iter().enumerate() {
            let path = folder.join(name);
            let file = MappedFile::open(&path).map_err(|e| open_error(&path, e, index.is_some()))?;
            for entry in safetensors::read(&file)? {
                if let Some(&other) = seen.get(&entry.name) {
                    return Err(CheckpointError::tensor(&path, &entry.name, format!("is also in {}", names[other])));
                }
                seen.insert(entry.name.clone(), i);
                w.tensors.push((i, entry));
            }
            file.advise_sequential();
            w.files.push(file);
        }
        if let Some(index) = index {
            check_index(folder, &index, &names, &seen)?;
        }
        Ok(w)
    }

    /// The tensor called `name`.
    pub fn find(&self, name: &str) -> Option<(usize, &Entry)> {
        self.tensors.iter().find(|(_, e)| e.name == name).map(|(f, e)| (*f, e))
    }
}

fn open_error(path: &Path, e: std::io::Error, indexed: bool) -> CheckpointError {
    match e.kind() {
        std::io::ErrorKind::NotFound if std::fs::symlink_metadata(path).is_ok() => {
            CheckpointError::file(path, "a link to a file that is missing: is the download complete?")
        }
        std::io::ErrorKind::NotFound if indexed => {
            CheckpointError::file(path, format!("is named in {INDEX} but missing: the download is incomplete"))
        }
        _ => CheckpointError::io(path, e),
    }
}

fn list_files(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = std::fs::read_dir(folder).map_err(|e| CheckpointError::io(folder, e))?;
    let mut all = Vec::new();
    for e in entries {
        let e = e.map_err(|e| CheckpointError::io(folder, e))?;
        if let Ok(name) = e.file_name().into_string() {
            all.push(name);
        }
    }
    all.sort();
    let weights: Vec<String> =
        all.iter().filter(|n| n.starts_with("model") && n.ends_with(".safetensors")).cloned().collect();
    if weights.is_empty() && !all.iter().any(|n| n == INDEX) {
        return Err(CheckpointError::file(folder, what_else(&all)));
    }
    Ok(weights)
}

/// The folder has no `model*.safetensors`: say what it seems to be.
fn what_else(names: &[String]) -> String {
    let has = |f: &dyn Fn(&str) -> bool| names.iter().any(|n| f(n));
    let found = if has(&|n| n == "adapter_config.json") {
        "this is a LoRA adapter (adapter_config.json), not a model: merge it into its base model first"
    } else if has(&|n| n == "model_index.json") {
        "this is a diffusers pipeline (model_index.json), not a language model"
    } else if has(&|n| n.ends_with(".bin") || n.ends_with(".pth") || n.ends_with(".pt") || n.ends_with(".ckpt")) {
        "only PyTorch pickle files here; load the model with transformers and save it with safe_serialization=True"
    } else if has(&|n| n.ends_with(".gguf")) {
        "only GGUF files here: name the file itself as input"
    } else if has(&|n| n.ends_with(".onnx")) {
        "this is an ONNX export; the original safetensors checkpoint is needed"
    } else if has(&|n| n.ends_with(".incomplete")) {
        "the download is incomplete (*.incomplete files)"
    } else if has(&|n| n.ends_with(".safetensors")) {
        "no file is named model*.safetensors"
    } else {
        "no model*.safetensors file here"
    };
    found.to_string()
}

struct Index {
    files: BTreeSet<String>,
    tensors: Vec<(String, String)>,
}

fn read_index(folder: &Path) -> Result<Option<Index>, CheckpointError> {
    let path = folder.join(INDEX);
    let Some(json) = json::read_if_present(&path)? else { return Ok(None) };
    let map = json
        .get("weight_map")
        .and_then(Json::as_object)
        .ok_or_else(|| CheckpointError::key(&path, "weight_map", "missing, or not an object"))?;
    let mut index = Index { files: BTreeSet::new(), tensors: Vec::with_capacity(map.len()) };
    for (tensor, file) in map {
        let file = file
            .as_str()
            .ok_or_else(|| CheckpointError::key(&path, "weight_map", format!("`{tensor}` names no file: {file}")))?;
        if file.is_empty() || file.contains(['/', '\\', '\0']) || file.starts_with("..") {
            return Err(CheckpointError::key(
                &path,
                "weight_map",
                format!("`{tensor}` names `{file}`; only files of the same folder are read"),
            ));
        }
        index.files.insert(file.to_string());
        index.tensors.push((tensor.clone(), file.to_string()));
    }
    if index.files.is_empty() {
        return Err(CheckpointError::key(&path, "weight_map", "is empty"));
    }
    Ok(Some(index))
}

fn check_index(
    folder: &Path,
    index: &Index,
    names: &[String],
    seen: &HashMap<String, usize>,
) -> Result<(), CheckpointError> {
    let path = folder.join(INDEX);
    for (tensor, file) in &index.tensors {
        match seen.get(tensor) {
            Some(&i) if names[i] == *file => {}
            Some(&i) => {
                return Err(CheckpointError::tensor(path, tensor, format!("should be in {file}, is in {}", names[i])));
            }
            None => return Err(CheckpointError::tensor(path, tensor, format!("is not in {file}"))),
        }
    }
    if seen.len() > index.tensors.len() {
        let listed: std::collections::HashSet<&str> = index.tensors.iter().map(|(t, _)| t.as_str()).collect();
        let mut extra: Vec<&str> = seen.keys().map(String::as_str).filter(|t| !listed.contains(t)).collect();
        extra.sort_unstable();
        return Err(CheckpointError::file(
            path,
            format!("does not list {} tensors that the files hold, the first is `{}`", extra.len(), extra[0]),
        ));
    }
    Ok(())
}
