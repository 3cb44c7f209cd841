//! CoreML.framework behind the [`Engine`] contract.

use super::{Array, Data, Engine, EngineKind, EngineState, Input, InputValue};
use crate::builder::{ComputeUnits, Options, Origin};
use crate::error::{BoxError, Error};
use crate::model::find_function;
use crate::value::{Dictionary, Image, Pixels, Sequence, Value};
use candle_core::{Device, Tensor};
use candle_coreml_apple as apple;
use candle_coreml_apple::framework;
use candle_coreml_mil::{Description, FunctionDescription, Model, ModelKind};
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

/// One function of a model on CoreML.framework.
struct AppleEngine {
    model: framework::Model,
    compiled: PathBuf,
    options: apple::LoadOptions,
    description: Arc<Description>,
    /// Index of the function in the description; checked when this is made.
    function: usize,
}

/// Core ML's buffers.
struct AppleState(framework::State);

/// The processors Core ML can use.
pub(super) fn devices() -> Result<Vec<apple::plan::ComputeDevice>, Error> {
    framework::devices(framework::system()).map_err(failed)
}

/// Core ML's plan for the function the options name.
pub(super) fn plan(origin: &Origin, options: &Options) -> Result<apple::plan::ComputePlan, Error> {
    let Opened {
        compiled,
        options,
        description,
        name,
    } = compile(origin, options)?;
    let options = apple::LoadOptions {
        function: Some(name),
        ..options
    };
    let functions = description.functions.len();
    framework::compute_plan(&compiled, &options, functions, framework::system()).map_err(failed)
}

/// What a model is loaded from and with.
struct Opened {
    compiled: PathBuf,
    options: apple::LoadOptions,
    description: Description,
    name: String,
}

/// Compiles the model where that is needed, and loads the function the options name.
pub(super) fn open(origin: &Origin, options: &Options) -> Result<Arc<dyn Engine>, Error> {
    let opened = compile(origin, options)?;
    AppleEngine::load(
        opened.compiled,
        opened.options,
        Arc::new(opened.description),
        &opened.name,
    )
}

fn compile(origin: &Origin, options: &Options) -> Result<Opened, Error> {
    let Origin::Path(path) = origin else {
        // Core ML reads files; a model in memory runs on the other engine unless this one was asked for.
        return Err(Error::EngineUnavailable {
            engine: EngineKind::Apple,
            reason: "the model is in memory, and CoreML.framework opens files".to_string(),
        });
    };
    let file = Model::open(path).map_err(|source| Error::Open { source })?;
    let mut description = file.description().clone();
    if description.kind != ModelKind::Program && description.functions.is_empty() {
        description.functions.push(FunctionDescription {
            name: "main".to_string(),
            ..FunctionDescription::default()
        });
    }
    let default = Some(description.default_function.as_str()).filter(|d| !d.is_empty());
    let name = options
        .function
        .as_deref()
        .or(default)
        .unwrap_or("main")
        .to_string();
    find_function(&description, &name)?;
    let compiled = framework::compiled(path, &framework::default_cache_folder()).map_err(failed)?;
    let options = apple::LoadOptions {
        compute_units: match options.compute_units {
            ComputeUnits::All => apple::ComputeUnits::All,
            ComputeUnits::CpuOnly => apple::ComputeUnits::CpuOnly,
            ComputeUnits::CpuAndGpu => apple::ComputeUnits::CpuAndGpu,
            ComputeUnits::CpuAndNeuralEngine => apple::ComputeUnits::CpuAndNeuralEngine,
        },
        function: None,
        low_precision_accumulation: options.low_precision_accumulation,
        reshape_frequency: options.reshape_frequency,
        specialization: options.specialization,
    };
    Ok(Opened {
        compiled,
        options,
        description,
        name,
    })
}

impl AppleEngine {
    fn load(
        compiled: PathBuf,
        options: apple::LoadOptions,
        description: Arc<Description>,
        name: &str,
    ) -> Result<Arc<dyn Engine>, Error> {
        let function = find_function(&description, name)?;
        let options = apple::LoadOptions {
            function: Some(name.to_string()),
            ..options
        };
        let declared = &description.functions[function];
        let functions = description.functions.len();
        let system = framework::system();
        let model =
            framework::Model::load(&compiled, &options, functions, Some(declared), system).map_err(failed)?;
        // Core ML runs what it loaded, whatever is thought of it here; a difference is said, since it explains what follows.
        let described = model.described(system);
        if let Err(difference) = described.and_then(|d| apple::describe::check(declared, &d)) {
            tracing::warn!(%difference, "CoreML.framework describes the model in another way than its files");
        }
        Ok(Arc::new(AppleEngine {
            model,
            compiled,
            options,
            description,
            function,
        }))
    }
}

