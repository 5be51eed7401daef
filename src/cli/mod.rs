//! The command line: one file per subcommand, arguments and printing only.
//!
//! Results go to stdout, all else to stderr. Exit codes: 0 done, 2 wrong usage, 3 input refused, 4 resource (disk,
//! memory, permission), 5 interrupted, 70 a defect of this program.

mod allocate;
mod args;
mod bar;
mod calibrate;
mod check;
mod choose;
mod convert;
mod estimate;
mod inspect;
mod layers;
mod learn;
mod lists;
mod plan;
mod print;
mod qsur;
mod round;
mod steps;
mod transform;
mod tune;
mod words;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::convert::ConvertError;

/// Wrong use of the command line.
pub const USAGE: u8 = 2;
/// An input that cannot be converted.
pub const REFUSED: u8 = 3;
/// Not enough of something, or not allowed.
pub const RESOURCE: u8 = 4;
/// Ended by a signal.
pub const INTERRUPTED: u8 = 5;
/// A defect of this program (`EX_SOFTWARE`).
pub const DEFECT: u8 = 70;

/// Convert a Hugging Face checkpoint to GGUF in one streaming pass.
///
/// `ostq-convert IN OUT.gguf` reads a folder with config.json, *.safetensors and tokenizer files (or a GGUF file) and
/// writes a GGUF file that any llama.cpp loads: as large as llama.cpp's of its type, types and numbers chosen for what they do
/// to the predictions (--quality), or with --exact the tensor bytes that convert_hf_to_gguf.py and llama-quantize write.
#[derive(Parser)]
#[command(name = "ostq-convert", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Exit codes: 0 done, 2 wrong usage, 3 input refused, 4 resource, 5 interrupted, 70 a bug.")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    convert: args::ConvertArgs,
    /// Print every type and exit.
    #[arg(long, exclusive = true)]
    list_types: bool,
    /// Print every architecture and exit.
    #[arg(long, exclusive = true)]
    list_archs: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Convert (the same as no subcommand).
    Convert(args::ConvertArgs),
    /// Show what a conversion would write: types, sizes, memory, warnings. Reads no weights.
    Plan(args::ConvertArgs),
    /// Run a text through a model: an importance matrix and, if asked for, second moments of every linear's input.
    #[command(visible_alias = "imatrix")]
    Calibrate(calibrate::CalibrateArgs),
    /// Compare models with a reference over a text: KL divergence, perplexity, top words, errors by tensor and layer.
    Check(check::CheckArgs),
    /// Make transforms that leave a model's function as it is, and write them to a file for --transform.
    Transform(transform::TransformArgs),
    /// Learn transforms for a type, and write them to a file for --transform.
    Learn(learn::LearnArgs),
    /// Quantization Space Utilization Rate of weights and, over a text, activations.
    Qsur(qsur::QsurArgs),
    /// Show metadata and tensors of a GGUF file, a safetensors file or a checkpoint folder.
    Inspect(inspect::InspectArgs),
    /// Print a completion script.
    Completions { shell: clap_complete::Shell },
    /// Print the manual page.
    Man,
}

/// An error on its way to the user.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub message: String,
}

