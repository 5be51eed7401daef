//! `--transform` on the way to a conversion, and `ostq-convert transform IN -o FILE --preset NAME`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::args::{ConvertArgs, MakingArgs};
use super::calibrate::{Opened, Prepared, pool, state_of};
use super::steps::Steps;
use super::{Failure, REFUSED, USAGE, print, words};
use crate::calibration::fingerprint::fingerprint;
use crate::calibration::imatrix::Imatrix;
use crate::gguf::{GgmlType, Metadata};
use crate::output;
use crate::plan::memory::human;
use crate::plan::quality::implies_transform;
use crate::plan::{FileType, Input, Options, Plan};
use crate::source::TensorSource;
use crate::transform::scales::{self, Job};
use crate::transform::{Anatomy, Preset, Transforms, file, preset};

/// Tokens that scales are made from, where nothing else is said: in files of second moments more change little.
const TOKENS: usize = 32_768;

/// What to make.
#[derive(Args, Clone, Debug)]
pub struct TransformArgs {
    /// smoothquant, awq, quarot or womi; or a file of SpinQuant or OSTQuant, to be written in this program's form.
    #[arg(long, value_name = "NAME|FILE")]
    preset: PathBuf,
    /// At most so many tokens of the text that smoothquant and awq make scales from, in whole windows.
    #[arg(long, value_name = "N", default_value_t = TOKENS)]
    calibrate_tokens: usize,
    /// The type that awq makes scales for.
    #[arg(long = "for", value_name = "TYPE", default_value = "q4_k")]
    ty: String,
    /// How much of the differences between inputs smoothquant moves to the weights.
    #[arg(long, value_name = "X", default_value_t = 0.5)]
    alpha: f64,
    #[command(flatten)]
    making: MakingArgs,
}

/// What scales are made from, beside the model.
struct Text<'a> {
    texts: &'a [PathBuf],
    tokens: usize,
    ctx: usize,
    alpha: f64,
    types: &'a (dyn Fn(&str) -> Option<GgmlType> + Sync),
    /// Folder of what the model writes itself.
    state: &'a Path,
    threads: Option<u16>,
    max_memory: Option<u64>,
    quiet: bool,
}

/// The preset that `what` names; `None`: a file.
fn named(what: &Path) -> Option<Preset> {
    what.to_str().and_then(Preset::parse)
}

/// The preset that a recipe names.
pub fn named_in(r: &crate::plan::Recipe) -> Option<Preset> {
    r.transform.as_deref().and_then(named)
}

/// What a recipe that makes the same transforms without a measurement says; `None`: nothing does.
pub fn repeats(chosen: Option<&Transforms>) -> Option<&str> {
    let closed = [Preset::QuaRot, Preset::Womi].map(Preset::name);
    chosen.map_or(Some(Preset::None.name()), |t| closed.into_iter().find(|n| *n == t.name))
}

/// Makes or reads the transforms that `what` names.
fn make(
    what: &Path,
    path: &Path,
    input: &Input,
    anatomy: &Anatomy,
    seed: u64,
    text: &Text<'_>,
) -> Result<Transforms, Failure> {
    let source = &*input.source;
    Ok(match named(what) {
        None => file::read(what, anatomy, &fingerprint(source))?,
        Some(Preset::None) => Transforms::identity("none", anatomy.spec.layers),
        Some(Preset::QuaRot) => preset::quarot(anatomy, seed),
        Some(Preset::Womi) => pool(text.threads)?.install(|| preset::womi(anatomy, source, seed))?,
        Some(p @ (Preset::SmoothQuant | Preset::Awq)) => scaled(p, path, input, anatomy, text)?,
        Some(p @ (Preset::SpinQuant | Preset::OstQuant)) => {
            return Err(Failure::new(USAGE, format!("{} is learned: `ostq-convert learn`", p.name())));
        }
        Some(Preset::Auto) => {
            return Err(Failure::new(USAGE, "auto measures conversions: `ostq-convert IN OUT --transform auto`"));
        }
    })
}

/// Scales, from a run over a text.
fn scaled(
    preset: Preset,
    path: &Path,
    input: &Input,
    anatomy: &Anatomy,
    text: &Text<'_>,
) -> Result<Transforms, Failure> {
    let words = words::Request {
        words: text.texts,
        length: text.ctx,
        limit: Some((text.tokens / text.ctx).max(1)),
        threads: text.threads,
        max_memory: text.max_memory,
        state: text.state,
        quiet: text.quiet,
    };
    let prepared = Prepared::new((path, input), &words)?;
    let tokens = &prepared.tokens;
    if !text.quiet {
        let names = prepared.texts.join(", ");
        print::stderr(&format!("scales of {} on {names}: {} tokens", preset.name(), tokens.len()));
    }
    let (model, length, alpha, types) = (&prepared.model, text.ctx, text.alpha, text.types);
    let job = Job { model, anatomy, tokens, length, alpha, types };
    let mut steps = Steps::new("layer", anatomy.spec.layers, text.quiet);
    let made = pool(text.threads)?.install(|| scales::run(&job, preset, &mut |done| steps.done(done)));
    steps.finish();
    Ok(made?)
}

