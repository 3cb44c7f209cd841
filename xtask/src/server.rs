//! The server and the terminal: OpenAI's own client, a person who types, and clients that misbehave for minutes.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::python::{Environment, Result, root, run};

/// What the tests of the Python client need.
const PACKAGES: &[&str] = &["openai>=2,<3", "pytest"];

/// `server`: builds the command, runs OpenAI's Python client against it and talks with it at a terminal; `--quick` without
/// optimisation.
pub fn tests(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    let env = Environment::venv(PACKAGES)?;
    let built = build(&["--bin", "candle-coreml"], quick)?;
    let mut pytest = env.python();
    pytest
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(root().join("crates/server/tests/python"));
    // Python knows terminals of Unix alone.
    if cfg!(unix) {
        pytest.arg(root().join("crates/cli/tests/terminal"));
    }
    run(pytest.env("CANDLE_COREML", program(&built, "candle-coreml")))
}

/// `soak [--minutes M] [--clients N]`: clients that stream at once and misbehave.
pub fn soak(arguments: &[String]) -> Result<()> {
    let built = build(&["--example", "soak"], false)?;
    run(Command::new(program(&built.join("examples"), "soak")).args(arguments))
}

/// Builds one program with the features of the whole workspace, as its tests are built, and gives its folder.
fn build(what: &[&str], quick: bool) -> Result<PathBuf> {
    let mut build = Command::new(env!("CARGO"));
    build
        .current_dir(root())
        .args(["build", "--locked", "--workspace"])
        .args(what);
    if !quick {
        build.arg("--release");
    }
    run(&mut build)?;
    Ok(root()
        .join("target")
        .join(if quick { "debug" } else { "release" }))
}

fn program(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}
