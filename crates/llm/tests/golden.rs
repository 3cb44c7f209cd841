//! Token for token: greedy continuations of real bundles equal those an independent interpreter computed from the same
//! packages, and prefill agrees with decode.

// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_coreml_llm::{
    Bundle, Completion, FinishReason, GenerateOptions, LanguageModel, LoadOptions, Message, Prediction,
    Session,
};
use serde_json::Value;

/// Where the two best tokens are closer than this, another rounding may choose the second.
const CLOSE: f64 = 0.002;

fn in_tree(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join(path)
}

/// A bundle outside the tree, `None` with a message where it is absent.
fn shared(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CANDLE_COREML_SHARED").map_or_else(|| in_tree("../shared"), PathBuf::from);
    let path = root.join("models").join(name);
    if !path.join("golden.json").exists() {
        eprintln!("skipped: {} absent", path.display());
        return None;
    }
    Some(path)
}

fn read(golden: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| u32::try_from(v.as_u64().unwrap()).unwrap())
        .collect()
}

/// Compares every prompt of `golden` and reports all that differ.
fn check(bundle: &Path, golden: &Path) {
    let golden = read(golden);
    let bundle = Bundle::open(bundle).unwrap();
    let mut session = bundle.session(&LoadOptions::default()).unwrap();
    let most = usize::try_from(golden["max_new_tokens"].as_u64().unwrap()).unwrap();
    let mut failures = Vec::new();
    for case in golden["prompts"].as_array().unwrap() {
        let prompt = ids(&case["prompt_tokens"]);
        assert_eq!(
            bundle
                .tokenizer()
                .encode(case["input_text"].as_str().unwrap())
                .unwrap(),
            prompt
        );
        session.reset();
        let done = generate(&mut session, &prompt, most);
        if let Err(what) = compare(&bundle, case, &prompt, &done) {
            failures.push(format!("{}: {what}", case["name"]));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn generate(session: &mut Session, prompt: &[u32], max_tokens: usize) -> Completion {
    let options = GenerateOptions {
        max_tokens,
        ..GenerateOptions::default()
    };
    session
        .generate_with(prompt, &options, |_| ControlFlow::Continue(()))
        .unwrap()
}

fn compare(bundle: &Bundle, case: &Value, prompt: &[u32], done: &Completion) -> Result<(), String> {
    let expected = ids(&case["tokens"]);
    let Some(at) =
        (0..expected.len().max(done.tokens.len())).find(|&i| expected.get(i) != done.tokens.get(i))
    else {
        let stopped = bundle.end_tokens().contains(expected.last().unwrap());
        let ended = done.finish_reason == FinishReason::Stop;
        if stopped != ended {
            return Err(format!("ended by {:?}", done.finish_reason));
        }
        let spoken = &expected[..expected.len() - usize::from(stopped)];
        let text = bundle.tokenizer().decode(spoken, false).unwrap();
        return if text == done.text {
            Ok(())
        } else {
            Err(format!("text {:?}, expected {text:?}", done.text))
        };
    };
    let margin = case["margins"][at].as_f64().unwrap_or(f64::INFINITY);
    let (found, wanted) = (done.tokens.get(at), expected.get(at));
    // A tie: the two are the best there are, in either order, as batches and single tokens round in different ways.
    let close = margin < CLOSE && {
        let best = best_two(bundle, &[prompt, &expected[..at]].concat());
        [found, wanted]
            .iter()
            .all(|t| t.is_some_and(|t| best.contains(t)))
    };
    if close {
        eprintln!("{}: token {at} differs within a margin of {margin}", case["name"]);
        return Ok(());
    }
    Err(format!(
        "token {at} is {found:?}, expected {wanted:?} (margin {margin})"
    ))
}

fn best_two(bundle: &Bundle, tokens: &[u32]) -> Vec<u32> {
    let mut model = bundle.load(&LoadOptions::default()).unwrap();
    let logits = logits(model.as_mut(), tokens, true);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order[..2].iter().map(|&t| u32::try_from(t).unwrap()).collect()
}

/// Logits after `tokens`, all but the last prefilled in batches or decoded one by one.
fn logits(model: &mut dyn LanguageModel, tokens: &[u32], batches: bool) -> Vec<f32> {
    let mut cached = 0;
    while cached + 1 < tokens.len() {
        if batches {
            cached = model.prefill(&tokens[..tokens.len() - 1], cached).unwrap();
        } else {
            model.decode(&tokens[..=cached]).unwrap();
            cached += 1;
        }
    }
    match model.decode(tokens).unwrap() {
        Prediction::Logits(logits) => logits.to_vec(),
        Prediction::Token(_) => panic!("the model gives no logits"),
    }
}

#[test]
fn the_demo_model_says_its_golden_texts() {
    check(
        &in_tree("models/tales"),
        &in_tree("crates/llm/testdata/golden/tales-lut6.json"),
    );
}

#[test]
fn the_model_without_palettes_says_its_golden_texts() {
    if let Some(bundle) = shared("tales-fp16") {
        check(&bundle, &bundle.join("golden.json"));
    }
}

#[test]
fn the_model_in_two_chunks_says_its_golden_texts() {
    if let Some(bundle) = shared("tales-fp16-chunk2") {
        check(&bundle, &bundle.join("golden.json"));
    }
}

#[test]
fn a_model_of_another_family_says_its_golden_texts() {
    if let Some(bundle) = shared("smollm2-135m-lut") {
        check(&bundle, &bundle.join("golden.json"));
    }
}

#[test]
fn the_model_in_one_stateful_package_says_its_golden_texts() {
    let Some(path) = shared("tales-stateful") else {
        return;
    };
    // Every step has other shapes and is laid out anew, which takes its time without optimisation.
    let (prompts, most) = if cfg!(debug_assertions) {
        (2, 8)
    } else {
        (usize::MAX, usize::MAX)
    };
    let golden = read(&path.join("golden.json"));
    let bundle = Bundle::open(&path).unwrap();
    assert_eq!(bundle.layout().name(), "stateful-package");
    let mut session = bundle.session(&LoadOptions::default()).unwrap();
    assert_eq!(session.context_tokens(), 512);
    let mut failures = Vec::new();
    for case in golden["prompts"].as_array().unwrap().iter().take(prompts) {
        let (prompt, expected) = (ids(&case["prompt_tokens"]), ids(&case["tokens"]));
        session.reset();
        let found = generate(&mut session, &prompt, most.min(expected.len())).tokens;
        let at = (0..found.len()).find(|&i| found[i] != expected[i]);
        let close = at.is_some_and(|at| case["margins"][at].as_f64().unwrap() < CLOSE);
        if at.is_some() && !close {
            failures.push(format!(
                "{}: token {at:?} of {expected:?} differs: {found:?}",
                case["name"]
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn first_logits_are_those_of_the_golden_run() {
    let golden = read(&in_tree("crates/llm/testdata/golden/tales-lut6.json"));
    let bundle = Bundle::open(in_tree("models/tales")).unwrap();
    let mut model = bundle.load(&LoadOptions::default()).unwrap();
    let mut failures = Vec::new();
    for case in golden["prompts"].as_array().unwrap() {
        let logits = logits(model.as_mut(), &ids(&case["prompt_tokens"]), true);
        for pair in case["first_top10"].as_array().unwrap() {
            let (token, expected) = (pair[0].as_u64().unwrap(), pair[1].as_f64().unwrap());
            let found = f64::from(logits[usize::try_from(token).unwrap()]);
            // Hidden states pass between packages as f16, and the cache holds f16.
            if (found - expected).abs() > 0.02 {
                failures.push(format!(
                    "{}: logit of {token} is {found}, expected {expected}",
                    case["name"]
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn chat_templates_write_the_golden_prompts() {
    let mut bundles = vec![(
        in_tree("models/tales"),
        in_tree("crates/llm/testdata/golden/tales-lut6.json"),
    )];
    bundles.extend(shared("smollm2-135m-lut").map(|bundle| (bundle.clone(), bundle.join("golden.json"))));
    for (bundle, golden) in bundles {
        let bundle = Bundle::open(bundle).unwrap();
        for case in read(&golden)["prompts"].as_array().unwrap() {
            let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
            let messages: Vec<Message> = match (case["messages"].as_array(), case["template"].as_str()) {
                (Some(messages), _) => messages
                    .iter()
                    .map(|m| Message::new(text(m, "role"), text(m, "content")))
                    .collect(),
                (None, Some(_)) => vec![Message::user(text(case, "prompt"))],
                (None, None) => continue,
            };
            let written = bundle.template().unwrap().render(&messages, true).unwrap();
            assert_eq!(written, case["input_text"].as_str().unwrap(), "{}", case["name"]);
        }
    }
}

#[test]
fn logits_are_not_rounded_to_fp16() {
    let bundle = Bundle::open(in_tree("models/tales")).unwrap();
    let mut model = bundle.load(&LoadOptions::default()).unwrap();
    let logits = logits(model.as_mut(), &[1, 494, 275], true);
    let rounded = logits
        .iter()
        .filter(|&&logit| half::f16::from_f32(logit).to_f32() == logit)
        .count();
    assert!(
        rounded < logits.len() / 10,
        "{rounded} of {} logits are fp16 numbers",
        logits.len()
    );
}

#[test]
fn n_tokens_prefilled_and_one_decoded_give_the_logits_of_all_decoded() {
    let golden = read(&in_tree("crates/llm/testdata/golden/tales-lut6.json"));
    let bundle = Bundle::open(in_tree("models/tales")).unwrap();
    let cases = golden["prompts"].as_array().unwrap();
    let long = cases
        .iter()
        .map(|case| ids(&case["prompt_tokens"]))
        .max_by_key(Vec::len)
        .unwrap();
    let filled: Vec<u32> = long.iter().copied().cycle().take(512).collect();
    for tokens in [
        &long[..1],
        &long[..2],
        &long[..64],
        &long[..65],
        &long[..66],
        &long,
        &filled,
    ] {
        let mut model = bundle.load(&LoadOptions::default()).unwrap();
        let batched = logits(model.as_mut(), tokens, true);
        let mut model = bundle.load(&LoadOptions::default()).unwrap();
        let single = logits(model.as_mut(), tokens, false);
        let furthest = batched
            .iter()
            .zip(&single)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // Two steps of f16 at the size of these logits.
        assert!(
            furthest <= 0.032,
            "{} tokens: logits differ by {furthest}",
            tokens.len()
        );
    }
}

#[test]
fn a_second_turn_near_the_end_of_the_context_rewrites_what_it_repeats() {
    let bundle = Bundle::open(in_tree("models/tales")).unwrap();
    let text = "Once upon a time, there was a brave mouse named Dot. He lived in a sunny valley. ";
    let tokens: Vec<u32> = bundle
        .tokenizer()
        .encode(text)
        .unwrap()
        .into_iter()
        .cycle()
        .take(505)
        .collect();
    let mut session = bundle.session(&LoadOptions::default()).unwrap();
    generate(&mut session, &tokens[..480], 1);
    let second = generate(&mut session, &tokens, 16);
    assert_eq!((second.reused_tokens, second.tokens.len()), (480, 8));
    assert_eq!(second.finish_reason, FinishReason::Context);
    session.reset();
    assert_eq!(generate(&mut session, &tokens, 16).tokens, second.tokens);
}
