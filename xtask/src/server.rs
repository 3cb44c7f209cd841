//! The server: OpenAI's own client against it, and clients that misbehave for minutes.

use std::process::Command;

use crate::python::{Environment, Result, root, run};

/// What the tests of the Python client need.
const PACKAGES: &[&str] = &["openai>=2,<3", "pytest"];

/// `server`: builds the command and runs OpenAI's Python client against it; `--quick` without optimisation.
pub fn tests(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    let env = Environment::venv(PACKAGES)?;
    let mut build = Command::new(env!("CARGO"));
    build
        .current_dir(root())
        .args(["build", "--locked", "--package", "candle-coreml-cli"]);
    if !quick {
        build.arg("--release");
    }
    run(&mut build)?;
    let profile = if quick { "debug" } else { "release" };
    let binary = if cfg!(windows) {
        "candle-coreml.exe"
    } else {
        "candle-coreml"
    };
    run(env
        .python()
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(root().join("crates/server/tests/python"))
        .env("CANDLE_COREML", root().join("target").join(profile).join(binary)))
}

/// `soak [--minutes M] [--clients N]`: clients that stream at once and misbehave.
pub fn soak(arguments: &[String]) -> Result<()> {
    run(Command::new(env!("CARGO"))
        .current_dir(root())
        .args([
            "run",
            "--release",
            "--locked",
            "--package",
            "candle-coreml-server",
        ])
        .args(["--example", "soak", "--"])
        .args(arguments))
}
