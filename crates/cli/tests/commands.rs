//! The commands as people call them, on the demo model and on files made here.

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    run_with_input(args, "")
}

fn run_with_input(args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_candle-coreml"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn demo() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tales"))
}

const PROMPT: &str = "Tell me a story about a brave mouse.";

#[test]
fn generate_prints_one_object_with_exactly_these_keys() {
    let text = stdout(&run(&[
        "generate",
        "--prompt",
        PROMPT,
        "--max-tokens",
        "6",
        "--json",
    ]));
    let object: serde_json::Value = serde_json::from_str(&text).unwrap();
    let keys: Vec<&String> = object.as_object().unwrap().keys().collect();
    let expected = [
        "prompt_tokens",
        "tokens",
        "text",
        "finish_reason",
        "prefill_ms",
        "decode_ms",
        "decode_tokens_per_s",
    ];
    assert_eq!(keys, expected);
    assert_eq!(object["tokens"], serde_json::json!([532, 600, 259, 458, 14, 440]));
    assert_eq!(
        (object["prompt_tokens"].as_u64(), object["text"].as_str()),
        (Some(20), Some("Once upon a time, there"))
    );
    assert_eq!(object["finish_reason"], "length");
    assert!(object["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn text_comes_to_standard_output_and_remarks_do_not() {
    let output = run(&["generate", "--prompt", PROMPT, "-n", "6"]);
    assert_eq!(stdout(&output), "Once upon a time, there\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("20 prompt tokens"));
}

#[test]
fn a_raw_prompt_is_fed_as_it_is_and_may_come_from_standard_input() {
    let written = format!("<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n");
    let folder = demo();
    let output = run_with_input(
        &[
            "generate",
            folder.to_str().unwrap(),
            "--prompt",
            "-",
            "--raw",
            "-n",
            "6",
        ],
        &written,
    );
    assert_eq!(stdout(&output), "Once upon a time, there\n");
}

#[test]
fn a_seed_decides_a_sampled_text() {
    let sampled = |seed: &str| {
        let args = [
            "generate",
            "-p",
            PROMPT,
            "-n",
            "12",
            "--temperature",
            "1.5",
            "--top-k",
            "50",
            "--seed",
            seed,
        ];
        stdout(&run(&args))
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn chat_answers_lines_and_knows_its_commands() {
    let lines = format!("/help\n{PROMPT}\n/stats\n/nonsense\n/quit\n");
    let output = run_with_input(&["chat", "-n", "6", "--temperature", "0"], &lines);
    let text = stdout(&output);
    assert!(
        text.contains("/reset") && text.contains("Once upon a time, there"),
        "{text}"
    );
    let remarks = String::from_utf8_lossy(&output.stderr);
    assert!(
        remarks.contains("of 512 tokens used") && remarks.contains("no command /nonsense"),
        "{remarks}"
    );
}

#[test]
fn inspect_shows_models_and_bundles() {
    let part = demo().join("qwen_lm_head_lut6.mlpackage");
    let json = stdout(&run(&["inspect", part.to_str().unwrap(), "--json"]));
    let facts: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(facts["kind"], "ML Program");
    assert_eq!(facts["functions"][0]["inputs"][0]["name"], "hidden_states");
    assert_eq!(facts["functions"][0]["outputs"].as_array().unwrap().len(), 16);
    assert!(facts["weights"]["by_dtype"]["uint6"]["bytes"].as_u64().unwrap() > 0);
    let text = stdout(&run(&["inspect", demo().to_str().unwrap()]));
    for expected in [
        "context tokens 512",
        "causal_mask fp16 [1, 1, 64, 512]",
        "<|im_end|>",
        "operators",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
}

#[test]
fn inspect_shows_the_wiring_of_every_layout() {
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/testdata/bundles");
    for (bundle, layout, expected) in [
        (
            "chunks",
            "anemll",
            "hidden_states fp16 [1, 8, 16] <- hidden states of tiny_FFN_PF_chunk_01of02.mlpackage",
        ),
        (
            "one-by-one",
            "anemll",
            "prefill token by token: meta.yaml (version 0.3.5) sets neither",
        ),
        (
            "rotate",
            "anemll",
            "decode past the window tiny_FFN_PF_chunk_01of01.mlpackage, function infer_rotate, state 0",
        ),
        (
            "monolith",
            "anemll-monolithic",
            "logits4 fp16 [1, 1, 20] -> logits, part 4 of 4",
        ),
        (
            "config-split",
            "model-config",
            "prefill ffn_prefill.mlpackage, function main, state 0",
        ),
        (
            "config-split/config-split.json",
            "model-config",
            "last_row fp16 [1, 1, 16] <- hidden states of",
        ),
        (
            "stateful",
            "stateful-package",
            "state 0 made by StatefulTiny.mlpackage",
        ),
        (
            "stateless",
            "stateless-package",
            "prefill none: the package keeps nothing",
        ),
    ] {
        let path = bundles.join(bundle);
        let text = stdout(&run(&["inspect", path.to_str().unwrap()]));
        assert!(text.contains(expected), "{bundle}: {expected} in {text}");
        let json = stdout(&run(&["inspect", path.to_str().unwrap(), "--json"]));
        let facts: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(facts["layout"], layout, "{bundle}");
        assert!(
            !facts["calls"][0]["inputs"][0]["flow"]
                .as_str()
                .unwrap()
                .is_empty(),
            "{bundle}"
        );
    }
}

#[test]
fn ops_counts_and_finds_nothing_missing_in_the_demo_model() {
    let part = demo().join("qwen_FFN_PF_lut6_chunk_01of01.mlpackage");
    let text = stdout(&run(&["ops", part.to_str().unwrap()]));
    assert!(
        text.contains("slice_update") && text.contains("has all of them"),
        "{text}"
    );
}

#[test]
fn predict_reads_and_writes_arrays() {
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.npy");
    let header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }";
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    let file = [
        b"\x93NUMPY\x01\x00",
        &length[..],
        header.as_bytes(),
        &5i64.to_le_bytes(),
    ]
    .concat();
    std::fs::write(&ids, file).unwrap();
    let part = demo().join("qwen_embeddings_lut6.mlpackage");
    let input = format!("input_ids={}", ids.display());
    let out = dir.path().join("out");
    let args = [
        "predict",
        part.to_str().unwrap(),
        "--input",
        &input,
        "--output",
        out.to_str().unwrap(),
    ];
    assert!(stdout(&run(&args)).starts_with("hidden_states F16 [1, 1, 256] "));
    let written = std::fs::read(out.join("hidden_states.npy")).unwrap();
    assert_eq!(written.len() % 64, 512 % 64);
    let missing = run(&[
        "predict",
        part.to_str().unwrap(),
        "--output",
        out.to_str().unwrap(),
    ]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("input_ids"));
}

#[test]
fn bench_prints_a_table_and_json() {
    let table = stdout(&run(&["bench", "-p", "8", "-n", "2", "-r", "2"]));
    assert!(
        table.starts_with("| model")
            && table.contains("pp8")
            && table.contains("tg2")
            && table.contains(" ± ")
            && table.contains("µs a token outside"),
        "{table}"
    );
    let json = stdout(&run(&["bench", "-p", "8", "-n", "0", "-r", "2", "--json"]));
    let rows: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (
            rows[0]["n_prompt"].as_u64(),
            rows[0]["samples_ts"].as_array().unwrap().len()
        ),
        (Some(8), 2)
    );
    let csv = stdout(&run(&[
        "bench", "-p", "8", "-n", "2", "-d", "0,64", "-r", "1", "-o", "csv",
    ]));
    let rows: Vec<_> = csv.lines().map(|l| l.split(',').collect::<Vec<_>>()).collect();
    let depths: Vec<_> = rows.iter().skip(1).map(|r| (r[4], r[5], r[6])).collect();
    assert_eq!(
        depths,
        [
            ("8", "0", "0"),
            ("0", "2", "0"),
            ("8", "0", "64"),
            ("0", "2", "64")
        ]
    );
}

#[test]
fn exit_codes_mean_something() {
    for (args, code, words) in [
        (&["inspect", "/no/such.mlpackage"][..], 1, "/no/such.mlpackage"),
        (
            &["generate", "/no/such", "-p", "x"],
            1,
            "/no/such: cannot be read",
        ),
        (&["generate"], 2, "--prompt"),
        (
            &["bench", "-p", "9999"],
            2,
            "pp9999 does not fit the context of 512 tokens",
        ),
        (
            &["bench", "-p", "8", "-n", "0", "-d", "9999"],
            2,
            "pp8 @ d9999 does not fit the context of 512 tokens",
        ),
        (
            &["generate", "-p", "x", "--temperature", "-1"],
            2,
            "temperature is -1, allowed: 0 or more",
        ),
        (
            &["generate", "-p", "x", "--top-p", "3"],
            2,
            "top_p is 3, allowed: above 0, up to 1",
        ),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_candle-coreml"))
        .args(["generate", "-p", PROMPT, "-n", "40"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("panicked"), "{said}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_text_cleanly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_candle-coreml"))
        .args(["generate", "-p", PROMPT, "-n", "400", "--temperature", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0u8; 1];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&output.stderr).contains("ended by cancelled"));
}

/// A picture in, a picture and probabilities out, and an fp16 value that overflows on the way.
const PICTURES: &str = r#"program(1.3) {
    func main<ios18>(tensor<fp16, [1, 4]> x, tensor<int32, [1]> n) {
        tensor<fp16, [1, 4]> large = mul(x = x, y = fp16(0x1p+12));
        tensor<fp16, [1, 4]> larger = mul(x = large, y = fp16(0x1p+12));
        tensor<fp16, [4, 1]> turned = transpose(perm = tensor<int32, [2]>([1, 0]), x = larger);
        tensor<fp16, [1, 4]> back = transpose(perm = tensor<int32, [2]>([1, 0]), x = turned);
        tensor<fp16, [1, 4]> y = mul(x = back, y = fp16(0x1p-20));
        tensor<int32, [1]> twice = add(x = n, y = n);
    } -> (y, twice);
}"#;

fn written_model(folder: &std::path::Path) -> String {
    let model = folder.join("m.mlmodelc");
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("model.mil"), PICTURES).unwrap();
    model.to_str().unwrap().to_owned()
}

#[test]
fn trace_shows_every_value_and_where_fp16_overflows_first() {
    let folder = tempfile::tempdir().unwrap();
    let model = written_model(folder.path());
    let saved = folder.path().join("values");
    let saved = saved.to_str().unwrap();
    for (numerics, last_inf) in [("faithful", true), ("default", false)] {
        let output = run(&[
            "trace",
            &model,
            "--random",
            "3",
            "--numerics",
            numerics,
            "--json",
            "-o",
            saved,
        ]);
        let rows: Vec<serde_json::Value> = stdout(&output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let names: Vec<&str> = rows.iter().map(|r| r["name"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["large", "larger", "turned", "back", "y", "twice"],
            "{numerics}"
        );
        let overflows: Vec<u64> = rows.iter().map(|r| r["overflow"].as_u64().unwrap()).collect();
        assert_eq!(overflows[0], 0);
        assert_eq!(overflows[1], 4, "|x| is above 2^-8 in all four elements");
        let inf = rows[4]["inf"].as_u64().unwrap();
        assert_eq!(inf > 0, last_inf, "{numerics}: {rows:?}");
    }
    let only = stdout(&run(&["trace", &model, "--random", "3", "--only", "arg"]));
    assert_eq!(only.lines().count(), 3, "a heading, large and larger: {only}");
    for name in names_in(folder.path().join("values")) {
        assert!(name.ends_with(".npy"), "{name}");
    }
}

fn names_in(folder: PathBuf) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn verify_compares_with_what_it_recorded_and_names_the_worst_element() {
    let folder = tempfile::tempdir().unwrap();
    let model = written_model(folder.path());
    let golden = folder.path().join("g.npz");
    let golden = golden.to_str().unwrap();
    stdout(&run(&[
        "verify", &model, "--golden", golden, "--record", "--random", "5",
    ]));
    let text = stdout(&run(&["verify", &model, "--golden", golden]));
    assert_eq!(text.matches(" ok: 0 of ").count(), 2, "{text}");
    // Other inputs than the saved ones give other outputs.
    let out = run(&["verify", &model, "--golden", golden, "--random", "6", "--json"]);
    assert_eq!(out.status.code(), Some(1));
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(rows[1]["output"], "y");
    assert_eq!(rows[1]["ok"], false);
    assert!(rows[1]["wrong"].as_u64().unwrap() > 0);
    assert_eq!(rows[1]["worst"].as_array().unwrap().len(), 2);
    let missing = run(&["verify", &model, "--golden", "nothing.npz"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("nothing.npz"));
}

#[test]
fn explain_prints_the_steps_of_the_plan() {
    let folder = tempfile::tempdir().unwrap();
    let model = written_model(folder.path());
    let text = stdout(&run(&["explain", &model]));
    assert!(text.contains("function \"main\""), "{text}");
    assert!(text.contains("[1, 4]") && text.contains("Mflop"), "{text}");
}

#[cfg(not(target_vendor = "apple"))]
#[test]
fn plan_says_what_there_is_in_its_place_off_apple_systems() {
    let folder = tempfile::tempdir().unwrap();
    let out = run(&["plan", &written_model(folder.path())]);
    assert_eq!(out.status.code(), Some(1));
    let words = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        words.contains("CoreML.framework exists on Apple systems only")
            && words.contains("candle-coreml explain"),
        "{words}"
    );
}

#[test]
fn a_schema_makes_json_of_every_text() {
    let schema = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["mouse", "fox"]}}, "required": ["name", "age", "kind"], "additionalProperties": false}"#;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("schema.json");
    std::fs::write(&file, schema).unwrap();
    for (schema, temperature, seed) in [
        (schema, "0", "0"),
        (file.to_str().unwrap(), "1", "1"),
        (schema, "3", "2"),
    ] {
        let output = run(&[
            "generate",
            "-p",
            PROMPT,
            "--json-schema",
            schema,
            "--temperature",
            temperature,
            "--seed",
            seed,
        ]);
        let text = stdout(&output);
        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(object["name"].as_str().unwrap().chars().count() <= 12, "{text}");
        assert!((1..100).contains(&object["age"].as_u64().unwrap()), "{text}");
        assert!(
            ["mouse", "fox"].contains(&object["kind"].as_str().unwrap()),
            "{text}"
        );
        assert_eq!(object.as_object().unwrap().len(), 3, "{text}");
    }
    let cut = run(&[
        "generate",
        "-p",
        PROMPT,
        "--json-schema",
        schema,
        "-n",
        "3",
        "--json",
    ]);
    assert_eq!(cut.status.code(), Some(1));
    let object: serde_json::Value = serde_json::from_slice(&cut.stdout).unwrap();
    assert_eq!(
        (&object["fits_grammar"], &object["finish_reason"]),
        (&false.into(), &"length".into())
    );
    let remarks = String::from_utf8_lossy(&cut.stderr);
    assert!(
        remarks.contains("the text is not whole: it was ended by length"),
        "{remarks}"
    );
}

#[test]
fn a_regular_expression_is_what_the_whole_text_matches() {
    let text = stdout(&run(&[
        "generate",
        "-p",
        PROMPT,
        "--regex",
        "(yes|no), [0-9]{2}!",
        "--temperature",
        "2",
    ]));
    let text = text.trim_end();
    let number = text.strip_prefix("yes, ").or_else(|| text.strip_prefix("no, "));
    let digits = number.unwrap().strip_suffix('!').unwrap();
    assert!(
        digits.len() == 2 && digits.chars().all(|c| c.is_ascii_digit()),
        "{text}"
    );
    for (args, code, words) in [
        (&["--regex", "a("][..], 2, "grammar: "),
        (&["--json-schema", "{\"type\": 3}"], 2, "grammar: "),
        (&["--json-schema", "{"], 2, "--json-schema: "),
        (&["--json-schema", "/no/such"], 2, "/no/such: "),
        (&["--think", "on"], 1, "no switch for thinking"),
    ] {
        let output = run(&[&["generate", "-p", "x"], args].concat());
        let remarks = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(code) && remarks.contains(words),
            "{args:?}: {remarks}"
        );
    }
}

