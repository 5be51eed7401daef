//! Goldens: what the reference wrote, as JSON (`goldens/*.json` of the shared folder, made by its `tools/make-goldens.py`).

#[allow(dead_code)]
pub mod npz;
pub mod program;

use std::path::{Path, PathBuf};

use ostq_convert::gguf::{Array, Value};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

/// The shared folder: `OSTQ_SHARED`, else `../shared`. `None`, and a loud line, if it is not there.
#[allow(dead_code)]
pub fn shared() -> Option<PathBuf> {
    let path = match std::env::var_os("OSTQ_SHARED") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    if path.join("goldens").is_dir() {
        return Some(path);
    }
    eprintln!("SKIPPED: no goldens at {} (set OSTQ_SHARED)", path.display());
    None
}

/// A program of real llama.cpp, in `bin` of `OSTQ_PEERS` (default `~/.cache/ostq-peers`). `None`, and a loud line, if it is
/// not there; a failure if `OSTQ_REQUIRE_PEERS=1`.
#[allow(dead_code)]
pub fn peer(name: &str) -> Option<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let peers = set("OSTQ_PEERS").or_else(|| Some(set("HOME")?.join(".cache/ostq-peers")))?;
    let tool = peers.join("bin").join(name);
    if tool.is_file() {
        return Some(tool);
    }
    let missing = format!("no {} (set OSTQ_PEERS, `just peers --without-python`)", tool.display());
    assert!(std::env::var_os("OSTQ_REQUIRE_PEERS").is_none_or(|v| v != "1"), "{missing}");
    eprintln!("SKIPPED: {missing}");
    None
}

/// llama.cpp's converter, which needs the Python side of `OSTQ_PEERS`. `None`, and a loud line, if it is not there; a failure
/// if `OSTQ_REQUIRE_PYTHON=1`.
#[allow(dead_code)]
pub fn converter() -> Option<PathBuf> {
    let set = |key: &str| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
    let peers = set("OSTQ_PEERS").or_else(|| Some(set("HOME")?.join(".cache/ostq-peers")));
    let tool = peers.map(|p| p.join("bin/convert-peer")).filter(|t| t.is_file());
    if tool.is_none() {
        assert!(std::env::var_os("OSTQ_REQUIRE_PYTHON").is_none_or(|v| v != "1"), "no convert-peer (`just peers`)");
        eprintln!("SKIPPED: no convert-peer (set OSTQ_PEERS, `just peers` without --without-python)");
    }
    tool
}

/// A golden file.
#[allow(dead_code)]
pub struct Golden(Json);

#[allow(dead_code)] // not every test binary uses all of it
impl Golden {
    /// Reads `goldens/MODEL.json`.
    pub fn load(shared: &Path, model: &str) -> Golden {
        let file = shared.join("goldens").join(format!("{model}.json"));
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        Golden(serde_json::from_str(&text).unwrap())
    }

    /// The names of its variants that begin with `prefix` and are neither errors nor copies.
    pub fn variants(&self, prefix: &str) -> Vec<&str> {
        let all = self.0["variants"].as_object().unwrap().iter();
        all.filter(|(name, v)| name.starts_with(prefix) && v.get("kv").is_some())
            .map(|(name, _)| name.as_str())
            .collect()
    }

    /// [key, type, value] in the order of the file.
    pub fn metadata(&self, variant: &str) -> Vec<&Json> {
        let indexes = self.0["variants"][variant]["kv"].as_array().unwrap_or_else(|| panic!("variant {variant}"));
        indexes.iter().map(|i| &self.0["kv_pool"][i.as_u64().unwrap() as usize]).collect()
    }

    /// The value of `key`.
    pub fn value(&self, variant: &str, key: &str) -> Option<&Json> {
        self.metadata(variant).into_iter().find(|kv| kv[0] == key).map(|kv| &kv[2])
    }

