//! `ostq-convert inspect FILE|DIR`: metadata and tensors of a GGUF file, a safetensors file or a checkpoint folder.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use super::{Failure, print};
use crate::calibration::imatrix::hex;
use crate::checkpoint::{CheckpointError, Weights, safetensors};
use crate::convert::hash as pieces;
use crate::gguf::{self, Array, Value};
use crate::mapped::MappedFile;

/// What to look at.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// GGUF file, safetensors file or checkpoint folder.
    path: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// With sha256 of the file(s) and of every tensor.
    #[arg(long)]
    sha256: bool,
}

/// One line of what was found.
struct Row {
    name: String,
    ty: String,
    dims: Vec<u64>,
    bytes: u64,
    sha256: Option<String>,
}

/// sha256 of a file and its tensors.
pub struct Manifest {
    file: String,
    sha256: String,
    rows: Vec<Row>,
}

impl Manifest {
    /// `sha256sum` style: digest, two spaces, name; tensors are indented by their file.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}  {}\n", self.sha256, self.file);
        for r in &self.rows {
            text += &format!("{}  {}:{}\n", r.sha256.as_deref().unwrap_or("-"), self.file, r.name);
        }
        text
    }

    /// As JSON.
    pub fn to_json(&self) -> Json {
        let tensors: Map<String, Json> = self.rows.iter().map(|r| (r.name.clone(), json!(r.sha256))).collect();
        json!({ "sha256": self.sha256, "tensors": tensors })
    }
}

/// Reads `path`, a GGUF file, back from the disk.
pub fn manifest(path: &Path) -> Result<Manifest, Failure> {
    let (file, _, rows) = gguf_rows(path, true)?;
    Ok(Manifest { file: path.display().to_string(), sha256: hash(&file, 0, file.bytes().len()), rows })
}

/// Digests of a whole file, in hex.
struct Sums {
    sha256: String,
    /// Of its pieces, as a converted file names its source ([`pieces::digest`]).
    pieces: String,
}

/// Prints.
pub fn run(args: InspectArgs) -> Result<(), Failure> {
    let path = &args.path;
    if path.is_dir() {
        let weights = Weights::open(path)?;
        let mut all = Vec::new();
        for (i, file) in weights.files.iter().enumerate() {
            let rows = weights.tensors.iter().filter(|(f, _)| *f == i).map(|(_, e)| entry(e, file, args.sha256));
            all.push((file, rows.collect::<Vec<_>>()));
        }
        let mut text = String::new();
        let mut json = Vec::new();
        for (file, rows) in all {
            let sum = args.sha256.then(|| sums(file));
            let name = file.path().display().to_string();
            text += &show(&name, None, &rows, sum.as_ref());
            json.push(to_json(&name, None, &rows, sum.as_ref()));
        }
        return output(&args, &text, Json::Array(json));
    }
    let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
    let name = path.display().to_string();
    if path.extension().is_some_and(|e| e == "safetensors") {
        let rows: Vec<Row> = safetensors::read(&file)?.iter().map(|e| entry(e, &file, args.sha256)).collect();
        let sum = args.sha256.then(|| sums(&file));
        return output(&args, &show(&name, None, &rows, sum.as_ref()), to_json(&name, None, &rows, sum.as_ref()));
    }
    let (file, header, rows) = gguf_rows(path, args.sha256)?;
    let sum = args.sha256.then(|| sums(&file));
    let text = show(&name, Some(&header), &rows, sum.as_ref());
    output(&args, &text, to_json(&name, Some(&header), &rows, sum.as_ref()))
}

fn output(args: &InspectArgs, text: &str, json: Json) -> Result<(), Failure> {
    if args.json { print::stdout(format!("{json:#}\n").as_bytes()) } else { print::stdout(text.as_bytes()) }
}

fn gguf_rows(path: &Path, sha: bool) -> Result<(MappedFile, gguf::Header, Vec<Row>), Failure> {
    let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
    let header = gguf::read(file.bytes()).map_err(|e| CheckpointError::file(path, e.to_string()))?;
    file.advise_sequential();
    let rows = header
        .tensors
        .iter()
        .map(|t| Row {
            name: t.name.clone(),
            ty: t.ty.to_string(),
            dims: t.dims.clone(),
            bytes: t.bytes,
            sha256: sha.then(|| hash(&file, t.offset as usize, (t.offset + t.bytes) as usize)),
        })
        .collect();
    Ok((file, header, rows))
}

fn entry(e: &safetensors::Entry, file: &MappedFile, sha: bool) -> Row {
    Row {
        name: e.name.clone(),
        ty: e.dtype_name.clone(),
        dims: e.shape.clone(),
        bytes: (e.end - e.begin) as u64,
        sha256: sha.then(|| hash(file, e.begin, e.end)),
    }
}

fn sums(file: &MappedFile) -> Sums {
    let mut all = Vec::new();
    let sha256 = hash_by(file, 0, file.bytes().len(), |piece| all.push(Sha256::digest(piece).into()));
    Sums { sha256, pieces: pieces::digest(all.into_iter()) }
}

