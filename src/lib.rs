//! ostq-convert: a Hugging Face checkpoint to a GGUF file, in one streaming pass.

pub mod arch;
pub mod calibration;
pub mod checkpoint;
pub mod cli;
pub mod convert;
pub mod formats;
pub mod gguf;
pub mod mapped;
pub mod plan;
pub mod source;
pub mod tokenizer;
