//! `convert --check` for encoders: hidden states and texts' vectors beside those of the original in float32.

use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_coreml::CoreMLModel;
use candle_coreml_convert::EncoderReference;
use candle_coreml_llm::Tokenizer;
use serde_json::json;

use super::super::args::ConvertArgs;
use crate::failure::Failure;
use crate::terminal;

/// How far a package is from the original, over some texts.
#[derive(Debug, Clone, PartialEq, Default)]
struct Fidelity {
    texts: usize,
    tokens: usize,
    /// Largest difference of an element of a hidden state.
    largest: f32,
    /// Sums of the squares of the differences and of the original's elements.
    squares: (f64, f64),
    /// The smallest cosine between a text's vector and the original's.
    cosine: f64,
}

pub fn run(args: &ConvertArgs, folder: &Path) -> Result<(), Failure> {
    let spinner = terminal::spinner("float32 forward pass of the original");
    let reference = EncoderReference::open(&args.model)?;
    let path = folder.join("tokenizer.json");
    let content = std::fs::read(&path).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
    let tokenizer = Tokenizer::parse("tokenizer.json", &content)?;
    let model = CoreMLModel::load(folder.join("model.mlpackage"))?;
    let mut found = Fidelity {
        cosine: 1.0,
        ..Fidelity::default()
    };
    let most = args.tokens.unwrap_or(args.text_tokens).min(args.text_tokens);
    for text in texts(&super::text(args)?, args.text.is_some()) {
        let most = most.min(reference.config().max_tokens);
        let (tokens, _, _) = tokenizer.encode_whole(&text, most)?;
        if tokens.is_empty() {
            continue;
        }
        let expected = reference.hidden(&tokens)?;
        let (hidden, pooled) = predict(&model, &tokens, args.tokens)?;
        // A package without a vector of the text is compared by the one its hidden states make.
        let pooled = match pooled {
            Some(pooled) => pooled,
            None => reference.pooled(&hidden)?,
        };
        found.add(&expected, &hidden, &reference.pooled(&expected)?, &pooled)?;
    }
    spinner.finish_and_clear();
    if found.texts == 0 {
        return Err(Failure::usage("the text of the check has no tokens"));
    }
    print(args.json, &found)
}

/// The lines of a file, or the sentences of the text inside this program.
fn texts(text: &str, lines: bool) -> Vec<String> {
    let parts: Vec<&str> = if lines {
        text.lines().collect()
    } else {
        text.split_inclusive(". ").collect()
    };
    let filled = parts.into_iter().map(str::trim).filter(|t| !t.is_empty());
    filled.map(str::to_owned).collect()
}

/// The hidden states [tokens, hidden] and the text's vector [hidden], where the package gives one.
fn predict(
    model: &CoreMLModel,
    tokens: &[u32],
    fixed: Option<usize>,
) -> Result<(Tensor, Option<Tensor>), Failure> {
    let length = fixed.unwrap_or(tokens.len());
    let mut ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    let mut mask = vec![1i64; ids.len()];
    ids.resize(length, 0);
    mask.resize(length, 0);
    let row = |values: Vec<i64>| Tensor::from_vec(values, (1, length), &Device::Cpu);
    let (ids, mask) = (row(ids)?, row(mask)?);
    let outputs = model.predict(&[("input_ids", &ids), ("attention_mask", &mask)])?;
    let float = |t: Tensor| t.squeeze(0)?.to_dtype(DType::F32);
    let hidden = float(outputs.tensor("last_hidden_state")?)?.narrow(0, 0, tokens.len())?;
    let pooled = match outputs.get("sentence_embedding") {
        Some(_) => Some(float(outputs.tensor("sentence_embedding")?)?),
        None => None,
    };
    Ok((hidden, pooled))
}

impl Fidelity {
    fn add(
        &mut self,
        expected: &Tensor,
        found: &Tensor,
        text: &Tensor,
        pooled: &Tensor,
    ) -> Result<(), Failure> {
        let values = |t: &Tensor| -> Result<Vec<f32>, Failure> { Ok(t.flatten_all()?.to_vec1()?) };
        self.texts += 1;
        self.tokens += expected.dim(0)?;
        for (e, f) in values(expected)?.iter().zip(values(found)?) {
            let off = (e - f).abs();
            self.largest = super::larger(self.largest, off);
            self.squares.0 += f64::from(off).powi(2);
            self.squares.1 += f64::from(*e).powi(2);
        }
        let cosine = cosine(&values(text)?, &values(pooled)?);
        if cosine.is_nan() || cosine < self.cosine {
            self.cosine = cosine;
        }
        Ok(())
    }

    /// Root of the mean squared difference as a share of the original's.
    fn relative(&self) -> f64 {
        (self.squares.0 / self.squares.1.max(f64::MIN_POSITIVE)).sqrt()
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn print(as_json: bool, f: &Fidelity) -> Result<(), Failure> {
    let mut out = terminal::out();
    if as_json {
        let facts = json!({
            "texts": f.texts, "tokens": f.tokens, "largest_error": f.largest, "relative_error": f.relative(),
            "smallest_cosine": f.cosine, "float32": "candle-transformers",
        });
        let text = serde_json::to_string_pretty(&json!({ "check": facts }))?;
        return Ok(writeln!(out, "{text}")?);
    }
    writeln!(
        out,
        "against a float32 forward pass (candle-transformers) over {} texts of {} tokens in all:",
        f.texts, f.tokens
    )?;
    writeln!(
        out,
        "hidden states differ by {:.4} at most, {:.3} % of their size on average",
        f.largest,
        100.0 * f.relative()
    )?;
    Ok(writeln!(
        out,
        "cosine of the texts' vectors {:.6} at least",
        f.cosine
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_by_lines_and_the_built_in_text_by_sentences() {
        assert_eq!(texts("one. two\n\n three ", true), ["one. two", "three"]);
        assert_eq!(texts("One. Two. Three", false), ["One.", "Two.", "Three"]);
    }

    #[test]
    fn errors_add_up_over_texts_and_a_nan_is_not_lost() {
        let row = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let mut found = Fidelity {
            cosine: 1.0,
            ..Fidelity::default()
        };
        found
            .add(
                &row(&[3.0, 4.0]),
                &row(&[3.0, 3.5]),
                &row(&[1.0, 0.0]),
                &row(&[1.0, 0.0]),
            )
            .unwrap();
        assert_eq!((found.texts, found.tokens, found.largest), (1, 1, 0.5));
        assert!((found.relative() - 0.1).abs() < 1e-9 && (found.cosine - 1.0).abs() < 1e-9);
        found
            .add(
                &row(&[1.0, 0.0]),
                &row(&[1.0, 0.0]),
                &row(&[1.0, 0.0]),
                &row(&[1.0, 1.0]),
            )
            .unwrap();
        assert!((found.cosine - 0.5f64.sqrt()).abs() < 1e-9);
        found
            .add(&row(&[1.0]), &row(&[f32::NAN]), &row(&[1.0]), &row(&[1.0]))
            .unwrap();
        found
            .add(&row(&[1.0]), &row(&[1.0]), &row(&[1.0]), &row(&[1.0]))
            .unwrap();
        assert!(found.largest.is_nan());
    }
}
