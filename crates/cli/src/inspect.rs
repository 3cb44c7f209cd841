//! `inspect`: what a model's files say, without running them.

mod bundle;

use std::io::Write;
use std::path::Path;

use candle_coreml_mil::{
    self as mil, ArrayDescription, Feature, FeatureType, Flexibility, FunctionDescription,
};
use serde_json::{Value, json};

use crate::failure::{DONE, Failure, Outcome};
use crate::model_facts;
use crate::terminal::{self, FAINT, STRONG, styled};

pub fn run(path: &Path, json: bool) -> Outcome {
    if is_bundle(path) {
        return bundle::run(path, json);
    }
    let facts = one_model(path)?;
    let mut out = terminal::out();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
    } else {
        print(&mut out, &facts, 0)?;
    }
    Ok(DONE)
}

/// A folder that is no model of its own, or a JSON file that describes one.
fn is_bundle(path: &Path) -> bool {
    let model = ["Manifest.json", "model.mil", "coremldata.bin"];
    let folder = path.is_dir() && !model.iter().any(|file| path.join(file).exists());
    folder || path.extension().is_some_and(|ending| ending == "json")
}

fn one_model(path: &Path) -> Result<Value, Failure> {
    let model = mil::Model::open(path)?;
    let description = model.description();
    let kind = match &description.kind {
        mil::ModelKind::Program => "ML Program",
        mil::ModelKind::Other(kind) => kind,
    };
    let functions: Vec<Value> = description
        .functions
        .iter()
        .map(|f| function_facts(f, model.program()))
        .collect();
    let metadata = &description.metadata;
    let mut facts = json!({
        "name": model.name(),
        "kind": kind,
        "specification_version": description.specification_version,
        "functions": functions,
        "default_function": description.default_function,
        "weights": weight_facts(&model),
        "metadata": {
            "description": metadata.short_description,
            "author": metadata.author,
            "license": metadata.license,
            "version": metadata.version,
            "user": metadata.user.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect::<serde_json::Map<_, _>>(),
        },
    });
    if let (Some(label), Some(map)) = (&description.predicted_feature, facts.as_object_mut()) {
        map.insert("predicted_label".to_owned(), json!(label));
        map.insert(
            "predicted_probabilities".to_owned(),
            json!(description.predicted_probabilities),
        );
    }
    Ok(facts)
}

fn function_facts(function: &FunctionDescription, program: Option<&mil::Program>) -> Value {
    let features = |list: &[Feature]| list.iter().map(feature_facts).collect::<Vec<_>>();
    let written = program.and_then(|program| program.function(&function.name));
    json!({
        "name": function.name,
        "inputs": features(&function.inputs),
        "outputs": features(&function.outputs),
        "states": features(&function.states),
        "opset": written.map(|function| function.opset.as_str()),
        "operators": written.map(|function| model_facts::operators(&function.body)),
    })
}

fn weight_facts(model: &mil::Model) -> Value {
    let stored = model.program().map(model_facts::weights).unwrap_or_default();
    let by_dtype = stored.iter().map(|(dtype, stored)| {
        (
            dtype.name().to_owned(),
            json!({ "tensors": stored.tensors, "bytes": stored.bytes }),
        )
    });
    json!({ "bytes": model.content_size_bytes(), "by_dtype": by_dtype.collect::<serde_json::Map<_, _>>() })
}

fn feature_facts(feature: &Feature) -> Value {
    let (kind, dtype, shape) = match &feature.ty {
        FeatureType::MultiArray(array) | FeatureType::State(array) => {
            ("array", Some(array.dtype.name()), Some(shape(array)))
        }
        FeatureType::Image(image) => {
            let size = format!("{}x{} {:?}", image.height, image.width, image.color);
            ("image", None, Some(size + &flexibility(&image.flexibility)))
        }
        FeatureType::Int64 => ("int64", None, None),
        FeatureType::Double => ("double", None, None),
        FeatureType::String => ("string", None, None),
        FeatureType::Dictionary { .. } => ("dictionary", None, None),
        FeatureType::Sequence { .. } => ("sequence", None, None),
    };
    json!({ "name": feature.name, "kind": kind, "dtype": dtype, "shape": shape, "optional": feature.optional,
            "description": feature.description })
}

