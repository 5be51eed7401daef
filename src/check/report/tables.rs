//! The tables of the page. Every number carries its place in the JSON (`data-path`) and its value (`data-value`).

use std::fmt::Write;

use super::chart::figure;
use super::figures::{Figure, groups};
use super::number::{bytes, count, escape, json, significant, with_error};
use super::{FileFacts, ModelReport, Report};

/// A number: what is shown, and what it is.
pub(super) fn data(path: &str, value: &str, shown: &str) -> String {
    format!("<span class=\"n\" {}>{}</span>", figure(path, value), escape(shown))
}

/// A cell that says its column's name where columns become rows (narrow screens).
fn cell(label: &str, class: &str, inner: &str) -> String {
    format!("<td class=\"{class}\" data-label=\"{}\">{inner}</td>", escape(label))
}

/// A value and its error.
fn estimate(path: &str, value: f64, error: f64, percent: bool) -> String {
    let (scale, unit) = if percent { (100.0, " %") } else { (1.0, "") };
    let shown = with_error(value * scale, error * scale);
    let (v, e) = shown.split_once(" ± ").unwrap_or((&shown, ""));
    let v = data(&format!("{path}/value"), &json(value), v);
    let e =
        if e.is_empty() { String::new() } else { format!(" ± {}", data(&format!("{path}/error"), &json(error), e)) };
    format!("<span class=\"v\">{v}{e}{unit}</span>")
}

fn facts(path: &str, f: &FileFacts) -> String {
    let name = format!("<th scope=\"row\" class=\"file\">{}</th>", escape(&f.name));
    let size = data(&format!("{path}/size"), &f.size.to_string(), &bytes(f.size));
    let bits = data(&format!("{path}/bits_per_weight"), &json(f.bits_per_weight), &significant(f.bits_per_weight, 3));
    name + &cell("type", "", &escape(&f.type_name))
        + &cell("size", "num", &size)
        + &cell("bits per weight", "num", &bits)
}

/// All models, one row each, and the reference.
pub(super) fn headline(report: &Report) -> String {
    let mut out = String::from(
        "<table class=\"cards\"><thead><tr><th scope=\"col\">model</th><th scope=\"col\">type</th>\
         <th scope=\"col\" class=\"num\">size</th><th scope=\"col\" class=\"num\">bits per weight</th>\
         <th scope=\"col\" class=\"num\">perplexity</th><th scope=\"col\" class=\"num\">mean KLD, nats</th>\
         <th scope=\"col\" class=\"num\">99 % KLD, nats</th><th scope=\"col\" class=\"num\">same top word</th>\
         <th scope=\"col\" class=\"num\">RMS Δp</th></tr></thead><tbody>",
    );
    let run = &report.run;
    let alone =
        run.reference_perplexity.map(|p| estimate("/run/reference_perplexity/ppl", p.ppl.value, p.ppl.error, false));
    let _ = write!(
        out,
        "<tr class=\"reference\">{}{}{}{}{}{}</tr>",
        facts("/run/reference", &run.reference),
        cell("perplexity", "num", alone.as_deref().unwrap_or("–")),
        cell("mean KLD, nats", "num none", "reference"),
        cell("99 % KLD, nats", "num none", "–"),
        cell("same top word", "num none", "–"),
        cell("RMS Δp", "num none", "–")
    );
    for (i, m) in report.models.iter().enumerate() {
        let (s, path) = (&m.summary, format!("/models/{i}/summary"));
        let (p99, rms) = (s.kld_percentiles.p99, s.p_diff_rms.value);
        let _ = write!(
            out,
            "<tr>{}{}{}{}{}{}</tr>",
            facts(&format!("/models/{i}/file"), &m.file),
            cell("perplexity", "num", &estimate(&format!("{path}/ppl"), s.ppl.value, s.ppl.error, false)),
            cell("mean KLD, nats", "num strong", &estimate(&format!("{path}/kld"), s.kld.value, s.kld.error, false)),
            cell(
                "99 % KLD, nats",
                "num",
                &data(&format!("{path}/kld_percentiles/p99"), &json(p99), &significant(p99, 3))
            ),
            cell(
                "same top word",
                "num",
                &estimate(&format!("{path}/same_top"), s.same_top.value, s.same_top.error, true)
            ),
            cell(
                "RMS Δp",
                "num",
                &data(&format!("{path}/p_diff_rms/value"), &json(rms), &format!("{} %", significant(100.0 * rms, 3)))
            )
        );
    }
    out + "</tbody></table>"
}

