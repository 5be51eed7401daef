//! `ostq-convert plan IN`, `--dry-run`: what would be written. Reads headers only.

use std::sync::Arc;

use serde_json::{Value as Json, json};

use super::args::ConvertArgs;
use super::tune::How;
use super::{Failure, REFUSED, RESOURCE, print};
use crate::calibration::imatrix::Imatrix;
use crate::convert::provenance;
use crate::forward::Model;
use crate::gguf::Metadata;
use crate::plan::memory::{self, Memory, human};
use crate::plan::{Budget, Input, Options, Plan, Rounding, Target};
use crate::transform::{Preset, Transforms};

/// Everything that is known before work starts.
pub struct Prepared {
    pub input: Input,
    pub options: Options,
    pub plan: Plan,
    pub imatrix: Option<Imatrix>,
    pub memory: Memory,
    pub transforms: Option<Arc<Transforms>>,
    /// How it is tuned.
    pub tuning: Option<How>,
}

/// Opens the input and makes the plan. `calibrate`: run the calibration that the recipe asks for; a plan alone only
/// supposes its result.
pub fn prepare(args: &ConvertArgs, calibrate: bool) -> Result<Prepared, Failure> {
    let mut options = args.options()?;
    let path = args.input.as_deref().expect("required by the parser");
    let mut input = Input::open(path, &options)?;
    if let Some(budget) = args.time_budget {
        let recipe = super::estimate::within(args, &args.plain_recipe()?, &input, budget)?;
        options = Options::resolve(recipe).map_err(|e| Failure::new(super::USAGE, e))?;
    }
    settle(args, &mut options, &mut input, path)?;
    let (mut tuning, rounds) = (None, calibrate && options.rounding == Rounding::Gptq);
    if rounds || options.recipe.row_scales {
        // what is refused is refused before anything is measured
        let plan = Plan::new(&input, &options, Some(&supposed(&input)), Metadata::new())?;
        if rounds {
            super::estimate::announce(args, &options, &input, &plan)?;
            tuning = super::tune::how(args, &options.recipe, &input, &plan)?;
        }
        if options.recipe.row_scales {
            by_row(&plan)?;
        }
    }
    let mut given = options.recipe.imatrix.as_deref().map(Imatrix::load).transpose()?;
    let transforms = super::transform::apply(args, &options, &mut input, given.as_mut(), calibrate)?;
    let measured = super::transform::named_in(&options.recipe) == Some(Preset::Auto);
    if let Some(name) = super::transform::repeats(transforms.as_deref()).filter(|_| measured && calibrate) {
        // the recipe says what was taken, not that it was measured
        options.recipe.transform = Some(name.into());
    }
    let r = &options.recipe;
    let mut imatrix = match given {
        Some(imatrix) => Some(imatrix),
        None if r.calibrate.is_empty() => None,
        None if calibrate && options.rounding == Rounding::Nearest => Some(super::calibrate::before(args, r, &input)?),
        None => Some(supposed(&input)),
    };
    if let Some(i) = &mut imatrix {
        i.filter(&r.include_weights, &r.exclude_weights);
    }
    let keys = provenance::keys(&input, r, imatrix.as_ref(), transforms.as_deref());
    let mut plan = Plan::new(&input, &options, imatrix.as_ref(), keys.clone())?;
    if r.row_scales {
        by_row(&plan)?;
    }
    let tries = |model: &Model<'_>| super::estimate::tried(args, r, model, &input) != (0, 0);
    if measured && !calibrate && Model::new(path, &*input.source, &input.metadata).is_ok_and(|m| tries(&m)) {
        plan.warnings.push("transforms are measured when the model is converted".into());
    }
    // the word asks for an allocation, but a plan alone reads headers only
    let later = !calibrate && options.recipe.quality.is_some() && !args.sizes();
    if later && options.budget.is_some() {
        plan.warnings
            .push("types are the mix's: which tensor gets which is allocated when the model is converted".into());
    }
    if !later {
        let state = match args.out() {
            Some(out) => super::calibrate::state_of(out),
            None => std::env::temp_dir().join(format!("ostq-plan-{}", std::process::id())),
        };
        allocate(args, &options, &input, (&mut plan, &keys), imatrix.as_ref(), &state)?;
        if args.out().is_none() {
            crate::rounding::state::forget(&state);
        }
    }
    plan.warnings.extend(super::transform::untied(&plan, &input));
    let memory = memory::plan(&plan, &*input.source, imatrix.as_ref(), args.thread_count(), args.max_memory)
        .map_err(|e| Failure::new(RESOURCE, e))?;
    Ok(Prepared { input, options, plan, imatrix, memory, transforms, tuning })
}

