//! What `predict`, `trace` and `verify` feed a model: arrays and pictures from files, values from the command line, or
//! seeded random numbers.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_coreml::{ArrayDescription, CoreMLModel, CoreMLModelBuilder, FeatureType, Image, Value};

use crate::args::{EngineArgs, InputArgs};
use crate::failure::Failure;
use crate::{npy, picture};

/// Names and values.
pub type Values = Vec<(String, Value)>;

/// Most elements a random input may have.
const RANDOM_LIMIT: usize = 1 << 28;

/// Opens the model the way the options say.
pub fn open(model: &Path, function: Option<&str>, engine: &EngineArgs) -> Result<CoreMLModel, Failure> {
    Ok(builder(model, function, engine).load()?)
}

/// The way to open the model that the options say.
pub fn builder(model: &Path, function: Option<&str>, engine: &EngineArgs) -> CoreMLModelBuilder {
    let options = engine.load_options();
    let builder = CoreMLModelBuilder::new(model)
        .engine(options.engine)
        .compute_units(options.compute_units)
        .numerics(options.numerics)
        .threads(options.threads);
    match function {
        Some(function) => builder.function(function),
        None => builder,
    }
}

/// Reads what the command line names; with a seed, fills the inputs it does not name with random numbers.
pub fn read(model: &CoreMLModel, args: &InputArgs) -> Result<Values, Failure> {
    let mut values = Vec::new();
    for input in &args.inputs {
        values.extend(read_input(model, input, args.resize)?);
    }
    if let Some(seed) = args.random {
        for (index, feature) in model.inputs().iter().enumerate() {
            if !feature.optional && values.iter().all(|(name, _)| *name != feature.name) {
                let value = random(&feature.ty, seed.wrapping_add(index as u64));
                let value =
                    value.map_err(|what| Failure::new(format!("input {:?}: {what}", feature.name)))?;
                values.push((feature.name.clone(), value));
            }
        }
    }
    Ok(values)
}

/// Names and references, as predictions take them.
pub fn borrowed(values: &Values) -> Vec<(&str, &Value)> {
    values
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect()
}

/// The values one `--input` gives.
fn read_input(model: &CoreMLModel, input: &str, resize: bool) -> Result<Values, Failure> {
    let Some((name, source)) = input.split_once('=') else {
        if !input.ends_with(".npz") {
            return Err(Failure::usage(format!(
                "--input {input}: needed NAME=FILE.npy, NAME=FILE.npz, NAME=PICTURE or FILE.npz"
            )));
        }
        let arrays = npy::read_all(Path::new(input))?;
        return arrays
            .into_iter()
            .map(|(name, tensor)| Ok((name.clone(), from_array(model, &name, tensor)?)))
            .collect();
    };
    let feature = model.inputs().iter().find(|input| input.name == name);
    let value = match (read_source(name, source)?, feature.map(|f| &f.ty)) {
        (Some(tensor), _) => from_array(model, name, tensor)?,
        (None, Some(FeatureType::Image(wanted))) => Value::Image(picture::read(source, wanted, resize)?),
        (None, _) => plain(model, name, source)?,
    };
    Ok(vec![(name.to_owned(), value)])
}

/// The array a source names, `None` for what is no file of arrays.
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

/// An array as the input takes it: a picture or a single number where the input is one.
pub fn from_array(model: &CoreMLModel, name: &str, tensor: Tensor) -> Result<Value, Failure> {
    let input = model.inputs().iter().find(|input| input.name == name);
    let single = tensor.elem_count() == 1;
    match input.map(|input| &input.ty) {
        Some(FeatureType::Image(_)) => Ok(Value::Image(Image::from_tensor(&tensor)?)),
        Some(FeatureType::Int64) if single => {
            let number = tensor.flatten_all()?.to_dtype(DType::I64)?;
            Ok(Value::Int64(number.get(0)?.to_scalar()?))
        }
        Some(FeatureType::Double) if single => {
            let number = tensor.flatten_all()?.to_dtype(DType::F64)?;
            Ok(Value::Double(number.get(0)?.to_scalar()?))
        }
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

/// Random values of the default shape: floats evenly in -1 to 1, pixels in 0 to 255, integers 0 or 1 (which are valid
/// tokens, positions and truth values nearly everywhere).
fn random(ty: &FeatureType, seed: u64) -> Result<Value, String> {
    let mut numbers = Numbers(seed);
    match ty {
        FeatureType::MultiArray(array) => random_array(array, &mut numbers).map(Value::Tensor),
        FeatureType::Image(image) => picture::random(image, || numbers.next()).map(Value::Image),
        FeatureType::Int64 => Ok(Value::Int64((numbers.next() & 1).into())),
        FeatureType::Double => Ok(Value::Double(numbers.float().into())),
        FeatureType::String => Ok(Value::from("text")),
        _ => Err("only arrays, pictures, numbers and strings can be random".to_owned()),
    }
}

fn random_array(array: &ArrayDescription, numbers: &mut Numbers) -> Result<Tensor, String> {
    let count = array.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let count = count
        .filter(|&n| n <= RANDOM_LIMIT && !array.shape.is_empty())
        .ok_or_else(|| format!("no random values for the default shape {:?}", array.shape))?;
    let shape = array.shape.as_slice();
    let made = if array.dtype.is_float() {
        Tensor::from_vec(numbers.take(count, Numbers::float), shape, &Device::Cpu)
    } else {
        Tensor::from_vec(
            numbers.take(count, |n| i64::from(n.next() & 1)),
            shape,
            &Device::Cpu,
        )
    };
    made.map_err(|e| e.to_string())
}

/// SplitMix64: the same numbers on every machine.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) as u32
    }

    fn float(&mut self) -> f32 {
        // 24 bits: every value is exact in f32.
        (self.next() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn take<T>(&mut self, count: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..count).map(|_| one(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_repeat_and_stay_in_their_range() {
        let draw = |seed| Numbers(seed).take(1000, Numbers::float);
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
        assert!(draw(3).iter().all(|v| (-1.0..1.0).contains(v)));
        let mean = draw(3).iter().sum::<f32>() / 1000.0;
        assert!(mean.abs() < 0.1, "{mean}");
    }
}
