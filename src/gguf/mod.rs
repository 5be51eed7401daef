//! GGUF: types, typed metadata, the strict reader and the order-preserving writer.

mod types;
pub mod value;

pub use types::GgmlType;
pub use value::{Array, Metadata, Value};
