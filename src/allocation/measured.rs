//! What a type costs a tensor, measured.
//!
//! One tensor of the float model at a time is rounded to nearest, to the type that an allocation would give it, and the model runs
//! from its layer on. What that costs by what was predicted for it multiplies the costs of all of the tensor's types: what the
//! prediction leaves out (outputs that depend on each other, later layers) is much the same for all of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;

use super::AllocationError;
use super::costs::TensorCosts;
use crate::calibration::CalibrationError;
use crate::calibration::collector::WeightSpec;
use crate::calibration::run::{Collect, specs};
use crate::forward::run::Head;
use crate::forward::{Activations, Hidden, Model, Runner};
use crate::gguf::{GgmlType, Metadata};
use crate::mapped::MappedFile;
use crate::source::{SourceTensor, TensorSource};
use crate::transform::TransformedSource;
use crate::tuning::head::LossHead;

/// Below this a divergence is too near to the noise of f32 to say anything.
const LEAST: f64 = 2e-6;
/// How far a measurement may move a cost: more is an accident of a few windows.
const MOST: f64 = 4.0;
/// Rows of a task.
const ROWS: usize = 64;

/// What to measure, on which text.
pub struct Job<'a> {
    pub path: &'a Path,
    pub model: &'a Model<'a>,
    pub metadata: &'a Metadata,
    /// Whole windows of `length` tokens.
    pub tokens: &'a [u32],
    pub length: usize,
    pub batch: usize,
    /// Where streams are kept meanwhile: one for each layer.
    pub state: &'a Path,
}

/// Bytes on disk that it takes meanwhile.
pub fn disk(model: &Model<'_>, tokens: usize) -> u64 {
    ((model.spec.layers + 3) * tokens * model.spec.embed * 4) as u64
}

/// Bytes of memory that it takes, with `batch` tokens going through a layer together.
pub fn memory(model: &Model<'_>, tokens: usize, batch: usize) -> u64 {
    let (tensors, n) = (model.source().tensors(), model.spec.embed);
    let largest = tensors.iter().map(SourceTensor::elements).max().unwrap_or(0);
    let table = (model.vocab * n) as u64;
    let logits = 2 * 512 * model.vocab as u64;
    // the rounded tensor, the other model's head and the float one's, streams, a layer at work
    let values = largest + table + table.min(1 << 28) + logits + 3 * (tokens * n) as u64;
    4 * values + 2 * model.layer_bytes() + Runner::batch_bytes(model, batch) + (96 << 20)
}

