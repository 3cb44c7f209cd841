//! What the text so far means for the next token.

use std::collections::BTreeMap;

use super::Sampling;

/// The text so far: the prompt and what was generated after it.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    tokens: &'a [u32],
    prompt: usize,
}

impl<'a> History<'a> {
    /// `tokens` of which the first `prompt` were given.
    pub fn new(tokens: &'a [u32], prompt: usize) -> Self {
        History {
            tokens,
            prompt: prompt.min(tokens.len()),
        }
    }

    /// Takes the penalties of `options` from `logits`.
    pub(super) fn penalise(self, options: &Sampling, logits: &mut [f32]) {
        let from = match options.penalty_tokens {
            0 => 0,
            back => self.tokens.len().saturating_sub(back),
        };
        // How often each token was generated; 0 for those of the prompt alone.
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for (index, &token) in self.tokens.iter().enumerate().skip(from) {
            *counts.entry(token).or_default() += u32::from(index >= self.prompt);
        }
        for (token, count) in counts {
            let Some(logit) = usize::try_from(token).ok().and_then(|t| logits.get_mut(t)) else {
                continue;
            };
            if *logit > 0.0 {
                *logit /= options.repetition_penalty;
            } else {
                *logit *= options.repetition_penalty;
            }
            if count > 0 {
                *logit -= options.presence_penalty + options.frequency_penalty * count as f32;
            }
        }
    }
}
