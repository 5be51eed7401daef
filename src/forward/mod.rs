//! The reference forward pass: f32, block by block, from any source of weights.
//!
//! A [`Model`] is a [`Spec`] (read off the GGUF keys) and a [`crate::source::TensorSource`]; layers are loaded as f32 one at a
//! time, run over every window of the text, and dropped. An [`Observer`] sees the input of every linear: calibration is
//! one. [`Activations::Ggml`] rounds activations as llama.cpp's CPU kernels do.

pub mod attention;
pub mod backward;
pub mod cache;
pub mod generate;
pub mod kernels;
pub mod layer;
pub mod model;
pub mod rope;
pub mod rounding;
pub mod run;
mod sample;
pub mod simulation;
pub mod spec;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Products as layers take them.
pub mod gemm {
    pub use crate::linalg::{Product, product, product_back, products};
}

pub use model::Model;
pub use rounding::Activations;
pub use run::{Hidden, Runner};
pub use simulation::Simulation;
pub use spec::Spec;

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("{}: {source}", file.display())]
    In { file: PathBuf, source: Box<ForwardError> },
    #[error("key `{key}`: {why}")]
    Key { key: String, why: String },
    #[error("architecture `{arch}` cannot be run yet (those that can: {known})")]
    Architecture { arch: String, known: String },
    #[error("tensor `{name}`: {why}")]
    Tensor { name: String, why: String },
    #[error("token {token} is not in a vocabulary of {vocab}")]
    Token { token: u32, vocab: usize },
    #[error("layer {layer}: the activations hold {value} at token {token}, column {column}")]
    NotFinite { layer: usize, token: usize, column: usize, value: f32 },
    #[error("architecture `{arch}`: {why}")]
    NoBackward { arch: String, why: String },
    #[error("layer {layer}: the gradients hold {value} at token {token}, column {column}")]
    Gradient { layer: usize, token: usize, column: usize, value: f32 },
    #[error("gradients: {0}")]
    Windows(String),
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("this model cannot write text: {0}")]
    Generate(String),
    #[error("{0}")]
    Memory(String),
    #[error("{0}")]
    Observer(String),
    #[error("interrupted")]
    Interrupted,
}

impl ForwardError {
    fn tensor(name: &str, why: impl Into<String>) -> ForwardError {
        ForwardError::Tensor { name: name.into(), why: why.into() }
    }

    /// The same, with the file.
    fn of(self, path: &Path) -> ForwardError {
        match self {
            e @ ForwardError::In { .. } => e,
            e => ForwardError::In { file: path.to_path_buf(), source: Box::new(e) },
        }
    }
}

/// An error once a signal has asked to stop: for the loops of a pass, between batches.
pub fn interrupted() -> Result<(), ForwardError> {
    match crate::convert::INTERRUPTED.load(Ordering::Relaxed) {
        true => Err(ForwardError::Interrupted),
        false => Ok(()),
    }
}

/// Sees the inputs of linears.
pub trait Observer {
    /// `x` is `[tokens, inputs]`: what the weights `names` (equal names: parts of one fused weight) are multiplied with,
    /// before any rounding. `expert`: which of how many, with the rows that were routed to it.
    fn input(&mut self, names: &[&str], expert: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError>;
}

/// Looks at nothing.
impl Observer for () {
    fn input(&mut self, _: &[&str], _: Option<(usize, usize)>, _: &[f32]) -> Result<(), ForwardError> {
        Ok(())
    }
}
