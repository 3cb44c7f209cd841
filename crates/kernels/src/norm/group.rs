//! Group norm: channels in groups, each normalised over its channels and positions, with what follows it.

use crate::elementwise::{Unary, apply_slice};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{View, ViewMut};
use std::ops::Range;

/// Elements whose statistics are taken together, while they are in the first-level cache.
const BLOCK: usize = 4096;

/// Parameters of a group norm.
#[derive(Debug, Clone, Copy)]
pub struct GroupNorm<'a> {
    /// Groups of channels side by side; as many channels in each.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// One per channel; 1 when absent.
    pub gamma: Option<&'a [f32]>,
    /// One per channel; 0 when absent.
    pub beta: Option<&'a [f32]>,
    /// Applied to the result.
    pub activation: Option<Unary>,
}

/// Stretches of the input that each give a mean and a sum of squared deviations per channel.
#[derive(Debug, Clone, Copy)]
struct Parts {
    samples: usize,
    channels: usize,
    positions: usize,
    /// Channels lie side by side; otherwise positions do.
    last: bool,
    /// Positions in a part.
    each: usize,
}

impl Parts {
    /// Parts of one sample: blocks of positions, or blocks of positions of each channel.
    fn blocks(&self) -> usize {
        self.positions.div_ceil(self.each)
    }

    /// Parts of all samples.
    fn count(&self) -> usize {
        self.samples * self.blocks() * if self.last { 1 } else { self.channels }
    }

    /// Channels in a part.
    fn wide(&self) -> usize {
        if self.last { self.channels } else { 1 }
    }

    /// Sample, first channel, first element and positions of a part.
    fn part(&self, part: usize) -> (usize, usize, usize, usize) {
        let block = part % self.blocks();
        let outer = part / self.blocks();
        let (sample, channel) = if self.last {
            (outer, 0)
        } else {
            (outer / self.channels, outer % self.channels)
        };
        let position = block * self.each;
        let rows = self.each.min(self.positions - position);
        let start = sample * self.channels * self.positions;
        let first = if self.last {
            start + position * self.channels
        } else {
            start + channel * self.positions + position
        };
        (sample, channel, first, rows)
    }
}

/// `y = activation((x - mean) / sqrt(variance + eps) * gamma + beta)` for `x[n, c, s]`, mean and variance over the channels of
/// a group and all positions of a sample.
///
/// # Panics
/// When the shapes do not fit, the groups do not divide the channels, or either value is neither dense in the order
/// `[n, c, s]` nor in the order `[n, s, c]`, the same for both.
pub fn group_norm(
    pool: &Pool,
    x: View<'_, f32>,
    norm: &GroupNorm<'_>,
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let &[samples, channels, positions] = x.shape() else {
        panic!("group norm takes samples, channels and positions")
    };
    assert!(
        x.shape() == y.shape() && norm.groups > 0 && channels.is_multiple_of(norm.groups),
        "group norm of {:?} in {} groups",
        x.shape(),
        norm.groups
    );
    let fits = |values: Option<&[f32]>| values.is_none_or(|v| v.len() == channels);
    assert!(
        fits(norm.gamma) && fits(norm.beta),
        "group norm: one value per channel"
    );
    if samples * channels * positions == 0 {
        return;
    }
    let last = dense_last(&x.shape()[1..], x.strides(), samples);
    assert!(
        (last && dense_last(&y.shape()[1..], y.strides(), samples))
            || (x.is_contiguous() && y.is_contiguous()),
        "group norm: memory order"
    );
    let parts = Parts {
        samples,
        channels,
        positions,
        last,
        each: if last { (BLOCK / channels).max(1) } else { BLOCK }.min(positions),
    };
    let (count, wide) = (parts.count(), parts.wide());
    let space = scratch.f32(2 * count * wide + 2 * samples * channels);
    let (stats, factors) = space.split_at_mut(2 * count * wide);
    let (px, py, ps) = (Shared::of(x.ptr()), Shared(y.ptr()), Shared(stats.as_mut_ptr()));
    let grain = (16 * 1024 / (parts.each * wide)).max(1);
    pool.run_ranges(count, grain, &|range| {
        for part in range {
            let (_, _, first, rows) = parts.part(part);
            // SAFETY: the part lies inside the dense input.
            let x = unsafe { std::slice::from_raw_parts(px.at(first as isize), rows * wide) };
            // SAFETY: each part has its own numbers.
            let stats =
                unsafe { std::slice::from_raw_parts_mut(ps.at((2 * part * wide) as isize), 2 * wide) };
            dispatch(Columns { x, stats });
        }
    });
    for (sample, factors) in factors.chunks_exact_mut(2 * channels).enumerate() {
        for group in 0..norm.groups {
            let each = channels / norm.groups;
            combine(
                &parts,
                stats,
                sample,
                group * each..(group + 1) * each,
                norm,
                factors,
            );
        }
    }
    let factors = &*factors;
    pool.run_ranges(count, grain, &|range| {
        for part in range {
            let (sample, channel, first, rows) = parts.part(part);
            // SAFETY: the part lies inside the dense input.
            let x = unsafe { std::slice::from_raw_parts(px.at(first as isize), rows * wide) };
            // SAFETY: the output has the same order, and the part is this thread's.
            let y = unsafe { std::slice::from_raw_parts_mut(py.at(first as isize), rows * wide) };
            let (scale, shift) = factors[2 * sample * channels..][..2 * channels].split_at(channels);
            let channels = channel..channel + wide;
            dispatch(Apply {
                x,
                y: &mut *y,
                scale: &scale[channels.clone()],
                shift: &shift[channels],
            });
            if let Some(op) = norm.activation {
                apply_slice(op, y);
            }
        }
    });
}

