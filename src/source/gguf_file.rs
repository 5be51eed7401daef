//! A GGUF file of any type as a [`TensorSource`], for requantization and for everything that reads finished models.

use std::ops::Range;
use std::path::Path;

use super::{SourceTensor, TensorSource};
use crate::checkpoint::CheckpointError;
use crate::formats;
use crate::gguf::{self, Header};
use crate::mapped::MappedFile;

/// An open GGUF file (little-endian).
#[derive(Debug)]
pub struct GgufSource {
    files: Vec<MappedFile>,
    pub header: Header,
    tensors: Vec<SourceTensor>,
}

impl GgufSource {
    /// Opens and checks `path`.
    pub fn open(path: &Path) -> Result<GgufSource, CheckpointError> {
        let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let header = gguf::read(file.bytes()).map_err(|e| CheckpointError::file(path, e.to_string()))?;
        if header.big_endian {
            return Err(CheckpointError::file(path, "a big-endian GGUF; its data cannot be read here"));
        }
        if gguf::value::get(&header.metadata, "split.count").and_then(|v| v.as_u64()).is_some_and(|n| n > 1) {
            return Err(CheckpointError::file(
                path,
                "one part of a split GGUF; merge it first (`llama-gguf-split --merge`)",
            ));
        }
        let tensors = header
            .tensors
            .iter()
            .map(|t| SourceTensor {
                name: t.name.clone(),
                dims: t.dims.clone(),
                stored: t.ty,
                origin: t.name.clone(),
                file: Some(0),
                position: t.offset as usize,
                stored_bytes: t.bytes,
                is_fp8: false,
                row_group: 1,
            })
            .collect();
        file.advise_sequential();
        Ok(GgufSource { files: vec![file], header, tensors })
    }

    fn range(&self, index: usize, rows: &Range<u64>) -> Range<usize> {
        let t = &self.header.tensors[index];
        let row = t.ty.row_bytes(self.tensors[index].row_len()).expect("checked by the reader");
        (t.offset + rows.start * row) as usize..(t.offset + rows.end * row) as usize
    }
}

impl TensorSource for GgufSource {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn files(&self) -> &[MappedFile] {
        &self.files
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        let bytes = &self.files[0].bytes()[self.range(index, &rows)];
        let format = formats::format(self.tensors[index].stored).expect("the plan refuses types without a format");
        format.decode(bytes, out);
    }

    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        out.copy_from_slice(&self.files[0].bytes()[self.range(index, &rows)]);
    }

    fn release(&self, index: usize, rows: Range<u64>) {
        let range = self.range(index, &rows);
        self.files[0].release_around(range);
    }
}
