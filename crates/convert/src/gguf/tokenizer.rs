//! `tokenizer.json` rebuilt from the vocabulary and merges of a GGUF file.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value as Stored;
use serde_json::{Map, Value, json};

use super::GgufFile;
use crate::error::{Error, Result};

/// Kinds of tokens as GGUF numbers them.
const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// How text is cut before merging, from the models' own `tokenizer.json`.
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn files(file: &GgufFile) -> Result<[(&'static str, String); 2]> {
    let tokenizer = tokenizer(file)?;
    Ok([
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", format!("{:#}\n", config(file))),
    ])
}

fn tokenizer(file: &GgufFile) -> Result<Value> {
    let kind = file.text("tokenizer.ggml.model").unwrap_or_default();
    let unsupported = |what: String| Error::Unsupported {
        file: file.name().to_owned(),
        what,
    };
    match kind {
        "gpt2" => {}
        "llama" => return sentence_pieces(file),
        _ => {
            return Err(unsupported(format!(
                "a tokenizer of kind {kind:?}; \"gpt2\" (byte-level merges) and \"llama\" (sentence pieces) are rebuilt, for others put tokenizer.json beside the file"
            )));
        }
    }
    let pre = file.text("tokenizer.ggml.pre").unwrap_or("default");
    let (pre_tokenizer, whole_words) = pre_tokenizer(pre).ok_or_else(|| {
        unsupported(format!(
            "pre-tokenizer {pre:?}; supported: default, gpt-2, smollm, qwen2, llama-bpe"
        ))
    })?;
    let missing = |key: &str| file.missing(key);
    let tokens = file
        .strings("tokenizer.ggml.tokens")
        .ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let merges = file
        .strings("tokenizer.ggml.merges")
        .ok_or_else(|| missing("tokenizer.ggml.merges"))?;
    let vocabulary: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| ((*t).to_owned(), id.into()))
        .collect();
    let normalizer = if pre == "qwen2" {
        json!({ "type": "NFC" })
    } else {
        Value::Null
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(file, &tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": first_token(file, &tokens),
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": whole_words,
            "vocab": vocabulary,
            "merges": merges,
        },
    }))
}

/// A tokenizer of sentence pieces with merges: Llama 2, Mistral, Gemma. The file has scores instead of merges; a piece of a
/// higher score is merged first.
fn sentence_pieces(file: &GgufFile) -> Result<Value> {
    let missing = |key: &str| file.missing(key);
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const SCORES: &str = "tokenizer.ggml.scores";
    let tokens = file.strings(TOKENS).ok_or_else(|| missing(TOKENS))?;
    let scores = file.floats(SCORES).ok_or_else(|| missing(SCORES))?;
    let vocabulary: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| ((*t).to_owned(), id.into()))
        .collect();
    let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let back = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
    let mut normalizers = vec![space];
    let mut decoders = vec![back, json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if file.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = special(file, &tokens, "unk").map(|(_, token)| token);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(file, &tokens),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": first_token(file, &tokens),
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": merges(&tokens, &scores, &kinds(file)),
        },
    }))
}

/// Every way to make a piece of two others, best pieces first.
fn merges(tokens: &[&str], scores: &[f32], kinds: &[i64]) -> Vec<Value> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, t)| (*t, id)).collect();
    let mut pairs: Vec<(f32, usize, usize, usize)> = Vec::new();
    for (id, (token, &score)) in tokens.iter().zip(scores).enumerate() {
        // Special tokens are not made of text.
        if kinds.get(id).is_some_and(|&kind| kind != NORMAL) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                pairs.push((score, id, left, right));
            }
        }
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.2, a.3).cmp(&(b.2, b.3))));
    let text = |id: usize| tokens.get(id).copied().unwrap_or_default();
    pairs
        .into_iter()
        .map(|(_, _, left, right)| json!([text(left), text(right)]))
        .collect()
}

/// The pre-tokenizer, and whether words that are tokens are taken without merging.
fn pre_tokenizer(name: &str) -> Option<(Value, bool)> {
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let split = |pattern: &str| {
        let split = json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        json!({ "type": "Sequence", "pretokenizers": [split, bytes(false)] })
    };
    Some(match name {
        "default" | "gpt-2" => (bytes(true), false),
        "smollm" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            (
                json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] }),
                false,
            )
        }
        "qwen2" => (split(QWEN), false),
        "llama-bpe" => (split(LLAMA3), true),
        _ => return None,
    })
}

/// The kind of each token; none where the file does not say.
fn kinds(file: &GgufFile) -> Vec<i64> {
    let kind = |v: &Stored| match v {
        Stored::I32(n) => i64::from(*n),
        Stored::U32(n) => i64::from(*n),
        _ => 0,
    };
    let kinds = file
        .get("tokenizer.ggml.token_type")
        .and_then(|v| v.to_vec().ok());
    kinds
        .map(|list| list.iter().map(kind).collect())
        .unwrap_or_default()
}

fn added_tokens(file: &GgufFile, tokens: &[&str]) -> Vec<Value> {
    let kinds = kinds(file);
    let added = tokens
        .iter()
        .zip(kinds)
        .enumerate()
        .filter(|(_, (_, k))| matches!(*k, CONTROL | USER_DEFINED));
    added
        .map(|(id, (content, kind))| {
            json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind == CONTROL,
            })
        })
        .collect()
}

/// Puts the first token of every text, where the model was trained with one.
fn first_token(file: &GgufFile, tokens: &[&str]) -> Value {
    // Sentence pieces have it unless the file says otherwise.
    let pieces = file.text("tokenizer.ggml.model") == Some("llama");
    let wanted = file.flag("tokenizer.ggml.add_bos_token").unwrap_or(pieces);
    let Some((id, token)) = special(file, tokens, "bos").filter(|_| wanted) else {
        return Value::Null;
    };
    let first = |kind: u8| json!({ "SpecialToken": { "id": token, "type_id": kind } });
    let text = |name: &str, kind: u8| json!({ "Sequence": { "id": name, "type_id": kind } });
    let mut special_tokens = Map::new();
    special_tokens.insert(
        token.to_owned(),
        json!({ "id": token, "ids": [id], "tokens": [token] }),
    );
    json!({
        "type": "TemplateProcessing",
        "single": [first(0), text("A", 0)],
        "pair": [first(0), text("A", 0), first(1), text("B", 1)],
        "special_tokens": special_tokens,
    })
}

fn special<'a>(file: &GgufFile, tokens: &[&'a str], which: &str) -> Option<(usize, &'a str)> {
    let names = match which {
        "unk" => "tokenizer.ggml.unknown_token_id".to_owned(),
        "pad" => "tokenizer.ggml.padding_token_id".to_owned(),
        other => format!("tokenizer.ggml.{other}_token_id"),
    };
    let id = usize::try_from(file.number(&names)?).ok()?;
    tokens.get(id).map(|t| (id, *t))
}

fn config(file: &GgufFile) -> Value {
    let tokens = file.strings("tokenizer.ggml.tokens").unwrap_or_default();
    let mut config = Map::new();
    for which in ["bos", "eos", "unk", "pad"] {
        if let Some((_, token)) = special(file, &tokens, which) {
            config.insert(format!("{which}_token"), token.into());
        }
    }
    if let Some(template) = file.text("tokenizer.chat_template") {
        config.insert("chat_template".to_owned(), template.into());
    }
    config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
    Value::Object(config)
}
