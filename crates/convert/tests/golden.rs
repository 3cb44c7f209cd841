//! Tiny checkpoints of every family beside the logits of the Python package transformers.
//!
//! `testdata/make_checkpoints.py` makes them. Their weights are 16-bit floats, so converting them loses nothing.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_coreml::CoreMLModel;
use candle_coreml_convert::{
    EncoderOptions, EncoderReference, ForwardPass, LanguageModelOptions, Layout, Reference, convert_encoder,
    convert_language_model,
};
use safetensors::SafeTensors;
use support::run::{anemll, anemll_rows, furthest, stateful, stateful_rows};
use support::write_tokenizer;

const DECODERS: [&str; 10] = [
    "llama2",
    "llama3",
    "llama-biased",
    "smollm2",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma3",
];

/// 32-bit floats, summed in another order.
const FLOAT32: f32 = 1e-3;
/// Programs whose rotary tables and small constants are 16-bit floats, of logits up to about 8.
const FLOAT16: f32 = 0.02;

fn data(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).join(name)
}

const ENCODERS: [&str; 2] = ["bert", "roberta"];

fn golden(folder: &Path) -> (Vec<u32>, Vec<Vec<f32>>) {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words =
        |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec() };
    let tokens = words("tokens").into_iter().map(u32::from_le_bytes).collect();
    let logits: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
    let width = file.tensor("logits").unwrap().shape()[1];
    (tokens, logits.chunks(width).map(<[f32]>::to_vec).collect())
}

fn worst(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let rows = found.iter().zip(expected).map(|(f, e)| furthest(f, e));
    // `max` would pass over a NaN.
    rows.fold(0.0, |m, v| if v.is_nan() { f32::INFINITY } else { m.max(v) })
}

/// Those that candle-transformers has as they are: no biases in Llama, no window shorter than the text, no linear scaling.
const IN_CANDLE: [&str; 6] = ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3"];

