//! The demo model through `CoreMLModel` on the Apple engine: the same tokens, and what a step costs on our side.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, CoreMLState, EngineKind};
use candle_coreml_apple_fake::Behaviour;
use common::{Folder, own_caches, start};
use std::path::PathBuf;
use std::time::Instant;

const CONTEXT: usize = 512;

fn packages() -> Option<PathBuf> {
    let shared = std::env::var_os("CANDLE_COREML_SHARED").map(PathBuf::from);
    let shared = shared.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../../../../shared").into());
    let folder = shared.join("models/tales-lut6");
    if !folder.is_dir() {
        println!("skipped: {} absent", folder.display());
    }
    folder.is_dir().then_some(folder)
}

/// The three packages of the demo model.
struct Demo {
    embeddings: CoreMLModel,
    body: CoreMLModel,
    head: CoreMLModel,
    state: CoreMLState,
}

impl Demo {
    fn open(folder: &std::path::Path, engine: EngineKind) -> Demo {
        let open = |name: &str, function: Option<&str>| {
            let builder = CoreMLModelBuilder::new(folder.join(name)).engine(engine);
            let builder = match function {
                Some(function) => builder.function(function),
                None => builder,
            };
            let model = builder.load().unwrap();
            assert_eq!(model.engine(), engine);
            model
        };
        let body = open("qwen_FFN_PF_lut6_chunk_01of01.mlpackage", Some("infer"));
        Demo {
            embeddings: open("qwen_embeddings_lut6.mlpackage", None),
            state: body.make_state().unwrap(),
            head: open("qwen_lm_head_lut6.mlpackage", None),
            body,
        }
    }

    /// Feeds one token and gives the most likely next one.
    fn step(&mut self, token: i64, position: usize) -> i64 {
        let cpu = &Device::Cpu;
        let token = Tensor::new(&[[token]], cpu).unwrap();
        let hidden = self.embeddings.predict(&[("input_ids", &token)]).unwrap();
        let hidden = hidden.tensor("hidden_states").unwrap();
        let at = Tensor::new(&[position as i64], cpu).unwrap();
        let mask: Vec<f32> = (0..CONTEXT)
            .map(|i| if i <= position { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(mask, (1, 1, 1, CONTEXT), cpu).unwrap();
        let inputs = [
            ("hidden_states", &hidden),
            ("position_ids", &at),
            ("causal_mask", &mask),
            ("current_pos", &at),
        ];
        let hidden = self.body.predict_with_state(&inputs, &mut self.state).unwrap();
        let hidden = hidden.tensor("output_hidden_states").unwrap();
        let logits = self.head.predict(&[("hidden_states", &hidden)]).unwrap();
        let parts: Vec<_> = (1..=16)
            .map(|i| logits.tensor(&format!("logits{i}")).unwrap())
            .collect();
        let logits = Tensor::cat(&parts, 2).unwrap().to_dtype(DType::F32).unwrap();
        let best = logits.flatten_all().unwrap().argmax(0).unwrap();
        best.to_scalar::<u32>().unwrap().into()
    }

    fn continued(&mut self, prompt: &[i64], count: usize) -> Vec<i64> {
        let mut next = 0;
        for (position, &token) in prompt.iter().enumerate() {
            next = self.step(token, position);
        }
        let mut tokens = vec![next];
        while tokens.len() < count {
            next = self.step(next, prompt.len() + tokens.len() - 1);
            tokens.push(next);
        }
        tokens
    }
}

#[test]
fn the_demo_model_says_the_same_on_both_engines() {
    let _one = start();
    let Some(folder) = packages() else { return };
    let home = Folder::new("home");
    own_caches(&home);
    let golden = std::fs::read(folder.join("golden.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
    let numbers = |v: &serde_json::Value| {
        v.as_array()
            .unwrap()
            .iter()
            .map(|t| t.as_i64().unwrap())
            .collect::<Vec<_>>()
    };
    let mut apple = Demo::open(&folder, EngineKind::Apple);
    let mut portable = Demo::open(&folder, EngineKind::Portable);
    for (i, prompt) in golden["prompts"].as_array().unwrap().iter().take(2).enumerate() {
        let (given, wanted) = (numbers(&prompt["prompt_tokens"]), numbers(&prompt["tokens"]));
        let count = wanted.len().min(32);
        let _on = [Behaviour::PaddedOutputs, Behaviour::RebasedBuffers]
            .get(i)
            .map(|b| b.on());
        let tokens = apple.continued(&given, count);
        assert_eq!(tokens, portable.continued(&given, count), "the engines differ");
        assert_eq!(tokens, wanted[..count], "golden tokens");
        println!(
            "{count} tokens after {} of prompt {i} are those of the portable engine",
            given.len()
        );
        apple.state.reset().unwrap();
        portable.state.reset().unwrap();
    }
}

#[test]
fn a_decode_step_costs_little_on_our_side() {
    let _one = start();
    let Some(folder) = packages() else { return };
    let home = Folder::new("home");
    own_caches(&home);
    let mut demo = Demo::open(&folder, EngineKind::Apple);
    let _idle = Behaviour::Idle.on();
    let cpu = &Device::Cpu;
    let hidden = Tensor::zeros((1, 1, 256), DType::F16, cpu).unwrap();
    let at = Tensor::zeros(1, DType::I64, cpu)
        .unwrap()
        .to_dtype(DType::I32)
        .unwrap();
    let mask = Tensor::zeros((1, 1, 1, CONTEXT), DType::F16, cpu).unwrap();
    let inputs = [
        ("hidden_states", &hidden),
        ("position_ids", &at),
        ("causal_mask", &mask),
        ("current_pos", &at),
    ];
    let mut times: Vec<f64> = (0..5_000)
        .map(|_| {
            let start = Instant::now();
            demo.body.predict_with_state(&inputs, &mut demo.state).unwrap();
            1e6 * start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let (median, late) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("one call of the body, the stand-in idle: {median:.1} microseconds median, {late:.1} at 99%");
    if !cfg!(debug_assertions) {
        assert!(median < 100.0, "{median} microseconds");
    }
}
