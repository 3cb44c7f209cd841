//! Convolutions over one, two or three spatial dimensions, and their transposes.

use crate::elementwise::Unary;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use crate::weights::Weights;

/// Window geometry. Arrays hold depth, height, width; with fewer spatial dimensions the last entries count and the
/// others keep their default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvParams {
    /// Window size.
    pub kernel: [usize; 3],
    /// Step of the window.
    pub stride: [usize; 3],
    /// Step inside the window.
    pub dilation: [usize; 3],
    /// Zeros before the first position.
    pub pad_before: [usize; 3],
    /// Zeros after the last position.
    pub pad_after: [usize; 3],
    /// Independent groups of channels.
    pub groups: usize,
}

impl Default for ConvParams {
    fn default() -> Self {
        ConvParams {
            kernel: [1; 3],
            stride: [1; 3],
            dilation: [1; 3],
            pad_before: [0; 3],
            pad_after: [0; 3],
            groups: 1,
        }
    }
}

/// A convolution with what follows it.
#[derive(Debug, Clone, Copy)]
pub struct Conv<'a> {
    /// `[O, C / groups * kernel]`; transposed: `[C, O / groups * kernel]`.
    pub weights: &'a Weights,
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// Added last, of the output's shape.
    pub residual: Option<View<'a, f32>>,
    /// Window geometry.
    pub params: ConvParams,
}

/// Shape and strides with three spatial dimensions, missing ones in front with length 1: `[n, c, d, h, w]`.
pub(crate) fn five(shape: &[usize], strides: &[isize]) -> ([usize; 5], [isize; 5]) {
    let spatial = shape
        .len()
        .checked_sub(2)
        .filter(|spatial| (1..=3).contains(spatial));
    let missing = 3 - spatial.expect("tensors of rank 3 to 5");
    let (mut dims, mut steps) = ([1; 5], [0; 5]);
    for axis in 0..shape.len() {
        let at = if axis < 2 { axis } else { axis + missing };
        dims[at] = shape[axis];
        steps[at] = strides[axis];
    }
    (dims, steps)
}

/// The output positions and window cells of one axis: `input = out * stride + cell * dilation - pad`.
pub(crate) fn input_position(
    out: usize,
    cell: usize,
    params: &ConvParams,
    axis: usize,
    len: usize,
) -> Option<usize> {
    let at = out * params.stride[axis] + cell * params.dilation[axis];
    at.checked_sub(params.pad_before[axis]).filter(|at| *at < len)
}

impl ConvParams {
    /// Output length of spatial axis `axis` (0 depth, 1 height, 2 width) for an input of `len`; none when the window
    /// does not fit or a step is 0.
    pub fn output_len(&self, axis: usize, len: usize) -> Option<usize> {
        let padded = len
            .checked_add(self.pad_before[axis])?
            .checked_add(self.pad_after[axis])?;
        let reach = self.kernel[axis]
            .checked_sub(1)?
            .checked_mul(self.dilation[axis])?;
        Some(
            padded
                .checked_sub(reach)?
                .checked_sub(1)?
                .checked_div(self.stride[axis])?
                + 1,
        )
    }

    fn cells(&self) -> usize {
        self.kernel.iter().product()
    }
}

