//! `ostq-convert qsur IN`: how much of a quantization grid weights and activations use.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::calibrate::{Opened, Request, TextArgs, collect, pool};
use super::{Failure, REFUSED, USAGE, print};
use crate::calibration::hessian_file::HessianFile;
use crate::calibration::moments::Moments;
use crate::calibration::run::forget;
use crate::linalg;
use crate::output;
use crate::plan::memory::parse_size;
use crate::source::TensorSource;
use crate::transform::qsur::{Options, QsurError};
use crate::transform::qsur_report::{Kind, Report, Row};
use crate::transform::spread::Spread;

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct QsurArgs {
    /// Checkpoint folder or GGUF file.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Activations too, over this text; several times for several texts. `builtin`: the corpus that ships with the program.
    #[arg(long, value_name = "TEXT")]
    calibrate: Vec<PathBuf>,
    /// Activations too, from second moments that `calibrate --hessian` has written.
    #[arg(long, value_name = "FILE", conflicts_with = "calibrate")]
    hessian: Option<PathBuf>,
    #[command(flatten)]
    text: TextArgs,
    /// Only tensors whose name contains this; may be given several times.
    #[arg(long, value_name = "PART")]
    include_weights: Vec<String>,
    /// Values that share a scale.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    block: u16,
    /// Noise that is added to the covariance, as a share of the mean variance.
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    damping: f64,
    /// Also the paper's form (eq. 7), which needs eigenvectors.
    #[arg(long)]
    paper: bool,
    /// Also after a transform of the inputs.
    #[arg(long, value_enum)]
    transform: Option<Transform>,
    /// Figures on standard output as JSON.
    #[arg(long)]
    json: bool,
    /// Also write a plot.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Worker threads [default: all processors].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Ceiling of resident memory of the calibration.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,
    /// Replace files that are there.
    #[arg(long)]
    force: bool,
    /// Only errors and results.
    #[arg(long, short)]
    quiet: bool,
}

/// A transform `x A` with an orthogonal A.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transform {
    /// Normalised Hadamard matrices of the largest power of two that divides the width, along the diagonal.
    Hadamard,
}

/// Measures.
pub fn run(args: QsurArgs) -> Result<(), Failure> {
    super::convert::install_signal_handlers()?;
    if !(args.damping > 0.0 && args.damping.is_finite()) {
        return Err(Failure::new(USAGE, format!("--damping {}: a number above 0 is needed", args.damping)));
    }
    if let Some(path) = &args.svg {
        output::check(path, &[], None, args.force)?;
    }
    let opened = Opened::new(&args.input)?;
    let options = Options { damping: args.damping, block: args.block.into(), paper: args.paper };
    let pool = pool(args.threads)?;
    let mut report = Report { damping: args.damping, rows: Vec::new() };
    let wanted =
        |name: &str| args.include_weights.is_empty() || args.include_weights.iter().any(|p| name.contains(&**p));
    let source = &*opened.input.source;
    for (i, t) in source.tensors().iter().enumerate() {
        let is_linear = t.name.starts_with("blk.") || t.name == "output.weight";
        if t.dims.len() < 2 || !is_linear || !wanted(&t.name) {
            continue;
        }
        let row = pool.install(|| row(&t.name, Kind::Weight, weight_spread(source, i), &args, &options));
        report.rows.push(row.map_err(|e| refused(&args.input, &t.name, e))?);
    }
    if let Some(path) = &args.hessian {
        activations(path, &opened, &args, &options, &pool, &mut report, &wanted)?;
    } else if !args.calibrate.is_empty() {
        let state = std::env::temp_dir().join(format!("ostq-qsur-{}", std::process::id()));
        let result = calibrated(&state, &opened, &args, &options, &pool, &mut report, &wanted);
        let _ = std::fs::remove_file(state.join(HESSIAN));
        forget(&state);
        result?;
    }
    if let Some(path) = &args.svg {
        output::write_new(path, report.svg().as_bytes(), args.force)?;
    }
    if args.json {
        let json = serde_json::to_string_pretty(&report).expect("plain data");
        print::stdout(format!("{json}\n").as_bytes())
    } else {
        print::stdout(report.table().as_bytes())
    }
}

