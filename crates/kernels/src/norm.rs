//! Normalisation: layer, RMS, L2, batch, instance, local response, and softmax.

mod group;

pub use group::{GroupNorm, group_norm};

use crate::elementwise::math::exp;
use crate::loops::{Nest, Shared};
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{MAX_RANK, View, ViewMut};
use std::cell::RefCell;

/// What a normalised row becomes.
#[derive(Debug, Clone, Copy)]
enum Rule<'a> {
    Rms {
        weight: Option<&'a [f32]>,
        eps: f32,
    },
    Layer {
        gamma: Option<&'a [f32]>,
        beta: Option<&'a [f32]>,
        eps: f32,
    },
    L2 {
        eps: f32,
    },
    Softmax {
        log: bool,
    },
}

/// Normalises every slice of the last `trailing` axes.
fn by_rows(pool: &Pool, x: View<'_, f32>, trailing: usize, mut y: ViewMut<'_, f32>, rule: Rule<'_>) {
    assert_eq!(x.shape(), y.shape(), "norm: different shapes");
    let lead = x
        .shape()
        .len()
        .checked_sub(trailing)
        .expect("no more trailing axes than there are");
    let inner_shape = &x.shape()[lead..];
    let n: usize = inner_shape.iter().product();
    for weight in rule.vectors().into_iter().flatten() {
        assert_eq!(weight.len(), n, "norm: one weight per element of a row");
    }
    let dense = crate::strided::dense_strides(inner_shape);
    let inner = Nest::new(
        inner_shape,
        [&y.strides()[lead..], &x.strides()[lead..], &dense[..trailing]],
    );
    let outer = Nest::new(&x.shape()[..lead], [&y.strides()[..lead], &x.strides()[..lead]]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let (len, steps) = outer.inner();
    let rows = outer.rows() * len;
    if n == 0 || rows == 0 {
        return;
    }
    pool.run_ranges(rows, (16384 / n).max(1), &|range| {
        outer.for_rows(range.start / len..range.end.div_ceil(len), |row, at| {
            let first = range.start.saturating_sub(row * len);
            for i in first..(range.end - row * len).min(len) {
                let at = [0, 1].map(|n| at[n] + steps[n] * i as isize);
                // SAFETY: the nests visit the indices of both shapes, a row of `y` on one thread.
                unsafe { rule.apply(&inner, n, py.at(at[0]), px.at(at[1])) };
            }
        });
    });
}

impl<'a> Rule<'a> {
    fn vectors(self) -> [Option<&'a [f32]>; 2] {
        match self {
            Rule::Rms { weight, .. } => [weight, None],
            Rule::Layer { gamma, beta, .. } => [gamma, beta],
            _ => [None, None],
        }
    }

    /// Normalises the row of `nest` from `x` on into `y`.
    ///
    /// # Safety
    /// The elements of the nest are readable and writable.
    unsafe fn apply(self, nest: &Nest<3>, n: usize, y: *mut f32, x: *const f32) {
        if nest.rows() == 1 && nest.inner().1 == [1; 3] {
            return dispatch(Row { rule: self, x, y, n });
        }
        ROW.with_borrow_mut(|row| {
            row.resize(n, 0.0);
            each(nest, |at| {
                // SAFETY: `nest` visits offsets inside the row.
                row[at[2] as usize] = unsafe { *x.wrapping_offset(at[1]) }
            });
            let data = row.as_mut_ptr();
            dispatch(Row {
                rule: self,
                x: data,
                y: data,
                n,
            });
            each(nest, |at| {
                // SAFETY: as above.
                unsafe { *y.wrapping_offset(at[0]) = row[at[2] as usize] };
            });
        });
    }
}

thread_local! {
    /// A row whose elements do not lie side by side.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One dense row of `n` elements, in place or from one place to another. Made by [`Rule::apply`] alone, on its
/// caller's word that the places are readable and writable.
struct Row<'a> {
    rule: Rule<'a>,
    x: *const f32,
    y: *mut f32,
    n: usize,
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { rule, x, y, n } = self;
        match rule {
            Rule::Rms { weight, eps } => {
                // SAFETY: the row, on the caller's word; so below.
                let squares = unsafe { total(s, (x, n), 0.0, |x| s.mul(x, x)) };
                let scale = 1.0 / (squares / n as f32 + eps).sqrt();
                // SAFETY: as above; the weight has been measured.
                unsafe { affine(s, x, y, n, (0.0, scale), (weight, None)) };
            }
            Rule::L2 { eps } => {
                // SAFETY: as above.
                let squares = unsafe { total(s, (x, n), 0.0, |x| s.mul(x, x)) };
                // SAFETY: as above.
                unsafe { affine(s, x, y, n, (0.0, 1.0 / (squares + eps).sqrt()), (None, None)) };
            }
            Rule::Layer { gamma, beta, eps } => {
                // SAFETY: as above.
                let mean = unsafe { total(s, (x, n), 0.0, |x| x) } / n as f32;
                let shift = s.splat(mean);
                // SAFETY: as above.
                let squares = unsafe { total(s, (x, n), mean, |x| s.mul(s.sub(x, shift), s.sub(x, shift))) };
                let scale = 1.0 / (squares / n as f32 + eps).sqrt();
                // SAFETY: as above.
                unsafe { affine(s, x, y, n, (mean, scale), (gamma, beta)) };
            }
            Rule::Softmax { log } => {
                if !std::ptr::eq(x, y) {
                    // SAFETY: `n` elements each, and different views do not overlap.
                    unsafe { x.copy_to_nonoverlapping(y, n) };
                }
                // SAFETY: the row of the output belongs to this thread.
                let row = unsafe { std::slice::from_raw_parts_mut(y, n) };
                if !log {
                    return crate::attention::softmax(s, row);
                }
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let shift = s.splat(max);
                let mut sums = s.zero();
                for part in row.chunks(S::LANES) {
                    let mut vector = [f32::NEG_INFINITY; 16];
                    vector[..part.len()].copy_from_slice(part);
                    // SAFETY: sixteen numbers, and no vector is longer.
                    sums = s.add(sums, exp(s, s.sub(unsafe { s.load(vector.as_ptr()) }, shift)));
                }
                let sum = s.sum(sums);
                let shift = max + sum.ln();
                row.iter_mut().for_each(|x| *x -= shift);
            }
        }
    }
}

