//! Text as windows of token ids.
//!
//! As llama-imatrix and llama-perplexity cut it: all tokens in a row, windows of equal length from the start, what is left
//! over dropped; where the vocabulary asks for a BOS token, it takes the place of the first token of every window.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::imatrix::hex;
use super::{CalibrationError, text};
use crate::checkpoint::CheckpointError;
use crate::tokenizer::encode::TextEncoder;

/// A named text.
#[derive(Clone, Debug)]
pub struct Text {
    /// The file's name, without its folder.
    pub name: String,
    pub content: String,
}

/// Reads `paths`, or the built-in corpus for none.
pub fn load(paths: &[PathBuf]) -> Result<Vec<Text>, CalibrationError> {
    if paths.is_empty() {
        return Ok(vec![Text { name: text::NAME.into(), content: text::TEXT.into() }]);
    }
    paths.iter().map(|p| read(p)).collect()
}

/// Reads one file; bytes that are no UTF-8 are refused with their place.
pub fn read(path: &Path) -> Result<Text, CalibrationError> {
    let bytes = std::fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
    let content = String::from_utf8(bytes).map_err(|e| {
        CalibrationError::file(path, format!("not UTF-8 text: byte {} does not fit", e.utf8_error().valid_up_to()))
    })?;
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Ok(Text { name, content })
}

/// The ids of all texts in a row, special tokens added as the vocabulary asks for.
pub fn ids(encoder: &TextEncoder, texts: &[Text]) -> Vec<u32> {
    texts.iter().flat_map(|t| encoder.encode(&t.content, true, false)).collect()
}

/// The first `limit` whole windows of `length` tokens, each with its BOS.
pub fn windows(encoder: &TextEncoder, ids: &[u32], length: usize, limit: Option<usize>) -> Result<Vec<u32>, String> {
    let count = (ids.len() / length.max(1)).min(limit.unwrap_or(usize::MAX));
    if length == 0 || count == 0 {
        return Err(format!("the text has {} tokens; a window needs {length}", ids.len()));
    }
    let mut windows = ids[..count * length].to_vec();
    if let Some(bos) = encoder.bos().filter(|_| encoder.add_bos()) {
        windows.chunks_exact_mut(length).for_each(|w| w[0] = bos);
    }
    Ok(windows)
}

/// sha256 of token ids (u32, little-endian), in hexadecimal.
pub fn digest(ids: &[u32]) -> String {
    let mut hash = Sha256::new();
    for chunk in ids.chunks(1 << 14) {
        hash.update(chunk.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>());
    }
    hex(&hash.finalize())
}
