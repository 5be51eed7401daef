//! What can be wrong with a checkpoint. A message names the file, the tensor or key, what was found and what helps.

use std::path::{Path, PathBuf};

/// An input that is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file as a whole: missing, of another kind, truncated, inconsistent.
    #[error("{}: {reason}", file.display())]
    File { file: PathBuf, reason: String },
    /// One tensor of a file.
    #[error("{}: tensor `{tensor}`: {reason}", file.display())]
    Tensor { file: PathBuf, tensor: String, reason: String },
    /// One key of a JSON or YAML file.
    #[error("{}: key `{key}`: {reason}", file.display())]
    Key { file: PathBuf, key: String, reason: String },
    /// The operating system said no.
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
}

impl CheckpointError {
    pub fn file(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::File { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }

    pub fn tensor(file: impl AsRef<Path>, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.as_ref().to_path_buf(), tensor: tensor.into(), reason: reason.into() }
    }

    pub fn key(file: impl AsRef<Path>, key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Key { file: file.as_ref().to_path_buf(), key: key.into(), reason: reason.into() }
    }

    pub fn io(file: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { file: file.as_ref().to_path_buf(), source }
    }
}
