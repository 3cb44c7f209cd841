//! The line that is typed: editing, history, completion of commands.

use std::io::IsTerminal;
use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper};

use super::COMMANDS;
use crate::failure::Failure;
use crate::terminal;

/// Lines that are kept.
const HISTORY_LINES: usize = 1000;

/// What was typed.
pub enum Input {
    Line(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of the file.
    End,
}

/// Reads lines; at a terminal with a history that outlives the program.
pub struct LineEditor {
    editor: Editor<Commands, FileHistory>,
    history: Option<PathBuf>,
}

impl LineEditor {
    /// An editor that remembers lines in the user's data folder, if `remember`.
    pub fn new(remember: bool) -> Result<Self, Failure> {
        let config = Config::builder()
            .max_history_size(HISTORY_LINES)?
            .history_ignore_dups(true)?
            .history_ignore_space(true)
            .build();
        let mut editor = Editor::with_config(config)?;
        editor.set_helper(Some(Commands));
        let wanted = remember && std::io::stdin().is_terminal();
        let history = dirs::data_dir()
            .filter(|_| wanted)
            .map(|folder| folder.join("candle-coreml").join("chat_history.txt"));
        if let Some(file) = &history {
            // The first time there is none, and a broken one is as good as none.
            let _ = editor.load_history(file);
        }
        Ok(LineEditor { editor, history })
    }

    pub fn read(&mut self) -> Result<Input, Failure> {
        let line = match self.editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof) => return Ok(Input::End),
            Err(ReadlineError::Interrupted) => return Ok(Input::Interrupted),
            Err(error) => return Err(error.into()),
        };
        if !line.trim().is_empty() {
            self.editor.add_history_entry(line.as_str())?;
            self.keep_history();
        }
        Ok(Input::Line(line.replace("\\\n", "\n")))
    }

    /// Lines up to one that is a single dot, to Ctrl-D, or none of them after Ctrl-C.
    pub fn read_lines(&mut self) -> Result<String, Failure> {
        let mut lines: Vec<String> = Vec::new();
        loop {
            match self.editor.readline("| ") {
                Ok(line) if line.trim() == "." => return Ok(lines.join("\n")),
                Ok(line) => lines.push(line),
                Err(ReadlineError::Eof) => return Ok(lines.join("\n")),
                Err(ReadlineError::Interrupted) => return Ok(String::new()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Written after every line, so that nothing is lost however the program ends.
    fn keep_history(&mut self) {
        let Some(file) = &self.history else { return };
        let folder = file.parent().map_or(Ok(()), std::fs::create_dir_all);
        let kept = folder
            .map_err(ReadlineError::from)
            .and_then(|()| self.editor.save_history(file));
        if let Err(error) = kept {
            terminal::note(&format!("no history: {}: {error}", file.display()));
            self.history = None;
        }
    }
}

/// Completes commands and asks for another line after a backslash.
struct Commands;

impl Completer for Commands {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _context: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..position).unwrap_or(line);
        let names = COMMANDS.iter().map(|(name, argument, _)| match *argument {
            "" => (*name).to_owned(),
            _ => format!("{name} "),
        });
        let matching = names.filter(|name| typed.starts_with('/') && name.starts_with(typed));
        Ok((0, matching.collect()))
    }
}

impl Validator for Commands {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if context.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Hinter for Commands {
    type Hint = String;
}

impl Highlighter for Commands {}

impl Helper for Commands {}
