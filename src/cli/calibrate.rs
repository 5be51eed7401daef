//! `ostq-convert calibrate IN`: an importance matrix, and second moments, of a model over a text.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::args::{ConvertArgs, ResourceArgs};
use super::steps::Steps;
use super::{Failure, REFUSED, RESOURCE, USAGE, print, words};
use crate::calibration::imatrix::Imatrix;
use crate::calibration::imatrix_sums::ImatrixSums;
use crate::calibration::imatrix_write::{self, Format};
use crate::calibration::run::{self, Job};
use crate::calibration::{fingerprint, windows as text};
use crate::forward::Model;
use crate::output;
use crate::plan::memory::human;
use crate::plan::{Input, Options, Recipe};
use crate::tokenizer::encode::TextEncoder;

/// Which texts, and how much of them. The same words on every command that runs a model over a text.
#[derive(Args, Clone, Debug)]
pub struct TextArgs {
    /// Tokens of a window.
    #[arg(long = "ctx", visible_alias = "ctx-size", short = 'c', value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..))]
    pub ctx: u32,
    /// At most so many windows.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
}

/// What to collect, from what.
#[derive(Args, Clone, Debug)]
pub struct CalibrateArgs {
    /// Checkpoint folder or GGUF file.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Importance matrix to write.
    #[arg(long, short, value_name = "FILE", default_value = "imatrix.gguf")]
    output: PathBuf,
    /// Text, UTF-8; may be given several times. `self`: the model writes text itself [default: `builtin`, a small general corpus
    /// that ships with the program].
    #[arg(long = "file", visible_alias = "text", short = 'f', value_name = "TEXT")]
    texts: Vec<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// At most so many tokens, in whole windows.
    #[arg(long, value_name = "N", conflicts_with = "chunks")]
    calibrate_tokens: Option<usize>,
    /// Also the input of the output matrix.
    #[arg(long)]
    process_output: bool,
    /// Blend the sums of each expert with N tokens of the mean of its layer's experts; 0: as llama-imatrix.
    #[arg(long, value_name = "N", default_value_t = 0)]
    expert_prior: u64,
    /// gguf, or dat for programs that know only the older format.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = OutputFormat::Gguf)]
    output_format: OutputFormat,
    /// Add the sums of an importance matrix that is there.
    #[arg(long, value_name = "FILE")]
    in_file: Vec<PathBuf>,
    /// Also write the second moments of every input (GPTQ and its relatives need them).
    #[arg(long, value_name = "FILE")]
    hessian: Option<PathBuf>,
    #[command(flatten)]
    resources: ResourceArgs,
    /// Folder of what is not done yet; a killed run goes on from there [default: OUTPUT.ostq-state].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Replace files that are there.
    #[arg(long)]
    force: bool,
    /// Only errors.
    #[arg(long, short)]
    quiet: bool,
}

/// How an importance matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Gguf,
    Dat,
}

/// A model opened for running.
pub struct Opened {
    pub path: PathBuf,
    pub input: Input,
}

impl Opened {
    /// Opens a folder or a file.
    pub fn new(path: &Path) -> Result<Opened, Failure> {
        // the type does not matter: nothing is written
        let options = Options::resolve(Recipe { r#type: Some("COPY".into()), ..Recipe::default() })
            .map_err(|e| Failure::new(USAGE, e))?;
        Ok(Opened { path: path.to_path_buf(), input: Input::open(path, &options)? })
    }

    /// The model in it.
    pub fn model(&self) -> Result<Model<'_>, Failure> {
        Ok(Model::new(&self.path, &*self.input.source, &self.input.metadata)?)
    }

    /// Its tokenizer.
    pub fn encoder(&self) -> Result<TextEncoder, Failure> {
        encoder(&self.path, &self.input)
    }
}

fn encoder(path: &Path, input: &Input) -> Result<TextEncoder, Failure> {
    TextEncoder::from_metadata(&input.metadata).map_err(|e| Failure::new(REFUSED, format!("{}: {e}", path.display())))
}

/// A model, and text cut into windows for it.
pub struct Prepared<'a> {
    pub model: Model<'a>,
    /// Whole windows.
    pub tokens: Vec<u32>,
    /// Names of the texts.
    pub texts: Vec<String>,
}

impl<'a> Prepared<'a> {
    /// The model `input` of `path` with the text that `request` asks for.
    pub fn new((path, input): (&Path, &'a Input), request: &words::Request<'_>) -> Result<Prepared<'a>, Failure> {
        let model = Model::new(path, &*input.source, &input.metadata)?;
        let (tokens, texts) = words::windows(&model, &encoder(path, input)?, request)?;
        Ok(Prepared { model, tokens, texts })
    }
}

/// A pool of `threads` threads, all processors for none.
pub fn pool(threads: Option<u16>) -> Result<rayon::ThreadPool, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads.map_or(0, usize::from))
        .build()
        .map_err(|e| Failure::new(RESOURCE, format!("no threads: {e}")))
}

/// A calibration on its own or on the way to a conversion.
pub struct Request<'a> {
    pub texts: &'a [PathBuf],
    pub ctx: usize,
    pub chunks: Option<usize>,
    pub second: Option<(&'a Path, bool)>,
    pub output: bool,
    pub prior: u64,
    pub threads: Option<u16>,
    pub max_memory: Option<u64>,
    pub state: &'a Path,
    pub quiet: bool,
}

