//! The strict GGUF reader: everything that `gguf.cpp` refuses is refused here, with the place and the reason.
//!
//! Input is the whole file as bytes (a map); nothing is allocated by a number that was not checked against the bytes
//! that are left. Versions 2 and 3, both byte orders. Rules: `ggml/src/gguf.cpp` (`gguf_init_from_file_impl`).

use std::collections::HashSet;

use super::value::{Array, Metadata, Value};
use super::{GgmlType, GgufError};

/// `GGML_MAX_NAME`: tensor names are shorter than this.
pub const MAX_NAME: usize = 64;
/// `GGML_MAX_DIMS`.
pub const MAX_DIMS: usize = 4;
/// `GGUF_DEFAULT_ALIGNMENT`.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Longest string that llama.cpp reads.
const MAX_STRING: u64 = 1 << 30;
/// Longest array that llama.cpp reads.
const MAX_ARRAY: u64 = 1 << 30;

/// A tensor of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// `ne`: fastest dimension first.
    pub dims: Vec<u64>,
    pub ty: GgmlType,
    /// From the start of the file.
    pub offset: u64,
    /// Without padding.
    pub bytes: u64,
}

/// A parsed header.
#[derive(Clone, Debug)]
pub struct Header {
    pub version: u32,
    pub big_endian: bool,
    pub alignment: u64,
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
    /// Where tensor data begins.
    pub data_offset: u64,
}

