//! Windows in pairs of bf16, read where they lie by matrix units.

use super::direct::{BLOCK, LARGE, Part};
use super::packed::width_at;
use crate::simd::{Kernel, Simd};
use crate::tiles::{self, SIDE, Session, Unit};
use std::ops::Range;

/// Outputs in a panel.
const WIDTH: usize = 2 * SIDE;
/// Parts of a product that are handed over together.
const PARTS: usize = 8;
/// Pixels that are finished together.
const ROWS: usize = 4;

/// [`Part`] by matrix units.
pub(super) struct ByTiles<'a> {
    pub part: Part<'a>,
    pub unit: Unit,
}

/// Pixels whose windows lie evenly apart, a tile of them at most.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    len: usize,
}

/// Divides pixels into strips whose windows, which begin at `starts`, lie `step` apart; gives how many there are.
fn strips(starts: &[*const f32], step: isize, to: &mut [Strip; BLOCK]) -> usize {
    let (mut count, mut first) = (0, 0);
    for i in 1..=starts.len() {
        let goes_on = i < starts.len()
            && i - first < SIDE
            && starts[i].addr().wrapping_sub(starts[i - 1].addr()) as isize == step;
        if !goes_on {
            to[count] = Strip {
                first,
                len: i - first,
            };
            (count, first) = (count + 1, i);
        }
    }
    count
}

/// Bytes from one window to the next in a row of the picture: the least distance there is. Other distances only cost time.
fn step_of(starts: &[*const f32]) -> isize {
    starts
        .windows(2)
        .map(|pair| pair[1].addr().wrapping_sub(pair[0].addr()) as isize)
        .filter(|step| *step > 0)
        .min()
        .unwrap_or(0)
}

/// What a thread works with.
#[repr(align(64))]
struct Space {
    sums: [[f32; WIDTH]; WIDTH],
    /// What is left of rows and of lines of columns behind the last whole chunk, and zeros.
    rows: [[f32; SIDE]; WIDTH],
    columns: [[f32; WIDTH]; SIDE],
}

impl Kernel for ByTiles<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert_eq!(S::LANES, SIDE, "conv: panels for matrix units");
        let (part, mut session) = (&self.part, Session::new(self.unit));
        let mut space = Space {
            sums: [[0.0; WIDTH]; WIDTH],
            rows: [[0.0; SIDE]; WIDTH],
            columns: [[0.0; WIDTH]; SIDE],
        };
        let (depth, outputs) = (part.product.runs.depth(), part.product.outputs);
        let mut begin = part.pixels.start;
        while begin < part.pixels.end {
            let mut starts = [std::ptr::null(); BLOCK];
            let starts = &mut starts[..BLOCK.min(part.pixels.end - begin)];
            (part.starts)(begin, starts);
            let step = step_of(starts);
            let mut all = [Strip { first: 0, len: 0 }; BLOCK];
            let count = strips(starts, step, &mut all);
            let mut first = part.outputs.start;
            while first < part.outputs.end {
                let width = width_at(first, outputs);
                let panel = &part.product.weights[first * depth..][..width * depth];
                let pairs = count.div_ceil(2);
                // The next panel is asked for a share at a time, where all of them are more than a cache holds.
                let mut next = match part.product.weights.get((first + width) * depth..) {
                    Some(next) if size_of_val(part.product.weights) > LARGE => next.as_ptr_range(),
                    _ => std::ptr::null()..std::ptr::null(),
                };
                let share = (width * depth).div_ceil(pairs);
                for two in all[..count].chunks(2) {
                    let tiles = Tiles {
                        step,
                        panel,
                        width,
                        pixels: two[0].first..two[0].first + two.iter().map(|strip| strip.len).sum::<usize>(),
                        rows: [two[0].len, two.get(1).map_or(0, |strip| strip.len)],
                    };
                    // SAFETY: the windows of these pixels lie in the picture, the panel has `depth` lines of `width`, and these
                    // elements of the result are this thread's.
                    unsafe {
                        tiles.sums(s, part, starts, (&mut session, &mut space));
                        let pixel = begin + tiles.pixels.start;
                        if width == WIDTH {
                            finish::<S, 2>(s, part, &space.sums[..tiles.pixels.len()], (first, pixel));
                        } else {
                            finish::<S, 1>(s, part, &space.sums[..tiles.pixels.len()], (first, pixel));
                        }
                    }
                    let end = next.start.wrapping_add(share).min(next.end);
                    while next.start < end {
                        s.prefetch_later(next.start.cast());
                        next.start = next.start.wrapping_add(SIDE);
                    }
                }
                first += width;
            }
            begin += starts.len();
        }
    }
}

/// Two strips of pixels, or one, by a panel.
struct Tiles<'a> {
    step: isize,
    panel: &'a [f32],
    width: usize,
    /// In the block.
    pixels: Range<usize>,
    rows: [usize; 2],
}

