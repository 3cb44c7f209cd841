//! Opening a model: where it is, which function, which engine, and how that is to compute.

use crate::config::Config;
use crate::engine::{self, EngineKind};
use crate::error::Error;
use crate::model::CoreMLModel;
use candle_coreml_apple::plan::{ComputeDevice, ComputePlan};
use candle_coreml_apple::{ReshapeFrequency, Specialization};
use candle_coreml_mil::Source;
use std::path::{Path, PathBuf};

/// Opens models with every choice there is; [`CoreMLModel::load`] is this with the defaults.
///
/// ```no_run
/// use candle_coreml::{ComputeUnits, CoreMLModelBuilder, EngineKind};
/// let model = CoreMLModelBuilder::new("model.mlpackage")
///     .function("prefill")
///     .compute_units(ComputeUnits::CpuAndNeuralEngine)
///     .engine(EngineKind::Auto)
///     .threads(4)
///     .load()?;
/// # Ok::<(), candle_coreml::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CoreMLModelBuilder {
    origin: Origin,
    options: Options,
    config: Option<Config>,
}

/// Where a model's files are.
#[derive(Debug, Clone)]
pub(crate) enum Origin {
    Path(PathBuf),
    Memory { source: Source, root: String },
}

/// What engines are told.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub function: Option<String>,
    pub compute_units: ComputeUnits,
    pub engine: EngineKind,
    pub numerics: Numerics,
    /// 0 for the default pool.
    pub threads: usize,
    /// fp16 inputs and outputs as fp32.
    pub wide: bool,
    /// Whether the GPU may add up 16-bit floats in 16 bits.
    pub low_precision_accumulation: bool,
    pub reshape_frequency: Option<ReshapeFrequency>,
    pub specialization: Option<Specialization>,
}

/// The processors CoreML.framework may use. The portable engine runs on the CPU whatever is said here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ComputeUnits {
    /// Neural Engine, GPU and CPU.
    #[default]
    All,
    /// The CPU alone.
    CpuOnly,
    /// CPU and GPU.
    CpuAndGpu,
    /// CPU and Neural Engine.
    CpuAndNeuralEngine,
}

/// How the portable engine computes. CoreML.framework decides for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Numerics {
    /// fp16 programs are computed in f32, and stored as fp16 where memory is the limit.
    #[default]
    Default,
    /// Every result is rounded to the type that is written, as the program says.
    Faithful,
    /// As `Default`, but factors of convolutions, and of linear layers with more than a few rows, are rounded to bf16 (8 bits of
    /// precision) on processors that multiply it faster (AVX-512 BF16, not Intel's; Intel's AMX). In functions with states, which are
    /// language models, linear layers with fp16 or fp32 weights multiply blocks of 8-bit integers instead where there is AVX-512 VNNI and no
    /// AMX (relative error of logits about 2e-2, a byte a weight more in memory). 32-bit weights of linear layers with few rows are rounded
    /// to fp16 (11 bits) on all processors.
    Fast,
}

