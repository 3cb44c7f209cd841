//! Choosing the next token from logits.

mod history;
mod logprobs;

use std::cmp::Ordering;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::Error;
pub use history::History;
pub use logprobs::Logprobs;

/// Tokens whose probability is below e^-30 (1e-13) of the best one's are never chosen; most of a vocabulary is, so they
/// are set aside before anything is computed of them.
const DEEPEST: f64 = 30.0;
/// Candidates sorted at first when the most probable ones are looked for; then four times as many, and so on.
const FIRST_SORTED: usize = 64;

/// How the next token is chosen. The order is penalties, bias, temperature, `top_k`, `typical_p`, `top_p`, `min_p`.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits: 0 takes the best token always, 1 leaves probabilities as they are.
    pub temperature: f32,
    /// Only this many of the best tokens; 0 for all.
    pub top_k: usize,
    /// Only the best tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens with this part of the best one's probability; 0 for all.
    pub min_p: f32,
    /// Only the tokens nearest to what is to be expected (whose surprise is nearest to the mean one) that together have this
    /// probability; 1 for all. Source: Meister et al., "Locally Typical Sampling".
    pub typical_p: f32,
    /// Divides logits above 0, and multiplies those below, of tokens that are in the text already, prompt included; 1 leaves
    /// them.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were generated already.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens that were generated already, once for each time.
    pub frequency_penalty: f32,
    /// How many tokens back penalties look; 0 for the whole text.
    pub penalty_tokens: usize,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Where the random numbers start: the same seed gives the same choices on every machine.
    pub seed: u64,
}

impl Default for Sampling {
    /// The best token, always.
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_tokens: 0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl Sampling {
    /// True when the best token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// True when logits are used as the model gives them.
    fn leaves_logits(&self) -> bool {
        self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
    }

    /// True when a model that gives tokens instead of logits will do.
    pub fn needs_no_logits(&self) -> bool {
        self.is_greedy() && self.leaves_logits()
    }

    fn check(&self) -> Result<(), Error> {
        let refuse = |option, value: f32, allowed| {
            Err(Error::Option {
                option,
                value: value.to_string(),
                allowed,
            })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "above 0, up to 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "0 to 1");
        }
        if !(self.typical_p > 0.0 && self.typical_p <= 1.0) {
            return refuse("typical_p", self.typical_p, "above 0, up to 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", self.repetition_penalty, "above 0");
        }
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !value.is_finite() {
                return refuse(name, value, "a number");
            }
        }
        if let Some((_, bias)) = self
            .logit_bias
            .iter()
            .find(|(_, b)| b.is_nan() || *b == f32::INFINITY)
        {
            return refuse("logit_bias", *bias, "numbers, or minus infinity");
        }
        Ok(())
    }
}

/// Chooses tokens; keeps its random numbers and its buffer between them.
///
/// ```
/// use candle_coreml_llm::{Sampler, Sampling};
///
/// let mut greedy = Sampler::new(Sampling::default())?;
/// assert_eq!(greedy.choose(&[0.5, 2.0, 2.0]), Some(1));
/// # Ok::<(), candle_coreml_llm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    options: Sampling,
    random: ChaCha8Rng,
    candidates: Vec<Candidate>,
    /// Logits after penalties and bias.
    altered: Vec<f32>,
    /// Logits of allowed tokens.
    masked: Vec<f32>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    token: u32,
    /// Its probability relative to the best token's.
    weight: f64,
}

