//! The GGUF header as bytes: keys and tensors in the order given, sizes known before the first byte of data is.
//!
//! Only the header is made here; tensor data is written at its offset by whoever has it.

use super::reader::{DEFAULT_ALIGNMENT, MAX_NAME, tensor_bytes};
use super::value::{Array, Value};
use super::{GgmlType, GgufError};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    pub name: String,
    /// `ne`: fastest dimension first.
    pub dims: Vec<u64>,
    pub ty: GgmlType,
}

/// Where everything of a file goes.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The header with its padding: bytes `0..data_offset` of the file.
    pub header: Vec<u8>,
    /// Offset and length of each tensor's data in the file, in the order given.
    pub tensors: Vec<(u64, u64)>,
    /// Size of the whole file.
    pub file_size: u64,
}

/// Lays a version 3 file out: `metadata`, then the infos of `tensors`, then data at [`DEFAULT_ALIGNMENT`], each tensor
/// (also the last) padded with zeros as gguf.cpp does. A file without tensors has `pad_empty` say whether the header is
/// padded all the same (gguf-py does not).
pub fn layout(metadata: &[(String, Value)], tensors: &[TensorSpec], big_endian: bool) -> Result<Layout, GgufError> {
    let mut w = Sink { out: Vec::with_capacity(1 << 16), big: big_endian };
    w.out.extend_from_slice(b"GGUF");
    w.u32(3);
    w.u64(tensors.len() as u64);
    w.u64(metadata.len() as u64);
    for (key, value) in metadata {
        w.string(key.as_bytes());
        w.u32(value.type_id());
        w.value(value);
    }
    let mut offset = 0u64;
    let mut places = Vec::with_capacity(tensors.len());
    for t in tensors {
        let err = |what: String| GgufError::at(w.out.len(), format!("tensor `{}`: {what}", t.name));
        if t.name.len() >= MAX_NAME {
            return Err(err(format!("the name has {} bytes, llama.cpp reads at most {}", t.name.len(), MAX_NAME - 1)));
        }
        let bytes = tensor_bytes(t.ty, &t.dims).map_err(err)?;
        w.string(t.name.as_bytes());
        w.u32(t.dims.len() as u32);
        for &d in &t.dims {
            w.u64(d);
        }
        w.u32(t.ty as u32);
        w.u64(offset);
        places.push((offset, bytes));
        offset = bytes
            .checked_next_multiple_of(DEFAULT_ALIGNMENT)
            .and_then(|b| offset.checked_add(b))
            .ok_or_else(|| GgufError::at(0, "the size of the file overflows"))?;
    }
    if !tensors.is_empty() {
        w.out.resize(w.out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    }
    let start = w.out.len() as u64;
    for p in &mut places {
        p.0 += start;
    }
    Ok(Layout { header: w.out, tensors: places, file_size: start + offset })
}

struct Sink {
    out: Vec<u8>,
    big: bool,
}

impl Sink {
    fn put<const N: usize>(&mut self, mut le: [u8; N]) {
        if self.big {
            le.reverse();
        }
        self.out.extend_from_slice(&le);
    }

    fn u32(&mut self, v: u32) {
        self.put(v.to_le_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.put(v.to_le_bytes());
    }

    fn string(&mut self, s: &[u8]) {
        self.u64(s.len() as u64);
        self.out.extend_from_slice(s);
    }

    fn value(&mut self, v: &Value) {
        match v {
            Value::U8(x) => self.put(x.to_le_bytes()),
            Value::I8(x) => self.put(x.to_le_bytes()),
            Value::U16(x) => self.put(x.to_le_bytes()),
            Value::I16(x) => self.put(x.to_le_bytes()),
            Value::U32(x) => self.put(x.to_le_bytes()),
            Value::I32(x) => self.put(x.to_le_bytes()),
            Value::F32(x) => self.put(x.to_le_bytes()),
            Value::Bool(x) => self.put([u8::from(*x)]),
            Value::Str(s) => self.string(s),
            Value::Array(a) => self.array(a),
            Value::U64(x) => self.put(x.to_le_bytes()),
            Value::I64(x) => self.put(x.to_le_bytes()),
            Value::F64(x) => self.put(x.to_le_bytes()),
        }
    }

    fn array(&mut self, a: &Array) {
        self.u32(a.type_id());
        self.u64(a.len() as u64);
        macro_rules! each {
            ($v:expr) => {
                for x in $v {
                    self.put(x.to_le_bytes());
                }
            };
        }
        match a {
            Array::U8(v) => each!(v),
            Array::I8(v) => each!(v),
            Array::U16(v) => each!(v),
            Array::I16(v) => each!(v),
            Array::U32(v) => each!(v),
            Array::I32(v) => each!(v),
            Array::F32(v) => each!(v),
            Array::Bool(v) => self.out.extend(v.iter().map(|&b| u8::from(b))),
            Array::Str(v) => {
                for s in v {
                    self.string(s);
                }
            }
            Array::U64(v) => each!(v),
            Array::I64(v) => each!(v),
            Array::F64(v) => each!(v),
        }
    }
}
