//! The best palette of numbers on a line, exactly: k-means in one dimension by dynamic programming.
//!
//! Clusters of sorted numbers are intervals, and the best first split of a prefix moves right as the prefix grows, so each
//! layer of the table is filled by divide and conquer (Grønlund and others, "Fast Exact k-Means, k-Medians and Bregman
//! Divergence Clustering in 1D", 2017). Equal inputs give equal palettes on every machine.

use half::f16;

/// Numbers above this many are counted in a table of all 65,536 patterns instead of sorted.
const COUNTED: usize = 1 << 15;

/// The 2^`bits` values that make the summed squared distance to `values` least, ascending, and the index of the value that
/// stands for each number. Fewer distinct numbers than entries repeat the last entry.
pub(crate) fn palette(values: &[f16], bits: u32) -> (Vec<f16>, Vec<u8>) {
    let entries = 1usize << bits;
    let distinct = Distinct::of(values);
    let starts = if distinct.len() <= entries {
        (0..distinct.len()).collect()
    } else {
        distinct.split(entries)
    };
    let mut table = Vec::with_capacity(entries);
    let mut by_rank = vec![0u8; distinct.len()];
    for (cluster, &from) in starts.iter().enumerate() {
        let to = starts.get(cluster + 1).copied().unwrap_or(distinct.len());
        table.push(f16::from_f64(distinct.mean(from, to)));
        by_rank[from..to].fill(cluster as u8);
    }
    let last = table.last().copied().unwrap_or(f16::ZERO);
    table.resize(entries, last);
    let indices = values.iter().map(|v| by_rank[distinct.rank(*v)]).collect();
    (table, indices)
}

/// The different numbers among some, ascending, with running sums.
struct Distinct {
    keys: Vec<u16>,
    /// Number of values before each distinct one; one longer than `keys`, as the next two.
    count: Vec<f64>,
    sum: Vec<f64>,
    square: Vec<f64>,
}

/// Bits of a float in an order that is that of the numbers.
fn key(v: f16) -> u16 {
    let bits = v.to_bits();
    if bits & 0x8000 == 0 { bits | 0x8000 } else { !bits }
}

fn number(key: u16) -> f64 {
    let bits = if key & 0x8000 == 0 { !key } else { key & 0x7fff };
    f16::from_bits(bits).to_f64()
}

impl Distinct {
    fn of(values: &[f16]) -> Self {
        let counted: Vec<(u16, u32)> = if values.len() > COUNTED {
            let mut counts = vec![0u32; 1 << 16];
            values.iter().for_each(|v| counts[usize::from(key(*v))] += 1);
            (0..=u16::MAX).zip(counts).filter(|(_, n)| *n > 0).collect()
        } else {
            let mut keys: Vec<u16> = values.iter().map(|v| key(*v)).collect();
            keys.sort_unstable();
            keys.chunk_by(|a, b| a == b)
                .map(|run| (run[0], run.len() as u32))
                .collect()
        };
        let mut sums = Distinct {
            keys: Vec::with_capacity(counted.len()),
            count: vec![0.0],
            sum: vec![0.0],
            square: vec![0.0],
        };
        let (mut n, mut s, mut q) = (0.0, 0.0, 0.0);
        for (key, times) in counted {
            let (x, w) = (number(key), f64::from(times));
            (n, s, q) = (n + w, s + w * x, q + w * x * x);
            sums.keys.push(key);
            sums.count.push(n);
            sums.sum.push(s);
            sums.square.push(q);
        }
        sums
    }

    fn len(&self) -> usize {
        self.keys.len()
    }

    fn rank(&self, v: f16) -> usize {
        self.keys.binary_search(&key(v)).unwrap_or_else(|at| at)
    }

    fn mean(&self, from: usize, to: usize) -> f64 {
        (self.sum[to] - self.sum[from]) / (self.count[to] - self.count[from])
    }

    /// Summed squared distance of the numbers `from..to` to their mean.
    #[inline]
    fn cost(&self, from: usize, to: usize) -> f64 {
        let (n, s) = (self.count[to] - self.count[from], self.sum[to] - self.sum[from]);
        (self.square[to] - self.square[from] - s * s / n).max(0.0)
    }

