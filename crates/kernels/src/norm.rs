//! Normalisation: layer, RMS, L2, batch, instance, local response, and softmax.

use crate::loops::{Nest, Shared};
use crate::pool::Pool;
use crate::strided::{MAX_RANK, View, ViewMut};

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
    pool.run_ranges(rows, (8192 / n).max(1), &|range| {
        outer.for_rows(range.start / len..range.end.div_ceil(len), |row, at| {
            let first = range.start.saturating_sub(row * len);
            for i in first..(range.end - row * len).min(len) {
                let at = [0, 1].map(|n| at[n] + steps[n] * i as isize);
                rule.apply(&inner, n, py.at(at[0]), px.at(at[1]));
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

    fn apply(self, nest: &Nest<3>, n: usize, y: *mut f32, x: *const f32) {
        let fold = |start: f64, f: &dyn Fn(f64, f32) -> f64| {
            let mut total = start;
            // SAFETY: `nest` visits offsets inside the row of `x`.
            each(nest, |at| total = f(total, unsafe { *x.wrapping_offset(at[1]) }));
            total
        };
        let (shift, scale) = match self {
            Rule::Rms { eps, .. } => (
                0.0,
                1.0 / (fold(0.0, &|sum, x| sum + f64::from(x) * f64::from(x)) / n as f64 + f64::from(eps))
                    .sqrt(),
            ),
            Rule::L2 { eps } => (
                0.0,
                1.0 / (fold(0.0, &|sum, x| sum + f64::from(x) * f64::from(x)) + f64::from(eps)).sqrt(),
            ),
            Rule::Layer { eps, .. } => {
                let mean = fold(0.0, &|sum, x| sum + f64::from(x)) / n as f64;
                let variance = fold(0.0, &|sum, x| sum + (f64::from(x) - mean).powi(2)) / n as f64;
                (mean, 1.0 / (variance + f64::from(eps)).sqrt())
            }
            Rule::Softmax { log } => {
                let max = fold(f64::NEG_INFINITY, &|max, x| max.max(f64::from(x)));
                let max = if max == f64::NEG_INFINITY { 0.0 } else { max };
                let sum = fold(0.0, &|sum, x| sum + (f64::from(x) - max).exp());
                if log {
                    (max + sum.ln(), 1.0)
                } else {
                    (max, if sum > 0.0 { 1.0 / sum } else { 0.0 })
                }
            }
        };
        let [gamma, beta] = self.vectors();
        each(nest, |at| {
            // SAFETY: as above; the row of `y` belongs to this thread.
            let x = f64::from(unsafe { *x.wrapping_offset(at[1]) }) - shift;
            let value = if matches!(self, Rule::Softmax { log: false }) {
                x.exp()
            } else {
                x
            } * scale;
            let weight = at[2] as usize;
            let value = value as f32 * gamma.map_or(1.0, |g| g[weight]) + beta.map_or(0.0, |b| b[weight]);
            // SAFETY: as above.
            unsafe { *y.wrapping_offset(at[0]) = value };
        });
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
