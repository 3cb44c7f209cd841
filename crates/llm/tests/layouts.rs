//! One tiny model packaged in every layout: each says, token for token, what a float64 forward pass says, however its prompt
//! is split, copied, saved or compiled. `testdata/make_bundles.py` makes the bundles.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_coreml_llm::{
    Bundle, GenerateOptions, LanguageModel, LoadOptions, Prediction, Session, WiredCall, Wiring,
};
use serde::Deserialize;

/// Bundles with what holds for them.
struct Case {
    folder: &'static str,
    layout: &'static str,
    /// Which of the golden sets it says.
    window: bool,
    context: usize,
    batch: Option<usize>,
    logits: bool,
}

const fn case(folder: &'static str, layout: &'static str, batch: Option<usize>) -> Case {
    Case {
        folder,
        layout,
        window: false,
        context: 64,
        batch,
        logits: true,
    }
}

const CASES: [Case; 13] = [
    case("chunks", "anemll", Some(8)),
    Case {
        logits: false,
        ..case("argmax", "anemll", Some(8))
    },
    case("one-by-one", "anemll", Some(1)),
    Case {
        window: true,
        ..case("rotate", "anemll", Some(8))
    },
    Case {
        window: true,
        ..case("rotate-files", "anemll", Some(8))
    },
    case("monolith", "anemll-monolithic", Some(8)),
    Case {
        window: true,
        logits: false,
        ..case("monolith-rotate", "anemll-monolithic", Some(1))
    },
    case("config-unified", "model-config", Some(1)),
    case("config-split", "model-config", Some(8)),
    case("stateful", "stateful-package", Some(64)),
    case("stateful-fixed", "stateful-package", Some(1)),
    Case {
        context: 32,
        ..case("stateless", "stateless-package", None)
    },
    case("stateless-sizes", "stateless-package", None),
];

#[derive(Deserialize)]
struct Golden {
    full: Vec<Said>,
    window: Vec<Said>,
}

#[derive(Deserialize)]
struct Said {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    least_margin: f64,
}

fn bundles() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/bundles")
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(bundles().join("golden.json")).unwrap()).unwrap()
}

fn open(case: &Case) -> Bundle {
    Bundle::open(bundles().join(case.folder)).unwrap()
}

fn load(bundle: &Bundle) -> Box<dyn LanguageModel> {
    bundle.load(&LoadOptions::default()).unwrap()
}

/// What a case says after `said.prompt`: its context may be shorter than the golden run's.
fn expected<'a>(case: &Case, said: &'a Said) -> &'a [u32] {
    let room = (case.context + 1).saturating_sub(said.prompt.len());
    &said.tokens[..room.min(said.tokens.len())]
}

fn told<'a>(case: &Case, golden: &'a Golden) -> impl Iterator<Item = &'a Said> {
    let all = if case.window { &golden.window } else { &golden.full };
    let context = case.context;
    all.iter().filter(move |said| said.prompt.len() <= context)
}

fn generate(session: &mut Session, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    let options = GenerateOptions {
        max_tokens,
        ignore_end: true,
        ..GenerateOptions::default()
    };
    session
        .generate_with(prompt, &options, |_| ControlFlow::Continue(()))
        .unwrap()
        .tokens
}

/// The best token after `tokens`, and how far the logits are from those of `other`, where there are logits.
fn best(prediction: Prediction<'_>) -> (u32, Option<Vec<f32>>) {
    match prediction {
        Prediction::Token(token) => (token, None),
        Prediction::Logits(logits) => {
            let best = (0..logits.len()).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
            (u32::try_from(best).unwrap(), Some(logits.to_vec()))
        }
    }
}

