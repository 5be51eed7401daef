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
//! nearest rounding. GPTQ lowers them, by about the same factor for all types, but by more where inputs are correlated: errors of
//! one size cost `Σ_j 1 / U_jj²` in place of `Σ_j H_jj` ([`Factor`]), and costs are multiplied by the ratio.
//!
//! Experts of a mixture have the diagonal of `H` of the tokens that are routed to them, and gradients that are 0 for all other tokens.
//! What GPTQ gains is taken to be what it gains for the router, which reads the same input.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::AllocationError;
use crate::calibration::CalibrationError;
use crate::calibration::collector::{Collector, WeightSpec};
use crate::calibration::moments::Moments;
use crate::calibration::run::{Collect, specs};
use crate::forward::backward::{self, Fisher};
use crate::forward::layer::{FeedForward, Linear};
use crate::forward::run::Head;
use crate::forward::{Activations, Hidden, Model, Runner, interrupted};
use crate::gguf::GgmlType;
use crate::linalg::{View, ViewMut, times};
use crate::rounding::Factor;
use crate::rounding::factor::mean_second;
use crate::rounding::fit::DAMPING;
use crate::rounding::run::{embedding_factor, weighs_embedding};

/// Rows of a task.
const ROWS: usize = 64;

/// A type for a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    pub ty: String,
    pub bytes: u64,
    /// Predicted KL divergence.
    pub cost: f64,
    /// The same of nearest rounding: without what GPTQ gains.
    pub nearest: f64,
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
    /// GPTQ follows.
    pub gptq: bool,
    pub state: &'a Path,
}

/// The costs of all candidates. `step` is told how many of how many steps are done.
pub fn run(job: &Job<'_>, step: &mut dyn FnMut(usize, usize)) -> Result<Vec<TensorCosts>, AllocationError> {
    let model = job.model;
    let (n, layers) = (model.spec.embed, model.spec.layers);
    let backward_steps = backward::steps(model);
    let all = backward_steps + layers + 1;
    std::fs::create_dir_all(job.state).map_err(|source| AllocationError::Io { file: job.state.into(), source })?;
    let windows = (job.backward, job.batch);
    let fisher = &backward::sample(model, job.tokens, job.length, windows, job.state, &mut |i| step(i, all))?;
    let bytes = (job.tokens.len() * n * 4) as u64;
    let mut streams = [Hidden::scratch(job.state, 0, bytes)?, Hidden::scratch(job.state, 1, bytes)?];
    let mut runner = Runner::new(model, job.length, Activations::F32)?;
    runner.embed(job.tokens, &mut streams[0])?;
    let of_table = if job.gptq { embedding_factor(model, fisher).map_or(1.0, |f| ratio(&f)) } else { 1.0 };
    let table_gain = |ty| if weighs_embedding(ty, model.tied()) { of_table } else { 1.0 };
    let mut costs = vec![embedding(job, &table_gain, fisher)?];
    for l in 0..layers {
        let mut wanted = specs(model, l, true);
        // second moments of every expert would not fit in memory
        wanted.iter_mut().filter(|w| w.experts.is_some()).for_each(|w| w.second = false);
        // without first tokens, as the rounding
        let mut collect = Collect::tails(wanted, job.length).map_err(CalibrationError::from)?;
        let [a, b] = &mut streams;
        let (from, to) = if l % 2 == 0 { (&*a, b) } else { (&*b, a) };
        runner.layer(l, from, to, job.tokens.len(), job.batch, &mut collect)?;
        let layer = model.layer(l, Activations::F32)?;
        let mut linears = vec![&layer.q, &layer.k, &layer.v, &layer.o];
        if let FeedForward::Dense { gate, up, down } = &layer.ffn {
            linears.extend([gate, up, down]);
        }
        for linear in linears {
            if let Some(moments) = moments(&collect, &linear.name) {
                let gain = gain(job, moments);
                add(&mut costs, of_linear(job, linear, moments, &|_| gain, fisher)?);
            }
        }
        if let FeedForward::Experts { router, .. } = &layer.ffn {
            let gain = moments(&collect, &router.name).map_or(1.0, |m| gain(job, m));
            costs.extend(of_experts(job, l, (&collect.collector, gain), fisher)?);
        }
        step(backward_steps + l + 1, all);
    }
    drop(runner);
    let spec =
        WeightSpec { name: model.head_name().to_string(), columns: n, experts: None, second: true, same_as: None };
    let mut collect = Collect::tails(vec![spec], job.length).map_err(CalibrationError::from)?;
    let head = Head::new(model, Activations::F32, 0)?;
    let mut x = vec![0f32; job.length * n];
    for at in (0..job.tokens.len()).step_by(job.length) {
        streams[layers % 2].read(at * n, &mut x)?;
        head.input(&mut x, &mut collect)?;
    }
    if let Some(moments) = moments(&collect, model.head_name()) {
        let own = gain(job, moments);
        // a head that is the embedding is rounded as both
        let gain = |ty| if model.tied() { table_gain(ty) } else { own };
        add(&mut costs, of_linear(job, &model.head(Activations::F32)?, moments, &gain, fisher)?);
    }
    step(all, all);
    costs.retain(|c| !c.choices.is_empty());
    Ok(costs)
}

