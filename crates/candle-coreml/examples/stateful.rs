//! A model that remembers: runs it, forks its state, resets it, and shows what is in the buffers each time:
//! `cargo run --example stateful -- model.mlpackage [function]`

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModelBuilder, CoreMLState, FeatureType};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: stateful MODEL [FUNCTION]")?;
    let mut builder = CoreMLModelBuilder::new(&path);
    if let Some(function) = arguments.next() {
        builder = builder.function(function);
    }
    let model = builder.load()?;
    if model.states().is_empty() {
        return Err(format!("{path}: function {:?} has no states", model.function().name).into());
    }

    let mut tensors = Vec::new();
    for input in model.inputs() {
        let FeatureType::MultiArray(array) = &input.ty else {
            return Err(format!("input {:?} is not an array", input.name).into());
        };
        // Zero is a token, a position and a mask of every language model; hidden states of zero would leave no trace.
        let masks_or_integers = !array.dtype.is_float() || input.name.to_lowercase().contains("mask");
        let fill = if masks_or_integers { 0f32 } else { 1f32 };
        tensors.push((
            input.name.as_str(),
            Tensor::full(fill, array.shape.as_slice(), &Device::Cpu)?,
        ));
    }
    let inputs: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();

    let mut state = model.make_state()?;
    show("made", &state)?;
    model.predict_with_state(&inputs, &mut state)?;
    show("after one prediction", &state)?;

    let fork = state.fork()?;
    state.reset()?;
    show("reset", &state)?;
    show("the fork, which the reset left alone", &fork)?;
    Ok(())
}

/// Prints the sum of the magnitudes of each buffer.
fn show(when: &str, state: &CoreMLState) -> Result<(), Box<dyn std::error::Error>> {
    for name in state.names() {
        let buffer = state.read(name)?;
        let sum = buffer
            .to_dtype(DType::F32)?
            .abs()?
            .sum_all()?
            .to_scalar::<f32>()?;
        println!("{when}: {name} {:?}, sum of magnitudes {sum}", buffer.dims());
    }
    Ok(())
}
