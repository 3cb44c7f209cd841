//! A text step by step: what a server does with several conversations, one step of each in turn.
//!
//! `cargo run --release --example streaming -p candle-coreml-llm -- [BUNDLE]`

use candle_coreml_llm::{Bundle, GenerateOptions, LoadOptions, Message, Step, TemplateOptions};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let path = std::env::args().nth(1).unwrap_or("models/tales".to_string());
    let bundle = Bundle::open(path)?;
    // The second conversation has the first one's weights and a memory of its own.
    let mut mouse = bundle.session(&LoadOptions::default())?;
    let mut fox = mouse.fork()?;
    let mut texts = Vec::new();
    for (session, animal) in [(&mut mouse, "mouse"), (&mut fox, "fox")] {
        let said = Message::user(format!("Tell me a story about a brave {animal}."));
        let prompt = bundle.template()?.prompt(&[said], &TemplateOptions::default())?;
        let options = GenerateOptions {
            max_tokens: 40,
            format: prompt.format,
            ..GenerateOptions::default()
        };
        let ids = bundle.tokenizer().encode(&prompt.text)?;
        texts.push((animal, session.generate(&ids, &options)?));
    }
    let mut running = texts.len();
    while running > 0 {
        running = 0;
        for (animal, text) in &mut texts {
            match text.step()? {
                Step::Prefilled { done, total } => println!("{animal}: {done} of {total} prompt tokens"),
                Step::Token(piece) => println!("{animal}: {:?}", piece.text),
                Step::Finished(_) => continue,
                other => println!("{animal}: {other:?}"),
            }
            running += 1;
        }
    }
    for (animal, text) in texts {
        println!("\n{animal}: {}", text.completion().text);
    }
    Ok(())
}
