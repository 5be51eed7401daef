//! What can be wrong with logits and with files of log-probabilities.

use std::path::{Path, PathBuf};

/// Rows of logits that cannot be scored.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LogitsError {
    /// A NaN or an infinity: the model, or the forward pass, is broken.
    #[error("{side}: the logit of word {word} is {value}; the weights or the evaluation are broken")]
    NotFinite { side: &'static str, word: usize, value: f32 },
    /// Two vocabularies.
    #[error("the reference has {reference} words, the model {model}: they cannot be compared")]
    Vocabulary { reference: usize, model: usize },
    /// The text holds a token that the model does not have.
    #[error("the next token is {next}, but the vocabulary ends at {n_vocab}: the text was cut by another tokenizer")]
    Token { next: usize, n_vocab: usize },
    /// A buffer that is not positions x words.
    #[error("{values} logits for {positions} positions of {n_vocab} words")]
    Shape { values: usize, positions: usize, n_vocab: usize },
}

/// A check that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A file that is refused.
    #[error("{}: {reason}", file.display())]
    File { file: PathBuf, reason: String },
    /// The operating system said no.
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: std::io::Error },
    /// Logits that cannot be scored.
    #[error(transparent)]
    Logits(#[from] LogitsError),
    /// A text or a context length that gives no positions.
    #[error("{0}")]
    Text(String),
}

impl CheckError {
    pub(crate) fn file(file: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::File { file: file.as_ref().to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn io(file: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { file: file.as_ref().to_path_buf(), source }
    }
}
