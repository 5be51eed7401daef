//! The page: one file, no network, no script. Charts are inline SVG, numbers carry their place in the JSON.

use std::fmt::Write;

use super::number::{bytes, count, escape};
use super::tables::data;
use super::{Report, bars, heat, lines, scatter, tables};

const STYLE: &str = include_str!("style.css");

/// A chart in its frame; nothing for an empty one.
fn chart(heading: &str, drawing: &str, caption: &str) -> String {
    if drawing.is_empty() {
        return String::new();
    }
    let caption = if caption.is_empty() { String::new() } else { format!("<figcaption>{caption}</figcaption>") };
    format!("<figure><h3>{}</h3>{drawing}{caption}</figure>", escape(heading))
}

/// A section; nothing if there is nothing in it.
fn section(heading: &str, lead: &str, inner: &str) -> String {
    if inner.is_empty() {
        return String::new();
    }
    format!("<section><h2>{heading}</h2><p class=\"lead\">{lead}</p>{inner}</section>")
}

fn facts(report: &Report) -> String {
    let run = &report.run;
    let n = |path: &str, v: usize| data(path, &v.to_string(), &count(v as u64));
    let source = if run.from_base_file { "a file of its log-probabilities (16 bits)" } else { "logits in f32" };
    let rows = [
        ("reference", format!("{} ({source})", escape(&run.reference.name))),
        (
            "text",
            format!(
                "{}, {}",
                escape(&run.text.name),
                data("/run/text/size", &run.text.size.to_string(), &bytes(run.text.size))
            ),
        ),
        ("windows", format!("{} of {} tokens", n("/run/n_chunks", run.n_chunks), n("/run/n_ctx", run.n_ctx))),
        ("scored positions", n("/run/positions", run.positions)),
        ("vocabulary", format!("{} words", n("/run/n_vocab", run.n_vocab))),
        ("activations", escape(&run.activations)),
    ];
    let mut out = String::from("<dl>");
    for (name, value) in rows {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    out += "</dl>";
    if !run.text.sha256.is_empty() {
        let _ = write!(out, "<p class=\"small\">sha256 of the text: <code>{}</code></p>", escape(&run.text.sha256));
    }
    for note in &run.notes {
        let _ = write!(out, "<p class=\"note\">{}</p>", escape(note));
    }
    out
}

const READING: &str = "<p><b>KL divergence</b> (KLD) says how far the model's probabilities of the next word are from \
the reference's, over the whole vocabulary, at one position of the text: 0 where they agree, in nats (one nat is 1.44 bits). \
Its mean is the figure to compare models by: it does not depend on luck with the words that happen to follow. As a rule of \
thumb, a mean below 0.01 is hard to notice, and above 0.1 it shows. The 99 % figure says how bad it gets at the worst position in a \
hundred.</p><p><b>Perplexity</b> is e to the mean of −ln p of the words that do follow; lower is better. \
It can be lower than the reference's by chance, so differences within the error mean nothing. <b>Same top word</b> is \
the share of positions at which both would choose the same word. <b>Δp</b> is the probability of the word that follows, model minus \
reference, in percentage points; RMS is the root of its mean square.</p><p>Errors behind ± are one standard error over positions, as \
llama-perplexity computes them. Positions of one window depend on each other, so the true ones are somewhat larger. \
<b>Relative error</b> of a tensor is ‖W − Q‖² / ‖W‖²: the share of its energy that rounding changed; weighted, each input \
counts by how strongly it is used. The <b>difference of hidden states</b> is the same ratio for the output of each \
block, with all that earlier blocks added.</p>";

/// Tables of more rows are folded.
const LONG: usize = 30;

pub(super) fn render(report: &Report) -> String {
    let mut out = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">",
    );
    let title = format!("{} against its quantized models", report.run.reference.name);
    let _ = write!(out, "<title>{}</title><style>{STYLE}</style></head><body><main>", escape(&title));
    let _ = write!(out, "<header><h1>{}</h1>{}</header>", escape(&title), facts(report));
    out +=
        &section("Models", "Each model against the reference, over all scored positions.", &tables::headline(report));
    let _ = write!(
        out,
        "<section class=\"reading\"><h2>How to read this</h2><div class=\"text\">{READING}</div></section>"
    );

    let equal = report.models.iter().any(|m| m.summary.kld.value <= 0.0);
    let zero = if equal { " Models without divergence stand on the lower edge." } else { "" };
    let mut quality = chart(
        "Size against KL divergence",
        &scatter::render(report),
        &format!("Lower and further left is better. The line joins the models that no smaller one beats.{zero}"),
    );
    quality += &chart(
        "Along the window",
        &lines::window(report),
        "Mean over all windows, by position in the window: does the difference grow with the context?",
    );
    out += &section("Quality", "", &grid(&quality)).replace("<p class=\"lead\"></p>", "");

    let mut histograms = String::new();
    for (i, m) in report.models.iter().enumerate() {
        let caption = format!("Four bins for each factor of ten.{}", escape(&bars::outside(m)));
        histograms += &chart(&m.file.name, &bars::render(report, i), &caption);
    }
    out += &section(
        "Distribution of the KL divergence",
        "How often which divergence occurs. All models have the same axes.",
        &grid(&histograms),
    );

    let mut maps = String::new();
    for (i, m) in report.models.iter().enumerate() {
        maps += &chart(&m.file.name, &heat::render(m, i), &escape(&heat::unchanged(m)));
    }
    let lead = "What rounding changed in each tensor, by layer and kind. Each map has its own scale of colours.";
    out += &section("Error of the weights", lead, &grid(&maps));
    let blocks = chart(
        "Behind each block",
        &lines::blocks(report),
        "Differences add up from block to block; a jump points at its layer.",
    );
    out += &section("Error of the hidden states", "How the difference grows through the model.", &grid(&blocks));
    if !report.models.is_empty() {
        out += &section(
            "All figures",
            "The figures that llama-perplexity prints, under its names.",
            &tables::all_figures(report),
        );
    }
    let mut tensors = String::new();
    for (i, m) in report.models.iter().enumerate().filter(|(_, m)| !m.tensors.is_empty()) {
        let open = if m.tensors.len() <= LONG { " open" } else { "" };
        let name = escape(&m.file.name);
        let _ = write!(
            tensors,
            "<details{open}><summary>{name}: {} tensors</summary>{}</details>",
            m.tensors.len(),
            tables::tensors(m, i)
        );
    }
    out += &section("Tensors", "In the order of the file.", &tensors);
    let _ = write!(
        out,
        "<footer><p>Made by {}. Formulas: docs/check.md of its sources.</p></footer>",
        escape(&report.program)
    );
    out + "</main></body></html>\n"
}