/// Makes the transforms of a preset for the types of a conversion's plan, from at most `windows` of its text.
fn made(
    preset: Preset,
    windows: usize,
    (args, options): (&ConvertArgs, &Options),
    (path, input): (&Path, &Input),
    anatomy: &Anatomy,
) -> Result<Transforms, Failure> {
    if preset.learns() {
        return super::learn::within(preset, windows, (args, options), (path, input), anatomy);
    }
    let r = &options.recipe;
    let types = if preset == Preset::Awq { planned(input, options)? } else { Vec::new() };
    let of = |name: &str| types.iter().find(|(n, _)| n == name).map(|(_, t)| *t);
    let text = Text {
        texts: &r.calibrate,
        tokens: TOKENS.min(windows * r.ctx.unwrap_or(512) as usize),
        ctx: r.ctx.unwrap_or(512) as usize,
        alpha: r.alpha.unwrap_or(0.5),
        types: &of,
        state: &state_of(args.out().map_or(Path::new("transforms"), |p| p)),
        threads: args.threads(),
        max_memory: args.max_memory,
        quiet: args.quiet,
    };
    make(Path::new(preset.name()), path, input, anatomy, r.seed.unwrap_or(0), &text)
}

/// Puts the transforms of the recipe between `input`'s weights and everybody who reads them; `imatrix`, made from the original
/// model, is carried over. `calibrate`: run a calibration that they need; a plan alone goes without scales.
pub fn apply(
    args: &ConvertArgs,
    options: &Options,
    input: &mut Input,
    imatrix: Option<&mut Imatrix>,
    calibrate: bool,
) -> Result<Option<Arc<Transforms>>, Failure> {
    let r = &options.recipe;
    let path = args.input.as_deref().expect("required by the parser");
    let Some(what) = r.transform.as_deref().filter(|w| named(w) != Some(Preset::None)) else { return Ok(None) };
    // a word's transforms are measured where there is something to measure
    let implied = implies_transform(r);
    if implied && input.transform.is_some() {
        input.warnings.push("the model was transformed before: no transforms are measured".into());
        return Ok(None);
    }
    if let Some((name, _)) = &input.transform {
        let why = format!("{}: was made with the transform `{name}` already; take the original", path.display());
        return Err(Failure::new(REFUSED, why));
    }
    let anatomy = match Anatomy::new(path, &*input.source, &input.metadata) {
        Err(e) if implied => {
            input.warnings.push(format!("no transforms are measured: {e}"));
            return Ok(None);
        }
        anatomy => anatomy?,
    };
    let preset = named(what);
    if let Some(p) = preset {
        input.warnings.extend(preset::left_out(p, &anatomy));
    }
    let transforms = match preset {
        // the shapes are all that a plan needs; scales have none
        Some(p) if !calibrate && p.calibrates() && !p.learns() => return Ok(None),
        Some(Preset::Womi | Preset::SpinQuant | Preset::OstQuant) if !calibrate => preset::quarot(&anatomy, 0),
        Some(Preset::Auto) => {
            let make = |p: Preset, windows: usize| made(p, windows, (args, options), (path, input), &anatomy);
            let word = what.to_str().expect("it names presets");
            let candidates = Preset::candidates(word).map_err(|e| Failure::new(USAGE, e))?;
            match super::choose::choose(args, options, (path, input), &anatomy, &candidates, &make)? {
                Some(chosen) => chosen,
                None => return Ok(None),
            }
        }
        Some(p) => made(p, super::round::windows(r), (args, options), (path, input), &anatomy)?,
        None => file::read(what, &anatomy, &fingerprint(&*input.source))?,
    };
    let transforms = Arc::new(transforms);
    input.transform(path, transforms.clone())?;
    if let Some(imatrix) = imatrix {
        carry_over(imatrix, input)?;
    }
    Ok(Some(transforms))
}

/// The types of a plan without transforms, by tensor.
pub fn planned(input: &Input, options: &Options) -> Result<Vec<(String, GgmlType)>, Failure> {
    let plan = Plan::new(input, options, Some(&super::plan::supposed(input)), Metadata::new())?;
    Ok(plan.tensors.into_iter().map(|t| (t.name, t.ty)).collect())
}

