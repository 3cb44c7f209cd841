//! How a text is continued: length, choice, ends, form, and what a full context means.

use crate::answer::AnswerFormat;
use crate::grammar::Grammar;
use crate::sampling::Sampling;

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
    /// What the text must be; thinking that the prompt has opened comes before it and is free.
    pub grammar: Option<Grammar>,
    /// How thinking and calls of tools are marked, from [`ChatTemplate::prompt`](crate::ChatTemplate::prompt).
    pub format: AnswerFormat,
    /// What happens when the model's context is full.
    pub context_full: ContextFull,
}

/// What happens when a conversation does not fit the model's context.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ContextFull {
    /// The text ends, by [`FinishReason::Context`](crate::FinishReason::Context); a prompt that does not fit is refused.
    #[default]
    Stop,
    /// The oldest tokens are dropped and the text goes on. What stays is computed again at its new place, from its tokens.
    Shift(Shift),
}

/// What is dropped from a full context: the oldest half of what comes after the tokens that are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shift {
    /// Tokens at the start that stay: a system turn.
    pub keep: usize,
    /// Places in the prompt, ascending, before which it is good to cut: the starts of turns. The first one at or after the half is taken,
    /// or the last one before it.
    pub cuts: Vec<usize>,
}

impl Shift {
    /// Drops the oldest part of `tokens` and gives how many those were, one at least. Everything before `keep` stays, and so does the
    /// last token.
    pub(crate) fn apply(&mut self, tokens: &mut Vec<u32>) -> usize {
        let keep = self.keep.min(tokens.len().saturating_sub(2));
        let rest = tokens.len() - keep;
        let half = keep + rest.div_ceil(2);
        // A cut that drops little would have most of the context computed again for little room.
        let least = keep + rest.div_ceil(8);
        let usable = |at: &&usize| (least..tokens.len()).contains(*at);
        let after = self.cuts.iter().filter(usable).find(|at| **at >= half);
        let at = after.or_else(|| self.cuts.iter().rfind(usable));
        let end = at.copied().unwrap_or(half).clamp(keep + 1, tokens.len() - 1);
        tokens.drain(keep..end);
        let dropped = end - keep;
        self.cuts = self
            .cuts
            .iter()
            .filter(|at| **at > end)
            .map(|at| at - dropped)
            .collect();
        dropped
    }
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
            grammar: None,
            format: AnswerFormat::default(),
            context_full: ContextFull::Stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_drops_the_oldest_half_or_up_to_a_turn() {
        let mut failures = Vec::new();
        for (keep, cuts, expected_dropped, expected_cuts) in [
            (0, vec![], 50, vec![]),
            (10, vec![], 45, vec![]),
            (10, vec![30, 60, 80], 50, vec![30]),
            (10, vec![30, 40], 30, vec![]),
            // A cut right behind what is kept gains nothing.
            (10, vec![12], 45, vec![]),
            (99, vec![], 1, vec![]),
            (500, vec![], 1, vec![]),
        ] {
            let mut tokens: Vec<u32> = (0..100).collect();
            let mut shift = Shift {
                keep,
                cuts: cuts.clone(),
            };
            let dropped = shift.apply(&mut tokens);
            let kept = keep.min(98);
            let whole = tokens.len() + dropped == 100
                && tokens[..kept].iter().copied().eq(0..u32::try_from(kept).unwrap())
                && tokens.last() == Some(&99);
            if (dropped, &shift.cuts) != (expected_dropped, &expected_cuts) || !whole {
                failures.push(format!(
                    "keep {keep}, cuts {cuts:?}: {dropped}, {:?}, {whole}",
                    shift.cuts
                ));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}
