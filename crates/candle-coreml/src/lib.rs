//! Core ML models with Candle tensors.
//!
//! A Core ML model (`.mlpackage`, `.mlmodel`, `.mlmodelc`) is opened and run with [`candle_core::Tensor`]s: on Apple systems
//! by CoreML.framework (Neural Engine, GPU, CPU), everywhere by the portable engine, which reads the same files and runs
//! the program itself. What is said here holds for both.
//!
//! ```no_run
//! use candle_core::{DType, Device, Tensor};
//! use candle_coreml::CoreMLModel;
//!
//! let model = CoreMLModel::load("model.mlpackage")?;
//! let image = Tensor::zeros((1, 3, 224, 224), DType::F32, &Device::Cpu)?;
//! let logits = model.forward(&[&image])?;
//! # Ok::<(), candle_coreml::Error>(())
//! ```
//!
//! - [`CoreMLModelBuilder`] chooses function, engine, compute units, numerics and threads.
//! - [`CoreMLModel::predict`] takes tensors by name, [`CoreMLModel::predict_values`] pictures, strings and the rest too.
//! - [`CoreMLModel::make_state`] and [`CoreMLModel::predict_with_state`] run models that remember, such as language models
//!   with a key-value cache.
//! - [`Error`] says which input was wrong, what came and what is allowed.

mod allowed;
mod builder;
mod config;
mod convert;
mod engine;
mod error;
mod inputs;
mod model;
mod outputs;
mod state;
mod trace;
mod value;

pub use builder::{ComputeUnits, CoreMLModelBuilder, Numerics, compute_devices};
pub use candle_coreml_apple::plan::{ComputeDevice, ComputePlan, DeviceShare, PlannedOperation};
pub use candle_coreml_apple::{ReshapeFrequency, Specialization};
pub use candle_coreml_mil::{
    ArrayDescription, ColorSpace, DType as ElementType, Description, Feature, FeatureType, Flexibility,
    FunctionDescription, ImageDescription, Metadata, ModelKind, Source,
};
pub use config::Config;
pub use engine::EngineKind;
pub use error::{BoxError, Error, FeatureRole};
pub use model::CoreMLModel;
pub use outputs::Outputs;
pub use state::CoreMLState;
pub use trace::TracedStep;
pub use value::{ArrayView, Dictionary, Elements, Given, Image, Pixels, Sequence, Value};
