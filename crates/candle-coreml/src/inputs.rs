//! What was given for a prediction, checked against the function's description and put in its order.

use crate::allowed;
use crate::convert::{self, Prepared, Target};
use crate::error::{Error, FeatureRole};
use crate::value::{Dictionary, Given, Image, Pixels, Sequence, Value};
use candle_core::{DType, Device, Tensor};
use candle_coreml_mil::{ColorSpace, Feature, FeatureType, FunctionDescription, ImageDescription};
use std::borrow::Cow;

/// An input an engine can take.
pub(crate) enum Ready<'a> {
    Array(Prepared<'a>),
    /// Of the declared kind, never a tensor.
    Value(Cow<'a, Value>),
}

/// Checks names, kinds, shapes, devices and elements; gives the inputs in the declared order. An optional input that was
/// left out is filled where the model gives a default, and else stays out.
pub(crate) fn ready<'a>(
    function: &'a FunctionDescription,
    given: &[(&str, Given<'a>)],
) -> Result<Vec<(&'a str, Ready<'a>)>, Error> {
    check_names(function, given)?;
    let mut inputs = Vec::with_capacity(function.inputs.len());
    for feature in &function.inputs {
        let found = given.iter().find(|(name, _)| *name == feature.name);
        let value = match found {
            Some(&(_, value)) => Some(ready_one(feature, value)?),
            None => default(feature)?,
        };
        inputs.extend(value.map(|v| (feature.name.as_str(), v)));
    }
    Ok(inputs)
}

/// The device outputs go back to: that of the first input that is not on the CPU.
pub(crate) fn device(given: &[(&str, Given<'_>)]) -> Device {
    let devices = given.iter().filter_map(|(_, g)| g.tensor()).map(Tensor::device);
    devices
        .into_iter()
        .find(|d| !d.is_cpu())
        .cloned()
        .unwrap_or(Device::Cpu)
}

fn check_names(function: &FunctionDescription, given: &[(&str, Given<'_>)]) -> Result<(), Error> {
    for (i, (name, _)) in given.iter().enumerate() {
        if !function.inputs.iter().any(|f| f.name == *name) {
            return Err(Error::UnknownInput {
                function: function.name.clone(),
                name: name.to_string(),
                allowed: function.inputs.iter().map(|f| f.name.clone()).collect(),
            });
        }
        if given.iter().take(i).any(|(n, _)| n == name) {
            return Err(Error::DuplicateInput {
                name: name.to_string(),
            });
        }
    }
    let absent = |f: &&Feature| !f.optional && !given.iter().any(|(n, _)| *n == f.name);
    let missing: Vec<String> = function
        .inputs
        .iter()
        .filter(absent)
        .map(allowed::named)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::MissingInputs {
        function: function.name.clone(),
        missing,
        given: given.iter().map(|(n, _)| n.to_string()).collect(),
    })
}

fn default(feature: &Feature) -> Result<Option<Ready<'_>>, Error> {
    let FeatureType::MultiArray(array) = &feature.ty else {
        return Ok(None);
    };
    let Some(value) = array.default_value else {
        return Ok(None);
    };
    let target = Target {
        role: FeatureRole::Input,
        name: &feature.name,
        array,
    };
    Ok(convert::filled(target, value)?.map(Ready::Array))
}

fn ready_one<'a>(feature: &Feature, given: Given<'a>) -> Result<Ready<'a>, Error> {
    let borrowed = |value: &'a Value| Ready::Value(Cow::Borrowed(value));
    if let Some(tensor) = given.tensor() {
        return match &feature.ty {
            FeatureType::MultiArray(array) => {
                let target = Target {
                    role: FeatureRole::Input,
                    name: &feature.name,
                    array,
                };
                convert::prepare(target, tensor).map(Ready::Array)
            }
            _ => of_tensor(feature, tensor).unwrap_or_else(|| Err(wrong_kind(feature, given))),
        };
    }
    let value = match given {
        Given::Array(view) => {
            if let FeatureType::MultiArray(array) = &feature.ty {
                let target = Target {
                    role: FeatureRole::Input,
                    name: &feature.name,
                    array,
                };
                return convert::prepare_view(target, view).map(Ready::Array);
            }
            // One element, or a picture: as a tensor they are small, or unpacked in any case.
            let tensor = view.to_tensor()?;
            return of_tensor(feature, &tensor).unwrap_or_else(|| Err(wrong_kind(feature, given)));
        }
        Given::Value(value) => value,
        Given::Tensor(_) => return Err(wrong_kind(feature, given)),
    };
    match (&feature.ty, value) {
        (FeatureType::Image(description), Value::Image(image)) => {
            check_image(feature, description, image)?;
            Ok(borrowed(value))
        }
        (FeatureType::Int64, Value::Int64(_))
        | (FeatureType::Double, Value::Double(_))
        | (FeatureType::String, Value::String(_))
        | (FeatureType::Dictionary { integer_keys: true }, Value::Dictionary(Dictionary::Integers(_)))
        | (FeatureType::Dictionary { integer_keys: false }, Value::Dictionary(Dictionary::Strings(_)))
        | (
            FeatureType::Sequence {
                integer_elements: true,
            },
            Value::Sequence(Sequence::Integers(_)),
        )
        | (
            FeatureType::Sequence {
                integer_elements: false,
            },
            Value::Sequence(Sequence::Strings(_)),
        ) => Ok(borrowed(value)),
        _ => Err(wrong_kind(feature, given)),
    }
}

/// A tensor for a feature that is not a multi-array; none where no tensor is allowed.
fn of_tensor<'a>(feature: &Feature, tensor: &Tensor) -> Option<Result<Ready<'a>, Error>> {
    let value = match &feature.ty {
        FeatureType::Image(image) => picture(feature, image, tensor),
        FeatureType::Int64 => integer(feature, tensor),
        FeatureType::Double => double(feature, tensor),
        _ => return None,
    };
    Some(value.map(|value| Ready::Value(Cow::Owned(value))))
}

fn wrong_kind(feature: &Feature, given: Given<'_>) -> Error {
    let mut allowed = allowed::kind(&feature.ty);
    match feature.ty {
        FeatureType::Image(_) => allowed += ", or a u8 tensor [channels, height, width]",
        FeatureType::Int64 | FeatureType::Double => allowed += ", or a tensor of one element",
        _ => {}
    }
    Error::Kind {
        name: feature.name.clone(),
        found: given.describe(),
        allowed,
    }
}

fn picture(feature: &Feature, description: &ImageDescription, tensor: &Tensor) -> Result<Value, Error> {
    let location = tensor.device().location();
    let role = FeatureRole::Input;
    convert::check_device(role, &feature.name, location)?;
    let image = match Image::from_tensor(tensor) {
        Err(Error::Image { .. }) => return Err(wrong_kind(feature, Given::Tensor(tensor))),
        other => other?,
    };
    check_image(feature, description, &image)?;
    Ok(Value::Image(image))
}

fn check_image(feature: &Feature, description: &ImageDescription, image: &Image) -> Result<(), Error> {
    let layout = matches!(
        (description.color, image.pixels()),
        (ColorSpace::Grayscale, Pixels::Gray(_))
            | (ColorSpace::GrayscaleFp16, Pixels::GrayF16(_))
            | (ColorSpace::Rgb | ColorSpace::Bgr, Pixels::Rgb(_))
    );
    let default = [description.height, description.width];
    let size = [image.height(), image.width()];
    if layout && allowed::allows(&default, &description.flexibility, &size) {
        return Ok(());
    }
    Err(Error::Kind {
        name: feature.name.clone(),
        found: image.describe(),
        allowed: allowed::kind(&feature.ty),
    })
}

fn integer(feature: &Feature, tensor: &Tensor) -> Result<Value, Error> {
    if !tensor.dtype().is_int() {
        return Err(wrong_kind(feature, Given::Tensor(tensor)));
    }
    let element = one_element(feature, tensor)?;
    Ok(Value::Int64(element.to_dtype(DType::I64)?.to_scalar()?))
}

fn double(feature: &Feature, tensor: &Tensor) -> Result<Value, Error> {
    let element = one_element(feature, tensor)?;
    Ok(Value::Double(element.to_dtype(DType::F64)?.to_scalar()?))
}

fn one_element(feature: &Feature, tensor: &Tensor) -> Result<Tensor, Error> {
    if tensor.elem_count() != 1 {
        return Err(wrong_kind(feature, Given::Tensor(tensor)));
    }
    convert::check_device(FeatureRole::Input, &feature.name, tensor.device().location())?;
    Ok(tensor.to_device(&Device::Cpu)?.reshape(())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{array, feature, optional, typed};
    use candle_coreml_mil::{DType as Declared, Flexibility};

    fn function() -> FunctionDescription {
        let image = |color| {
            FeatureType::Image(ImageDescription {
                width: 4,
                height: 2,
                color,
                flexibility: Flexibility::Fixed,
            })
        };
        let mut inputs = vec![
            feature("x", array(Declared::Fp32, &[1, 2])),
            optional("scale", array(Declared::Fp32, &[2]), Some(3.0)),
            optional("bias", array(Declared::Fp32, &[2]), None),
        ];
        for (name, ty) in [
            ("picture", image(ColorSpace::Bgr)),
            ("grey", image(ColorSpace::Grayscale)),
            ("count", FeatureType::Int64),
            ("ratio", FeatureType::Double),
            ("label", FeatureType::String),
            ("weights", FeatureType::Dictionary { integer_keys: false }),
            (
                "words",
                FeatureType::Sequence {
                    integer_elements: false,
                },
            ),
        ] {
            inputs.push(Feature {
                optional: true,
                ..typed(name, ty)
            });
        }
        FunctionDescription {
            name: "main".into(),
            inputs,
            ..FunctionDescription::default()
        }
    }

    fn x() -> Tensor {
        Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn inputs_come_in_the_declared_order_with_defaults_filled_in() {
        let (f, x) = (function(), x());
        let label = Value::from("cat");
        let inputs = ready(&f, &[("label", Given::Value(&label)), ("x", Given::Tensor(&x))]).unwrap();
        let names: Vec<_> = inputs.iter().map(|(n, _)| *n).collect();
        assert_eq!(
            names,
            ["x", "scale", "label"],
            "bias has no default and stays out"
        );
        let Ready::Array(scale) = &inputs[1].1 else {
            panic!("not an array")
        };
        let scale = scale.lock().unwrap().array().to_tensor().unwrap();
        assert_eq!(scale.to_vec1::<f32>().unwrap(), [3.0, 3.0]);
    }

    #[test]
    fn arrays_outside_candle_are_read_in_place_or_converted_as_tensors_are() {
        use crate::value::{ArrayView, Elements};
        let f = function();
        let memory = [1.0f32, 2.0];
        let one = |shape, elements| Given::Array(ArrayView::new(shape, elements).unwrap());
        let inputs = ready(&f, &[("x", one(&[1, 2], Elements::F32(&memory)))]).unwrap();
        let Ready::Array(x) = &inputs[0].1 else {
            panic!("not an array")
        };
        assert_eq!(x.lock().unwrap().array().address(), memory.as_ptr().addr());
        let wide = [1.0f64, 2.5];
        let count = ("count", one(&[1], Elements::I64(&[7])));
        let picture = ("picture", one(&[2, 4, 3], Elements::U8(&[9; 24])));
        let inputs = ready(&f, &[("x", one(&[1, 2], Elements::F64(&wide))), count, picture]).unwrap();
        let Ready::Array(x) = &inputs[0].1 else {
            panic!("not an array")
        };
        let x = x.lock().unwrap().array().to_tensor().unwrap();
        assert_eq!(x.to_vec2::<f32>().unwrap(), [[1.0, 2.5]]);
        assert!(matches!(&inputs[2].1, Ready::Value(v) if matches!(**v, Value::Image(_))));
        assert!(matches!(&inputs[3].1, Ready::Value(v) if matches!(**v, Value::Int64(7))));
        let words = ready(&f, &[("x", one(&[2], Elements::F32(&memory)))])
            .err()
            .unwrap()
            .to_string();
        assert_eq!(words, r#"input "x": shape [2] is not allowed; allowed: [1, 2]"#);
        let label = ready(
            &f,
            &[
                ("x", one(&[1, 2], Elements::F32(&memory))),
                ("label", one(&[1], Elements::U8(&[1]))),
            ],
        );
        let words = label.err().unwrap().to_string();
        assert_eq!(
            words,
            r#"input "label": a u8 array of shape [1] was given; allowed: a string"#
        );
    }

    #[test]
    fn wrong_names_are_refused_with_the_right_ones() {
        let (f, x) = (function(), x());
        let g = Given::Tensor(&x);
        let rows: [(&[(&str, Given<'_>)], &str); 4] = [
            (
                &[("y", g)],
                r#"function "main" has no input "y"; it takes: "x", "scale""#,
            ),
            (&[("x", g), ("x", g)], r#"input "x" was given more than once"#),
            (
                &[],
                r#"function "main" was not given: "x" (a tensor fp32 [1, 2]); given: none"#,
            ),
            (&[("scale", g)], r#"given: "scale""#),
        ];
        for (given, wanted) in rows {
            let words = ready(&f, given).err().unwrap().to_string();
            assert!(words.contains(wanted), "{words}");
        }
    }

    #[test]
    fn every_kind_of_value_is_taken_where_it_is_declared_and_nowhere_else() {
        let (f, x) = (function(), x());
        let rgb = Image::new(4, 2, Pixels::Rgb(vec![0; 24])).unwrap();
        let grey = Image::new(4, 2, Pixels::Gray(vec![0; 8])).unwrap();
        let small = Image::new(2, 2, Pixels::Rgb(vec![0; 12])).unwrap();
        let u8s = |shape: &[usize]| Value::from(Tensor::zeros(shape, DType::U8, &Device::Cpu).unwrap());
        let one = |dtype| Value::from(Tensor::ones(1, dtype, &Device::Cpu).unwrap());
        let strings = Value::Sequence(Sequence::Strings(vec!["a".into()]));
        let integers = Value::Sequence(Sequence::Integers(vec![1]));
        let by_name = Value::Dictionary(Dictionary::Strings([("a".to_string(), 1.0)].into()));
        let by_number = Value::Dictionary(Dictionary::Integers([(1, 1.0)].into()));
        let rows = [
            ("picture", rgb.clone().into(), true),
            ("picture", grey.clone().into(), false),
            ("picture", small.into(), false),
            ("picture", u8s(&[3, 2, 4]), true),
            ("picture", u8s(&[1, 3, 2, 4]), true),
            ("picture", u8s(&[3, 4, 2]), false),
            ("picture", x.clone().into(), false),
            ("grey", grey.into(), true),
            ("grey", u8s(&[2, 4]), true),
            ("grey", rgb.clone().into(), false),
            ("count", 3i64.into(), true),
            ("count", one(DType::U32), true),
            ("count", one(DType::F32), false),
            ("count", 3.0.into(), false),
            ("ratio", 3.0.into(), true),
            ("ratio", one(DType::F16), true),
            ("ratio", u8s(&[2]), false),
            ("label", "cat".into(), true),
            ("label", 1i64.into(), false),
            ("label", x.clone().into(), false),
            ("weights", by_name, true),
            ("weights", by_number, false),
            ("words", strings, true),
            ("words", integers, false),
            ("scale", rgb.into(), false),
        ];
        for (name, value, taken) in rows {
            let found = ready(&f, &[("x", Given::Tensor(&x)), (name, Given::Value(&value))]);
            match found {
                Ok(_) => assert!(taken, "{name} took {value:?}"),
                Err(e) => {
                    let words = e.to_string();
                    assert!(
                        !taken && words.contains(&format!("input {name:?}: a")),
                        "{name}: {words}"
                    );
                    assert!(words.contains("allowed: a"), "{words}");
                }
            }
        }
    }
}
