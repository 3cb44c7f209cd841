//! Measuring what a model knows: perplexity of a text, choices by probability, and how far one model is from another.
//!
//! All of it goes by the probability of given tokens after given ones. Every scored token is decoded by itself, because packages give the
//! logits of one position at a time.

use crate::Error;
use crate::model::{LanguageModel, Prediction};
use crate::tokenizer::Tokenizer;

/// How a long text is cut into what a model sees at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, the ones a text of the vocabulary begins with included; the model's context at most.
    pub tokens: usize,
    /// Tokens from one window's start to the next one's: what is scored in each but the first. The others of a window are what the
    /// scored ones are seen after.
    pub stride: usize,
}

/// The perplexity of a text: e to the mean surprise of its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    /// Tokens scored.
    pub tokens: usize,
    /// Mean of minus the natural logarithm of their probabilities.
    pub mean_nll: f64,
    /// Its standard error, tokens taken as independent.
    pub stderr_nll: f64,
}

impl Perplexity {
    /// The perplexity.
    pub fn value(&self) -> f64 {
        libm::exp(self.mean_nll)
    }

    /// Its standard error, to first order.
    pub fn stderr(&self) -> f64 {
        self.value() * self.stderr_nll
    }
}

/// Two models on one text: a compressed one and its original.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// The model measured.
    pub model: Perplexity,
    /// The one it is compared with.
    pub base: Perplexity,
    /// Mean of the logarithm of how many times less probable a token is than in the base: the perplexities' ratio is e to it.
    pub log_ratio: f64,
    /// Its standard error; smaller than the perplexities' own, because both models find the same tokens hard.
    pub stderr_log_ratio: f64,
    /// Mean Kullback-Leibler divergence of the model's distribution from the base's, in nats.
    pub mean_kl: f64,
    /// Its standard error.
    pub stderr_kl: f64,
    /// The largest one.
    pub max_kl: f64,
    /// The part of positions where both have the same best token, 0 to 1.
    pub same_best: f64,
}

/// One question: a text, how it may go on, and which of those is right.
///
/// It is read from JSON as this crate writes it, and as HellaSwag, MMLU and ARC have it: an answer may be a number in a string, a letter or one
/// of the choices' labels.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(try_from = "WrittenQuestion")]
pub struct Question {
    /// The text before the choices.
    pub prompt: String,
    /// How it may go on; a blank between belongs to the choice or to the prompt.
    pub choices: Vec<String>,
    /// The place of the right one, from 0.
    pub answer: usize,
}

#[derive(serde::Deserialize)]
struct WrittenQuestion {
    #[serde(alias = "query", alias = "question", alias = "ctx", alias = "context")]
    prompt: String,
    #[serde(alias = "endings")]
    choices: WrittenChoices,
    #[serde(alias = "gold", alias = "label", alias = "answerKey")]
    answer: WrittenAnswer,
}

#[derive(serde::Deserialize)]
#[serde(
    untagged,
    expecting = "choices are a list of texts, or lists `text` and `label`"
)]
enum WrittenChoices {
    Plain(Vec<String>),
    Labelled { text: Vec<String>, label: Vec<String> },
}

#[derive(serde::Deserialize)]
#[serde(untagged, expecting = "the answer is a place from 0, a letter or a label")]
enum WrittenAnswer {
    Place(usize),
    Name(String),
}

impl TryFrom<WrittenQuestion> for Question {
    type Error = String;

    fn try_from(written: WrittenQuestion) -> Result<Self, String> {
        let (choices, labels) = match written.choices {
            WrittenChoices::Plain(choices) => (choices, Vec::new()),
            WrittenChoices::Labelled { text, label } => (text, label),
        };
        let answer = match written.answer {
            WrittenAnswer::Place(place) => place,
            WrittenAnswer::Name(name) => {
                let labelled = labels.iter().position(|label| *label == name);
                let letter = || ('A'..='Z').position(|letter| name == letter.to_string());
                let found = labelled.or_else(|| name.parse().ok()).or_else(letter);
                found.ok_or_else(|| {
                    format!("the answer is {name:?}; allowed: a place from 0, a letter or a label")
                })?
            }
        };
        Ok(Question {
            prompt: written.prompt,
            choices,
            answer,
        })
    }
}

