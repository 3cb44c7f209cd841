//! Runs packages of both layouts on the portable engine.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLState};
use candle_coreml_llm::{Bundle, LanguageModel, LoadOptions, Prediction};

/// Logits after the last of `tokens` from packages in ANEMLL's layout.
pub fn anemll(folder: &Path, tokens: &[u32]) -> Vec<f32> {
    let mut model = Bundle::open(folder)
        .unwrap()
        .load(&LoadOptions::default())
        .unwrap();
    let mut cached = 0;
    while cached + 1 < tokens.len() {
        cached = model.prefill(&tokens[..tokens.len() - 1], cached).unwrap();
    }
    match model.decode(tokens).unwrap() {
        Prediction::Logits(logits) => logits.to_vec(),
        Prediction::Token(token) => panic!("token {token} without logits"),
    }
}

/// One call of a stateful package: logits after the last of `new`, with `cached` tokens in the state.
pub fn step(model: &CoreMLModel, state: &mut CoreMLState, new: &[u32], cached: usize) -> Vec<f32> {
    rows(model, state, new, cached).pop().unwrap()
}

/// One call of a stateful package: logits after each of `new`.
fn rows(model: &CoreMLModel, state: &mut CoreMLState, new: &[u32], cached: usize) -> Vec<Vec<f32>> {
    let (n, all) = (new.len(), cached + new.len());
    let ids = Tensor::new(new, &Device::Cpu)
        .unwrap()
        .to_dtype(DType::I64)
        .unwrap()
        .reshape((1, n))
        .unwrap();
    let hidden = |i: usize| {
        if i % all > cached + i / all {
            f32::NEG_INFINITY
        } else {
            0.0
        }
    };
    let mask: Vec<f32> = (0..n * all).map(hidden).collect();
    let mask = Tensor::from_vec(mask, (1, 1, n, all), &Device::Cpu).unwrap();
    let outputs = model
        .predict_with_state(&[("inputIds", &ids), ("causalMask", &mask)], state)
        .unwrap();
    let logits = outputs.tensor("logits").unwrap().to_dtype(DType::F32).unwrap();
    logits.squeeze(0).unwrap().to_vec2().unwrap()
}

pub fn stateful(folder: &Path, tokens: &[u32]) -> Vec<f32> {
    let model = CoreMLModel::load(folder.join("model.mlpackage")).unwrap();
    let mut state = model.make_state().unwrap();
    let (first, last) = tokens.split_at(tokens.len() - 1);
    step(&model, &mut state, first, 0);
    step(&model, &mut state, last, first.len())
}

pub fn furthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits after each of `tokens`, decoded one by one.
pub fn anemll_rows(folder: &Path, tokens: &[u32]) -> Vec<Vec<f32>> {
    let bundle = Bundle::open(folder).unwrap();
    let mut model: Box<dyn LanguageModel> = bundle.load(&LoadOptions::default()).unwrap();
    let row = |n: usize| match model.decode(&tokens[..n]).unwrap() {
        Prediction::Logits(logits) => logits.to_vec(),
        Prediction::Token(token) => panic!("token {token} without logits"),
    };
    (1..=tokens.len()).map(row).collect()
}

/// Logits after each of `tokens`, all in one call.
pub fn stateful_rows(folder: &Path, tokens: &[u32]) -> Vec<Vec<f32>> {
    let model = CoreMLModel::load(folder.join("model.mlpackage")).unwrap();
    let mut state = model.make_state().unwrap();
    rows(&model, &mut state, tokens, 0)
}
