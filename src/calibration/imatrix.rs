//! Importance matrices, as quantization uses them: a weight for every input column.
//!
//! Rules: `tools/quantize/quantize.cpp` (`prepare_imatrix`) of llama.cpp b11434. The weight of an input column is
//! `in_sum2 / count` in f32, one row per expert; a count of 0 gives 1.0 throughout. What files hold is read by
//! [`super::imatrix_sums`].

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::imatrix_sums::{ImatrixSums, Sums};
use crate::checkpoint::CheckpointError;
use crate::mapped::MappedFile;

/// Importance of every input column, by tensor name.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    /// Tensor name to columns x experts values.
    pub entries: BTreeMap<String, Vec<f32>>,
    /// The text it was collected from, where the file says so.
    pub datasets: Vec<String>,
    pub chunks: u32,
    /// Of the file.
    pub sha256: String,
}

impl Imatrix {
    /// Reads `path`, of either kind.
    pub fn load(path: &Path) -> Result<Imatrix, CheckpointError> {
        let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let refuse = |why: String| CheckpointError::file(path, why);
        let mut imatrix = Imatrix::from(ImatrixSums::parse(file.bytes()).map_err(refuse)?);
        for (name, values) in &imatrix.entries {
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(refuse(format!("entry `{name}` holds {} at column {i}", values[i])));
            }
        }
        imatrix.sha256 = hex(&Sha256::digest(file.bytes()));
        Ok(imatrix)
    }

    /// Keeps entries whose names contain one of `include` (all, if empty) and none of `exclude`.
    pub fn filter(&mut self, include: &[String], exclude: &[String]) {
        self.entries.retain(|name, _| {
            (include.is_empty() || include.iter().any(|s| name.contains(s.as_str())))
                && !exclude.iter().any(|s| name.contains(s.as_str()))
        });
    }
}

impl From<ImatrixSums> for Imatrix {
    /// Means by column. The sha256 stays empty: it is that of a file.
    fn from(sums: ImatrixSums) -> Imatrix {
        let mean = if sums.legacy { legacy_mean } else { mean };
        let entries = sums.entries.into_iter().map(|(name, s)| (name, mean(s))).collect();
        Imatrix { entries, datasets: sums.datasets, chunks: sums.chunk_count, sha256: String::new() }
    }
}

fn mean(s: Sums) -> Vec<f32> {
    let columns = s.in_sum2.len() / s.counts.len().max(1);
    let mut values = Vec::with_capacity(s.in_sum2.len());
    for (sums, &count) in s.in_sum2.chunks(columns.max(1)).zip(&s.counts) {
        let count = count as f32;
        values.extend(sums.iter().map(|&s| if count > 0.0 { s / count } else { 1.0 }));
    }
    values
}

/// Stored values are mean x calls.
fn legacy_mean(s: Sums) -> Vec<f32> {
    let calls = s.counts.first().copied().filter(|&c| c > 0).unwrap_or(1) as f32;
    s.in_sum2.into_iter().map(|v| v / calls).collect()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_values_are_divided_by_the_calls() {
        let mut b = [1i32.to_le_bytes(), 8i32.to_le_bytes()].concat();
        b.extend(b"w.weight");
        b.extend([3i32.to_le_bytes(), 2i32.to_le_bytes(), 6f32.to_le_bytes(), 3f32.to_le_bytes()].concat());
        b.extend([7i32.to_le_bytes(), 4i32.to_le_bytes()].concat());
        b.extend(b"text");
        let m = Imatrix::from(ImatrixSums::parse(&b).unwrap());
        assert_eq!(m.entries["w.weight"], [2.0, 1.0]);
        assert_eq!((m.chunks, m.datasets), (7, vec!["text".to_string()]));
    }

    #[test]
    fn an_expert_without_tokens_counts_as_one_throughout() {
        let sums = Sums { in_sum2: vec![6.0, 3.0, 0.0, 0.0], counts: vec![3, 0], in_sum: None };
        let m = Imatrix::from(ImatrixSums { entries: [("w".to_string(), sums)].into(), ..ImatrixSums::default() });
        assert_eq!(m.entries["w"], [2.0, 1.0, 1.0, 1.0]);
    }
}
