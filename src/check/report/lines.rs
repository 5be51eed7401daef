//! Lines over layers and over positions, one for each model.

use std::fmt::Write;

use super::Report;
use super::chart::{Axis, Frame, figure, legend, line_class, marker};
use super::number::{json, significant};

/// A value along the line, and where it stands in the JSON.
struct Point {
    x: f64,
    y: f64,
    path: String,
    title: String,
}

fn render(series: &[(usize, &str, Vec<Point>)], title: &str, x_title: &str, y_title: &str) -> String {
    let all = || series.iter().flat_map(|s| &s.2);
    if all().next().is_none() {
        return String::new();
    }
    let (min, max) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), p| (a.min(p.x), b.max(p.x)));
    let frame = Frame { x: Axis::whole(min, max), y: Axis::log(all().map(|p| p.y)), height: 280.0 };
    let mut body = String::new();
    for (i, name, points) in series {
        let at: Vec<String> = points
            .iter()
            .map(|p| {
                let (x, y) = frame.place(p.x, p.y);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let _ = write!(body, "<polyline class=\"{}\" points=\"{}\"/>", line_class(*i), at.join(" "));
        let size = if points.len() > 40 { 2.0 } else { 3.2 };
        for p in points {
            let title = format!("{name}, {}: {}", p.title, significant(p.y, 3));
            body += &marker(*i, frame.place(p.x, p.y), size, &figure(&p.path, &json(p.y)), &title);
        }
    }
    let names: Vec<(usize, &str)> = series.iter().filter(|s| !s.2.is_empty()).map(|s| (s.0, s.1)).collect();
    let zero = if all().any(|p| p.y <= 0.0) { "<p class=\"small\">A line on the lower edge is at 0.</p>" } else { "" };
    frame.svg(title, x_title, y_title, 8, &body) + &legend(&names) + zero
}

/// Relative difference of the hidden states behind each block; empty without rows.
pub(super) fn blocks(report: &Report) -> String {
    let series: Vec<_> = report
        .models
        .iter()
        .enumerate()
        .map(|(i, m)| {
            let point = |(k, b): (usize, &super::BlockRow)| Point {
                x: f64::from(b.layer),
                y: b.relative_difference,
                path: format!("/models/{i}/blocks/{k}/relative_difference"),
                title: format!("block {}", b.layer),
            };
            (i, m.file.name.as_str(), m.blocks.iter().enumerate().map(point).collect())
        })
        .collect();
    render(
        &series,
        "Relative difference of hidden states by block",
        "block (layer)",
        "relative difference of hidden states",
    )
}

/// Mean KL divergence along the window.
pub(super) fn window(report: &Report) -> String {
    let series: Vec<_> = report
        .models
        .iter()
        .enumerate()
        .map(|(i, m)| {
            let point = |(k, p): (usize, &super::WindowPart)| Point {
                x: (p.first + p.last) as f64 / 2.0,
                y: p.kld,
                path: format!("/models/{i}/along_window/{k}/kld"),
                title: format!("positions {} to {}", p.first, p.last),
            };
            (i, m.file.name.as_str(), m.along_window.iter().enumerate().map(point).collect())
        })
        .collect();
    render(&series, "Mean KL divergence along the window", "position in the window, tokens", "mean KLD, nats")
}
