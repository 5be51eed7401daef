//! `ostq-convert learn IN -o FILE --for TYPE`, and learning on the way to a conversion.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use sha2::{Digest, Sha256};

use super::args::{ConvertArgs, MakingArgs};
use super::calibrate::{Prepared, pool, state_of};
use super::layers::Layers;
use super::steps::Steps;
use super::transform::Made;
use super::tune::{HELD_OUT_MOST, HELD_OUT_PART, Progress, split, summary};
use super::{Failure, REFUSED, RESOURCE, USAGE, print, words};
use crate::calibration::fingerprint::fingerprint;
use crate::calibration::windows;
use crate::forward::{Activations, Model, Simulation};
use crate::gguf::GgmlType;
use crate::learning::LearningError;
use crate::learning::engine::{Engine, Processor};
use crate::learning::fake::{Fake, can_round};
use crate::learning::local;
use crate::learning::network::{self, Network};
use crate::learning::run::{self, Job, Settings};
use crate::plan::memory::human;
use crate::plan::{FileType, Input, Options, Recipe};
use crate::transform::{Anatomy, Preset, Transforms, preset};
use crate::tuning::head::Loss;
use crate::tuning::run::{Device, SAVE_EVERY};

/// Steps where nothing else is said: those of the papers.
pub const STEPS: u32 = 100;
/// Words of KL-Top.
const TOP: usize = 1000;

/// What to learn.
#[derive(Args, Clone, Debug)]
pub struct LearnArgs {
    /// What the transforms are for: a type as --type takes it, or a simulated precision like w4a8 or w4a4kv4 (check
    /// --activations).
    #[arg(long = "for", value_name = "TYPE", default_value = "q4_0")]
    target: String,
    /// ostquant: rotations of the stream and of values, and scales. spinquant: rotations alone.
    #[arg(long, value_enum, default_value_t = MethodArg::Ostquant)]
    method: MethodArg,
    /// Steps; with --local of each layer.
    #[arg(long, value_name = "N", default_value_t = STEPS, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Layer by layer, each against its own float output, one of them in memory: for models that do not fit. The rotation of the
    /// stream is then not learned.
    #[arg(long, conflicts_with = "loss")]
    local: bool,
    /// kl: divergence over the whole vocabulary. kl-top: over the 1000 words that the model finds most likely. ce: cross-entropy of
    /// the text [default: kl-top for ostquant, ce for spinquant, as published].
    #[arg(long, value_enum)]
    loss: Option<LossArg>,
    /// Windows of a step.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Rate of rotations at the start [default: 0.01].
    #[arg(long, value_name = "X")]
    rotation_rate: Option<f64>,
    /// Rate of scales at the start, relative [default: 0.01].
    #[arg(long, value_name = "X")]
    scale_rate: Option<f64>,
    /// With w4a8 and the like: Hadamard rotations of queries and keys and of the input of the down matrix while it runs.
    #[arg(long)]
    online_hadamard: bool,
    /// At most so many tokens of the text, in whole windows.
    #[arg(long, value_name = "N")]
    calibrate_tokens: Option<u64>,
    /// What to learn on: cpu, or an NVIDIA GPU (needs a program built with the feature `cuda`): cuda in f32, cuda-bf16 with
    /// products in bf16.
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t, conflicts_with = "local")]
    device: Device,
    #[command(flatten)]
    making: MakingArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    Ostquant,
    Spinquant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LossArg {
    Kl,
    KlTop,
    Ce,
}

/// What is learned from, beside the model.
pub struct Request<'a> {
    pub preset: Preset,
    pub local: bool,
    pub device: Device,
    pub settings: Settings,
    /// How inputs, keys and values are rounded.
    pub activations: Activations,
    /// How the linear of a name with so many columns is rounded.
    pub fake: &'a (dyn Fn(&str, usize) -> Option<Fake> + Sync),
    /// What that depends on, in words, and exactly.
    pub target: String,
    pub types: String,
    pub texts: &'a [PathBuf],
    /// Windows of text.
    pub limit: Option<usize>,
    pub length: usize,
    pub threads: Option<u16>,
    pub max_memory: Option<u64>,
    pub state: &'a Path,
    pub quiet: bool,
}

