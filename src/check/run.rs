//! Reference and models over the same windows, layer by layer side by side, then their logits at every scored position.
//!
//! In memory at a time: one layer of one model as f32, one batch of windows, the streams of all models (in scratch files
//! if they are too large), and the logits of a few windows.

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::base_file::{BaseFile, Chunk};
use super::base_writer::BaseWriter;
use super::stats::{Position, compare_rows, nll_rows};
use super::windows::Windows;
use super::{CheckError, LogitsError};
use crate::forward::run::Head;
use crate::forward::{Activations, ForwardError, Hidden, Model, Runner};

/// What the models are compared with.
pub enum Reference<'a> {
    Model(&'a Model<'a>),
    /// Log-probabilities of an earlier run, here or by llama-perplexity.
    Base(&'a mut BaseFile),
}

/// How a check is run.
pub struct Settings<'a> {
    pub windows: Windows,
    /// The text, whole windows as they were cut.
    pub tokens: &'a [i32],
    /// Takes the place of the first token of every window.
    pub bos: Option<u32>,
    /// A simulated precision is that of the models, not of the reference.
    pub activations: Activations,
    pub memory: Memory,
    /// Where streams go that do not fit in memory.
    pub scratch: &'a Path,
    /// Write the reference's log-probabilities here.
    pub save: Option<&'a Path>,
}

/// How a check fits under its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Ceiling of resident memory, in bytes.
    pub peak: u64,
    /// Windows that go through a layer together.
    pub batch: usize,
    /// Windows whose logits are held together.
    pub scored: usize,
    /// Bytes of each model's head that are held as f32.
    pub head: u64,
    /// The streams are in files.
    pub spill: bool,
}

const BASE: u64 = 96 << 20;

/// The memory of a check of `models` (with the reference) under `limit` bytes; without one, what is quickest.
pub fn memory(models: &[&Model<'_>], windows: &Windows, threads: usize, limit: Option<u64>) -> Result<Memory, String> {
    let length = windows.n_ctx();
    let largest = |f: &dyn Fn(&Model<'_>) -> u64| models.iter().map(|m| f(m)).max().unwrap_or(0);
    let streams: u64 = models.iter().map(|m| (windows.n_chunks() * length * m.spec.embed * 4) as u64).sum();
    let layer = largest(&|m| m.layer_bytes());
    let head_all = largest(&|m| (m.vocab * m.spec.embed * 4) as u64);
    let logits = largest(&|m| (windows.scored() * m.vocab * 4) as u64);
    let group = largest(&|m| (m.spec.heads / m.spec.kv_heads) as u64);
    let thread = (96 * group * length as u64 + (1 << 21)) * 4 * threads as u64;
    let of = |m: &Memory| {
        let pass = layer + largest(&|x| Runner::batch_bytes(x, m.batch * length));
        // heads are held by all models at once; a part of one needs room for its logits beside
        let part = if m.head < head_all { logits * m.scored as u64 / 2 } else { 0 };
        let heads = m.head * models.len() as u64 + part + 2 * logits * m.scored as u64;
        BASE + thread + pass.max(heads) + if m.spill { 0 } else { streams }
    };
    let mut best = Memory { peak: 0, batch: 16.min(windows.n_chunks()), scored: 2, head: head_all, spill: false };
    best.scored = best.scored.min(windows.n_chunks());
    let limit = limit.unwrap_or(u64::MAX);
    if limit == u64::MAX && streams > 2 << 30 {
        best.spill = true;
    }
    while of(&best) > limit {
        let pass = layer + largest(&|x| Runner::batch_bytes(x, best.batch * length));
        if !best.spill && streams > limit / 4 {
            best.spill = true;
        } else if best.batch > 1 && BASE + thread + pass > limit / 2 {
            best.batch = best.batch.div_ceil(2);
        } else if best.scored > 1 {
            best.scored = 1;
        } else if best.head > 64 << 20 {
            best.head /= 2;
        } else if best.batch > 1 {
            best.batch = best.batch.div_ceil(2);
        } else if !best.spill {
            best.spill = true;
        } else {
            return Err(format!(
                "--max-memory {}: this check needs at least {}",
                crate::plan::memory::human(limit),
                crate::plan::memory::human(of(&best))
            ));
        }
    }
    best.peak = of(&best);
    Ok(best)
}

/// One model against the reference.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Every scored position.
    pub records: Vec<Position>,
    /// After each layer: Σ(h - h_ref)² / Σh_ref² over all tokens; empty without a reference that runs.
    pub blocks: Vec<f64>,
}

/// What a check finds.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// -ln p of the reference at every scored position; empty with a base file.
    pub reference: Vec<f64>,
    pub models: Vec<Outcome>,
}

