//! Importance matrices: the GGUF files of `llama-imatrix` and the legacy `.dat` files.
//!
//! Rules: `common/imatrix-loader.cpp` and `tools/quantize/quantize.cpp` (`prepare_imatrix`) of llama.cpp b11434. The
//! weight of an input column is `in_sum2 / count` in f32, one row per expert; a count of 0 gives 1.0 throughout.
//! An unreadable file is refused with its place; nothing is allocated by an unchecked number.

use std::collections::BTreeMap;
use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};
use sha2::{Digest, Sha256};

use crate::checkpoint::CheckpointError;
use crate::gguf::{self, Array, GgmlType, Header, Value};
use crate::mapped::MappedFile;

/// Importance of every input column, by tensor name.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    /// Tensor name to columns x experts values.
    pub entries: BTreeMap<String, Vec<f32>>,
    /// The text it was collected from, where the file says so.
    pub datasets: Vec<String>,
    pub chunks: u32,
    /// Of the file.
    pub sha256: String,
}

impl Imatrix {
    /// Reads `path`, of either kind.
    pub fn load(path: &Path) -> Result<Imatrix, CheckpointError> {
        let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let bytes = file.bytes();
        let refuse = |why: String| CheckpointError::file(path, why);
        let mut imatrix = if bytes.starts_with(b"GGUF") {
            let header = gguf::read(bytes).map_err(|e| refuse(e.to_string()))?;
            from_gguf(&header, bytes).map_err(refuse)?
        } else {
            from_legacy(bytes).map_err(|e| refuse(format!("neither GGUF nor a legacy imatrix: {e}")))?
        };
        for (name, values) in &imatrix.entries {
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(refuse(format!("entry `{name}` holds {} at column {i}", values[i])));
            }
        }
        imatrix.sha256 = hex(&Sha256::digest(bytes));
        Ok(imatrix)
    }

    /// Keeps entries whose names contain one of `include` (all, if empty) and none of `exclude`.
    pub fn filter(&mut self, include: &[String], exclude: &[String]) {
        self.entries.retain(|name, _| {
            (include.is_empty() || include.iter().any(|s| name.contains(s.as_str())))
                && !exclude.iter().any(|s| name.contains(s.as_str()))
        });
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn from_gguf(header: &Header, bytes: &[u8]) -> Result<Imatrix, String> {
    let get = |key: &str| gguf::value::get(&header.metadata, key);
    let mut out = Imatrix::default();
    match get("imatrix.datasets") {
        Some(Value::Array(Array::Str(list))) => {
            out.datasets = list.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect();
        }
        Some(_) => return Err("key `imatrix.datasets` is not an array of strings".into()),
        None => return Err("key `imatrix.datasets` is missing: not an imatrix".into()),
    }
    for key in ["imatrix.chunk_count", "imatrix.chunk_size"] {
        match get(key) {
            Some(Value::U32(n)) if key == "imatrix.chunk_count" => out.chunks = *n,
            Some(Value::U32(_)) => {}
            Some(_) => return Err(format!("key `{key}` is not a u32")),
            None => return Err(format!("key `{key}` is missing: not an imatrix")),
        }
    }
    type Floats<'a> = Option<(Vec<f32>, &'a [u64])>;
    let floats = |name: &str| -> Result<Floats, String> {
        let Some(t) = header.tensor(name) else { return Ok(None) };
        if t.ty != GgmlType::F32 {
            return Err(format!("tensor `{name}` is {}, not f32", t.ty));
        }
        let data = &bytes[t.offset as usize..(t.offset + t.bytes) as usize];
        Ok(Some((f32s(data), &t.dims)))
    };
    for t in &header.tensors {
        let Some(name) = t.name.strip_suffix(".in_sum2") else {
            if let Some(name) =
                t.name.strip_suffix(".counts").filter(|n| header.tensor(&format!("{n}.in_sum2")).is_none())
            {
                return Err(format!("`{name}` has counts but no in_sum2"));
            }
            continue;
        };
        let (sums, _) = floats(&t.name)?.ok_or("in_sum2 vanished")?;
        let (counts, _) =
            floats(&format!("{name}.counts"))?.ok_or_else(|| format!("`{name}` has in_sum2 but no counts"))?;
        if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
            return Err(format!("`{name}`: {} sums for {} counts", sums.len(), counts.len()));
        }
        let columns = sums.len() / counts.len();
        let mut values = Vec::with_capacity(sums.len());
        for (sums, &count) in sums.chunks(columns.max(1)).zip(&counts) {
            let count = (f64::from(count).round()) as f32;
            values.extend(sums.iter().map(|&s| if count > 0.0 { s / count } else { 1.0 }));
        }
        out.entries.insert(name.to_string(), values);
    }
    if out.entries.is_empty() {
        return Err("no tensor `*.in_sum2`: not an imatrix".into());
    }
    Ok(out)
}

