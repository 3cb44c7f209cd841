//! Converted decoders against a float32 forward pass of the checkpoint they come from, in both layouts.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::Path;

use candle_coreml::CoreMLModel;
use candle_coreml_convert::{
    Compression, LanguageModelOptions, Layout, Reference, convert_language_model, plan_language_model,
};
use candle_coreml_llm::{Bundle, LanguageModel, LoadOptions, Prediction};
use support::run::{anemll, furthest, stateful, step};
use support::{LAYERS, VOCABULARY, checkpoint, shared};

/// Families with what their configurations add.
const FAMILIES: [(&str, &str, &str); 7] = [
    ("llama", "llama", ", \"tie_word_embeddings\": false"),
    (
        "llama, rope of 3.1",
        "llama",
        ", \"tie_word_embeddings\": true, \"rope_theta\": 500000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 16}",
    ),
    (
        "llama, linear rope",
        "llama",
        ", \"tie_word_embeddings\": true, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}",
    ),
    (
        "mistral",
        "mistral",
        ", \"tie_word_embeddings\": false, \"sliding_window\": null",
    ),
    (
        "qwen 2.5",
        "qwen2",
        ", \"tie_word_embeddings\": true, \"use_sliding_window\": false, \"sliding_window\": 8",
    ),
    ("qwen 3", "qwen3", ", \"tie_word_embeddings\": true"),
    (
        "gemma 3",
        "gemma3_text",
        ", \"query_pre_attn_scalar\": 8, \"sliding_window\": 64, \"sliding_window_pattern\": 2",
    ),
];

fn options(layout: Layout) -> LanguageModelOptions {
    LanguageModelOptions {
        layout,
        context: 32,
        batch: 4,
        head_splits: 3,
        ..LanguageModelOptions::default()
    }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count)
        .map(|i| u32::try_from((i * i * 7 + i * 3 + 1) % VOCABULARY).unwrap())
        .collect()
}

fn last_row(reference: &Reference, tokens: &[u32]) -> Vec<f32> {
    reference
        .logits(tokens)
        .unwrap()
        .get(tokens.len() - 1)
        .unwrap()
        .to_vec1()
        .unwrap()
}

