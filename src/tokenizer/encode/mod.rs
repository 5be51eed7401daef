//! Text to token ids, as llama.cpp b11434 gives them.
//!
//! In: the `tokenizer.*` keys of a GGUF file, or those that this program makes for a checkpoint, and text. Out: ids.
//! Source: `llama_vocab::impl` of `src/llama-vocab.cpp` and `src/unicode.cpp`: `load` ([`TextEncoder::from_metadata`]), `tokenize`
//! ([`TextEncoder::encode`]), `token_to_piece` ([`TextEncoder::piece`]).
//!
//! [`partition`] takes special tokens out of the text; what is between them goes through [`spm`] (model `llama`), or through
//! [`split`] and [`bpe`] (models `gpt2` and `gemma4`). WordPiece, Unigram, RWKV, PLaMo-2, HybridDNA and the whitespace model are
//! refused by name. `clean_up_tokenization_spaces`, which llama.cpp derives from the pre-tokenizer, plays a role only in
//! its text from ids, which is not here.
//!
//! Text is UTF-8; llama.cpp's replacements for invalid bytes never come up.

pub mod bpe;
pub mod bytes;
mod chain;
mod error;
mod keys;
mod memory;
pub mod partition;
pub mod pre;
mod special;
pub mod split;
pub mod spm;
mod vocab;

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use self::bpe::Bpe;
use self::partition::{Fragment, Partition};
use self::pre::PreTokenizer;
use self::spm::{SPACE, Spm};
use self::vocab::{Vocab, attr};
use crate::calibration::imatrix::hex;
use crate::checkpoint::nearest::nearest;
use crate::gguf::Metadata;
use crate::tokenizer::pre::names::NAMES;

pub use self::error::EncodeError;

/// A vocabulary that turns text into ids.
#[derive(Debug)]
pub struct TextEncoder {
    vocab: Vocab,
    partition: Partition,
    algorithm: Algorithm,
    /// A space is set before text at the beginning and behind special tokens.
    space_prefix: bool,
    /// Spaces become U+2581.
    escape_spaces: bool,
    add_bos: bool,
    add_eos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    fingerprint: String,
}

#[derive(Debug)]
enum Algorithm {
    Spm(Box<Spm>),
    Bpe(Box<Bpe>),
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";

/// What `tokenizer.ggml.model` implies.
struct Model {
    /// `None`: SentencePiece.
    pre: Option<PreTokenizer>,
    pre_name: String,
    /// Ids of bos, eos and the unknown token where no key names them.
    defaults: [Option<u32>; 3],
    add_bos: bool,
}

impl Model {
    fn read(metadata: &Metadata) -> Result<Model, EncodeError> {
        let model = keys::string(metadata, MODEL)?.ok_or(EncodeError::Missing { key: MODEL })?;
        let name = keys::string(metadata, PRE)?.unwrap_or_default();
        let name = match model.as_str() {
            "llama" => {
                let defaults = [Some(1), Some(2), Some(0)];
                return Ok(Model { pre: None, pre_name: String::new(), defaults, add_bos: true });
            }
            "gpt2" if name.is_empty() => "default".to_string(),
            "gpt2" => name,
            "gemma4" => model.clone(),
            _ => return Err(EncodeError::Model { what: kind_of(&model), model }),
        };
        let Some(pre) = pre::find(&name) else {
            let nearest = nearest(&name, NAMES.iter().copied()).unwrap_or_default().to_string();
            return Err(EncodeError::Pre { pre: name, nearest });
        };
        let defaults = match model.as_str() {
            "gemma4" => [None; 3],
            _ => [Some(11).filter(|_| !pre.no_bos), Some(11), None],
        };
        Ok(Model { pre: Some(pre), pre_name: name, defaults, add_bos: pre.add_bos })
    }
}

fn kind_of(model: &str) -> &'static str {
    match model {
        "bert" => "WordPiece",
        "t5" => "Unigram",
        "rwkv" => "the trie of RWKV",
        "plamo2" => "PLaMo-2",
        "hybriddna" => "byte-pair merges with DNA k-mers",
        "whitespace" => "byte-pair merges within words",
        "no_vocab" | "none" => "no vocabulary",
        _ => "not known to llama.cpp",
    }
}

