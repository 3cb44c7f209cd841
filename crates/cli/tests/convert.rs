//! `convert` and `compress` as people call them, on tiny checkpoints of the tree.

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_candle-coreml"))
        .args(args)
        .output()
        .unwrap()
}

fn stdout(args: &[&str]) -> String {
    let output = run(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// What a call that cannot work says, and its exit code.
fn refusal(args: &[&str]) -> (String, Option<i32>) {
    let output = run(args);
    assert!(!output.status.success(), "{args:?}");
    (String::from_utf8(output.stderr).unwrap(), output.status.code())
}

fn checkpoint(name: &str) -> String {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../convert/testdata");
    format!("{data}/{name}")
}

/// A copy of a checkpoint with a tokenizer of words.
fn with_tokenizer(name: &str, folder: &Path) -> PathBuf {
    let to = folder.join(name);
    std::fs::create_dir_all(&to).unwrap();
    for entry in std::fs::read_dir(checkpoint(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    let words: Vec<String> = (0..64).map(|i| format!("\"w{i}\": {i}")).collect();
    let tokenizer = format!(
        r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}},
        "post_processor": null, "decoder": null, "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "w0"}}}}"#,
        words.join(", ")
    );
    std::fs::write(to.join("tokenizer.json"), tokenizer).unwrap();
    let text: Vec<String> = (3..30).map(|i| format!("w{i}")).collect();
    std::fs::write(folder.join("text.txt"), text.join(" ")).unwrap();
    to
}

#[test]
fn a_dry_run_prints_sizes_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let model = checkpoint("llama3");
    let facts = json(&[
        "convert",
        &model,
        out,
        "--dry-run",
        "--json",
        "--chunks",
        "2",
        "--palettize",
        "4",
    ]);
    assert_eq!(
        (facts["layers"].as_u64(), facts["context"].as_u64()),
        (Some(2), Some(64))
    );
    assert_eq!(facts["packages"].as_array().unwrap().len(), 4);
    // Two layers of 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 values in 4 bits, a head in 4, embeddings in 16.
    assert_eq!(
        facts["weight_bytes"].as_u64(),
        Some(2 * 7680 / 2 + 64 * 32 / 2 + 64 * 32 * 2)
    );
    assert!(!Path::new(out).exists());
    let text = stdout(&["convert", &checkpoint("bert"), "--dry-run"]);
    assert!(text.starts_with("encoder: 2 layers of 32"), "{text}");
}

#[test]
fn a_conversion_is_checked_against_float32_in_both_layouts() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_tokenizer("qwen3", folder.path());
    let text = folder.path().join("text.txt");
    for (name, layout) in [("a", "anemll"), ("b", "stateful")] {
        let out = folder.path().join(name);
        let words = [
            "convert",
            model.to_str().unwrap(),
            out.to_str().unwrap(),
            "--layout",
            layout,
            "--context",
            "32",
            "--check",
            "--text",
            text.to_str().unwrap(),
        ];
        let report = stdout(&words);
        assert!(
            report.contains("the best token is the same at 27 (100.0 %)"),
            "{report}"
        );
        assert!(report.contains("perplexity"), "{report}");
        assert!(report.contains("(candle-transformers)"), "{report}");
    }
}

#[test]
fn an_encoder_is_checked_against_float32() {
    for (name, tokens) in [("bert", None), ("roberta", Some("24"))] {
        let folder = tempfile::tempdir().unwrap();
        let model = with_tokenizer(name, folder.path());
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "w3 w4 w5 w6 w7 w8\n\nw40 w9 w33\n").unwrap();
        let out = folder.path().join("out");
        let [model, out, text] = [&model, &out, &text].map(|p| p.to_str().unwrap().to_owned());
        let mut words = vec!["convert", &model, &out, "--check", "--text", &text, "--json"];
        words.extend(tokens.iter().flat_map(|n| ["--tokens", n]));
        let report = stdout(&words);
        // Two documents: what was written, and the check.
        let check = report.split_once("\n}\n").unwrap().1;
        let check: serde_json::Value = serde_json::from_str(check).unwrap();
        let check = &check["check"];
        assert_eq!(
            (check["texts"].as_u64(), check["tokens"].as_u64()),
            (Some(2), Some(9)),
            "{report}"
        );
        assert!(check["largest_error"].as_f64().unwrap() < 0.02, "{report}");
        assert!(check["smallest_cosine"].as_f64().unwrap() > 0.999, "{report}");
    }
}