fn report(failures: &[String]) {
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_layout_says_what_the_reference_says() {
    let golden = golden();
    let mut failures = Vec::new();
    for case in &CASES {
        let bundle = open(case);
        let mut session = bundle.session(&LoadOptions::default()).unwrap();
        for said in told(case, &golden) {
            assert!(said.least_margin >= 0.02);
            session.reset();
            let found = generate(&mut session, &said.prompt, 1000);
            let wanted = expected(case, said);
            if found != wanted {
                let at = (0..wanted.len()).find(|&i| found.get(i) != wanted.get(i));
                failures.push(format!(
                    "{}, prompt of {}: token {at:?} of {} differs ({} came)",
                    case.folder,
                    said.prompt.len(),
                    wanted.len(),
                    found.len()
                ));
            }
        }
    }
    report(&failures);
}

#[test]
fn prompts_split_anywhere_give_what_single_tokens_give() {
    let golden = golden();
    let mut failures = Vec::new();
    for case in &CASES {
        let bundle = open(case);
        let whole = &told(case, &golden)
            .max_by_key(|said| said.prompt.len())
            .unwrap()
            .prompt;
        let whole = &whole[..whole.len().min(case.context)];
        let mut single = load(&bundle);
        let singles: Vec<_> = (1..=whole.len())
            .map(|n| best(single.decode(&whole[..n]).unwrap()))
            .collect();
        for (first, end) in [
            (1, 2),
            (3, 12),
            (7, 30),
            (8, 17),
            (15, 24),
            (16, 25),
            (17, 32),
            (20, 40),
            (5, 63),
            (63, 64),
        ] {
            if end > whole.len() {
                continue;
            }
            let mut model = load(&bundle);
            // One stretch token by token, the rest in batches, then the last token.
            (1..=first.min(end - 1)).for_each(|n| drop(best(model.decode(&whole[..n]).unwrap())));
            let mut cached = first.min(end - 1);
            while cached < end - 1 {
                let now = model.prefill(&whole[..end - 1], cached).unwrap();
                assert!(now > cached && now < end, "{}: {now} after {cached}", case.folder);
                cached = now;
            }
            let (token, logits) = best(model.decode(&whole[..end]).unwrap());
            let (wanted, right) = &singles[end - 1];
            let apart = logits
                .iter()
                .zip(right)
                .map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max));
            let apart = apart.fold(0f32, f32::max);
            // Batches and single tokens sum in another order, in float32.
            if apart > 2e-3 || (logits.is_none() && token != *wanted) {
                failures.push(format!(
                    "{}: {first} single, then batches to {end}: {token} and not {wanted}, logits {apart} apart",
                    case.folder
                ));
            }
        }
    }
    report(&failures);
}

#[test]
fn batches_past_the_window_are_used_where_they_are_right() {
    // The first batch past the window is computed both ways; the next one shows what was found.
    for (folder, after) in [("rotate", 32), ("rotate-files", 25)] {
        let case = CASES.iter().find(|case| case.folder == folder).unwrap();
        let golden = golden();
        let prompt = &told(case, &golden)
            .max_by_key(|said| said.prompt.len())
            .unwrap()
            .prompt;
        let mut model = load(&open(case));
        for (cached, now) in [(0, 8), (8, 16), (16, 24), (24, after)] {
            assert_eq!(model.prefill(prompt, cached).unwrap(), now, "{folder}");
        }
        let mut fork = model.fork().unwrap();
        assert_eq!(
            fork.prefill(prompt, after).unwrap(),
            after + after - 24,
            "{folder}"
        );
    }
}

#[test]
fn going_back_computes_what_a_new_conversation_computes() {
    let golden = golden();
    let mut failures = Vec::new();
    for case in &CASES {
        let bundle = open(case);
        let mut session = bundle.session(&LoadOptions::default()).unwrap();
        let all: Vec<&Said> = told(case, &golden).collect();
        let long = all.iter().max_by_key(|said| said.prompt.len()).unwrap();
        generate(&mut session, &long.prompt, 1);
        // The second prompt begins as the first and leaves it after a while, before and past the window.
        for keep in [4, 12, 20, 29] {
            let other: Vec<u32> = long.prompt[..keep].iter().copied().chain([5, 9, 3]).collect();
            let came = generate(&mut session, &other, 3);
            let mut fresh = bundle.session(&LoadOptions::default()).unwrap();
            let wanted = generate(&mut fresh, &other, 3);
            if came != wanted {
                failures.push(format!(
                    "{}: after {keep} kept tokens {came:?}, not {wanted:?}",
                    case.folder
                ));
            }
            generate(&mut session, &long.prompt, 1);
        }
        if generate(&mut session, &long.prompt, 1)[0] != long.tokens[0] {
            failures.push(format!(
                "{}: the same prompt again says something else",
                case.folder
            ));
        }
    }
    report(&failures);
}

