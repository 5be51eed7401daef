//! Transforms that leave a model's function as it is and make its weights easier to round: what they are worth ([`qsur`]), and
//! their application.
//!
//! [`Transforms`] are rotations and scales in pairs that cancel, of the kinds of OSTQuant (arXiv 2501.13987). A
//! [`TransformedSource`] gives the weights of the transformed model under the same GGUF names, fused in f64 while they are
//! read; plan, calibration, rounding and conversion see nothing else. [`preset`] makes transforms in closed form, [`mod@file`]
//! reads and writes them.

pub mod anatomy;
pub mod file;
pub mod import;
mod ops;
pub mod preset;
mod product;
pub mod qsur;
pub mod qsur_report;
pub mod scales;
pub mod set;
pub mod source;
pub mod spread;

use std::path::PathBuf;

pub use anatomy::{Anatomy, Pair};
pub use ops::InputMap;
pub use preset::Preset;
pub use set::{LayerTransforms, Transforms};
pub use source::TransformedSource;

use crate::checkpoint::CheckpointError;
use crate::forward::ForwardError;

/// Why transforms cannot be made or applied.
#[derive(Debug, thiserror::Error)]
pub enum TransformError {
    #[error("transforms: every reader and writer of the stream must be known: {0}")]
    Model(ForwardError),
    #[error("transform `{name}`: {why} ({arch})")]
    Void { name: String, arch: String, why: String },
    #[error("transform `{name}`: has shape {found:?}, this model wants {expected:?}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("transform `{name}`: holds {value} at {index}")]
    NotFinite { name: String, index: usize, value: f64 },
    #[error(
        "transform `{name}`: not orthogonal: |RᵀR - I| is up to {error:.2e}, at most {:.0e} is taken",
        set::ORTHOGONAL
    )]
    NotOrthogonal { name: String, error: f64 },
    #[error("transform `{name}`: scales must be above 0, element {index} is {value}")]
    NotPositive { name: String, index: usize, value: f64 },
    #[error("{}: {why}", file.display())]
    File { file: PathBuf, why: String },
    #[error(transparent)]
    Input(#[from] CheckpointError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Calibration(#[from] crate::calibration::CalibrationError),
    #[error(transparent)]
    Eigen(#[from] crate::linalg::LinalgError),
    #[error("tensor `{tensor}`: {source}")]
    Format { tensor: String, source: crate::formats::FormatError },
    #[error("{0}")]
    Other(String),
}

impl TransformError {
    /// The same, of a file.
    pub(crate) fn of(self, file: &std::path::Path) -> TransformError {
        TransformError::File { file: file.to_path_buf(), why: self.to_string() }
    }
}
