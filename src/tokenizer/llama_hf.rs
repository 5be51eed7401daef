//! A SentencePiece vocabulary that is left only as tokenizer.json (BPE with byte fallback).
//!
//! Source: `LlamaHfVocab` in `gguf-py/gguf/vocab.py` of llama.cpp b11434, but for the scores. The reference writes -1000 for
//! every token; llama.cpp's SentencePiece tokenizer always merges the pair of the highest score, so all orders of merging
//! become alike and ordinary words come out wrong. Here a token's score is its rank among the merges, counted down from 0 as
//! SentencePiece counts them in a BPE model: the scores are those of the lost tokenizer.model.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value as Json};

use super::files::Files;
use super::gpt2::merges;
use super::vocab::{TokenType, Vocab};
use super::{Report, Request};
use crate::checkpoint::CheckpointError;

const ADDED_SCORE: f32 = -1000.0;
const PADDING_SCORE: f32 = -10000.0;

/// The vocabulary, if tokenizer.json is of this kind.
pub fn read(request: &Request<'_>, files: &Files, report: &mut Report) -> Result<Option<Vocab>, CheckpointError> {
    if !files.tokenizer.as_ref().is_some_and(is_sentencepiece) {
        return Ok(None);
    }
    let file = files.path("tokenizer.json");
    let base = files.bpe_vocab()?;
    let added = files.added(&mut report.warnings)?;
    let largest = base.iter().map(|(_, id)| *id).chain(added.iter().map(|a| a.id)).max().unwrap_or(0);
    if largest >= request.vocab_size {
        let rows = request.embedding_rows.map_or(String::new(), |r| format!(", the token embedding has {r} rows"));
        return Err(CheckpointError::key(
            &request.config.file,
            "vocab_size",
            format!(
                "{}, but tokenizer.json has ids up to {largest}{rows}: the files do not belong together",
                request.vocab_size
            ),
        ));
    }
    let special = special_texts(files);
    // The reference ends after the last token; up to vocab_size it is padded here, as llama.cpp wants a token for every row.
    let (mut tokens, mut types) = Vocab::padding(request.vocab_size);
    let mut scores = vec![PADDING_SCORE; tokens.len()];
    let ranked = ranked_scores(&base, &merges(files)?);
    let in_base: HashSet<&str> = base.iter().map(|(t, _)| *t).collect();
    let marked: HashSet<&str> = added.iter().map(|a| a.content.as_str()).collect();
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
        types[i] = match () {
            () if is_byte(text) => TokenType::Byte,
            () if special.contains(*text) => TokenType::Control,
            () => TokenType::Normal,
        };
        // tokenizer.model with the same added tokens beside it gives these the score of added tokens.
        scores[i] = if marked.contains(text) { ADDED_SCORE } else { ranked.get(text).copied().unwrap_or(0.0) };
        tokens[i] = text.as_bytes().to_vec();
    }
    let unmade = |(text, _): &&(&str, u64)| {
        !ranked.contains_key(text) && !is_byte(text) && !marked.contains(text) && !special.contains(*text)
    };
    let mut unmade = base.iter().filter(unmade);
    if let Some((first, _)) = unmade.next() {
        let n = 1 + unmade.count();
        report.warn(format!(
            "{}: no merge makes `{first}` ({n} such tokens); llama.cpp may form it nevertheless",
            file.display()
        ));
    }
    for token in added.iter().filter(|a| !in_base.contains(a.content.as_str())) {
        let i = token.id as usize;
        if types[i] != TokenType::Unused {
            report.warn(format!(
                "{}: id {i} stands for two tokens; the added one, `{}`, counts",
                file.display(),
                token.content
            ));
        }
        let control = special.contains(&token.content);
        types[i] = if control { TokenType::Control } else { TokenType::UserDefined };
        scores[i] = ADDED_SCORE;
        tokens[i] = token.content.clone().into_bytes();
    }
    Ok(Some(Vocab {
        model: "llama",
        pre: "default".into(),
        pre_reason: None,
        source: "tokenizer.json (scores from the ranks of its merges)",
        tokens,
        scores: Some(scores),
        types,
        merges: None,
    }))
}

