//! How many texts of how many tokens a package takes in one prediction.

use candle_coreml::{ArrayDescription, Flexibility};

/// Texts computed together where the package sets no bound: more gain nothing and take more memory.
const MOST_ROWS: usize = 32;

/// The sizes of an encoder's inputs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sizes {
    /// 1 for inputs [tokens], 2 for [texts, tokens].
    rank: usize,
    allowed: Allowed,
}

#[derive(Debug, Clone, PartialEq)]
enum Allowed {
    /// These numbers of rows and tokens; never empty.
    Exactly(Vec<(usize, usize)>),
    /// From and to, inclusive, of rows and of tokens.
    Within {
        rows: (usize, usize),
        tokens: (usize, usize),
    },
}

impl Sizes {
    /// The sizes one input takes; `Err` says what is wrong with its shape.
    pub(super) fn of(input: &ArrayDescription) -> Result<Self, String> {
        let pair = |shape: &[usize]| match *shape {
            [tokens] => Some((1, tokens)),
            [rows, tokens] => Some((rows, tokens)),
            _ => None,
        };
        let wrong = |shape: &dyn std::fmt::Debug| {
            format!("has shape {shape:?}, allowed: [texts, tokens] or [tokens]")
        };
        let (rank, allowed) = match &input.flexibility {
            Flexibility::Fixed if input.shape.is_empty() => {
                let any = (1, usize::MAX);
                let allowed = Allowed::Within {
                    rows: any,
                    tokens: any,
                };
                (2, allowed)
            }
            Flexibility::Fixed => {
                let size = pair(&input.shape).ok_or_else(|| wrong(&input.shape))?;
                (input.shape.len(), Allowed::Exactly(vec![size]))
            }
            Flexibility::Enumerated(shapes) => {
                let sizes = shapes.iter().map(|s| pair(s).ok_or_else(|| wrong(s)));
                let rank = shapes.first().map_or(0, Vec::len);
                (rank, Allowed::Exactly(sizes.collect::<Result<_, _>>()?))
            }
            Flexibility::Ranges(ranges) => {
                let bound = |&(low, high): &(usize, Option<usize>)| (low.max(1), high.unwrap_or(usize::MAX));
                let (rows, tokens) = match ranges.as_slice() {
                    [tokens] => ((1, 1), bound(tokens)),
                    [rows, tokens] => (bound(rows), bound(tokens)),
                    _ => return Err(wrong(ranges)),
                };
                (ranges.len(), Allowed::Within { rows, tokens })
            }
        };
        let sizes = Sizes { rank, allowed };
        sizes.some().ok_or_else(|| wrong(&input.shape))
    }

    /// The sizes that both take, `None` when there are none.
    pub(super) fn both(&self, other: &Sizes) -> Option<Sizes> {
        if self.rank != other.rank {
            return None;
        }
        let meet = |a: (usize, usize), b: (usize, usize)| (a.0.max(b.0), a.1.min(b.1));
        let allowed = match (&self.allowed, &other.allowed) {
            (Allowed::Exactly(sizes), _) => {
                Allowed::Exactly(sizes.iter().copied().filter(|&s| other.takes(s)).collect())
            }
            (_, Allowed::Exactly(sizes)) => {
                Allowed::Exactly(sizes.iter().copied().filter(|&s| self.takes(s)).collect())
            }
            (Allowed::Within { rows, tokens }, Allowed::Within { rows: r, tokens: t }) => Allowed::Within {
                rows: meet(*rows, *r),
                tokens: meet(*tokens, *t),
            },
        };
        let rank = self.rank;
        Sizes { rank, allowed }.some()
    }

    fn some(self) -> Option<Self> {
        let some = match &self.allowed {
            Allowed::Exactly(sizes) => !sizes.is_empty() && sizes.iter().all(|s| s.0 > 0 && s.1 > 0),
            Allowed::Within { rows, tokens } => rows.0 <= rows.1 && tokens.0 <= tokens.1,
        };
        some.then_some(self)
    }

    fn takes(&self, (rows, tokens): (usize, usize)) -> bool {
        match &self.allowed {
            Allowed::Exactly(sizes) => sizes.contains(&(rows, tokens)),
            Allowed::Within { rows: r, tokens: t } => {
                (r.0..=r.1).contains(&rows) && (t.0..=t.1).contains(&tokens)
            }
        }
    }

