//! Winograd's transform for 3x3 windows with step 1: a square of outputs costs a product per element of a slightly larger
//! square, not nine per output. F(4x4) does a quarter of the multiplications, F(2x2) under a half.
//!
//! Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.

use super::Call;
use super::direct::{Part, Product, Runs};
use super::epilogue::Epilogue;
use super::packed::{PackedConv, Way, padded, panel_of};
use crate::conv::ConvParams;
use crate::gemm::panel_width;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch};
use crate::weights::Weights;

/// The largest square that is transformed.
const MOST: usize = 6;
/// Channels must be a multiple of the widest vector.
const LANES: usize = 16;
/// Fewer channels do not pay for the transforms.
const LEAST_CHANNELS: usize = 32;

/// One form of the transform. Lines have [`MOST`] entries, of which the first `TILE + 2` count.
pub(super) trait Form: Copy + Send + Sync {
    /// Outputs along a side.
    const TILE: usize;
    /// Inputs along a side.
    const SIDE: usize = Self::TILE + 2;

    /// A line of weights.
    fn weights(w: [f64; 3]) -> [f64; MOST];
    /// A line of inputs.
    fn input<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST];
    /// A line of products back to outputs.
    fn output<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST];
}

/// F(4x4, 3x3).
#[derive(Debug, Clone, Copy)]
pub(super) struct Four;

/// F(2x2, 3x3).
#[derive(Debug, Clone, Copy)]
pub(super) struct Two;

impl Form for Four {
    const TILE: usize = 4;

    fn weights([a, b, c]: [f64; 3]) -> [f64; MOST] {
        let (even, far) = ((a + c) / 6.0, a / 24.0 + c / 6.0);
        [
            a / 4.0,
            -even - b / 6.0,
            -even + b / 6.0,
            far + b / 12.0,
            far - b / 12.0,
            c,
        ]
    }

    #[inline(always)]
    fn input<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST] {
        let (two, four, five) = (s.splat(2.0), s.splat(4.0), s.splat(5.0));
        let near = s.fnma(four, x[2], x[4]);
        let near_odd = s.fnma(four, x[1], x[3]);
        let far = s.sub(x[4], x[2]);
        let far_odd = s.mul(two, s.sub(x[3], x[1]));
        [
            s.add(s.fnma(five, x[2], s.mul(four, x[0])), x[4]),
            s.add(near, near_odd),
            s.sub(near, near_odd),
            s.add(far, far_odd),
            s.sub(far, far_odd),
            s.add(s.fnma(five, x[3], s.mul(four, x[1])), x[5]),
        ]
    }

    #[inline(always)]
    fn output<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST] {
        let (two, four, eight) = (s.splat(2.0), s.splat(4.0), s.splat(8.0));
        let (near, near_odd) = (s.add(x[1], x[2]), s.sub(x[1], x[2]));
        let (far, far_odd) = (s.add(x[3], x[4]), s.sub(x[3], x[4]));
        [
            s.add(x[0], s.add(near, far)),
            s.fma(two, far_odd, near_odd),
            s.fma(four, far, near),
            s.add(s.fma(eight, far_odd, near_odd), x[5]),
            s.zero(),
            s.zero(),
        ]
    }
}

impl Form for Two {
    const TILE: usize = 2;

    fn weights([a, b, c]: [f64; 3]) -> [f64; MOST] {
        [a, (a + b + c) / 2.0, (a - b + c) / 2.0, c, 0.0, 0.0]
    }

    #[inline(always)]
    fn input<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST] {
        [
            s.sub(x[0], x[2]),
            s.add(x[1], x[2]),
            s.sub(x[2], x[1]),
            s.sub(x[1], x[3]),
            s.zero(),
            s.zero(),
        ]
    }

    #[inline(always)]
    fn output<S: Simd>(s: S, x: [S::F; MOST]) -> [S::F; MOST] {
        let (sum, difference) = (s.add(x[1], x[2]), s.sub(x[1], x[2]));
        [
            s.add(x[0], sum),
            s.sub(difference, x[3]),
            s.zero(),
            s.zero(),
            s.zero(),
            s.zero(),
        ]
    }
}

/// The way that costs least: transformed weights are larger, so they must be few beside the outputs they serve.
pub(super) fn worth(params: &ConvParams, channels: usize, outputs: usize, pixels: [usize; 2]) -> Way {
    let square = params.kernel == [1, 3, 3] && params.stride[1..] == [1, 1] && params.dilation[1..] == [1, 1];
    let whole = channels.is_multiple_of(LANES) && outputs.is_multiple_of(LANES);
    let enough = channels.min(outputs) >= LEAST_CHANNELS;
    if !square || !whole || !enough || params.groups != 1 {
        return Way::Direct;
    }
    let side = pixels[0].min(pixels[1]);
    let weights = channels * outputs;
    if side >= 24 && weights <= 256 * 256 {
        Way::Winograd4
    } else if side >= 10 && weights <= 256 * 512 {
        Way::Winograd2
    } else {
        Way::Direct
    }
}

