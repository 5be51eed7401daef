//! A tuning run: batches in a seeded order, rates that fall linearly, windows that decide which step is kept.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::TuningError;
use super::blocks::Adam;
use super::engine::{Engine, Processor};
use super::layer::Rounded;
use super::student::Student;
use crate::forward::{Model, interrupted};
use crate::gguf::GgmlType;
use crate::resume::{self, Descent};
use crate::rounding::state;

/// How to tune.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub steps: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Relative step of scales, minima and norms, at the start.
    pub rate: f32,
    /// Step of codes, in levels, at the start.
    pub code_rate: f32,
    /// Codes of types with at most so many levels are tuned.
    pub latent: u32,
    pub seed: u64,
    /// Steps between two looks at the windows that are held out.
    pub every: usize,
}

impl Settings {
    /// What measured best: see docs/quality.md. `two_bits`: the coarsest type of the layers has two; codes then go further in
    /// few steps.
    pub fn new(steps: usize, batch: usize, two_bits: bool) -> Settings {
        let least = 2e-3;
        let code_rate = if two_bits { (1.5 / steps.max(1) as f32).clamp(least, 5e-3) } else { least };
        Settings { steps, batch, rate: 5e-4, code_rate, latent: 16, seed: 1, every: (steps / 12).clamp(10, 50) }
    }
}

/// Windows of a step where nothing else is said.
pub const BATCH: u32 = 8;

/// Where to tune.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    #[default]
    Cpu,
    /// An NVIDIA GPU, in f32.
    Cuda,
    /// The same with products in bf16.
    CudaBf16,
}

/// What a program without the feature `cuda` says of a GPU.
pub(crate) const WITHOUT_CUDA: &str = "this program was built without the feature `cuda`";

impl Device {
    /// Why this program cannot use it, whatever the machine has.
    pub fn refused(self) -> Option<&'static str> {
        (self != Device::Cpu && !cfg!(feature = "cuda")).then_some(WITHOUT_CUDA)
    }

    /// How the GPU computes.
    #[cfg(feature = "cuda")]
    pub(crate) fn passes(self) -> super::gpu::Passes {
        super::gpu::Passes { bf16: self == Device::CudaBf16, again: false }
    }
}

/// What to tune.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens to learn from, and some to decide on.
    pub tokens: &'a [u32],
    pub held_out: &'a [u32],
    pub length: usize,
    /// The tensors that were rounded.
    pub rounded: &'a BTreeMap<String, Rounded>,
    pub settings: Settings,
    /// Of everything that the result depends on beside the settings.
    pub key: String,
    pub again: bool,
    pub device: Device,
    /// Time between two states that are kept.
    pub save_every: Duration,
    pub state: &'a Path,
}

/// What a run says of itself.
pub trait Watch {
    /// `step` steps are done; the mean divergence of the last.
    fn step(&mut self, step: usize, loss: f64);
    /// The divergence on windows that are held out, and whether it is the least so far.
    fn held_out(&mut self, step: usize, loss: f64, best: bool);
    fn resumed(&mut self, step: usize);
}

/// What tuning brought.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Divergence on the windows held out, before and after.
    pub before: f64,
    pub after: f64,
    /// The step that was kept.
    pub step: usize,
    /// The median of the seconds that steps took; 0 if none was left to do.
    pub seconds: f64,
}

/// The head of `tuning.state`; after it all values of [`Student::state`].
type Kept = Descent<Settings>;

/// Time between two states that are kept, for a run of a command.
pub const SAVE_EVERY: Duration = Duration::from_secs(60);

/// Name, type and bytes of a tensor.
type Tensor = (String, GgmlType, Vec<u8>);

/// Where the run's numbers are.
fn state_path(folder: &Path) -> PathBuf {
    folder.join("tuning.state")
}

/// The name under which a tuned tensor lies in the state folder.
pub fn tuned(name: &str) -> String {
    format!("tuned.{name}")
}

