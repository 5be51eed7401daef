//! The text of `--calibrate` on its way into a run, with the progress of what the model writes itself.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::calibrate::pool;
use super::steps::Steps;
use super::{Failure, print};
use crate::calibration::words::{Wanted, Words};
use crate::forward::{Model, generate};
use crate::plan::Recipe;
use crate::tokenizer::encode::TextEncoder;

/// How much text, from which words.
pub struct Request<'a> {
    pub words: &'a [PathBuf],
    /// Tokens of a window.
    pub length: usize,
    /// Windows.
    pub limit: Option<usize>,
    pub threads: Option<u16>,
    pub max_memory: Option<u64>,
    pub state: &'a Path,
    pub quiet: bool,
}

/// Bytes that a model takes to write text for `recipe`.
pub fn memory(model: &Model<'_>, recipe: &Recipe) -> u64 {
    const MANY: usize = 1 << 20;
    let length = recipe.ctx.unwrap_or(512) as usize;
    generate::memory(model, length, generate::batch(model, length, MANY))
}

/// Windows of token ids, and the names of their texts.
pub fn windows(
    model: &Model<'_>,
    encoder: &TextEncoder,
    request: &Request<'_>,
) -> Result<(Vec<u32>, Vec<String>), Failure> {
    let words = Words::load(request.words)?;
    let available = super::round::available_memory();
    let wanted = Wanted {
        model,
        encoder,
        length: request.length,
        limit: request.limit,
        memory: request.max_memory.or((available > 0).then_some(available)),
        state: request.state,
    };
    let mut steps: Option<Steps> = None;
    let start = Instant::now();
    let (quiet, mut written) = (request.quiet, 0);
    let mut progress = |done: usize, all: usize| {
        let steps = steps.get_or_insert_with(|| {
            if !quiet {
                print::stderr("the model writes text to calibrate on");
            }
            Steps::new("token", all, quiet)
        });
        steps.done(done);
        written = done;
    };
    let tokens = pool(request.threads)?.install(|| words.windows(&wanted, &mut progress))?;
    if let Some(steps) = steps {
        steps.finish();
        if !quiet {
            let seconds = start.elapsed().as_secs_f64();
            let (count, rate) = (tokens.len(), written as f64 / seconds);
            print::stderr(&format!("{written} tokens written in {seconds:.1} s ({rate:.0} tokens/s); {count} in all"));
        }
    }
    Ok((tokens, words.names()))
}
