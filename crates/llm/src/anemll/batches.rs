//! Which tokens the next prefill call computes.

/// One call of the prefill function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Position of its first row.
    pub(crate) start: usize,
    /// Rows that are tokens; the rest of the batch is padding.
    pub(crate) tokens: usize,
}

impl Batch {
    /// The batch that follows `cached` tokens of a prompt of `total`, at most `rows` at once, in a cache of `slots`.
    ///
    /// A full batch is computed wherever it starts. One that would reach past the last slot starts earlier instead: the
    /// rows before `cached` are computed a second time, to the same values. A cache smaller than a batch takes none.
    pub(crate) fn next(cached: usize, total: usize, rows: usize, slots: usize) -> Option<Self> {
        let latest = slots.checked_sub(rows)?;
        let start = cached.min(latest);
        let end = total.min(start + rows);
        (end > cached).then_some(Batch {
            start,
            tokens: end - start,
        })
    }

    /// The first position it does not compute.
    pub(crate) fn end(self) -> usize {
        self.start + self.tokens
    }
}

/// What a call costs beside its rows, in rows: weights are read and threads are started for it.
const CALL: usize = 12;

/// The rows of the next call, of several sizes there are, for a prompt of which `tokens` are left: those that make all calls together the
/// cheapest.
pub(crate) fn size_for(tokens: usize, sizes: impl Iterator<Item = usize> + Clone) -> Option<usize> {
    let largest_first = |size: &usize| std::cmp::Reverse(*size);
    sizes
        .clone()
        .min_by_key(|size| (cost(tokens, *size, &sizes), largest_first(size)))
}

/// What `tokens` cost that begin with calls of `size` rows, as many as they fill.
fn cost(tokens: usize, size: usize, sizes: &(impl Iterator<Item = usize> + Clone)) -> usize {
    let (calls, rest) = (tokens / size.max(1), tokens % size.max(1));
    match (calls, rest) {
        (0, _) => size + CALL,
        (_, 0) => calls * (size + CALL),
        // What is left is less than this size, so that this ends.
        _ => {
            let rest = sizes.clone().map(|other| cost(rest, other, sizes)).min();
            calls * (size + CALL) + rest.unwrap_or(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_takes_calls_of_the_sizes_that_suit_it() {
        let calls = |mut tokens: usize| {
            let mut all = Vec::new();
            while tokens > 0 {
                let size = size_for(tokens, [32, 64, 256].into_iter()).unwrap();
                all.push(size);
                tokens = tokens.saturating_sub(size);
            }
            all
        };
        for (tokens, expected) in [
            (1, &[32][..]),
            (32, &[32]),
            (33, &[64]),
            (64, &[64]),
            (70, &[64, 32]),
            (100, &[64, 64]),
            (128, &[64, 64]),
            (200, &[256]),
            (256, &[256]),
            (300, &[256, 64]),
            (512, &[256, 256]),
        ] {
            assert_eq!(calls(tokens), expected, "{tokens}");
        }
        assert_eq!(size_for(10, [64].into_iter()), Some(64));
        assert_eq!(size_for(10, std::iter::empty()), None);
    }

    fn batches(mut cached: usize, total: usize, rows: usize, slots: usize) -> Vec<(usize, usize)> {
        let mut all = Vec::new();
        while let Some(batch) = Batch::next(cached, total, rows, slots) {
            assert!(batch.start <= cached && batch.end() > cached && batch.start + rows <= slots);
            all.push((batch.start, batch.tokens));
            cached = batch.end();
        }
        assert!(cached == total || slots < rows, "{cached} of {total}");
        all
    }

    #[test]
    fn batches_cover_the_prompt_and_stay_inside_the_cache() {
        for (cached, total, expected) in [
            (0, 0, &[][..]),
            (0, 1, &[(0, 1)]),
            (0, 64, &[(0, 64)]),
            (0, 65, &[(0, 64), (64, 1)]),
            (0, 128, &[(0, 64), (64, 64)]),
            (10, 80, &[(10, 64), (74, 6)]),
            (480, 500, &[(448, 52)]),
            (448, 512, &[(448, 64)]),
            (400, 512, &[(400, 64), (448, 64)]),
            (511, 512, &[(448, 64)]),
        ] {
            assert_eq!(batches(cached, total, 64, 512), expected, "{cached}..{total}");
        }
        for total in 0..=200 {
            for cached in 0..=total {
                batches(cached, total, 64, 200);
            }
        }
        assert_eq!(batches(0, 10, 64, 32), []);
    }
}
