//! How far a quantized model is from its reference: KL divergence, perplexity and top words, over the positions that
//! llama-perplexity scores, and the report that shows it.
//!
//! A text becomes [`windows`]; somebody's forward pass makes logits of reference and model at every scored position;
//! [`stats`] turns the two rows into one record, [`summary`] all records into what llama-perplexity prints. Instead of a
//! reference that runs, there may be a file of its log-probabilities ([`base_file`], [`base_writer`]), as llama-perplexity
//! writes and reads it. [`report`] holds facts, figures and rows per tensor, and renders them as text, JSON and one HTML page.
//!
//! `docs/check.md` has the formulas.

pub mod base_file;
pub mod base_row;
pub mod base_writer;
mod error;
mod kernel;
pub mod report;
pub mod run;
pub mod stats;
pub mod summary;
pub mod tensors;
pub mod windows;

pub use error::{CheckError, LogitsError};
