//! Windows read where they lie: tiles of pixels times panels of output channels.

use super::Call;
use super::epilogue::Epilogue;
use super::packed::width_at;
use crate::gemm::panel_width;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs};
use crate::weights::Round;
use half::bf16;
use std::cell::Cell;
use std::ops::Range;

/// Pixels in a tile, of two vectors of outputs.
const ROWS: usize = 6;
/// Pixels in a high tile.
const TALL: usize = 2 * ROWS;
/// So few pixels are no tile of their own beside high ones.
const FEW: usize = 3;
/// Tiles that share a pass over a panel of weights, at least.
const TILES: usize = 8;
/// Pixels whose windows are looked up together.
pub(super) const BLOCK: usize = 8 * TALL;
/// Arithmetic a chunk should have before another one is worth claiming.
const CHUNK_FLOPS: usize = 400_000;
/// Bytes of weights from which they come from memory, or from the last cache.
pub(super) const LARGE: usize = 1 << 20;
/// Arithmetic below which waking a thread costs more than it saves.
const LEAST_FLOPS: usize = 60_000;

/// The stretches of memory a window reads: `rows * columns` of them, `len` numbers each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Runs {
    pub rows: usize,
    pub columns: usize,
    pub steps: [isize; 2],
    pub len: usize,
    /// How far apart the windows of neighbours in a line are, 0 where it is not needed.
    pub apart: usize,
}

impl Runs {
    pub(super) fn depth(&self) -> usize {
        self.rows * self.columns * self.len
    }
}

/// A product of pixels and panels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product<'a> {
    pub weights: &'a [f32],
    pub outputs: usize,
    pub runs: Runs,
}

/// Writes where the windows of pixels from the one given on begin.
pub(super) type Starts<'a> = dyn Fn(usize, &mut [*const f32]) + Sync + 'a;

/// Everything for a call, in pairs of bf16 where `PAIRS`: elements are pairs then.
pub(super) fn run<const PAIRS: bool>(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) {
    let params = &call.params;
    let pads = [1, 2]
        .iter()
        .any(|&a| params.pad_before[a] + params.pad_after[a] > 0);
    if PAIRS && !pads && params.kernel == [1; 3] {
        return points(pool, call, scratch);
    }
    let planes = call.packed.planes();
    let (x, steps, width) = if PAIRS {
        paired(pool, call, scratch)
    } else if planes {
        let (x, steps) = padded_planes(pool, call, scratch);
        (x, steps, 1)
    } else if pads || call.channel_step != 1 {
        padded(pool, call, scratch)
    } else {
        (call.x, call.x_steps, call.x_dims[3])
    };
    // With no step inside the window and pixels side by side, a row of the window is one stretch.
    let joined = params.dilation[2] == 1 && steps[2] == width as isize;
    let [_, kernel_h, kernel_w] = params.kernel;
    let runs = if planes {
        let [plane, line] = [steps[0] / call.x_dims[3] as isize, steps[1]];
        Runs {
            rows: call.x_dims[3],
            columns: kernel_h,
            steps: [plane, params.dilation[1] as isize * line],
            len: kernel_w,
            apart: params.stride[2],
        }
    } else {
        Runs {
            rows: kernel_h,
            columns: if joined { 1 } else { kernel_w },
            steps: [
                params.dilation[1] as isize * steps[1],
                params.dilation[2] as isize * steps[2],
            ],
            len: if joined { kernel_w * width } else { width },
            apart: 0,
        }
    };
    let starts = |first: usize, starts: &mut [*const f32]| {
        call.each_place(first, starts.len(), |i, place| {
            let offset: isize = place.iter().zip(steps).map(|(i, s)| *i as isize * s).sum();
            starts[i] = x.at(offset);
        });
    };
    let most = 8 * pool.threads();
    each_chunk(pool, call, (runs.depth(), most), &|_, pixels, outputs| {
        Part::of(call, runs, &starts, (pixels, outputs)).run::<PAIRS>();
    });
}

