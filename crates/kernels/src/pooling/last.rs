//! Pooling of pictures whose channels lie side by side.

use super::{Pooling, padded_cells};
use crate::conv::ConvParams;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{View, ViewMut};
use std::ops::Range;

/// Pools `x[n, h, w, c]` into `y[n, h, w, c]` (row-major) as [`pool`](super::pool) does; the channels of `x` lie side by side.
///
/// # Panics
/// When the shapes do not fit or channels are apart.
pub fn pool_last(
    workers: &Pool,
    kind: Pooling,
    x: View<'_, f32>,
    params: &ConvParams,
    mut y: ViewMut<'_, f32>,
) {
    let (&[n, h, w, c], &[yn, oh, ow, oc]) = (x.shape(), y.shape()) else {
        panic!("pool: a picture has four dimensions")
    };
    let dense = x.strides()[3] == 1 || c == 1;
    assert!((n, c) == (yn, oc) && dense && y.is_contiguous(), "pool: shapes");
    let call = Call {
        kind,
        params,
        x: Shared::of(x.ptr()),
        x_dims: [h, w, c],
        x_steps: [x.strides()[0], x.strides()[1], x.strides()[2]],
        y: Shared(y.ptr()),
        y_dims: [oh, ow],
    };
    let line = ow * c;
    workers.run_ranges(n * oh, (4096 / line.max(1)).max(1), &|range| {
        for row in range {
            dispatch(Row { call: &call, row });
        }
    });
}

struct Call<'a> {
    kind: Pooling,
    params: &'a ConvParams,
    x: Shared<f32>,
    /// Rows, columns, channels.
    x_dims: [usize; 3],
    x_steps: [isize; 3],
    y: Shared<f32>,
    y_dims: [usize; 2],
}

impl Call<'_> {
    /// The cells of the window of output `out` along `axis` (1 rows, 2 columns) that lie in the picture.
    fn inside(&self, axis: usize, out: usize) -> Range<usize> {
        let (start, pad) = (out * self.params.stride[axis], self.params.pad_before[axis]);
        let dilation = self.params.dilation[axis];
        let first = pad.saturating_sub(start).div_ceil(dilation);
        let end = (pad + self.x_dims[axis - 1])
            .saturating_sub(start)
            .div_ceil(dilation);
        first..end.min(self.params.kernel[axis]).max(first)
    }
}

/// One row of the result, counted over all samples.
struct Row<'a> {
    call: &'a Call<'a>,
    row: usize,
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let call = self.call;
        let [oh, ow] = call.y_dims;
        let channels = call.x_dims[2];
        let (sample, row) = (self.row / oh, self.row % oh);
        let rows = call.inside(1, row);
        for column in 0..ow {
            let columns = call.inside(2, column);
            let cells = rows.len() * columns.len();
            let divisor = match call.kind {
                Pooling::Average {
                    count_include_pad: true,
                } => padded_cells(
                    [0, row, column],
                    call.params,
                    [1, 1, 1, call.x_dims[0], call.x_dims[1]],
                ),
                _ => cells.max(1),
            };
            let window = Window {
                call,
                first: call.x.at(sample as isize * call.x_steps[0]),
                places: [row, column],
                rows: rows.clone(),
                columns,
                divisor: divisor as f32,
            };
            let to = call.y.at((((self.row * ow) + column) * channels) as isize);
            let mut channel = 0;
            // SAFETY: the cells lie in the picture, the channels exist, and this row is this thread's.
            unsafe {
                while channel + S::LANES <= channels {
                    s.store(to.add(channel), window.pool(s, channel));
                    channel += S::LANES;
                }
                for channel in channel..channels {
                    *to.add(channel) = window.one(channel);
                }
            }
        }
    }
}

/// The window of one pixel of the result.
struct Window<'a> {
    call: &'a Call<'a>,
    /// The sample's first number.
    first: *mut f32,
    places: [usize; 2],
    rows: Range<usize>,
    columns: Range<usize>,
    divisor: f32,
}

