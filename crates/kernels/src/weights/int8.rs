//! Weights rounded to 8-bit integers in blocks, as [`gemm::int8`](crate::gemm::int8) reads them.

use super::slab::Part;
use crate::gemm::int8::{BLOCK, QUADS, ROWS, Round, TILE};
use crate::gemm::{pack_panels, panel_width};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::simd::dispatch;
use crate::weights::{Lines, Weights};
use std::cell::RefCell;
use std::ops::Range;

/// Rows rounded together: a multiple of every panel's width and of [`ROWS`].
const GROUP: usize = 96;

thread_local! {
    /// A block of a group: as rows, as lines of panels, rounded.
    static SPACE: RefCell<[Vec<f32>; 3]> = const { RefCell::new([const { Vec::new() }; 3]) };
}

/// `[rows / ROWS][block]`, each [`TILE`] words: scales of the rows, what their sums begin with, quads of numbers, quad by quad. Rows and
/// columns that do not exist are zeros.
#[derive(Debug)]
pub(crate) struct Int8 {
    data: Part,
    tiles: usize,
    blocks: usize,
}

impl Int8 {
    pub(crate) fn pack(pool: &Pool, weights: &Weights) -> Int8 {
        let (rows, cols) = (weights.rows(), weights.cols());
        let (groups, blocks) = (rows.div_ceil(GROUP), cols.div_ceil(BLOCK));
        let tiles = groups * (GROUP / ROWS);
        let data = Part::new(tiles * blocks * TILE * size_of::<f32>());
        let target = Shared(data.as_ptr().cast::<f32>());
        let width = panel_width();
        pool.run_ranges(groups, 1, &|range| {
            SPACE.with_borrow_mut(|[dense, turned, rounded]| {
                dense.resize(GROUP * BLOCK, 0.0);
                turned.resize(BLOCK * width, 0.0);
                rounded.resize(Round::<true>::len(width), 0.0);
                for (group, block) in range.flat_map(|group| (0..blocks).map(move |block| (group, block))) {
                    let part = group * GROUP..rows.min((group + 1) * GROUP);
                    let (lanes, first) = (part.len(), block * BLOCK);
                    let count = BLOCK.min(cols - first);
                    weights.decode_block(part, first, count, (dense, BLOCK));
                    for panel in 0..GROUP / width {
                        let steps = [BLOCK as isize, 1];
                        let range = panel..panel + 1;
                        // SAFETY: so many rows lie so far apart.
                        unsafe {
                            let lines = &mut turned[..count * width];
                            pack_panels(Shared::of(dense.as_ptr()), steps, lanes, count, range, lines);
                        }
                        dispatch(Round::<true> {
                            from: turned,
                            step: width,
                            count,
                            width,
                            to: rounded,
                        });
                        for lane in 0..width {
                            let row = panel * width + lane;
                            let tile = (group * (GROUP / ROWS) + row / ROWS) * blocks + block;
                            let to =
                                |line: usize| target.at((tile * TILE + line * ROWS + row % ROWS) as isize);
                            // SAFETY: a tile of this thread's group.
                            unsafe {
                                *to(0) = rounded[QUADS * width + lane];
                                *to(1) = rounded[(QUADS + 1) * width + lane];
                                for quad in 0..QUADS {
                                    *to(2 + quad) = rounded[quad * width + lane];
                                }
                            }
                        }
                    }
                }
            });
        });
        Int8 { data, tiles, blocks }
    }

    /// Blocks of a row.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Blocks `blocks` of the rows from `row` on, which is the first of [`ROWS`].
    pub(crate) fn tile(&self, row: usize, blocks: Range<usize>) -> &[f32] {
        let all = self.tiles * self.blocks * TILE;
        // SAFETY: all of it was written.
        let data = unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast::<f32>(), all) };
        debug_assert!(row.is_multiple_of(ROWS));
        &data[(row / ROWS * self.blocks + blocks.start) * TILE..][..blocks.len() * TILE]
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles * self.blocks * TILE * size_of::<f32>()
    }

    /// Where blocks `blocks` of some rows lie.
    pub(crate) fn lines(&self, rows: &Range<usize>, blocks: Range<usize>) -> Lines {
        let tile = TILE * size_of::<f32>();
        Lines {
            first: self
                .data
                .as_ptr()
                .wrapping_add((rows.start / ROWS * self.blocks + blocks.start) * tile),
            step: self.blocks * tile,
            rows: rows.len().div_ceil(ROWS),
            bytes: blocks.len() * tile,
        }
    }
}
