//! One conversation: what was said, what the model has computed of it, and the loop that continues it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Error;
use crate::model::{LanguageModel, Prediction};
use crate::sampling::{History, Logprobs, Sampler, Sampling};
use crate::saved::Saved;
use crate::stops::Stops;
use crate::tokenizer::{TextStream, Tokenizer};

/// A model, its tokenizer and the tokens of one conversation.
///
/// Each prompt is the whole conversation so far. What the session has computed before and the new prompt begins with
/// is not computed again.
pub struct Session {
    model: Box<dyn LanguageModel>,
    tokenizer: Arc<Tokenizer>,
    end_tokens: Arc<[u32]>,
    tokens: Vec<u32>,
    cached: usize,
}

/// How a text is continued.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to generate, an end token included.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// End at these tokens too.
    pub stop_tokens: Vec<u32>,
    /// End before these strings, wherever tokens cut them.
    pub stop_strings: Vec<String>,
    /// Give log probabilities with each token, and those of this many of the best ones.
    pub logprobs: Option<usize>,
    /// Go on past the model's own end tokens, for measurements.
    pub ignore_end: bool,
}

impl Default for GenerateOptions {
    /// 256 tokens at most, the best token always.
    fn default() -> Self {
        GenerateOptions {
            max_tokens: 256,
            sampling: Sampling::default(),
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            logprobs: None,
            ignore_end: false,
        }
    }
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its id.
    pub token: u32,
    /// The text that became certain with it: empty for end tokens, while a character is incomplete and while the text may
    /// become a stop string.
    pub text: String,
    /// How probable the model thought it, when that was asked for.
    pub logprobs: Option<Logprobs>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model gave an end token, or a stop string.
    Stop,
    /// The number of tokens asked for is reached.
    Length,
    /// The model's context is full.
    Context,
    /// The caller ended it.
    Cancelled,
}

impl FinishReason {
    /// `stop`, `length`, `context` or `cancelled`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Context => "context",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Time spent, without that of whoever takes the pieces.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timings {
    /// From the start to the first token, in milliseconds.
    pub prefill_ms: f64,
    /// From the first token to the last, in milliseconds.
    pub decode_ms: f64,
    /// Tokens after the first.
    pub decode_tokens: usize,
}

impl Timings {
    /// Tokens a second after the first token; 0 when there was one only.
    pub fn decode_tokens_per_s(&self) -> f64 {
        if self.decode_ms > 0.0 {
            self.decode_tokens as f64 * 1000.0 / self.decode_ms
        } else {
            0.0
        }
    }
}

/// A finished text.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that an earlier prompt had computed.
    pub reused_tokens: usize,
    /// The generated ids, the end token included.
    pub tokens: Vec<u32>,
    /// Their text, special tokens left out.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// What one step of a generation did.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A batch of the prompt was computed: `done` of `total` tokens.
    Prefilled {
        /// Tokens computed.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// A token was generated.
    Token(Piece),
    /// There is no more.
    Finished(FinishReason),
}

impl Session {
    /// A conversation without tokens. `end_tokens` are those the model ends an answer with.
    pub fn new(model: Box<dyn LanguageModel>, tokenizer: Arc<Tokenizer>, end_tokens: Arc<[u32]>) -> Self {
        Session {
            model,
            tokenizer,
            end_tokens,
            tokens: Vec::new(),
            cached: 0,
        }
    }