/// Steps and loss of a preset as it is published.
pub fn settings(preset: Preset, steps: u32, seed: u64) -> Settings {
    let loss = if preset == Preset::SpinQuant { Loss::CrossEntropy } else { Loss::KlTop(TOP) };
    Settings::new(steps as usize, loss, seed)
}

/// Rounding to the types that `of` gives.
pub fn to_types(of: impl Fn(&str) -> Option<GgmlType>) -> impl Fn(&str, usize) -> Option<Fake> {
    move |name, columns| {
        let ty = of(name).filter(|t| columns.is_multiple_of(t.block_len()) && can_round(*t))?;
        Some(Fake::Type(ty))
    }
}

/// Rounding to the integers of a simulated precision.
fn to_rows(s: Simulation) -> impl Fn(&str, usize) -> Option<Fake> {
    move |name, _| (s.weights < 16).then(|| Fake::Rows(s, name.contains(".ffn_down")))
}

/// Learns the transforms of a preset.
pub fn learn(path: &Path, input: &Input, anatomy: &Anatomy, r: &Request<'_>) -> Result<Transforms, Failure> {
    if anatomy.spec.experts > 0 {
        return Err(Failure::new(
            REFUSED,
            format!("{}: nothing is learned for mixtures of experts yet", path.display()),
        ));
    }
    let words = words::Request {
        words: r.texts,
        length: r.length,
        limit: r.limit,
        threads: r.threads,
        max_memory: r.max_memory,
        state: r.state,
        quiet: r.quiet,
    };
    let prepared = Prepared::new((path, input), &words)?;
    let model = &prepared.model;
    let batch = r.settings.batch * r.length;
    if r.local {
        return by_layer(input, anatomy, r, &prepared);
    }
    let (learn, decide) = split(&prepared.tokens, r.length);
    let room = super::round::room(r.max_memory);
    let (most, least) = match r.device {
        Device::Cpu => (network::memory(model, batch, false), network::memory(model, batch, true)),
        _ => [network::beside_device(model); 2].into(),
    };
    if least > room {
        let (least, room) = (human(least), human(room));
        let less = if r.device == Device::Cpu { "; `learn --local` needs less" } else { "" };
        let why = format!("learning needs {least} of memory for this model; {room} are there{less}");
        return Err(Failure::new(RESOURCE, why));
    }
    let name = format!("{}({}, {} steps)", r.preset.name(), r.target, r.settings.steps);
    if !r.quiet {
        let names = prepared.texts.join(", ");
        print::stderr(&format!(
            "{name} on {names}: {} windows a step out of {}, {} held out; at most {} of memory",
            r.settings.batch,
            learn.len() / r.length,
            decide.len() / r.length,
            human(if most > room { least } else { most }),
        ));
    }
    let pool = pool(r.threads)?;
    let start = pool.install(|| start(r.preset, anatomy, input, r.settings.seed))?;
    let job = Job {
        tokens: &learn,
        held_out: &decide,
        length: r.length,
        settings: r.settings.clone(),
        key: format!(
            "{name} {} {} {} {} {}",
            r.types,
            r.length,
            fingerprint(&*input.source),
            windows::digest(&learn),
            windows::digest(&decide)
        ),
        save_every: SAVE_EVERY,
        state: r.state,
    };
    let begin = Instant::now();
    let steps = Steps::new("step", r.settings.steps, r.quiet);
    let mut progress = Progress { steps, quiet: r.quiet };
    let (done, made) = pool.install(|| {
        let mut engine = engine(model, anatomy, &start, r, most > room)?;
        run::run(&job, &mut *engine, &name, &mut progress)
    })?;
    progress.steps.finish();
    if !r.quiet {
        summary("learned", &done, begin.elapsed().as_secs_f64());
    }
    made.check(anatomy)?;
    Ok(made)
}

/// What carries the steps out; `again`: each layer's forward pass is computed twice.
fn engine<'a>(
    model: &'a Model<'a>,
    anatomy: &Anatomy,
    start: &Transforms,
    r: &Request<'_>,
    again: bool,
) -> Result<Box<dyn Engine + 'a>, LearningError> {
    let (length, batch) = (r.length, r.settings.batch);
    match r.device {
        Device::Cpu => {
            let network = Network::new(model, anatomy, start, r.fake, again)?;
            Ok(Box::new(Processor::new(network, r.activations, length, batch)?))
        }
        #[cfg(feature = "cuda")]
        device => {
            let (shape, passes) = ((length, batch), device.passes());
            let gpu = crate::learning::gpu::Gpu::new(model, anatomy, start, r.fake, r.activations, shape, passes)?;
            Ok(Box::new(gpu))
        }
        #[cfg(not(feature = "cuda"))]
        _ => Err(LearningError::Device(crate::tuning::run::WITHOUT_CUDA.into())),
    }
}

