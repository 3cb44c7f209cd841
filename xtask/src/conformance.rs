//! `conformance`: the tests that come with coremltools, with the portable engine under `predict`.

mod asked;
mod exceptions;
mod record;
mod report;

use crate::python::{Environment, Result, TORCH, root};
use asked::{Asked, BACKEND, OPS};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What coremltools' tests need, in the versions they were written for.
const SUITE: &[&str] = &[
    "coremltools==9.0",
    "numpy==2.0.2",
    "pytest",
    "pytest-xdist",
    "pytest-asyncio",
    "scikit-learn==1.5.1",
    "pandas",
    "parameterized",
    "six",
    "pillow",
    "scipy",
];

/// Bound of the tolerances that tests of operators and of the backend ask for: they allow 0.5 for fp16, which proves little.
const TOLERANCE: &str = "2e-2";

/// How programs of each precision are computed: those that are called fp32 in 32 bits, where they have float16 inside too; those
/// that are called fp16 with every result rounded.
const PRECISIONS: &[(&str, &str)] = &[("fp32", "default"), ("fp16", "faithful")];

/// Random numbers that are multiples of 1/16 are such as float16 holds, and so are most sums of their products.
const GRID: &str = "16";

/// Files of a run.
struct Files {
    /// One line a test that ended.
    record: PathBuf,
    /// Names of the tests of the default configuration.
    default: PathBuf,
    /// Names of the tests that need not run.
    done: PathBuf,
    /// Names of the tests that are to run.
    chosen: PathBuf,
    /// The record of the tests that failed, with other random numbers.
    proof: PathBuf,
    /// Names of these tests.
    doubtful: PathBuf,
}

/// Runs the tests that are asked for and reports what became of them.
pub fn run(arguments: &[String]) -> Result<()> {
    let asked = Asked::new(arguments)?;
    let packages = [SUITE, if asked.torch { TORCH } else { &[] }].concat();
    let env = Environment::make(&packages, asked.quick)?;
    if asked.torch {
        // It would bring another torch along.
        env.install(&["--no-deps", "torchvision==0.22.1"])?;
    }
    let files = Files::new(&env.folder, &asked)?;
    if asked.full && !(asked.resume && files.default.is_file()) {
        let mut collect = pytest(&env, &asked, &asked.tests, false)?;
        collect
            .args(["--collect-only", "-qq"])
            .env("CONFORMANCE_NAMES", &files.default)
            .stdout(std::process::Stdio::null());
        finish(&mut collect)?;
    }
    let mut chosen = BTreeSet::new();
    for (precision, numerics) in PRECISIONS {
        if asked.precision.is_some_and(|only| only != *precision) {
            continue;
        }
        let mut tests = pytest(&env, &asked, &asked.tests, asked.full)?;
        tests
            .args(["-n", &asked.jobs.to_string()])
            .env("CONFORMANCE_RECORD", &files.record)
            .env("CONFORMANCE_DONE", &files.done)
            .env("CONFORMANCE_NAMES", &files.chosen)
            .env("CONFORMANCE_PRECISION", precision)
            .env("CANDLE_COREML_NUMERICS", numerics);
        finish(&mut tests)?;
        // Tests that do not say their precision need not run twice.
        files.leave_out_what_is_done(false)?;
        chosen.extend(record::names(&files.chosen)?);
    }
    prove(&env, &asked, &files)?;
    conclude(&asked, arguments, &files, &chosen)
}

/// Runs tests that compare float16 values too finely once more, with random numbers that float16 holds: whoever computes an
/// expectation from numbers that the program does not have passes then. Some of these tests round what they expect and some do
/// not, so what does not pass computed in 32 bits is tried with every result rounded.
fn prove(env: &Environment, asked: &Asked, files: &Files) -> Result<()> {
    for (_, numerics) in PRECISIONS {
        let proven = files.proven()?;
        let outcomes = record::read(&files.record, &proven)?;
        let doubtful: Vec<&str> = outcomes
            .iter()
            .filter(|o| o.is_doubtful())
            .map(|o| o.test.as_str())
            .collect();
        if doubtful.is_empty() {
            return Ok(());
        }
        fs::write(&files.doubtful, doubtful.join("\n"))
            .map_err(|e| format!("{}: {e}", files.doubtful.display()))?;
        let modules: BTreeSet<String> = doubtful
            .iter()
            .filter_map(|name| name.split("::").next().map(str::to_string))
            .collect();
        let mut tests = pytest(env, asked, &Vec::from_iter(modules), asked.full)?;
        tests
            .args(["-n", &asked.jobs.to_string()])
            .env("CONFORMANCE_RECORD", &files.proof)
            .env("CONFORMANCE_ONLY", &files.doubtful)
            .env("CONFORMANCE_EVERY", "1")
            .env("CONFORMANCE_GRID", GRID)
            .env("CANDLE_COREML_NUMERICS", numerics);
        finish(&mut tests)?;
    }
    Ok(())
}

