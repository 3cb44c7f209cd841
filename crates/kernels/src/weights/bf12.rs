//! Numbers that bf16 holds, in 12 bits without loss.
//!
//! Most language models are published in bf16. Their weights in 16 or 32 bits have bits that are always empty, and the numbers of a row
//! lie within few powers of two of each other: sign, 4 bits of exponent and the 7 bits behind the point say it all. What decoding reads
//! shrinks by a quarter, or by more than half.
//!
//! A row is a sequence of blocks of 64 columns in 96 bytes: 64 with exponent's lowest bit and the bits behind the point, 32 with sign and
//! the upper bits of exponents, two in a byte. Widened, a number has the exponent as it is stored, 1 for the least: what is below 2^-111.
//! Vectors are multiplied with 2^64 before and sums with the factor of their row after, all without rounding. Few numbers are too small for
//! their row: they are kept apart, with a zero in their place.

use super::slab::Part;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs};
use crate::weights::Weights;
use half::bf16;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Columns of a block.
pub(crate) const BLOCK: usize = 64;

/// Bytes of a block.
pub(crate) const BLOCK_BYTES: usize = 96;

/// What vectors are multiplied with.
pub(crate) const SCALE: f32 = 18_446_744_073_709_551_616.0;

/// One of so many numbers may be kept apart, and a block more.
const APART: usize = 512;

/// Exponents above this are not packed: 2^15, the largest of fp16.
const MOST: u32 = 127 + 15;

/// In a row's tail: some of its numbers are kept apart.
const SOME_APART: u8 = 0x80;

/// A matrix in 12 bits a number.
#[derive(Debug)]
pub(crate) struct Bf12 {
    data: Part,
    rows: usize,
    cols: usize,
    /// How much the exponents of each row are lowered, and [`SOME_APART`]: a byte, since lines of these come from memory as well.
    tails: Box<[u8]>,
    /// What is kept apart, row by row.
    apart: Apart,
}

