//! A model, rounded layer by layer behind its own rounded layers.
//!
//! Two residual streams run side by side: the float model's, and the one of what is rounded already. At each of the four
//! inputs of a layer ([`Step`]) both are summed over all windows ([`Site`]), the weights are rounded ([`fit`]), and the rounded
//! stream goes on with them. With `one_pass` there is only the float stream. The head comes last, the embedding first. In
//! memory: one layer twice as f32, the sums of one input, one batch of windows; streams and the inputs that the next step needs
//! where there is room, otherwise in files of the state folder.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::fit::{self, DAMPING, Fitted};
use super::site::{self, Site, is_held_out};
use super::state::{self, Key, Report, State};

use super::step::Step;
use super::streams::{Pair, Saves};
use super::{Factor, RoundingError, matrix};
use crate::calibration::run::Watch;
use crate::calibration::stages::Stages;
use crate::forward::backward;
use crate::forward::layer::Layer;
use crate::forward::run::Head;
use crate::forward::{Activations, Hidden, Model, Runner, interrupted};
use crate::gguf::GgmlType;
use crate::linalg;

/// What to round.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens.
    pub tokens: &'a [u32],
    pub length: usize,
    /// The type of every tensor that is to be rounded.
    pub types: BTreeMap<String, GgmlType>,
    pub fingerprint: String,
    /// sha256 of the tokens.
    pub text: String,
    /// Hessians of the float model only.
    pub one_pass: bool,
    /// One scale for each row ([`Grid::by_row`](crate::formats::grid::Grid::by_row)), in types that have an f16 by block alone.
    pub row_scales: bool,
    /// Windows that go through a layer together.
    pub batch: usize,
    /// Windows of the backward pass that weighs the errors of the embedding; 0: all columns weigh alike.
    pub backward: usize,
    /// Keep streams and the inputs that the next step needs in memory ([`kept`]), not in files.
    pub keep: bool,
    pub state: &'a Path,
}

/// The most columns of an input.
fn widest(model: &Model<'_>) -> usize {
    model.feed_forward().max(model.spec.heads * model.spec.head_dim)
}

/// Bytes of the streams, and of the inputs that a step leaves to the next, of `tokens` tokens.
pub fn kept(model: &Model<'_>, tokens: usize, one_pass: bool) -> u64 {
    let s = &model.spec;
    // the inputs of all experts of a layer are kept beside what a step leaves
    let experts = if s.experts > 0 { s.embed } else { 0 };
    (tokens * (s.embed + widest(model) + experts) * 4 * if one_pass { 1 } else { 2 }) as u64
}

/// Bytes of memory that a run needs, with `batch` windows of `length` tokens.
/// `backward`: errors of the embedding are weighed.
pub fn memory(model: &Model<'_>, length: usize, batch: usize, threads: usize, backward: bool) -> u64 {
    let s = &model.spec;
    // the table, before and after, both sides of the head, logits, a layer and what it leaves to its backward pass
    let table = 4 * (model.vocab * s.embed) as u64;
    let logits = 4 * 2 * 512 * model.vocab as u64;
    let tokens = batch.min(backward::SAMPLE_BATCH) * length;
    let gradients = crate::tuning::student::kept(model, tokens) / s.layers.max(1) as u64;
    let wide = 4 * tokens as u64 * (6 * s.embed + 4 * s.heads * s.head_dim + 3 * model.feed_forward()) as u64;
    let head = 2 * table.min(256 << 20) + logits;
    let first = if backward { head + model.layer_bytes() + gradients + wide } else { 0 } + 2 * table;
    let inputs = s.embed.max(widest(model)) as u64;
    let tiles = threads as u64 * (64 * inputs * 4 * 6 + (4 << 20));
    let batch = 2 * Runner::batch_bytes(model, batch * length);
    // the blocks of a layer's experts, twice, at a byte for each weight
    let experts = 6 * s.experts as u64 * (s.embed * model.feed_forward()) as u64;
    // targets, values and blocks of the weights of one site
    let weights = model.layer_bytes() + experts;
    (96 << 20) + first.max(2 * model.layer_bytes() + weights + site::memory(inputs, true) + tiles + batch)
}

