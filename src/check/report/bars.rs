//! The histogram of a model's KL divergence over the positions.

use std::fmt::Write;

use super::chart::{Axis, Frame, figure};
use super::number::{power_of_ten, significant};
use super::{ModelReport, Report};

/// Bins that are drawn: those that any model uses, as indexes from..to.
fn used(report: &Report) -> (usize, usize) {
    let (mut from, mut to) = (usize::MAX, 0);
    for m in &report.models {
        for (i, &count) in m.histogram.counts.iter().enumerate() {
            if count > 0 {
                (from, to) = (from.min(i), to.max(i + 1));
            }
        }
    }
    if from < to { (from, to) } else { (0, 0) }
}

/// Share of positions in a bin, percent.
fn share(m: &ModelReport, count: u64) -> f64 {
    100.0 * count as f64 / m.histogram.total().max(1) as f64
}

/// Model `i`; the axes are those of all models.
pub(super) fn render(report: &Report, i: usize) -> String {
    let Some(m) = report.models.get(i) else { return String::new() };
    let (from, to) = used(report);
    let edge = |k: usize| m.histogram.edge(k);
    let shares = report.models.iter().flat_map(|m| m.histogram.counts.iter().map(|&c| share(m, c)));
    let frame = Frame {
        x: Axis::log([10f64.powf(edge(from)), 10f64.powf(edge(to.max(from + 1)))].into_iter()),
        y: Axis::linear(shares.chain([0.0])),
        height: 240.0,
    };
    let mut body = String::new();
    for (k, &count) in m.histogram.counts.iter().enumerate() {
        if !(from..to).contains(&k) {
            continue;
        }
        let (left, top) = frame.place(10f64.powf(edge(k)), share(m, count));
        let (right, bottom) = frame.place(10f64.powf(edge(k + 1)), 0.0);
        let title = format!(
            "KLD {} to {}: {count} positions, {} %",
            significant(10f64.powf(edge(k)), 2),
            significant(10f64.powf(edge(k + 1)), 2),
            significant(share(m, count), 3)
        );
        let _ = write!(
            body,
            "<rect class=\"bar c{}\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" {}><title>{title}</title></rect>",
            i % 8,
            left + 0.5,
            (right - left - 1.0).max(0.5),
            bottom - top,
            figure(&format!("/models/{i}/histogram/counts/{k}"), &count.to_string())
        );
    }
    let (top, bottom) = (30.0, frame.corner().1);
    // on either side of their lines, which may be close together
    let percentiles = &m.summary.kld_percentiles;
    for (name, value, anchor) in [("median ", percentiles.median, "end"), (" 99 %", percentiles.p99, "start")] {
        if value > 0.0 {
            let (x, _) = frame.place(value, 0.0);
            let _ = write!(
                body,
                "<line class=\"rule\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"><title>{}: {}</title></line>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{name}</text>",
                name.trim(),
                significant(value, 3),
                top - 3.0
            );
        }
    }
    let title = format!("Histogram of the KL divergence of {}", m.file.name);
    frame.svg(&title, "KLD of a position, nats", "% of positions", 6, &body)
}

/// What the drawn bins leave out.
pub(super) fn outside(m: &ModelReport) -> String {
    let h = &m.histogram;
    let high = h.low + h.counts.len() as i32 / h.per_decade.max(1);
    let mut parts = Vec::new();
    if h.below > 0 {
        parts.push(format!("{} positions below {}", h.below, power_of_ten(h.low)));
    }
    if h.above > 0 {
        parts.push(format!("{} from {} on", h.above, power_of_ten(high)));
    }
    if parts.is_empty() { String::new() } else { format!(" Not drawn: {}.", parts.join(", ")) }
}