thread_local! {
    /// One row as it was.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Numbers kept apart: row, column, number.
type Apart = Vec<(u32, u32, f32)>;

impl Bf12 {
    /// Whether rows of so many columns are whole blocks.
    pub(crate) fn fits(cols: usize) -> bool {
        cols.is_multiple_of(BLOCK) && cols > 0
    }

    /// Packs `weights`; none where they have more bits, or too many numbers that are small for their row.
    pub(crate) fn pack(pool: &Pool, weights: &Weights) -> Option<Bf12> {
        let (rows, cols) = (weights.rows(), weights.cols());
        if !Bf12::fits(cols) || u32::try_from(rows).is_err() || u32::try_from(cols).is_err() {
            return None;
        }
        // Weights that have more bits have them in the first row.
        let first = &mut Vec::new();
        if rows > 0 && first_apart(weights, first).is_none() {
            return None;
        }
        let data = Part::new(rows * row_bytes(cols));
        let mut tails = vec![0; rows].into_boxed_slice();
        let target = Shared(data.as_ptr().cast::<MaybeUninit<u8>>());
        let tail = Shared(tails.as_mut_ptr());
        let (failed, apart) = (AtomicBool::new(false), Mutex::new(Apart::new()));
        pool.run_ranges(rows, (16384 / cols).max(1), &|rows| {
            let mut own = Apart::new();
            for row in rows {
                let to = target.at((row * row_bytes(cols)) as isize);
                // SAFETY: the bytes of the row, which is this thread's, not initialised yet.
                let to = unsafe { std::slice::from_raw_parts_mut(to, row_bytes(cols)) };
                if failed.load(Ordering::Relaxed) {
                    return;
                }
                match pack_row(weights, row, to, &mut own) {
                    // SAFETY: the row is this thread's.
                    Some(down) => unsafe { *tail.at(row as isize) = down },
                    None => failed.store(true, Ordering::Relaxed),
                }
            }
            if let Ok(mut apart) = apart.lock() {
                apart.append(&mut own);
            }
        });
        let mut apart = apart.into_inner().ok()?;
        if failed.into_inner() || apart.len() > rows * cols / APART + BLOCK {
            return None;
        }
        apart.sort_unstable_by_key(|(row, column, _)| (*row, *column));
        for (row, ..) in &apart {
            tails[*row as usize] |= SOME_APART;
        }
        Some(Bf12 {
            data,
            rows,
            cols,
            tails,
            apart,
        })
    }

    /// The blocks of all rows.
    pub(crate) fn data(&self) -> &[u8] {
        // SAFETY: `pack` wrote these.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.rows * row_bytes(self.cols)) }
    }

    pub(crate) fn row_bytes(&self) -> usize {
        row_bytes(self.cols)
    }

    /// Bytes held in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.data().len() + self.tails.len() + size_of_val(&*self.apart)
    }

    /// What numbers of a row times [`SCALE`] are multiplied with.
    #[inline(always)]
    fn factor(&self, row: usize) -> f32 {
        // 2^(down - 64)
        f32::from_bits((u32::from(self.tails[row] & !SOME_APART) + 127 - 64) << 23)
    }

    /// The product of row `row` and `x`, whose other part is `sum`: of numbers as they are widened, and of `x` times [`SCALE`].
    #[inline(always)]
    pub(crate) fn finish(&self, row: usize, sum: f32, x: &[f32]) -> f32 {
        let sum = sum * self.factor(row);
        if self.tails[row] & SOME_APART == 0 {
            return sum;
        }
        sum + self.sum_apart(row, x)
    }

    /// The line of cache of what [`Bf12::finish`] reads, for a row some lines behind.
    #[inline(always)]
    pub(crate) fn tail(&self, row: usize) -> *const u8 {
        self.tails.as_ptr().wrapping_add(row)
    }

    #[cold]
    fn sum_apart(&self, row: usize, x: &[f32]) -> f32 {
        let products = self.apart(row).iter();
        products
            .map(|(_, column, number)| number * x[*column as usize])
            .sum()
    }

    fn apart(&self, row: usize) -> &[(u32, u32, f32)] {
        if self.tails[row] & SOME_APART == 0 {
            return &[];
        }
        let row = row as u32;
        let from = &self.apart[self.apart.partition_point(|(r, ..)| *r < row)..];
        &from[..from.iter().take_while(|(r, ..)| *r == row).count()]
    }

    /// Columns `first..first + depth` of each row in `rows` into `out`, where rows begin `step` elements apart.
    pub(crate) fn decode(&self, rows: Range<usize>, first: usize, depth: usize, out: (&mut [f32], usize)) {
        assert!(
            rows.end <= self.rows && first + depth <= self.cols,
            "bf12: a part of the matrix"
        );
        dispatch(Decode {
            matrix: self,
            rows,
            columns: first..first + depth,
            out,
        });
    }

    /// As [`Bf12::decode`], in bf16, with zeros behind up to `whole`.
    pub(crate) fn decode_pairs(
        &self,
        rows: Range<usize>,
        (first, depth, whole): (usize, usize, usize),
        out: (&mut [bf16], usize),
    ) {
        assert!(
            rows.end <= self.rows && first + depth <= self.cols,
            "bf12: a part of the matrix"
        );
        dispatch_pairs(DecodePairs(
            Decode {
                matrix: self,
                rows,
                columns: first..first + depth,
                out,
            },
            whole,
        ));
    }
}

fn row_bytes(cols: usize) -> usize {
    cols / BLOCK * BLOCK_BYTES
}

/// Packs the first row, to see whether it can be.
fn first_apart(weights: &Weights, space: &mut Vec<MaybeUninit<u8>>) -> Option<u8> {
    space.resize(row_bytes(weights.cols()), MaybeUninit::uninit());
    pack_row(weights, 0, space, &mut Apart::new())
}

/// Packs a row and gives how much its exponents were lowered.
fn pack_row(weights: &Weights, row: usize, to: &mut [MaybeUninit<u8>], apart: &mut Apart) -> Option<u8> {
    ROW.with_borrow_mut(|space| {
        space.resize(weights.cols(), 0.0);
        weights.row(row, space);
        let largest = dispatch(Exponent(space))?;
        // The largest has exponent 15.
        let down = largest.saturating_sub(15);
        let before = apart.len();
        let small = dispatch(Pack {
            from: space,
            to,
            down,
        });
        if small > 0 {
            let left_out = |x: &f32| x.to_bits() << 1 != 0 && (x.to_bits() >> 23 & 0xff) <= down;
            let numbers = space.iter().enumerate().filter(|(_, x)| left_out(x));
            apart.extend(numbers.map(|(column, x)| (row as u32, column as u32, *x)));
        }
        // A row of small numbers would be kept apart whole.
        if apart.len() - before > weights.cols() / 8 {
            return None;
        }
        Some(down as u8)
    })
}

