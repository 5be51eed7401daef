//! `--tune`: the blocks of a rounded model, moved against the divergence of its predictions.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::time::Instant;

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool, state_of};
use super::layers::Layers;
use super::steps::Steps;
use super::{Failure, RESOURCE, USAGE, print, words};
use crate::calibration::windows;
use crate::forward::Model;
use crate::gguf::GgmlType;
use crate::plan::memory::human;
use crate::plan::{Input, Plan, PlannedTensor, Recipe};
use crate::rounding::RoundingError;
use crate::rounding::state::RoundedTensors;
use crate::tuning::layer::Rounded;
use crate::tuning::run::{self, Device, Done, Job, Settings, Watch};
use crate::tuning::{local, student};

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

/// A tensor as it was rounded; none: it was not.
fn one_rounded(plan: &Plan, rounded: &RoundedTensors, name: &str) -> Result<Option<Rounded>, RoundingError> {
    let wanted = |t: &&PlannedTensor| t.name == name && t.ty.is_quantized() && t.dims.len() == 2;
    let Some(t) = plan.tensors.iter().find(wanted) else { return Ok(None) };
    let mut bytes = vec![0; t.bytes as usize];
    Ok(rounded.read(name, t.ty, 0, &mut bytes)?.then_some(Rounded { ty: t.ty, bytes }))
}

