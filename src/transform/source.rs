//! A source behind transforms: the weights of the transformed model, under the same GGUF names, as f32.
//!
//! Nothing is stored but the transforms themselves and the vectors of the model. Rows are read from the source behind and
//! fused in f64 when they are asked for. A writer of the stream mixes all its rows: for each portion of rows it is read once
//! from front to back, a few rows at a time, so portions are 128 rows at least ([`SourceTensor::row_group`]).

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::TransformError;
use super::anatomy::{Anatomy, Pair};
use super::ops::{Gammas, InputMap, Ops};
use super::product::add_product;
use super::set::Transforms;
use crate::gguf::{GgmlType, Metadata};
use crate::mapped::MappedFile;
use crate::source::{SourceTensor, TensorSource};

/// Rows of a writer that are made together.
const PORTION: u64 = 128;
/// Rows of a writer that are read together.
const STEP: u64 = 128;

/// How a tensor comes about.
#[derive(Debug)]
enum How {
    /// As in the source behind.
    Same(usize),
    /// Made once.
    Values(Vec<f32>),
    Matrix(usize, Box<Ops>),
}

/// Weights behind transforms.
pub struct TransformedSource {
    inner: Box<dyn TensorSource>,
    model: Anatomy,
    transforms: Arc<Transforms>,
    tensors: Vec<SourceTensor>,
    how: Vec<How>,
}

impl TransformedSource {
    /// `inner` behind `transforms`, which are checked. With a rotation of the stream a tied head gets a tensor of its own,
    /// `output.weight`, the last.
    pub fn new(
        path: &Path,
        inner: Box<dyn TensorSource>,
        metadata: &Metadata,
        transforms: Arc<Transforms>,
    ) -> Result<TransformedSource, TransformError> {
        let model = Anatomy::new(path, &*inner, metadata)?;
        transforms.check(&model)?;
        let gammas = if transforms.r_res.is_some() { gammas(&*inner, &model) } else { Gammas::default() };
        let mut this = TransformedSource { inner, model, transforms, tensors: Vec::new(), how: Vec::new() };
        for index in 0..this.inner.tensors().len() {
            this.push(index, None, &gammas);
        }
        if this.transforms.r_res.is_some() && this.model.tied {
            let embedding = this.inner.tensors().iter().position(|t| t.name == "token_embd.weight");
            this.push(embedding.expect("checked with the model"), Some("output.weight"), &gammas);
        }
        Ok(this)
    }

    fn push(&mut self, index: usize, name: Option<&str>, gammas: &Gammas) {
        let t = self.inner.tensors()[index].clone();
        let name = name.unwrap_or(&t.name).to_string();
        let rows = if t.dims.len() == 1 { t.row_len() } else { t.dims.get(1).copied().unwrap_or(1) };
        let ops = Ops::of(&name, rows as usize, &self.model, &self.transforms, gammas);
        let how = if t.dims.len() == 1 {
            match self.vector(index, &name, &ops) {
                Some(values) => How::Values(values),
                None => How::Same(index),
            }
        } else if ops.is_identity() {
            How::Same(index)
        } else {
            How::Matrix(index, Box::new(ops))
        };
        let group = match &how {
            How::Matrix(_, ops) if ops.stream => PORTION.min(rows),
            How::Matrix(_, ops) if ops.heads.is_some() => self.model.spec.head_dim as u64,
            _ => 1,
        };
        let tensor = match how {
            How::Same(_) => SourceTensor { name, ..t },
            _ => SourceTensor {
                stored: GgmlType::F32,
                origin: format!("{} (transformed)", t.origin),
                is_fp8: false,
                row_group: lcm(group, t.row_group.max(1)),
                name,
                ..t
            },
        };
        self.tensors.push(tensor);
        self.how.push(how);
    }