impl CoreMLModelBuilder {
    /// A `.mlpackage`, `.mlmodel` or `.mlmodelc` at `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self::from_origin(Origin::Path(path.as_ref().to_path_buf()))
    }

    /// A model among files that are in memory already: `root` is the model's file or folder in `source`.
    ///
    /// ```no_run
    /// use candle_coreml::{CoreMLModelBuilder, Source};
    /// let files = [("tiny.mlmodel".to_string(), std::fs::read("tiny.mlmodel")?.into())];
    /// let model = CoreMLModelBuilder::from_source(Source::memory(files.into()), "tiny.mlmodel").load()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_source(source: Source, root: impl Into<String>) -> Self {
        Self::from_origin(Origin::Memory {
            source,
            root: root.into(),
        })
    }

    fn from_origin(origin: Origin) -> Self {
        CoreMLModelBuilder {
            origin,
            options: Options::default(),
            config: None,
        }
    }

    /// The function to run; without it the model's own default, mostly `main`.
    pub fn function(mut self, name: impl Into<String>) -> Self {
        self.options.function = Some(name.into());
        self
    }

    /// The processors CoreML.framework may use.
    pub fn compute_units(mut self, units: ComputeUnits) -> Self {
        self.options.compute_units = units;
        self
    }

    /// The engine that is to run the model.
    pub fn engine(mut self, kind: EngineKind) -> Self {
        self.options.engine = kind;
        self
    }

    /// Lets CoreML.framework add up 16-bit floats in 16 bits on the GPU: faster, less exact.
    pub fn low_precision_accumulation(mut self, allowed: bool) -> Self {
        self.options.low_precision_accumulation = allowed;
        self
    }

    /// Tells CoreML.framework how often input shapes change (macOS 14.4, iOS 17.4).
    pub fn reshape_frequency(mut self, hint: ReshapeFrequency) -> Self {
        self.options.reshape_frequency = Some(hint);
        self
    }

    /// Tells CoreML.framework what to prepare the model for (macOS 15, iOS 18).
    pub fn specialization(mut self, hint: Specialization) -> Self {
        self.options.specialization = Some(hint);
        self
    }

    /// How the portable engine computes.
    pub fn numerics(mut self, numerics: Numerics) -> Self {
        self.options.numerics = numerics;
        self
    }

    /// Makes the portable engine take and give fp16 inputs and outputs as fp32, not rounded on the way: for models that feed
    /// each other, where rounding at every border adds up. The descriptions say fp32 then. Other engines ignore it.
    pub fn wide(mut self, wide: bool) -> Self {
        self.options.wide = wide;
        self
    }

    /// How many threads the portable engine uses for this model; 0, the default, is the pool that all models share.
    pub fn threads(mut self, threads: usize) -> Self {
        self.options.threads = threads;
        self
    }

    /// The names [`CoreMLModel::forward`] uses; without it they are derived from the function.
    pub fn config(mut self, config: Config) -> Self {
        self.config = Some(config);
        self
    }

    /// Which operation CoreML.framework would run on which device, and at what cost (macOS 14.4, iOS 17.4).
    ///
    /// # Errors
    /// [`Error::EngineUnavailable`] where there is no CoreML.framework, [`Error::Engine`] for what it says.
    pub fn compute_plan(&self) -> Result<ComputePlan, Error> {
        engine::compute_plan(&self.origin, &self.options)
    }

    /// Opens the model.
    ///
    /// # Errors
    /// - [`Error::Open`] when the files are not a readable model;
    /// - [`Error::EngineUnavailable`] when the engine asked for does not exist here;
    /// - [`Error::Engine`] or [`Error::NoEngine`] when it cannot run the model: an operation it lacks, by name;
    /// - [`Error::UnknownFunction`] with the functions there are;
    /// - [`Error::UnknownInput`], [`Error::UnknownOutput`], [`Error::DuplicateInput`] when the configuration names what the
    ///   function does not have.
    pub fn load(self) -> Result<CoreMLModel, Error> {
        let engine = engine::open(&self.origin, &self.options)?;
        tracing::debug!(engine = %engine.kind(), function = engine.function().name, "opened a Core ML model");
        CoreMLModel::with_config(engine, self.config)
    }
}

/// The devices CoreML.framework can use on this machine (macOS 14, iOS 17).
///
/// # Errors
/// [`Error::EngineUnavailable`] where there is no CoreML.framework, [`Error::Engine`] for what it says.
pub fn compute_devices() -> Result<Vec<ComputeDevice>, Error> {
    engine::compute_devices()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let words = CoreMLModelBuilder::new("/no/such.mlpackage")
            .load()
            .unwrap_err()
            .to_string();
        assert!(words.contains("/no/such.mlpackage"), "{words}");
    }

    #[cfg(not(target_vendor = "apple"))]
    #[test]
    fn asking_for_the_apple_engine_elsewhere_says_why_there_is_none() {
        let builder = CoreMLModelBuilder::new("/no/such.mlpackage").engine(EngineKind::Apple);
        let words = builder.load().unwrap_err().to_string();
        assert_eq!(
            words,
            "the apple engine is not available: CoreML.framework exists on Apple systems only; \
             the portable engine runs here"
        );
    }
}
