//! What keeps a server from starting or from running on.

use std::net::SocketAddr;

/// Errors of this crate. What a single request is refused for is told to its client and is none of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model could not be opened.
    #[error("model `{id}`: {source}")]
    Model {
        /// The name it was to be served under.
        id: String,
        /// The engine's or the bundle's reason.
        source: candle_coreml_llm::Error,
    },
    /// Two models have one name.
    #[error("two models are named `{id}`; give one of them another name")]
    SameName {
        /// The name.
        id: String,
    },
    /// There is nothing to serve.
    #[error("no model to serve; at least one is needed")]
    NoModel,
    /// An option is out of range.
    #[error("{option} is {value}, allowed: {allowed}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The address cannot be listened on.
    #[error("{address}: cannot be listened on: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system gave no thread or no timer.
    #[error("the server cannot run: {0}")]
    System(#[from] std::io::Error),
}