/// What a model thinks of a question's choices.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The natural logarithm of each choice's probability after the prompt.
    pub log_probabilities: Vec<f64>,
    /// The place of the most probable one.
    pub best: usize,
    /// The place of the one that is most probable for each of its characters, which is fairer to long ones.
    pub best_per_character: usize,
}

/// The perplexity of `text` to `model`, in overlapping windows: every token is scored once, after at least `tokens - stride` others where
/// the text has them (the first window's scores begin with its second token). `progress` gets the tokens scored and those to
/// score, and ends the measurement with what there is when it gives false.
///
/// `stride` of half a window is a fair price for a value near the one of full context; `stride == tokens` is the fastest and
/// gives higher values.
///
/// ```no_run
/// use candle_coreml_llm::{Bundle, Windows, perplexity};
///
/// let bundle = Bundle::open("models/tales")?;
/// let mut model = bundle.load(&Default::default())?;
/// let windows = Windows { tokens: model.context_tokens(), stride: model.context_tokens() / 2 };
/// let text = "Once upon a time, there was a brave mouse.";
/// let found = perplexity(model.as_mut(), bundle.tokenizer(), text, windows, |_, _| true)?;
/// println!("{:.3} ± {:.3}", found.value(), found.stderr());
/// # Ok::<(), candle_coreml_llm::Error>(())
/// ```
///
/// # Errors
/// [`Error::NoLogits`] for models that choose tokens themselves, [`Error::Option`] for windows that cannot be, [`Error::EmptyPrompt`] for
/// texts of fewer than two tokens, and what the engine says.
pub fn perplexity(
    model: &mut dyn LanguageModel,
    tokenizer: &Tokenizer,
    text: &str,
    windows: Windows,
    progress: impl FnMut(usize, usize) -> bool,
) -> Result<Perplexity, Error> {
    let mut surprise = Mean::default();
    let mut each = |logits: &[&[f32]], target: u32, position: usize| {
        for logits in logits {
            surprise.add(-Distribution::of(logits, position)?.log_probability(logits, target));
        }
        Ok(())
    };
    walk(&mut [model], tokenizer, text, windows, &mut each, progress)?;
    Ok(surprise.perplexity())
}

/// As [`perplexity`], of two models over one text at once. They must have the same vocabulary.
///
/// # Errors
/// As [`perplexity`]; [`Error::Option`] when the vocabularies have different sizes.
pub fn compare(
    model: &mut dyn LanguageModel,
    base: &mut dyn LanguageModel,
    tokenizer: &Tokenizer,
    text: &str,
    windows: Windows,
    progress: impl FnMut(usize, usize) -> bool,
) -> Result<Comparison, Error> {
    if model.vocabulary() != base.vocabulary() {
        return Err(Error::Option {
            option: "vocabulary of the model compared with",
            value: base.vocabulary().to_string(),
            allowed: "that of the model",
        });
    }
    let (mut own, mut other, mut ratio) = (Mean::default(), Mean::default(), Mean::default());
    let (mut divergence, mut same) = (Mean::default(), Mean::default());
    let mut each = |logits: &[&[f32]], target: u32, position: usize| {
        let [model, base] = logits else { return Ok(()) };
        let (p, q) = (
            Distribution::of(base, position)?,
            Distribution::of(model, position)?,
        );
        let (in_base, in_model) = (p.log_probability(base, target), q.log_probability(model, target));
        own.add(-in_model);
        other.add(-in_base);
        ratio.add(in_base - in_model);
        divergence.add(p.divergence(base, &q, model));
        same.add(if p.best == q.best { 1.0 } else { 0.0 });
        Ok(())
    };
    let mut both: [&mut dyn LanguageModel; 2] = [model, base];
    walk(&mut both, tokenizer, text, windows, &mut each, progress)?;
    Ok(Comparison {
        model: own.perplexity(),
        base: other.perplexity(),
        log_ratio: ratio.mean(),
        stderr_log_ratio: ratio.stderr(),
        mean_kl: divergence.mean(),
        stderr_kl: divergence.stderr(),
        max_kl: divergence.most,
        same_best: same.mean(),
    })
}