/// The sum of `f` over `n` elements; the last vector is filled up with `fill`.
///
/// # Safety
/// The elements are readable.
#[inline(always)]
unsafe fn total<S: Simd>(s: S, (x, n): (*const f32, usize), fill: f32, f: impl Fn(S::F) -> S::F) -> f32 {
    let mut sums = [s.zero(); 4];
    let mut i = 0;
    while i + 4 * S::LANES <= n {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a vector inside the row.
            *sum = s.add(*sum, f(unsafe { s.load(x.add(i + part * S::LANES)) }));
        }
        i += 4 * S::LANES;
    }
    while i < n {
        let mut rest = [fill; 16];
        let count = S::LANES.min(n - i);
        // SAFETY: what is left of the row, a vector of sixteen at most.
        unsafe { x.add(i).copy_to_nonoverlapping(rest.as_mut_ptr(), count) };
        // SAFETY: sixteen numbers.
        sums[0] = s.add(sums[0], f(unsafe { s.load(rest.as_ptr()) }));
        i += count;
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// `y = (x - shift) * scale * gamma + beta`.
///
/// # Safety
/// The elements are readable and writable, and there are `n` of gamma and beta.
#[inline(always)]
unsafe fn affine<S: Simd>(
    s: S,
    x: *const f32,
    y: *mut f32,
    n: usize,
    (shift, scale): (f32, f32),
    (gamma, beta): (Option<&[f32]>, Option<&[f32]>),
) {
    let (shifts, scales) = (s.splat(shift), s.splat(scale));
    let whole = n / S::LANES * S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: a vector inside the row, and inside gamma and beta below.
        let mut value = s.mul(s.sub(unsafe { s.load(x.add(i)) }, shifts), scales);
        if let Some(gamma) = gamma {
            // SAFETY: as above.
            value = s.mul(value, unsafe { s.load(gamma.as_ptr().add(i)) });
        }
        if let Some(beta) = beta {
            // SAFETY: as above.
            value = s.add(value, unsafe { s.load(beta.as_ptr().add(i)) });
        }
        // SAFETY: as above.
        unsafe { s.store(y.add(i), value) };
    }
    for i in whole..n {
        // SAFETY: an element of the row.
        let value = (unsafe { *x.add(i) } - shift) * scale;
        let value = value * gamma.map_or(1.0, |gamma| gamma[i]) + beta.map_or(0.0, |beta| beta[i]);
        // SAFETY: as above.
        unsafe { *y.add(i) = value };
    }
}

