//! Tuning layer by layer, for models that do not fit: each rounded decoder layer against the float layer's output.
//!
//! The loss of a layer is `‖ŷ − y‖² / ‖y − x‖²` over a batch: `x` and `y` the input and output of the float layer, `ŷ` what the rounded
//! one makes of the stream that the rounded, tuned layers before it left (block reconstruction: BRECQ, Li et al. 2021, arXiv 2102.05426).
//! Each layer keeps the step that is best on windows held out. Embedding, head and the last norm stay. In memory: one layer with its
//! parameters, a batch, and the streams of the text (in files where they are large).

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::TuningError;
use super::blocks::{Adam, Blocks};
use super::layer::{Rounded, Step, Tuned};
use super::run::{Settings, tuned, window};
use crate::forward::backward::layer::{Kept, LayerBack, Scratch};
use crate::forward::layer::Pass;
use crate::forward::{Activations, Hidden, Model, Runner, interrupted, kernels};
use crate::gguf::GgmlType;
use crate::resume;
use crate::rounding::state;

/// What to tune.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens, the last `held_out` of them to decide on.
    pub tokens: &'a [u32],
    pub held_out: usize,
    pub length: usize,
    /// What a tensor was rounded to; none: it stays.
    pub rounded: &'a (dyn Fn(&str) -> Result<Option<Rounded>, TuningError> + Sync),
    /// Steps are those of each layer.
    pub settings: Settings,
    /// Of everything that the result depends on beside the settings.
    pub key: String,
    /// Keep the streams in memory, not in files of the state's folder.
    pub keep: bool,
    pub state: &'a Path,
}

/// What tuning brought a layer: its loss on windows held out, before and at the step that was kept.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub before: f64,
    pub after: f64,
    pub step: usize,
}

/// What a run says of itself.
pub trait Watch {
    /// Layer `l` is done.
    fn layer(&mut self, l: usize, done: Done);
    /// So many layers were done before.
    fn resumed(&mut self, layers: usize);
}

/// How far a run is; the tuned tensors lie beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Progress {
    version: String,
    key: String,
    settings: Settings,
    layers: usize,
    tensors: Vec<(String, String)>,
}

/// The same file as that of a run of the whole model, whose head is another.
const FILE: &str = "tuning.state";

/// Streams of the text.
const STREAMS: u64 = 3;

/// Bytes of the streams of `tokens` tokens.
pub fn streams(model: &Model<'_>, tokens: usize) -> u64 {
    STREAMS * (tokens * model.spec.embed * 4) as u64
}

/// Bytes that a run takes beside the streams, with `tokens` in a batch.
pub fn memory(model: &Model<'_>, tokens: usize) -> u64 {
    let s = &model.spec;
    let kept = super::student::kept(model, tokens) / s.layers.max(1) as u64;
    let scratch = tokens * (10 * s.embed + 4 * s.heads * s.head_dim + 3 * model.feed_forward()) * 4;
    // the layer of both models and a gradient, parameters, and those of the best step; the rounded embedding
    let layer = model.layer_bytes();
    (96 << 20)
        + 3 * layer
        + 2 * Blocks::memory(layer / 4, true)
        + kept
        + scratch as u64
        + (model.vocab * s.embed) as u64
}