#[test]
fn forks_go_their_own_way() {
    let golden = golden();
    let mut failures = Vec::new();
    for case in &CASES {
        let bundle = open(case);
        for said in told(case, &golden).filter(|said| (9..=30).contains(&said.prompt.len())) {
            let wanted = expected(case, said);
            let half = wanted.len() / 2;
            let mut session = bundle.session(&LoadOptions::default()).unwrap();
            generate(&mut session, &said.prompt, half);
            let mut fork = session.fork().unwrap();
            let aside: Vec<u32> = session.tokens().iter().copied().chain([7]).collect();
            generate(&mut session, &aside, 2);
            let prompt = [&said.prompt[..], &wanted[..half]].concat();
            let rest = generate(&mut fork, &prompt, wanted.len() - half);
            if rest != wanted[half..] {
                failures.push(format!("{}: a fork of {} tokens", case.folder, said.prompt.len()));
            }
        }
    }
    report(&failures);
}

#[test]
fn saved_conversations_go_on_in_another_session() {
    let golden = golden();
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for case in &CASES {
        let bundle = open(case);
        let name = bundle.fingerprint().unwrap();
        let path = folder.path().join(case.folder);
        let said = told(case, &golden).find(|said| said.prompt.len() == 17).unwrap();
        let wanted = expected(case, said);
        let half = wanted.len() / 2;
        let mut session = bundle.session(&LoadOptions::default()).unwrap();
        generate(&mut session, &said.prompt, half);
        session.save(&path, &name).unwrap();
        let mut other = bundle.session(&LoadOptions::default()).unwrap();
        generate(&mut other, &[2, 3, 4], 20);
        other.load(&path, &name).unwrap();
        let prompt = [&said.prompt[..], &wanted[..half]].concat();
        assert_eq!(other.tokens(), prompt, "{}", case.folder);
        if generate(&mut other, &prompt, wanted.len() - half) != wanted[half..] {
            failures.push(case.folder.to_owned());
        }
    }
    report(&failures);
}

#[test]
fn compiled_packages_say_the_same() {
    let golden = golden();
    let mut failures = Vec::new();
    for case in &CASES {
        let from = bundles().join(case.folder);
        let to = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            match name.strip_suffix(".mlpackage") {
                Some(stem) => candle_coreml_mil::Model::open(&path)
                    .unwrap()
                    .write_compiled(to.path().join(format!("{stem}.mlmodelc")))
                    .unwrap(),
                None => drop(std::fs::copy(&path, to.path().join(name)).unwrap()),
            }
        }
        let bundle = Bundle::open(to.path()).unwrap();
        assert_eq!(bundle.layout().name(), case.layout);
        assert!(
            bundle
                .layout()
                .packages()
                .iter()
                .all(|file| file.ends_with(".mlmodelc"))
        );
        let mut session = bundle.session(&LoadOptions::default()).unwrap();
        let said = told(case, &golden).find(|said| said.prompt.len() == 17).unwrap();
        if generate(&mut session, &said.prompt, 1000) != expected(case, said) {
            failures.push(case.folder.to_owned());
        }
    }
    report(&failures);
}

#[test]
fn the_wiring_says_what_loading_finds() {
    for case in &CASES {
        let bundle = open(case);
        let wiring = bundle.wiring().unwrap();
        let model = load(&bundle);
        let found = (
            wiring.layout.as_str(),
            wiring.context_tokens,
            wiring.vocabulary,
            wiring.gives_logits,
        );
        assert_eq!(
            found,
            (case.layout, case.context, 96, case.logits),
            "{}",
            case.folder
        );
        assert_eq!(
            (model.context_tokens(), model.vocabulary()),
            (case.context, 96),
            "{}",
            case.folder
        );
        assert_eq!(
            (model.gives_logits(), wiring.batch_tokens),
            (case.logits, case.batch),
            "{}",
            case.folder
        );
        assert_eq!(
            wiring.no_batches_because.is_some(),
            case.batch.is_none_or(|rows| rows == 1),
            "{}",
            case.folder
        );
        assert_eq!(
            wiring.sliding_window,
            case.window.then_some(16),
            "{}",
            case.folder
        );
        let wired: Vec<&str> = wiring.calls.iter().map(|call| call.file.as_str()).collect();
        for file in bundle.layout().packages() {
            let unused = case.folder == "config-unified" || case.batch == Some(1);
            assert!(
                unused || wired.contains(&file),
                "{}: {file} is in no call",
                case.folder
            );
        }
    }
}

