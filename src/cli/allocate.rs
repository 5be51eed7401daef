//! `--target-size`, `--target-bpw`, `--like`: types for a size, on the way to a conversion.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::args::ConvertArgs;
use super::calibrate::{Prepared, pool};
use super::steps::Steps;
use super::{Failure, REFUSED, USAGE, print, words};
use crate::allocation::{AllocationError, TensorCosts, costs, knapsack, measured};
use crate::calibration::{fingerprint, windows};
use crate::forward::Model;
use crate::forward::backward::SAMPLE;
use crate::gguf::GgmlType;
use crate::plan::memory::human;
use crate::plan::{Budget, Input, Options, Plan, Recipe, Rounding};

/// Windows of the second moments.
const WINDOWS: usize = 64;
/// Windows that go through a layer together.
const BATCH: usize = 8;
/// Sizes of the frontier that is shown, as parts of the target.
const FRONTIER: [f64; 8] = [0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6];

/// Types that runtimes run fast, where `--types` says nothing.
const DEFAULT: &[GgmlType] =
    &[GgmlType::Q2_K, GgmlType::Q3_K, GgmlType::IQ4_XS, GgmlType::Q4_K, GgmlType::Q5_K, GgmlType::Q6_K, GgmlType::Q8_0];
/// For rows that are no whole super-blocks.
const SMALL: &[GgmlType] = &[GgmlType::IQ4_NL, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1, GgmlType::Q8_0];

/// What was predicted, kept for a second run with the same text.
#[derive(Clone, Serialize, Deserialize)]
struct Kept {
    version: String,
    fingerprint: String,
    text: String,
    gptq: bool,
    candidates: Vec<(String, Vec<String>)>,
    costs: Vec<TensorCosts>,
    /// The choices that were measured, of these costs; none: costs are predicted.
    picks: Vec<usize>,
    predicted: Vec<TensorCosts>,
}

/// Types of tensors that an allocation chooses among.
fn candidates(plan: &Plan, input: &Input, options: &Options) -> Vec<(String, Vec<GgmlType>)> {
    // what the user gave a type keeps it
    let given = |name: &str| {
        (name == "output.weight" && options.output_tensor_type.is_some())
            || (name == "token_embd.weight" && options.token_embedding_type.is_some())
            || options.tensor_types.iter().any(|rule| rule.matches(name))
    };
    let wanted = |t: &&crate::plan::PlannedTensor| {
        !given(&t.name) && t.ty.is_quantized() && t.ty != input.source.tensors()[t.source].stored && t.dims.len() >= 2
    };
    let types = |row: u64| -> Vec<GgmlType> {
        let all = match (options.types.is_empty(), row.is_multiple_of(256)) {
            (false, _) => &options.types,
            (true, true) => DEFAULT,
            (true, false) => SMALL,
        };
        all.iter().copied().filter(|t| row.is_multiple_of(t.block_len() as u64)).collect()
    };
    plan.tensors
        .iter()
        .filter(wanted)
        .map(|t| (t.name.clone(), types(t.row_len())))
        .filter(|(_, t)| !t.is_empty())
        .collect()
}

/// Gives the tensors of `plan` the types that cost least under the budget. `mix`: the plan of a mix, for its size.
pub fn apply(
    args: &ConvertArgs,
    options: &Options,
    input: &Input,
    plan: &mut Plan,
    budget: Budget,
    mix: Option<&Plan>,
    state: &Path,
) -> Result<(), Failure> {
    let target = match (budget, mix) {
        (Budget::Bytes(bytes), _) => bytes,
        (Budget::Bits(bits), _) => {
            let data: u64 = plan.tensors.iter().map(|t| t.bytes).sum();
            plan.layout.file_size - data + (plan.elements() as f64 * bits / 8.0) as u64
        }
        (Budget::Like(_), Some(mix)) => mix.layout.file_size,
        (Budget::Like(_), None) => plan.layout.file_size,
    };
    let mut costs = predicted(args, options, input, plan, state)?;
    let mut unit = "predicted KLD";
    let mut tensors = candidates_of(&costs);
    let free: u64 = plan.tensors.iter().filter(|t| costs.iter().any(|c| c.name == t.name)).map(|t| t.bytes).sum();
    // header, tensors that keep their type, and the padding of each tensor
    let rest = plan.layout.file_size - free + 32 * costs.len() as u64;
    let cap = target.saturating_sub(rest);
    let Some(picks) = knapsack::solve(&tensors, cap) else {
        let least: u64 = tensors.iter().map(|t| t.iter().map(|o| o.bytes).min().unwrap_or(0)).sum();
        let e = AllocationError::TooSmall { least: least + rest, target };
        if options.recipe.quality.is_some() && !args.sizes() {
            // nobody asked for a size: the word did
            if !args.quiet {
                print::stderr(&format!("warning: {e}; the mix of {} stays", plan.type_name));
            }
            return Ok(());
        }
        return Err(Failure::new(USAGE, e));
    };
    let mut picks = picks;
    if options.recipe.measure {
        costs = measured(args, options, input, costs, &picks, state)?;
        unit = "measured KLD";
        tensors = candidates_of(&costs);
        picks = knapsack::solve(&tensors, cap).expect("the sizes are the same");
    }
    let types: BTreeMap<String, GgmlType> = costs
        .iter()
        .zip(&picks)
        .filter_map(|(c, &p)| Some((c.name.clone(), GgmlType::from_name(&c.choices[p].ty)?)))
        .collect();
    if !args.quiet {
        explain((&costs, unit), &tensors, (target, rest), plan, &types);
    }
    plan.retype(&types).map_err(|e| Failure::new(REFUSED, e))?;
    Ok(())
}

