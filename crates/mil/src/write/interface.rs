//! A [`Description`] becomes the `Model` message around the program.

use std::collections::BTreeMap;

use coreml_proto::proto as pb;
use pb::array_feature_type::{ArrayDataType, DefaultOptionalValue, ShapeFlexibility};
use pb::feature_type::Type;
use pb::image_feature_type::{ColorSpace as PbColor, SizeFlexibility};
use prost::Message;

use crate::description::*;
use crate::program::DType;
use crate::wire;

/// `CoreML.Specification.Model` with the fields an ML Program has. The generated types keep maps in hash order; these
/// have them sorted, so that equal models give equal bytes.
#[derive(Clone, PartialEq, Message)]
pub(super) struct WireModel {
    #[prost(int32, tag = "1")]
    specification_version: i32,
    #[prost(message, optional, tag = "2")]
    description: Option<WireDescription>,
    #[prost(message, optional, tag = "502")]
    program: Option<wire::Program>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WireDescription {
    #[prost(message, repeated, tag = "1")]
    input: Vec<pb::FeatureDescription>,
    #[prost(message, repeated, tag = "10")]
    output: Vec<pb::FeatureDescription>,
    #[prost(string, tag = "11")]
    predicted_feature_name: String,
    #[prost(string, tag = "12")]
    predicted_probabilities_name: String,
    #[prost(message, repeated, tag = "13")]
    state: Vec<pb::FeatureDescription>,
    #[prost(message, repeated, tag = "20")]
    functions: Vec<pb::FunctionDescription>,
    #[prost(string, tag = "21")]
    default_function_name: String,
    #[prost(message, optional, tag = "100")]
    metadata: Option<WireMetadata>,
}

#[derive(Clone, PartialEq, Message)]
struct WireMetadata {
    #[prost(string, tag = "1")]
    short_description: String,
    #[prost(string, tag = "2")]
    version_string: String,
    #[prost(string, tag = "3")]
    author: String,
    #[prost(string, tag = "4")]
    license: String,
    #[prost(btree_map = "string, string", tag = "100")]
    user_defined: BTreeMap<String, String>,
}

/// The message around a program.
pub(super) fn model(d: &Description, program: wire::Program) -> WireModel {
    WireModel {
        specification_version: d.specification_version,
        description: Some(description(d)),
        program: Some(program),
    }
}

/// A single function called `main` is described at the top level, as converters do.
pub(super) fn description(d: &Description) -> WireDescription {
    let mut description = WireDescription {
        metadata: Some(metadata(&d.metadata)),
        ..WireDescription::default()
    };
    let predicted = d.predicted_feature.clone().unwrap_or_default();
    let probabilities = d.predicted_probabilities.clone().unwrap_or_default();
    match d.functions.as_slice() {
        [main] if main.name == "main" => {
            description.input = features(&main.inputs);
            description.output = features(&main.outputs);
            description.state = features(&main.states);
            description.predicted_feature_name = predicted;
            description.predicted_probabilities_name = probabilities;
        }
        functions => {
            description.functions = functions
                .iter()
                .map(|f| {
                    let is_default = f.name == d.default_function;
                    let if_default = |text: &str| {
                        if is_default {
                            text.to_string()
                        } else {
                            String::new()
                        }
                    };
                    pb::FunctionDescription {
                        name: f.name.clone(),
                        input: features(&f.inputs),
                        output: features(&f.outputs),
                        state: features(&f.states),
                        predicted_feature_name: if_default(&predicted),
                        predicted_probabilities_name: if_default(&probabilities),
                    }
                })
                .collect();
            description.default_function_name = d.default_function.clone();
        }
    }
    description
}

fn metadata(m: &Metadata) -> WireMetadata {
    WireMetadata {
        short_description: m.short_description.clone(),
        version_string: m.version.clone(),
        author: m.author.clone(),
        license: m.license.clone(),
        user_defined: m.user.iter().cloned().collect(),
    }
}

fn features(list: &[Feature]) -> Vec<pb::FeatureDescription> {
    list.iter()
        .map(|f| pb::FeatureDescription {
            name: f.name.clone(),
            short_description: f.description.clone(),
            r#type: Some(pb::FeatureType {
                is_optional: f.optional,
                r#type: Some(feature_type(&f.ty)),
            }),
        })
        .collect()
}

