//! Codebook formats.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// IQ2_XXS.
#[allow(non_camel_case_types)]
pub struct Iq2Xxs;

impl BlockFormat for Iq2Xxs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_XXS
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
/// IQ2_XS.
#[allow(non_camel_case_types)]
pub struct Iq2Xs;

impl BlockFormat for Iq2Xs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_XS
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
/// IQ2_S.
#[allow(non_camel_case_types)]
pub struct Iq2S;

impl BlockFormat for Iq2S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ2_S
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
/// IQ3_XXS.
#[allow(non_camel_case_types)]
pub struct Iq3Xxs;

impl BlockFormat for Iq3Xxs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ3_XXS
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
/// IQ3_S.
#[allow(non_camel_case_types)]
pub struct Iq3S;

impl BlockFormat for Iq3S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ3_S
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
/// IQ1_S.
#[allow(non_camel_case_types)]
pub struct Iq1S;

impl BlockFormat for Iq1S {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ1_S
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
/// IQ1_M.
#[allow(non_camel_case_types)]
pub struct Iq1M;

impl BlockFormat for Iq1M {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ1_M
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
