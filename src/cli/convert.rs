//! `ostq-convert IN OUT.gguf`.

use std::path::Path;
use std::sync::atomic::Ordering;

use serde_json::json;

use super::args::ConvertArgs;
use super::bar::Bar;
use super::plan::{Prepared, prepare, threads};
use super::{Failure, INTERRUPTED, RESOURCE, USAGE, inspect, print};
use crate::convert::progress::Silent;
use crate::convert::{self, OutputError, Progress, Run};
use crate::mapped::identity;
use crate::output;
use crate::plan::Rounding;
use crate::plan::memory::human;

/// Refuses a device that this program does not know before any work is done.
pub fn can_use(device: crate::tuning::run::Device) -> Result<(), Failure> {
    match device.refused() {
        Some(why) => Err(Failure::new(USAGE, format!("--device: {why}"))),
        None => Ok(()),
    }
}

/// Converts.
pub fn run(args: ConvertArgs) -> Result<(), Failure> {
    let Some(out) = args.out().cloned() else {
        return Err(Failure::new(USAGE, "name the file to write: ostq-convert IN OUT.gguf (or --dry-run)"));
    };
    install_signal_handlers()?;
    can_use(args.device)?;
    if args.options()?.rounding == Rounding::Gptq || args.calibrates() {
        // it takes its time
        output::check(&out, &[], None, args.force)?;
    }
    let prepared = prepare(&args, true)?;
    if args.print_recipe {
        print::stdout(prepared.options.recipe.to_toml().as_bytes())?;
    }
    check_output(&args, &prepared, &out)?;
    let say = |text: String| {
        if !args.quiet {
            print::stderr(&text);
        }
    };
    for w in &prepared.plan.warnings {
        say(format!("warning: {w}"));
    }
    for (what, value) in &prepared.input.summary {
        say(format!("{what}: {value}"));
    }
    let total: u64 = prepared.plan.tensors.iter().map(|t| prepared.input.source.tensors()[t.source].stored_bytes).sum();
    say(format!(
        "{}: {} tensors, {} -> {} ({:.2} bits per weight); at most {} of memory, {}, {}",
        prepared.plan.type_name,
        prepared.plan.tensors.len(),
        human(total),
        human(prepared.plan.layout.file_size),
        prepared.plan.bits_per_weight(),
        human(prepared.memory.peak),
        threads(prepared.memory.threads),
        crate::formats::simd::isa().name(),
    ));
    let rounded = match prepared.options.rounding {
        Rounding::Gptq => {
            let (recipe, input, plan) = (&prepared.options.recipe, &prepared.input, &prepared.plan);
            let mut rounded = super::round::before(&args, recipe, input, plan)?;
            super::tune::after(&args, recipe, (input, plan), prepared.tuning, &mut rounded)?;
            Some(rounded)
        }
        Rounding::Nearest => None,
    };
    let bar = (!args.quiet).then(|| Bar::new(total));
    let progress: &dyn Progress = bar.as_ref().map_or(&Silent as &dyn Progress, |b| b);
    let Prepared { input, options, plan, imatrix, memory, transforms, .. } = prepared;
    let summary = args.json.then(|| super::plan::to_json(&plan, &input, &memory));
    let result = convert::run(Run {
        input: &input,
        plan,
        imatrix: imatrix.as_ref(),
        rounded: rounded.as_ref(),
        search: options.search,
        row_scales: options.recipe.row_scales,
        memory,
        output: &out,
        force: args.force,
        allow_f16_overflow: options.recipe.allow_f16_overflow,
        progress,
    });
    if let Some(bar) = &bar {
        bar.finish();
    }
    let done = result?;
    if done.overflows > 0 {
        say(format!("warning: {} values did not fit in f16 and are infinite now", done.overflows));
    }
    let seconds = done.elapsed.as_secs_f64();
    say(format!(
        "{}: {} in {seconds:.1} s ({}/s of input)",
        out.display(),
        human(done.file_size),
        human((total as f64 / seconds.max(1e-9)) as u64)
    ));
    if !args.keep_state {
        super::calibrate::done(&args);
    }
    report(&args, &out, summary, &done)?;
    super::check::after(&args, &out, transforms)
}

fn report(
    args: &ConvertArgs,
    out: &Path,
    summary: Option<serde_json::Value>,
    done: &convert::Done,
) -> Result<(), Failure> {
    let manifest = if args.manifest { Some(inspect::manifest(out)?) } else { None };
    match summary {
        Some(mut json) => {
            json["output"] = json!(out.display().to_string());
            json["seconds"] = json!(done.elapsed.as_secs_f64());
            json["f16_overflows"] = json!(done.overflows);
            if let Some(m) = &manifest {
                json["manifest"] = m.to_json();
            }
            print::stdout(format!("{json:#}\n").as_bytes())
        }
        None => manifest.map_or(Ok(()), |m| print::stdout(m.to_text().as_bytes())),
    }
}

fn check_output(args: &ConvertArgs, prepared: &Prepared, out: &Path) -> Result<(), Failure> {
    let input = args.input.as_deref().expect("required by the parser");
    let mut inputs: Vec<(u64, u64)> = prepared.input.source.files().iter().map(|f| f.identity()).collect();
    let r = &prepared.options.recipe;
    let mut side: Vec<std::path::PathBuf> = [&r.imatrix, &r.metadata, &r.chat_template, &r.transform]
        .into_iter()
        .flatten()
        .chain(&r.calibrate)
        .cloned()
        .collect();
    if input.is_dir() {
        side.extend(std::fs::read_dir(input).into_iter().flatten().flatten().map(|e| e.path()));
    }
    inputs.extend(side.iter().filter_map(|p| identity(p)));
    // a finished conversion inside the input folder may be replaced with --force, an input never
    let own = identity(out).filter(|_| args.force && out.extension().is_some_and(|e| e == "gguf"));
    if let Some(own) = own {
        let used = prepared.input.source.files().iter().any(|f| f.identity() == own)
            || r.imatrix.as_deref().and_then(identity) == Some(own);
        if !used {
            inputs.retain(|&id| id != own);
        }
    }
    output::check(out, &inputs, input.is_dir().then_some(input), args.force)?;
    let needed = prepared.plan.layout.file_size;
    match output::free_space(out) {
        Ok(free) if free < needed => Err(OutputError::NoSpace { path: out.to_path_buf(), needed, free }.into()),
        _ => Ok(()),
    }
}

/// The first SIGINT or SIGTERM sets a flag, the second ends the process. A file size limit (`ulimit -f`) becomes an error
/// of the write that meets it.
pub(super) fn install_signal_handlers() -> Result<(), Failure> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let flag = &*convert::INTERRUPTED;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED.into(), flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
            .map_err(|e| Failure::new(RESOURCE, format!("signal handlers: {e}")))?;
    }
    // SAFETY: ignoring a signal runs no handler.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    flag.store(false, Ordering::Relaxed);
    Ok(())
}