#[test]
fn a_full_context_ends_a_text_or_loses_its_oldest_tokens() {
    let long = format!("{PROMPT} ").repeat(40);
    let long = long.trim();
    let args = ["generate", "--raw", "-p", long, "-n", "300", "--json"];
    let stopped: serde_json::Value = serde_json::from_str(&stdout(&run(&args))).unwrap();
    assert!(stopped.get("dropped_tokens").is_none());
    let shifted = run(&[&args[..], &["--context", "shift"]].concat());
    let remarks = String::from_utf8_lossy(&shifted.stderr).into_owned();
    let object: serde_json::Value = serde_json::from_str(&stdout(&shifted)).unwrap();
    if stopped["finish_reason"] == "context" {
        assert!(object["dropped_tokens"].as_u64().unwrap() > 200, "{object}");
        assert!(remarks.contains("the context is full: its oldest"), "{remarks}");
    } else {
        assert_eq!(object["tokens"], stopped["tokens"]);
    }
    let over = format!("{PROMPT} ").repeat(80);
    let refused = run(&["generate", "--raw", "-p", &over, "-n", "1"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the model's context holds 512"));
    let taken = run(&[
        "generate",
        "--raw",
        "-p",
        &over,
        "-n",
        "1",
        "--json",
        "--context",
        "shift",
    ]);
    let object: serde_json::Value = serde_json::from_str(&stdout(&taken)).unwrap();
    assert!(object["dropped_tokens"].as_u64().unwrap() > 100, "{object}");
}

#[test]
fn a_chat_is_saved_taken_up_tried_again_and_taken_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("talk");
    let file = file.to_str().unwrap();
    let args = ["chat", "-n", "6", "--temperature", "0"];
    let first = run_with_input(&args, &format!("{PROMPT}\n/retry\n/save {file}\n/undo\n/undo\n"));
    let text = stdout(&first);
    assert_eq!(text.matches("Once upon a time, there").count(), 2, "{text}");
    let remarks = String::from_utf8_lossy(&first.stderr);
    for expected in [
        "saved to",
        "taken back: Tell me a story about a brave mouse.",
        "nothing was said yet",
    ] {
        assert!(remarks.contains(expected), "{expected} in {remarks}");
    }
    let second = run_with_input(&args, &format!("/load {file}\n/think on\nand\\\nthen\n/stats\n"));
    stdout(&second);
    let remarks = String::from_utf8_lossy(&second.stderr);
    for expected in [
        "2 messages, ",
        "assistant: Once upon a time, there",
        "no switch for thinking",
        "first token after",
    ] {
        assert!(remarks.contains(expected), "{expected} in {remarks}");
    }
    let known = remarks.split(" known").next().unwrap();
    let known: usize = known.rsplit('(').next().unwrap().parse().unwrap();
    assert!(known >= 25, "{remarks}");
}

#[test]
fn a_chat_outlives_its_context() {
    let lines = format!("{PROMPT}\n").repeat(6);
    let output = run_with_input(
        &["chat", "-n", "120", "--temperature", "0", "--system", "Be brief."],
        &lines,
    );
    stdout(&output);
    let remarks = String::from_utf8_lossy(&output.stderr);
    assert!(
        remarks.contains("the model no longer sees") || remarks.contains("the context is full"),
        "{remarks}"
    );
}

#[test]
fn perplexity_and_choices_know_the_model_from_noise() {
    let folder = tempfile::tempdir().unwrap();
    let story = folder.path().join("story.txt");
    std::fs::write(
        &story,
        "Once upon a time, there was a brave mouse. She lived in a small house.",
    )
    .unwrap();
    let noise = folder.path().join("noise.txt");
    std::fs::write(
        &noise,
        "house in small brave She a lived. mouse a was there, time a upon Once.",
    )
    .unwrap();
    let demo = demo();
    let measure = |file: &Path, more: &[&str]| -> serde_json::Value {
        let args = [&["eval", "perplexity", file.to_str().unwrap(), "--json"], more].concat();
        serde_json::from_str(&stdout(&run(&args))).unwrap()
    };
    let (known, strange) = (measure(&story, &[]), measure(&noise, &[]));
    assert!(known["perplexity"].as_f64().unwrap() * 10.0 < strange["perplexity"].as_f64().unwrap());
    let same = measure(
        &story,
        &[demo.to_str().unwrap(), "--compare", demo.to_str().unwrap()],
    );
    assert_eq!(
        (
            same["mean_kl"].as_f64(),
            same["ratio"].as_f64(),
            same["same_best"].as_f64()
        ),
        (Some(0.0), Some(1.0), Some(1.0))
    );
    assert_eq!(measure(&story, &["--limit", "3"])["tokens"], 3);
    let questions = folder.path().join("questions.jsonl");
    std::fs::write(
        &questions,
        "{\"prompt\": \"Once upon a\", \"choices\": [\" time\", \" Once\"], \"answer\": 0}\n\
         \n{\"ctx\": \"Once upon a time, there was\", \"endings\": [\" upon\", \" a\"], \"label\": 1}\n",
    )
    .unwrap();
    let json = stdout(&run(&["eval", "choices", questions.to_str().unwrap(), "--json"]));
    let object: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&object["questions"], object["accuracy"].as_f64()),
        (&2.into(), Some(1.0))
    );
    std::fs::write(
        &questions,
        "{\"prompt\": \"a\", \"choices\": [\"b\"], \"answer\": 1}\n",
    )
    .unwrap();
    let output = run(&["eval", "choices", questions.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("line 1: the answer is 1"));
}
