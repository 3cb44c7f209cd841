//! `metadata.json` of compiled models: a description with every value written as a string.

use serde::Deserialize;
use std::collections::BTreeMap;

use crate::description::*;
use crate::error::{Error, Problem, Result, problem};
use crate::program::DType;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Model {
    #[serde(flatten)]
    interface: Interface,
    #[serde(default)]
    functions: Vec<Interface>,
    #[serde(default)]
    default_function_name: String,
    #[serde(default)]
    specification_version: i32,
    #[serde(default)]
    model_type: ModelType,
    #[serde(default)]
    user_defined_metadata: BTreeMap<String, String>,
    #[serde(default)]
    short_description: String,
    #[serde(default)]
    author: String,
    #[serde(default)]
    license: String,
    #[serde(default)]
    version: String,
}

#[derive(Deserialize, Default)]
struct ModelType {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    input_schema: Vec<Schema>,
    #[serde(default)]
    output_schema: Vec<Schema>,
    #[serde(default)]
    state_schema: Vec<Schema>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Schema {
    name: String,
    r#type: String,
    #[serde(default)]
    short_description: String,
    #[serde(default)]
    data_type: String,
    #[serde(default)]
    shape: String,
    #[serde(default)]
    is_optional: String,
    #[serde(default)]
    shape_range: Option<String>,
    #[serde(default)]
    enumerated_shapes: Option<String>,
    #[serde(default)]
    width: String,
    #[serde(default)]
    height: String,
    #[serde(default)]
    color_space: String,
    #[serde(default)]
    colorspace: String,
    #[serde(default)]
    key_type: String,
}

/// Reads the file; `name` is how messages call it.
pub(super) fn parse(bytes: &[u8], name: &str) -> Result<Description> {
    let json = |source| Error::Json {
        path: name.to_string(),
        source,
    };
    let models: Vec<Model> = serde_json::from_slice(bytes).map_err(json)?;
    let model = models
        .into_iter()
        .next()
        .ok_or_else(|| problem!("describes no model").in_file(name))?;
    describe(model).map_err(|p| p.in_file(name))
}

fn describe(model: Model) -> std::result::Result<Description, Problem> {
    let mut functions = model
        .functions
        .into_iter()
        .map(function)
        .collect::<Result<Vec<_>, _>>()?;
    if functions.is_empty() {
        functions.push(FunctionDescription {
            name: "main".to_string(),
            ..function(model.interface)?
        });
    }
    let first = functions.first().map(|f| f.name.clone()).unwrap_or_default();
    let named = functions.iter().any(|f| f.name == model.default_function_name);
    let kind = match model.model_type.name.trim_start_matches("MLModelType_") {
        "mlProgram" | "" => ModelKind::Program,
        other => ModelKind::Other(other.to_string()),
    };
    Ok(Description {
        functions,
        default_function: if named { model.default_function_name } else { first },
        specification_version: model.specification_version,
        metadata: Metadata {
            short_description: model.short_description,
            author: model.author,
            license: model.license,
            version: model.version,
            user: model.user_defined_metadata.into_iter().collect(),
        },
        kind,
        predicted_feature: None,
        predicted_probabilities: None,
    })
}

fn function(f: Interface) -> std::result::Result<FunctionDescription, Problem> {
    let all = |list: Vec<Schema>, state: bool| -> std::result::Result<Vec<Feature>, Problem> {
        list.into_iter()
            .map(|s| {
                let place = format!("feature {:?}", s.name);
                feature(s, state).map_err(|p| p.within(place))
            })
            .collect()
    };
    Ok(FunctionDescription {
        name: f.name,
        inputs: all(f.input_schema, false)?,
        outputs: all(f.output_schema, false)?,
        states: all(f.state_schema, true)?,
    })
}

fn feature(s: Schema, state: bool) -> std::result::Result<Feature, Problem> {
    let ty = match s.r#type.as_str() {
        "MultiArray" | "State" if state || s.r#type == "State" => FeatureType::State(array(&s)?),
        "MultiArray" => FeatureType::MultiArray(array(&s)?),
        "Image" => FeatureType::Image(image(&s)?),
        "Int64" => FeatureType::Int64,
        "Double" => FeatureType::Double,
        "String" => FeatureType::String,
        "Dictionary" => FeatureType::Dictionary {
            integer_keys: s.key_type == "Int64",
        },
        "Sequence" => FeatureType::Sequence {
            integer_elements: s.data_type == "Int64",
        },
        other => return Err(problem!("type {other:?} is not known")),
    };
    Ok(Feature {
        name: s.name,
        description: s.short_description,
        ty,
        optional: s.is_optional == "1",
    })
}

