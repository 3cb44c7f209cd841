//! One conversation: what was said, and what the model has computed of it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::completion::{Completion, Piece, Step};
use crate::generation::Generation;
use crate::model::LanguageModel;
use crate::options::{ContextFull, GenerateOptions};
use crate::sampling::Sampler;
use crate::saved::Saved;
use crate::tokenizer::Tokenizer;

/// A model, its tokenizer and the tokens of one conversation.
///
/// Each prompt is the whole conversation so far. What the session has computed before and the new prompt begins with
/// is not computed again.
pub struct Session {
    pub(crate) model: Box<dyn LanguageModel>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) end_tokens: Arc<[u32]>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) cached: usize,
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
    /// [`Error::Option`] and [`Error::NoLogits`] for sampling it cannot do; [`Error::Grammar`] for grammars that cannot be read.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<Generation<'_>, Error> {
        let sampler = self.check(prompt, options)?;
        let given_tokens = prompt.len();
        let mut options = options.clone();
        let mut prompt = prompt.to_vec();
        let dropped_tokens = self.fit(&mut prompt, &mut options)?;
        let same = self.tokens[..self.cached]
            .iter()
            .zip(&prompt)
            .take_while(|(a, b)| a == b)
            .count();
        // The last token is always decoded: its prediction is what the text continues with.
        self.cached = same.min(prompt.len() - 1);
        self.tokens = prompt;
        Generation::new(self, options, sampler, given_tokens, dropped_tokens)
    }

    /// Drops the oldest tokens of a prompt that does not fit, where that is wanted, and gives how many.
    fn fit(&self, prompt: &mut Vec<u32>, options: &mut GenerateOptions) -> Result<usize, Error> {
        let context = self.model.context_tokens();
        let mut dropped = 0;
        if let ContextFull::Shift(shift) = &mut options.context_full {
            if shift.keep + 2 > context {
                return Err(Error::Option {
                    option: "keep",
                    value: shift.keep.to_string(),
                    allowed: "up to the model's context less 2 tokens",
                });
            }
            while prompt.len() > context {
                dropped += shift.apply(prompt);
            }
        }
        if prompt.len() > context {
            let tokens = prompt.len();
            return Err(Error::PromptTooLong { tokens, context });
        }
        Ok(dropped)
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
        self.generate_in_steps(prompt, options, |step| match step {
            Step::Token(piece) => on_piece(piece),
            _ => ControlFlow::Continue(()),
        })
    }

    /// As [`Session::generate_with`], with every step: batches of the prompt and what was dropped from a full context too.
    ///
    /// # Errors
    /// As [`Session::generate_with`].
    pub fn generate_in_steps(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        let mut generation = self.generate(prompt, options)?;
        loop {
            match generation.step()? {
                Step::Finished(_) => return Ok(generation.completion()),
                step if on_step(&step).is_break() => generation.cancel(),
                _ => {}
            }
        }
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
        let vocabulary = self.model.vocabulary();
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let outside = |token: u32| usize::try_from(token).map_or(true, |token| token >= vocabulary);
        if let Some((index, &token)) = prompt.iter().enumerate().find(|(_, token)| outside(**token)) {
            return Err(Error::TokenOutside {
                index,
                token,
                vocabulary,
            });
        }
        let needs_logits =
            !options.sampling.needs_no_logits() || options.logprobs.is_some() || options.grammar.is_some();
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

#[cfg(test)]
mod tests;
