//! What an imatrix file holds, as it holds it: sums and counts. Both kinds of file are read here, and added up.
//!
//! Rules: `common/imatrix-loader.cpp` (`common_imatrix_load`) and `IMatrixCollector::load_imatrix` of
//! `tools/imatrix/imatrix.cpp` of llama.cpp b11434. An unreadable file is refused with its place; nothing is allocated by
//! an unchecked number.

use std::collections::BTreeMap;
use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};

use super::collector::Collector;
use crate::checkpoint::CheckpointError;
use crate::gguf::{self, Array, GgmlType, Header, TensorInfo, Value};
use crate::mapped::MappedFile;

/// Keys of an imatrix GGUF (`LLM_KV_IMATRIX_*`).
pub const DATASETS: &str = "imatrix.datasets";
pub const CHUNK_COUNT: &str = "imatrix.chunk_count";
pub const CHUNK_SIZE: &str = "imatrix.chunk_size";
pub const NEXTN_LAYERS: &str = "imatrix.n_layer_nextn";

/// The sums of one weight. `in_sum2` and `in_sum` have columns x `counts.len()` values, one row for each expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Σx² over tokens.
    pub in_sum2: Vec<f32>,
    /// Tokens: one number for a dense weight, one for each expert of a stacked one. In a legacy file: calls.
    pub counts: Vec<i64>,
    /// Σx over tokens; legacy files have none.
    pub in_sum: Option<Vec<f32>>,
}

/// The contents of an imatrix file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImatrixSums {
    /// By name of the weight, sorted as in the file.
    pub entries: BTreeMap<String, Sums>,
    /// The text it was collected from.
    pub datasets: Vec<String>,
    pub chunk_count: u32,
    /// Tokens per chunk; 0 in legacy files.
    pub chunk_size: u32,
    /// Top layers that predict further tokens (NextN); written only above 0.
    pub nextn_layers: u32,
    /// From a `.dat` file: `in_sum2` is mean x calls, `counts` are calls.
    pub legacy: bool,
}

impl ImatrixSums {
    /// Reads `path`, of either kind. Every sum is finite.
    pub fn load(path: &Path) -> Result<ImatrixSums, CheckpointError> {
        let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let sums = ImatrixSums::parse(file.bytes()).map_err(|why| CheckpointError::file(path, why))?;
        for (name, s) in &sums.entries {
            for (what, values) in [("in_sum2", Some(&s.in_sum2)), ("in_sum", s.in_sum.as_ref())] {
                if let Some(i) = values.and_then(|v| v.iter().position(|v| !v.is_finite())) {
                    let value = values.map_or(f32::NAN, |v| v[i]);
                    return Err(CheckpointError::tensor(path, name, format!("{what} holds {value} at column {i}")));
                }
            }
        }
        Ok(sums)
    }

    /// Reads the bytes of a file of either kind; values may be NaN.
    pub fn parse(bytes: &[u8]) -> Result<ImatrixSums, String> {
        if bytes.starts_with(b"GGUF") {
            let header = gguf::read(bytes).map_err(|e| e.to_string())?;
            from_gguf(&header, bytes)
        } else {
            from_legacy(bytes).map_err(|e| format!("neither GGUF nor a legacy imatrix: {e}"))
        }
    }

    /// The sums of a forward pass over `datasets` in chunks of `chunk_size` tokens. Fails where a sum overflows f32.
    pub fn of(collector: &Collector, datasets: Vec<String>, chunk_size: u32) -> Result<ImatrixSums, String> {
        let mut this = ImatrixSums { datasets, chunk_size, ..ImatrixSums::default() };
        for spec in collector.weights() {
            let moments = collector.moments(&spec.name).unwrap_or_default();
            let mut sums = Sums { in_sum: Some(Vec::new()), ..Sums::default() };
            for m in moments {
                let count = i64::try_from(m.count()).map_err(|_| format!("`{}`: too many tokens", spec.name))?;
                sums.counts.push(count);
                sums.in_sum2.extend(m.sum2().iter().map(|&v| v as f32));
                sums.in_sum.get_or_insert_default().extend(m.sum().iter().map(|&v| v as f32));
            }
            if let Some(i) = sums.in_sum2.iter().position(|v| !v.is_finite()) {
                return Err(format!("`{}`: the sum of squares of column {i} is too large for f32", spec.name));
            }
            this.entries.insert(spec.name.clone(), sums);
        }
        this.count_chunks();
        Ok(this)
    }