/// Adds costs to those of the same tensor: parts of a fused weight, a head that is the embedding.
fn add(all: &mut Vec<TensorCosts>, new: TensorCosts) {
    match all.iter_mut().find(|c| c.name == new.name) {
        Some(old) => old.choices.iter_mut().zip(new.choices).for_each(|(a, b)| {
            a.cost += b.cost;
            a.nearest += b.nearest;
        }),
        None => all.push(new),
    }
}

fn types<'a>(job: &'a Job<'_>, name: &str) -> &'a [GgmlType] {
    job.candidates.iter().find(|(n, _)| n == name).map_or(&[], |(_, t)| t)
}

/// Second moments of a linear's input: `[n, n]`, or their diagonal alone.
enum Second<'a> {
    Full(&'a [f32]),
    Diagonal(&'a [f32]),
}

impl Second<'_> {
    /// `d_rᵀ H d_r` of every row of `d` \[rows, n\].
    fn norms(&self, d: &[f32], n: usize) -> Vec<f64> {
        let along = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        match self {
            Second::Full(h) => {
                let rows = d.len() / n;
                let mut hd = vec![0f32; d.len()];
                times(ViewMut::new(&mut hd, rows, n), View::new(d, rows, n), View::new(h, n, n), 1.0);
                d.chunks_exact(n).zip(hd.chunks_exact(n)).map(|(d, hd)| along(d, hd)).collect()
            }
            Second::Diagonal(h) => {
                let row =
                    |d: &[f32]| d.iter().zip(*h).map(|(d, h)| f64::from(*d) * f64::from(*d) * f64::from(*h)).sum();
                d.chunks_exact(n).map(row).collect()
            }
        }
    }
}

/// `Σ_r weight_r d_rᵀ H d_r` over rows, `d` what rounding to `ty` changes of `w` \[rows, n\].
fn error(
    name: &str,
    (w, n): (&[f32], usize),
    ty: GgmlType,
    importance: &[f32],
    h: &Second<'_>,
    weight: impl Fn(usize) -> f64 + Sync,
) -> Result<f64, AllocationError> {
    let format = crate::formats::format(ty).expect("a type that can be encoded");
    let row_bytes = n / ty.block_len() * ty.block_bytes();
    let tasks: Result<Vec<f64>, AllocationError> = w
        .par_chunks(ROWS * n)
        .enumerate()
        .map(|(i, w)| {
            let rows = w.len() / n;
            let (mut bytes, mut d) = (vec![0u8; rows * row_bytes], vec![0f32; rows * n]);
            format
                .encode(w, n, Some(importance), &mut bytes)
                .map_err(|source| AllocationError::Format { tensor: name.to_string(), source })?;
            format.decode(&bytes, &mut d);
            d.iter_mut().zip(w).for_each(|(d, w)| *d -= w);
            Ok(h.norms(&d, n).iter().enumerate().map(|(r, e)| weight(i * ROWS + r) * e).sum())
        })
        .collect();
    Ok(tasks?.iter().sum())
}

/// Moments of a weight that is no stack.
fn moments<'a>(collect: &'a Collect, name: &str) -> Option<&'a Moments> {
    collect.collector.moments(name).and_then(|m| m.first()).filter(|m| m.count() > 0)
}

/// What GPTQ leaves of the errors of nearest rounding, for a linear whose inputs have these moments.
fn gain(job: &Job<'_>, m: &Moments) -> f64 {
    if !job.gptq {
        return 1.0;
    }
    let factor = Factor::new(m.second().unwrap_or_default(), m.count(), m.columns(), DAMPING);
    // where there is no factor, rounding is nearest
    factor.map_or(1.0, |f| ratio(&f))
}

/// `Σ_j 1 / U_jj²` by `Σ_j H_jj`.
fn ratio(f: &Factor) -> f64 {
    let diagonal = (0..f.n).map(|i| f64::from(f.h[i * f.n + i])).sum::<f64>();
    f.costs.iter().map(|c| f64::from(*c)).sum::<f64>() / diagonal
}

