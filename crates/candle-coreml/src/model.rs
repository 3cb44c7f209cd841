//! An opened model: what it takes, what it gives, and running it on Candle tensors.

use crate::builder::CoreMLModelBuilder;
use crate::config::Config;
use crate::convert;
use crate::engine::{Engine, EngineKind, Input, InputValue};
use crate::error::{Error, quoted};
use crate::inputs::{self, Given, Ready};
use crate::outputs::Outputs;
use crate::state::CoreMLState;
use crate::value::Value;
use candle_core::{Device, Module, Tensor};
use candle_coreml_mil::{Description, Feature, FeatureType, FunctionDescription, Metadata};
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

/// A Core ML model ready to run one of its functions.
///
/// Cloning is cheap, and clones share the weights. Predictions may run on several threads at once.
///
/// Tensors are given on the CPU or on Metal and come back on the device of the inputs; CUDA tensors are refused.
/// Input dtypes convert to what the model declares: floats to narrower floats by rounding, integers and whole-numbered
/// floats to integers where they fit, integers to floats where the float holds them exactly. CPU tensors that are
/// contiguous and of the declared dtype are read in place, without a copy. Outputs come in the declared dtype: fp16 as
/// `f16`, fp32 as `f32`, fp64 as `f64`, int32 as `i32` (for Candle's indexing: `to_dtype(DType::U32)`).
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_coreml::CoreMLModel;
///
/// let model = CoreMLModel::load("model.mlpackage")?;
/// for input in model.inputs() {
///     println!("{}: {:?}", input.name, input.ty);
/// }
/// let x = Tensor::zeros((1, 3, 224, 224), candle_core::DType::F32, &Device::Cpu)?;
/// let outputs = model.predict(&[("image", &x)])?;
/// println!("{}", outputs.tensor("logits")?);
/// # Ok::<(), candle_coreml::Error>(())
/// ```
#[derive(Clone)]
pub struct CoreMLModel {
    engine: Arc<dyn Engine>,
    config: Arc<Config>,
    config_given: bool,
}

