//! SmolLM2-135M from a GGUF file, where there is one: `cargo xtask smollm2` gets it and runs this.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use std::path::{Path, PathBuf};

use candle_coreml_convert::{Compression, LanguageModelOptions, convert_language_model};
use candle_coreml_llm::{Bundle, GenerateOptions, LoadOptions};

/// Names the file.
const VARIABLE: &str = "CANDLE_COREML_SMOLLM2_GGUF";

const COMPLETIONS: [(&str, &str); 2] = [
    ("The quick brown fox jumps over the lazy", " dog"),
    ("The capital of France is", " Paris"),
];

fn completions(from: &Path, layers: Compression, head: Compression) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let options = LanguageModelOptions {
        context: 128,
        layers,
        head,
        ..LanguageModelOptions::default()
    };
    convert_language_model(from, folder.path(), &options, &mut |_| {}).unwrap();
    let bundle = Bundle::open(folder.path()).unwrap();
    let mut session = bundle.session(&LoadOptions::default()).unwrap();
    let one = GenerateOptions {
        max_tokens: 1,
        ..GenerateOptions::default()
    };
    let complete = |(text, _): &(&str, &str)| {
        session.reset();
        let prompt = bundle.tokenizer().encode(text).unwrap();
        let done = session.generate_with(&prompt, &one, |_| std::ops::ControlFlow::Continue(()));
        done.unwrap().text
    };
    COMPLETIONS.iter().map(complete).collect()
}

#[test]
fn smollm2_from_gguf_completes_sentences_as_it_is_and_in_six_bits() {
    let Some(file) = std::env::var_os(VARIABLE).map(PathBuf::from) else {
        eprintln!("skipped: {VARIABLE} absent");
        return;
    };
    let expected: Vec<&str> = COMPLETIONS.iter().map(|(_, next)| *next).collect();
    let six = Compression::palette(6, Some(8));
    for (layers, head) in [(Compression::None, Compression::None), (six, six)] {
        assert_eq!(
            completions(&file, layers, head),
            expected,
            "layers {layers}, head {head}"
        );
    }
}
