//! What a type costs a tensor, predicted.
//!
//! For a linear layer with weight `W`, rounded to `W + ΔW`, the KL divergence at a position is near
//!
//! ```text
//! ½ Σ_o E[g_o²] (ΔW H ΔWᵀ)_oo
//! ```
//!
//! with `g_o` the gradient of the loss by output `o` (labels drawn from the model itself: the Fisher information) and `H` the
//! second moment of the input; outputs are taken as independent of each other and of the input. For the embedding it is
//! `½ Σ_v p(v) e_vᵀ E[g gᵀ] e_v` with `e_v` the error of row `v` and `p(v)` how often the text has it. Errors are those of
//! nearest rounding: GPTQ lowers them by about the same factor for all types.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::AllocationError;
use crate::calibration::collector::Collector;
use crate::calibration::run::{Collect, specs};
use crate::forward::backward::{self, Fisher, Labels, Windows};
use crate::forward::layer::{FeedForward, Linear};
use crate::forward::run::Head;
use crate::forward::{Activations, Hidden, Model, Runner};
use crate::gguf::GgmlType;
use crate::linalg::{View, ViewMut, times};
use crate::rounding::factor;

/// Rows of a task.
const ROWS: usize = 64;
/// Seed of the labels that the backward pass draws.
const SEED: u64 = 1;

/// A type for a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub ty: String,
    pub bytes: u64,
    /// Predicted KL divergence.
    pub cost: f64,
}

/// What a tensor can be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorCosts {
    pub name: String,
    pub choices: Vec<Choice>,
}

/// What to predict, from which text.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens.
    pub tokens: &'a [u32],
    pub length: usize,
    pub batch: usize,
    /// Windows of the backward pass.
    pub backward: usize,
    /// Tensors and the types that each may get.
    pub candidates: Vec<(String, Vec<GgmlType>)>,
    pub state: &'a Path,
}

/// The costs of all candidates. `step` is told how many of how many steps are done.
pub fn run(job: &Job<'_>, step: &mut dyn FnMut(usize, usize)) -> Result<Vec<TensorCosts>, AllocationError> {
    let model = job.model;
    let (n, layers) = (model.spec.embed, model.spec.layers);
    let backward_steps = backward::steps(model);
    let all = backward_steps + layers + 1;
    std::fs::create_dir_all(job.state).map_err(|source| AllocationError::Io { file: job.state.into(), source })?;
    let text = &job.tokens[..job.tokens.len().min(job.backward * job.length)];
    let windows = Windows { length: job.length, batch: job.batch.min(8), first: 1 };
    let fisher =
        backward::fisher_of(model, text, windows, Labels::Sampled(SEED), Some(job.state), &mut |i| step(i, all))?;
    let bytes = (job.tokens.len() * n * 4) as u64;
    let mut streams = [Hidden::scratch(job.state, 0, bytes)?, Hidden::scratch(job.state, 1, bytes)?];
    let mut runner = Runner::new(model, job.length, Activations::F32)?;
    runner.embed(job.tokens, &mut streams[0])?;
    let mut costs = vec![embedding(job, &fisher)?];
    for l in 0..layers {
        let mut collect =
            Collect(Collector::new(specs(model, l, true)).map_err(crate::calibration::CalibrationError::from)?);
        let [a, b] = &mut streams;
        let (from, to) = if l % 2 == 0 { (&*a, b) } else { (&*b, a) };
        runner.layer(l, from, to, job.tokens.len(), job.batch, &mut collect)?;
        let layer = model.layer(l, Activations::F32)?;
        let mut linears = vec![&layer.q, &layer.k, &layer.v, &layer.o];
        if let FeedForward::Dense { gate, up, down } = &layer.ffn {
            linears.extend([gate, up, down]);
        }
        for linear in linears {
            if let Some(moments) = collect.0.moments(&linear.name).and_then(|m| m.first()) {
                let h = factor::mean_second(moments).unwrap_or_default();
                add(&mut costs, of_linear(job, linear, &h, &fisher)?);
            }
        }
        step(backward_steps + l + 1, all);
    }
    drop(runner);
    let spec = crate::calibration::collector::WeightSpec {
        name: model.head_name().to_string(),
        columns: n,
        experts: None,
        second: true,
        same_as: None,
    };
    let mut collect = Collect(Collector::new(vec![spec]).map_err(crate::calibration::CalibrationError::from)?);
    let head = Head::new(model, Activations::F32, 0)?;
    let mut x = vec![0f32; job.length * n];
    for at in (0..job.tokens.len()).step_by(job.length) {
        streams[layers % 2].read(at * n, &mut x)?;
        head.input(&mut x, &mut collect)?;
    }
    let moments = collect.0.moments(model.head_name()).and_then(|m| m.first());
    let h = moments.and_then(factor::mean_second).unwrap_or_default();
    add(&mut costs, of_linear(job, &model.head(Activations::F32)?, &h, &fisher)?);
    step(all, all);
    costs.retain(|c| !c.choices.is_empty());
    Ok(costs)
}

