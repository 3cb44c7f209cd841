//! A conversation written to a file with what was computed of it, and taken up again: the second program computes nothing twice.
//!
//! `cargo run --release --example save_restore -p candle-coreml-llm -- [BUNDLE]`

use std::ops::ControlFlow;

use candle_coreml_llm::{Bundle, Chat, GenerateOptions, LoadOptions};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let path = std::env::args().nth(1).unwrap_or("models/tales".to_string());
    let bundle = Bundle::open(path)?;
    // A file belongs to the packages it was computed with, whatever their folder is called.
    let model = bundle.fingerprint()?;
    let file = std::env::temp_dir().join(format!("{}.session", std::process::id()));
    let options = GenerateOptions {
        max_tokens: 30,
        ..GenerateOptions::default()
    };

    let mut first = Chat::open(&bundle, &LoadOptions::default())?;
    let answer = first.say("Tell me a story about a brave mouse.", &options, |_| {
        ControlFlow::Continue(())
    })?;
    println!("{}", answer.text);
    first.save(&file, &model)?;

    let mut second = Chat::open(&bundle, &LoadOptions::default())?;
    second.load(&file, &model)?;
    std::fs::remove_file(&file)?;
    let answer = second.say("And then?", &options, |_| ControlFlow::Continue(()))?;
    println!("{}", answer.text);
    println!(
        "[{} prompt tokens, {} of them from the file]",
        answer.prompt_tokens, answer.reused_tokens
    );
    assert!(answer.reused_tokens > 40);
    Ok(())
}
