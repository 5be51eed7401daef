//! What is known of the activations: collected over a text, written to files, read from them.
//!
//! [`collector`] holds the sums of a forward pass by weight ([`moments`]: of one layer's input). They leave as an importance
//! matrix that any llama.cpp reads ([`imatrix_write`], with the statistics of [`imatrix_stats`]) or as a file of second
//! moments of our own ([`hessian_file`]). [`imatrix_sums`] reads importance matrices as they are stored, [`imatrix`] as
//! quantization uses them. [`text`] is what is run through a model when no other text is given; [`words`] puts texts together, the model's own among
//! them.

pub mod collector;
pub mod fingerprint;
pub mod hessian_file;
pub mod hessian_write;
pub mod imatrix;
pub mod imatrix_stats;
pub mod imatrix_sums;
pub mod imatrix_write;
pub mod moments;
pub mod run;
pub mod stages;
pub mod text;
pub mod windows;
pub mod words;

use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::output::OutputError;

/// What can go wrong between a forward pass and its files.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The contents as a whole.
    #[error("{}: {reason}", file.display())]
    File { file: PathBuf, reason: String },
    /// The entry of one weight.
    #[error("{}: `{tensor}`: {reason}", file.display())]
    Tensor { file: PathBuf, tensor: String, reason: String },
    /// What the command line names as text.
    #[error("{0}")]
    Words(String),
    /// The text itself.
    #[error("{0}")]
    Text(String),
    #[error("{0}")]
    Collect(#[from] collector::CollectError),
    #[error("{0}")]
    Input(#[from] CheckpointError),
    #[error("{0}")]
    Output(#[from] OutputError),
    #[error("{0}")]
    Forward(#[from] crate::forward::ForwardError),
}

impl CalibrationError {
    fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self::File { file: file.to_path_buf(), reason: reason.into() }
    }

    fn tensor(file: &Path, tensor: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.into(), reason: reason.into() }
    }
}