    /// What becomes of a norm or a bias; `None`: nothing.
    fn vector(&self, index: usize, name: &str, ops: &Ops) -> Option<Vec<f32>> {
        let t = &self.transforms;
        let layer = name.strip_prefix("blk.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
        let norm = |scales: Option<&Vec<f64>>| {
            if t.r_res.is_none() && scales.is_none() {
                return None;
            }
            let n = self.inner.tensors()[index].row_len() as usize;
            let gamma = if t.r_res.is_some() { vec![1.0; n] } else { read(&*self.inner, index) };
            Some(match scales {
                Some(s) => gamma.iter().zip(s).map(|(g, s)| g / s).collect(),
                None => gamma,
            })
        };
        let of = |layer: Option<usize>| t.layers.get(layer?);
        let part = name.rsplit_once("blk.").map_or(name, |(_, rest)| rest.split_once('.').map_or(rest, |(_, p)| p));
        let values = match part {
            "attn_norm.weight" => norm(of(layer).and_then(|l| l.s_attn.as_ref()))?,
            "ffn_norm.weight" => norm(of(layer).and_then(|l| l.s_ffn.as_ref()))?,
            "output_norm.weight" => norm(None)?,
            _ if ops.is_identity() => return None,
            _ => self.rows(ops, read(&*self.inner, index)),
        };
        Some(values.iter().map(|v| *v as f32).collect())
    }

    /// Row operations on a whole vector: for biases.
    fn rows(&self, ops: &Ops, mut w: Vec<f64>) -> Vec<f64> {
        scale_rows(&mut w, 1, 0, ops);
        if let Some(first) = ops.heads {
            self.rotate_heads(ops, 0, &mut w[first as usize..], 1);
        }
        if ops.stream {
            let (r, n) = (self.transforms.r_res.as_deref().expect("ops of these transforms"), self.model.spec.embed);
            let mut out = vec![0.0; n];
            add_product(&mut out, r, (1, n), &w, (n, 1, n));
            w = out;
        }
        w
    }

    /// `W ← R_gᵀ W` for whole heads `w` of v, the first of them KV head `head`.
    fn rotate_heads(&self, ops: &Ops, head: usize, w: &mut [f64], columns: usize) {
        let n = self.model.spec.head_dim;
        let r = self.transforms.get(Pair::Values, ops.layer).expect("ops of these transforms");
        let mut out = vec![0.0; n * columns];
        for (w, r) in w.chunks_exact_mut(n * columns).zip(r[head * n * n..].chunks_exact(n * n)) {
            out.fill(0.0);
            add_product(&mut out, r, (1, n), w, (n, columns, n));
            w.copy_from_slice(&out);
        }
    }

    /// Rows of the source behind, in f64.
    fn behind(&self, index: usize, rows: Range<u64>, columns: usize) -> Vec<f64> {
        let mut values = vec![0f32; (rows.end - rows.start) as usize * columns];
        self.inner.read_rows(index, rows, &mut values);
        values.iter().map(|v| f64::from(*v)).collect()
    }

    /// Rows of one matrix, `first` its first row and `rows` within it, before anything is done to columns.
    fn matrix_rows(&self, index: usize, ops: &Ops, first: u64, rows: Range<u64>, columns: usize) -> Vec<f64> {
        if ops.stream {
            let (r, n) = (self.transforms.r_res.as_deref().expect("ops of these transforms"), self.model.spec.embed);
            let count = (rows.end - rows.start) as usize;
            let mut out = vec![0.0; count * columns];
            for at in (0..n as u64).step_by(STEP as usize) {
                let step = at..(at + STEP).min(n as u64);
                let behind = self.behind(index, first + step.start..first + step.end, columns);
                self.inner.release(index, first + step.start..first + step.end);
                let r = &r[at as usize * n + rows.start as usize..];
                add_product(&mut out, r, (1, n), &behind, (count, columns, (step.end - step.start) as usize));
            }
            return out;
        }
        let (mut from, mut to) = (rows.start, rows.end);
        let heads = ops.heads.filter(|h| to > *h);
        if let Some(h) = heads {
            let n = self.model.spec.head_dim as u64;
            from = if from < h { from } else { h + (from - h) / n * n };
            to = h + (to - h).next_multiple_of(n);
        }
        let mut w = self.behind(index, first + from..first + to, columns);
        scale_rows(&mut w, columns, (first + from) as usize, ops);
        if let Some(h) = heads {
            let start = from.max(h);
            let head = (start - h) as usize / self.model.spec.head_dim;
            self.rotate_heads(ops, head, &mut w[(start - from) as usize * columns..], columns);
        }
        w.truncate((rows.end - from) as usize * columns);
        w.drain(..(rows.start - from) as usize * columns);
        w
    }

    /// The map of the input of weight `name`, by its name in this source; `None` where the weights of a norm that were folded
    /// into it hold a 0, or there is no such weight.
    pub fn input_map(&self, name: &str) -> Option<InputMap<'_>> {
        let index = self.tensors.iter().position(|t| t.name == name)?;
        match &self.how[index] {
            How::Matrix(_, ops) => InputMap::new(ops, &self.model, &self.transforms),
            _ => InputMap::new(&Ops::none(), &self.model, &self.transforms),
        }
    }

