//! `chat`: a conversation at the terminal.

mod editor;

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use candle_coreml_llm::{Bundle, Chat, Completion, GenerateOptions, Message, Step, TemplateOptions};

use crate::args::ChatArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::generate::{Printer, summary};
use crate::terminal::{STRONG, styled};
use crate::{demo, interrupt, terminal};
use editor::{Input, LineEditor};

/// Commands with what they do, for /help and for completion.
const COMMANDS: [(&str, &str, &str); 11] = [
    ("/help", "", "this list"),
    ("/reset", "", "forget the conversation"),
    ("/system", "TEXT", "start anew with a system message"),
    ("/retry", "", "another answer to what was said last"),
    ("/undo", "", "take back what was said last, with its answer"),
    (
        "/save",
        "FILE",
        "write the conversation with what was computed of it",
    ),
    ("/load", "FILE", "take up a conversation that was saved"),
    (
        "/think",
        "on|off",
        "thinking, with models that have a switch for it",
    ),
    (
        "/stats",
        "",
        "the last answer's length and speed, and how full the context is",
    ),
    ("/multi", "", "several lines, up to one that is a single dot"),
    ("/quit", "", "leave (Ctrl-D does too)"),
];

pub fn run(args: &ChatArgs) -> Outcome {
    let at_terminal = std::io::stdin().is_terminal();
    // Without a terminal there is no line at which a Ctrl-C could be only that of an answer.
    if at_terminal {
        interrupt::install_for_answers()?;
    }
    let (bundle, model) = demo::model(args.bundle.as_deref(), &args.engine.load_options())?;
    let template = bundle.template()?.clone();
    let mut chat = Chat::new(bundle.session_of(model), template);
    if let Some(system) = &args.system {
        chat.push(Message::system(system));
    }
    let template_options = TemplateOptions {
        enable_thinking: args.think.map(|switch| switch.is_on()),
        ..TemplateOptions::default()
    };
    chat.set_template_options(template_options);
    let seed = args.seed.unwrap_or_else(clock_seed);
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.with(args.temperature, seed),
        stop_strings: args.sampling.stop.clone(),
        context_full: args.context.into(),
        ..GenerateOptions::default()
    };
    if at_terminal {
        terminal::note(&format!(
            "{}, {} tokens of context; /help lists commands",
            bundle.name(),
            chat.session().context_tokens()
        ));
    }
    let mut talk = Talk {
        chat,
        options,
        bundle,
        fingerprint: None,
        last: None,
    };
    talk.converse(LineEditor::new(!args.no_history)?)
}

/// A conversation with what is known about it.
struct Talk {
    chat: Chat,
    options: GenerateOptions,
    bundle: Bundle,
    /// The packages' hash, once a conversation was saved or loaded.
    fingerprint: Option<String>,
    last: Option<Answered>,
}

/// An answer with the time to its first token.
struct Answered {
    completion: Completion,
    first_token_ms: f64,
}

/// What a Ctrl-C, or a closed output, makes of an answer.
type Answering<'a> = &'a mut dyn FnMut(&Step) -> ControlFlow<()>;

impl Talk {
    fn converse(&mut self, mut editor: LineEditor) -> Outcome {
        loop {
            let line = match editor.read()? {
                Input::Line(line) => line,
                Input::End => return Ok(DONE),
                Input::Interrupted => {
                    terminal::note("Ctrl-D or /quit leaves");
                    continue;
                }
            };
            let said = line.trim();
            let (command, rest) = said.split_once(char::is_whitespace).unwrap_or((said, ""));
            match command {
                "" => continue,
                "/quit" | "/exit" => return Ok(DONE),
                "/multi" => match editor.read_lines()? {
                    text if text.trim().is_empty() => continue,
                    text => self.say(&text)?,
                },
                _ if command.starts_with('/') => self.command(command, rest.trim())?,
                _ => self.say(said)?,
            }
        }
    }

    fn command(&mut self, command: &str, rest: &str) -> Result<(), Failure> {
        match (command, rest) {
            ("/help", _) => help()?,
            ("/reset", _) => {
                self.chat.reset();
                self.last = None;
            }
            ("/system", text) => self.chat.restart_with_system(text),
            ("/retry", _) => {
                let retried = self.answer(|chat, options, on_step| chat.retry(options, on_step))?;
                if !retried {
                    terminal::note("nothing was said yet");
                }
            }
            ("/undo", _) => match self.chat.undo() {
                Some(said) => terminal::note(&format!("taken back: {said}")),
                None => terminal::note("nothing was said yet"),
            },
            ("/save" | "/load", "") => terminal::note(&format!("{command} takes the name of a file")),
            ("/save", file) => self.save(file)?,
            ("/load", file) => self.load(file)?,
            ("/think", switch @ ("on" | "off")) => self.think(switch == "on"),
            ("/think", _) => terminal::note("/think takes on or off"),
            ("/stats", _) => terminal::note(&self.stats()),
            _ => terminal::note(&format!("no command {command}; /help lists them")),
        }
        Ok(())
    }

