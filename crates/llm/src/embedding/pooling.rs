//! How the vectors of tokens become the vector of a text, and how vectors compare.

use std::str::FromStr;

/// How a text's vector is made of those of its tokens; padding never counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// The mean over the tokens.
    Mean,
    /// The first token's, `[CLS]` of BERT.
    Cls,
    /// The last token's.
    Last,
    /// The largest of each component.
    Max,
    /// The sum divided by the square root of the number of tokens.
    MeanSqrtLength,
    /// The mean with weights 1, 2, 3 and so on.
    WeightedMean,
    /// The package's `pooler_output`: the first token's through a layer of its own.
    Pooler,
}

impl Pooling {
    /// All, in the order of their names in messages.
    pub const ALL: [Pooling; 7] = [
        Pooling::Mean,
        Pooling::Cls,
        Pooling::Last,
        Pooling::Max,
        Pooling::MeanSqrtLength,
        Pooling::WeightedMean,
        Pooling::Pooler,
    ];

    /// The word for it, which [`str::parse`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Cls => "cls",
            Pooling::Last => "last",
            Pooling::Max => "max",
            Pooling::MeanSqrtLength => "mean-sqrt-length",
            Pooling::WeightedMean => "weighted-mean",
            Pooling::Pooler => "pooler",
        }
    }

    /// The vector of the tokens in `rows`, each as wide as the others; sums are kept in 64 bits. Empty for no tokens.
    pub(super) fn pool(self, rows: &[Vec<f32>]) -> Vec<f32> {
        let count = rows.len() as f64;
        match self {
            Pooling::Cls | Pooling::Pooler => rows.first().cloned().unwrap_or_default(),
            Pooling::Last => rows.last().cloned().unwrap_or_default(),
            Pooling::Max => {
                let mut rows = rows.iter();
                let first = rows.next().cloned().unwrap_or_default();
                rows.fold(first, |most, row| {
                    most.iter().zip(row).map(|(&a, &b)| a.max(b)).collect()
                })
            }
            Pooling::Mean => weighted(rows, |_| 1.0, count),
            Pooling::MeanSqrtLength => weighted(rows, |_| 1.0, count.sqrt()),
            Pooling::WeightedMean => weighted(rows, |i| i as f64 + 1.0, count * (count + 1.0) / 2.0),
        }
    }
}

impl std::fmt::Display for Pooling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Pooling {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Pooling::ALL.into_iter().find(|p| p.name() == text);
        found.ok_or_else(|| format!("{text:?} is no pooling; allowed: {}", names()))
    }
}

/// The names of all poolings, for messages.
pub(super) fn names() -> String {
    Pooling::ALL.map(Pooling::name).join(", ")
}

fn weighted(rows: &[Vec<f32>], weight: impl Fn(usize) -> f64, divisor: f64) -> Vec<f32> {
    let mut sums = vec![0f64; rows.first().map_or(0, Vec::len)];
    for (i, row) in rows.iter().enumerate() {
        let weight = weight(i);
        sums.iter_mut()
            .zip(row)
            .for_each(|(s, &v)| *s += weight * f64::from(v));
    }
    sums.iter().map(|s| (s / divisor) as f32).collect()
}

/// Scales a vector to length 1; a vector of zeros stays as it is.
pub(super) fn normalize(vector: &mut [f32]) {
    let length = dot(vector, vector).sqrt();
    if length > 0.0 {
        vector
            .iter_mut()
            .for_each(|v| *v = (f64::from(*v) / length) as f32);
    }
}

/// The cosine of the angle between two vectors, from -1 to 1; 0 when one of them is all zeros. Components beyond the
/// shorter vector's do not count.
pub fn cosine_similarity(a: &[f32], b: &[f32]) -> f32 {
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths == 0.0 {
        return 0.0;
    }
    (dot(a, b) / lengths) as f32
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pooling_gives_what_its_name_says() {
        let rows = [vec![1.0, -2.0], vec![3.0, 0.0], vec![5.0, 8.0], vec![-1.0, 2.0]];
        let expected = [
            (Pooling::Mean, [2.0, 2.0]),
            (Pooling::Cls, [1.0, -2.0]),
            (Pooling::Last, [-1.0, 2.0]),
            (Pooling::Max, [5.0, 8.0]),
            (Pooling::MeanSqrtLength, [4.0, 4.0]),
            (Pooling::WeightedMean, [1.8, 3.0]),
            (Pooling::Pooler, [1.0, -2.0]),
        ];
        for (pooling, expected) in expected {
            assert_eq!(pooling.pool(&rows), expected, "{pooling}");
            assert_eq!(pooling.name().parse(), Ok(pooling));
        }
        assert!(
            "median"
                .parse::<Pooling>()
                .unwrap_err()
                .contains("mean-sqrt-length")
        );
    }

    #[test]
    fn vectors_compare_by_their_angle() {
        let mut a = vec![3.0, 4.0];
        assert_eq!(cosine_similarity(&a, &[6.0, 8.0]), 1.0);
        assert_eq!(cosine_similarity(&a, &[-3.0, -4.0]), -1.0);
        assert_eq!(cosine_similarity(&a, &[4.0, -3.0]), 0.0);
        assert_eq!(cosine_similarity(&a, &[0.0, 0.0]), 0.0);
        normalize(&mut a);
        assert_eq!(a, [0.6, 0.8]);
        let mut zeros = [0.0f32; 2];
        normalize(&mut zeros);
        assert_eq!(zeros, [0.0; 2]);
    }
}
