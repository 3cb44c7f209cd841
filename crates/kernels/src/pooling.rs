//! Maximum, average and L2 pooling over one, two or three spatial dimensions.

mod last;

pub use last::pool_last;

use crate::conv::{ConvParams, five, for_positions, input_position};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::strided::{View, ViewMut};

/// What a window becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The greatest value; padding does not take part.
    Max,
    /// The mean; padding counts as zeros when `count_include_pad`, and not at all otherwise.
    Average {
        /// Whether padding is part of the divisor.
        count_include_pad: bool,
    },
    /// The root of the sum of squares.
    L2,
}

/// Pools `x[n, c, ..]` into `y[n, c, ..]`. The output lengths are `y`'s, so windows may reach past the padding at
/// the end (ceiling mode); the part outside does not count. Groups are not used.
///
/// # Panics
/// When batch or channels differ.
pub fn pool(workers: &Pool, kind: Pooling, x: View<'_, f32>, params: &ConvParams, mut y: ViewMut<'_, f32>) {
    let ((xd, xs), (yd, ys)) = (five(x.shape(), x.strides()), five(y.shape(), y.strides()));
    assert!(xd[..2] == yd[..2], "pool: batch and channels");
    let (px, py) = (Shared::of(x.ptr()), Shared(y.ptr()));
    workers.run_ranges(yd[0] * yd[1], 1, &|range| {
        for job in range {
            let (n, c) = ((job / yd[1]) as isize, (job % yd[1]) as isize);
            for_positions([yd[2], yd[3], yd[4]], |at| {
                let (mut max, mut sum, mut squares, mut count) = (f32::NEG_INFINITY, 0.0, 0.0, 0_usize);
                for_positions(params.kernel, |cell| {
                    let place: [Option<usize>; 3] =
                        std::array::from_fn(|a| input_position(at[a], cell[a], params, a, xd[a + 2]));
                    let [Some(d), Some(h), Some(w)] = place else {
                        return;
                    };
                    let from =
                        n * xs[0] + c * xs[1] + d as isize * xs[2] + h as isize * xs[3] + w as isize * xs[4];
                    // SAFETY: the position was checked against the shape of `x`.
                    let value = unsafe { *px.at(from) };
                    max = if value > max || value.is_nan() { value } else { max };
                    sum += value;
                    squares += value * value;
                    count += 1;
                });
                let value = match kind {
                    Pooling::Max => max,
                    Pooling::L2 => f32::sqrt(squares),
                    Pooling::Average {
                        count_include_pad: true,
                    } => sum / padded_cells(at, params, xd) as f32,
                    Pooling::Average { .. } => sum / count.max(1) as f32,
                };
                let to = n * ys[0]
                    + c * ys[1]
                    + at[0] as isize * ys[2]
                    + at[1] as isize * ys[3]
                    + at[2] as isize * ys[4];
                // SAFETY: inside `y`; this channel belongs to this thread.
                unsafe { *py.at(to) = value };
            });
        }
    });
}

/// Cells of the window at `at` that lie in the input or its padding.
fn padded_cells(at: [usize; 3], params: &ConvParams, xd: [usize; 5]) -> usize {
    let cells = (0..3).map(|a| {
        let end = params.pad_before[a] + xd[a + 2] + params.pad_after[a];
        (0..params.kernel[a])
            .filter(|cell| at[a] * params.stride[a] + cell * params.dilation[a] < end)
            .count()
    });
    cells.product::<usize>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_counts_as_asked() {
        let params = ConvParams {
            kernel: [1, 1, 3],
            stride: [1, 1, 2],
            pad_before: [0, 0, 1],
            pad_after: [0, 0, 1],
            ..ConvParams::default()
        };
        // The windows are padding, -5, -3 and -3, 1, 6.
        let cases = [
            (Pooling::Max, [-3.0, 6.0]),
            (
                Pooling::Average {
                    count_include_pad: false,
                },
                [-4.0, 4.0 / 3.0],
            ),
            (
                Pooling::Average {
                    count_include_pad: true,
                },
                [-8.0 / 3.0, 4.0 / 3.0],
            ),
            (Pooling::L2, [34.0_f32.sqrt(), 46.0_f32.sqrt()]),
        ];
        for (kind, expected) in cases {
            let mut y = [0.0; 2];
            let x = View::new(&[-5.0, -3.0, 1.0, 6.0], 0, &[1, 1, 4], &[4, 4, 1]).unwrap();
            pool(
                &Pool::new(1),
                kind,
                x,
                &params,
                ViewMut::new(&mut y, 0, &[1, 1, 2], &[2, 2, 1]).unwrap(),
            );
            assert_eq!(y, expected, "{kind:?}");
        }
    }
}
