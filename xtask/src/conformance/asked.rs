//! What `cargo xtask conformance` is asked for.

use crate::python::Result;

/// Where the suite has its tests of single operators.
pub const OPS: &str = "coremltools/converters/mil/mil/ops/tests";
const OPSETS: &[&str] = &["iOS14", "iOS15", "iOS16", "iOS17", "iOS18"];
/// Where it has the tests of the writer of ML Programs.
pub const BACKEND: &str = "coremltools/converters/mil/backend";

pub const USAGE: &str = "cargo xtask conformance [--full] [--fp32 | --fp16] [--every N] [--part K] [--jobs N] [--resume | --retry] \
                         [--no-torch] [--quick] [--write] [DIRECTORY OR TEST OF coremltools ...]
  --full          older operators under every later operation set too
  --fp32, --fp16  only programs of that precision
  --every N       every N-th test; --part K says which of them
  --jobs N        pytest workers (2)
  --resume        go on where the last run ended; --retry: and run again what failed
  --no-torch      without PyTorch and the tests that need it
  --quick         with a module that is not optimised
  --write         make docs/CONFORMANCE.md of it, or docs/CONFORMANCE-fp32.md, docs/CONFORMANCE-fp16.md";

/// What `conformance` is asked for.
#[derive(Debug)]
pub struct Asked {
    pub every: usize,
    pub part: usize,
    pub jobs: usize,
    pub full: bool,
    /// "fp32" or "fp16" for programs of that precision alone.
    pub precision: Option<&'static str>,
    /// The record of the last run is kept and tests in it are not run again.
    pub resume: bool,
    /// Except those that failed.
    pub retry: bool,
    pub torch: bool,
    pub quick: bool,
    pub write: bool,
    pub tests: Vec<String>,
}

impl Asked {
    pub fn new(arguments: &[String]) -> Result<Self> {
        let mut asked = Asked {
            every: 1,
            part: 0,
            jobs: 2,
            full: false,
            precision: None,
            resume: false,
            retry: false,
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
                "--fp32" => asked.precision = Some("fp32"),
                "--fp16" => asked.precision = Some("fp16"),
                "--resume" => asked.resume = true,
                "--retry" => (asked.resume, asked.retry) = (true, true),
                "--no-torch" => asked.torch = false,
                "--quick" => asked.quick = true,
                "--write" => asked.write = true,
                flag if flag.starts_with('-') => return Err(format!("{flag} is unknown\n{USAGE}")),
                test => asked.tests.push(test.to_string()),
            }
        }
        if asked.tests.is_empty() {
            asked.tests = OPSETS.iter().map(|o| format!("{OPS}/{o}")).collect();
            asked.tests.push(BACKEND.to_string());
        }
        Ok(asked)
    }

    /// The command that repeats this run from its beginning.
    pub fn command(arguments: &[String]) -> String {
        let mut command = "cargo xtask conformance".to_string();
        let again = ["--resume", "--retry", "--write"];
        for argument in arguments.iter().filter(|a| !again.contains(&a.as_str())) {
            command.push(' ');
            command.push_str(argument);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_string).collect()
    }

    #[test]
    fn the_command_in_the_report_runs_everything_again() {
        let command = Asked::command(&words("--full --retry --jobs 4 --write a/b.py"));
        assert_eq!(command, "cargo xtask conformance --full --jobs 4 a/b.py");
    }

    #[test]
    fn an_unknown_flag_is_answered_with_what_is_allowed() {
        for line in ["--fast", "--every", "--jobs many"] {
            let error = Asked::new(&words(line)).expect_err(line);
            assert!(error.contains("--retry"), "{line}: {error}");
        }
    }

    #[test]
    fn the_operators_and_the_backend_are_what_runs_when_nothing_is_named() {
        let asked = Asked::new(&words("--fp16 --retry")).expect("known flags");
        assert_eq!(asked.tests.len(), OPSETS.len() + 1);
        assert!(asked.resume && asked.retry);
        assert_eq!(asked.precision, Some("fp16"));
    }
}
