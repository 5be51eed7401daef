//! Learning layer by layer, for models that do not fit: each decoder layer against its own float output.
//!
//! The loss of a layer is `‖y' − y‖² / ‖y − x‖²` over a batch: `y` its float output, `x` its float input, which the rounded layer
//! gets too, `y'` what that makes of it. Its scales and rotations of values learn; the rotation of the stream, which all layers share,
//! stays what it was. In memory: one layer, a batch, and the float stream of the text twice (in files where it is large).

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::LearningError;
use super::fake::Fake;
use super::manifold::Rates;
use super::network::{Back, fuse, set_up, turned};
use super::run::Settings;
use super::values::Values;
use crate::forward::backward::layer::{Kept, LayerBack, Scratch};
use crate::forward::layer::Pass;
use crate::forward::{Activations, Hidden, Model, Runner, interrupted};
use crate::resume;
use crate::transform::{Anatomy, Transforms};
use crate::tuning::run::window;

/// What to learn from.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    pub anatomy: &'a Anatomy,
    /// Whole windows of `length` tokens, the last `held_out` of them to decide on.
    pub tokens: &'a [u32],
    pub held_out: usize,
    pub length: usize,
    /// Of inputs, keys and values.
    pub activations: Activations,
    /// Steps are those of each layer; the loss is not looked at.
    pub settings: Settings,
    pub key: String,
    /// Keep the stream in memory, not in files of the state's folder.
    pub keep: bool,
    pub save_every: Duration,
    pub state: &'a Path,
}

/// What a run says of itself.
pub trait Watch {
    /// Layer `l` is done: its loss on windows held out, before and after.
    fn layer(&mut self, l: usize, before: f64, after: f64);
    fn resumed(&mut self, layers: usize);
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Done {
    version: String,
    key: String,
    settings: Settings,
    layers: usize,
}

/// Bytes that a run takes beside the streams.
pub fn memory(model: &Model<'_>, tokens: usize) -> u64 {
    let s = &model.spec;
    let kept = crate::tuning::student::kept(model, tokens) / s.layers.max(1) as u64;
    let scratch = tokens * (8 * s.embed + 4 * s.heads * s.head_dim + 3 * model.feed_forward()) * 4;
    (96 << 20) + 6 * model.layer_bytes() + kept + scratch as u64
}

/// Learns from what `start` has; the transforms, each layer's of its best step.
pub fn run(
    job: &Job<'_>,
    start: &Transforms,
    fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
    name: &str,
    watch: &mut dyn Watch,
) -> Result<Transforms, LearningError> {
    let (model, n) = (job.model, job.model.spec.embed);
    let windows = job.tokens.len() / job.length;
    if windows <= job.held_out || job.held_out == 0 {
        return Err(LearningError::Refused(format!("{windows} windows are too few; give more text")));
    }
    std::fs::create_dir_all(job.state).map_err(|source| LearningError::Io { file: job.state.into(), source })?;
    let count = job.tokens.len() * n;
    let stream = |number: usize| match job.keep {
        true => Ok(Hidden::Memory(vec![0.0; count])),
        false => Hidden::scratch(job.state, 2000 + number, count as u64 * 4),
    };
    let (mut x, mut y) = (stream(0)?, stream(1)?);
    let mut float = Runner::new(model, job.length, Activations::F32)?;
    float.embed(job.tokens, &mut x)?;
    let mut values = Values::new(start, job.anatomy);
    let mut done = Done {
        version: env!("CARGO_PKG_VERSION").into(),
        key: job.key.clone(),
        settings: job.settings.clone(),
        layers: 0,
    };
    let path = job.state.join(super::run::FILE);
    let io = |source| LearningError::Io { file: path.clone(), source };
    let own = |f: &Done| (&f.version, &f.key, &f.settings) == (&done.version, &done.key, &done.settings);
    if let Some(found) = resume::load(&path, values.state(), own).map_err(io)? {
        values.refresh();
        watch.resumed(found.layers);
        done = found;
    }
    let mut runner = Runner::new(model, job.length, job.activations)?;
    let mut saved = Instant::now();
    for l in 0..model.spec.layers {
        float.layer(l, &x, &mut y, job.tokens.len(), job.settings.batch, &mut ())?;
        if l >= done.layers {
            let (before, after) = layer(job, &mut runner, (&x, &y), &mut values, fake, l)?;
            done.layers = l + 1;
            watch.layer(l, before, after);
            if saved.elapsed() >= job.save_every || done.layers == model.spec.layers {
                resume::save(&path, &done, values.state()).map_err(io)?;
                saved = Instant::now();
            }
        }
        std::mem::swap(&mut x, &mut y);
    }
    Ok(values.transforms(name))
}

/// A layer in work.
struct Local<'a> {
    layer: LayerBack,
    kept: Kept,
    scratch: Scratch,
    streams: (&'a Hidden, &'a Hidden),
    length: usize,
}

