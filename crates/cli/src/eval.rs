//! `eval`: what a model knows, and how far it is from the one it was made from.

use std::io::Write;
use std::path::Path;

use candle_coreml_llm::{
    Bundle, Comparison, LanguageModel, Perplexity, Question, Scores, Windows, compare, perplexity,
    score_choices,
};
use serde_json::json;

use crate::args::{ChoicesArgs, EngineArgs, EvalCommand, PerplexityArgs};
use crate::failure::{DONE, Failure, INTERRUPTED, Outcome};
use crate::{demo, interrupt, terminal};

pub fn run(command: &EvalCommand) -> Outcome {
    interrupt::install()?;
    match command {
        EvalCommand::Perplexity(args) => measure_perplexity(args),
        EvalCommand::Choices(args) => measure_choices(args),
    }
}

fn open(path: Option<&Path>, engine: &EngineArgs) -> Result<(Bundle, Box<dyn LanguageModel>), Failure> {
    Ok(demo::model(path, &engine.load_options())?)
}

fn read(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|e| Failure::usage(format!("{}: {e}", file.display())))
}

fn measure_perplexity(args: &PerplexityArgs) -> Outcome {
    let text = read(&args.file)?;
    let (bundle, mut model) = open(args.bundle.as_deref(), &args.engine)?;
    let base = args
        .compare
        .as_deref()
        .map(|path| open(Some(path), &args.engine))
        .transpose()?;
    let context = base
        .as_ref()
        .map_or(usize::MAX, |(_, base)| base.context_tokens())
        .min(model.context_tokens());
    let tokens = args.window.unwrap_or(context);
    let windows = Windows {
        tokens,
        stride: args.stride.unwrap_or(tokens.div_ceil(2)),
    };
    let bar = terminal::bar("tokens", 0);
    let progress = |done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        !interrupt::asked() && args.limit.is_none_or(|limit| done < limit)
    };
    let tokenizer = bundle.tokenizer();
    let name = bundle.name();
    let report = match base {
        None => {
            let found = perplexity(model.as_mut(), tokenizer, &text, windows, progress)?;
            Report::One { name, found }
        }
        Some((other, mut base)) => {
            if other.tokenizer().encode(&text)? != tokenizer.encode(&text)? {
                return Err(Failure::new(format!(
                    "{} and {name} cut the text into different tokens: they cannot be compared",
                    other.name()
                )));
            }
            let found = compare(model.as_mut(), base.as_mut(), tokenizer, &text, windows, progress)?;
            Report::Two {
                name,
                base: other.name(),
                found,
            }
        }
    };
    bar.finish_and_clear();
    if args.json {
        writeln!(terminal::out(), "{}", report.object(windows))?;
    } else {
        report.print(windows)?;
    }
    Ok(if interrupt::asked() { INTERRUPTED } else { DONE })
}

/// What was found of one model, or of two.
enum Report {
    One {
        name: String,
        found: Perplexity,
    },
    Two {
        name: String,
        base: String,
        found: Comparison,
    },
}

impl Report {
    fn print(&self, windows: Windows) -> Result<(), Failure> {
        let mut out = terminal::out();
        let tokens = match self {
            Report::One { name, found } => {
                writeln!(out, "perplexity {} ({name})", plus_minus(found))?;
                found.tokens
            }
            Report::Two { name, base, found } => {
                let ratio = found.log_ratio.exp();
                writeln!(out, "perplexity     {} ({name})", plus_minus(&found.model))?;
                writeln!(out, "compared with  {} ({base})", plus_minus(&found.base))?;
                writeln!(
                    out,
                    "ratio          {ratio:.4} ± {:.4}",
                    ratio * found.stderr_log_ratio
                )?;
                writeln!(
                    out,
                    "KL divergence  {:.5} ± {:.5} nats a token, {:.3} at most",
                    found.mean_kl, found.stderr_kl, found.max_kl
                )?;
                writeln!(out, "same best      {:.2} %", found.same_best * 100.0)?;
                found.model.tokens
            }
        };
        terminal::note(&format!(
            "{tokens} tokens, in windows of {} every {}",
            windows.tokens, windows.stride
        ));
        Ok(())
    }