/// A failure of a check.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{0}")]
    Forward(#[from] ForwardError),
    #[error("{0}")]
    Check(#[from] CheckError),
    #[error("{}: {source}", file.display())]
    Logits { file: PathBuf, source: LogitsError },
}

/// Runs everything. `watch` hears of steps done, of `(layers + windows' share)` steps in all, see [`steps`].
pub fn run(
    mut reference: Reference<'_>,
    models: &[&Model<'_>],
    settings: &Settings<'_>,
    watch: &mut dyn FnMut(usize),
) -> Result<Outcomes, RunError> {
    let w = settings.windows;
    let bos = settings.bos.map(|t| t as i32);
    let inputs = (0..w.n_chunks()).flat_map(|c| w.input(settings.tokens, c, bos).unwrap_or_default());
    let tokens: Vec<u32> = inputs.map(|t| t as u32).collect();
    let mut all: Vec<&Model<'_>> = Vec::new();
    let has_reference = if let Reference::Model(m) = &reference {
        all.push(m);
        true
    } else {
        false
    };
    all.extend(models);
    let first = usize::from(has_reference);
    let activations = |i: usize| match settings.activations {
        Activations::Simulated(_) if i < first => Activations::F32,
        a => a,
    };
    let mut outcomes = Outcomes { models: vec![Outcome::default(); models.len()], ..Outcomes::default() };
    let mut streams = Vec::new();
    let mut runners = Vec::new();
    for (i, m) in all.iter().enumerate() {
        let values = tokens.len() * m.spec.embed;
        let mut stream = if settings.memory.spill {
            Hidden::scratch(settings.scratch, i, values as u64 * 4)?
        } else {
            Hidden::Memory(vec![0.0; values])
        };
        let mut runner = Runner::new(m, w.n_ctx(), activations(i))?;
        runner.embed(&tokens, &mut stream)?;
        streams.push(stream);
        runners.push(runner);
    }
    let mut done = 0;
    for l in 0..all.iter().map(|m| m.spec.layers).max().unwrap_or(0) {
        for (runner, stream) in runners.iter_mut().zip(&mut streams).filter(|(r, _)| l < r.model.spec.layers) {
            runner.layer_in_place(l, stream, tokens.len(), settings.memory.batch, &mut ())?;
            done += 1;
            watch(done);
        }
        if has_reference {
            let (a, rest) = streams.split_first().expect("the reference is first");
            for ((b, m), outcome) in rest.iter().zip(models).zip(&mut outcomes.models) {
                if m.spec.embed == all[0].spec.embed && l < m.spec.layers.min(all[0].spec.layers) {
                    outcome.blocks.push(difference(a, b, tokens.len() * m.spec.embed)?);
                }
            }
        }
    }
    drop(runners);
    let heads = all.iter().enumerate().map(|(i, m)| Head::new(m, activations(i), settings.memory.head));
    let mut heads = heads.collect::<Result<Vec<_>, _>>()?;
    let mut save = match (settings.save, has_reference) {
        (Some(path), true) => Some(BaseWriter::create(path, w, all[0].vocab, settings.tokens)?),
        _ => None,
    };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for from in (0..w.n_chunks()).step_by(settings.memory.scored) {
        let to = (from + settings.memory.scored).min(w.n_chunks());
        let next: Vec<i32> =
            (from..to).flat_map(|c| w.next(w.tokens(settings.tokens, c).unwrap_or_default()).iter().copied()).collect();
        let rows = |i: usize, logits: &mut Vec<f32>, heads: &mut [Head<'_>]| -> Result<(), RunError> {
            let n = all[i].spec.embed;
            let mut x = vec![0.0; (to - from) * w.scored() * n];
            for (c, x) in (from..to).zip(x.chunks_exact_mut(w.scored() * n)) {
                streams[i].read((c * w.n_ctx() + w.first()) * n, x)?;
            }
            Ok(heads[i].logits(&mut x, logits, &mut ())?)
        };
        let fail = |i: usize| {
            let file = all[i].path().to_path_buf();
            move |source| RunError::Logits { file, source }
        };
        match &mut reference {
            Reference::Model(m) => {
                rows(0, &mut a, &mut heads)?;
                outcomes.reference.extend(nll_rows(&a, m.vocab, &next).map_err(fail(0))?);
                if let Some(save) = &mut save {
                    for chunk in a.chunks_exact(w.scored() * m.vocab) {
                        save.write_chunk(chunk)?;
                    }
                }
                for (i, outcome) in outcomes.models.iter_mut().enumerate() {
                    rows(first + i, &mut b, &mut heads)?;
                    outcome.records.extend(compare_rows(&a, &b, m.vocab, &next).map_err(fail(first + i))?);
                    done += to - from;
                    watch(done);
                }
            }
            Reference::Base(base) => {
                let mut chunks = Vec::new();
                for _ in from..to {
                    let mut chunk = Chunk::default();
                    base.read_chunk(&mut chunk)?;
                    chunks.push(chunk);
                }
                for (i, outcome) in outcomes.models.iter_mut().enumerate() {
                    rows(i, &mut b, &mut heads)?;
                    for (chunk, logits) in chunks.iter().zip(b.chunks_exact(w.scored() * all[i].vocab)) {
                        outcome.records.extend(chunk.compare(logits).map_err(fail(i))?);
                    }
                    done += to - from;
                    watch(done);
                }
            }
        }
    }
    if let Some(save) = save {
        save.finish()?;
    }
    Ok(outcomes)
}

/// Steps that [`run`] reports in all.
pub fn steps(reference: Option<&Model<'_>>, models: &[&Model<'_>], windows: &Windows) -> usize {
    let layers: usize = reference.iter().chain(models).map(|m| m.spec.layers).sum();
    layers + models.len() * windows.n_chunks()
}

/// Σ(b - a)² / Σa² of two streams of `n` values.
fn difference(a: &Hidden, b: &Hidden, n: usize) -> Result<f64, ForwardError> {
    const PIECE: usize = 1 << 20;
    let (mut x, mut y) = (Vec::new(), Vec::new());
    let (mut error, mut size) = (0.0, 0.0);
    for at in (0..n).step_by(PIECE) {
        let here = PIECE.min(n - at);
        x.resize(here, 0.0);
        y.resize(here, 0.0);
        a.read(at, &mut x)?;
        b.read(at, &mut y)?;
        // pieces of a fixed size, added in order: the same for any number of threads
        let parts: Vec<(f64, f64)> = x
            .par_chunks(1 << 14)
            .zip(y.par_chunks(1 << 14))
            .map(|(x, y)| {
                x.iter().zip(y).fold((0.0, 0.0), |(e, s), (&a, &b)| {
                    let (a, d) = (f64::from(a), f64::from(b) - f64::from(a));
                    (e + d * d, s + a * a)
                })
            })
            .collect();
        for (e, s) in parts {
            error += e;
            size += s;
        }
    }
    Ok(if size > 0.0 { error / size } else { error })
}