impl Engine for AppleEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Apple
    }

    fn description(&self) -> &Description {
        &self.description
    }

    fn function(&self) -> &FunctionDescription {
        &self.description.functions[self.function]
    }

    fn with_function(&self, name: &str) -> Result<Arc<dyn Engine>, Error> {
        let (compiled, options) = (self.compiled.clone(), self.options.clone());
        AppleEngine::load(compiled, options, self.description.clone(), name)
    }

    fn make_state(&self) -> Result<Box<dyn EngineState>, Error> {
        let state = self.model.make_state(framework::system()).map_err(failed)?;
        Ok(Box::new(AppleState(state)))
    }

    fn predict(
        &self,
        inputs: &[Input<'_>],
        state: Option<&mut dyn EngineState>,
    ) -> Result<Vec<(String, Value)>, Error> {
        let held = Holding::of(inputs);
        let given = held.values(inputs);
        let state = match state {
            Some(state) => Some(own(state)?),
            None => None,
        };
        let outputs = self.model.predict(&given, state).map_err(failed)?;
        named(outputs)
    }

    fn predict_batch(&self, batch: &[Vec<Input<'_>>]) -> Result<Vec<Vec<(String, Value)>>, Error> {
        let held: Vec<Holding> = batch.iter().map(|inputs| Holding::of(inputs)).collect();
        let given: Vec<Vec<_>> = held
            .iter()
            .zip(batch)
            .map(|(h, inputs)| h.values(inputs))
            .collect();
        let given: Vec<&[_]> = given.iter().map(Vec::as_slice).collect();
        let outputs = self.model.predict_batch(&given).map_err(failed)?;
        outputs.into_iter().map(named).collect()
    }
}

fn named(outputs: framework::Outputs) -> Result<Vec<(String, Value)>, Error> {
    let outputs = outputs.into_iter().map(|(name, value)| Ok((name, owned(value)?)));
    outputs.collect()
}

/// What the inputs of a prediction refer to while it runs: pictures in Core ML's form, handles on large tensors.
struct Holding {
    pictures: Vec<Option<apple::Picture>>,
    owners: Vec<Option<apple::Owner>>,
}

impl Holding {
    fn of(inputs: &[Input<'_>]) -> Holding {
        Holding {
            pictures: inputs.iter().map(|i| picture(&i.value)).collect(),
            owners: owners(inputs),
        }
    }

    fn values<'a>(&'a self, inputs: &[Input<'a>]) -> Vec<(&'a str, apple::Value<'a>)> {
        let value = |(i, input): (usize, &Input<'a>)| {
            let owner = self.owners.get(i).and_then(Option::as_ref);
            (input.name, value(&input.value, self.pictures[i].as_ref(), owner))
        };
        inputs.iter().enumerate().map(value).collect()
    }
}

impl EngineState for AppleState {
    fn read(&self, name: &str) -> Result<Tensor, Error> {
        tensor(self.0.read(name).map_err(failed)?)
    }

    fn write(&mut self, name: &str, array: Array<'_>) -> Result<(), Error> {
        self.0.write(name, borrowed(array, None)).map_err(failed)
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.0.reset().map_err(failed)
    }

    fn fork(&self) -> Result<Box<dyn EngineState>, Error> {
        Ok(Box::new(AppleState(self.0.fork().map_err(failed)?)))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Handles on the tensors that are read where they are: none at all when the inputs are small enough to be copied.
fn owners(inputs: &[Input<'_>]) -> Vec<Option<apple::Owner>> {
    let array = |input: &Input<'_>| match input.value {
        InputValue::Array(array) => Some(borrowed(array, None).bytes.len()),
        _ => None,
    };
    if inputs.iter().filter_map(array).sum::<usize>() <= apple::reuse::COPY_UP_TO_BYTES {
        return Vec::new();
    }
    let owner = |input: &Input<'_>| match input.value {
        InputValue::Array(Array {
            tensor: Some(tensor), ..
        }) => Some(Arc::new(tensor.clone()) as apple::Owner),
        _ => None,
    };
    inputs.iter().map(owner).collect()
}

/// The elements where they are.
fn borrowed<'a>(array: Array<'a>, owner: Option<&'a apple::Owner>) -> apple::ArrayRef<'a> {
    let (element, bytes) = match array.data {
        Data::F16(v) => (apple::Element::F16, bytemuck::cast_slice(v)),
        Data::F32(v) => (apple::Element::F32, bytemuck::cast_slice(v)),
        Data::F64(v) => (apple::Element::F64, bytemuck::cast_slice(v)),
        Data::I32(v) => (apple::Element::I32, bytemuck::cast_slice(v)),
        Data::I8(v) => (apple::Element::I8, bytemuck::cast_slice(v)),
    };
    apple::ArrayRef {
        shape: array.shape,
        element,
        bytes,
        owner,
    }
}

fn picture(value: &InputValue<'_>) -> Option<apple::Picture> {
    let InputValue::Value(Value::Image(image)) = value else {
        return None;
    };
    Some(apple::Picture {
        width: image.width(),
        height: image.height(),
        pixels: match image.pixels() {
            Pixels::Gray(p) => apple::Pixels::Gray(p.clone()),
            Pixels::GrayF16(p) => apple::Pixels::GrayF16(p.clone()),
            Pixels::Rgb(p) => apple::Pixels::Rgb(p.clone()),
        },
    })
}

fn value<'a>(
    value: &InputValue<'a>,
    picture: Option<&'a apple::Picture>,
    owner: Option<&'a apple::Owner>,
) -> apple::Value<'a> {
    if let Some(picture) = picture {
        return apple::Value::Picture(picture);
    }
    match value {
        InputValue::Array(array) => apple::Value::Array(borrowed(*array, owner)),
        InputValue::Value(Value::String(text)) => apple::Value::String(text),
        InputValue::Value(Value::Int64(v)) => apple::Value::Int64(*v),
        InputValue::Value(Value::Double(v)) => apple::Value::Double(*v),
        InputValue::Value(Value::Dictionary(Dictionary::Strings(d))) => apple::Value::Strings(d),
        InputValue::Value(Value::Dictionary(Dictionary::Integers(d))) => apple::Value::Integers(d),
        InputValue::Value(Value::Sequence(Sequence::Strings(s))) => apple::Value::StringSequence(s),
        InputValue::Value(Value::Sequence(Sequence::Integers(s))) => apple::Value::IntegerSequence(s),
        InputValue::Value(Value::Tensor(_) | Value::Image(_)) => {
            unreachable!("tensors come as arrays, and pictures were taken above")
        }
    }
}

fn owned(value: apple::OwnedValue) -> Result<Value, Error> {
    use apple::OwnedValue as O;
    Ok(match value {
        O::Array(array) => Value::Tensor(tensor(array)?),
        O::Picture(p) => {
            let pixels = match p.pixels {
                apple::Pixels::Gray(v) => Pixels::Gray(v),
                apple::Pixels::GrayF16(v) => Pixels::GrayF16(v),
                apple::Pixels::Rgb(v) => Pixels::Rgb(v),
            };
            Value::Image(Image::new(p.width, p.height, pixels)?)
        }
        O::String(text) => Value::String(text),
        O::Int64(v) => Value::Int64(v),
        O::Double(v) => Value::Double(v),
        O::Strings(pairs) => Value::Dictionary(Dictionary::Strings(pairs)),
        O::Integers(pairs) => Value::Dictionary(Dictionary::Integers(pairs)),
        O::StringSequence(texts) => Value::Sequence(Sequence::Strings(texts)),
        O::IntegerSequence(values) => Value::Sequence(Sequence::Integers(values)),
    })
}

/// A tensor that takes over the elements; int8 becomes i32, since Candle has no int8.
fn tensor(array: apple::Array) -> Result<Tensor, Error> {
    let shape = array.shape;
    Ok(match array.data {
        apple::Buffer::F16(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        apple::Buffer::F32(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        apple::Buffer::F64(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        apple::Buffer::I32(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        apple::Buffer::I8(v) => {
            let wide: Vec<i32> = v.into_iter().map(i32::from).collect();
            Tensor::from_vec(wide, shape, &Device::Cpu)?
        }
    })
}

fn own(state: &mut dyn EngineState) -> Result<&mut framework::State, Error> {
    let state = state.as_any_mut().downcast_mut::<AppleState>();
    state
        .map(|s| &mut s.0)
        .ok_or_else(|| failed("the state was made by another engine"))
}

fn failed(source: impl Into<BoxError>) -> Error {
    Error::Engine {
        engine: EngineKind::Apple,
        source: source.into(),
    }
}
