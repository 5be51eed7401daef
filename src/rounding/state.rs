//! What a rounding run keeps on the disk: rounded tensors, and how far it is. A killed run goes on behind the last layer that
//! was finished; the result is the same.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::RoundingError;
use crate::gguf::GgmlType;

/// What must be the same for a run to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub version: String,
    pub fingerprint: String,
    pub text: String,
    pub tokens: usize,
    pub length: usize,
    pub one_pass: bool,
    pub row_scales: bool,
    /// Types by tensor.
    pub types: BTreeMap<String, String>,
}

/// `rounding.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub key: Key,
    /// Layers that are done; one more with the head.
    pub layers: usize,
    /// Digests of the two streams behind them.
    pub streams: [String; 2],
    pub reports: Vec<Report>,
}

/// How a tensor was rounded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub name: String,
    pub ty: String,
    /// Error in the norm of the Hessian, of the result and of nearest rounding.
    pub error: f64,
    pub nearest: f64,
    /// Square error of the output on windows that the rounding did not see, of GPTQ and of nearest rounding.
    pub held_out: Option<(f64, f64)>,
    /// Whether GPTQ's result is used.
    pub accepted: bool,
    /// What was odd.
    pub note: Option<String>,
}

fn io(path: &Path, source: std::io::Error) -> RoundingError {
    RoundingError::Io { file: path.to_path_buf(), source }
}

impl State {
    /// What is there, if it can be used for `key`.
    pub fn load(folder: &Path, key: &Key) -> Option<State> {
        let state: State = serde_json::from_slice(&std::fs::read(folder.join("rounding.json")).ok()?).ok()?;
        (state.key == *key && state.layers > 0).then_some(state)
    }

    pub fn save(&self, folder: &Path) -> Result<(), RoundingError> {
        let (new, path) = (folder.join("rounding.json.new"), folder.join("rounding.json"));
        let text = serde_json::to_vec_pretty(self).expect("plain data");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(|e| io(&path, e))
    }
}

/// Where the blocks of a tensor are.
pub fn blocks_path(folder: &Path, tensor: &str) -> PathBuf {
    folder.join(format!("{tensor}.blocks"))
}

/// Writes the blocks of a tensor.
pub fn write_blocks(folder: &Path, tensor: &str, bytes: &[u8]) -> Result<(), RoundingError> {
    let path = blocks_path(folder, tensor);
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(bytes)?;
        file.sync_data()
    };
    write().map_err(|e| io(&path, e))
}

/// Rounded tensors, as a conversion reads them.
#[derive(Debug, Default)]
pub struct RoundedTensors {
    files: BTreeMap<String, (GgmlType, File, PathBuf)>,
}

impl RoundedTensors {
    /// Opens the blocks of `tensors` in `folder`.
    pub fn open(folder: &Path, tensors: impl Iterator<Item = (String, GgmlType)>) -> Result<Self, RoundingError> {
        let mut files = BTreeMap::new();
        for (name, ty) in tensors {
            let path = blocks_path(folder, &name);
            let file = File::open(&path).map_err(|e| io(&path, e))?;
            files.insert(name, (ty, file, path));
        }
        Ok(RoundedTensors { files })
    }

    /// Takes what lies under the name `stored` in `folder` for the tensor `name`.
    pub fn replace(&mut self, folder: &Path, stored: &str, name: &str, ty: GgmlType) -> Result<(), RoundingError> {
        let path = blocks_path(folder, stored);
        let file = File::open(&path).map_err(|e| io(&path, e))?;
        self.files.insert(name.to_string(), (ty, file, path));
        Ok(())
    }

    /// Reads bytes of a tensor from `at` on; false if it is not among them.
    pub fn read(&self, tensor: &str, ty: GgmlType, at: u64, out: &mut [u8]) -> Result<bool, RoundingError> {
        let Some((stored, file, path)) = self.files.get(tensor) else { return Ok(false) };
        assert_eq!(*stored, ty, "the plan that the tensor was rounded for");
        file.read_exact_at(out, at).map_err(|e| io(path, e))?;
        Ok(true)
    }
}

/// Removes what a run left in `folder`.
pub fn forget(folder: &Path) {
    crate::calibration::words::forget(folder);
    // of `--transform auto`
    let trials = folder.join("auto");
    if trials.is_dir() {
        forget(&trials);
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(".blocks")
            || (name.ends_with(".f32") && name.starts_with("rounding-"))
            || (name.ends_with(".json") && name.starts_with("allocation-"))
            || matches!(
                &*name,
                "rounding.json"
                    | "rounding.json.new"
                    | "measured.json"
                    | "auto.json"
                    | "tuning.state"
                    | "tuning.new"
                    | "learning.state"
                    | "learning.new"
            )
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let _ = std::fs::remove_dir(folder);
}
