//! Language models packaged for Core ML.

mod anemll;
mod bundle;
mod error;
mod model;
mod template;
mod tokenizer;

pub use bundle::{Configs, Files, Meta, PartFiles};
pub use error::Error;
pub use model::{LanguageModel, Prediction};
pub use template::{ChatTemplate, Message};
pub use tokenizer::{TextStream, Tokenizer};