/// What `model` thinks of each choice: the summed logarithms of its tokens' probabilities after the prompt, of which the oldest tokens are left
/// out where both do not fit the context.
///
/// # Errors
/// [`Error::NoLogits`] for models that choose tokens themselves, [`Error::Option`] for questions without choices or with an answer that is none
/// of them, [`Error::PromptTooLong`] for choices longer than the context, and what the engine says.
pub fn score_choices(
    model: &mut dyn LanguageModel,
    tokenizer: &Tokenizer,
    question: &Question,
) -> Result<Scores, Error> {
    if !model.gives_logits() {
        return Err(Error::NoLogits);
    }
    if question.answer >= question.choices.len() {
        return Err(Error::Option {
            option: "answer",
            value: question.answer.to_string(),
            allowed: "the place of a choice, from 0",
        });
    }
    let mut log_probabilities = Vec::new();
    let mut seen: Vec<u32> = Vec::new();
    for choice in &question.choices {
        let (tokens, from) = joined(tokenizer, &question.prompt, choice, model.context_tokens())?;
        check_tokens(&tokens, model.vocabulary())?;
        let shared = seen.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        let mut total = 0.0;
        let mut cached = shared.min(from - 1);
        for at in from..tokens.len() {
            while cached < at - 1 {
                cached = model.prefill(&tokens[..at - 1], cached)?;
            }
            let logits = logits(model.decode(&tokens[..at])?)?;
            total += Distribution::of(logits, at - 1)?.log_probability(logits, tokens[at]);
            cached = at;
        }
        log_probabilities.push(total);
        seen = tokens;
        seen.truncate(cached);
    }
    let characters = |at: usize| question.choices[at].chars().count().max(1) as f64;
    Ok(Scores {
        best: place_of_most(log_probabilities.iter().copied()),
        best_per_character: place_of_most(
            log_probabilities
                .iter()
                .enumerate()
                .map(|(at, sum)| sum / characters(at)),
        ),
        log_probabilities,
    })
}

/// Tokens of a prompt with a choice, and where those of the choice begin. Both are encoded as one text, and blanks at the prompt's end
/// belong to the choice, as vocabularies have them before words.
fn joined(
    tokenizer: &Tokenizer,
    prompt: &str,
    choice: &str,
    context: usize,
) -> Result<(Vec<u32>, usize), Error> {
    let beginning = tokenizer.beginning()?;
    let before = tokenizer.encode(prompt.trim_end())?.len();
    let text = tokenizer.encode(&format!("{prompt}{choice}"))?;
    // A choice that melts into the prompt's last token is scored with it.
    let from = before.min(text.len().saturating_sub(1));
    let room = (context + 1).saturating_sub(beginning.len());
    let cut = text.len().saturating_sub(room);
    if beginning.len() + text.len() < 2 {
        return Err(Error::EmptyPrompt);
    }
    if cut > from || (cut == from && beginning.is_empty() && cut > 0) {
        let tokens = text.len() - from;
        return Err(Error::PromptTooLong { tokens, context });
    }
    let tokens = [&beginning, &text[cut..]].concat();
    let from = (beginning.len() + from - cut).max(1);
    Ok((tokens, from))
}

fn place_of_most(values: impl Iterator<Item = f64>) -> usize {
    let best = values
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(at, _)| at)
}

/// What gets the logits of every model, the token that came, and its position.
type Each<'e> = &'e mut dyn FnMut(&[&[f32]], u32, usize) -> Result<(), Error>;

