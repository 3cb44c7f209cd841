//! One channel a group: every window runs along the channels.
//!
//! Pixels of a row whose windows lie in the picture go in tiles, so that a weight is read once for several pixels; those at the
//! edges go one by one, with the cells they have. All channels of a tile are computed before the next one.

use super::Call;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use std::ops::Range;

/// Vectors of channels that are summed side by side.
const VECTORS: usize = 2;
/// The same for a pixel alone, whose sums would wait for each other.
const ALONE: usize = 6;
/// Pixels in a tile, of twelve sums; rows of 7, 14, 28 pixels go in tiles of 14 sums where there are registers for them.
const TILE: usize = 6;
const SEVEN: usize = 7;

pub(super) fn run(pool: &Pool, call: &Call<'_>) {
    let rows = call.y_dims[0] * call.y_dims[1];
    let line = call.y_dims[2] * call.y_dims[3];
    pool.run_ranges(rows, (4096 / line.max(1)).max(1), &|range| {
        for row in range {
            let sample = row / call.y_dims[1];
            dispatch(Row {
                call,
                lines: Lines::Picture {
                    first: Shared(call.x.at(sample as isize * call.x_steps[0])),
                    step: call.x_steps[1],
                },
                row: row % call.y_dims[1],
                channels: 0..call.y_dims[3],
                y: call.y,
                at: row * call.y_dims[2] * call.y_dims[3],
                step: call.y_dims[3],
            });
        }
    });
}

/// The cells of the window of output `out` along `axis` that lie in the picture.
pub(super) fn inside(call: &Call<'_>, axis: usize, out: usize, len: usize) -> Range<usize> {
    let (params, start) = (&call.params, out * call.params.stride[axis]);
    let dilation = params.dilation[axis];
    // cell * dilation + start >= pad, and below pad + len
    let first = params.pad_before[axis].saturating_sub(start).div_ceil(dilation);
    let end = (params.pad_before[axis] + len)
        .saturating_sub(start)
        .div_ceil(dilation);
    first..end.min(params.kernel[axis]).max(first)
}

/// The columns of the result whose windows lie in the picture with all their columns.
fn whole(call: &Call<'_>) -> Range<usize> {
    let (params, width) = (&call.params, call.x_dims[2]);
    let (pad, stride) = (params.pad_before[2], params.stride[2]);
    let reach = (params.kernel[2] - 1) * params.dilation[2];
    let first = pad.div_ceil(stride).min(call.y_dims[2]);
    let end = (width + pad)
        .checked_sub(reach + 1)
        .map_or(0, |last| last / stride + 1);
    first..end.clamp(first, call.y_dims[2])
}

/// Where the rows of a picture are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lines {
    /// One after the other.
    Picture { first: Shared<f32>, step: isize },
    /// The last `rows` of them, row `h` at place `h % rows`.
    Ring {
        first: Shared<f32>,
        rows: usize,
        line: usize,
    },
}

impl Lines {
    #[inline(always)]
    fn line(&self, h: usize) -> *const f32 {
        match *self {
            Lines::Picture { first, step } => first.at(h as isize * step),
            Lines::Ring { first, rows, line } => first.at((h % rows * line) as isize),
        }
    }
}

/// One row of the result.
pub(super) struct Row<'a> {
    /// The window and what follows it; of the picture, its size and the steps from pixel to pixel.
    pub call: &'a Call<'a>,
    pub lines: Lines,
    pub row: usize,
    /// Those that are computed. Where they lie apart, `lines` and `at` are where the first channel of all would be.
    pub channels: Range<usize>,
    /// Where the row of the result goes: from element `at` of `y` on, pixels `step` apart.
    pub y: Shared<f32>,
    pub at: usize,
    pub step: usize,
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = inside(self.call, 1, self.row, self.call.x_dims[1]);
        let whole = whole(self.call);
        let cells = |columns| Cells {
            rows: rows.clone(),
            columns,
        };
        let all = cells(0..self.call.params.kernel[2]);
        let mut column = 0;
        // Pixels before channels: what is read lies side by side.
        while column < self.call.y_dims[2] {
            let left = whole.end.saturating_sub(column);
            // SAFETY: the cells lie in the picture, and this row is this thread's.
            unsafe {
                if !whole.contains(&column) {
                    let columns = inside(self.call, 2, column, self.call.x_dims[2]);
                    self.across::<S, 1>(s, &cells(columns), column);
                    column += 1;
                } else if S::REGISTERS >= 32 && left.is_multiple_of(SEVEN) {
                    self.across::<S, SEVEN>(s, &all, column);
                    column += SEVEN;
                } else if left >= TILE {
                    self.across::<S, TILE>(s, &all, column);
                    column += TILE;
                } else if left >= 3 {
                    self.across::<S, 3>(s, &all, column);
                    column += 3;
                } else {
                    self.across::<S, 1>(s, &all, column);
                    column += 1;
                }
            }
        }
    }
}

