//! ostq-convert: a Hugging Face checkpoint to a GGUF file, in one streaming pass.

pub mod arch;
pub mod checkpoint;
pub mod formats;
pub mod gguf;
pub mod mapped;
pub mod tokenizer;