/// What the sum is minimised over.
fn candidates_of(costs: &[TensorCosts]) -> Vec<Vec<knapsack::Candidate>> {
    let choices =
        |c: &TensorCosts| c.choices.iter().map(|c| knapsack::Candidate { bytes: c.bytes, cost: c.cost }).collect();
    costs.iter().map(choices).collect()
}

/// Windows that [`measured`] runs each tensor on.
pub const MEASURED: usize = 8;

/// The costs, corrected by what rounding each tensor to its pick does to the model; from the state folder if they are there.
fn measured(
    args: &ConvertArgs,
    options: &Options,
    input: &Input,
    mut costs: Vec<TensorCosts>,
    picks: &[usize],
    state: &Path,
) -> Result<Vec<TensorCosts>, Failure> {
    let path = args.input.as_deref().expect("required by the parser");
    let length = options.recipe.ctx.unwrap_or(512) as usize;
    let prepared = Prepared::new((path, input), &request(args, &options.recipe, state, length))?;
    let (model, all) = (&prepared.model, &prepared.tokens);
    let tokens = &all[..all.len().min(MEASURED * length)];
    let mut kept = Kept::new(options, model, tokens, &[]);
    (kept.picks, kept.predicted) = (picks.to_vec(), costs.clone());
    let file = state.join("measured.json");
    if let Some(found) = kept.found(&file) {
        return Ok(found);
    }
    let needed = measured::memory(model, tokens.len(), BATCH * length);
    let room = super::round::room(args.max_memory);
    if needed > room {
        let why = format!("--measure needs {} of memory; {} are there", human(needed), human(room));
        return Err(Failure::new(super::RESOURCE, why));
    }
    if !args.quiet {
        let (n, disk) = (costs.len(), human(measured::disk(model, tokens.len())));
        print::stderr(&format!(
            "allocation: measuring {n} tensors on {} tokens; {disk} on disk meanwhile",
            tokens.len()
        ));
    }
    let before: f64 = costs.iter().zip(picks).map(|(c, &p)| c.choices[p].nearest).sum();
    let metadata = &input.metadata;
    let job = measured::Job { path, model, metadata, tokens, length, batch: BATCH, state };
    let mut steps = Steps::new("tensor", costs.len(), args.quiet);
    let pool = pool(args.threads())?;
    let found =
        pool.install(|| measured::run(&job, &mut costs, picks, &mut |done, _| steps.done(done))).map_err(failed)?;
    steps.finish();
    if !args.quiet {
        let sum: f64 = found.iter().flatten().sum();
        let none = found.iter().filter(|f| f.is_none()).count();
        let few = if none > 0 { format!("; {none} too small to tell") } else { String::new() };
        print::stderr(&format!("measured: {sum:.5} in all, rounded to nearest one by one; {before:.5} predicted{few}"));
    }
    kept.costs = costs;
    kept.save(&file)?;
    Ok(kept.costs)
}

fn failed(e: AllocationError) -> Failure {
    match e {
        AllocationError::Forward(e) => e.into(),
        e => Failure::new(REFUSED, e),
    }
}

fn request<'a>(args: &ConvertArgs, recipe: &'a Recipe, state: &'a Path, length: usize) -> words::Request<'a> {
    words::Request {
        words: &recipe.calibrate,
        length,
        // as much as the rounding behind it takes, which finds it written
        limit: Some(super::round::windows(recipe)),
        threads: args.threads(),
        max_memory: args.max_memory,
        state,
        quiet: args.quiet,
    }
}

impl Kept {
    fn new(options: &Options, model: &Model<'_>, tokens: &[u32], candidates: &[(String, Vec<GgmlType>)]) -> Kept {
        let names = |t: &[GgmlType]| t.iter().map(|t| t.name().to_string()).collect();
        Kept {
            version: env!("CARGO_PKG_VERSION").into(),
            fingerprint: fingerprint::fingerprint(model.source()),
            text: windows::digest(tokens),
            gptq: options.rounding == Rounding::Gptq,
            candidates: candidates.iter().map(|(n, t)| (n.clone(), names(t))).collect(),
            costs: Vec::new(),
            picks: Vec::new(),
            predicted: Vec::new(),
        }
    }

    /// The costs that are in `file`, if all else is the same.
    fn found(&self, file: &Path) -> Option<Vec<TensorCosts>> {
        let found: Kept = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        let key = |k: &Kept| serde_json::to_string(&Kept { costs: Vec::new(), ..k.clone() }).expect("plain data");
        (key(&found) == key(self)).then_some(found.costs)
    }

