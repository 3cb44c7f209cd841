//! Times a language model for a program that compares engines: `timed_tokens BUNDLE THREADS [fast]`.
//!
//! Requests are lines of standard input, each answered by one line: `prefill N` (nanoseconds of a prompt of N tokens,
//! without a prediction at its end), `decode N DEPTH` (of N tokens one by one, after DEPTH tokens), `greedy N T T ..` (the N best tokens after the tokens T,
//! one at a time), `logits T T ..` (those after the tokens T), `peak` (the most memory the process has had, in KB, on Linux).

use candle_coreml::{EngineKind, Numerics};
use candle_coreml_llm::{Bundle, LanguageModel, LoadOptions, Prediction};
use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (bundle, threads, numerics) = match arguments.as_slice() {
        [bundle, threads] => (bundle, threads, Numerics::Default),
        [bundle, threads, fast] if fast == "fast" => (bundle, threads, Numerics::Fast),
        _ => return Err("timed_tokens BUNDLE THREADS [fast]".into()),
    };
    let options = LoadOptions {
        engine: EngineKind::Portable,
        threads: threads.parse()?,
        numerics,
        ..LoadOptions::default()
    };
    let (_, mut model) = Bundle::open_model(bundle, &options)?;
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        println!("{}", answer(model.as_mut(), &line)?);
    }
    Ok(())
}

fn answer(model: &mut dyn LanguageModel, line: &str) -> Result<String, Box<dyn Error>> {
    let (what, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    let numbers = rest
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<Vec<u32>, _>>()?;
    Ok(match (what, numbers.as_slice()) {
        ("prefill", &[count]) => {
            let tokens = some_tokens(count, model.vocabulary());
            let start = Instant::now();
            prefill(model, &tokens)?;
            start.elapsed().as_nanos().to_string()
        }
        ("decode", &[count, depth]) => {
            let tokens = some_tokens(depth + count, model.vocabulary());
            let depth = usize::try_from(depth)?;
            prefill(model, &tokens[..depth])?;
            let start = Instant::now();
            for end in depth..tokens.len() {
                best(model.decode(&tokens[..=end])?);
            }
            start.elapsed().as_nanos().to_string()
        }
        ("greedy", [count, prompt @ ..]) if !prompt.is_empty() => {
            let mut tokens = prompt.to_vec();
            prefill(model, &prompt[..prompt.len() - 1])?;
            for _ in 0..*count {
                let token = best(model.decode(&tokens)?);
                tokens.push(token);
            }
            let words: Vec<String> = tokens[prompt.len()..].iter().map(u32::to_string).collect();
            words.join(" ")
        }
        ("logits", [prompt @ .., _]) => {
            prefill(model, prompt)?;
            match model.decode(&numbers)? {
                Prediction::Logits(logits) => logits
                    .iter()
                    .map(f32::to_string)
                    .collect::<Vec<String>>()
                    .join(" "),
                Prediction::Token(_) => return Err("this model gives no logits".into()),
            }
        }
        ("peak", []) => {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
            line.map_or("0", |l| l.trim().trim_end_matches(" kB")).to_string()
        }
        _ => return Err(format!("unknown: {line}").into()),
    })
}

fn prefill(model: &mut dyn LanguageModel, tokens: &[u32]) -> Result<(), Box<dyn Error>> {
    let mut done = 0;
    while done < tokens.len() {
        done = model.prefill(tokens, done)?;
    }
    Ok(())
}

fn best(prediction: Prediction<'_>) -> u32 {
    match prediction {
        Prediction::Token(token) => token,
        Prediction::Logits(logits) => {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            best.map_or(0, |(token, _)| u32::try_from(token).unwrap_or(0))
        }
    }
}

/// Tokens spread over the vocabulary, the same every time.
fn some_tokens(count: u32, vocabulary: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % (vocabulary.max(1) as u64)
    };
    (0..count).map(|_| u32::try_from(next()).unwrap_or(0)).collect()
}