/// `[position][panel][channel][width]`
pub(super) fn pack<F: Form>(packed: &mut PackedConv, weights: &Weights) {
    let (channels, outputs) = (packed.channels(), packed.outputs());
    let mut row = vec![0.0_f32; 9 * channels];
    let each = padded(outputs) * channels;
    let out = packed.grow(F::SIDE * F::SIDE * each);
    for o in 0..outputs {
        weights.decode(o, 0, &mut row);
        let (start, width) = panel_of(o, outputs, channels);
        for (c, w) in row.chunks_exact(9).enumerate() {
            let line = |i: usize| F::weights([w[3 * i], w[3 * i + 1], w[3 * i + 2]].map(f64::from));
            let lines = [line(0), line(1), line(2)];
            for j in 0..F::SIDE {
                let column = F::weights([lines[0][j], lines[1][j], lines[2][j]]);
                for (i, value) in column.iter().take(F::SIDE).enumerate() {
                    out[(i * F::SIDE + j) * each + start + c * width] = *value as f32;
                }
            }
        }
    }
}

/// Squares of outputs in a row, in a column, in all.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    columns: usize,
    rows: usize,
    all: usize,
}

pub(super) fn run<F: Form>(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) {
    let (channels, outputs) = (call.x_dims[3], call.y_dims[3]);
    let (rows, columns) = (call.y_dims[1].div_ceil(F::TILE), call.y_dims[2].div_ceil(F::TILE));
    let tiles = Tiles {
        columns,
        rows,
        all: call.x_dims[0] * rows * columns,
    };
    let positions = F::SIDE * F::SIDE;
    let inputs_len = (positions * tiles.all * channels).next_multiple_of(LANES);
    let space = scratch.f32(inputs_len + positions * tiles.all * outputs);
    let (inputs, products) = space.split_at_mut(inputs_len);
    let (inputs, products) = (Shared(inputs.as_mut_ptr()), Shared(products.as_mut_ptr()));
    pool.run_ranges(tiles.all, 2, &|range| {
        dispatch(Inputs::<F> {
            call,
            tiles,
            range,
            to: inputs,
            form: std::marker::PhantomData,
        });
    });
    multiply::<F>(pool, call, tiles, inputs, products);
    pool.run_ranges(tiles.all, 2, &|range| {
        dispatch(Outputs::<F> {
            call,
            tiles,
            range,
            from: products,
            form: std::marker::PhantomData,
        });
    });
}

/// For each position of the square, `products[tile][o] = inputs[tile][c] * weights[c][o]`.
fn multiply<F: Form>(pool: &Pool, call: &Call<'_>, tiles: Tiles, inputs: Shared<f32>, products: Shared<f32>) {
    let (channels, outputs) = (call.x_dims[3], call.y_dims[3]);
    let each = padded(outputs) * channels;
    let runs = Runs {
        rows: 1,
        columns: 1,
        steps: [0; 2],
        len: channels,
        apart: 0,
    };
    let positions = F::SIDE * F::SIDE;
    // Where weights are the smaller part, a thread has the tiles that it transformed, at all positions; else it has positions, two
    // chunks each: enough of them for many threads, and each reads half of the position's weights.
    let by_tiles = channels * outputs < tiles.all * (channels + outputs) / 2;
    let parts = if by_tiles {
        pool.threads().min(tiles.all)
    } else {
        1
    };
    let group = if by_tiles {
        outputs
    } else {
        outputs.div_ceil(panel_width()).div_ceil(2) * panel_width()
    };
    let groups = outputs.div_ceil(group);
    pool.run(parts * positions * groups, &|chunk| {
        let (part, chunk) = (chunk / (positions * groups), chunk % (positions * groups));
        let (position, first) = (chunk / groups, chunk % groups * group);
        let from = inputs.at((position * tiles.all * channels) as isize);
        let from = Shared(from);
        let starts = |first: usize, starts: &mut [*const f32]| {
            for (i, start) in starts.iter_mut().enumerate() {
                *start = from.at(((first + i) * channels) as isize);
            }
        };
        Part {
            product: Product {
                weights: &call.packed.data()[position * each..][..each],
                outputs,
                runs,
            },
            starts: &starts,
            pixels: part * tiles.all / parts..(part + 1) * tiles.all / parts,
            outputs: first..(first + group).min(outputs),
            epilogue: Epilogue::none(),
            y: Shared(products.at((position * tiles.all * outputs) as isize)),
            line: outputs,
        }
        .run::<false>();
    });
}

