//! Language models packaged for Core ML: from a folder of packages to streamed text.
//!
//! [`Bundle`] reads the files, [`Session`] runs one conversation token by token, [`Chat`] puts messages on top. The
//! model itself is seen through [`LanguageModel`], so other layouts and fakes take its place. [`EmbeddingModel`] gives
//! texts their vectors.
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

mod anemll;
mod bundle;
mod chat;
mod embedding;
mod error;
mod model;
mod part;
mod sampling;
mod saved;
mod session;
mod single;
mod stops;
mod template;
mod tokenizer;
mod wiring;

pub use bundle::{Bundle, ChunkFiles, Configs, ConfiguredFiles, Files, Layout, LoadOptions, Meta, PartFiles};
pub use chat::Chat;
pub use embedding::{Embedding, EmbeddingModel, EmbeddingOptions, Pooling, cosine_similarity};
pub use error::Error;
pub use model::{LanguageModel, Prediction};
pub use sampling::{History, Logprobs, Sampler, Sampling};
pub use session::{Completion, FinishReason, GenerateOptions, Generation, Piece, Session, Step, Timings};
pub use template::{ChatTemplate, Message};
pub use tokenizer::{TextStream, Tokenizer};
pub use wiring::{WiredCall, WiredPort, WiredState, Wiring};
