//! The language-model engine, unchanged, on the Apple engine: the demo model of the tree says what it says on the portable one.

mod common;

use candle_coreml::EngineKind;
use candle_coreml_apple_fake::{Behaviour, live};
use candle_coreml_llm::{Bundle, GenerateOptions, LoadOptions, Session};
use common::{Folder, own_caches, start};
use std::ops::ControlFlow;
use std::path::Path;

const TOKENS: usize = 48;

fn session(bundle: &Bundle, engine: EngineKind) -> Session {
    let options = LoadOptions {
        engine,
        ..LoadOptions::default()
    };
    bundle.session(&options).unwrap()
}

fn spoken(session: &mut Session, prompt: &[u32]) -> Vec<u32> {
    let options = GenerateOptions {
        max_tokens: TOKENS,
        ..GenerateOptions::default()
    };
    session.reset();
    let done = session.generate_with(prompt, &options, |_| ControlFlow::Continue(()));
    done.unwrap().tokens
}

#[test]
fn the_demo_model_says_the_same_through_the_language_model_engine() {
    let _one = start();
    let home = Folder::new("home-llm");
    own_caches(&home);
    let before = live();
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../models/tales"));
    let bundle = Bundle::open(folder).unwrap();
    {
        let mut apple = session(&bundle, EngineKind::Apple);
        let mut portable = session(&bundle, EngineKind::Portable);
        let long = "Once upon a time there was a little mouse who lived in a big house. ".repeat(6);
        let rows = [
            ("Tell me a story about a brave mouse.", None),
            ("The dog and the cat", Some(Behaviour::PaddedOutputs)),
            // More than one batch of prefill.
            (long.as_str(), Some(Behaviour::RebasedBuffers)),
            ("A girl named Lily", Some(Behaviour::OtherThread)),
        ];
        for (text, behaviour) in rows {
            let prompt = bundle.tokenizer().encode(text).unwrap();
            let _on = behaviour.map(Behaviour::on);
            let found = spoken(&mut apple, &prompt);
            assert_eq!(found, spoken(&mut portable, &prompt), "{text:?} {behaviour:?}");
            println!("{} tokens after {} are the same", found.len(), prompt.len());
        }
    }
    assert_eq!(live(), before, "nothing is left of the model");
}
