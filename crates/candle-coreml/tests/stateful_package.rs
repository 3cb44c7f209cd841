//! A language model in one stateful package (`inputIds`, `causalMask`, `keyCache`, `valueCache`, `logits`), driven by hand:
//! greedy tokens equal those recorded beside it. Skipped where the package is not on the machine.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_coreml::{CoreMLModel, CoreMLState};
use serde::Deserialize;
use std::path::PathBuf;

/// Without optimisation the first tokens of each prompt have to do.
const TOKENS: usize = if cfg!(debug_assertions) { 12 } else { usize::MAX };

/// Where the recorded margin between the two best logits is smaller, another arithmetic may choose the second.
const CLOSE: f64 = 0.002;

#[derive(Deserialize)]
struct Golden {
    stop_token: u32,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    name: String,
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    margins: Vec<f64>,
}

fn folder() -> PathBuf {
    let shared = std::env::var_os("CANDLE_COREML_SHARED").map(PathBuf::from);
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    shared.unwrap_or_else(beside).join("models/tales-stateful")
}

/// Logits of the last of `tokens`, which follow `before` tokens that the state holds.
fn logits(model: &CoreMLModel, state: &mut CoreMLState, tokens: &[u32], before: usize) -> Vec<f32> {
    let (q, k) = (tokens.len(), before + tokens.len());
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let allowed = |row: usize, column: usize| {
        if column <= before + row {
            0.0
        } else {
            f32::NEG_INFINITY
        }
    };
    let mask: Vec<f32> = (0..q * k).map(|i| allowed(i / k, i % k)).collect();
    let mask = Tensor::from_vec(mask, (1, 1, q, k), &Device::Cpu).unwrap();
    let outputs = model
        .predict_with_state(&[("inputIds", &ids), ("causalMask", &mask)], state)
        .unwrap();
    let logits = outputs.tensor("logits").unwrap().i((0, q - 1)).unwrap();
    logits.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// The best token, on ties the lowest, and the second.
fn two_best(logits: &[f32]) -> (u32, u32) {
    let mut order: Vec<u32> = (0..).take(logits.len()).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    (order[0], order[1])
}

#[test]
fn greedy_tokens_equal_the_recorded_ones() {
    let folder = folder();
    let Ok(golden) = std::fs::read_to_string(folder.join("golden.json")) else {
        println!("skipped: {} absent", folder.display());
        return;
    };
    let golden: Golden = serde_json::from_str(&golden).unwrap();
    let model = CoreMLModel::load(folder.join("model.mlpackage")).unwrap();
    let mut state = model.make_state().unwrap();
    let mut wrong = Vec::new();
    for prompt in &golden.prompts {
        state.reset().unwrap();
        let mut last = logits(&model, &mut state, &prompt.prompt_tokens, 0);
        for (step, (&wanted, &margin)) in prompt.tokens.iter().zip(&prompt.margins).enumerate().take(TOKENS) {
            let (best, second) = two_best(&last);
            if best != wanted {
                if margin >= CLOSE || second != wanted {
                    wrong.push(format!(
                        "{}: token {step} is {best}, recorded {wanted}, margin {margin}",
                        prompt.name
                    ));
                }
                break;
            }
            if wanted == golden.stop_token {
                break;
            }
            last = logits(&model, &mut state, &[wanted], prompt.prompt_tokens.len() + step);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn tokens_in_parts_give_the_logits_of_tokens_at_once() {
    let path = folder().join("model.mlpackage");
    if !path.exists() {
        println!("skipped: {} absent", path.display());
        return;
    }
    let model = CoreMLModel::load(path).unwrap();
    let tokens = [1, 494, 275, 201, 634, 388, 259, 361, 363, 259, 874, 1177];
    let at_once = logits(&model, &mut model.make_state().unwrap(), &tokens, 0);
    let mut state = model.make_state().unwrap();
    logits(&model, &mut state, &tokens[..5], 0);
    let fork = state.fork().unwrap();
    for mut state in [state, fork] {
        for (i, token) in tokens.iter().enumerate().skip(5).take(tokens.len() - 6) {
            logits(&model, &mut state, &[*token], i);
        }
        let in_parts = logits(&model, &mut state, &tokens[tokens.len() - 1..], tokens.len() - 1);
        let largest = at_once
            .iter()
            .zip(&in_parts)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // The cache is stored as fp16 either way; what differs is the order of sums in f32 and the rounding of logits near
        // 15 to fp16, whose neighbours are 1/128 apart there.
        assert!(largest <= 1.0 / 64.0, "largest difference {largest}");
    }
}
