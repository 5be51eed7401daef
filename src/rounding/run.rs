//! A model, rounded layer by layer behind its own rounded layers.
//!
//! Two residual streams run side by side: the float model's, and the one of what is rounded already. At each of the four
//! inputs of a layer (of q, k, v; of the output matrix; of gate and up; of down) both are summed over all windows, the weights
//! are rounded, and the rounded stream goes on with them. With `one_pass` there is only the float stream. The head comes
//! last, the embedding first. In memory: one layer twice as f32, the sums of one input, one batch of windows. Streams and the
//! inputs that the next step needs lie in files of the state folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::factor::Factor;
use super::site::{Site, is_held_out};
use super::state::{self, Key, Report, State};
use super::{RoundingError, matrix};
use crate::calibration::run::Watch;
use crate::forward::backward;
use crate::forward::gemm::product;
use crate::forward::layer::{FeedForward, Layer, Linear, Pass, Scratch, gated};
use crate::forward::run::Head;
use crate::forward::{Activations, Hidden, Model, Runner, interrupted};
use crate::gguf::GgmlType;

/// Damping of the Hessian, as a part of the mean of its diagonal.
const DAMPING: f64 = 0.01;

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
    /// Windows that go through a layer together.
    pub batch: usize,
    /// Windows of the backward pass that weighs the errors of the embedding; 0: all columns weigh alike.
    pub backward: usize,
    /// Keep the inputs that the next step needs in memory ([`kept`]), not in files.
    pub keep: bool,
    pub state: &'a Path,
}

/// Bytes of the inputs that a step leaves to the next, of `tokens` tokens.
pub fn kept(model: &Model<'_>, tokens: usize, one_pass: bool) -> u64 {
    let widest = model.feed_forward().max(model.spec.heads * model.spec.head_dim);
    (tokens * widest * 4 * if one_pass { 1 } else { 2 }) as u64
}

/// Bytes of memory that a run needs, with `batch` windows of `length` tokens.
pub fn memory(model: &Model<'_>, length: usize, batch: usize, threads: usize) -> u64 {
    let s = &model.spec;
    let widest = (s.embed.max(model.feed_forward()).max(s.heads * s.head_dim)) as u64;
    // one site: packed sums, Σ (x − x̂) x̂ᵀ; its factor: H, L and the inverse in f64
    let square = widest * widest * (4 + 4 + 24);
    let held_out = 2 * 8192 * widest * 4;
    let tiles = threads as u64 * (64 * widest * 4 * 6 + (4 << 20));
    let batch = 2 * Runner::batch_bytes(model, batch * length);
    (96 << 20) + 2 * model.layer_bytes() + square + held_out + tiles + batch
}

/// A stream or its rounded twin in a file.
fn file(job: &Job<'_>, what: &str, columns: usize) -> Result<Hidden, RoundingError> {
    let path: PathBuf = job.state.join(format!("rounding-{what}.f32"));
    Ok(Hidden::in_file(&path, (job.tokens.len() * columns * 4) as u64)?)
}

/// Both paths: the float one, and the rounded one where there are two.
struct Pair {
    float: Hidden,
    rounded: Option<Hidden>,
}

impl Pair {
    fn new(job: &Job<'_>, what: &str, columns: usize) -> Result<Pair, RoundingError> {
        let rounded = (!job.one_pass).then(|| file(job, &format!("{what}-rounded"), columns)).transpose()?;
        Ok(Pair { float: file(job, what, columns)?, rounded })
    }

    /// What a step leaves to the next.
    fn kept(job: &Job<'_>, step: Step, columns: usize) -> Result<Pair, RoundingError> {
        if !job.keep {
            return Pair::new(job, step.name(), columns);
        }
        let memory = || Hidden::Memory(vec![0.0; job.tokens.len() * columns]);
        Ok(Pair { float: memory(), rounded: (!job.one_pass).then(memory) })
    }

