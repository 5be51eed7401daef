//! Writing imatrix files, as `llama-imatrix` of llama.cpp b11434 writes them, byte for byte.
//!
//! Rules: `IMatrixCollector::save_imatrix` and `save_imatrix_legacy` of `tools/imatrix/imatrix.cpp`. For each weight `W`, in
//! the order of their names: `W.in_sum2` \[columns, experts\], `W.counts` \[1, experts\], `W.in_sum` (where there is one) and
//! `W.stats` \[12\]; trailing dimensions of 1 are not written. A legacy file holds means times calls.
//!
//! Two things are refused that llama-imatrix does: names that the suffix makes longer than GGUF allows (it cuts them, and
//! the reader no longer finds the pair), and sums that are not finite. A file gets its name only when it is complete.

use std::path::Path;

use super::CalibrationError;
use super::imatrix_stats::{self, SCHEMA};
use super::imatrix_sums::{CHUNK_COUNT, CHUNK_SIZE, DATASETS, ImatrixSums, NEXTN_LAYERS};
use crate::gguf::{self, GgmlType, Metadata, TensorSpec, Value};
use crate::output::{self, PartFile};

/// The kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `imatrix.gguf`: sums and counts, which can be added up.
    Gguf,
    /// `imatrix.dat`: means; what programs before GGUF imatrix files read (`--output-format dat`).
    Dat,
}

/// Writes `sums` to `path`. `force` replaces a file that is there.
pub fn write(path: &Path, sums: &ImatrixSums, format: Format, force: bool) -> Result<(), CalibrationError> {
    check(sums).map_err(|(name, why)| CalibrationError::tensor(path, name, why))?;
    output::check(path, &[], None, force)?;
    let mut out = match format {
        Format::Gguf => write_gguf(path, sums, force)?,
        Format::Dat => {
            let bytes = legacy(sums).map_err(|why| CalibrationError::file(path, why))?;
            let out = PartFile::create(path, bytes.len() as u64, force)?;
            out.write_at(&bytes, 0)?;
            out
        }
    };
    out.sync()?;
    Ok(out.publish()?)
}

/// Writes a part of an unfinished run: replaced if it is there, and not waited for until it is on the disk.
pub(super) fn write_part(path: &Path, sums: &ImatrixSums) -> Result<(), CalibrationError> {
    check(sums).map_err(|(name, why)| CalibrationError::tensor(path, name, why))?;
    Ok(write_gguf(path, sums, true)?.publish_unsynced()?)
}

/// Shapes fit and values are finite: what a reader will demand.
fn check(sums: &ImatrixSums) -> Result<(), (&str, String)> {
    if sums.entries.is_empty() {
        return Err(("*", "there are no sums to write: no weight was seen".into()));
    }
    for (name, s) in &sums.entries {
        let (n, experts) = (s.in_sum2.len(), s.counts.len());
        if n == 0 || experts == 0 || !n.is_multiple_of(experts) {
            return Err((name, format!("{n} sums for {experts} counts")));
        }
        if let Some(m) = s.in_sum.as_ref().map(Vec::len).filter(|&m| m != n) {
            return Err((name, format!("{m} values in in_sum, {n} in in_sum2")));
        }
        for (what, values) in [("in_sum2", Some(&s.in_sum2)), ("in_sum", s.in_sum.as_ref())] {
            let bad = values.and_then(|v| v.iter().enumerate().find(|(_, v)| !v.is_finite()));
            if let Some((i, value)) = bad {
                return Err((name, format!("{what} holds {value} at column {i}; quantizers refuse such a file")));
            }
        }
    }
    Ok(())
}

fn metadata(sums: &ImatrixSums) -> Metadata {
    let mut keys: Metadata = vec![
        ("general.type".into(), "imatrix".into()),
        (DATASETS.into(), Value::strs(&sums.datasets)),
        (CHUNK_COUNT.into(), Value::U32(sums.chunk_count)),
        (CHUNK_SIZE.into(), Value::U32(sums.tokens_per_chunk())),
    ];
    if sums.nextn_layers > 0 {
        keys.push((NEXTN_LAYERS.into(), Value::U32(sums.nextn_layers)));
    }
    keys.push(("imatrix.stats_schema".into(), Value::strs(SCHEMA)));
    keys
}

