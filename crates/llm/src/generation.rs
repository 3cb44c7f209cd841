//! The loop that continues a conversation: prefill, decode, choose, tell the parts apart.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::Error;
use crate::answer::{Parts, Splitter};
use crate::completion::{Completion, FinishReason, Piece, Step, Timings};
use crate::grammar::Constraint;
use crate::model::Prediction;
use crate::options::{ContextFull, GenerateOptions};
use crate::part::predict_time;
use crate::sampling::{History, Logprobs, Sampler};
use crate::session::Session;
use crate::stops::Stops;
use crate::tokenizer::TextStream;
use crate::tools::ToolCall;

/// A text while it is generated: an iterator of pieces, or a machine of [steps](Generation::step).
///
/// Dropping it leaves the session whole, at the last token that came.
#[derive(Debug)]
pub struct Generation<'s> {
    session: &'s mut Session,
    options: GenerateOptions,
    sampler: Sampler,
    constraint: Option<Constraint>,
    /// Tokens that the grammar leaves no choice about; they are computed in batches with what comes after them.
    forced: VecDeque<u32>,
    /// Special tokens that mark parts of the answer.
    marks: Vec<u32>,
    stream: TextStream,
    splitter: Splitter,
    stops: Stops,
    prompt_tokens: usize,
    reused_tokens: usize,
    dropped_tokens: usize,
    /// Where in the session's tokens the generated ones begin.
    boundary: usize,
    generated: Vec<u32>,
    text: String,
    thinking: String,
    tool_calls: Vec<ToolCall>,
    /// A stop string was found: what follows it is nobody's.
    cut: bool,
    finished: Option<FinishReason>,
    prefill: Duration,
    decode: Duration,
    /// The part of `decode` that predictions took.
    predict: Duration,
}

impl<'s> Generation<'s> {
    /// Continues the tokens of `session`, which are a prompt of `prompt_tokens` less `dropped_tokens`.
    pub(crate) fn new(
        session: &'s mut Session,
        options: GenerateOptions,
        sampler: Sampler,
        prompt_tokens: usize,
        dropped_tokens: usize,
    ) -> Result<Self, Error> {
        let tokenizer = &session.tokenizer;
        let grammar = options.grammar.as_ref();
        let constraint = grammar
            .map(|grammar| Constraint::new(grammar, tokenizer))
            .transpose()?;
        let special = |mark: &str| tokenizer.id(mark).filter(|id| tokenizer.is_special(*id));
        Ok(Generation {
            constraint,
            forced: VecDeque::new(),
            marks: options.format.marks().filter_map(special).collect(),
            stream: TextStream::default(),
            splitter: Splitter::new(options.format.clone()),
            stops: Stops::new(&options.stop_strings),
            prompt_tokens,
            reused_tokens: session.cached,
            dropped_tokens,
            boundary: session.tokens.len(),
            generated: Vec::new(),
            text: String::new(),
            thinking: String::new(),
            tool_calls: Vec::new(),
            cut: false,
            finished: (options.max_tokens == 0).then_some(FinishReason::Length),
            prefill: Duration::ZERO,
            decode: Duration::ZERO,
            predict: Duration::ZERO,
            session,
            options,
            sampler,
        })
    }