fn feature_type(ty: &FeatureType) -> Type {
    use pb::{dictionary_feature_type::KeyType, sequence_feature_type::Type as Element};
    let (int64, string) = (pb::Int64FeatureType {}, pb::StringFeatureType {});
    match ty {
        FeatureType::Int64 => Type::Int64Type(int64),
        FeatureType::Double => Type::DoubleType(pb::DoubleFeatureType {}),
        FeatureType::String => Type::StringType(string),
        FeatureType::Image(image) => Type::ImageType(image_type(image)),
        FeatureType::MultiArray(array) => Type::MultiArrayType(array_type(array)),
        FeatureType::Dictionary { integer_keys } => {
            let key = if *integer_keys {
                KeyType::Int64KeyType(int64)
            } else {
                KeyType::StringKeyType(string)
            };
            Type::DictionaryType(pb::DictionaryFeatureType { key_type: Some(key) })
        }
        FeatureType::Sequence { integer_elements } => {
            let element = if *integer_elements {
                Element::Int64Type(int64)
            } else {
                Element::StringType(string)
            };
            Type::SequenceType(pb::SequenceFeatureType {
                size_range: None,
                r#type: Some(element),
            })
        }
        FeatureType::State(array) => Type::StateType(pb::StateFeatureType {
            r#type: Some(pb::state_feature_type::Type::ArrayType(array_type(array))),
        }),
    }
}

fn array_type(a: &ArrayDescription) -> pb::ArrayFeatureType {
    let data_type = match a.dtype {
        DType::Fp16 => ArrayDataType::Float16,
        DType::Fp32 => ArrayDataType::Float32,
        DType::Fp64 => ArrayDataType::Double,
        DType::Int8 => ArrayDataType::Int8,
        DType::Int32 => ArrayDataType::Int32,
        // Descriptions have no other types; readers refuse this one by name.
        _ => ArrayDataType::InvalidArrayDataType,
    };
    let shape_flexibility = match &a.flexibility {
        Flexibility::Fixed => None,
        Flexibility::Enumerated(shapes) => {
            let shapes = shapes
                .iter()
                .map(|s| pb::array_feature_type::Shape { shape: signed(s) })
                .collect();
            Some(ShapeFlexibility::EnumeratedShapes(
                pb::array_feature_type::EnumeratedShapes { shapes },
            ))
        }
        Flexibility::Ranges(ranges) => {
            let size_ranges = ranges.iter().map(range).collect();
            Some(ShapeFlexibility::ShapeRange(pb::array_feature_type::ShapeRange {
                size_ranges,
            }))
        }
    };
    let default_optional_value = a.default_value.map(|x| match a.dtype {
        DType::Fp32 | DType::Fp16 => DefaultOptionalValue::FloatDefaultValue(x as f32),
        DType::Int32 | DType::Int8 => DefaultOptionalValue::IntDefaultValue(x as i32),
        _ => DefaultOptionalValue::DoubleDefaultValue(x),
    });
    pb::ArrayFeatureType {
        shape: signed(&a.shape),
        data_type: data_type as i32,
        shape_flexibility,
        default_optional_value,
    }
}

fn image_type(image: &ImageDescription) -> pb::ImageFeatureType {
    let color = match image.color {
        ColorSpace::Grayscale => PbColor::Grayscale,
        ColorSpace::GrayscaleFp16 => PbColor::GrayscaleFloat16,
        ColorSpace::Rgb => PbColor::Rgb,
        ColorSpace::Bgr => PbColor::Bgr,
    };
    let size_flexibility = match &image.flexibility {
        Flexibility::Fixed => None,
        Flexibility::Enumerated(sizes) => {
            let sizes = sizes.iter().filter_map(|s| match s.as_slice() {
                [height, width] => Some(pb::image_feature_type::ImageSize {
                    width: *width as u64,
                    height: *height as u64,
                }),
                _ => None,
            });
            let sizes = pb::image_feature_type::EnumeratedImageSizes {
                sizes: sizes.collect(),
            };
            Some(SizeFlexibility::EnumeratedSizes(sizes))
        }
        Flexibility::Ranges(ranges) => Some(SizeFlexibility::ImageSizeRange(
            pb::image_feature_type::ImageSizeRange {
                height_range: ranges.first().map(range),
                width_range: ranges.get(1).map(range),
            },
        )),
    };
    pb::ImageFeatureType {
        width: image.width as i64,
        height: image.height as i64,
        color_space: color as i32,
        size_flexibility,
    }
}