    fn save(&self, file: &Path) -> Result<(), Failure> {
        let text = serde_json::to_vec(self).expect("plain data");
        std::fs::write(file, text).map_err(|e| Failure::new(super::RESOURCE, format!("{}: {e}", file.display())))
    }
}

/// The costs, from the state folder if they are there.
fn predicted(
    args: &ConvertArgs,
    options: &Options,
    input: &Input,
    plan: &Plan,
    state: &Path,
) -> Result<Vec<TensorCosts>, Failure> {
    let path = args.input.as_deref().expect("required by the parser");
    let recipe = &options.recipe;
    let length = recipe.ctx.unwrap_or(512) as usize;
    let prepared = Prepared::new((path, input), &request(args, recipe, state, length))?;
    let (model, all) = (&prepared.model, &prepared.tokens);
    let tokens = &all[..all.len().min(WINDOWS * length)];
    let backward = SAMPLE.min(tokens.len() / length);
    let candidates = candidates(plan, input, options);
    let mut kept = Kept::new(options, model, tokens, &candidates);
    // candidates of `--transform auto` are models of their own
    let file = state.join(format!("allocation-{}.json", &kept.fingerprint[..16]));
    if let Some(costs) = kept.found(&file) {
        return Ok(costs);
    }
    if !args.quiet {
        print::stderr(&format!(
            "allocation: predicting costs from {} tokens, {} of them backward",
            tokens.len(),
            backward * length
        ));
    }
    let pool = pool(args.threads())?;
    let memory = |batch| crate::rounding::run::memory(model, length, batch, pool.current_num_threads(), true);
    let batch = super::round::fitting(BATCH, args.max_memory, memory);
    if let Some(limit) = args.max_memory.filter(|l| memory(batch) > *l) {
        let (limit, needed) = (human(limit), human(memory(batch)));
        let why = format!("--max-memory {limit}: allocating types for this model needs at least {needed}");
        return Err(Failure::new(super::RESOURCE, why));
    }
    let job = costs::Job { model, tokens, length, batch, backward: SAMPLE, candidates, gptq: kept.gptq, state };
    let mut steps: Option<Steps> = None;
    let quiet = args.quiet;
    kept.costs = pool
        .install(|| {
            costs::run(&job, &mut |done, all| steps.get_or_insert_with(|| Steps::new("step", all, quiet)).done(done))
        })
        .map_err(failed)?;
    if let Some(s) = steps {
        s.finish();
    }
    kept.save(&file)?;
    Ok(kept.costs)
}

/// The frontier, and what moved against the mix.
fn explain(
    (costs, unit): (&[TensorCosts], &str),
    tensors: &[Vec<knapsack::Candidate>],
    (target, rest): (u64, u64),
    mix: &Plan,
    types: &BTreeMap<String, GgmlType>,
) {
    let sum = |picks: &[usize]| -> (u64, f64) {
        tensors.iter().zip(picks).fold((rest, 0.0), |s, (t, &p)| (s.0 + t[p].bytes, s.1 + t[p].cost))
    };
    // unless the mix has types that are not to choose from
    let of_mix: Option<f64> = costs
        .iter()
        .map(|c| {
            let ty = mix.tensors.iter().find(|t| t.name == c.name)?.ty;
            c.choices.iter().find(|o| o.ty == ty.name()).map(|o| o.cost)
        })
        .sum();
    let mut rows = vec![["size", "bits per weight", unit].map(String::from).to_vec()];
    for part in FRONTIER {
        let cap = ((target as f64 * part) as u64).saturating_sub(rest);
        if let Some(p) = knapsack::solve(tensors, cap) {
            let (bytes, cost) = sum(&p);
            let bits = bytes as f64 * 8.0 / mix.elements() as f64;
            let here = if part == 1.0 { format!("{cost:.5}  <- target") } else { format!("{cost:.5}") };
            rows.push(vec![crate::plan::memory::human(bytes), format!("{bits:.3}"), here]);
        }
    }
    print::stderr(print::table(&rows, &[true, true, false]).trim_end());
    let of_mix = of_mix.map_or_else(String::new, |sum| format!(", {sum:.5}"));
    let size = crate::plan::memory::human(mix.layout.file_size);
    print::stderr(&format!("the mix of {}: {size}{of_mix}", mix.type_name));
    let mut moves: BTreeMap<(String, String, String), usize> = BTreeMap::new();
    for t in &mix.tensors {
        if let Some(ty) = types.get(&t.name).filter(|ty| **ty != t.ty) {
            let kind = t.name.rsplit_once("blk.").map_or(&*t.name, |(_, n)| n.split_once('.').map_or(n, |(_, k)| k));
            *moves.entry((kind.to_string(), t.ty.name().to_string(), ty.name().to_string())).or_default() += 1;
        }
    }
    let moved: Vec<String> = moves.iter().map(|((k, a, b), n)| format!("{k} {a} -> {b} ({n})")).collect();
    print::stderr(&format!(
        "moved against the mix: {}",
        if moved.is_empty() { "nothing".into() } else { moved.join(", ") }
    ));
}
