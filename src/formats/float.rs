//! F32, F16, BF16.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// F32.
#[allow(non_camel_case_types)]
pub struct F32;

impl BlockFormat for F32 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F32
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
/// F16.
#[allow(non_camel_case_types)]
pub struct F16;

impl BlockFormat for F16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::F16
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
/// BF16.
#[allow(non_camel_case_types)]
pub struct Bf16;

impl BlockFormat for Bf16 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::BF16
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
