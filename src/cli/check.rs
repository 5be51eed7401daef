//! `ostq-convert check REFERENCE MODEL...`: what a conversion costs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::args::{ConvertArgs, ResourceArgs};
use super::calibrate::{Opened, TextArgs, pool};
use super::steps::Steps;
use super::{Failure, REFUSED, RESOURCE, USAGE, print};
use crate::calibration::fingerprint::fingerprint;
use crate::calibration::hessian_file::HessianFile;
use crate::calibration::imatrix::{Imatrix, hex};
use crate::calibration::windows as text;
use crate::check::base_file::BaseFile;
use crate::check::report::{BlockRow, FORMAT, FileFacts, ModelReport, Report, RunFacts, TensorRow, TextFacts};
use crate::check::run::{self, Reference, Settings};
use crate::check::summary::{Perplexity, Rules};
use crate::check::tensors::{self, Weighting};
use crate::check::windows::Windows;
use crate::forward::{Activations, Model};
use crate::gguf;
use crate::output;
use crate::plan::memory::human;
use crate::plan::{FileType, Rounding};
use crate::transform::{Pair, Transforms};

/// What to compare, on what.
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// The reference and the models to compare with it: checkpoint folders or GGUF files. With --kl-divergence-base only
    /// models.
    #[arg(value_name = "REFERENCE MODEL", required = true)]
    paths: Vec<PathBuf>,
    /// Text, UTF-8: one that nothing was calibrated on.
    #[arg(long = "text", visible_alias = "file", short = 'f', value_name = "TEXT")]
    text: Option<PathBuf>,
    #[command(flatten)]
    windows: TextArgs,
    /// f32: what the weights cost. ggml: rounded as llama.cpp's CPU kernels round, to compare with llama-perplexity. w4a8,
    /// w4a4kv4 and the like: integers by row for weights, by token for inputs, by head for keys and values, simulated in the
    /// models (not in the reference).
    #[arg(long, value_name = "WHAT", default_value = "f32", value_parser = activations)]
    activations: Activations,
    /// With w4a8 and the like: Hadamard rotations of queries and keys and of the input of the down matrix while it runs.
    #[arg(long)]
    online_hadamard: bool,
    /// Error of every tensor.
    #[arg(long)]
    per_tensor: bool,
    /// Weigh tensor errors by this importance matrix (with --per-tensor).
    #[arg(long, value_name = "FILE", requires = "per_tensor")]
    imatrix: Option<PathBuf>,
    /// Weigh tensor errors by these second moments (with --per-tensor).
    #[arg(long, value_name = "FILE", requires = "per_tensor", conflicts_with = "imatrix")]
    hessian: Option<PathBuf>,
    /// Compare tensors (with --per-tensor) with those of the reference behind this transform: quarot, womi or a transforms file.
    /// Text is compared with the reference as it is.
    #[arg(long, value_name = "NAME|FILE", requires = "per_tensor", conflicts_with_all = ["imatrix", "hessian"])]
    transform: Option<PathBuf>,
    /// Of the random rotations of --transform.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Where hidden states begin to differ, layer by layer.
    #[arg(long)]
    per_block: bool,
    /// Compare with log-probabilities that an earlier run or llama-perplexity has written.
    #[arg(long, value_name = "FILE")]
    kl_divergence_base: Option<PathBuf>,
    /// Write the reference's log-probabilities, as llama-perplexity does.
    #[arg(long, value_name = "FILE", conflicts_with = "kl_divergence_base")]
    save_all_logits: Option<PathBuf>,
    /// Report on standard output as JSON.
    #[arg(long)]
    json: bool,
    /// Also write the report as one HTML page.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    resources: ResourceArgs,
    /// Replace files that are there.
    #[arg(long)]
    force: bool,
    /// Only errors and results.
    #[arg(long, short)]
    quiet: bool,
}

/// Arithmetic of the products, by its word.
fn activations(word: &str) -> Result<Activations, String> {
    match word {
        "f32" => Ok(Activations::F32),
        "ggml" => Ok(Activations::Ggml),
        other => other
            .parse()
            .map(Activations::Simulated)
            .map_err(|e: crate::forward::simulation::NoSimulation| format!("f32, ggml, or a precision: {e}")),
    }
}

