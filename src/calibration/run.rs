//! Calibration: the text goes through the model one layer at a time; every layer's moments are kept.
//!
//! In memory at a time: one layer of weights as f32, one batch of windows, one layer's sums. The residual stream of all windows
//! lies in files of the state folder, from which a killed run goes on: after each layer its sums are written there, then
//! `state.json` says that it is done. The stream has two files in turn, so that a layer that was cut short starts again
//! from what the one before it left. Results do not depend on where a run was cut, nor on the number of threads.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::CalibrationError;
use super::collector::{CollectError, Collector, Coverage, WeightSpec};
use super::hessian_file::{HessianFile, Origin};
use super::hessian_write::{HessianSpec, HessianWriter};
use super::imatrix_sums::ImatrixSums;
use super::imatrix_write;
use crate::checkpoint::CheckpointError;
use crate::forward::run::Head;
use crate::forward::{Activations, ForwardError, Hidden, Model, Observer, Runner};

/// What to run, and where to keep what is not done.
pub struct Job<'a> {
    pub model: &'a Model<'a>,
    /// Whole windows of `length` tokens.
    pub tokens: &'a [u32],
    pub length: usize,
    /// Names of the texts, for the file.
    pub datasets: Vec<String>,
    /// [`super::fingerprint::fingerprint`] of the model.
    pub fingerprint: String,
    /// sha256 of the tokens, in hexadecimal.
    pub text: String,
    /// Σxxᵀ as well.
    pub second: bool,
    /// Also the head's input (`--process-output` of llama-imatrix).
    pub output: bool,
    /// Tokens of the prior that experts get ([`super::moments::with_prior`]); 0: none, as llama-imatrix.
    pub prior: u64,
    pub memory: Memory,
    /// Folder of the state; removed when the results are written.
    pub state: &'a Path,
}

/// How a run fits under its ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Ceiling of resident memory, in bytes.
    pub peak: u64,
    /// Windows that go through a layer together.
    pub batch: usize,
}

/// Program, vocabulary, thread stacks and the library's packing buffers, measured and rounded up.
const BASE: u64 = 96 << 20;
/// Largest useful batch, in windows.
const MOST: usize = 16;

/// The memory of a run over `windows` windows of `length` tokens under `limit` bytes.
pub fn memory(
    model: &Model<'_>,
    (windows, length): (usize, usize),
    second: bool,
    threads: usize,
    limit: Option<u64>,
) -> Result<Memory, String> {
    let specs = (0..model.spec.layers).map(|l| super::collector::bytes(&specs(model, l, second)));
    let sums = specs.max().flatten().ok_or("a layer's second moments do not fit in memory at all")? as u64;
    // the sums of a layer, once more while they are written, and what one call adds in f32
    let widest = model.spec.embed.max(model.feed_forward()) as u64;
    let second_copy = if second { widest * widest * 4 } else { 0 };
    // scores of attention and packing buffers of the products, per thread
    let group = (model.spec.heads / model.spec.kv_heads) as u64;
    let thread = (96 * group * length as u64 + (1 << 21)) * 4;
    let fixed = BASE + model.layer_bytes() + sums + sums / 2 + second_copy + threads as u64 * thread;
    let of = |batch: usize| fixed + Runner::batch_bytes(model, batch * length);
    let mut batch = MOST.min(windows.max(1));
    while batch > 1 && limit.is_some_and(|l| of(batch) > l) {
        batch -= 1;
    }
    match limit {
        Some(l) if of(batch) > l => Err(format!(
            "--max-memory {}: this model needs at least {} with one window of {length} tokens at a time",
            crate::plan::memory::human(l),
            crate::plan::memory::human(of(batch))
        )),
        _ => Ok(Memory { peak: of(batch), batch }),
    }
}

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    version: String,
    fingerprint: String,
    text: String,
    tokens: usize,
    length: usize,
    second: bool,
    output: bool,
    prior: u64,
    isa: String,
    /// Layers that are done.
    layers: usize,
    /// [`Hidden::digest`] of the stream behind them: a crash of the machine may have lost what was not on the disk yet.
    stream: String,
}

/// The weights of a layer whose inputs are seen, in the order of the forward pass.
pub(crate) fn specs(model: &Model<'_>, layer: usize, second: bool) -> Vec<WeightSpec> {
    let prefix = format!("blk.{layer}.");
    let mut specs: Vec<WeightSpec> = Vec::new();
    // the first of each group that is there owns the sums
    const GROUPS: &[&[&str]] = &[
        &["attn_qkv", "attn_q", "attn_k", "attn_v"],
        &["attn_output"],
        &["ffn_gate_inp"],
        &["ffn_gate", "ffn_up"],
        &["ffn_gate_exps", "ffn_up_exps"],
        &["ffn_down"],
        &["ffn_down_exps"],
    ];
    for group in GROUPS {
        let mut owner: Option<String> = None;
        for part in *group {
            let name = format!("{prefix}{part}.weight");
            let Some(t) = model.source().tensors().iter().find(|t| t.name == name) else { continue };
            let experts = part.ends_with("_exps").then_some(model.spec.experts);
            let columns = t.row_len() as usize;
            specs.push(WeightSpec { name: name.clone(), columns, experts, second, same_as: owner.clone() });
            owner.get_or_insert(name);
        }
    }
    specs
}

