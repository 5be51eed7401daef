//! A file of second moments: Σxxᵀ of every weight's input, for rounding with compensation and for low-rank corrections.
//!
//! A GGUF container of our own (`docs/file-format.md` has the layout): keys say which model and which text, tensors hold for
//! each weight `W` the packed lower triangle `W.second`, the tokens `W.counts` and Σx `W.in_sum`. This is the reader;
//! [`super::hessian_write`] writes. It gives one matrix at a time and refuses what is not whole, not finite, not a second
//! moment, or of another model.

use std::collections::HashMap;
use std::path::Path;

use byteorder::{ByteOrder, LittleEndian};

use crate::checkpoint::CheckpointError;
use crate::gguf::{self, Array, GgmlType, Header, TensorInfo, Value};
use crate::linalg::packed_len;
use crate::mapped::MappedFile;

pub(super) const TYPE: &str = "ostq.hessian";
pub(super) const VERSION: u32 = 1;
/// How far an element may exceed what Cauchy and Schwarz allow: f32 sums and f32 storage err by less.
const SLACK: f64 = 1e-3;

/// Where second moments come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origin {
    /// [`super::fingerprint::fingerprint`] of the model.
    pub fingerprint: String,
    /// Tokens of text that went through the model.
    pub tokens: u64,
    /// Names and sha256 of the texts.
    pub texts: Vec<(String, String)>,
}

/// A weight as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct HessianEntry {
    pub columns: usize,
    /// Experts of a stacked weight.
    pub experts: Option<usize>,
    /// Tokens, by expert.
    pub counts: Vec<u64>,
    /// Bytes of the file where `counts`, `second` and `in_sum` begin.
    stored_counts: usize,
    second: usize,
    in_sum: usize,
}

/// An open file.
#[derive(Debug)]
pub struct HessianFile {
    file: MappedFile,
    pub origin: Origin,
    entries: HashMap<String, HessianEntry>,
    shared: HashMap<String, String>,
    names: Vec<String>,
}

impl HessianFile {
    /// Opens `path` and checks everything but the values.
    pub fn open(path: &Path) -> Result<HessianFile, CheckpointError> {
        let file = MappedFile::open(path).map_err(|e| CheckpointError::io(path, e))?;
        let header = gguf::read(file.bytes()).map_err(|e| CheckpointError::file(path, e.to_string()))?;
        if header.big_endian {
            return Err(CheckpointError::file(path, "a big-endian file; second moments are little-endian"));
        }
        let (origin, shared) = keys(path, &header)?;
        let mut entries = HashMap::new();
        let mut names = Vec::new();
        let by_name: HashMap<&str, &TensorInfo> = header.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        for t in &header.tensors {
            let Some(name) = t.name.strip_suffix(".second") else {
                let base = [".counts", ".in_sum"].iter().find_map(|s| t.name.strip_suffix(s));
                if base.is_some_and(|b| by_name.contains_key(format!("{b}.second").as_str())) {
                    continue;
                }
                return Err(CheckpointError::tensor(path, &t.name, "does not belong to any `*.second`"));
            };
            let entry =
                entry(&by_name, name, t, file.bytes()).map_err(|why| CheckpointError::tensor(path, name, why))?;
            entries.insert(name.to_string(), entry);
            names.push(name.to_string());
        }
        for (name, owner) in &shared {
            if entries.contains_key(name) || !entries.contains_key(owner) {
                let why = format!("`{name}` is said to share the sums of `{owner}`, which the file does not bear out");
                return Err(CheckpointError::key(path, "ostq.hessian.shared", why));
            }
        }
        Ok(HessianFile { file, origin, entries, shared, names })
    }

    /// Refuses a file that was made from another model than the one with this fingerprint.
    pub fn check_model(&self, fingerprint: &str) -> Result<(), CheckpointError> {
        if self.origin.fingerprint == fingerprint {
            return Ok(());
        }
        let theirs = &self.origin.fingerprint;
        let why = format!("was made from another model: fingerprint {theirs}, this model has {fingerprint}");
        Err(CheckpointError::file(self.file.path(), format!("{why}; collect second moments of this model")))
    }

    /// Names of the weights that have sums of their own, in the order of the file.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What is stored of `weight`, of all experts: second moments, counts, sums; as in the file.
    pub(super) fn stored(&self, weight: &str) -> Result<[&[u8]; 3], CheckpointError> {
        let entry = self.find(weight, 0)?;
        let (n, experts) = (entry.columns, entry.experts.unwrap_or(1));
        let packed = packed_len(n).unwrap_or(0);
        let bytes = |at: usize, len: usize| self.file.bytes().get(at..at + len).unwrap_or_default();
        Ok([
            bytes(entry.second, packed * experts * 4),
            bytes(entry.stored_counts, experts * 8),
            bytes(entry.in_sum, n * experts * 4),
        ])
    }

