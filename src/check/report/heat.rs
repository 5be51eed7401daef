//! The error of every tensor: kinds by layers, one map for each model, each with its own scale: differences inside a model
//! are what types are mixed by, and they are small against those between models.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::chart::{WIDTH, figure, open};
use super::number::{escape, json, shorten, significant};
use super::{ModelReport, TensorRow};

/// Steps of the colour scale.
const STEPS: usize = 8;
/// The order in which a block computes; others follow as they come.
const KINDS: [&str; 8] = ["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// A logarithmic colour scale.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// Around the errors of a model; `None` if no tensor has one.
    fn of(m: &ModelReport) -> Option<Scale> {
        let positive = m.tensors.iter().map(|t| t.relative_error).filter(|e| *e > 0.0 && e.is_finite());
        let (low, high) = positive.fold((f64::INFINITY, 0.0f64), |(a, b), e| (a.min(e), b.max(e)));
        // one value would have no scale
        (high > 0.0)
            .then(|| if high > 1.05 * low { Scale { low, high } } else { Scale { low: low / 2.0, high: high * 2.0 } })
    }

    fn edge(&self, i: usize) -> f64 {
        self.low * (self.high / self.low).powf(i as f64 / STEPS as f64)
    }

    fn step(&self, error: f64) -> usize {
        let place = (error / self.low).ln() / (self.high / self.low).ln();
        ((place * STEPS as f64) as usize).min(STEPS - 1)
    }
}

/// Kinds with an error somewhere, in order: of layers, and of no layer.
fn kinds(tensors: &[TensorRow]) -> (Vec<&str>, Vec<&str>) {
    let of = |layered: bool| {
        let mut seen = BTreeSet::new();
        let rows = tensors.iter().filter(|t| t.layer.is_some() == layered && t.relative_error > 0.0);
        let mut kinds: Vec<&str> = rows.map(|t| t.kind.as_str()).filter(|k| seen.insert(*k)).collect();
        kinds.sort_by_key(|k| KINDS.iter().position(|have| have == k).unwrap_or(KINDS.len()));
        kinds
    };
    (of(true), of(false))
}

const LEFT: f64 = 98.0;
const ROW: f64 = 22.0;

fn cell(out: &mut String, at: (f64, f64), wide: f64, model: usize, k: usize, t: &TensorRow, scale: &Scale) {
    let class = if t.relative_error > 0.0 { format!("q{}", scale.step(t.relative_error)) } else { "exact".into() };
    let weighted = t.weighted_error.map(|e| format!(", weighted {}", significant(e, 3))).unwrap_or_default();
    let error = significant(t.relative_error, 3);
    let title = escape(&format!("{} ({}): relative error {error}{weighted}", t.name, t.type_name));
    let _ = write!(
        out,
        "<rect class=\"cell {class}\" x=\"{:.2}\" y=\"{:.1}\" width=\"{:.2}\" height=\"{:.1}\" {}><title>{title}</title></rect>",
        at.0,
        at.1,
        (wide - 1.0).max(wide * 0.8),
        ROW - 2.0,
        figure(&format!("/models/{model}/tensors/{k}/relative_error"), &json(t.relative_error))
    );
}

