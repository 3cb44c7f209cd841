//! `ModelDescription` of the protobuf becomes a [`Description`].

use coreml_proto::proto as pb;
use pb::array_feature_type::{ArrayDataType, DefaultOptionalValue, ShapeFlexibility};
use pb::feature_type::Type;
use pb::image_feature_type::{ColorSpace as PbColor, SizeFlexibility};

use crate::description::*;
use crate::error::{Problem, problem};
use crate::program::DType;

type Result<T> = std::result::Result<T, Problem>;

/// The description without specification version and kind, which are not in the message.
///
/// Models of one function describe it at the top level; here it becomes a function called `main`.
pub(crate) fn description(d: &pb::ModelDescription) -> Result<Description> {
    let mut functions = Vec::new();
    for f in &d.functions {
        let place = format!("description of function {:?}", f.name);
        functions.push(function(&f.name, &f.input, &f.output, &f.state).map_err(|p| p.within(place))?);
    }
    if functions.is_empty() {
        let main = function("main", &d.input, &d.output, &d.state);
        functions.push(main.map_err(|p| p.within("description"))?);
    }
    let default_function = match d.default_function_name.as_str() {
        "" => functions.first().map(|f| f.name.clone()).unwrap_or_default(),
        name if functions.iter().any(|f| f.name == name) => name.to_string(),
        name => {
            return Err(problem!(
                "description: default function {name:?} is not described"
            ));
        }
    };
    let default = d.functions.iter().find(|f| f.name == default_function);
    let predicted = default.map_or(&d.predicted_feature_name, |f| &f.predicted_feature_name);
    let probabilities = default.map_or(&d.predicted_probabilities_name, |f| {
        &f.predicted_probabilities_name
    });
    Ok(Description {
        functions,
        default_function,
        specification_version: 0,
        metadata: metadata(d.metadata.clone().unwrap_or_default()),
        kind: ModelKind::Program,
        predicted_feature: non_empty(predicted),
        predicted_probabilities: non_empty(probabilities),
    })
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_string())
}

fn metadata(m: pb::Metadata) -> Metadata {
    let mut user: Vec<_> = m.user_defined.into_iter().collect();
    user.sort();
    Metadata {
        short_description: m.short_description,
        author: m.author,
        license: m.license,
        version: m.version_string,
        user,
    }
}

fn function(
    name: &str,
    inputs: &[pb::FeatureDescription],
    outputs: &[pb::FeatureDescription],
    states: &[pb::FeatureDescription],
) -> Result<FunctionDescription> {
    let all = |what: &str, list: &[pb::FeatureDescription]| -> Result<Vec<Feature>> {
        list.iter()
            .map(|f| feature(f).map_err(|p| p.within(format!("{what} {:?}", f.name))))
            .collect()
    };
    Ok(FunctionDescription {
        name: name.to_string(),
        inputs: all("input", inputs)?,
        outputs: all("output", outputs)?,
        states: all("state", states)?,
    })
}

fn feature(f: &pb::FeatureDescription) -> Result<Feature> {
    let ty = f.r#type.as_ref().ok_or_else(|| problem!("has no type"))?;
    Ok(Feature {
        name: f.name.clone(),
        description: f.short_description.clone(),
        ty: feature_type(ty)?,
        optional: ty.is_optional,
    })
}

fn feature_type(ty: &pb::FeatureType) -> Result<FeatureType> {
    Ok(match ty.r#type.as_ref().ok_or_else(|| problem!("has no type"))? {
        Type::Int64Type(_) => FeatureType::Int64,
        Type::DoubleType(_) => FeatureType::Double,
        Type::StringType(_) => FeatureType::String,
        Type::ImageType(image) => FeatureType::Image(image_description(image)?),
        Type::MultiArrayType(array) => FeatureType::MultiArray(array_description(array)?),
        Type::DictionaryType(d) => FeatureType::Dictionary {
            integer_keys: matches!(
                d.key_type,
                Some(pb::dictionary_feature_type::KeyType::Int64KeyType(_))
            ),
        },
        Type::SequenceType(s) => FeatureType::Sequence {
            integer_elements: matches!(s.r#type, Some(pb::sequence_feature_type::Type::Int64Type(_))),
        },
        Type::StateType(s) => match &s.r#type {
            Some(pb::state_feature_type::Type::ArrayType(array)) => {
                FeatureType::State(array_description(array)?)
            }
            None => return Err(problem!("state without an array type")),
        },
    })
}