/// Calls `body` with the offsets of every element of `nest`.
fn each<const N: usize>(nest: &Nest<N>, mut body: impl FnMut([isize; N])) {
    let (len, steps) = nest.inner();
    nest.for_rows(0..nest.rows(), |_, at| {
        for i in 0..len as isize {
            body(std::array::from_fn(|n| at[n] + steps[n] * i));
        }
    });
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last axis; equals the first half of the layer norm of
/// `concat(x, -x)`.
///
/// # Panics
/// When the shapes differ or the weight has another length; so do all functions of this module.
pub fn rms_norm(pool: &Pool, x: View<'_, f32>, weight: Option<&[f32]>, eps: f32, y: ViewMut<'_, f32>) {
    by_rows(pool, x, 1, y, Rule::Rms { weight, eps });
}

/// Scale, offset and axes of a layer norm.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// How many of the last axes are normalised together.
    pub axes: usize,
    /// One per normalised element, in row-major order.
    pub gamma: Option<&'a [f32]>,
    /// One per normalised element, in row-major order.
    pub beta: Option<&'a [f32]>,
    /// Added to the variance.
    pub eps: f32,
}

/// `y = (x - mean) / sqrt(variance + eps) * gamma + beta` over the last `norm.axes` axes.
pub fn layer_norm(pool: &Pool, x: View<'_, f32>, norm: LayerNorm<'_>, y: ViewMut<'_, f32>) {
    let LayerNorm {
        axes,
        gamma,
        beta,
        eps,
    } = norm;
    by_rows(pool, x, axes, y, Rule::Layer { gamma, beta, eps });
}

/// `y = x / sqrt(sum(x^2) + eps)` over the last `axes` axes.
pub fn l2_norm(pool: &Pool, x: View<'_, f32>, axes: usize, eps: f32, y: ViewMut<'_, f32>) {
    by_rows(pool, x, axes, y, Rule::L2 { eps });
}

/// Softmax over the last axis (any other axis is a permuted view). A row of minus infinities gives zeros.
pub fn softmax(pool: &Pool, x: View<'_, f32>, y: ViewMut<'_, f32>) {
    by_rows(pool, x, 1, y, Rule::Softmax { log: false });
}

/// The logarithm of the softmax over the last axis.
pub fn log_softmax(pool: &Pool, x: View<'_, f32>, y: ViewMut<'_, f32>) {
    by_rows(pool, x, 1, y, Rule::Softmax { log: true });
}

/// `y[n, c, ..] = x[n, c, ..] * scale[c] + shift[c]`.
pub fn scale_shift(pool: &Pool, x: View<'_, f32>, scale: &[f32], shift: &[f32], mut y: ViewMut<'_, f32>) {
    assert!(
        x.shape() == y.shape() && x.shape().len() >= 2,
        "scale_shift of {:?} into {:?}",
        x.shape(),
        y.shape()
    );
    assert!(
        scale.len() == x.shape()[1] && shift.len() == scale.len(),
        "scale_shift: one value per channel"
    );
    let mut channel = [0; MAX_RANK];
    channel[1] = 1;
    let nest = Nest::new(x.shape(), [y.strides(), x.strides(), &channel[..x.shape().len()]]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            let c = (at[2] + i * steps[2]) as usize;
            // SAFETY: `Nest` visits indices of both shapes, those of `y` on one thread each.
            unsafe { *py.at(at[0] + i * steps[0]) = *px.at(at[1] + i * steps[1]) * scale[c] + shift[c] };
        }
    });
}

/// Parameters of a batch norm, one per channel.
#[derive(Debug, Clone, Copy)]
pub struct BatchNorm<'a> {
    /// Subtracted.
    pub mean: &'a [f32],
    /// `sqrt(variance + eps)` divides.
    pub variance: &'a [f32],
    /// Multiplies; 1 when absent.
    pub gamma: Option<&'a [f32]>,
    /// Added; 0 when absent.
    pub beta: Option<&'a [f32]>,
    /// Added to the variance.
    pub eps: f32,
}

