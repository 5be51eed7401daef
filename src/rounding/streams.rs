//! The two streams of a run, float and rounded, in memory or in files, and when they are saved.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::RoundingError;
use super::run::Job;
use crate::forward::Hidden;

/// Both paths: the float one, and the rounded one where there are two.
pub struct Pair {
    pub float: Hidden,
    pub rounded: Option<Hidden>,
}

impl Pair {
    /// `columns` values of every token, in files called `what`.
    pub fn in_files(job: &Job<'_>, what: &str, columns: usize) -> Result<Pair, RoundingError> {
        let file = |what: &str| {
            let path: PathBuf = job.state.join(format!("rounding-{what}.f32"));
            Hidden::in_file(&path, (job.tokens.len() * columns * 4) as u64)
        };
        let rounded = (!job.one_pass).then(|| file(&format!("{what}-rounded"))).transpose()?;
        Ok(Pair { float: file(what)?, rounded })
    }

    /// In memory.
    pub fn in_memory(job: &Job<'_>, columns: usize) -> Pair {
        let memory = || Hidden::Memory(vec![0.0; job.tokens.len() * columns]);
        Pair { float: memory(), rounded: (!job.one_pass).then(memory) }
    }

    /// Copies the first `values` values of both.
    pub fn copy(&mut self, other: &Pair, values: usize) -> Result<(), RoundingError> {
        self.float.copy(&other.float, values)?;
        if let (Some(own), Some(other)) = (&mut self.rounded, &other.rounded) {
            own.copy(other, values)?;
        }
        Ok(())
    }

    /// Checksums of the first `values` values; empty for what is not there.
    pub fn digests(&self, values: usize) -> Result<[String; 2], RoundingError> {
        let rounded = self.rounded.as_ref().map_or(Ok(String::new()), |r| r.digest(values))?;
        Ok([self.float.digest(values)?, rounded])
    }
}

/// When streams that are in memory are saved: first of all, then so rarely that it takes a small part of the time.
#[derive(Default)]
pub struct Saves {
    last: Option<(Instant, Duration)>,
}

impl Saves {
    /// Time between saves, in times that the last one took.
    const RARELY: u32 = 40;

    pub fn due(&self) -> bool {
        self.last.is_none_or(|(at, took)| at.elapsed() >= took * Self::RARELY)
    }

    /// Saves.
    pub fn save(&mut self, save: impl FnOnce() -> Result<(), RoundingError>) -> Result<(), RoundingError> {
        let start = Instant::now();
        save()?;
        self.last = Some((Instant::now(), start.elapsed()));
        Ok(())
    }
}
