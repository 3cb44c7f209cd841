//! An opened model: what it takes, what it gives, and running it on Candle tensors.

use crate::builder::CoreMLModelBuilder;
use crate::config::Config;
use crate::convert;
use crate::engine::{Engine, EngineKind, EngineState, Input, InputValue};
use crate::error::{Error, quoted};
use crate::inputs::{self, Ready};
use crate::outputs::Outputs;
use crate::state::CoreMLState;
use crate::trace::TracedStep;
use crate::value::{Given, Value};
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
        find_function(self.description(), name)?;
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
        Ok(CoreMLModel {
            engine,
            config: Arc::new(config),
            config_given,
        })
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
            return Err(Error::InputCount {
                found: inputs.len(),
                expected: names.clone(),
            });
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
        Ok(CoreMLState::new(
            self.engine.make_state()?,
            self.engine.kind(),
            self.states(),
        ))
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

    /// Runs the function on tensors, values and arrays in memory that is not Candle's, with a state where it has one.
    ///
    /// # Errors
    /// Those of [`predict`](Self::predict), and of [`predict_with_state`](Self::predict_with_state).
    ///
    /// ```no_run
    /// use candle_coreml::{ArrayView, CoreMLModel, Elements, Given};
    /// let model = CoreMLModel::load("model.mlpackage")?;
    /// let samples = [0f32; 512];
    /// let audio = ArrayView::new(&[1, 512], Elements::F32(&samples))?;
    /// let outputs = model.predict_given(&[("audio", Given::Array(audio))], None)?;
    /// # Ok::<(), candle_coreml::Error>(())
    /// ```
    pub fn predict_given(
        &self,
        inputs: &[(&str, Given<'_>)],
        state: Option<&mut CoreMLState>,
    ) -> Result<Outputs, Error> {
        self.run(inputs, state)
    }

    /// Runs the function as [`predict_values`](Self::predict_values) does and shows every value the program computes on
    /// the way, in order; constants and what follows from them alone are not among them. Operations are not merged, so
    /// this is slower than a prediction, and results may differ in the last bits.
    ///
    /// # Errors
    /// Those of [`predict_with_state`](Self::predict_with_state), and [`Error::EngineUnavailable`] for an engine that does
    /// not show what it computes: CoreML.framework.
    pub fn trace(
        &self,
        inputs: &[(&str, &Value)],
        state: Option<&mut CoreMLState>,
        mut see: impl FnMut(TracedStep),
    ) -> Result<Outputs, Error> {
        self.run_by(&values(inputs), state, |engine, inputs, state| {
            engine.trace(inputs, state, &mut see)
        })
    }

    /// Runs the function on each set of inputs, in one call of the engine: CoreML.framework may do that faster than one
    /// after another. For functions without states.
    ///
    /// # Errors
    /// Those of [`predict`](Self::predict), for the first set that is wrong.
    pub fn predict_batch(&self, batch: &[&[(&str, &Value)]]) -> Result<Vec<Outputs>, Error> {
        let function = self.engine.function();
        self.fitting(None)?;
        let given: Vec<_> = batch.iter().map(|inputs| values(inputs)).collect();
        let ready = given.iter().map(|given| inputs::ready(function, given));
        let ready = ready.collect::<Result<Vec<_>, _>>()?;
        let locked = ready
            .iter()
            .map(|ready| ready.iter().map(|(_, r)| r.lock()).collect::<Result<Vec<_>, _>>())
            .collect::<Result<Vec<_>, _>>()?;
        let inputs = ready.iter().zip(&locked).map(|(r, l)| named_inputs(r, l));
        let outputs = self.engine.predict_batch(&inputs.collect::<Vec<_>>())?;
        outputs
            .into_iter()
            .zip(&given)
            .map(|(outputs, given)| finished(function, outputs, &inputs::device(given)))
            .collect()
    }

    /// What runs for the default shapes, as text for people: steps with their merged operations, memory, bytes, arithmetic.
    ///
    /// # Errors
    /// [`Error::EngineUnavailable`] for CoreML.framework, [`Error::Engine`] when the shapes are open.
    pub fn explain(&self) -> Result<String, Error> {
        self.engine.explain()
    }

    fn run(&self, given: &[(&str, Given<'_>)], state: Option<&mut CoreMLState>) -> Result<Outputs, Error> {
        self.run_by(given, state, |engine, inputs, state| {
            engine.predict(inputs, state)
        })
    }

    fn run_by(
        &self,
        given: &[(&str, Given<'_>)],
        state: Option<&mut CoreMLState>,
        by: impl FnOnce(
            &dyn Engine,
            &[Input<'_>],
            Option<&mut dyn EngineState>,
        ) -> Result<Vec<(String, Value)>, Error>,
    ) -> Result<Outputs, Error> {
        let function = self.engine.function();
        let state = self.fitting(state)?;
        let ready = inputs::ready(function, given)?;
        // Read locks on the tensors' memory are held from here until the engine is done.
        let locked = ready
            .iter()
            .map(|(_, r)| r.lock())
            .collect::<Result<Vec<_>, _>>()?;
        let inputs = named_inputs(&ready, &locked);
        let state = state.map(|s| s.inner.as_mut() as &mut dyn EngineState);
        let outputs = by(self.engine.as_ref(), &inputs, state)?;
        finished(function, outputs, &inputs::device(given))
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
        let names =
            |features: &[Feature]| quoted(&features.iter().map(|f| f.name.clone()).collect::<Vec<_>>());
        f.debug_struct("CoreMLModel")
            .field("engine", &self.engine())
            .field("function", &self.function().name)
            .field("inputs", &names(self.inputs()))
            .field("outputs", &names(self.outputs()))
            .field("states", &names(self.states()))
            .finish_non_exhaustive()
    }
}

/// The place of a function in the description.
pub(crate) fn find_function(description: &Description, name: &str) -> Result<usize, Error> {
    description
        .functions
        .iter()
        .position(|f| f.name == name)
        .ok_or_else(|| Error::UnknownFunction {
            name: name.to_string(),
            allowed: description.functions.iter().map(|f| f.name.clone()).collect(),
        })
}

fn tensors<'a>(inputs: &[(&'a str, &'a Tensor)]) -> Vec<(&'a str, Given<'a>)> {
    inputs
        .iter()
        .map(|&(name, tensor)| (name, Given::Tensor(tensor)))
        .collect()
}

fn values<'a>(inputs: &[(&'a str, &'a Value)]) -> Vec<(&'a str, Given<'a>)> {
    inputs
        .iter()
        .map(|&(name, value)| (name, Given::Value(value)))
        .collect()
}

/// Inputs as engines take them, their memory held readable.
fn named_inputs<'a>(ready: &'a [(&'a str, Ready<'a>)], locked: &'a [Held<'a>]) -> Vec<Input<'a>> {
    let input = |((name, _), held): (&(&'a str, Ready<'a>), &'a Held<'a>)| Input {
        name,
        value: held.value(),
    };
    ready.iter().zip(locked).map(input).collect()
}

/// What an engine gave, in the declared dtypes and on the device of the inputs.
fn finished(
    function: &FunctionDescription,
    outputs: Vec<(String, Value)>,
    device: &Device,
) -> Result<Outputs, Error> {
    let finished = outputs.into_iter().map(|(name, value)| {
        let value = finish(function, &name, value, device)?;
        Ok((name, value))
    });
    Ok(Outputs::new(finished.collect::<Result<_, Error>>()?))
}

/// An output in the declared dtype and on the device it is wanted on.
fn finish(function: &FunctionDescription, name: &str, value: Value, device: &Device) -> Result<Value, Error> {
    let Value::Tensor(mut tensor) = value else {
        return Ok(value);
    };
    let declared = function.outputs.iter().find(|f| f.name == name).map(|f| &f.ty);
    if let Some(FeatureType::MultiArray(array)) = declared {
        tensor = convert::as_declared(tensor, array.dtype)?;
    }
    Ok(Value::Tensor(if device.is_cpu() {
        tensor
    } else {
        tensor.to_device(device)?
    }))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{FakeEngine, array, feature, state};
    use candle_core::DType;
    use candle_coreml_mil::DType as Declared;

    fn described(name: &str, inputs: Vec<Feature>, outputs: Vec<Feature>) -> FunctionDescription {
        FunctionDescription {
            name: name.into(),
            inputs,
            outputs,
            states: vec![],
        }
    }

    /// Functions `add` (a + b, f32 [2]) and `double` (2 * a); each also gives its name.
    fn model() -> CoreMLModel {
        let vector = |name| feature(name, array(Declared::Fp32, &[2]));
        let label = || crate::engine::fake::typed("label", FeatureType::String);
        let functions = vec![
            described(
                "add",
                vec![vector("a"), vector("b")],
                vec![vector("sum"), label()],
            ),
            described("double", vec![vector("a")], vec![vector("sum")]),
        ];
        let engine = FakeEngine::engine(functions, |inputs, _| {
            let tensors = inputs.iter().map(|i| {
                let InputValue::Array(array) = i.value else {
                    panic!("not an array")
                };
                array.to_tensor().unwrap()
            });
            let tensors: Vec<_> = tensors.collect();
            let sum = (&tensors[0] + tensors.last().unwrap())?;
            let mut outputs = vec![("sum".to_string(), Value::Tensor(sum))];
            if tensors.len() == 2 {
                outputs.push(("label".to_string(), "add".into()));
            }
            Ok(outputs)
        });
        CoreMLModel::from_engine(engine).unwrap()
    }

    fn tensor(values: [f32; 2]) -> Tensor {
        Tensor::new(&values, &Device::Cpu).unwrap()
    }

    fn vector(tensor: &Tensor) -> Vec<f32> {
        tensor.to_vec1().unwrap()
    }

    #[test]
    fn forward_takes_the_order_of_the_configuration_and_predict_takes_names() {
        let (a, b) = (tensor([1.0, 2.0]), tensor([10.0, 20.0]));
        let model = model();
        assert_eq!(vector(&model.forward(&[&a, &b]).unwrap()), [11.0, 22.0]);
        assert_eq!(
            vector(&model.forward(&[&a, &a]).unwrap()),
            [2.0, 4.0],
            "one tensor for both inputs"
        );
        let outputs = model.predict(&[("b", &b), ("a", &a)]).unwrap();
        assert_eq!(outputs.names().collect::<Vec<_>>(), ["sum", "label"]);
        assert_eq!(vector(&outputs.tensor("sum").unwrap()), [11.0, 22.0]);
        let values = [("a", &Value::from(a)), ("b", &Value::from(b))];
        assert_eq!(model.predict_values(&values).unwrap().len(), 2);
    }

    #[test]
    fn forward_with_too_few_tensors_names_the_inputs() {
        let words = model().forward(&[&tensor([0.0, 0.0])]).unwrap_err().to_string();
        assert_eq!(words, r#"1 tensors were given to forward; it takes 2: "a", "b""#);
    }

    #[test]
    fn a_function_of_one_input_is_a_candle_module() {
        let double = model().with_function("double").unwrap();
        assert_eq!(vector(&tensor([1.0, 2.0]).apply(&double).unwrap()), [2.0, 4.0]);
        let words = tensor([1.0, 2.0]).apply(&model()).unwrap_err().to_string();
        assert!(words.contains(r#"it takes 2: "a", "b""#), "{words}");
    }

    #[test]
    fn another_function_has_another_interface_and_unknown_ones_are_refused() {
        let double = model().with_function("double").unwrap();
        assert_eq!(double.function().name, "double");
        assert_eq!(double.config().input_names, ["a"]);
        assert_eq!(double.functions().len(), 2);
        let words = double.with_function("triple").unwrap_err().to_string();
        assert_eq!(
            words,
            r#"the model has no function "triple"; it has: "add", "double""#
        );
    }

    #[test]
    fn a_given_configuration_is_checked_and_kept_between_functions() {
        let engine = model().engine;
        let wrong = CoreMLModel::with_config(engine.clone(), Some(Config::new(["a", "c"], "sum")));
        assert!(matches!(wrong, Err(Error::UnknownInput { name, .. }) if name == "c"));
        let reversed = CoreMLModel::with_config(engine, Some(Config::new(["b", "a"], "label"))).unwrap();
        let words = reversed
            .forward(&[&tensor([0.0; 2]), &tensor([0.0; 2])])
            .unwrap_err()
            .to_string();
        assert_eq!(words, r#"output "label" is a string, not a tensor"#);
        assert!(matches!(
            reversed.with_function("double"),
            Err(Error::UnknownInput { .. })
        ));
    }

    #[test]
    fn an_input_of_the_declared_dtype_is_not_copied() {
        let x = tensor([1.0, 2.0]);
        let function = described("main", vec![feature("x", array(Declared::Fp32, &[2]))], vec![]);
        let start = {
            let (storage, _) = x.storage_and_layout();
            let candle_core::Storage::Cpu(candle_core::CpuStorage::F32(v)) = &*storage else {
                panic!()
            };
            v.as_ptr().addr()
        };
        let engine = FakeEngine::engine(vec![function], move |inputs, _| {
            let InputValue::Array(array) = inputs[0].value else {
                panic!("not an array")
            };
            assert_eq!(array.address(), start);
            Ok(vec![])
        });
        CoreMLModel::from_engine(engine)
            .unwrap()
            .predict(&[("x", &x)])
            .unwrap();
    }

    #[test]
    fn outputs_come_in_the_dtype_the_model_declares() {
        let rows = [
            (Declared::Fp16, DType::F16),
            (Declared::Fp32, DType::F32),
            (Declared::Fp64, DType::F64),
            (Declared::Int32, DType::I32),
            (Declared::Int8, DType::I32),
        ];
        for (declared, dtype) in rows {
            let function = described("main", vec![], vec![feature("y", array(declared, &[2]))]);
            let engine = FakeEngine::engine(vec![function], |_, _| {
                Ok(vec![("y".into(), tensor([1.0, 2.0]).into())])
            });
            let outputs = CoreMLModel::from_engine(engine).unwrap().predict(&[]).unwrap();
            let y = outputs.tensor("y").unwrap();
            assert_eq!(y.dtype(), dtype, "{declared}");
            assert_eq!(vector(&y.to_dtype(DType::F32).unwrap()), [1.0, 2.0], "{declared}");
        }
    }

    #[test]
    fn a_function_with_states_does_not_run_without_one() {
        let function = FunctionDescription {
            states: vec![state("cache", Declared::Fp16, &[1])],
            ..described("infer", vec![], vec![])
        };
        let engine = FakeEngine::engine(vec![function], |_, _| panic!("ran without its state"));
        let words = CoreMLModel::from_engine(engine)
            .unwrap()
            .predict(&[])
            .unwrap_err()
            .to_string();
        assert!(
            words.starts_with(r#"function "infer" keeps state ("cache"); make one"#),
            "{words}"
        );
    }

    #[test]
    fn a_function_without_states_runs_with_the_state_it_makes() {
        let model = model();
        let mut none = model.make_state().unwrap();
        let (a, b) = (tensor([1.0, 2.0]), tensor([3.0, 4.0]));
        model
            .predict_with_state(&[("a", &a), ("b", &b)], &mut none)
            .unwrap();
    }

    #[test]
    fn two_threads_predict_on_one_model_at_once() {
        // Each prediction waits for the other, so both run at the same time or the test does not end.
        let meeting = std::sync::Barrier::new(2);
        let function = described(
            "main",
            vec![feature("x", array(Declared::Fp32, &[2]))],
            vec![feature("x", array(Declared::Fp32, &[2]))],
        );
        let engine = FakeEngine::engine(vec![function], move |inputs, _| {
            meeting.wait();
            let InputValue::Array(array) = inputs[0].value else {
                panic!("not an array")
            };
            Ok(vec![("x".into(), array.to_tensor()?.into())])
        });
        let model = CoreMLModel::from_engine(engine).unwrap();
        let shared = tensor([5.0, 6.0]);
        std::thread::scope(|scope| {
            let run = || vector(&model.forward(&[&shared]).unwrap());
            let other = scope.spawn(run);
            assert_eq!((run(), other.join().unwrap()), (vec![5.0, 6.0], vec![5.0, 6.0]));
        });
    }

    #[test]
    fn models_are_shared_between_threads() {
        fn assert_send_sync<T: Send + Sync + Clone>() {}
        assert_send_sync::<CoreMLModel>();
    }

    #[test]
    fn an_engines_failure_keeps_its_words_and_its_source() {
        let engine = FakeEngine::engine(vec![described("main", vec![], vec![])], |_, _| {
            Err("out of memory".into())
        });
        let error = CoreMLModel::from_engine(engine)
            .unwrap()
            .predict(&[])
            .unwrap_err();
        assert_eq!(error.to_string(), "portable engine: out of memory");
        assert_eq!(
            std::error::Error::source(&error).unwrap().to_string(),
            "out of memory"
        );
    }
}
