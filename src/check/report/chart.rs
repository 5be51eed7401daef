//! What the charts share: scales, ticks, the frame with its axes, markers. Charts are inline SVG, 440 units wide, with
//! colours from the page's style sheet (`style.css`), so that they follow light and dark.

use std::fmt::Write;

use super::number::{escape, power_of_ten, significant};

/// Units across.
pub(super) const WIDTH: f64 = 440.0;
/// Colours, and shapes, before they repeat.
const COLOURS: usize = 8;
const SHAPES: usize = 4;

/// Values to places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    min: f64,
    max: f64,
    /// `min` and `max` are logarithms to base 10.
    log: bool,
}

impl Axis {
    /// From round number to round number around `values`. An empty or single range is widened.
    pub(super) fn linear(values: impl Iterator<Item = f64>) -> Axis {
        let (min, max) = range(values).unwrap_or((0.0, 1.0));
        let room = if max > min { 0.0 } else { (max.abs() * 0.1).max(1.0) };
        let step = step(max - min + 2.0 * room, 5);
        Axis { min: ((min - room) / step).floor() * step, max: ((max + room) / step).ceil() * step, log: false }
    }

    /// From `min` to `max` as they are.
    pub(super) fn whole(min: f64, max: f64) -> Axis {
        Axis { min, max: if max > min { max } else { min + 1.0 }, log: false }
    }

    /// Logarithmic, around the positive ones of `values`; ends at 1, 2 or 5 times a power of ten.
    pub(super) fn log(values: impl Iterator<Item = f64>) -> Axis {
        let (min, max) = range(values.filter(|v| *v > 0.0)).unwrap_or((0.1, 1.0));
        let (mut low, mut high) = (round_log(min, f64::floor), round_log(max, f64::ceil));
        if high - low < 0.25 {
            (low, high) = (round_log(min / 2.0, f64::floor), round_log(max * 2.0, f64::ceil));
        }
        Axis { min: low, max: high, log: true }
    }

    /// 0 to 1 inside the axis; what a logarithm cannot show is at 0.
    pub(super) fn place(&self, v: f64) -> f64 {
        let v = if self.log { if v > 0.0 { v.log10() } else { self.min } } else { v };
        ((v - self.min) / (self.max - self.min)).clamp(0.0, 1.0)
    }

    /// Value and label.
    pub(super) fn ticks(&self, wanted: usize) -> Vec<(f64, String)> {
        if !self.log {
            let step = step(self.max - self.min, wanted);
            let (first, last) = ((self.min / step - 1e-9).ceil() as i64, (self.max / step + 1e-9).floor() as i64);
            let decimals = (-step.log10().floor()).max(0.0) as usize;
            return (first..=last).map(|i| (i as f64 * step, format!("{:.decimals$}", i as f64 * step))).collect();
        }
        let (low, high) = ((self.min - 1e-9).ceil() as i32, (self.max + 1e-9).floor() as i32);
        let decades = (high - low).max(0) as usize;
        if self.max - self.min > 2.4 {
            let every = decades.div_ceil(wanted.max(1)).max(1);
            return (low..=high).step_by(every).map(|n| (10f64.powi(n), power_of_ten(n))).collect();
        }
        let mut out = Vec::new();
        for n in low - 1..=high {
            for m in [1.0, 2.0, 5.0] {
                let v = m * 10f64.powi(n);
                if (self.min - 1e-9..=self.max + 1e-9).contains(&v.log10()) {
                    out.push((v, significant(v, 1)));
                }
            }
        }
        out
    }
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |r, v| match r {
        None => Some((v, v)),
        Some((min, max)) => Some((f64::min(min, v), f64::max(max, v))),
    })
}

/// 1, 2 or 5 times a power of ten, so that `span` has about `n` of them.
fn step(span: f64, n: usize) -> f64 {
    let raw = (span / n.max(1) as f64).max(1e-300);
    let unit = 10f64.powf(raw.log10().floor());
    unit * [1.0, 2.0, 5.0].into_iter().find(|m| m * unit >= raw * 0.999).unwrap_or(10.0)
}

/// Logarithm of the next 1, 2 or 5 times a power of ten.
fn round_log(v: f64, round: fn(f64) -> f64) -> f64 {
    let log = v.log10();
    let whole = (log + 1e-9).floor();
    let marks = [0.0, 2f64.log10(), 5f64.log10(), 1.0].map(|m| whole + m);
    if round(0.5) == 0.0 {
        marks.into_iter().rev().find(|m| *m <= log + 1e-9).unwrap_or(whole)
    } else {
        marks.into_iter().find(|m| *m >= log - 1e-9).unwrap_or(whole + 1.0)
    }
}

/// A plot with two axes.
pub(super) struct Frame {
    pub x: Axis,
    pub y: Axis,
    pub height: f64,
}

