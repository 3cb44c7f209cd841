//! Convolutions over one, two or three spatial dimensions, and their transposes.

mod blocked;
mod depthwise;
mod last;

pub use last::{
    Beside as ConvBeside, ConvChain, ConvLast, PackedConv, conv_chain, conv_last, has_conv_chain,
    has_conv_last,
};

use crate::elementwise::{Unary, apply_slice};
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
pub fn conv(pool: &Pool, x: View<'_, f32>, conv: &Conv<'_>, y: ViewMut<'_, f32>, scratch: &mut Scratch) {
    let call = Call::new(x, conv, y);
    for axis in 0..3 {
        let expected = call.params.output_len(axis, call.x_dims[axis + 2]);
        assert_eq!(Some(call.y_dims[axis + 2]), expected, "conv: output length");
    }
    let cells = call.params.cells();
    assert!(
        conv.weights.rows() == call.y_dims[1] && conv.weights.cols() == call.channels * cells,
        "conv: weights"
    );
    if call.y_dims.contains(&0) {
        return;
    }
    if call.channels == 1
        && call.params.kernel[0] == 1
        && call.y_dims[2] == 1
        && call.params.pad_before[0] == 0
    {
        depthwise::run(pool, &call, scratch);
    } else {
        blocked::run(pool, &call, scratch);
    }
}

/// A call in five dimensions, with its channels per group.
#[derive(Debug, Clone, Copy)]
struct Call<'a> {
    weights: &'a Weights,
    bias: Option<&'a [f32]>,
    activation: Option<Unary>,
    params: ConvParams,
    x: Shared<f32>,
    x_dims: [usize; 5],
    x_steps: [isize; 5],
    y: Shared<f32>,
    y_dims: [usize; 5],
    y_steps: [isize; 5],
    residual: Option<(Shared<f32>, [isize; 5])>,
    channels: usize,
    outputs: usize,
}

impl<'a> Call<'a> {
    fn new(x: View<'_, f32>, conv: &Conv<'a>, mut y: ViewMut<'_, f32>) -> Self {
        let params = conv.params;
        let ((x_dims, x_steps), (y_dims, y_steps)) =
            (five(x.shape(), x.strides()), five(y.shape(), y.strides()));
        let groups = params.groups;
        let fits = groups > 0 && x_dims[1].is_multiple_of(groups) && y_dims[1].is_multiple_of(groups);
        assert!(fits && x_dims[0] == y_dims[0], "conv: channels");
        assert!(
            conv.bias.is_none_or(|bias| bias.len() == y_dims[1]),
            "conv: one bias per output"
        );
        let residual = conv.residual.map(|r| {
            assert_eq!(r.shape(), y.shape(), "conv: residual shape");
            (Shared::of(r.ptr()), five(r.shape(), r.strides()).1)
        });
        Call {
            weights: conv.weights,
            bias: conv.bias,
            activation: conv.activation,
            params,
            x: Shared::of(x.ptr()),
            x_dims,
            x_steps,
            y: Shared(y.ptr()),
            y_dims,
            y_steps,
            residual,
            channels: x_dims[1] / groups,
            outputs: y_dims[1] / groups,
        }
    }

