//! Writing files of second moments ([`super::hessian_file`]), one weight at a time, in any order.
//!
//! Places are known before the first sum is: while a forward pass goes through the model, each weight's sums are written
//! and dropped, and memory is that of one weight. The file gets its name when everything is written.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::CalibrationError;
use super::hessian_file::{HessianFile, Origin, TYPE, VERSION};
use super::moments::Moments;
use crate::gguf::{self, GgmlType, Layout, Metadata, TensorSpec, Value};
use crate::linalg::packed_len;
use crate::output::{self, PartFile};

/// Values that are converted at a time.
const PIECE: usize = 1 << 16;

/// A weight of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct HessianSpec {
    /// GGUF name.
    pub name: String,
    /// Input features.
    pub columns: usize,
    /// Experts of a stacked weight.
    pub experts: Option<usize>,
    /// An earlier weight with the very same input, under whose name the sums are.
    pub same_as: Option<String>,
}

impl From<&super::collector::WeightSpec> for HessianSpec {
    fn from(s: &super::collector::WeightSpec) -> HessianSpec {
        HessianSpec { name: s.name.clone(), columns: s.columns, experts: s.experts, same_as: s.same_as.clone() }
    }
}

/// A file in the making. Dropped before [`HessianWriter::finish`], it leaves nothing behind.
#[derive(Debug)]
pub struct HessianWriter {
    path: PathBuf,
    out: PartFile,
    layout: Layout,
    specs: Vec<HessianSpec>,
    /// By name: index of the spec, index of its first tensor.
    index: HashMap<String, (usize, usize)>,
    written: Vec<bool>,
}

impl HessianWriter {
    /// Lays the file out and reserves its whole size on the disk. `force` replaces a file that is there.
    pub fn create(
        path: &Path,
        specs: Vec<HessianSpec>,
        origin: &Origin,
        force: bool,
    ) -> Result<HessianWriter, CalibrationError> {
        let mut tensors = Vec::new();
        let mut index = HashMap::new();
        let (mut names, mut owners) = (Vec::new(), Vec::new());
        for (at, s) in specs.iter().enumerate() {
            let fail = |why: &str| Err(CalibrationError::tensor(path, &s.name, why));
            if s.columns == 0 || s.experts == Some(0) {
                return fail("has no columns or no experts");
            }
            if let Some(owner) = &s.same_as {
                let fits = |&(i, _): &(usize, usize)| {
                    let o: &HessianSpec = &specs[i];
                    o.same_as.is_none() && (o.columns, o.experts) == (s.columns, s.experts)
                };
                if !index.get(owner).is_some_and(fits) {
                    return fail(&format!("is said to have the input of `{owner}`, which is no such weight before it"));
                }
                names.push(s.name.clone());
                owners.push(owner.clone());
            }
            if index.insert(s.name.clone(), (at, tensors.len())).is_some() {
                return fail("appears twice");
            }
            if s.same_as.is_some() {
                continue;
            }
            let Some(packed) = packed_len(s.columns) else { return fail("has too many columns") };
            let mut add = |suffix: &str, n: usize, ty: GgmlType| {
                let dims = [Some(n as u64), s.experts.map(|e| e as u64)];
                let dims = dims.into_iter().flatten().collect();
                tensors.push(TensorSpec { name: format!("{}.{suffix}", s.name), dims, ty });
            };
            add("second", packed, GgmlType::F32);
            add("counts", 1, GgmlType::I64);
            add("in_sum", s.columns, GgmlType::F32);
        }
        let keys: Metadata = vec![
            ("general.type".into(), TYPE.into()),
            ("ostq.hessian.version".into(), Value::U32(VERSION)),
            ("ostq.hessian.fingerprint".into(), origin.fingerprint.clone().into()),
            ("ostq.hessian.tokens".into(), Value::U64(origin.tokens)),
            ("ostq.hessian.texts".into(), Value::strs(origin.texts.iter().map(|(name, _)| name))),
            ("ostq.hessian.texts.sha256".into(), Value::strs(origin.texts.iter().map(|(_, digest)| digest))),
            ("ostq.hessian.shared".into(), Value::strs(names)),
            ("ostq.hessian.shared.with".into(), Value::strs(owners)),
        ];
        let layout = gguf::layout(&keys, &tensors, false).map_err(|e| CalibrationError::file(path, e.reason))?;
        output::check(path, &[], None, force)?;
        let out = PartFile::create(path, layout.file_size, force)?;
        let written = specs.iter().map(|s| s.same_as.is_some()).collect();
        Ok(HessianWriter { path: path.to_path_buf(), out, layout, specs, index, written })
    }

