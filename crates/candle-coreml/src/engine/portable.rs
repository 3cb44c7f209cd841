//! The portable engine behind the [`Engine`] contract: what it takes and gives is arrays, so pictures become arrays here.

use super::{Array, Data, Engine, EngineKind, EngineState, Input, InputValue};
use crate::allowed;
use crate::builder::{Numerics, Options};
use crate::error::{BoxError, Error};
use crate::model::find_function;
use crate::trace::TracedStep;
use crate::value::{Dictionary, Image, Pixels, Value};
use candle_core::{Device, Tensor};
use candle_coreml_kernels::Pool;
use candle_coreml_mil::{
    ColorSpace, DType as ElementType, Description, Feature, FeatureType, FunctionDescription,
    ImageDescription, Model, ModelKind,
};
use candle_coreml_portable as portable;
use half::f16;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

/// One function of a model on the portable engine.
struct PortableEngine {
    model: portable::Model,
    /// Index of the function in the description; checked when this is made.
    function: usize,
    /// The function's description with fp32 in the place of fp16, when the model was opened so.
    widened: Option<FunctionDescription>,
}

/// The portable engine's buffers.
struct PortableState(portable::State);

/// Prepares an opened model to run the function the options name.
pub(super) fn open(model: Arc<Model>, options: &Options) -> Result<Arc<dyn Engine>, Error> {
    let default = Some(model.description().default_function.as_str())
        .filter(|d| !d.is_empty())
        .unwrap_or("main");
    let name = options.function.as_deref().unwrap_or(default).to_string();
    if model.description().kind == ModelKind::Program {
        find_function(model.description(), &name)?;
    }
    let engine_options = portable::Options {
        numerics: match options.numerics {
            Numerics::Default => portable::Numerics::Default,
            Numerics::Faithful => portable::Numerics::Faithful,
            Numerics::Fast => portable::Numerics::Fast,
        },
        pool: (options.threads > 0).then(|| Pool::new(options.threads)),
        wide_outputs: options.wide,
        ..portable::Options::default()
    };
    let model = portable::Model::load(model, Some(&name), engine_options).map_err(failed)?;
    Ok(Arc::new(PortableEngine::new(model, &name, options.wide)?))
}

impl PortableEngine {
    fn new(model: portable::Model, name: &str, wide: bool) -> Result<Self, Error> {
        let description = model.file().description();
        let function = find_function(description, name)?;
        check_kinds(&description.functions[function])?;
        let widened = description.functions.get(function).filter(|_| wide).map(widen);
        Ok(PortableEngine {
            model,
            function,
            widened,
        })
    }
}

impl Engine for PortableEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Portable
    }

    fn description(&self) -> &Description {
        self.model.file().description()
    }

    fn function(&self) -> &FunctionDescription {
        let own = &self.description().functions[self.function];
        self.widened.as_ref().unwrap_or(own)
    }

    fn with_function(&self, name: &str) -> Result<Arc<dyn Engine>, Error> {
        let model = self.model.with_function(name).map_err(failed)?;
        Ok(Arc::new(PortableEngine::new(
            model,
            name,
            self.widened.is_some(),
        )?))
    }

    fn make_state(&self) -> Result<Box<dyn EngineState>, Error> {
        Ok(Box::new(PortableState(self.model.make_state())))
    }

    fn predict(
        &self,
        inputs: &[Input<'_>],
        state: Option<&mut dyn EngineState>,
    ) -> Result<Vec<(String, Value)>, Error> {
        self.run(inputs, state, |arrays, state| self.model.predict(arrays, state))
    }

    fn trace(
        &self,
        inputs: &[Input<'_>],
        state: Option<&mut dyn EngineState>,
        see: &mut dyn FnMut(TracedStep),
    ) -> Result<Vec<(String, Value)>, Error> {
        let options = portable::Options {
            passes: false,
            every_value: true,
            ..self.model.options().clone()
        };
        let model = self.model.with_options(options).map_err(failed)?;
        let mut tracer = Tracer { see, failure: None };
        let outputs = self.run(inputs, state, |arrays, state| {
            model.observe(arrays, state, &mut tracer)
        });
        tracer.failure.map_or(outputs, Err)
    }

    fn explain(&self) -> Result<String, Error> {
        Ok(self.model.explain().map_err(failed)?.to_string())
    }
}

/// Shows the steps of a run to a caller of this crate.
struct Tracer<'a> {
    see: &'a mut dyn FnMut(TracedStep),
    failure: Option<Error>,
}