    fn digests(&self, values: usize) -> Result<[String; 2], RoundingError> {
        let rounded = self.rounded.as_ref().map_or(Ok(String::new()), |r| r.digest(values))?;
        Ok([self.float.digest(values)?, rounded])
    }
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
        types: job.types.iter().map(|(n, t)| (n.clone(), t.name().to_string())).collect(),
    };
    let stream = |layers: usize| Pair::new(job, &format!("stream-{}", layers % 2), n);
    let mut work = Work { job, runner: Runner::new(job.model, job.length, Activations::F32)?, reports: Vec::new() };
    let mut done = 0;
    match State::load(job.state, &key) {
        Some(s) if stream(s.layers)?.digests(values)? == s.streams => {
            watch.resumed(s.layers);
            (done, work.reports) = (s.layers, s.reports);
        }
        _ => work.embed(&mut stream(0)?)?,
    }
    for l in done..job.model.spec.layers {
        let (from, mut to) = (stream(l)?, stream(l + 1)?);
        work.layer(l, &from, &mut to)?;
        let streams = to.digests(values)?;
        State { key: key.clone(), layers: l + 1, streams, reports: work.reports.clone() }.save(job.state)?;
        watch.layer(l + 1);
    }
    let last = job.model.spec.layers;
    if job.types.contains_key("output.weight") {
        work.head(&stream(last)?)?;
    }
    Ok(work.reports)
}

