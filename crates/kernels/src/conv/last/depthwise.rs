//! One channel a group: every window runs along the channels.

use super::Call;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};

/// Vectors of channels that are summed side by side.
const VECTORS: usize = 4;

pub(super) fn run(pool: &Pool, call: &Call<'_>) {
    let rows = call.y_dims[0] * call.y_dims[1];
    let line = call.y_dims[2] * call.y_dims[3];
    pool.run_ranges(rows, (4096 / line.max(1)).max(1), &|range| {
        for row in range {
            dispatch(Row {
                call,
                sample: row / call.y_dims[1],
                row: row % call.y_dims[1],
            });
        }
    });
}

/// The cells of the window of output `out` along `axis` that lie in the picture.
fn inside(call: &Call<'_>, axis: usize, out: usize, len: usize) -> std::ops::Range<usize> {
    let (params, start) = (&call.params, out * call.params.stride[axis]);
    let dilation = params.dilation[axis];
    // cell * dilation + start >= pad, and below pad + len
    let first = params.pad_before[axis].saturating_sub(start).div_ceil(dilation);
    let end = (params.pad_before[axis] + len)
        .saturating_sub(start)
        .div_ceil(dilation);
    first..end.min(params.kernel[axis]).max(first)
}

/// One row of the result.
struct Row<'a> {
    call: &'a Call<'a>,
    sample: usize,
    row: usize,
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let call = self.call;
        let [_, height, width, channels] = call.x_dims;
        let rows = inside(call, 1, self.row, height);
        for column in 0..call.y_dims[2] {
            let columns = inside(call, 2, column, width);
            let window = Window {
                call,
                rows: rows.clone(),
                columns,
                row: self.row,
                sample: self.sample,
                column,
            };
            let at = ((self.sample * call.y_dims[1] + self.row) * call.y_dims[2] + column) * channels;
            let mut channel = 0;
            // SAFETY: the cells lie in the picture, the channels exist, and this row is this thread's.
            unsafe {
                while channel + VECTORS * S::LANES <= channels {
                    window.channels::<S, VECTORS>(s, channel, VECTORS * S::LANES, at);
                    channel += VECTORS * S::LANES;
                }
                while channel + S::LANES <= channels {
                    window.channels::<S, 1>(s, channel, S::LANES, at);
                    channel += S::LANES;
                }
                window.rest(channel, at);
            }
        }
    }
}

/// The window of one pixel.
struct Window<'a> {
    call: &'a Call<'a>,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    sample: usize,
    row: usize,
    column: usize,
}

impl Window<'_> {
    /// Where the channels of a cell are in the picture.
    #[inline(always)]
    fn pixel(&self, i: usize, j: usize) -> *const f32 {
        let (params, steps) = (&self.call.params, &self.call.x_steps);
        let h = self.row * params.stride[1] + i * params.dilation[1] - params.pad_before[1];
        let w = self.column * params.stride[2] + j * params.dilation[2] - params.pad_before[2];
        let offset = self.sample as isize * steps[0] + h as isize * steps[1] + w as isize * steps[2];
        self.call.x.at(offset)
    }

    /// `V` vectors of channels from `channel` on; the result's pixel begins at element `at`.
    ///
    /// # Safety
    /// The channels exist, and the pixel is this thread's.
    #[inline(always)]
    unsafe fn channels<S: Simd, const V: usize>(&self, s: S, channel: usize, count: usize, at: usize) {
        let mut sums = [s.zero(); V];
        let weights = self.call.packed.data().as_ptr();
        let all = self.call.x_dims[3];
        for i in self.rows.clone() {
            let line = i * self.call.params.kernel[2];
            for j in self.columns.clone() {
                let (x, w) = (self.pixel(i, j), (line + j) * all + channel);
                for (v, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's.
                    *sum = unsafe {
                        let x = s.load(x.add(channel + v * S::LANES));
                        s.fma(x, s.load(weights.add(w + v * S::LANES)), *sum)
                    };
                }
            }
        }
        let (epilogue, y) = (&self.call.epilogue, self.call.y);
        if epilogue.in_registers() {
            for (v, sum) in sums.into_iter().enumerate() {
                let c = channel + v * S::LANES;
                // SAFETY: the caller's.
                unsafe { epilogue.put(s, sum, c, y, at + c) };
            }
        } else {
            let mut line = [0.0; 16 * VECTORS];
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: no vector is longer than sixteen lanes.
                unsafe { s.store(line.as_mut_ptr().add(v * S::LANES), sum) };
            }
            // SAFETY: the caller's.
            unsafe { epilogue.put_slice(&mut line[..count], channel, y, at + channel) };
        }
    }

    /// The channels from `first` on, one by one.
    ///
    /// # Safety
    /// The pixel is this thread's.
    unsafe fn rest(&self, first: usize, at: usize) {
        let all = self.call.x_dims[3];
        let weights = self.call.packed.data();
        for channel in first..all {
            let mut sum = 0.0;
            for i in self.rows.clone() {
                for j in self.columns.clone() {
                    let w = weights[(i * self.call.params.kernel[2] + j) * all + channel];
                    // SAFETY: a channel of a cell in the picture.
                    sum += w * unsafe { *self.pixel(i, j).add(channel) };
                }
            }
            // SAFETY: the caller's.
            unsafe {
                self.call
                    .epilogue
                    .put_slice(&mut [sum], channel, self.call.y, at + channel);
            }
        }
    }
}
