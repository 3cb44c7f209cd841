//! What can go wrong between a folder of files and the text a model says.

use std::error::Error as StdError;

/// Errors of this crate. Each names the file or the option, what was found and what is allowed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the bundle could not be read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// Path of the file.
        file: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bundle lacks a file that every bundle has.
    #[error("{bundle}: `{file}` is missing ({purpose})")]
    MissingFile {
        /// Name or path of the bundle.
        bundle: String,
        /// The file looked for.
        file: String,
        /// What it is for.
        purpose: &'static str,
    },
    /// A model part was not found under any of its possible names.
    #[error("{bundle}: the {part} is missing; looked for {}", tried.join(", "))]
    MissingPart {
        /// Name or path of the bundle.
        bundle: String,
        /// Which part: `embeddings`, `chunk 1 of 2`, `language head`.
        part: String,
        /// The names that were tried.
        tried: Vec<String>,
    },
    /// A package or compiled model is there but not whole.
    #[error("{file}: incomplete: it has no `{missing}`")]
    IncompletePart {
        /// The package.
        file: String,
        /// What it lacks.
        missing: &'static str,
    },
    /// A file is there but does not say what it should.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong, with the place where known.
        reason: String,
    },
    /// The bundle uses something this version does not run.
    #[error("{file}: not supported: {what}")]
    Unsupported {
        /// The bundle or file.
        file: String,
        /// What is not supported and what is.
        what: String,
    },
    /// A part's inputs, outputs or states do not fit the layout.
    #[error("{part}, function `{function}`: {what}")]
    Wiring {
        /// The part's file name.
        part: String,
        /// The function looked at.
        function: String,
        /// What does not fit, and what would.
        what: String,
    },
    /// A saved conversation could not be written or read, or belongs to another model.
    #[error("{file}: {reason}")]
    Session {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The engine refused or failed.
    #[error("{part}: {source}")]
    Engine {
        /// The part's file name.
        part: String,
        /// The engine's error.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A tensor operation at the engine's border failed.
    #[error("tensor: {0}")]
    Tensor(#[from] candle_core::Error),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template could not be read or refused the messages.
    #[error("chat template: {0}")]
    Template(String),
    /// The bundle has no chat template.
    #[error(
        "{bundle}: no chat template in `tokenizer_config.json` or `chat_template.jinja`; give the prompt as raw text"
    )]
    NoTemplate {
        /// Name or path of the bundle.
        bundle: String,
    },
    /// A prompt has no tokens.
    #[error("the prompt is empty; at least one token is needed")]
    EmptyPrompt,
    /// A prompt does not fit the model's context.
    #[error("the prompt has {tokens} tokens, the model's context holds {context}")]
    PromptTooLong {
        /// Tokens in the prompt.
        tokens: usize,
        /// Tokens the context holds.
        context: usize,
    },
    /// A token id is outside the model's vocabulary.
    #[error("token {index} of the prompt is {token}, the vocabulary has {vocabulary} tokens")]
    TokenOutside {
        /// Place in the prompt, from 0.
        index: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// A text to embed has no tokens, and the model's tokenizer adds none.
    #[error("text {index} has no tokens; at least one is needed")]
    EmptyText {
        /// Place among the texts, from 0.
        index: usize,
    },
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
    /// Sampling was asked of a model that gives its best token and no logits.
    #[error(
        "this model chooses the best token itself and gives no logits; only temperature 0 is possible, without penalties, \
         log probabilities or a grammar"
    )]
    NoLogits,
    /// A grammar could not be read, or is more than can be followed.
    #[error("grammar: {0}")]
    Grammar(String),
    /// Every logit of a step is NaN.
    #[error("all {vocabulary} logits at position {position} are NaN")]
    AllNan {
        /// The position computed.
        position: usize,
        /// Number of logits.
        vocabulary: usize,
    },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Tensor(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}