impl Failure {
    fn new(code: u8, message: impl ToString) -> Failure {
        Failure { code, message: message.to_string() }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Failure {
        // a closed pipe (`| head`) is no failure
        let code = if e.kind() == std::io::ErrorKind::BrokenPipe { 0 } else { RESOURCE };
        Failure::new(code, format!("standard output: {e}"))
    }
}

impl From<crate::checkpoint::CheckpointError> for Failure {
    fn from(e: crate::checkpoint::CheckpointError) -> Failure {
        use std::io::ErrorKind as Kind;
        let code = match &e {
            crate::checkpoint::CheckpointError::Io { source, .. } => match source.kind() {
                _ if source.raw_os_error() == Some(libc::ELOOP) => REFUSED,
                Kind::NotFound | Kind::InvalidInput | Kind::NotADirectory | Kind::InvalidData => REFUSED,
                _ => RESOURCE,
            },
            _ => REFUSED,
        };
        Failure::new(code, e)
    }
}

impl From<crate::plan::PlanError> for Failure {
    fn from(e: crate::plan::PlanError) -> Failure {
        use crate::plan::PlanError as P;
        match e {
            P::Checkpoint(e) => e.into(),
            P::UnusedPattern(_) | P::Prune(_) => Failure::new(USAGE, e),
            e => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::convert::OutputError> for Failure {
    fn from(e: crate::convert::OutputError) -> Failure {
        use crate::convert::OutputError as O;
        let code = match e {
            O::Exists(_)
            | O::IsInput(_)
            | O::InsideInput(_)
            | O::IsFolder(_)
            | O::IsSpecial(_)
            | O::NoFolder { .. } => USAGE,
            O::Busy(_) | O::NoSpace { .. } | O::Io { .. } => RESOURCE,
        };
        Failure::new(code, e)
    }
}

impl From<crate::forward::ForwardError> for Failure {
    fn from(e: crate::forward::ForwardError) -> Failure {
        use crate::forward::ForwardError as F;
        let code = match &e {
            F::Interrupted => INTERRUPTED,
            F::Io { .. } | F::Memory(_) => RESOURCE,
            _ => REFUSED,
        };
        Failure::new(code, e)
    }
}

impl From<crate::tuning::TuningError> for Failure {
    fn from(e: crate::tuning::TuningError) -> Failure {
        use crate::tuning::TuningError as T;
        match e {
            T::Forward(e) => e.into(),
            T::Rounding(e) => e.into(),
            T::Interrupted => Failure::new(INTERRUPTED, e),
            T::Io { .. } => Failure::new(RESOURCE, e),
            T::Refused(_) | T::Device(_) => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::learning::LearningError> for Failure {
    fn from(e: crate::learning::LearningError) -> Failure {
        use crate::learning::LearningError as L;
        match e {
            L::Forward(e) => e.into(),
            L::Interrupted => Failure::new(INTERRUPTED, e),
            L::Io { .. } => Failure::new(RESOURCE, e),
            L::Refused(_) | L::Rotation(_) | L::Device(_) => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::rounding::RoundingError> for Failure {
    fn from(e: crate::rounding::RoundingError) -> Failure {
        use crate::rounding::RoundingError as R;
        match e {
            R::Forward(e) => e.into(),
            R::Interrupted => Failure::new(INTERRUPTED, e),
            R::Io { .. } => Failure::new(RESOURCE, e),
            e => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::transform::TransformError> for Failure {
    fn from(e: crate::transform::TransformError) -> Failure {
        use crate::transform::TransformError as T;
        match e {
            T::Forward(e) => e.into(),
            T::Calibration(e) => e.into(),
            T::Input(e) => e.into(),
            e => Failure::new(REFUSED, e),
        }
    }
}

impl From<crate::calibration::CalibrationError> for Failure {
    fn from(e: crate::calibration::CalibrationError) -> Failure {
        use crate::calibration::CalibrationError as C;
        match e {
            C::Input(e) => e.into(),
            C::Output(e) => e.into(),
            C::Forward(e) => e.into(),
            e @ C::Words(_) => Failure::new(USAGE, e),
            e => Failure::new(REFUSED, e),
        }
    }
}

impl From<ConvertError> for Failure {
    fn from(e: ConvertError) -> Failure {
        use crate::convert::WorkError as W;
        match e {
            ConvertError::Output(e) => e.into(),
            ConvertError::Work(W::Read { .. }) | ConvertError::Threads(_) => Failure::new(RESOURCE, e),
            ConvertError::Work(_) | ConvertError::InputChanged(_) => Failure::new(REFUSED, e),
            ConvertError::Interrupted => Failure::new(INTERRUPTED, e),
            ConvertError::Verify(_) => Failure::new(DEFECT, e),
        }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if let Some(name) = args.next().and_then(|first| misspelt(first.to_str()?)) {
        let first = std::env::args().nth(1).unwrap_or_default();
        print::stderr(&format!("error: `{first}` is neither a file nor a subcommand; did you mean `{name}`?"));
        return ExitCode::from(USAGE);
    }
    let result = std::panic::catch_unwind(|| run(Cli::parse()));
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(f)) => {
            if f.code != 0 {
                print::stderr(&format!("error: {}", f.message));
            }
            ExitCode::from(f.code)
        }
        Err(_) => {
            print::stderr("error: this is a defect of ostq-convert; please report it with the message above");
            ExitCode::from(DEFECT)
        }
    }
}

/// The subcommand that a first argument which names nothing is close to.
fn misspelt(first: &str) -> Option<String> {
    let command = Cli::command();
    let mut names = command.get_subcommands().map(|c| c.get_name().to_string());
    if first.starts_with('-') || first.len() < 3 || std::path::Path::new(first).exists() {
        return None;
    }
    let close = |name: &String| (1..=2).contains(&distance(first, name)) && first.len().abs_diff(name.len()) <= 2;
    if command.find_subcommand(first).is_some() { None } else { names.find(close) }
}

/// Letters to change, add or drop to make `b` of `a` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let best = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

fn run(cli: Cli) -> Result<(), Failure> {
    crate::formats::simd::check_env().map_err(|e| Failure::new(USAGE, e))?;
    if cli.list_types {
        return lists::types();
    }
    if cli.list_archs {
        return lists::archs();
    }
    match cli.command {
        None if cli.convert.dry_run => plan::run(cli.convert),
        None => convert::run(cli.convert),
        Some(Command::Convert(a)) if a.dry_run => plan::run(a),
        Some(Command::Convert(a)) => convert::run(a),
        Some(Command::Plan(a)) => plan::run(a),
        Some(Command::Calibrate(a)) => calibrate::run(a),
        Some(Command::Check(a)) => check::run(a),
        Some(Command::Qsur(a)) => qsur::run(a),
        Some(Command::Transform(a)) => transform::run(a),
        Some(Command::Learn(a)) => learn::run(a),
        Some(Command::Inspect(a)) => inspect::run(a),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ostq-convert", &mut script);
            print::stdout(&script)
        }
        Some(Command::Man) => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            print::stdout(&page)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_subcommand_is_seen() {
        assert_eq!(misspelt("chekc").as_deref(), Some("check"));
        assert_eq!(misspelt("calibrat").as_deref(), Some("calibrate"));
        for fine in ["check", "imatrix", "--help", "models/llama", "in", "Cargo.toml"] {
            assert_eq!(misspelt(fine), None, "{fine}");
        }
        assert_eq!((distance("kitten", "sitting"), distance("", "ab"), distance("a", "a")), (3, 2, 0));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