#[test]
fn sensitivity_has_a_row_for_each_layer() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_tokenizer("qwen3", folder.path());
    let text = folder.path().join("text.txt");
    let words = [
        "convert",
        model.to_str().unwrap(),
        "--sensitivity",
        "--palettize",
        "2",
        "--mix",
        "1=int8",
        "--text",
        text.to_str().unwrap(),
        "--json",
    ];
    let facts = json(&words);
    let layers = facts["layers"].as_array().unwrap();
    let divergence = |i: usize| layers[i]["divergence"].as_f64().unwrap();
    assert_eq!(layers.len(), 2);
    assert!(divergence(0) > divergence(1) && divergence(1) > 0.0, "{facts}");
    assert_eq!(layers[1]["how"], "int8");
}

#[test]
fn a_package_and_a_folder_are_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    stdout(&["convert", &checkpoint("qwen2"), out.to_str().unwrap()]);
    let head = out.join("qwen25_lm_head.mlpackage");
    let facts = json(&[
        "compress",
        head.to_str().unwrap(),
        "--palettize",
        "4",
        "--least",
        "64",
        "--json",
    ]);
    let package = &facts["packages"][0];
    assert!(
        package["path"]
            .as_str()
            .unwrap()
            .ends_with("qwen25_lm_head-palette-4.mlpackage")
    );
    assert_eq!(
        (package["compressed"].as_u64(), package["values"].as_u64()),
        (Some(8), Some(64 * 32))
    );
    assert!(package["relative_error"].as_f64().unwrap() < 0.1);
    std::fs::remove_dir_all(package["path"].as_str().unwrap()).unwrap();

    let small = folder.path().join("small");
    let facts = json(&[
        "compress",
        out.to_str().unwrap(),
        small.to_str().unwrap(),
        "--quantize",
        "8",
        "--least",
        "64",
        "--only",
        "rotary=none",
        "--json",
    ]);
    assert_eq!(facts["packages"].as_array().unwrap().len(), 3);
    assert!(small.join("meta.yaml").exists() && small.join("config.json").exists());
    let kept = facts["packages"][0]["kept"].as_array().unwrap();
    assert!(
        kept.iter()
            .any(|k| k["weight"] == "rotary_cos" && k["why"] == "asked for"),
        "{facts}"
    );
}

#[test]
fn what_cannot_be_done_is_said_with_the_name_of_the_tensor_or_option() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let llama = checkpoint("llama3");
    for (words, code, expected) in [
        (
            vec!["convert", &llama, out, "--context", "65"],
            1,
            "1 to 64 positions",
        ),
        (
            vec!["convert", &llama, out, "--mix", "2=int8"],
            1,
            "layer 2; the model has 0 to 1",
        ),
        (
            vec!["convert", &llama, out, "--palettize", "5"],
            2,
            "palettes of 5 bits",
        ),
        (
            vec!["convert", &llama, out, "--quantize", "4", "--block", "5"],
            1,
            "model.layers.0.self_attn.q_proj.weight",
        ),
        (vec!["convert", &llama], 2, "<OUT>"),
        (vec!["compress", &llama], 2, "nothing to do"),
        (vec!["compress", &llama, "--palettize", "4"], 1, "no .mlpackage"),
        (vec!["convert", "/nowhere", out], 1, "/nowhere"),
    ] {
        let (error, found) = refusal(&words);
        assert!(error.contains(expected), "{words:?}: {error}");
        assert_eq!(found, Some(code), "{words:?}: {error}");
    }
}
