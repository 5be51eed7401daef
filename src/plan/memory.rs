//! How much memory a conversion takes, stated before it starts.
//!
//! Resident memory has four parts: the program with its metadata (vocabulary, header), the importance matrix, the
//! buffers of the workers, and the mapped pages of the rows in work. Nothing grows with the size of the model but the
//! longest row group.

use super::Plan;
use crate::calibration::imatrix::Imatrix;
use crate::source::TensorSource;

/// Elements that a worker takes at a time, if rows allow.
pub const CHUNK_ELEMENTS: u64 = 1 << 18;

/// Program, libraries, thread stacks and allocator overhead, measured (docs/performance.md) and rounded up.
const BASE: u64 = 32 << 20;
/// Codebook search tables of the IQ types.
const TABLES: u64 = 16 << 20;

/// Memory of a run, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Ceiling of resident memory.
    pub peak: u64,
    /// Elements per work item.
    pub chunk: u64,
    pub threads: usize,
}

/// A ceiling that cannot be kept.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error(
    "--max-memory {limit}: this conversion needs at least {needed} even with one thread and the smallest work items",
    limit = human(*limit), needed = human(*needed)
)]
pub struct MemoryError {
    pub limit: u64,
    pub needed: u64,
}

/// Plans the workers under `limit` bytes (`None`: no limit): first smaller work items, then fewer threads.
pub fn plan(
    plan: &Plan,
    source: &dyn TensorSource,
    imatrix: Option<&Imatrix>,
    threads: usize,
    limit: Option<u64>,
) -> Result<Memory, MemoryError> {
    let mut threads = threads.max(1);
    let mut chunk = CHUNK_ELEMENTS;
    loop {
        let peak = peak(plan, source, imatrix, threads, chunk);
        match limit {
            Some(limit) if peak > limit => {
                if chunk > 1 {
                    chunk = if chunk > 1 << 12 { chunk / 2 } else { 1 };
                } else if threads > 1 {
                    (threads, chunk) = (threads - 1, CHUNK_ELEMENTS);
                } else {
                    return Err(MemoryError { limit, needed: peak });
                }
            }
            _ => return Ok(Memory { peak, chunk, threads }),
        }
    }
}

fn peak(plan: &Plan, source: &dyn TensorSource, imatrix: Option<&Imatrix>, threads: usize, chunk: u64) -> u64 {
    let item = plan
        .tensors
        .iter()
        .map(|t| {
            let s = &source.tensors()[t.source];
            let rows = rows_per_item(t.row_len(), t.rows(), s.row_group, chunk);
            let elements = rows * t.row_len();
            // f32 values, a rounding copy, output, mapped input (read ahead counts once more)
            let stored = s.stored_bytes.div_ceil(t.elements().max(1));
            elements * (4 + 4 + 2 * stored) + elements * t.bytes / t.elements().max(1) + source.scratch(t.source, rows)
        })
        .max()
        .unwrap_or(0);
    let tables = if plan.tensors.iter().any(|t| t.ty.name().starts_with("iq")) { TABLES } else { 0 };
    let importance = imatrix.map_or(0, |i| i.entries.values().map(|v| v.len() as u64 * 4).sum());
    // keys are held as values and as header bytes
    BASE + source.resident()
        + tables
        + importance
        + 4 * plan.layout.header.len() as u64
        + threads as u64 * (item + (2 << 20))
}

/// Rows of one work item: whole groups, at least one, at most `chunk` elements where that is possible.
pub fn rows_per_item(row_len: u64, rows: u64, group: u64, chunk: u64) -> u64 {
    let group = group.max(1);
    let groups = (chunk / (row_len.max(1) * group)).max(1);
    (groups * group).min(rows.max(1))
}

/// Bytes for people: `4.1 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Reads `4GiB`, `500M`, `1.5g`, `1000000`; K, M, G, T are powers of 1024 with or without `iB`.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("`{text}` is no size; try 512MiB or 4GiB")),
    };
    let value: f64 = number.parse().map_err(|_| format!("`{text}` is no size; try 512MiB or 4GiB"))?;
    Ok((value * (1u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("1.5g"), Ok(3 << 29));
        assert_eq!(parse_size("1000"), Ok(1000));
        assert!(parse_size("lots").is_err() && parse_size("").is_err() && parse_size("3 parsecs").is_err());
        assert_eq!(human(512 << 20), "512.0 MiB");
    }

    #[test]
    fn items_are_whole_groups() {
        assert_eq!(rows_per_item(4096, 4096, 128, 1 << 18), 128);
        assert_eq!(rows_per_item(4096, 4096, 1, 1 << 18), 64);
        assert_eq!(rows_per_item(64, 10, 1, 1 << 18), 10);
        assert_eq!(rows_per_item(1 << 20, 4, 1, 1), 1);
    }
}
