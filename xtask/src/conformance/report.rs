//! What `docs/CONFORMANCE.md` says of a run.

use super::exceptions::{EXCEPTIONS, Exception};
use super::record::{Ending, Outcome};
use crate::python::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Of a hundred tests that reach `predict`, how many may fail with an explanation.
fn allowed_percent(precision: &str) -> f64 {
    if precision == "fp16" { 1.0 } else { 0.3 }
}

/// Tests of one row of a table.
#[derive(Default, Clone, Copy)]
struct Count {
    reached: usize,
    passed: usize,
    rounded: usize,
    explained: usize,
    failed: usize,
}

impl Count {
    fn add(&mut self, outcome: &Outcome) {
        self.reached += 1;
        match outcome.ending {
            Ending::Passed => self.passed += 1,
            Ending::Rounded => self.rounded += 1,
            Ending::Explained(_) => self.explained += 1,
            Ending::Failed => self.failed += 1,
            Ending::Skipped => {}
        }
    }

    fn percent(&self, part: usize) -> f64 {
        100.0 * part as f64 / self.reached.max(1) as f64
    }
}

/// A run, counted.
pub struct Report<'a> {
    outcomes: Vec<&'a Outcome>,
    /// Tests of the default configuration, when others ran too.
    default: Option<&'a BTreeSet<String>>,
    /// Tests that end before `predict` without failing.
    unreached: usize,
    /// Tests that make models of another format.
    others: usize,
    /// Tests that were chosen and not run.
    cut: usize,
}

impl<'a> Report<'a> {
    pub fn new(all: &'a [Outcome], default: Option<&'a BTreeSet<String>>, cut: usize) -> Self {
        let mut report = Report {
            outcomes: Vec::new(),
            default,
            unreached: 0,
            others: 0,
            cut,
        };
        for outcome in all {
            // A model that does not load is never asked to predict; its test failed all the same.
            if !outcome.reached && !outcome.failed() || matches!(outcome.ending, Ending::Skipped) {
                report.unreached += 1;
            } else if outcome.is_another_format() {
                report.others += 1;
            } else {
                report.outcomes.push(outcome);
            }
        }
        report
    }

