//! Byte-level BPE: tokenizer.json as `tokenizer.ggml.model` "gpt2" (Llama 3, SmolLM, Qwen).
//!
//! Source: `get_vocab_base` and `_set_vocab_gpt2` in `conversion/base.py` of llama.cpp b11434; merges as `SpecialVocab` reads
//! them in `gguf-py/gguf/vocab.py`.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::files::{Added, Files};
use super::library::Library;
use super::pre::structure::Structure;
use super::pre::{self, Chosen};
use super::vocab::{TokenType, Vocab, looks_special, visible_spaces};
use super::{Report, Request};
use crate::checkpoint::{CheckpointError, json as js};

/// The byte-level vocabulary of a folder.
pub fn read(request: &Request<'_>, files: &Files, report: &mut Report) -> Result<Vocab, CheckpointError> {
    let slow;
    let (files, source) = if files.tokenizer.is_some() {
        (files, "tokenizer.json")
    } else {
        slow = from_vocab_and_merges(files)?;
        (&slow, "vocab.json and merges.txt")
    };
    let file = files.path("tokenizer.json");
    let Some(tokenizer) = &files.tokenizer else {
        return Err(CheckpointError::file(&file, "missing"));
    };
    let kind = tokenizer.get("model").and_then(|m| m.get("type")).and_then(Json::as_str);
    if kind.is_some_and(|k| k != "BPE") {
        let kind = kind.unwrap_or_default();
        return Err(CheckpointError::key(
            &file,
            "model.type",
            format!("`{kind}`; this architecture needs BPE, or a SentencePiece tokenizer.model"),
        ));
    }
    let library = match Library::load(files.tokenizer_text.as_deref().unwrap_or_default(), tokenizer) {
        Ok(library) => Some(library),
        Err(e) => {
            report.warn(format!("{}: cannot be used as a tokenizer ({e}); only its structure is read", file.display()));
            None
        }
    };
    let Chosen { name, reason, warning } = {
        let hash = library.as_ref().and_then(|l| match l.hash() {
            Ok(hash) => Some(hash),
            Err(e) => {
                report.warn(format!("{}: the check text cannot be encoded: {e}", file.display()));
                None
            }
        });
        pre::choose(&file, &Structure::read(tokenizer), hash.as_deref(), request.class, request.pre)?
    };
    report.warnings.extend(warning);

    let added = files.added(&mut report.warnings)?;
    let base = files.bpe_vocab()?;
    check_sizes(request, files, &base, &added)?;
    let (mut tokens, mut types) = Vocab::padding(request.vocab_size);
    for (text, id) in &base {
        let i = *id as usize;
        if types[i] != TokenType::Unused {
            let other = String::from_utf8_lossy(&tokens[i]).into_owned();
            return Err(CheckpointError::key(
                &file,
                "model.vocab",
                format!("`{other}` and `{text}` have the same id {id}"),
            ));
        }
        (tokens[i], types[i]) = (text.as_bytes().to_vec(), TokenType::Normal);
    }
    for token in &added {
        let i = token.id as usize;
        if types[i] != TokenType::Unused && tokens[i] != token.content.as_bytes() {
            let other = String::from_utf8_lossy(&tokens[i]).into_owned();
            report.warn(format!(
                "{}: id {i} is `{other}` in the vocabulary and `{}` among the added tokens, which count",
                file.display(),
                token.content
            ));
        }
        let text = as_matched(token, library.as_ref());
        (tokens[i], types[i]) = if token.special || looks_special(&text) {
            (text.into_bytes(), TokenType::Control)
        } else {
            (visible_spaces(&text).into_bytes(), TokenType::UserDefined)
        };
    }
    let mut merges = merges(files)?;
    if merges.is_empty() && files.has("merges.txt") {
        merges = merges_txt(&files.path("merges.txt"))?;
    }
    check_merges(&file, &base, &merges, report);
    Ok(Vocab {
        model: "gpt2",
        pre: name.clone(),
        pre_reason: Some((name, reason)),
        source,
        tokens,
        scores: None,
        types,
        merges: Some(merges),
    })
}

/// An added token that is matched before normalization is written as it reads after encoding and decoding.
fn as_matched(token: &Added, library: Option<&Library>) -> String {
    let round_trip = || library?.round_trip(&token.content).ok();
    if token.normalized { token.content.clone() } else { round_trip().unwrap_or_else(|| token.content.clone()) }
}

/// Every id must be below `vocab_size`; the message names all three sizes.
fn check_sizes(
    request: &Request<'_>,
    files: &Files,
    base: &[(&str, u64)],
    added: &[Added],
) -> Result<(), CheckpointError> {
    let ids = base.iter().map(|(t, id)| (*id, *t)).chain(added.iter().map(|a| (a.id, a.content.as_str())));
    let Some((id, text)) = ids.max() else {
        return Err(CheckpointError::key(files.path("tokenizer.json"), "model.vocab", "no tokens"));
    };
    if id < request.vocab_size {
        return Ok(());
    }
    let rows = request.embedding_rows.map_or(String::new(), |r| format!(", the token embedding has {r} rows"));
    Err(CheckpointError::key(
        &request.config.file,
        "vocab_size",
        format!(
            "{}, but the tokenizer has ids up to {id} (`{text}`){rows}: the files do not belong together",
            request.vocab_size
        ),
    ))
}

