//! The product of many tokens in 8-bit integers, for `fast` numerics.
//!
//! Both sides are cut along `k` into blocks of [`BLOCK`] numbers. A block of a row, or of a lane, has a scale of its own: its greatest
//! magnitude becomes 127, the others are rounded. Sums within a block are exact, in 32-bit integers; blocks are added in floats.
//!
//! One number that is large beside the others of its block, as activations of language models have them, would leave these few of the
//! eight bits. So both sides are turned first, [`TURNED`] numbers at a time, by the matrix of Hadamard, which changes no product, and makes
//! of one large number many of middle size.
//!
//! Instructions multiply bytes without a sign by bytes with one, so lanes are stored 128 above what they are, and sums of a block begin
//! 128 times the row's numbers below zero. A block that holds what is not finite gives NaN; one whose numbers are all below 1e-30 is zero.

use super::{Ahead, pack_panels, panel_width};
use crate::loops::Shared;
use crate::simd::{Kernel, Simd, dispatch, dispatch_bytes};
use crate::weights::{Int8, Lines};
use std::ops::Range;

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 96;
/// Numbers turned together.
pub(crate) const TURNED: usize = 32;
/// Words of four numbers in a block.
pub(crate) const QUADS: usize = BLOCK / 4;
/// Rows of the innermost kernel, of two vectors of lanes: integer sums take twelve registers, sums of blocks as many.
pub(crate) const ROWS: usize = 6;
/// Words of a block of so many rows: scales, what sums begin with, quads.
pub(crate) const TILE: usize = ROWS * (2 + QUADS);
/// Lines of a panel for a block: quads, then scales.
const LINES: usize = QUADS + 1;
/// Blocks handled together at most: a panel of so many stays in the first-level cache.
pub(crate) const DEEP: usize = 8;
/// Lanes of a panel at most.
const MOST: usize = 32;
/// What lanes are stored above.
const ABOVE: i32 = 128;

/// Lines of a panel of lanes with `k` elements.
pub(crate) fn lines(k: usize) -> usize {
    k.div_ceil(BLOCK) * LINES
}

/// Turns a block of numbers `[k][width]`, whose lines lie `step` apart, in place, and rounds it to quads `[QUADS][width]`, with zeros
/// behind the last of `count`. A line of scales follows, and for rows another one of what sums begin with. There are lines up to a multiple
/// of [`TURNED`].
pub(crate) struct Round<'a, const ROW: bool> {
    pub from: &'a mut [f32],
    pub step: usize,
    pub count: usize,
    pub width: usize,
    pub to: &'a mut [f32],
}

impl<const ROW: bool> Round<'_, ROW> {
    /// Numbers that are written.
    pub(crate) fn len(width: usize) -> usize {
        (LINES + usize::from(ROW)) * width
    }
}

impl<const ROW: bool> Kernel for Round<'_, ROW> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Round {
            from,
            step,
            count,
            width,
            to,
        } = self;
        assert!(
            (1..=BLOCK).contains(&count) && width.is_multiple_of(S::LANES) && to.len() >= Self::len(width),
            "int8: a block"
        );
        let there = count.next_multiple_of(TURNED);
        assert!(from.len() >= (there - 1) * step + width, "int8: numbers");
        for line in count..there {
            from[line * step..][..width].fill(0.0);
        }
        let count = there;
        for lane in (0..width).step_by(S::LANES) {
            let from = from[lane..].as_mut_ptr();
            for first in (0..count).step_by(TURNED) {
                // SAFETY: a vector of each of so many lines.
                unsafe { turn(s, from.add(first * step), step) };
            }
            let mut largest = s.zero();
            let mut odd = s.zero();
            for k in 0..count {
                // SAFETY: a vector of line `k`.
                let x = unsafe { s.load(from.add(k * step)) };
                largest = s.max(largest, s.abs(x));
                odd = s.fma(x, s.zero(), odd);
            }
            let some = s.lt(s.splat(1e-30), largest);
            let up = s.select(some, s.div(s.splat(127.0), largest), s.zero());
            // What turning makes of both sides makes products larger.
            let down = if ROW { 1.0 } else { 1.0 / TURNED as f32 } / 127.0;
            let scale = s.select(some, s.mul(largest, s.splat(down)), s.zero());
            let mut sum = s.int(0);
            for quad in 0..QUADS {
                let mut word = s.int(0);
                for i in (0..4).rev() {
                    let k = 4 * quad + i;
                    let mut number = s.int(0);
                    if k < count {
                        // SAFETY: as above.
                        let x = unsafe { s.load(from.add(k * step)) };
                        number = s.to_int(s.mul(x, up));
                    }
                    let byte = if ROW {
                        sum = s.int_add(sum, number);
                        s.int_and(number, s.int(255))
                    } else {
                        s.int_add(number, s.int(ABOVE))
                    };
                    word = s.int_or(s.shl::<8>(word), byte);
                }
                // SAFETY: lines `quad` and up to the last were counted above.
                unsafe { s.store(to.as_mut_ptr().add(quad * width + lane), s.from_bits(word)) };
            }
            let below = s.int_sub(s.int(0), s.shl::<7>(sum));
            // SAFETY: as above.
            unsafe {
                let to = to.as_mut_ptr().add(QUADS * width + lane);
                s.store(to, s.add(scale, odd));
                if ROW {
                    s.store(to.add(width), s.from_bits(below));
                }
            }
        }
    }
}

