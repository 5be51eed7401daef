//! The stream: a plan carried out.
//!
//! Work items are runs of rows, taken in the order in which they stand in the input files, so that a file is read once
//! from front to back. A worker takes the next item, reads its rows as f32, rounds them to the type of the intermediate
//! file where there is one, encodes, writes the bytes at their planned place and lets the pages go. Places are planned,
//! so the order of completion does not matter, and neither do the number of threads or the instruction set.

pub mod hash;
pub mod progress;
pub mod provenance;
mod sha256;
mod verify;
mod work;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

pub use progress::Progress;
pub use verify::VerifyError;
pub use work::WorkError;

pub use crate::output::OutputError;

use crate::calibration::imatrix::Imatrix;
use crate::output;
use crate::plan::memory::Memory;
use crate::plan::{Input, Plan};
use crate::rounding::state::RoundedTensors;

/// Set by the signal handler; workers look at it between items.
pub static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// What can go wrong while writing.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error(transparent)]
    Work(#[from] WorkError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error("{}: changed while it was being read; nothing was written", .0.display())]
    InputChanged(PathBuf),
    #[error("interrupted; nothing was written")]
    Interrupted,
    #[error("threads: {0}")]
    Threads(String),
}

/// How to run.
pub struct Run<'a> {
    pub input: &'a Input,
    pub plan: Plan,
    pub imatrix: Option<&'a Imatrix>,
    /// Tensors whose blocks are there already.
    pub rounded: Option<&'a RoundedTensors>,
    /// Search scales of weighted tensors better than llama.cpp does.
    pub search: bool,
    /// One scale for each row, with `search`.
    pub row_scales: bool,
    pub memory: Memory,
    pub output: &'a Path,
    pub force: bool,
    /// Accept infinities where a value does not fit in f16.
    pub allow_f16_overflow: bool,
    pub progress: &'a dyn Progress,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Done {
    pub file_size: u64,
    pub elapsed: Duration,
    /// Values that became infinite in f16 (only with `allow_f16_overflow`).
    pub overflows: u64,
}

/// Carries the plan out. On any error the final name is as it was.
pub fn run(mut run: Run) -> Result<Done, ConvertError> {
    let start = Instant::now();
    let mut out = output::PartFile::create(run.output, run.plan.layout.file_size, run.force)?;
    let digests = provenance::is_wanted(&run.plan.metadata);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(run.memory.threads)
        .thread_name(|i| format!("convert-{i}"))
        .build()
        .map_err(|e| ConvertError::Threads(e.to_string()))?;
    let files = run.input.source.files();
    let (overflows, hashes) = std::thread::scope(|scope| {
        let hasher = digests.then(|| hash::Hasher::start(scope, files, run.memory.threads));
        let overflows = work::run(&run, &out, &pool, hasher.as_ref())?;
        if hasher.is_some() {
            // the disk has work while the digests are finished; the header follows and is synced below
            out.sync()?;
        }
        Ok::<_, ConvertError>((overflows, hasher.map(hash::Hasher::finish)))
    })?;
    stop_if_interrupted()?;
    // a file that was cut short cannot be hashed either
    if let Some(f) = files.iter().find(|f| !f.unchanged()) {
        return Err(ConvertError::InputChanged(f.path().to_path_buf()));
    }
    if let Some(hashes) = hashes {
        let hashes = hashes.map_err(|(file, source)| WorkError::Read { file, source })?;
        provenance::fill(&mut run.plan, &hashes);
    }
    out.write_at(&run.plan.layout.header, 0)?;
    out.sync()?;
    verify::header(out.path(), &run.plan)?;
    stop_if_interrupted()?;
    out.publish()?;
    Ok(Done { file_size: run.plan.layout.file_size, elapsed: start.elapsed(), overflows })
}

fn stop_if_interrupted() -> Result<(), ConvertError> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(ConvertError::Interrupted) } else { Ok(()) }
}