/// Windows of one pixel in pairs of bf16: a thread rounds the pixels of a chunk when it begins it, so that there is one job, and
/// what it reads lies in its own cache.
fn points(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) {
    let channels = call.x_dims[3];
    let runs = Runs {
        rows: 1,
        columns: 1,
        steps: [0; 2],
        len: channels.div_ceil(2),
        apart: 0,
    };
    // Chunks that differ by their outputs alone round the same pixels.
    let most = 4 * pool.threads();
    let (block, _) = shares(call, (runs.len, most), pool.threads());
    let (_, memory) = scratch.with_own(0, pool.threads(), block * runs.len);
    each_chunk(pool, call, (runs.len, most), &|worker, pixels, outputs| {
        // SAFETY: this thread alone is the worker.
        let own = unsafe { memory.of(worker) };
        let rounded: &mut [bf16] = bytemuck::cast_slice_mut(own);
        let step = call.params.stride[2] as isize * call.x_steps[2];
        let mut done = 0;
        while done < pixels.len() {
            let [n, h, w] = call.place(pixels.start + done);
            let count = (call.y_dims[2] - w).min(pixels.len() - done);
            let place = [n, h * call.params.stride[1], w * call.params.stride[2]];
            let offset: isize = (place.iter().zip(call.x_steps))
                .map(|(i, s)| *i as isize * s)
                .sum();
            dispatch_pairs(Rounded {
                from: call.x.at(offset),
                step,
                channel_step: call.channel_step,
                channels,
                to: &mut rounded[2 * runs.len * done..2 * runs.len * (done + count)],
                to_step: 2 * runs.len,
            });
            done += count;
        }
        let (x, first) = (Shared::of(own.as_ptr()), pixels.start);
        let starts = |pixel: usize, starts: &mut [*const f32]| {
            for (i, start) in starts.iter_mut().enumerate() {
                *start = x.at(((pixel - first + i) * runs.len) as isize);
            }
        };
        Part::of(call, runs, &starts, (pixels, outputs)).run::<true>();
    });
}

/// Calls `task` with the worker, the pixels and the outputs of every chunk: of windows of `depth` elements, at most `most` of them
/// but for large pictures.
fn each_chunk(
    pool: &Pool,
    call: &Call<'_>,
    (depth, most): (usize, usize),
    task: &(dyn Fn(usize, Range<usize>, Range<usize>) + Sync),
) {
    let (pixels, outputs) = (call.pixels(), call.y_dims[3]);
    let (block, group) = shares(call, (depth, most), pool.threads());
    let (blocks, groups) = (pixels.div_ceil(block), outputs.div_ceil(group));
    pool.run_indexed(blocks * groups, &|worker, chunk| {
        let (first, output) = (chunk / groups * block, chunk % groups * group);
        task(
            worker,
            first..(first + block).min(pixels),
            output..(output + group).min(outputs),
        );
    });
}

/// Pixels and outputs of a chunk: enough arithmetic, and enough chunks for the threads.
fn shares(call: &Call<'_>, (depth, most): (usize, usize), threads: usize) -> (usize, usize) {
    let (pixels, outputs) = (call.pixels(), call.y_dims[3]);
    let width = panel_width();
    let wanted = CHUNK_FLOPS / (2 * depth * outputs).max(1);
    let block = wanted.max(ROWS * TILES).next_multiple_of(ROWS);
    let blocks = pixels.div_ceil(block);
    let worth = (2 * depth * outputs * pixels / LEAST_FLOPS).max(1);
    let groups = most.min(worth).div_ceil(blocks).min(outputs.div_ceil(width));
    let each = outputs.div_ceil(width).div_ceil(groups.max(1)) * width;
    // Even blocks: no thread is left with a short last one.
    let even = pixels.div_ceil(blocks);
    let even = if blocks > threads {
        even.next_multiple_of(ROWS)
    } else {
        even
    };
    (even, each)
}