    /// Adds `other`, as `llama-imatrix --in-file` does for one file after another: sums and counts add up, a single count
    /// is repeated for the experts of the other, Σx is dropped where one of the two has none, the datasets follow each
    /// other. Calls of a legacy file count `chunk_size` tokens each (that of `self`, else 512). Starts from `default()`.
    ///
    /// Returns what is worth a warning; on an error `self` is spoilt.
    pub fn add(&mut self, other: ImatrixSums) -> Result<Vec<String>, String> {
        let mut notes = Vec::new();
        if self.legacy {
            return Err("sums cannot be added to those of a legacy file; begin with `ImatrixSums::default()`".into());
        }
        let mut settle = |ours: &mut u32, theirs: u32, what: &str| {
            if *ours == 0 {
                *ours = theirs;
            } else if theirs != 0 && *ours != theirs {
                notes.push(format!("{what} differ: {theirs} and {ours}; {ours} is kept"));
            }
        };
        settle(&mut self.nextn_layers, other.nextn_layers, "NextN layers");
        settle(&mut self.chunk_size, other.chunk_size, "chunk sizes");
        let chunk = self.tokens_per_chunk();
        for (name, mut entry) in other.entries {
            if other.legacy {
                entry.in_sum2.iter_mut().for_each(|v| *v *= chunk as f32);
                for c in &mut entry.counts {
                    *c = c.checked_mul(chunk.into()).ok_or_else(|| format!("`{name}`: the count overflows"))?;
                }
            }
            match self.entries.get_mut(&name) {
                None => {
                    self.entries.insert(name, entry);
                }
                Some(ours) => add_sums(ours, &entry, other.legacy).map_err(|why| format!("`{name}`: {why}"))?,
            }
        }
        self.datasets.extend(other.datasets);
        self.count_chunks();
        Ok(notes)
    }

    /// The chunk size of the first GGUF file, else llama-imatrix's `n_ctx / n_parallel`, 512 by default (`e_chunk_size`).
    pub fn tokens_per_chunk(&self) -> u32 {
        if self.chunk_size > 0 { self.chunk_size } else { 512 }
    }

    /// Sets the number of chunks from the largest count, rounded to the nearest (`rows_to_chunks`).
    fn count_chunks(&mut self) {
        let size = i64::from(self.tokens_per_chunk());
        let most = self.entries.values().flat_map(|s| &s.counts).copied().max().unwrap_or(0).max(0);
        self.chunk_count = u32::try_from(most.saturating_add(size / 2) / size).unwrap_or(u32::MAX);
    }
}

fn add_sums(ours: &mut Sums, theirs: &Sums, legacy: bool) -> Result<(), String> {
    let (n, m) = (ours.in_sum2.len(), theirs.in_sum2.len());
    if n != m {
        return Err(format!("{m} sums cannot be added to {n}: not the same model"));
    }
    if ours.counts.len() == 1 && theirs.counts.len() > 1 {
        ours.counts = vec![ours.counts[0]; theirs.counts.len()];
    }
    // a legacy file has one count for all experts
    let one = if legacy { theirs.counts.first().copied() } else { None };
    if one.is_none() && ours.counts.len() != theirs.counts.len() {
        let (n, m) = (ours.counts.len(), theirs.counts.len());
        return Err(format!("{m} counts cannot be added to {n}: not the same experts"));
    }
    for (i, c) in ours.counts.iter_mut().enumerate() {
        let more = one.unwrap_or_else(|| theirs.counts[i]);
        *c = c.checked_add(more).ok_or("the count overflows")?;
    }
    ours.in_sum2.iter_mut().zip(&theirs.in_sum2).for_each(|(a, b)| *a += b);
    match (&mut ours.in_sum, &theirs.in_sum) {
        (Some(a), Some(b)) => a.iter_mut().zip(b).for_each(|(a, b)| *a += b),
        _ => ours.in_sum = None,
    }
    match ours.in_sum2.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(format!("the sum of squares of column {i} is too large for f32")),
        None => Ok(()),
    }
}

