//! How probable the model thought a token.

/// Natural logarithms of probabilities, before temperature, penalties and filters.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The most probable tokens, best first, and theirs.
    pub best: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of `token` and of the `count` most probable ones; NaN counts as impossible.
    pub(crate) fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let parts = logits.iter().filter(|l| !l.is_nan());
        let total: f64 = parts.map(|l| libm::exp(f64::from(l - most))).sum();
        let norm = f64::from(most) + libm::log(total);
        let of = |logit: f32| (f64::from(logit) - norm) as f32;
        let mut order: Vec<u32> = (0u32..)
            .zip(logits)
            .filter(|(_, l)| !l.is_nan())
            .map(|(t, _)| t)
            .collect();
        let logit = |t: u32| {
            usize::try_from(t)
                .ok()
                .and_then(|t| logits.get(t))
                .copied()
                .unwrap_or(f32::NAN)
        };
        let best_first = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
        let count = count.min(order.len());
        if count > 0 && count < order.len() {
            order.select_nth_unstable_by(count - 1, best_first);
        }
        order.truncate(count);
        order.sort_unstable_by(best_first);
        Logprobs {
            chosen: of(logit(token)),
            best: order.into_iter().map(|t| (t, of(logit(t)))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [0.2f32, 0.3, 0.1, 0.4].map(|p| p.ln() + 3.0);
        let found = Logprobs::of(&logits, 2, 2);
        assert!((found.chosen - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(found.best.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [3, 1]);
        assert!((found.best[0].1 - 0.4f32.ln()).abs() < 1e-6);
        assert_eq!(Logprobs::of(&logits, 0, 0).best, []);
        assert_eq!(Logprobs::of(&logits, 0, 9).best.len(), 4);
    }
}
