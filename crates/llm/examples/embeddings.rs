//! Finds the text that is nearest to a question:
//! `cargo run -p candle-coreml-llm --example embeddings -- ENCODER "question" "text" "text" ...`
//!
//! An encoder is a folder with a package and its tokenizer, as `candle-coreml convert` makes of all-MiniLM-L6-v2.

use candle_coreml_llm::{EmbeddingModel, EmbeddingOptions, cosine_similarity};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, texts @ ..] = arguments.as_slice() else {
        return Err("usage: embeddings ENCODER QUESTION TEXT...".into());
    };
    let model = EmbeddingModel::open(folder, &EmbeddingOptions::default())?;

    // All at once: texts of similar length are computed together where the package takes several.
    let found = model.embed(texts)?;
    let [question, rest @ ..] = found.as_slice() else {
        return Err("no question".into());
    };
    println!(
        "{} numbers a text, {} tokens at most",
        question.vector.len(),
        model.max_tokens()
    );

    let mut ranked: Vec<(f32, &String)> = rest
        .iter()
        .zip(texts.iter().skip(1))
        .map(|(text, words)| (cosine_similarity(&question.vector, &text.vector), words))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (similarity, words) in ranked {
        println!("{similarity:7.4}  {words}");
    }
    Ok(())
}