/// Space for labels: left, right, above, below.
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const ABOVE: f64 = 30.0;
const BELOW: f64 = 46.0;

impl Frame {
    pub(super) fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let wide = WIDTH - LEFT - RIGHT;
        let high = self.height - ABOVE - BELOW;
        (LEFT + self.x.place(x) * wide, ABOVE + (1.0 - self.y.place(y)) * high)
    }

    /// Right edge and lower edge of the plot.
    pub(super) fn corner(&self) -> (f64, f64) {
        (WIDTH - RIGHT, self.height - BELOW)
    }

    /// The SVG element with axes; `body` is drawn on top. `title` is what a screen reader says.
    pub(super) fn svg(&self, title: &str, x_title: &str, y_title: &str, x_ticks: usize, body: &str) -> String {
        let mut out = open(self.height, title);
        let (right, bottom) = self.corner();
        for (v, label) in self.y.ticks(5) {
            let y = bottom - self.y.place(v) * (bottom - ABOVE);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 6.0,
                y + 4.0
            );
        }
        for (v, label) in self.x.ticks(x_ticks) {
            let x = LEFT + self.x.place(v) * (right - LEFT);
            let _ = write!(
                out,
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                bottom + 4.0,
                bottom + 18.0
            );
        }
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text class=\"label\" x=\"2\" y=\"14\">{}</text>{body}</svg>",
            (LEFT + right) / 2.0,
            self.height - 8.0,
            escape(x_title),
            escape(y_title)
        );
        out
    }
}

/// `<svg>`, not closed.
pub(super) fn open(height: f64, title: &str) -> String {
    let title = escape(title);
    format!("<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">")
}

/// A number's place in the JSON and its value, as attributes.
pub(super) fn figure(path: &str, json: &str) -> String {
    format!("data-path=\"{}\" data-value=\"{}\"", escape(path), escape(json))
}

/// The mark of model `i` at (x, y): four shapes, eight colours. `attributes` and `title` (plain text) belong to it.
pub(super) fn marker(i: usize, (x, y): (f64, f64), size: f64, attributes: &str, title: &str) -> String {
    let class = format!("mark c{}", i % COLOURS);
    let title = if title.is_empty() { String::new() } else { format!("<title>{}</title>", escape(title)) };
    let s = size;
    let points = match i % SHAPES {
        0 => {
            return format!(
                "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{s:.1}\" {attributes}>{title}</circle>"
            );
        }
        1 => vec![(-s, -s), (s, -s), (s, s), (-s, s)],
        2 => vec![(0.0, -1.3 * s), (1.2 * s, s), (-1.2 * s, s)],
        _ => vec![(0.0, -1.4 * s), (1.4 * s, 0.0), (0.0, 1.4 * s), (-1.4 * s, 0.0)],
    };
    let points: Vec<String> = points.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
    format!("<polygon class=\"{class}\" points=\"{}\" {attributes}>{title}</polygon>", points.join(" "))
}

/// Classes of the line of model `i`: colour, and dashes once colours repeat.
pub(super) fn line_class(i: usize) -> String {
    format!("line l{} d{}", i % COLOURS, (i / COLOURS) % 3)
}

/// Which mark and line is whose.
pub(super) fn legend(names: &[(usize, &str)]) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for (i, name) in names {
        let _ = write!(
            out,
            "<li><svg class=\"swatch\" viewBox=\"0 0 30 14\" aria-hidden=\"true\"><line class=\"{}\" x1=\"1\" x2=\"29\" \
             y1=\"7\" y2=\"7\"/>{}</svg>{}</li>",
            line_class(*i),
            marker(*i, (15.0, 7.0), 4.0, "", ""),
            escape(name)
        );
    }
    out + "</ul>"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: Axis, n: usize) -> Vec<String> {
        axis.ticks(n).into_iter().map(|t| t.1).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(labels(Axis::linear([3.1, 17.0].into_iter()), 5), ["0", "5", "10", "15", "20"]);
        assert_eq!(labels(Axis::linear([0.2, 0.9].into_iter()), 4), ["0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(Axis::log([3e-5, 0.7].into_iter()), 5), ["10⁻⁴", "0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(Axis::log([0.03, 0.4].into_iter()), 5), ["0.02", "0.05", "0.1", "0.2", "0.5"]);
        for axis in [Axis::log([0.1, 0.1].into_iter()), Axis::linear([7.0].into_iter()), Axis::log([0.0].into_iter())] {
            assert!(axis.ticks(5).len() >= 2, "{axis:?}");
            assert!(axis.ticks(5).iter().all(|t| (0.0..=1.0).contains(&axis.place(t.0))));
        }
        assert_eq!(Axis::log([1e-3, 1.0].into_iter()).place(0.0), 0.0);
    }
}
