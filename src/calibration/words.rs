//! What `--calibrate` names, as windows of token ids: files, the text that ships, text that the model writes itself.
//!
//! Text of the model's own comes after the others and fills what they leave of the tokens asked for. It is kept in the state
//! folder, so that a run that was cut short, and the next step of a conversion, need not write it again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::windows::{self, Text};
use super::{CalibrationError, fingerprint};
use crate::checkpoint::CheckpointError;
use crate::forward::generate::{self, Generator, Joints};
use crate::forward::{ForwardError, Model};
use crate::plan::{BUILT_IN, OWN};
use crate::tokenizer::encode::TextEncoder;

/// What files call text that the model wrote.
pub const NAME: &str = "ostq-convert/self";
/// Tokens of all texts where nothing says how many.
pub const TOKENS: usize = 131_072;
/// Of the draws.
const SEED: u64 = 0;
/// In the state folder.
const FILE: &str = "self.json";

/// The texts that words stand for.
pub struct Words {
    texts: Vec<Text>,
    /// Whether the model writes too.
    own: bool,
}

/// How much is wanted, and by what means the model writes.
pub struct Wanted<'a> {
    pub model: &'a Model<'a>,
    pub encoder: &'a TextEncoder,
    /// Tokens of a window.
    pub length: usize,
    /// Windows in all.
    pub limit: Option<usize>,
    /// Bytes that writing may take.
    pub memory: Option<u64>,
    pub state: &'a Path,
}

impl Words {
    /// Reads the files; no words are the built-in text.
    ///
    /// # Errors
    /// A file cannot be read; the built-in text stands beside files.
    pub fn load(words: &[PathBuf]) -> Result<Words, CalibrationError> {
        let is = |word: &Path, name: &str| word.as_os_str() == name;
        let files: Vec<PathBuf> = words.iter().filter(|w| !is(w, BUILT_IN) && !is(w, OWN)).cloned().collect();
        let (built_in, own) = (words.iter().any(|w| is(w, BUILT_IN)), words.iter().any(|w| is(w, OWN)));
        if built_in && !files.is_empty() {
            return Err(CalibrationError::Words(format!("--calibrate {BUILT_IN}: no text stands beside it but {OWN}")));
        }
        let texts = if own && !built_in && files.is_empty() { Vec::new() } else { windows::load(&files)? };
        Ok(Words { texts, own })
    }

    /// Names of the texts, for messages and files.
    pub fn names(&self) -> Vec<String> {
        self.texts.iter().map(|t| t.name.clone()).chain(self.own.then(|| NAME.to_string())).collect()
    }

    /// Whole windows, each with its BOS. `progress`: tokens that the model has written, of how many.
    ///
    /// # Errors
    /// The texts have no whole window; the model cannot write (experts, memory); the state folder cannot be written.
    pub fn windows(
        &self,
        wanted: &Wanted<'_>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<u32>, CalibrationError> {
        let ids = windows::ids(wanted.encoder, &self.texts);
        let cut = |limit| windows::windows(wanted.encoder, &ids, wanted.length, limit).map_err(CalibrationError::Text);
        if !self.own {
            return cut(wanted.limit);
        }
        let all = wanted.limit.unwrap_or((TOKENS / wanted.length.max(1)).max(1));
        let mut tokens = if ids.len() < wanted.length { Vec::new() } else { cut(wanted.limit)? };
        let missing = all.saturating_sub(tokens.len() / wanted.length);
        if missing > 0 {
            tokens.extend(own(wanted, missing, progress)?);
        }
        Ok(tokens)
    }
}

/// What the model has written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Written {
    version: String,
    fingerprint: String,
    seed: u64,
    length: usize,
    /// Windows in all.
    count: usize,
    first: u32,
    ends: Vec<u32>,
    next: Option<u32>,
    /// `[windows, length]`, whole batches.
    tokens: Vec<u32>,
    /// sha256 of the tokens.
    sha256: String,
}

/// `count` windows that the model writes.
fn own(
    wanted: &Wanted<'_>,
    count: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<u32>, CalibrationError> {
    let (model, length) = (wanted.model, wanted.length);
    let joints = joints(wanted.encoder)?;
    let path = wanted.state.join(FILE);
    let io = |e| CalibrationError::Input(CheckpointError::io(&path, e));
    // behind transforms it is the same model
    let source = model.source();
    let original = source.transformed().map_or(source, |t| t.original());
    let empty = Written {
        version: env!("CARGO_PKG_VERSION").into(),
        fingerprint: fingerprint::fingerprint(original),
        seed: SEED,
        length,
        count,
        first: joints.first,
        ends: joints.ends.clone(),
        next: joints.next,
        tokens: Vec::new(),
        sha256: String::new(),
    };
    let usable = |w: &Written| {
        let known = Written { tokens: Vec::new(), sha256: String::new(), ..w.clone() } == empty;
        known
            && w.tokens.len().is_multiple_of(length)
            && w.tokens.len() <= count * length
            && w.sha256 == windows::digest(&w.tokens)
    };
    let found = std::fs::read(&path).ok().and_then(|b| serde_json::from_slice(&b).ok()).filter(usable);
    let mut written: Written = found.unwrap_or(empty);
    let batch = generate::batch(model, length, count);
    if written.tokens.len() < count * length {
        std::fs::create_dir_all(wanted.state).map_err(io)?;
        let mut generator = Generator::new(model, length, batch, wanted.memory)?;
        while written.tokens.len() < count * length {
            let done = written.tokens.len();
            let windows = done / length..(done / length + batch).min(count);
            let here = windows.len();
            let mut see = |position: usize, _: &[f32]| progress(done + (position + 1) * here, count * length);
            written.tokens.extend(generator.write(windows, &joints, SEED, &mut see)?);
            progress(written.tokens.len(), count * length);
            written.sha256 = windows::digest(&written.tokens);
            let new = path.with_extension("json.new");
            let text = serde_json::to_vec(&written).expect("plain data");
            std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(io)?;
        }
    }
    Ok(written.tokens)
}

/// How texts of a vocabulary begin and end: as in [`windows::ids`], where the vocabulary asks for BOS; elsewhere with the token
/// that its texts are joined by.
fn joints(encoder: &TextEncoder) -> Result<Joints, ForwardError> {
    let bos = encoder.bos().filter(|_| encoder.add_bos());
    let first = bos.or(encoder.bos()).or(encoder.eos());
    let why = "its vocabulary names no token that a text begins with";
    let first = first.ok_or_else(|| ForwardError::Generate(why.into()))?;
    // where one token is both, it begins the next text itself
    Ok(Joints { first, ends: encoder.eos().filter(|&e| e != first).into_iter().collect(), next: bos })
}

/// Removes what [`Words::windows`] keeps in the state folder.
pub fn forget(state: &Path) {
    for name in [FILE, "self.json.new"] {
        let _ = std::fs::remove_file(state.join(name));
    }
}
