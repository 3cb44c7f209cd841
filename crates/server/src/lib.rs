//! Core ML language models over HTTP, as OpenAI's clients speak it.
//!
//! `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` and `/v1/models`, with streams, tools and forms of JSON;
//! `/health`, `/metrics` for Prometheus, and a page to chat on at `/`. Texts take turns step by step, each with a state
//! of its own; the states of finished conversations are kept, so that the next turn computes its new tokens only.
//!
//! ```no_run
//! use candle_coreml_llm::Bundle;
//! use candle_coreml_server::{Model, Options, Server};
//!
//! let bundle = Bundle::open("models/tales")?;
//! let model = Model::open("tales", &bundle, &Default::default())?;
//! let server = Server::bind(vec![model], Options::default())?;
//! println!("http://{}", server.address());
//! server.run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod app;
mod asked;
mod error;
mod json;
mod listen;
mod metrics;
mod models;
mod options;
mod refusal;
mod routes;
mod run;
mod scheduler;
mod server;
mod sse;

pub use error::Error;
pub use models::Model;
pub use options::Options;
pub use server::{Handle, Server};
