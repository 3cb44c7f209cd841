//! Tiny checkpoints made from a seed, and what runs their packages.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect
#![allow(dead_code)] // each test uses a part

pub mod gguf;
pub mod run;

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Numbers between -1 and 1, the same on every machine.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

pub const VOCABULARY: usize = 50;
const HIDDEN: usize = 32;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const INNER: usize = 48;
pub const LAYERS: usize = 3;

/// Writes a random checkpoint of a family to `folder`.
pub fn checkpoint(folder: &Path, model_type: &str, extra: &str) {
    let config = format!(
        r#"{{"model_type": "{model_type}", "hidden_size": {HIDDEN}, "num_hidden_layers": {LAYERS},
        "num_attention_heads": {HEADS}, "num_key_value_heads": {KV_HEADS}, "head_dim": {HEAD_DIM},
        "intermediate_size": {INNER}, "vocab_size": {VOCABULARY}, "max_position_embeddings": 64{extra}}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    write_tokenizer(folder, VOCABULARY);
    let mut numbers = Numbers(7);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape, size, offset) in names(model_type, extra) {
        let count: usize = shape.iter().product();
        let bytes = (0..count)
            .flat_map(|_| (offset + size * numbers.next()).to_le_bytes())
            .collect();
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(n, s, b)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

/// A tokenizer of words, so that the folder is whole.
pub fn write_tokenizer(folder: &Path, vocabulary: usize) {
    let words: Vec<String> = (0..vocabulary).map(|i| format!("\"w{i}\": {i}")).collect();
    let tokenizer = format!(
        r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}},
        "post_processor": null, "decoder": null,
        "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "w0"}}}}"#,
        words.join(", ")
    );
    std::fs::write(folder.join("tokenizer.json"), tokenizer).unwrap();
}

/// Name, shape, size of the numbers, and what is added to them.
fn names(model_type: &str, extra: &str) -> Vec<(String, Vec<usize>, f32, f32)> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let gemma = model_type == "gemma3_text";
    // Gemma stores what its norms differ from 1 by.
    let one = if gemma { 0.0 } else { 1.0 };
    let mut list = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![VOCABULARY, HIDDEN],
            1.0,
            0.0,
        ),
        ("model.norm.weight".to_owned(), vec![HIDDEN], 0.3, one),
    ];
    if extra.contains("\"tie_word_embeddings\": false") {
        list.push(("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN], 1.0, 0.0));
    }
    for layer in 0..LAYERS {
        let mut add = |part: &str, shape: &[usize], size: f32, offset: f32| {
            list.push((
                format!("model.layers.{layer}.{part}"),
                shape.to_vec(),
                size,
                offset,
            ));
        };
        for (part, shape) in [
            ("self_attn.q_proj", [q, HIDDEN]),
            ("self_attn.k_proj", [kv, HIDDEN]),
            ("self_attn.v_proj", [kv, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, q]),
            ("mlp.gate_proj", [INNER, HIDDEN]),
            ("mlp.up_proj", [INNER, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INNER]),
        ] {
            add(&format!("{part}.weight"), &shape, 0.25, 0.0);
            let biased = ["q_proj", "k_proj", "v_proj"].iter().any(|p| part.ends_with(p));
            if model_type == "qwen2" && biased {
                add(&format!("{part}.bias"), &shape[..1], 0.5, 0.0);
            }
        }
        add("input_layernorm.weight", &[HIDDEN], 0.3, one);
        add("post_attention_layernorm.weight", &[HIDDEN], 0.3, one);
        if gemma {
            add("pre_feedforward_layernorm.weight", &[HIDDEN], 0.3, one);
            add("post_feedforward_layernorm.weight", &[HIDDEN], 0.3, one);
        }
        if gemma || model_type == "qwen3" {
            add("self_attn.q_norm.weight", &[HEAD_DIM], 0.3, one);
            add("self_attn.k_norm.weight", &[HEAD_DIM], 0.3, one);
        }
    }
    list
}

/// A folder beside the workspace with models that are not in the tree.
pub fn shared(name: &str) -> Option<PathBuf> {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    let path = std::env::var_os("CANDLE_COREML_SHARED")
        .map_or_else(beside, PathBuf::from)
        .join("models")
        .join(name);
    if !path.exists() {
        eprintln!("skipped: {} absent", path.display());
        return None;
    }
    Some(path)
}