/// Refuses types without a scale by row.
fn by_row(plan: &Plan) -> Result<(), Failure> {
    let by_row = |ty| crate::formats::grid::Grid::of(ty).is_some_and(|g| g.by_row().is_some());
    match plan.tensors.iter().find(|t| t.ty.is_quantized() && !by_row(t.ty)) {
        Some(t) => {
            let (name, ty) = (&t.name, t.ty);
            let why = format!("--row-scales: `{name}` is to be {ty}: there is no scale by row in it (try --pure)");
            Err(Failure::new(super::USAGE, why))
        }
        None => Ok(()),
    }
}

/// Gives the tensors of `plan` the types that a size allocates, where one is asked for; `keys` are those that it was made with.
pub fn allocate(
    args: &ConvertArgs,
    options: &Options,
    input: &Input,
    (plan, keys): (&mut Plan, &Metadata),
    imatrix: Option<&Imatrix>,
    state: &std::path::Path,
) -> Result<(), Failure> {
    let Some(budget) = options.budget else { return Ok(()) };
    let mix = match budget {
        Budget::Like(f) => {
            let options = Options { target: Target::Quantize(f), ..options.clone() };
            Some(Plan::new(input, &options, imatrix, keys.clone())?)
        }
        _ => None,
    };
    if let Some(mix) = &mix {
        plan.retype(&mix.tensors.iter().map(|t| (t.name.clone(), t.ty)).collect())
            .map_err(|e| Failure::new(REFUSED, e))?;
    }
    super::allocate::apply(args, options, input, plan, budget, mix.as_ref(), state)
}

/// Takes back what the recipe asks for and this model cannot have: loudly where a word or a default asked for it; what the
/// user spelled out is refused where it is tried.
fn settle(args: &ConvertArgs, options: &mut Options, input: &mut Input, path: &std::path::Path) -> Result<(), Failure> {
    let nearest = options.rounding != Rounding::Gptq;
    if nearest && (options.recipe.quality.is_none() || options.recipe.calibrate.is_empty()) {
        return Ok(());
    }
    let mixture = crate::forward::Spec::read(&input.metadata).is_ok_and(|s| s.experts > 0);
    let asked = args.plain_recipe()?;
    if mixture && asked.tune.is_some() {
        return Err(Failure::new(REFUSED, "--tune: mixtures of experts are not tuned yet"));
    }
    if options.recipe.quality.is_none() {
        return Ok(());
    }
    let sized = asked.target_size.is_some() || asked.target_bpw.is_some() || asked.like.is_some();
    let mut r = options.recipe.clone();
    let implied = crate::plan::quality::implies_transform(&r);
    let model = Model::new(path, &*input.source, &input.metadata);
    let writes = model.as_ref().map_or(0, |m| super::words::memory(m, &r));
    let model = model.map(|m| m.spec.experts > 0);
    let encoder = crate::tokenizer::encode::TextEncoder::from_metadata(&input.metadata).map(drop);
    match model.map_err(|e| e.to_string()).and_then(|m| encoder.map(|()| m).map_err(|e| e.to_string())) {
        Ok(_) if nearest => return Ok(()),
        Ok(false) => {
            let room = super::round::room(args.max_memory);
            if !asked.calibrate.is_empty() || !super::tune::own(&r.calibrate) || writes <= room {
                return Ok(());
            }
            // the word asked for it
            r.calibrate.retain(|t| t.as_os_str() != crate::plan::OWN);
            let (writes, room) = (human(writes), human(room));
            input.warnings.push(format!(
                "no text of the model's own: to write it needs {writes} of memory, {room} are there; give more text with --calibrate"
            ));
        }
        Ok(_) => {
            // nothing writes text, tunes or measures transforms yet that has experts
            r.tune = None;
            r.transform.take_if(|_| implied);
            r.calibrate.retain(|t| t.as_os_str() != crate::plan::OWN);
            let tuned = if options.recipe.tune.is_some() { ", nothing is tuned" } else { "" };
            input.warnings.push(format!("a mixture of experts: no transforms are measured{tuned}"));
        }
        Err(why) if sized => return Err(Failure::new(REFUSED, format!("{why}: types cannot be allocated"))),
        Err(why) => {
            (r.like, r.target_size, r.target_bpw, r.tune) = (None, None, None, None);
            r.transform.take_if(|_| implied);
            r.calibrate.clear();
            r.rounding = Some("nearest".into());
            let how = "rounding to nearest, as llama.cpp does without an importance matrix";
            input.warnings.push(format!("{why}: {how}"));
        }
    }
    *options = Options::resolve(r).map_err(|e| Failure::new(super::USAGE, e))?;
    Ok(())
}