impl TextEncoder {
    /// The encoder of a file.
    ///
    /// # Errors
    /// A key is missing or of another type than llama.cpp reads; the model is none of `llama`, `gpt2`, `gemma4`; the
    /// pre-tokenizer is unknown; scores or types are fewer than tokens; two tokens have one text; a special token is not
    /// UTF-8; the bos, eos or unknown id is no token (llama.cpp goes on with a default); bos or eos is to be added and
    /// there is none (llama.cpp aborts when it gets there).
    pub fn from_metadata(metadata: &Metadata) -> Result<TextEncoder, EncodeError> {
        let model = Model::read(metadata)?;
        let mut vocab = Vocab::read(metadata)?;
        let merges = keys::strings(metadata, MERGES)?;
        // Kimi K2 has none
        if merges.is_none() && model.pre.is_some() && model.pre_name != "kimi-k2" {
            return Err(EncodeError::Missing { key: MERGES });
        }
        let fingerprint = fingerprint(metadata, &model, &vocab)?;
        let [bos, eos, unknown] = special_ids(metadata, &vocab, model.defaults)?;
        special::correct(&mut vocab, metadata)?;
        let listed = special::list(&vocab);
        special::strip(&mut vocab, &listed, metadata)?;
        let partition = Partition::new(&vocab, &listed)?;
        let flag = |name: &str| keys::flag(metadata, &format!("tokenizer.ggml.{name}"));
        let add_bos = flag("add_bos_token")?.unwrap_or(model.add_bos) || model.pre.is_some_and(|p| p.force_bos);
        let add_eos = flag("add_eos_token")?.unwrap_or(false);
        let space_prefix = flag("add_space_prefix")?.unwrap_or(true) && model.pre.is_none();
        for (add, id, name) in [(add_bos, bos, "bos"), (add_eos, eos, "eos")] {
            if add && id.is_none() {
                return Err(EncodeError::NoToken { name });
            }
        }
        let algorithm = match model.pre {
            None => Algorithm::Spm(Box::new(Spm::new(&vocab, unknown))),
            Some(pre) => Algorithm::Bpe(Box::new(Bpe::new(&vocab, pre, merges.into_iter().flatten()))),
        };
        let escape_spaces = model.pre.is_none_or(|p| p.escape_spaces);
        Ok(TextEncoder {
            vocab,
            partition,
            algorithm,
            space_prefix,
            escape_spaces,
            add_bos,
            add_eos,
            bos,
            eos,
            fingerprint,
        })
    }

