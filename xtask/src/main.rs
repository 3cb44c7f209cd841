//! Chores of this workspace: `cargo xtask ops [--check]` writes (or checks) the table of operators.

mod ops;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["ops"] => ops::write(),
        ["ops", "--check"] => ops::check(),
        _ => Err("usage: cargo xtask ops [--check]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}
