//! Weights rounded to pairs of bf16, as the innermost kernel of products in pairs reads them.
//!
//! Twelve rows lie side by side, pair by pair: one stream, from which nothing is decoded. Rounding weights each time costs a tenth of the
//! product of 64 tokens.

use super::slab::Part;
use crate::gemm::TALL;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::weights::{Lines, Weights};
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// Twelve rows, one behind the other.
    static ROWS: RefCell<Vec<bf16>> = const { RefCell::new(Vec::new()) };
}

/// A matrix in pairs of bf16: `[rows / 12][pair of columns][12]`, zeros where there are no rows and behind an odd number of columns.
#[derive(Debug)]
pub(crate) struct Pairs {
    data: Part,
    tiles: usize,
    /// Pairs of a row.
    each: usize,
}

impl Pairs {
    pub(crate) fn pack(pool: &Pool, weights: &Weights) -> Pairs {
        let (rows, cols) = (weights.rows(), weights.cols());
        let (tiles, each) = (rows.div_ceil(TALL), cols.div_ceil(2));
        let data = Part::new(tiles * each * TALL * size_of::<f32>());
        let target = Shared(data.as_ptr().cast::<[u32; TALL]>());
        pool.run_ranges(tiles, (16384 / (TALL * each).max(1)).max(1), &|range| {
            ROWS.with_borrow_mut(|space| {
                for tile in range {
                    space.clear();
                    space.resize(TALL * 2 * each, bf16::ZERO);
                    let part = tile * TALL..rows.min((tile + 1) * TALL);
                    weights.decode_pairs(part, (0, cols, 2 * each), (space, 2 * each));
                    let pairs: &[u32] = bytemuck::cast_slice(space);
                    for pair in 0..each {
                        let line = std::array::from_fn(|row| pairs[row * each + pair]);
                        // SAFETY: the tile is this thread's.
                        unsafe { *target.at((tile * each + pair) as isize) = line };
                    }
                }
            });
        });
        Pairs { data, tiles, each }
    }

    /// Where row `row`, the first of twelve, has pair `pair`.
    pub(crate) fn at(&self, row: usize, pair: usize) -> *const f32 {
        assert!(
            row.is_multiple_of(TALL) && row < self.tiles * TALL && pair < self.each,
            "pairs: a tile"
        );
        let place = (row / TALL * self.each + pair) * TALL;
        self.data.as_ptr().cast::<f32>().wrapping_add(place)
    }

    /// From twelve rows to the next.
    pub(crate) fn stride(&self) -> isize {
        (self.each * TALL) as isize
    }

    pub(crate) fn bytes(&self) -> usize {
        self.tiles * self.each * TALL * size_of::<f32>()
    }

    /// Where `depth` pairs of some rows lie.
    pub(crate) fn lines(&self, rows: &Range<usize>, first: usize, depth: usize) -> Lines {
        let step = self.each * TALL * size_of::<f32>();
        if !rows.start.is_multiple_of(TALL) || rows.start >= self.tiles * TALL {
            return Lines::default();
        }
        Lines {
            first: self.at(rows.start, first).cast(),
            step,
            rows: rows.len().div_ceil(TALL),
            bytes: depth * TALL * size_of::<f32>(),
        }
    }
}