/// The picture with its padding written out and its channels side by side; gives its memory, steps and channels.
fn padded(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) -> (Shared<f32>, [isize; 3], usize) {
    let params = &call.params;
    let [n, h, w, c] = call.x_dims;
    let [ph, pw] = [1, 2].map(|a| params.pad_before[a] + params.pad_after[a]);
    let (rows, line) = (h + ph, (w + pw) * c);
    let to = Shared(scratch.f32(n * rows * line).as_mut_ptr());
    pool.run_ranges(n * rows, (8192 / line.max(1)).max(1), &|range| {
        for row in range {
            // SAFETY: row `row` of the scratch memory is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at((row * line) as isize), line) };
            let (sample, row) = (row / rows, row % rows);
            let Some(row) = row.checked_sub(params.pad_before[1]).filter(|r| *r < h) else {
                out.fill(0.0);
                continue;
            };
            let (before, rest) = out.split_at_mut(params.pad_before[2] * c);
            let (inside, after) = rest.split_at_mut(w * c);
            before.fill(0.0);
            after.fill(0.0);
            let from = call
                .x
                .at(sample as isize * call.x_steps[0] + row as isize * call.x_steps[1]);
            // SAFETY: a row of `x`.
            unsafe { gather(from, call.x_steps[2], call.channel_step, c, inside) };
        }
    });
    (to, [(rows * line) as isize, line as isize, c as isize], c)
}

/// The picture with its padding written out and a plane for each channel; gives its memory and steps.
fn padded_planes(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) -> (Shared<f32>, [isize; 3]) {
    let params = &call.params;
    let [n, h, w, c] = call.x_dims;
    let [ph, pw] = [1, 2].map(|a| params.pad_before[a] + params.pad_after[a]);
    let (rows, line) = (h + ph, w + pw);
    let to = Shared(scratch.f32(n * c * rows * line).as_mut_ptr());
    // Row by row through all planes, as the rows of the result are shared out.
    pool.run_ranges(n * rows, (8192 / (c * line).max(1)).max(1), &|range| {
        for (row, channel) in range.flat_map(|row| (0..c).map(move |channel| (row, channel))) {
            let (sample, row) = (row / rows, row % rows);
            let place = (sample * c + channel) * rows + row;
            // SAFETY: this row of the scratch memory, in all planes, is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at((place * line) as isize), line) };
            let Some(row) = row.checked_sub(params.pad_before[1]).filter(|r| *r < h) else {
                out.fill(0.0);
                continue;
            };
            let (before, rest) = out.split_at_mut(params.pad_before[2]);
            let (inside, after) = rest.split_at_mut(w);
            before.fill(0.0);
            after.fill(0.0);
            let from = call.x.at(sample as isize * call.x_steps[0]
                + channel as isize * call.channel_step
                + row as isize * call.x_steps[1]);
            if call.x_steps[2] == 1 {
                // SAFETY: a row of a channel, side by side.
                inside.copy_from_slice(unsafe { std::slice::from_raw_parts(from, w) });
            } else {
                for (i, to) in inside.iter_mut().enumerate() {
                    // SAFETY: a pixel of the row.
                    *to = unsafe { *from.wrapping_offset(i as isize * call.x_steps[2]) };
                }
            }
        }
    });
    let plane = rows * line;
    (to, [(c * plane) as isize, line as isize, 1])
}

/// The picture rounded to bf16, with its padding written out, its channels side by side and even in number; gives its memory,
/// steps and channels, in pairs.
fn paired(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) -> (Shared<f32>, [isize; 3], usize) {
    let params = &call.params;
    let [n, h, w, c] = call.x_dims;
    let [ph, pw] = [1, 2].map(|a| params.pad_before[a] + params.pad_after[a]);
    let pairs = c.div_ceil(2);
    let (rows, line) = (h + ph, (w + pw) * pairs);
    let to = Shared(scratch.f32(n * rows * line).as_mut_ptr());
    pool.run_ranges(n * rows, (8192 / line.max(1)).max(1), &|range| {
        for row in range {
            // SAFETY: row `row` of the scratch memory is this thread's.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at((row * line) as isize), line) };
            let out: &mut [[bf16; 2]] = bytemuck::cast_slice_mut(out);
            let (sample, row) = (row / rows, row % rows);
            let Some(row) = row.checked_sub(params.pad_before[1]).filter(|r| *r < h) else {
                out.fill([bf16::ZERO; 2]);
                continue;
            };
            let (before, rest) = out.split_at_mut(params.pad_before[2] * pairs);
            let (inside, after) = rest.split_at_mut(w * pairs);
            before.fill([bf16::ZERO; 2]);
            after.fill([bf16::ZERO; 2]);
            let from = call
                .x
                .at(sample as isize * call.x_steps[0] + row as isize * call.x_steps[1]);
            dispatch_pairs(Rounded {
                from,
                step: call.x_steps[2],
                channel_step: call.channel_step,
                channels: c,
                to: inside.as_flattened_mut(),
                to_step: 2 * pairs,
            });
        }
    });
    (to, [(rows * line) as isize, line as isize, pairs as isize], pairs)
}