/// Turns [`TURNED`] numbers of each lane of a vector, which lie `step` apart: each becomes a sum of all with signs.
///
/// # Safety
/// So many vectors are readable and writable from `first` on.
#[inline(always)]
unsafe fn turn<S: Simd>(s: S, first: *mut f32, step: usize) {
    // SAFETY: the caller's: pairs whose numbers differ in three bits, then in the other two.
    unsafe {
        for at in (0..TURNED).step_by(8) {
            turn_some::<S, 8>(s, first.add(at * step), step);
        }
        for at in 0..8 {
            turn_some::<S, 4>(s, first.add(at * step), 8 * step);
        }
    }
}

/// [`turn`] of so many.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn turn_some<S: Simd, const N: usize>(s: S, first: *mut f32, step: usize) {
    let mut all = [s.zero(); N];
    for (i, x) in all.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *x = unsafe { s.load(first.add(i * step)) };
    }
    let mut apart = 1;
    while apart < N {
        for i in 0..N {
            if i & apart == 0 {
                let (x, y) = (all[i], all[i + apart]);
                (all[i], all[i + apart]) = (s.add(x, y), s.sub(x, y));
            }
        }
        apart *= 2;
    }
    for (i, x) in all.into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { s.store(first.add(i * step), x) };
    }
}

/// Packs `lanes` lanes of `k` elements into panels, as [`pack_panels`] does.
///
/// # Safety
/// As there.
pub(crate) unsafe fn pack(
    x: Shared<f32>,
    steps: [isize; 2],
    lanes: usize,
    k: usize,
    range: Range<usize>,
    panels: &mut [f32],
) {
    let width = panel_width();
    let mut turned = [0.0; BLOCK * MOST];
    for (p, panel) in range.zip(panels.chunks_exact_mut((width * lines(k)).max(1))) {
        for (block, to) in panel.chunks_exact_mut(LINES * width).enumerate() {
            let first = block * BLOCK;
            let count = BLOCK.min(k - first);
            let lines = &mut turned[..count * width];
            let x = Shared(x.at(first as isize * steps[1]));
            // SAFETY: the caller's, from element `first` on.
            unsafe { pack_panels(x, steps, lanes, count, p..p + 1, lines) };
            dispatch(Round::<false> {
                from: &mut turned,
                step: width,
                count,
                width,
                to,
            });
        }
    }
}

/// A block of results `[row][lane]`, lines of which lie `line` apart, as panels of a product whose depth these rows are: lanes of
/// `panels` panels. `first` is where this block of the first panel goes, `step` the distance to the next panel.
pub(crate) struct IntoPanels<'a> {
    pub sums: &'a mut [f32],
    pub line: usize,
    pub count: usize,
    pub panels: usize,
    pub first: *mut f32,
    pub step: usize,
}

impl IntoPanels<'_> {
    /// Rounds them.
    ///
    /// # Safety
    /// A block of each panel is writable where it was said to lie, and this thread's.
    pub(crate) unsafe fn run(self) {
        let width = panel_width();
        for panel in 0..self.panels {
            let to = self.first.wrapping_add(panel * self.step);
            dispatch(Round::<false> {
                from: &mut self.sums[panel * width..],
                step: self.line,
                count: self.count,
                width,
                // SAFETY: the caller's.
                to: unsafe { std::slice::from_raw_parts_mut(to, LINES * width) },
            });
        }
    }
}

/// Where row `row` of a product's depth goes in its panels, in lines.
pub(crate) fn line_of(row: usize) -> usize {
    debug_assert!(row.is_multiple_of(BLOCK));
    row / BLOCK * LINES
}

