//! `--tune`: the blocks of a rounded model, moved against the divergence of its predictions.

use std::collections::BTreeMap;
use std::time::Instant;

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool, state_of};
use super::steps::Steps;
use super::{Failure, RESOURCE, print, words};
use crate::calibration::windows;
use crate::gguf::GgmlType;
use crate::plan::memory::human;
use crate::plan::{Input, Plan, Recipe};
use crate::rounding::state::RoundedTensors;
use crate::tuning::run::{self, Done, Job, Settings, Watch};
use crate::tuning::student::Rounded;

/// The last of so many parts of the text is held out of tuning: windows between those that it learns from would tell little
/// of other text.
pub const HELD_OUT_PART: usize = 12;
/// Most windows of it that are looked at.
pub const HELD_OUT_MOST: usize = 32;

/// Progress, and what the windows that are held out say.
pub struct Progress {
    pub steps: Steps,
    pub quiet: bool,
}

impl Watch for Progress {
    fn step(&mut self, step: usize, loss: f64) {
        self.steps.message(format!("loss {loss:.5}"));
        self.steps.done(step);
    }

    fn held_out(&mut self, step: usize, loss: f64, best: bool) {
        if !self.quiet {
            let word = if best { "" } else { ", not better" };
            self.steps.line(&format!("step {step}: KLD {loss:.5} on windows held out{word}"));
        }
    }

    fn resumed(&mut self, step: usize) {
        crate::calibration::run::Watch::resumed(&mut self.steps, step);
    }
}

/// The tensors as they were rounded, in memory.
pub fn rounded_of(plan: &Plan, rounded: &RoundedTensors) -> Result<BTreeMap<String, Rounded>, Failure> {
    let mut all = BTreeMap::new();
    for t in plan.tensors.iter().filter(|t| t.ty.is_quantized() && t.dims.len() == 2) {
        let mut bytes = vec![0; t.bytes as usize];
        if rounded.read(&t.name, t.ty, 0, &mut bytes)? {
            all.insert(t.name.clone(), Rounded { ty: t.ty, bytes });
        }
    }
    Ok(all)
}

/// Whether the model writes some of the text.
pub fn own(words: &[std::path::PathBuf]) -> bool {
    words.iter().any(|w| w.as_os_str() == crate::plan::OWN)
}

/// Windows of a step.
pub fn batch(recipe: &Recipe) -> usize {
    recipe.tune_batch.unwrap_or(run::BATCH) as usize
}

/// Windows of text for so many steps where the model writes: each is seen about four times. Files are taken whole.
pub fn windows_of(recipe: &Recipe, steps: u32) -> usize {
    (steps as usize * batch(recipe) / 4).max(super::round::windows(recipe))
}

/// Splits windows of `length` tokens: most to learn from, some of the last part, spread evenly, to decide on.
pub fn split(tokens: &[u32], length: usize) -> (Vec<u32>, Vec<u32>) {
    let count = tokens.len() / length;
    let last = count.div_ceil(HELD_OUT_PART);
    let (learn, rest) = tokens.split_at((count - last) * length);
    let every = last.div_ceil(HELD_OUT_MOST).max(1);
    let decide = rest.chunks_exact(length).step_by(every).flatten().copied().collect();
    (learn.to_vec(), decide)
}

/// Tunes what was rounded; the tuned tensors take the place of the rounded ones.
pub fn after(
    args: &ConvertArgs,
    recipe: &Recipe,
    input: &Input,
    plan: &Plan,
    tensors: &mut RoundedTensors,
) -> Result<(), Failure> {
    let Some(steps) = recipe.tune else { return Ok(()) };
    let path = args.input.as_deref().expect("required by the parser");
    let named = if recipe.tune_text.is_empty() { &recipe.calibrate } else { &recipe.tune_text };
    let length = recipe.ctx.unwrap_or(512) as usize;
    let state = state_of(args.out().expect("a conversion has an output"));
    let request = words::Request {
        words: named,
        length,
        limit: own(named).then(|| windows_of(recipe, steps)),
        threads: args.threads(),
        max_memory: args.max_memory,
        state: &state,
        quiet: args.quiet,
    };
    let Prepared { model, tokens, .. } = Prepared::new((path, input), &request)?;
    let (learn, decide) = split(&tokens, length);
    let rounded = rounded_of(plan, tensors)?;
    let two_bits = plan.tensors.iter().any(|t| t.ty == GgmlType::Q2_K);
    let settings = Settings::new(steps as usize, batch(recipe), two_bits);
    let latent: u64 = plan.tensors.iter().filter(|t| rounded.contains_key(&t.name)).map(|t| t.elements()).sum();
    let weights = input.source.tensors().iter().map(|t| t.elements() * 4).sum::<u64>();
    let batch = settings.batch * length;
    let least = weights + latent * 14 + crate::tuning::student::least(&model, batch);
    let kept = crate::tuning::student::kept(&model, batch);
    let room = super::round::room(args.max_memory);
    if least > room {
        return Err(Failure::new(
            RESOURCE,
            format!("--tune needs {} of memory for this model; {} are there", human(least), human(room)),
        ));
    }
    let again = least + kept > room;
    if !args.quiet {
        print::stderr(&format!(
            "tuning: {steps} steps of {} windows out of {}, {} held out; at most {} of memory",
            settings.batch,
            learn.len() / length,
            decide.len() / length,
            human(least + if again { kept / model.spec.layers as u64 } else { kept }),
        ));
        let seen = steps as usize * settings.batch * length;
        if learn.len() < seen / 4 {
            print::stderr(
                "warning: every window is seen more than four times: more text with --tune-text over-fits less",
            );
        }
    }
    let digest = key(&rounded, &[&learn, &decide]);
    let job = Job {
        model: &model,
        tokens: &learn,
        held_out: &decide,
        length,
        rounded: &rounded,
        settings,
        key: digest,
        again,
        device: args.device,
        save_every: run::SAVE_EVERY,
        state: &state,
    };
    let start = Instant::now();
    let mut progress = Progress { steps: Steps::new("step", steps as usize, args.quiet), quiet: args.quiet };
    let pool = pool(args.threads())?;
    let (done, tuned) = pool.install(|| run::run(&job, &mut progress))?;
    progress.steps.finish();
    if !args.quiet {
        summary("tuned", &done, start.elapsed().as_secs_f64());
    }
    for (name, ty) in tuned {
        tensors.replace(&state, &run::tuned(&name), &name, ty)?;
    }
    Ok(())
}

/// Of the blocks and the text that a run starts from.
fn key(rounded: &BTreeMap<String, Rounded>, texts: &[&[u32]]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for (name, r) in rounded {
        hash.update(name.as_bytes());
        hash.update(&r.bytes);
    }
    texts.iter().for_each(|t| hash.update(windows::digest(t)));
    crate::calibration::imatrix::hex(&hash.finalize())
}

/// What a run brought; `verb`: what it did.
pub fn summary(verb: &str, done: &Done, seconds: f64) {
    print::stderr(&format!(
        "{verb} in {seconds:.1} s, {:.3} s a step: KLD {:.5} -> {:.5} on windows held out ({:.3} of it), step {}",
        done.seconds,
        done.before,
        done.after,
        done.after / done.before,
        done.step
    ));
}
