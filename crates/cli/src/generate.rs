//! `generate`: one prompt, one text.

use std::io::{self, Read, Write};

use candle_coreml_llm::{
    Bundle, Completion, FinishReason, GenerateOptions, Generation, Message, Session, Step,
};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::failure::{DONE, Failure, INTERRUPTED, Outcome};
use crate::{demo, interrupt, terminal};

pub fn run(args: &GenerateArgs) -> Outcome {
    let prompt = read_prompt(&args.prompt)?;
    interrupt::install()?;
    let bundle = demo::bundle(args.bundle.as_deref())?;
    let ids = bundle.tokenizer().encode(&written(&bundle, args, prompt)?)?;
    let mut session = open(&bundle, &args.engine.load_options())?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.with(args.temperature, args.seed),
        stop_strings: args.sampling.stop.clone(),
        ..GenerateOptions::default()
    };
    let mut generation = session.generate(&ids, &options)?;
    prefill(&mut generation)?;
    stream(&mut generation, !args.json)?;
    let done = generation.completion();
    if args.json {
        writeln!(terminal::out(), "{}", object(&done))?;
    } else {
        terminal::note(&summary(&done));
    }
    Ok(if done.finish_reason == FinishReason::Cancelled {
        INTERRUPTED
    } else {
        DONE
    })
}

fn read_prompt(prompt: &str) -> Result<String, Failure> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// The text the model is given.
fn written(bundle: &Bundle, args: &GenerateArgs, prompt: String) -> Result<String, Failure> {
    if args.raw {
        return Ok(prompt);
    }
    let system = args.system.as_ref().map(Message::system);
    let messages: Vec<Message> = system.into_iter().chain([Message::user(prompt)]).collect();
    let template = bundle
        .template()
        .map_err(|e| Failure::usage(format!("{e} (--raw)")))?;
    Ok(template.render(&messages, true)?)
}

/// Opens a bundle's packages behind a spinner.
pub fn open(bundle: &Bundle, options: &candle_coreml_llm::LoadOptions) -> Result<Session, Failure> {
    let spinner = terminal::spinner(format!("opening {}", bundle.name()));
    let session = bundle.session(options);
    spinner.finish_and_clear();
    Ok(session?)
}

/// Computes the prompt behind a bar; Ctrl-C ends it between batches.
pub fn prefill(generation: &mut Generation<'_>) -> Result<(), Failure> {
    let bar = terminal::bar("reading", 0);
    let result = generation.prefill_while(|done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        !interrupt::asked()
    });
    bar.finish_and_clear();
    Ok(result?)
}

/// Generates to the end or to Ctrl-C, and prints the text as it comes.
fn stream(generation: &mut Generation<'_>, print: bool) -> Result<(), Failure> {
    let mut out = terminal::out();
    loop {
        if interrupt::asked() {
            generation.cancel();
        }
        match generation.step()? {
            Step::Token(piece) if print => {
                out.write_all(piece.text.as_bytes())?;
                out.flush()?;
            }
            Step::Finished(_) => break,
            _ => {}
        }
    }
    if print {
        writeln!(out)?;
    }
    Ok(())
}

fn object(done: &Completion) -> serde_json::Value {
    json!({
        "prompt_tokens": done.prompt_tokens,
        "tokens": done.tokens,
        "text": done.text,
        "finish_reason": done.finish_reason.name(),
        "prefill_ms": rounded(done.timings.prefill_ms),
        "decode_ms": rounded(done.timings.decode_ms),
        "decode_tokens_per_s": rounded(done.timings.decode_tokens_per_s()),
    })
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// One line about a text: how long, how fast, why it ended.
pub fn summary(done: &Completion) -> String {
    format!(
        "{} prompt tokens ({} known) in {:.0} ms, {} tokens at {:.1} tokens/s, ended by {}",
        done.prompt_tokens,
        done.reused_tokens,
        done.timings.prefill_ms,
        done.tokens.len(),
        done.timings.decode_tokens_per_s(),
        done.finish_reason.name()
    )
}
