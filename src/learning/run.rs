//! A run that learns transforms.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::LearningError;
use super::engine::Engine;
use super::manifold::Rates;
use crate::forward::interrupted;
use crate::resume::{self, Descent};
use crate::transform::Transforms;
use crate::tuning::head::Loss;
use crate::tuning::run::fill;

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
    /// Whole windows of `length` tokens to learn from, and some to decide on.
    pub tokens: &'a [u32],
    pub held_out: &'a [u32],
    pub length: usize,
    pub settings: Settings,
    /// Of everything that the result depends on beside the settings.
    pub key: String,
    pub save_every: Duration,
    /// Where the state is kept.
    pub state: &'a Path,
}

/// What a run says of itself: that of tuning.
pub use crate::tuning::run::{Done, Watch};

/// The head of the state; after it rotations and scales, now and best.
type Kept = Descent<Settings>;

/// Name of the state's file.
pub const FILE: &str = "learning.state";

/// Learns from what `engine` starts with; the transforms of the best step.
pub fn run(
    job: &Job<'_>,
    engine: &mut dyn Engine,
    name: &str,
    watch: &mut dyn Watch,
) -> Result<(Done, Transforms), LearningError> {
    let s = &job.settings;
    let windows = job.tokens.len() / job.length;
    if windows == 0 || job.held_out.len() < job.length {
        return Err(LearningError::Refused(format!("{windows} windows are too few; give more text")));
    }
    let mut kept = Kept::new(&job.key, s);
    let mut best: Vec<Vec<f64>> = Vec::new();
    if let Some(found) = load(job, &kept, engine, &mut best)? {
        kept = found;
        watch.resumed(kept.step);
    } else {
        kept.before = engine.divergence(job.held_out)?;
        kept.best = kept.before;
        best = copy(engine);
        watch.held_out(0, kept.before, true);
    }
    let (mut batch, mut times, mut saved) = (Vec::new(), Vec::new(), Instant::now());
    for step in kept.step + 1..=s.steps {
        interrupted()?;
        fill(&mut batch, job.tokens, job.length, (step - 1) * s.batch..step * s.batch, s.seed);
        let start = Instant::now();
        let loss = engine.gradients(&batch, s.loss)?;
        if !loss.is_finite() {
            return Err(LearningError::Refused(format!("the loss is {loss} at step {step}")));
        }
        let left = 0.5 * (1.0 + ((step - 1) as f64 / s.steps as f64 * std::f64::consts::PI).cos());
        engine.values().step(&Rates { step, rotation: s.rotation * left, scale: s.scale * left })?;
        engine.fuse()?;
        times.push(start.elapsed().as_secs_f64());
        watch.step(step, loss);
        if step % s.every == 0 || step == s.steps {
            let loss = engine.divergence(job.held_out)?;
            let better = loss < kept.best;
            if better {
                (kept.best, kept.best_step, best) = (loss, step, copy(engine));
            }
            watch.held_out(step, loss, better);
        }
        if saved.elapsed() >= job.save_every || step == s.steps {
            kept.step = step;
            save(job, &kept, engine, &mut best)?;
            saved = Instant::now();
        }
    }
    paste(engine, &best);
    times.sort_by(f64::total_cmp);
    let seconds = times.get(times.len() / 2).copied().unwrap_or(0.0);
    let done = Done { before: kept.before, after: kept.best, step: kept.best_step, seconds };
    Ok((done, engine.values().transforms(name)))
}

fn copy(engine: &mut dyn Engine) -> Vec<Vec<f64>> {
    engine.values().state().into_iter().map(|v| v.clone()).collect()
}

/// The weights stay those of the last step.
fn paste(engine: &mut dyn Engine, values: &[Vec<f64>]) {
    engine.values().state().into_iter().zip(values).for_each(|(to, from)| to.copy_from_slice(from));
    engine.values().refresh();
}

fn save(job: &Job<'_>, kept: &Kept, engine: &mut dyn Engine, best: &mut [Vec<f64>]) -> Result<(), LearningError> {
    let path = job.state.join(FILE);
    let mut write = || {
        std::fs::create_dir_all(job.state)?;
        let mut all = engine.values().state();
        all.extend(best.iter_mut());
        resume::save(&path, kept, all)
    };
    write().map_err(|source| LearningError::Io { file: path.clone(), source })
}

fn load(
    job: &Job<'_>,
    kept: &Kept,
    engine: &mut dyn Engine,
    best: &mut Vec<Vec<f64>>,
) -> Result<Option<Kept>, LearningError> {
    let path = job.state.join(FILE);
    *best = copy(engine);
    let own = |f: &Kept| f.is_run_of(kept);
    let mut all = engine.values().state();
    all.extend(best.iter_mut());
    let found = resume::load(&path, all, own).map_err(|source| LearningError::Io { file: path.clone(), source })?;
    if found.is_some() {
        engine.values().refresh();
        engine.fuse()?;
    }
    Ok(found)
}