    /// First rank of each of `clusters` intervals with the least summed cost. There are more numbers than clusters.
    fn split(&self, clusters: usize) -> Vec<usize> {
        let n = self.len();
        // best[j]: least cost of the first j numbers with the clusters so far; from[layer][j]: start of the last cluster.
        let mut best: Vec<f64> = (0..=n)
            .map(|j| if j == 0 { 0.0 } else { self.cost(0, j) })
            .collect();
        let mut next = vec![f64::INFINITY; n + 1];
        let mut from: Vec<Vec<u32>> = Vec::with_capacity(clusters - 1);
        for layer in 1..clusters {
            let mut starts = vec![0u32; n + 1];
            let mut fill = Layer {
                numbers: self,
                best: &best,
                next: &mut next,
                starts: &mut starts,
            };
            fill.fill(layer + 1, n, layer, n - 1);
            from.push(starts);
            std::mem::swap(&mut best, &mut next);
        }
        let mut starts = vec![0; clusters];
        let mut end = n;
        for layer in (1..clusters).rev() {
            end = from[layer - 1][end] as usize;
            starts[layer] = end;
        }
        starts
    }
}

/// One layer of the table while it is filled.
struct Layer<'a> {
    numbers: &'a Distinct,
    best: &'a [f64],
    next: &'a mut [f64],
    starts: &'a mut [u32],
}

impl Layer<'_> {
    /// Fills prefixes `low..=high`, whose last clusters start at `first..=last`.
    fn fill(&mut self, low: usize, high: usize, first: usize, last: usize) {
        let middle = low + (high - low) / 2;
        let (mut least, mut at) = (f64::INFINITY, first);
        for start in first..=last.min(middle - 1) {
            let cost = self.best[start] + self.numbers.cost(start, middle);
            if cost < least {
                (least, at) = (cost, start);
            }
        }
        self.next[middle] = least;
        self.starts[middle] = at as u32;
        if low < middle {
            self.fill(low, middle - 1, first, at);
        }
        if middle < high {
            self.fill(middle + 1, high, at, last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(values: &[f16], bits: u32) -> f64 {
        let (table, indices) = palette(values, bits);
        let distance = |(v, i): (&f16, &u8)| (v.to_f64() - table[usize::from(*i)].to_f64()).powi(2);
        values.iter().zip(&indices).map(distance).sum()
    }

    /// Every split of the sorted numbers into four intervals.
    fn least_of_all_splits(values: &[f16]) -> f64 {
        let d = Distinct::of(values);
        let n = d.len();
        let mut least = f64::INFINITY;
        for a in 1..n {
            for b in a + 1..n {
                for c in b + 1..n {
                    least = least.min(d.cost(0, a) + d.cost(a, b) + d.cost(b, c) + d.cost(c, n));
                }
            }
        }
        least
    }

    fn numbers(seed: u64, count: usize) -> Vec<f16> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) - 0.5
        };
        // Sums of uniform numbers have the bell shape of weights.
        (0..count)
            .map(|_| f16::from_f32(next() + next() + next()))
            .collect()
    }

    #[test]
    fn no_other_split_is_better() {
        for seed in 0..20 {
            let values = numbers(seed, 24);
            // Centroids are rounded to 16 bits, which costs a little.
            let (found, least) = (error(&values, 2), least_of_all_splits(&values));
            assert!(
                (found - least).abs() <= 1e-5 * least + 1e-6,
                "seed {seed}: {found}, {least}"
            );
        }
    }

    #[test]
    fn few_numbers_are_kept_as_they_are() {
        let values = [1.0, -2.0, 1.0, 0.5].map(f16::from_f32);
        let (table, indices) = palette(&values, 2);
        assert_eq!(table, [-2.0, 0.5, 1.0, 1.0].map(f16::from_f32));
        assert_eq!(indices, [2, 0, 2, 1]);
        assert_eq!(error(&[f16::ONE; 9], 1), 0.0);
    }

    #[test]
    fn counting_and_sorting_give_the_same_palette() {
        let values = numbers(3, 500);
        let times = COUNTED / values.len() + 1;
        let many: Vec<f16> = values
            .iter()
            .cycle()
            .take(values.len() * times)
            .copied()
            .collect();
        assert_eq!(palette(&values, 4).0, palette(&many, 4).0);
        let errors: Vec<f64> = [1, 2, 3, 4, 6].map(|bits| error(&values, bits)).into();
        assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    }
}