/// Pixels of `channels` numbers, `step` apart and their channels `channel_step` apart, as bf16; an odd number of channels gets a
/// zero. In `to`, pixels lie `to_step` apart, an even number. Made for pixels that are readable.
pub(super) struct Rounded<'a> {
    pub from: *const f32,
    pub step: isize,
    pub channel_step: isize,
    pub channels: usize,
    pub to: &'a mut [bf16],
    pub to_step: usize,
}

impl Kernel for Rounded<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (channels, dense) = (self.channels, self.channel_step == 1);
        if dense && self.to_step == channels && self.step == channels as isize {
            // SAFETY: the pixels lie side by side.
            let from = unsafe { std::slice::from_raw_parts(self.from, self.to.len()) };
            return Round(from, self.to).run(s);
        }
        for (i, pixel) in self.to.chunks_mut(self.to_step).enumerate() {
            let pixel = &mut pixel[..channels.next_multiple_of(2)];
            let from = self.from.wrapping_offset(i as isize * self.step);
            if dense {
                // SAFETY: the channels lie side by side.
                let from = unsafe { std::slice::from_raw_parts(from, channels) };
                Round(from, &mut pixel[..channels]).run(s);
            } else {
                for (c, value) in pixel.iter_mut().enumerate().take(channels) {
                    // SAFETY: a channel of a pixel of the row.
                    let x = unsafe { *from.wrapping_offset(c as isize * self.channel_step) };
                    *value = bf16::from_f32(x);
                }
            }
            pixel[channels..].fill(bf16::ZERO);
        }
    }
}

/// Copies pixels of `channels` numbers, `step` apart and their channels `channel_step` apart.
///
/// # Safety
/// `to.len() / channels` pixels are readable at `from`.
unsafe fn gather(from: *const f32, step: isize, channel_step: isize, channels: usize, to: &mut [f32]) {
    if channel_step == 1 && step == channels as isize {
        // SAFETY: the pixels lie side by side.
        return to.copy_from_slice(unsafe { std::slice::from_raw_parts(from, to.len()) });
    }
    for c in 0..channels {
        let from = from.wrapping_offset(c as isize * channel_step);
        for (i, to) in to.iter_mut().skip(c).step_by(channels).enumerate() {
            // SAFETY: the caller's.
            *to = unsafe { *from.wrapping_offset(i as isize * step) };
        }
    }
}

/// Some pixels times some panels, on one thread.
pub(super) struct Part<'a> {
    pub product: Product<'a>,
    pub starts: &'a Starts<'a>,
    pub pixels: Range<usize>,
    pub outputs: Range<usize>,
    pub epilogue: Epilogue<'a>,
    /// Where the results of pixel 0 begin, and how far apart those of pixels are. Where not all outputs are computed this may be
    /// where the first of all would be.
    pub y: Shared<f32>,
    pub line: usize,
}

impl<'a> Part<'a> {
    /// Some pixels and outputs of a call.
    fn of(
        call: &Call<'a>,
        runs: Runs,
        starts: &'a Starts<'a>,
        (pixels, outputs): (Range<usize>, Range<usize>),
    ) -> Self {
        let line = call.y_dims[3];
        Part {
            product: Product {
                weights: call.packed.data(),
                outputs: line,
                runs,
            },
            starts,
            pixels,
            outputs,
            epilogue: call.epilogue,
            y: call.y,
            line,
        }
    }

    /// Computes it, in pairs of bf16 where `PAIRS`.
    pub(super) fn run<const PAIRS: bool>(self) {
        if PAIRS {
            #[cfg(target_arch = "x86_64")]
            if let Some(unit) = crate::simd::matrix_unit() {
                return dispatch_pairs(super::tiles::ByTiles { part: self, unit });
            }
            dispatch_pairs(Tiles::<true>(self));
        } else {
            dispatch(Tiles::<false>(self));
        }
    }
}

struct Tiles<'a, const PAIRS: bool>(Part<'a>);

/// Weights of one or two vectors of outputs.
struct Panel {
    /// The first of the outputs.
    first: usize,
    data: *const f32,
    ahead: Cell<Ahead>,
}