/// Tunes; the tuned tensors are then in the state folder under [`tuned`] names. Their names and types.
pub fn run(job: &Job<'_>, watch: &mut dyn Watch) -> Result<Vec<(String, GgmlType)>, TuningError> {
    let (model, n) = (job.model, job.model.spec.embed);
    let windows = job.tokens.len() / job.length;
    if windows <= job.held_out || job.held_out == 0 {
        return Err(TuningError::Refused(format!("{windows} windows are too few; give more text")));
    }
    let path = job.state.join(FILE);
    let io = |source| TuningError::Io { file: path.clone(), source };
    std::fs::create_dir_all(job.state).map_err(io)?;
    let (version, key, settings) = (env!("CARGO_PKG_VERSION").into(), job.key.clone(), job.settings.clone());
    let mut progress = Progress { version, key, settings, layers: 0, tensors: Vec::new() };
    let own =
        |f: &Progress| (&f.version, &f.key, &f.settings) == (&progress.version, &progress.key, &progress.settings);
    if let Some(found) = resume::load::<f32, Progress>(&path, Vec::new(), own).map_err(io)? {
        progress = found;
        watch.resumed(progress.layers);
    }
    let count = job.tokens.len() * n;
    let stream = |number: usize| match job.keep {
        true => Ok(Hidden::Memory(vec![0.0; count])),
        false => Hidden::scratch(job.state, 3000 + number, count as u64 * 4),
    };
    // before and after a layer of the float model; before, then after a layer of the rounded one
    let (mut x, mut y, mut own) = (stream(0)?, stream(1)?, stream(2)?);
    let mut float = Runner::new(model, job.length, Activations::F32)?;
    float.embed(job.tokens, &mut x)?;
    embed(job, &mut float, &mut own)?;
    let mut runner = Runner::new(model, job.length, Activations::F32)?;
    for l in 0..model.spec.layers {
        float.layer(l, &x, &mut y, job.tokens.len(), job.settings.batch, &mut ())?;
        let latent = job.settings.latent;
        let mut local = match l < progress.layers {
            true => Local::new(job, Tuned::of(model, l, &|name| written(job, &progress, name), latent)?),
            false => {
                let mut local = Local::new(job, Tuned::of(model, l, job.rounded, latent)?);
                let done = local.tune(&mut runner, (&x, &y, &own), l)?;
                for (name, ty, bytes) in local.tuned.bytes(&local.layer, l) {
                    state::write_blocks(job.state, &tuned(&name), &bytes)?;
                    progress.tensors.push((name, ty.name().into()));
                }
                progress.layers = l + 1;
                resume::save::<f32>(&path, &progress, Vec::new()).map_err(io)?;
                watch.layer(l, done);
                local
            }
        };
        if l + 1 < model.spec.layers {
            local.advance(&mut runner, &mut own)?;
            std::mem::swap(&mut x, &mut y);
        }
    }
    let ty = |name: &str| GgmlType::from_name(name).expect("written by its name");
    Ok(progress.tensors.into_iter().map(|(name, t)| (name, ty(&t))).collect())
}

/// A tensor of a layer that was tuned before.
fn written(job: &Job<'_>, progress: &Progress, name: &str) -> Result<Option<Rounded>, TuningError> {
    let Some((_, ty)) = progress.tensors.iter().find(|(n, _)| n == name) else { return Ok(None) };
    let file = state::blocks_path(job.state, &tuned(name));
    let bytes = std::fs::read(&file).map_err(|source| TuningError::Io { file: file.clone(), source })?;
    let known = job.model.source().tensors().iter().find(|t| t.name == name);
    let ty = GgmlType::from_name(ty).filter(|ty| {
        let row = known.and_then(|t| Some(t.rows() * ty.row_bytes(t.row_len())?));
        row == Some(bytes.len() as u64)
    });
    let broken = || std::io::Error::other("holds something else than its tensor");
    let ty = ty.ok_or_else(|| TuningError::Io { file, source: broken() })?;
    Ok(Some(Rounded { ty, bytes }))
}

/// The stream behind the embedding as it was rounded.
fn embed(job: &Job<'_>, float: &mut Runner<'_>, out: &mut Hidden) -> Result<(), TuningError> {
    let Some(r) = (job.rounded)("token_embd.weight")? else { return Ok(float.embed(job.tokens, out)?) };
    let n = job.model.spec.embed;
    let format = crate::formats::format(r.ty).expect("it was rounded to it");
    let row = n / r.ty.block_len() * r.ty.block_bytes();
    let scale = job.model.spec.embedding_scale;
    let mut x = vec![0f32; job.length * n];
    for (w, tokens) in job.tokens.chunks_exact(job.length).enumerate() {
        x.par_chunks_mut(n).zip(tokens).for_each(|(x, &t)| format.decode(&r.bytes[t as usize * row..][..row], x));
        kernels::scale(&mut x, scale);
        out.write(w * x.len(), &x)?;
    }
    Ok(())
}

/// A layer in work.
struct Local<'a> {
    job: &'a Job<'a>,
    layer: LayerBack,
    tuned: Tuned,
    kept: Kept,
    scratch: Scratch,
}

