//! Size against KL divergence: which model is worth its bytes.

use std::fmt::Write;

use super::chart::{Axis, Frame, figure, marker};
use super::number::{bytes, escape, json, shorten, significant};
use super::{ModelReport, Report};

/// The models that no smaller or equally small one beats, by size.
pub(super) fn pareto(models: &[ModelReport]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..models.len()).collect();
    order.sort_by(|&i, &j| {
        let key = |i: usize| (models[i].file.size, models[i].summary.kld.value);
        let ((a, x), (b, y)) = (key(i), key(j));
        a.cmp(&b).then(x.total_cmp(&y))
    });
    let mut best = f64::INFINITY;
    order.retain(|&i| {
        let better = models[i].summary.kld.value < best;
        best = best.min(models[i].summary.kld.value);
        better
    });
    order
}

/// A rectangle that is taken: left, top, right, bottom.
type Box4 = (f64, f64, f64, f64);

fn overlap(a: Box4, b: Box4) -> f64 {
    let wide = a.2.min(b.2) - a.0.max(b.0);
    let high = a.3.min(b.3) - a.1.max(b.1);
    wide.max(0.0) * high.max(0.0)
}

/// Left end of a label that hits as little as may be: right of its point, left, above, below.
fn label_place((x, y): (f64, f64), width: f64, taken: &[Box4], limits: Box4) -> (f64, f64) {
    let mut best = ((x, y), f64::INFINITY);
    for (dx, dy) in [
        (9.0, 4.0),
        (-9.0 - width, 4.0),
        (-width / 2.0, -9.0),
        (-width / 2.0, 19.0),
        (6.0, -8.0),
        (-6.0 - width, -8.0),
        (6.0, 17.0),
        (-6.0 - width, 17.0),
        (-width / 2.0, -22.0),
        (-width / 2.0, 32.0),
    ] {
        let (left, base) = (x + dx, y + dy);
        let own = (left, base - 11.0, left + width, base + 3.0);
        let outside = (limits.0 - own.0).max(0.0)
            + (own.2 - limits.2).max(0.0)
            + (limits.1 - own.1).max(0.0)
            + (own.3 - limits.3).max(0.0);
        let cost = 1000.0 * outside + taken.iter().map(|t| overlap(*t, own)).sum::<f64>();
        if cost < best.1 {
            best = ((left, base), cost);
        }
    }
    best.0
}

/// The chart; empty for fewer than two models.
pub(super) fn render(report: &Report) -> String {
    let models = &report.models;
    if models.len() < 2 {
        return String::new();
    }
    let largest = models.iter().map(|m| m.file.size).max().unwrap_or(0) as f64;
    let (unit, name) = if largest >= 1e9 {
        (1e9, "GB")
    } else if largest >= 1e6 {
        (1e6, "MB")
    } else {
        (1e3, "kB")
    };
    let size = |m: &ModelReport| m.file.size as f64 / unit;
    let frame = Frame {
        // room for marks and labels at the ends
        x: Axis::linear(models.iter().flat_map(|m| [0.94 * size(m), 1.06 * size(m)])),
        y: Axis::log(models.iter().map(|m| m.summary.kld.value)),
        height: 330.0,
    };
    let at = |m: &ModelReport| frame.place(size(m), m.summary.kld.value);
    let line: Vec<String> =
        pareto(models).iter().map(|&i| at(&models[i])).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let mut body = format!("<polyline class=\"pareto\" points=\"{}\"/>", line.join(" "));
    let mut taken: Vec<Box4> = models
        .iter()
        .map(|m| {
            let (x, y) = at(m);
            (x - 6.0, y - 6.0, x + 6.0, y + 6.0)
        })
        .collect();
    let (right, bottom) = frame.corner();
    for (i, m) in models.iter().enumerate() {
        let title = format!(
            "{}: {}, {} bits per weight, mean KLD {}",
            m.file.name,
            bytes(m.file.size),
            significant(m.file.bits_per_weight, 3),
            significant(m.summary.kld.value, 3)
        );
        let path = format!("/models/{i}/summary/kld/value");
        body += &marker(i, at(m), 5.0, &figure(&path, &json(m.summary.kld.value)), &title);
        let text = shorten(if m.file.type_name.is_empty() { &m.file.name } else { &m.file.type_name }, 18);
        let width = 7.0 * text.chars().count() as f64;
        let (x, y) = label_place(at(m), width, &taken, (54.0, 24.0, right, bottom));
        taken.push((x, y - 11.0, x + width, y + 3.0));
        let _ = write!(body, "<text class=\"name\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escape(&text));
    }
    let x_title = format!("size of the file, {name}");
    frame.svg("Size of each model against its mean KL divergence", &x_title, "mean KLD, nats", 6, &body)
}
