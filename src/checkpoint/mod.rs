//! What comes in: a Hugging Face folder. Headers and side files here; weights are read through the maps of `safetensors`.

pub mod card;
pub mod config;
mod error;
pub mod folder;
pub mod general;
pub mod generation;
pub mod hparams;
pub mod json;
pub mod naming;
pub mod nearest;
pub mod rope;
pub mod safetensors;
mod yaml;

pub use config::Config;
pub use error::CheckpointError;
pub use folder::Weights;
pub use hparams::Hparams;
pub use safetensors::Dtype;
