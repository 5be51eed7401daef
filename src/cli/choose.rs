//! `--transform auto`: presets tried on this model with the types that it would get and this rounding, and the one taken that pays.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool, state_of};
use super::steps::Steps;
use super::{Failure, INTERRUPTED, RESOURCE, print, words};
use crate::calibration::{fingerprint, windows};
use crate::forward::Model;
use crate::gguf::Metadata;
use crate::plan::memory::human;
use crate::plan::quality::implies_transform;
use crate::plan::{Input, Options, Plan, Recipe, Rounding};
use crate::rounding::matrix::Form;
use crate::rounding::run::{self, Job};
use crate::rounding::state::{RoundedTensors, forget};
use crate::rounding::weighted;
use crate::transform::preset::left_out;
use crate::transform::{Anatomy, Pair, Preset, Transforms};
use crate::tuning::engine::{Engine, Processor};
use crate::tuning::layer::Rounded;
use crate::tuning::student::{self, Student};

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

/// What a candidate takes: the rounding, then the model twice in f32 and a batch.
pub fn memory(model: &Model<'_>, recipe: &Recipe, threads: usize) -> u64 {
    let weights: u64 = model.source().tensors().iter().map(|t| t.elements() * 4).sum();
    let length = recipe.ctx.unwrap_or(512) as usize;
    let rounding =
        run::memory(model, length, BATCH, threads, false) + run::kept(model, tokens(length), recipe.one_pass);
    rounding.max(2 * weights + student::least(model, BATCH * length))
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
    let needed = memory(&Model::new(path, &*input.source, &input.metadata)?, &options.recipe, args.thread_count());
    let room = super::round::room(args.max_memory);
    if needed > room {
        let why = format!("needs {} of memory; {} are there", human(needed), human(room));
        if !implies_transform(&options.recipe) {
            return Err(Failure::new(RESOURCE, format!("--transform auto {why}")));
        }
        say(format!("transforms: not measured, which {why}"));
        return Ok(None);
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
    // what is said of allocations is said by the conversion, and measured there
    let (mut quiet, mut predicted) = (args.clone(), options.clone());
    (quiet.quiet, predicted.recipe.measure) = (true, false);
    let trial = Trial {
        args: &quiet,
        options: &predicted,
        path,
        text,
        last,
        length,
        all: windows::digest(&tokens),
        state: &state,
        quiet: args.quiet,
    };
    let plain = match trial.divergence(None) {
        Err(e) if e.code != INTERRUPTED && implies_transform(&options.recipe) => {
            say(format!("transforms: not measured: {}", e.message));
            return Ok(None);
        }
        plain => plain?,
    };
    say(format!("transform none: KLD {plain:.6} on {} windows held out", judged / length));
    let mut best = (plain * PAYS, None);
    for (preset, _) in fit {
        left_out(preset, anatomy).into_iter().for_each(&say);
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

/// What was measured, kept in the state folder for a run that goes on there.
const MEASURED: &str = "auto.json";

/// What a measurement depends on.
#[derive(PartialEq, Serialize, Deserialize)]
struct Key {
    version: String,
    /// Of the model behind the transforms.
    fingerprint: String,
    /// Of what is rounded on, what judges, and all of it.
    texts: [String; 3],
    /// Rounding, one pass, scales by row, tokens of a window.
    how: (String, bool, bool, usize),
    types: Vec<(String, String)>,
}

/// What all candidates have in common.
struct Trial<'a> {
    args: &'a ConvertArgs,
    options: &'a Options,
    path: &'a Path,
    text: &'a [u32],
    last: &'a [u32],
    length: usize,
    /// Digest of all of the text.
    all: String,
    /// Of the conversion: a candidate's allocation is kept there for the one that is taken.
    state: &'a Path,
    quiet: bool,
}

impl Trial<'_> {
    /// Folder of the state of a candidate's rounding.
    fn rounds(&self) -> std::path::PathBuf {
        self.state.join("auto")
    }

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
        let types = super::round::types(&plan, &input).into_iter().map(|(n, t)| (n, t.name().to_string())).collect();
        let key = Key {
            version: env!("CARGO_PKG_VERSION").into(),
            fingerprint: fingerprint::fingerprint(model.source()),
            texts: [windows::digest(self.text), windows::digest(self.last), self.all.clone()],
            how: (format!("{:?}", options.rounding), options.recipe.one_pass, options.recipe.row_scales, length),
            types,
        };
        let file = self.state.join(MEASURED);
        let mut known: Vec<(Key, f64)> =
            std::fs::read(&file).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        if let Some((_, kld)) = known.iter().find(|(k, _)| *k == key) {
            return Ok(*kld);
        }
        let pool = pool(args.threads())?;
        let result: Result<f64, Failure> = pool.install(|| {
            let rounded = self.rounded(&plan, &input, &model, &key)?;
            let student = Student::new(&model, &rounded, 0, true)?;
            let mut engine = Processor::new(&model, student, length, BATCH)?;
            Ok(engine.loss(self.last)?)
        });
        if !matches!(&result, Err(e) if e.code == INTERRUPTED) {
            forget(&self.rounds());
        }
        if let Ok(kld) = result {
            known.push((key, kld));
            let text = serde_json::to_vec(&known).expect("plain data");
            let written = std::fs::create_dir_all(self.state).and_then(|()| std::fs::write(&file, text));
            written.map_err(|e| Failure::new(RESOURCE, format!("{}: {e}", file.display())))?;
        }
        result
    }

    /// The blocks of every tensor that the plan rounds.
    fn rounded(
        &self,
        plan: &Plan,
        input: &Input,
        model: &Model<'_>,
        key: &Key,
    ) -> Result<BTreeMap<String, Rounded>, Failure> {
        let types = super::round::types(plan, input);
        if self.options.rounding == Rounding::Gptq {
            let job = Job {
                model,
                tokens: self.text,
                length: self.length,
                types: types.clone(),
                fingerprint: key.fingerprint.clone(),
                text: key.texts[0].clone(),
                one_pass: self.options.recipe.one_pass,
                row_scales: self.options.recipe.row_scales,
                batch: BATCH,
                backward: 0,
                keep: true,
                state: &self.rounds(),
            };
            let mut steps = Steps::new("layer", model.spec.layers, self.quiet);
            run::run(&job, &mut steps)?;
            steps.finish();
            return super::tune::rounded_of(plan, &RoundedTensors::open(job.state, types.into_iter())?);
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
