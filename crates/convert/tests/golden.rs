//! Tiny checkpoints of every family beside the logits of the Python package transformers.
//!
//! `testdata/make_checkpoints.py` makes them. Their weights are 16-bit floats, so converting them loses nothing.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::{Path, PathBuf};

use candle_coreml_convert::{LanguageModelOptions, Layout, Reference, convert_language_model};
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

#[test]
fn the_float32_reference_gives_the_logits_of_transformers() {
    let mut failures = Vec::new();
    for name in DECODERS {
        let (tokens, expected) = golden(&data(name));
        let logits = Reference::open(data(name)).unwrap().logits(&tokens).unwrap();
        let off = worst(&logits.to_vec2().unwrap(), &expected);
        println!("{name}: {off:e}");
        if off > FLOAT32 {
            failures.push(format!("{name}: off by {off}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
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