    /// Does one thing: a batch of the prompt, one token, or making room in a full context. A server that goes round its conversations step by step is
    /// fair to all of them.
    ///
    /// # Errors
    /// What the engine says; [`Error::AllNan`] when a model's logits are; [`Error::Grammar`] when a grammar becomes more than can be
    /// followed.
    pub fn step(&mut self) -> Result<Step, Error> {
        if let Some(reason) = self.finished {
            return Ok(Step::Finished(reason));
        }
        let first = self.generated.is_empty();
        let (start, predicted) = (Instant::now(), predict_time());
        let step = if self.session.tokens.len() > self.session.context_tokens() {
            Ok(self.shift())
        } else if self.reads() {
            self.prefill_batch()
        } else {
            self.token()
        };
        let spent = start.elapsed();
        if first {
            self.prefill += spent;
        } else {
            self.decode += spent;
            self.predict += predict_time().saturating_sub(predicted);
        }
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
        while self.finished.is_none() && self.reads() {
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

    /// True while the answer is inside thinking.
    pub fn is_thinking(&self) -> bool {
        self.splitter.is_thinking()
    }

    /// The text so far. Its reason is `Cancelled` unless it has ended by itself.
    pub fn completion(mut self) -> Completion {
        // A cancelled text may end in what was held back for a mark or a stop string.
        if !self.cut {
            let rest = self.splitter.finish();
            let _ = self.add(rest, true);
        }
        let whole = |constraint: &mut Constraint| !self.cut && constraint.may_end();
        Completion {
            prompt_tokens: self.prompt_tokens,
            reused_tokens: self.reused_tokens,
            dropped_tokens: self.dropped_tokens,
            fits_grammar: self.constraint.as_mut().map(whole),
            finish_reason: self.finished.unwrap_or(FinishReason::Cancelled),
            timings: Timings {
                prefill_ms: self.prefill.as_secs_f64() * 1000.0,
                decode_ms: self.decode.as_secs_f64() * 1000.0,
                decode_tokens: self.generated.len().saturating_sub(1),
                decode_predict_ms: self.predict.as_secs_f64() * 1000.0,
            },
            tokens: self.generated,
            text: self.text,
            thinking: self.thinking,
            tool_calls: self.tool_calls,
        }
    }

    /// Tokens before the last that the model has not computed.
    fn unfilled(&self) -> usize {
        self.session.tokens.len() - 1 - self.session.cached
    }

    /// True when the next step computes a batch: of the prompt, or of tokens that were certain.
    fn reads(&self) -> bool {
        self.forced.is_empty() && self.unfilled() > 0
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

    /// Makes room in a full context.
    fn shift(&mut self) -> Step {
        let ContextFull::Shift(shift) = &mut self.options.context_full else {
            self.finished = Some(FinishReason::Context);
            return Step::Finished(FinishReason::Context);
        };
        let keep = shift.keep;
        let dropped = shift.apply(&mut self.session.tokens);
        self.session.cached = self.session.cached.min(keep);
        self.boundary = if self.boundary >= keep + dropped {
            self.boundary - dropped
        } else {
            self.boundary.min(keep)
        };
        self.dropped_tokens += dropped;
        Step::Shifted {
            dropped,
            left: self.session.tokens.len(),
        }
    }

    fn token(&mut self) -> Result<Step, Error> {
        let (token, logprobs) = match self.next_forced() {
            Some(token) => (token, None),
            None => {
                let Some(chosen) = self.choose()? else {
                    self.finished = Some(FinishReason::Stop);
                    return Ok(Step::Finished(FinishReason::Stop));
                };
                self.session.cached = self.session.tokens.len();
                chosen
            }
        };
        self.generated.push(token);
        let ends = self.session.end_tokens.contains(&token) && !self.options.ignore_end;
        let stops = ends || self.options.stop_tokens.contains(&token);
        let mut whole = false;
        if !stops {
            self.session.tokens.push(token);
            if let Some(constraint) = self.active_constraint() {
                constraint.take(token)?;
                whole = constraint.is_done();
            }
        }
        self.finished = if stops || whole {
            Some(FinishReason::Stop)
        } else if self.generated.len() >= self.options.max_tokens {
            Some(FinishReason::Length)
        } else if self.options.context_full == ContextFull::Stop
            && self.session.tokens.len() > self.session.context_tokens()
        {
            Some(FinishReason::Context)
        } else {
            None
        };
        let mut piece = self.piece(token, stops)?;
        piece.logprobs = logprobs;
        Ok(Step::Token(piece))
    }

    /// The next token that the grammar leaves no choice about. Where probabilities are asked for all tokens are chosen.
    fn next_forced(&mut self) -> Option<u32> {
        if self.forced.is_empty() && self.options.logprobs.is_none() {
            let forced = self.active_constraint().map(Constraint::forced);
            self.forced.extend(forced.unwrap_or_default());
        }
        self.forced.pop_front()
    }

    /// The grammar, once it is its turn.
    fn active_constraint(&mut self) -> Option<&mut Constraint> {
        self.constraint.as_mut().filter(|_| !self.splitter.is_thinking())
    }

    /// Decodes the last token and chooses the next one; `None` where a grammar leaves none.
    fn choose(&mut self) -> Result<Option<(u32, Option<Logprobs>)>, Error> {
        let thinking = self.splitter.is_thinking();
        let Session {
            model,
            tokens,
            end_tokens,
            ..
        } = &mut *self.session;
        let ends: &[u32] = if self.options.ignore_end { &[] } else { end_tokens };
        let allowed = match self.constraint.as_mut().filter(|_| !thinking) {
            None => None,
            Some(constraint) => {
                let ends = if constraint.may_end() { ends } else { &[] };
                let allowed = constraint.allowed()?;
                if ends.is_empty() && allowed.ids().next().is_none() {
                    return Ok(None);
                }
                Some((allowed, ends))
            }
        };
        let position = tokens.len() - 1;
        let history = History::new(tokens, self.boundary);
        match model.decode(tokens)? {
            Prediction::Token(token) => Ok(Some((token, None))),
            Prediction::Logits(logits) => {
                let chosen = match &allowed {
                    None => self.sampler.choose_after(logits, history),
                    Some((allowed, ends)) => {
                        let allowed = allowed.ids().chain(ends.iter().copied());
                        self.sampler.choose_among(logits, history, allowed)
                    }
                };
                let token = chosen.ok_or(Error::AllNan {
                    position,
                    vocabulary: logits.len(),
                })?;
                let count = self.options.logprobs;
                Ok(Some((
                    token,
                    count.map(|count| Logprobs::of(logits, token, count)),
                )))
            }
        }
    }

    /// What became certain with a token.
    fn piece(&mut self, token: u32, stops: bool) -> Result<Piece, Error> {
        let was_thinking = self.splitter.is_thinking();
        let text = self.text_of(token, stops)?;
        let mut parts = self.splitter.push(&text);
        if was_thinking && !self.splitter.is_thinking() {
            self.begin_answer(&parts.text)?;
        }
        if self.finished.is_some() {
            let rest = self.splitter.finish();
            parts.text.push_str(&rest.text);
            parts.thinking.push_str(&rest.thinking);
            parts.calls.extend(rest.calls);
        }
        let parts = self.add(parts, self.finished.is_some());
        Ok(Piece {
            token,
            text: parts.text,
            thinking: parts.thinking,
            tool_calls: parts.calls,
            logprobs: None,
        })
    }

    /// Gives the grammar what the token that ended the thinking had of the answer.
    fn begin_answer(&mut self, text: &str) -> Result<(), Error> {
        let Some(constraint) = &mut self.constraint else {
            return Ok(());
        };
        let ids = self.session.tokenizer.encode(text)?;
        if !constraint.take_all(&ids)? {
            let reason = format!("{text:?} came with the end of the thinking and does not fit");
            return Err(Error::Grammar(reason));
        }
        Ok(())
    }

    /// Adds parts of the answer to the whole and gives what of them is shown: no stop string and nothing after it.
    fn add(&mut self, mut parts: Parts, last: bool) -> Parts {
        let (mut text, stopped) = self.stops.push(parts.text);
        if stopped {
            self.finished = Some(FinishReason::Stop);
            self.cut = true;
        } else if last {
            text.push_str(&self.stops.flush());
        }
        self.text.push_str(&text);
        self.thinking.push_str(&parts.thinking);
        self.tool_calls.extend(parts.calls.iter().cloned());
        parts.text = text;
        parts
    }

    fn text_of(&mut self, token: u32, stops: bool) -> Result<String, Error> {
        let tokenizer = &self.session.tokenizer;
        let mut text = if stops {
            String::new()
        } else {
            self.stream.push(tokenizer, token)?
        };
        if !stops && self.marks.contains(&token) {
            text.push_str(&tokenizer.decode(&[token], true)?);
        }
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
                Ok(Step::Prefilled { .. } | Step::Shifted { .. }) => {}
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