/// Learns layer by layer.
fn by_layer(input: &Input, anatomy: &Anatomy, r: &Request<'_>, prepared: &Prepared<'_>) -> Result<Transforms, Failure> {
    let (model, tokens) = (&prepared.model, &prepared.tokens);
    let windows = tokens.len() / r.length;
    let held_out = windows.div_ceil(HELD_OUT_PART).min(HELD_OUT_MOST);
    let (least, streams) =
        (local::memory(model, r.settings.batch * r.length), (tokens.len() * model.spec.embed * 8) as u64);
    let room = super::round::room(r.max_memory);
    if least > room {
        let (least, room) = (human(least), human(room));
        let why = format!("learning by layers needs {least} of memory for this model; {room} are there");
        return Err(Failure::new(RESOURCE, why));
    }
    let keep = least + streams <= room / 2;
    let name = format!("{}({}, {} steps a layer)", r.preset.name(), r.target, r.settings.steps);
    if !r.quiet {
        print::stderr(&format!(
            "{name} on {}: {} windows a step out of {}, {held_out} held out; at most {} of memory",
            prepared.texts.join(", "),
            r.settings.batch,
            windows - held_out,
            human(least + if keep { streams } else { 0 }),
        ));
    }
    let pool = pool(r.threads)?;
    let start = pool.install(|| start(r.preset, anatomy, input, r.settings.seed))?;
    let job = local::Job {
        model,
        anatomy,
        tokens,
        held_out,
        length: r.length,
        activations: r.activations,
        settings: r.settings.clone(),
        key: format!("{name} {} {} {} {}", r.types, r.length, fingerprint(&*input.source), windows::digest(tokens)),
        keep,
        save_every: SAVE_EVERY,
        state: r.state,
    };
    let mut watch = Layers::new(model.spec.layers, r.quiet);
    let made = pool.install(|| local::run(&job, &start, r.fake, &name, &mut watch))?;
    watch.finish("learned");
    made.check(anatomy)?;
    Ok(made)
}

/// What learning starts from: random Hadamard rotations (SpinQuant), or WOMI and scales of 1 (OSTQuant).
fn start(preset: Preset, anatomy: &Anatomy, input: &Input, seed: u64) -> Result<Transforms, Failure> {
    if preset == Preset::SpinQuant {
        return Ok(preset::quarot(anatomy, seed));
    }
    Ok(network::with_scales(preset::womi(anatomy, &*input.source, seed)?, anatomy))
}

/// Learns and writes a transforms file.
pub fn run(args: LearnArgs) -> Result<(), Failure> {
    let making = &args.making;
    super::convert::can_use(args.device)?;
    let preset = if args.method == MethodArg::Spinquant { Preset::SpinQuant } else { Preset::OstQuant };
    let Made { opened, anatomy, state } = making.open()?;
    if !making.quiet {
        preset::left_out(preset, &anatomy).iter().for_each(|w| print::stderr(&format!("warning: {w}")));
    }
    let mut settings = settings(preset, args.steps, making.seed);
    settings.batch = args.batch as usize;
    settings.rotation = rate("--rotation-rate", args.rotation_rate, settings.rotation)?;
    settings.scale = rate("--scale-rate", args.scale_rate, settings.scale)?;
    settings.loss = match args.loss {
        None => settings.loss,
        Some(LossArg::Kl) => Loss::Kl,
        Some(LossArg::KlTop) => Loss::KlTop(TOP),
        Some(LossArg::Ce) => Loss::CrossEntropy,
    };
    let simulated = args.target.parse::<Simulation>().ok().map(|s| Simulation { online: args.online_hadamard, ..s });
    if simulated.is_none() && args.online_hadamard {
        return Err(Failure::new(USAGE, "--online-hadamard: only with --for w4a8 and the like"));
    }
    let types = match simulated {
        Some(_) => Vec::new(),
        None => types(&args.target, &opened.input)?,
    };
    let of = to_types(|name: &str| types.iter().find(|(n, _)| n == name).map(|(_, t)| *t));
    let rows = simulated.map(to_rows);
    let fake = |name: &str, columns: usize| rows.as_ref().map_or_else(|| of(name, columns), |f| f(name, columns));
    let builtin = [PathBuf::from(crate::plan::BUILT_IN)];
    let length = making.ctx as usize;
    let request = Request {
        preset,
        local: args.local,
        device: args.device,
        settings,
        activations: simulated.map_or(Activations::F32, Activations::Simulated),
        fake: &fake,
        target: simulated.map_or_else(|| args.target.to_ascii_lowercase(), |s| s.to_string()),
        types: digest(&types),
        texts: if making.calibrate.is_empty() { &builtin } else { &making.calibrate },
        limit: args.calibrate_tokens.map(|n| (n as usize / length).max(1)),
        length,
        threads: making.resources.threads,
        max_memory: making.resources.max_memory,
        state: &state,
        quiet: making.quiet,
    };
    let made = learn(&making.input, &opened.input, &anatomy, &request)?;
    making.write(&made, &anatomy, &*opened.input.source, &state)
}