impl Local<'_> {
    /// The loss over some windows. With `gradient` it becomes that at the layer's output; `x` the input that it had.
    fn loss(
        &mut self,
        pass: &Pass<'_>,
        values: &Values,
        windows: &[usize],
        mut gradient: Option<&mut Vec<f32>>,
    ) -> Result<(f64, Vec<f32>), LearningError> {
        let n = pass.model.spec.embed;
        let size = self.length * n;
        let (mut x, mut y) = (vec![0f32; windows.len() * size], vec![0f32; windows.len() * size]);
        for (i, w) in windows.iter().enumerate() {
            self.streams.0.read(w * size, &mut x[i * size..][..size])?;
            self.streams.1.read(w * size, &mut y[i * size..][..size])?;
        }
        let square =
            |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum() };
        let branch = square(&y, &x).max(f64::MIN_POSITIVE);
        let (x, y) = (turned(values, x), turned(values, y));
        let mut out = Vec::new();
        self.layer.forward(pass, &x, &mut self.kept, &mut self.scratch);
        self.layer.output(pass, &self.kept, &mut self.scratch, &mut out);
        let loss = square(&out, &y) / branch;
        if let Some(d) = &mut gradient {
            d.clear();
            d.extend(out.iter().zip(&y).map(|(o, y)| (2.0 * f64::from(o - y) / branch) as f32));
        }
        Ok((loss, x))
    }
}

/// Learns one layer; its loss on windows held out, before and after.
fn layer(
    job: &Job<'_>,
    runner: &mut Runner<'_>,
    streams: (&Hidden, &Hidden),
    values: &mut Values,
    fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
    l: usize,
) -> Result<(f64, f64), LearningError> {
    let s = &job.settings;
    let windows = job.tokens.len() / job.length;
    let (learn, eps) = (windows - job.held_out, job.model.spec.rms_eps);
    let decide: Vec<usize> = (learn..windows).collect();
    let (base, layer) = set_up(job.model, job.anatomy, values, fake, l)?;
    let (kept, scratch) = Default::default();
    let mut local = Local { layer, kept, scratch, streams, length: job.length };
    let held_out = |runner: &mut Runner<'_>, local: &mut Local<'_>, values: &Values| {
        let mut sum = 0.0;
        for some in decide.chunks(s.batch) {
            interrupted()?;
            let (loss, _) = runner.pass(|pass, _| local.loss(pass, values, some, None))?;
            sum += loss * some.len() as f64;
        }
        Ok::<f64, LearningError>(sum / decide.len() as f64)
    };
    let before = held_out(runner, &mut local, values)?;
    let copy =
        |values: &mut Values| -> Vec<Vec<f64>> { values.layers[l].state().into_iter().map(|v| v.clone()).collect() };
    let mut best = (before, copy(values));
    let mut d = Vec::new();
    for step in 1..=s.steps {
        interrupted()?;
        let batch: Vec<usize> = (0..s.batch).map(|i| window((step - 1) * s.batch + i, learn, s.seed)).collect();
        runner.pass(|pass, _| {
            let (loss, x) = local.loss(pass, values, &batch, Some(&mut d))?;
            if !loss.is_finite() {
                return Err(LearningError::Refused(format!("the loss is {loss} at step {step} of layer {l}")));
            }
            let mut sink = Back { base: &base, values: &mut *values, layer: l, eps };
            local.layer.back(pass, &x, &mut d, &mut local.kept, &mut local.scratch, &mut sink)?;
            Ok(())
        })?;
        if let Some(r) = &mut values.r_res {
            r.gradient.fill(0.0);
        }
        let left = 0.5 * (1.0 + ((step - 1) as f64 / s.steps as f64 * std::f64::consts::PI).cos());
        let rates = Rates { step, rotation: s.rotation * left, scale: s.scale * left };
        let own = &mut values.layers[l];
        own.r_ov.iter_mut().try_for_each(|r| r.step(&rates))?;
        own.all_scales().for_each(|s| s.step(&rates));
        fuse(&base, &mut local.layer, values, l);
        if step % s.every == 0 || step == s.steps {
            let loss = held_out(runner, &mut local, values)?;
            if loss < best.0 {
                best = (loss, copy(values));
            }
        }
    }
    values.layers[l].state().into_iter().zip(&best.1).for_each(|(to, from)| to.copy_from_slice(from));
    values.layers[l].r_ov.iter_mut().for_each(|r| r.refresh());
    values.layers[l].all_scales().for_each(|s| s.refresh());
    Ok((before, best.0))
}