impl CoreMLModel {
    /// Opens a `.mlpackage`, `.mlmodel` or `.mlmodelc` with every default; [`CoreMLModelBuilder`] has the choices.
    ///
    /// # Errors
    /// [`Error::Open`] when the files are not a readable model, [`Error::Engine`] when no engine can run it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        CoreMLModelBuilder::new(path).load()
    }

    /// Opens a model to run its function `function`.
    ///
    /// # Errors
    /// Those of [`load`](Self::load), and [`Error::UnknownFunction`] with the functions there are.
    pub fn load_with_function(path: impl AsRef<Path>, function: &str) -> Result<Self, Error> {
        CoreMLModelBuilder::new(path).function(function).load()
    }

    /// The same model ready to run its function `name`; the weights are shared. A configuration that was given is kept,
    /// one that was derived is derived anew.
    ///
    /// # Errors
    /// [`Error::UnknownFunction`] with the functions there are; [`Error::UnknownInput`] or [`Error::UnknownOutput`]
    /// when a configuration that was given does not fit the function.
    pub fn with_function(&self, name: &str) -> Result<Self, Error> {
        check_function(self.description(), name)?;
        let config = self.config_given.then(|| Config::clone(&self.config));
        CoreMLModel::with_config(self.engine.with_function(name)?, config)
    }

    #[cfg(test)]
    pub(crate) fn from_engine(engine: Arc<dyn Engine>) -> Result<Self, Error> {
        CoreMLModel::with_config(engine, None)
    }

    pub(crate) fn with_config(engine: Arc<dyn Engine>, config: Option<Config>) -> Result<Self, Error> {
        let config_given = config.is_some();
        let config = match config {
            Some(config) => {
                config.check(engine.function())?;
                config
            }
            None => Config::from_function(engine.function()),
        };
        Ok(CoreMLModel { engine, config: Arc::new(config), config_given })
    }

    /// The inputs of the function, in the order of the file.
    pub fn inputs(&self) -> &[Feature] {
        &self.function().inputs
    }

    /// The outputs of the function, in the order of the file.
    pub fn outputs(&self) -> &[Feature] {
        &self.function().outputs
    }

    /// The states of the function, in the order of the file; empty for most models.
    pub fn states(&self) -> &[Feature] {
        &self.function().states
    }

    /// The function that runs.
    pub fn function(&self) -> &FunctionDescription {
        self.engine.function()
    }

    /// The functions of the model; [`with_function`](Self::with_function) takes their names.
    pub fn functions(&self) -> &[FunctionDescription] {
        &self.description().functions
    }

    /// Author, licence, version, description and the author's own keys.
    pub fn metadata(&self) -> &Metadata {
        &self.description().metadata
    }

    /// Everything the model says about itself.
    pub fn description(&self) -> &Description {
        self.engine.description()
    }

    /// The engine that runs the model: [`EngineKind::Portable`] or [`EngineKind::Apple`].
    pub fn engine(&self) -> EngineKind {
        self.engine.kind()
    }

    /// The names [`forward`](Self::forward) uses: those given to the builder, or derived from the function.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Runs the function on tensors in the order of [`Config::input_names`]; gives [`Config::output_name`].
    ///
    /// For a single tensor there is [`candle_core::Module`] as well: `tensor.apply(&model)`.
    ///
    /// # Errors
    /// [`Error::InputCount`] when the number of tensors is another, [`Error::NotATensor`] when the output is a label or
    /// a picture, and those of [`predict`](Self::predict).
    ///
    /// ```no_run
    /// # use candle_core::{Device, Tensor};
    /// use candle_coreml::{Config, CoreMLModelBuilder};
    /// let config = Config::new(["input_ids", "attention_mask"], "logits");
    /// let model = CoreMLModelBuilder::new("bert.mlpackage").config(config).load()?;
    /// let ids = Tensor::new(&[[101i64, 7592, 102]], &Device::Cpu)?;
    /// let mask = ids.ones_like()?;
    /// let logits = model.forward(&[&ids, &mask])?;
    /// # Ok::<(), candle_coreml::Error>(())
    /// ```
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Tensor, Error> {
        let names = &self.config.input_names;
        if names.len() != inputs.len() {
            return Err(Error::InputCount { found: inputs.len(), expected: names.clone() });
        }
        let given: Vec<_> = names.iter().zip(inputs).map(|(n, t)| (n.as_str(), *t)).collect();
        self.predict(&given)?.tensor(&self.config.output_name)
    }

    /// Runs the function on named tensors, in any order; gives all outputs. Optional inputs may be left out.
    ///
    /// # Errors
    /// [`Error::UnknownInput`], [`Error::MissingInputs`], [`Error::DuplicateInput`], [`Error::Shape`], [`Error::DType`],
    /// [`Error::Element`], [`Error::Kind`] and [`Error::Device`] name the input, what came and what is allowed.
    /// [`Error::StateNeeded`] for a function with states. [`Error::Engine`] when the engine fails.
    pub fn predict(&self, inputs: &[(&str, &Tensor)]) -> Result<Outputs, Error> {
        self.run(&tensors(inputs), None)
    }

    /// Runs the function on named values of every kind: pictures, strings, numbers, dictionaries, sequences, tensors.
    ///
    /// # Errors
    /// Those of [`predict`](Self::predict).
    ///
    /// ```no_run
    /// use candle_coreml::{CoreMLModel, Image, Pixels, Value};
    /// let model = CoreMLModel::load("classifier.mlmodel")?;
    /// let image = Image::new(224, 224, Pixels::Rgb(vec![0; 224 * 224 * 3]))?;
    /// let outputs = model.predict_values(&[("image", &Value::Image(image))])?;
    /// println!("{:?}", outputs.get("classLabel"));
    /// # Ok::<(), candle_coreml::Error>(())
    /// ```
    pub fn predict_values(&self, inputs: &[(&str, &Value)]) -> Result<Outputs, Error> {
        self.run(&values(inputs), None)
    }

    /// Makes the buffers the function keeps between predictions, zero. For a function without states they are none.
    ///
    /// # Errors
    /// [`Error::Engine`] when the engine fails.
    pub fn make_state(&self) -> Result<CoreMLState, Error> {
        Ok(CoreMLState::new(self.engine.make_state()?, self.engine.kind(), self.states()))
    }

    /// Runs the function on named tensors and the buffers in `state`, which it changes.
    ///
    /// # Errors
    /// Those of [`predict`](Self::predict), and [`Error::StateMismatch`] for the state of a model that declares others.
    /// After an error of the inputs or a mismatch the state is as it was; after [`Error::Engine`] it may be half-written.
    pub fn predict_with_state(
        &self,
        inputs: &[(&str, &Tensor)],
        state: &mut CoreMLState,
    ) -> Result<Outputs, Error> {
        self.run(&tensors(inputs), Some(state))
    }

    /// Runs the function on named values of every kind and the buffers in `state`, which it changes.
    ///
    /// # Errors
    /// Those of [`predict_with_state`](Self::predict_with_state).
    pub fn predict_values_with_state(
        &self,
        inputs: &[(&str, &Value)],
        state: &mut CoreMLState,
    ) -> Result<Outputs, Error> {
        self.run(&values(inputs), Some(state))
    }

    fn run(&self, given: &[(&str, Given<'_>)], state: Option<&mut CoreMLState>) -> Result<Outputs, Error> {
        let function = self.engine.function();
        let state = self.fitting(state)?;
        let ready = inputs::ready(function, given)?;
        // Read locks on the tensors' memory are held from here until the engine is done.
        let locked = ready.iter().map(|(_, r)| r.lock()).collect::<Result<Vec<_>, _>>()?;
        let inputs: Vec<Input<'_>> = ready
            .iter()
            .zip(&locked)
            .map(|((name, _), value)| Input { name, value: value.value() })
            .collect();
        let outputs = self.engine.predict(&inputs, state.map(|s| &mut *s.inner))?;
        let device = inputs::device(given);
        let finished = outputs.into_iter().map(|(name, value)| {
            let value = finish(function, &name, value, &device)?;
            Ok((name, value))
        });
        Ok(Outputs::new(finished.collect::<Result<_, Error>>()?))
    }

    /// The state to run with: none where the function declares none.
    fn fitting<'s>(&self, state: Option<&'s mut CoreMLState>) -> Result<Option<&'s mut CoreMLState>, Error> {
        let function = self.engine.function();
        match state {
            Some(state) => {
                state.check(self.engine.kind(), function)?;
                Ok(Some(state).filter(|_| !function.states.is_empty()))
            }
            None if function.states.is_empty() => Ok(None),
            None => Err(Error::StateNeeded {
                function: function.name.clone(),
                states: function.states.iter().map(|f| f.name.clone()).collect(),
            }),
        }
    }
}

