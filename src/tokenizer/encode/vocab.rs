//! The tokens of a file: texts, attributes, scores, and ids by text.
//!
//! In: `tokenizer.ggml.tokens`, `scores`, `token_type`. Out: a [`Vocab`]. Source: `llama_vocab::impl::load` of
//! `src/llama-vocab.cpp`; attributes are `llama_token_attr`.

use std::collections::HashMap;

use super::{EncodeError, keys};
use crate::gguf::Metadata;
use crate::tokenizer::vocab::TokenType;

/// `llama_token_attr`.
pub mod attr {
    pub const UNKNOWN: u16 = 1 << 0;
    pub const UNUSED: u16 = 1 << 1;
    pub const NORMAL: u16 = 1 << 2;
    pub const CONTROL: u16 = 1 << 3;
    pub const USER_DEFINED: u16 = 1 << 4;
    pub const BYTE: u16 = 1 << 5;
    /// White space before it belongs to it.
    pub const LSTRIP: u16 = 1 << 7;
    /// White space behind it belongs to it.
    pub const RSTRIP: u16 = 1 << 8;
}

pub const TOKENS: &str = "tokenizer.ggml.tokens";
pub const SCORES: &str = "tokenizer.ggml.scores";
pub const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";

/// No token.
pub const NONE: u32 = u32::MAX;

/// Tokens by id and by text.
#[derive(Debug)]
pub struct Vocab {
    pub texts: Vec<Box<[u8]>>,
    pub attrs: Vec<u16>,
    /// Empty where the file has none.
    scores: Vec<f32>,
    ids: HashMap<Box<[u8]>, u32>,
    longest: usize,
}

impl Vocab {
    /// Reads the tokens.
    ///
    /// # Errors
    /// No tokens, arrays that are shorter than the list of tokens, two tokens with the same text, a score that is NaN, a byte
    /// token whose text is too short to name a byte.
    pub fn read(metadata: &Metadata) -> Result<Vocab, EncodeError> {
        let tokens = keys::strings(metadata, TOKENS)?.ok_or(EncodeError::Missing { key: TOKENS })?;
        let count = tokens.len();
        if !(1..NONE as usize).contains(&count) {
            return Err(EncodeError::Count { found: count });
        }
        let scores = keys::scores(metadata, SCORES)?;
        if let Some(scores) = scores.as_ref().filter(|s| s.len() < count) {
            return Err(EncodeError::Length { key: SCORES, found: scores.len(), tokens: count });
        }
        let types = keys::integers(metadata, TOKEN_TYPE)?;
        if let Some(types) = types.filter(|t| t.len() < count) {
            return Err(EncodeError::Length { key: TOKEN_TYPE, found: types.len(), tokens: count });
        }
        let mut vocab = Vocab {
            texts: Vec::with_capacity(count),
            attrs: Vec::with_capacity(count),
            scores: scores.unwrap_or_default(),
            ids: HashMap::with_capacity(count),
            longest: 0,
        };
        for (i, text) in tokens.enumerate() {
            let attr = types.map_or(attr::NORMAL, |t| attr_of(t[i]));
            vocab.push(text, attr)?;
        }
        Ok(vocab)
    }

    fn push(&mut self, text: &[u8], attr: u16) -> Result<(), EncodeError> {
        let id = self.texts.len() as u32;
        let text: Box<[u8]> = if text.is_empty() { format!("[EMPTY_{id}]").into_bytes().into() } else { text.into() };
        let shown = || String::from_utf8_lossy(&text).into_owned();
        if let Some(first) = self.ids.insert(text.clone(), id) {
            return Err(EncodeError::Duplicate { first, second: id, text: shown() });
        }
        if self.score(id).is_nan() {
            return Err(EncodeError::Token { id, text: shown(), reason: "has a score that is not a number" });
        }
        if attr & attr::BYTE != 0 && text.len() < 3 {
            let reason = "is a byte token, whose text is expected to be `<0x00>` to `<0xFF>`";
            return Err(EncodeError::Token { id, text: shown(), reason });
        }
        self.longest = self.longest.max(text.len());
        self.texts.push(text);
        self.attrs.push(attr);
        Ok(())
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// The token whose text is `text`.
    pub fn id(&self, text: &[u8]) -> Option<u32> {
        if text.len() > self.longest { None } else { self.ids.get(text).copied() }
    }

    /// 0 where there are no scores.
    pub fn score(&self, id: u32) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    /// The token `<0x0A>` for byte 10.
    pub fn byte(&self, byte: u8) -> Option<u32> {
        self.id(format!("<0x{byte:02X}>").as_bytes())
    }

    /// The attributes of the token `text`, if there is one.
    pub fn attr_mut(&mut self, text: &str) -> Option<&mut u16> {
        let id = self.id(text.as_bytes())?;
        self.attrs.get_mut(id as usize)
    }
}

fn attr_of(token_type: i32) -> u16 {
    const UNKNOWN: i32 = TokenType::Unknown as i32;
    const CONTROL: i32 = TokenType::Control as i32;
    const USER_DEFINED: i32 = TokenType::UserDefined as i32;
    const UNUSED: i32 = TokenType::Unused as i32;
    const BYTE: i32 = TokenType::Byte as i32;
    const NORMAL: i32 = TokenType::Normal as i32;
    match token_type {
        NORMAL => attr::NORMAL,
        UNKNOWN => attr::UNKNOWN,
        CONTROL => attr::CONTROL,
        USER_DEFINED => attr::USER_DEFINED,
        UNUSED => attr::UNUSED,
        BYTE => attr::BYTE,
        _ => 0,
    }
}
