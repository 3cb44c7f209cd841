//! `chat`: a conversation at the terminal.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

use candle_coreml_llm::{Chat, Completion, GenerateOptions, Message};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::ChatArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::generate::{open, summary};
use crate::terminal::{STRONG, styled};
use crate::{demo, interrupt, terminal};

const HELP: &str = "/help    this list\n/reset   forget the conversation\n/system TEXT  start anew with a system message\n\
                    /stats   length and speed of the last answer\n/quit    leave (Ctrl-D does too)\n\
                    Ctrl-C stops an answer.";

pub fn run(args: &ChatArgs) -> Outcome {
    interrupt::install()?;
    let bundle = demo::bundle(args.bundle.as_deref())?;
    let template = bundle.template()?.clone();
    let mut chat = Chat::new(open(&bundle, &args.engine.load_options())?, template);
    if let Some(system) = &args.system {
        chat.push(Message::system(system));
    }
    let seed = args.seed.unwrap_or_else(clock_seed);
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.with(args.temperature, seed),
        stop_strings: args.sampling.stop.clone(),
        ..GenerateOptions::default()
    };
    if std::io::stdin().is_terminal() {
        terminal::note(&format!(
            "{}, {} tokens of context; /help lists commands",
            bundle.name(),
            chat.session().context_tokens()
        ));
    }
    converse(&mut chat, options)
}

fn converse(chat: &mut Chat, mut options: GenerateOptions) -> Outcome {
    let mut editor = DefaultEditor::new()?;
    let mut last = None;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof) => return Ok(DONE),
            Err(ReadlineError::Interrupted) => {
                terminal::note("Ctrl-D or /quit leaves");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        editor.add_history_entry(line)?;
        match line.split_once(' ').unwrap_or((line, "")) {
            ("/quit" | "/exit", _) => return Ok(DONE),
            ("/help", _) => writeln!(terminal::out(), "{HELP}")?,
            ("/reset", _) => chat.reset(),
            ("/system", text) => chat.restart_with_system(text.trim()),
            ("/stats", _) => terminal::note(&stats(chat, last.as_ref())),
            (command, _) if command.starts_with('/') => {
                terminal::note(&format!("no command {command}; /help lists them"))
            }
            _ => last = answer(chat, line, &options)?.or(last),
        }
        // Every answer draws other numbers, and a seed still decides the whole conversation.
        options.sampling.seed = options.sampling.seed.wrapping_add(1);
    }
}

/// Prints an answer as it comes. A prompt the model cannot take is said and ends nothing.
fn answer(chat: &mut Chat, line: &str, options: &GenerateOptions) -> Result<Option<Completion>, Failure> {
    interrupt::clear();
    let mut out = terminal::out();
    let mut written = Ok(());
    let answer = chat.say(line, options, |piece| {
        written = out.write_all(piece.text.as_bytes()).and_then(|()| out.flush());
        if written.is_err() || interrupt::asked() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    written?;
    interrupt::clear();
    match answer {
        Ok(done) => {
            writeln!(out)?;
            Ok(Some(done))
        }
        Err(
            error @ (candle_coreml_llm::Error::PromptTooLong { .. } | candle_coreml_llm::Error::Template(_)),
        ) => {
            terminal::error(&format!(
                "{error}; {} forgets the conversation",
                styled(STRONG, "/reset")
            ));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn stats(chat: &Chat, last: Option<&Completion>) -> String {
    let used = chat.session().tokens().len();
    let context = format!("{used} of {} tokens used", chat.session().context_tokens());
    last.map_or(context.clone(), |done| format!("{}; {context}", summary(done)))
}

fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() ^ u64::from(since.subsec_nanos()) << 20
}