fn one(path: &str, f: &Figure) -> String {
    match (f.value, f.error) {
        (Some(v), Some(e)) => estimate(path, v, e, f.percent),
        (Some(v), None) => data(path, &json(v), &f.shown()),
        (None, _) => f.shown(),
    }
}

/// Every figure of every model.
pub(super) fn all_figures(report: &Report) -> String {
    let mut out = String::from(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"All figures\"><table><thead><tr><th scope=\"col\">figure</th>",
    );
    for m in &report.models {
        let _ = write!(out, "<th scope=\"col\" class=\"num\">{}</th>", escape(&m.file.name));
    }
    out += "</tr></thead>";
    let all: Vec<_> = report.models.iter().map(|m| groups(&m.summary)).collect();
    let Some(first) = all.first() else { return String::new() };
    for (g, (heading, figures)) in first.iter().enumerate() {
        let _ = write!(
            out,
            "<tbody><tr class=\"group\"><th scope=\"rowgroup\" colspan=\"{}\">{heading}</th></tr>",
            all.len() + 1
        );
        for (k, figure) in figures.iter().enumerate() {
            let _ = write!(out, "<tr><th scope=\"row\">{}</th>", escape(&figure.name));
            for (i, groups) in all.iter().enumerate() {
                let f = &groups[g].1[k];
                let _ = write!(out, "<td class=\"num\">{}</td>", one(&format!("/models/{i}/summary{}", f.path), f));
            }
            out += "</tr>";
        }
        out += "</tbody>";
    }
    out + "</table></div>"
}

/// The tensors of model `i`.
pub(super) fn tensors(m: &ModelReport, i: usize) -> String {
    let weighted = m.tensors.iter().any(|t| t.weighted_error.is_some());
    let mut out = String::from(
        "<table class=\"cards tensors\"><thead><tr><th scope=\"col\">tensor</th><th scope=\"col\">type</th>\
         <th scope=\"col\" class=\"num\">weights</th><th scope=\"col\" class=\"num\">bits per weight</th>\
         <th scope=\"col\" class=\"num\">relative error</th>",
    );
    if weighted {
        out += "<th scope=\"col\" class=\"num\">weighted error</th>";
    }
    out += "</tr></thead><tbody>";
    for (k, t) in m.tensors.iter().enumerate() {
        let path = |key: &str| format!("/models/{i}/tensors/{k}/{key}");
        let _ = write!(
            out,
            "<tr><th scope=\"row\" class=\"file\">{}</th>{}{}{}{}",
            escape(&t.name),
            cell("type", "", &escape(&t.type_name)),
            cell("weights", "num", &data(&path("weights"), &t.weights.to_string(), &count(t.weights))),
            cell(
                "bits per weight",
                "num",
                &data(&path("bits_per_weight"), &json(t.bits_per_weight), &significant(t.bits_per_weight, 3))
            ),
            cell(
                "relative error",
                "num",
                &data(&path("relative_error"), &json(t.relative_error), &significant(t.relative_error, 3))
            )
        );
        if weighted {
            let shown = t.weighted_error.map(|e| data(&path("weighted_error"), &json(e), &significant(e, 3)));
            out += &cell("weighted error", "num", shown.as_deref().unwrap_or("–"));
        }
        out += "</tr>";
    }
    out + "</tbody></table>"
}