struct Work<'a> {
    job: &'a Job<'a>,
    runner: Runner<'a>,
    reports: Vec<Report>,
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
            let r = matrix::round(ty, &table, &table, &f)?;
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

    /// The Hessian of a row of the embedding: E[g gᵀ] of the gradients there, from the model's own predictions.
    fn embedding_factor(&self) -> Result<Factor, RoundingError> {
        let (job, n) = (self.job, self.job.model.spec.embed);
        let par = crate::linalg::all_threads();
        if job.backward == 0 {
            return Factor::new(identity(n), n, 0.0, par);
        }
        let text = &job.tokens[..job.tokens.len().min(job.backward * job.length)];
        let windows = backward::Windows { length: job.length, batch: job.batch.min(8), first: 1 };
        let labels = backward::Labels::Sampled(1);
        let f = backward::fisher_of(job.model, text, windows, labels, Some(job.state), &mut |_| {})?;
        // few tokens for many columns, and gradients of a sampled label: damp well
        Factor::new(crate::linalg::unpack(&f.embedding, n), n, 10.0 * DAMPING, par)
    }

    /// One layer: `from` is the stream before it, `to` the one behind it.
    fn layer(&mut self, l: usize, from: &Pair, to: &mut Pair) -> Result<(), RoundingError> {
        let job = self.job;
        let float = job.model.layer(l, Activations::F32)?;
        let mut rounded = if job.one_pass { None } else { Some(job.model.layer(l, Activations::F32)?) };
        for step in Step::ALL {
            let columns = step.linears(&float).ok_or(RoundingError::Experts)?[0].inputs;
            let mut kept = match step.leads_back() {
                true => Some(Pair::kept(job, step, columns)?),
                false => None,
            };
            let stream = if step.is_attention() { from } else { &*to };
            let mut site = self.collect(step, (&float, rounded.as_ref()), stream, columns, kept.as_mut())?;
            let values = self.round(&mut site, &step.linears(&float).ok_or(RoundingError::Experts)?)?;
            drop(site);
            if let Some(linears) = rounded.as_mut().and_then(|r| step.linears_mut(r)) {
                linears.into_iter().zip(values).for_each(|(l, v)| l.weight = v);
            }
            if let Some(kept) = kept {
                let from = step.is_attention().then_some(from);
                self.advance(step, (&float, rounded.as_ref()), (&kept, columns), from, to)?;
            }
        }
        Ok(())
    }

    /// Tokens from which each batch starts, and the values that it has of a row of `columns`.
    fn batches(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
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
        let mut site = Site::new(columns, rounded.is_some())?;
        let (mut x, mut r) = (Vec::new(), Vec::new());
        for (at, tokens) in self.batches() {
            interrupted()?;
            let mut input = |layer: &Layer, stream: &Hidden, x: &mut Vec<f32>| {
                x.resize(tokens * n, 0.0);
                stream.read(at * n, x)?;
                let found = self.runner.pass(|pass, s| step.input(layer, pass, x, s));
                x.clear();
                x.extend_from_slice(&found);
                self.runner.pass(|_, s| step.give_back(found, s));
                Ok::<(), RoundingError>(())
            };
            input(float, &stream.float, &mut x)?;
            if let (Some(layer), Some(stream)) = (rounded, &stream.rounded) {
                input(layer, stream, &mut r)?;
            }
            for (i, x) in x.chunks_exact(length * columns).enumerate() {
                let r = rounded.map(|_| &r[i * length * columns..][..length * columns]);
                site.add(x, r, is_held_out(at / length + i, windows, length))?;
            }
            if let Some(kept) = &mut kept {
                kept.float.write(at * columns, &x)?;
                if let Some(kept) = &mut kept.rounded {
                    kept.write(at * columns, &r)?;
                }
            }
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
        let (mut x, mut input) = (Vec::new(), Vec::new());
        for (at, tokens) in self.batches() {
            interrupted()?;
            x.resize(tokens * n, 0.0);
            input.resize(tokens * columns, 0.0);
            let mut go = |layer: &Layer, inputs: &Hidden, from: Option<&Hidden>, to: &mut Hidden| {
                inputs.read(at * columns, &mut input)?;
                from.unwrap_or(to).read(at * n, &mut x)?;
                self.runner.pass(|pass, s| step.output(layer, pass, &input, &mut x, s));
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
        let mut site = Site::new(n, stream.rounded.is_some())?;
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
        self.round(&mut site, &[&head])?;
        Ok(())
    }

    /// Rounds the weights of a site; what the rounded stream goes on with.
    fn round(&mut self, site: &mut Site, linears: &[&Linear]) -> Result<Vec<Vec<f32>>, RoundingError> {
        let par = crate::linalg::all_threads();
        let n = linears[0].inputs;
        let wanted = linears.iter().any(|l| self.job.types.contains_key(&l.name));
        if !wanted {
            return Ok(linears.iter().map(|l| l.weight.clone()).collect());
        }
        let tokens = site.tokens();
        let (h, correction) = site.finish()?;
        let factor = Factor::new(h, n, DAMPING, par)?;
        let mut note = None;
        if factor.damping > DAMPING {
            note = Some(format!("its Hessian needed a damping of {}", factor.damping));
        } else if tokens < n as u64 {
            note = Some(format!("{tokens} tokens for {n} columns"));
        }
        let mut all = Vec::new();
        let mut blocks: Vec<(&str, Vec<u8>)> = Vec::new();
        for l in linears {
            let Some(&ty) = self.job.types.get(&l.name) else {
                all.push(l.weight.clone());
                continue;
            };
            let target = correction.as_ref().map(|c| c.of(&l.weight, site));
            let target = target.as_deref().unwrap_or(&l.weight);
            let mut r = matrix::round(ty, &l.weight, target, &factor)?;
            let held_out = held_out(site, l, &r.values, ty, &factor)?;
            let accepted = held_out.is_none_or(|(own, nearest)| own <= nearest);
            if !accepted {
                (r.bytes, r.values) = matrix::nearest(ty, &l.weight, &factor)?;
            }
            self.reports.push(Report {
                name: l.name.clone(),
                ty: ty.name().into(),
                error: r.error,
                nearest: r.nearest,
                held_out,
                accepted,
                note: note.clone(),
            });
            // parts of a fused weight stand one behind the other
            match blocks.last_mut().filter(|(name, _)| *name == l.name) {
                Some((_, bytes)) => bytes.extend(r.bytes),
                None => blocks.push((&l.name, r.bytes)),
            }
            all.push(r.values);
        }
        for (name, bytes) in blocks {
            state::write_blocks(self.job.state, name, &bytes)?;
        }
        Ok(all)
    }
}

/// Square error of the output on the held-out windows: of `values`, and of nearest rounding.
fn held_out(
    site: &Site,
    l: &Linear,
    values: &[f32],
    ty: GgmlType,
    factor: &Factor,
) -> Result<Option<(f64, f64)>, RoundingError> {
    if site.float.is_empty() {
        return Ok(None);
    }
    let n = l.inputs;
    let rounded = if site.rounded.is_empty() { &site.float } else { &site.rounded };
    let size = site.float.len() / n * l.outputs();
    let (mut want, mut got) = (vec![0f32; size], vec![0f32; size]);
    product(&site.float, &l.weight, n, &mut want);
    let mut error = |values: &[f32]| {
        product(rounded, values, n, &mut got);
        want.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    let own = error(values);
    let (_, nearest) = matrix::nearest(ty, &l.weight, factor)?;
    Ok(Some((own, error(&nearest))))
}

fn identity(n: usize) -> Vec<f64> {
    let mut h = vec![0.0; n * n];
    (0..n).for_each(|i| h[i * n + i] = 1.0);
    h
}

/// The four inputs of a layer, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Qkv,
    Output,
    GateUp,
    Down,
}

impl Step {
    const ALL: [Step; 4] = [Step::Qkv, Step::Output, Step::GateUp, Step::Down];

    fn name(self) -> &'static str {
        match self {
            Step::Qkv => "qkv",
            Step::Output => "attended",
            Step::GateUp => "gate-up",
            Step::Down => "hidden",
        }
    }

    fn is_attention(self) -> bool {
        matches!(self, Step::Qkv | Step::Output)
    }

    /// Its output is added to the stream.
    fn leads_back(self) -> bool {
        matches!(self, Step::Output | Step::Down)
    }

    fn linears(self, layer: &Layer) -> Option<Vec<&Linear>> {
        Some(match (self, &layer.ffn) {
            (Step::Qkv, _) => vec![&layer.q, &layer.k, &layer.v],
            (Step::Output, _) => vec![&layer.o],
            (Step::GateUp, FeedForward::Dense { gate, up, .. }) => vec![gate, up],
            (Step::Down, FeedForward::Dense { down, .. }) => vec![down],
            _ => return None,
        })
    }

    fn linears_mut(self, layer: &mut Layer) -> Option<Vec<&mut Linear>> {
        Some(match (self, &mut layer.ffn) {
            (Step::Qkv, _) => vec![&mut layer.q, &mut layer.k, &mut layer.v],
            (Step::Output, _) => vec![&mut layer.o],
            (Step::GateUp, FeedForward::Dense { gate, up, .. }) => vec![gate, up],
            (Step::Down, FeedForward::Dense { down, .. }) => vec![down],
            _ => return None,
        })
    }

    /// The input of its linears, from the stream `x`, in a buffer of `s`.
    fn input(self, layer: &Layer, pass: &Pass<'_>, x: &[f32], s: &mut Scratch) -> Vec<f32> {
        match self {
            Step::Qkv => layer.attention_input(pass, x, s),
            Step::GateUp => layer.feed_forward_input(pass, x, s),
            Step::Output => {
                let input = layer.attention_input(pass, x, s);
                layer.attend(pass, &input, s);
                s.normed = input;
                std::mem::take(&mut s.attended)
            }
            Step::Down => {
                let input = layer.feed_forward_input(pass, x, s);
                if let FeedForward::Dense { gate, up, .. } = &layer.ffn {
                    gated(pass, (gate, up), &input, s);
                }
                s.normed = input;
                std::mem::take(&mut s.gate)
            }
        }
    }

    /// Returns the buffer of [`Step::input`].
    fn give_back(self, buffer: Vec<f32>, s: &mut Scratch) {
        match self {
            Step::Qkv | Step::GateUp => s.normed = buffer,
            Step::Output => s.attended = buffer,
            Step::Down => s.gate = buffer,
        }
    }

    /// Adds the output for `input` to the stream `x`.
    fn output(self, layer: &Layer, pass: &Pass<'_>, input: &[f32], x: &mut [f32], s: &mut Scratch) {
        match self {
            Step::Output => layer.attention_output(pass, input, x, s),
            Step::Down => layer.feed_forward_output(pass, input, x, s),
            Step::Qkv | Step::GateUp => {}
        }
    }
}
