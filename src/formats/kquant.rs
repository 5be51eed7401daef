//! The k-quants.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// Q2_K.
#[allow(non_camel_case_types)]
pub struct Q2K;

impl BlockFormat for Q2K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q2_K
    }
    fn decode(&self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        todo!()
    }
    fn validate(&self, _blocks: &[u8]) -> Result<(), FormatError> {
        todo!()
    }
}
/// Q3_K.
#[allow(non_camel_case_types)]
pub struct Q3K;

impl BlockFormat for Q3K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q3_K
    }
    fn decode(&self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        todo!()
    }
    fn validate(&self, _blocks: &[u8]) -> Result<(), FormatError> {
        todo!()
    }
}
/// Q4_K.
#[allow(non_camel_case_types)]
pub struct Q4K;

impl BlockFormat for Q4K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q4_K
    }
    fn decode(&self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        todo!()
    }
    fn validate(&self, _blocks: &[u8]) -> Result<(), FormatError> {
        todo!()
    }
}
/// Q5_K.
#[allow(non_camel_case_types)]
pub struct Q5K;

impl BlockFormat for Q5K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q5_K
    }
    fn decode(&self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        todo!()
    }
    fn validate(&self, _blocks: &[u8]) -> Result<(), FormatError> {
        todo!()
    }
}
/// Q6_K.
#[allow(non_camel_case_types)]
pub struct Q6K;

impl BlockFormat for Q6K {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q6_K
    }
    fn decode(&self, _blocks: &[u8], _out: &mut [f32]) {
        todo!()
    }
    fn encode(&self, _rows: &[f32], _n: usize, _w: Option<&[f32]>, _out: &mut [u8]) -> Result<(), FormatError> {
        todo!()
    }
    fn validate(&self, _blocks: &[u8]) -> Result<(), FormatError> {
        todo!()
    }
}