fn call<'a>(wiring: &'a Wiring, when: &str, file: &str) -> &'a WiredCall {
    wiring
        .calls
        .iter()
        .find(|call| call.when == when && call.file.starts_with(file))
        .unwrap()
}

fn flow(call: &WiredCall, port: &str) -> String {
    let ports = call.inputs.iter().chain(&call.outputs);
    ports.filter(|p| p.name == port).map(|p| p.flow.clone()).collect()
}

#[test]
fn the_wiring_shows_which_input_feeds_which() {
    let wiring = open(&CASES[0]).wiring().unwrap();
    let second = call(&wiring, "prefill", "tiny_FFN_PF_chunk_02of02");
    assert_eq!(second.function, "prefill");
    assert_eq!(
        flow(second, "hidden_states"),
        "hidden states of tiny_FFN_PF_chunk_01of02.mlpackage"
    );
    assert_eq!(flow(second, "output_hidden_states"), "not used");
    let head = call(&wiring, "decode", "tiny_lm_head");
    assert_eq!(flow(head, "logits3"), "logits, part 3 of 4");
    assert_eq!(wiring.states.len(), 1);

    let rotated = open(&CASES[4]).wiring().unwrap();
    let far = call(
        &rotated,
        "prefill past the window",
        "tiny_FFN_PF_chunk_01of01_rot",
    );
    assert_eq!((far.function.as_str(), far.state), ("prefill_rotate", Some(0)));
    let near = call(&rotated, "decode past the window", "tiny_FFN_PF_chunk_01of01");
    assert_eq!(near.function, "infer_rotate");
    let buffers: Vec<_> = rotated.states[0]
        .buffers
        .iter()
        .map(|b| (b.name.as_str(), b.shape[2]))
        .collect();
    assert_eq!(buffers.len(), 2);
    assert!(buffers.contains(&("kv_cache_local", 16)) && buffers.contains(&("kv_cache_global", 64)));

    let unvouched = open(&CASES[2]).wiring().unwrap();
    let why = unvouched.no_batches_because.unwrap();
    assert!(
        why.contains("neither `update_mask_prefill` nor `prefill_dynamic_slice`"),
        "{why}"
    );
    assert_eq!(unvouched.states.len(), 2);
}

