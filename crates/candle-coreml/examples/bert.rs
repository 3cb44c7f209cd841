//! A BERT package with tensors alone, no tokenizer: ids in, vectors of the tokens out, their mean by Candle:
//! `cargo run --example bert -- bert.mlpackage 101 7592 2088 102`
//!
//! `candle-coreml-llm` has the same with tokenizer, pooling and batches: `EmbeddingModel`.

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, FeatureType, Flexibility};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: bert PACKAGE ID...")?;
    let ids: Vec<i64> = arguments.map(|id| id.parse()).collect::<Result<_, _>>()?;
    let model = CoreMLModel::load(&path)?;

    // A package of one length wants the rest filled up; the mask says what is filler.
    let tokens = length(&model, ids.len())?;
    let padded = |value: &dyn Fn(usize) -> i64| -> candle_core::Result<Tensor> {
        Tensor::from_vec(
            (0..tokens).map(value).collect::<Vec<i64>>(),
            (1, tokens),
            &Device::Cpu,
        )
    };
    let input_ids = padded(&|i| ids.get(i).copied().unwrap_or(0))?;
    let mask = padded(&|i| i64::from(i < ids.len()))?;
    let types = padded(&|_| 0)?;

    let known = [
        ("input_ids", &input_ids),
        ("attention_mask", &mask),
        ("token_type_ids", &types),
    ];
    let declared = |name: &str| model.inputs().iter().any(|input| input.name == name);
    let given: Vec<(&str, &Tensor)> = known.into_iter().filter(|(name, _)| declared(name)).collect();
    let hidden = model
        .predict(&given)?
        .tensor("last_hidden_state")?
        .to_dtype(DType::F32)?;
    println!("last_hidden_state {:?}", hidden.dims());

    // The mean over the tokens that are no filler, scaled to length 1.
    let shown = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
    let mean = hidden
        .broadcast_mul(&shown)?
        .sum(1)?
        .broadcast_div(&shown.sum(1)?)?;
    let length = mean.sqr()?.sum_keepdim(1)?.sqrt()?;
    println!("{}", mean.broadcast_div(&length)?);
    Ok(())
}

/// The number of tokens to feed: the package's, or as many as there are where it leaves that open.
fn length(model: &CoreMLModel, ids: usize) -> Result<usize, Box<dyn std::error::Error>> {
    let input = model.inputs().iter().find(|input| input.name == "input_ids");
    let FeatureType::MultiArray(array) = &input.ok_or("the package has no input `input_ids`")?.ty else {
        return Err("`input_ids` is no array".into());
    };
    let fixed = array
        .shape
        .last()
        .copied()
        .filter(|_| array.flexibility == Flexibility::Fixed);
    match fixed {
        Some(tokens) if ids > tokens => Err(format!("{ids} ids, the package takes {tokens}").into()),
        Some(tokens) => Ok(tokens),
        None => Ok(ids),
    }
}