fn rate(flag: &str, given: Option<f64>, default: f64) -> Result<f64, Failure> {
    match given {
        Some(x) if !(x.is_finite() && x >= 0.0) => Err(Failure::new(USAGE, format!("{flag}: {x} is no rate"))),
        given => Ok(given.unwrap_or(default)),
    }
}

/// The types that a mix, or one type, gives the tensors of `input`.
fn types(word: &str, input: &Input) -> Result<Vec<(String, GgmlType)>, Failure> {
    let name = match (FileType::parse(word), GgmlType::from_name(word)) {
        (Some(t), _) if !can_round(t.default_type()) => {
            return Err(Failure::new(USAGE, format!("--for: there is nothing to learn for {}", t.name())));
        }
        (Some(t), _) => t.name().to_string(),
        (None, Some(t)) if !can_round(t) => {
            return Err(Failure::new(USAGE, format!("--for: there is nothing to learn for {t}")));
        }
        (None, Some(t)) => {
            // every linear of the layers in it
            let fits = |t: &GgmlType, columns: u64| columns.is_multiple_of(t.block_len() as u64);
            let all = input.source.tensors().iter().filter(|x| x.name.starts_with("blk.") && fits(&t, x.row_len()));
            return Ok(all.map(|x| (x.name.clone(), t)).collect());
        }
        (None, None) => {
            let why = format!("--for: `{word}` is no type (--list-types shows all) and no precision like w4a8");
            return Err(Failure::new(USAGE, why));
        }
    };
    let recipe = Recipe { r#type: Some(name), ..Recipe::default() };
    let options = Options::resolve(recipe).map_err(|e| Failure::new(USAGE, e))?;
    super::transform::planned(input, &options)
}

/// sha256 of types by tensor.
fn digest(types: &[(String, GgmlType)]) -> String {
    let mut hash = Sha256::new();
    types.iter().for_each(|(name, ty)| hash.update(format!("{name} {ty}\n")));
    crate::calibration::imatrix::hex(&hash.finalize())
}

/// Learning on the way to a conversion, for the types of its plan; from at most `limit` windows.
pub fn within(
    preset: Preset,
    limit: usize,
    (args, options): (&ConvertArgs, &Options),
    (path, input): (&Path, &Input),
    anatomy: &Anatomy,
) -> Result<Transforms, Failure> {
    let r = &options.recipe;
    let types = super::transform::planned(input, options)?;
    let fake = to_types(|name: &str| types.iter().find(|(n, _)| n == name).map(|(_, t)| *t));
    let length = r.ctx.unwrap_or(512) as usize;
    let request = Request {
        preset,
        local: false,
        device: args.device,
        settings: settings(preset, STEPS, r.seed.unwrap_or(0)),
        activations: Activations::F32,
        fake: &fake,
        target: r.r#type.clone().unwrap_or_else(|| "q4_k_m".into()).to_ascii_lowercase(),
        types: digest(&types),
        texts: &r.calibrate,
        limit: Some(limit),
        length,
        threads: args.threads(),
        max_memory: args.max_memory,
        state: &state_of(args.out().map_or(Path::new("transforms"), |p| p)),
        quiet: args.quiet,
    };
    learn(path, input, anatomy, &request)
}