    /// Continues `prompt`, the ids of the whole conversation so far. Nothing is computed until the generation is asked
    /// for its first token.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::PromptTooLong`], [`Error::TokenOutside`] for prompts the model cannot take;
    /// [`Error::Option`] and [`Error::NoLogits`] for sampling it cannot do.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<Generation<'_>, Error> {
        let sampler = self.check(prompt, options)?;
        let same = self.tokens[..self.cached]
            .iter()
            .zip(prompt)
            .take_while(|(a, b)| a == b)
            .count();
        // The last token is always decoded: its prediction is what the text continues with.
        self.cached = same.min(prompt.len() - 1);
        self.tokens.clear();
        self.tokens.extend_from_slice(prompt);
        let reused_tokens = self.cached;
        let finished = (options.max_tokens == 0).then_some(FinishReason::Length);
        Ok(Generation {
            session: self,
            options: options.clone(),
            sampler,
            stream: TextStream::default(),
            stops: Stops::new(&options.stop_strings),
            prompt_tokens: prompt.len(),
            reused_tokens,
            generated: Vec::new(),
            text: String::new(),
            finished,
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
        })
    }

    /// Continues `prompt` and gives every piece to `on_piece`, which may end it.
    ///
    /// # Errors
    /// As [`Session::generate`], and what the engine says.
    pub fn generate_with(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_piece: impl FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        let mut generation = self.generate(prompt, options)?;
        while let Some(piece) = generation.next() {
            if on_piece(&piece?).is_break() {
                generation.cancel();
            }
        }
        Ok(generation.completion())
    }

    /// Every token of the conversation: the last prompt and what was generated after it, without an end token.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of them the model has computed.
    pub fn cached_tokens(&self) -> usize {
        self.cached
    }

    /// Most tokens the conversation may have.
    pub fn context_tokens(&self) -> usize {
        self.model.context_tokens()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.tokens.clear();
        self.cached = 0;
    }

    /// Writes the conversation and what was computed of it to `path`; `model` says which model it belongs to, for instance by
    /// [`Bundle::fingerprint`](crate::Bundle::fingerprint). A file of that name is replaced when the new one is whole.
    ///
    /// # Errors
    /// [`Error::Session`] when it cannot be written, and what the engine says when its state cannot be read.
    pub fn save(&self, path: impl AsRef<Path>, model: &str) -> Result<(), Error> {
        self.save_with(path.as_ref(), model, BTreeMap::new())
    }

    /// As [`Session::save`], with more in the file.
    pub(crate) fn save_with(
        &self,
        path: &Path,
        model: &str,
        extra: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let saved = Saved {
            tokens: self.tokens.clone(),
            cached: self.cached,
            buffers: self.model.snapshot()?,
            extra,
        };
        saved.write(path, model)
    }

    /// Takes up a conversation that [`Session::save`] wrote, in the place of this one's.
    ///
    /// # Errors
    /// [`Error::Session`] when the file cannot be read, is no conversation or belongs to another model; this conversation is
    /// then as it was. What the engine says of buffers that do not fit; this conversation is then empty.
    pub fn load(&mut self, path: impl AsRef<Path>, model: &str) -> Result<(), Error> {
        self.load_with(path.as_ref(), model).map(|_| ())
    }

    /// As [`Session::load`], with what else is in the file.
    pub(crate) fn load_with(&mut self, path: &Path, model: &str) -> Result<BTreeMap<String, String>, Error> {
        let saved = Saved::read(path, model)?;
        self.reset();
        self.model.restore(&saved.buffers)?;
        self.tokens = saved.tokens;
        self.cached = saved.cached;
        Ok(saved.extra)
    }

    /// A second conversation that starts with this one's tokens; weights are shared.
    ///
    /// # Errors
    /// What the engine says when it cannot copy its state.
    pub fn fork(&self) -> Result<Self, Error> {
        Ok(Session {
            model: self.model.fork()?,
            tokenizer: Arc::clone(&self.tokenizer),
            end_tokens: Arc::clone(&self.end_tokens),
            tokens: self.tokens.clone(),
            cached: self.cached,
        })
    }

    fn check(&self, prompt: &[u32], options: &GenerateOptions) -> Result<Sampler, Error> {
        let (context, vocabulary) = (self.model.context_tokens(), self.model.vocabulary());
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if prompt.len() > context {
            return Err(Error::PromptTooLong {
                tokens: prompt.len(),
                context,
            });
        }
        let outside = |token: u32| usize::try_from(token).map_or(true, |token| token >= vocabulary);
        if let Some((index, &token)) = prompt.iter().enumerate().find(|(_, token)| outside(**token)) {
            return Err(Error::TokenOutside {
                index,
                token,
                vocabulary,
            });
        }
        let needs_logits = !options.sampling.needs_no_logits() || options.logprobs.is_some();
        if needs_logits && !self.model.gives_logits() {
            return Err(Error::NoLogits);
        }
        if options.stop_strings.iter().any(String::is_empty) {
            return Err(Error::Option {
                option: "stop_strings",
                value: "an empty string".to_string(),
                allowed: "one character or more each",
            });
        }
        Sampler::new(options.sampling.clone())
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("context_tokens", &self.context_tokens())
            .field("tokens", &self.tokens.len())
            .field("cached", &self.cached)
            .finish()
    }
}

