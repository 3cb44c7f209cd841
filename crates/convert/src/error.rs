//! What can go wrong between a checkpoint and a package.

/// Why something could not be converted. Each names the file, tensor, operator or option.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder to write is in use.
    #[error("{path}: something is there already; a folder that does not exist yet or is empty is needed")]
    Occupied {
        /// The folder.
        path: String,
    },
    /// A Core ML file could not be read or written.
    #[error(transparent)]
    Mil(#[from] candle_coreml_mil::Error),
    /// A file is there but does not say what it should.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// What was found and what is allowed.
        problem: String,
    },
    /// A tensor of the checkpoint is missing or is not what the configuration promises.
    #[error("tensor {tensor:?}: {problem}")]
    Tensor {
        /// Its name in the checkpoint.
        tensor: String,
        /// What was found and what is needed.
        problem: String,
    },
    /// The model uses something that is not converted.
    #[error("{file}: not supported: {what}")]
    Unsupported {
        /// The file that says so.
        file: String,
        /// What, and what is supported.
        what: String,
    },
    /// An operator was given what it does not take.
    #[error("operator {op:?}: {problem}")]
    Op {
        /// The operator's name.
        op: String,
        /// What was given and what is allowed.
        problem: String,
    },
    /// An option's value does not fit the model.
    #[error("option {option:?}: {problem}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its value and what is allowed.
        problem: String,
    },
}

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

impl Error {
    pub(crate) fn tensor(tensor: &str, problem: impl Into<String>) -> Self {
        Error::Tensor {
            tensor: tensor.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn op(op: &str, problem: impl Into<String>) -> Self {
        Error::Op {
            op: op.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn malformed(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Malformed {
            file: file.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Error::Io { path, source }
    }
}
