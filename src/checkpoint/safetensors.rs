//! The safetensors header, read strictly and with messages that name file, tensor and place.
//!
//! Layout: u64 length N, N bytes of JSON (`name -> {dtype, shape, data_offsets}`), data. Rules are those of the format's
//! text and of the reference reader: ranges contiguous, nothing overlapping, the whole buffer covered; a duplicate name
//! is refused (generic JSON maps keep the last). The crate `safetensors` is the oracle of the tests.

use std::fmt;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;

use super::CheckpointError;
use crate::mapped::MappedFile;

/// Longest header that the reference reader accepts.
const MAX_HEADER: u64 = 100_000_000;

/// Element type of a stored tensor that this program can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Name in the header, kind, bytes of an element. Names that are known but not readable have no kind.
    const TABLE: &'static [(&'static str, Option<Dtype>, u64)] = &[
        ("F64", Some(Dtype::F64), 64),
        ("F32", Some(Dtype::F32), 32),
        ("F16", Some(Dtype::F16), 16),
        ("BF16", Some(Dtype::BF16), 16),
        ("F8_E4M3", Some(Dtype::F8E4M3), 8),
        ("F8_E5M2", Some(Dtype::F8E5M2), 8),
        ("I64", Some(Dtype::I64), 64),
        ("I32", Some(Dtype::I32), 32),
        ("I16", Some(Dtype::I16), 16),
        ("I8", Some(Dtype::I8), 8),
        ("U8", Some(Dtype::U8), 8),
        ("BOOL", Some(Dtype::Bool), 8),
        ("U16", None, 16),
        ("U32", None, 32),
        ("U64", None, 64),
        ("C64", None, 64),
        ("F8_E8M0", None, 8),
        ("F8_E4M3FNUZ", None, 8),
        ("F8_E5M2FNUZ", None, 8),
        ("F4", None, 4),
        ("F6_E2M3", None, 6),
        ("F6_E3M2", None, 6),
    ];

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::F8E4M3 | Dtype::F8E5M2 | Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// True for the types whose values are numbers of a weight.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F8E4M3 | Dtype::F8E5M2)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Dtype::TABLE.iter().find(|(_, d, _)| *d == Some(*self)).map_or("?", |(n, ..)| n);
        f.pad(name)
    }
}

/// A tensor of one file.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    /// The type's name in the header.
    pub dtype_name: String,
    /// `None`: known, sized, but not readable here (refused only when the tensor is needed).
    pub dtype: Option<Dtype>,
    /// Row-major, outermost dimension first.
    pub shape: Vec<u64>,
    /// Range in the file.
    pub begin: usize,
    pub end: usize,
}

/// Reads the header of `file`; entries in the order of the header.
pub fn read(file: &MappedFile) -> Result<Vec<Entry>, CheckpointError> {
    parse(file.path(), file.bytes())
}

/// Reads the header of `bytes`, a whole file; `path` is for messages.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    let refuse = |why: String| CheckpointError::file(path, why);
    if bytes.len() < 8 {
        return Err(refuse(format!("{} bytes are too few for a safetensors file{}", bytes.len(), guess_kind(bytes))));
    }
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    if n > MAX_HEADER || n > bytes.len() as u64 - 8 {
        return Err(refuse(format!(
            "the header says it has {n} bytes, the file has {} after it{}",
            bytes.len() - 8,
            guess_kind(bytes)
        )));
    }
    let header = &bytes[8..8 + n as usize];
    if header.first() != Some(&b'{') {
        return Err(refuse(format!("the header does not start with `{{`{}", guess_kind(bytes))));
    }
    let text = std::str::from_utf8(header)
        .map_err(|e| refuse(format!("the header is not UTF-8 at byte {}", 8 + e.valid_up_to())))?;
    let raw: RawHeader =
        serde_json::from_str(text).map_err(|e| refuse(format!("the header is not a valid JSON object: {e}")))?;
    if let Some((_, metadata)) = raw.0.iter().find(|(name, _)| name == "__metadata__")
        && metadata.as_object().is_none_or(|m| m.values().any(|v| !v.is_string()))
    {
        return Err(CheckpointError::key(path, "__metadata__", "not an object of strings"));
    }
    let start = 8 + n as usize;
    let entries = raw
        .0
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, json)| {
            entry(&name, &json, start, bytes.len()).map_err(|why| CheckpointError::tensor(path, name.clone(), why))
        })
        .collect::<Result<Vec<_>, _>>()?;
    check_cover(path, bytes.len(), &entries, start)?;
    Ok(entries)
}

