//! Language models packaged for Core ML: from a folder of packages to streamed text.
//!
//! [`Bundle`] reads the files, [`Session`] runs one conversation token by token, [`Chat`] puts messages on top. The
//! model itself is seen through [`LanguageModel`], so other layouts and fakes take its place. [`EmbeddingModel`] gives
//! texts their vectors; [`perplexity`], [`compare`] and [`score_choices`] measure what a model knows.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//! use candle_coreml_llm::{Bundle, Chat, GenerateOptions, LoadOptions};
//!
//! let bundle = Bundle::open("models/tales")?;
//! let mut chat = Chat::open(&bundle, &LoadOptions::default())?;
//! let answer = chat.say("Tell me a story about a brave mouse.", &GenerateOptions::default(), |piece| {
//!     print!("{}", piece.text);
//!     ControlFlow::Continue(())
//! })?;
//! println!("\n{} tokens/s", answer.timings.decode_tokens_per_s());
//! # Ok::<(), candle_coreml_llm::Error>(())
//! ```
//!
//! What a text must be is a [`Grammar`] (JSON, a schema, a regular expression), and what a full context means a [`ContextFull`]; both
//! are set in [`GenerateOptions`]. A [`ChatTemplate`] writes messages, tools and switches as a [`Prompt`], whose [`AnswerFormat`]
//! has thinking and [`ToolCall`]s told apart from the answer's text:
//!
//! ```no_run
//! use candle_coreml_llm::{Bundle, GenerateOptions, Message, TemplateOptions};
//!
//! let bundle = Bundle::open("models/tales")?;
//! let mut session = bundle.session(&Default::default())?;
//! let prompt = bundle.template()?.prompt(&[Message::user("Hello!")], &TemplateOptions::default())?;
//! let options = GenerateOptions { format: prompt.format, ..GenerateOptions::default() };
//! let ids = bundle.tokenizer().encode(&prompt.text)?;
//! for piece in session.generate(&ids, &options)? {
//!     let piece = piece?;
//!     print!("{}{}", piece.thinking, piece.text);
//!     for call in piece.tool_calls {
//!         println!("{}({:?})", call.name, call.arguments);
//!     }
//! }
//! # Ok::<(), candle_coreml_llm::Error>(())
//! ```

mod anemll;
mod answer;
mod bundle;
mod chat;
mod completion;
mod embedding;
mod error;
mod evaluation;
mod generation;
mod grammar;
mod model;
mod options;
mod part;
mod sampling;
mod saved;
mod session;
mod single;
mod stops;
mod template;
mod tokenizer;
mod tools;
mod wiring;

pub use answer::{AnswerFormat, Thinking};
pub use bundle::{Bundle, ChunkFiles, Configs, ConfiguredFiles, Files, Layout, LoadOptions, Meta, PartFiles};
pub use chat::Chat;
pub use completion::{Completion, FinishReason, Piece, Step, Timings};
pub use embedding::{Embedding, EmbeddingModel, EmbeddingOptions, Pooling, cosine_similarity};
pub use error::Error;
pub use evaluation::{Comparison, Perplexity, Question, Scores, Windows, compare, perplexity, score_choices};
pub use generation::Generation;
pub use grammar::Grammar;
pub use model::{LanguageModel, Prediction};
pub use options::{ContextFull, GenerateOptions, Shift};
pub use sampling::{History, Logprobs, Sampler, Sampling};
pub use session::Session;
pub use template::{ChatTemplate, Message, Prompt, TemplateOptions};
pub use tokenizer::{TextStream, Tokenizer};
pub use tools::{ToolCall, ToolFormat};
pub use wiring::{WiredCall, WiredPort, WiredState, Wiring};

/// The Rust of the guides compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/rust.md")]
#[doc = include_str!("../../../docs/migration.md")]
pub struct Guides;
