//! `--transform auto`: presets tried on this model with the types that it would get and this rounding, and the one taken that pays.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool, state_of};
use super::steps::Steps;
use super::{Failure, INTERRUPTED, RESOURCE, print, words};
use crate::calibration::{fingerprint, windows};
use crate::forward::Model;
use crate::gguf::Metadata;
use crate::plan::memory::human;
use crate::plan::{Input, Options, Plan, Recipe, Rounding};
use crate::rounding::matrix::Form;
use crate::rounding::run::{self, Job};
use crate::rounding::state::{RoundedTensors, forget};
use crate::rounding::weighted;
use crate::transform::{Anatomy, Pair, Preset, Transforms};
use crate::tuning::engine::{Engine, Processor};
use crate::tuning::student::{self, Rounded, Student};

/// Windows that each candidate is rounded on, and those that it is judged by.
const WINDOWS: usize = 64;
const JUDGED: usize = 16;
/// Windows that go through a layer together.
const BATCH: usize = 8;
/// A transform is taken where the divergence falls below this part of that without one: less may be chance.
const PAYS: f64 = 0.98;

/// Tokens that each candidate is rounded on, in windows of `length`.
pub fn tokens(length: usize) -> usize {
    WINDOWS * length
}

/// What a candidate takes: the model twice in f32, and a batch.
pub fn memory(model: &Model<'_>, recipe: &Recipe) -> u64 {
    let weights: u64 = model.source().tensors().iter().map(|t| t.elements() * 4).sum();
    2 * weights + student::least(model, BATCH * recipe.ctx.unwrap_or(512) as usize)
}

/// Why a preset is not tried.
pub fn unfit(preset: Preset, anatomy: &Anatomy) -> Option<String> {
    let turns = !matches!(preset, Preset::SmoothQuant | Preset::Awq);
    if turns && anatomy.tied && anatomy.admits(Pair::Stream) {
        // a head of its own costs more than it could bring
        return Some("it would give a tied model a head of its own".into());
    }
    (preset == Preset::SpinQuant && !anatomy.admits(Pair::Stream))
        .then(|| anatomy.refusal(Pair::Stream).unwrap_or_default().into())
}

