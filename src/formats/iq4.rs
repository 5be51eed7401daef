//! IQ4_NL, IQ4_XS.

use super::{BlockFormat, FormatError};
use crate::gguf::GgmlType;

/// IQ4_NL.
#[allow(non_camel_case_types)]
pub struct Iq4Nl;

impl BlockFormat for Iq4Nl {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ4_NL
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
/// IQ4_XS.
#[allow(non_camel_case_types)]
pub struct Iq4Xs;

impl BlockFormat for Iq4Xs {
    fn ggml_type(&self) -> GgmlType {
        GgmlType::IQ4_XS
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