fn write_gguf(path: &Path, sums: &ImatrixSums, force: bool) -> Result<PartFile, CalibrationError> {
    if sums.legacy {
        return Err(CalibrationError::file(path, "these are sums of a legacy file; add them to others first"));
    }
    let statistics = imatrix_stats::statistics(sums);
    let mut specs = Vec::new();
    for (name, s) in &sums.entries {
        let experts = s.counts.len() as u64;
        let columns = s.in_sum2.len() as u64 / experts;
        let mut add = |suffix: &str, dims: [u64; 2]| {
            // ggml_n_dims: trailing ones are not dimensions
            let dims = if dims[1] > 1 { dims.to_vec() } else { vec![dims[0]] };
            specs.push(TensorSpec { name: format!("{name}.{suffix}"), dims, ty: GgmlType::F32 });
        };
        add("in_sum2", [columns, experts]);
        add("counts", [1, experts]);
        if s.in_sum.is_some() {
            add("in_sum", [columns, experts]);
        }
        add("stats", [SCHEMA.len() as u64, 1]);
    }
    let layout =
        gguf::layout(&metadata(sums), &specs, false).map_err(|e| CalibrationError::file(path, e.reason.clone()))?;
    let out = PartFile::create(path, layout.file_size, force)?;
    out.write_at(&layout.header, 0)?;
    let mut places = layout.tensors.iter();
    let mut put = |values: &mut dyn Iterator<Item = f32>| {
        let (offset, len) = places.next().copied().unwrap_or_default();
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        debug_assert_eq!(bytes.len() as u64, len);
        out.write_at(&bytes, offset)
    };
    for (name, s) in &sums.entries {
        put(&mut s.in_sum2.iter().copied())?;
        put(&mut s.counts.iter().map(|&c| c as f32))?;
        if let Some(in_sum) = &s.in_sum {
            put(&mut in_sum.iter().copied())?;
        }
        let values = statistics.get(name.as_str()).map(|s| s.values()).unwrap_or_default();
        put(&mut values.into_iter())?;
    }
    Ok(out)
}