impl BatchNorm<'_> {
    /// The scale and shift per channel that say the same.
    pub fn scale_shift(&self) -> (Vec<f32>, Vec<f32>) {
        let channels = 0..self.mean.len();
        let scale: Vec<f32> = channels
            .clone()
            .map(|c| self.gamma.map_or(1.0, |gamma| gamma[c]) / (self.variance[c] + self.eps).sqrt())
            .collect();
        let shift = channels
            .map(|c| self.beta.map_or(0.0, |beta| beta[c]) - self.mean[c] * scale[c])
            .collect();
        (scale, shift)
    }
}

/// `y = (x - mean) / sqrt(variance + eps) * gamma + beta` per channel of `x[n, c, ..]`.
pub fn batch_norm(pool: &Pool, x: View<'_, f32>, norm: BatchNorm<'_>, y: ViewMut<'_, f32>) {
    let (scale, shift) = norm.scale_shift();
    scale_shift(pool, x, &scale, &shift, y);
}

/// Normalises each channel of each sample of `x[n, c, ..]` over its positions, then scales and shifts per channel.
pub fn instance_norm(
    pool: &Pool,
    x: View<'_, f32>,
    (gamma, beta): (Option<&[f32]>, Option<&[f32]>),
    eps: f32,
    mut y: ViewMut<'_, f32>,
) {
    let channels = x.shape()[1];
    let axes = x.shape().len() - 2;
    by_rows(
        pool,
        x,
        axes,
        y.reborrow(),
        Rule::Layer {
            gamma: None,
            beta: None,
            eps,
        },
    );
    if gamma.is_none() && beta.is_none() {
        return;
    }
    let ones = vec![1.0; channels];
    let zeros = vec![0.0; channels];
    let (gamma, beta) = (gamma.unwrap_or(&ones), beta.unwrap_or(&zeros));
    let mut channel = [0; MAX_RANK];
    channel[1] = 1;
    let nest = Nest::new(y.shape(), [y.strides(), &channel[..axes + 2]]);
    let py = Shared(y.ptr());
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            let c = (at[1] + i * steps[1]) as usize;
            let y = py.at(at[0] + i * steps[0]);
            // SAFETY: as in `scale_shift`.
            unsafe { *y = *y * gamma[c] + beta[c] };
        }
    });
}

/// Parameters of a local response norm.
#[derive(Debug, Clone, Copy)]
pub struct LocalResponse {
    /// Channels in the window.
    pub size: usize,
    /// Multiplies the mean square.
    pub alpha: f32,
    /// The exponent.
    pub beta: f32,
    /// Added to the mean square.
    pub k: f32,
}