/// The map of a model; empty if its weights were not compared or none differs.
pub(super) fn render(m: &ModelReport, model: usize) -> String {
    let Some(scale) = &Scale::of(m) else { return String::new() };
    let (layered, single) = kinds(&m.tensors);
    let layers = m.tensors.iter().filter_map(|t| t.layer).max().map_or(0, |l| l as usize + 1);
    let wide = ((WIDTH - LEFT - 4.0) / layers.max(1) as f64).min(34.0);
    let singles_at = if layered.is_empty() { 6.0 } else { 6.0 + ROW * layered.len() as f64 + 42.0 };
    let height = singles_at + ROW * single.len() as f64 + 4.0;
    let title = format!("Relative error of the tensors of {}, kinds by layers", m.file.name);
    let mut out = open(height, &title);
    let name = |out: &mut String, kind: &str, y: f64| {
        let text = escape(&shorten(kind, 14));
        let _ = write!(
            out,
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            LEFT - 6.0,
            y + 14.0
        );
    };
    for (r, kind) in layered.iter().enumerate() {
        let y = 6.0 + ROW * r as f64;
        name(&mut out, kind, y);
        for (k, t) in m.tensors.iter().enumerate().filter(|(_, t)| t.kind == *kind) {
            if let Some(layer) = t.layer {
                cell(&mut out, (LEFT + wide * f64::from(layer), y), wide, model, k, t, scale);
            }
        }
    }
    if !layered.is_empty() {
        let y = 6.0 + ROW * layered.len() as f64;
        let needed = ((layers as f64 * 24.0 / (WIDTH - LEFT)).ceil() as usize).max(1);
        let round = |tens: u32| [1, 2, 5].map(|m| m * 10usize.pow(tens));
        let every = (0..10).flat_map(round).find(|every| *every >= needed).unwrap_or(layers);
        for layer in (0..layers).step_by(every) {
            let x = LEFT + wide * (layer as f64 + 0.5);
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{layer}</text>",
                y + 12.0
            );
        }
        let middle = LEFT + wide * layers as f64 / 2.0;
        let _ = write!(
            out,
            "<text class=\"label\" x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">layer</text>",
            y + 28.0
        );
    }
    for (r, kind) in single.iter().enumerate() {
        let y = singles_at + ROW * r as f64;
        name(&mut out, kind, y);
        for (k, t) in m.tensors.iter().enumerate().filter(|(_, t)| t.kind == *kind && t.layer.is_none()) {
            cell(&mut out, (LEFT, y), 34.0, model, k, t, scale);
            let text = format!("{}, {}", significant(t.relative_error, 2), t.type_name);
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{}\" y=\"{:.1}\">{}</text>",
                LEFT + 42.0,
                y + 14.0,
                escape(&text)
            );
        }
    }
    out + "</svg>" + &key(scale)
}

/// The colours and what they stand for.
fn key(scale: &Scale) -> String {
    let wide = (WIDTH - LEFT - 4.0) / STEPS as f64;
    let mut out = open(60.0, "Colour scale of the relative error");
    let _ = write!(out, "<text class=\"label\" x=\"{LEFT}\" y=\"18\">relative error ‖W − Q‖² / ‖W‖²</text>");
    for i in 0..STEPS {
        let x = LEFT + wide * i as f64;
        let _ = write!(out, "<rect class=\"cell q{i}\" x=\"{x:.1}\" y=\"26\" width=\"{wide:.1}\" height=\"12\"/>");
    }
    for i in (0..=STEPS).step_by(STEPS / 2) {
        let (x, text) = (LEFT + wide * i as f64, significant(scale.edge(i), 2));
        let anchor = if i == 0 {
            "start"
        } else if i == STEPS {
            "end"
        } else {
            "middle"
        };
        let _ = write!(out, "<text class=\"tick\" x=\"{x:.1}\" y=\"53\" text-anchor=\"{anchor}\">{text}</text>");
    }
    out + "</svg>"
}

/// Kinds that are left out of a map, and how many tensors they are.
pub(super) fn unchanged(m: &ModelReport) -> String {
    let (layered, single) = kinds(&m.tensors);
    let shown = |t: &TensorRow| if t.layer.is_some() { &layered } else { &single }.contains(&t.kind.as_str());
    match m.tensors.iter().filter(|t| !shown(t)).count() {
        0 => String::new(),
        n => format!("{n} tensors (norms and the like) are stored without error and left out."),
    }
}

#[cfg(test)]
mod tests {
    use super::super::FileFacts;
    use super::*;
    use crate::check::stats::Position;
    use crate::check::summary::Rules;
    use crate::check::windows::Windows;

    #[test]
    fn a_name_with_an_absurd_layer_makes_no_absurd_map() {
        let name = format!("blk.{}.attn_q.weight", u32::MAX);
        let (kind, layer) = TensorRow::kind_and_layer(&name);
        assert_eq!(layer, Some(u32::MAX));
        let (weights, bits_per_weight) = (1, 4.0);
        let row = TensorRow {
            name,
            kind,
            layer,
            type_name: "q4_0".into(),
            bits_per_weight,
            weights,
            relative_error: 0.1,
            weighted_error: None,
        };
        let file = FileFacts { name: "x".into(), size: 1, type_name: "Q4_0".into(), bits_per_weight, weights };
        let windows = Windows::new(6, 3, None).unwrap();
        let mut m = ModelReport::new(file, &[Position::default()], Rules::Exact, windows).unwrap();
        m.tensors = vec![row];
        assert!(render(&m, 0).len() < 20_000);
    }

    #[test]
    fn the_scale_covers_its_ends() {
        let s = Scale { low: 1e-5, high: 1e-1 };
        assert_eq!((s.step(1e-5), s.step(1e-1), s.step(1.1e-3)), (0, 7, 4));
        assert!((s.edge(8) - 0.1).abs() < 1e-12);
    }
}