impl Header {
    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

/// Parses the header of `bytes`, a whole file, and checks that the data of every tensor is inside it.
pub fn read(bytes: &[u8]) -> Result<Header, GgufError> {
    let mut c = Cursor { bytes, pos: 0, big: false };
    check_magic(bytes)?;
    c.pos = 4;
    let version = match c.u32()? {
        v if v & 0xffff == 0 && v != 0 => {
            c.big = true;
            v.swap_bytes()
        }
        v => v,
    };
    if !(2..=3).contains(&version) {
        return Err(GgufError::at(4, format!("GGUF version {version}, versions 2 and 3 can be read")));
    }
    let n_tensors = c.count("number of tensors", 24)?;
    let n_kv = c.count("number of keys", 13)?;
    let metadata = read_metadata(&mut c, n_kv)?;
    let alignment = alignment(&metadata)?;
    let infos = read_infos(&mut c, n_tensors)?;
    let data_offset = c.pos.next_multiple_of(alignment as usize) as u64;
    let tensors = place(infos, data_offset, alignment, bytes.len() as u64)?;
    Ok(Header { version, big_endian: c.big, alignment, metadata, tensors, data_offset })
}

fn check_magic(bytes: &[u8]) -> Result<(), GgufError> {
    if bytes.len() < 24 {
        return Err(GgufError::at(0, format!("{} bytes are too few for a GGUF header", bytes.len())));
    }
    if &bytes[..4] != b"GGUF" {
        let why = if bytes[..24].iter().all(|&b| b == 0) {
            "the header is all zero: an interrupted write"
        } else {
            "not a GGUF file (the first bytes are not `GGUF`)"
        };
        return Err(GgufError::at(0, why));
    }
    Ok(())
}

fn read_metadata(c: &mut Cursor, n: usize) -> Result<Metadata, GgufError> {
    let mut metadata = Metadata::with_capacity(n.min(1024));
    let mut seen = HashSet::new();
    for _ in 0..n {
        let at = c.pos;
        let key = String::from_utf8(c.string()?).map_err(|_| GgufError::at(at, "a key is not UTF-8"))?;
        if key.is_empty() {
            return Err(GgufError::at(at, "an empty key"));
        }
        let ty = c.u32()?;
        let value = c.value(ty).map_err(|e| e.within(&format!("key `{key}`")))?;
        if !seen.insert(key.clone()) {
            return Err(GgufError::at(at, format!("key `{key}` appears twice")));
        }
        metadata.push((key, value));
    }
    Ok(metadata)
}

fn alignment(metadata: &Metadata) -> Result<u64, GgufError> {
    match super::value::get(metadata, "general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(a)) if a.is_power_of_two() && *a <= 1 << 24 => Ok((*a).into()),
        Some(v) => Err(GgufError::at(0, format!("general.alignment must be a u32 power of two, found {v:?}"))),
    }
}

struct RawInfo {
    name: String,
    dims: Vec<u64>,
    ty: GgmlType,
    bytes: u64,
    offset: u64,
    at: usize,
}

fn read_infos(c: &mut Cursor, n: usize) -> Result<Vec<RawInfo>, GgufError> {
    let mut infos = Vec::with_capacity(n.min(4096));
    let mut seen = HashSet::new();
    for _ in 0..n {
        let at = c.pos;
        let name = String::from_utf8(c.string()?).map_err(|_| GgufError::at(at, "a tensor name is not UTF-8"))?;
        if name.len() >= MAX_NAME {
            return Err(GgufError::at(at, format!("tensor name of {} bytes, at most {}", name.len(), MAX_NAME - 1)));
        }
        let err = |what: String| GgufError::at(at, format!("tensor `{name}`: {what}"));
        if !seen.insert(name.clone()) {
            return Err(err("appears twice".into()));
        }
        let n_dims = c.u32()? as usize;
        if n_dims > MAX_DIMS {
            return Err(err(format!("{n_dims} dimensions, at most {MAX_DIMS}")));
        }
        let dims = (0..n_dims).map(|_| c.u64()).collect::<Result<Vec<_>, _>>()?;
        if let Some(d) = dims.iter().find(|&&d| d > i64::MAX as u64) {
            return Err(err(format!("dimension {} is negative", *d as i64)));
        }
        let id = c.u32()?;
        let ty = GgmlType::from_id(id).ok_or_else(|| err(format!("type {id} is not known")))?;
        let bytes = tensor_bytes(ty, &dims).map_err(err)?;
        let offset = c.u64()?;
        infos.push(RawInfo { name, dims, ty, bytes, offset, at });
    }
    Ok(infos)
}

/// Bytes of a tensor; an error where a product overflows or a row is no whole number of blocks.
pub fn tensor_bytes(ty: GgmlType, dims: &[u64]) -> Result<u64, String> {
    // ggml checks the element count in i64, whatever the order of the dimensions
    let mut elements: i64 = 1;
    for &d in dims.iter().filter(|&&d| d != 0) {
        elements = i64::try_from(d)
            .ok()
            .and_then(|d| elements.checked_mul(d))
            .ok_or_else(|| format!("the number of elements of {dims:?} overflows"))?;
    }
    let ne0 = dims.first().copied().unwrap_or(1);
    let row = ty
        .row_bytes(ne0)
        .ok_or_else(|| format!("a row of {ne0} is no multiple of the {} elements of a {ty} block", ty.block_len()))?;
    dims.iter()
        .skip(1)
        .try_fold(row, |n, &d| n.checked_mul(d))
        .filter(|&n| n < i64::MAX as u64)
        .ok_or_else(|| format!("the size in bytes of {dims:?} as {ty} overflows"))
}

fn place(infos: Vec<RawInfo>, start: u64, align: u64, file: u64) -> Result<Vec<TensorInfo>, GgufError> {
    let mut expected = 0u64;
    let mut out = Vec::with_capacity(infos.len());
    for i in infos {
        let err = |what: String| GgufError::at(i.at, format!("tensor `{}`: {what}", i.name));
        if i.offset != expected {
            return Err(err(format!("data offset {}, expected {expected}", i.offset)));
        }
        let end = i.offset.checked_add(i.bytes).and_then(|e| e.checked_add(start));
        match end {
            Some(end) if end <= file => {}
            Some(end) => {
                return Err(err(format!("data ends at byte {end}, the file has {file}: truncated?")));
            }
            None => return Err(err("data offset overflows".into())),
        }
        expected = i
            .bytes
            .checked_next_multiple_of(align)
            .and_then(|b| expected.checked_add(b))
            .ok_or_else(|| err("padded size overflows".into()))?;
        out.push(TensorInfo { name: i.name, dims: i.dims, ty: i.ty, offset: start + i.offset, bytes: i.bytes });
    }
    Ok(out)
}

struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
    big: bool,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.pos
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], GgufError> {
        if n > self.left() {
            return Err(GgufError::at(self.pos, format!("{n} bytes expected, {} left", self.left())));
        }
        let s = &self.bytes[self.pos..self.pos + n];
        self.pos += n;
        Ok(s)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut b: [u8; N] = self.take(N)?.try_into().expect("N bytes were taken");
        if self.big {
            b.reverse();
        }
        Ok(b)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of records of at least `min` bytes each.
    fn count(&mut self, what: &str, min: usize) -> Result<usize, GgufError> {
        let at = self.pos;
        let n = self.u64()?;
        match usize::try_from(n) {
            Ok(n) if n <= self.left() / min => Ok(n),
            _ => Err(GgufError::at(at, format!("{what} is {n}, the file is too short for that"))),
        }
    }

    fn string(&mut self) -> Result<Vec<u8>, GgufError> {
        let at = self.pos;
        let n = self.u64()?;
        if n > MAX_STRING || n > self.left() as u64 {
            return Err(GgufError::at(at, format!("a string of {n} bytes, {} are left", self.left())));
        }
        Ok(self.take(n as usize)?.to_vec())
    }

    fn value(&mut self, ty: u32) -> Result<Value, GgufError> {
        Ok(match ty {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Str(self.string()?),
            9 => Value::Array(self.array_value()?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            t => return Err(GgufError::at(self.pos - 4, format!("value type {t} is not known"))),
        })
    }

    fn array_value(&mut self) -> Result<Array, GgufError> {
        let ty = self.u32()?;
        let at = self.pos;
        let n = self.u64()?;
        let size = match ty {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err(GgufError::at(at - 4, "an array of arrays")),
            t => return Err(GgufError::at(at - 4, format!("array element type {t} is not known"))),
        };
        if n > MAX_ARRAY || n > (self.left() / size) as u64 {
            return Err(GgufError::at(at, format!("an array of {n} elements, {} bytes are left", self.left())));
        }
        macro_rules! items {
            ($t:ty) => {
                (0..n).map(|_| Ok(<$t>::from_le_bytes(self.array()?))).collect::<Result<Vec<_>, GgufError>>()?
            };
        }
        Ok(match ty {
            0 => Array::U8(items!(u8)),
            1 => Array::I8(items!(i8)),
            2 => Array::U16(items!(u16)),
            3 => Array::I16(items!(i16)),
            4 => Array::U32(items!(u32)),
            5 => Array::I32(items!(i32)),
            6 => Array::F32(items!(f32)),
            7 => Array::Bool(items!(u8).into_iter().map(|b| b != 0).collect()),
            8 => Array::Str((0..n).map(|_| self.string()).collect::<Result<_, _>>()?),
            10 => Array::U64(items!(u64)),
            11 => Array::I64(items!(i64)),
            _ => Array::F64(items!(f64)),
        })
    }
}