/// An importance matrix as a calibration would give it, all ones: types and sizes depend on its entries only.
pub fn supposed(input: &Input) -> Imatrix {
    let weights = input.source.tensors().iter().filter(|t| t.name.starts_with("blk.") && t.dims.len() > 1);
    let ones =
        |t: &crate::source::SourceTensor| vec![1.0; t.row_len() as usize * t.dims.get(2).map_or(1, |&n| n as usize)];
    Imatrix { entries: weights.map(|t| (t.name.clone(), ones(t))).collect(), ..Imatrix::default() }
}

/// Prints the plan.
pub fn run(args: ConvertArgs) -> Result<(), Failure> {
    let p = prepare(&args, false)?;
    if args.print_recipe {
        return print::stdout(p.options.recipe.to_toml().as_bytes());
    }
    if args.json {
        let json = to_json(&p.plan, &p.input, &p.memory);
        return print::stdout(format!("{json:#}\n").as_bytes());
    }
    print::stdout(text(&p).as_bytes())
}

/// A number of threads, in words.
pub fn threads(n: usize) -> String {
    if n == 1 { "1 thread".into() } else { format!("{n} threads") }
}

fn dims(d: &[u64]) -> String {
    d.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ")
}

fn text(p: &Prepared) -> String {
    let mut rows = vec![["tensor", "shape", "from", "to", "bytes", "bpw", ""].map(String::from).to_vec()];
    for t in &p.plan.tensors {
        let s = &p.input.source.tensors()[t.source];
        let note = match (t.fallback_from, &t.importance) {
            (Some(f), _) => format!("instead of {f}: {} columns", t.row_len()),
            (None, Some(_)) => "imatrix".to_string(),
            _ => String::new(),
        };
        rows.push(vec![
            t.name.clone(),
            dims(&t.dims),
            s.stored.to_string(),
            t.ty.to_string(),
            t.bytes.to_string(),
            format!("{:.2}", t.bytes as f64 * 8.0 / t.elements().max(1) as f64),
            note,
        ]);
    }
    let mut text = print::table(&rows, &[false, false, false, false, true, true, false]);
    text.push('\n');
    let mut facts = vec![
        vec!["type".to_string(), p.plan.type_name.clone()],
        vec!["weights".to_string(), p.plan.elements().to_string()],
        vec!["bits per weight".to_string(), format!("{:.4}", p.plan.bits_per_weight())],
        vec![
            "disk needed".to_string(),
            format!("{} ({} bytes)", human(p.plan.layout.file_size), p.plan.layout.file_size),
        ],
        vec![
            "memory needed".to_string(),
            format!("at most {}, with {}", human(p.memory.peak), threads(p.memory.threads)),
        ],
    ];
    facts.extend(p.input.summary.iter().map(|(k, v)| vec![k.clone(), v.clone()]));
    text += &print::table(&facts, &[]);
    for w in &p.plan.warnings {
        text += &format!("warning: {w}\n");
    }
    text
}

/// The plan for machines.
pub fn to_json(plan: &Plan, input: &Input, memory: &Memory) -> Json {
    let tensors: Vec<Json> = plan
        .tensors
        .iter()
        .map(|t| {
            let s = &input.source.tensors()[t.source];
            json!({
                "name": t.name,
                "dims": t.dims,
                "source": s.origin,
                "source_type": s.stored.name(),
                "type": t.ty.name(),
                "offset": t.offset,
                "bytes": t.bytes,
                "instead_of": t.fallback_from.map(|f| f.name()),
                "imatrix": t.importance.is_some(),
            })
        })
        .collect();
    json!({
        "type": plan.type_name,
        "weights": plan.elements(),
        "bits_per_weight": plan.bits_per_weight(),
        "file_size": plan.layout.file_size,
        "memory": memory.peak,
        "threads": memory.threads,
        "tensors": tensors,
        "warnings": plan.warnings,
    })
}
