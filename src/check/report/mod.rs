//! The report of a check: what was compared, the figures, rows per tensor and per block, and three renderings.
//!
//! [`Report`] is plain data and serializes as it stands; its JSON keys are documented in `docs/check.md` and stay as they
//! are within a `format`. [`Report::json`], [`Report::text`] and [`Report::html`] render it. Nothing in it depends on the
//! time or the machine: the same figures give the same bytes. Every figure is finite (JSON has no NaN);
//! [`Report::problems`] finds what is not.

mod bars;
mod chart;
mod data;
mod figures;
mod heat;
mod histogram;
mod html;
mod lines;
mod number;
mod scatter;
mod tables;
mod text;

pub use data::{
    BlockRow, FORMAT, FileFacts, ModelReport, Report, RunFacts, TensorRow, TextFacts, WindowPart, window_parts,
};
pub use histogram::Histogram;

impl Report {
    /// JSON, indented, with a line break at the end.
    pub fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data, string keys");
        text.push('\n');
        text
    }

    /// Tables for a terminal.
    pub fn text(&self) -> String {
        text::render(self)
    }

    /// One HTML page that needs nothing else: no network, no script.
    pub fn html(&self) -> String {
        html::render(self)
    }
}