    fn think(&mut self, on: bool) {
        let template = self.bundle.template();
        if !template.is_ok_and(|template| template.knows("enable_thinking") || template.knows("thinking")) {
            terminal::note("this model's template has no switch for thinking");
            return;
        }
        self.chat.set_template_options(TemplateOptions {
            enable_thinking: Some(on),
            ..TemplateOptions::default()
        });
    }

    fn say(&mut self, text: &str) -> Result<(), Failure> {
        self.chat.push(Message::user(text));
        let answered = self.answer(|chat, options, on_step| chat.answer(options, on_step).map(Some))?;
        if !answered {
            self.chat.undo();
        }
        Ok(())
    }

    /// Prints an answer as it comes; false when there is none. A prompt the model cannot take is said and ends nothing.
    fn answer(
        &mut self,
        ask: impl FnOnce(
            &mut Chat,
            &GenerateOptions,
            Answering<'_>,
        ) -> Result<Option<Completion>, candle_coreml_llm::Error>,
    ) -> Result<bool, Failure> {
        use candle_coreml_llm::Error::{PromptTooLong, Template};
        interrupt::clear();
        let (start, mut first_token_ms) = (Instant::now(), 0.0);
        let mut printer = Printer::new();
        let mut written = Ok(());
        let mut dropped = self.chat.dropped_messages();
        let answer = ask(&mut self.chat, &self.options, &mut |step: &Step| {
            match step {
                Step::Token(piece) => {
                    if first_token_ms == 0.0 {
                        first_token_ms = start.elapsed().as_secs_f64() * 1000.0;
                    }
                    written = printer.print(piece);
                }
                Step::Shifted { dropped, .. } => {
                    terminal::note(&format!(
                        " [the context is full: its oldest {dropped} tokens are dropped]"
                    ));
                }
                _ => {}
            }
            if written.is_err() || interrupt::asked() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        written?;
        interrupt::clear();
        // Every answer draws other numbers, and a seed still decides the whole conversation.
        self.options.sampling.seed = self.options.sampling.seed.wrapping_add(1);
        let completion = match answer {
            Ok(Some(completion)) => completion,
            Ok(None) => return Ok(false),
            Err(error @ (PromptTooLong { .. } | Template(_))) => {
                let reset = styled(STRONG, "/reset");
                terminal::error(&format!("{error}; {reset} forgets the conversation"));
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        printer.end()?;
        dropped = self.chat.dropped_messages().saturating_sub(dropped);
        if dropped > 0 {
            terminal::note(&format!(
                "[the context was full: the model no longer sees {dropped} of the oldest messages]"
            ));
        }
        self.last = Some(Answered {
            completion,
            first_token_ms,
        });
        Ok(true)
    }

    fn fingerprint(&mut self) -> Result<String, Failure> {
        if self.fingerprint.is_none() {
            self.fingerprint = Some(self.bundle.fingerprint()?);
        }
        Ok(self.fingerprint.clone().unwrap_or_default())
    }

    fn save(&mut self, file: &str) -> Result<(), Failure> {
        let model = self.fingerprint()?;
        match self.chat.save(file, &model) {
            Ok(()) => terminal::note(&format!("saved to {file}")),
            Err(error) => terminal::error(&error.to_string()),
        }
        Ok(())
    }

    fn load(&mut self, file: &str) -> Result<(), Failure> {
        let model = self.fingerprint()?;
        if let Err(error) = self.chat.load(file, &model) {
            terminal::error(&error.to_string());
            return Ok(());
        }
        self.last = None;
        let messages = self.chat.messages();
        terminal::note(&format!(
            "{} messages, {} tokens, all but {} of them computed",
            messages.len(),
            self.chat.session().tokens().len(),
            self.chat.session().tokens().len() - self.chat.session().cached_tokens(),
        ));
        if let Some(message) = messages.last() {
            terminal::note(&format!("{}: {}", message.role, message.content));
        }
        Ok(())
    }

    fn stats(&self) -> String {
        let session = self.chat.session();
        let context = format!(
            "{} of {} tokens used",
            session.tokens().len(),
            session.context_tokens()
        );
        match &self.last {
            None => context,
            Some(last) => format!(
                "{}; first token after {:.0} ms; {context}",
                summary(&last.completion),
                last.first_token_ms
            ),
        }
    }
}

fn help() -> Result<(), Failure> {
    let mut out = terminal::out();
    for (name, argument, what) in COMMANDS {
        writeln!(out, "{:<16} {what}", format!("{name} {argument}"))?;
    }
    writeln!(
        out,
        "A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."
    )?;
    Ok(())
}

fn clock_seed() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() ^ u64::from(since.subsec_nanos()) << 20
}
