//! Checks of the repository: `cargo xtask COMMAND`.

mod apple;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rest = arguments.get(1..).unwrap_or_default();
    let result = match arguments.first().map(String::as_str) {
        Some("apple-check") => apple::check(rest),
        Some("apple-fake") => apple::fake(rest),
        Some("apple-report") => apple::report(rest),
        _ => Err(USAGE.to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "cargo xtask COMMAND
  apple-check [--quick] [--no-install]   check, clippy and build for Apple systems from Linux; then apple-fake
  apple-fake [CARGO ARGUMENTS]           the Apple engine against stand-in classes on GNUstep (default: test)
  apple-report MODEL                     on a Mac: run everything, print a report";