impl Window<'_> {
    #[inline(always)]
    fn pixel(&self, i: usize, j: usize) -> *const f32 {
        let p = self.call.params;
        let h = self.places[0] * p.stride[1] + i * p.dilation[1] - p.pad_before[1];
        let w = self.places[1] * p.stride[2] + j * p.dilation[2] - p.pad_before[2];
        let steps = &self.call.x_steps;
        self.first
            .wrapping_offset(h as isize * steps[1] + w as isize * steps[2])
    }

    /// A vector of channels from `channel` on.
    ///
    /// # Safety
    /// The channels exist.
    #[inline(always)]
    unsafe fn pool<S: Simd>(&self, s: S, channel: usize) -> S::F {
        let start = match self.call.kind {
            Pooling::Max => f32::NEG_INFINITY,
            _ => 0.0,
        };
        let mut sum = s.splat(start);
        for i in self.rows.clone() {
            for j in self.columns.clone() {
                // SAFETY: the caller's.
                let x = unsafe { s.load(self.pixel(i, j).add(channel)) };
                sum = match self.call.kind {
                    // NaN is taken over from either side.
                    Pooling::Max => {
                        let held = s.select(s.eq(sum, sum), s.max(sum, x), sum);
                        s.select(s.eq(x, x), held, x)
                    }
                    Pooling::Average { .. } => s.add(sum, x),
                    Pooling::L2 => s.fma(x, x, sum),
                };
            }
        }
        match self.call.kind {
            Pooling::Max => sum,
            Pooling::Average { .. } => s.div(sum, s.splat(self.divisor)),
            Pooling::L2 => s.sqrt(sum),
        }
    }

    /// One channel, for those that do not fill a vector.
    ///
    /// # Safety
    /// The channel exists.
    unsafe fn one(&self, channel: usize) -> f32 {
        let (mut max, mut sum, mut squares) = (f32::NEG_INFINITY, 0.0_f32, 0.0_f32);
        for i in self.rows.clone() {
            for j in self.columns.clone() {
                // SAFETY: the caller's.
                let x = unsafe { *self.pixel(i, j).add(channel) };
                max = if x > max || x.is_nan() { x } else { max };
                sum += x;
                squares += x * x;
            }
        }
        match self.call.kind {
            Pooling::Max => max,
            Pooling::Average { .. } => sum / self.divisor,
            Pooling::L2 => squares.sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use crate::pooling::pool;

    #[test]
    fn channels_last_gives_what_channels_first_gives() {
        let mut seed = 5;
        let kinds = [
            Pooling::Max,
            Pooling::L2,
            Pooling::Average {
                count_include_pad: true,
            },
            Pooling::Average {
                count_include_pad: false,
            },
        ];
        for (i, &(h, w, c, kernel, stride, before, after)) in [
            (9, 7, 20, [3, 3], [2, 2], [1, 1], [1, 1]),
            (5, 6, 8, [2, 3], [1, 2], [0, 2], [1, 0]),
            (4, 4, 37, [4, 4], [4, 4], [0, 0], [0, 0]),
            (3, 8, 5, [1, 2], [1, 1], [0, 0], [0, 1]),
        ]
        .iter()
        .enumerate()
        {
            let params = ConvParams {
                kernel: [1, kernel[0], kernel[1]],
                stride: [1, stride[0], stride[1]],
                pad_before: [0, before[0], before[1]],
                pad_after: [0, after[0], after[1]],
                ..ConvParams::default()
            };
            let out = [1, 2].map(|a| params.output_len(a, [h, w][a - 1]).unwrap());
            let mut x: Vec<f32> = (0..2 * h * w * c).map(|_| random(&mut seed)).collect();
            x[i] = f32::NAN;
            let turned = |h: usize, w: usize| {
                let step = [h * w * c, 1, w * c, c].map(|s| s as isize);
                ([2, c, h, w], step)
            };
            let ((xs, xd), (ys, yd)) = (turned(h, w), turned(out[0], out[1]));
            let len = 2 * out[0] * out[1] * c;
            for kind in kinds {
                let (mut expected, mut found) = (vec![0.0; len], vec![0.0; len]);
                let first = View::new(&x, 0, &xs, &xd).unwrap();
                pool(
                    &Pool::new(1),
                    kind,
                    first,
                    &params,
                    ViewMut::new(&mut expected, 0, &ys, &yd).unwrap(),
                );
                let (xs, ys) = ([2, h, w, c], [2, out[0], out[1], c]);
                let dense = |s: [usize; 4]| [s[1] * s[2] * s[3], s[2] * s[3], s[3], 1].map(|s| s as isize);
                let (xd, yd) = (dense(xs), dense(ys));
                let last = View::new(&x, 0, &xs, &xd).unwrap();
                pool_last(
                    &Pool::new(2),
                    kind,
                    last,
                    &params,
                    ViewMut::new(&mut found, 0, &ys, &yd).unwrap(),
                );
                for (at, (a, b)) in expected.iter().zip(&found).enumerate() {
                    let same = (a - b).abs() < 1e-5 || (a.is_nan() && b.is_nan());
                    assert!(same, "case {i} {kind:?} at {at}: {a} {b}");
                }
            }
        }
    }
}