    /// The longest text, `usize::MAX` where the package sets no bound.
    pub(super) fn most_tokens(&self) -> usize {
        match &self.allowed {
            Allowed::Exactly(sizes) => sizes.iter().map(|s| s.1).max().unwrap_or(0),
            Allowed::Within { tokens, .. } => tokens.1,
        }
    }

    /// Rows and tokens of the prediction for `texts`, the longest of which has `longest` tokens: as few tokens as
    /// possible, then as many of the texts as possible, then as few empty rows as possible.
    pub(super) fn choose(&self, texts: usize, longest: usize) -> (usize, usize) {
        match &self.allowed {
            Allowed::Within { rows, tokens } => {
                let most = rows.1.min(MOST_ROWS.max(rows.0));
                (texts.clamp(rows.0, most), longest.max(tokens.0))
            }
            Allowed::Exactly(sizes) => {
                let fits = sizes.iter().copied().filter(|s| s.1 >= longest);
                let best = fits.min_by_key(|&(r, n)| (n, texts.saturating_sub(r), r));
                best.unwrap_or((1, longest))
            }
        }
    }

    /// The shape of the inputs.
    pub(super) fn shape(&self, rows: usize, tokens: usize) -> Vec<usize> {
        match self.rank {
            1 => vec![tokens],
            _ => vec![rows, tokens],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_coreml::ElementType;

    fn input(shape: &[usize], flexibility: Flexibility) -> ArrayDescription {
        ArrayDescription {
            dtype: ElementType::Int32,
            shape: shape.to_vec(),
            flexibility,
            default_value: None,
        }
    }

    #[test]
    fn a_prediction_is_no_longer_than_it_must_be() {
        let enumerated = Flexibility::Enumerated(vec![vec![1, 8], vec![4, 8], vec![1, 16], vec![8, 16]]);
        let ranges = Flexibility::Ranges(vec![(1, Some(4)), (2, Some(64))]);
        let rows = [
            (input(&[1, 16], Flexibility::Fixed), 5, 3, (1, 16)),
            (input(&[16], Flexibility::Fixed), 5, 3, (1, 16)),
            (input(&[1, 8], enumerated.clone()), 1, 8, (1, 8)),
            (input(&[1, 8], enumerated.clone()), 2, 5, (4, 8)),
            (input(&[1, 8], enumerated.clone()), 9, 5, (4, 8)),
            (input(&[1, 8], enumerated), 2, 9, (8, 16)),
            (input(&[1, 2], ranges.clone()), 9, 5, (4, 5)),
            (input(&[1, 2], ranges.clone()), 2, 1, (2, 2)),
            (input(&[1, 2], ranges), 1, 64, (1, 64)),
            (input(&[], Flexibility::Fixed), 100, 7, (32, 7)),
        ];
        let mut failures = Vec::new();
        for (input, texts, longest, expected) in rows {
            let found = Sizes::of(&input).unwrap().choose(texts, longest);
            if found != expected {
                failures.push(format!(
                    "{texts} of {longest} in {input:?}: {found:?}, expected {expected:?}"
                ));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn inputs_agree_on_sizes_or_are_refused() {
        let fixed = Sizes::of(&input(&[1, 16], Flexibility::Fixed)).unwrap();
        let ranges = |high| {
            let ranges = Flexibility::Ranges(vec![(1, Some(1)), (4, high)]);
            Sizes::of(&input(&[1, 4], ranges)).unwrap()
        };
        assert_eq!(fixed.both(&ranges(None)), Some(fixed.clone()));
        assert_eq!(fixed.both(&ranges(Some(8))), None);
        assert_eq!(ranges(Some(8)).both(&ranges(None)).unwrap().most_tokens(), 8);
        assert_eq!(
            fixed.both(&Sizes::of(&input(&[16], Flexibility::Fixed)).unwrap()),
            None
        );
        let wrong = Sizes::of(&input(&[1, 1, 16], Flexibility::Fixed)).unwrap_err();
        assert!(wrong.contains("[1, 1, 16]"), "{wrong}");
    }
}
