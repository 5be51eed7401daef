//! Typed reading of `tokenizer.ggml.*`.
//!
//! In: metadata. Out: values of the one type that llama.cpp accepts for the key; anything else is an error, as it is there
//! (`GGUFMeta::GKV::get_kv` of `src/llama-model-loader.cpp`, `llama_vocab::impl::load`).

use super::EncodeError;
use crate::gguf::{Array, Metadata, Value, value};

/// `string`, `u32`, `array of i32`.
fn type_name(value: &Value) -> String {
    const NAMES: [&str; 13] =
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];
    match value {
        Value::Array(array) => format!("array of {}", NAMES[array.type_id() as usize]),
        other => NAMES[other.type_id() as usize].to_string(),
    }
}

fn wrong(key: &str, found: &Value, expected: &'static str) -> EncodeError {
    EncodeError::Type { key: key.to_string(), found: type_name(found), expected }
}

/// A string; bytes that are not UTF-8 are shown as such.
pub fn string(metadata: &Metadata, key: &str) -> Result<Option<String>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::Str(bytes)) => Ok(Some(String::from_utf8_lossy(bytes).into_owned())),
        Some(other) => Err(wrong(key, other, "string")),
    }
}

/// A boolean.
pub fn flag(metadata: &Metadata, key: &str) -> Result<Option<bool>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(*b)),
        Some(other) => Err(wrong(key, other, "bool")),
    }
}

/// A token id.
pub fn id(metadata: &Metadata, key: &str) -> Result<Option<u32>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::U32(id)) => Ok(Some(*id)),
        Some(other) => Err(wrong(key, other, "u32")),
    }
}

/// An array of strings, each cut at its first zero byte: llama.cpp reads them as C strings.
pub fn strings<'a>(
    metadata: &'a Metadata,
    key: &str,
) -> Result<Option<impl ExactSizeIterator<Item = &'a [u8]>>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::Array(Array::Str(items))) => {
            Ok(Some(items.iter().map(|s| s.split(|&b| b == 0).next().unwrap_or_default())))
        }
        Some(other) => Err(wrong(key, other, "array of string")),
    }
}

/// An array of i32.
pub fn integers<'a>(metadata: &'a Metadata, key: &str) -> Result<Option<&'a [i32]>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::Array(Array::I32(items))) => Ok(Some(items)),
        Some(other) => Err(wrong(key, other, "array of i32")),
    }
}

/// Scores: f32, or i32 as some converters have written.
pub fn scores(metadata: &Metadata, key: &str) -> Result<Option<Vec<f32>>, EncodeError> {
    match value::get(metadata, key) {
        None => Ok(None),
        Some(Value::Array(Array::F32(items))) => Ok(Some(items.clone())),
        Some(Value::Array(Array::I32(items))) => Ok(Some(items.iter().map(|&s| s as f32).collect())),
        Some(other) => Err(wrong(key, other, "array of f32")),
    }
}