/// The largest exponent of numbers, biased as in `f32`; none where one has more bits than bf16, or is too large.
struct Exponent<'a>(&'a [f32]);

impl Kernel for Exponent<'_> {
    type Out = Option<u32>;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Out {
        let (mut rest, mut largest) = (0, 0);
        for x in self.0 {
            let bits = x.to_bits();
            rest |= bits & 0xffff;
            largest = largest.max(bits << 1);
        }
        let exponent = largest >> 24;
        (rest == 0 && exponent <= MOST).then_some(exponent)
    }
}

/// Writes the blocks of a row whose exponents are lowered by `down`; gives how many numbers are too small and became zero.
struct Pack<'a> {
    from: &'a [f32],
    to: &'a mut [MaybeUninit<u8>],
    down: u32,
}

impl Kernel for Pack<'_> {
    type Out = u32;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> u32 {
        let mut small = 0;
        for (x, to) in self
            .from
            .chunks_exact(BLOCK)
            .zip(self.to.chunks_exact_mut(BLOCK_BYTES))
        {
            let mut codes = [0_u32; BLOCK];
            for (code, x) in codes.iter_mut().zip(x) {
                let (bits, sign) = (x.to_bits() & 0x7fff_ffff, x.to_bits() & 0x8000_0000);
                let there = (bits >> 23) > self.down;
                small += u32::from(bits != 0 && !there);
                *code = if there {
                    (bits - (self.down << 23)) | sign
                } else {
                    0
                };
            }
            // Halves of two quarters side by side, as unpacking leaves them.
            let mut words = [[0_u16; 32]; 2];
            for (quarters, words) in codes.chunks_exact(32).zip(&mut words) {
                for i in 0..16 {
                    words[2 * i] = (quarters[i] >> 16) as u16;
                    words[2 * i + 1] = (quarters[16 + i] >> 16) as u16;
                }
            }
            let mut upper = [0_u8; BLOCK];
            for lane in 0..4 {
                for half in 0..2 {
                    for i in 0..8 {
                        let (at, word) = (16 * lane + 8 * half + i, words[half][8 * lane + i]);
                        to[at].write(word as u8);
                        upper[at] = (word >> 12 & 8 | word >> 8 & 7) as u8;
                    }
                }
            }
            for i in 0..32 {
                to[BLOCK + i].write(upper[i] | upper[32 + i] << 4);
            }
        }
        small
    }
}

/// Columns of some rows, to where rows begin so many elements apart.
struct Decode<'a, T> {
    matrix: &'a Bf12,
    rows: Range<usize>,
    columns: Range<usize>,
    out: (&'a mut [T], usize),
}

impl<T: Copy + Default> Decode<'_, T> {
    /// Has `block` widen each block of row `row` that is told, and `number` each number that lies apart.
    #[inline(always)]
    fn row(
        &self,
        row: usize,
        out: &mut [T],
        mut block: impl FnMut(&[u8], &mut [T; BLOCK]),
        number: impl Fn(f32) -> T,
    ) {
        let (matrix, columns) = (self.matrix, &self.columns);
        let blocks = &matrix.data()[row * matrix.row_bytes()..(row + 1) * matrix.row_bytes()];
        let mut column = columns.start;
        while column < columns.end {
            let from = &blocks[column / BLOCK * BLOCK_BYTES..][..BLOCK_BYTES];
            let (skip, at) = (column % BLOCK, column - columns.start);
            let count = (BLOCK - skip).min(columns.end - column);
            let mut part = [T::default(); BLOCK];
            let out = &mut out[at..at + count];
            // One call: functions of a closure that is called twice are not inlined.
            block(from, out.as_mut_array().unwrap_or(&mut part));
            if count < BLOCK {
                out.copy_from_slice(&part[skip..skip + count]);
            }
            column += count;
        }
        for (_, column, apart) in matrix.apart(row) {
            let column = *column as usize;
            if columns.contains(&column) {
                out[column - columns.start] = number(*apart);
            }
        }
    }
}

impl Kernel for Decode<'_, f32> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (out, step) = std::mem::take(&mut self.out);
        for (row, out) in self.rows.clone().zip(out.chunks_mut(step)) {
            // 2^down
            let factor = s.splat(self.matrix.factor(row) * SCALE);
            // SAFETY: a block of both.
            let block = |from: &[u8], to: &mut [f32; BLOCK]| unsafe {
                widen(s, from.as_ptr(), factor, to.as_mut_ptr())
            };
            self.row(row, &mut out[..self.columns.len()], block, |x| x);
        }
    }
}