/// Goes over a text in windows.
fn walk(
    models: &mut [&mut dyn LanguageModel],
    tokenizer: &Tokenizer,
    text: &str,
    windows: Windows,
    each: Each<'_>,
    mut progress: impl FnMut(usize, usize) -> bool,
) -> Result<(), Error> {
    let context = models
        .iter()
        .map(|model| model.context_tokens())
        .min()
        .unwrap_or(0);
    let beginning = tokenizer.beginning()?;
    let refused = |option, value: usize, allowed| Error::Option {
        option,
        value: value.to_string(),
        allowed,
    };
    if windows.tokens > context || windows.tokens < beginning.len() + 2 {
        return Err(refused(
            "window",
            windows.tokens,
            "2 or more tokens, up to the context",
        ));
    }
    let own = windows.tokens - beginning.len();
    if windows.stride == 0 || windows.stride > own {
        return Err(refused(
            "stride",
            windows.stride,
            "1 up to the tokens of a window",
        ));
    }
    if !models.iter().all(|model| model.gives_logits()) {
        return Err(Error::NoLogits);
    }
    let tokens = tokenizer.encode(text)?;
    let vocabulary = models.iter().map(|model| model.vocabulary()).min().unwrap_or(0);
    check_tokens(&tokens, vocabulary)?;
    // The first token of a text without a beginning is seen after nothing and has no score.
    let unscored = usize::from(beginning.is_empty());
    if tokens.len() <= unscored {
        return Err(Error::EmptyPrompt);
    }
    let (mut start, mut next) = (0, unscored);
    while next < tokens.len() {
        let end = tokens.len().min(start + own);
        let window = [&beginning, &tokens[start..end]].concat();
        let first = beginning.len() + next - start;
        for model in models.iter_mut() {
            let mut cached = 0;
            while cached + 1 < first {
                cached = model.prefill(&window[..first - 1], cached)?;
            }
        }
        for at in first..window.len() {
            let mut logits = Vec::with_capacity(models.len());
            for model in models.iter_mut() {
                logits.push(self::logits(model.decode(&window[..at])?)?);
            }
            each(&logits, window[at], at - 1)?;
            if !progress(next - unscored + at + 1 - first, tokens.len() - unscored) {
                return Ok(());
            }
        }
        next = end;
        // Without a beginning the first scored token is seen after one other at least.
        start = (start + windows.stride).min(next - unscored);
    }
    Ok(())
}

fn check_tokens(tokens: &[u32], vocabulary: usize) -> Result<(), Error> {
    let outside = |token: u32| usize::try_from(token).map_or(true, |token| token >= vocabulary);
    match tokens.iter().enumerate().find(|(_, token)| outside(**token)) {
        None => Ok(()),
        Some((index, &token)) => Err(Error::TokenOutside {
            index,
            token,
            vocabulary,
        }),
    }
}

fn logits(prediction: Prediction<'_>) -> Result<&[f32], Error> {
    match prediction {
        Prediction::Logits(logits) => Ok(logits),
        Prediction::Token(_) => Err(Error::NoLogits),
    }
}

/// What logits say, as probabilities.
struct Distribution {
    /// The logarithm of the sum of their exponentials.
    norm: f64,
    best: usize,
}

impl Distribution {
    fn of(logits: &[f32], position: usize) -> Result<Self, Error> {
        let numbers = logits.iter().enumerate().filter(|(_, logit)| !logit.is_nan());
        let best = numbers.reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some((best, &most)) = best else {
            return Err(Error::AllNan {
                position,
                vocabulary: logits.len(),
            });
        };
        let most = f64::from(most);
        let numbers = logits.iter().filter(|logit| !logit.is_nan());
        let total: f64 = numbers.map(|logit| libm::exp(f64::from(*logit) - most)).sum();
        Ok(Distribution {
            norm: most + libm::log(total),
            best,
        })
    }

    fn log_probability(&self, logits: &[f32], token: u32) -> f64 {
        let logit = usize::try_from(token).ok().and_then(|at| logits.get(at));
        match logit {
            Some(logit) if !logit.is_nan() => f64::from(*logit) - self.norm,
            _ => f64::NEG_INFINITY,
        }
    }

