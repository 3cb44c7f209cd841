//! GGUF files made of tiny checkpoints give what the checkpoints give; tokenizers and templates are rebuilt from their headers.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_coreml_convert::{LanguageModelOptions, Reference, convert_language_model};
use candle_coreml_llm::{Bundle, Tokenizer};
use support::gguf::{byte_level, gguf, header, strings, write};
use support::run::{anemll, furthest};
use support::{VOCABULARY, checkpoint};

#[test]
fn every_architecture_gives_the_logits_of_its_checkpoint() {
    let mut failures = Vec::new();
    for (arch, model_type, extra) in [
        ("llama", "llama", ", \"tie_word_embeddings\": false"),
        ("qwen2", "qwen2", ", \"tie_word_embeddings\": true"),
        ("qwen3", "qwen3", ", \"tie_word_embeddings\": true"),
        ("gemma3", "gemma3_text", ", \"sliding_window\": 8"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path(), model_type, extra);
        let file = gguf(folder.path(), arch, byte_level());
        let tokens: Vec<u32> = (0..12).map(|i| (i * i * 5 + 3) % VOCABULARY as u32).collect();
        let rows = |path: &Path| -> Vec<Vec<f32>> {
            Reference::open(path)
                .unwrap()
                .logits(&tokens)
                .unwrap()
                .to_vec2()
                .unwrap()
        };
        let (expected, found) = (rows(folder.path()), rows(&file));
        let size = expected.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
        let off = expected
            .iter()
            .zip(&found)
            .map(|(e, f)| furthest(e, f))
            .fold(0.0, f32::max);
        if off.is_nan() || off > 1e-5 * size {
            failures.push(format!("{arch}: the file is off by {off} of {size}"));
        }
        let to = folder.path().join("out");
        let options = LanguageModelOptions {
            context: 16,
            batch: 4,
            ..LanguageModelOptions::default()
        };
        convert_language_model(&file, &to, &options, &mut |_| {}).unwrap();
        let off = furthest(&anemll(&to, &tokens), expected.last().unwrap());
        if off.is_nan() || off > 0.01 * size {
            failures.push(format!("{arch}: the packages are off by {off} of {size}"));
        }
        let bundle = Bundle::open(&to).unwrap();
        assert_eq!(bundle.tokenizer().encode("ab ab").unwrap(), [3, 4]);
        assert!(bundle.template().is_ok() && bundle.end_tokens().contains(&0));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The tokenizer that a header of sentence pieces becomes.
fn pieces(begins: bool, more: Vec<(&'static str, Value)>) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let tokens = [
        "<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "c", "ab", "bc", "▁ab", "abc", "s", "<s",
        ">",
    ];
    let scores = [
        0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -10.0, -11.0, -12.0, -2.0, -1.0, -3.0, -4.0, -13.0, -5.0, -14.0,
    ];
    let mut kinds = [1; 16];
    (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]) = (2, 3, 3, 6, 6);
    let mut all = vec![
        ("ggml.model", Value::String("llama".into())),
        ("ggml.tokens", strings(&tokens)),
        ("ggml.scores", Value::Array(scores.map(Value::F32).to_vec())),
        ("ggml.token_type", Value::Array(kinds.map(Value::I32).to_vec())),
        ("ggml.bos_token_id", Value::U32(1)),
        ("ggml.eos_token_id", Value::U32(2)),
        ("ggml.unknown_token_id", Value::U32(0)),
    ];
    all.extend(more);
    let tensor = Tensor::zeros((16, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    let stored = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
    write(
        &path,
        &header("llama", all),
        &[("token_embd.weight".to_owned(), stored)],
    );
    let json = Reference::open(&path).unwrap().tokenizer().unwrap();
    // The first token is put by whoever asks for special tokens.
    let parsed: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let first = &parsed["post_processor"]["single"][0]["SpecialToken"]["id"];
    assert_eq!(first.as_str(), begins.then_some("<s>"));
    Tokenizer::parse("tokenizer.json", &json).unwrap()
}

#[test]
fn sentence_pieces_are_merged_by_their_scores() {
    let llama = pieces(true, Vec::new());
    for (text, expected) in [
        // "bc" has the higher score: it is made before "ab", and then "abc" of both.
        ("abc", &[5, 12][..]),
        ("ab", &[11]),
        ("é", &[5, 3, 4]),
        ("a</s>", &[5, 6, 2]),
    ] {
        assert_eq!(llama.encode(text).unwrap(), expected, "{text}");
    }
    assert_eq!(llama.decode(&[11, 3, 4, 5, 6], false).unwrap(), "abé a");
    let gemma = pieces(
        false,
        vec![
            ("ggml.add_space_prefix", Value::Bool(false)),
            ("ggml.add_bos_token", Value::Bool(false)),
        ],
    );
    assert_eq!(gemma.encode("ab ab").unwrap(), [9, 11]);
    assert_eq!(gemma.decode(&[9, 11], false).unwrap(), "ab ab");
}