    /// True if a tied head got a tensor of its own.
    pub fn unties(&self) -> bool {
        self.tensors.len() > self.inner.tensors().len()
    }

    /// The weights without the transforms.
    pub fn original(&self) -> &dyn TensorSource {
        &*self.inner
    }

    /// The transforms.
    pub fn transforms(&self) -> &Arc<Transforms> {
        &self.transforms
    }
}

/// A vector of `source` in f64.
fn read(source: &dyn TensorSource, index: usize) -> Vec<f64> {
    let t = &source.tensors()[index];
    let mut values = vec![0f32; t.elements() as usize];
    source.read_rows(index, 0..t.rows(), &mut values);
    values.iter().map(|v| f64::from(*v)).collect()
}

/// The weights of every norm that a rotation of the stream folds.
fn gammas(source: &dyn TensorSource, model: &Anatomy) -> Gammas {
    let of = |name: String| Some(read(source, source.tensors().iter().position(|t| t.name == name)?));
    let all = |part: &str| (0..model.spec.layers).map(|l| of(format!("blk.{l}.{part}.weight"))).collect();
    Gammas { attention: all("attn_norm"), feed_forward: all("ffn_norm"), output: of("output_norm.weight".into()) }
}

/// Rows from row `from` (over all experts) on, times what belongs to them.
fn scale_rows(w: &mut [f64], columns: usize, from: usize, ops: &Ops) {
    if let Some(s) = &ops.rows {
        for (row, s) in w.chunks_exact_mut(columns).zip(&s[from..]) {
            row.iter_mut().for_each(|v| *v *= s);
        }
    }
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

impl TensorSource for TransformedSource {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn files(&self) -> &[MappedFile] {
        self.inner.files()
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        let (behind, ops) = match &self.how[index] {
            How::Same(i) => return self.inner.read_rows(*i, rows, out),
            How::Values(v) => return out.copy_from_slice(v),
            How::Matrix(i, ops) => (*i, ops),
        };
        let t = &self.tensors[index];
        let (columns, height) = (t.row_len() as usize, t.dims[1]);
        let (mut at, mut done) = (rows.start, 0);
        while at < rows.end && height > 0 {
            let (expert, first) = (at / height, at / height * height);
            let to = rows.end.min(first + height);
            let mut w = self.matrix_rows(behind, ops, first, at - first..to - first, columns);
            ops.columns(&mut w, columns, expert as usize, &self.model, &self.transforms);
            out[done..done + w.len()].iter_mut().zip(&w).for_each(|(o, v)| *o = *v as f32);
            (done, at) = (done + w.len(), to);
        }
    }

    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        if let How::Same(i) = self.how[index] {
            return self.inner.copy_rows(i, rows, out);
        }
        let mut values = vec![0f32; out.len() / 4];
        self.read_rows(index, rows, &mut values);
        out.as_chunks_mut::<4>().0.iter_mut().zip(&values).for_each(|(o, v)| *o = v.to_le_bytes());
    }

    fn stored_element(&self, index: usize, element: u64) -> u64 {
        match &self.how[index] {
            How::Same(i) | How::Matrix(i, _) => self.inner.stored_element(*i, element),
            How::Values(_) => element,
        }
    }

    fn release(&self, index: usize, rows: Range<u64>) {
        match &self.how[index] {
            How::Same(i) => self.inner.release(*i, rows),
            How::Matrix(i, ops) if !ops.stream => self.inner.release(*i, rows),
            _ => {}
        }
    }

    fn transformed(&self) -> Option<&TransformedSource> {
        Some(self)
    }

    fn resident(&self) -> u64 {
        let values = |h: &How| if let How::Values(v) = h { v.len() as u64 * 4 } else { 0 };
        self.inner.resident() + self.transforms.bytes() + self.how.iter().map(values).sum::<u64>()
    }

    fn scratch(&self, index: usize, rows: u64) -> u64 {
        let columns = self.tensors[index].row_len();
        match &self.how[index] {
            How::Matrix(_, ops) if ops.stream => (rows * 16 + STEP * 12) * columns,
            How::Matrix(..) => rows * columns * 24,
            _ => 0,
        }
    }
}
