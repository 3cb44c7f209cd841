//! Opens a model, prints what it takes and gives, runs it once on zeros:
//! `cargo run --example predict -- model.mlpackage [function]`

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, FeatureType, Value};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: predict MODEL [FUNCTION]")?;
    let mut builder = CoreMLModelBuilder::new(&path);
    if let Some(function) = arguments.next() {
        builder = builder.function(function);
    }
    let model = builder.load()?;
    println!(
        "{path}: function {:?} on the {} engine",
        model.function().name,
        model.engine()
    );

    let zeros = zeros(&model)?;
    let inputs: Vec<(&str, &Tensor)> = zeros
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    for (name, tensor) in &inputs {
        println!("in  {name}: {:?} {:?}", tensor.dtype(), tensor.dims());
    }

    let mut state = model.make_state()?;
    let outputs = model.predict_with_state(&inputs, &mut state)?;
    for (name, value) in outputs.iter() {
        match value {
            Value::Tensor(tensor) => {
                println!("out {name}: {:?} {:?}\n{tensor}", tensor.dtype(), tensor.dims())
            }
            other => println!("out {name}: {other:?}"),
        }
    }
    Ok(())
}

/// A tensor of zeros in the default shape for every array the model needs.
fn zeros(model: &CoreMLModel) -> Result<Vec<(String, Tensor)>, Box<dyn std::error::Error>> {
    let mut tensors = Vec::new();
    for input in model.inputs().iter().filter(|input| !input.optional) {
        let tensor = match &input.ty {
            FeatureType::MultiArray(array) => {
                // Zeros of any dtype become zeros of the declared one.
                Tensor::zeros(array.shape.as_slice(), DType::F32, &Device::Cpu)?
            }
            FeatureType::Image(image) => {
                Tensor::zeros((3, image.height, image.width), DType::U8, &Device::Cpu)?
            }
            other => return Err(format!("input {:?}: no zeros for {other:?}", input.name).into()),
        };
        tensors.push((input.name.clone(), tensor));
    }
    Ok(tensors)
}