    /// The Kullback-Leibler divergence of `other` from this one.
    fn divergence(&self, logits: &[f32], other: &Distribution, others: &[f32]) -> f64 {
        let pairs = logits.iter().zip(others);
        let parts = pairs.filter(|(own, _)| !own.is_nan()).map(|(own, other_logit)| {
            let log_p = f64::from(*own) - self.norm;
            let p = libm::exp(log_p);
            if p == 0.0 {
                0.0
            } else {
                p * (log_p - (f64::from(*other_logit) - other.norm))
            }
        });
        // Rounding may leave two equal distributions a little below nothing.
        parts.sum::<f64>().max(0.0)
    }
}

/// A mean with its error, by Welford's method.
#[derive(Debug, Default)]
struct Mean {
    count: usize,
    mean: f64,
    squares: f64,
    most: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
        self.most = self.most.max(value);
    }

    fn mean(&self) -> f64 {
        self.mean
    }

    fn stderr(&self) -> f64 {
        if self.count < 2 {
            return 0.0;
        }
        let count = self.count as f64;
        (self.squares / (count - 1.0) / count).sqrt()
    }

    fn perplexity(&self) -> Perplexity {
        Perplexity {
            tokens: self.count,
            mean_nll: self.mean,
            stderr_nll: self.stderr(),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use std::path::Path;

    use super::*;
    use crate::Bundle;
    use crate::tokenizer::tests::bytes_tokenizer;

    /// After byte `b`, byte `b + 1` has logit `sharp`, all others 0, as far back as the model is shown a `!`: then twice that.
    struct Successor {
        sharp: f32,
        logits: Vec<f32>,
        seen: usize,
    }

    fn successor(sharp: f32) -> Successor {
        Successor {
            sharp,
            logits: Vec::new(),
            seen: 0,
        }
    }

    impl LanguageModel for Successor {
        fn context_tokens(&self) -> usize {
            16
        }

        fn vocabulary(&self) -> usize {
            300
        }

        fn gives_logits(&self) -> bool {
            self.sharp != 0.0
        }

        fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error> {
            assert!(cached < tokens.len() && cached <= self.seen);
            self.seen = tokens.len().min(cached + 3);
            Ok(self.seen)
        }

        fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
            assert!(
                tokens.len() <= self.seen + 1,
                "{} after {}",
                tokens.len(),
                self.seen
            );
            assert!(tokens.len() <= 16);
            self.seen = tokens.len();
            let sharp = if tokens.contains(&u32::from(b'!')) {
                2.0
            } else {
                1.0
            } * self.sharp;
            self.logits = vec![0.0; 300];
            self.logits[tokens[tokens.len() - 1] as usize + 1] = sharp;
            Ok(Prediction::Logits(&self.logits))
        }

        fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
            Err(Error::EmptyPrompt)
        }

        fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
            Ok(Vec::new())
        }

        fn restore(&mut self, _buffers: &[(String, Tensor)]) -> Result<(), Error> {
            Ok(())
        }
    }

    /// Minus the logarithms of the two probabilities such a model gives.
    fn surprises(sharp: f64) -> (f64, f64) {
        let norm = (sharp.exp() + 299.0).ln();
        (norm - sharp, norm)
    }

    #[test]
    fn perplexity_is_that_of_every_token_once_after_what_its_window_shows() {
        let text = "!bcdefghijklmnopqrstuvwxyz";
        let (right, wrong) = surprises(6.0);
        let (plain, _) = surprises(3.0);
        let mut failures = Vec::new();
        for (tokens, stride, far) in [
            // All of the 25 scored tokens but the first are right; those whose window shows the mark are sharper. Windows that do
            // not overlap still show one token before the first they score.
            (16, 16, 14),
            (16, 8, 14),
            (10, 1, 8),
            (2, 1, 0),
        ] {
            let windows = Windows { tokens, stride };
            let mut seen = Vec::new();
            let found = perplexity(
                &mut successor(3.0),
                &bytes_tokenizer(),
                text,
                windows,
                |done, all| {
                    seen.push((done, all));
                    true
                },
            )
            .unwrap();
            let mean = (wrong + far as f64 * right + (24 - far) as f64 * plain) / 25.0;
            if found.tokens != 25 || (found.mean_nll - mean).abs() > 1e-9 {
                failures.push(format!("{windows:?}: {found:?}, expected {mean}"));
            }
            if seen.last() != Some(&(25, 25)) || seen.len() != 25 {
                failures.push(format!("{windows:?}: {seen:?}"));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn windows_and_models_that_cannot_be_are_refused() {
        let tokenizer = bytes_tokenizer();
        for (tokens, stride, text, sharp, expected) in [
            (17, 1, "abc", 1.0, "window"),
            (1, 1, "abc", 1.0, "window"),
            (16, 0, "abc", 1.0, "stride"),
            (16, 17, "abc", 1.0, "stride"),
            (16, 8, "a", 1.0, "the prompt is empty"),
            (16, 8, "", 1.0, "the prompt is empty"),
            (16, 8, "abc", 0.0, "gives no logits"),
        ] {
            let windows = Windows { tokens, stride };
            let error = perplexity(&mut successor(sharp), &tokenizer, text, windows, |_, _| true);
            let words = error.unwrap_err().to_string();
            assert!(words.contains(expected), "{windows:?} {text:?}: {words}");
        }
    }

    #[test]
    fn a_model_is_as_far_from_another_as_their_distributions_say() {
        let windows = Windows {
            tokens: 16,
            stride: 8,
        };
        let tokenizer = bytes_tokenizer();
        let found = compare(
            &mut successor(2.0),
            &mut successor(3.0),
            &tokenizer,
            "abcxyz",
            windows,
            |_, _| true,
        )
        .unwrap();
        let ((right, wrong), (base_right, base_wrong)) = (surprises(2.0), surprises(3.0));
        let divergence = |p: f64, q: f64| p * (p / q).ln();
        let kl = divergence((-base_right).exp(), (-right).exp())
            + 299.0 * divergence((-base_wrong).exp(), (-wrong).exp());
        assert!(
            (found.mean_kl - kl).abs() < 1e-9 && (found.max_kl - kl).abs() < 1e-9,
            "{found:?}, expected {kl}"
        );
        assert!(found.stderr_kl < 1e-9 && found.same_best == 1.0);
        let ratio = (4.0 * (right - base_right) + wrong - base_wrong) / 5.0;
        assert!((found.log_ratio - ratio).abs() < 1e-9, "{found:?}");
        assert!((found.model.value() / found.base.value() - ratio.exp()).abs() < 1e-9);
        let same = compare(
            &mut successor(2.0),
            &mut successor(2.0),
            &tokenizer,
            "abc",
            windows,
            |_, _| true,
        )
        .unwrap();
        assert_eq!(
            (same.log_ratio, same.mean_kl, same.stderr_log_ratio),
            (0.0, 0.0, 0.0)
        );
    }

    #[test]
    fn choices_are_scored_by_their_own_tokens_after_the_prompt() {
        let tokenizer = bytes_tokenizer();
        let mut model = successor(4.0);
        let (right, wrong) = surprises(4.0);
        let question = |prompt: &str, choices: &[&str]| Question {
            prompt: prompt.to_string(),
            choices: choices.iter().map(|c| c.to_string()).collect(),
            answer: 0,
        };
        for (prompt, choices, sums, best, per_character) in [
            (
                "abc",
                &["def", "x", "dex"][..],
                vec![-3.0 * right, -wrong, -2.0 * right - wrong],
                0,
                0,
            ),
            // One wrong token is likelier than one wrong and eight right ones, which are likelier each.
            (
                "abc",
                &["z", "fghijklmn"],
                vec![-wrong, -wrong - 8.0 * right],
                0,
                1,
            ),
            // A prompt that does not fit loses its oldest tokens.
            (
                "0123456789abcdefghijkl",
                &["mn", "xx"],
                vec![-2.0 * right, -2.0 * wrong],
                0,
                0,
            ),
        ] {
            let found = score_choices(&mut model, &tokenizer, &question(prompt, choices)).unwrap();
            for (found, expected) in found.log_probabilities.iter().zip(&sums) {
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{prompt} {choices:?}: {found} {expected}"
                );
            }
            assert_eq!(
                (found.best, found.best_per_character),
                (best, per_character),
                "{choices:?}"
            );
        }
        let long = "abcdefghijklmnopqrstuvwxyz";
        assert!(matches!(
            score_choices(&mut model, &tokenizer, &question("a", &[long])),
            Err(Error::PromptTooLong { .. })
        ));
        assert!(score_choices(&mut model, &tokenizer, &question("a", &[])).is_err());
    }

    #[test]
    fn questions_are_read_under_the_names_they_have_in_the_field() {
        let expected = Question {
            prompt: "a".into(),
            choices: vec!["b".into(), "c".into()],
            answer: 1,
        };
        for json in [
            r#"{"prompt": "a", "choices": ["b", "c"], "answer": 1}"#,
            r#"{"ctx": "a", "endings": ["b", "c"], "label": 1, "id": 7}"#,
            r#"{"query": "a", "choices": ["b", "c"], "gold": 1}"#,
            r#"{"ctx": "a", "endings": ["b", "c"], "label": "1"}"#,
            r#"{"question": "a", "choices": ["b", "c"], "answer": "B"}"#,
            r#"{"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"}"#,
            r#"{"question": "a", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answerKey": "2"}"#,
        ] {
            assert_eq!(
                serde_json::from_str::<Question>(json).unwrap(),
                expected,
                "{json}"
            );
        }
    }

    const STORY: &str = include_str!("../testdata/story.txt");
    /// What `perplexity.py` prints for the checkpoint behind the demo model: window, stride, mean nll and its error.
    const REFERENCE: [(usize, usize, f64, f64); 2] =
        [(128, 64, 3.261510, 0.276080), (256, 256, 3.195701, 0.276932)];

    fn open(folder: &str) -> Option<(Bundle, Box<dyn LanguageModel>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder);
        if !folder.exists() {
            eprintln!("{} is absent: nothing is compared with it", folder.display());
            return None;
        }
        Some(Bundle::open_model(folder, &Default::default()).unwrap())
    }

    #[test]
    fn perplexity_is_what_the_checkpoint_has_by_an_independent_computation() {
        // The packages in the tree have 6 bits a weight; those beside it fp16, as the checkpoint.
        for (folder, allowed) in [("models/tales", 0.02), ("../shared/models/tales-fp16", 0.001)] {
            let Some((bundle, mut model)) = open(folder) else {
                continue;
            };
            for (tokens, stride, mean, error) in REFERENCE {
                let windows = Windows { tokens, stride };
                let found =
                    perplexity(model.as_mut(), bundle.tokenizer(), STORY, windows, |_, _| true).unwrap();
                eprintln!("{folder} {windows:?}: {found:?}, perplexity {:.4}", found.value());
                assert_eq!(found.tokens, 159);
                assert!(
                    (found.mean_nll - mean).abs() < allowed,
                    "{folder}: {found:?}, expected {mean}"
                );
                assert!(
                    (found.stderr_nll - error).abs() < allowed,
                    "{folder}: {found:?}, expected {error}"
                );
            }
        }
    }

    #[test]
    fn a_palettized_model_is_near_its_original_and_not_the_same() {
        let (Some((bundle, mut small)), Some((_, mut original))) =
            (open("models/tales"), open("../shared/models/tales-fp16"))
        else {
            return;
        };
        let windows = Windows {
            tokens: 128,
            stride: 64,
        };
        let found = compare(
            small.as_mut(),
            original.as_mut(),
            bundle.tokenizer(),
            STORY,
            windows,
            |_, _| true,
        )
        .unwrap();
        eprintln!("{found:?}");
        assert!(
            found.mean_kl > 1e-5 && found.mean_kl < 0.1 && found.same_best > 0.85,
            "{found:?}"
        );
        assert!(found.stderr_log_ratio < found.model.stderr_nll / 3.0, "{found:?}");
    }
}