/// The bytes of a `.dat` file. Weights that saw no token are left out, experts that saw none count as 1.0.
fn legacy(sums: &ImatrixSums) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let number = |out: &mut Vec<u8>, n: i64, what: &str| {
        let n = i32::try_from(n).map_err(|_| format!("{what}: {n} is too large for a legacy file; write GGUF"))?;
        out.extend(n.to_le_bytes());
        Ok::<(), String>(())
    };
    let chunk = i64::from(sums.tokens_per_chunk());
    let seen = || sums.entries.iter().filter(|(_, s)| s.counts.iter().any(|&c| c != 0));
    number(&mut out, seen().count() as i64, "entries")?;
    for (name, s) in seen() {
        number(&mut out, name.len() as i64, name)?;
        out.extend(name.as_bytes());
        let most = s.counts.iter().copied().max().unwrap_or(0);
        // whole chunks, rounded up so that there is at least one
        let calls = if sums.legacy { most } else { most.saturating_add(chunk - 1) / chunk };
        number(&mut out, calls, name)?;
        number(&mut out, s.in_sum2.len() as i64, name)?;
        for (row, &count) in s.in_sum2.chunks(s.in_sum2.len() / s.counts.len()).zip(&s.counts) {
            for &value in row {
                let (value, count) = if count == 0 { (1.0, 1.0) } else { (value, count as f32) };
                out.extend(((value / count) * calls as f32).to_le_bytes());
            }
        }
    }
    number(&mut out, sums.chunk_count.into(), "chunks")?;
    let dataset = sums.datasets.last().map_or("", String::as_str);
    number(&mut out, dataset.len() as i64, "the name of the dataset")?;
    out.extend(dataset.as_bytes());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::imatrix_sums::Sums;
    use super::*;

    fn sums() -> ImatrixSums {
        let dense = Sums { in_sum2: vec![256.0, 512.0], counts: vec![256], in_sum: Some(vec![1.0, -1.0]) };
        let experts = Sums { in_sum2: vec![6.0, 3.0, 0.0, 0.0], counts: vec![3, 0], in_sum: Some(vec![1.0; 4]) };
        let unseen = Sums { in_sum2: vec![0.0; 2], counts: vec![0], in_sum: Some(vec![0.0; 2]) };
        let entries = [("blk.0.a.weight", dense), ("blk.0.b_exps.weight", experts), ("blk.0.c.weight", unseen)];
        ImatrixSums {
            entries: entries.map(|(n, s)| (n.to_string(), s)).into(),
            datasets: vec!["one.txt".into(), "two.txt".into()],
            chunk_count: 2,
            chunk_size: 128,
            ..ImatrixSums::default()
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imatrix.gguf");
        write(&path, &sums(), Format::Gguf, false).unwrap();
        assert_eq!(ImatrixSums::load(&path).unwrap(), sums());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the file");
        let error = write(&path, &sums(), Format::Gguf, false).unwrap_err();
        assert!(error.to_string().contains("--force"), "{error}");
        let mut other = sums();
        other.nextn_layers = 1;
        write(&path, &other, Format::Gguf, true).unwrap();
        assert_eq!(ImatrixSums::load(&path).unwrap(), other);
    }

    #[test]
    fn a_legacy_file_holds_means_times_calls() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imatrix.dat");
        write(&path, &sums(), Format::Dat, false).unwrap();
        let back = ImatrixSums::load(&path).unwrap();
        assert!(back.legacy);
        assert_eq!((back.chunk_count, &back.datasets[..]), (2, &["two.txt".to_string()][..]));
        let entry = |in_sum2: &[f32], calls| Sums { in_sum2: in_sum2.to_vec(), counts: vec![calls], in_sum: None };
        let exact = [
            ("blk.0.a.weight".to_string(), entry(&[2.0, 4.0], 2)),
            ("blk.0.b_exps.weight".to_string(), entry(&[2.0, 1.0, 1.0, 1.0], 1)),
        ];
        assert_eq!(back.entries, exact.into(), "the weight without tokens is left out");
        let importance = |s: ImatrixSums| crate::calibration::imatrix::Imatrix::from(s).entries;
        let means = importance(sums());
        for (name, values) in importance(back) {
            assert_eq!(values, means[&name], "{name}");
        }
    }

    #[test]
    fn what_no_reader_would_take_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("imatrix.gguf");
        let fails = |change: &dyn Fn(&mut ImatrixSums), text: &str| {
            let mut s = sums();
            change(&mut s);
            for format in [Format::Gguf, Format::Dat] {
                let error = write(&path, &s, format, false).unwrap_err().to_string();
                assert!(error.contains(text) && error.contains("imatrix.gguf"), "{error}");
                if text.contains("at most") {
                    break; // a limit of GGUF
                }
            }
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        };
        fn first(s: &mut ImatrixSums) -> &mut Sums {
            s.entries.get_mut("blk.0.a.weight").unwrap()
        }
        fails(&|s| first(s).in_sum2[1] = f32::NAN, "`blk.0.a.weight`: in_sum2 holds NaN at column 1");
        fails(&|s| first(s).counts.clear(), "2 sums for 0 counts");
        fails(&|s| first(s).in_sum = Some(vec![]), "0 values in in_sum, 2 in in_sum2");
        fails(&|s| s.entries.clear(), "no weight was seen");
        let long = format!("blk.0.{}.weight", "x".repeat(45));
        fails(
            &move |s| {
                let entry = s.entries.remove("blk.0.a.weight").unwrap();
                s.entries.insert(long.clone(), entry);
            },
            "at most 63",
        );
    }
}