/// `y[n, c, ..] = x[n, c, ..] / (k + alpha / size * sum_w x[n, w, ..]^2)^beta`, the window `w` of `size` channels
/// around `c` (one more below than above when `size` is even).
pub fn local_response_norm(pool: &Pool, x: View<'_, f32>, norm: LocalResponse, mut y: ViewMut<'_, f32>) {
    assert!(
        x.shape() == y.shape() && x.shape().len() >= 2,
        "local_response_norm: different shapes"
    );
    let channels = x.shape()[1];
    let step = x.strides()[1];
    let mut channel = [0; MAX_RANK];
    channel[1] = 1;
    let nest = Nest::new(x.shape(), [y.strides(), x.strides(), &channel[..x.shape().len()]]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            let c = (at[2] + i * steps[2]) as usize;
            let from = at[1] + i * steps[1];
            let window = c.saturating_sub(norm.size / 2)..(c + norm.size.div_ceil(2)).min(channels);
            // SAFETY: the window stays inside the channels of `x`.
            let square = |w: usize| unsafe { *px.at(from + step * (w as isize - c as isize)) }.powi(2);
            let sum: f32 = window.map(square).sum();
            let scale = (norm.k + norm.alpha / norm.size as f32 * sum).powf(-norm.beta);
            // SAFETY: as in `scale_shift`.
            unsafe { *py.at(at[0] + i * steps[0]) = *px.at(from) * scale };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(
        data: &[f32],
        shape: &[usize],
        strides: &[isize],
        f: impl Fn(&Pool, View<'_, f32>, ViewMut<'_, f32>),
    ) -> Vec<f32> {
        let pool = Pool::new(2);
        let mut y = vec![f32::NAN; data.len()];
        let dense = crate::strided::dense_strides(shape);
        let out = ViewMut::new(&mut y, 0, shape, &dense[..shape.len()]).unwrap();
        f(&pool, View::new(data, 0, shape, strides).unwrap(), out);
        y
    }

    fn close(a: &[f32], b: &[f32]) {
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5),
            "{a:?} is not {b:?}"
        );
    }

    #[test]
    fn rms_norm_is_half_the_layer_norm_of_the_doubled_row() {
        let x: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let rms = run(&x, &[4, 6], &[6, 1], |pool, x, y| {
            rms_norm(pool, x, None, 1e-5, y)
        });
        let doubled: Vec<f32> = x
            .chunks(6)
            .flat_map(|row| row.iter().copied().chain(row.iter().map(|x| -x)))
            .collect();
        let norm = LayerNorm {
            axes: 1,
            gamma: None,
            beta: None,
            eps: 1e-5,
        };
        let layer = run(&doubled, &[4, 12], &[12, 1], |pool, x, y| {
            layer_norm(pool, x, norm, y)
        });
        for row in 0..4 {
            close(&rms[row * 6..row * 6 + 6], &layer[row * 12..row * 12 + 6]);
        }
    }

    #[test]
    fn rows_of_any_length_and_layout_agree_with_the_definition() {
        for n in [1_usize, 3, 8, 17, 31, 64, 100, 577] {
            let x: Vec<f32> = (0..3 * n).map(|i| (i as f32 * 1.3).sin() * 2.0 + 0.3).collect();
            let weight: Vec<f32> = (0..n).map(|i| 0.5 + i as f32 / n as f32).collect();
            let mean = |v: &[f64]| v.iter().sum::<f64>() / n as f64;
            for (strides, at) in [([n as isize, 1], [n, 1]), ([1, 3], [1, 3])] {
                let row =
                    |r: usize| -> Vec<f64> { (0..n).map(|i| f64::from(x[r * at[0] + i * at[1]])).collect() };
                let norm = LayerNorm {
                    axes: 1,
                    gamma: Some(&weight),
                    beta: Some(&weight),
                    eps: 1e-3,
                };
                let shape = [3, n];
                let found = [
                    run(&x, &shape, &strides, |pool, x, y| {
                        rms_norm(pool, x, Some(&weight), 1e-3, y)
                    }),
                    run(&x, &shape, &strides, |pool, x, y| layer_norm(pool, x, norm, y)),
                    run(&x, &shape, &strides, |pool, x, y| l2_norm(pool, x, 1, 1e-3, y)),
                    run(&x, &shape, &strides, softmax),
                    run(&x, &shape, &strides, log_softmax),
                ];
                for r in 0..3 {
                    let row = row(r);
                    let squares: Vec<f64> = row.iter().map(|x| x * x).collect();
                    let m = mean(&row);
                    let variance = mean(&row.iter().map(|x| (x - m).powi(2)).collect::<Vec<_>>());
                    let sum: f64 = row.iter().map(|x| x.exp()).sum();
                    for i in 0..n {
                        let (x, w) = (row[i], f64::from(weight[i]));
                        let expected = [
                            x / (mean(&squares) + 1e-3).sqrt() * w,
                            (x - m) / (variance + 1e-3).sqrt() * w + w,
                            x / (squares.iter().sum::<f64>() + 1e-3).sqrt(),
                            x.exp() / sum,
                            x - sum.ln(),
                        ];
                        for (which, expected) in expected.into_iter().enumerate() {
                            let found = f64::from(found[which][r * n + i]);
                            assert!(
                                (found - expected).abs() < 1e-4,
                                "{which} of {n}: {found} is not {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn softmax_follows_strides_and_survives_infinities() {
        let x = [1.0, f32::NEG_INFINITY, 3.0, f32::NEG_INFINITY];
        let y = run(&x, &[2, 2], &[1, 2], softmax);
        let e = 1.0 / (1.0 + 2.0_f32.exp());
        close(&y, &[e, 1.0 - e, 0.0, 0.0]);
    }

    #[test]
    fn local_response_looks_at_neighbouring_channels() {
        let norm = LocalResponse {
            size: 3,
            alpha: 3.0,
            beta: 1.0,
            k: 1.0,
        };
        let y = run(&[1.0, 2.0, 3.0], &[1, 3, 1], &[3, 1, 1], |pool, x, y| {
            local_response_norm(pool, x, norm, y)
        });
        close(&y, &[1.0 / 6.0, 2.0 / 15.0, 3.0 / 14.0]);
    }
}
