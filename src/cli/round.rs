//! GPTQ on the way to a conversion.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool, state_of};
use super::steps::Steps;
use super::{Failure, RESOURCE, print, words};
use crate::calibration::{fingerprint, windows::digest};
use crate::forward::{Model, backward};
use crate::gguf::GgmlType;
use crate::plan::memory::human;
use crate::plan::{Input, Plan, PlannedTensor, Recipe};
use crate::rounding::run::{self, Job};
use crate::rounding::state::{Report, RoundedTensors};

/// Tokens that are enough: with 8 thousand most of what GPTQ with corrected targets gains is lost again.
const TOKENS: u64 = crate::calibration::words::TOKENS as u64;
/// Fewer are warned of.
const FEW: usize = 128 * 1024;
/// Most windows that go through a layer together.
const BATCH: usize = 16;

/// Whether errors of the embedding are weighed by gradients.
fn weighs_embedding(plan: &Plan, model: &Model<'_>) -> bool {
    let weighs = |t: &PlannedTensor| t.name == "token_embd.weight" && run::weighs_embedding(t.ty, model.tied());
    plan.tensors.iter().any(weighs)
}

/// The tensors of a plan that GPTQ rounds: matrices of layers, the head, the embedding, where their type is a block format.
pub fn types(plan: &Plan, input: &Input) -> BTreeMap<String, GgmlType> {
    let wanted = |t: &&crate::plan::PlannedTensor| {
        let stored = input.source.tensors()[t.source].stored;
        let matrix = t.dims.len() == 2 || t.name.ends_with("_exps.weight");
        t.ty.is_quantized() && t.ty != stored && matrix && t.name.ends_with(".weight")
    };
    plan.tensors.iter().filter(wanted).map(|t| (t.name.clone(), t.ty)).collect()
}

/// Windows of text that are asked for.
pub fn windows(recipe: &Recipe) -> usize {
    (recipe.calibrate_tokens.unwrap_or(TOKENS) as usize / recipe.ctx.unwrap_or(512) as usize).max(1)
}

/// Windows that go through a layer together: as many of `most` as `limit` bytes allow, one at least.
pub fn fitting(most: usize, limit: Option<u64>, memory: impl Fn(usize) -> u64) -> usize {
    (1..=most).rev().find(|b| limit.is_none_or(|l| memory(*b) <= l)).unwrap_or(1)
}

/// Rounds what the plan says.
pub fn before(args: &ConvertArgs, recipe: &Recipe, input: &Input, plan: &Plan) -> Result<RoundedTensors, Failure> {
    let path = args.input.as_deref().expect("required by the parser");
    let length = recipe.ctx.unwrap_or(512) as usize;
    let state = state_of(args.out().expect("a conversion has an output"));
    let request = words::Request {
        words: &recipe.calibrate,
        length,
        limit: Some(windows(recipe)),
        threads: args.threads(),
        max_memory: args.max_memory,
        state: &state,
        quiet: args.quiet,
    };
    let prepared = Prepared::new((path, input), &request)?;
    let (model, tokens) = (&prepared.model, &prepared.tokens);
    let pool = pool(args.threads())?;
    let threads = pool.current_num_threads();
    let kept = run::kept(model, tokens.len(), recipe.one_pass);
    let room = args.max_memory.unwrap_or_else(|| available_memory() / 2);
    let most = BATCH.min(tokens.len() / length);
    let backward = weighs_embedding(plan, model);
    let memory = |batch| run::memory(model, length, batch, threads, backward);
    let keep = memory(most) + kept <= room;
    let batch = fitting(most, args.max_memory, memory);
    let needed = memory(batch) + if keep { kept } else { 0 };
    if let Some(limit) = args.max_memory.filter(|l| needed > *l) {
        let (limit, needed) = (human(limit), human(needed));
        return Err(Failure::new(
            RESOURCE,
            format!("--max-memory {limit}: GPTQ of this model needs at least {needed}"),
        ));
    }
    let spec = &model.spec;
    let paths = if recipe.one_pass { 1 } else { 2 };
    let streams = (tokens.len() * spec.embed * 4 * paths) as u64;
    let disk = streams + if keep { streams } else { kept };
    if !args.quiet {
        print::stderr(&format!(
            "rounding with GPTQ on {}: {} tokens in {} windows{}; at most {} of memory, {} on disk meanwhile, {}",
            prepared.texts.join(", "),
            tokens.len(),
            tokens.len() / length,
            if recipe.one_pass { ", float inputs" } else { ", targets corrected" },
            human(needed),
            human(disk),
            super::plan::threads(threads),
        ));
        // what is asked for comes in whole windows
        if tokens.len() + length <= FEW {
            print::stderr(&format!(
                "warning: {} tokens are few: below {FEW} much of the gain is lost; give more text with --calibrate",
                tokens.len()
            ));
        }
    }
    let job = Job {
        model,
        tokens,
        length,
        types: types(plan, input),
        fingerprint: fingerprint::fingerprint(model.source()),
        text: digest(tokens),
        one_pass: recipe.one_pass,
        row_scales: recipe.row_scales,
        batch,
        backward: backward as usize * backward::SAMPLE,
        keep,
        state: &state,
    };
    let start = Instant::now();
    let mut steps = Steps::new("layer", spec.layers, args.quiet);
    let reports = pool.install(|| run::run(&job, &mut steps))?;
    steps.finish();
    if !args.quiet {
        summary(&reports, start.elapsed().as_secs_f64());
    }
    Ok(RoundedTensors::open(
        &state,
        job.types.iter().map(|(n, t)| (n.clone(), *t)).filter(|(n, _)| on_disk(&state, n)),
    )?)
}

/// Memory that there is: what the user allows, or what the system could give, where it says.
pub(super) fn room(limit: Option<u64>) -> u64 {
    limit.unwrap_or(match available_memory() {
        0 => u64::MAX,
        available => available,
    })
}

/// Memory that the system could give, in bytes; 0 where it does not say.
pub(super) fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

/// Whether the run left blocks of a tensor.
fn on_disk(state: &Path, name: &str) -> bool {
    crate::rounding::state::blocks_path(state, name).exists()
}

/// What the rounding brought, in a few lines.
fn summary(reports: &[Report], seconds: f64) {
    let mean = |ratios: Vec<f64>| (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len().max(1) as f64).exp();
    let fitted = mean(reports.iter().filter(|r| r.nearest > 0.0).map(|r| r.error / r.nearest).collect());
    let held: Vec<f64> = reports.iter().filter_map(|r| r.held_out).map(|(own, nearest)| own / nearest).collect();
    let held_out = if held.is_empty() {
        "no windows were held out".to_string()
    } else {
        format!("{:.3} of it on windows held out", mean(held))
    };
    print::stderr(&format!(
        "{} tensors in {seconds:.1} s: error {fitted:.3} of nearest rounding's, {held_out} (geometric means)",
        reports.len()
    ));
    for r in reports.iter().filter(|r| !r.accepted) {
        print::stderr(&format!("warning: `{}`: GPTQ was worse on windows held out; rounded to nearest", r.name));
    }
    for (r, note) in reports.iter().filter_map(|r| r.note.as_ref().map(|n| (r, n))) {
        print::stderr(&format!("warning: `{}`: {note}", r.name));
    }
}
