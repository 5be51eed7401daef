//! Rounding: the numbers that a block format can hold, chosen for what they do to the output of a layer.
//!
//! The formats stay as llama.cpp reads them. [`matrix::round`] takes a weight, its target and the factored Hessian of its
//! input and gives blocks: GPTQ ([`gptq`], Frantar et al. 2023) with the format's own grid ([`levels`], [`search`]), then
//! coordinate descent in the Hessian norm on all that is stored ([`refine`]), for vector codebooks the same by points
//! ([`codebook`], [`codebook_gptq`], [`codebook_refine`]); and row by row the nearest rounding of ggml
//! where that is better. [`run`] takes a model through it layer by layer: the float model and the rounded one side by side,
//! each layer fitted to the float model's output from the inputs that the rounded one gives it ([`target`]).

mod carry;
pub mod codebook;
pub mod codebook_gptq;
pub mod codebook_refine;
mod experts;
pub mod factor;
pub mod fit;
pub mod gptq;
pub mod levels;
pub mod matrix;
pub mod refine;
pub mod run;
pub mod search;
pub mod site;
pub mod state;
pub mod step;
pub mod streams;
pub mod target;
pub mod weighted;

pub use factor::Factor;

use std::path::PathBuf;

use crate::calibration::moments::MomentsError;
use crate::formats::FormatError;
use crate::forward::ForwardError;

/// Why a weight cannot be rounded this way.
#[derive(Debug, thiserror::Error)]
pub enum RoundingError {
    #[error("the Hessian cannot be used: {0}")]
    Hessian(String),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Forward(ForwardError),
    #[error(transparent)]
    Moments(#[from] MomentsError),
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("interrupted; what is done is kept, the same command goes on from there")]
    Interrupted,
}

impl From<ForwardError> for RoundingError {
    fn from(e: ForwardError) -> RoundingError {
        match e {
            ForwardError::Interrupted => RoundingError::Interrupted,
            e => RoundingError::Forward(e),
        }
    }
}

#[cfg(test)]
mod tests;
