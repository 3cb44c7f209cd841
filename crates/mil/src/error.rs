//! What can be wrong with a model file, with the place where it is.

use std::fmt::Display;

/// Why a model file could not be read, checked or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path that would leave the model's own folder.
    #[error("path {path:?} leaves the model's folder: only relative paths without `..` are allowed")]
    OutsideModel {
        /// The path as written.
        path: String,
    },
    /// Nothing at this path is a Core ML model, or part of it is missing.
    #[error("{path}: {problem}")]
    NotAModel {
        /// The path.
        path: String,
        /// What was found and what is expected.
        problem: String,
    },
    /// A file is larger than its format allows.
    #[error("{path}: {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size in bytes.
        bytes: u64,
        /// The largest size allowed, in bytes.
        limit: u64,
    },
    /// A file is not the protobuf message it should be.
    #[error("{path}: not a Core ML specification: {source}")]
    Protobuf {
        /// The file.
        path: String,
        /// What the decoder said.
        source: prost::DecodeError,
    },
    /// A JSON file is malformed.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: String,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A well-formed file says something that cannot be.
    #[error("{path}: {problem}")]
    Content {
        /// The file.
        path: String,
        /// The place in it, what was found and what is allowed.
        problem: String,
    },
    /// MIL text that does not follow the grammar.
    #[error("{path}:{line}:{column}: {problem}")]
    Text {
        /// The file.
        path: String,
        /// Line, the first is 1.
        line: usize,
        /// Column in characters, the first is 1.
        column: usize,
        /// What was found and what is expected.
        problem: String,
    },
    /// A weight file that the program refers to cannot be read.
    #[error("{program}: its weights {weights} cannot be read: {source}")]
    Weights {
        /// The program's file.
        program: String,
        /// The weight file as the program has it.
        weights: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A weight blob is not what the program says.
    #[error("{path}: blob at offset {offset}: {problem}")]
    Blob {
        /// The weight file.
        path: String,
        /// Offset of the blob's metadata record in bytes.
        offset: u64,
        /// What was found and what is expected.
        problem: String,
    },
    /// A program that breaks a rule every program keeps.
    #[error("{path}: {source}")]
    Program {
        /// The file.
        path: String,
        /// The rule and the place.
        source: crate::ProgramError,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong, before the file it is in is known; places are put in front of it on the way up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem(String);

impl Problem {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Problem(text.into())
    }

    pub(crate) fn within(self, place: impl Display) -> Self {
        Problem(format!("{place}: {}", self.0))
    }

    pub(crate) fn in_file(self, path: impl Into<String>) -> Error {
        Error::Content {
            path: path.into(),
            problem: self.0,
        }
    }

    pub(crate) fn into_text(self) -> String {
        self.0
    }
}

/// A [`Problem`] from format arguments.
macro_rules! problem {
    ($($arg:tt)*) => { $crate::error::Problem::new(format!($($arg)*)) };
}
pub(crate) use problem;
