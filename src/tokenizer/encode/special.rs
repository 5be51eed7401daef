//! Which tokens are special, beyond what the file says.
//!
//! In: the vocabulary and the keys of special tokens. Out: its attributes, corrected as llama.cpp corrects them: tokens
//! whose text looks like a control token become one, a few become user-defined, and for some models white space beside
//! them is dropped. Source: `llama_vocab::impl::load` of `src/llama-vocab.cpp`.
//!
//! Where a file has several texts of one infill role and no key for it, llama.cpp marks one of them, whichever its hash
//! table yields first; here it is the first of the list.

use super::vocab::{Vocab, attr};
use super::{EncodeError, keys};
use crate::gguf::Metadata;

/// Texts that end a generation: always control tokens.
const END: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
];

/// Roles of infill tokens: the keys that name one, and the texts that mean it where no key does.
const INFILL: &[(&[&str], &[&str])] = &[
    (
        &["fim_pre", "prefix"],
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
            "<PRE>",
            "\u{2581}<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        &["fim_suf", "suffix"],
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
            "<SUF>",
            "\u{2581}<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        &["fim_mid", "middle"],
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
            "<MID>",
            "\u{2581}<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (&["fim_pad"], &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (&["fim_rep"], &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    (&["fim_sep"], &["<|file_sep|>"]),
];

/// Roles whose tokens end a generation.
const ENDING: &[&str] = &["eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"];

/// Corrects the attributes.
///
/// # Errors
/// A key of a special token that is no u32.
pub fn correct(vocab: &mut Vocab, metadata: &Metadata) -> Result<(), EncodeError> {
    let named = |role: &str| -> Result<Option<u32>, EncodeError> {
        let id = keys::id(metadata, &format!("tokenizer.ggml.{role}_token_id"))?;
        // llama.cpp goes on without an id that is out of range
        Ok(id.filter(|&id| (id as usize) < vocab.len()))
    };
    let mut ending = Vec::new();
    for role in ENDING {
        ending.extend(named(role)?);
    }
    let mut found = Vec::new();
    for (roles, texts) in INFILL {
        let mut key = None;
        for role in *roles {
            key = key.or(named(role)?);
        }
        if key.is_none() {
            found.extend(texts.iter().find(|t| vocab.id(t.as_bytes()).is_some()));
        }
    }
    for text in found.iter().chain(END) {
        if let Some(attr) = vocab.attr_mut(text) {
            *attr |= attr::CONTROL;
        }
    }
    // gpt-oss: always shown
    for text in ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"] {
        if let Some(attr) = vocab.attr_mut(text) {
            *attr = attr::USER_DEFINED;
        }
    }
    let has = |text: &str| vocab.id(text.as_bytes()).is_some();
    let call = has("<|call|>") || has("<|calls|>");
    let end_is_no_end = call && (has("<|return|>") || has("<|flush|>"));
    let plamo = vocab.id(b"<|plamo:eos|>").is_some_and(|id| ending.contains(&id));
    let s_is_normal = has("<|tool_response>") || plamo;
    if end_is_no_end && let Some(attr) = vocab.attr_mut("<|end|>") {
        *attr = attr::USER_DEFINED;
    }
    if s_is_normal && let Some(attr) = vocab.attr_mut("</s>") {
        *attr = attr::NORMAL;
    }
    Ok(())
}

/// Special tokens: control, unknown and user-defined, the longest text first.
pub fn list(vocab: &Vocab) -> Vec<u32> {
    let special = attr::CONTROL | attr::USER_DEFINED | attr::UNKNOWN;
    let mut ids: Vec<u32> = (0..vocab.len() as u32).filter(|&id| vocab.attrs[id as usize] & special != 0).collect();
    ids.sort_by_key(|&id| std::cmp::Reverse(vocab.texts[id as usize].len()));
    ids
}

/// White space that special tokens take with them, by the name of the model. `special`: [`list`].
///
/// # Errors
/// A name that is no string.
pub fn strip(vocab: &mut Vocab, special: &[u32], metadata: &Metadata) -> Result<(), EncodeError> {
    let text = |key: &str| keys::string(metadata, key).map(Option::unwrap_or_default);
    let pre = text("tokenizer.ggml.pre")?;
    let arch = text("general.architecture")?;
    let name = text("general.name")?.to_ascii_lowercase();
    let any = |text: &str, parts: &[&str]| parts.iter().any(|p| text.contains(p));
    if any(&pre, &["jina-v2-de", "jina-v2-es", "jina-v2-code", "mmbert"])
        || any(&arch, &["nomic-bert-moe", "jina-bert-v3"])
    {
        if let Some(attr) = vocab.attr_mut("<mask>") {
            *attr |= attr::LSTRIP;
        }
    } else if any(&name, &["phi-3", "phi3"]) {
        for &id in special {
            vocab.attrs[id as usize] |= attr::RSTRIP;
        }
        for text in ["<unk>", "<s>", "<|endoftext|>"] {
            if let Some(attr) = vocab.attr_mut(text) {
                *attr &= !attr::RSTRIP;
            }
        }
    } else if name.contains("modern-bert")
        && let Some(attr) = vocab.attr_mut("[MASK]")
    {
        *attr |= attr::LSTRIP;
    }
    Ok(())
}
