//! Parse, call, map the error to an exit code; nothing else.

fn main() -> std::process::ExitCode {
    ostq_convert::cli::main()
}