    /// What the file has for `weight`, also where it shares the sums of another.
    pub fn entry(&self, weight: &str) -> Option<&HessianEntry> {
        self.entries.get(self.shared.get(weight).map_or(weight, String::as_str))
    }

    fn find(&self, weight: &str, expert: usize) -> Result<&HessianEntry, CheckpointError> {
        let fail = |why: String| CheckpointError::tensor(self.file.path(), weight, why);
        let entry = self.entry(weight).ok_or_else(|| fail("no second moment in this file".into()))?;
        if expert >= entry.counts.len() {
            return Err(fail(format!("expert {expert} is asked for, there are {}", entry.counts.len())));
        }
        Ok(entry)
    }

    /// Σxxᵀ of `weight` (of `expert`; 0 for a dense weight): packed lower triangle, row `i` at `i (i + 1) / 2`.
    ///
    /// Refused are NaN and infinities, diagonals below 0, and elements that no sum of products could have
    /// (`h_ij² > h_ii h_jj`): damage is found here, not in a factorisation.
    pub fn lower(&self, weight: &str, expert: usize) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.find(weight, expert)?;
        let n = entry.columns;
        let packed = packed_len(n).unwrap_or(0);
        let start = entry.second + expert * packed * 4;
        let bytes = self.file.bytes().get(start..start + packed * 4).unwrap_or_default();
        let mut h = vec![0f32; bytes.len() / 4];
        LittleEndian::read_f32_into(bytes, &mut h);
        self.file.release_around(start..start + packed * 4);
        let fail = |i: usize, j: usize, why: &str| {
            let why = format!("expert {expert}: the second moment is {} at {i},{j}, {why}", h[i * (i + 1) / 2 + j]);
            Err(CheckpointError::tensor(self.file.path(), weight, format!("{why}; the file is damaged")))
        };
        let mut roots = Vec::with_capacity(n);
        for i in 0..n {
            let diagonal = h[i * (i + 1) / 2 + i];
            if !(diagonal >= 0.0 && diagonal.is_finite()) {
                return fail(i, i, "no sum of squares");
            }
            if entry.counts[expert] == 0 && diagonal != 0.0 {
                return fail(i, i, "without a token");
            }
            // squares of very small activations vanish in f32, their products with others need not
            let lost = entry.counts[expert] as f64 * f64::from(f32::MIN_POSITIVE);
            roots.push((f64::from(diagonal) + lost).sqrt() * (1.0 + SLACK));
        }
        for i in 0..n {
            let row = &h[i * (i + 1) / 2..][..i];
            // false for NaN as well
            let fits = |(v, root): (&f32, &f64)| f64::from(v.abs()) <= root * roots[i];
            if let Some(j) = row.iter().zip(&roots).position(|pair| !fits(pair)) {
                return fail(i, j, "more than its diagonal allows");
            }
        }
        Ok(h)
    }

    /// [`HessianFile::lower`] as a full symmetric matrix \[columns, columns\] in f64.
    pub fn matrix(&self, weight: &str, expert: usize) -> Result<Vec<f64>, CheckpointError> {
        let h = self.lower(weight, expert)?;
        let n = self.find(weight, expert)?.columns;
        let fail = || CheckpointError::tensor(self.file.path(), weight, format!("no memory for {n} x {n} values"));
        let mut full = Vec::new();
        full.try_reserve_exact(n.checked_mul(n).ok_or_else(fail)?).map_err(|_| fail())?;
        full.resize(n * n, 0.0);
        for i in 0..n {
            for j in 0..=i {
                let v = f64::from(h[i * (i + 1) / 2 + j]);
                full[i * n + j] = v;
                full[j * n + i] = v;
            }
        }
        Ok(full)
    }

    /// Σx of `weight`, one value per column.
    pub fn sum(&self, weight: &str, expert: usize) -> Result<Vec<f64>, CheckpointError> {
        let entry = self.find(weight, expert)?;
        let start = entry.in_sum + expert * entry.columns * 4;
        let bytes = self.file.bytes().get(start..start + entry.columns * 4).unwrap_or_default();
        let mut sum = vec![0f32; bytes.len() / 4];
        LittleEndian::read_f32_into(bytes, &mut sum);
        match sum.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                let why = format!("expert {expert}: the sum of column {i} is {}; the file is damaged", sum[i]);
                Err(CheckpointError::tensor(self.file.path(), weight, why))
            }
            None => Ok(sum.into_iter().map(f64::from).collect()),
        }
    }
}

