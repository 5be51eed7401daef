//! Allocation: which tensor gets which type, for a file of a given size.
//!
//! [`costs`] predicts what each type costs each tensor in KL divergence, from one backward pass and the second moments of
//! the inputs; [`measured`] corrects that, one rounded tensor at a time. [`knapsack`] chooses one type for each tensor so that the sum is least and the bytes stay under the target.

pub mod costs;
pub mod knapsack;
pub mod measured;

pub use costs::{Choice, TensorCosts};

use std::path::PathBuf;

use crate::calibration::CalibrationError;
use crate::formats::FormatError;
use crate::forward::ForwardError;

/// Why types cannot be allocated.
#[derive(Debug, thiserror::Error)]
pub enum AllocationError {
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error("tensor `{tensor}`: {source}")]
    Format { tensor: String, source: FormatError },
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("tensor `{tensor}`: rounded to {ty} alone it makes predictions that are no numbers")]
    Measured { tensor: String, ty: String },
    #[error("the smallest file that the allowed types give has {least} bytes, the target {target}")]
    TooSmall { least: u64, target: u64 },
}