/// Whether `[c, s]` of every sample lie densely with channels side by side.
fn dense_last(shape: &[usize], strides: &[isize], samples: usize) -> bool {
    let (channels, positions) = (shape[0], shape[1]);
    (channels == 1 || strides[1] == 1)
        && (positions == 1 || strides[2] == channels as isize)
        && (samples == 1 || strides[0] == (channels * positions) as isize)
}

/// Scale and shift of the channels `group` of one sample, from the statistics of its parts.
fn combine(
    parts: &Parts,
    stats: &[f32],
    sample: usize,
    group: Range<usize>,
    norm: &GroupNorm<'_>,
    factors: &mut [f32],
) {
    let wide = parts.wide();
    let of_sample = parts.count() / parts.samples;
    let cells = || {
        (sample * of_sample..(sample + 1) * of_sample).flat_map(|part| {
            let (_, channel, _, rows) = parts.part(part);
            let here = group.start.max(channel)..group.end.min(channel + wide);
            here.map(move |c| {
                let at = 2 * part * wide + c - channel;
                (rows as f64, f64::from(stats[at]), f64::from(stats[at + wide]))
            })
        })
    };
    let total = (group.len() * parts.positions) as f64;
    let mean = cells().map(|(rows, mean, _)| rows * mean).sum::<f64>() / total;
    let squares: f64 = cells()
        .map(|(rows, m, squares)| squares + rows * (m - mean) * (m - mean))
        .sum();
    let factor = 1.0 / (squares / total + f64::from(norm.eps)).sqrt();
    let (scale, shift) = factors.split_at_mut(parts.channels);
    for c in group {
        let by = factor * norm.gamma.map_or(1.0, |gamma| f64::from(gamma[c]));
        scale[c] = by as f32;
        shift[c] = (norm.beta.map_or(0.0, |beta| f64::from(beta[c])) - mean * by) as f32;
    }
}

/// Means and sums of squared deviations of columns: `x` is rows of `stats.len() / 2` columns.
struct Columns<'a> {
    x: &'a [f32],
    stats: &'a mut [f32],
}

impl Kernel for Columns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let wide = self.stats.len() / 2;
        let (means, squares) = self.stats.split_at_mut(wide);
        let rows = self.x.len() / wide;
        if wide == 1 {
            let mean = long_sum(s, self.x, 0.0, false) / rows as f32;
            means[0] = mean;
            squares[0] = long_sum(s, self.x, mean, true);
            return;
        }
        let mut c = 0;
        while c + S::LANES <= wide {
            let at = self.x.as_ptr().wrapping_add(c);
            let mut sum = s.zero();
            for row in 0..rows {
                // SAFETY: one vector of a row's columns.
                sum = s.add(sum, unsafe { s.load(at.add(row * wide)) });
            }
            let mean = s.div(sum, s.splat(rows as f32));
            let mut square = s.zero();
            for row in 0..rows {
                // SAFETY: as above.
                let low = s.sub(unsafe { s.load(at.add(row * wide)) }, mean);
                square = s.fma(low, low, square);
            }
            // SAFETY: one vector of the columns.
            unsafe { s.store(means[c..][..S::LANES].as_mut_ptr(), mean) };
            // SAFETY: as above.
            unsafe { s.store(squares[c..][..S::LANES].as_mut_ptr(), square) };
            c += S::LANES;
        }
        for c in c..wide {
            let column = || self.x.iter().skip(c).step_by(wide);
            means[c] = column().sum::<f32>() / rows as f32;
            squares[c] = column().map(|x| (x - means[c]) * (x - means[c])).sum();
        }
    }
}