/// Runs the text through the model `input`, which `path` names in messages; the sums.
pub fn collect(path: &Path, input: &Input, request: &Request<'_>) -> Result<ImatrixSums, Failure> {
    let words = words::Request {
        words: request.texts,
        length: request.ctx,
        limit: request.chunks,
        threads: request.threads,
        max_memory: request.max_memory,
        state: request.state,
        quiet: request.quiet,
    };
    let prepared = Prepared::new((path, input), &words)?;
    let (model, tokens) = (&prepared.model, &prepared.tokens);
    let windows = tokens.len() / request.ctx;
    let pool = pool(request.threads)?;
    let second = request.second.is_some();
    let threads = pool.current_num_threads();
    let memory = run::memory(model, (windows, request.ctx), second, threads, request.max_memory)
        .map_err(|e| Failure::new(RESOURCE, e))?;
    if !request.quiet {
        print::stderr(&format!(
            "calibration on {}: {} tokens in {windows} windows; at most {} of memory, {} on disk meanwhile, {}",
            prepared.texts.join(", "),
            tokens.len(),
            human(memory.peak),
            human((tokens.len() * model.spec.embed * 8) as u64),
            super::plan::threads(threads),
        ));
    }
    let job = Job {
        model,
        tokens,
        length: request.ctx,
        datasets: prepared.texts.clone(),
        fingerprint: fingerprint::fingerprint(model.source()),
        text: text::digest(tokens),
        second,
        output: request.output,
        prior: request.prior,
        memory,
        state: request.state,
    };
    let mut steps = Steps::new("layer", model.spec.layers, request.quiet);
    let start = Instant::now();
    let sums = pool.install(|| run::run(&job, request.second, &mut steps))?;
    steps.finish();
    if !request.quiet {
        let seconds = start.elapsed().as_secs_f64();
        let rate = tokens.len() as f64 / seconds;
        let flops = (model.linear_flops() * tokens.len() as u64
            + crate::forward::attention::flops(&model.spec, request.ctx) * (model.spec.layers * windows) as u64)
            as f64;
        print::stderr(&format!("{seconds:.1} s, {rate:.0} tokens/s, {:.1} GFLOP/s", flops / seconds * 1e-9));
    }
    Ok(sums)
}

/// Folder of the state of a run that writes `out`.
pub fn state_of(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_os_string();
    name.push(".ostq-state");
    name.into()
}

/// The calibration on the way to a conversion: its importance matrix, which stays in the state folder until the conversion
/// is done, so that a killed one goes on there.
pub fn before(args: &ConvertArgs, recipe: &Recipe, input: &Input) -> Result<Imatrix, Failure> {
    let out = args.out().expect("a conversion has an output");
    let state = state_of(out);
    let ctx = recipe.ctx.unwrap_or(512) as usize;
    let sums = collect(
        args.input.as_deref().expect("required by the parser"),
        input,
        &Request {
            texts: &recipe.calibrate,
            ctx,
            chunks: recipe.calibrate_tokens.map(|n| (n as usize / ctx).max(1)),
            second: None,
            output: false,
            prior: 0,
            threads: args.threads(),
            max_memory: args.max_memory,
            state: &state,
            quiet: args.quiet,
        },
    )?;
    let path = state.join("imatrix.gguf");
    imatrix_write::write(&path, &sums, Format::Gguf, true)?;
    Ok(Imatrix::load(&path)?)
}

/// The conversion is done: its calibration's state may go.
pub fn done(args: &ConvertArgs) {
    if let Some(out) = args.out() {
        run::forget(&state_of(out));
        crate::rounding::state::forget(&state_of(out));
    }
}

/// Calibrates.
pub fn run(args: CalibrateArgs) -> Result<(), Failure> {
    super::convert::install_signal_handlers()?;
    let opened = Opened::new(&args.input)?;
    for out in std::iter::once(&args.output).chain(&args.hessian) {
        output::check(out, &[], None, args.force)?;
    }
    let ctx = args.text.ctx as usize;
    let chunks = args.text.chunks.map(|n| n as usize).or(args.calibrate_tokens.map(|n| (n / ctx).max(1)));
    let state = args.state.clone().unwrap_or_else(|| state_of(&args.output));
    let mut sums = collect(
        &opened.path,
        &opened.input,
        &Request {
            texts: &args.texts,
            ctx,
            chunks,
            second: args.hessian.as_deref().map(|p| (p, args.force)),
            output: args.process_output,
            prior: args.expert_prior,
            threads: args.resources.threads,
            max_memory: args.resources.max_memory,
            state: &state,
            quiet: args.quiet,
        },
    )?;
    for path in &args.in_file {
        let notes = sums
            .add(ImatrixSums::load(path)?)
            .map_err(|e| Failure::new(REFUSED, format!("{}: {e}", path.display())))?;
        for note in notes {
            print::stderr(&format!("warning: {}: {note}", path.display()));
        }
    }
    let format = if args.output_format == OutputFormat::Dat { Format::Dat } else { Format::Gguf };
    imatrix_write::write(&args.output, &sums, format, args.force)?;
    run::forget(&state);
    if !args.quiet {
        print::stderr(&format!("{}: {} weights", args.output.display(), sums.entries.len()));
    }
    Ok(())
}