#[test]
fn every_family_gives_the_logits_of_its_checkpoint_in_both_layouts() {
    let tokens = tokens(11);
    let mut failures = Vec::new();
    for (name, model_type, extra) in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path(), model_type, extra);
        let expected = last_row(&Reference::open(folder.path()).unwrap(), &tokens);
        let size = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let mut compare = |what: &str, found: &[f32]| {
            let error = furthest(found, &expected) / size;
            // Weights and results are 16-bit floats, 2^-11 each, over three layers.
            if error.is_nan() || error > 0.01 {
                failures.push(format!("{name}, {what}: off by {error} of the largest logit"));
            }
        };
        for chunks in [1, 2] {
            let to = folder.path().join(format!("chunks{chunks}"));
            let options = LanguageModelOptions {
                chunks,
                ..options(Layout::Anemll)
            };
            convert_language_model(folder.path(), &to, &options, &mut |_| {}).unwrap();
            compare(&format!("{chunks} chunks"), &anemll(&to, &tokens));
        }
        let to = folder.path().join("stateful");
        convert_language_model(folder.path(), &to, &options(Layout::Stateful), &mut |_| {}).unwrap();
        compare("stateful", &stateful(&to, &tokens));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn compressed_weights_stay_near_the_original_and_progress_reaches_the_end() {
    let tokens = tokens(9);
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path(), "qwen3", ", \"tie_word_embeddings\": true");
    let expected = last_row(&Reference::open(folder.path()).unwrap(), &tokens);
    let size = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let mut failures = Vec::new();
    for (how, most) in [
        ("palette:8", 0.05),
        ("palette:6:group=8", 0.1),
        ("palette:4:group=8", 0.4),
        ("palette:8:group=16:vector=2", 0.4),
        ("int8", 0.05),
        ("int4:block=16", 0.4),
        ("sparse:0.05", 0.1),
        ("sparse:0.05+palette:8", 0.1),
        ("sparse:0.05+palette:8:table=int8", 0.2),
        ("sparse:0.05+int8", 0.1),
    ] {
        let how: Compression = how.parse().unwrap();
        let to = tempfile::tempdir().unwrap();
        let options = LanguageModelOptions {
            layers: how,
            head: how,
            ..options(Layout::Anemll)
        };
        let mut last = (0, 1);
        convert_language_model(folder.path(), to.path(), &options, &mut |p| {
            last = (p.done, p.total)
        })
        .unwrap();
        let error = furthest(&anemll(to.path(), &tokens), &expected) / size;
        if error.is_nan() || error > most || error == 0.0 || last.0 != last.1 {
            failures.push(format!(
                "{how}: off by {error}, at most {most}; progress {last:?}"
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_head_can_choose_the_token_itself() {
    let tokens = tokens(5);
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path(), "llama", ", \"tie_word_embeddings\": true");
    let expected = last_row(&Reference::open(folder.path()).unwrap(), &tokens);
    let to = folder.path().join("out");
    let options = LanguageModelOptions {
        argmax: true,
        ..options(Layout::Anemll)
    };
    convert_language_model(folder.path(), &to, &options, &mut |_| {}).unwrap();
    let mut model = Bundle::open(&to).unwrap().load(&LoadOptions::default()).unwrap();
    let mut cached = 0;
    while cached + 1 < tokens.len() {
        cached = model.prefill(&tokens[..tokens.len() - 1], cached).unwrap();
    }
    let best = (0..expected.len())
        .max_by(|&a, &b| expected[a].total_cmp(&expected[b]))
        .unwrap();
    match model.decode(&tokens).unwrap() {
        Prediction::Token(token) => assert_eq!(token as usize, best),
        Prediction::Logits(_) => panic!("logits from a head that chooses"),
    }
}

#[test]
fn a_plan_names_packages_and_wrong_options_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(
        folder.path(),
        "mistral",
        ", \"tie_word_embeddings\": false, \"sliding_window\": 16",
    );
    let base = LanguageModelOptions {
        context: 16,
        ..options(Layout::Anemll)
    };
    let plan = plan_language_model(
        folder.path(),
        &LanguageModelOptions {
            chunks: 2,
            ..base.clone()
        },
    )
    .unwrap();
    let names: Vec<&str> = plan.packages.iter().map(|(n, _, _)| n.as_str()).collect();
    assert_eq!(
        names,
        [
            "llama_embeddings.mlpackage",
            "llama_FFN_PF_chunk_01of02.mlpackage",
            "llama_FFN_PF_chunk_02of02.mlpackage",
            "llama_lm_head.mlpackage"
        ]
    );
    let to = folder.path().join("out");
    for (options, expected) in [
        (
            LanguageModelOptions {
                context: 65,
                ..base.clone()
            },
            "1 to 64 positions",
        ),
        (
            LanguageModelOptions {
                batch: 17,
                ..base.clone()
            },
            "2 to the context of 16",
        ),
        (
            LanguageModelOptions {
                chunks: LAYERS + 1,
                ..base.clone()
            },
            "1 to 3 layers",
        ),
        (
            LanguageModelOptions {
                head_splits: 51,
                ..base.clone()
            },
            "the vocabulary has 50",
        ),
    ] {
        let error = convert_language_model(folder.path(), &to, &options, &mut |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected) && !to.exists(), "{error}");
    }
}

/// Tokens until the end of text, with how much better each was than the next.
fn greedy(folder: &Path, layout: Layout, prompt: &[u32], most: usize, end: u32) -> Vec<(u32, u32, f32)> {
    let mut all = prompt.to_vec();
    let mut out = Vec::new();
    let mut bundle = (layout == Layout::Anemll).then(|| {
        Bundle::open(folder)
            .unwrap()
            .load(&LoadOptions::default())
            .unwrap()
    });
    let package =
        (layout == Layout::Stateful).then(|| CoreMLModel::load(folder.join("model.mlpackage")).unwrap());
    let mut state = package.as_ref().map(|p| p.make_state().unwrap());
    let mut cached = 0;
    while out.len() < most && out.last().is_none_or(|(t, _, _)| *t != end) {
        let logits = match (&mut bundle, &package, &mut state) {
            (Some(model), _, _) => next(model.as_mut(), &all, &mut cached),
            (_, Some(model), Some(state)) => {
                let logits = step(model, state, &all[cached..], cached);
                cached = all.len();
                logits
            }
            _ => unreachable!("one of the layouts"),
        };
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let [best, second] = [order[0], order[1]];
        out.push((best as u32, second as u32, logits[best] - logits[second]));
        all.push(best as u32);
    }
    out
}

fn next(model: &mut dyn LanguageModel, all: &[u32], cached: &mut usize) -> Vec<f32> {
    while *cached + 1 < all.len() {
        *cached = model.prefill(&all[..all.len() - 1], *cached).unwrap();
    }
    *cached = all.len();
    match model.decode(all).unwrap() {
        Prediction::Logits(logits) => logits.to_vec(),
        Prediction::Token(_) => panic!("the model gives no logits"),
    }
}

/// Where the two best tokens of the golden run are closer than this, 16-bit floats may choose the second.
const CLOSE: f32 = 0.002;

#[test]
fn a_trained_model_says_its_golden_texts_in_both_layouts() {
    let Some(source) = shared("tales-hf") else { return };
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(source.join("golden.json")).unwrap()).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|n| u32::try_from(n.as_u64().unwrap()).unwrap())
            .collect()
    };
    let end = u32::try_from(golden["eos_id"].as_u64().unwrap()).unwrap();
    let mut failures = Vec::new();
    for (layout, chunks) in [(Layout::Anemll, 1), (Layout::Anemll, 2), (Layout::Stateful, 1)] {
        let to = tempfile::tempdir().unwrap();
        let options = LanguageModelOptions {
            layout,
            chunks,
            ..LanguageModelOptions::default()
        };
        convert_language_model(&source, to.path(), &options, &mut |_| {}).unwrap();
        for item in golden["items"].as_array().unwrap() {
            let (prompt, expected) = (ids(&item["prompt_ids"]), ids(&item["greedy_ids"]));
            let found = greedy(to.path(), layout, &prompt, expected.len(), end);
            let tokens: Vec<u32> = found.iter().map(|f| f.0).collect();
            let differs = (0..expected.len()).find(|&i| tokens.get(i) != expected.get(i));
            let Some(at) = differs else { continue };
            let close = found.get(at).is_some_and(|f| f.2 < CLOSE && f.1 == expected[at]);
            if !close {
                failures.push(format!(
                    "{layout:?} {chunks} {}: token {at} is {:?}, not {}",
                    item["name"],
                    found.get(at),
                    expected[at]
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
