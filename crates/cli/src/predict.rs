//! `predict`: one run of a model on arrays from files.

use std::io::Write;
use std::path::Path;

use candle_core::Tensor;
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, FeatureType, Image, Value};

use crate::args::PredictArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::{npy, terminal};

pub fn run(args: &PredictArgs) -> Outcome {
    let options = args.engine.load_options();
    let mut builder = CoreMLModelBuilder::new(&args.model)
        .engine(options.engine)
        .compute_units(options.compute_units)
        .numerics(options.numerics)
        .threads(options.threads);
    if let Some(function) = &args.function {
        builder = builder.function(function);
    }
    let spinner = terminal::spinner("opening and running the model");
    let outputs = builder
        .load()
        .map_err(Failure::from)
        .and_then(|model| predict(&model, &args.inputs));
    spinner.finish_and_clear();
    write_outputs(&args.output, outputs?)?;
    Ok(DONE)
}

fn predict(model: &CoreMLModel, inputs: &[String]) -> Result<Vec<(String, Value)>, Failure> {
    let mut values = Vec::new();
    for input in inputs {
        values.extend(read_input(model, input)?);
    }
    let named: Vec<(&str, &Value)> = values
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    let outputs = if model.states().is_empty() {
        model.predict_values(&named)?
    } else {
        model.predict_values_with_state(&named, &mut model.make_state()?)?
    };
    Ok(outputs.into_iter().collect())
}

/// The values one `--input` gives.
fn read_input(model: &CoreMLModel, input: &str) -> Result<Vec<(String, Value)>, Failure> {
    let Some((name, source)) = input.split_once('=') else {
        if !input.ends_with(".npz") {
            return Err(Failure::usage(format!(
                "--input {input}: needed NAME=FILE.npy, NAME=FILE.npz or FILE.npz"
            )));
        }
        let arrays = npy::read_all(Path::new(input))?;
        return arrays
            .into_iter()
            .map(|(name, tensor)| Ok((name.clone(), array(model, &name, tensor)?)))
            .collect();
    };
    let value = match read_source(name, source)? {
        Some(tensor) => array(model, name, tensor)?,
        None => plain(model, name, source)?,
    };
    Ok(vec![(name.to_owned(), value)])
}

/// The array a source names, `None` for what is no file name.
fn read_source(name: &str, source: &str) -> Result<Option<Tensor>, Failure> {
    if source.ends_with(".npy") {
        return npy::read_npy(Path::new(source)).map(Some);
    }
    if source.ends_with(".npz") {
        return npy::read_npz(Path::new(source), name).map(Some);
    }
    match source.rsplit_once(':') {
        Some((file, array)) if file.ends_with(".npz") => npy::read_npz(Path::new(file), array).map(Some),
        _ => Ok(None),
    }
}

/// An array as the input takes it: a picture from bytes of [height, width, channels] where the input is one.
fn array(model: &CoreMLModel, name: &str, tensor: Tensor) -> Result<Value, Failure> {
    let input = model.inputs().iter().find(|input| input.name == name);
    match input.map(|input| &input.ty) {
        Some(FeatureType::Image(_)) => Ok(Value::Image(Image::from_tensor(&tensor)?)),
        _ => Ok(Value::Tensor(tensor)),
    }
}

/// A number or a string written on the command line.
fn plain(model: &CoreMLModel, name: &str, text: &str) -> Result<Value, Failure> {
    let input = model.inputs().iter().find(|input| input.name == name);
    let wrong = |what| Failure::usage(format!("--input {name}={text}: {what}"));
    match input.map(|input| &input.ty) {
        Some(FeatureType::Int64) => text
            .parse()
            .map(Value::Int64)
            .map_err(|_| wrong("the input takes a whole number")),
        Some(FeatureType::Double) => text
            .parse()
            .map(Value::Double)
            .map_err(|_| wrong("the input takes a number")),
        Some(FeatureType::String) => Ok(Value::String(text.to_owned())),
        Some(_) => Err(wrong(
            "the input takes an array: FILE.npy, FILE.npz or FILE.npz:ARRAY",
        )),
        None => {
            let names: Vec<&str> = model.inputs().iter().map(|input| input.name.as_str()).collect();
            Err(Failure::usage(format!(
                "--input {name}: the function takes {}",
                names.join(", ")
            )))
        }
    }
}

fn write_outputs(place: &Path, outputs: Vec<(String, Value)>) -> Result<(), Failure> {
    let mut out = terminal::out();
    let mut tensors = Vec::new();
    for (name, value) in outputs {
        match value {
            Value::Tensor(tensor) => tensors.push((name, tensor)),
            Value::Image(image) => tensors.push((name, image.to_tensor()?)),
            other => writeln!(out, "{name} {}", shown(&other))?,
        }
    }
    let single = place.extension().is_some_and(|ending| ending == "npz");
    if single {
        npy::write_npz(place, &tensors)?;
    } else {
        std::fs::create_dir_all(place).map_err(|e| Failure::new(format!("{}: {e}", place.display())))?;
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
        other => format!("{other:?}"),
    }
}

/// An output's name without what file names cannot have.
fn file_name(name: &str) -> String {
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