    /// Bias, activation and residual for values of output channel `o` of sample `n`, then to `y`. The values are those
    /// of positions `first..`, counted row-major over depth, height and width.
    ///
    /// # Safety
    /// The positions exist, and no other thread has them.
    unsafe fn finish(&self, (n, o): (usize, usize), first: usize, values: &mut [f32]) {
        if let Some(bias) = self.bias {
            values.iter_mut().for_each(|value| *value += bias[o]);
        }
        if let Some(op) = self.activation {
            apply_slice(op, values);
        }
        let [_, _, _, height, width] = self.y_dims;
        let mut done = 0;
        while done < values.len() {
            let at = first + done;
            let place = [n, o, at / (height * width), at / width % height, at % width];
            let count = (width - place[4]).min(values.len() - done);
            let part = &mut values[done..done + count];
            done += count;
            let offset = |steps: &[isize; 5]| {
                place
                    .iter()
                    .zip(steps)
                    .map(|(i, s)| *i as isize * s)
                    .sum::<isize>()
            };
            if let Some((residual, steps)) = self.residual {
                let from = residual.at(offset(&steps));
                for (i, value) in part.iter_mut().enumerate() {
                    // SAFETY: the residual has the shape of the output.
                    *value += unsafe { *from.wrapping_offset(i as isize * steps[4]) };
                }
            }
            let to = self.y.at(offset(&self.y_steps));
            for (i, value) in part.iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { *to.wrapping_offset(i as isize * self.y_steps[4]) = *value };
            }
        }
    }
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
    use crate::matvec::tests::random;
    use proptest::prelude::*;

    /// The value at one output position, by the definition.
    fn one(
        x: &[f32],
        w: &[f32],
        dims: [usize; 5],
        params: &ConvParams,
        (o, outputs): (usize, usize),
        at: [usize; 4],
    ) -> f64 {
        let channels = dims[1] / params.groups;
        let group = o / (outputs / params.groups);
        let mut sum = 0.0;
        for c in 0..channels {
            for_positions(params.kernel, |cell| {
                let place: [Option<usize>; 3] =
                    std::array::from_fn(|a| input_position(at[a + 1], cell[a], params, a, dims[a + 2]));
                if let [Some(d), Some(h), Some(v)] = place {
                    let from = (((at[0] * dims[1] + group * channels + c) * dims[2] + d) * dims[3] + h)
                        * dims[4]
                        + v;
                    let cell = (cell[0] * params.kernel[1] + cell[1]) * params.kernel[2] + cell[2];
                    sum += f64::from(x[from]) * f64::from(w[(o * channels + c) * params.cells() + cell]);
                }
            });
        }
        sum
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(250))]
        #[test]
        fn convolutions_of_any_geometry_agree_with_the_definition(
            n in 1_usize..3, groups in 1_usize..4, per_group in (1_usize..4, 1_usize..9), spatial in 1_usize..4,
            size in proptest::array::uniform3(1_usize..23), kernel in proptest::array::uniform3(1_usize..5),
            stride in proptest::array::uniform3(1_usize..4), dilation in proptest::array::uniform3(1_usize..3),
            pad in proptest::array::uniform3(0_usize..3), extras in any::<bool>(), reversed in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let keep = |value: [usize; 3], rest: usize| std::array::from_fn(|a| if a + spatial >= 3 { value[a] } else { rest });
            let mut size = keep(size, 1);
            if spatial == 3 {
                size = size.map(|size| size.min(9));
            }
            let params = ConvParams {
                kernel: keep(kernel, 1),
                stride: keep(stride, 1),
                dilation: keep(dilation, 1),
                pad_before: keep(pad, 0),
                pad_after: keep([pad[1], pad[2], pad[0]], 0),
                groups,
            };
            let Some(out) = (0..3).map(|a| params.output_len(a, size[a])).collect::<Option<Vec<_>>>() else { return Ok(()) };
            let (channels, outputs) = (groups * per_group.0, groups * per_group.1);
            let dims = [n, channels, size[0], size[1], size[2]];
            let x: Vec<f32> = (0..dims.iter().product()).map(|_| random(&mut seed)).collect();
            let w: Vec<f32> = (0..outputs * per_group.0 * params.cells()).map(|_| random(&mut seed)).collect();
            let bytes = bytemuck::cast_slice(&w).to_vec().into();
            let weights = Weights::from_f32(outputs, per_group.0 * params.cells(), bytes).unwrap();
            let front = |all: [usize; 5]| [&all[..2], &all[5 - spatial..]].concat();
            let (x_shape, y_shape) = (front(dims), front([n, outputs, out[0], out[1], out[2]]));
            let y_len: usize = y_shape.iter().product();
            let bias: Vec<f32> = (0..outputs).map(|_| random(&mut seed)).collect();
            let residual: Vec<f32> = (0..y_len).map(|_| random(&mut seed)).collect();
            let (xs, ys) = (dense_strides(&x_shape), dense_strides(&y_shape));
            // Reversed: the input is read backwards, so its data is turned round first.
            let rank = x_shape.len();
            let data: Vec<f32> = if reversed { x.iter().rev().copied().collect() } else { x.clone() };
            let x_strides: Vec<isize> = xs[..rank].iter().map(|s| if reversed { -s } else { *s }).collect();
            let view = View::new(&data, if reversed { x.len() - 1 } else { 0 }, &x_shape, &x_strides).unwrap();
            let call = Conv {
                weights: &weights,
                bias: extras.then_some(&bias[..]),
                activation: extras.then_some(Unary::Relu),
                residual: extras.then(|| View::new(&residual, 0, &y_shape, &ys[..rank]).unwrap()),
                params,
            };
            let mut y = vec![f32::NAN; y_len];
            let target = ViewMut::new(&mut y, 0, &y_shape, &ys[..rank]).unwrap();
            conv(&Pool::new(2), view, &call, target, &mut Scratch::new());
            let positions: usize = out.iter().product();
            for (i, found) in y.iter().enumerate() {
                let (o, rest) = (i / positions % outputs, i % positions);
                let at = [i / positions / outputs, rest / (out[1] * out[2]), rest / out[2] % out[1], rest % out[2]];
                let mut expected = one(&x, &w, dims, &params, (o, outputs), at);
                if extras {
                    expected = (expected + f64::from(bias[o])).max(0.0) + f64::from(residual[i]);
                }
                prop_assert!((f64::from(*found) - expected).abs() < 1e-4, "{at:?} {o}: {found} is not {expected}");
            }
        }
    }
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
