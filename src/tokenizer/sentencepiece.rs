//! `tokenizer.model`: SentencePiece's protobuf, read by hand with every length checked, and the vocabulary made of it.
//!
//! Format: `sentencepiece_model.proto` (ModelProto: 1 pieces {1 text, 2 score, 3 type}, 2 trainer_spec {3 model_type});
//! vocabulary: `_create_vocab_sentencepiece` in `conversion/base.py` of llama.cpp b11434.

use super::files::{Files, plain_id};
use super::vocab::{TokenType, Vocab, looks_special, visible_spaces};
use super::{Report, Request};
use crate::checkpoint::{CheckpointError, json};

const ADDED_SCORE: f32 = -1000.0;
const PADDING_SCORE: f32 = -10000.0;

/// A piece as stored. The protobuf defaults are a score of 0 and the type NORMAL.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece<'a> {
    pub text: &'a [u8],
    pub score: f32,
    pub kind: u64,
}

/// The parts of a model that are needed.
#[derive(Debug)]
pub struct Model<'a> {
    pub pieces: Vec<Piece<'a>>,
    /// 1 unigram, 2 BPE, 3 word, 4 char.
    pub model_type: u64,
}

impl<'a> Model<'a> {
    /// Parses a serialized ModelProto.
    pub fn parse(bytes: &'a [u8]) -> Result<Model<'a>, String> {
        let mut model = Model { pieces: Vec::new(), model_type: 1 };
        let mut fields = Fields { bytes, at: 0 };
        while let Some((number, field)) = fields.next()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => model.pieces.push(parse_piece(piece)?),
                (2, Field::Bytes(trainer)) => {
                    let mut inner = Fields { bytes: trainer, at: 0 };
                    while let Some((number, field)) = inner.next()? {
                        if let (3, Field::Varint(kind)) = (number, field) {
                            model.model_type = kind;
                        }
                    }
                }
                (1 | 2, _) => return Err(format!("field {number} is not a message")),
                _ => {}
            }
        }
        if model.pieces.is_empty() { Err("no pieces".into()) } else { Ok(model) }
    }
}

fn parse_piece(bytes: &[u8]) -> Result<Piece<'_>, String> {
    let mut piece = Piece { text: &[], score: 0.0, kind: 1 };
    let mut fields = Fields { bytes, at: 0 };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => piece.text = text,
            (2, Field::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Field::Varint(kind)) => piece.kind = kind,
            (1..=3, _) => return Err(format!("field {number} of a piece has a wrong type")),
            _ => {}
        }
    }
    Ok(piece)
}

enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

/// The fields of a protobuf message.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n)).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("a field of {n} bytes at {} is longer than its message", self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(format!("a number at {} is longer than 10 bytes", self.at))
    }

    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Fixed64
            }
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(n)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().unwrap_or_default())),
            other => return Err(format!("unknown wire type {other} at {}", self.at)),
        };
        Ok(Some((tag >> 3, field)))
    }
}

/// True for tiktoken's lines of base64 and rank, which some folders keep under the same name.
fn is_tiktoken(bytes: &[u8]) -> bool {
    let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
    match line.split(|b| *b == b' ').collect::<Vec<_>>()[..] {
        [text, rank] => {
            let base64 = |b: &u8| b.is_ascii_alphanumeric() || b"+/=".contains(b);
            !text.is_empty()
                && text.iter().all(base64)
                && !rank.is_empty()
                && rank.iter().all(|b| b.is_ascii_digit() || *b == b'\r')
        }
        _ => false,
    }
}

/// The vocabulary of tokenizer.model with added tokens over it; `None` if there is no such file.
pub fn read(request: &Request<'_>, files: &Files, report: &mut Report) -> Result<Option<Vocab>, CheckpointError> {
    let file = files.path("tokenizer.model");
    if !json::exists(&file)? {
        return Ok(None);
    }
    let bytes = json::read_bytes(&file)?;
    if is_tiktoken(&bytes) {
        if files.tokenizer.is_none() {
            return Err(CheckpointError::file(
                file,
                "a tiktoken file, not SentencePiece; tokenizer.json is needed beside it",
            ));
        }
        report.warn(format!("{}: a tiktoken file, not SentencePiece; tokenizer.json is taken", file.display()));
        return Ok(None);
    }
    let model =
        Model::parse(&bytes).map_err(|e| CheckpointError::file(&file, format!("not a SentencePiece model: {e}")))?;
    if let Some(i) = model.pieces.iter().position(|p| std::str::from_utf8(p.text).is_err()) {
        return Err(CheckpointError::file(&file, format!("piece {i} is not UTF-8: the file is damaged")));
    }
    if model.model_type != 2 {
        report.warn(format!(
            "{}: not a BPE model (model_type {}); llama.cpp merges by score, which may give other ids",
            file.display(),
            model.model_type
        ));
    }
    let size = request.vocab_size;
    let mut out = Out { scores: vec![PADDING_SCORE; size as usize], ..Out::padding(size) };
    out.ignored(&file, model.pieces.len() as u64, report);
    for (id, piece) in model.pieces.iter().enumerate().take(size as usize) {
        let kind = match piece.kind {
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => TokenType::Normal,
        };
        out.set(id as u64, piece.text.to_vec(), piece.score, kind);
    }
    out.added_tokens(files, report)?;
    Ok(Some(Vocab {
        model: "llama",
        pre: "default".into(),
        pre_reason: None,
        source: "tokenizer.model",
        tokens: out.tokens,
        scores: Some(out.scores),
        types: out.types,
        merges: None,
    }))
}

