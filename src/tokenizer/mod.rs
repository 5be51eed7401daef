//! Vocabularies as GGUF metadata: the tokenizer files of a checkpoint become the `tokenizer.*` keys.
//!
//! Which reader is tried in which order is the architecture's business ([`VocabOrder`]); what each one writes follows
//! `TextModel._set_vocab_*` in `conversion/base.py` and `gguf-py/gguf/vocab.py` of llama.cpp b11434, with these deviations, all
//! where the reference writes a file that does not work: scores of a SentencePiece vocabulary that has only tokenizer.json
//! ([`llama_hf`]), its padding to `vocab_size`, and the first entry of an `eos_token_id` list where nothing else names one.

pub mod encode;
pub mod files;
pub mod gpt2;
pub mod library;
pub mod llama_hf;
pub mod pre;
pub mod sentencepiece;
pub mod special;
pub mod template;
pub mod vocab;

use std::path::Path;

use crate::arch::VocabOrder;
use crate::checkpoint::{CheckpointError, Config};
use crate::gguf::{Metadata, Value, value};

use self::files::Files;
use self::special::{Override, SpecialTokens};
use self::vocab::Vocab;

/// What is wanted of the tokenizer.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub folder: &'a Path,
    pub config: &'a Config,
    pub order: VocabOrder,
    /// `architectures[0]`.
    pub class: &'a str,
    /// `vocab_size`, checked.
    pub vocab_size: u64,
    /// Rows of the token embedding, where they are known.
    pub embedding_rows: Option<u64>,
    /// `--pre`.
    pub pre: Option<&'a str>,
    /// `--chat-template`: a file.
    pub chat_template: Option<&'a Path>,
}

/// What the user should hear of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub warnings: Vec<String>,
    /// Label and text: tokenizer, pre-tokenizer, bos, eos, eot, chat template.
    pub summary: Vec<(String, String)>,
}

impl Report {
    pub(crate) fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    pub(crate) fn say(&mut self, label: &str, text: impl Into<String>) {
        self.summary.push((label.into(), text.into()));
    }
}

/// Writes the `tokenizer.*` keys.
pub fn write(metadata: &mut Metadata, request: &Request<'_>) -> Result<Report, CheckpointError> {
    let mut report = Report::default();
    let files = Files::load(request.folder)?;
    check_embedding(request, &files)?;
    let llama = request.order == VocabOrder::Llama;
    if llama && let Some(prefix) = files.config_bool("add_prefix_space") {
        value::set(metadata, "tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
    }
    let vocab = read(request, &files, &mut report)?;
    vocab.write(metadata);
    report.say("tokenizer", format!("{}, {} tokens, from {}", vocab.model, vocab.tokens.len(), vocab.source));
    if let Some((name, reason)) = &vocab.pre_reason {
        report.say("pre-tokenizer", format!("{name} (by {reason})"));
    }
    let template = match request.chat_template {
        Some(file) => Override::Template(file),
        None => Override::None,
    };
    let special = SpecialTokens::load(&files, request.config, special::TYPES, vocab.bound(), template, &mut report)?;
    if let Some(merges) = &vocab.merges {
        value::set(metadata, "tokenizer.ggml.merges", Value::strs(merges));
    }
    special.write(metadata, &vocab, &mut report);
    if llama && request.vocab_size == 32016 {
        code_llama(metadata, &files, request, &vocab, &mut report)?;
    }
    if llama && request.vocab_size == 49152 {
        // SmolLM and Granite's small models.
        value::set(metadata, "tokenizer.ggml.add_bos_token", Value::Bool(false));
    }
    Ok(report)
}

fn read(request: &Request<'_>, files: &Files, report: &mut Report) -> Result<Vocab, CheckpointError> {
    if request.order == VocabOrder::Llama
        && files.has("tekken.json")
        && files.tokenizer.is_none()
        && !files.has("tokenizer.model")
    {
        return Err(CheckpointError::file(
            request.folder.join("tekken.json"),
            "Mistral's own tokenizer format is not supported; tokenizer.json of the Hugging Face form of the model is needed",
        ));
    }
    if let Some(vocab) = sentencepiece::read(request, files, report)? {
        return Ok(vocab);
    }
    if request.order == VocabOrder::Llama
        && let Some(vocab) = llama_hf::read(request, files, report)?
    {
        return Ok(vocab);
    }
    gpt2::read(request, files, report)
}

/// CodeLlama's infill tokens, which its files do not name.
fn code_llama(
    metadata: &mut Metadata,
    files: &Files,
    request: &Request<'_>,
    vocab: &Vocab,
    report: &mut Report,
) -> Result<(), CheckpointError> {
    let types = &["prefix", "suffix", "middle", "eot"];
    let mut quiet = Report::default();
    let mut special = SpecialTokens::load(files, request.config, types, None, Override::NoTemplate, &mut quiet)?;
    for (name, id) in [("prefix", 32007), ("suffix", 32008), ("middle", 32009), ("eot", 32010)] {
        special.set_if_open(name, id);
    }
    special.write(metadata, vocab, &mut quiet);
    report.warnings.append(&mut quiet.warnings);
    Ok(())
}

/// Refuses an embedding whose rows are not those of the vocabulary, and names all the sizes at once.
fn check_embedding(request: &Request<'_>, files: &Files) -> Result<(), CheckpointError> {
    match request.embedding_rows {
        Some(rows) if rows != request.vocab_size => {
            let tokens = files.token_count().map_or("unknown".to_string(), |n| n.to_string());
            Err(CheckpointError::key(
                &request.config.file,
                "vocab_size",
                format!(
                    "{}, but the token embedding has {rows} rows (tokens in tokenizer.json: {tokens}); llama.cpp loads only \
                     equal sizes. Set vocab_size to {rows} if the tokenizer has no more tokens than that",
                    request.vocab_size
                ),
            ))
        }
        _ => Ok(()),
    }
}