impl Candidate {
    /// Best first, the lower token of equals first: an order without ties, so that every way of sorting agrees.
    fn order(&self, other: &Self) -> Ordering {
        other
            .logit
            .total_cmp(&self.logit)
            .then(self.token.cmp(&other.token))
    }
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`Error::Option`] for an option out of range.
    pub fn new(options: Sampling) -> Result<Self, Error> {
        options.check()?;
        let random = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Sampler {
            options,
            random,
            candidates: Vec::new(),
            altered: Vec::new(),
            masked: Vec::new(),
        })
    }

    /// Chooses among `logits` after the text in `history`, which penalties look at. Otherwise as [`Sampler::choose`].
    pub fn choose_after(&mut self, logits: &[f32], history: History<'_>) -> Option<u32> {
        if self.options.leaves_logits() {
            return self.choose(logits);
        }
        let mut altered = std::mem::take(&mut self.altered);
        altered.clear();
        altered.extend_from_slice(logits);
        history.penalise(&self.options, &mut altered);
        for &(token, bias) in &self.options.logit_bias {
            if let Some(logit) = usize::try_from(token).ok().and_then(|t| altered.get_mut(t)) {
                *logit += bias;
            }
        }
        let chosen = self.choose(&altered);
        self.altered = altered;
        chosen
    }

    /// As [`Sampler::choose_after`], among the tokens `allowed` alone; `None` when there is none of them or all of them are NaN.
    pub fn choose_among(
        &mut self,
        logits: &[f32],
        history: History<'_>,
        allowed: impl IntoIterator<Item = u32>,
    ) -> Option<u32> {
        // NaN is never chosen, whatever penalties and bias do to it.
        let mut masked = std::mem::take(&mut self.masked);
        masked.clear();
        masked.resize(logits.len(), f32::NAN);
        for token in allowed {
            let at = usize::try_from(token).unwrap_or(usize::MAX);
            if let (Some(masked), Some(logit)) = (masked.get_mut(at), logits.get(at)) {
                *masked = *logit;
            }
        }
        let chosen = self.choose_after(&masked, history);
        self.masked = masked;
        chosen
    }

    /// Chooses among `logits`, one for each token id; `None` when all are NaN. NaN is never chosen, and of equal logits
    /// the lower id counts as the better. Takes time linear in the vocabulary.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        let (best, most) = best(logits)?;
        if self.options.is_greedy() || !most.is_finite() {
            return Some(best);
        }
        self.gather(logits, most);
        self.keep_top_k();
        let temperature = f64::from(self.options.temperature);
        for candidate in &mut self.candidates {
            // libm's exp has the same bits on every machine, the system's has not.
            candidate.weight = libm::exp((f64::from(candidate.logit) - f64::from(most)) / temperature);
        }
        self.keep_typical();
        self.keep_top_p();
        let least = f64::from(self.options.min_p);
        self.candidates.retain(|candidate| candidate.weight >= least);
        self.draw().or(Some(best))
    }

    fn gather(&mut self, logits: &[f32], most: f32) {
        let floor = f64::from(most) - DEEPEST * f64::from(self.options.temperature);
        let likely = (0u32..)
            .zip(logits)
            .filter(|(_, logit)| f64::from(**logit) >= floor);
        self.candidates.clear();
        self.candidates.extend(likely.map(|(token, &logit)| Candidate {
            logit,
            token,
            weight: 0.0,
        }));
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k == 0 || k >= self.candidates.len() {
            return;
        }
        self.candidates.select_nth_unstable_by(k - 1, Candidate::order);
        self.candidates.truncate(k);
        self.candidates.sort_unstable_by(Candidate::order);
    }

    fn keep_typical(&mut self) {
        if self.options.typical_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let surprise = |c: &Candidate| -libm::log(c.weight / total);
        let mean: f64 = self
            .candidates
            .iter()
            .map(|c| c.weight / total * surprise(c))
            .sum();
        let distance = |c: &Candidate| (surprise(c) - mean).abs();
        // Equal distances stay in the order of probability.
        self.candidates
            .sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.order(b)));
        let (enough, mut sum) = (total * f64::from(self.options.typical_p), 0.0);
        let last = self.candidates.iter().position(|c| {
            sum += c.weight;
            sum >= enough
        });
        self.candidates.truncate(last.map_or(usize::MAX, |last| last + 1));
    }

    fn keep_top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let enough = total * f64::from(self.options.top_p);
        let (mut sorted, mut step, mut sum) = (0, FIRST_SORTED, 0.0);
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let count = step.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, Candidate::order);
            }
            rest[..count].sort_unstable_by(Candidate::order);
            for (index, candidate) in rest[..count].iter().enumerate() {
                sum += candidate.weight;
                if sum >= enough {
                    self.candidates.truncate(sorted + index + 1);
                    return;
                }
            }
            sorted += count;
            step *= 4;
        }
    }

    fn draw(&mut self) -> Option<u32> {
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        // 53 random bits make a number in 0..1 that a double holds exactly.
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for candidate in &self.candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Some(candidate.token);
            }
        }
        self.candidates.last().map(|candidate| candidate.token)
    }
}

