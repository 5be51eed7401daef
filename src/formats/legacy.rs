//! The 32-element formats Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// Q4_0.
#[allow(non_camel_case_types)]
pub struct Q4_0;

impl BlockFormat for Q4_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q4_0
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
/// Q4_1.
#[allow(non_camel_case_types)]
pub struct Q4_1;

impl BlockFormat for Q4_1 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q4_1
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
/// Q5_0.
#[allow(non_camel_case_types)]
pub struct Q5_0;

impl BlockFormat for Q5_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q5_0
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
/// Q5_1.
#[allow(non_camel_case_types)]
pub struct Q5_1;

impl BlockFormat for Q5_1 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q5_1
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
/// Q8_0.
#[allow(non_camel_case_types)]
pub struct Q8_0;

impl BlockFormat for Q8_0 {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::Q8_0
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
