//! The figures of a summary by name: what tables list, in the order of llama-perplexity.

use super::number::{significant, with_error};
use crate::check::summary::{Estimate, Percentiles, Summary};

/// A figure.
pub(super) struct Figure {
    /// As llama-perplexity calls it.
    pub name: String,
    /// Below `/models/N/summary`.
    pub path: String,
    /// Shown in percent.
    pub percent: bool,
    pub value: Option<f64>,
    pub error: Option<f64>,
}

impl Figure {
    /// For readers.
    pub(super) fn shown(&self) -> String {
        let scale = if self.percent { 100.0 } else { 1.0 };
        let unit = if self.percent { " %" } else { "" };
        match (self.value, self.error) {
            (None, _) => "–".into(),
            (Some(v), Some(e)) => with_error(v * scale, e * scale) + unit,
            (Some(v), None) => significant(v * scale, 4) + unit,
        }
    }
}

fn estimate(name: &str, key: &str, percent: bool, e: Estimate) -> Figure {
    Figure { name: name.into(), path: format!("/{key}"), percent, value: Some(e.value), error: Some(e.error) }
}

fn percentiles(what: &str, key: &str, percent: bool, p: &Percentiles) -> Vec<Figure> {
    let all = [
        ("Maximum", "max", p.max),
        ("99.9 %", "p99_9", p.p99_9),
        ("99 %", "p99", p.p99),
        ("95 %", "p95", p.p95),
        ("90 %", "p90", p.p90),
        ("75 %", "p75", p.p75),
        ("Median", "median", p.median),
        ("25 %", "p25", p.p25),
        ("10 %", "p10", p.p10),
        ("5 %", "p5", p.p5),
        ("1 %", "p1", p.p1),
        ("0.1 %", "p0_1", p.p0_1),
        ("Minimum", "min", p.min),
    ];
    all.into_iter()
        .map(|(name, sub, value)| Figure {
            name: format!("{name} {what}"),
            path: format!("/{key}/{sub}"),
            percent,
            value: Some(value),
            error: None,
        })
        .collect()
}

/// Groups of figures with their headings.
pub(super) fn groups(s: &Summary) -> Vec<(&'static str, Vec<Figure>)> {
    let correlation = Figure {
        name: "Correlation of ln PPL(Q) and ln PPL(base)".into(),
        path: "/ln_ppl_correlation".into(),
        percent: true,
        value: s.ln_ppl_correlation,
        error: None,
    };
    let perplexity = vec![
        estimate("PPL(Q)", "ppl", false, s.ppl),
        estimate("PPL(base)", "ppl_base", false, s.ppl_base),
        correlation,
        estimate("ln(PPL(Q)/PPL(base))", "ln_ppl_ratio", false, s.ln_ppl_ratio),
        estimate("PPL(Q)/PPL(base)", "ppl_ratio", false, s.ppl_ratio),
        estimate("PPL(Q)−PPL(base)", "ppl_difference", false, s.ppl_difference),
    ];
    let mut kld = vec![estimate("Mean KLD", "kld", false, s.kld)];
    kld.extend(percentiles("KLD", "kld_percentiles", false, &s.kld_percentiles));
    let mut tokens = vec![estimate("Mean Δp", "p_diff", true, s.p_diff)];
    tokens.extend(percentiles("Δp", "p_diff_percentiles", true, &s.p_diff_percentiles));
    tokens.push(estimate("RMS Δp", "p_diff_rms", true, s.p_diff_rms));
    tokens.push(estimate("Same top p", "same_top", true, s.same_top));
    vec![("Perplexity", perplexity), ("KL divergence, nats", kld), ("Probability of the next token", tokens)]
}