/// The transforms that pay; `None`: none does. `make` makes those of a preset from so many windows of text: those that judge are
/// not among them.
pub fn choose(
    args: &ConvertArgs,
    options: &Options,
    (path, input): (&Path, &Input),
    anatomy: &Anatomy,
    candidates: &[Preset],
    make: &dyn Fn(Preset, usize) -> Result<Transforms, Failure>,
) -> Result<Option<Transforms>, Failure> {
    let say = |line: String| {
        if !args.quiet {
            print::stderr(&line);
        }
    };
    if anatomy.spec.experts > 0 {
        say("warning: --transform auto: mixtures of experts are not measured yet: none".into());
        return Ok(None);
    }
    let (fit, unfit): (Vec<_>, Vec<_>) =
        candidates.iter().map(|&p| (p, unfit(p, anatomy))).partition(|(_, u)| u.is_none());
    for (preset, why) in unfit {
        say(format!("transform {}: not tried: {}", preset.name(), why.unwrap_or_default()));
    }
    if fit.is_empty() {
        return Ok(None);
    }
    let needed = memory(&Model::new(path, &*input.source, &input.metadata)?, &options.recipe);
    let room = super::round::room(args.max_memory);
    if needed > room {
        let why = format!("needs {} of memory; {} are there", human(needed), human(room));
        return match args.plain_recipe()?.transform {
            Some(_) => Err(Failure::new(RESOURCE, format!("--transform auto {why}"))),
            // nobody asked for it: the word did
            None => {
                say(format!("transforms: not measured, which {why}"));
                Ok(None)
            }
        };
    }
    let r = &options.recipe;
    let state = state_of(args.out().map_or(Path::new("transforms"), |p| p));
    let request = words::Request {
        words: &r.calibrate,
        length: r.ctx.unwrap_or(512) as usize,
        limit: Some(super::round::windows(r)),
        threads: args.threads(),
        max_memory: args.max_memory,
        state: &state,
        quiet: args.quiet,
    };
    let length = request.length;
    let tokens = Prepared::new((path, input), &request)?.tokens;
    let judged = JUDGED.min(tokens.len() / length / 2) * length;
    let (text, last) = tokens.split_at(tokens.len() - judged);
    let text = &text[..text.len().min(WINDOWS * length)];
    if judged == 0 || text.is_empty() {
        say("warning: --transform auto: the text is too short to judge by: none".into());
        return Ok(None);
    }
    let windows = tokens.len() / length - judged / length;
    // what it says of allocations is said by the conversion
    let mut quiet = args.clone();
    quiet.quiet = true;
    let trial = Trial { args: &quiet, options, path, text, last, length, state: &state };
    let plain = trial.divergence(None)?;
    say(format!("transform none: KLD {plain:.6} on {} windows held out", judged / length));
    let mut best = (plain * PAYS, None);
    for (preset, _) in fit {
        let start = Instant::now();
        let tried = make(preset, windows).and_then(|made| Ok((trial.divergence(Some(&made))?, made)));
        let (kld, made) = match tried {
            Ok(tried) => tried,
            Err(e) if e.code == INTERRUPTED => return Err(e),
            Err(e) => {
                say(format!("transform {}: not tried: {}", preset.name(), e.message));
                continue;
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        say(format!("transform {}: KLD {kld:.6}, {:.3} of it, {seconds:.0} s", preset.name(), kld / plain));
        if kld < best.0 {
            best = (kld, Some(made));
        }
    }
    let name = best.1.as_ref().map_or("none", |t| t.name.as_str());
    say(format!("transform auto: {name}"));
    Ok(best.1)
}

/// What all candidates have in common.
struct Trial<'a> {
    args: &'a ConvertArgs,
    options: &'a Options,
    path: &'a Path,
    text: &'a [u32],
    last: &'a [u32],
    length: usize,
    /// Of the conversion: a candidate's allocation is kept there for the one that is taken.
    state: &'a Path,
}

impl Trial<'_> {
    /// Divergence of the model, transformed and rounded, on the windows that judge.
    fn divergence(&self, transforms: Option<&Transforms>) -> Result<f64, Failure> {
        let Trial { args, options, path, length, .. } = *self;
        let mut input = Input::open(path, options)?;
        if let Some(t) = transforms {
            input.transform(path, Arc::new(t.clone()))?;
        }
        let supposed = super::plan::supposed(&input);
        let mut plan = Plan::new(&input, options, Some(&supposed), Metadata::new())?;
        super::plan::allocate(args, options, &input, (&mut plan, &Metadata::new()), Some(&supposed), self.state)?;
        let model = Model::new(path, &*input.source, &input.metadata)?;
        let pool = pool(args.threads())?;
        let rounds = self.state.join("auto");
        let result: Result<f64, Failure> = pool.install(|| {
            let rounded = self.rounded(&plan, &input, &model, &rounds)?;
            let student = Student::new(&model, &rounded, 0, true)?;
            let mut engine = Processor::new(&model, student, length, BATCH)?;
            Ok(engine.loss(self.last)?)
        });
        if !matches!(&result, Err(e) if e.code == INTERRUPTED) {
            forget(&rounds);
        }
        result
    }

    /// The blocks of every tensor that the plan rounds.
    fn rounded(
        &self,
        plan: &Plan,
        input: &Input,
        model: &Model<'_>,
        state: &Path,
    ) -> Result<BTreeMap<String, Rounded>, Failure> {
        let types = super::round::types(plan, input);
        if self.options.rounding == Rounding::Gptq {
            let job = Job {
                model,
                tokens: self.text,
                length: self.length,
                types: types.clone(),
                fingerprint: fingerprint::fingerprint(model.source()),
                text: windows::digest(self.text),
                one_pass: self.options.recipe.one_pass,
                row_scales: self.options.recipe.row_scales,
                batch: BATCH,
                backward: 0,
                keep: true,
                state,
            };
            run::run(&job, &mut Steps::new("layer", model.spec.layers, true))?;
            return super::tune::rounded_of(plan, &RoundedTensors::open(state, types.into_iter())?);
        }
        let row_scales = self.options.recipe.row_scales;
        let imatrix = super::calibrate::before(self.args, &self.options.recipe, input)?;
        let mut all = BTreeMap::new();
        for (name, ty) in types {
            let index = input.source.tensors().iter().position(|t| t.name == name).expect("the plan's tensors");
            let t = &input.source.tensors()[index];
            let mut values = vec![0f32; t.elements() as usize];
            input.source.read_rows(index, 0..t.rows(), &mut values);
            let mut bytes = vec![0; values.len() / ty.block_len() * ty.block_bytes()];
            let weights = imatrix.entries.get(&name).map(Vec::as_slice);
            weighted::nearest(
                Form { ty, row_scales },
                &values,
                t.row_len() as usize,
                weights,
                self.options.search,
                &mut bytes,
            )
            .map_err(|source| crate::transform::TransformError::Format { tensor: name.clone(), source })?;
            all.insert(name, Rounded { ty, bytes });
        }
        Ok(all)
    }
}
