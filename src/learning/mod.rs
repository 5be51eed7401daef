//! Learning transforms: rotations on the orthogonal group and scales, against the divergence of a rounded model's predictions
//! from the float model's (OSTQuant, arXiv 2501.13987; SpinQuant, arXiv 2405.16406).
//!
//! The transformed model ([`network`]) is made of the original and of the transforms as they stand ([`values`], [`maps`]), its weights
//! rounded as the target format would ([`fake`]), inputs and cache too where a precision is simulated. The backward pass is that
//! of [`crate::forward::backward`]; rotations step with a Cayley map ([`manifold`]), scales by their logarithms. [`run`] is the
//! loop: batches in a seeded order, rates that fall along a cosine, windows that decide which step is kept. Models that do not fit
//! learn layer by layer against their own float outputs ([`local`]).

pub mod engine;
pub mod fake;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod local;
pub mod manifold;
pub mod maps;
pub mod network;
pub mod run;
pub mod values;

use std::path::PathBuf;

use crate::forward::ForwardError;

/// Why transforms cannot be learned.
#[derive(Debug, thiserror::Error)]
pub enum LearningError {
    #[error(transparent)]
    Forward(ForwardError),
    #[error("learning: {0}")]
    Refused(String),
    #[error("learning: a rotation cannot be moved: {0}")]
    Rotation(String),
    #[error("the GPU: {0}")]
    Device(String),
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("interrupted; what is done is kept, the same command goes on from there")]
    Interrupted,
}

impl From<ForwardError> for LearningError {
    fn from(e: ForwardError) -> LearningError {
        match e {
            ForwardError::Interrupted => LearningError::Interrupted,
            e => LearningError::Forward(e),
        }
    }
}

#[cfg(feature = "cuda")]
impl From<crate::cuda::DeviceError> for LearningError {
    fn from(e: crate::cuda::DeviceError) -> LearningError {
        match e {
            crate::cuda::DeviceError::Forward(e) => e.into(),
            crate::cuda::DeviceError::Device(why) => LearningError::Device(why),
        }
    }
}
