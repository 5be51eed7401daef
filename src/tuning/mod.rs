//! Tuning after rounding: what the blocks of a rounded model store, moved against the Kullback-Leibler divergence of its
//! predictions from the float model's.
//!
//! Parameters are the scales, minima and, where there are few levels, the codes of every block ([`blocks`]), and the norms.
//! The rounded model is in memory as f32 ([`student`]); a step is one batch of windows forward and back, the float model
//! ([`teacher`]) beside it, then one step of Adam. Windows that training does not see say when to stop ([`run`]): on little
//! text this over-fits. Models that do not fit are tuned layer by layer ([`local`]). What comes out are plain blocks of the same types.

pub mod blocks;
pub mod engine;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod head;
pub mod layer;
pub mod local;
pub mod run;
pub mod student;
pub mod teacher;

use std::path::PathBuf;

use crate::forward::ForwardError;
use crate::rounding::RoundingError;

/// Why a model cannot be tuned.
#[derive(Debug, thiserror::Error)]
pub enum TuningError {
    #[error(transparent)]
    Forward(ForwardError),
    #[error(transparent)]
    Rounding(RoundingError),
    #[error("tuning: {0}")]
    Refused(String),
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    #[error("the GPU: {0}")]
    Device(String),
    #[error("interrupted; what is done is kept, the same command goes on from there")]
    Interrupted,
}

impl From<ForwardError> for TuningError {
    fn from(e: ForwardError) -> TuningError {
        match e {
            ForwardError::Interrupted => TuningError::Interrupted,
            e => TuningError::Forward(e),
        }
    }
}

impl From<RoundingError> for TuningError {
    fn from(e: RoundingError) -> TuningError {
        match e {
            RoundingError::Interrupted => TuningError::Interrupted,
            e => TuningError::Rounding(e),
        }
    }
}

#[cfg(feature = "cuda")]
impl From<crate::cuda::DeviceError> for TuningError {
    fn from(e: crate::cuda::DeviceError) -> TuningError {
        match e {
            crate::cuda::DeviceError::Forward(e) => e.into(),
            crate::cuda::DeviceError::Device(why) => TuningError::Device(why),
        }
    }
}