/// Fills a collector.
pub(crate) struct Collect {
    pub(crate) collector: Collector,
    /// Tokens of a window whose first one is left out, its activations being like no others. Experts get all of theirs.
    tails: Option<usize>,
}

impl Collect {
    pub(crate) fn new(specs: Vec<WeightSpec>) -> Result<Collect, CollectError> {
        Ok(Collect { collector: Collector::new(specs)?, tails: None })
    }

    /// Without the first token of every window of `length`.
    pub(crate) fn tails(specs: Vec<WeightSpec>, length: usize) -> Result<Collect, CollectError> {
        Ok(Collect { tails: Some(length), ..Collect::new(specs)? })
    }
}

impl Observer for Collect {
    fn input(&mut self, names: &[&str], expert: Option<(usize, usize)>, x: &[f32]) -> Result<(), ForwardError> {
        // parts of one fused weight have one name
        for (_, name) in names.iter().enumerate().filter(|(i, name)| !names[..*i].contains(name)) {
            let columns = self.collector.columns(name).unwrap_or(1);
            let mut add = |x: &[f32]| {
                let added = self.collector.add(name, expert.map(|(e, _)| e), x, x.len() / columns);
                added.map_err(|e| ForwardError::Observer(e.to_string()))
            };
            match self.tails.filter(|_| expert.is_none()) {
                None => add(x)?,
                Some(length) => x.chunks_exact(length * columns).try_for_each(|window| add(&window[columns..]))?,
            }
        }
        Ok(())
    }
}

/// What a run is told about its progress.
pub trait Watch {
    /// `layers` of all are done.
    fn layer(&mut self, layers: usize);
    /// A state was found that has `layers` layers already.
    fn resumed(&mut self, layers: usize);
    /// How many tokens the experts of a layer saw, before any prior.
    fn experts(&mut self, _coverage: Vec<Coverage>) {}
    /// Where the time of a rounding run went up to the layer that is done.
    fn stages(&mut self, _stages: &super::stages::Stages) {}
}

/// Runs what is not done yet; sums of all weights. With `hessians` their second moments are written there.
pub fn run(
    job: &Job<'_>,
    hessians: Option<(&Path, bool)>,
    watch: &mut dyn Watch,
) -> Result<ImatrixSums, CalibrationError> {
    let n = job.model.spec.embed;
    let bytes = (job.tokens.len() * n * 4) as u64;
    std::fs::create_dir_all(job.state).map_err(|e| io(job.state, e))?;
    let lock = Lock::take(job.state)?;
    let mut state = State {
        version: env!("CARGO_PKG_VERSION").into(),
        fingerprint: job.fingerprint.clone(),
        text: job.text.clone(),
        tokens: job.tokens.len(),
        length: job.length,
        second: job.second,
        output: job.output,
        prior: job.prior,
        isa: crate::formats::simd::isa().name().into(),
        layers: 0,
        stream: String::new(),
    };
    let found = read_state(job.state)
        .filter(|s| s.layers > 0 && State { layers: 0, stream: String::new(), ..s.clone() } == state)
        .filter(|s| (0..s.layers).all(|l| ImatrixSums::load(&part(job.state, l, "imatrix")).is_ok()));
    let mut runner = Runner::new(job.model, job.length, Activations::F32)?;
    let stream = |i: usize| Hidden::in_file(&job.state.join(format!("stream-{}.f32", i % 2)), bytes);
    let found = match found {
        Some(s) if stream(s.layers)?.digest(job.tokens.len() * n)? == s.stream => Some(s),
        _ => None,
    };
    match found {
        Some(s) => {
            state = s;
            watch.resumed(state.layers);
        }
        None => runner.embed(job.tokens, &mut stream(0)?)?,
    }
    for l in state.layers..job.model.spec.layers {
        let mut collect = Collect::new(specs(job.model, l, job.second))?;
        let (from, mut to) = (stream(l)?, stream(l + 1)?);
        runner.layer(l, &from, &mut to, job.tokens.len(), job.memory.batch, &mut collect)?;
        collect.collector.check_shared()?;
        watch.experts(collect.collector.coverage());
        if job.prior > 0 {
            collect.collector.apply_prior(job.prior)?;
        }
        write_part(job, l, &collect.collector)?;
        state.layers = l + 1;
        state.stream = to.digest(job.tokens.len() * n)?;
        write_state(job.state, &state)?;
        watch.layer(state.layers);
    }
    drop(runner);
    if job.output {
        let last = job.model.spec.layers;
        let name = job.model.head_name().to_string();
        let spec = WeightSpec { name, columns: n, experts: None, second: job.second, same_as: None };
        let mut collect = Collect::new(vec![spec])?;
        let head = Head::new(job.model, Activations::F32, 0)?;
        let stream = stream(last)?;
        let mut x = vec![0.0; job.length * n];
        for at in (0..job.tokens.len()).step_by(job.length) {
            stream.read(at * n, &mut x)?;
            head.input(&mut x, &mut collect)?;
        }
        write_part(job, last, &collect.collector)?;
    }
    let parts = job.model.spec.layers + usize::from(job.output);
    let mut all = ImatrixSums::default();
    for l in 0..parts {
        let path = part(job.state, l, "imatrix");
        let mut sums = ImatrixSums::load(&path)?;
        sums.datasets = Vec::new();
        all.add(sums).map_err(|why| CalibrationError::file(&path, why))?;
    }
    all.datasets = job.datasets.clone();
    if let Some((path, force)) = hessians {
        gather_hessians(job, parts, path, force)?;
    }
    lock.done();
    Ok(all)
}

