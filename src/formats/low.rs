//! Ternary, binary and FP4 formats.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// TQ1_0.
#[allow(non_camel_case_types)]
pub struct Tq1_0;

impl BlockFormat for Tq1_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::TQ1_0
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
/// TQ2_0.
#[allow(non_camel_case_types)]
pub struct Tq2_0;

impl BlockFormat for Tq2_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::TQ2_0
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
/// MXFP4.
#[allow(non_camel_case_types)]
pub struct Mxfp4;

impl BlockFormat for Mxfp4 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::MXFP4
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
/// NVFP4.
#[allow(non_camel_case_types)]
pub struct Nvfp4;

impl BlockFormat for Nvfp4 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::NVFP4
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
/// Q1_0.
#[allow(non_camel_case_types)]
pub struct Q1_0;

impl BlockFormat for Q1_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q1_0
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
/// Q2_0.
#[allow(non_camel_case_types)]
pub struct Q2_0;

impl BlockFormat for Q2_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q2_0
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