/// One tensor in, one tensor out: [`CoreMLModel::forward`] for a configuration with a single input.
impl Module for CoreMLModel {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        Ok(CoreMLModel::forward(self, &[xs])?)
    }
}

impl std::fmt::Debug for CoreMLModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = |features: &[Feature]| quoted(&features.iter().map(|f| f.name.clone()).collect::<Vec<_>>());
        f.debug_struct("CoreMLModel")
            .field("engine", &self.engine())
            .field("function", &self.function().name)
            .field("inputs", &names(self.inputs()))
            .field("outputs", &names(self.outputs()))
            .field("states", &names(self.states()))
            .finish_non_exhaustive()
    }
}

/// Refuses a function the model does not have.
pub(crate) fn check_function(description: &Description, name: &str) -> Result<(), Error> {
    if description.functions.iter().any(|f| f.name == name) {
        return Ok(());
    }
    Err(Error::UnknownFunction {
        name: name.to_string(),
        allowed: description.functions.iter().map(|f| f.name.clone()).collect(),
    })
}

fn tensors<'a>(inputs: &[(&'a str, &'a Tensor)]) -> Vec<(&'a str, Given<'a>)> {
    inputs.iter().map(|&(name, tensor)| (name, Given::Tensor(tensor))).collect()
}

fn values<'a>(inputs: &[(&'a str, &'a Value)]) -> Vec<(&'a str, Given<'a>)> {
    inputs.iter().map(|&(name, value)| (name, Given::Value(value))).collect()
}

/// An output in the declared dtype and on the device it is wanted on.
fn finish(function: &FunctionDescription, name: &str, value: Value, device: &Device) -> Result<Value, Error> {
    let Value::Tensor(mut tensor) = value else { return Ok(value) };
    let declared = function.outputs.iter().find(|f| f.name == name).map(|f| &f.ty);
    if let Some(FeatureType::MultiArray(array)) = declared {
        tensor = convert::as_declared(tensor, array.dtype)?;
    }
    Ok(Value::Tensor(if device.is_cpu() { tensor } else { tensor.to_device(device)? }))
}

/// An input whose memory is held readable.
enum Held<'p> {
    Array(convert::Locked<'p>),
    Value(&'p Value),
}

impl Ready<'_> {
    fn lock(&self) -> Result<Held<'_>, Error> {
        Ok(match self {
            Ready::Array(prepared) => Held::Array(prepared.lock()?),
            Ready::Value(Cow::Borrowed(value)) => Held::Value(value),
            Ready::Value(Cow::Owned(value)) => Held::Value(value),
        })
    }
}

impl Held<'_> {
    fn value(&self) -> InputValue<'_> {
        match self {
            Held::Array(locked) => InputValue::Array(locked.array()),
            Held::Value(value) => InputValue::Value(value),
        }
    }
}