/// Rounds what is not rounded yet; a report of each tensor.
pub fn run(job: &Job<'_>, watch: &mut dyn Watch) -> Result<Vec<Report>, RoundingError> {
    let n = job.model.spec.embed;
    let values = job.tokens.len() * n;
    std::fs::create_dir_all(job.state).map_err(|source| RoundingError::Io { file: job.state.to_path_buf(), source })?;
    let key = Key {
        version: env!("CARGO_PKG_VERSION").into(),
        fingerprint: job.fingerprint.clone(),
        text: job.text.clone(),
        tokens: job.tokens.len(),
        length: job.length,
        one_pass: job.one_pass,
        row_scales: job.row_scales,
        types: job.types.iter().map(|(n, t)| (n.clone(), t.name().to_string())).collect(),
    };
    let stream = |layers: usize| Pair::in_files(job, &format!("stream-{}", layers % 2), n);
    let mut work = Work {
        job,
        runner: Runner::new(job.model, job.length, Activations::F32)?,
        reports: Vec::new(),
        kept: job.keep.then(|| Pair::in_memory(job, widest(job.model))),
        spare: Default::default(),
        stages: Stages::default(),
    };
    let mut memory = job.keep.then(|| Pair::in_memory(job, n));
    let mut done = 0;
    let all = job.model.spec.layers;
    match State::load(job.state, &key) {
        // the head as well
        Some(s) if s.layers > all => return Ok(s.reports),
        Some(s) if stream(s.layers)?.digests(values)? == s.streams => {
            watch.resumed(s.layers);
            (done, work.reports) = (s.layers, s.reports);
            memory.as_mut().map_or(Ok(()), |m| m.copy(&stream(done)?, values))?;
        }
        _ => match &mut memory {
            Some(memory) => work.embed(memory)?,
            None => work.embed(&mut stream(0)?)?,
        },
    }
    let mut saves = Saves::default();
    for l in done..job.model.spec.layers {
        match &mut memory {
            Some(memory) => work.layer(l, None, memory)?,
            None => work.layer(l, Some(&stream(l)?), &mut stream(l + 1)?)?,
        }
        if memory.is_none() || saves.due() {
            let start = Instant::now();
            saves.save(|| {
                let mut to = stream(l + 1)?;
                memory.as_ref().map_or(Ok(()), |m| to.copy(m, values))?;
                let streams = memory.as_ref().unwrap_or(&to).digests(values)?;
                State { key: key.clone(), layers: l + 1, streams, reports: work.reports.clone() }.save(job.state)
            })?;
            work.stages.add("saving", start.elapsed());
        }
        watch.layer(l + 1);
        watch.stages(&work.stages);
    }
    if job.types.contains_key("output.weight") {
        match &memory {
            Some(memory) => work.head(memory)?,
            None => work.head(&stream(all)?)?,
        }
    }
    // what comes behind, tuning, may be cut short
    State { key, layers: all + 1, streams: Default::default(), reports: work.reports.clone() }.save(job.state)?;
    Ok(work.reports)
}

/// Whether an embedding of type `ty` is rounded so coarsely that it pays to know what its errors do; where it is the head as well
/// (`tied`), that is sooner.
pub fn weighs_embedding(ty: GgmlType, tied: bool) -> bool {
    let bits = 8.0 * ty.block_bytes() as f64 / ty.block_len() as f64;
    bits < if tied { 8.0 } else { 6.0 }
}

/// The norm of errors in rows of the embedding: E\[g gᵀ\] of the gradients there. Where the embedding is the head as well, the
/// mean over its rows of what they cost on both sides: the second moment of the head's input comes in as often as the gradients
/// at the logits have it.
pub(crate) fn embedding_factor(model: &Model<'_>, f: &backward::Fisher) -> Result<Factor, RoundingError> {
    let mut second = f.embedding.clone();
    if model.tied() {
        let weight: f64 = f.of(model.head_name()).unwrap_or_default().iter().sum();
        second.iter_mut().zip(&f.head_input).for_each(|(s, h)| *s += weight * h);
    }
    // few tokens for many columns, and gradients of a sampled label: damp well
    Factor::new(&second, 1, model.spec.embed, 10.0 * DAMPING)
}

pub(super) struct Work<'a> {
    pub job: &'a Job<'a>,
    pub runner: Runner<'a>,
    reports: Vec<Report>,
    /// In memory: what a step leaves to the next.
    kept: Option<Pair>,
    /// Buffers of [`Step::input`] of both paths, that the next call makes its result in.
    spare: [Vec<f32>; 2],
    pub stages: Stages,
}

