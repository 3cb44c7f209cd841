//! A loop of one's own below `Session`: the model's logits, a rule that no option has, and the crate's sampler for the rest.
//!
//! `cargo run --release --example custom_sampling -p candle-coreml-llm -- [BUNDLE]`
//!
//! The rule here: no token comes a second time within eight.

use candle_coreml_llm::{Bundle, History, Prediction, Sampler, Sampling, TextStream};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let path = std::env::args().nth(1).unwrap_or("models/tales".to_string());
    let bundle = Bundle::open(path)?;
    let mut model = bundle.load(&Default::default())?;
    let mut sampler = Sampler::new(Sampling {
        temperature: 0.8,
        top_p: 0.95,
        seed: 7,
        ..Sampling::default()
    })?;
    let mut tokens = bundle.tokenizer().encode("Once upon a time, there was")?;
    let start = tokens.len();
    let mut done = 0;
    while done + 1 < tokens.len() {
        done = model.prefill(&tokens[..tokens.len() - 1], done)?;
    }
    let mut stream = TextStream::default();
    let mut text = String::new();
    while tokens.len() < model.context_tokens().min(start + 60) {
        let Prediction::Logits(logits) = model.decode(&tokens)? else {
            return Err("this model chooses its tokens itself".into());
        };
        let recent = &tokens[tokens.len().saturating_sub(8)..];
        let allowed = (0..).take(logits.len()).filter(|id| !recent.contains(id));
        let chosen = sampler.choose_among(logits, History::new(&tokens, start), allowed);
        let token = chosen.ok_or("all logits are NaN")?;
        if bundle.end_tokens().contains(&token) {
            break;
        }
        tokens.push(token);
        text += &stream.push(bundle.tokenizer(), token)?;
    }
    text += &stream.flush(bundle.tokenizer())?;
    println!("Once upon a time, there was{text}");
    Ok(())
}
