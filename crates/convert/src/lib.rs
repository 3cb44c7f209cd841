//! Checkpoints to Core ML packages, and a builder for programs of one's own.
//!
//! [`ProgramBuilder`] writes a package whose functions are made with [`FunctionBuilder`]; operators and their parameters
//! are checked against the specs of the portable engine. [`convert_language_model`] turns a Hugging Face folder or a GGUF
//! file into packages, [`convert_encoder`] one of the BERT family, [`compress_package`] makes the weights of an existing package smaller.

mod builder;
pub mod compress;
mod config;
mod encoder;
mod error;
mod folder;
mod function;
mod gguf;
mod layers;
pub mod literal;
mod lm;
mod reference;
mod weights;

pub use builder::{ProgramBuilder, Weight};
pub use compress::{
    CompressOptions, CompressReport, Compression, Kept, Palette, Progress, Table, compress_package,
};
pub use config::{DecoderConfig, Family, RopeScaling};
pub use encoder::{Activation, EncoderConfig, EncoderOptions, Pooling, convert_encoder, model_type};
pub use error::{Error, Result};
pub use folder::PartialFolder;
pub use function::{Arg, FunctionBuilder, Var};
pub use lm::{LanguageModelOptions, Layout, Plan, convert_language_model, plan_language_model, read_config};
pub use reference::{EncoderReference, ForwardPass, LayerSensitivity, Reference, SensitivityReport};
pub use weights::{Checkpoint, TensorStream};
