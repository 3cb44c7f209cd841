//! `bench`: tokens a second of prefill and decode, in llama-bench's form.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use candle_coreml::EngineKind;
use candle_coreml_llm::{Bundle, GenerateOptions, LanguageModel, Prediction, Session};
use candle_coreml_mil as mil;
use serde::Serialize;

use crate::args::{BenchArgs, BenchOutput};
use crate::failure::{DONE, Failure, INTERRUPTED, Outcome};
use crate::{demo, interrupt, terminal};

/// One row: what was measured, how often, how fast.
#[derive(Debug, Serialize)]
struct Row {
    model: String,
    model_size_bytes: u64,
    engine: String,
    threads: usize,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    avg_ns: f64,
    stddev_ns: f64,
    avg_ts: f64,
    stddev_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
    /// Microseconds a generated token outside the packages' own predictions; rows of decode have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    overhead_us: Option<f64>,
}

/// What is measured: a prompt of so many tokens, or so many tokens one by one, after `depth` tokens of context.
#[derive(Debug, Clone, Copy)]
struct Test {
    kind: Kind,
    tokens: usize,
    depth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Prefill,
    Decode,
}

impl Test {
    /// As llama-bench names it: `pp64`, `tg32 @ d128`.
    fn name(self) -> String {
        let name = match self.kind {
            Kind::Prefill => format!("pp{}", self.tokens),
            Kind::Decode => format!("tg{}", self.tokens),
        };
        match self.depth {
            0 => name,
            depth => format!("{name} @ d{depth}"),
        }
    }
}

/// Every kind at every depth.
fn tests(args: &BenchArgs) -> Vec<Test> {
    let kinds = [(Kind::Prefill, &args.prompts), (Kind::Decode, &args.generations)];
    let mut tests = Vec::new();
    for &depth in &args.depths {
        for (kind, counts) in kinds {
            let here = counts.iter().filter(|&&n| n > 0);
            tests.extend(here.map(|&tokens| Test { kind, tokens, depth }));
        }
    }
    tests
}

pub fn run(args: &BenchArgs) -> Outcome {
    interrupt::install()?;
    let (bundle, mut model) = demo::model(args.bundle.as_deref(), &args.engine.load_options())?;
    let tests = tests(args);
    check(&tests, model.as_ref())?;
    let bar = terminal::bar("measuring", (tests.len() * (args.repetitions + 1)) as u64);
    let mut rows = Vec::new();
    for test in tests {
        let mut samples = Vec::new();
        // The first run warms caches and plans and is not counted.
        for repetition in 0..=args.repetitions {
            let Some(ns) = measure(model.as_mut(), test)? else {
                return Ok(INTERRUPTED);
            };
            if repetition > 0 {
                samples.push(ns);
            }
            bar.inc(1);
        }
        rows.push(row(&bundle, args, test, samples)?);
    }
    bar.finish_and_clear();
    if rows.iter().any(|row| row.n_gen > 0) {
        let overhead = overhead(&bundle, model)?;
        for row in rows.iter_mut().filter(|row| row.n_gen > 0) {
            row.overhead_us = Some(overhead);
        }
    }
    let output = if args.json { BenchOutput::Json } else { args.output };
    print(&rows, output)
}

fn check(tests: &[Test], model: &dyn LanguageModel) -> Result<(), Failure> {
    let context = model.context_tokens();
    match tests.iter().find(|test| test.depth + test.tokens > context) {
        Some(test) => Err(Failure::usage(format!(
            "{} does not fit the context of {context} tokens",
            test.name()
        ))),
        None if tests.is_empty() => Err(Failure::usage("nothing to measure: -p and -n are empty or 0")),
        None => Ok(()),
    }
}

/// Nanoseconds of one run, `None` after Ctrl-C.
fn measure(model: &mut dyn LanguageModel, test: Test) -> Result<Option<u64>, Failure> {
    let tokens = some_tokens(test.depth + test.tokens, model.vocabulary());
    let mut done = 0;
    while done < test.depth {
        done = model.prefill(&tokens[..test.depth], done)?;
    }
    let start = Instant::now();
    while done < tokens.len() {
        if interrupt::asked() {
            return Ok(None);
        }
        match test.kind {
            Kind::Prefill => done = model.prefill(&tokens, done)?,
            Kind::Decode => {
                done += 1;
                if let Prediction::Logits(logits) = model.decode(&tokens[..done])? {
                    std::hint::black_box(logits);
                }
            }
        }
    }
    Ok(Some(
        u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
    ))
}

/// Microseconds a token that the loop of a conversation takes outside the packages' own predictions: inputs and outputs, choice, text. The
/// least of some runs, because whatever else the machine does only adds to it.
fn overhead(bundle: &Bundle, model: Box<dyn LanguageModel>) -> Result<f64, Failure> {
    const RUNS: usize = 4;
    const TOKENS: usize = 64;
    let prompt = some_tokens(1, model.vocabulary());
    let options = GenerateOptions {
        max_tokens: TOKENS.min(model.context_tokens()),
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let mut session = Session::new(
        model,
        Arc::clone(bundle.tokenizer()),
        Arc::clone(bundle.end_tokens()),
    );
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        let done = session.generate_with(&prompt, &options, |_| ControlFlow::Continue(()))?;
        least = least.min(done.timings.overhead_us_per_token());
    }
    Ok(least)
}