impl portable::Observer for Tracer<'_> {
    fn after(&mut self, done: &portable::Done<'_>) {
        let values: Result<Vec<Tensor>, Error> = done.results.iter().cloned().map(tensor).collect();
        match values {
            Ok(values) => (self.see)(TracedStep {
                name: done.step.name.to_string(),
                operation: done.step.op.name(),
                elapsed: done.elapsed,
                dtypes: done.step.dtypes.to_vec(),
                values,
                overflows: done.overflows,
            }),
            Err(error) => self.failure = self.failure.take().or(Some(error)),
        }
    }
}

impl PortableEngine {
    /// Converts inputs, has them run, converts the results.
    fn run<'s>(
        &self,
        inputs: &[Input<'_>],
        state: Option<&'s mut dyn EngineState>,
        run: impl FnOnce(
            &[(&str, portable::Array<'_>)],
            Option<&'s mut portable::State>,
        ) -> Result<Vec<(String, portable::OwnedArray)>, portable::Error>,
    ) -> Result<Vec<(String, Value)>, Error> {
        let function = self.function();
        let taken = inputs
            .iter()
            .map(|input| take(function, input))
            .collect::<Result<Vec<_>, _>>()?;
        let arrays: Vec<_> = inputs
            .iter()
            .zip(&taken)
            .map(|(i, t)| (i.name, t.array()))
            .collect();
        let state = match state {
            Some(state) => Some(own(state)?),
            None => None,
        };
        let mut results = run(&arrays, state).map_err(failed)?;
        let in_order = function.outputs.iter().map(|feature| {
            let at = results.iter().position(|(name, _)| *name == feature.name);
            let at = at.ok_or_else(|| failed(format!("output {:?} was not computed", feature.name)))?;
            let (name, array) = results.swap_remove(at);
            Ok((name, give(feature, array)?))
        });
        in_order.collect()
    }
}

impl EngineState for PortableState {
    fn read(&self, name: &str) -> Result<Tensor, Error> {
        let array = self
            .0
            .get(name)
            .ok_or_else(|| failed(format!("no state {name:?}")))?;
        tensor(array)
    }

    fn write(&mut self, name: &str, array: Array<'_>) -> Result<(), Error> {
        self.0.set(name, Taken::from(array).array()).map_err(failed)
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.0.reset();
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn EngineState>, Error> {
        Ok(Box::new(PortableState(self.0.clone())))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// An input in one of the three element types this engine reads.
struct Taken<'a> {
    shape: std::borrow::Cow<'a, [usize]>,
    elements: Elements<'a>,
}

enum Elements<'a> {
    Borrowed(portable::Data<'a>),
    F32(Vec<f32>),
    I32(Vec<i32>),
}

impl Taken<'_> {
    fn array(&self) -> portable::Array<'_> {
        let data = match &self.elements {
            Elements::Borrowed(data) => *data,
            Elements::F32(v) => portable::Data::F32(v),
            Elements::I32(v) => portable::Data::I32(v),
        };
        portable::Array {
            shape: &self.shape,
            data,
        }
    }
}

impl<'a> From<Array<'a>> for Taken<'a> {
    fn from(array: Array<'a>) -> Self {
        let elements = match array.data {
            Data::F16(v) => Elements::Borrowed(portable::Data::F16(v)),
            Data::F32(v) => Elements::Borrowed(portable::Data::F32(v)),
            Data::I32(v) => Elements::Borrowed(portable::Data::I32(v)),
            // The engine computes in f32; fp64 is rounded to it.
            Data::F64(v) => Elements::F32(v.iter().map(|&x| x as f32).collect()),
            Data::I8(v) => Elements::I32(v.iter().map(|&x| x.into()).collect()),
        };
        Taken {
            shape: array.shape.into(),
            elements,
        }
    }
}

/// The same function with fp32 inputs and outputs where the file says fp16; states stay as they are.
fn widen(function: &FunctionDescription) -> FunctionDescription {
    let mut function = function.clone();
    for feature in function.inputs.iter_mut().chain(&mut function.outputs) {
        if let FeatureType::MultiArray(array) = &mut feature.ty
            && array.dtype == ElementType::Fp16
        {
            array.dtype = ElementType::Fp32;
        }
    }
    function
}

/// Refuses, when a model is opened, the kinds of features this engine has no arrays for.
fn check_kinds(function: &FunctionDescription) -> Result<(), Error> {
    use FeatureType::*;
    let refused_input =
        |f: &&Feature| !f.optional && matches!(f.ty, String | Dictionary { .. } | Sequence { .. });
    let refused_output = |f: &&Feature| matches!(f.ty, Sequence { .. });
    let refused = |side: &str, f: &Feature| failed(format!("{side} {} is not supported", allowed::named(f)));
    if let Some(f) = function.inputs.iter().find(refused_input) {
        return Err(refused("input", f));
    }
    function
        .outputs
        .iter()
        .find(refused_output)
        .map_or(Ok(()), |f| Err(refused("output", f)))
}

fn take<'a>(function: &FunctionDescription, input: &Input<'a>) -> Result<Taken<'a>, Error> {
    let one = |elements| Taken {
        shape: vec![1].into(),
        elements,
    };
    match input.value {
        InputValue::Array(array) => Ok(array.into()),
        InputValue::Value(Value::Image(image)) => {
            let feature = function.inputs.iter().find(|f| f.name == input.name);
            let bgr = matches!(
                feature.map(|f| &f.ty),
                Some(FeatureType::Image(ImageDescription {
                    color: ColorSpace::Bgr,
                    ..
                }))
            );
            Ok(planes(image, bgr))
        }
        InputValue::Value(Value::Double(v)) => Ok(one(Elements::F32(vec![*v as f32]))),
        InputValue::Value(Value::Int64(v)) => match i32::try_from(*v) {
            Ok(v) => Ok(one(Elements::I32(vec![v]))),
            Err(_) => Err(failed(format!("input {:?}: {v} is outside 32 bits", input.name))),
        },
        InputValue::Value(other) => Err(failed(format!(
            "input {:?}: {} is not supported",
            input.name,
            other.kind()
        ))),
    }
}