/// A text while it is generated: an iterator of pieces, or a machine of [steps](Generation::step).
///
/// Dropping it leaves the session whole, at the last token that came.
#[derive(Debug)]
pub struct Generation<'s> {
    session: &'s mut Session,
    options: GenerateOptions,
    sampler: Sampler,
    stream: TextStream,
    stops: Stops,
    prompt_tokens: usize,
    reused_tokens: usize,
    generated: Vec<u32>,
    text: String,
    finished: Option<FinishReason>,
    prefill: Duration,
    decode: Duration,
}

impl Generation<'_> {
    /// Does one thing: a batch of the prompt or one token. A server that goes round its conversations step by step is
    /// fair to all of them.
    ///
    /// # Errors
    /// What the engine says; [`Error::AllNan`] when a model's logits are.
    pub fn step(&mut self) -> Result<Step, Error> {
        if let Some(reason) = self.finished {
            return Ok(Step::Finished(reason));
        }
        let first = self.generated.is_empty();
        let start = Instant::now();
        let step = if self.unfilled() > 0 {
            self.prefill_batch()
        } else {
            self.token().map(Step::Token)
        };
        let spent = start.elapsed();
        *(if first {
            &mut self.prefill
        } else {
            &mut self.decode
        }) += spent;
        step
    }

    /// Computes the prompt up to its last token; `progress` gets the tokens done and those of the prompt.
    ///
    /// # Errors
    /// What the engine says.
    pub fn prefill(&mut self, mut progress: impl FnMut(usize, usize)) -> Result<(), Error> {
        self.prefill_while(|done, total| {
            progress(done, total);
            true
        })
    }

    /// As [`Generation::prefill`], and ends the text when `go_on` says so after a batch.
    ///
    /// # Errors
    /// What the engine says.
    pub fn prefill_while(&mut self, mut go_on: impl FnMut(usize, usize) -> bool) -> Result<(), Error> {
        while self.finished.is_none() && self.unfilled() > 0 {
            let step = self.step()?;
            if let Step::Prefilled { done, total } = step
                && !go_on(done, total)
            {
                self.cancel();
            }
        }
        Ok(())
    }

    /// Ends the text here.
    pub fn cancel(&mut self) {
        self.finished.get_or_insert(FinishReason::Cancelled);
    }

    /// The text so far. Its reason is `Cancelled` unless it has ended by itself.
    pub fn completion(mut self) -> Completion {
        // A cancelled text may end in what was held back for a stop string.
        let held = self.stops.flush();
        self.text.push_str(&held);
        Completion {
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused_tokens,
            finish_reason: self.finished.unwrap_or(FinishReason::Cancelled),
            timings: Timings {
                prefill_ms: self.prefill.as_secs_f64() * 1000.0,
                decode_ms: self.decode.as_secs_f64() * 1000.0,
                decode_tokens: self.generated.len().saturating_sub(1),
            },
            tokens: self.generated,
            text: self.text,
        }
    }

    /// Tokens before the last that the model has not computed.
    fn unfilled(&self) -> usize {
        self.session.tokens.len() - 1 - self.session.cached
    }

    fn prefill_batch(&mut self) -> Result<Step, Error> {
        let Session {
            model,
            tokens,
            cached,
            ..
        } = &mut *self.session;
        *cached = model.prefill(&tokens[..tokens.len() - 1], *cached)?;
        Ok(Step::Prefilled {
            done: *cached,
            total: tokens.len(),
        })
    }

    fn token(&mut self) -> Result<Piece, Error> {
        let Session {
            model,
            tokens,
            cached,
            ..
        } = &mut *self.session;
        let position = tokens.len() - 1;
        let mut logprobs = None;
        let history = History::new(tokens, self.prompt_tokens);
        let token = match model.decode(tokens)? {
            Prediction::Token(token) => token,
            Prediction::Logits(logits) => {
                let chosen = self.sampler.choose_after(logits, history);
                let token = chosen.ok_or(Error::AllNan {
                    position,
                    vocabulary: logits.len(),
                })?;
                logprobs = self
                    .options
                    .logprobs
                    .map(|count| Logprobs::of(logits, token, count));
                token
            }
        };
        *cached = tokens.len();
        self.generated.push(token);
        let ends = self.session.end_tokens.contains(&token) && !self.options.ignore_end;
        let stops = ends || self.options.stop_tokens.contains(&token);
        if !stops {
            self.session.tokens.push(token);
        }
        self.finished = if stops {
            Some(FinishReason::Stop)
        } else if self.generated.len() >= self.options.max_tokens {
            Some(FinishReason::Length)
        } else if self.session.tokens.len() > self.session.model.context_tokens() {
            Some(FinishReason::Context)
        } else {
            None
        };
        let text = self.text_of(token, stops)?;
        let (mut text, stopped) = self.stops.push(text);
        if stopped {
            self.finished = Some(FinishReason::Stop);
        } else if self.finished.is_some() {
            text.push_str(&self.stops.flush());
        }
        self.text.push_str(&text);
        Ok(Piece {
            token,
            text,
            logprobs,
        })
    }

    fn text_of(&mut self, token: u32, stops: bool) -> Result<String, Error> {
        let tokenizer = &self.session.tokenizer;
        let mut text = if stops {
            String::new()
        } else {
            self.stream.push(tokenizer, token)?
        };
        if self.finished.is_some() {
            text.push_str(&self.stream.flush(tokenizer)?);
        }
        Ok(text)
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.step() {
                Ok(Step::Prefilled { .. }) => {}
                Ok(Step::Token(piece)) => return Some(Ok(piece)),
                Ok(Step::Finished(_)) => return None,
                Err(error) => {
                    self.finished = Some(FinishReason::Cancelled);
                    return Some(Err(error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anemll::toy::{Calls, Toy, VOCABULARY};
    use crate::tokenizer::tests::bytes_tokenizer;
    use candle_core::Tensor;

    const END: u32 = 259;

    fn session(toy: &Toy) -> (Session, Calls) {
        let (model, calls) = toy.model();
        (
            Session::new(Box::new(model), Arc::new(bytes_tokenizer()), vec![END].into()),
            calls,
        )
    }

    fn prompt(tokens: usize) -> Vec<u32> {
        (0..tokens)
            .map(|i| (i as u32 * 13 + 5) % VOCABULARY as u32)
            .collect()
    }

    fn at_most(max_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_tokens,
            ignore_end: true,
            ..GenerateOptions::default()
        }
    }

    fn run(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Completion {
        session
            .generate_with(prompt, options, |_| ControlFlow::Continue(()))
            .unwrap()
    }

    /// A model that says what it is told to, whatever it is asked.
    struct Script {
        says: Vec<u32>,
        from: usize,
    }

    impl LanguageModel for Script {
        fn context_tokens(&self) -> usize {
            64
        }

        fn vocabulary(&self) -> usize {
            VOCABULARY
        }

        fn gives_logits(&self) -> bool {
            false
        }

        fn prefill(&mut self, tokens: &[u32], _cached: usize) -> Result<usize, Error> {
            Ok(tokens.len())
        }

        fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
            Ok(Prediction::Token(self.says[tokens.len() - self.from]))
        }

        fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
            Ok(Vec::new())
        }

        fn restore(&mut self, _buffers: &[(String, Tensor)]) -> Result<(), Error> {
            Ok(())
        }

        fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
            Ok(Box::new(Script {
                says: self.says.clone(),
                from: self.from,
            }))
        }
    }

    fn script(says: &[u32]) -> Session {
        let model = Script {
            says: says.to_vec(),
            from: 1,
        };
        Session::new(Box::new(model), Arc::new(bytes_tokenizer()), vec![END].into())
    }

    #[test]
    fn a_saved_conversation_goes_on_where_it_was_and_with_its_model_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk.session");
        let (mut first, _) = session(&Toy::default());
        run(&mut first, &prompt(70), &at_most(5));
        let known = first.cached_tokens();
        first.save(&path, "a model").unwrap();
        let longer = [first.tokens(), &[7, 8, 9]].concat();
        let expected = run(&mut first, &longer, &at_most(6));
        let (mut second, calls) = session(&Toy::default());
        second.load(&path, "a model").unwrap();
        assert_eq!((second.tokens().len(), second.cached_tokens()), (75, known));
        let before = calls.lock().unwrap().len();
        let done = run(&mut second, &longer, &at_most(6));
        assert_eq!((done.tokens, done.reused_tokens), (expected.tokens, known));
        assert!(calls.lock().unwrap().len() > before);
        let words = second.load(&path, "another").unwrap_err().to_string();
        assert!(
            words.contains("it belongs to the model a model, this one is another"),
            "{words}"
        );
        assert_eq!(second.tokens().len(), longer.len() + 6, "as it was");
        let whole = std::fs::read(&path).unwrap();
        for length in [0, 1, 8, 40, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(
                matches!(second.load(&path, "a model"), Err(Error::Session { .. })),
                "{length}"
            );
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it_and_is_never_shown() {
        let says: Vec<u32> = "story\n\nUser: no".bytes().map(u32::from).collect();
        for (stop, text, tokens, reason) in [
            ("\n\nUser:", "story", 12, FinishReason::Stop),
            ("ry", "sto", 5, FinishReason::Stop),
            ("never", "story\n\nUser: n", 14, FinishReason::Length),
        ] {
            let options = GenerateOptions {
                stop_strings: vec![stop.to_string()],
                ..at_most(14)
            };
            let mut shown = String::new();
            let mut session = script(&says);
            let done = session
                .generate_with(&[1], &options, |piece| {
                    shown.push_str(&piece.text);
                    assert!(!shown.contains(stop) && text.starts_with(&shown), "{shown:?}");
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert_eq!((done.text.as_str(), shown.as_str()), (text, text), "{stop:?}");
            assert_eq!(
                (done.tokens.len(), done.finish_reason),
                (tokens, reason),
                "{stop:?}"
            );
        }
        let empty = GenerateOptions {
            stop_strings: vec![String::new()],
            ..at_most(1)
        };
        let error = script(&says).generate(&[1], &empty).unwrap_err().to_string();
        assert!(error.starts_with("stop_strings"), "{error}");
    }

    #[test]
    fn log_probabilities_are_of_the_models_own_logits() {
        let (mut session, _) = session(&Toy::default());
        let options = GenerateOptions {
            logprobs: Some(3),
            sampling: Sampling {
                temperature: 0.1,
                ..Sampling::default()
            },
            ..at_most(4)
        };
        let mut pieces = 0;
        let each = |piece: &Piece| {
            let logprobs = piece.logprobs.as_ref().unwrap();
            assert_eq!(logprobs.best.len(), 3);
            assert!(logprobs.best[0].1 >= logprobs.chosen && logprobs.chosen <= 0.0);
            let own = logprobs.best.iter().find(|(t, _)| *t == piece.token);
            assert!(own.is_none_or(|(_, p)| *p == logprobs.chosen));
            pieces += 1;
            ControlFlow::Continue(())
        };
        session.generate_with(&prompt(3), &options, each).unwrap();
        assert_eq!(pieces, 4);
        assert!(matches!(
            script(&[1]).generate(&[1], &options),
            Err(Error::NoLogits)
        ));
    }

    #[test]
    fn prompts_of_every_length_continue_as_they_do_token_by_token() {
        let slow = Toy {
            batched_prefill: false,
            ..Toy::default()
        };
        for tokens in [1, 2, 63, 64, 65, 128, 129, 255, 256] {
            let (mut batched, _) = session(&Toy::default());
            let (mut single, _) = session(&slow);
            let fast = run(&mut batched, &prompt(tokens), &at_most(8));
            assert_eq!(
                fast.tokens,
                run(&mut single, &prompt(tokens), &at_most(8)).tokens,
                "{tokens} tokens"
            );
            let room = 256 + 1 - tokens;
            assert_eq!(fast.tokens.len(), room.min(8), "{tokens} tokens");
            let reason = if room < 8 {
                FinishReason::Context
            } else {
                FinishReason::Length
            };
            assert_eq!(fast.finish_reason, reason, "{tokens} tokens");
        }
    }

    #[test]
    fn prompts_the_model_cannot_take_are_refused() {
        let (mut session, calls) = session(&Toy::default());
        for (prompt, expected) in [
            (
                prompt(257),
                "the prompt has 257 tokens, the model's context holds 256",
            ),
            (vec![], "the prompt is empty; at least one token is needed"),
            (
                vec![1, 300],
                "token 1 of the prompt is 300, the vocabulary has 300 tokens",
            ),
        ] {
            let error = session.generate(&prompt, &at_most(1)).unwrap_err().to_string();
            assert_eq!(error, expected);
        }
        assert!(calls.lock().unwrap().is_empty());
    }

    #[test]
    fn a_prompt_that_begins_like_the_last_computes_its_rest_only() {
        let (mut session, calls) = session(&Toy::default());
        let first = run(&mut session, &prompt(100), &at_most(10));
        assert_eq!(session.cached_tokens(), 109);
        let longer = [session.tokens(), &prompt(20)].concat();
        calls.lock().unwrap().clear();
        let second = run(&mut session, &longer, &at_most(3));
        assert_eq!((first.reused_tokens, second.reused_tokens), (0, 109));
        let batches = calls
            .lock()
            .unwrap()
            .iter()
            .filter(|c| c.function == "prefill" && c.part == "chunk0")
            .count();
        assert_eq!(batches, 1);
        let (mut fresh, _) = self::session(&Toy::default());
        assert_eq!(second.tokens, run(&mut fresh, &longer, &at_most(3)).tokens);

        let other = [&prompt(50)[..], &[9, 9]].concat();
        let third = run(&mut session, &other, &at_most(3));
        assert_eq!(third.reused_tokens, 50);
        fresh.reset();
        assert_eq!(third.tokens, run(&mut fresh, &other, &at_most(3)).tokens);
        let again = run(&mut session, &other, &at_most(3));
        assert_eq!((again.reused_tokens, again.tokens), (51, third.tokens));
    }

    #[test]
    fn it_stops_at_end_tokens_and_leaves_them_out_of_text_and_history() {
        for (options, expected, reason) in [
            (
                GenerateOptions::default(),
                vec![104, 105, END],
                FinishReason::Stop,
            ),
            (
                GenerateOptions {
                    stop_tokens: vec![105],
                    ..Default::default()
                },
                vec![104, 105],
                FinishReason::Stop,
            ),
            (
                GenerateOptions {
                    max_tokens: 2,
                    ..Default::default()
                },
                vec![104, 105],
                FinishReason::Length,
            ),
            (at_most(4), vec![104, 105, END, 106], FinishReason::Length),
            (at_most(0), vec![], FinishReason::Length),
        ] {
            let mut session = script(&[104, 105, END, 106, 107]);
            let done = run(&mut session, &[1], &options);
            assert_eq!(
                (&done.tokens, done.finish_reason),
                (&expected, reason),
                "{options:?}"
            );
            let text: String = expected
                .iter()
                .filter(|&&t| t < 256)
                .map(|&t| char::from(t as u8))
                .collect();
            let cut = if options.stop_tokens.is_empty() {
                text.len()
            } else {
                1
            };
            assert_eq!(done.text, text[..cut], "{options:?}");
            assert_eq!(
                session.tokens().contains(&END),
                options.ignore_end && options.max_tokens > 2
            );
        }
    }

    #[test]
    fn characters_come_whole_and_what_is_left_comes_last() {
        let face = [0xF0, 0x9F, 0x98, 0x80];
        let mut session = script(&[&face[..], &[END]].concat());
        let pieces: Vec<Piece> = session
            .generate(&[1], &Default::default())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let texts: Vec<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
        assert_eq!(texts, ["", "", "", "😀", ""]);
        let cut = run(&mut script(&face[..2]), &[1], &at_most(2));
        assert_eq!(cut.text, "\u{FFFD}");
    }

    #[test]
    fn steps_iterator_and_callback_agree() {
        let toy = Toy::default();
        let (mut session, _) = session(&toy);
        let by_callback = run(&mut session, &prompt(130), &at_most(6));
        session.reset();
        let mut pieces = session.generate(&prompt(130), &at_most(6)).unwrap();
        let by_iterator: Vec<u32> = pieces.by_ref().map(|piece| piece.unwrap().token).collect();
        assert_eq!(by_iterator, by_callback.tokens);
        assert_eq!(pieces.completion().text, by_callback.text);
        session.reset();
        let mut generation = session.generate(&prompt(130), &at_most(1)).unwrap();
        let mut steps = Vec::new();
        while !matches!(steps.last(), Some(Step::Finished(_))) {
            steps.push(generation.step().unwrap());
        }
        assert_eq!(steps[0], Step::Prefilled { done: 64, total: 130 });
        assert_eq!(
            steps[1],
            Step::Prefilled {
                done: 128,
                total: 130
            }
        );
        assert_eq!(
            steps[2],
            Step::Prefilled {
                done: 129,
                total: 130
            }
        );
        assert!(matches!(&steps[3], Step::Token(piece) if piece.token == by_callback.tokens[0]));
        assert_eq!(steps[4..], [Step::Finished(FinishReason::Length)]);
        session.reset();
        let mut generation = session.generate(&prompt(130), &at_most(1)).unwrap();
        generation.prefill_while(|done, _| done < 100).unwrap();
        assert_eq!(
            generation.step().unwrap(),
            Step::Finished(FinishReason::Cancelled)
        );
        assert_eq!(session.cached_tokens(), 128);
    }

    #[test]
    fn cancelling_keeps_what_came() {
        let (mut session, _) = session(&Toy::default());
        let mut left = 3;
        let done = session
            .generate_with(&prompt(5), &at_most(50), |_| {
                left -= 1;
                if left == 0 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .unwrap();
        assert_eq!(
            (done.tokens.len(), done.finish_reason),
            (3, FinishReason::Cancelled)
        );
        assert_eq!((session.tokens().len(), session.cached_tokens()), (8, 7));
    }

    #[test]
    fn seeds_decide_sampled_texts() {
        let sampled = |seed| {
            let sampling = Sampling {
                temperature: 2.0,
                top_k: 20,
                seed,
                ..Sampling::default()
            };
            let (mut session, _) = session(&Toy::default());
            run(
                &mut session,
                &prompt(9),
                &GenerateOptions {
                    sampling,
                    ..at_most(20)
                },
            )
            .tokens
        };
        assert_eq!(sampled(1), sampled(1));
        assert_ne!(sampled(1), sampled(2));
        let (mut greedy_only, _) = session(&Toy {
            argmax: true,
            ..Toy::default()
        });
        let sampling = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let refused = greedy_only.generate(
            &prompt(3),
            &GenerateOptions {
                sampling,
                ..at_most(1)
            },
        );
        assert!(matches!(refused, Err(Error::NoLogits)));
    }

    #[test]
    fn a_fork_continues_alike_and_apart() {
        let (mut session, calls) = session(&Toy::default());
        run(&mut session, &prompt(90), &at_most(1));
        let mut fork = session.fork().unwrap();
        calls.lock().unwrap().clear();
        let left = run(&mut session, &[&prompt(90)[..], &[1]].concat(), &at_most(4));
        let right = run(&mut fork, &[&prompt(90)[..], &[2]].concat(), &at_most(4));
        assert_eq!((left.reused_tokens, right.reused_tokens), (90, 90));
        assert!(calls.lock().unwrap().iter().all(|call| call.function == "infer"));
        let (mut fresh, _) = self::session(&Toy::default());
        assert_eq!(
            right.tokens,
            run(&mut fresh, &[&prompt(90)[..], &[2]].concat(), &at_most(4)).tokens
        );
    }

    #[test]
    fn timings_count_tokens_after_the_first() {
        let (mut session, _) = session(&Toy::default());
        let done = run(&mut session, &prompt(5), &at_most(4));
        assert_eq!(done.timings.decode_tokens, 3);
        assert!(done.timings.prefill_ms > 0.0 && done.timings.decode_tokens_per_s() > 0.0);
        let single = run(&mut session, &prompt(5), &at_most(1));
        assert_eq!(single.timings.decode_tokens_per_s(), 0.0);
    }
}
