//! `generate`: one prompt, one text.

use std::io::{self, Read, Write};

use candle_coreml_llm::{
    AnswerFormat, Bundle, Completion, Error as ModelError, FinishReason, GenerateOptions, Generation,
    Grammar, Message, Piece, Prompt, Step, TemplateOptions,
};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::failure::{DONE, FAILED, Failure, INTERRUPTED, Outcome};
use crate::terminal::{FAINT, styled};
use crate::{demo, interrupt, terminal};

pub fn run(args: &GenerateArgs) -> Outcome {
    let grammar = grammar(args)?;
    let prompt = read_prompt(&args.prompt)?;
    interrupt::install()?;
    let (bundle, model) = demo::model(args.bundle.as_deref(), &args.engine.load_options())?;
    let prompt = written(&bundle, args, prompt)?;
    let ids = bundle.tokenizer().encode(&prompt.text)?;
    let mut session = bundle.session_of(model);
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.with(args.temperature, args.seed),
        stop_strings: args.sampling.stop.clone(),
        grammar,
        format: prompt.format,
        context_full: args.context.into(),
        ..GenerateOptions::default()
    };
    // A grammar that cannot be read was written by whoever called.
    let mut generation = session.generate(&ids, &options).map_err(|e| match e {
        ModelError::Grammar(_) => Failure::usage(e.to_string()),
        e => e.into(),
    })?;
    prefill(&mut generation)?;
    stream(&mut generation, !args.json)?;
    let done = generation.completion();
    if args.json {
        writeln!(terminal::out(), "{}", object(&done))?;
    } else {
        terminal::note(&summary(&done));
    }
    if done.finish_reason == FinishReason::Cancelled {
        return Ok(INTERRUPTED);
    }
    if done.fits_grammar == Some(false) {
        let why = done.finish_reason.name();
        terminal::error(&format!("the text is not whole: it was ended by {why}"));
        return Ok(FAILED);
    }
    Ok(DONE)
}

/// What the text must be.
fn grammar(args: &GenerateArgs) -> Result<Option<Grammar>, Failure> {
    if let Some(pattern) = &args.regex {
        return Ok(Some(Grammar::Regex(pattern.clone())));
    }
    let Some(given) = &args.json_schema else {
        return Ok(None);
    };
    let given = given.trim();
    let (place, text) = if given.starts_with('{') || given == "true" {
        ("--json-schema", given.to_owned())
    } else {
        let text = std::fs::read_to_string(given).map_err(|e| Failure::usage(format!("{given}: {e}")))?;
        (given, text)
    };
    let schema = serde_json::from_str(&text).map_err(|e| Failure::usage(format!("{place}: {e}")))?;
    Ok(Some(Grammar::JsonSchema(schema)))
}

fn read_prompt(prompt: &str) -> Result<String, Failure> {
    if prompt != "-" {
        return Ok(prompt.to_owned());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// The text the model is given, and what its answer looks like.
fn written(bundle: &Bundle, args: &GenerateArgs, prompt: String) -> Result<Prompt, Failure> {
    if args.raw {
        return Ok(Prompt {
            text: prompt,
            format: AnswerFormat::default(),
        });
    }
    let system = args.system.as_ref().map(Message::system);
    let messages: Vec<Message> = system.into_iter().chain([Message::user(prompt)]).collect();
    let template = bundle
        .template()
        .map_err(|e| Failure::usage(format!("{e} (--raw)")))?;
    let options = TemplateOptions {
        enable_thinking: args.think.map(|switch| switch.is_on()),
        ..TemplateOptions::default()
    };
    Ok(template.prompt(&messages, &options)?)
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
    let mut printer = Printer::new();
    loop {
        if interrupt::asked() {
            generation.cancel();
        }
        match generation.step()? {
            Step::Token(piece) if print => printer.print(&piece)?,
            Step::Shifted { dropped, .. } => {
                terminal::note(&format!(
                    "the context is full: its oldest {dropped} tokens are dropped"
                ));
            }
            Step::Finished(_) => break,
            _ => {}
        }
    }
    if print {
        printer.end()?;
    }
    Ok(())
}

/// Prints answers as they come: text on standard output, thinking beside it on standard error.
pub struct Printer {
    thinking: bool,
}

impl Printer {
    pub fn new() -> Self {
        Printer { thinking: false }
    }

    pub fn print(&mut self, piece: &Piece) -> io::Result<()> {
        if !piece.thinking.is_empty() {
            self.thinking = true;
            let mut beside = anstream::AutoStream::auto(io::stderr());
            write!(beside, "{}", styled(FAINT, &piece.thinking))?;
            beside.flush()?;
        }
        if !piece.text.is_empty() {
            self.end_thinking()?;
            let mut out = terminal::out();
            out.write_all(piece.text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }

    fn end_thinking(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.thinking) {
            writeln!(io::stderr(), "\n")?;
        }
        Ok(())
    }

    pub fn end(&mut self) -> io::Result<()> {
        self.end_thinking()?;
        writeln!(terminal::out())
    }
}

fn object(done: &Completion) -> serde_json::Value {
    let mut object = json!({
        "prompt_tokens": done.prompt_tokens,
        "tokens": done.tokens,
        "text": done.text,
        "finish_reason": done.finish_reason.name(),
        "prefill_ms": rounded(done.timings.prefill_ms),
        "decode_ms": rounded(done.timings.decode_ms),
        "decode_tokens_per_s": rounded(done.timings.decode_tokens_per_s()),
    });
    if !done.thinking.is_empty() {
        object["thinking"] = done.thinking.as_str().into();
    }
    if let Some(fits) = done.fits_grammar {
        object["fits_grammar"] = fits.into();
    }
    if done.dropped_tokens > 0 {
        object["dropped_tokens"] = done.dropped_tokens.into();
    }
    object
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// One line about a text: how long, how fast, why it ended.
pub fn summary(done: &Completion) -> String {
    let dropped = match done.dropped_tokens {
        0 => String::new(),
        dropped => format!(", {dropped} dropped"),
    };
    format!(
        "{} prompt tokens ({} known{dropped}) in {:.0} ms, {} tokens at {:.1} tokens/s, ended by {}",
        done.prompt_tokens,
        done.reused_tokens,
        done.timings.prefill_ms,
        done.tokens.len(),
        done.timings.decode_tokens_per_s(),
        done.finish_reason.name()
    )
}