/// A picture as [1, channels, height, width] of 0 to 255, blue first where the model wants it so.
fn planes(image: &Image, bgr: bool) -> Taken<'static> {
    let (elements, channels): (Vec<f32>, usize) = match image.pixels() {
        Pixels::Gray(p) => (p.iter().map(|&v| v.into()).collect(), 1),
        Pixels::GrayF16(p) => (p.iter().map(|v| v.to_f32()).collect(), 1),
        Pixels::Rgb(p) => {
            let order = if bgr { [2, 1, 0] } else { [0, 1, 2] };
            let plane = |channel: usize| p.iter().skip(channel).step_by(3).map(|&v| f32::from(v));
            (order.into_iter().flat_map(plane).collect(), 3)
        }
    };
    Taken {
        shape: vec![1, channels, image.height(), image.width()].into(),
        elements: Elements::F32(elements),
    }
}

fn give(feature: &Feature, array: portable::OwnedArray) -> Result<Value, Error> {
    use portable::Buffer;
    match (&feature.ty, array.data) {
        (FeatureType::String, Buffer::Strings(texts)) => {
            let text = texts.into_iter().next();
            text.map(Value::String)
                .ok_or_else(|| failed(format!("output {:?} is empty", feature.name)))
        }
        (FeatureType::Dictionary { .. }, Buffer::Dictionary(pairs)) => dictionary(feature, pairs),
        (FeatureType::Int64, Buffer::I32(v)) if v.len() == 1 => Ok(Value::Int64(v[0].into())),
        (FeatureType::Int64, Buffer::I64(v)) if v.len() == 1 => Ok(Value::Int64(v[0])),
        (FeatureType::Double, Buffer::F32(v)) if v.len() == 1 => Ok(Value::Double(v[0].into())),
        (FeatureType::Double, Buffer::F16(v)) if v.len() == 1 => Ok(Value::Double(v[0].into())),
        (FeatureType::Image(description), data) => {
            let array = portable::OwnedArray {
                shape: array.shape,
                data,
            };
            picture(feature, description, &array)
        }
        (_, data) => tensor(portable::OwnedArray {
            shape: array.shape,
            data,
        })
        .map(Value::Tensor),
    }
}

/// Numbers by label, labels of one kind.
fn dictionary(feature: &Feature, pairs: Vec<(portable::Label, f64)>) -> Result<Value, Error> {
    let (mut texts, mut numbers) = (BTreeMap::new(), BTreeMap::new());
    for (label, value) in pairs {
        match label {
            portable::Label::Text(text) => texts.insert(text, value),
            portable::Label::Number(number) => numbers.insert(number, value),
        };
    }
    match (texts.is_empty(), numbers.is_empty()) {
        (_, true) => Ok(Value::Dictionary(Dictionary::Strings(texts))),
        (true, false) => Ok(Value::Dictionary(Dictionary::Integers(numbers))),
        (false, false) => Err(failed(format!(
            "output {:?} has labels of two kinds",
            feature.name
        ))),
    }
}