    /// The ids of `text`, as `llama_tokenize` gives them.
    ///
    /// `add_special`: bos and eos are added where the vocabulary wants them ([`Self::add_bos`], [`Self::add_eos`]).
    /// `parse_special`: control tokens that are written out in the text are those tokens; otherwise they are text.
    /// User-defined tokens are always recognised.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 4 + 2);
        out.extend(self.bos.filter(|_| add_special && self.add_bos));
        let fragments = self.partition.fragments(text, parse_special);
        let (text, fragments) = self.escape(text, fragments);
        match &self.algorithm {
            Algorithm::Spm(spm) => {
                let mut session = spm::Session::default();
                each(fragments, &mut out, |range, out| spm.encode(&self.vocab, &text, range, &mut session, out));
            }
            Algorithm::Bpe(bpe) => {
                let mut session = bpe::Session::default();
                each(fragments, &mut out, |range, out| bpe.encode(&self.vocab, &text, range, &mut session, out));
            }
        }
        out.extend(self.eos.filter(|_| add_special && self.add_eos));
        out
    }

    /// The text as the algorithm wants it: spaces made visible, one set before text that follows a special token.
    fn escape<'t>(&self, text: &'t str, fragments: Vec<Fragment>) -> (Cow<'t, str>, Vec<Fragment>) {
        if !self.escape_spaces {
            return (Cow::Borrowed(text), fragments);
        }
        let mut escaped = String::with_capacity(text.len() + text.len() / 2);
        let mut after_special = true;
        let escape = |fragment| match fragment {
            Fragment::Text(range) => {
                let start = escaped.len();
                if self.space_prefix && after_special {
                    escaped.push(SPACE);
                }
                after_special = false;
                for (i, part) in text[range].split(' ').enumerate() {
                    if i > 0 {
                        escaped.push(SPACE);
                    }
                    escaped.push_str(part);
                }
                Fragment::Text(start..escaped.len())
            }
            token => {
                after_special = true;
                token
            }
        };
        let fragments = fragments.into_iter().map(escape).collect();
        (Cow::Owned(escaped), fragments)
    }

    /// Whether texts begin with [`Self::bos`].
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The token for the beginning of a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether texts end with [`Self::eos`].
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// The token for the end of a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.vocab.len()
    }

    /// Never: a vocabulary without tokens is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes that a token stands for, as `llama_token_to_piece` with `special` gives them: special tokens as they are
    /// written, nothing for unused ones. Nothing for an id that is no token.
    pub fn piece(&self, id: u32) -> Vec<u8> {
        let at = id as usize;
        let (Some(text), Some(&attrs)) = (self.vocab.texts.get(at), self.vocab.attrs.get(at)) else {
            return Vec::new();
        };
        if attrs & (attr::UNKNOWN | attr::CONTROL | attr::USER_DEFINED) != 0 {
            text.to_vec()
        } else if attrs & attr::NORMAL != 0 {
            if self.escape_spaces { unescape(text) } else { bytes::decode_or_name(text) }
        } else if attrs & attr::BYTE != 0 {
            vec![byte_of(text)]
        } else {
            Vec::new()
        }
    }

    /// What decides the ids of ordinary text: sha256, in hexadecimal, over model, pre-tokenizer, tokens, and merges (for
    /// SentencePiece: scores, which are its merges). Files with the same value give the same ids but for special tokens.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }
}

/// Fragments in order: tokens as they are, texts through `encode`.
fn each(fragments: Vec<Fragment>, out: &mut Vec<u32>, mut encode: impl FnMut(std::ops::Range<usize>, &mut Vec<u32>)) {
    for fragment in fragments {
        match fragment {
            Fragment::Token(id) => out.push(id),
            Fragment::Text(range) => encode(range, out),
        }
    }
}

/// Ids of bos, eos and the unknown token.
fn special_ids(
    metadata: &Metadata,
    vocab: &Vocab,
    defaults: [Option<u32>; 3],
) -> Result<[Option<u32>; 3], EncodeError> {
    let tokens = vocab.len();
    let mut ids = defaults.map(|id| id.filter(|&id| (id as usize) < tokens));
    for (slot, name) in ids.iter_mut().zip(["bos", "eos", "unknown"]) {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match keys::id(metadata, &key)? {
            Some(id) if id as usize >= tokens => return Err(EncodeError::Id { key, id: id.into(), tokens }),
            Some(id) => *slot = Some(id),
            None => {}
        }
    }
    Ok(ids)
}

fn fingerprint(metadata: &Metadata, model: &Model, vocab: &Vocab) -> Result<String, EncodeError> {
    let mut sha = Sha256::new();
    let mut text = |bytes: &[u8]| {
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    };
    text(if model.pre.is_some() { b"bpe" } else { b"spm" });
    text(model.pre_name.as_bytes());
    text(&(vocab.len() as u64).to_le_bytes());
    vocab.texts.iter().for_each(|t| text(t));
    if model.pre.is_some() {
        keys::strings(metadata, MERGES)?.into_iter().flatten().for_each(&mut text);
    } else {
        (0..vocab.len() as u32).for_each(|id| text(&vocab.score(id).to_le_bytes()));
    }
    Ok(hex(&sha.finalize()))
}

/// U+2581 back to spaces.
fn unescape(text: &[u8]) -> Vec<u8> {
    let space = [0xE2, 0x96, 0x81];
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        match rest.strip_prefix(&space[..]) {
            Some(left) => {
                out.push(b' ');
                rest = left;
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// The byte of `<0x0A>`: the hexadecimal digits from the fourth character on, 0 if there are none.
fn byte_of(text: &[u8]) -> u8 {
    let digits = text.iter().skip(3).take(2).map_while(|&b| char::from(b).to_digit(16));
    digits.fold(0, |value, digit| value * 16 + digit as u8)
}

#[cfg(test)]
mod tests;