/// Removes the state of a run whose results are safe: our own files, and the folder if nothing else is in it.
pub fn forget(state: &Path) {
    super::words::forget(state);
    let Ok(entries) = std::fs::read_dir(state) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let part = ["stream-", "layer-"].iter().any(|p| name.starts_with(p))
            && [".f32", ".gguf", ".ostq-part"].iter().any(|e| name.ends_with(e));
        if part || matches!(&*name, "state.json" | "state.json.new" | "lock" | "imatrix.gguf") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    let _ = std::fs::remove_dir(state);
}

fn io(path: &Path, source: std::io::Error) -> CalibrationError {
    CalibrationError::Input(CheckpointError::io(path, source))
}

fn part(state: &Path, layer: usize, kind: &str) -> PathBuf {
    state.join(format!("layer-{layer:03}.{kind}.gguf"))
}

fn origin(job: &Job<'_>) -> Origin {
    Origin {
        fingerprint: job.fingerprint.clone(),
        tokens: job.tokens.len() as u64,
        texts: vec![(job.datasets.join(", "), job.text.clone())],
    }
}

fn write_part(job: &Job<'_>, layer: usize, collector: &Collector) -> Result<(), CalibrationError> {
    let path = part(job.state, layer, "imatrix");
    let sums =
        ImatrixSums::of(collector, Vec::new(), job.length as u32).map_err(|why| CalibrationError::file(&path, why))?;
    imatrix_write::write_part(&path, &sums)?;
    if job.second {
        let specs: Vec<HessianSpec> = collector.weights().map(HessianSpec::from).collect();
        let names: Vec<String> = specs.iter().filter(|s| s.same_as.is_none()).map(|s| s.name.clone()).collect();
        let mut out = HessianWriter::create(&part(job.state, layer, "hessian"), specs, &origin(job), true)?;
        for name in names {
            out.put(&name, collector.moments(&name).unwrap_or_default())?;
        }
        out.finish()?;
    }
    Ok(())
}

/// One file of all layers' second moments. Each layer's own stays in the state folder until [`forget`].
fn gather_hessians(job: &Job<'_>, parts: usize, path: &Path, force: bool) -> Result<(), CalibrationError> {
    let mut all = Vec::new();
    for l in 0..job.model.spec.layers {
        all.extend(specs(job.model, l, true).iter().map(HessianSpec::from));
    }
    if job.output {
        let name = job.model.head_name().to_string();
        all.push(HessianSpec { name, columns: job.model.spec.embed, experts: None, same_as: None });
    }
    let mut out = HessianWriter::create(path, all, &origin(job), force)?;
    for l in 0..parts {
        let file = HessianFile::open(&part(job.state, l, "hessian"))?;
        for name in file.names().to_vec() {
            out.copy(&name, &file)?;
        }
    }
    out.finish()
}

fn read_state(folder: &Path) -> Option<State> {
    serde_json::from_slice(&std::fs::read(folder.join("state.json")).ok()?).ok()
}

fn write_state(folder: &Path, state: &State) -> Result<(), CalibrationError> {
    let (new, path) = (folder.join("state.json.new"), folder.join("state.json"));
    let text = serde_json::to_vec_pretty(state).expect("plain data");
    std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(|e| io(&path, e))
}

/// Keeps a second run out of the folder.
struct Lock {
    file: std::fs::File,
    path: PathBuf,
}

impl Lock {
    fn take(folder: &Path) -> Result<Lock, CalibrationError> {
        let path = folder.join("lock");
        let file = std::fs::File::create(&path).map_err(|e| io(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Lock { file, path }),
            Err(_) => Err(CalibrationError::file(folder, "another run is using this folder")),
        }
    }

    fn done(self) {
        let _ = self.file.unlock();
        let _ = std::fs::remove_file(&self.path);
    }
}