/// Multiplies the costs of each tensor by what its choice `picks` costs, measured by predicted. `step` is told how many of how many
/// tensors are done. Returns the measured divergence of each, where there is one.
pub fn run(
    job: &Job<'_>,
    costs: &mut [TensorCosts],
    picks: &[usize],
    step: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Option<f64>>, AllocationError> {
    let model = job.model;
    let (n, layers) = (model.spec.embed, model.spec.layers);
    let float = Float::new(job)?;
    let mut head = LossHead::new(model)?;
    let mut a = Hidden::scratch(job.state, layers + 1, float.bytes)?;
    let mut b = Hidden::scratch(job.state, layers + 2, float.bytes)?;
    let mut found = Vec::new();
    let all = costs.len();
    for (i, (costs, &pick)) in costs.iter_mut().zip(picks).enumerate() {
        // where the pick costs nothing, the smallest choice says more
        let smallest = || costs.choices.iter().filter(|c| c.nearest > 0.0).min_by_key(|c| c.bytes);
        let picked = Some(&costs.choices[pick]).filter(|c| c.nearest > 0.0);
        let Some(choice) = picked.or_else(smallest) else {
            found.push(None);
            continue;
        };
        let ty = GgmlType::from_name(&choice.ty).expect("a choice is a type");
        let index = model.source().tensors().iter().position(|t| t.name == costs.name).expect("a tensor of the model");
        let values = rounded(model.source(), index, ty, float.importance.get(&costs.name))?;
        let source = With { base: model.source(), index, values };
        let other = Model::new(job.path, &source, job.metadata)?;
        let mut runner = Runner::new(&other, job.length, Activations::F32)?;
        let of = costs.name.strip_prefix("blk.").and_then(|n| n.split_once('.')?.0.parse::<usize>().ok());
        // the first stream, that before the tensor's layer, or for the head the last one
        let first = of.unwrap_or(if costs.name == "token_embd.weight" { 0 } else { layers });
        let mut x = vec![0f32; job.tokens.len() * n];
        match of {
            None if first == 0 => runner.embed(job.tokens, &mut a)?,
            _ => {
                float.streams[first].read(0, &mut x)?;
                a.write(0, &x)?;
            }
        }
        for l in first..layers {
            runner.layer(l, &a, &mut b, job.tokens.len(), job.batch, &mut ())?;
            std::mem::swap(&mut a, &mut b);
        }
        a.read(0, &mut x)?;
        let weight = other.head(Activations::F32)?.weight;
        let kld = head.loss(&x, &float.last, &weight)? / job.tokens.len() as f64;
        if !kld.is_finite() {
            return Err(AllocationError::Measured { tensor: costs.name.clone(), ty: choice.ty.clone() });
        }
        let told = kld > LEAST;
        if told {
            let factor = (kld / choice.nearest).clamp(1.0 / MOST, MOST);
            costs.choices.iter_mut().for_each(|c| (c.cost, c.nearest) = (c.cost * factor, c.nearest * factor));
        }
        found.push(told.then_some(kld));
        step(i + 1, all);
    }
    Ok(found)
}

/// The float model's streams before each layer and after the last, and the mean squares of inputs.
struct Float {
    streams: Vec<Hidden>,
    last: Vec<f32>,
    /// By tensor; of a stack of experts one behind the other.
    importance: BTreeMap<String, Vec<Vec<f32>>>,
    bytes: u64,
}

impl Float {
    fn new(job: &Job<'_>) -> Result<Float, AllocationError> {
        let model = job.model;
        let (n, layers) = (model.spec.embed, model.spec.layers);
        let bytes = (job.tokens.len() * n * 4) as u64;
        std::fs::create_dir_all(job.state).map_err(|source| AllocationError::Io { file: job.state.into(), source })?;
        let mut streams = vec![Hidden::scratch(job.state, 0, bytes)?];
        let mut runner = Runner::new(model, job.length, Activations::F32)?;
        runner.embed(job.tokens, &mut streams[0])?;
        let mut importance = BTreeMap::new();
        let mut keep = |collect: &Collect, specs: &[WeightSpec]| {
            for s in specs {
                let all = collect.collector.moments(&s.name).unwrap_or_default();
                let squares = |m: &crate::calibration::moments::Moments| -> Vec<f32> {
                    m.mean_square().map_or_else(Vec::new, |q| q.iter().map(|v| *v as f32).collect())
                };
                importance.insert(s.name.clone(), all.iter().map(squares).collect());
            }
        };
        for l in 0..layers {
            let wanted = specs(model, l, false);
            let mut collect = Collect::tails(wanted.clone(), job.length).map_err(CalibrationError::from)?;
            let mut next = Hidden::scratch(job.state, l + 1, bytes)?;
            runner.layer(l, &streams[l], &mut next, job.tokens.len(), job.batch, &mut collect)?;
            keep(&collect, &wanted);
            streams.push(next);
        }
        let mut last = vec![0f32; job.tokens.len() * n];
        streams[layers].read(0, &mut last)?;
        let name = model.head_name().to_string();
        let wanted = vec![WeightSpec { name, columns: n, experts: None, second: false, same_as: None }];
        let mut collect = Collect::tails(wanted.clone(), job.length).map_err(CalibrationError::from)?;
        let head = Head::new(model, Activations::F32, 0)?;
        for x in last.clone().chunks_mut(job.length * n) {
            head.input(x, &mut collect)?;
        }
        keep(&collect, &wanted);
        Ok(Float { streams, last, importance, bytes })
    }
}

/// What tensor `index` is after it was rounded to `ty`.
fn rounded(
    source: &dyn TensorSource,
    index: usize,
    ty: GgmlType,
    importance: Option<&Vec<Vec<f32>>>,
) -> Result<Vec<f32>, AllocationError> {
    let t = &source.tensors()[index];
    let (n, rows) = (t.row_len() as usize, t.rows() as usize);
    let format = crate::formats::format(ty).expect("a type that can be encoded");
    let ones = vec![1f32; n];
    let each = rows / importance.map_or(1, |i| i.len().max(1));
    let mut values = vec![0f32; rows * n];
    // whole rotary heads, of one expert
    let step = ROWS.next_multiple_of(t.row_group.max(1) as usize);
    for (e, values) in values.chunks_mut(each * n).enumerate() {
        let squares = importance.and_then(|i| i.get(e)).filter(|s| s.len() == n).unwrap_or(&ones);
        values.par_chunks_mut(step * n).enumerate().try_for_each(|(i, values)| {
            let first = (e * each + i * step) as u64;
            let own = first..first + (values.len() / n) as u64;
            source.read_rows(index, own.clone(), values);
            source.release(index, own);
            let mut bytes = vec![0u8; values.len() / ty.block_len() * ty.block_bytes()];
            format
                .encode(values, n, Some(squares), &mut bytes)
                .map_err(|source| AllocationError::Format { tensor: t.name.clone(), source })?;
            format.decode(&bytes, values);
            Ok::<(), AllocationError>(())
        })?;
    }
    Ok(values)
}

/// A source with other values for one tensor.
struct With<'a> {
    base: &'a dyn TensorSource,
    index: usize,
    values: Vec<f32>,
}

impl TensorSource for With<'_> {
    fn tensors(&self) -> &[SourceTensor] {
        self.base.tensors()
    }

    fn files(&self) -> &[MappedFile] {
        self.base.files()
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        if index != self.index {
            return self.base.read_rows(index, rows, out);
        }
        let n = self.tensors()[index].row_len() as usize;
        out.copy_from_slice(&self.values[rows.start as usize * n..][..out.len()]);
    }

    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        self.base.copy_rows(index, rows, out)
    }

    fn release(&self, index: usize, rows: Range<u64>) {
        self.base.release(index, rows)
    }

    fn transformed(&self) -> Option<&TransformedSource> {
        self.base.transformed()
    }
}
