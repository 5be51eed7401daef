//! GGUF: types, typed metadata, the strict reader and the order-preserving writer.

mod reader;
mod types;
pub mod value;
mod writer;

pub use reader::{DEFAULT_ALIGNMENT, Header, MAX_NAME, TensorInfo, read, tensor_bytes};
pub use types::GgmlType;
pub use value::{Array, Metadata, Value};
pub use writer::{Layout, TensorSpec, layout};

/// A GGUF file that is refused: where and why.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("at byte {offset}: {reason}")]
pub struct GgufError {
    pub offset: usize,
    pub reason: String,
}

impl GgufError {
    pub(crate) fn at(offset: usize, reason: impl Into<String>) -> GgufError {
        GgufError { offset, reason: reason.into() }
    }

    fn within(mut self, what: &str) -> GgufError {
        self.reason = format!("{what}: {}", self.reason);
        self
    }
}