/// A picture from [1, channels, height, width]; 8-bit pixels are rounded and clamped to 0 to 255.
fn picture(
    feature: &Feature,
    description: &ImageDescription,
    array: &portable::OwnedArray,
) -> Result<Value, Error> {
    let values = array.to_f32();
    let wrong = || {
        failed(format!(
            "output {:?} has the shape {:?}, no picture",
            feature.name, array.shape
        ))
    };
    let &[1, channels, height, width] = array.shape.as_slice() else {
        return Err(wrong());
    };
    let byte = |v: f32| v.round().clamp(0.0, 255.0) as u8;
    let pixels = match (description.color, channels) {
        (ColorSpace::Grayscale, 1) => Pixels::Gray(values.into_iter().map(byte).collect()),
        (ColorSpace::GrayscaleFp16, 1) => Pixels::GrayF16(values.into_iter().map(f16::from_f32).collect()),
        (ColorSpace::Rgb | ColorSpace::Bgr, 3) => {
            let count = values.len() / 3;
            let order = if description.color == ColorSpace::Bgr {
                [2, 1, 0]
            } else {
                [0, 1, 2]
            };
            let pixel = |i: usize| order.map(|channel| byte(values[channel * count + i]));
            Pixels::Rgb((0..count).flat_map(pixel).collect())
        }
        _ => return Err(wrong()),
    };
    Ok(Value::Image(Image::new(width, height, pixels)?))
}

/// The engine's result as a tensor that takes over its memory.
fn tensor(array: portable::OwnedArray) -> Result<Tensor, Error> {
    let shape = array.shape;
    Ok(match array.data {
        portable::Buffer::F32(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        portable::Buffer::F16(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        portable::Buffer::I32(v) => Tensor::from_vec(v, shape, &Device::Cpu)?,
        _ => return Err(failed("a text where a tensor is declared")),
    })
}

fn own(state: &mut dyn EngineState) -> Result<&mut portable::State, Error> {
    let state = state.as_any_mut().downcast_mut::<PortableState>();
    state
        .map(|s| &mut s.0)
        .ok_or_else(|| failed("the state was made by another engine"))
}

fn failed(source: impl Into<BoxError>) -> Error {
    Error::Engine {
        engine: EngineKind::Portable,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_coreml_mil::Flexibility;

    fn description(color: ColorSpace) -> ImageDescription {
        ImageDescription {
            width: 2,
            height: 1,
            color,
            flexibility: Flexibility::Fixed,
        }
    }

    #[test]
    fn a_picture_goes_through_the_engine_in_the_channel_order_of_the_model() {
        let image = Image::new(2, 1, Pixels::Rgb(vec![1, 2, 3, 4, 5, 6])).unwrap();
        let rows = [
            (ColorSpace::Rgb, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]),
            (ColorSpace::Bgr, [3.0, 6.0, 2.0, 5.0, 1.0, 4.0]),
        ];
        for (color, wanted) in rows {
            let taken = planes(&image, color == ColorSpace::Bgr);
            let Elements::F32(values) = &taken.elements else {
                panic!("not f32")
            };
            assert_eq!(
                (taken.shape.as_ref(), values.as_slice()),
                (&[1, 3, 1, 2][..], &wanted[..])
            );
            let array = portable::OwnedArray {
                shape: taken.shape.to_vec(),
                data: portable::Buffer::F32(values.iter().map(|v| v + 0.3).collect()),
            };
            let feature = crate::engine::fake::typed("y", FeatureType::Image(description(color)));
            let Value::Image(back) = give(&feature, array).unwrap() else {
                panic!("not an image")
            };
            assert_eq!(back, image);
        }
    }

    #[test]
    fn what_is_no_picture_is_refused_by_name() {
        let feature = crate::engine::fake::typed("y", FeatureType::Image(description(ColorSpace::Rgb)));
        let array = portable::OwnedArray {
            shape: vec![1, 1, 1, 2],
            data: portable::Buffer::F32(vec![0.0; 2]),
        };
        let words = give(&feature, array).unwrap_err().to_string();
        assert_eq!(
            words,
            r#"portable engine: output "y" has the shape [1, 1, 1, 2], no picture"#
        );
    }
}