fn shape(array: &ArrayDescription) -> String {
    format!("{:?}{}", array.shape, flexibility(&array.flexibility))
}

/// ` or [1, 64]`, ` within [1..512, 1..]`, or nothing for fixed shapes.
fn flexibility(flexibility: &Flexibility) -> String {
    match flexibility {
        Flexibility::Fixed => String::new(),
        Flexibility::Enumerated(shapes) => {
            let shapes: Vec<String> = shapes.iter().map(|s| format!("{s:?}")).collect();
            format!(", one of {}", shapes.join(" "))
        }
        Flexibility::Ranges(ranges) => {
            let end = |high: &Option<usize>| high.map(|high| high.to_string()).unwrap_or_default();
            let ranges: Vec<String> = ranges
                .iter()
                .map(|(low, high)| {
                    if Some(*low) == *high {
                        low.to_string()
                    } else {
                        format!("{low}..{}", end(high))
                    }
                })
                .collect();
            format!(", within [{}]", ranges.join(", "))
        }
    }
}

/// The facts as indented text: what is empty is left out, features take one line each.
fn print(out: &mut impl Write, facts: &Value, depth: usize) -> std::io::Result<()> {
    let Value::Object(map) = facts else { return Ok(()) };
    let indent = "  ".repeat(depth);
    for (key, value) in map {
        let title = styled(STRONG, key.replace('_', " "));
        match value {
            Value::Null => {}
            Value::String(text) if text.is_empty() => {}
            Value::Array(items) if items.is_empty() => {}
            Value::Object(inner) if inner.is_empty() => {}
            Value::Array(items) if items.iter().all(|item| item.get("kind").is_some()) => {
                writeln!(out, "{indent}{title}")?;
                for item in items {
                    writeln!(out, "{indent}  {}", feature_line(item))?;
                }
            }
            Value::Array(items) if items.iter().all(Value::is_object) => {
                for item in items {
                    writeln!(out, "{indent}{title}")?;
                    print(out, item, depth + 1)?;
                }
            }
            Value::Object(_) if key == "operators" => writeln!(out, "{indent}{title} {}", histogram(value))?,
            Value::Object(_) => {
                writeln!(out, "{indent}{title}")?;
                print(out, value, depth + 1)?;
            }
            Value::String(text) => writeln!(out, "{indent}{title} {text}")?,
            Value::Number(number) if key == "bytes" => {
                writeln!(
                    out,
                    "{indent}{title} {}",
                    terminal::bytes(number.as_u64().unwrap_or(0))
                )?;
            }
            other => writeln!(out, "{indent}{title} {other}")?,
        }
    }
    Ok(())
}

fn feature_line(feature: &Value) -> String {
    let text = |key: &str| feature[key].as_str().unwrap_or_default().to_owned();
    let optional = if feature["optional"] == Value::Bool(true) {
        " optional"
    } else {
        ""
    };
    let dtype = if feature["dtype"].is_string() {
        text("dtype")
    } else {
        text("kind")
    };
    let line = format!("{} {dtype} {}{optional}", text("name"), text("shape"));
    let about = text("description");
    if about.is_empty() {
        line.trim_end().to_owned()
    } else {
        format!("{} {}", line.trim_end(), styled(FAINT, about))
    }
}

/// Operators, most frequent first.
fn histogram(operators: &Value) -> String {
    let mut counts: Vec<(&String, u64)> = operators
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, count)| (name, count.as_u64().unwrap_or(0)))
        .collect();
    counts.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
    counts
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}