/// Tokens spread over the vocabulary, the same every time.
fn some_tokens(count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % (vocabulary.max(1) as u64)
    };
    (0..count).map(|_| u32::try_from(next()).unwrap_or(0)).collect()
}

fn row(bundle: &Bundle, args: &BenchArgs, test: Test, samples_ns: Vec<u64>) -> Result<Row, Failure> {
    let options = args.engine.load_options();
    let (n_prompt, n_gen) = match test.kind {
        Kind::Prefill => (test.tokens, 0),
        Kind::Decode => (0, test.tokens),
    };
    let samples_ts: Vec<f64> = samples_ns
        .iter()
        .map(|&ns| test.tokens as f64 * 1e9 / ns as f64)
        .collect();
    let (avg_ns, stddev_ns) = mean_and_deviation(&samples_ns.iter().map(|&ns| ns as f64).collect::<Vec<_>>());
    let (avg_ts, stddev_ts) = mean_and_deviation(&samples_ts);
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    Ok(Row {
        model: bundle.name(),
        model_size_bytes: size(bundle)?,
        engine: engine_name(options.engine),
        threads,
        n_prompt,
        n_gen,
        n_depth: test.depth,
        avg_ns,
        stddev_ns,
        avg_ts,
        stddev_ts,
        samples_ns,
        samples_ts,
        overhead_us: None,
    })
}

/// Off Apple systems there is one engine to choose.
fn engine_name(engine: EngineKind) -> String {
    match engine {
        EngineKind::Auto if !cfg!(target_vendor = "apple") => EngineKind::Portable.to_string(),
        engine => engine.to_string(),
    }
}

/// Bytes of the weights of all packages.
fn size(bundle: &Bundle) -> Result<u64, Failure> {
    let mut total = 0;
    for file in bundle.layout().packages() {
        let model = match (bundle.files().path(), bundle.files().below(file)) {
            (Some(path), _) => mil::Model::open(path.join(file))?,
            (None, inside) => {
                let rooted = inside
                    .unwrap_or_default()
                    .into_iter()
                    .map(|(p, b)| (format!("{file}/{p}"), b));
                mil::Model::open_source(mil::Source::memory(rooted.collect()), file)?
            }
        };
        total += model.content_size_bytes();
    }
    Ok(total)
}

/// Mean and sample deviation.
fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let count = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / count;
    if samples.len() < 2 {
        return (mean, 0.0);
    }
    let squares: f64 = samples.iter().map(|s| (s - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0)).sqrt())
}

fn print(rows: &[Row], output: BenchOutput) -> Outcome {
    let mut out = terminal::out();
    match output {
        BenchOutput::Json => {
            writeln!(out, "{}", serde_json::to_string_pretty(rows)?)?;
            return Ok(DONE);
        }
        BenchOutput::Csv => {
            writeln!(
                out,
                "model,model_size_bytes,engine,threads,n_prompt,n_gen,n_depth,avg_ts,stddev_ts,overhead_us"
            )?;
            for row in rows {
                // A name is a folder's: it may hold commas and quotes.
                let name = row.model.replace('"', "\"\"");
                let overhead = row.overhead_us.map(|us| format!("{us:.1}")).unwrap_or_default();
                writeln!(
                    out,
                    "\"{name}\",{},{},{},{},{},{},{:.3},{:.3},{overhead}",
                    row.model_size_bytes,
                    row.engine,
                    row.threads,
                    row.n_prompt,
                    row.n_gen,
                    row.n_depth,
                    row.avg_ts,
                    row.stddev_ts
                )?;
            }
            return Ok(DONE);
        }
        BenchOutput::Md => {}
    }
    let name = rows.iter().map(|row| row.model.len()).max().unwrap_or(0).max(5);
    writeln!(
        out,
        "| {:<name$} | {:>10} | {:<8} | {:>7} | {:>14} | {:>18} |",
        "model", "size", "engine", "threads", "test", "t/s"
    )?;
    writeln!(
        out,
        "| {:-<name$} | ---------: | -------- | ------: | -------------: | -----------------: |",
        ""
    )?;
    for row in rows {
        let kind = if row.n_gen == 0 {
            Kind::Prefill
        } else {
            Kind::Decode
        };
        let test = Test {
            kind,
            tokens: row.n_prompt + row.n_gen,
            depth: row.n_depth,
        };
        let speed = format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts);
        let size = terminal::bytes(row.model_size_bytes);
        writeln!(
            out,
            "| {:<name$} | {size:>10} | {:<8} | {:>7} | {:>14} | {speed:>18} |",
            row.model,
            row.engine,
            row.threads,
            test.name()
        )?;
    }
    if let Some(overhead) = rows.iter().find_map(|row| row.overhead_us) {
        writeln!(
            out,
            "\nengine: {overhead:.1} µs a token outside the model's own predictions"
        )?;
    }
    Ok(DONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
    }

    #[test]
    fn measured_tokens_are_in_the_vocabulary_and_always_the_same() {
        let tokens = some_tokens(1000, 300);
        assert!(tokens.iter().all(|&t| t < 300));
        assert!(tokens.iter().collect::<std::collections::BTreeSet<_>>().len() > 250);
        assert_eq!(tokens, some_tokens(1000, 300));
    }
}