/// The part of a window that lies in the picture.
#[derive(Debug, Clone)]
struct Cells {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Row<'_> {
    /// Where the channels of a cell of the window of `column` are in the picture.
    #[inline(always)]
    fn pixel(&self, i: usize, j: usize, column: usize) -> *const f32 {
        let (params, steps) = (&self.call.params, &self.call.x_steps);
        let h = self.row * params.stride[1] + i * params.dilation[1] - params.pad_before[1];
        let w = column * params.stride[2] + j * params.dilation[2] - params.pad_before[2];
        self.lines.line(h).wrapping_offset(w as isize * steps[2])
    }

    /// The channels of `T` pixels from `column` on.
    ///
    /// # Safety
    /// The cells lie in the picture for all these pixels, and the row is this thread's.
    #[inline(always)]
    unsafe fn across<S: Simd, const T: usize>(&self, s: S, cells: &Cells, column: usize) {
        let Range {
            start: mut channel,
            end: channels,
        } = self.channels;
        // SAFETY: the channels exist, the rest is the caller's.
        unsafe {
            while T == 1 && channel + ALONE * S::LANES <= channels {
                self.tile::<S, T, ALONE, false>(s, cells, column, channel);
                channel += ALONE * S::LANES;
            }
            while channel + VECTORS * S::LANES <= channels {
                self.tile::<S, T, VECTORS, false>(s, cells, column, channel);
                channel += VECTORS * S::LANES;
            }
            while channel + S::LANES <= channels {
                self.tile::<S, T, 1, false>(s, cells, column, channel);
                channel += S::LANES;
            }
            if channel < channels {
                self.tile::<S, T, 1, true>(s, cells, column, channel);
            }
        }
    }

    /// `T` pixels from `column` on, `V` vectors of channels from `channel` on, for the cells of the window given.
    ///
    /// # Safety
    /// The cells lie in the picture for all these pixels, the channels exist, and the row is this thread's.
    #[inline(always)]
    unsafe fn tile<S: Simd, const T: usize, const V: usize, const PART: bool>(
        &self,
        s: S,
        cells: &Cells,
        column: usize,
        channel: usize,
    ) {
        let (call, params) = (self.call, &self.call.params);
        let channels = call.x_dims[3];
        let there = self.channels.end - channel;
        let next = params.stride[2] as isize * call.x_steps[2];
        let beside = params.dilation[2] as isize * call.x_steps[2];
        let mut sums = [[s.zero(); V]; T];
        for i in cells.rows.clone() {
            let first = (i * params.kernel[2] + cells.columns.start) * channels + channel;
            let mut w = call.packed.data().as_ptr().wrapping_add(first);
            let mut x = self.pixel(i, cells.columns.start, column).wrapping_add(channel);
            for _ in cells.columns.clone() {
                let mut weights = [s.zero(); V];
                for (v, weight) in weights.iter_mut().enumerate() {
                    // SAFETY: the weights of the cell, of these channels.
                    *weight = unsafe { s.load_some::<PART>(w.wrapping_add(v * S::LANES), there) };
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = x.wrapping_offset(t as isize * next);
                    for v in 0..V {
                        // SAFETY: the channels of the cell of pixel `t`.
                        let x = unsafe { s.load_some::<PART>(x.wrapping_add(v * S::LANES), there) };
                        sums[v] = s.fma(x, weights[v], sums[v]);
                    }
                }
                w = w.wrapping_add(channels);
                x = x.wrapping_offset(beside);
            }
        }
        let at = (self.at + column * self.step).wrapping_add(channel);
        let outputs = (channel, there.min(V * S::LANES));
        // SAFETY: the caller's.
        unsafe { call.epilogue.finish(s, sums, outputs, (self.y, at, self.step)) };
    }
}