/// The same in bf16, with zeros up to so many elements.
struct DecodePairs<'a>(Decode<'a, bf16>, usize);

impl Kernel for DecodePairs<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let DecodePairs(mut decode, whole) = self;
        let (out, step) = std::mem::take(&mut decode.out);
        for (row, out) in decode.rows.clone().zip(out.chunks_mut(step)) {
            let (out, zeros) = out[..whole].split_at_mut(decode.columns.len());
            zeros.fill(bf16::ZERO);
            let up = u16::from(decode.matrix.tails[row] & !SOME_APART);
            // SAFETY: a block of both.
            let block = |from: &[u8], to: &mut [bf16; BLOCK]| unsafe {
                s.widen_bf12(from.as_ptr(), up, to.as_mut_ptr())
            };
            decode.row(row, out, block, bf16::from_f32);
        }
    }
}

/// The numbers of a block, times `factor`.
///
/// # Safety
/// A block is readable at `block`, and `BLOCK` numbers are writable at `to`.
#[inline(always)]
unsafe fn widen<S: Simd>(s: S, block: *const u8, factor: S::F, to: *mut f32) {
    for part in 0..16 / S::LANES {
        // SAFETY: the caller's.
        let quarters = unsafe { s.load_bf12(block, part) };
        for (quarter, x) in quarters.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { s.store(to.add(16 * quarter + part * S::LANES), s.mul(x, factor)) };
        }
    }
}

/// What [`Simd::load_bf12`] does, number by number.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn load_apart<S: Simd>(s: S, block: *const u8, part: usize) -> [S::F; 4] {
    std::array::from_fn(|quarter| {
        let mut buffer = [0.0_f32; 16];
        for (lane, number) in buffer.iter_mut().enumerate().take(S::LANES) {
            let i = part * S::LANES + lane;
            let at = 16 * (i / 4) + 2 * (i % 4) + quarter % 2 + quarter / 2 * 8;
            // SAFETY: two bytes of the block.
            let (low, pair) = unsafe { (u32::from(*block.add(at)), u32::from(*block.add(BLOCK + at % 32))) };
            let upper = pair >> (at / 32 * 4) & 15;
            *number = f32::from_bits((upper & 8) << 28 | (upper & 7) << 24 | low << 16);
        }
        // SAFETY: no vector is longer than sixteen lanes.
        unsafe { s.load(buffer.as_ptr()) }
    })
}