fn array_description(a: &pb::ArrayFeatureType) -> Result<ArrayDescription> {
    let dtype = match ArrayDataType::try_from(a.data_type) {
        Ok(ArrayDataType::Float32) => DType::Fp32,
        Ok(ArrayDataType::Double) => DType::Fp64,
        Ok(ArrayDataType::Int32) => DType::Int32,
        Ok(ArrayDataType::Int8) => DType::Int8,
        Ok(ArrayDataType::Float16) => DType::Fp16,
        Ok(ArrayDataType::InvalidArrayDataType) | Err(_) => {
            return Err(problem!(
                "array element type {:#x}; Float16, Float32, Double, Int32 and Int8 are known",
                a.data_type
            ));
        }
    };
    let flexibility = match &a.shape_flexibility {
        None => Flexibility::Fixed,
        Some(ShapeFlexibility::EnumeratedShapes(e)) => {
            Flexibility::Enumerated(e.shapes.iter().map(|s| shape(&s.shape)).collect::<Result<_>>()?)
        }
        Some(ShapeFlexibility::ShapeRange(r)) => {
            Flexibility::Ranges(r.size_ranges.iter().map(range).collect::<Result<_>>()?)
        }
    };
    let default_value = a.default_optional_value.map(|v| match v {
        DefaultOptionalValue::IntDefaultValue(n) => f64::from(n),
        DefaultOptionalValue::FloatDefaultValue(x) => f64::from(x),
        DefaultOptionalValue::DoubleDefaultValue(x) => x,
    });
    Ok(ArrayDescription {
        dtype,
        shape: shape(&a.shape)?,
        flexibility,
        default_value,
    })
}

fn image_description(image: &pb::ImageFeatureType) -> Result<ImageDescription> {
    let color = match PbColor::try_from(image.color_space) {
        Ok(PbColor::Grayscale) => ColorSpace::Grayscale,
        Ok(PbColor::GrayscaleFloat16) => ColorSpace::GrayscaleFp16,
        Ok(PbColor::Rgb) => ColorSpace::Rgb,
        Ok(PbColor::Bgr) => ColorSpace::Bgr,
        Ok(PbColor::InvalidColorSpace) | Err(_) => {
            return Err(problem!(
                "colour space {}; 10, 20, 30 and 40 are known",
                image.color_space
            ));
        }
    };
    let flexibility = match &image.size_flexibility {
        None => Flexibility::Fixed,
        Some(SizeFlexibility::EnumeratedSizes(e)) => Flexibility::Enumerated(
            e.sizes
                .iter()
                .map(|s| Ok(vec![size(s.height)?, size(s.width)?]))
                .collect::<Result<_>>()?,
        ),
        Some(SizeFlexibility::ImageSizeRange(r)) => {
            let side = |s: &Option<pb::SizeRange>| s.as_ref().map_or(Ok((0, None)), range);
            Flexibility::Ranges(vec![side(&r.height_range)?, side(&r.width_range)?])
        }
    };
    Ok(ImageDescription {
        width: dimension(image.width)?,
        height: dimension(image.height)?,
        color,
        flexibility,
    })
}

fn range(r: &pb::SizeRange) -> Result<(usize, Option<usize>)> {
    let upper = if r.upper_bound < 0 {
        None
    } else {
        Some(dimension(r.upper_bound)?)
    };
    Ok((size(r.lower_bound)?, upper))
}

fn shape(dims: &[i64]) -> Result<Vec<usize>> {
    dims.iter().map(|n| dimension(*n)).collect()
}

fn dimension(n: i64) -> Result<usize> {
    usize::try_from(n).map_err(|_| problem!("size {n} is negative or too large"))
}