/// The merges as `left right`. A space inside a part is written as byte-level BPE writes it.
pub fn merges(files: &Files) -> Result<Vec<String>, CheckpointError> {
    let file = files.path("tokenizer.json");
    let list = match files.tokenizer.as_ref().and_then(|t| t.get("model")).and_then(|m| m.get("merges")) {
        None | Some(Json::Null) => return Ok(Vec::new()),
        Some(Json::Array(list)) => list,
        Some(_) => return Err(CheckpointError::key(file, "model.merges", "not a list")),
    };
    let part = |p: &Json| p.as_str().map(|s| s.replace(' ', "\u{120}"));
    let entry = |(i, merge): (usize, &Json)| {
        let text = match merge {
            Json::String(s) => Some(s.clone()).filter(|s| s.split(' ').count() == 2),
            Json::Array(pair) if pair.len() == 2 => part(&pair[0]).zip(part(&pair[1])).map(|(a, b)| format!("{a} {b}")),
            _ => None,
        };
        text.ok_or_else(|| {
            CheckpointError::key(&file, "model.merges", format!("entry {i} is not a pair of texts: {merge:.100}"))
        })
    };
    list.iter().enumerate().map(entry).collect()
}

fn check_merges(file: &Path, base: &[(&str, u64)], merges: &[String], report: &mut Report) {
    if merges.is_empty() {
        report.warn(format!(
            "{}: no merges; llama.cpp does not load a byte-level BPE vocabulary without",
            file.display()
        ));
    }
    let known: HashSet<&str> = base.iter().map(|(t, _)| *t).collect();
    let unknown = |merge: &&String| match merge.split_once(' ') {
        Some((a, b)) => !(known.contains(a) && known.contains(b) && known.contains(format!("{a}{b}").as_str())),
        None => true,
    };
    let mut bad = merges.iter().filter(unknown);
    if let Some(first) = bad.next() {
        let n = 1 + bad.count();
        report.warn(format!(
            "{}: {n} of {} merges name tokens that the vocabulary lacks, such as `{first}`",
            file.display(),
            merges.len()
        ));
    }
}

/// merges.txt: a first line that starts with `#` and lines that are no pair are passed over.
fn merges_txt(file: &Path) -> Result<Vec<String>, CheckpointError> {
    let text = js::read_text(file)?;
    let lines = text.lines().enumerate().filter(|(i, line)| !(*i == 0 && line.starts_with('#'))).map(|(_, line)| line);
    let pairs = lines.map(|line| line.split_whitespace().collect::<Vec<_>>()).filter(|parts| parts.len() == 2);
    Ok(pairs.map(|parts| parts.join(" ")).collect())
}

/// A tokenizer.json for a folder that has only the files of the slow tokenizer. Which words GPT-2's and Qwen2's classes split
/// a text into is known; for other classes `--pre` must say it.
fn from_vocab_and_merges(files: &Files) -> Result<Files, CheckpointError> {
    let (vocab, merges) = (files.path("vocab.json"), files.path("merges.txt"));
    if !js::exists(&vocab)? || !js::exists(&merges)? {
        return Err(CheckpointError::file(
            &files.folder,
            "no tokenizer: neither tokenizer.json, nor tokenizer.model, nor vocab.json with merges.txt",
        ));
    }
    let pairs = merges_txt(&merges)?;
    let class = files.config.as_ref().and_then(|c| c.get("tokenizer_class")).and_then(Json::as_str).unwrap_or_default();
    let pre_tokenizer = if class.starts_with("Qwen2") {
        let split = json!({"type": "Split", "pattern": {"Regex": pre::structure::QWEN2}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
    } else if class.starts_with("GPT2") || class.is_empty() {
        byte_level(true)
    } else {
        Json::Null
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": if class.starts_with("Qwen2") { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level(true),
        "model": {"type": "BPE", "vocab": Json::Object(js::read_object(&vocab)?), "merges": pairs},
    });
    let text = tokenizer.to_string();
    let Json::Object(tokenizer) = tokenizer else { return Err(CheckpointError::file(vocab, "not an object")) };
    Ok(Files {
        folder: files.folder.clone(),
        tokenizer: Some(tokenizer),
        tokenizer_text: Some(text),
        config: files.config.clone(),
        added_tokens: files.added_tokens.clone(),
        special_map: files.special_map.clone(),
    })
}

fn byte_level(use_regex: bool) -> Json {
    let fields = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    Json::Object(fields.as_object().cloned().unwrap_or_else(Map::new))
}
