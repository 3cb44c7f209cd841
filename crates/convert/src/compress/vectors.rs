//! Palettes of vectors: one index stands for several output channels. k-means with seeded starts.

use half::f16;

use super::how::Palette;
use super::map_parallel;

/// Rounds after which the clusters stay as they are.
const ROUNDS: usize = 60;
/// Vectors among which the first centres are chosen.
const SAMPLE: usize = 1 << 14;

/// A table and the index of each vector for every group of channels; `row` values are one channel's.
///
/// A group's vectors are `how.vector` channels at one place of their rows; indices are in the order of the weight with
/// channels merged.
pub(super) fn palettes(groups: &[&[f16]], row: usize, how: Palette) -> Vec<(Vec<f16>, Vec<u8>)> {
    map_parallel(groups.len(), |i| {
        let points = gather(groups[i], row, how.vector);
        let seed = how.seed ^ (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        cluster(&points, how.vector, 1 << how.bits, seed)
    })
}

/// The vectors of a group, one after the other.
fn gather(values: &[f16], row: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for channels in values.chunks_exact((row * width).max(1)) {
        for at in 0..row {
            out.extend((0..width).map(|c| channels[c * row + at].to_f32()));
        }
    }
    out
}

fn cluster(points: &[f32], width: usize, entries: usize, seed: u64) -> (Vec<f16>, Vec<u8>) {
    let mut centres = first_centres(points, width, entries, seed);
    let mut codes = vec![0u8; points.len() / width];
    let mut before = f64::INFINITY;
    for _ in 0..ROUNDS {
        let error = assign(points, width, &centres, &mut codes);
        if error >= before * (1.0 - 1e-4) {
            break;
        }
        before = error;
        move_centres(points, width, &codes, &mut centres);
    }
    // The entries are stored in 16 bits: indices are those of the nearest stored entry.
    let table: Vec<f16> = centres.iter().map(|&v| f16::from_f32(v)).collect();
    let stored: Vec<f32> = table.iter().map(|v| v.to_f32()).collect();
    assign(points, width, &stored, &mut codes);
    (table, codes)
}

/// k-means++: each further centre is a vector drawn with its squared distance to the centres so far.
fn first_centres(points: &[f32], width: usize, entries: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let count = points.len() / width;
    let sample: Vec<&[f32]> = if count <= SAMPLE {
        points.chunks_exact(width).collect()
    } else {
        let pick = |_| points.chunks_exact(width).nth(random.below(count));
        (0..SAMPLE).filter_map(pick).collect()
    };
    let mut centres: Vec<f32> = Vec::with_capacity(entries * width);
    let mut distances = vec![f64::INFINITY; sample.len()];
    let mut chosen = random.below(sample.len());
    for _ in 0..entries {
        let centre = sample.get(chosen).copied().unwrap_or_default().to_vec();
        for (d, p) in distances.iter_mut().zip(&sample) {
            *d = d.min(f64::from(distance(p, &centre)));
        }
        centres.extend(&centre);
        let total: f64 = distances.iter().sum();
        let mut left = random.share() * total;
        chosen = distances
            .iter()
            .position(|d| {
                left -= d;
                left < 0.0
            })
            .unwrap_or(chosen);
    }
    centres
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// Gives each vector its nearest centre; the summed squared distance.
fn assign(points: &[f32], width: usize, centres: &[f32], codes: &mut [u8]) -> f64 {
    match width {
        2 => assign_fixed::<2>(points, centres, codes),
        4 => assign_fixed::<4>(points, centres, codes),
        8 => assign_fixed::<8>(points, centres, codes),
        _ => {
            let nearest = |p: &[f32]| {
                let all = centres.chunks_exact(width).map(|c| distance(p, c)).enumerate();
                all.fold(
                    (0, f32::INFINITY),
                    |best, (i, d)| if d < best.1 { (i, d) } else { best },
                )
            };
            collect(points.chunks_exact(width).map(nearest), codes)
        }
    }
}

/// The same with a width the compiler knows.
fn assign_fixed<const W: usize>(points: &[f32], centres: &[f32], codes: &mut [u8]) -> f64 {
    let centres = centres.as_chunks::<W>().0;
    let nearest = |p: &[f32; W]| {
        let (mut best, mut least) = (0, f32::INFINITY);
        for (i, c) in centres.iter().enumerate() {
            let mut d = 0.0;
            for (a, b) in p.iter().zip(c) {
                d += (a - b) * (a - b);
            }
            if d < least {
                (best, least) = (i, d);
            }
        }
        (best, least)
    };
    collect(points.as_chunks::<W>().0.iter().map(nearest), codes)
}

fn collect(nearest: impl Iterator<Item = (usize, f32)>, codes: &mut [u8]) -> f64 {
    let mut total = 0.0;
    for (code, (i, d)) in codes.iter_mut().zip(nearest) {
        // At most 256 entries.
        *code = i as u8;
        total += f64::from(d);
    }
    total
}

/// Each centre to the mean of its vectors; one without any takes the vector that is worst off.
fn move_centres(points: &[f32], width: usize, codes: &[u8], centres: &mut [f32]) {
    let entries = centres.len() / width;
    let mut sums = vec![0f64; centres.len()];
    let mut counts = vec![0u32; entries];
    for (point, &code) in points.chunks_exact(width).zip(codes) {
        let code = usize::from(code);
        counts[code] += 1;
        for (s, v) in sums[code * width..].iter_mut().zip(point) {
            *s += f64::from(*v);
        }
    }
    let mut worst: Vec<(f32, usize)> = Vec::new();
    if counts.contains(&0) {
        let off = |(i, (p, &c)): (usize, (&[f32], &u8))| (distance(p, &centres[usize::from(c) * width..]), i);
        worst = points
            .chunks_exact(width)
            .zip(codes)
            .enumerate()
            .map(off)
            .collect();
        worst.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    }
    for (i, centre) in centres.chunks_exact_mut(width).enumerate() {
        if counts[i] > 0 {
            let mean = |s: &f64| (s / f64::from(counts[i])) as f32;
            for (c, s) in centre.iter_mut().zip(&sums[i * width..]) {
                *c = mean(s);
            }
        } else if let Some((_, point)) = worst.pop() {
            centre.copy_from_slice(&points[point * width..(point + 1) * width]);
        }
    }
}

/// SplitMix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, count: usize) -> usize {
        ((self.share() * count as f64) as usize).min(count.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn how(bits: u32, vector: usize, seed: u64) -> Palette {
        Palette {
            bits,
            vector,
            seed,
            ..Palette::default()
        }
    }

    #[test]
    fn as_many_different_vectors_as_entries_are_kept_as_they_are() {
        // Two channels of four: the vectors are the columns.
        let values = [1.0, 2.0, 1.0, 5.0, -1.0, 7.0, -1.0, 0.5].map(f16::from_f32);
        for seed in 0..5 {
            let coded = palettes(&[&values], 4, how(2, 2, seed));
            let (table, codes) = &coded[0];
            for at in 0..4 {
                let entry = usize::from(codes[at]) * 2;
                assert_eq!(
                    table[entry..entry + 2],
                    [values[at], values[4 + at]],
                    "seed {seed}, column {at}"
                );
            }
        }
    }

    #[test]
    fn a_seed_decides_and_more_entries_are_nearer() {
        let mut random = Random(5);
        let values: Vec<f16> = (0..4096).map(|_| f16::from_f64(random.share() - 0.5)).collect();
        let error = |bits: u32, width: usize| {
            let coded = palettes(&[&values], 256, how(bits, width, 1));
            let (table, codes) = &coded[0];
            let points = gather(&values, 256, width);
            let entry = |i: usize| table[i * width..(i + 1) * width].iter().map(|v| v.to_f32());
            let off = |(p, &c): (&[f32], &u8)| {
                p.iter()
                    .zip(entry(usize::from(c)))
                    .map(|(a, b)| (a - b).powi(2))
                    .sum::<f32>()
            };
            points.chunks(width).zip(codes).map(off).sum::<f32>()
        };
        for width in [2, 3, 4] {
            let errors = [2, 4, 6, 8].map(|bits| error(bits, width));
            assert!(errors.is_sorted_by(|a, b| a > b), "{width}: {errors:?}");
        }
        let table = |seed| palettes(&[&values], 256, how(4, 2, seed))[0].0.clone();
        assert_eq!(table(3), table(3));
        assert_ne!(table(3), table(4));
    }
}