    /// (name, row-major shape, digest of the data).
    pub fn tensors(&self, variant: &str) -> Vec<(&str, Vec<u64>, &str)> {
        let indexes = self.0["variants"][variant]["tensors"].as_array().unwrap();
        let tensor = |i: &Json| {
            let t = &self.0["tensor_pool"][i.as_u64().unwrap() as usize];
            let shape = t[2].as_array().unwrap().iter().rev().map(|d| d.as_u64().unwrap()).collect();
            (t[0].as_str().unwrap(), shape, t[4].as_str().unwrap_or_default())
        };
        indexes.iter().map(tensor).collect()
    }
}

#[allow(dead_code)]
/// The first 32 hex digits of the sha256.
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().take(16).map(|b| format!("{b:02x}")).collect()
}

#[allow(dead_code)]
/// A value as a golden holds it: [type, value], with long ones as length and digest.
pub fn manifest(value: &Value) -> (String, Json) {
    let array = |name: &str, items: Vec<Json>, bytes: Vec<u8>| {
        let shown = if items.len() > 8 {
            serde_json::json!({"len": items.len(), "sha256": digest(&bytes)})
        } else {
            Json::Array(items)
        };
        (format!("arr:{name}"), shown)
    };
    match value {
        Value::U32(v) => ("u32".into(), (*v).into()),
        Value::I32(v) => ("i32".into(), (*v).into()),
        Value::Bool(v) => ("bool".into(), (*v).into()),
        Value::F32(v) => ("f32".into(), f64::from(*v).into()),
        Value::Str(v) if v.len() > 200 => ("str".into(), serde_json::json!({"len": v.len(), "sha256": digest(v)})),
        Value::Str(v) => ("str".into(), String::from_utf8_lossy(v).into()),
        Value::Array(Array::Str(v)) => array(
            "str",
            v.iter().map(|s| String::from_utf8_lossy(s).into()).collect(),
            v.iter().flat_map(|s| [&(s.len() as u64).to_le_bytes()[..], s].concat()).collect(),
        ),
        Value::Array(Array::I32(v)) => {
            array("i32", v.iter().map(|n| (*n).into()).collect(), v.iter().flat_map(|n| n.to_le_bytes()).collect())
        }
        Value::Array(Array::F32(v)) => array(
            "f32",
            v.iter().map(|n| f64::from(*n).into()).collect(),
            v.iter().flat_map(|n| n.to_le_bytes()).collect(),
        ),
        other => panic!("the reference writes no {other:?}"),
    }
}

#[allow(dead_code)]
/// Equal, numbers as f32 (goldens hold the shortest decimal of an f32).
pub fn equal(ours: &Json, golden: &Json) -> bool {
    match (ours.as_f64(), golden.as_f64()) {
        (Some(a), Some(b)) => a as f32 == b as f32,
        _ => ours == golden,
    }
}

/// Writes a GGUF file of metadata alone, for llama.cpp to read. On purpose not the writer of the crate.
#[allow(dead_code)]
pub fn write_vocab(file: &Path, metadata: &[(String, Value)]) {
    fn text(out: &mut Vec<u8>, bytes: &[u8]) {
        out.extend((bytes.len() as u64).to_le_bytes());
        out.extend(bytes);
    }
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key.as_bytes());
        out.extend(value.type_id().to_le_bytes());
        match value {
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::I32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push((*v).into()),
            Value::Str(v) => text(&mut out, v),
            Value::Array(array) => {
                out.extend(array.type_id().to_le_bytes());
                out.extend((array.len() as u64).to_le_bytes());
                match array {
                    Array::Str(v) => v.iter().for_each(|s| text(&mut out, s)),
                    Array::I32(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
                    Array::F32(v) => v.iter().for_each(|n| out.extend(n.to_le_bytes())),
                    other => panic!("no {other:?} here"),
                }
            }
            other => panic!("no {other:?} here"),
        }
    }
    out.resize(out.len().next_multiple_of(32), 0);
    std::fs::write(file, out).unwrap();
}