/// `c[row][lane] = sum_k` for `rows`, a multiple of [`ROWS`] the first, and the lanes of panels `panels` of `packed`; `c` is dense.
pub(crate) struct Product<'a> {
    pub packed: &'a [f32],
    pub weights: &'a Int8,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
    pub c: &'a mut [f32],
    /// What is read after this product, asked of memory meanwhile.
    pub then: Lines,
}

impl Product<'_> {
    pub(crate) fn run(self) {
        dispatch_bytes(self);
    }
}

impl Kernel for Product<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Product {
            packed,
            weights,
            rows,
            panels,
            c,
            then,
        } = self;
        let (width, blocks) = (2 * S::LANES, weights.blocks());
        let (line, each) = (panels.len() * width, blocks * LINES * width);
        assert!(
            width == panel_width() && packed.len() >= panels.end * each,
            "int8: panels"
        );
        assert!(c.len() >= rows.len() * line, "int8: output");
        if blocks == 0 {
            return c[..rows.len() * line].fill(0.0);
        }
        for start in (0..blocks).step_by(DEEP) {
            let deep = DEEP.min(blocks - start);
            let after = if start + deep < blocks {
                weights.lines(&rows, start + deep..blocks.min(start + 2 * DEEP))
            } else {
                then
            };
            let tiles = panels.len() * rows.len().div_ceil(ROWS);
            let share = after.len().div_ceil(tiles.max(1));
            let mut ahead = Ahead {
                walk: after.walk(),
                left: 0,
            };
            for (p, panel) in panels.clone().enumerate() {
                let panel = &packed[panel * each + start * LINES * width..][..deep * LINES * width];
                for row in (0..rows.len()).step_by(ROWS) {
                    let count = ROWS.min(rows.len() - row);
                    let tile = weights.tile(rows.start + row, start..start + deep);
                    let c = &mut c[row * line + p * width..];
                    assert!(c.len() >= (count - 1) * line + width, "int8: output");
                    ahead.left = share;
                    let to = (start > 0, c.as_mut_ptr(), line, count);
                    // SAFETY: a panel and a tile of so many blocks, and lines of the output that were checked.
                    unsafe { multiply(s, (panel.as_ptr(), tile.as_ptr()), deep, to, &mut ahead) };
                    ahead.ask(s, share);
                }
            }
        }
    }
}