fn of_linear(
    job: &Job<'_>,
    l: &Linear,
    m: &Moments,
    gain: &dyn Fn(GgmlType) -> f64,
    fisher: &Fisher,
) -> Result<TensorCosts, AllocationError> {
    let (n, name) = (l.inputs, &l.name);
    let h: Vec<f32> = mean_second(m).unwrap_or_default().iter().map(|v| *v as f32).collect();
    let importance: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
    let h = Second::Full(&h);
    let squares = fisher.of(name).unwrap_or_default();
    // parts of a fused weight: the mean over all of its outputs
    let mean = squares.iter().sum::<f64>() / squares.len().max(1) as f64;
    let whole = squares.len() == l.outputs();
    let weight = |o: usize| 0.5 * if whole { squares[o] } else { mean };
    let choices = types(job, name).iter().map(|&ty| {
        let nearest = error(name, (&l.weight, n), ty, &importance, &h, weight)?;
        Ok(Choice { ty: ty.name().into(), bytes: bytes(job, name, ty), cost: gain(ty) * nearest, nearest })
    });
    Ok(TensorCosts { name: name.clone(), choices: choices.collect::<Result<_, AllocationError>>()? })
}

/// Gate, up and down of the experts of layer `l`.
fn of_experts(
    job: &Job<'_>,
    l: usize,
    (collected, gain): (&Collector, f64),
    fisher: &Fisher,
) -> Result<Vec<TensorCosts>, AllocationError> {
    // by part: the error of each type
    let mut sums: [(String, Vec<f64>); 3] = Default::default();
    for e in 0..job.model.spec.experts {
        interrupted()?;
        for (linear, (name, errors)) in job.model.expert(l, e, Activations::F32)?.iter().zip(&mut sums) {
            let (n, outputs) = (linear.inputs, linear.outputs());
            name.clone_from(&linear.name);
            let types = types(job, name);
            errors.resize(types.len(), 0.0);
            let moments = collected.moments(name).and_then(|m| m.get(e));
            // an expert that no token came to costs nothing that is known
            let Some(squares) = moments.and_then(|m| m.mean_square()) else { continue };
            let importance: Vec<f32> = squares.iter().map(|v| *v as f32).collect();
            let h = Second::Diagonal(&importance);
            let gradients = fisher.of(name).and_then(|g| g.get(e * outputs..(e + 1) * outputs)).unwrap_or_default();
            let weight = |o: usize| 0.5 * gradients.get(o).copied().unwrap_or_default();
            for (sum, &ty) in errors.iter_mut().zip(types) {
                *sum += error(name, (&linear.weight, n), ty, &importance, &h, weight)?;
            }
        }
    }
    let costs = sums.map(|(name, errors)| {
        let choice = |(&ty, nearest): (&GgmlType, f64)| Choice {
            ty: ty.name().into(),
            bytes: bytes(job, &name, ty),
            cost: gain * nearest,
            nearest,
        };
        let choices = types(job, &name).iter().zip(errors).map(choice).collect();
        TensorCosts { name, choices }
    });
    Ok(costs.into())
}

fn bytes(job: &Job<'_>, name: &str, ty: GgmlType) -> u64 {
    let tensor = job.model.source().tensors().iter().find(|t| t.name == name);
    tensor.map_or(0, |t| t.rows() * ty.row_bytes(t.row_len()).unwrap_or(0))
}

/// The embedding, each row as often as the text has it.
fn embedding(job: &Job<'_>, gain: &dyn Fn(GgmlType) -> f64, fisher: &Fisher) -> Result<TensorCosts, AllocationError> {
    let name = "token_embd.weight";
    let (n, vocab) = (job.model.spec.embed, job.model.vocab);
    let mut counts = vec![0u64; vocab];
    job.tokens.iter().for_each(|&t| counts[t as usize] += 1);
    let mut table = vec![0f32; vocab * n];
    job.model.embedding_rows(0, vocab, &mut table)?;
    let g: Vec<f32> = crate::linalg::unpack(&fisher.embedding, n).iter().map(|v| *v as f32).collect();
    let (ones, g) = (vec![1f32; n], Second::Full(&g));
    let weight = |v: usize| 0.5 * counts[v] as f64 / job.tokens.len() as f64;
    let choices = types(job, name).iter().map(|&ty| {
        let nearest = error(name, (&table, n), ty, &ones, &g, weight)?;
        Ok(Choice { ty: ty.name().into(), bytes: bytes(job, name, ty), cost: gain(ty) * nearest, nearest })
    });
    Ok(TensorCosts { name: name.into(), choices: choices.collect::<Result<_, AllocationError>>()? })
}