/// Names of weights by the weights they share with.
type Shared = HashMap<String, String>;

fn keys(path: &Path, header: &Header) -> Result<(Origin, Shared), CheckpointError> {
    let get = |key: &str| gguf::value::get(&header.metadata, key);
    let fail = |key: &str, why: String| CheckpointError::key(path, key, why);
    if get("general.type").and_then(Value::as_str) != Some(TYPE) {
        return Err(fail("general.type", format!("is not `{TYPE}`: not a file of second moments")));
    }
    match get("ostq.hessian.version") {
        Some(Value::U32(VERSION)) => {}
        other => {
            let why = format!("is {other:?}, this program reads {VERSION}; use the version that wrote the file");
            return Err(fail("ostq.hessian.version", why));
        }
    }
    let strings = |key: &str| match get(key) {
        Some(Value::Array(Array::Str(all))) => {
            let all = all.iter().map(|s| String::from_utf8(s.clone()));
            all.collect::<Result<Vec<_>, _>>().map_err(|_| fail(key, "is not UTF-8".into()))
        }
        _ => Err(fail(key, "is missing or no array of strings".into())),
    };
    let pairs = |key: &str, other: &str| {
        let (a, b) = (strings(key)?, strings(other)?);
        if a.len() != b.len() {
            return Err(fail(other, format!("has {} entries, `{key}` has {}", b.len(), a.len())));
        }
        Ok(a.into_iter().zip(b))
    };
    let fingerprint = get("ostq.hessian.fingerprint").and_then(Value::as_str);
    let fingerprint = fingerprint.ok_or_else(|| fail("ostq.hessian.fingerprint", "is missing or no text".into()))?;
    let Some(Value::U64(tokens)) = get("ostq.hessian.tokens") else {
        return Err(fail("ostq.hessian.tokens", "is missing or no u64".into()));
    };
    let texts = pairs("ostq.hessian.texts", "ostq.hessian.texts.sha256")?.collect();
    let shared = pairs("ostq.hessian.shared", "ostq.hessian.shared.with")?.collect();
    Ok((Origin { fingerprint: fingerprint.to_string(), tokens: *tokens, texts }, shared))
}

/// The three tensors of `name`, whose shapes must fit.
fn entry(
    by_name: &HashMap<&str, &TensorInfo>,
    name: &str,
    second: &TensorInfo,
    bytes: &[u8],
) -> Result<HessianEntry, String> {
    let find = |suffix: &str, ty: GgmlType| {
        let full = format!("{name}.{suffix}");
        let t = by_name.get(full.as_str()).ok_or_else(|| format!("`{full}` is missing"))?;
        if t.ty != ty {
            return Err(format!("`{full}` is {}, not {ty}", t.ty));
        }
        Ok(*t)
    };
    find("second", GgmlType::F32)?;
    let (counts, in_sum) = (find("counts", GgmlType::I64)?, find("in_sum", GgmlType::F32)?);
    let outer = match second.dims[..] {
        [_] => &[][..],
        [_, _] => &second.dims[1..],
        _ => return Err(format!("second has dimensions {:?}", second.dims)),
    };
    let columns = in_sum.dims.first().and_then(|&c| usize::try_from(c).ok()).filter(|&c| c > 0).unwrap_or(0);
    let fits = |t: &TensorInfo, n: Option<u64>| {
        t.dims.first().copied() == n && t.dims.get(1..) == Some(outer) && n.is_some_and(|n| n > 0)
    };
    let packed = packed_len(columns).map(|n| n as u64);
    if !(fits(second, packed) && fits(counts, Some(1)) && fits(in_sum, Some(columns as u64))) || outer == [0] {
        let dims = (&second.dims, &counts.dims, &in_sum.dims);
        return Err(format!(
            "dimensions do not fit together: second {:?}, counts {:?}, in_sum {:?}",
            dims.0, dims.1, dims.2
        ));
    }
    let stored = &bytes[counts.offset as usize..(counts.offset + counts.bytes) as usize];
    let mut values = vec![0i64; stored.len() / 8];
    LittleEndian::read_i64_into(stored, &mut values);
    let count = |&c: &i64| u64::try_from(c).map_err(|_| format!("a count is {c}"));
    Ok(HessianEntry {
        columns,
        experts: outer.first().map(|&e| e as usize),
        stored_counts: counts.offset as usize,
        counts: values.iter().map(count).collect::<Result<_, _>>()?,
        second: second.offset as usize,
        in_sum: in_sum.offset as usize,
    })
}