impl Work<'_> {
    /// Rounds the embedding and embeds all tokens.
    fn embed(&mut self, stream: &mut Pair) -> Result<(), RoundingError> {
        let (job, n) = (self.job, self.job.model.spec.embed);
        self.runner.embed(job.tokens, &mut stream.float)?;
        let name = "token_embd.weight";
        let vocab = job.model.vocab;
        let mut table = vec![0f32; vocab * n];
        job.model.embedding_rows(0, vocab, &mut table)?;
        if let Some(&ty) = job.types.get(name) {
            let f = self.embedding_factor()?;
            let r = matrix::round(matrix::Form { ty, row_scales: job.row_scales }, &table, &table, &f)?;
            state::write_blocks(job.state, name, &r.bytes)?;
            self.reports.push(Report {
                name: name.into(),
                ty: ty.name().into(),
                error: r.error,
                nearest: r.nearest,
                held_out: None,
                accepted: true,
                note: None,
            });
            table = r.values;
        }
        if let Some(rounded) = &mut stream.rounded {
            let scale = job.model.spec.embedding_scale;
            let mut rows = Vec::new();
            for (i, tokens) in job.tokens.chunks(4096).enumerate() {
                rows.clear();
                tokens.iter().for_each(|&t| rows.extend_from_slice(&table[t as usize * n..][..n]));
                if scale != 1.0 {
                    crate::forward::kernels::scale(&mut rows, scale);
                }
                rounded.write(i * 4096 * n, &rows)?;
            }
        }
        Ok(())
    }

    /// The Hessian of a row of the embedding, from the model's own predictions.
    fn embedding_factor(&self) -> Result<Factor, RoundingError> {
        let (job, n) = (self.job, self.job.model.spec.embed);
        if job.backward == 0 {
            let mut identity = vec![0.0; linalg::packed_at(n, 0)];
            (0..n).for_each(|i| identity[linalg::packed_at(i, i)] = 1.0);
            return Factor::new(&identity, 1, n, 0.0);
        }
        let sizes = (job.backward, job.batch);
        let f = backward::sample(job.model, job.tokens, job.length, sizes, job.state, &mut |_| {})?;
        embedding_factor(job.model, &f)
    }

    /// One layer: `from` is the stream before it, `to` the one behind it; no `from`: `to` is both.
    fn layer(&mut self, l: usize, from: Option<&Pair>, to: &mut Pair) -> Result<(), RoundingError> {
        let job = self.job;
        let start = Instant::now();
        let float = job.model.layer(l, Activations::F32)?;
        let mut rounded = if job.one_pass { None } else { Some(job.model.layer(l, Activations::F32)?) };
        self.stages.add("reading weights", start.elapsed());
        for step in Step::ALL {
            let Some(linears) = step.linears(&float) else {
                // a mixture: both steps in one
                return self.experts(l, &float, rounded.as_mut(), to);
            };
            let columns = linears[0].inputs;
            let mut kept = match (step.leads_back(), self.kept.take()) {
                (true, None) => Some(Pair::in_files(job, step.name(), columns)?),
                (_, memory) => memory,
            };
            let from = if step.is_attention() { from } else { None };
            let keep = kept.as_mut().filter(|_| step.leads_back());
            let site = self.collect(step, (&float, rounded.as_ref()), from.unwrap_or(to), columns, keep)?;
            let Fitted { values, blocks, reports } = fit::round(job, site, &linears, DAMPING, &mut self.stages)?;
            self.done(blocks, reports)?;
            if let Some(linears) = rounded.as_mut().and_then(|r| step.linears_mut(r)) {
                linears.into_iter().zip(values).for_each(|(l, v)| l.weight = v);
            }
            if let Some(kept) = kept.as_ref().filter(|_| step.leads_back()) {
                let start = Instant::now();
                self.advance(step, (&float, rounded.as_ref()), (kept, columns), from, to)?;
                self.stages.add("forward", start.elapsed());
            }
            self.kept = kept.filter(|_| job.keep);
        }
        Ok(())
    }

    /// Tokens from which each batch starts, and the values that it has of a row of `columns`.
    pub(super) fn batches(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (all, step) = (self.job.tokens.len(), self.job.batch * self.job.length);
        (0..all).step_by(step).map(move |at| (at, step.min(all - at)))
    }

    /// Sums the input of a step over all windows; keeps it where the step leads back to the stream.
    fn collect(
        &mut self,
        step: Step,
        (float, rounded): (&Layer, Option<&Layer>),
        stream: &Pair,
        columns: usize,
        mut kept: Option<&mut Pair>,
    ) -> Result<Site, RoundingError> {
        let (n, length) = (self.job.model.spec.embed, self.job.length);
        let windows = self.job.tokens.len() / length;
        let mut site = Site::new(columns, rounded.is_some(), self.job.tokens.len())?;
        let mut buffer = Vec::new();
        for (at, tokens) in self.batches() {
            interrupted()?;
            let mut input = |layer: &Layer, stream: &Hidden, spare: Vec<f32>| {
                let x = stream.part(at * n, tokens * n, &mut buffer)?;
                Ok::<_, RoundingError>(self.runner.pass(|pass, s| {
                    step.give_back(spare, s);
                    step.input(layer, pass, x, s)
                }))
            };
            let [spare, spare_rounded] = std::mem::take(&mut self.spare);
            let start = Instant::now();
            let x = input(float, &stream.float, spare)?;
            let r = match (rounded, &stream.rounded) {
                (Some(layer), Some(stream)) => Some(input(layer, stream, spare_rounded)?),
                _ => None,
            };
            self.stages.add("forward", start.elapsed());
            let start = Instant::now();
            for (i, x) in x.chunks_exact(length * columns).enumerate() {
                let r = r.as_ref().map(|r| &r[i * length * columns..][..length * columns]);
                site.add(x, r, is_held_out(at / length + i, windows, length))?;
            }
            self.stages.add("sums", start.elapsed());
            let start = Instant::now();
            if let Some(kept) = &mut kept {
                kept.float.write(at * columns, &x)?;
                if let (Some(kept), Some(r)) = (&mut kept.rounded, &r) {
                    kept.write(at * columns, r)?;
                }
            }
            self.stages.add("keeping inputs", start.elapsed());
            self.spare = [x, r.unwrap_or_default()];
        }
        Ok(site)
    }

    /// `to = from + output(inputs)` on both paths; `from` none: the stream `to` as it is.
    fn advance(
        &mut self,
        step: Step,
        (float, rounded): (&Layer, Option<&Layer>),
        (inputs, columns): (&Pair, usize),
        from: Option<&Pair>,
        to: &mut Pair,
    ) -> Result<(), RoundingError> {
        let n = self.job.model.spec.embed;
        let (mut x, mut buffer) = (Vec::new(), Vec::new());
        for (at, tokens) in self.batches() {
            interrupted()?;
            let mut go = |layer: &Layer, inputs: &Hidden, from: Option<&Hidden>, to: &mut Hidden| {
                let input = inputs.part(at * columns, tokens * columns, &mut buffer)?;
                if let (None, Hidden::Memory(to)) = (from, &mut *to) {
                    let x = &mut to[at * n..][..tokens * n];
                    self.runner.pass(|pass, s| step.output(layer, pass, input, x, s));
                    return Ok(());
                }
                x.resize(tokens * n, 0.0);
                from.unwrap_or(to).read(at * n, &mut x)?;
                self.runner.pass(|pass, s| step.output(layer, pass, input, &mut x, s));
                to.write(at * n, &x)
            };
            go(float, &inputs.float, from.map(|f| &f.float), &mut to.float)?;
            if let (Some(layer), Some(inputs), Some(to)) = (rounded, &inputs.rounded, &mut to.rounded) {
                go(layer, inputs, from.and_then(|f| f.rounded.as_ref()), to)?;
            }
        }
        Ok(())
    }

    /// The head, from the stream behind the last layer.
    fn head(&mut self, stream: &Pair) -> Result<(), RoundingError> {
        let job = self.job;
        let (n, length) = (job.model.spec.embed, job.length);
        let windows = job.tokens.len() / length;
        let head = Head::new(job.model, Activations::F32, 0)?;
        let mut site = Site::new(n, stream.rounded.is_some(), job.tokens.len())?;
        let (mut x, mut r) = (vec![0f32; length * n], vec![0f32; length * n]);
        for w in 0..windows {
            interrupted()?;
            stream.float.read(w * length * n, &mut x)?;
            head.input(&mut x, &mut ())?;
            if let Some(rounded) = &stream.rounded {
                rounded.read(w * length * n, &mut r)?;
                head.input(&mut r, &mut ())?;
            }
            site.add(&x, stream.rounded.as_ref().map(|_| &r[..]), is_held_out(w, windows, length))?;
        }
        let head = job.model.head(Activations::F32)?;
        let fitted = fit::round(job, site, &[&head], DAMPING, &mut self.stages)?;
        self.done(fitted.blocks, fitted.reports)
    }

    /// Writes the blocks of tensors that are finished.
    pub(super) fn done(
        &mut self,
        blocks: Vec<(String, Vec<u8>)>,
        reports: Vec<state::Report>,
    ) -> Result<(), RoundingError> {
        blocks.iter().try_for_each(|(name, bytes)| state::write_blocks(self.job.state, name, bytes))?;
        self.reports.extend(reports);
        Ok(())
    }
}