    fn object(&self, windows: Windows) -> serde_json::Value {
        let one = |name: &str, found: &Perplexity| {
            json!({"model": name, "perplexity": found.value(), "stderr": found.stderr(),
                "mean_nll": found.mean_nll, "stderr_nll": found.stderr_nll})
        };
        let (mut object, tokens) = match self {
            Report::One { name, found } => (one(name, found), found.tokens),
            Report::Two { name, base, found } => {
                let mut object = one(name, &found.model);
                object["compared_with"] = one(base, &found.base);
                object["ratio"] = found.log_ratio.exp().into();
                object["stderr_log_ratio"] = found.stderr_log_ratio.into();
                object["mean_kl"] = found.mean_kl.into();
                object["stderr_kl"] = found.stderr_kl.into();
                object["max_kl"] = found.max_kl.into();
                object["same_best"] = found.same_best.into();
                (object, found.model.tokens)
            }
        };
        object["tokens"] = tokens.into();
        object["window"] = windows.tokens.into();
        object["stride"] = windows.stride.into();
        object
    }
}

fn plus_minus(found: &Perplexity) -> String {
    format!("{:.4} ± {:.4}", found.value(), found.stderr())
}

/// Answers counted: how many questions, how many right by either measure.
#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    questions: usize,
    right: usize,
    right_per_character: usize,
}

impl Tally {
    fn add(&mut self, question: &Question, scores: &Scores) {
        self.questions += 1;
        self.right += usize::from(scores.best == question.answer);
        self.right_per_character += usize::from(scores.best_per_character == question.answer);
    }

    /// The part that is right, with its standard error.
    fn accuracy(self, right: usize) -> (f64, f64) {
        let count = self.questions as f64;
        let part = right as f64 / count;
        let error = if self.questions > 1 {
            (part * (1.0 - part) / (count - 1.0)).sqrt()
        } else {
            0.0
        };
        (part, error)
    }

    fn object(self, name: &str) -> serde_json::Value {
        let ((all, error), (each, error_each)) =
            (self.accuracy(self.right), self.accuracy(self.right_per_character));
        json!({"model": name, "questions": self.questions, "accuracy": all, "stderr": error,
            "accuracy_per_character": each, "stderr_per_character": error_each})
    }

    fn line(self, name: &str) -> String {
        let ((all, error), (each, error_each)) =
            (self.accuracy(self.right), self.accuracy(self.right_per_character));
        format!("accuracy {all:.4} ± {error:.4}, per character {each:.4} ± {error_each:.4} ({name})")
    }
}

fn questions(args: &ChoicesArgs) -> Result<Vec<Question>, Failure> {
    let text = read(&args.file)?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    let read = lines.map(|(at, line)| {
        let question: Question = serde_json::from_str(line).map_err(|e| {
            // Each line is a document of its own, whose only line is the first.
            let what = e.to_string().replace(" at line 1 column ", ", column ");
            Failure::usage(format!("{}, line {}: {what}", args.file.display(), at + 1))
        })?;
        if question.answer >= question.choices.len() {
            return Err(Failure::usage(format!(
                "{}, line {}: the answer is {}, the choices are {} (counted from 0)",
                args.file.display(),
                at + 1,
                question.answer,
                question.choices.len()
            )));
        }
        Ok(question)
    });
    let questions: Vec<Question> = read
        .take(args.limit.unwrap_or(usize::MAX))
        .collect::<Result<_, _>>()?;
    if questions.is_empty() {
        return Err(Failure::usage(format!("{}: no question", args.file.display())));
    }
    Ok(questions)
}

fn measure_choices(args: &ChoicesArgs) -> Outcome {
    let questions = questions(args)?;
    let (bundle, mut model) = open(args.bundle.as_deref(), &args.engine)?;
    let mut base = args
        .compare
        .as_deref()
        .map(|path| open(Some(path), &args.engine))
        .transpose()?;
    let (mut own, mut other, mut same) = (Tally::default(), Tally::default(), 0);
    let bar = terminal::bar("questions", questions.len() as u64);
    for question in &questions {
        if interrupt::asked() {
            bar.finish_and_clear();
            return Ok(INTERRUPTED);
        }
        let scores = score_choices(model.as_mut(), bundle.tokenizer(), question)?;
        own.add(question, &scores);
        if let Some((bundle, base)) = &mut base {
            let found = score_choices(base.as_mut(), bundle.tokenizer(), question)?;
            other.add(question, &found);
            same += usize::from(found.best == scores.best);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut out = terminal::out();
    let agreement = same as f64 / questions.len() as f64;
    if args.json {
        let mut object = own.object(&bundle.name());
        if let Some((bundle, _)) = &base {
            object["compared_with"] = other.object(&bundle.name());
            object["same_choice"] = agreement.into();
        }
        writeln!(out, "{object}")?;
        return Ok(DONE);
    }
    writeln!(out, "{}", own.line(&bundle.name()))?;
    if let Some((bundle, _)) = &base {
        writeln!(out, "{}", other.line(&bundle.name()))?;
        writeln!(out, "same choice {:.2} %", agreement * 100.0)?;
    }
    terminal::note(&format!("{} questions", questions.len()));
    Ok(DONE)
}
