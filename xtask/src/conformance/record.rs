//! The record of a run: one JSON line a test, written by the pytest plugin as tests end, so that a run that was cut can go on.

use super::asked::OPS;
use super::exceptions::{EXCEPTIONS, Exception, UNEQUAL};
use crate::python::Result;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What became of one test.
pub struct Outcome {
    pub test: String,
    /// Its folder, without what all operator tests have in common.
    pub directory: String,
    /// The operation set of the last program it asked for a prediction.
    pub opset: &'static str,
    /// "fp32", "fp16" or nothing.
    pub precision: String,
    pub ending: Ending,
    /// True when something was predicted.
    pub reached: bool,
    pub reason: String,
    pub seconds: f64,
    pub loads_us: Vec<u64>,
}

/// How a test ended.
#[derive(Clone, Copy)]
pub enum Ending {
    Passed,
    Skipped,
    /// It compares float16 values more finely than float16 is: it finds what it expects but for the last place, or passes with
    /// numbers that float16 holds.
    Rounded,
    /// It cannot pass, and why.
    Explained(&'static Exception),
    Failed,
}

impl Outcome {
    fn new(line: &str, proven: &BTreeSet<String>) -> Option<Self> {
        let line: Value = serde_json::from_str(line).ok()?;
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_string();
        let numbers = |key: &str| -> Vec<u64> {
            let array = line[key].as_array();
            array.map_or_else(Vec::new, |a| a.iter().filter_map(Value::as_u64).collect())
        };
        let (test, precision, reason) = (text("test"), text("precision"), text("reason"));
        let versions = numbers("reached");
        let directory = test.split("::").next().unwrap_or_default();
        let directory = directory.strip_prefix(OPS).unwrap_or(directory);
        let directory = directory.trim_start_matches('/').split("/test_").next();
        Some(Outcome {
            directory: directory.unwrap_or_default().to_string(),
            opset: opset(versions.last().copied()),
            ending: match text("outcome").as_str() {
                "passed" => Ending::Passed,
                "failed" if proven.contains(&test) || is_last_place(&test, &precision, &reason) => {
                    Ending::Rounded
                }
                "failed" => EXCEPTIONS
                    .iter()
                    .find(|e| e.fits(&test, &reason))
                    .map_or(Ending::Failed, Ending::Explained),
                _ => Ending::Skipped,
            },
            reached: !versions.is_empty(),
            seconds: line["seconds"].as_f64().unwrap_or_default(),
            loads_us: numbers("loads_us"),
            test,
            precision,
            reason,
        })
    }

    pub fn failed(&self) -> bool {
        !self.passed() && !matches!(self.ending, Ending::Skipped)
    }

    pub fn passed(&self) -> bool {
        matches!(self.ending, Ending::Passed)
    }

    /// It has float16 values in a program that is compared as if all were 32 bits wide, and misses that tolerance.
    pub fn is_doubtful(&self) -> bool {
        matches!(self.ending, Ending::Failed) && compares_float16(&self.test, &self.precision, &self.reason)
    }

    /// It failed where Python found no PyTorch, before anything was predicted.
    pub fn asks_for_torch(&self) -> bool {
        let words = ["name 'torch' is not defined", "No module named 'torch'"];
        self.failed() && !self.reached && words.iter().any(|w| self.reason.contains(w))
    }

    /// It makes a neural network, which is another format.
    pub fn is_another_format(&self) -> bool {
        self.failed() && self.reason.contains("the model is a neuralNetwork")
    }
}

/// A test of float16 values in a program that is called fp32 misses its tolerance.
fn compares_float16(test: &str, precision: &str, reason: &str) -> bool {
    let float16 = ["float16", "=fp16"].iter().any(|word| test.contains(word));
    float16 && precision == "fp32" && reason.contains(UNEQUAL)
}

/// It does so by no more than a unit in the last place of float16, of which neighbours differ by 2^-10 at most.
fn is_last_place(test: &str, precision: &str, reason: &str) -> bool {
    let found = reason.split("Max relative difference among violations: ").nth(1);
    let found = found.and_then(|rest| rest.split_whitespace().next());
    let difference = found.and_then(|number| number.parse::<f64>().ok());
    compares_float16(test, precision, reason) && difference.is_some_and(|d| d <= 1.0 / 1024.0)
}

/// The operation set that belongs to a specification version.
fn opset(version: Option<u64>) -> &'static str {
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

/// The outcomes in the text of a record: of several of one test the last counts, and a line that was cut does not. Tests that are
/// `proven` pass with numbers that float16 holds.
pub fn outcomes(text: &str, proven: &BTreeSet<String>) -> Vec<Outcome> {
    let mut last = BTreeMap::new();
    for outcome in text.lines().filter_map(|line| Outcome::new(line, proven)) {
        last.insert(outcome.test.clone(), outcome);
    }
    last.into_values().collect()
}

pub fn read(path: &Path, proven: &BTreeSet<String>) -> Result<Vec<Outcome>> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(outcomes(&text, proven))
}

