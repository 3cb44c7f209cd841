//! Checkpoints of the tests as GGUF files.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::VOCABULARY;

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

pub fn strings(words: &[&str]) -> Value {
    Value::Array(words.iter().map(|w| Value::String((*w).to_owned())).collect())
}

/// A header with what a decoder needs, and the tokenizer given.
pub fn header(arch: &str, tokenizer: Vec<(&str, Value)>) -> Vec<(String, Value)> {
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

pub fn write(path: &Path, header: &[(String, Value)], tensors: &[(String, QTensor)]) {
    let header: Vec<(&str, &Value)> = header.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &header, &tensors).unwrap();
}

/// The checkpoint in `folder` as a GGUF file in a folder of its own.
pub fn gguf(folder: &Path, arch: &str, tokenizer: Vec<(&str, Value)>) -> PathBuf {
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
pub fn byte_level() -> Vec<(&'static str, Value)> {
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
