//! What the text loop asks of a model.

use candle_core::Tensor;

use crate::Error;

/// A language model with one conversation's memory.
///
/// The loop keeps the token ids; the model keeps what it computed from them. Both calls get the whole conversation, so
/// that a layout which computes its window anew every time fits too. `tokens[..cached]` are those the model has
/// computed and may rely on; what it holds for later positions is void.
///
/// The law: any mixture of [`prefill`](LanguageModel::prefill) and [`decode`](LanguageModel::decode) over the same
/// tokens gives the same prediction, up to rounding.
pub trait LanguageModel: Send {
    /// Most tokens a conversation may have.
    fn context_tokens(&self) -> usize;

    /// Number of token ids; ids are below it.
    fn vocabulary(&self) -> usize;

    /// False for models that choose the best token themselves.
    fn gives_logits(&self) -> bool;

    /// Computes tokens from `cached` on, one batch of them, and returns how many are computed now: more than
    /// `cached`, at most `tokens.len()`.
    ///
    /// # Errors
    /// What the engine says; the memory is then good for `tokens[..cached]` still.
    fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error>;

    /// Computes the last of `tokens`, all others being computed, and predicts the one after it.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error>;

    /// The same weights with a copy of the memory, for a second conversation that starts alike.
    ///
    /// # Errors
    /// What the engine says when it cannot copy its state.
    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error>;

    /// The memory as named buffers, as exact as the engine keeps them.
    ///
    /// # Errors
    /// What the engine says when it cannot read its state.
    fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error>;

    /// Replaces the memory by that of a [`snapshot`](LanguageModel::snapshot) of the same model.
    ///
    /// # Errors
    /// What the engine says of buffers that do not fit; the memory is then void.
    fn restore(&mut self, buffers: &[(String, Tensor)]) -> Result<(), Error>;
}

/// What a model predicts for the next token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Prediction<'a> {
    /// One logit for each token id.
    Logits(&'a [f32]),
    /// The best token, chosen in the model.
    Token(u32),
}
