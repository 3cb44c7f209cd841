//! `embed` as people call it, on a small encoder that coremltools wrote and on one that `convert` makes.

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn encoder() -> String {
    data("llm/testdata/encoders/ranged").display().to_string()
}

fn run(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_candle-coreml"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A call that is refused does not read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn stdout(args: &[&str], input: &str) -> String {
    let output = run(args, input);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn vectors_are_those_of_the_reference_printed_and_saved() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(data("llm/testdata/encoders/ranged/golden.json")).unwrap())
            .unwrap();
    let rows = golden.as_array().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vectors.npy");
    let input = format!(
        "{}\n{}\n",
        rows[0]["text"].as_str().unwrap(),
        rows[1]["text"].as_str().unwrap()
    );
    let args = [
        "embed",
        &encoder(),
        "--file",
        "-",
        "--json",
        "--similarity",
        "-o",
        file.to_str().unwrap(),
    ];
    let found: Value = serde_json::from_str(&stdout(&args, &input)).unwrap();
    let numbers = |v: &Value| -> Vec<f64> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_f64().unwrap())
            .collect()
    };
    for (row, text) in rows.iter().zip(found["texts"].as_array().unwrap()) {
        let pairs = numbers(&row["vector"]).into_iter().zip(numbers(&text["vector"]));
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 2e-5), "{text}");
        assert_eq!(
            text["tokens"].as_u64().unwrap() as usize,
            row["ids"].as_array().unwrap().len()
        );
    }
    assert_eq!(
        (found["pooling"].as_str(), found["normalized"].as_bool()),
        (Some("mean"), Some(true))
    );
    let cosine: f64 = {
        let (a, b) = (numbers(&rows[0]["vector"]), numbers(&rows[1]["vector"]));
        a.iter().zip(&b).map(|(x, y)| x * y).sum()
    };
    let similarity = &found["similarity"];
    assert!(
        (similarity[0][1].as_f64().unwrap() - cosine).abs() < 1e-5,
        "{similarity}"
    );
    assert!(
        (similarity[1][1].as_f64().unwrap() - 1.0).abs() < 1e-6,
        "{similarity}"
    );
    // A header of 128 bytes and two rows of 16 numbers.
    let saved = std::fs::read(&file).unwrap();
    assert_eq!(saved.len(), 128 + 2 * 16 * 4);
    let first = f32::from_le_bytes(saved[128..132].try_into().unwrap());
    assert!((f64::from(first) - numbers(&rows[0]["vector"])[0]).abs() < 2e-5);
}

#[test]
fn options_change_what_comes() {
    let encoder = encoder();
    let vector = |more: &[&str]| -> Vec<f64> {
        let args: Vec<&str> = ["embed", &encoder, "--text", "the cat sat"]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        serde_json::from_str(&stdout(&args, "")).unwrap()
    };
    let plain = vector(&[]);
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!((length(&plain) - 1.0).abs() < 1e-6);
    assert!((length(&vector(&["--normalize", "false"])) - 1.0).abs() > 1e-3);
    assert_ne!(vector(&["--pooling", "last"]), plain);
    let short = vector(&["--dimensions", "4"]);
    assert_eq!(short.len(), 4);
    assert!((length(&short) - 1.0).abs() < 1e-6);
    let table = stdout(
        &[
            "embed",
            &encoder,
            "--text",
            "the cat",
            "--text",
            "the dog",
            "--similarity",
        ],
        "",
    );
    assert!(
        table.starts_with(" 1.0000 ") && table.lines().count() == 2,
        "{table}"
    );
    let cut = run(
        &[
            "embed",
            &encoder,
            "--text",
            "the cat sat on the mat",
            "--max-tokens",
            "4",
        ],
        "",
    );
    let remark = String::from_utf8_lossy(&cut.stderr).into_owned();
    assert!(
        cut.status.success() && remark.contains("last 4 were left out"),
        "{remark}"
    );
}

#[test]
fn calls_that_cannot_work_say_why() {
    let encoder = encoder();
    let demo = data("../models/tales").display().to_string();
    for (args, code, words) in [
        (&["embed", &encoder][..], 2, "--text"),
        (
            &["embed", &encoder, "--text", "a", "--pooling", "median"],
            2,
            "weighted-mean",
        ),
        (
            &["embed", &encoder, "--text", "a", "--max-tokens", "99"],
            2,
            "3 to 32",
        ),
        (&["embed", &encoder, "--text", "a", "--dimensions", "17"], 2, "16"),
        (
            &["embed", &encoder, "--text", "a", "--prompt", "query"],
            2,
            "it has none",
        ),
        (&["embed", &encoder, "--file", "nowhere.txt"], 1, "nowhere.txt"),
        (&["embed", &demo, "--text", "a"], 1, "several packages"),
    ] {
        let output = run(args, "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn a_converted_encoder_opens_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("bert");
    std::fs::create_dir_all(checkpoint.join("1_Pooling")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(data("convert/testdata/bert").join(file), checkpoint.join(file)).unwrap();
    }
    let words: String = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        .map(|w| format!("{w}\n"))
        .concat();
    let more: String = (4..64).map(|i| format!("w{i}\n")).collect();
    std::fs::write(checkpoint.join("vocab.txt"), words + &more).unwrap();
    std::fs::write(
        checkpoint.join("1_Pooling/config.json"),
        r#"{"pooling_mode_cls_token": true}"#,
    )
    .unwrap();
    let out = folder.path().join("out");
    stdout(
        &["convert", checkpoint.to_str().unwrap(), out.to_str().unwrap()],
        "",
    );
    let vector = |more: &[&str]| -> Vec<f64> {
        let args: Vec<&str> = ["embed", out.to_str().unwrap(), "--text", "w5 w9 w33"]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        serde_json::from_str(&stdout(&args, "")).unwrap()
    };
    // The package's own text vector, and the same pooled here from the vectors of tokens.
    let (package, here) = (vector(&[]), vector(&["--pooling", "cls"]));
    assert_eq!((package.len(), here.len()), (32, 32));
    let off = package
        .iter()
        .zip(&here)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max);
    assert!(off < 1e-3, "{off}");
}