/// The tensors as they were rounded, in memory.
pub fn rounded_of(plan: &Plan, rounded: &RoundedTensors) -> Result<BTreeMap<String, Rounded>, Failure> {
    let mut all = BTreeMap::new();
    for t in &plan.tensors {
        if let Some(r) = one_rounded(plan, rounded, &t.name)? {
            all.insert(t.name.clone(), r);
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

/// How a model is tuned.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// All layers together, with so many bytes; `again`: each layer's forward pass is computed twice.
    Whole { memory: u64, again: bool },
    /// Layer by layer.
    Local { memory: u64 },
}

/// How what the recipe asks for fits; refused before anything is done where it does not. `None`: nothing is tuned.
pub fn how(args: &ConvertArgs, recipe: &Recipe, input: &Input, plan: &Plan) -> Result<Option<How>, Failure> {
    if recipe.tune.is_none() {
        return Ok(None);
    }
    let path = args.input.as_deref().expect("required by the parser");
    let model = Model::new(path, &*input.source, &input.metadata)?;
    let tokens = batch(recipe) * recipe.ctx.unwrap_or(512) as usize;
    let types = super::round::types(plan, input);
    let latent: u64 = plan.tensors.iter().filter(|t| types.contains_key(&t.name)).map(|t| t.elements()).sum();
    let weights = input.source.tensors().iter().map(|t| t.elements() * 4).sum::<u64>();
    let least = weights + latent * 14 + student::least(&model, tokens);
    let kept = student::kept(&model, tokens);
    let room = super::round::room(args.max_memory);
    // what a word asks for is done as it can be
    let word = args.plain_recipe()?.tune.is_none();
    if !recipe.tune_local && least <= room {
        let again = least + kept > room;
        let kept = if again { kept / model.spec.layers as u64 } else { kept };
        return Ok(Some(How::Whole { memory: least + kept, again }));
    }
    let needs = |flag: &str, bytes: u64| {
        format!("{flag} needs {} of memory for this model; {} are there", human(bytes), human(room))
    };
    if !recipe.tune_local && (!word || args.device != Device::Cpu) {
        let why = format!("{}; --tune-local needs less", needs("--tune", least));
        return Err(Failure::new(RESOURCE, why));
    }
    if args.device != Device::Cpu {
        return Err(Failure::new(USAGE, "--tune-local runs on the processor: leave --device out"));
    }
    if !recipe.tune_local && !args.quiet {
        print::stderr(&format!("{}: layer by layer", needs("tuning", least)));
    }
    let memory = local::memory(&model, tokens);
    if memory > room {
        let without = if word { "; --quality balanced does without" } else { "" };
        return Err(Failure::new(RESOURCE, needs("--tune-local", memory) + without));
    }
    Ok(Some(How::Local { memory }))
}

/// Tunes what was rounded; the tuned tensors take the place of the rounded ones.
pub fn after(
    args: &ConvertArgs,
    recipe: &Recipe,
    (input, plan): (&Input, &Plan),
    how: Option<How>,
    tensors: &mut RoundedTensors,
) -> Result<(), Failure> {
    let (Some(steps), Some(how)) = (recipe.tune, how) else { return Ok(()) };
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
    let (mut learn, decide) = split(&tokens, length);
    let two_bits = plan.tensors.iter().any(|t| t.ty == GgmlType::Q2_K);
    let settings = Settings::new(steps as usize, batch(recipe), two_bits);
    if let How::Local { .. } = how {
        let every = (learn.len() / length).div_ceil(LOCAL_WINDOWS).max(1);
        learn = learn.chunks_exact(length).step_by(every).flatten().copied().collect();
    }
    if !args.quiet {
        let (memory, layer) = match how {
            How::Whole { memory, .. } => (memory, ""),
            How::Local { memory } => (memory, " for each layer"),
        };
        print::stderr(&format!(
            "tuning: {steps} steps{layer} of {} windows out of {}, {} held out; at most {} of memory",
            settings.batch,
            learn.len() / length,
            decide.len() / length,
            human(memory),
        ));
        let seen = steps as usize * settings.batch * length;
        if learn.len() < seen / 4 && matches!(how, How::Whole { .. }) {
            print::stderr(
                "warning: every window is seen more than four times: more text with --tune-text over-fits less",
            );
        }
    }
    let start = Instant::now();
    let pool = pool(args.threads())?;
    let tuned = match how {
        How::Local { memory } => {
            let all: Vec<u32> = learn.iter().chain(&decide).copied().collect();
            let keep = memory + local::streams(&model, all.len()) <= super::round::room(args.max_memory) / 2;
            let mut names: Vec<&str> = plan.tensors.iter().map(|t| &*t.name).collect();
            names.sort_unstable();
            let read = |name: &'_ str| one_rounded(plan, tensors, name).transpose();
            let blocks = names.into_iter().filter_map(|n| Some(read(n)?.map(|r| (n, r))));
            let job = local::Job {
                model: &model,
                tokens: &all,
                held_out: decide.len() / length,
                length,
                rounded: &|name| Ok(one_rounded(plan, tensors, name)?),
                settings,
                key: key(blocks, &[&learn, &decide])?,
                keep,
                state: &state,
            };
            let mut watch = Layers::new(model.spec.layers, args.quiet);
            let tuned = pool.install(|| local::run(&job, &mut watch))?;
            watch.finish("tuned");
            tuned
        }
        How::Whole { again, .. } => {
            let rounded = rounded_of(plan, tensors)?;
            let job = Job {
                model: &model,
                tokens: &learn,
                held_out: &decide,
                length,
                rounded: &rounded,
                settings,
                key: key(rounded.iter().map(|(n, r)| Ok((&**n, r))), &[&learn, &decide])?,
                again,
                device: args.device,
                save_every: run::SAVE_EVERY,
                state: &state,
            };
            let mut progress = Progress { steps: Steps::new("step", steps as usize, args.quiet), quiet: args.quiet };
            let (done, tuned) = pool.install(|| run::run(&job, &mut progress))?;
            progress.steps.finish();
            if !args.quiet {
                summary("tuned", &done, start.elapsed().as_secs_f64());
            }
            tuned
        }
    };
    for (name, ty) in tuned {
        tensors.replace(&state, &run::tuned(&name), &name, ty)?;
    }
    Ok(())
}

/// Windows that tuning by layers learns from at most: all of their streams are kept.
const LOCAL_WINDOWS: usize = 512;

/// Of the blocks, in the order of their names, and the text that a run starts from.
fn key<'a, R: Borrow<Rounded>>(
    rounded: impl Iterator<Item = Result<(&'a str, R), RoundingError>>,
    texts: &[&[u32]],
) -> Result<String, RoundingError> {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for tensor in rounded {
        let (name, r) = tensor?;
        hash.update(name.as_bytes());
        hash.update(&r.borrow().bytes);
    }
    texts.iter().for_each(|t| hash.update(windows::digest(t)));
    Ok(crate::calibration::imatrix::hex(&hash.finalize()))
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