/// A tile of [`ROWS`] rows by one panel, two vectors wide, all sums in registers.
///
/// # Safety
/// `blocks` blocks of a panel and of a tile are readable; `count` lines of `2 * LANES`, at most [`ROWS`], are writable at `c`, `line` apart.
#[inline(always)]
unsafe fn multiply<S: Simd>(
    s: S,
    (mut x, mut w): (*const f32, *const f32),
    blocks: usize,
    (add, c, line, count): (bool, *mut f32, usize, usize),
    ahead: &mut Ahead,
) {
    let width = 2 * S::LANES;
    let mut sums = [[s.zero(); 2]; ROWS];
    for _ in 0..blocks {
        // SAFETY: a block of both.
        unsafe {
            let mut whole: [[S::I; 2]; ROWS] = [[s.int(0); 2]; ROWS];
            for r in 0..ROWS {
                whole[r] = [s.bits(s.splat(*w.add(ROWS + r))); 2];
            }
            let (scales, mut quads) = (w, w.add(2 * ROWS));
            for quad in 0..QUADS {
                let both = [s.bits(s.load(x)), s.bits(s.load(x.add(S::LANES)))];
                for r in 0..ROWS {
                    let w = s.bits(s.splat(*quads.add(r)));
                    for half in 0..2 {
                        whole[r][half] = s.dot_bytes(both[half], w, whole[r][half]);
                    }
                }
                (x, quads) = (x.add(width), quads.add(ROWS));
                if quad % 8 == 7 {
                    ahead.ask(s, 2);
                }
            }
            let of_lanes = [s.load(x), s.load(x.add(S::LANES))];
            for r in 0..ROWS {
                let scale = s.splat(*scales.add(r));
                for half in 0..2 {
                    let scale = s.mul(scale, of_lanes[half]);
                    sums[r][half] = s.fma(s.from_int(whole[r][half]), scale, sums[r][half]);
                }
            }
            (x, w) = (x.add(width), w.add(TILE));
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        if r == count {
            return;
        }
        for (half, mut sum) in sums.into_iter().enumerate() {
            let to = c.wrapping_add(r * line + half * S::LANES);
            if add {
                // SAFETY: a line of the output.
                sum = s.add(sum, unsafe { s.load(to) });
            }
            // SAFETY: a line of the output.
            unsafe { s.store(to, sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use crate::pool::Pool;
    use crate::simd::{Isa, agree, forced};
    use crate::weights::Weights;
    use proptest::prelude::*;

    /// The matrix that turns, by its definition.
    fn turned(x: &[f32]) -> Vec<f32> {
        let sum = |row: usize| {
            let signs = (0..x.len()).map(|k| {
                if (row & k).count_ones().is_multiple_of(2) {
                    1.0
                } else {
                    -1.0
                }
            });
            signs.zip(x).map(|(sign, x)| sign * f64::from(*x)).sum::<f64>() as f32
        };
        (0..TURNED).map(sum).collect()
    }

    /// The numbers that blocks of `x` stand for, turned.
    fn rounded(x: &[f32]) -> Vec<f64> {
        let blocks = x.chunks(BLOCK).flat_map(|block| {
            let block: Vec<f32> = block.chunks(TURNED).flat_map(turned).collect();
            let largest = block.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let up = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
            let scale = f64::from(largest) / 127.0;
            let number = move |x: f32| f64::from((x * up).round_ties_even()) * scale;
            block.into_iter().map(number)
        });
        blocks.collect()
    }

    /// `[n][m]` of tokens `[m, k]` and weights `[n, k]`.
    fn product(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize), turned: bool) -> Vec<f32> {
        let weights = Weights::from_f32(n, k, bytemuck::cast_slice(w).to_vec().into()).unwrap();
        weights.round(&Pool::new(1));
        let width = panel_width();
        let count = m.div_ceil(width);
        let mut packed = vec![f32::NAN; count * width * lines(k)];
        let turned_x: Vec<f32> = (0..m * k).map(|at| x[at % m * k + at / m]).collect();
        let (x, steps) = if turned {
            (&turned_x[..], [1, m as isize])
        } else {
            (x, [k as isize, 1])
        };
        // SAFETY: `x` is `[m, k]`, or turned.
        unsafe { pack(Shared::of(x.as_ptr()), steps, m, k, 0..count, &mut packed) };
        let mut c = vec![f32::NAN; n * count * width];
        let half = n / 2 / ROWS * ROWS;
        for rows in [0..half, half..n] {
            Product {
                packed: &packed,
                weights: weights.int8().unwrap(),
                c: &mut c[rows.start * count * width..rows.end * count * width],
                rows,
                panels: 0..count,
                then: Lines::default(),
            }
            .run();
        }
        c.chunks(count * width)
            .flat_map(|row| row[..m].to_vec())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn products_are_those_of_the_rounded_numbers(
            m in 1_usize..70, n in 1_usize..130, k in 1_usize..1000, turned in any::<bool>(), seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let numbers = |count: usize, seed: &mut u64| -> Vec<f32> {
                // Turned exactly, in any order.
                let mut all: Vec<f32> = (0..count).map(|_| (random(seed) * 256.0).round() / 256.0).collect();
                // One that all others of its block are small beside, and blocks of zeros.
                all.iter_mut().step_by(1013).for_each(|x| *x = 1000.0);
                all.chunks_mut(BLOCK).skip(2).step_by(7).for_each(|block| block.fill(0.0));
                all
            };
            let (x, w) = (numbers(m * k, &mut seed), numbers(n * k, &mut seed));
            let (xs, ws): (Vec<_>, Vec<_>) = (x.chunks(k).map(rounded).collect(), w.chunks(k).map(rounded).collect());
            for set in agree::sets().into_iter().chain([Isa::Portable]) {
                let found = forced(set, || product(&x, &w, (m, n, k), turned));
                for (row, w) in ws.iter().enumerate() {
                    for (lane, x) in xs.iter().enumerate() {
                        let (mut exact, mut size) = (0.0, 0.0);
                        for (x, w) in x.iter().zip(w) {
                            exact += x * w / TURNED as f64;
                            size += (x * w).abs() / TURNED as f64;
                        }
                        let found = f64::from(found[row * m + lane]);
                        prop_assert!((found - exact).abs() <= 1e-5 * size + 1e-9, "{set:?} [{row}, {lane}]: {found} {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        let (m, n, k) = (3, 2, 200);
        for odd in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; m * k];
            x[k + 150] = odd;
            let found = product(&x, &vec![1.0; n * k], (m, n, k), false);
            for row in found.chunks(m) {
                assert!(
                    row[1].is_nan() && (row[0] - 200.0).abs() < 1e-2 && (row[2] - 200.0).abs() < 1e-2,
                    "{row:?}"
                );
            }
        }
    }
}