fn from_gguf(header: &Header, bytes: &[u8]) -> Result<ImatrixSums, String> {
    let get = |key: &str| gguf::value::get(&header.metadata, key);
    let mut out = ImatrixSums::default();
    match get(DATASETS) {
        Some(Value::Array(Array::Str(list))) => {
            out.datasets = list.iter().map(|s| String::from_utf8_lossy(s).into_owned()).collect();
        }
        Some(_) => return Err(format!("key `{DATASETS}` is not an array of strings")),
        None => return Err(format!("key `{DATASETS}` is missing: not an imatrix")),
    }
    let number = |key: &str, needed: bool| match get(key) {
        Some(Value::U32(n)) => Ok(*n),
        Some(_) => Err(format!("key `{key}` is not a u32")),
        None if needed => Err(format!("key `{key}` is missing: not an imatrix")),
        None => Ok(0),
    };
    out.chunk_count = number(CHUNK_COUNT, true)?;
    out.chunk_size = number(CHUNK_SIZE, true)?;
    out.nextn_layers = number(NEXTN_LAYERS, false)?;
    let by_name: BTreeMap<&str, &TensorInfo> = header.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let floats = |name: &str| -> Result<Option<Vec<f32>>, String> {
        let Some(t) = by_name.get(name) else { return Ok(None) };
        if t.ty != GgmlType::F32 {
            return Err(format!("tensor `{name}` is {}, not f32", t.ty));
        }
        let data = &bytes[t.offset as usize..(t.offset + t.bytes) as usize];
        Ok(Some(f32s(data)))
    };
    for t in &header.tensors {
        let lone = |suffix: &str| {
            let name = t.name.strip_suffix(suffix)?;
            (!by_name.contains_key(format!("{name}.in_sum2").as_str())).then_some(name)
        };
        if let Some(name) = lone(".counts") {
            return Err(format!("`{name}` has counts but no in_sum2"));
        }
        if let Some(name) = lone(".in_sum") {
            return Err(format!("`{name}` has in_sum but no in_sum2"));
        }
        let Some(name) = t.name.strip_suffix(".in_sum2") else { continue };
        let in_sum2 = floats(&t.name)?.ok_or("in_sum2 vanished")?;
        let counts = floats(&format!("{name}.counts"))?.ok_or_else(|| format!("`{name}` has in_sum2 but no counts"))?;
        if counts.is_empty() || in_sum2.is_empty() || !in_sum2.len().is_multiple_of(counts.len()) {
            return Err(format!("`{name}`: {} sums for {} counts", in_sum2.len(), counts.len()));
        }
        let in_sum = floats(&format!("{name}.in_sum"))?;
        if let Some(n) = in_sum.as_ref().map(Vec::len).filter(|&n| n != in_sum2.len()) {
            return Err(format!("`{name}`: {n} values in in_sum, {} in in_sum2", in_sum2.len()));
        }
        let count = |&c: &f32| match f64::from(c).round() {
            n if n.abs() < i64::MAX as f64 => Ok(n as i64),
            _ => Err(format!("`{name}`: a count is {c}, which is no number of tokens")),
        };
        let counts = counts.iter().map(count).collect::<Result<_, _>>()?;
        out.entries.insert(name.to_string(), Sums { in_sum2, counts, in_sum });
    }
    if out.entries.is_empty() {
        return Err("no tensor `*.in_sum2`: not an imatrix".into());
    }
    Ok(out)
}

