//! `predict`: one run of a model on arrays, pictures and values.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_coreml::{CoreMLModel, Dictionary, Value};

use crate::args::PredictArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::inputs::{self, Values};
use crate::{npy, picture, terminal};

pub fn run(args: &PredictArgs) -> Outcome {
    let spinner = terminal::spinner("opening and running the model");
    let outputs = inputs::open(&args.model, args.function.as_deref(), &args.engine)
        .and_then(|model| predict(&model, &inputs::read(&model, &args.inputs)?));
    spinner.finish_and_clear();
    write_outputs(&args.output, outputs?)?;
    Ok(DONE)
}

/// One prediction; states start at zero.
pub fn predict(model: &CoreMLModel, values: &Values) -> Result<Values, Failure> {
    let named = inputs::borrowed(values);
    let outputs = if model.states().is_empty() {
        model.predict_values(&named)?
    } else {
        model.predict_values_with_state(&named, &mut model.make_state()?)?
    };
    Ok(outputs.into_iter().collect())
}

fn write_outputs(place: &Path, outputs: Values) -> Result<(), Failure> {
    let mut out = terminal::out();
    let single = place.extension().is_some_and(|ending| ending == "npz");
    if !single {
        std::fs::create_dir_all(place).map_err(|e| Failure::new(format!("{}: {e}", place.display())))?;
    }
    let mut tensors = Vec::new();
    for (name, value) in outputs {
        match value {
            Value::Tensor(tensor) => tensors.push((name, tensor)),
            Value::Image(image) => {
                let file = place.join(format!("{}.png", file_name(&name)));
                if !single && picture::write(&file, &image)? {
                    writeln!(
                        out,
                        "{name} {} x {} {}",
                        image.width(),
                        image.height(),
                        file.display()
                    )?;
                } else {
                    tensors.push((name, image.to_tensor()?));
                }
            }
            other => writeln!(out, "{name} {}", shown(&other))?,
        }
    }
    if single {
        npy::write_npz(place, &tensors)?;
    }
    for (name, tensor) in &tensors {
        let file = if single {
            place.to_owned()
        } else {
            place.join(format!("{}.npy", file_name(name)))
        };
        if !single {
            npy::write_npy(&file, tensor)?;
        }
        writeln!(
            out,
            "{name} {:?} {:?} {}",
            tensor.dtype(),
            tensor.dims(),
            file.display()
        )?;
    }
    Ok(())
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Int64(number) => number.to_string(),
        Value::Double(number) => number.to_string(),
        Value::Dictionary(Dictionary::Strings(pairs)) => listed(pairs),
        Value::Dictionary(Dictionary::Integers(pairs)) => listed(pairs),
        other => format!("{other:?}"),
    }
}

/// Labels with their numbers, the largest first.
fn listed<K: std::fmt::Display>(pairs: &BTreeMap<K, f64>) -> String {
    let mut pairs: Vec<(&K, &f64)> = pairs.iter().collect();
    pairs.sort_by(|a, b| b.1.total_cmp(a.1));
    let words = pairs.iter().map(|(label, number)| format!("{label}: {number}"));
    words.collect::<Vec<_>>().join(", ")
}

/// A name without what file names cannot have.
pub fn file_name(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c.is_alphanumeric() || "_-.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        for (name, expected) in [
            ("logits", "logits"),
            ("a/b:c", "a_b_c"),
            ("../x", ".._x"),
            ("x.1", "x.1"),
        ] {
            assert_eq!(file_name(name), expected);
        }
    }
}
