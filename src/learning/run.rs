//! A run that learns transforms.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::LearningError;
use super::manifold::Rates;
use super::network::Network;
use crate::forward::{Activations, Model, Runner, interrupted};
use crate::resume::{self, Descent};
use crate::transform::Transforms;
use crate::tuning::head::{Loss, Target};
use crate::tuning::run::fill;
use crate::tuning::teacher::Teacher;

/// How to learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Of rotations and of the logarithms of scales, at the start; they fall along a cosine.
    pub rotation: f64,
    pub scale: f64,
    pub loss: Loss,
    pub seed: u64,
    /// Steps between two looks at the windows that are held out.
    pub every: usize,
}

/// Rate of rotations; OSTQuant's code has 0.017 for batches of 32 thousand tokens (docs/quality.md has what was measured here).
const ROTATION: f64 = 0.01;
/// Rate of scales.
const SCALE: f64 = 0.01;

impl Settings {
    /// `steps` steps against `loss`.
    pub fn new(steps: usize, loss: Loss, seed: u64) -> Settings {
        Settings { steps, batch: 8, rotation: ROTATION, scale: SCALE, loss, seed, every: (steps / 10).clamp(5, 50) }
    }
}

/// What to learn from.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens to learn from, and some to decide on.
    pub tokens: &'a [u32],
    pub held_out: &'a [u32],
    pub length: usize,
    /// Of inputs, keys and values.
    pub activations: Activations,
    pub settings: Settings,
    /// Of everything that the result depends on beside the settings.
    pub key: String,
    pub save_every: Duration,
    /// Where the state is kept.
    pub state: &'a Path,
}

/// What a run says of itself: that of tuning.
pub use crate::tuning::run::{Done, Watch};

/// The head of the state; after it the values of the network, now and best.
type Kept = Descent<Settings>;

/// Name of the state's file.
pub const FILE: &str = "learning.state";

/// Learns from what `network` starts with; the transforms of the best step.
pub fn run(
    job: &Job<'_>,
    network: &mut Network<'_>,
    name: &str,
    watch: &mut dyn Watch,
) -> Result<(Done, Transforms), LearningError> {
    let s = &job.settings;
    let windows = job.tokens.len() / job.length;
    if windows == 0 || job.held_out.len() < job.length {
        return Err(LearningError::Refused(format!("{windows} windows are too few; give more text")));
    }
    let mut runner = Runner::new(job.model, job.length, job.activations)?;
    let mut teacher = Teacher::new(job.model, job.length, s.batch)?;
    let span = s.batch * job.length;
    let wanted = teacher.last(job.held_out)?;
    let width = wanted.len() / job.held_out.len();
    let decide = |runner: &mut Runner<'_>, network: &mut Network<'_>| -> Result<f64, LearningError> {
        let mut sum = 0.0;
        for (tokens, last) in job.held_out.chunks(span).zip(wanted.chunks(span * width)) {
            interrupted()?;
            sum += runner.pass(|pass, _| network.divergence(pass, tokens, last))? * tokens.len() as f64;
        }
        Ok(sum / job.held_out.len() as f64)
    };
    let mut kept = Kept::new(&job.key, s);
    let mut best: Vec<Vec<f64>> = Vec::new();
    if let Some(found) = load(job, &kept, network, &mut best)? {
        kept = found;
        watch.resumed(kept.step);
    } else {
        kept.before = decide(&mut runner, network)?;
        kept.best = kept.before;
        best = copy(network);
        watch.held_out(0, kept.before, true);
    }
    let (mut batch, mut times, mut saved) = (Vec::new(), Vec::new(), Instant::now());
    for step in kept.step + 1..=s.steps {
        interrupted()?;
        fill(&mut batch, job.tokens, job.length, (step - 1) * s.batch..step * s.batch, s.seed);
        let start = Instant::now();
        let last = teacher.last(&batch)?;
        let target = Target { loss: s.loss, last: &last, tokens: &batch, length: job.length };
        let loss = runner.pass(|pass, _| network.gradients(pass, &batch, &target))?;
        if !loss.is_finite() {
            return Err(LearningError::Refused(format!("the loss is {loss} at step {step}")));
        }
        let left = 0.5 * (1.0 + ((step - 1) as f64 / s.steps as f64 * std::f64::consts::PI).cos());
        network.step(&Rates { step, rotation: s.rotation * left, scale: s.scale * left })?;
        times.push(start.elapsed().as_secs_f64());
        watch.step(step, loss);
        if step % s.every == 0 || step == s.steps {
            let loss = decide(&mut runner, network)?;
            let better = loss < kept.best;
            if better {
                (kept.best, kept.best_step, best) = (loss, step, copy(network));
            }
            watch.held_out(step, loss, better);
        }
        if saved.elapsed() >= job.save_every || step == s.steps {
            kept.step = step;
            save(job, &kept, network, &mut best)?;
            saved = Instant::now();
        }
    }
    paste(network, &best);
    times.sort_by(f64::total_cmp);
    let seconds = times.get(times.len() / 2).copied().unwrap_or(0.0);
    let done = Done { before: kept.before, after: kept.best, step: kept.best_step, seconds };
    Ok((done, network.values.transforms(name)))
}

fn copy(network: &mut Network<'_>) -> Vec<Vec<f64>> {
    network.state().into_iter().map(|v| v.clone()).collect()
}

fn paste(network: &mut Network<'_>, values: &[Vec<f64>]) {
    network.state().into_iter().zip(values).for_each(|(to, from)| to.copy_from_slice(from));
    network.refresh();
}

fn save(job: &Job<'_>, kept: &Kept, network: &mut Network<'_>, best: &mut [Vec<f64>]) -> Result<(), LearningError> {
    let path = job.state.join(FILE);
    let mut write = || {
        std::fs::create_dir_all(job.state)?;
        let mut all = network.state();
        all.extend(best.iter_mut());
        resume::save(&path, kept, all)
    };
    write().map_err(|source| LearningError::Io { file: path.clone(), source })
}

fn load(
    job: &Job<'_>,
    kept: &Kept,
    network: &mut Network<'_>,
    best: &mut Vec<Vec<f64>>,
) -> Result<Option<Kept>, LearningError> {
    let path = job.state.join(FILE);
    *best = copy(network);
    let own = |f: &Kept| f.is_run_of(kept);
    let mut all = network.state();
    all.extend(best.iter_mut());
    let found = resume::load(&path, all, own).map_err(|source| LearningError::Io { file: path.clone(), source })?;
    if found.is_some() {
        network.refresh();
    }
    Ok(found)
}
