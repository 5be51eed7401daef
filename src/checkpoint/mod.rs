//! What comes in: a Hugging Face folder. Headers and side files here; weights are read through the maps of `safetensors`.

pub mod config;
mod error;
pub mod folder;
pub mod safetensors;

pub use config::Config;
pub use error::CheckpointError;
pub use folder::Weights;
pub use safetensors::Dtype;