    /// Counts by configuration and precision; the full configuration contains the default one.
    fn configurations(&self) -> BTreeMap<(&'static str, &str), Count> {
        let mut rows: BTreeMap<(&'static str, &str), Count> = BTreeMap::new();
        for outcome in &self.outcomes {
            let precision = outcome.precision.as_str();
            if self.default.is_none_or(|names| names.contains(&outcome.test)) {
                rows.entry(("default", precision)).or_default().add(outcome);
            }
            if self.default.is_some() {
                rows.entry(("full", precision)).or_default().add(outcome);
            }
        }
        rows
    }

    /// # Errors
    /// When a test failed without an explanation, when too many are explained, or when nothing ran.
    pub fn verdict(&self) -> Result<()> {
        if self.outcomes.is_empty() {
            return Err("no test reached predict".to_string());
        }
        if self.cut > 0 {
            return Err(format!(
                "{} tests did not run; --resume goes on with them",
                self.cut
            ));
        }
        let failed = self
            .outcomes
            .iter()
            .filter(|o| matches!(o.ending, Ending::Failed));
        let failed = failed.count();
        if failed > 0 {
            return Err(format!("{failed} tests failed without an explanation"));
        }
        // A handful of tests says nothing about a share of 0.3%.
        let large = |count: &Count| count.reached >= 1000;
        for ((configuration, precision), count) in self.configurations() {
            let (found, allowed) = (count.percent(count.explained), allowed_percent(precision));
            if large(&count) && found > allowed {
                return Err(format!(
                    "{configuration} configuration, {precision}: {found:.2}% of the tests are explained away; allowed: {allowed}%"
                ));
            }
        }
        Ok(())
    }

    /// The page.
    pub fn render(&self, command: &str, every: usize) -> String {
        let mut text = format!(
            "# coremltools' own tests\n\nThe tests that come with coremltools 9.0 compare `predict` with numpy and PyTorch, and skip that \
             off macOS. Here they run on the portable engine, unmodified, through `candle_coreml.coremltools`: ML Programs, compute \
             units CPU_ONLY, default numerics for fp32 and faithful ones for fp16. Tolerances are those of the tests, and never above \
             2e-2 (for fp16 they allow 0.5). The full \
             configuration runs the tests of older operators under every later operation set too.\n\n    {command}\n\n"
        );
        if every > 1 {
            let _ = writeln!(
                text,
                "**One test in {every} was run**, chosen by a hash of its name; all numbers here are those of this sample.\n"
            );
        }
        self.headline(&mut text);
        self.cost(&mut text);
        self.directories(&mut text);
        self.rounding(&mut text);
        self.explained(&mut text);
        self.failed(&mut text);
        text
    }

    fn headline(&self, text: &mut String) {
        text.push_str(
            "| configuration | precision | reach `predict` | pass | rounding | explained | fail |\n|---|---|---|---|---|---|---|\n",
        );
        for ((configuration, precision), count) in self.configurations() {
            let _ = writeln!(
                text,
                "| {configuration} | {} | {} | **{}** | {} ({:.2}%) | {} ({:.2}%) | {} |",
                named(precision),
                count.reached,
                count.passed,
                count.rounded,
                count.percent(count.rounded),
                count.explained,
                count.percent(count.explained),
                count.failed
            );
        }
        let _ = writeln!(
            text,
            "\n{} more tests end before `predict` (skipped, or about conversion alone), and {} make a neural network, which is another \
             format.\n\n*Rounding* counts tests of fp32 that have float16 values inside and compare them at 1e-4, where a unit in the last place \
             of float16 is up to 5e-4 below 1: they compute what they expect from numbers before these are rounded to the float16 of the \
             program, or round it where the program does not. Their program does not hold the numbers that the expectation is made of. \
             Which tests these are is told by one of two rules: they differ by no more than a unit in the last place \
             of float16, which shows nearness and not the cause; or they were run again with random numbers that are multiples of 1/16, which float16 holds, and passed, \
             computed in 32 bits or with every result rounded. *Explained* are tests that fail because their expectation is not what \
             their program says; each is listed below.",
            self.unreached, self.others
        );
        if self.cut > 0 {
            let _ = writeln!(
                text,
                "\n**The run was cut: {} tests did not run.** Tests run in an order without meaning, so these are a fair sample.",
                self.cut
            );
        }
    }

    fn cost(&self, text: &mut String) {
        let mut loads: Vec<u64> = self
            .outcomes
            .iter()
            .flat_map(|o| o.loads_us.iter().copied())
            .collect();
        loads.sort_unstable();
        let at =
            |part: usize| loads.get(loads.len() * part / 100).copied().unwrap_or_default() as f64 / 1000.0;
        if !loads.is_empty() {
            let minutes = self.outcomes.iter().map(|o| o.seconds).sum::<f64>() / 60.0;
            let _ = writeln!(
                text,
                "\nLoading one of the {} models took {:.2} ms (median; 95 of 100 took less than {:.2} ms). The tests took {minutes:.0} minutes of \
                 one processor, conversion by coremltools included.",
                loads.len(),
                at(50),
                at(95)
            );
        }
    }

    fn directories(&self, text: &mut String) {
        let mut rows: BTreeMap<(&str, &str), [Count; 3]> = BTreeMap::new();
        for outcome in &self.outcomes {
            let row = rows.entry((&outcome.directory, outcome.opset)).or_default();
            let column = match outcome.precision.as_str() {
                "fp32" => 0,
                "fp16" => 1,
                _ => 2,
            };
            if let Some(count) = row.get_mut(column) {
                count.add(outcome);
            }
        }
        text.push_str(
            "\nPassed of those that reach `predict`:\n\n\
             | tests | operation set | fp32 | fp16 | no precision | rounding | explained | failed |\n|---|---|---|---|---|---|---|---|\n",
        );
        for ((directory, opset), columns) in rows {
            let part = |c: &Count| match c.reached {
                0 => "-".to_string(),
                _ => format!("{} of {}", c.passed, c.reached),
            };
            let parts: Vec<String> = columns.iter().map(part).collect();
            let sum = |f: fn(&Count) -> usize| columns.iter().map(f).sum::<usize>();
            let _ = writeln!(
                text,
                "| {directory} | {opset} | {} | {} | {} | {} |",
                parts.join(" | "),
                sum(|c| c.rounded),
                sum(|c| c.explained),
                sum(|c| c.failed)
            );
        }
    }

    fn rounding(&self, text: &mut String) {
        let mut tests: BTreeMap<String, [usize; 2]> = BTreeMap::new();
        for outcome in &self.outcomes {
            let column = match outcome.ending {
                Ending::Rounded => 0,
                Ending::Passed if outcome.precision == "fp32" => 1,
                _ => continue,
            };
            let counts = tests.entry(without_parameters(&outcome.test)).or_default();
            if let Some(count) = counts.get_mut(column) {
                *count += 1;
            }
        }
        text.push_str("\n## Rounding\n\n");
        tests.retain(|_, [rounded, _]| *rounded > 0);
        if tests.is_empty() {
            text.push_str("None.\n");
            return;
        }
        text.push_str("| test | rounding | of the same test pass in fp32 |\n|---|---|---|\n");
        for (name, [rounded, passed]) in tests {
            let _ = writeln!(text, "| `{name}` | {rounded} | {passed} |");
        }
    }

    fn explained(&self, text: &mut String) {
        text.push_str("\n## Explained\n\n");
        let before = text.len();
        for exception in EXCEPTIONS {
            let own = |o: &&&Outcome| matches!(o.ending, Ending::Explained(e) if std::ptr::eq(e, exception));
            let mut precisions: BTreeMap<&str, usize> = BTreeMap::new();
            for outcome in self.outcomes.iter().filter(own) {
                *precisions.entry(named(&outcome.precision)).or_default() += 1;
            }
            if precisions.is_empty() {
                continue;
            }
            let counts: Vec<String> = precisions.iter().map(|(p, n)| format!("{n} in {p}")).collect();
            let _ = writeln!(
                text,
                "- {} with {} ({} like them pass): {}.",
                counts.join(" and "),
                exception.words.join(" and "),
                self.passing_like(exception),
                exception.why
            );
        }
        if text.len() == before {
            text.push_str("None.\n");
        }
    }

    fn passing_like(&self, exception: &Exception) -> usize {
        let like = |o: &&&Outcome| {
            matches!(o.ending, Ending::Passed) && exception.words.iter().all(|w| o.test.contains(w))
        };
        self.outcomes.iter().filter(like).count()
    }

    fn failed(&self, text: &mut String) {
        text.push_str("\n## Failed\n\n");
        let mut reasons: BTreeMap<(String, String), usize> = BTreeMap::new();
        for outcome in self
            .outcomes
            .iter()
            .filter(|o| matches!(o.ending, Ending::Failed))
        {
            let name = without_parameters(&outcome.test);
            let lines = outcome.reason.lines().filter(|l| !l.trim().is_empty());
            let reason = lines.take(2).collect::<Vec<_>>().join(" ");
            let reason: String = reason.chars().take(200).collect();
            *reasons.entry((name, reason)).or_default() += 1;
        }
        if reasons.is_empty() {
            text.push_str("None.\n");
        }
        for ((name, reason), count) in reasons {
            let _ = writeln!(text, "- {count} of `{name}`: {reason}");
        }
    }
}

/// File, class and name of a test.
fn without_parameters(test: &str) -> String {
    let name = test.split('[').next().unwrap_or_default();
    let mut parts = name.rsplitn(3, '/');
    let (file, folder) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("{folder}/{file}")
}

fn named(precision: &str) -> &str {
    if precision.is_empty() {
        "not said"
    } else {
        precision
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::outcomes;
    use super::*;

    const LINES: &str = r#"
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_conv.py::TestConv::a[1]", "outcome": "passed", "precision": "fp32", "reached": [8], "loads_us": [300]}
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_conv.py::TestConv::a[2]", "outcome": "passed", "precision": "fp32", "reached": [9]}
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::b[2]", "outcome": "failed", "precision": "fp16", "reached": [], "reason": "\nno such operator"}
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::n", "outcome": "failed", "precision": "", "reached": [5], "reason": "the model is a neuralNetwork"}
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::c", "outcome": "skipped", "precision": "", "reached": []}
{"test": "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::r[float16]", "outcome": "failed", "precision": "fp32", "reached": [8]}
"#;

    #[test]
    fn a_record_becomes_tables_with_reasons() {
        let proven = "coremltools/converters/mil/mil/ops/tests/iOS17/test_x.py::T::r[float16]";
        let all = outcomes(LINES, &BTreeSet::from([proven.to_string()]));
        let name = "coremltools/converters/mil/mil/ops/tests/iOS17/test_conv.py::TestConv::a[1]";
        let default = BTreeSet::from([name.to_string()]);
        let report = Report::new(&all, Some(&default), 3);
        let text = report.render("cargo xtask conformance --full", 10);
        let expected = [
            "| default | fp32 | 1 | **1** | 0 (0.00%) | 0 (0.00%) | 0 |",
            "| full | fp16 | 1 | **0** | 0 (0.00%) | 0 (0.00%) | 1 |",
            "| full | fp32 | 3 | **2** | 1 (33.33%) | 0 (0.00%) | 0 |",
            "One test in 10 was run",
            "| `iOS17/test_x.py::T::r` | 1 | 0 |",
            "1 more tests end before `predict`",
            "3 tests did not run",
            "and 1 make a neural network",
            "one of the 1 models took 0.30 ms",
            "| iOS17 | iOS17 | 1 of 2 | - | - | 1 | 0 | 0 |",
            "| iOS17 | - | - | 0 of 1 | - | 0 | 0 | 1 |",
            "- 1 of `iOS17/test_x.py::T::b`: no such operator",
        ];
        let missing: Vec<_> = expected.iter().filter(|e| !text.contains(*e)).collect();
        assert!(missing.is_empty(), "{missing:#?}\n{text}");
        assert!(report.verdict().is_err());
    }

    #[test]
    fn more_explanations_than_allowed_are_a_failure() {
        let line = |n: usize, ending: &str| {
            format!(
                r#"{{"test": "t.py::TestNormalizationL2Norm::test_builder_to_backend_stress[precision='fp32' <class 'numpy.float16'> {n}]", "outcome": "{ending}", "precision": "fp32", "reached": [8], "reason": "Not equal to tolerance"}}"#
            )
        };
        for (failed, fine) in [(2, true), (20, false)] {
            let lines: Vec<_> = (0..1000)
                .map(|n| line(n, if n < failed { "failed" } else { "passed" }))
                .collect();
            let all = outcomes(&lines.join("\n"), &BTreeSet::new());
            let report = Report::new(&all, None, 0);
            let listed = format!("- {failed} in fp32 with TestNormalizationL2Norm");
            let text = report.render("", 1);
            assert!(text.contains(&listed), "{failed}: {text}");
            let verdict = report.verdict();
            assert_eq!(verdict.is_ok(), fine, "{failed}: {verdict:?}");
        }
    }
}