const HESSIAN: &str = "second.gguf";

fn refused(path: &Path, name: &str, e: impl std::fmt::Display) -> Failure {
    Failure::new(REFUSED, format!("{}: tensor `{name}`: {e}", path.display()))
}

/// The rows of a weight as samples.
fn weight_spread(source: &dyn TensorSource, index: usize) -> Result<Spread, QsurError> {
    let t = &source.tensors()[index];
    let columns = t.row_len() as usize;
    let mut moments = Moments::new(columns, true).map_err(|_| QsurError::Empty)?;
    let step = 512u64.next_multiple_of(t.row_group.max(1));
    let mut x = Vec::new();
    for from in (0..t.rows()).step_by(step as usize) {
        let to = (from + step).min(t.rows());
        x.resize((to - from) as usize * columns, 0.0);
        source.read_rows(index, from..to, &mut x);
        source.release(index, from..to);
        moments.add(&x, (to - from) as usize).map_err(|_| QsurError::Shape {
            what: "finite rows",
            values: x.len(),
            d: columns,
        })?;
    }
    Spread::of_moments(&moments)
}

fn row(
    name: &str,
    kind: Kind,
    spread: Result<Spread, QsurError>,
    args: &QsurArgs,
    options: &Options,
) -> Result<Row, QsurError> {
    let spread = spread?;
    let par = linalg::all_threads();
    let after = match args.transform {
        Some(Transform::Hadamard) => Some(spread.map(&hadamard(spread.dimension()), par)?.qsur(options, par)?),
        None => None,
    };
    Ok(Row { name: name.to_string(), kind, before: spread.qsur(options, par)?, after })
}

/// Block diagonal, `[d, d]`.
fn hadamard(d: usize) -> Vec<f64> {
    let n = 1usize << d.trailing_zeros();
    let scale = 1.0 / (n as f64).sqrt();
    let mut a = vec![0.0; d * d];
    for block in 0..d / n {
        for i in 0..n {
            for j in 0..n {
                let sign = if (i & j).count_ones().is_multiple_of(2) { scale } else { -scale };
                a[(block * n + i) * d + block * n + j] = sign;
            }
        }
    }
    a
}

#[allow(clippy::too_many_arguments)] // what a run has, handed on
fn calibrated(
    state: &Path,
    opened: &Opened,
    args: &QsurArgs,
    options: &Options,
    pool: &rayon::ThreadPool,
    report: &mut Report,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(), Failure> {
    std::fs::create_dir_all(state).map_err(|e| crate::checkpoint::CheckpointError::io(state, e))?;
    let path = state.join(HESSIAN);
    collect(
        &opened.path,
        &opened.input,
        &Request {
            texts: &args.calibrate,
            ctx: args.text.ctx as usize,
            chunks: args.text.chunks.map(|n| n as usize),
            second: Some((&path, true)),
            output: true,
            prior: 0,
            threads: args.threads,
            max_memory: args.max_memory,
            state,
            quiet: args.quiet,
        },
    )?;
    activations(&path, opened, args, options, pool, report, wanted)
}

#[allow(clippy::too_many_arguments)] // what a run has, handed on
fn activations(
    path: &Path,
    opened: &Opened,
    args: &QsurArgs,
    options: &Options,
    pool: &rayon::ThreadPool,
    report: &mut Report,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(), Failure> {
    let file = HessianFile::open(path)?;
    file.check_model(&crate::calibration::fingerprint::fingerprint(&*opened.input.source))?;
    for name in file.names().iter().filter(|n| wanted(n)) {
        let experts = file.entry(name).map_or(1, |e| e.counts.len());
        for e in 0..experts {
            let count = file.entry(name).map_or(0, |entry| entry.counts[e]);
            if count == 0 {
                continue;
            }
            let (second, sum) = (file.matrix(name, e)?, file.sum(name, e)?);
            let shown = if experts > 1 { format!("{name}[{e}]") } else { name.clone() };
            let spread = Spread::of_sums(second, &sum, count);
            let row = pool.install(|| row(&shown, Kind::Activation, spread, args, options));
            report.rows.push(row.map_err(|e| refused(path, &shown, e))?);
        }
    }
    Ok(())
}