fn range((low, high): &(usize, Option<usize>)) -> pb::SizeRange {
    pb::SizeRange {
        lower_bound: *low as u64,
        upper_bound: high.map_or(-1, |n| n as i64),
    }
}

fn signed(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|n| *n as i64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{Program, ProgramVersion};

    fn array(dtype: DType, flexibility: Flexibility, default_value: Option<f64>) -> ArrayDescription {
        ArrayDescription {
            dtype,
            shape: vec![1, 4],
            flexibility,
            default_value,
        }
    }

    fn every_type() -> Vec<FeatureType> {
        let enumerated = Flexibility::Enumerated(vec![vec![1, 4], vec![2, 4]]);
        let ranges = Flexibility::Ranges(vec![(1, Some(1)), (0, None)]);
        let image = |color, flexibility| {
            FeatureType::Image(ImageDescription {
                width: 3,
                height: 2,
                color,
                flexibility,
            })
        };
        vec![
            FeatureType::MultiArray(array(DType::Fp16, Flexibility::Fixed, Some(0.5))),
            FeatureType::MultiArray(array(DType::Fp32, enumerated.clone(), None)),
            FeatureType::MultiArray(array(DType::Fp64, ranges.clone(), Some(0.1))),
            FeatureType::MultiArray(array(DType::Int32, Flexibility::Fixed, Some(-3.0))),
            FeatureType::MultiArray(array(DType::Int8, Flexibility::Fixed, None)),
            FeatureType::State(array(DType::Fp16, Flexibility::Fixed, None)),
            image(ColorSpace::Grayscale, Flexibility::Fixed),
            image(
                ColorSpace::GrayscaleFp16,
                Flexibility::Ranges(vec![(1, Some(9)), (2, None)]),
            ),
            image(
                ColorSpace::Rgb,
                Flexibility::Enumerated(vec![vec![2, 3], vec![4, 6]]),
            ),
            image(ColorSpace::Bgr, Flexibility::Fixed),
            FeatureType::Int64,
            FeatureType::Double,
            FeatureType::String,
            FeatureType::Dictionary { integer_keys: true },
            FeatureType::Dictionary { integer_keys: false },
            FeatureType::Sequence {
                integer_elements: true,
            },
            FeatureType::Sequence {
                integer_elements: false,
            },
        ]
    }

    fn function(name: &str) -> FunctionDescription {
        let features = |prefix: &str| -> Vec<Feature> {
            let named = every_type().into_iter().enumerate();
            let named = named.map(|(i, ty)| Feature {
                name: format!("{prefix}{i}"),
                description: "what it is".to_string(),
                ty,
                optional: i % 2 == 0,
            });
            named.collect()
        };
        FunctionDescription {
            name: name.to_string(),
            inputs: features("in"),
            outputs: features("out"),
            states: features("state"),
        }
    }

    #[test]
    fn every_kind_of_feature_reads_back_in_both_forms() {
        for names in [&["main"][..], &["infer", "main"], &["other"]] {
            let described = Description {
                functions: names.iter().map(|name| function(name)).collect(),
                default_function: names[names.len() - 1].to_string(),
                specification_version: 9,
                metadata: Metadata {
                    short_description: "short".into(),
                    author: "author".into(),
                    license: "licence".into(),
                    version: "7".into(),
                    user: vec![("a".into(), "1".into()), ("b".into(), "2".into())],
                },
                kind: ModelKind::Program,
                predicted_feature: Some("out12".into()),
                predicted_probabilities: Some("out14".into()),
            };
            let bytes =
                model(&described, super::super::program::convert(&Program::default())).encode_to_vec();
            let (found, program) = crate::spec::read_spec(&bytes.into(), "m").unwrap();
            assert_eq!(found, described, "{names:?}");
            // Programs of iOS 18 are of the newer dialect.
            let expected = Program {
                version: ProgramVersion::V1_3,
                ..Program::default()
            };
            assert_eq!(program, Some(expected));
        }
    }
}