fn size(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| problem!("size {n} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(shape: &[i64]) -> pb::ArrayFeatureType {
        pb::ArrayFeatureType {
            shape: shape.to_vec(),
            data_type: ArrayDataType::Float16 as i32,
            shape_flexibility: None,
            default_optional_value: None,
        }
    }

    fn described(name: &str, ty: Type) -> pb::FeatureDescription {
        let ty = pb::FeatureType {
            is_optional: true,
            r#type: Some(ty),
        };
        pb::FeatureDescription {
            name: name.to_string(),
            short_description: "words".to_string(),
            r#type: Some(ty),
        }
    }

    #[test]
    fn flexible_and_optional_arrays_keep_everything() {
        let mut a = array(&[1, 4]);
        a.shape_flexibility = Some(ShapeFlexibility::ShapeRange(pb::array_feature_type::ShapeRange {
            size_ranges: vec![
                pb::SizeRange {
                    lower_bound: 1,
                    upper_bound: 1,
                },
                pb::SizeRange {
                    lower_bound: 2,
                    upper_bound: -1,
                },
            ],
        }));
        a.default_optional_value = Some(DefaultOptionalValue::FloatDefaultValue(0.5));
        let found = feature(&described("x", Type::MultiArrayType(a))).unwrap();
        let ty = FeatureType::MultiArray(ArrayDescription {
            dtype: DType::Fp16,
            shape: vec![1, 4],
            flexibility: Flexibility::Ranges(vec![(1, Some(1)), (2, None)]),
            default_value: Some(0.5),
        });
        assert_eq!(
            found,
            Feature {
                name: "x".into(),
                description: "words".into(),
                ty,
                optional: true
            }
        );
    }

    #[test]
    fn images_give_height_before_width() {
        let image = pb::ImageFeatureType {
            width: 3,
            height: 2,
            color_space: PbColor::Bgr as i32,
            size_flexibility: Some(SizeFlexibility::EnumeratedSizes(
                pb::image_feature_type::EnumeratedImageSizes {
                    sizes: vec![pb::image_feature_type::ImageSize {
                        width: 30,
                        height: 20,
                    }],
                },
            )),
        };
        let expected = ImageDescription {
            width: 3,
            height: 2,
            color: ColorSpace::Bgr,
            flexibility: Flexibility::Enumerated(vec![vec![20, 30]]),
        };
        assert_eq!(
            feature(&described("i", Type::ImageType(image))).unwrap().ty,
            FeatureType::Image(expected)
        );
    }

    #[test]
    fn both_forms_of_functions_are_read() {
        let x = || described("x", Type::MultiArrayType(array(&[1])));
        let flat = pb::ModelDescription {
            input: vec![x()],
            predicted_feature_name: "label".into(),
            ..Default::default()
        };
        let found = description(&flat).unwrap();
        assert_eq!(
            (found.functions.len(), found.default_function.as_str()),
            (1, "main")
        );
        assert_eq!(found.predicted_feature.as_deref(), Some("label"));
        let named = |name: &str| pb::FunctionDescription {
            name: name.into(),
            input: vec![x()],
            ..Default::default()
        };
        let mut many = pb::ModelDescription {
            functions: vec![named("infer"), named("prefill")],
            default_function_name: "prefill".into(),
            ..Default::default()
        };
        let found = description(&many).unwrap();
        assert_eq!(
            found
                .functions
                .iter()
                .map(|f| f.name.as_str())
                .collect::<Vec<_>>(),
            ["infer", "prefill"]
        );
        assert_eq!(found.default_function, "prefill");
        many.default_function_name = "other".into();
        assert!(description(&many).unwrap_err().into_text().contains("other"));
    }

    #[test]
    fn nonsense_is_refused_with_the_feature_it_is_in() {
        let mut no_type = array(&[1]);
        no_type.data_type = 0;
        let bad_color = pb::ImageFeatureType {
            color_space: 99,
            ..Default::default()
        };
        for (what, ty) in [
            ("negative", Type::MultiArrayType(array(&[-1]))),
            ("element type", Type::MultiArrayType(no_type)),
            ("colour", Type::ImageType(bad_color)),
            ("state", Type::StateType(pb::StateFeatureType { r#type: None })),
        ] {
            let d = pb::ModelDescription {
                input: vec![described("pixels", ty)],
                ..Default::default()
            };
            let text = description(&d).unwrap_err().into_text();
            assert!(text.contains("input \"pixels\"") && text.contains(what), "{text}");
        }
    }
}