/// An importance matrix of the original model becomes one of the transformed model.
fn carry_over(imatrix: &mut Imatrix, input: &Input) -> Result<(), Failure> {
    let Some(source) = input.source.transformed() else { return Ok(()) };
    for (name, values) in &mut imatrix.entries {
        let Some(index) = source.tensors().iter().position(|t| t.name == *name) else { continue };
        let columns = source.tensors()[index].row_len() as usize;
        let refuse = |why: &str| {
            let why = format!("--imatrix: `{name}`: {why}; let one be made of the transformed model with --calibrate");
            Failure::new(REFUSED, why)
        };
        let map = source.input_map(name).ok_or_else(|| refuse("a norm before it has a weight of 0"))?;
        if columns == 0 || !values.len().is_multiple_of(columns) {
            continue;
        }
        for (expert, row) in values.chunks_exact_mut(columns).enumerate() {
            let moved = map.importance(row, expert).ok_or_else(|| {
                refuse("the transform mixes the columns of its input, whose correlations an importance matrix does not have")
            })?;
            row.copy_from_slice(&moved);
        }
    }
    Ok(())
}

/// What a rotation of the stream makes of a tied head, in words.
pub fn untied(plan: &Plan, input: &Input) -> Option<String> {
    let source = input.source.transformed().filter(|s| s.unties())?;
    let name = &source.transforms().name;
    let head = plan.tensors.iter().find(|t| t.name == "output.weight")?;
    Some(format!(
        "transform {name}: the head no longer is the embedding: output.weight ({}) adds {} to the file",
        head.ty,
        human(head.bytes)
    ))
}

/// The transforms that `what` names, where they need no text: for comparing weights.
pub fn of_weights(what: &Path, opened: &Opened, seed: u64) -> Result<Option<Arc<Transforms>>, Failure> {
    if let Some(p) = named(what).filter(|p| p.calibrates()) {
        let how = if p.learns() { "learn" } else { "transform" };
        let why = format!("--transform {} depends on a text: write it with `{how}` and give the file", p.name());
        return Err(Failure::new(USAGE, why));
    }
    let anatomy = Anatomy::new(&opened.path, &*opened.input.source, &opened.input.metadata)?;
    let text = Text {
        texts: &[],
        tokens: 0,
        ctx: 512,
        alpha: 0.5,
        types: &|_| None,
        state: Path::new(""),
        threads: None,
        max_memory: None,
        quiet: true,
    };
    Ok(Some(Arc::new(make(what, &opened.path, &opened.input, &anatomy, seed, &text)?)))
}

/// What transforms are made of, and where.
pub struct Made {
    pub opened: Opened,
    pub anatomy: Anatomy,
    /// Folder of what a run that is stopped goes on from.
    pub state: PathBuf,
}

impl MakingArgs {
    /// Opens the model, if the file may be written.
    pub fn open(&self) -> Result<Made, Failure> {
        super::convert::install_signal_handlers()?;
        output::check(&self.output, &[], None, self.force)?;
        let opened = Opened::new(&self.input)?;
        let anatomy = Anatomy::new(&self.input, &*opened.input.source, &opened.input.metadata)?;
        Ok(Made { opened, anatomy, state: state_of(&self.output) })
    }

    /// Writes the file and forgets the state.
    pub fn write(
        &self,
        made: &Transforms,
        anatomy: &Anatomy,
        source: &dyn TensorSource,
        state: &Path,
    ) -> Result<(), Failure> {
        file::write(&self.output, made, anatomy, &fingerprint(source), self.force)?;
        crate::rounding::state::forget(state);
        if !self.quiet {
            let (count, bytes) = (made.tensors().len(), human(made.bytes()));
            print::stderr(&format!("{}: {}, {count} tensors, {bytes}", self.output.display(), made.name));
        }
        Ok(())
    }
}

/// Writes a transforms file.
pub fn run(args: TransformArgs) -> Result<(), Failure> {
    let making = &args.making;
    if !(0.0..=1.0).contains(&args.alpha) {
        return Err(Failure::new(USAGE, format!("--alpha: {} is not between 0 and 1", args.alpha)));
    }
    let ty = FileType::parse(&args.ty)
        .map(FileType::default_type)
        .or_else(|| GgmlType::from_name(&args.ty))
        .ok_or_else(|| Failure::new(USAGE, format!("--for: `{}` is no type; `--list-types` shows all", args.ty)))?;
    let Made { opened, anatomy, state } = making.open()?;
    if let (Some(p), false) = (named(&args.preset), making.quiet) {
        preset::left_out(p, &anatomy).iter().for_each(|w| print::stderr(&format!("warning: {w}")));
    }
    let source = &*opened.input.source;
    let fits = |name: &str| {
        let t = source.tensors().iter().find(|t| t.name == name)?;
        (t.name.starts_with("blk.") && t.row_len().is_multiple_of(ty.block_len() as u64)).then_some(ty)
    };
    let text = Text {
        texts: &making.calibrate,
        tokens: args.calibrate_tokens,
        ctx: making.ctx as usize,
        alpha: args.alpha,
        types: &fits,
        state: &state,
        threads: making.resources.threads,
        max_memory: making.resources.max_memory,
        quiet: making.quiet,
    };
    let made = make(&args.preset, &making.input, &opened.input, &anatomy, making.seed, &text)?;
    made.check(&anatomy)?;
    making.write(&made, &anatomy, source, &state)
}
