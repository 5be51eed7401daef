//! Reading the JSON files of a checkpoint folder, with messages that say what is wrong and where.
//!
//! Everything is read as [`serde_json::Value`]: `gguf-rs` turns `serde_json/arbitrary_precision` on for the whole build, and
//! with it flattened, untagged and internally tagged structures that hold floats no longer deserialize.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::CheckpointError;

/// No side file of a checkpoint comes near this (the largest tokenizer.json files have 40 MB).
const MAX_BYTES: u64 = 1 << 30;

/// The text of a file: a regular one, UTF-8, of a sensible size. A byte order mark is dropped.
pub fn read_text(file: &Path) -> Result<String, CheckpointError> {
    let bytes = read_bytes(file)?;
    let text = String::from_utf8(bytes).map_err(|e| {
        CheckpointError::file(file, format!("not UTF-8 (first bad byte at {})", e.utf8_error().valid_up_to()))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    })
}

/// The bytes of a regular file of a sensible size.
pub fn read_bytes(file: &Path) -> Result<Vec<u8>, CheckpointError> {
    let meta = std::fs::metadata(file).map_err(|e| CheckpointError::io(file, e))?;
    if !meta.is_file() {
        return Err(CheckpointError::file(file, "not a regular file"));
    }
    if meta.len() > MAX_BYTES {
        return Err(CheckpointError::file(
            file,
            format!("{} bytes, more than 1 GiB: not the file meant here", meta.len()),
        ));
    }
    std::fs::read(file).map_err(|e| CheckpointError::io(file, e))
}

/// True if the file is there; a dangling link is an error (an interrupted download of a Hugging Face cache).
pub fn exists(file: &Path) -> Result<bool, CheckpointError> {
    match std::fs::metadata(file) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => match std::fs::symlink_metadata(file) {
            Ok(_) => Err(CheckpointError::file(file, "a link to a file that is missing: is the download complete?")),
            Err(_) => Ok(false),
        },
        Err(e) => Err(CheckpointError::io(file, e)),
    }
}

/// Parses the text of `file`. Python writes `NaN` and `Infinity`, which JSON does not know: they are named.
pub fn parse(file: &Path, text: &str) -> Result<Json, CheckpointError> {
    serde_json::from_str(text).map_err(|e| {
        if text.trim_start().starts_with("version https://git-lfs") {
            return CheckpointError::file(file, "a Git LFS pointer, not the file itself: run `git lfs pull`");
        }
        let literal = non_finite_literal(text).map(|(word, line)| {
            format!("{word} in line {line} is not JSON (Python writes it so): replace it by a number or by null")
        });
        CheckpointError::file(file, literal.unwrap_or_else(|| format!("not valid JSON: {e}")))
    })
}

/// Reads and parses `file`.
pub fn read(file: &Path) -> Result<Json, CheckpointError> {
    parse(file, &read_text(file)?)
}

/// Reads and parses `file`, if it is there.
pub fn read_if_present(file: &Path) -> Result<Option<Json>, CheckpointError> {
    if exists(file)? { read(file).map(Some) } else { Ok(None) }
}

/// Reads `file`, which must hold an object.
pub fn read_object(file: &Path) -> Result<Map<String, Json>, CheckpointError> {
    match read(file)? {
        Json::Object(values) => Ok(values),
        other => Err(CheckpointError::file(file, format!("{}, where an object was expected", kind(&other)))),
    }
}

/// Reads the object in `file`, if the file is there.
pub fn read_object_if_present(file: &Path) -> Result<Option<Map<String, Json>>, CheckpointError> {
    if exists(file)? { read_object(file).map(Some) } else { Ok(None) }
}

/// What a value is, in words for messages.
pub fn kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// A whole number. Python's JSON tells `5` from `5.0`; only the first counts.
pub fn as_integer(value: &Json) -> Option<i128> {
    let Json::Number(n) = value else { return None };
    n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from))
}

/// Whether Python would take the value for true (`if value:`).
pub fn truthy(value: Option<&Json>) -> bool {
    match value {
        None | Some(Json::Null) => false,
        Some(Json::Bool(b)) => *b,
        Some(Json::Number(n)) => n.as_f64() != Some(0.0),
        Some(Json::String(s)) => !s.is_empty(),
        Some(Json::Array(a)) => !a.is_empty(),
        Some(Json::Object(o)) => !o.is_empty(),
    }
}

/// The first `NaN`, `Infinity` or `-Infinity` outside of strings, with its line.
fn non_finite_literal(text: &str) -> Option<(&'static str, usize)> {
    let (mut line, mut in_string, mut escaped) = (1, false, false);
    for (at, c) in text.char_indices() {
        if c == '\n' {
            line += 1;
        }
        match (in_string, c) {
            (true, _) if escaped => escaped = false,
            (true, '\\') => escaped = true,
            (_, '"') => in_string = !in_string,
            (false, 'N' | 'I' | '-') => {
                for word in ["NaN", "Infinity", "-Infinity"] {
                    if text[at..].starts_with(word) {
                        return Some((word, line));
                    }
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_literals_are_named() {
        let file = Path::new("config.json");
        let message = |text: &str| parse(file, text).unwrap_err().to_string();
        assert!(message("{\"a\": \"NaN\",\n\"b\": NaN}").contains("NaN in line 2"));
        assert!(message("[-Infinity]").contains("-Infinity in line 1"));
        assert!(message("{\"a\": \"x\\\"NaN\"").contains("not valid JSON"));
        assert!(message("version https://git-lfs.github.com/spec/v1").contains("git lfs pull"));
        assert!(message(&"[".repeat(100_000)).contains("not valid JSON"));
    }

    #[test]
    fn whole_numbers_only() {
        let v = |t: &str| as_integer(&serde_json::from_str(t).unwrap());
        assert_eq!(v("5"), Some(5));
        assert_eq!(v("-5"), Some(-5));
        assert_eq!(v("18446744073709551615"), Some(u64::MAX.into()));
        for bad in ["5.0", "1e3", "\"5\"", "true", "null", "184467440737095516160"] {
            assert_eq!(v(bad), None, "{bad}");
        }
    }
}