impl Files {
    fn new(folder: &Path, asked: &Asked) -> Result<Self> {
        let files = Files {
            record: folder.join("record.jsonl"),
            default: folder.join("default.txt"),
            done: folder.join("done.txt"),
            chosen: folder.join("chosen.txt"),
            proof: folder.join("proof.jsonl"),
            doubtful: folder.join("doubtful.txt"),
        };
        if !asked.resume {
            let _ = fs::remove_file(&files.record);
            let _ = fs::remove_file(&files.proof);
        }
        files.leave_out_what_is_done(asked.retry)?;
        Ok(files)
    }

    /// Has the next run leave out the tests in the record; those that failed not, if they are to be retried.
    fn leave_out_what_is_done(&self, retry: bool) -> Result<()> {
        let mut done = Vec::new();
        if self.record.is_file() {
            let outcomes = record::read(&self.record, &BTreeSet::new())?;
            let kept = outcomes.into_iter().filter(|o| !(retry && o.failed()));
            done.extend(kept.map(|o| o.test));
        }
        fs::write(&self.done, done.join("\n")).map_err(|e| format!("{}: {e}", self.done.display()))
    }

    /// Names of the tests that pass with random numbers that float16 holds.
    fn proven(&self) -> Result<BTreeSet<String>> {
        if !self.proof.is_file() {
            return Ok(BTreeSet::new());
        }
        let outcomes = record::read(&self.proof, &BTreeSet::new())?;
        let passed = outcomes.into_iter().filter(record::Outcome::passed);
        Ok(passed.map(|o| o.test).collect())
    }
}

/// pytest with the plugin, on `tests`.
fn pytest(env: &Environment, asked: &Asked, tests: &[String], full: bool) -> Result<Command> {
    let mut command = env.python();
    command
        .current_dir(env.packages()?)
        .args(["-m", "pytest", "-p", "candle_conformance"])
        .args(["-p", "no:cacheprovider", "-p", "no:warnings"])
        .args(["-q", "--tb=no", "-o", "log_file="])
        .args(tests)
        .env("PYTHONPATH", root().join("crates/python/conformance"))
        .env("CONFORMANCE_EVERY", asked.every.to_string())
        .env("CONFORMANCE_PART", asked.part.to_string())
        .env("PYMIL_TEST_TARGETS", "mlprogram")
        .env("INCLUDE_MIL_FP32_UNIT_TESTS", "1")
        .env("CANDLE_COREML_THREADS", "1")
        .env("OMP_NUM_THREADS", "1")
        .env("TQDM_DISABLE", "1");
    // Other tests compare compressed weights with what they were: their tolerances have another reason.
    if tests
        .iter()
        .all(|test| test.starts_with(OPS) || test.starts_with(BACKEND))
    {
        command
            .env("CONFORMANCE_ATOL", TOLERANCE)
            .env("CONFORMANCE_RTOL", TOLERANCE);
    }
    if full {
        command.env("RUN_BACKWARD_COMPATIBILITY", "1");
    }
    Ok(command)
}

/// Runs it to its end. Tests that fail are what the record is for.
fn finish(command: &mut Command) -> Result<()> {
    command
        .status()
        .map(drop)
        .map_err(|e| format!("{command:?}: {e}"))
}

fn conclude(asked: &Asked, arguments: &[String], files: &Files, chosen: &BTreeSet<String>) -> Result<()> {
    let mut outcomes = record::read(&files.record, &files.proven()?)?;
    let ended: BTreeSet<&str> = outcomes.iter().map(|o| o.test.as_str()).collect();
    let cut = chosen
        .iter()
        .filter(|name| !ended.contains(name.as_str()))
        .count();
    if !asked.torch {
        let all = outcomes.len();
        outcomes.retain(|outcome| !outcome.asks_for_torch());
        println!("{} tests ask for PyTorch and are left out", all - outcomes.len());
    }
    let default = match asked.full {
        true => record::names(&files.default)?,
        false => BTreeSet::new(),
    };
    let report = report::Report::new(&outcomes, asked.full.then_some(&default), cut);
    let text = report.render(&Asked::command(arguments), asked.every);
    println!("{text}");
    if asked.write {
        // A run of one precision has a report of its own.
        let name = match asked.precision {
            None => "docs/CONFORMANCE.md".to_string(),
            Some(precision) => format!("docs/CONFORMANCE-{precision}.md"),
        };
        let path = root().join(name);
        fs::write(&path, &text).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    report.verdict()
}