/// BPE with byte fallback and a decoder that is a sequence.
fn is_sentencepiece(tokenizer: &Map<String, Json>) -> bool {
    let model = tokenizer.get("model");
    let text = |v: Option<&Json>, key: &str| v.and_then(|v| v.get(key)).and_then(Json::as_str).map(str::to_string);
    text(model, "type").as_deref() == Some("BPE")
        && model.and_then(|m| m.get("byte_fallback")).and_then(Json::as_bool) == Some(true)
        && text(tokenizer.get("decoder"), "type").as_deref() == Some("Sequence")
}

/// `<0x00>` to `<0xFF>`.
fn is_byte(text: &str) -> bool {
    text.len() == 6
        && text
            .strip_prefix("<0x")
            .and_then(|t| t.strip_suffix('>'))
            .is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Scores as a SentencePiece BPE model has them: the tokens that merges make, in the order in which merges first make them,
/// get 0, -1, -2 ...; then the single characters in the order of their ids. Bytes and the rest get 0.
fn ranked_scores<'a>(base: &[(&'a str, u64)], merges: &[String]) -> HashMap<&'a str, f32> {
    let mut by_text: HashMap<&str, &'a str> = base.iter().map(|(t, _)| (*t, *t)).collect();
    let mut scores = HashMap::with_capacity(base.len());
    let mut next = 0u32;
    for merge in merges {
        let made = merge.replacen(' ', "", 1);
        if let Some(text) = by_text.remove(made.as_str()) {
            scores.insert(text, -(next as f32));
            next += 1;
        }
    }
    let mut characters: Vec<(u64, &str)> =
        base.iter().filter(|(t, _)| by_text.contains_key(t)).map(|(t, id)| (*id, *t)).collect();
    characters.retain(|(_, t)| t.chars().count() == 1);
    characters.sort_unstable();
    for (_, text) in characters {
        scores.insert(text, -(next as f32));
        next += 1;
    }
    scores
}

/// The texts of `all_special_tokens`: the named special tokens and the additional ones.
fn special_texts(files: &Files) -> HashSet<String> {
    let content = |v: &Json| v.as_str().or_else(|| v.get("content")?.as_str()).map(str::to_string);
    let mut out = HashSet::new();
    for source in [&files.config, &files.special_map].into_iter().flatten() {
        for typ in super::special::TYPES {
            out.extend(source.get(&format!("{typ}_token")).and_then(content));
        }
        for list in ["additional_special_tokens", "extra_special_tokens"] {
            match source.get(list) {
                Some(Json::Array(items)) => out.extend(items.iter().filter_map(content)),
                Some(Json::Object(items)) => out.extend(items.values().filter_map(content)),
                _ => {}
            }
        }
    }
    let class = files.config.as_ref().and_then(|c| c.get("tokenizer_class")).and_then(Json::as_str).unwrap_or_default();
    if class.starts_with("Llama") {
        // Defaults of that class.
        out.extend(["<unk>", "<s>", "</s>"].map(String::from));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_count_down_by_the_first_merge() {
        let base = [("<unk>", 0), ("<0x41>", 1), ("ab", 2), ("abc", 3), ("b", 4), ("a", 5), ("c", 6), ("x y", 7)];
        let merges = ["a b", "ab c", "a bc", "q r"].map(String::from);
        let scores = ranked_scores(&base, &merges);
        let shown: Vec<_> = base.iter().map(|(t, _)| scores.get(t).copied().unwrap_or(0.0)).collect();
        assert_eq!(shown, [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, 0.0]);
        assert!(is_byte("<0x0A>") && !is_byte("<0x0G>") && !is_byte("<0x\u{e9}>"));
    }
}