/// Adds costs to those of the same tensor: parts of a fused weight, a head that is the embedding.
fn add(all: &mut Vec<TensorCosts>, new: TensorCosts) {
    match all.iter_mut().find(|c| c.name == new.name) {
        Some(old) => old.choices.iter_mut().zip(new.choices).for_each(|(a, b)| a.cost += b.cost),
        None => all.push(new),
    }
}

fn types<'a>(job: &'a Job<'_>, name: &str) -> &'a [GgmlType] {
    job.candidates.iter().find(|(n, _)| n == name).map_or(&[], |(_, t)| t)
}

/// `Σ_r weight_r d_rᵀ H d_r` over rows, `d` what rounding to `ty` changes of `w` \[rows, n\].
fn error(
    name: &str,
    (w, n): (&[f32], usize),
    ty: GgmlType,
    importance: &[f32],
    h: &[f32],
    weight: impl Fn(usize) -> f64 + Sync,
) -> Result<f64, AllocationError> {
    let format = crate::formats::format(ty).expect("a type that can be encoded");
    let row_bytes = n / ty.block_len() * ty.block_bytes();
    let tasks: Result<Vec<f64>, AllocationError> = w
        .par_chunks(ROWS * n)
        .enumerate()
        .map(|(i, w)| {
            let rows = w.len() / n;
            let (mut bytes, mut d, mut hd) = (vec![0u8; rows * row_bytes], vec![0f32; rows * n], vec![0f32; rows * n]);
            format
                .encode(w, n, Some(importance), &mut bytes)
                .map_err(|source| AllocationError::Format { tensor: name.to_string(), source })?;
            format.decode(&bytes, &mut d);
            d.iter_mut().zip(w).for_each(|(d, w)| *d -= w);
            times(ViewMut::new(&mut hd, rows, n), View::new(&d, rows, n), View::new(h, n, n), 1.0);
            let row =
                |(d, hd): (&[f32], &[f32])| d.iter().zip(hd).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            Ok(d.chunks_exact(n).zip(hd.chunks_exact(n)).enumerate().map(|(r, p)| weight(i * ROWS + r) * row(p)).sum())
        })
        .collect();
    Ok(tasks?.iter().sum())
}

fn of_linear(job: &Job<'_>, l: &Linear, h: &[f64], fisher: &Fisher) -> Result<TensorCosts, AllocationError> {
    let (n, name) = (l.inputs, &l.name);
    let importance: Vec<f32> = (0..n).map(|i| h[i * n + i] as f32).collect();
    let h: Vec<f32> = h.iter().map(|v| *v as f32).collect();
    let squares = fisher.of(name).unwrap_or_default();
    // parts of a fused weight: the mean over all of its outputs
    let mean = squares.iter().sum::<f64>() / squares.len().max(1) as f64;
    let whole = squares.len() == l.outputs();
    let weight = |o: usize| 0.5 * if whole { squares[o] } else { mean };
    let choices = types(job, name).iter().map(|&ty| {
        let cost = error(name, (&l.weight, n), ty, &importance, &h, weight)?;
        Ok(Choice { ty: ty.name().into(), bytes: bytes(job, name, ty), cost })
    });
    Ok(TensorCosts { name: name.clone(), choices: choices.collect::<Result<_, AllocationError>>()? })
}

fn bytes(job: &Job<'_>, name: &str, ty: GgmlType) -> u64 {
    let tensor = job.model.source().tensors().iter().find(|t| t.name == name);
    tensor.map_or(0, |t| t.rows() * ty.row_bytes(t.row_len()).unwrap_or(0))
}

/// The embedding, each row as often as the text has it.
fn embedding(job: &Job<'_>, fisher: &Fisher) -> Result<TensorCosts, AllocationError> {
    let name = "token_embd.weight";
    let (n, vocab) = (job.model.spec.embed, job.model.vocab);
    let mut counts = vec![0u64; vocab];
    job.tokens.iter().for_each(|&t| counts[t as usize] += 1);
    let mut table = vec![0f32; vocab * n];
    job.model.embedding_rows(0, vocab, &mut table)?;
    let g: Vec<f32> = crate::linalg::unpack(&fisher.embedding, n).iter().map(|v| *v as f32).collect();
    let ones = vec![1f32; n];
    let weight = |v: usize| 0.5 * counts[v] as f64 / job.tokens.len() as f64;
    let choices = types(job, name).iter().map(|&ty| {
        let cost = error(name, (&table, n), ty, &ones, &g, weight)?;
        Ok(Choice { ty: ty.name().into(), bytes: bytes(job, name, ty), cost })
    });
    Ok(TensorCosts { name: name.into(), choices: choices.collect::<Result<_, AllocationError>>()? })
}