/// sha256 of a range, pages released behind.
fn hash(file: &MappedFile, begin: usize, end: usize) -> String {
    hash_by(file, begin, end, |_| ())
}

/// The same; `each` gets its pieces.
fn hash_by(file: &MappedFile, begin: usize, end: usize, mut each: impl FnMut(&[u8])) -> String {
    let mut h = Sha256::new();
    for at in (begin..end).step_by(pieces::PIECE) {
        let to = (at + pieces::PIECE).min(end);
        h.update(&file.bytes()[at..to]);
        each(&file.bytes()[at..to]);
        file.release(at..to);
    }
    hex(&h.finalize())
}

fn show(name: &str, header: Option<&gguf::Header>, rows: &[Row], sum: Option<&Sums>) -> String {
    let mut text = format!("{name}\n");
    if let Some(sum) = sum {
        text += &format!("sha256 {}\nsha256_pieces {}\n", sum.sha256, sum.pieces);
    }
    if let Some(h) = header {
        let endian = if h.big_endian { "big-endian, " } else { "" };
        text += &format!(
            "GGUF version {}, {endian}alignment {}, {} keys, {} tensors, data at byte {}\n\n",
            h.version,
            h.alignment,
            h.metadata.len(),
            h.tensors.len(),
            h.data_offset
        );
        let keys: Vec<Vec<String>> = h.metadata.iter().map(|(k, v)| vec![k.clone(), type_name(v), short(v)]).collect();
        text += &print::table(&keys, &[]);
        text.push('\n');
    }
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            let dims = r.dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
            vec![r.name.clone(), r.ty.clone(), dims, r.bytes.to_string(), r.sha256.clone().unwrap_or_default()]
        })
        .collect();
    text + &print::table(&lines, &[false, false, false, true, false])
}

fn to_json(name: &str, header: Option<&gguf::Header>, rows: &[Row], sum: Option<&Sums>) -> Json {
    let tensors: Vec<Json> = rows
        .iter()
        .map(|r| json!({ "name": r.name, "type": r.ty, "dims": r.dims, "bytes": r.bytes, "sha256": r.sha256 }))
        .collect();
    let mut out = json!({
        "file": name,
        "sha256": sum.map(|s| &s.sha256),
        "sha256_pieces": sum.map(|s| &s.pieces),
        "tensors": tensors,
    });
    if let Some(h) = header {
        let keys: Vec<Json> =
            h.metadata.iter().map(|(k, v)| json!({ "key": k, "type": type_name(v), "value": value_json(v) })).collect();
        out["version"] = json!(h.version);
        out["alignment"] = json!(h.alignment);
        out["metadata"] = Json::Array(keys);
    }
    out
}

const TYPE_NAMES: [&str; 13] =
    ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"];

fn type_name(v: &Value) -> String {
    match v {
        Value::Array(a) => format!("arr[{}]", TYPE_NAMES[a.type_id() as usize]),
        v => TYPE_NAMES[v.type_id() as usize].to_string(),
    }
}

fn value_json(v: &Value) -> Json {
    let text = |b: &[u8]| json!(String::from_utf8_lossy(b));
    match v {
        Value::U8(x) => json!(x),
        Value::I8(x) => json!(x),
        Value::U16(x) => json!(x),
        Value::I16(x) => json!(x),
        Value::U32(x) => json!(x),
        Value::I32(x) => json!(x),
        Value::F32(x) => float(f64::from(*x), x.to_string()),
        Value::Bool(x) => json!(x),
        Value::Str(b) => text(b),
        Value::U64(x) => json!(x),
        Value::I64(x) => json!(x),
        Value::F64(x) => float(*x, x.to_string()),
        Value::Array(a) => match a {
            Array::U8(v) => json!(v),
            Array::I8(v) => json!(v),
            Array::U16(v) => json!(v),
            Array::I16(v) => json!(v),
            Array::U32(v) => json!(v),
            Array::I32(v) => json!(v),
            Array::F32(v) => v.iter().map(|x| float(f64::from(*x), x.to_string())).collect(),
            Array::Bool(v) => json!(v),
            Array::Str(v) => v.iter().map(|b| text(b)).collect(),
            Array::U64(v) => json!(v),
            Array::I64(v) => json!(v),
            Array::F64(v) => v.iter().map(|x| float(*x, x.to_string())).collect(),
        },
    }
}

/// A number with the digits of its own type; what JSON has no number for is a string.
fn float(value: f64, digits: String) -> Json {
    if value.is_finite() { serde_json::from_str(&digits).unwrap_or(json!(value)) } else { json!(digits) }
}

/// A value on one line.
fn short(v: &Value) -> String {
    const MAX: usize = 72;
    let text = match v {
        Value::Array(a) if a.len() > 8 => format!("{} elements", a.len()),
        v => value_json(v).to_string(),
    };
    if text.chars().count() > MAX { text.chars().take(MAX).chain("...".chars()).collect() } else { text }
}