/// The same, as a report says it.
fn named(activations: Activations) -> String {
    match activations {
        Activations::F32 => "f32".into(),
        Activations::Ggml => "ggml".into(),
        Activations::Simulated(s) => s.to_string(),
    }
}

impl From<run::RunError> for Failure {
    fn from(e: run::RunError) -> Failure {
        match e {
            run::RunError::Forward(e) => e.into(),
            e @ run::RunError::Check(crate::check::CheckError::Io { .. }) => Failure::new(RESOURCE, e),
            e => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::check::CheckError> for Failure {
    fn from(e: crate::check::CheckError) -> Failure {
        run::RunError::Check(e).into()
    }
}

/// Compares.
pub fn run(mut args: CheckArgs) -> Result<(), Failure> {
    super::convert::install_signal_handlers()?;
    match &mut args.activations {
        Activations::Simulated(s) => s.online = args.online_hadamard,
        _ if args.online_hadamard => {
            return Err(Failure::new(USAGE, "--online-hadamard: only with --activations w4a8 and the like"));
        }
        _ => {}
    }
    let transforms = match args.transform.as_deref() {
        Some(t) => super::transform::of_weights(t, &Opened::new(&args.paths[0])?, args.seed)?,
        None => None,
    };
    compared(args, transforms)
}

/// Compares; tensors with those of the reference behind `transforms`.
fn compared(args: CheckArgs, transforms: Option<Arc<Transforms>>) -> Result<(), Failure> {
    for out in args.html.iter().chain(&args.save_all_logits) {
        output::check(out, &[], None, args.force)?;
    }
    let pool = pool(args.resources.threads)?;
    // vocabularies take as long as layers of a small model: all at once, errors in the order of the files
    let opened: Vec<_> = pool.install(|| args.paths.par_iter().map(|p| Opened::new(p)).collect());
    let opened = opened.into_iter().collect::<Result<Vec<_>, _>>()?;
    let all = opened.iter().map(Opened::model).collect::<Result<Vec<_>, _>>()?;
    let base = args.kl_divergence_base.as_deref().map(BaseFile::open).transpose()?;
    let first = usize::from(base.is_none());
    if base.is_none() && all.len() < 2 && args.save_all_logits.is_none() {
        return Err(Failure::new(
            USAGE,
            "name a model to compare with the reference: check REFERENCE MODEL --text FILE",
        ));
    }
    let text = Evaluation::new(&args, &opened, base.as_ref())?;
    let vocab = all[0].vocab;
    for (m, o) in all.iter().zip(&opened).skip(1) {
        if m.vocab != vocab {
            let (a, b) = (args.paths[0].display(), o.path.display());
            return Err(Failure::new(
                REFUSED,
                format!("{b} has {} words, {a} has {vocab}: they cannot be compared", m.vocab),
            ));
        }
    }
    let imatrix = args.imatrix.as_deref().map(Imatrix::load).transpose()?;
    let hessian = args.hessian.as_deref().map(HessianFile::open).transpose()?;
    let weighting = match (&imatrix, &hessian) {
        (Some(i), _) => Weighting::Importance(i),
        (None, Some(h)) => {
            h.check_model(&fingerprint(&*opened[0].input.source))?;
            Weighting::Hessian(h)
        }
        (None, None) => Weighting::None,
    };
    let mut report = compare(&args, &pool, &all, base, &text, &opened)?;
    let mut behind = match &transforms {
        Some(_) if args.per_tensor => Some(Opened::new(&args.paths[0])?),
        _ => None,
    };
    if let (Some(behind), Some(t)) = (&mut behind, transforms) {
        behind.input.transform(&args.paths[0], t)?;
    }
    for (o, row) in opened[first..].iter().zip(&mut report.models) {
        if let Some((t, _)) = o.input.transform.as_ref().filter(|_| args.per_tensor && behind.is_none()) {
            let name = name(&o.path);
            report
                .run
                .notes
                .push(format!("{name} was made with the transform {t}: tensors are compared with --transform"));
        } else if args.per_tensor && first == 1 {
            row.tensors = tensor_rows(behind.as_ref().unwrap_or(&opened[0]), o, weighting)?;
        }
    }
    let problems = report.problems();
    if !problems.is_empty() {
        return Err(Failure::new(REFUSED, problems.join("\n")));
    }
    if let Some(path) = &args.html {
        output::write_new(path, report.html().as_bytes(), args.force)?;
    }
    print::stdout(if args.json { report.json() } else { report.text() }.as_bytes())
}

/// What `--per-tensor` and `--check` of a conversion ask for: the finished file, read back, against its source.
pub fn after(args: &ConvertArgs, out: &Path, transforms: Option<Arc<Transforms>>) -> Result<(), Failure> {
    let source = args.input.as_deref().expect("required by the parser");
    // a file without provenance does not say that its stream is rotated
    let recipe = args.options()?.recipe;
    let hidden = recipe.no_provenance && transforms.as_ref().is_some_and(|t| t.r_res.is_some());
    if let Some(text) = &args.check {
        let args = CheckArgs {
            paths: vec![source.to_path_buf(), out.to_path_buf()],
            text: Some(text.clone()),
            windows: TextArgs { ctx: recipe.ctx.unwrap_or(512), chunks: args.chunks },
            activations: Activations::F32,
            online_hadamard: false,
            per_tensor: true,
            imatrix: None,
            hessian: None,
            transform: None,
            seed: 0,
            per_block: !hidden,
            kl_divergence_base: None,
            save_all_logits: None,
            json: args.json,
            html: args.html.clone(),
            resources: ResourceArgs { threads: args.threads(), max_memory: args.max_memory },
            force: args.force,
            quiet: args.quiet,
        };
        return compared(args, transforms);
    }
    // where rounding took minutes, reading the file back takes seconds
    let by_type = args.options()?.rounding == Rounding::Gptq && !args.quiet;
    if !args.per_tensor && !by_type {
        return Ok(());
    }
    let rows = || -> Result<Vec<TensorRow>, Failure> {
        let mut reference = Opened::new(source)?;
        if let Some(t) = transforms {
            reference.input.transform(source, t)?;
        }
        tensor_rows(&reference, &Opened::new(out)?, Weighting::None)
    };
    if !args.per_tensor {
        // nobody asked: the file is there, whatever comes of this
        match rows() {
            Ok(rows) => print::stderr(types(&rows).trim_end()),
            Err(e) => print::stderr(&format!("warning: errors by type: {}", e.message)),
        }
        return Ok(());
    }
    let rows = rows()?;
    let mut table = vec![["tensor", "type", "bpw", "relative error"].map(String::from).to_vec()];
    for t in rows {
        let (bits, error) = (format!("{:.2}", t.bits_per_weight), format!("{:.3e}", t.relative_error));
        table.push(vec![t.name, t.type_name, bits, error]);
    }
    print::stdout(print::table(&table, &[false, false, true, true]).as_bytes())
}

/// What a conversion came to, by type: tensors, weights, bits, and the error over all their weights as if each weighed alike.
fn types(rows: &[TensorRow]) -> String {
    let mut all: Vec<(&str, Vec<&TensorRow>)> = Vec::new();
    for row in rows {
        match all.iter_mut().find(|(ty, _)| *ty == row.type_name) {
            Some((_, rows)) => rows.push(row),
            None => all.push((&row.type_name, vec![row])),
        }
    }
    all.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.iter().map(|r| r.weights).sum::<u64>()));
    let mut table = vec![["type", "tensors", "weights", "bpw", "relative error"].map(String::from).to_vec()];
    for (ty, rows) in all {
        let weights: u64 = rows.iter().map(|r| r.weights).sum();
        let mean = |of: &dyn Fn(&TensorRow) -> f64| {
            rows.iter().map(|r| of(r) * r.weights as f64).sum::<f64>() / weights.max(1) as f64
        };
        table.push(vec![
            ty.to_string(),
            rows.len().to_string(),
            weights.to_string(),
            format!("{:.2}", mean(&|r| r.bits_per_weight)),
            format!("{:.2e}", mean(&|r| r.relative_error)),
        ]);
    }
    print::table(&table, &[false, true, true, true, true])
}

/// The text as windows, cut by the models' own tokenizer.
struct Evaluation {
    facts: TextFacts,
    windows: Windows,
    tokens: Vec<i32>,
    bos: Option<u32>,
}

impl Evaluation {
    fn new(args: &CheckArgs, opened: &[Opened], base: Option<&BaseFile>) -> Result<Evaluation, Failure> {
        let encoder = opened[0].encoder()?;
        let differing = opened[1..].iter().filter(|o| !same_tokenizer(&opened[0], o));
        let others = differing.map(|o| Ok((o, o.encoder()?))).collect::<Result<Vec<_>, Failure>>()?;
        let bos = encoder.bos().filter(|_| encoder.add_bos());
        if let Some(base) = base {
            base.expect(encoder.len(), None)?;
            let facts = TextFacts { name: "tokens of the base file".into(), size: 0, sha256: String::new() };
            let windows = base.windows();
            return Ok(Evaluation { facts, windows, tokens: base.tokens().to_vec(), bos });
        }
        let Some(path) = &args.text else {
            return Err(Failure::new(USAGE, "--text FILE: which text? One that nothing was calibrated on"));
        };
        let text = text::read(path)?;
        let ids = encoder.encode(&text.content, true, false);
        let print = encoder.fingerprint();
        for (o, e) in &others {
            if e.fingerprint() == print && (e.add_bos(), e.bos()) == (encoder.add_bos(), encoder.bos()) {
                continue;
            }
            let other = e.encode(&text.content, true, false);
            if let Some(at) = (0..ids.len().max(other.len())).find(|&i| ids.get(i) != other.get(i)) {
                return Err(Failure::new(
                    REFUSED,
                    format!(
                        "{} and {} cut the text differently, from token {at} on: they cannot be compared",
                        args.paths[0].display(),
                        o.path.display()
                    ),
                ));
            }
        }
        let windows = Windows::new(ids.len(), args.windows.ctx as usize, args.windows.chunks.map(|n| n as usize))
            .map_err(|e| Failure::new(REFUSED, format!("{}: {e}", path.display())))?;
        let tokens = ids[..windows.n_chunks() * windows.n_ctx()].iter().map(|&t| t as i32).collect();
        let facts = TextFacts {
            name: text.name,
            size: text.content.len() as u64,
            sha256: hex(&Sha256::digest(text.content.as_bytes())),
        };
        Ok(Evaluation { facts, windows, tokens, bos })
    }
}

/// Whether the `tokenizer.*` keys of two models are the same.
fn same_tokenizer(a: &Opened, b: &Opened) -> bool {
    let of_tokenizer = |(key, _): &&(String, gguf::Value)| key.starts_with("tokenizer.");
    a.input.metadata.iter().filter(of_tokenizer).eq(b.input.metadata.iter().filter(of_tokenizer))
}

fn compare(
    args: &CheckArgs,
    pool: &rayon::ThreadPool,
    all: &[Model<'_>],
    mut base: Option<BaseFile>,
    text: &Evaluation,
    opened: &[Opened],
) -> Result<Report, Failure> {
    let first = usize::from(base.is_none());
    let everything: Vec<&Model<'_>> = all.iter().collect();
    let models = &everything[first..];
    let memory = run::memory(&everything, &text.windows, pool.current_num_threads(), args.resources.max_memory)
        .map_err(|e| Failure::new(RESOURCE, e))?;
    if !args.quiet {
        print::stderr(&format!(
            "{} windows of {} tokens, {} positions; at most {} of memory, {}",
            text.windows.n_chunks(),
            text.windows.n_ctx(),
            text.windows.positions(),
            human(memory.peak),
            super::plan::threads(pool.current_num_threads()),
        ));
    }
    let scratch = std::env::temp_dir();
    let settings = Settings {
        windows: text.windows,
        tokens: &text.tokens,
        bos: text.bos,
        activations: args.activations,
        memory,
        scratch: &scratch,
        save: args.save_all_logits.as_deref(),
    };
    let total = run::steps((first == 1).then_some(&all[0]), models, &text.windows);
    let mut steps = Steps::new("step", total, args.quiet);
    let start = Instant::now();
    let outcomes = pool.install(|| {
        let reference = match &mut base {
            Some(base) => Reference::Base(base),
            None => Reference::Model(&all[0]),
        };
        run::run(reference, models, &settings, &mut |done| steps.done(done))
    })?;
    steps.finish();
    if !args.quiet {
        print::stderr(&format!("{:.1} s", start.elapsed().as_secs_f64()));
    }
    let rules = if first == 1 { Rules::Exact } else { Rules::LlamaCpp };
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    for (outcome, o) in outcomes.models.iter().zip(&opened[first..]) {
        let mut row = ModelReport::new(facts(o), &outcome.records, rules, text.windows)
            .ok_or_else(|| Failure::new(REFUSED, "there are no positions to score"))?;
        if args.per_block && rotated(o) {
            notes.push(format!("{}: its stream is rotated, layers do not compare", name(&o.path)));
        } else if args.per_block {
            let blocks = outcome.blocks.iter().enumerate();
            row.blocks = blocks.map(|(l, &d)| BlockRow { layer: l as u32, relative_difference: d }).collect();
        }
        rows.push(row);
    }
    Ok(Report {
        format: FORMAT,
        program: format!("ostq-convert {}", env!("CARGO_PKG_VERSION")),
        run: RunFacts {
            reference: match &args.kl_divergence_base {
                Some(path) => FileFacts {
                    name: name(path),
                    size: std::fs::metadata(path).map_or(0, |m| m.len()),
                    type_name: "log-probabilities".into(),
                    bits_per_weight: 0.0,
                    weights: 0,
                },
                None => facts(&opened[0]),
            },
            reference_perplexity: Perplexity::of(&outcomes.reference),
            from_base_file: first == 0,
            text: text.facts.clone(),
            n_ctx: text.windows.n_ctx(),
            n_chunks: text.windows.n_chunks(),
            positions: text.windows.positions(),
            n_vocab: all[0].vocab,
            activations: named(args.activations),
            notes,
        },
        models: rows,
    })
}

/// True if the model's residual stream is rotated: it does not compare with the reference's.
fn rotated(o: &Opened) -> bool {
    o.input.transform.as_ref().is_some_and(|(_, pairs)| pairs.iter().any(|p| p == Pair::Stream.name()))
}

fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// A model's file as the report shows it.
fn facts(o: &Opened) -> FileFacts {
    let tensors = o.input.source.tensors();
    let weights: u64 = tensors.iter().map(|t| t.elements()).sum();
    let bytes: u64 = tensors.iter().map(|t| t.stored_bytes).sum();
    let file_type = gguf::value::get(&o.input.metadata, "general.file_type").and_then(|v| v.as_u64());
    FileFacts {
        name: name(&o.path),
        size: o.input.source.files().iter().map(|f| f.bytes().len() as u64).sum(),
        type_name: file_type.and_then(FileType::of_number).map_or("unknown", FileType::name).to_string(),
        bits_per_weight: bytes as f64 * 8.0 / weights.max(1) as f64,
        weights,
    }
}

fn tensor_rows(reference: &Opened, model: &Opened, weighting: Weighting<'_>) -> Result<Vec<TensorRow>, Failure> {
    let errors = tensors::errors(&*reference.input.source, &*model.input.source, weighting)
        .map_err(|e| Failure::new(REFUSED, format!("{}: {e}", model.path.display())))?;
    let row = |t: tensors::TensorError| {
        let (kind, layer) = TensorRow::kind_and_layer(&t.name);
        TensorRow {
            kind,
            layer,
            type_name: t.ty.to_string(),
            bits_per_weight: t.bytes as f64 * 8.0 / t.elements.max(1) as f64,
            weights: t.elements,
            relative_error: t.relative,
            weighted_error: t.weighted,
            name: t.name,
        }
    };
    Ok(errors.into_iter().map(row).collect())
}
