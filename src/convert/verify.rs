//! A written file is read again before it gets its name: by our own strict reader, and by the crate `gguf-rs` as an
//! independent second one.
//!
//! `gguf-rs` 0.1.8 is used where it is sound: header only, through its `Read` interface (never its map, never its
//! writer), sizes compared only for the types that it sizes rightly; it knows no Q1_0 and Q2_0, panics on NVFP4, keeps
//! no order of keys, and turns JSON numbers into arbitrary-precision ones for the whole build.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::gguf::{self, GgmlType, Value};
use crate::mapped::MappedFile;
use crate::plan::Plan;

/// The written file is not what was planned. This is a defect of ours or of the disk.
#[derive(Debug, thiserror::Error)]
#[error("{}: the written file does not read back as planned ({reader}): {reason}", path.display())]
pub struct VerifyError {
    pub path: PathBuf,
    pub reader: &'static str,
    pub reason: String,
}

/// Reads the header of `path` with both readers and compares it with the plan.
pub fn header(path: &Path, plan: &Plan) -> Result<(), VerifyError> {
    let fail = |reader| move |reason| VerifyError { path: path.to_path_buf(), reader, reason };
    ours(path, plan).map_err(fail("own reader"))?;
    if !plan.big_endian {
        second(path, plan).map_err(fail("gguf-rs"))?;
    }
    Ok(())
}

fn ours(path: &Path, plan: &Plan) -> Result<(), String> {
    let file = MappedFile::open(path).map_err(|e| e.to_string())?;
    if file.bytes().len() as u64 != plan.layout.file_size {
        return Err(format!("it has {} bytes, {} were planned", file.bytes().len(), plan.layout.file_size));
    }
    if plan.tensors.is_empty() {
        return Ok(()); // gguf-py pads no file without tensors
    }
    let header = gguf::read(file.bytes()).map_err(|e| e.to_string())?;
    let same = |a: &Value, b: &Value| a == b || format!("{a:?}") == format!("{b:?}"); // NaN is equal to itself here
    if header.metadata.len() != plan.metadata.len()
        || header.metadata.iter().zip(&plan.metadata).any(|(a, b)| a.0 != b.0 || !same(&a.1, &b.1))
    {
        return Err("its keys differ".into());
    }
    if header.tensors.len() != plan.tensors.len() {
        return Err(format!("it has {} tensors, {} were planned", header.tensors.len(), plan.tensors.len()));
    }
    for (t, p) in header.tensors.iter().zip(&plan.tensors) {
        if (t.name.as_str(), &t.dims, t.ty, t.offset, t.bytes) != (p.name.as_str(), &p.dims, p.ty, p.offset, p.bytes) {
            return Err(format!("tensor `{}` differs from the planned `{}`", t.name, p.name));
        }
    }
    Ok(())
}

/// Types that gguf-rs 0.1.8 reads, and those among them whose size it computes rightly.
fn known_to_gguf_rs(ty: GgmlType) -> (bool, bool) {
    use GgmlType::*;
    match ty {
        NVFP4 | Q1_0 | Q2_0 => (false, false),
        Q8_1 | IQ4_NL | I8 | I16 | I32 | I64 | F64 | BF16 | MXFP4 => (true, false),
        _ => (true, true),
    }
}

fn second(path: &Path, plan: &Plan) -> Result<(), String> {
    if plan.tensors.iter().any(|t| !known_to_gguf_rs(t.ty).0) {
        return Ok(());
    }
    let mut file = BufReader::with_capacity(1 << 20, std::fs::File::open(path).map_err(|e| e.to_string())?);
    let mut magic = [0u8; 4];
    file.read_exact(&mut magic).map_err(|e| e.to_string())?;
    // arrays are truncated to this many elements in memory; all are parsed
    const KEEP: u64 = 4;
    let mut container = gguf_rs::GGUFContainer::new(gguf_rs::ByteOrder::LE, Box::new(file), KEEP);
    let model = container.decode().map_err(|e| e.to_string())?;
    if model.metadata().len() != plan.metadata.len() {
        return Err(format!("{} keys, {} were planned", model.metadata().len(), plan.metadata.len()));
    }
    let tensors = model.tensors();
    if tensors.len() != plan.tensors.len() {
        return Err(format!("{} tensors, {} were planned", tensors.len(), plan.tensors.len()));
    }
    for (t, p) in tensors.iter().zip(&plan.tensors) {
        let offset = p.offset - plan.layout.header.len() as u64;
        if t.name != p.name || t.kind != p.ty as u32 || t.offset != offset {
            return Err(format!("tensor `{}` differs from the planned `{}`", t.name, p.name));
        }
        if known_to_gguf_rs(p.ty).1 && t.size != p.bytes {
            return Err(format!("tensor `{}`: {} bytes, {} were planned", t.name, t.size, p.bytes));
        }
    }
    Ok(())
}