#[test]
fn both_float32_passes_give_the_logits_of_transformers() {
    let mut failures = Vec::new();
    for name in DECODERS {
        let (tokens, expected) = golden(&data(name));
        let reference = Reference::open(data(name)).unwrap();
        let pass = reference.pass(tokens.len());
        let wanted = if IN_CANDLE.contains(&name) {
            ForwardPass::CandleTransformers
        } else {
            ForwardPass::LayerByLayer
        };
        if pass != wanted {
            failures.push(format!("{name}: computed by {pass}"));
        }
        let (chosen, own) = (reference.logits(&tokens), reference.layer_by_layer(&tokens));
        for (what, logits) in [(pass, chosen), (ForwardPass::LayerByLayer, own)] {
            let off = worst(&logits.unwrap().to_vec2().unwrap(), &expected);
            println!("{name}, {what}: {off:e}");
            if off > FLOAT32 {
                failures.push(format!("{name}, {what}: off by {off}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The checkpoint of the tree has what candle-transformers has not; without it both passes agree.
#[test]
fn gemma_is_computed_by_candle_transformers_past_its_window() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        data("gemma3").join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(data("gemma3").join("config.json")).unwrap();
    let config = config.replace("\"query_pre_attn_scalar\": 12", "\"query_pre_attn_scalar\": 16");
    let config = config
        .replace("\"factor\": 2.0,", "")
        .replace("\"linear\"", "\"default\"");
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let reference = Reference::open(folder.path()).unwrap();
    let tokens: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 64).collect();
    assert_eq!(reference.pass(tokens.len()), ForwardPass::CandleTransformers);
    let [theirs, ours] = [reference.logits(&tokens), reference.layer_by_layer(&tokens)];
    let off = worst(
        &theirs.unwrap().to_vec2().unwrap(),
        &ours.unwrap().to_vec2().unwrap(),
    );
    assert!(off < FLOAT32, "off by {off}");
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_of_both_passes() {
    let reference = Reference::open(data("llama3")).unwrap();
    for result in [reference.logits(&[1, 64]), reference.layer_by_layer(&[1, 64])] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("embed_tokens"), "{error}");
    }
}

#[test]
fn the_float32_encoders_give_the_hidden_states_of_transformers() {
    for name in ENCODERS {
        let golden =
            candle_core::safetensors::load(data(name).join("golden.safetensors"), &Device::Cpu).unwrap();
        let reference = EncoderReference::open(data(name)).unwrap();
        let mask: Vec<i64> = golden["mask"].to_dtype(DType::I64).unwrap().to_vec1().unwrap();
        let shown = mask.iter().filter(|&&m| m == 1).count();
        let tokens: Vec<u32> = golden["tokens"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
        let hidden = reference.hidden(&tokens[..shown]).unwrap();
        let expected = golden["hidden"]
            .narrow(0, 0, shown)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        let off = worst(&hidden.to_vec2().unwrap(), &expected.to_vec2().unwrap());
        println!("{name}: {off:e}");
        assert!(off < FLOAT32, "{name}: off by {off}");
        assert!(reference.hidden(&[]).is_err() && reference.hidden(&[64]).is_err());
    }
}

#[test]
fn packages_give_the_logits_of_transformers_in_both_layouts() {
    let mut failures = Vec::new();
    for name in DECODERS {
        let (tokens, expected) = golden(&data(name));
        let folder = tempfile::tempdir().unwrap();
        let mut compare = |what: &str, off: f32| {
            println!("{name}, {what}: {off:e}");
            if off.is_nan() || off > FLOAT16 {
                failures.push(format!("{name}, {what}: off by {off}"));
            }
        };
        for chunks in [1, 2] {
            let options = LanguageModelOptions {
                context: 32,
                batch: 8,
                chunks,
                ..LanguageModelOptions::default()
            };
            let to = folder.path().join(format!("chunks{chunks}"));
            convert_language_model(data(name), &to, &options, &mut |_| {}).unwrap();
            write_tokenizer(&to, expected[0].len());
            compare("decoded", worst(&anemll_rows(&to, &tokens), &expected));
            let last = std::slice::from_ref(expected.last().unwrap());
            compare("prefilled", worst(&[anemll(&to, &tokens)], last));
        }
        let options = LanguageModelOptions {
            layout: Layout::Stateful,
            context: 32,
            ..LanguageModelOptions::default()
        };
        let to = folder.path().join("stateful");
        convert_language_model(data(name), &to, &options, &mut |_| {}).unwrap();
        compare("at once", worst(&stateful_rows(&to, &tokens), &expected));
        let last = std::slice::from_ref(expected.last().unwrap());
        compare("in two calls", worst(&[stateful(&to, &tokens)], last));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Tokens that count first, then padding.
#[test]
fn encoders_give_the_hidden_states_of_transformers() {
    let mut failures = Vec::new();
    for name in ENCODERS {
        let golden =
            candle_core::safetensors::load(data(name).join("golden.safetensors"), &Device::Cpu).unwrap();
        let row = |name: &str| golden[name].unsqueeze(0).unwrap().to_dtype(DType::I64).unwrap();
        let (tokens, mask) = (row("tokens"), row("mask"));
        let shown = mask
            .to_dtype(DType::F32)
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap() as usize;
        let all = tokens.dim(1).unwrap();
        // Without padding, any length; with padding, a fixed one.
        for (count, fixed) in [(shown, None), (all, Some(all)), (all, None)] {
            let to = tempfile::tempdir().unwrap();
            let options = EncoderOptions {
                tokens: fixed,
                ..EncoderOptions::default()
            };
            convert_encoder(data(name), to.path(), &options, &mut |_| {}).unwrap();
            let model = CoreMLModel::load(to.path().join("model.mlpackage")).unwrap();
            let cut = |t: &Tensor| t.narrow(1, 0, count).unwrap();
            let outputs = model
                .predict(&[("input_ids", &cut(&tokens)), ("attention_mask", &cut(&mask))])
                .unwrap();
            let hidden = |t: &Tensor| -> Vec<f32> {
                let t = t.narrow(0, 0, shown).unwrap().flatten_all().unwrap();
                t.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
            };
            let found = outputs.tensor("last_hidden_state").unwrap().squeeze(0).unwrap();
            let off = furthest(&hidden(&found), &hidden(&golden["hidden"]));
            let pooled = outputs.tensor("pooler_output").unwrap().squeeze(0).unwrap();
            let pooled = pooled.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            let pooled = furthest(&pooled, &golden["pooled"].to_vec1::<f32>().unwrap());
            println!("{name}, {count} tokens, {fixed:?}: {off:e}, pooled {pooled:e}");
            if off.is_nan() || pooled.is_nan() || off.max(pooled) > FLOAT16 {
                failures.push(format!("{name}, {count} tokens: off by {off}, pooled {pooled}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
