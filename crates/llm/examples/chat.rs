//! A conversation of three turns: each computes its new tokens only, and a context that is full loses its oldest turns.
//!
//! `cargo run --release --example chat -p candle-coreml-llm -- [BUNDLE]`

use std::io::Write;
use std::ops::ControlFlow;

use candle_coreml_llm::{Bundle, Chat, ContextFull, GenerateOptions, LoadOptions, Message, Shift};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let path = std::env::args().nth(1).unwrap_or("models/tales".to_string());
    let mut chat = Chat::open(&Bundle::open(path)?, &LoadOptions::default())?;
    chat.push(Message::system("You tell short stories."));
    let options = GenerateOptions {
        max_tokens: 60,
        context_full: ContextFull::Shift(Shift::default()),
        ..GenerateOptions::default()
    };
    for said in [
        "Tell me a story about a brave mouse.",
        "And then?",
        "Tell me one about a fox.",
    ] {
        println!("> {said}");
        let answer = chat.say(said, &options, |piece| {
            print!("{}", piece.text);
            match std::io::stdout().flush() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        println!(
            "\n[{} prompt tokens, {} of them known, first token after {:.0} ms]\n",
            answer.prompt_tokens, answer.reused_tokens, answer.timings.prefill_ms
        );
    }
    Ok(())
}
