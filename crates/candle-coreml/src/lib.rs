//! Core ML models with Candle tensors.
mod allowed;
mod config;
mod convert;
mod engine;
mod error;
mod inputs;
mod outputs;
mod value;

pub use config::Config;
pub use engine::EngineKind;
pub use error::{BoxError, Error, FeatureRole};
pub use outputs::Outputs;
pub use value::{Dictionary, Image, Pixels, Sequence, Value};
