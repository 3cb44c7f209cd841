//! `convert --check`: the packages on the portable engine beside a float32 forward pass of the original.

mod encoder;

use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLState};
use candle_coreml_convert::{ForwardPass, LanguageModelOptions, Layout, Reference};
use candle_coreml_llm::{Bundle, LoadOptions, Prediction, Tokenizer};
use serde_json::json;

use super::args::ConvertArgs;
use crate::failure::Failure;
use crate::terminal;
pub use encoder::run as run_encoder;

/// The text when none is given.
const TEXT: &str = "The old lighthouse keeper climbed the stairs every evening, as he had done for forty years. From the top he \
could see the whole bay: fishing boats coming home, gulls turning above the cliffs, and far away the lights of the town. One \
night a storm came up from the south. The wind tore at the windows and the waves broke over the rocks. He kept the lamp \
burning until morning, and when the sun rose, a small boat lay safe in the harbour. Nobody ever knew who had steered it. \
The people of the town said that the light itself had brought it home, and the keeper did not tell them otherwise.";

/// How far a result is from the original, over the tokens of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Fidelity {
    tokens: usize,
    /// Positions at which the best token is the same.
    agree: usize,
    /// Largest and mean difference of a logit; nothing where the head gives none.
    logit_error: Option<(f32, f64)>,
    /// Perplexity of the text: the original's, the result's.
    perplexity: (f64, Option<f64>),
}

pub fn run(args: &ConvertArgs, folder: &Path, options: &LanguageModelOptions) -> Result<(), Failure> {
    let reference = Reference::open(&args.model)?;
    let tokens = text_tokens(args, &reference.tokenizer()?, options.context)?;
    let pass = reference.pass(tokens.len());
    let spinner = terminal::spinner("float32 forward pass of the original");
    let reference = reference.logits(&tokens)?;
    spinner.finish_and_clear();
    let rows: Vec<Vec<f32>> = reference.to_vec2()?;
    let bar = terminal::bar("the result on the portable engine", tokens.len() as u64);
    let mut model = Opened::open(folder, options)?;
    let mut sums = Sums::default();
    for (at, row) in rows.iter().enumerate() {
        let (before, now) = tokens.split_at(at);
        let Some((&last, _)) = now.split_first() else {
            break;
        };
        sums.add(row, &model.next(before, last)?, tokens.get(at + 1).copied());
        bar.inc(1);
    }
    bar.finish_and_clear();
    print(args.json, pass, &sums.finish())
}

/// The text to compare on.
fn text(args: &ConvertArgs) -> Result<String, Failure> {
    match &args.text {
        Some(path) => {
            std::fs::read_to_string(path).map_err(|e| Failure::new(format!("{}: {e}", path.display())))
        }
        None => Ok(TEXT.to_owned()),
    }
}

/// The tokens of the text that is used. `tokenizer` is the content of tokenizer.json.
pub fn text_tokens(args: &ConvertArgs, tokenizer: &[u8], context: usize) -> Result<Vec<u32>, Failure> {
    let tokenizer = Tokenizer::parse("tokenizer.json", tokenizer)?;
    let mut tokens = tokenizer.encode(&text(args)?)?;
    tokens.truncate(args.text_tokens.min(context));
    if tokens.len() < 2 {
        return Err(Failure::usage("the text of the check has fewer than two tokens"));
    }
    Ok(tokens)
}

/// The result in either layout, one token a call.
enum Opened {
    Anemll(Box<dyn candle_coreml_llm::LanguageModel>),
    Stateful(CoreMLModel, CoreMLState),
}

enum Answer {
    Logits(Vec<f32>),
    Token(u32),
}

impl Opened {
    fn open(folder: &Path, options: &LanguageModelOptions) -> Result<Self, Failure> {
        Ok(match options.layout {
            Layout::Anemll => Opened::Anemll(Bundle::open(folder)?.load(&LoadOptions::default())?),
            Layout::Stateful => {
                let model = CoreMLModel::load(folder.join("model.mlpackage"))?;
                let state = model.make_state()?;
                Opened::Stateful(model, state)
            }
        })
    }

    /// The prediction after `before` and `last`; `before` went through already.
    fn next(&mut self, before: &[u32], last: u32) -> Result<Answer, Failure> {
        match self {
            Opened::Anemll(model) => {
                let all = [before, &[last]].concat();
                Ok(match model.decode(&all)? {
                    Prediction::Logits(logits) => Answer::Logits(logits.to_vec()),
                    Prediction::Token(token) => Answer::Token(token),
                })
            }
            Opened::Stateful(model, state) => {
                let ids = Tensor::new(&[[i64::from(last)]], &Device::Cpu)?;
                let mask = Tensor::zeros((1, 1, 1, before.len() + 1), DType::F32, &Device::Cpu)?;
                let outputs =
                    model.predict_with_state(&[("inputIds", &ids), ("causalMask", &mask)], state)?;
                let logits = outputs.tensor("logits")?.to_dtype(DType::F32)?;
                Ok(Answer::Logits(logits.flatten_all()?.to_vec1()?))
            }
        }
    }
}