/// Little-endian values.
fn f32s(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / 4];
    LittleEndian::read_f32_into(bytes, &mut values);
    values
}

struct Legacy<'a>(&'a [u8]);

impl<'a> Legacy<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        if n > self.0.len() {
            return Err(format!("{n} bytes expected, {} left", self.0.len()));
        }
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        Ok(head)
    }

    fn i32(&mut self) -> Result<i32, String> {
        Ok(i32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn length(&mut self, what: &str) -> Result<usize, String> {
        let n = self.i32()?;
        usize::try_from(n).ok().filter(|&n| n >= 1).ok_or_else(|| format!("{what} is {n}"))
    }
}

fn from_legacy(bytes: &[u8]) -> Result<Imatrix, String> {
    let mut r = Legacy(bytes);
    let mut out = Imatrix::default();
    let n = r.length("the number of entries")?;
    for i in 0..n {
        let len = r.length("the length of a name")?;
        let name = std::str::from_utf8(r.take(len)?).map_err(|_| format!("the name of entry {i} is not UTF-8"))?;
        let calls = r.i32()?;
        let len = r.length(&format!("the number of values of `{name}`"))?;
        let bytes = len.checked_mul(4).ok_or("a length overflows")?;
        let data = f32s(r.take(bytes)?);
        // stored values are mean x calls
        let calls = if calls > 0 { calls as f32 } else { 1.0 };
        let values = data.iter().map(|v| v / calls).collect();
        if out.entries.insert(name.to_string(), values).is_some() {
            return Err(format!("entry `{name}` appears twice"));
        }
    }
    if !r.0.is_empty() {
        out.chunks = u32::try_from(r.i32()?).unwrap_or(0);
        let len = r.length("the length of the dataset name")?;
        out.datasets.push(String::from_utf8_lossy(r.take(len)?).into_owned());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legacy(name_len: i32, values: &[f32], calls: i32) -> Vec<u8> {
        let mut b = Vec::new();
        b.extend(1i32.to_le_bytes());
        b.extend(name_len.to_le_bytes());
        b.extend(b"w.weight");
        b.extend(calls.to_le_bytes());
        b.extend((values.len() as i32).to_le_bytes());
        b.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        b
    }

    #[test]
    fn legacy_values_are_divided_by_the_calls() {
        let mut b = legacy(8, &[6.0, 3.0], 3);
        b.extend(7i32.to_le_bytes());
        b.extend(4i32.to_le_bytes());
        b.extend(b"text");
        let m = from_legacy(&b).unwrap();
        assert_eq!(m.entries["w.weight"], [2.0, 1.0]);
        assert_eq!((m.chunks, m.datasets), (7, vec!["text".to_string()]));
    }

    #[test]
    fn hostile_lengths_are_refused() {
        assert!(from_legacy(&legacy(-1, &[1.0], 1)).is_err());
        assert!(from_legacy(&legacy(i32::MAX, &[1.0], 1)).is_err());
        assert!(from_legacy(&[255, 255, 255, 127]).is_err());
        assert!(from_legacy(&[]).is_err());
    }
}
