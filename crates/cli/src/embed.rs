//! `embed`: texts to vectors, printed, saved or compared.

use std::io::{Read, Write};
use std::path::Path;

use candle_core::{Device, Tensor};
use candle_coreml_llm::{Embedding, EmbeddingModel, EmbeddingOptions, cosine_similarity};
use serde_json::json;

use crate::args::EmbedArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::npy;
use crate::terminal::{self, FAINT, styled};

/// Columns of a table of similarities that still fit a terminal.
const MOST_COLUMNS: usize = 12;

pub fn run(args: &EmbedArgs) -> Outcome {
    let texts = texts(args)?;
    let spinner = terminal::spinner("opening the encoder");
    let opened = EmbeddingModel::open(&args.model, &options(args));
    spinner.finish_and_clear();
    let model = opened?;
    let mut found = match &args.prompt {
        Some(kind) => model.embed_with_prompt(kind, &texts)?,
        None => model.embed(&texts)?,
    };
    if let Some(width) = args.dimensions {
        shorten(&mut found, width)?;
    }
    for (i, embedding) in found.iter().enumerate().filter(|(_, e)| e.tokens_cut > 0) {
        terminal::note(&format!(
            "text {i} is longer than {} tokens: its last {} were left out",
            model.max_tokens(),
            embedding.tokens_cut
        ));
    }
    if let Some(file) = &args.output {
        save(file, &found)?;
    }
    match (args.json, args.similarity) {
        (true, _) => print_json(args, &model, &texts, &found)?,
        (false, true) => print_similarity(&texts, &found)?,
        (false, false) if args.output.is_none() => print_vectors(&found)?,
        _ => {}
    }
    Ok(DONE)
}

fn options(args: &EmbedArgs) -> EmbeddingOptions {
    EmbeddingOptions {
        load: args.engine.load_options(),
        pooling: args.pooling,
        normalize: args.normalize,
        max_tokens: args.max_tokens,
        output: args.output_name.clone(),
    }
}

/// The texts of the command line, then those of the file, one a line.
fn texts(args: &EmbedArgs) -> Result<Vec<String>, Failure> {
    let mut texts = args.text.clone();
    if let Some(file) = &args.file {
        let lines = match file.as_os_str() == "-" {
            true => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                text
            }
            false => {
                std::fs::read_to_string(file).map_err(|e| Failure::new(format!("{}: {e}", file.display())))?
            }
        };
        texts.extend(lines.lines().map(str::to_owned));
    }
    if texts.is_empty() {
        return Err(Failure::usage(
            "no texts: give --text, or --file with one text a line",
        ));
    }
    Ok(texts)
}

fn shorten(found: &mut [Embedding], width: usize) -> Result<(), Failure> {
    let widest = found.first().map_or(0, |e| e.vector.len());
    if width == 0 || width > widest {
        return Err(Failure::usage(format!(
            "--dimensions is {width}; vectors of this model have {widest}"
        )));
    }
    found.iter_mut().for_each(|embedding| embedding.shorten(width));
    Ok(())
}

fn save(file: &Path, found: &[Embedding]) -> Result<(), Failure> {
    let width = found.first().map_or(0, |e| e.vector.len());
    let values: Vec<f32> = found.iter().flat_map(|e| e.vector.iter().copied()).collect();
    let tensor = Tensor::from_vec(values, (found.len(), width), &Device::Cpu)?;
    npy::write_npy(file, &tensor)
}

fn print_vectors(found: &[Embedding]) -> Result<(), Failure> {
    let mut out = terminal::out();
    for embedding in found {
        writeln!(out, "{}", serde_json::to_string(&embedding.vector)?)?;
    }
    Ok(())
}

fn similarities(found: &[Embedding]) -> Vec<Vec<f32>> {
    let row = |a: &Embedding| {
        let row = found.iter().map(|b| cosine_similarity(&a.vector, &b.vector));
        row.collect()
    };
    found.iter().map(row).collect()
}

fn print_json(
    args: &EmbedArgs,
    model: &EmbeddingModel,
    texts: &[String],
    found: &[Embedding],
) -> Result<(), Failure> {
    let rows: Vec<_> = texts
        .iter()
        .zip(found)
        .map(|(text, e)| json!({ "text": text, "tokens": e.tokens, "tokens_cut": e.tokens_cut, "vector": e.vector }))
        .collect();
    let mut facts = json!({
        "model": model.name(), "max_tokens": model.max_tokens(),
        "pooling": model.pooling().map_or("in the package", |p| p.name()), "normalized": model.normalizes(),
        "texts": rows,
    });
    if let (true, Some(facts)) = (args.similarity, facts.as_object_mut()) {
        facts.insert("similarity".to_owned(), json!(similarities(found)));
    }
    writeln!(terminal::out(), "{facts}")?;
    Ok(())
}

/// Every text with every other, or with the first where there are many.
fn print_similarity(texts: &[String], found: &[Embedding]) -> Result<(), Failure> {
    let mut out = terminal::out();
    let shown = if found.len() > MOST_COLUMNS {
        1
    } else {
        found.len()
    };
    for (text, row) in texts.iter().zip(similarities(found)) {
        let cells: Vec<String> = row.iter().take(shown).map(|s| format!("{s:7.4}")).collect();
        writeln!(out, "{}  {}", cells.join(" "), styled(FAINT, text))?;
    }
    Ok(())
}