/// The strings of `__metadata__` in `bytes`, a whole file that [`parse`] has taken.
pub fn metadata(path: &Path, bytes: &[u8]) -> Result<Vec<(String, String)>, CheckpointError> {
    let bad = || CheckpointError::file(path, "its header cannot be read");
    let n = u64::from_le_bytes(bytes.get(..8).ok_or_else(bad)?.try_into().expect("eight bytes"));
    let header = usize::try_from(n).ok().and_then(|n| bytes.get(8..n.checked_add(8)?)).ok_or_else(bad)?;
    let raw: RawHeader = serde_json::from_slice(header).map_err(|_| bad())?;
    let metadata = raw.0.into_iter().find(|(name, _)| name == "__metadata__").map(|(_, json)| json);
    let strings = metadata.as_ref().and_then(Json::as_object).into_iter().flatten();
    Ok(strings.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string()))).collect())
}

/// What a file that is no safetensors file probably is.
fn guess_kind(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => ": the file is empty",
        b if b.starts_with(b"version https://git-lfs") => {
            ": a Git LFS pointer; fetch the real file with `git lfs pull`"
        }
        b if b.starts_with(b"PK") || b.first() == Some(&0x80) => {
            ": a PyTorch pickle; save the model with safe_serialization=True"
        }
        b if b.starts_with(b"<") => ": an HTML page, the download failed",
        b if b.starts_with(b"GGUF") => ": a GGUF file",
        _ => "",
    }
}

struct RawHeader(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut out = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((k, v)) = map.next_entry::<String, Json>()? {
                    if !seen.insert(k.clone()) {
                        return Err(serde::de::Error::custom(format!("tensor `{k}` appears twice")));
                    }
                    out.push((k, v));
                }
                Ok(RawHeader(out))
            }
        }
        d.deserialize_map(V)
    }
}

fn entry(name: &str, json: &Json, start: usize, len: usize) -> Result<Entry, String> {
    let field = |key: &str| json.get(key).ok_or_else(|| format!("`{key}` is missing from its header entry"));
    let dtype_name = field("dtype")?.as_str().ok_or("`dtype` is not a string")?.to_string();
    let (_, dtype, bits) = *Dtype::TABLE
        .iter()
        .find(|(n, ..)| *n == dtype_name)
        .ok_or_else(|| format!("dtype `{dtype_name}` is not known"))?;
    let numbers = |key: &str| -> Result<Vec<u64>, String> {
        let list = field(key)?.as_array().ok_or_else(|| format!("`{key}` is not a list"))?;
        list.iter().map(|v| v.as_u64().ok_or_else(|| format!("`{key}` holds {v}, not a whole number >= 0"))).collect()
    };
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let [begin, end] = offsets[..] else {
        return Err(format!("`data_offsets` holds {} numbers, not 2", offsets.len()));
    };
    if begin > end {
        return Err(format!("data_offsets [{begin}, {end}]: the end is before the beginning"));
    }
    let room = (len - start) as u64;
    if end > room {
        return Err(format!(
            "its data ends at byte {end} of the buffer, the file has only {room}: truncated download?"
        ));
    }
    let overflow = || format!("the size of shape {shape:?} overflows");
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
    let bits = elements.checked_mul(bits).ok_or_else(overflow)?;
    if bits % 8 != 0 || bits / 8 != end - begin {
        return Err(format!(
            "shape {shape:?} of {dtype_name} needs {} bytes, data_offsets [{begin}, {end}] hold {}",
            bits.div_ceil(8),
            end - begin
        ));
    }
    Ok(Entry {
        name: name.to_string(),
        dtype_name,
        dtype,
        shape,
        begin: start + begin as usize,
        end: start + end as usize,
    })
}

/// Ranges sorted by their beginning must follow each other and fill the file.
fn check_cover(path: &Path, len: usize, entries: &[Entry], start: usize) -> Result<(), CheckpointError> {
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|e| (e.begin, e.end));
    let mut at = start;
    for e in order {
        if e.begin != at {
            let what = if e.begin < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(CheckpointError::tensor(
                path,
                &e.name,
                format!("data begins at file byte {}, expected {at}: it {what}", e.begin),
            ));
        }
        at = e.end;
    }
    if at != len {
        return Err(CheckpointError::file(
            path,
            format!("the tensors end at byte {at}, the file has {len}: {} bytes belong to no tensor", len - at),
        ));
    }
    Ok(())
}
