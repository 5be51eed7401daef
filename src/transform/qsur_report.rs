//! Utilisation rates of many tensors as a table, as JSON and as a plot.

use std::fmt::Write;

use super::qsur::Qsur;

/// What the samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Rows of a weight.
    Weight,
    /// Inputs of a layer.
    Activation,
}

/// Figures of one tensor.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Row {
    /// GGUF name of the weight.
    pub name: String,
    pub kind: Kind,
    pub before: Qsur,
    /// After a transform, if there is one.
    pub after: Option<Qsur>,
}

/// Figures of a model.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Report {
    /// [`super::qsur::Options::damping`].
    pub damping: f64,
    pub rows: Vec<Row>,
}

/// Side of a panel of the plot, and the room around it for names.
const PANEL: f64 = 220.0;
const ROOM: f64 = 46.0;

impl Report {
    /// For people: a line for each tensor, figures as before → after.
    pub fn table(&self) -> String {
        let width = self.rows.iter().map(|r| r.name.len()).max().unwrap_or(0).max("tensor".len());
        let mut out = format!("{:width$}  {:10}  {:>5}", "tensor", "samples", "d");
        for title in ["by tensor", "by channel", "by block", "rotation"] {
            // writing to a string cannot fail
            let _ = write!(out, "  {title:>15}");
        }
        out.push_str("  paper (eq. 7)\n");
        for r in &self.rows {
            let kind = if r.kind == Kind::Weight { "weight" } else { "activation" };
            let _ = write!(out, "{:width$}  {kind:10}  {:5}", r.name, r.before.dimension);
            for figure in FIGURES {
                let after = r.after.as_ref().map(|q| format!(" → {:.4}", (figure.1)(q))).unwrap_or_default();
                let cell = format!("{:.4}{after}", (figure.1)(&r.before));
                let _ = write!(out, "  {cell:>15}");
            }
            let paper = |q: &Qsur| q.paper.map_or("-".to_string(), |p| format!("{p:.4}"));
            let _ = write!(out, "  {}", paper(&r.before));
            if let Some(after) = &r.after {
                let _ = write!(out, " → {}", paper(after));
            }
            out.push('\n');
        }
        out
    }

    /// One panel for each figure, by tensor in order, with one line before and one after; no scripts, no fonts, no links.
    pub fn svg(&self) -> String {
        let (wide, high) = (FIGURES.len() as f64 * (PANEL + ROOM) + ROOM, PANEL + 2.5 * ROOM);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {wide} {high}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{wide}\" height=\"{high}\" fill=\"#fff\"/>\n"
        );
        for (at, (title, figure)) in FIGURES.iter().enumerate() {
            let left = ROOM + at as f64 * (PANEL + ROOM);
            let _ = write!(out, "<g transform=\"translate({left} {ROOM})\"><text y=\"-10\">{title}</text>");
            for tick in 0..=4 {
                let (y, value) = (PANEL * (1.0 - f64::from(tick) / 4.0), f64::from(tick) / 4.0);
                let _ = write!(
                    out,
                    "<path d=\"M0 {y}H{PANEL}\" stroke=\"#ddd\"/><text x=\"-6\" y=\"{}\" text-anchor=\"end\" \
                     fill=\"#666\">{value}</text>",
                    y + 4.0
                );
            }
            self.line(&mut out, "#888", |r| Some(figure(&r.before)));
            self.line(&mut out, "#06c", |r| r.after.as_ref().map(figure));
            out.push_str("</g>\n");
        }
        let y = PANEL + 1.8 * ROOM;
        let n = self.rows.len();
        let _ = writeln!(
            out,
            "<text x=\"{ROOM}\" y=\"{y}\" fill=\"#666\">{n} tensors in order; <tspan fill=\"#888\">before</tspan>, \
             <tspan fill=\"#06c\">after</tspan>; 1 is a full grid; damping {:e}</text>\n</svg>",
            self.damping
        );
        out
    }

    /// Points and the line through them; each point says its tensor and value when pointed at.
    fn line(&self, out: &mut String, colour: &str, value: impl Fn(&Row) -> Option<f64>) {
        let step = PANEL / self.rows.len().saturating_sub(1).max(1) as f64;
        let (mut path, mut points) = (String::new(), String::new());
        for (i, r) in self.rows.iter().enumerate() {
            let Some(v) = value(r).filter(|v| v.is_finite()) else { continue };
            let (x, y, name) = (i as f64 * step, PANEL * (1.0 - v.clamp(0.0, 1.0)), escape(&r.name));
            let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { 'M' } else { 'L' });
            let _ = write!(
                points,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\" fill=\"{colour}\"><title>{name}: {v:.4}</title></circle>"
            );
        }
        let _ = write!(out, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\"/>{points}");
    }
}

/// A title and what it stands for.
type Figure = (&'static str, fn(&Qsur) -> f64);

/// What is shown of each tensor.
const FIGURES: [Figure; 4] = [
    ("by tensor", |q| q.tensor),
    ("by channel", |q| q.channel),
    ("by block", |q| q.block),
    ("rotation", |q| q.rotation),
];

/// Text within XML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let q = |tensor| Qsur {
            dimension: 64,
            block_len: 32,
            paper: None,
            tensor,
            channel: 0.9,
            block: 0.5,
            rotation: 0.75,
        };
        let row = |name: &str, kind, after| Row { name: name.into(), kind, before: q(0.25), after };
        let rows =
            vec![row("blk.0.attn_q.weight", Kind::Weight, Some(q(0.625))), row("a<b>&\"c\"", Kind::Activation, None)];
        Report { damping: 1e-4, rows }
    }

    #[test]
    fn columns_stand_under_their_titles() {
        let table = report().table();
        let lines: Vec<Vec<char>> = table.lines().map(|l| l.chars().collect()).collect();
        let end = |line: &[char], text: &str| {
            let line: String = line.iter().collect();
            line[..line.find(text).unwrap() + text.len()].chars().count()
        };
        assert_eq!(lines.len(), 3);
        assert_eq!(end(&lines[0], "by tensor"), end(&lines[1], "0.2500 → 0.6250"));
        assert_eq!(end(&lines[0], "by tensor"), end(&lines[2], "0.2500"));
        assert_eq!(end(&lines[0], "rotation"), end(&lines[2], "0.7500"));
        assert!(table.contains("attn_q.weight  weight         64"), "{table}");
    }

    #[test]
    fn json_has_every_figure() {
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&report()).unwrap()).unwrap();
        assert_eq!(json["rows"][0]["kind"], "weight");
        assert_eq!(json["rows"][0]["after"]["tensor"].as_f64(), Some(0.625));
        assert!(json["rows"][1]["after"].is_null() && json["rows"][0]["before"]["paper"].is_null());
    }

    #[test]
    fn the_plot_is_self_contained() {
        let svg = report().svg();
        assert_eq!(svg.matches("<circle").count(), 4 * 3);
        // half way between 0.25 and 1: a quarter above the bottom of the panel
        assert!(svg.contains("cx=\"0.0\" cy=\"165.0\"") && svg.contains("<title>blk.0.attn_q.weight: 0.2500</title>"));
        assert!(svg.contains("a&lt;b&gt;&amp;&quot;c&quot;: 0.2500"));
        assert_eq!(svg.matches("http").count(), 1, "only the name space");
        let empty = Report::default().svg();
        assert!(empty.contains("0 tensors") && !empty.contains("NaN"));
    }
}