#[derive(Default)]
struct Sums {
    tokens: usize,
    agree: usize,
    largest: f32,
    distance: f64,
    logits: u64,
    /// Summed negative log likelihood of the tokens that followed, and their number.
    surprise: (f64, f64),
    followed: usize,
}

impl Sums {
    fn add(&mut self, expected: &[f32], found: &Answer, next: Option<u32>) {
        self.tokens += 1;
        let next = next.and_then(|n| usize::try_from(n).ok());
        self.followed += usize::from(next.is_some());
        self.surprise.0 += next.map_or(0.0, |n| surprise(expected, n));
        let choice = match found {
            Answer::Token(token) => *token as usize,
            Answer::Logits(found) => {
                for (a, b) in expected.iter().zip(found) {
                    let off = (a - b).abs();
                    self.largest = larger(self.largest, off);
                    self.distance += f64::from(off);
                }
                self.logits += found.len() as u64;
                self.surprise.1 += next.map_or(0.0, |n| surprise(found, n));
                best(found)
            }
        };
        self.agree += usize::from(choice == best(expected));
    }

    fn finish(&self) -> Fidelity {
        let followed = self.followed.max(1) as f64;
        let some = self.logits > 0;
        Fidelity {
            tokens: self.tokens,
            agree: self.agree,
            logit_error: some.then(|| (self.largest, self.distance / self.logits as f64)),
            perplexity: (
                (self.surprise.0 / followed).exp(),
                some.then(|| (self.surprise.1 / followed).exp()),
            ),
        }
    }
}

/// The larger of two differences; a NaN is the largest there is.
fn larger(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        f32::NAN
    } else {
        a.max(b)
    }
}

/// Index of the largest; the first of equal ones.
pub fn best(logits: &[f32]) -> usize {
    let larger = |best: (usize, f32), (i, &v): (usize, &f32)| if v > best.1 { (i, v) } else { best };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), larger).0
}

/// Negative logarithm of the probability that `logits` give to `token`.
pub fn surprise(logits: &[f32], token: usize) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let sum: f64 = logits.iter().map(|&v| f64::from(v - most).exp()).sum();
    sum.ln()
        - logits
            .get(token)
            .map_or(f64::NEG_INFINITY, |&v| f64::from(v - most))
}

fn print(as_json: bool, pass: ForwardPass, f: &Fidelity) -> Result<(), Failure> {
    let mut out = terminal::out();
    if as_json {
        let facts = json!({
            "tokens": f.tokens, "tokens_agree": f.agree, "largest_logit_error": f.logit_error.map(|e| e.0),
            "mean_logit_error": f.logit_error.map(|e| e.1), "perplexity_float32": f.perplexity.0,
            "perplexity": f.perplexity.1, "float32": pass.to_string(),
        });
        writeln!(
            out,
            "{}",
            serde_json::to_string_pretty(&json!({ "check": facts }))?
        )?;
        return Ok(());
    }
    let share = 100.0 * f.agree as f64 / f.tokens.max(1) as f64;
    writeln!(
        out,
        "against a float32 forward pass ({pass}) over {} tokens: the best token is the same at {} ({share:.1} %)",
        f.tokens, f.agree
    )?;
    if let Some((largest, mean)) = f.logit_error {
        writeln!(out, "logits differ by {largest:.4} at most, {mean:.5} on average")?;
    }
    match f.perplexity {
        (original, Some(result)) => {
            writeln!(
                out,
                "perplexity {original:.4} in float32, {result:.4} as converted"
            )?;
        }
        (original, None) => writeln!(
            out,
            "perplexity {original:.4} in float32; the head gives no logits"
        )?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_count_agreement_error_and_perplexity() {
        let mut sums = Sums::default();
        let even = [1.0, 1.0, 1.0, 1.0];
        sums.add(&even, &Answer::Logits(vec![1.0, 1.0, 1.0, 1.5]), Some(2));
        sums.add(
            &[0.0, 3.0, 0.0, 0.0],
            &Answer::Logits(vec![0.0, 3.0, 0.0, 0.0]),
            None,
        );
        let found = sums.finish();
        assert_eq!((found.tokens, found.agree), (2, 1));
        assert_eq!(found.logit_error, Some((0.5, 0.0625)));
        assert!((found.perplexity.0 - 4.0).abs() < 1e-9);
        assert!(found.perplexity.1.unwrap() > 4.0);
    }

    #[test]
    fn a_nan_is_not_lost() {
        let mut sums = Sums::default();
        sums.add(&[0.0, 1.0], &Answer::Logits(vec![f32::NAN, 1.0]), None);
        sums.add(&[0.0, 1.0], &Answer::Logits(vec![0.0, 1.0]), None);
        assert!(sums.finish().logit_error.unwrap().0.is_nan());
    }

    #[test]
    fn a_head_without_logits_still_agrees_or_not() {
        let mut sums = Sums::default();
        sums.add(&[0.0, 1.0], &Answer::Token(1), Some(0));
        sums.add(&[0.0, 1.0], &Answer::Token(0), None);
        let found = sums.finish();
        assert_eq!(
            (found.agree, found.logit_error, found.perplexity.1),
            (1, None, None)
        );
    }
}
