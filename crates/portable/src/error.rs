//! What can go wrong while a program is lowered, planned or run.

use candle_coreml_mil as mil;

/// Errors of the portable engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be read.
    #[error(transparent)]
    Mil(#[from] mil::Error),
    /// The file holds another kind of model.
    #[error(
        "the model is a {kind}, and this engine runs ML Programs only; convert it again with `convert_to=\"mlprogram\"`"
    )]
    NotAProgram {
        /// The protobuf's name of the kind.
        kind: String,
    },
    /// The program uses operations this engine does not have; all of them are listed.
    #[error("operations that are not supported: {}", ops.join(", "))]
    Unsupported {
        /// Each name once, with the number of uses.
        ops: Vec<String>,
    },
    /// No function of that name.
    #[error("no function {name:?}; the model has: {}", available.join(", "))]
    NoFunction {
        /// The name asked for.
        name: String,
        /// The functions there are.
        available: Vec<String>,
    },
    /// A node that cannot be lowered: attributes, types or shapes do not fit.
    #[error("node {node:?} ({op}): {message}")]
    Node {
        /// The operation's name in the file, or its first result.
        node: String,
        /// The operator.
        op: String,
        /// What was found and what is allowed.
        message: String,
    },
    /// An input or state given by the caller does not fit.
    #[error("{what} {name:?}: {message}")]
    Value {
        /// `input` or `state`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What came and what is allowed.
        message: String,
    },
    /// A prediction of a model with states was asked for without a state.
    #[error("the function has states ({}) and needs a state made by `make_state`", names.join(", "))]
    NeedsState {
        /// Names of the states.
        names: Vec<String>,
    },
    /// A mistake of the engine, not of the file: please report it.
    #[error("internal: {message}")]
    Internal {
        /// Where and what.
        message: String,
    },
}

/// What an operation's lowering or evaluation says; the node's name is added by the caller.
#[derive(Debug)]
pub enum OpError {
    /// Attributes, types or shapes do not fit.
    Message(String),
    /// The value of this parameter is needed, and is known only when the model runs.
    Dynamic(String),
    /// An operation inside a block of this one failed.
    Inner(Box<Error>),
}

impl OpError {
    /// An error with this text.
    pub fn new(message: impl Into<String>) -> OpError {
        OpError::Message(message.into())
    }
}

impl From<String> for OpError {
    fn from(message: String) -> OpError {
        OpError::Message(message)
    }
}

impl From<&str> for OpError {
    fn from(message: &str) -> OpError {
        OpError::Message(message.to_string())
    }
}

impl std::fmt::Display for OpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            OpError::Message(m) => f.write_str(m),
            OpError::Inner(e) => e.fmt(f),
            OpError::Dynamic(name) => write!(f, "the value of {name:?} is known only when the model runs"),
        }
    }
}

/// Result of an operation's lowering or evaluation.
pub type OpResult<T> = std::result::Result<T, OpError>;