/// Copies a bundle and changes it.
fn changed(folder: &str, change: impl Fn(&Path)) -> Result<Wiring, String> {
    let to = tempfile::tempdir().unwrap();
    copy(&bundles().join(folder), to.path());
    change(to.path());
    let bundle = Bundle::open(to.path()).map_err(|e| e.to_string())?;
    let loaded = bundle
        .load(&LoadOptions::default())
        .map(|_| ())
        .map_err(|e| e.to_string());
    let wired = bundle.wiring().map_err(|e| e.to_string());
    assert_eq!(
        loaded.is_ok(),
        wired.is_ok(),
        "{loaded:?}, {:?}",
        wired.as_ref().err()
    );
    wired
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn swap(from: &str, to: &Path, name: &str) {
    let target = to.join(name);
    std::fs::remove_dir_all(&target).unwrap();
    copy(&bundles().join(from), &target);
}

type Change = fn(&Path);

#[test]
fn bundles_that_do_not_fit_say_where_and_what() {
    let cases: &[(&str, Change, &str)] = &[
        (
            "chunks",
            |to| {
                swap(
                    "chunks/tiny_lm_head.mlpackage",
                    to,
                    "tiny_FFN_PF_chunk_01of02.mlpackage",
                )
            },
            "tiny_FFN_PF_chunk_01of02.mlpackage, function `main`: an input `causal_mask` is needed",
        ),
        (
            "chunks",
            |to| {
                swap(
                    "chunks/tiny_FFN_PF_chunk_01of02.mlpackage",
                    to,
                    "tiny_embeddings.mlpackage",
                )
            },
            "one input is needed, found `hidden_states`, `position_ids`",
        ),
        (
            "chunks",
            |to| std::fs::remove_dir_all(to.join("tiny_FFN_PF_chunk_02of02.mlpackage")).unwrap(),
            "the chunk 2 of 2 is missing; looked for `tiny_FFN_PF_chunk_02of02`",
        ),
        (
            "argmax",
            |to| {
                swap(
                    "one-by-one/tiny_FFN_PF_chunk_01of02.mlpackage",
                    to,
                    "tiny_FFN_PF_lut6_chunk_01of01.mlpackage",
                )
            },
            "",
        ),
        (
            "config-split",
            |to| {
                swap(
                    "one-by-one/tiny_FFN_PF_chunk_01of02.mlpackage",
                    to,
                    "ffn_prefill.mlpackage",
                )
            },
            "ffn_prefill.mlpackage, function `prefill`: its states are `model_kv_cache_0` [2, 2, 64, 8]",
        ),
        (
            "monolith",
            |to| {
                swap(
                    "chunks/tiny_FFN_PF_chunk_01of02.mlpackage",
                    to,
                    "tiny_monolithic_full_lut6.mlpackage",
                )
            },
            "takes hidden states, and there are no embeddings; needed: token ids",
        ),
        (
            "stateless",
            |to| swap("chunks/tiny_lm_head.mlpackage", to, "model.mlpackage"),
            "an input of token ids [1, tokens] is needed, found `hidden_states`",
        ),
        (
            "stateless",
            |to| swap("chunks/tiny_embeddings.mlpackage", to, "model.mlpackage"),
            "",
        ),
        (
            "stateful",
            |to| {
                std::fs::write(
                    to.join("StatefulTiny.mlpackage/Data/com.apple.CoreML/model.mlmodel"),
                    [7; 90],
                )
                .unwrap()
            },
            "StatefulTiny.mlpackage",
        ),
        (
            "rotate",
            |to| std::fs::remove_dir_all(to.join("tiny_lm_head.mlpackage/Data")).unwrap(),
            "tiny_lm_head.mlpackage",
        ),
    ];
    let mut failures = Vec::new();
    for (folder, change, expected) in cases {
        match changed(folder, change) {
            Err(error) if error.contains(expected) => {}
            // Where nothing is expected, the bundle is odd and whole.
            Ok(_) if expected.is_empty() => {}
            other => failures.push(format!("{folder}, {expected:?}: {:?}", other.map(|_| "no error"))),
        }
    }
    report(&failures);
}

#[test]
fn windows_and_the_caches_that_roll_fit_each_other() {
    let wiring = changed("rotate", |to| {
        swap(
            "rotate-files/tiny_FFN_PF_chunk_01of01_rot.mlpackage",
            to,
            "tiny_FFN_PF_chunk_01of01.mlpackage",
        );
    });
    let error = wiring.unwrap_err();
    assert!(
        error.contains("the package has no such function; it has"),
        "{error}"
    );
    let wide = changed("rotate", |to| {
        let meta = std::fs::read_to_string(to.join("meta.yaml")).unwrap();
        std::fs::write(
            to.join("meta.yaml"),
            meta.replace("sliding_window: 16", "sliding_window: 32"),
        )
        .unwrap();
    });
    let error = wide.unwrap_err();
    assert!(
        error.contains("the window is 32 tokens, a cache that rolls has 16 slots"),
        "{error}"
    );
    let unsaid = changed("rotate", |to| {
        let meta = std::fs::read_to_string(to.join("meta.yaml")).unwrap();
        std::fs::write(
            to.join("meta.yaml"),
            meta.replace("sliding_window: 16", "unsaid: 1"),
        )
        .unwrap();
    });
    assert_eq!(unsaid.unwrap().sliding_window, Some(16));
}

#[test]
fn a_window_without_rotation_functions_bounds_the_context() {
    let wiring = changed("chunks", |to| {
        let meta = std::fs::read_to_string(to.join("meta.yaml")).unwrap();
        std::fs::write(to.join("meta.yaml"), format!("{meta}    sliding_window: 16\n")).unwrap();
    });
    let wiring = wiring.unwrap();
    assert_eq!(wiring.context_tokens, 16);
    assert_eq!(
        wiring.context_bound_by,
        "sliding_window, without rotation functions"
    );
    let single = changed("chunks", |to| {
        let meta = std::fs::read_to_string(to.join("meta.yaml")).unwrap();
        let more = "    sliding_window: 16\n    single_cache: true\n";
        std::fs::write(to.join("meta.yaml"), format!("{meta}{more}")).unwrap();
    });
    assert_eq!(single.unwrap().context_tokens, 64);
}