/// `y[n, o, ..] = activation(sum_{c, cell} x[n, c, ..] * w[o, c, cell] + bias[o]) + residual`.
///
/// # Panics
/// When the shapes do not fit.
pub fn conv(pool: &Pool, x: View<'_, f32>, conv: &Conv<'_>, mut y: ViewMut<'_, f32>, _scratch: &mut Scratch) {
    let params = conv.params;
    let ((xd, xs), (yd, ys)) = (five(x.shape(), x.strides()), five(y.shape(), y.strides()));
    let (channels, outputs) = (xd[1] / params.groups, yd[1] / params.groups);
    for axis in 0..3 {
        assert_eq!(
            Some(yd[axis + 2]),
            params.output_len(axis, xd[axis + 2]),
            "conv: output length"
        );
    }
    assert!(
        conv.weights.rows() == yd[1] && conv.weights.cols() == channels * params.cells(),
        "conv: weights"
    );
    assert!(
        xd[0] == yd[0] && xd[1] % params.groups == 0 && yd[1] % params.groups == 0,
        "conv: channels"
    );
    let residual = conv
        .residual
        .map(|r| (Shared::of(r.ptr()), five(r.shape(), r.strides()).1));
    let (px, py) = (Shared::of(x.ptr()), Shared(y.ptr()));
    pool.run(yd[0] * yd[1], &|job| {
        let (n, o) = (job / yd[1], job % yd[1]);
        let mut w = vec![0.0; conv.weights.cols()];
        conv.weights.row(o, &mut w);
        let base = n as isize * xs[0] + (o / outputs * channels) as isize * xs[1];
        for_positions([yd[2], yd[3], yd[4]], |at| {
            let mut sum = 0.0;
            for_positions(params.kernel, |cell| {
                let place: [Option<usize>; 3] =
                    std::array::from_fn(|a| input_position(at[a], cell[a], &params, a, xd[a + 2]));
                let [Some(d), Some(h), Some(w0)] = place else {
                    return;
                };
                let from = base + d as isize * xs[2] + h as isize * xs[3] + w0 as isize * xs[4];
                let cell = (cell[0] * params.kernel[1] + cell[1]) * params.kernel[2] + cell[2];
                for c in 0..channels {
                    // SAFETY: the position was checked against the shape of `x`.
                    sum += w[c * params.cells() + cell] * unsafe { *px.at(from + c as isize * xs[1]) };
                }
            });
            sum += conv.bias.map_or(0.0, |bias| bias[o]);
            sum = conv.activation.map_or(sum, |op| op.apply(sum));
            let offset = |s: [isize; 5]| {
                let index = [n, o, at[0], at[1], at[2]];
                index.iter().zip(s).map(|(i, s)| *i as isize * s).sum::<isize>()
            };
            // SAFETY: inside the shape of the residual, which is that of `y`.
            sum += residual.map_or(0.0, |(p, s)| unsafe { *p.at(offset(s)) });
            // SAFETY: inside `y`; this channel belongs to this thread.
            unsafe { *py.at(offset(ys)) = sum };
        });
    });
}

/// The transpose of [`conv`] (a fractionally strided convolution): `params` are those of the convolution that would
/// give `x` from `y`, and the weights are `[C, O / groups * kernel]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn conv_transpose(
    pool: &Pool,
    x: View<'_, f32>,
    conv: &Conv<'_>,
    mut y: ViewMut<'_, f32>,
    _scratch: &mut Scratch,
) {
    let params = conv.params;
    let ((xd, xs), (yd, ys)) = (five(x.shape(), x.strides()), five(y.shape(), y.strides()));
    let (channels, outputs) = (xd[1] / params.groups, yd[1] / params.groups);
    assert!(
        conv.weights.rows() == xd[1] && conv.weights.cols() == outputs * params.cells(),
        "conv: weights"
    );
    assert!(
        xd[0] == yd[0] && xd[1] % params.groups == 0 && yd[1] % params.groups == 0,
        "conv: channels"
    );
    assert!(params.stride.iter().all(|stride| *stride > 0), "conv: stride 0");
    let residual = conv
        .residual
        .map(|r| (Shared::of(r.ptr()), five(r.shape(), r.strides()).1));
    let (px, py) = (Shared::of(x.ptr()), Shared(y.ptr()));
    let cells = params.cells();
    pool.run(yd[0] * yd[1], &|job| {
        let (n, o) = (job / yd[1], job % yd[1]);
        let (group, inside) = (o / outputs, o % outputs);
        let mut w = vec![0.0; channels * cells];
        for (c, w) in w.chunks_mut(cells.max(1)).enumerate() {
            conv.weights.decode(group * channels + c, inside * cells, w);
        }
        let base = n as isize * xs[0] + (group * channels) as isize * xs[1];
        for_positions([yd[2], yd[3], yd[4]], |at| {
            let mut sum = 0.0;
            for_positions(params.kernel, |cell| {
                let place: [Option<usize>; 3] = std::array::from_fn(|a| {
                    let place = (at[a] + params.pad_before[a]).checked_sub(cell[a] * params.dilation[a])?;
                    let fits = place.is_multiple_of(params.stride[a]) && place / params.stride[a] < xd[a + 2];
                    fits.then_some(place / params.stride[a])
                });
                let [Some(d), Some(h), Some(w0)] = place else {
                    return;
                };
                let from = base + d as isize * xs[2] + h as isize * xs[3] + w0 as isize * xs[4];
                let cell = (cell[0] * params.kernel[1] + cell[1]) * params.kernel[2] + cell[2];
                for c in 0..channels {
                    // SAFETY: the position was checked against the shape of `x`.
                    sum += w[c * cells + cell] * unsafe { *px.at(from + c as isize * xs[1]) };
                }
            });
            sum += conv.bias.map_or(0.0, |bias| bias[o]);
            sum = conv.activation.map_or(sum, |op| op.apply(sum));
            let offset = |s: [isize; 5]| {
                let index = [n, o, at[0], at[1], at[2]];
                index.iter().zip(s).map(|(i, s)| *i as isize * s).sum::<isize>()
            };
            // SAFETY: inside the shape of the residual, which is that of `y`.
            sum += residual.map_or(0.0, |(p, s)| unsafe { *p.at(offset(s)) });
            // SAFETY: inside `y`; this channel belongs to this thread.
            unsafe { *py.at(offset(ys)) = sum };
        });
    });
}