/// Lines that memory is asked for while it has nothing else to do.
#[derive(Clone, Copy)]
struct Ahead {
    at: *const u8,
    left: usize,
    /// How many every four steps.
    each: usize,
}

impl Default for Ahead {
    fn default() -> Self {
        Ahead {
            at: std::ptr::null(),
            left: 0,
            each: 0,
        }
    }
}

impl<const PAIRS: bool> Kernel for Tiles<'_, PAIRS> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let part = &self.0;
        let mut begin = part.pixels.start;
        while begin < part.pixels.end {
            let mut starts = [std::ptr::null(); BLOCK];
            let starts = &mut starts[..BLOCK.min(part.pixels.end - begin)];
            (part.starts)(begin, starts);
            self.block(s, begin, starts);
            begin += starts.len();
        }
    }
}

impl<const PAIRS: bool> Tiles<'_, PAIRS> {
    /// All panels for the pixels from `begin` on, whose windows begin at `starts`.
    #[inline(always)]
    fn block<S: Simd>(&self, s: S, begin: usize, starts: &[*const f32]) {
        let depth = self.0.product.runs.depth();
        // Tiles of nearly one height: a single last pixel would wait for its own sums.
        let mut first = self.0.outputs.start;
        while first < self.0.outputs.end {
            let width = width_at(first, self.0.product.outputs);
            let panel = &self.0.product.weights[first * depth..][..width * depth];
            let panel = Panel {
                first,
                data: panel.as_ptr(),
                ahead: self.next_panel(first + width, width, starts.len()),
            };
            let panel = &panel;
            // Tiles are twice as high where registers hold their sums: six sums of one vector would wait for each other, and twelve
            // pixels read the weights half as often.
            let mut done = 0;
            let wide = width == 2 * S::LANES;
            while done < starts.len() {
                // SAFETY: as below.
                let tile = unsafe {
                    match self.0.product.runs.apart {
                        1 if !PAIRS => self.neighbours::<S, 1>(s, panel, begin + done, &starts[done..], wide),
                        2 if !PAIRS => self.neighbours::<S, 2>(s, panel, begin + done, &starts[done..], wide),
                        _ => break,
                    }
                };
                done += tile;
            }
            if !wide || S::REGISTERS >= 32 {
                let rest = starts.len() % TALL;
                let last = if (1..=FEW).contains(&rest) {
                    TALL + rest
                } else {
                    rest
                };
                while let Some(rows) = starts[done..].first_chunk::<TALL>()
                    && starts.len() - done > last
                {
                    // SAFETY: as below.
                    unsafe {
                        if !wide {
                            self.tile::<S, TALL, 1>(s, panel, begin + done, *rows);
                        } else if S::REGISTERS >= 32 {
                            self.tile::<S, TALL, 2>(s, panel, begin + done, *rows);
                        }
                    }
                    done += rows.len();
                }
            }
            let (begin, starts) = (begin + done, &starts[done..]);
            let tiles = starts.len().div_ceil(ROWS);
            for tile in 0..tiles {
                let (from, to) = (tile * starts.len() / tiles, (tile + 1) * starts.len() / tiles);
                let (pixel, rows) = (begin + from, &starts[from..to]);
                // SAFETY: the windows of these pixels lie in the picture, the panel has `depth` lines of `width`,
                // and these elements of the result are this thread's.
                unsafe {
                    if wide {
                        self.tiles::<S, 2>(s, panel, pixel, rows);
                    } else {
                        self.tiles::<S, 1>(s, panel, pixel, rows);
                    }
                }
            }
            first += width;
        }
    }

    /// A tile of the first pixels, of which windows of neighbours lie `APART`; gives how many they were.
    ///
    /// # Safety
    /// As [`Tiles::tile`].
    #[inline(always)]
    unsafe fn neighbours<S: Simd, const APART: usize>(
        &self,
        s: S,
        panel: &Panel,
        pixel: usize,
        starts: &[*const f32],
        wide: bool,
    ) -> usize {
        let in_line = |(i, start): &(usize, &*const f32)| **start == starts[0].wrapping_add(i * APART);
        let count = starts.iter().take(TALL).enumerate().take_while(in_line).count();
        // SAFETY: the caller's; so many windows lie evenly.
        unsafe {
            match (count, wide) {
                (TALL.., false) => self.even::<S, TALL, 1, APART>(s, panel, pixel, starts[0]),
                (TALL.., true) if S::REGISTERS >= 32 => {
                    self.even::<S, TALL, 2, APART>(s, panel, pixel, starts[0])
                }
                (8.., false) => self.even::<S, 8, 1, APART>(s, panel, pixel, starts[0]),
                (4.., false) => self.even::<S, 4, 1, APART>(s, panel, pixel, starts[0]),
                (4.., true) => self.even::<S, 4, 2, APART>(s, panel, pixel, starts[0]),
                _ => {
                    let rows = &starts[..count];
                    if wide {
                        self.tiles::<S, 2>(s, panel, pixel, rows);
                    } else {
                        self.tiles::<S, 1>(s, panel, pixel, rows);
                    }
                    count
                }
            }
        }
    }

    /// [`Tiles::tile`] of windows that lie `APART` from `first` on: addresses that differ by what is known need no registers, and rows of
    /// few numbers no twelve sums to find them. Gives how many they were.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn even<S: Simd, const R: usize, const V: usize, const APART: usize>(
        &self,
        s: S,
        panel: &Panel,
        pixel: usize,
        first: *const f32,
    ) -> usize {
        // SAFETY: the caller's.
        let sums = unsafe { even_windows::<S, R, V, APART>(s, first, self.0.product.runs, panel.data) };
        let (outputs, first) = (self.0.product.outputs, panel.first);
        let there = (outputs - first).min(V * S::LANES);
        let place = (self.0.y, pixel * self.0.line + first, self.0.line);
        // SAFETY: these outputs exist and are this thread's.
        unsafe { self.0.epilogue.finish(s, sums, (first, there), place) };
        R
    }

    /// What is asked of memory while a panel is multiplied with `pixels` pixels: the next panel, which begins at output `first`, where
    /// all of them are more than a cache holds.
    fn next_panel(&self, first: usize, width: usize, pixels: usize) -> Cell<Ahead> {
        let Product {
            weights,
            outputs,
            runs,
        } = self.0.product;
        let next = weights.get(first * runs.depth()..).filter(|_| first < outputs);
        let Some(next) = next.filter(|_| size_of_val(weights) > LARGE) else {
            return Cell::default();
        };
        let lines = runs.depth() * width_at(first, outputs) * size_of::<f32>() / 64;
        let tiles = pixels.div_ceil(TALL);
        Cell::new(Ahead {
            at: next.as_ptr().cast(),
            left: lines,
            // As many every four steps as make a panel.
            each: (4 * width * size_of::<f32>() / 64).div_ceil(tiles),
        })
    }

    /// # Safety
    /// As [`Tiles::tile`].
    #[inline(always)]
    unsafe fn tiles<S: Simd, const V: usize>(&self, s: S, panel: &Panel, pixel: usize, rows: &[*const f32]) {
        // SAFETY: the caller's.
        unsafe {
            match *rows {
                [a, b, c, d, e, f] => self.tile::<S, 6, V>(s, panel, pixel, [a, b, c, d, e, f]),
                [a, b, c, d, e] => self.tile::<S, 5, V>(s, panel, pixel, [a, b, c, d, e]),
                [a, b, c, d] => self.tile::<S, 4, V>(s, panel, pixel, [a, b, c, d]),
                [a, b, c] => self.tile::<S, 3, V>(s, panel, pixel, [a, b, c]),
                [a, b] => self.tile::<S, 2, V>(s, panel, pixel, [a, b]),
                [a] => self.tile::<S, 1, V>(s, panel, pixel, [a]),
                _ => unreachable!("a tile has one to six pixels"),
            }
        }
    }

    /// `R` pixels from `pixel` on, whose windows begin at `rows`, by a panel of `V` vectors.
    ///
    /// # Safety
    /// The pixels' windows are readable, the panel has as many lines as they have elements, and the outputs from `first` on
    /// of these pixels are this thread's.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        panel: &Panel,
        pixel: usize,
        rows: [*const f32; R],
    ) {
        // SAFETY: the caller's.
        let sums = unsafe { windows::<S, R, V, PAIRS>(s, rows, self.0.product.runs, panel) };
        let (outputs, first) = (self.0.product.outputs, panel.first);
        let there = (outputs - first).min(V * S::LANES);
        let place = (self.0.y, pixel * self.0.line + first, self.0.line);
        // SAFETY: these outputs exist and are this thread's.
        unsafe { self.0.epilogue.finish(s, sums, (first, there), place) };
    }
}

