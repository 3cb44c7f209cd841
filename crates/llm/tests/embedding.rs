//! Text encoders as coremltools wrote them, against vectors that numpy computed (`testdata/encoders.py`).

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_coreml_llm::{EmbeddingModel, EmbeddingOptions, Error, Files, Pooling};
use serde_json::Value;

/// Programs in 32 bits: sums of some dozen products in another order.
const FLOAT32: f32 = 2e-5;
/// Weights and operators in 16-bit floats, computed in 32 bits.
const FLOAT16: f32 = 4e-3;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/encoders")
        .join(name)
}

fn golden(folder: &Path) -> Vec<Value> {
    let text = std::fs::read(folder.join("golden.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn numbers(row: &Value, key: &str) -> Vec<f32> {
    row[key]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn furthest(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // `max` would pass over a NaN.
    off.fold(
        0.0,
        |most, v| if v.is_nan() { f32::INFINITY } else { most.max(v) },
    )
}

/// Embeds all texts at once and each alone; gives what is further off than `tolerance`.
fn compare(model: &EmbeddingModel, rows: &[Value], key: &str, tolerance: f32) -> Vec<String> {
    let texts: Vec<&str> = rows.iter().map(|row| row["text"].as_str().unwrap()).collect();
    let together = model.embed(&texts).unwrap();
    let mut failures = Vec::new();
    for ((row, text), found) in rows.iter().zip(&texts).zip(together) {
        let ids = row["ids"].as_array().unwrap();
        let cut = row["cut"].as_u64().unwrap() as usize;
        if (found.tokens, found.tokens_cut) != (ids.len(), cut) {
            failures.push(format!(
                "{text:?}: {} tokens, {} cut",
                found.tokens, found.tokens_cut
            ));
        }
        let alone = model.embed(&[text]).unwrap().remove(0);
        for (how, vector) in [("together", &found.vector), ("alone", &alone.vector)] {
            let off = furthest(vector, &numbers(row, key));
            if off > tolerance {
                failures.push(format!("{text:?} {how}, {key}: off by {off}"));
            }
        }
    }
    failures
}

#[test]
fn packages_of_every_kind_of_shape_give_the_vectors_of_numpy() {
    let mut failures = Vec::new();
    for (name, pooling, normalized, tokens, tolerance) in [
        ("ranged", Some(Pooling::Mean), true, 32, FLOAT32),
        ("fixed", Some(Pooling::Cls), false, 16, FLOAT16),
        ("enumerated", None, true, 32, FLOAT32),
    ] {
        let model = EmbeddingModel::open(data(name), &EmbeddingOptions::default()).unwrap();
        assert_eq!(
            (model.pooling(), model.normalizes(), model.max_tokens()),
            (pooling, normalized, tokens),
            "{name}"
        );
        let found = compare(&model, &golden(&data(name)), "vector", tolerance);
        failures.extend(found.iter().map(|failure| format!("{name}: {failure}")));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn pooling_and_normalization_are_those_asked_for() {
    let mut failures = Vec::new();
    for (pooling, key) in [
        (Pooling::Cls, "cls"),
        (Pooling::Last, "last"),
        (Pooling::Max, "max"),
        (Pooling::Pooler, "pooler"),
    ] {
        let options = EmbeddingOptions {
            pooling: Some(pooling),
            normalize: Some(false),
            ..EmbeddingOptions::default()
        };
        let model = EmbeddingModel::open(data("ranged"), &options).unwrap();
        failures.extend(compare(&model, &golden(&data("ranged")), key, 10.0 * FLOAT32));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_package_and_files_in_memory_open_as_the_folder_does() {
    let folder = data("ranged");
    let rows = golden(&folder);
    let package =
        EmbeddingModel::open(folder.join("ranged.mlpackage"), &EmbeddingOptions::default()).unwrap();
    let mut files = Vec::new();
    list(&folder, &folder, &mut files);
    let memory = Files::memory("memory", files);
    let memory = EmbeddingModel::from_files(&memory, &EmbeddingOptions::default()).unwrap();
    for model in [package, memory] {
        let failures = compare(&model, &rows[..2], "vector", FLOAT32);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
    assert!(EmbeddingModel::recognizes(&folder));
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tales");
    assert!(!EmbeddingModel::recognizes(demo));
}

fn list(root: &Path, folder: &Path, files: &mut Vec<(String, bytes::Bytes)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(root, &path, files);
            continue;
        }
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .replace('\\', "/");
        files.push((name, std::fs::read(&path).unwrap().into()));
    }
}

#[test]
fn ids_give_what_their_text_gives_and_are_checked() {
    let model = EmbeddingModel::open(data("ranged"), &EmbeddingOptions::default()).unwrap();
    let rows = golden(&data("ranged"));
    let ids: Vec<u32> = numbers(&rows[0], "ids").iter().map(|&id| id as u32).collect();
    let found = model.embed_ids(&[&ids]).unwrap().remove(0);
    assert!(furthest(&found.vector, &numbers(&rows[0], "vector")) < FLOAT32);
    let errors = [
        model.embed_ids(&[vec![2; 33]]).unwrap_err(),
        model.embed_ids(&[vec![2, 5000]]).unwrap_err(),
        model.embed_ids(&[vec![2], vec![]]).unwrap_err(),
    ];
    assert!(matches!(
        errors[0],
        Error::PromptTooLong {
            tokens: 33,
            context: 32
        }
    ));
    assert!(matches!(
        errors[1],
        Error::TokenOutside {
            index: 1,
            token: 5000,
            ..
        }
    ));
    assert!(matches!(errors[2], Error::EmptyText { index: 1 }));
    assert!(model.embed(&[""; 0]).unwrap().is_empty());
}

#[test]
fn options_that_do_not_fit_are_refused_with_what_would() {
    let base = EmbeddingOptions::default;
    let rows = [
        (
            "ranged",
            EmbeddingOptions {
                max_tokens: Some(33),
                ..base()
            },
            "3 to 32",
        ),
        (
            "ranged",
            EmbeddingOptions {
                max_tokens: Some(2),
                ..base()
            },
            "3 to 32",
        ),
        (
            "ranged",
            EmbeddingOptions {
                output: Some("logits".to_owned()),
                ..base()
            },
            "`last_hidden_state`, `pooler_output`",
        ),
        (
            "fixed",
            EmbeddingOptions {
                pooling: Some(Pooling::Pooler),
                ..base()
            },
            "`pooler_output`",
        ),
        (
            "enumerated",
            EmbeddingOptions {
                pooling: Some(Pooling::Cls),
                ..base()
            },
            "nothing for pooling cls",
        ),
    ];
    for (name, options, words) in rows {
        let opened = EmbeddingModel::open(data(name), &options);
        let found = opened.and_then(|model| model.embed(&["a cat"]).map(|_| ()));
        let error = found.unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
    let options = EmbeddingOptions {
        max_tokens: Some(4),
        ..base()
    };
    let model = EmbeddingModel::open(data("ranged"), &options).unwrap();
    let found = model.embed(&["the cat sat on the mat"]).unwrap().remove(0);
    assert_eq!((found.tokens, found.tokens_cut), (4, 4));
}

/// `cargo xtask encoder` makes the folder: packages of all-MiniLM-L6-v2 by coremltools, and by this project's converter.
#[test]
fn minilm_gives_the_vectors_of_numpy() {
    let Some(folder) = std::env::var_os("CANDLE_COREML_MINILM").map(PathBuf::from) else {
        eprintln!(
            "CANDLE_COREML_MINILM names no folder with all-MiniLM-L6-v2: not tested (`cargo xtask encoder`)"
        );
        return;
    };
    let rows = golden(&folder);
    let mut failures = Vec::new();
    // Components of vectors of length 1 are 0.05 on average.
    for (name, tolerance) in [("float32", 2e-6), ("float16", 5e-4), ("converted", 5e-4)] {
        let model = EmbeddingModel::open(folder.join(name), &EmbeddingOptions::default()).unwrap();
        let texts: Vec<&str> = rows.iter().map(|row| row["text"].as_str().unwrap()).collect();
        let found = model.embed(&texts).unwrap();
        let off = found
            .iter()
            .zip(&rows)
            .map(|(f, row)| furthest(&f.vector, &numbers(row, "vector")));
        println!("{name}: {:e}", off.fold(0f32, f32::max));
        let found = compare(&model, &rows, "vector", tolerance);
        failures.extend(found.iter().map(|failure| format!("{name}: {failure}")));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
