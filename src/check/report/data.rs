//! What a report holds.

use serde::{Deserialize, Serialize};

use super::Histogram;
use crate::check::stats::Position;
use crate::check::summary::{Perplexity, Rules, Summary};
use crate::check::windows::Windows;

/// Of the JSON; raised when a key changes its meaning or goes away.
pub const FORMAT: u32 = 1;

/// A check of models against a reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Name and version of the program.
    pub program: String,
    pub run: RunFacts,
    /// In the order of the command line.
    pub models: Vec<ModelReport>,
}

/// What was compared, and on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    pub reference: FileFacts,
    /// Perplexity of the reference alone; `null` if it comes from a base file and no model was compared.
    pub reference_perplexity: Option<Perplexity>,
    /// A file of log-probabilities stood in for the reference: its figures are good to 16 bits.
    pub from_base_file: bool,
    pub text: TextFacts,
    /// Tokens in a window.
    pub n_ctx: usize,
    /// Windows.
    pub n_chunks: usize,
    /// Scored positions.
    pub positions: usize,
    /// Words.
    pub n_vocab: usize,
    /// How activations were held in matrix products: `f32`, or `q8` as llama.cpp's CPU kernels do.
    pub activations: String,
    /// Whatever a reader should know; shown as it is.
    pub notes: Vec<String>,
}

/// A model's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileFacts {
    /// As it should be shown: a file name, not a path.
    pub name: String,
    /// Bytes of the file, or of the weights of a checkpoint.
    pub size: u64,
    /// File type such as `Q4_K_M`.
    pub type_name: String,
    /// Bits of all tensors by their weights.
    pub bits_per_weight: f64,
    /// Weights of all tensors.
    pub weights: u64,
}

/// The evaluation text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextFacts {
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// One model against the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    pub file: FileFacts,
    pub summary: Summary,
    /// Of the KL divergence of the positions.
    pub histogram: Histogram,
    /// Mean KL divergence along the window.
    pub along_window: Vec<WindowPart>,
    /// In the order of the file. Empty if weights were not compared.
    pub tensors: Vec<TensorRow>,
    /// In the order of the layers. Empty if hidden states were not compared.
    pub blocks: Vec<BlockRow>,
}

/// A stretch of scored positions of every window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowPart {
    /// Position in the window, from 0, of the first of them.
    pub first: usize,
    /// Of the last.
    pub last: usize,
    /// Mean KL divergence, nats.
    pub kld: f64,
}

/// One tensor: weights W of the reference, Q of the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorRow {
    pub name: String,
    /// The name without layer and `.weight`: `attn_q`, `ffn_down`, `token_embd`.
    pub kind: String,
    /// `null` for tensors of no layer.
    pub layer: Option<u32>,
    /// Block format of the model's tensor.
    pub type_name: String,
    pub bits_per_weight: f64,
    pub weights: u64,
    /// ||W - Q||^2 / ||W||^2.
    pub relative_error: f64,
    /// tr((W - Q) H (W - Q)^T) / tr(W H W^T), with H = E\[x x^T\] of the inputs x; `null` without H.
    pub weighted_error: Option<f64>,
}

/// The output of one transformer block: hidden states h of the reference, g of the model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockRow {
    pub layer: u32,
    /// sum ||h - g||^2 / sum ||h||^2 over positions.
    pub relative_difference: f64,
}

impl TensorRow {
    /// Kind and layer of a GGUF tensor name: `blk.3.attn_q.weight` is `attn_q` of layer 3.
    pub fn kind_and_layer(name: &str) -> (String, Option<u32>) {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let (layer, rest) = match layer.map(|(n, rest)| (n.parse().ok(), rest)) {
            Some((Some(n), rest)) => (Some(n), rest),
            _ => (None, name),
        };
        (rest.strip_suffix(".weight").unwrap_or(rest).to_string(), layer)
    }
}

impl ModelReport {
    /// The figures of a model from its records, window after window. `None` if there are no records. Rows per tensor and per
    /// block are added by whoever has them.
    pub fn new(file: FileFacts, records: &[Position], rules: Rules, windows: Windows) -> Option<ModelReport> {
        let summary = Summary::of(records, rules)?;
        let klds: Vec<f64> = records.iter().map(|r| r.kld).collect();
        Some(ModelReport {
            file,
            summary,
            histogram: Histogram::of(&klds),
            along_window: window_parts(&klds, windows.first(), windows.scored()),
            tensors: Vec::new(),
            blocks: Vec::new(),
        })
    }
}

/// Mean KL divergence of at most 16 stretches of the scored positions, over all windows.
pub fn window_parts(klds: &[f64], first: usize, scored: usize) -> Vec<WindowPart> {
    const PARTS: usize = 16;
    let (parts, scored) = (PARTS.min(scored), scored.max(1));
    let mut out = Vec::with_capacity(parts);
    for part in 0..parts {
        let (from, to) = (part * scored / parts, (part + 1) * scored / parts);
        let (mut sum, mut count) = (0.0, 0usize);
        for window in klds.chunks(scored) {
            for kld in window.iter().take(to).skip(from) {
                sum += kld;
                count += 1;
            }
        }
        if count > 0 {
            out.push(WindowPart { first: first + from, last: first + to - 1, kld: sum / count as f64 });
        }
    }
    out
}

impl Report {
    /// Figures that are NaN or infinite, by where they stand; JSON would show `null` for them.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        for model in &self.models {
            let name = &model.file.name;
            let s = &model.summary;
            let estimates = [
                ("ppl", s.ppl),
                ("ppl_base", s.ppl_base),
                ("ln_ppl_ratio", s.ln_ppl_ratio),
                ("ppl_ratio", s.ppl_ratio),
                ("ppl_difference", s.ppl_difference),
                ("kld", s.kld),
                ("p_diff", s.p_diff),
                ("p_diff_rms", s.p_diff_rms),
                ("same_top", s.same_top),
            ];
            for (key, e) in estimates {
                if !e.value.is_finite() || !e.error.is_finite() {
                    found.push(format!("{name}: {key} is {} ± {}", e.value, e.error));
                }
            }
            for t in &model.tensors {
                if !t.relative_error.is_finite() || t.weighted_error.is_some_and(|e| !e.is_finite()) {
                    found.push(format!("{name}: tensor `{}`: relative error {}", t.name, t.relative_error));
                }
            }
            for b in model.blocks.iter().filter(|b| !b.relative_difference.is_finite()) {
                found.push(format!("{name}: block {}: relative difference {}", b.layer, b.relative_difference));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_layers_are_read_off_names() {
        let of = |n| TensorRow::kind_and_layer(n);
        assert_eq!(of("blk.12.attn_q.weight"), ("attn_q".into(), Some(12)));
        assert_eq!(of("blk.0.attn_q.bias"), ("attn_q.bias".into(), Some(0)));
        assert_eq!(of("token_embd.weight"), ("token_embd".into(), None));
        assert_eq!(of("blk.x.y.weight"), ("blk.x.y".into(), None));
    }

    #[test]
    fn parts_of_the_window_cover_it_once() {
        let klds: Vec<f64> = (0..2 * 40).map(|i| f64::from(i % 40)).collect();
        let parts = window_parts(&klds, 41, 40);
        assert_eq!((parts.len(), parts[0].first, parts[15].last), (16, 41, 80));
        assert!(parts.windows(2).all(|w| w[1].first == w[0].last + 1));
        assert_eq!(parts[0].kld, 0.5);
        assert_eq!(window_parts(&[1.0, 3.0], 2, 1), [WindowPart { first: 2, last: 2, kld: 2.0 }]);
    }
}