fn array(s: &Schema) -> std::result::Result<ArrayDescription, Problem> {
    let dtype = match s.data_type.as_str() {
        "Float32" => DType::Fp32,
        "Float16" => DType::Fp16,
        "Double" | "Float64" => DType::Fp64,
        "Int32" => DType::Int32,
        "Int8" => DType::Int8,
        other => return Err(problem!("element type {other:?} is not known")),
    };
    let flexibility = match (&s.shape_range, &s.enumerated_shapes) {
        (_, Some(shapes)) => Flexibility::Enumerated(numbers(shapes)?),
        (Some(ranges), None) => Flexibility::Ranges(
            numbers::<Vec<[i64; 2]>>(ranges)?
                .into_iter()
                .map(|[low, high]| (usize::try_from(low).unwrap_or(0), usize::try_from(high).ok()))
                .collect(),
        ),
        (None, None) => Flexibility::Fixed,
    };
    let shape = if s.shape.is_empty() {
        Vec::new()
    } else {
        numbers(&s.shape)?
    };
    Ok(ArrayDescription {
        dtype,
        shape,
        flexibility,
        default_value: None,
    })
}

fn image(s: &Schema) -> std::result::Result<ImageDescription, Problem> {
    let color = match if s.colorspace.is_empty() {
        &s.color_space
    } else {
        &s.colorspace
    }
    .as_str()
    {
        "Grayscale" | "Gray" => ColorSpace::Grayscale,
        "Grayscale16Half" | "GrayscaleFloat16" => ColorSpace::GrayscaleFp16,
        "RGB" => ColorSpace::Rgb,
        "BGR" => ColorSpace::Bgr,
        other => return Err(problem!("colour space {other:?} is not known")),
    };
    Ok(ImageDescription {
        width: numbers(&s.width)?,
        height: numbers(&s.height)?,
        color,
        flexibility: Flexibility::Fixed,
    })
}

fn numbers<T: serde::de::DeserializeOwned>(text: &str) -> std::result::Result<T, Problem> {
    serde_json::from_str(text).map_err(|_| problem!("{text:?} is not a size, shape or list of shapes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(schema: &str) -> std::result::Result<Feature, String> {
        let json = format!(r#"[{{"inputSchema": [{schema}], "specificationVersion": 9}}]"#);
        let found = parse(json.as_bytes(), "metadata.json").map_err(|e| e.to_string())?;
        Ok(found.functions[0].inputs[0].clone())
    }

    #[test]
    fn arrays_are_read_from_strings() {
        let found = parsed(
            r#"{"name": "x", "type": "MultiArray", "dataType": "Float16", "shape": "[1, 4]", "isOptional": "1",
                "shapeRange": "[[1, 1], [2, -1]]"}"#,
        );
        let ty = FeatureType::MultiArray(ArrayDescription {
            dtype: DType::Fp16,
            shape: vec![1, 4],
            flexibility: Flexibility::Ranges(vec![(1, Some(1)), (2, None)]),
            default_value: None,
        });
        assert_eq!(
            found,
            Ok(Feature {
                name: "x".into(),
                description: String::new(),
                ty,
                optional: true
            })
        );
    }

    #[test]
    fn nonsense_is_refused() {
        for schema in [
            r#"{"name": "x", "type": "Magic"}"#,
            r#"{"name": "x", "type": "MultiArray", "dataType": "Complex"}"#,
            r#"{"name": "x", "type": "MultiArray", "dataType": "Float16", "shape": "[-1]"}"#,
            r#"{"name": "x", "type": "Image", "width": "a"}"#,
            r#"{"name": 1}"#,
        ] {
            assert!(
                parsed(schema).unwrap_err().starts_with("metadata.json: "),
                "{schema}"
            );
        }
        assert!(parse(b"[]", "m").is_err());
    }
}
