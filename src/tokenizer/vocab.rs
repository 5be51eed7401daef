//! The token list as GGUF stores it: texts, scores, types.

use crate::gguf::{Array, Metadata, Value, value};

/// `tokenizer.ggml.token_type` (`llama_token_type` of llama.cpp).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// A vocabulary that is ready to be written.
#[derive(Debug)]
pub struct Vocab {
    /// `tokenizer.ggml.model`: `llama` (SentencePiece) or `gpt2` (byte-level BPE).
    pub model: &'static str,
    /// `tokenizer.ggml.pre`.
    pub pre: String,
    /// The pre-tokenizer's name and why it was chosen, to show.
    pub pre_reason: Option<(String, String)>,
    /// The file it was read from.
    pub source: &'static str,
    pub tokens: Vec<Vec<u8>>,
    /// SentencePiece only.
    pub scores: Option<Vec<f32>>,
    pub types: Vec<TokenType>,
    /// Byte-level BPE only.
    pub merges: Option<Vec<String>>,
}

impl Vocab {
    /// `size` unused tokens `[PAD0]` ..., for ids that the tokenizer leaves open.
    pub fn padding(size: u64) -> (Vec<Vec<u8>>, Vec<TokenType>) {
        let tokens: Vec<Vec<u8>> = (0..size).map(|i| format!("[PAD{i}]").into_bytes()).collect();
        let types = vec![TokenType::Unused; tokens.len()];
        (tokens, types)
    }

    /// The bound of special token ids: SentencePiece vocabularies have one, the reference lets those of BPE pass.
    pub fn bound(&self) -> Option<u64> {
        self.scores.as_ref().map(|_| self.tokens.len() as u64)
    }

    /// The text of a token, for messages.
    pub fn show(&self, id: u64) -> String {
        match usize::try_from(id).ok().and_then(|i| self.tokens.get(i)) {
            Some(text) => String::from_utf8_lossy(text).into_owned(),
            None => "outside of the vocabulary".into(),
        }
    }

    /// Writes model, pre, tokens, scores and types.
    pub fn write(&self, metadata: &mut Metadata) {
        value::set(metadata, "tokenizer.ggml.model", self.model.into());
        value::set(metadata, "tokenizer.ggml.pre", self.pre.as_str().into());
        value::set(metadata, "tokenizer.ggml.tokens", Value::Array(Array::Str(self.tokens.clone())));
        if let Some(scores) = &self.scores {
            value::set(metadata, "tokenizer.ggml.scores", Value::Array(Array::F32(scores.clone())));
        }
        let types = self.types.iter().map(|t| *t as i32).collect();
        value::set(metadata, "tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    }
}

/// Tokens that were not marked as special but ought to have been (`does_token_look_special` of the reference).
pub fn looks_special(text: &str) -> bool {
    let between = |a: &str, b: &str| text.starts_with(a) && text.ends_with(b);
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
        || between("<unused", ">")
}

/// A user-defined token is written as the text it matches: SentencePiece's visible space becomes a space.
pub fn visible_spaces(text: &str) -> String {
    text.replace('\u{2581}', " ")
}