/// Little-endian values.
fn f32s(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / 4];
    LittleEndian::read_f32_into(bytes, &mut values);
    values
}

struct Legacy<'a>(&'a [u8]);

impl<'a> Legacy<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        if n > self.0.len() {
            return Err(format!("{n} bytes expected, {} left", self.0.len()));
        }
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        Ok(head)
    }

    fn i32(&mut self) -> Result<i32, String> {
        Ok(i32::from_le_bytes(self.take(4)?.try_into().expect("four bytes")))
    }

    fn length(&mut self, what: &str) -> Result<usize, String> {
        let n = self.i32()?;
        usize::try_from(n).ok().filter(|&n| n >= 1).ok_or_else(|| format!("{what} is {n}"))
    }
}

fn from_legacy(bytes: &[u8]) -> Result<ImatrixSums, String> {
    let mut r = Legacy(bytes);
    let mut out = ImatrixSums { legacy: true, ..ImatrixSums::default() };
    let n = r.length("the number of entries")?;
    for i in 0..n {
        let len = r.length("the length of a name")?;
        let name = std::str::from_utf8(r.take(len)?).map_err(|_| format!("the name of entry {i} is not UTF-8"))?;
        let calls = r.i32()?;
        let len = r.length(&format!("the number of values of `{name}`"))?;
        let bytes = len.checked_mul(4).ok_or("a length overflows")?;
        let in_sum2 = f32s(r.take(bytes)?);
        let sums = Sums { in_sum2, counts: vec![calls.into()], in_sum: None };
        if out.entries.insert(name.to_string(), sums).is_some() {
            return Err(format!("entry `{name}` appears twice"));
        }
    }
    if !r.0.is_empty() {
        out.chunk_count = u32::try_from(r.i32()?).unwrap_or(0);
        let len = r.length("the length of the dataset name")?;
        out.datasets.push(String::from_utf8_lossy(r.take(len)?).into_owned());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::collector::WeightSpec;
    use super::*;

    fn gguf_file(counts: &[f32], in_sum: &[f32]) -> ImatrixSums {
        let sums = Sums {
            in_sum2: vec![4.0; 2 * counts.len()],
            counts: counts.iter().map(|&c| c as i64).collect(),
            in_sum: (!in_sum.is_empty()).then(|| in_sum.to_vec()),
        };
        let entries = [("w".to_string(), sums)].into();
        ImatrixSums { entries, datasets: vec!["a.txt".into()], chunk_size: 128, ..ImatrixSums::default() }
    }

    #[test]
    fn the_sums_of_a_pass() {
        let spec = |name: &str, experts, same_as: Option<&str>| WeightSpec {
            name: name.into(),
            columns: 2,
            experts,
            second: false,
            same_as: same_as.map(str::to_string),
        };
        let specs = vec![spec("q", None, None), spec("k", None, Some("q")), spec("a_exps", Some(2), None)];
        let mut c = Collector::new(specs).unwrap();
        c.add("q", None, &[1.0, -2.0].repeat(320), 320).unwrap();
        c.add("k", None, &[1.0, -2.0].repeat(320), 320).unwrap();
        c.add("a_exps", Some(1), &[3.0, 0.5], 1).unwrap();
        let sums = ImatrixSums::of(&c, vec!["t".into()], 128).unwrap();
        let q = Sums { in_sum2: vec![320.0, 1280.0], counts: vec![320], in_sum: Some(vec![320.0, -640.0]) };
        let in_sum = Some(vec![0.0, 0.0, 3.0, 0.5]);
        let experts = Sums { in_sum2: vec![0.0, 0.0, 9.0, 0.25], counts: vec![0, 1], in_sum };
        let exact = [("a_exps", experts), ("k", q.clone()), ("q", q)].map(|(n, s)| (n.to_string(), s));
        assert_eq!((sums.entries, sums.chunk_count), (exact.into(), 3));
        c.add("q", None, &[0.0, 1e25], 1).unwrap();
        let error = ImatrixSums::of(&c, vec![], 128).unwrap_err();
        assert_eq!(error, "`q`: the sum of squares of column 1 is too large for f32");
    }

    #[test]
    fn files_add_up_as_in_llama_imatrix() {
        let mut all = ImatrixSums::default();
        assert_eq!(all.add(gguf_file(&[256.0], &[1.0, 2.0])).unwrap(), [""; 0]);
        all.add(gguf_file(&[320.0], &[1.0, 2.0])).unwrap();
        let w = &all.entries["w"];
        assert_eq!(
            (&w.in_sum2[..], &w.counts[..], w.in_sum.as_deref()),
            (&[8.0; 2][..], &[576][..], Some(&[2.0, 4.0][..]))
        );
        // 4.5 chunks of 128
        assert_eq!((all.chunk_count, all.chunk_size, all.datasets.len()), (5, 128, 2));
        // a legacy file counts chunks, and has no sum of values
        let legacy = ImatrixSums {
            entries: [("w".to_string(), Sums { in_sum2: vec![3.0; 2], counts: vec![2], in_sum: None })].into(),
            legacy: true,
            ..ImatrixSums::default()
        };
        all.add(legacy.clone()).unwrap();
        let w = &all.entries["w"];
        assert_eq!((&w.in_sum2[..], &w.counts[..], &w.in_sum), (&[392.0; 2][..], &[832][..], &None));
        let mut first = ImatrixSums::default();
        first.add(legacy).unwrap();
        assert_eq!((first.entries["w"].counts[0], first.chunk_count, first.legacy), (1024, 2, false));
        let other = ImatrixSums { chunk_size: 512, ..gguf_file(&[1.0], &[]) };
        assert_eq!(all.add(other).unwrap(), ["chunk sizes differ: 512 and 128; 128 is kept"]);
    }

    #[test]
    fn other_shapes_are_not_added() {
        let mut all = gguf_file(&[1.0, 2.0], &[]);
        assert!(all.add(gguf_file(&[1.0], &[])).unwrap_err().contains("`w`: 2 sums cannot be added to 4"));
        let mut one_count = gguf_file(&[1.0, 2.0], &[]);
        one_count.entries.get_mut("w").unwrap().counts = vec![7];
        let mut all = one_count.clone();
        all.add(gguf_file(&[1.0, 2.0], &[])).unwrap();
        assert_eq!(all.entries["w"].counts, [8, 9]);
        assert!(all.add(one_count).unwrap_err().contains("1 counts cannot be added to 2"));
        let mut huge = gguf_file(&[1.0], &[]);
        huge.entries.get_mut("w").unwrap().in_sum2[1] = f32::MAX;
        let mut all = huge.clone();
        assert!(all.add(huge).unwrap_err().contains("column 1 is too large"));
    }

    #[test]
    fn hostile_lengths_are_refused() {
        let legacy = |name_len: i32, values: i32| {
            let mut b = [1i32.to_le_bytes(), name_len.to_le_bytes()].concat();
            b.extend(b"w.weight");
            b.extend([1i32.to_le_bytes(), values.to_le_bytes(), 1f32.to_le_bytes()].concat());
            b
        };
        assert!(from_legacy(&legacy(8, 1)).is_ok());
        for (name, values) in [(-1, 1), (i32::MAX, 1), (8, -1), (8, 0), (8, i32::MAX), (0, 1)] {
            assert!(from_legacy(&legacy(name, values)).is_err(), "{name} {values}");
        }
        assert!(from_legacy(&[255, 255, 255, 127]).is_err());
        assert!(from_legacy(&[]).is_err());
    }
}