/// Numbers compared at a time, so that the compiler makes vectors of them.
const LANES: usize = 32;

/// The first of the largest numbers and its value; NaN is passed over.
fn best(logits: &[f32]) -> Option<(u32, f32)> {
    // A comparison with NaN is false, so that it never becomes the larger one.
    let larger = |most: f32, logit: f32| if logit > most { logit } else { most };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    let most = lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |most, &logit| larger(most, logit));
    // Minus infinity is the most too where nothing but NaN came; then it is found nowhere.
    let here = |chunk: &[f32; LANES]| chunk.iter().fold(false, |found, &logit| found | (logit == most));
    let before = chunks.iter().take_while(|chunk| !here(chunk)).count() * LANES;
    let after = logits.get(before..)?.iter().position(|&logit| logit == most)?;
    Some((u32::try_from(before + after).ok()?, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;
    const LOW: f32 = f32::NEG_INFINITY;

    fn choices(options: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        (0..count).map(|_| sampler.choose(logits).unwrap()).collect()
    }

    fn warm() -> Sampling {
        Sampling {
            temperature: 1.0,
            seed: 7,
            ..Sampling::default()
        }
    }

    /// Logits of a vocabulary, spread by a fixed rule.
    fn spread(size: usize) -> Vec<f32> {
        (0..size).map(|i| ((i * 7919) % 1009) as f32 / 100.0).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_best_and_never_nan() {
        for (logits, expected) in [
            (&[1.0, 3.0, 2.0][..], Some(1)),
            (&[3.0, 3.0], Some(0)),
            (&[NAN, 1.0, NAN, 2.0], Some(3)),
            (&[LOW, LOW], Some(0)),
            (&[NAN, LOW], Some(1)),
            (&[f32::INFINITY, 1.0], Some(0)),
            (&[NAN, NAN], None),
            (&[], None),
        ] {
            for options in [Sampling::default(), Sampling { top_k: 1, ..warm() }] {
                assert_eq!(
                    Sampler::new(options).unwrap().choose(logits),
                    expected,
                    "{logits:?}"
                );
            }
        }
    }

    #[test]
    fn the_best_is_found_wherever_it_stands() {
        for size in [1, LANES - 1, LANES, LANES + 1, 3 * LANES + 7] {
            for at in 0..size {
                let mut logits = vec![-1.0; size];
                logits[size / 2] = NAN;
                logits[at] = 2.0;
                logits[size - 1] = 2.0;
                assert_eq!(
                    best(&logits),
                    Some((u32::try_from(at).unwrap(), 2.0)),
                    "{at} of {size}"
                );
            }
            assert_eq!(best(&vec![LOW; size]), Some((0, LOW)));
            assert_eq!(best(&vec![NAN; size]), None);
        }
    }

    #[test]
    fn among_allowed_tokens_no_other_is_chosen() {
        let logits = spread(500);
        for options in [
            Sampling::default(),
            warm(),
            Sampling {
                top_k: 3,
                logit_bias: vec![(7, 100.0), (9, LOW)],
                presence_penalty: 2.0,
                ..warm()
            },
            Sampling {
                logit_bias: vec![(8, LOW), (9, LOW), (300, LOW)],
                ..warm()
            },
        ] {
            let mut sampler = Sampler::new(options.clone()).unwrap();
            for _ in 0..50 {
                let chosen = sampler.choose_among(&logits, History::new(&[1, 9], 1), [8, 9, 300, 1000]);
                assert!(matches!(chosen, Some(8 | 9 | 300)), "{options:?}: {chosen:?}");
            }
            assert_eq!(sampler.choose_among(&logits, History::default(), []), None);
        }
    }

    #[test]
    fn sampling_survives_nan_and_infinity() {
        let warm = || {
            Sampler::new(Sampling {
                top_p: 0.9,
                top_k: 2,
                ..warm()
            })
            .unwrap()
        };
        assert_eq!(warm().choose(&[NAN, 1.0, LOW]), Some(1));
        assert_eq!(warm().choose(&[0.0, f32::INFINITY]), Some(1));
        assert_eq!(warm().choose(&[LOW, LOW]), Some(0));
        assert_eq!(warm().choose(&[NAN]), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_choices_and_another_seed_others() {
        let logits = spread(500);
        let options = [
            warm(),
            Sampling { top_k: 40, ..warm() },
            Sampling { top_p: 0.9, ..warm() },
            Sampling {
                temperature: 0.7,
                top_k: 40,
                top_p: 0.95,
                min_p: 0.05,
                ..warm()
            },
        ];
        for options in options {
            let first = choices(options.clone(), &logits, 50);
            assert_eq!(first, choices(options.clone(), &logits, 50));
            assert_ne!(first, choices(Sampling { seed: 8, ..options }, &logits, 50));
        }
        // Written down once: a change here is a change of every user's seeded text.
        assert_eq!(
            choices(warm(), &[1.0, 2.0, 3.0, 2.5, 0.5], 12),
            [1, 1, 3, 3, 2, 2, 1, 3, 2, 4, 1, 2]
        );
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let logits = [0.0f32, 1.0, 2.0].map(|p: f32| (p + 1.0).ln());
        let chosen = choices(warm(), &logits, 60_000);
        for (token, expected) in [(0, 1.0 / 6.0), (1, 2.0 / 6.0), (2, 3.0 / 6.0)] {
            let part = chosen.iter().filter(|&&t| t == token).count() as f64 / 60_000.0;
            assert!((part - expected).abs() < 0.01, "{token}: {part}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        // Probabilities 0.4, 0.3, 0.2, 0.1 for tokens 3, 1, 0, 2.
        let logits = [0.2f32, 0.3, 0.1, 0.4].map(f32::ln);
        for (options, kept) in [
            (warm(), &[0, 1, 2, 3][..]),
            (Sampling { top_k: 2, ..warm() }, &[1, 3]),
            (Sampling { top_k: 9, ..warm() }, &[0, 1, 2, 3]),
            (
                Sampling {
                    top_p: 0.35,
                    ..warm()
                },
                &[3],
            ),
            (
                Sampling {
                    top_p: 0.65,
                    ..warm()
                },
                &[1, 3],
            ),
            (
                Sampling {
                    top_p: 0.85,
                    ..warm()
                },
                &[0, 1, 3],
            ),
            (
                // Surprises 0.92, 1.20, 1.61, 2.30 around a mean of 1.28.
                Sampling {
                    typical_p: 0.25,
                    ..warm()
                },
                &[1],
            ),
            (
                Sampling {
                    typical_p: 0.6,
                    ..warm()
                },
                &[0, 1, 3],
            ),
            (Sampling { min_p: 0.6, ..warm() }, &[1, 3]),
            (Sampling { min_p: 1.0, ..warm() }, &[3]),
            (
                Sampling {
                    temperature: 0.01,
                    ..warm()
                },
                &[3],
            ),
            (
                Sampling {
                    top_k: 3,
                    top_p: 0.7,
                    ..warm()
                },
                &[1, 3],
            ),
        ] {
            let mut chosen = choices(options.clone(), &logits, 400);
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen, kept, "{options:?}");
        }
    }

    #[test]
    fn penalties_and_bias_change_what_is_best() {
        let logits = [2.0, 1.9, -1.0, 1.0];
        let text = [0, 2, 1, 1];
        let (prompt, plain) = (2, Sampling::default);
        for (options, expected) in [
            (plain(), 0),
            // Token 0 is in the prompt: 2.0 / 1.5; token 1: 1.9 / 1.5.
            (
                Sampling {
                    repetition_penalty: 2.0,
                    ..plain()
                },
                0,
            ),
            (
                Sampling {
                    repetition_penalty: 2.1,
                    ..plain()
                },
                3,
            ),
            (
                Sampling {
                    repetition_penalty: 2.1,
                    penalty_tokens: 2,
                    ..plain()
                },
                0,
            ),
            // Of the generated tokens there is 1 alone, twice.
            (
                Sampling {
                    presence_penalty: -0.2,
                    ..plain()
                },
                1,
            ),
            (
                Sampling {
                    frequency_penalty: -0.06,
                    ..plain()
                },
                1,
            ),
            (
                Sampling {
                    frequency_penalty: -0.04,
                    ..plain()
                },
                0,
            ),
            (
                Sampling {
                    logit_bias: vec![(0, LOW), (3, 0.5), (99, 5.0)],
                    ..plain()
                },
                1,
            ),
            (
                Sampling {
                    logit_bias: vec![(2, 5.0)],
                    ..plain()
                },
                2,
            ),
        ] {
            let mut sampler = Sampler::new(options.clone()).unwrap();
            let chosen = sampler.choose_after(&logits, History::new(&text, prompt));
            assert_eq!(chosen, Some(expected), "{options:?}");
        }
    }

    #[test]
    fn top_p_looks_past_its_first_candidates() {
        let flat = vec![0.0f32; 5000];
        let mut sampler = Sampler::new(Sampling { top_p: 0.5, ..warm() }).unwrap();
        sampler.choose(&flat).unwrap();
        assert_eq!(sampler.candidates.len(), 2500);
        assert!(
            sampler.candidates.iter().all(|c| c.token < 2500),
            "of equals the lower ids are kept"
        );
    }

    #[test]
    fn no_buffer_grows_after_the_first_token() {
        let mut sampler = Sampler::new(Sampling { top_p: 0.9, ..warm() }).unwrap();
        sampler.choose(&vec![0.0; 3000]).unwrap();
        let (place, capacity) = (sampler.candidates.as_ptr(), sampler.candidates.capacity());
        for _ in 0..10 {
            sampler.choose(&spread(3000)).unwrap();
        }
        assert_eq!(
            (sampler.candidates.as_ptr(), sampler.candidates.capacity()),
            (place, capacity)
        );
    }

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        for (options, name) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..warm()
                },
                "temperature is -1",
            ),
            (
                Sampling {
                    temperature: NAN,
                    ..warm()
                },
                "temperature is NaN",
            ),
            (
                Sampling {
                    typical_p: 0.0,
                    ..warm()
                },
                "typical_p is 0",
            ),
            (
                Sampling {
                    repetition_penalty: 0.0,
                    ..warm()
                },
                "repetition_penalty is 0",
            ),
            (
                Sampling {
                    frequency_penalty: NAN,
                    ..warm()
                },
                "frequency_penalty is NaN",
            ),
            (
                Sampling {
                    logit_bias: vec![(1, NAN)],
                    ..warm()
                },
                "logit_bias is NaN",
            ),
            (Sampling { top_p: 0.0, ..warm() }, "top_p is 0"),
            (Sampling { top_p: 1.5, ..warm() }, "top_p is 1.5"),
            (
                Sampling {
                    min_p: -0.1,
                    ..warm()
                },
                "min_p is -0.1",
            ),
        ] {
            let error = Sampler::new(options).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
