//! What a generation gives: steps, pieces, and the finished text.

use crate::sampling::Logprobs;
use crate::tools::ToolCall;

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its id.
    pub token: u32,
    /// The text that became certain with it: empty for end tokens, while a character is incomplete and while the text may
    /// become a stop string.
    pub text: String,
    /// The thinking that became certain with it, where [`GenerateOptions::format`](crate::GenerateOptions::format) marks it.
    pub thinking: String,
    /// The calls of tools that became whole with it, likewise.
    pub tool_calls: Vec<ToolCall>,
    /// How probable the model thought it, when that was asked for.
    pub logprobs: Option<Logprobs>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model gave an end token or a stop string, or the grammar ends here.
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
    /// The part of `decode_ms` that the packages' own predictions took; 0 for models that are none of this crate's.
    pub decode_predict_ms: f64,
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

    /// Microseconds a token after the first that went outside the packages' own predictions: their inputs and outputs, the choice,
    /// the text; 0 when there was one token only.
    pub fn overhead_us_per_token(&self) -> f64 {
        if self.decode_tokens == 0 {
            return 0.0;
        }
        (self.decode_ms - self.decode_predict_ms) * 1000.0 / self.decode_tokens as f64
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
    /// Their text, special tokens left out; the answer alone where thinking and calls are told apart.
    pub text: String,
    /// The thinking before it.
    pub thinking: String,
    /// The calls of tools in it.
    pub tool_calls: Vec<ToolCall>,
    /// With a grammar: whether the text is whole. False when it was cut short, by the number of tokens for instance.
    pub fits_grammar: Option<bool>,
    /// Tokens dropped from the start of the conversation because the context was full.
    pub dropped_tokens: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// What one step of a generation did.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A batch of the prompt, or of tokens that a grammar left no choice about, was computed: `done` of `total` tokens.
    Prefilled {
        /// Tokens computed.
        done: usize,
        /// Tokens so far.
        total: usize,
    },
    /// The context was full: the oldest tokens after those to keep were dropped. What stays is computed again by the steps that
    /// follow.
    Shifted {
        /// Tokens dropped.
        dropped: usize,
        /// Tokens left.
        left: usize,
    },
    /// A token was generated.
    Token(Piece),
    /// There is no more.
    Finished(FinishReason),
}