/// The three lists under construction.
struct Out {
    tokens: Vec<Vec<u8>>,
    scores: Vec<f32>,
    types: Vec<TokenType>,
}

impl Out {
    fn padding(size: u64) -> Out {
        let (tokens, types) = Vocab::padding(size);
        Out { tokens, scores: Vec::new(), types }
    }

    fn set(&mut self, id: u64, text: Vec<u8>, score: f32, kind: TokenType) {
        let i = id as usize;
        (self.tokens[i], self.scores[i], self.types[i]) = (text, score, kind);
    }

    fn holds(&self, id: u64) -> bool {
        id < self.tokens.len() as u64
    }

    fn ignored(&self, file: &std::path::Path, tokens: u64, report: &mut Report) {
        if tokens > self.tokens.len() as u64 {
            report.warn(format!(
                "{}: {tokens} tokens, but vocab_size is {}: the rest is left out",
                file.display(),
                self.tokens.len()
            ));
        }
    }

    /// added_tokens.json, then `added_tokens_decoder`, as in the reference.
    fn added_tokens(&mut self, files: &Files, report: &mut Report) -> Result<(), CheckpointError> {
        let file = files.path("added_tokens.json");
        for (content, id) in files.added_tokens.iter().flatten() {
            let id = plain_id(&file, content, id)?;
            if self.holds(id) {
                self.set(id, content.clone().into_bytes(), ADDED_SCORE, TokenType::UserDefined);
            } else {
                report.warn(format!("{}: `{content}` ({id}) is outside of vocab_size and left out", file.display()));
            }
        }
        let file = files.path("tokenizer_config.json");
        for added in files.decoder()? {
            if !self.holds(added.id) {
                report.warn(format!(
                    "{}: `{}` ({}) is outside of vocab_size and left out",
                    file.display(),
                    added.content,
                    added.id
                ));
                continue;
            }
            let i = added.id as usize;
            if self.types[i] != TokenType::Unused && self.tokens[i] != added.content.as_bytes() {
                let old = String::from_utf8_lossy(&self.tokens[i]).into_owned();
                report.warn(format!(
                    "{}: token {i} is `{}` here and `{old}` in tokenizer.model; this one is taken",
                    file.display(),
                    added.content
                ));
            }
            if added.special || looks_special(&added.content) {
                self.set(added.id, added.content.into_bytes(), ADDED_SCORE, TokenType::Control);
            } else {
                self.set(added.id, visible_spaces(&added.content).into_bytes(), ADDED_SCORE, TokenType::UserDefined);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(field: u8, body: &[u8]) -> Vec<u8> {
        [&[field << 3 | 2, body.len() as u8], body].concat()
    }

    #[test]
    fn pieces_with_defaults() {
        let full = [&message(1, b"ab")[..], &[2 << 3 | 5], &(-3.5f32).to_le_bytes(), &[3 << 3, 6]].concat();
        let bytes =
            [message(1, &full), message(1, &message(1, "\u{2581}".as_bytes())), message(2, &[3 << 3, 2])].concat();
        let model = Model::parse(&bytes).unwrap();
        assert_eq!(model.pieces[0], Piece { text: b"ab", score: -3.5, kind: 6 });
        assert_eq!(model.pieces[1], Piece { text: "\u{2581}".as_bytes(), score: 0.0, kind: 1 });
        assert_eq!(model.model_type, 2);
    }

    #[test]
    fn broken_files_are_errors() {
        let good = message(1, &message(1, b"abc"));
        for cut in 1..good.len() {
            assert!(Model::parse(&good[..cut]).is_err(), "{cut}");
        }
        for bad in [
            &b""[..],
            &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0xff; 12],
            &[0x0b],
            &[0x08, 1],
        ] {
            assert!(Model::parse(bad).is_err(), "{bad:?}");
        }
        assert!(is_tiktoken(b"IQ== 0\nIg== 1\n") && !is_tiktoken(&good) && !is_tiktoken(b""));
    }
}
