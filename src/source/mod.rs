//! Where weights come from. Whatever reads weights takes a [`TensorSource`]: a checkpoint folder or a GGUF file.
//!
//! A source lists its tensors under their GGUF names and GGUF dimensions, and gives rows of them as f32, with every
//! data transform of the architecture applied (row order of rotary heads, fp8 scales). Nothing is copied before it is
//! asked for; [`TensorSource::release`] drops pages that are done with.

mod checkpoint;
mod gguf_file;
mod rows;

pub use checkpoint::{CheckpointSource, MapOptions};
pub use gguf_file::GgufSource;

use std::ops::Range;

use crate::gguf::GgmlType;
use crate::mapped::MappedFile;
use crate::transform::TransformedSource;

/// A tensor as the output will know it.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// GGUF name.
    pub name: String,
    /// `ne`: fastest dimension first.
    pub dims: Vec<u64>,
    /// The type whose values the tensor holds: what a lossless copy needs. F32 for fp8 and f64 weights.
    pub stored: GgmlType,
    /// The name in the input, for messages and the plan.
    pub origin: String,
    /// Index into [`TensorSource::files`] of the (first) file it is in; `None` for computed tensors.
    pub file: Option<usize>,
    /// Position of its data in that file: reading tensors in this order reads the file front to back.
    pub position: usize,
    /// Bytes that its values take in the input.
    pub stored_bytes: u64,
    /// The stored weight is fp8 with scales.
    pub is_fp8: bool,
    /// Rows that must be read together for [`TensorSource::release`] to work (a rotary head).
    pub row_group: u64,
}

impl SourceTensor {
    /// Elements of a row.
    pub fn row_len(&self) -> u64 {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Rows over all outer dimensions.
    pub fn rows(&self) -> u64 {
        self.dims.iter().skip(1).product()
    }

    /// Elements.
    pub fn elements(&self) -> u64 {
        self.dims.iter().product()
    }
}

/// Weights by GGUF name.
pub trait TensorSource: Send + Sync {
    /// Every tensor, in the order in which the reference converter meets them.
    fn tensors(&self) -> &[SourceTensor];

    /// The mapped input files.
    fn files(&self) -> &[MappedFile];

    /// Rows `rows` of tensor `index` as f32; `out.len()` is rows x row length.
    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]);

    /// Rows in their stored type, as GGUF stores them (`out` has rows x row bytes).
    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]);

    /// Where element `element` stands in the stored tensor, for messages: transforms may change the order of rows.
    fn stored_element(&self, _index: usize, element: u64) -> u64 {
        element
    }

    /// Rows are done with: their pages may leave memory.
    fn release(&self, index: usize, rows: Range<u64>);

    /// The transforms between these weights and the file, if there are any.
    fn transformed(&self) -> Option<&TransformedSource> {
        None
    }

    /// Bytes that the source itself keeps in memory, beside the maps.
    fn resident(&self) -> u64 {
        0
    }

    /// Bytes that reading `rows` rows of a tensor takes for as long as it lasts.
    fn scratch(&self, _index: usize, _rows: u64) -> u64 {
        0
    }
}