    /// Size of the whole file.
    pub fn file_size(&self) -> u64 {
        self.layout.file_size
    }

    /// Writes the sums of `weight`: one for a dense weight, one for each expert of a stacked one.
    pub fn put(&mut self, weight: &str, moments: &[Moments]) -> Result<(), CalibrationError> {
        let fail = |why: String| CalibrationError::tensor(&self.path, weight, why);
        let &(at, first) = self.index.get(weight).ok_or_else(|| fail("is not one of the weights".into()))?;
        let s = &self.specs[at];
        if let Some(owner) = &s.same_as {
            return Err(fail(format!("has the sums of `{owner}`; none of its own are stored")));
        }
        let experts = s.experts.unwrap_or(1);
        if moments.len() != experts {
            return Err(fail(format!("{} sums for {experts} experts", moments.len())));
        }
        for (e, m) in moments.iter().enumerate() {
            let Some(second) = m.second().filter(|_| m.columns() == s.columns) else {
                let (has, n) = (m.second().is_some(), m.columns());
                return Err(fail(format!("expert {e}: {n} columns for {}, second moments: {has}", s.columns)));
            };
            let count = i64::try_from(m.count()).map_err(|_| fail("too many tokens".into()))?;
            let place = |i: usize, n: usize, size: usize| self.layout.tensors[first + i].0 + (e * n * size) as u64;
            self.put_f32(second, place(0, second.len(), 4)).map_err(|why| why.unwrap_or_else(fail))?;
            self.out.write_at(&count.to_le_bytes(), place(1, 1, 8))?;
            self.put_f32(m.sum(), place(2, s.columns, 4)).map_err(|why| why.unwrap_or_else(fail))?;
        }
        self.written[at] = true;
        Ok(())
    }

    /// Takes over what `file` holds for `weight`.
    pub fn copy(&mut self, weight: &str, file: &HessianFile) -> Result<(), CalibrationError> {
        let fail = |why: String| CalibrationError::tensor(&self.path, weight, why);
        let &(at, first) = self.index.get(weight).ok_or_else(|| fail("is not one of the weights".into()))?;
        let (s, entry) = (&self.specs[at], file.entry(weight));
        if s.same_as.is_some() || entry.is_none_or(|e| (e.columns, e.experts) != (s.columns, s.experts)) {
            return Err(fail("has other columns or experts there".into()));
        }
        for (i, bytes) in file.stored(weight)?.into_iter().enumerate() {
            self.out.write_at(bytes, self.layout.tensors[first + i].0)?;
        }
        self.written[at] = true;
        Ok(())
    }

    /// Writes `values` as f32 from `offset`, a piece at a time.
    fn put_f32(&self, values: &[f64], mut offset: u64) -> Result<(), Fault> {
        let mut bytes = Vec::with_capacity(4 * PIECE.min(values.len()));
        for piece in values.chunks(PIECE) {
            bytes.clear();
            for &v in piece {
                let v = v as f32;
                if !v.is_finite() {
                    return Err(Fault::Content(format!("a sum is {v} in f32; take fewer tokens")));
                }
                bytes.extend(v.to_le_bytes());
            }
            self.out.write_at(&bytes, offset).map_err(|e| Fault::Written(e.into()))?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes the header, syncs and gives the file its name. Every weight must have been put.
    pub fn finish(mut self) -> Result<(), CalibrationError> {
        if let Some(at) = self.written.iter().position(|w| !w) {
            return Err(CalibrationError::tensor(&self.path, &self.specs[at].name, "was never written"));
        }
        self.out.write_at(&self.layout.header, 0)?;
        self.out.sync()?;
        Ok(self.out.publish()?)
    }
}

/// Why a piece was not written.
enum Fault {
    Content(String),
    Written(CalibrationError),
}

impl Fault {
    fn unwrap_or_else(self, f: impl FnOnce(String) -> CalibrationError) -> CalibrationError {
        match self {
            Fault::Content(why) => f(why),
            Fault::Written(error) => error,
        }
    }
}
