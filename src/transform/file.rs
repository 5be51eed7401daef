//! Transforms files: safetensors with the tensors of [`Transforms::tensors`] in f32 or f64, row-major (`docs/transforms.md`).
//! Files of SpinQuant and OSTQuant are read through [`super::import`].

use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};
use serde_json::{Map, Value as Json, json};

use super::anatomy::{Anatomy, Pair};
use super::set::Transforms;
use super::{TransformError, import};
use crate::checkpoint::safetensors::{self, Entry};
use crate::checkpoint::{CheckpointError, Dtype};
use crate::mapped::MappedFile;
use crate::output::{self, OutputError};

/// `format` of the file's metadata.
const FORMAT: &str = "ostq.transforms";
const VERSION: &str = "1";

/// A tensor as a file has it.
pub(super) struct Stored {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

/// Reads the transforms of `model`, whose original has `fingerprint`; everything is checked.
pub fn read(path: &Path, model: &Anatomy, fingerprint: &str) -> Result<Transforms, TransformError> {
    let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
    let entries = safetensors::read(&file)?;
    let metadata = safetensors::metadata(path, file.bytes())?;
    let get = |key: &str| metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    let refuse = |why: String| TransformError::File { file: path.to_path_buf(), why };
    let stored = entries.iter().map(|e| stored(path, e, file.bytes())).collect::<Result<Vec<_>, _>>()?;
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let transforms = match get("format") {
        Some(FORMAT) => {
            match get("version") {
                Some(VERSION) => {}
                other => {
                    let found = other.unwrap_or("missing");
                    return Err(refuse(format!("its format version is {found}, this program reads {VERSION}")));
                }
            }
            match get("fingerprint") {
                Some(theirs) if theirs == fingerprint => {}
                theirs => {
                    let theirs = theirs.unwrap_or("missing");
                    return Err(refuse(format!(
                        "was made for another model: fingerprint {theirs}, this model has {fingerprint}"
                    )));
                }
            }
            own(&stored, model, get("name").unwrap_or(&name)).map_err(|e| e.of(path))?
        }
        _ => import::read(stored, model, &name).map_err(|e| e.of(path))?,
    };
    transforms.check(model).map_err(|e| e.of(path))?;
    Ok(transforms)
}

fn stored(path: &Path, e: &Entry, bytes: &[u8]) -> Result<Stored, CheckpointError> {
    let bytes = &bytes[e.begin..e.end];
    let values = match e.dtype {
        Some(Dtype::F64) => {
            let mut v = vec![0f64; bytes.len() / 8];
            LittleEndian::read_f64_into(bytes, &mut v);
            v
        }
        Some(Dtype::F32) => {
            let mut v = vec![0f32; bytes.len() / 4];
            LittleEndian::read_f32_into(bytes, &mut v);
            v.into_iter().map(f64::from).collect()
        }
        _ => {
            let why = format!("is {}; transforms are F32 or F64", e.dtype_name);
            return Err(CheckpointError::tensor(path, &e.name, why));
        }
    };
    Ok(Stored { name: e.name.clone(), shape: e.shape.iter().map(|&d| d as usize).collect(), values })
}

/// Puts `stored` where its name says.
fn own(stored: &[Stored], model: &Anatomy, name: &str) -> Result<Transforms, TransformError> {
    let mut t = Transforms::identity(name, model.spec.layers);
    for s in stored {
        let unknown =
            || TransformError::Other(format!("tensor `{}`: no transform of this model has this name", s.name));
        let (layer, part) = match s.name.strip_prefix("blk.").and_then(|n| n.split_once('.')) {
            Some((layer, part)) => (Some(layer.parse::<usize>().map_err(|_| unknown())?), part),
            None => (None, s.name.as_str()),
        };
        let pair = Pair::ALL.into_iter().find(|p| p.name() == part).ok_or_else(unknown)?;
        if (pair == Pair::Stream) != layer.is_none() || layer.is_some_and(|l| l >= model.spec.layers) {
            return Err(unknown());
        }
        put(&mut t, model, pair, layer.unwrap_or(0), s.name.clone(), &s.shape, s.values.clone())?;
    }
    Ok(t)
}

/// Stores `values`, whose shape must be that of the pair.
pub(super) fn put(
    t: &mut Transforms,
    model: &Anatomy,
    pair: Pair,
    layer: usize,
    name: String,
    shape: &[usize],
    values: Vec<f64>,
) -> Result<(), TransformError> {
    if let Some(why) = model.refusal(pair) {
        return Err(TransformError::Void { name, arch: model.spec.arch.clone(), why: why.into() });
    }
    let expected = model.shape(pair, layer);
    if shape != expected {
        return Err(TransformError::Shape { name, found: shape.to_vec(), expected });
    }
    *t.slot(pair, layer) = Some(values);
    Ok(())
}

/// Writes `transforms` of the model with `fingerprint` in f64.
pub fn write(
    path: &Path,
    transforms: &Transforms,
    model: &Anatomy,
    fingerprint: &str,
    force: bool,
) -> Result<(), OutputError> {
    let mut header = Map::new();
    header.insert(
        "__metadata__".into(),
        json!({"format": FORMAT, "version": VERSION, "name": transforms.name, "architecture": model.spec.arch,
            "fingerprint": fingerprint}),
    );
    let mut data = Vec::new();
    for (name, pair, layer, values) in transforms.tensors() {
        let begin = data.len();
        values.iter().for_each(|v| data.extend(v.to_le_bytes()));
        let entry = json!({"dtype": "F64", "shape": model.shape(pair, layer), "data_offsets": [begin, data.len()]});
        header.insert(name, entry);
    }
    let mut text = Json::Object(header).to_string();
    while !(text.len() + 8).is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.extend(data);
    output::write_new(path, &bytes, force)
}