/// The sums over the windows that begin at `rows`, for `V` vectors of outputs.
///
/// # Safety
/// The windows are readable, and `panel` has `V` vectors for each of their elements.
#[inline(always)]
unsafe fn windows<S: Simd, const R: usize, const V: usize, const PAIRS: bool>(
    s: S,
    rows: [*const f32; R],
    runs: Runs,
    panel: &Panel,
) -> [[S::F; V]; R] {
    let mut sums = [[s.zero(); V]; R];
    let mut at = panel.data;
    let mut ahead = panel.ahead.get();
    for i in 0..runs.rows {
        for j in 0..runs.columns {
            let offset = i as isize * runs.steps[0] + j as isize * runs.steps[1];
            let from = rows.map(|row| row.wrapping_offset(offset));
            let mut k = 0;
            while k + 4 <= runs.len {
                for step in 0..4 {
                    // SAFETY: the caller's.
                    unsafe {
                        step_by::<S, R, V, PAIRS>(s, &from, k + step, at.add(step * V * S::LANES), &mut sums)
                    };
                }
                for _ in 0..ahead.each.min(ahead.left) {
                    s.prefetch_later(ahead.at);
                    ahead.at = ahead.at.wrapping_add(64);
                    ahead.left -= 1;
                }
                k += 4;
                at = at.wrapping_add(4 * V * S::LANES);
            }
            while k < runs.len {
                // SAFETY: the caller's.
                unsafe { step_by::<S, R, V, PAIRS>(s, &from, k, at, &mut sums) };
                k += 1;
                at = at.wrapping_add(V * S::LANES);
            }
        }
    }
    panel.ahead.set(ahead);
    sums
}

