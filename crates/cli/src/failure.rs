//! How commands end: exit codes and what is said about a failure.

use std::any::Any;
use std::error::Error;
use std::io;

/// Done.
pub const DONE: u8 = 0;
/// Something failed while the command ran.
pub const FAILED: u8 = 1;
/// The command was called wrongly.
pub const USAGE: u8 = 2;
/// The model has operators the portable engine lacks.
pub const LACKING: u8 = 3;
/// Ctrl-C, as shells number it.
pub const INTERRUPTED: u8 = 130;

/// What a command gives: its exit code, or why it failed.
pub type Outcome = Result<u8, Failure>;

/// A failure with its exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
    broken_pipe: bool,
}

impl Failure {
    /// A call that cannot be meant.
    pub fn usage(message: impl Into<String>) -> Self {
        Failure {
            code: USAGE,
            message: message.into(),
            broken_pipe: false,
        }
    }

    /// A failure in words of its own.
    pub fn new(message: impl Into<String>) -> Self {
        Failure {
            code: FAILED,
            message: message.into(),
            broken_pipe: false,
        }
    }

    pub fn code(&self) -> u8 {
        self.code
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    pub fn is_broken_pipe(&self) -> bool {
        self.broken_pipe
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let io = (&error as &dyn Any).downcast_ref::<io::Error>();
        let broken_pipe = io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
            || error
                .source()
                .and_then(|s| s.downcast_ref::<io::Error>())
                .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe);
        Failure {
            code: FAILED,
            message: error.to_string(),
            broken_pipe,
        }
    }
}