/// The sum of `x - low`, or of its squares.
#[inline(always)]
fn long_sum<S: Simd>(s: S, x: &[f32], low: f32, square: bool) -> f32 {
    let chunks = x.chunks_exact(4 * S::LANES);
    let each = |x: f32| if square { (x - low) * (x - low) } else { x - low };
    let rest: f32 = chunks.remainder().iter().map(|x| each(*x)).sum();
    let base = s.splat(low);
    let mut sums = [s.zero(); 4];
    for chunk in chunks {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: one of the four vectors of the chunk.
            let v = s.sub(unsafe { s.load(chunk.as_ptr().add(n * S::LANES)) }, base);
            *sum = if square { s.fma(v, v, *sum) } else { s.add(*sum, v) };
        }
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]))) + rest
}

/// `y = x * scale + shift` for rows of columns.
struct Apply<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
    scale: &'a [f32],
    shift: &'a [f32],
}

impl Kernel for Apply<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if let ([scale], [shift]) = (self.scale, self.shift) {
            let (a, b) = (s.splat(*scale), s.splat(*shift));
            let whole = self.x.len() / S::LANES * S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                // SAFETY: one vector of both.
                unsafe {
                    s.store(
                        self.y.as_mut_ptr().add(i),
                        s.fma(s.load(self.x.as_ptr().add(i)), a, b),
                    )
                };
            }
            for (y, x) in self.y[whole..].iter_mut().zip(&self.x[whole..]) {
                *y = x * scale + shift;
            }
            return;
        }
        let wide = self.scale.len();
        for (x, y) in self.x.chunks_exact(wide).zip(self.y.chunks_exact_mut(wide)) {
            let mut c = 0;
            while c + S::LANES <= wide {
                // SAFETY: one vector of the columns, of each of the four.
                unsafe {
                    let (a, b) = (
                        s.load(self.scale.as_ptr().add(c)),
                        s.load(self.shift.as_ptr().add(c)),
                    );
                    s.store(y.as_mut_ptr().add(c), s.fma(s.load(x.as_ptr().add(c)), a, b));
                }
                c += S::LANES;
            }
            for c in c..wide {
                y[c] = x[c] * self.scale[c] + self.shift[c];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        #[test]
        fn both_memory_orders_agree_with_the_definition(
            samples in 1_usize..3, groups in 1_usize..5, each in 1_usize..9, positions in 1_usize..900, last in any::<bool>(),
            weighted in any::<bool>(), threads in 1_usize..4, seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let channels = groups * each;
            // A mean far from 0, as activations have.
            let x: Vec<f32> = (0..samples * channels * positions).map(|_| 3.0 + random(&mut seed)).collect();
            let gamma: Vec<f32> = (0..channels).map(|_| random(&mut seed)).collect();
            let beta: Vec<f32> = (0..channels).map(|_| random(&mut seed)).collect();
            let shape = [samples, channels, positions];
            let (c, s) = (channels as isize, positions as isize);
            let strides = if last { [c * s, 1, c] } else { [c * s, s, 1] };
            let norm = GroupNorm {
                groups,
                eps: 1e-3,
                gamma: weighted.then_some(&gamma[..]),
                beta: weighted.then_some(&beta[..]),
                activation: weighted.then_some(Unary::Silu),
            };
            let mut y = vec![f32::NAN; x.len()];
            let view = View::new(&x, 0, &shape, &strides).unwrap();
            let out = ViewMut::new(&mut y, 0, &shape, &strides).unwrap();
            group_norm(&Pool::new(threads), view, &norm, out, &mut Scratch::new());
            let at = |n: usize, c: usize, s: usize| n * channels * positions + if last { s * channels + c } else { c * positions + s };
            for n in 0..samples {
                for g in 0..groups {
                    let cells = || (g * each..(g + 1) * each).flat_map(|c| (0..positions).map(move |s| (c, s)));
                    let value = |(c, s)| f64::from(x[at(n, c, s)]);
                    let count = (each * positions) as f64;
                    let mean = cells().map(value).sum::<f64>() / count;
                    let variance = cells().map(|cell| (value(cell) - mean).powi(2)).sum::<f64>() / count;
                    for (c, s) in cells() {
                        let mut wanted = ((value((c, s)) - mean) / (variance + 1e-3).sqrt()) as f32;
                        if weighted {
                            wanted = Unary::Silu.apply(wanted * gamma[c] + beta[c]);
                        }
                        let found = y[at(n, c, s)];
                        prop_assert!((found - wanted).abs() < 2e-4, "[{n}, {c}, {s}] {found} is not {wanted}");
                    }
                }
            }
        }
    }
}