fn grid(charts: &str) -> String {
    if charts.is_empty() { String::new() } else { format!("<div class=\"grid\">{charts}</div>") }
}

#[cfg(test)]
mod tests {
    use super::STYLE;

    fn variables(block: &str) -> Vec<(String, [f64; 3])> {
        let colours =
            block.lines().filter_map(|l| l.trim().strip_prefix("--")?.trim_end_matches(';').split_once(": #"));
        colours
            .map(|(name, hex)| {
                assert_eq!(hex.len(), 6, "{name}");
                let channel = |i: usize| f64::from(u8::from_str_radix(&hex[i..i + 2], 16).unwrap()) / 255.0;
                (name.to_string(), [channel(0), channel(2), channel(4)])
            })
            .collect()
    }

    /// WCAG 2.1, relative luminance.
    fn luminance(c: [f64; 3]) -> f64 {
        let linear = |v: f64| if v <= 0.04045 { v / 12.92 } else { ((v + 0.055) / 1.055).powf(2.4) };
        0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2])
    }

    #[test]
    fn text_and_marks_stand_out_in_light_and_dark() {
        let (light, dark) = STYLE.split_once("@media (prefers-color-scheme: dark)").unwrap();
        let dark = dark.split_once("}\n}").unwrap().0;
        for (mode, block) in [("light", light), ("dark", dark)] {
            let all = variables(block);
            let get =
                |n: &str| luminance(all.iter().find(|v| v.0 == n).unwrap_or_else(|| panic!("{mode}: no --{n}")).1);
            let contrast = |a: f64, b: f64| (a.max(b) + 0.05) / (a.min(b) + 0.05);
            for ground in ["page", "card"] {
                for text in ["ink", "soft", "link"] {
                    let c = contrast(get(text), get(ground));
                    assert!(c >= 4.5, "{mode}: --{text} on --{ground} has {c:.2}");
                }
                for i in 0..8 {
                    let c = contrast(get(&format!("c{i}")), get(ground));
                    assert!(c >= 3.0, "{mode}: --c{i} on --{ground} has {c:.2}");
                }
            }
            // the scale of the maps goes one way, in steps that can be told apart
            let scale: Vec<f64> = (0..8).map(|i| get(&format!("q{i}"))).collect();
            let steps = scale.windows(2).map(|w| contrast(w[0], w[1]) * f64::from((w[1] - w[0]) as f32).signum());
            let steps: Vec<f64> = steps.collect();
            assert!(steps.iter().all(|s| s.signum() == steps[0].signum() && s.abs() > 1.15), "{mode}: {steps:?}");
        }
    }

    #[test]
    fn the_style_fetches_nothing() {
        assert!(!STYLE.contains("url(") && !STYLE.contains("@import") && !STYLE.contains('<'));
    }
}