impl<'a> Local<'a> {
    fn new(job: &'a Job<'a>, (layer, tuned): (LayerBack, Tuned)) -> Local<'a> {
        Local { job, layer, tuned, kept: Kept::default(), scratch: Scratch::default() }
    }

    /// The layer's output for `x`.
    fn forward(&mut self, pass: &Pass<'_>, x: &[f32], out: &mut Vec<f32>) {
        self.layer.forward(pass, x, &mut self.kept, &mut self.scratch);
        self.layer.output(pass, &self.kept, &mut self.scratch, out);
    }

    /// The loss over some windows of the streams (float before, float after, rounded before). With `gradient` it becomes that at the
    /// layer's output; the input that it had.
    fn loss(
        &mut self,
        pass: &Pass<'_>,
        streams: (&Hidden, &Hidden, &Hidden),
        windows: &[usize],
        gradient: Option<&mut Vec<f32>>,
    ) -> Result<(f64, Vec<f32>), TuningError> {
        let size = self.job.length * pass.model.spec.embed;
        let read = |from: &Hidden| -> Result<Vec<f32>, TuningError> {
            let mut values = vec![0f32; windows.len() * size];
            let pieces = values.chunks_exact_mut(size).zip(windows);
            pieces.into_iter().try_for_each(|(values, w)| from.read(w * size, values))?;
            Ok(values)
        };
        let (x, y, own) = (read(streams.0)?, read(streams.1)?, read(streams.2)?);
        let branch = square(&y, &x).max(f64::MIN_POSITIVE);
        let mut out = x;
        self.forward(pass, &own, &mut out);
        let loss = square(&out, &y) / branch;
        if let Some(d) = gradient {
            let by = (2.0 / branch) as f32;
            d.resize(out.len(), 0.0);
            d.par_iter_mut().zip(&out).zip(&y).with_min_len(1 << 14).for_each(|((d, o), y)| *d = (o - y) * by);
        }
        Ok((loss, own))
    }

    /// Tunes the layer; it is then that of the best step.
    fn tune(
        &mut self,
        runner: &mut Runner<'_>,
        streams: (&Hidden, &Hidden, &Hidden),
        l: usize,
    ) -> Result<Done, TuningError> {
        let (job, s) = (self.job, &self.job.settings);
        let windows = job.tokens.len() / job.length;
        let learn = windows - job.held_out;
        let decide: Vec<usize> = (learn..windows).collect();
        let held_out = |runner: &mut Runner<'_>, local: &mut Local<'_>| {
            let mut sum = 0.0;
            for some in decide.chunks(s.batch) {
                interrupted()?;
                sum += runner.pass(|pass, _| local.loss(pass, streams, some, None))?.0 * some.len() as f64;
            }
            Ok::<f64, TuningError>(sum / decide.len() as f64)
        };
        let copy = |tuned: &mut Tuned| -> Vec<Vec<f32>> { tuned.state().into_iter().map(|v| v.clone()).collect() };
        let before = held_out(runner, self)?;
        let mut best = (before, 0, copy(&mut self.tuned));
        let (mut d, mut gradient) = (Vec::new(), Vec::new());
        for step in 1..=s.steps {
            interrupted()?;
            let batch: Vec<usize> = (0..s.batch).map(|i| window((step - 1) * s.batch + i, learn, s.seed)).collect();
            let left = 1.0 - (step - 1) as f32 / s.steps as f32;
            let adam = Adam::new(step, s.rate * left, s.code_rate * left);
            runner.pass(|pass, _| {
                let (loss, x) = self.loss(pass, streams, &batch, Some(&mut d))?;
                if !loss.is_finite() {
                    return Err(TuningError::Refused(format!("the loss is {loss} at step {step} of layer {l}")));
                }
                let mut sink = Step::new(&mut self.tuned, &mut gradient, adam, pass.model.spec.rms_eps);
                Ok(self.layer.back(pass, &x, &mut d, &mut self.kept, &mut self.scratch, &mut sink)?)
            })?;
            if step % s.every == 0 || step == s.steps {
                let loss = held_out(runner, self)?;
                if loss < best.0 {
                    best = (loss, step, copy(&mut self.tuned));
                }
            }
        }
        self.tuned.state().into_iter().zip(best.2).for_each(|(to, from)| *to = from);
        self.tuned.refresh(&mut self.layer);
        Ok(Done { before, after: best.0, step: best.1 })
    }

    /// Leads the rounded model's stream through the layer.
    fn advance(&mut self, runner: &mut Runner<'_>, stream: &mut Hidden) -> Result<(), TuningError> {
        let job = self.job;
        let (size, count) = (job.length * job.model.spec.embed, job.tokens.len() / job.length);
        let mut out = Vec::new();
        for at in (0..count).step_by(job.settings.batch) {
            interrupted()?;
            let mut x = vec![0f32; job.settings.batch.min(count - at) * size];
            stream.read(at * size, &mut x)?;
            runner.pass(|pass, _| self.forward(pass, &x, &mut out));
            stream.write(at * size, &out)?;
        }
        Ok(())
    }
}

/// `‖a − b‖²`, summed in one order.
fn square(a: &[f32], b: &[f32]) -> f64 {
    let part = |(a, b): (&[f32], &[f32])| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum() };
    let parts: Vec<f64> = a.par_chunks(1 << 14).zip(b.par_chunks(1 << 14)).map(part).collect();
    parts.iter().sum()
}
