//! The report for a terminal: what was compared, a table of the models, all figures of each, the worst tensors.

use std::fmt::Write;

use super::Report;
use super::figures::groups;
use super::number::{bytes, significant, with_error};

/// Tensors that are named.
const WORST: usize = 8;

/// Rows of cells in columns; those from `first_right` on are numbers.
fn table(rows: &[Vec<String>], first_right: usize) -> String {
    crate::table::aligned(rows, usize::MAX, |c| c >= first_right)
}

/// A name of a file must not steer the terminal.
fn plain(s: &str) -> String {
    s.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(super) fn render(report: &Report) -> String {
    let run = &report.run;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "reference    {}{}",
        plain(&run.reference.name),
        if run.from_base_file { " (base file)" } else { "" }
    );
    let _ = writeln!(out, "text         {}, {}", plain(&run.text.name), bytes(run.text.size));
    let _ = writeln!(out, "positions    {} ({} windows of {} tokens)", run.positions, run.n_chunks, run.n_ctx);
    let _ = writeln!(out, "activations  {}", plain(&run.activations));
    for note in &run.notes {
        let _ = writeln!(out, "note         {}", plain(note));
    }
    let head = ["model", "type", "size", "bits/weight", "perplexity", "mean KLD", "99% KLD", "same top %", "RMS Δp %"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let facts = |f: &super::FileFacts| {
        vec![plain(&f.name), plain(&f.type_name), bytes(f.size), significant(f.bits_per_weight, 3)]
    };
    let mut first = facts(&run.reference);
    first.push(run.reference_perplexity.map_or("–".into(), |p| with_error(p.ppl.value, p.ppl.error)));
    rows.push(first);
    for m in &report.models {
        let s = &m.summary;
        let mut row = facts(&m.file);
        row.push(with_error(s.ppl.value, s.ppl.error));
        row.push(with_error(s.kld.value, s.kld.error));
        row.push(significant(s.kld_percentiles.p99, 3));
        row.push(with_error(100.0 * s.same_top.value, 100.0 * s.same_top.error));
        row.push(with_error(100.0 * s.p_diff_rms.value, 100.0 * s.p_diff_rms.error));
        rows.push(row);
    }
    let _ = write!(out, "\n{}", table(&rows, 2));

    let all: Vec<_> = report.models.iter().map(|m| groups(&m.summary)).collect();
    for (g, (heading, figures)) in all.first().into_iter().flatten().enumerate() {
        let mut rows = vec![vec![(*heading).to_string()]];
        rows[0].extend(report.models.iter().map(|m| plain(&m.file.name)));
        for (k, figure) in figures.iter().enumerate() {
            let mut row = vec![format!("  {}", figure.name)];
            row.extend(all.iter().map(|groups| groups[g].1[k].shown()));
            rows.push(row);
        }
        let _ = write!(out, "\n{}", table(&rows, 1));
    }
    for m in report.models.iter().filter(|m| !m.tensors.is_empty()) {
        let mut worst: Vec<_> = m.tensors.iter().filter(|t| t.relative_error > 0.0).collect();
        worst.sort_by(|a, b| b.relative_error.total_cmp(&a.relative_error));
        let mut rows =
            vec![vec![format!("largest relative errors of {}", plain(&m.file.name)), "type".into(), "error".into()]];
        for t in worst.iter().take(WORST) {
            rows.push(vec![format!("  {}", plain(&t.name)), plain(&t.type_name), significant(t.relative_error, 3)]);
        }
        let _ = write!(out, "\n{}", table(&rows, 2));
    }
    out
}