/// Tunes; the blocks of the best step are then in the state folder under [`tuned`] names.
pub fn run(job: &Job<'_>, watch: &mut dyn Watch) -> Result<(Done, Vec<(String, GgmlType)>), TuningError> {
    let s = &job.settings;
    let windows = job.tokens.len() / job.length;
    if windows == 0 || job.held_out.len() < job.length {
        return Err(TuningError::Refused(format!("{windows} windows are too few; give more text")));
    }
    let student = Student::new(job.model, job.rounded, s.latent, job.again)?;
    let mut engine = engine(job, student)?;
    let mut kept = Kept::new(&job.key, s);
    if load(job, &mut kept, engine.pull()?)? {
        engine.push()?;
        watch.resumed(kept.step);
    }
    let mut best_bytes = Vec::new();
    let mut saved = Instant::now();
    if kept.step == 0 {
        kept.before = engine.loss(job.held_out)?;
        (kept.best, kept.best_step) = (kept.before, 0);
        best_bytes = engine.pull()?.bytes();
        watch.held_out(0, kept.before, true);
    }
    let (mut batch, mut times) = (Vec::new(), Vec::new());
    for step in kept.step + 1..=s.steps {
        interrupted()?;
        fill(&mut batch, job.tokens, job.length, (step - 1) * s.batch..step * s.batch, s.seed);
        let left = 1.0 - (step - 1) as f32 / s.steps as f32;
        let adam = Adam::new(step, s.rate * left, s.code_rate * left);
        let start = Instant::now();
        let loss = engine.step(&batch, &adam)?;
        times.push(start.elapsed().as_secs_f64());
        if !loss.is_finite() {
            return Err(TuningError::Refused(format!("the loss is {loss} at step {step}")));
        }
        watch.step(step, loss);
        if step % s.every == 0 || step == s.steps {
            let loss = engine.loss(job.held_out)?;
            let best = loss < kept.best;
            let keep = saved.elapsed() >= job.save_every && step < s.steps;
            if best || keep {
                let student = engine.pull()?;
                if best {
                    (kept.best, kept.best_step) = (loss, step);
                    best_bytes = student.bytes();
                }
                if keep {
                    kept.step = step;
                    write_best(job, &mut best_bytes)?;
                    save(job, &kept, student)?;
                    saved = Instant::now();
                }
            }
            watch.held_out(step, loss, best);
        }
    }
    write_best(job, &mut best_bytes)?;
    let tensors = engine.pull()?.bytes().into_iter().map(|(name, ty, _)| (name, ty)).collect();
    times.sort_by(f64::total_cmp);
    let seconds = times.get(times.len() / 2).copied().unwrap_or(0.0);
    Ok((Done { before: kept.before, after: kept.best, step: kept.best_step, seconds }, tensors))
}

/// What carries the steps out.
fn engine<'a>(job: &Job<'a>, student: Student<'a>) -> Result<Box<dyn Engine<'a> + 'a>, TuningError> {
    match job.device {
        Device::Cpu => Ok(Box::new(Processor::new(job.model, student, job.length, job.settings.batch)?)),
        #[cfg(feature = "cuda")]
        device => {
            let shape = (job.length, job.settings.batch);
            Ok(Box::new(super::gpu::Gpu::new(student, shape, device.passes())?))
        }
        #[cfg(not(feature = "cuda"))]
        _ => Err(TuningError::Device(WITHOUT_CUDA.into())),
    }
}

/// Makes `batch` the windows of these numbers of an endless run through those of `tokens`.
pub(crate) fn fill(batch: &mut Vec<u32>, tokens: &[u32], length: usize, numbers: Range<usize>, seed: u64) {
    batch.clear();
    for i in numbers {
        let w = window(i, tokens.len() / length, seed);
        batch.extend_from_slice(&tokens[w * length..][..length]);
    }
}

/// Window number `i` of an endless run through `windows` of them, in a new order each time.
pub(crate) fn window(i: usize, windows: usize, seed: u64) -> usize {
    let (epoch, at) = ((i / windows) as u64, i % windows);
    let mut order: Vec<u32> = (0..windows as u32).collect();
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (epoch + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    // Fisher and Yates, with SplitMix64
    for k in (1..windows).rev() {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = x;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap(k, ((z ^ (z >> 31)) % (k as u64 + 1)) as usize);
    }
    order[at] as usize
}

/// Writes the tensors of the best step, if they are not written yet.
fn write_best(job: &Job<'_>, tensors: &mut Vec<Tensor>) -> Result<(), TuningError> {
    for (name, _, bytes) in tensors.drain(..) {
        state::write_blocks(job.state, &tuned(&name), &bytes)?;
    }
    Ok(())
}

fn save(job: &Job<'_>, kept: &Kept, student: &mut Student<'_>) -> Result<(), TuningError> {
    let path = state_path(job.state);
    resume::save(&path, kept, student.state()).map_err(|source| TuningError::Io { file: path, source })
}

/// Takes up what is there, if it belongs to this run.
fn load(job: &Job<'_>, kept: &mut Kept, student: &mut Student<'_>) -> Result<bool, TuningError> {
    let path = state_path(job.state);
    let own = |found: &Kept| found.is_run_of(kept);
    let found = resume::load(&path, student.state(), own).map_err(|source| TuningError::Io { file: path, source })?;
    let Some(found) = found else { return Ok(false) };
    student.refresh();
    *kept = found;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_comes_once_an_epoch() {
        for epoch in 0..3 {
            let mut seen: Vec<usize> = (0..37).map(|i| window(epoch * 37 + i, 37, 5)).collect();
            let order = seen.clone();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..37));
            let next: Vec<usize> = (0..37).map(|i| window((epoch + 1) * 37 + i, 37, 5)).collect();
            assert_ne!(order, next);
        }
    }
}