/// Names in a file, one a line.
pub fn names(path: &Path) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(text
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_string)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_without_pytorch_is_told_from_one_that_fails() {
        for (reached, reason, expected) in [
            ("[]", "NameError: name 'torch' is not defined", true),
            ("[]", "ModuleNotFoundError: No module named 'torch'", true),
            ("[8]", "NameError: name 'torch' is not defined", false),
            ("[]", "no such operator", false),
        ] {
            let line = format!(
                r#"{{"test": "a.py::t", "outcome": "failed", "reached": {reached}, "reason": "{reason}"}}"#
            );
            let all = outcomes(&line, &BTreeSet::new());
            let found: Vec<bool> = all.iter().map(Outcome::asks_for_torch).collect();
            assert_eq!(found, [expected], "{reached} {reason}");
        }
    }

    #[test]
    fn a_unit_in_the_last_place_of_float16_is_rounding_and_two_are_not() {
        for (test, difference, expected) in [
            ("a.py::t[float16]", "0.00089968", true),
            ("a.py::t[float16]", "0.00195312", false),
            ("a.py::t[float16]", "inf", false),
            ("a.py::t[float32]", "0.00089968", false),
        ] {
            let line = format!(
                r#"{{"test": "{test}", "outcome": "failed", "precision": "fp32", "reached": [8], "reason": "Not equal to tolerance\nMax relative difference among violations: {difference}\n ACTUAL"}}"#
            );
            let all = outcomes(&line, &BTreeSet::new());
            let found: Vec<bool> = all.iter().map(|o| matches!(o.ending, Ending::Rounded)).collect();
            assert_eq!(found, [expected], "{test} {difference}");
        }
    }

    #[test]
    fn of_a_test_that_ran_twice_the_last_outcome_counts_and_a_cut_line_is_left_out() {
        let text = concat!(
            r#"{"test": "a.py::t", "outcome": "failed", "reached": [8], "reason": "x"}"#,
            "\n",
            r#"{"test": "a.py::t", "outcome": "passed", "reached": [8], "reason": ""}"#,
            "\n",
            r#"{"test": "a.py::u", "outco"#,
        );
        let all = outcomes(text, &BTreeSet::new());
        assert_eq!(all.len(), 1);
        assert!(all.iter().all(|o| matches!(o.ending, Ending::Passed)));
    }

    #[test]
    fn only_float16_values_compared_at_the_tolerance_of_fp32_are_doubtful_until_they_are_proven() {
        let unequal = "Not equal to tolerance rtol=1e-05";
        for (test, precision, reason, expected) in [
            (
                "a.py::t[precision='fp32' dtype=<class 'numpy.float16'>]",
                "fp32",
                unequal,
                true,
            ),
            ("a.py::t[precision='fp32' lut_dtype=fp16]", "fp32", unequal, true),
            ("a.py::t[precision='fp32' lut_dtype=fp32]", "fp32", unequal, false),
            (
                "a.py::t[precision='fp16' dtype=<class 'numpy.float16'>]",
                "fp16",
                unequal,
                false,
            ),
            (
                "a.py::t[precision='fp32' lut_dtype=fp16]",
                "fp32",
                "no such operator",
                false,
            ),
        ] {
            let line = format!(
                r#"{{"test": "{test}", "outcome": "failed", "precision": "{precision}", "reached": [8], "reason": "{reason}"}}"#
            );
            let found = |proven: &BTreeSet<String>| outcomes(&line, proven).iter().any(Outcome::is_doubtful);
            assert_eq!(found(&BTreeSet::new()), expected, "{test} {reason}");
            assert!(!found(&BTreeSet::from([test.to_string()])), "{test} {reason}");
        }
    }
}