/// What [`Simd::widen_bf12`] does, number by number.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn widen_apart<S: Simd>(s: S, block: *const u8, up: u16, to: *mut bf16) {
    for part in 0..16 / S::LANES {
        // SAFETY: the caller's.
        let quarters = unsafe { s.load_bf12(block, part) };
        for (quarter, x) in quarters.into_iter().enumerate() {
            let mut buffer = [0.0_f32; 16];
            // SAFETY: no vector is longer than sixteen lanes.
            unsafe { s.store(buffer.as_mut_ptr(), x) };
            for (lane, x) in buffer.into_iter().enumerate().take(S::LANES) {
                let bits = (x.to_bits() >> 16) as u16;
                let bits = if bits == 0 { 0 } else { bits + (up << 7) };
                // SAFETY: the caller's.
                unsafe { *to.add(16 * quarter + part * S::LANES + lane) = bf16::from_bits(bits) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use half::f16;
    use proptest::prelude::*;

    /// Numbers of bf16 in every power of two, small ones and zeros among them.
    pub(crate) fn numbers(count: usize, small: f32, seed: &mut u64) -> Vec<f32> {
        (0..count)
            .map(|_| {
                let x = random(seed) * (random(seed) * 3.0).exp2();
                let x = match random(seed).abs() {
                    r if r < small => x / 1e6,
                    r if r < 2.0 * small => 0.0,
                    _ => x,
                };
                // What is small in f16 has fewer bits.
                f16::from_f32(bf16::from_f32(x).to_f32()).to_f32()
            })
            .collect()
    }

    fn stored(rows: usize, cols: usize, numbers: &[f32], half: bool) -> Weights {
        if half {
            let numbers: Vec<f16> = numbers.iter().map(|x| f16::from_f32(*x)).collect();
            Weights::from_f16(rows, cols, bytemuck::cast_slice(&numbers).to_vec().into()).unwrap()
        } else {
            Weights::from_f32(rows, cols, bytemuck::cast_slice(numbers).to_vec().into()).unwrap()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn packed_numbers_are_what_they_were(
            rows in 1_usize..70, blocks in 1_usize..10, half in any::<bool>(), seed in any::<u64>(), threads in 1_usize..4,
            first in 0_usize..200, depth in 1_usize..300, start in 0_usize..70,
        ) {
            let (mut seed, cols) = (seed, blocks * BLOCK);
            let numbers = numbers(rows * cols, 1e-3, &mut seed);
            let weights = stored(rows, cols, &numbers, half);
            weights.pack(&Pool::new(threads));
            prop_assert!(weights.bf12().is_some());
            let mut found = vec![f32::NAN; cols];
            for (row, wanted) in numbers.chunks_exact(cols).enumerate() {
                weights.row(row, &mut found);
                prop_assert_eq!(&found[..], wanted);
            }
            let (first, start) = (first % cols, start % rows);
            let depth = depth.min(cols - first);
            let mut part = vec![f32::NAN; (rows - start) * 320];
            weights.decode_block(start..rows, first, depth, (&mut part, 320));
            let mut pairs = vec![bf16::NAN; (rows - start) * 320];
            weights.decode_pairs(start..rows, (first, depth, depth + 3), (&mut pairs, 320));
            for row in start..rows {
                let at = (row - start) * 320;
                let wanted = &numbers[row * cols + first..row * cols + first + depth];
                prop_assert_eq!(&part[at..at + depth], wanted);
                let rounded: Vec<f32> = pairs[at..at + depth + 3].iter().map(|x| x.to_f32()).collect();
                prop_assert_eq!(&rounded[..depth], wanted);
                prop_assert_eq!(&rounded[depth..], &[0.0; 3]);
            }
        }
    }

    #[test]
    fn a_matrix_of_other_numbers_stays_as_it_is() {
        let (rows, cols, pool) = (40, 128, Pool::new(2));
        let kept = |change: &dyn Fn(&mut [f32])| {
            let mut data = numbers(rows * cols, 0.0, &mut 7);
            change(&mut data);
            let weights = stored(rows, cols, &data, false);
            weights.pack(&pool);
            weights.bf12().is_none()
        };
        assert!(!kept(&|_| ()));
        assert!(kept(&|data| data[39 * 128 + 5] = 1.001), "more bits than bf16");
        assert!(kept(&|data| data[3] = 65536.0), "above fp16");
        assert!(kept(&|data| data[700] = f32::NAN));
        assert!(kept(&|data| data[700] = f32::NEG_INFINITY));
        assert!(
            kept(&|data| data.iter_mut().step_by(7).for_each(|x| *x *= 1e-9)),
            "many are small"
        );
        assert!(!kept(&|data| data.fill(0.0)));
        assert!(
            !kept(&|data| data[5] = f32::MIN_POSITIVE / 4.0),
            "a number without a leading bit"
        );
        let narrow = stored(2, 100, &vec![1.0; 200], true);
        narrow.pack(&pool);
        assert!(narrow.bf12().is_none(), "columns are no blocks");
    }

    #[test]
    fn matrices_are_packed_when_they_are_used_again_and_those_read_together_at_once() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicUsize;
        let (rows, cols, pool) = (1024, 256, Pool::new(1));
        let data = numbers(rows * cols, 0.0, &mut 3);
        let make = || stored(rows, cols, &data, true);
        let (gate, up, other, told) = (make(), make(), make(), Arc::new(AtomicUsize::new(0)));
        for weights in [&gate, &up] {
            for _ in 0..2 {
                let told = told.clone();
                weights.pack_when_used(move || _ = told.fetch_add(1, Ordering::Relaxed));
            }
        }
        let mut uses = 0;
        while gate.bf12().is_none() && uses < 100 {
            gate.used(&pool, Some(&up));
            other.used(&pool, Some(&up));
            uses += 1;
        }
        if cfg!(target_arch = "x86_64") {
            assert!((4..20).contains(&uses), "{uses}");
            assert!(up.bf12().is_some() && told.load(Ordering::Relaxed) == 2);
            assert!(gate.bytes() < rows * cols * 2 * 4 / 5, "{}", gate.bytes());
        }
        assert!(other.bf12().is_none(), "nobody asked for it");
    }
}