/// Calls `body` with every index below `dims`, the last axis fastest.
pub(crate) fn for_positions(dims: [usize; 3], mut body: impl FnMut([usize; 3])) {
    for d in 0..dims[0] {
        for h in 0..dims[1] {
            (0..dims[2]).for_each(|w| body([d, h, w]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strided::dense_strides;

    #[test]
    fn output_lengths_follow_the_usual_rule() {
        let params = ConvParams {
            kernel: [1, 1, 3],
            pad_before: [0, 0, 1],
            ..ConvParams::default()
        };
        assert_eq!(params.output_len(2, 5), Some(4));
        assert_eq!(
            ConvParams {
                stride: [1, 1, 2],
                ..params
            }
            .output_len(2, 5),
            Some(2)
        );
        assert_eq!(
            ConvParams {
                dilation: [1, 1, 9],
                ..params
            }
            .output_len(2, 5),
            None
        );
        assert_eq!(
            ConvParams {
                stride: [0; 3],
                ..params
            }
            .output_len(2, 5),
            None
        );
    }

    #[test]
    fn a_small_convolution_and_its_transpose_have_their_known_values() {
        let pool = Pool::new(2);
        let weights =
            Weights::from_f32(1, 3, bytemuck::cast_slice(&[1.0_f32, 2.0, 3.0]).to_vec().into()).unwrap();
        let params = ConvParams {
            kernel: [1, 1, 3],
            stride: [1, 1, 2],
            pad_before: [0, 0, 1],
            ..ConvParams::default()
        };
        let call = Conv {
            weights: &weights,
            bias: Some(&[0.5]),
            activation: None,
            residual: None,
            params,
        };
        let x = [1.0, 10.0, 100.0, 1000.0];
        let mut y = [0.0; 2];
        let strides = dense_strides(&[1, 1, 4]);
        let view = View::new(&x, 0, &[1, 1, 4], &strides[..3]).unwrap();
        let strides = dense_strides(&[1, 1, 2]);
        let out = ViewMut::new(&mut y, 0, &[1, 1, 2], &strides[..3]).unwrap();
        conv(&pool, view, &call, out, &mut Scratch::new());
        assert_eq!(y, [32.5, 3210.5]);
        let x = [1.0, 10.0];
        let mut y = [0.0; 4];
        let view = View::new(&x, 0, &[1, 1, 2], &strides[..3]).unwrap();
        let strides = dense_strides(&[1, 1, 4]);
        let out = ViewMut::new(&mut y, 0, &[1, 1, 4], &strides[..3]).unwrap();
        conv_transpose(&pool, view, &call, out, &mut Scratch::new());
        assert_eq!(y, [2.5, 13.5, 20.5, 30.5]);
    }
}