/// Transforms the inputs of some tiles.
struct Inputs<'a, F> {
    call: &'a Call<'a>,
    tiles: Tiles,
    range: std::ops::Range<usize>,
    to: Shared<f32>,
    form: std::marker::PhantomData<F>,
}

impl<F: Form> Kernel for Inputs<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let call = self.call;
        let [_, height, width, channels] = call.x_dims;
        let pads = [call.params.pad_before[1], call.params.pad_before[2]];
        for tile in self.range.clone() {
            let (n, at) = (
                tile / (self.tiles.rows * self.tiles.columns),
                tile % (self.tiles.rows * self.tiles.columns),
            );
            let top = (at / self.tiles.columns * F::TILE) as isize - pads[0] as isize;
            let left = (at % self.tiles.columns * F::TILE) as isize - pads[1] as isize;
            let sample = n as isize * call.x_steps[0];
            for channel in (0..channels).step_by(S::LANES) {
                let mut square = [[s.zero(); MOST]; MOST];
                for (i, line) in square.iter_mut().enumerate().take(F::SIDE) {
                    let row = top + i as isize;
                    if row < 0 || row >= height as isize {
                        continue;
                    }
                    let mut x = [s.zero(); MOST];
                    for (j, x) in x.iter_mut().enumerate().take(F::SIDE) {
                        let column = left + j as isize;
                        if column >= 0 && column < width as isize {
                            let offset = sample + row * call.x_steps[1] + column * call.x_steps[2];
                            // SAFETY: a vector of channels of a pixel of the picture; channels are whole vectors.
                            *x = unsafe { s.load(call.x.at(offset + channel as isize)) };
                        }
                    }
                    *line = F::input(s, x);
                }
                for j in 0..F::SIDE {
                    let column = F::input(s, std::array::from_fn(|i| square[i][j]));
                    for (i, value) in column.into_iter().enumerate().take(F::SIDE) {
                        let position = i * F::SIDE + j;
                        let at = (position * self.tiles.all + tile) * channels + channel;
                        // SAFETY: this tile of the working memory is this thread's.
                        unsafe { s.store(self.to.at(at as isize), value) };
                    }
                }
            }
        }
    }
}

/// Transforms the products of some tiles back and finishes them.
struct Outputs<'a, F> {
    call: &'a Call<'a>,
    tiles: Tiles,
    range: std::ops::Range<usize>,
    from: Shared<f32>,
    form: std::marker::PhantomData<F>,
}

impl<F: Form> Kernel for Outputs<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [_, height, width, outputs] = self.call.y_dims;
        for tile in self.range.clone() {
            let (n, at) = (
                tile / (self.tiles.rows * self.tiles.columns),
                tile % (self.tiles.rows * self.tiles.columns),
            );
            let (top, left) = (
                at / self.tiles.columns * F::TILE,
                at % self.tiles.columns * F::TILE,
            );
            for output in (0..outputs).step_by(S::LANES) {
                let mut square = [[s.zero(); MOST]; MOST];
                for (j, column) in square.iter_mut().enumerate().take(F::SIDE) {
                    let mut x = [s.zero(); MOST];
                    for (i, x) in x.iter_mut().enumerate().take(F::SIDE) {
                        let position = i * F::SIDE + j;
                        let at = (position * self.tiles.all + tile) * outputs + output;
                        // SAFETY: a vector of products; outputs are whole vectors.
                        *x = unsafe { s.load(self.from.at(at as isize)) };
                    }
                    *column = F::output(s, x);
                }
                for i in 0..F::TILE.min(height - top) {
                    let line = F::output(s, std::array::from_fn(|j| square[j][i]));
                    for (j, value) in line.into_iter().enumerate().take(F::TILE.min(width - left)) {
                        let at = ((n * height + top + i) * width + left + j) * outputs + output;
                        // SAFETY: these outputs of the tile exist and are this thread's.
                        unsafe { self.put(s, value, output, at) };
                    }
                }
            }
        }
    }
}

impl<F: Form> Outputs<'_, F> {
    /// # Safety
    /// As [`Epilogue::put`].
    #[inline(always)]
    unsafe fn put<S: Simd>(&self, s: S, value: S::F, output: usize, at: usize) {
        let (epilogue, y) = (&self.call.epilogue, self.call.y);
        if epilogue.in_registers() {
            // SAFETY: the caller's.
            return unsafe { epilogue.put(s, value, output, y, at) };
        }
        let mut line = [0.0; LANES];
        // SAFETY: no vector is longer than sixteen lanes.
        unsafe { s.store(line.as_mut_ptr(), value) };
        // SAFETY: the caller's.
        unsafe { epilogue.put_slice(&mut line[..S::LANES], output, y, at) };
    }
}
