//! GGUF files made of tiny checkpoints give what the checkpoints give; tokenizers and templates are rebuilt from their headers.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_coreml_convert::{LanguageModelOptions, Reference, convert_language_model};
use candle_coreml_llm::{Bundle, Tokenizer};
use support::run::{anemll, furthest};
use support::{VOCABULARY, checkpoint};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;

/// The name llama.cpp gives a tensor.
fn stored_name(name: &str, gemma: bool) -> String {
    let name = name.trim_start_matches("model.");
    let Some(rest) = name.strip_prefix("layers.") else {
        let (part, kind) = name.rsplit_once('.').unwrap();
        let part = match part {
            "embed_tokens" => "token_embd",
            "norm" => "output_norm",
            "lm_head" => "output",
            other => panic!("{other}"),
        };
        return format!("{part}.{kind}");
    };
    let (layer, rest) = rest.split_once('.').unwrap();
    let (part, kind) = rest.rsplit_once('.').unwrap();
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" if gemma => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{part}.{kind}")
}

/// What llama.cpp's converter does to a tensor.
fn stored_values(name: &str, arch: &str, tensor: &Tensor) -> Tensor {
    let pairs = |heads: usize| {
        let (rows, width) = tensor.dims2().unwrap();
        let halves = tensor.reshape((heads, 2, rows / heads / 2, width)).unwrap();
        halves.transpose(1, 2).unwrap().reshape((rows, width)).unwrap()
    };
    match arch {
        "llama" if name.contains("q_proj") => pairs(HEADS),
        "llama" if name.contains("k_proj") => pairs(KV_HEADS),
        "gemma3" if name.ends_with("norm.weight") => (tensor + 1.0).unwrap(),
        _ => tensor.clone(),
    }
}

fn strings(words: &[&str]) -> Value {
    Value::Array(words.iter().map(|w| Value::String((*w).to_owned())).collect())
}

/// A header with what a decoder needs, and the tokenizer given.
fn header(arch: &str, tokenizer: Vec<(&str, Value)>) -> Vec<(String, Value)> {
    let mut all = vec![("general.architecture".to_owned(), Value::String(arch.to_owned()))];
    for (key, n) in [
        ("embedding_length", 32),
        ("block_count", 3),
        ("attention.head_count", HEADS as u32),
        ("attention.head_count_kv", KV_HEADS as u32),
        ("attention.key_length", 16),
        ("feed_forward_length", 48),
        ("context_length", 64),
    ] {
        all.push((format!("{arch}.{key}"), Value::U32(n)));
    }
    if arch == "gemma3" {
        all.push(("gemma3.attention.sliding_window".to_owned(), Value::U32(8)));
    }
    all.push((
        format!("{arch}.rope.freq_base"),
        Value::F32(if arch == "gemma3" { 1e6 } else { 1e4 }),
    ));
    all.push((
        format!("{arch}.attention.layer_norm_rms_epsilon"),
        Value::F32(1e-6),
    ));
    all.extend(
        tokenizer
            .into_iter()
            .map(|(key, v)| (format!("tokenizer.{key}"), v)),
    );
    all
}

fn write(path: &Path, header: &[(String, Value)], tensors: &[(String, QTensor)]) {
    let header: Vec<(&str, &Value)> = header.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &header, &tensors).unwrap();
}

/// The checkpoint in `folder` as a GGUF file in a folder of its own.
fn gguf(folder: &Path, arch: &str, tokenizer: Vec<(&str, Value)>) -> PathBuf {
    let all = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let tensors: Vec<(String, QTensor)> = all
        .iter()
        .map(|(name, tensor)| {
            let values = stored_values(name, arch, tensor);
            let stored = QTensor::quantize(&values.contiguous().unwrap(), GgmlDType::F32).unwrap();
            (stored_name(name, arch == "gemma3"), stored)
        })
        .collect();
    let path = folder.join("gguf/model.gguf");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write(&path, &header(arch, tokenizer), &tensors);
    path
}

/// Byte-level merges over a vocabulary of the right size.
fn byte_level() -> Vec<(&'static str, Value)> {
    let fill: Vec<String> = (6..VOCABULARY).map(|i| format!("w{i}")).collect();
    let mut tokens = vec!["<|end|>", "a", "b", "ab", "\u{120}ab", "\u{120}"];
    tokens.extend(fill.iter().map(String::as_str));
    let mut kinds = vec![Value::I32(1); VOCABULARY];
    kinds[0] = Value::I32(3);
    vec![
        ("ggml.model", Value::String("gpt2".into())),
        ("ggml.pre", Value::String("qwen2".into())),
        ("ggml.tokens", strings(&tokens)),
        ("ggml.merges", strings(&["a b", "\u{120} ab"])),
        ("ggml.token_type", Value::Array(kinds)),
        ("ggml.eos_token_id", Value::U32(0)),
        (
            "chat_template",
            Value::String("{{ messages[0].content }}<|end|>".into()),
        ),
    ]
}

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