/// The sums over windows that lie `APART` from `first` on, for `V` vectors of outputs.
///
/// # Safety
/// As for [`windows`].
#[inline(always)]
unsafe fn even_windows<S: Simd, const R: usize, const V: usize, const APART: usize>(
    s: S,
    first: *const f32,
    runs: Runs,
    mut w: *const f32,
) -> [[S::F; V]; R] {
    let mut sums = [[s.zero(); V]; R];
    for i in 0..runs.rows {
        for j in 0..runs.columns {
            let mut from = first.wrapping_offset(i as isize * runs.steps[0] + j as isize * runs.steps[1]);
            let end = from.wrapping_add(runs.len);
            while from != end {
                // SAFETY: the caller's.
                unsafe { even_step::<S, R, V, APART>(s, from, w, &mut sums) };
                from = from.wrapping_add(1);
                w = w.wrapping_add(V * S::LANES);
            }
        }
    }
    sums
}

/// One element of windows that lie `APART`, the first of them at `from`.
///
/// # Safety
/// As for [`step_by`].
#[inline(always)]
unsafe fn even_step<S: Simd, const R: usize, const V: usize, const APART: usize>(
    s: S,
    from: *const f32,
    w: *const f32,
    sums: &mut [[S::F; V]; R],
) {
    let mut vectors = [s.zero(); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *vector = unsafe { s.load(w.add(v * S::LANES)) };
    }
    let w = vectors;
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *from.add(r * APART) });
        for v in 0..V {
            sums[r][v] = s.fma(x, w[v], sums[r][v]);
        }
    }
}

/// One element of the windows.
///
/// # Safety
/// Each window has an element `k`, and `V` vectors are readable at `w`.
#[inline(always)]
unsafe fn step_by<S: Simd, const R: usize, const V: usize, const PAIRS: bool>(
    s: S,
    from: &[*const f32; R],
    k: usize,
    w: *const f32,
    sums: &mut [[S::F; V]; R],
) {
    let mut vectors = [s.zero(); V];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *vector = unsafe { s.load(w.add(v * S::LANES)) };
    }
    let w = vectors;
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *from[r].add(k) });
        for v in 0..V {
            sums[r][v] = if PAIRS {
                s.dot_pairs(x, w[v], sums[r][v])
            } else {
                s.fma(x, w[v], sums[r][v])
            };
        }
    }
}
