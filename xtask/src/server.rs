//! The server and the terminal: OpenAI's own client, a person who types, and clients that misbehave for minutes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::python::{Environment, Result, root, run};

/// What the tests of the Python client need.
const PACKAGES: &[&str] = &["openai>=2,<3", "pytest"];

/// What drives the browser.
const PLAYWRIGHT: &str = "playwright-core@1";

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

/// `page [--quick]`: the built-in page in a Chromium; pictures of it in `target/page`.
pub fn page(arguments: &[String]) -> Result<()> {
    let folder = root().join("target/page");
    if !folder.join("node_modules/playwright-core").is_dir() {
        fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let mut npm = Command::new("npm");
        npm.current_dir(&folder)
            .args(["install", "--silent", "--no-audit", "--no-fund", "--prefix", "."]);
        run(npm.arg(PLAYWRIGHT))?;
    }
    let built = build(
        &["--bin", "candle-coreml"],
        arguments.iter().any(|a| a == "--quick"),
    )?;
    // The page is not to talk with the encoder.
    let mut server = Command::new(program(&built, "candle-coreml"))
        .current_dir(root())
        .args(["serve", "--quiet", "--port", "0", "models/tales"])
        .args(["--embedding", "crates/llm/testdata/encoders/ranged"])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut line = String::new();
    if let Some(out) = server.stdout.take() {
        BufReader::new(out)
            .read_line(&mut line)
            .map_err(|e| e.to_string())?;
    }
    let address = line.split_whitespace().next().unwrap_or_default();
    let chromium = std::env::var("CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
    let done = run(Command::new("node")
        .arg(root().join("crates/server/tests/page/page.mjs"))
        .args([address, chromium.as_str()])
        .arg(&folder));
    // It is ended in any case, and may have ended by itself.
    let _ = server.kill();
    let _ = server.wait();
    done
}

/// Builds one program with the features of the whole workspace, as its tests are built, and gives its folder.
pub fn build(what: &[&str], quick: bool) -> Result<PathBuf> {
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

/// A program in a folder of built ones.
pub fn program(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}