impl Tiles<'_> {
    /// The sums over all windows, in `space`.
    ///
    /// # Safety
    /// The windows, which begin at `starts`, are readable; the panel has a line for each of their elements.
    #[inline(always)]
    unsafe fn sums<S: Simd>(
        &self,
        s: S,
        part: &Part<'_>,
        starts: &[*const f32],
        (session, space): (&mut Session, &mut Space),
    ) {
        let runs = part.product.runs;
        let (whole, rest) = (runs.len / SIDE, runs.len % SIDE);
        let starts = &starts[self.pixels.clone()];
        let mut parts = [tiles::Part::NONE; PARTS];
        let (mut count, mut done, all) = (0, 0, runs.rows * runs.columns);
        let mut add = false;
        for i in 0..runs.rows {
            for j in 0..runs.columns {
                let offset = i as isize * runs.steps[0] + j as isize * runs.steps[1];
                let lines = self.panel[done * runs.len * self.width..].as_ptr();
                if whole > 0 {
                    parts[count] = tiles::Part {
                        a: [0, self.rows[0].min(starts.len() - 1)]
                            .map(|row| starts[row].wrapping_offset(offset).cast()),
                        a_step: self.step as usize,
                        b: lines.cast(),
                        b_step: self.width * size_of::<f32>(),
                        chunks: whole,
                    };
                    count += 1;
                }
                if rest > 0 {
                    for (start, to) in starts.iter().zip(&mut space.rows) {
                        let from = start.wrapping_offset(offset).wrapping_add(whole * SIDE);
                        // SAFETY: `rest` elements of the window are there, and a line of sixteen.
                        unsafe { s.store(to.as_mut_ptr(), s.load_part(from, rest)) };
                    }
                    let lines = &self.panel[(done * runs.len + whole * SIDE) * self.width..];
                    for (line, to) in lines.chunks_exact(self.width).zip(&mut space.columns[..rest]) {
                        to[..self.width].copy_from_slice(line);
                    }
                    parts[count] = tiles::Part {
                        a: [0, self.rows[0]].map(|row| space.rows[row.min(WIDTH - 1)].as_ptr().cast()),
                        a_step: size_of_val(&space.rows[0]),
                        b: space.columns.as_ptr().cast(),
                        b_step: size_of_val(&space.columns[0]),
                        chunks: 1,
                    };
                    count += 1;
                }
                done += 1;
                // What is copied is used before the next copy.
                if rest > 0 || count == PARTS || done == all {
                    let (parts, c) = (&parts[..count], space.sums.as_mut_ptr().cast());
                    // SAFETY: the caller's; what was copied is whole.
                    unsafe {
                        match (self.rows[1] > 0, self.width == WIDTH) {
                            (true, true) => session.product::<2, 2>(self.rows, parts, c, WIDTH, add),
                            (true, false) => session.product::<2, 1>(self.rows, parts, c, WIDTH, add),
                            (false, true) => session.product::<1, 2>(self.rows, parts, c, WIDTH, add),
                            (false, false) => session.product::<1, 1>(self.rows, parts, c, WIDTH, add),
                        }
                    }
                    (count, add) = (0, true);
                }
            }
        }
        if !add {
            space.sums.as_flattened_mut().fill(0.0);
        }
    }
}

/// Finishes the sums of pixels from `pixel` on, of `V` vectors of outputs from `first` on.
///
/// # Safety
/// These outputs of these pixels are this thread's.
#[inline(always)]
unsafe fn finish<S: Simd, const V: usize>(
    s: S,
    part: &Part<'_>,
    sums: &[[f32; WIDTH]],
    (first, pixel): (usize, usize),
) {
    let there = (part.product.outputs - first).min(V * S::LANES);
    let (several, single) = sums.as_chunks::<ROWS>();
    let mut pixel = pixel;
    for sums in several {
        let mut vectors = [[s.zero(); V]; ROWS];
        for (vectors, sums) in vectors.iter_mut().zip(sums) {
            for (v, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: a line of sums has two vectors.
                *vector = unsafe { s.load(sums.as_ptr().add(v * S::LANES)) };
            }
        }
        let place = (part.y, pixel * part.line + first, part.line);
        // SAFETY: the caller's.
        unsafe { part.epilogue.finish(s, vectors, (first, there), place) };
        pixel += ROWS;
    }
    for sums in single {
        let mut vectors = [[s.zero(); V]; 1];
        for (v, vector) in vectors[0].iter_mut().enumerate() {
            // SAFETY: a line of sums has two vectors.
            *vector = unsafe { s.load(sums.as_ptr().add(v * S::LANES)) };
        }
        let place = (part.y, pixel * part.line + first, part.line);
        // SAFETY: the caller's.
        unsafe { part.epilogue.finish(s, vectors, (first, there), place) };
        pixel += 1;
    }
}
