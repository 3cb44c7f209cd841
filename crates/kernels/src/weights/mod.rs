//! Weight matrices kept as a model stores them: `f32`, `f16`, palettes of 1 to 8 bits, 4- and 8-bit integers.

mod affine;
pub(crate) mod bf12;
mod int8;
mod lut;
mod slab;

pub(crate) use affine::Affine;
pub(crate) use bf12::Bf12;
pub(crate) use int8::Int8;
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_imports))]
pub(crate) use lut::{FixedTables, Lut};

use crate::matvec::Stored;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs};
use bytes::Bytes;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// A matrix of `rows` (outputs, N) by `cols` (inputs, K), row-major. Clones share the data.
///
/// ```
/// use candle_coreml_kernels::weights::Weights;
/// let table = (0..16).map(|i| i as f32).collect();
/// let weights = Weights::lut(1, 4, 4, vec![0x21, 0x43].into(), table, 1, 4)?;
/// let mut row = [0.0; 4];
/// weights.row(0, &mut row);
/// assert_eq!(row, [1.0, 2.0, 3.0, 4.0]);
/// # Ok::<(), candle_coreml_kernels::weights::WeightsError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Weights(Arc<Matrix>);

#[derive(Debug)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub storage: Storage,
    /// The same numbers in 12 bits: what is read once it is there.
    bf12: OnceLock<Option<Bf12>>,
    /// The same rounded to 8-bit integers, for products of many tokens in `fast` numerics.
    int8: OnceLock<Int8>,
    packing: Packing,
}

/// Whether and when a matrix is packed into [`Bf12`].
#[derive(Default)]
struct Packing {
    /// The turn, and what is called when the numbers as stored are not read any longer; none where packing is not wanted.
    wanted: OnceLock<(usize, Box<dyn Fn() + Send + Sync>)>,
    /// Products with few tokens so far.
    uses: AtomicUsize,
}

impl std::fmt::Debug for Packing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let wanted = self.wanted.get().is_some();
        write!(f, "Packing {{ wanted: {wanted}, uses: {:?} }}", self.uses)
    }
}

/// Products with few tokens after which a matrix is packed: packing costs as much as a dozen of them, and several matrices are not
/// packed at once, so that no token waits for all of them.
const PACK_AFTER: std::ops::Range<usize> = 4..12;

/// Fewer bytes than this stay in caches: tokens one by one gain nothing by packing.
const PACK_BYTES: usize = 256 * 1024;

/// Fewer bytes than this are not rounded for many tokens either.
const ROUND_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub(crate) enum Storage {
    F32(Aligned),
    F16(Aligned),
    Lut(Lut),
    Affine(Affine),
}

/// Bytes that start at a multiple of four, as numbers read in place need.
#[derive(Debug)]
pub(crate) struct Aligned(Bytes);

impl Aligned {
    /// Keeps `data` when it is aligned already, as it is in mapped weight files, and copies it otherwise.
    fn new(data: Bytes) -> Self {
        if data.as_ptr().addr().is_multiple_of(4) {
            return Aligned(data);
        }
        struct Words(Vec<u32>, usize);
        impl AsRef<[u8]> for Words {
            fn as_ref(&self) -> &[u8] {
                &bytemuck::cast_slice(&self.0)[..self.1]
            }
        }
        let mut words = vec![0_u32; data.len().div_ceil(4)];
        bytemuck::cast_slice_mut(&mut words)[..data.len()].copy_from_slice(&data);
        let len = data.len();
        Aligned(Bytes::from_owner(Words(words, len)))
    }

    pub(crate) fn f32(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    pub(crate) fn f16(&self) -> &[f16] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Parts of a matrix that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The element count does not fit the address space.
    #[error("a matrix of {rows} x {cols} is too large")]
    TooLarge {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// The data is shorter or longer than the shape says.
    #[error("{part} has {found} entries, the matrix of {rows} x {cols} needs {needed}")]
    Length {
        /// Which argument.
        part: &'static str,
        /// Entries given.
        found: usize,
        /// Entries needed.
        needed: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A width that no kernel reads.
    #[error("{bits} bits an entry are not supported for {kind}, allowed: {allowed}")]
    Bits {
        /// Which storage.
        kind: &'static str,
        /// The width given.
        bits: u32,
        /// The widths there are.
        allowed: &'static str,
    },
    /// A group size of zero.
    #[error("{part} is 0, allowed is 1 or more")]
    Group {
        /// Which argument.
        part: &'static str,
    },
}

impl Weights {
    /// Little-endian `f32` values.
    ///
    /// # Errors
    /// When the length is not `4 * rows * cols` bytes.
    pub fn from_f32(rows: usize, cols: usize, data: Bytes) -> Result<Weights, WeightsError> {
        expect_len(
            "data (bytes)",
            data.len(),
            count(rows, cols)?.checked_mul(4),
            (rows, cols),
        )?;
        Ok(Self::new(rows, cols, Storage::F32(Aligned::new(data))))
    }

    /// Little-endian `f16` values.
    ///
    /// # Errors
    /// When the length is not `2 * rows * cols` bytes.
    pub fn from_f16(rows: usize, cols: usize, data: Bytes) -> Result<Weights, WeightsError> {
        expect_len(
            "data (bytes)",
            data.len(),
            count(rows, cols)?.checked_mul(2),
            (rows, cols),
        )?;
        Ok(Self::new(rows, cols, Storage::F16(Aligned::new(data))))
    }

    /// Palettised values: entry `[r, c]` is `table[r / row_group][c / col_group][index[r, c]]`.
    ///
    /// `bits` is 1, 2, 3, 4, 6 or 8. `indices` holds the row-major index stream, first index in the lowest bits, rows
    /// not padded. `table` is `[ceil(rows / row_group)][ceil(cols / col_group)][2^bits]`.
    ///
    /// # Errors
    /// When a length does not fit, a group is 0, or `bits` is none of the above.
    #[allow(clippy::too_many_arguments)] // the parts of one stored tensor, named as its file names them
    pub fn lut(
        rows: usize,
        cols: usize,
        bits: u32,
        indices: Bytes,
        table: Vec<f32>,
        row_group: usize,
        col_group: usize,
    ) -> Result<Weights, WeightsError> {
        let lut = Lut::new((rows, cols), bits, indices, table, (row_group, col_group))?;
        Ok(Self::new(rows, cols, Storage::Lut(lut)))
    }

    /// Integers with a scale and an optional zero point per block: entry `[r, c]` is `(q[r, c] - zero) * scale`.
    ///
    /// `bits` is 4 (two entries a byte, the first in the low half) or 8; `signed` says how they are read. `scale`
    /// and `zero` are `[ceil(rows / row_block)][ceil(cols / col_block)]`.
    ///
    /// # Errors
    /// When a length does not fit, a block is 0, or `bits` is neither 4 nor 8.
    #[allow(clippy::too_many_arguments)] // the parts of one stored tensor, named as its file names them
    pub fn affine(
        rows: usize,
        cols: usize,
        bits: u32,
        signed: bool,
        data: Bytes,
        scale: Vec<f32>,
        zero: Option<Vec<f32>>,
        row_block: usize,
        col_block: usize,
    ) -> Result<Weights, WeightsError> {
        let affine = Affine::new(
            (rows, cols),
            (bits, signed),
            data,
            (scale, zero),
            (row_block, col_block),
        )?;
        Ok(Self::new(rows, cols, Storage::Affine(affine)))
    }

    fn new(rows: usize, cols: usize, storage: Storage) -> Weights {
        Weights(Arc::new(Matrix {
            rows,
            cols,
            storage,
            bf12: OnceLock::new(),
            int8: OnceLock::new(),
            packing: Packing::default(),
        }))
    }

    /// Lets fp16 and fp32 numbers be packed into fewer bits when they are products time and again: those that were bf16 for few tokens,
    /// without loss, where memory is what products wait for (x86-64); all of them to 8-bit integers for many tokens in
    /// [`Arithmetic::Int8`](crate::Arithmetic::Int8). `packed` is called when the data given is not read any longer, as far as it can be
    /// known: a file's pages may leave memory then. Without effect a second time.
    pub fn pack_when_used(&self, packed: impl Fn() + Send + Sync + 'static) {
        let floats = matches!(self.storage(), Storage::F32(_) | Storage::F16(_));
        if floats && self.bytes() >= ROUND_BYTES {
            static TURN: AtomicUsize = AtomicUsize::new(0);
            // The first who asks is called.
            let turn = TURN.fetch_add(1, Ordering::Relaxed) % PACK_AFTER.len();
            let _ = self.0.packing.wanted.set((turn, Box::new(packed)));
        }
    }

    /// Counts a product with few tokens of this matrix and of `up`, which is read beside it; packs both when it is time.
    pub(crate) fn used(&self, pool: &Pool, up: Option<&Weights>) {
        let packing = &self.0.packing;
        let Some((turn, _)) = packing.wanted.get().filter(|_| self.0.bf12.get().is_none()) else {
            return;
        };
        let uses = packing.uses.fetch_add(1, Ordering::Relaxed);
        let large = Read::of(self).bytes() >= PACK_BYTES;
        if uses == PACK_AFTER.start + turn && large && packing_pays() {
            self.pack(pool);
            if let Some(up) = up.filter(|up| up.0.packing.wanted.get().is_some()) {
                up.pack(pool);
            }
        }
    }

    /// The numbers in 8-bit integers; rounds them the first time, where packing is wanted.
    pub(crate) fn int8_when_used(&self, pool: &Pool) -> Option<&Int8> {
        if self.int8().is_none() {
            let (_, packed) = self.0.packing.wanted.get()?;
            self.round(pool);
            packed();
        }
        self.int8()
    }

    /// Rounds the numbers to 8-bit integers.
    pub(crate) fn round(&self, pool: &Pool) {
        if self.int8().is_none() {
            // Another thread may have been first: what it made is as good.
            let _ = self.0.int8.set(Int8::pack(pool, self));
        }
    }

    /// The numbers in 8-bit integers, where they were rounded.
    pub(crate) fn int8(&self) -> Option<&Int8> {
        self.0.int8.get()
    }

    /// Packs the numbers, where that loses nothing.
    pub(crate) fn pack(&self, pool: &Pool) {
        let bf12 = &self.0.bf12;
        if bf12.get().is_some() || bf12.set(Bf12::pack(pool, self)).is_err() {
            return;
        }
        if let Some((_, packed)) = self.0.packing.wanted.get().filter(|_| self.bf12().is_some()) {
            packed();
        }
    }

    /// The numbers in 12 bits, where they were packed.
    pub(crate) fn bf12(&self) -> Option<&Bf12> {
        self.0.bf12.get()?.as_ref()
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// Rows, the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Columns, the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.0.cols
    }

    /// Decodes row `row` into `out`.
    ///
    /// # Panics
    /// When `row` is outside the matrix or `out` is not [`Weights::cols`] long.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows(), "row {row} of {}", self.rows());
        assert_eq!(out.len(), self.cols(), "a row has other columns");
        self.decode(row, 0, out);
    }

    /// Decodes `out.len()` entries of row `row` from column `first` on.
    pub(crate) fn decode(&self, row: usize, first: usize, out: &mut [f32]) {
        if let Some(bf12) = self.bf12() {
            let (depth, step) = (out.len(), out.len().max(1));
            return bf12.decode(row..row + 1, first, depth, (out, step));
        }
        let start = row * self.cols() + first;
        match self.storage() {
            Storage::F32(data) => out.copy_from_slice(&data.f32()[start..start + out.len()]),
            Storage::F16(data) => crate::copy::f16_to_f32(&data.f16()[start..start + out.len()], out),
            Storage::Lut(lut) => lut.decode(row, first, out),
            Storage::Affine(affine) => affine.decode(row, first, out),
        }
    }

    /// Decodes columns `first..first + depth` of each row in `rows` into `out`, where rows begin `step` elements apart.
    pub(crate) fn decode_block(
        &self,
        rows: Range<usize>,
        first: usize,
        depth: usize,
        (out, step): (&mut [f32], usize),
    ) {
        if let Some(bf12) = self.bf12() {
            return bf12.decode(rows, first, depth, (out, step));
        }
        if let Storage::F16(data) = self.storage() {
            let block = RowsOf::new(data.f16(), self.cols(), rows, first..first + depth);
            return dispatch(Widened(block, out, step));
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(step)) {
            self.decode(row, first, &mut out[..depth]);
        }
    }

    /// Columns `first..first + count` of each row in `rows`, rounded to bf16, with zeros behind up to `whole`; rows begin `step` elements
    /// of `out` apart.
    pub(crate) fn decode_pairs(
        &self,
        rows: Range<usize>,
        (first, count, whole): (usize, usize, usize),
        (out, step): (&mut [bf16], usize),
    ) {
        if let Some(bf12) = self.bf12() {
            return bf12.decode_pairs(rows, (first, count, whole), (out, step));
        }
        let columns = first..first + count;
        match self.storage() {
            Storage::F32(data) => {
                let block = RowsOf::new(data.f32(), self.cols(), rows, columns);
                dispatch_pairs(RoundedRows(block, whole, out, step));
            }
            Storage::F16(data) => {
                let block = RowsOf::new(data.f16(), self.cols(), rows, columns);
                dispatch_pairs(RoundedRows(block, whole, out, step));
            }
            Storage::Lut(_) | Storage::Affine(_) => {
                let mut wide = [0.0; 512];
                for (row, out) in rows.zip(out.chunks_exact_mut(step)) {
                    let (out, rest) = out[..whole].split_at_mut(count);
                    rest.fill(bf16::ZERO);
                    for (i, out) in out.chunks_mut(wide.len()).enumerate() {
                        let wide = &mut wide[..out.len()];
                        self.decode(row, first + i * 512, wide);
                        dispatch_pairs(Round(wide, out));
                    }
                }
            }
        }
    }

    /// Where the part of some rows lies that [`Weights::decode_block`] reads, when it does little besides waiting for it.
    pub(crate) fn lines(&self, rows: Range<usize>, first: usize, depth: usize) -> Lines {
        let (data, bits) = Read::of(self).numbers();
        let row = self.cols() * bits;
        if rows.end > self.rows() || !row.is_multiple_of(8) {
            return Lines::default();
        }
        Lines {
            first: data.as_ptr().wrapping_add((rows.start * row + first * bits) / 8),
            step: row / 8,
            rows: rows.len(),
            bytes: (depth * bits).div_ceil(8),
        }
    }

    /// Bytes held in memory or mapped, tables included.
    pub fn bytes(&self) -> usize {
        Read::of(self).bytes() + self.int8().map_or(0, Int8::bytes)
    }
}

/// A matrix as one call reads it: what another thread packs meanwhile is for the next one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Read<'a> {
    pub weights: &'a Weights,
    pub bf12: Option<&'a Bf12>,
}

impl<'a> Read<'a> {
    pub(crate) fn of(weights: &'a Weights) -> Self {
        let bf12 = weights.bf12();
        Read { weights, bf12 }
    }

    pub(crate) fn rows(self) -> usize {
        self.weights.rows()
    }

    pub(crate) fn cols(self) -> usize {
        self.weights.cols()
    }

    /// As [`Weights::bytes`].
    pub(crate) fn bytes(self) -> usize {
        match (self.bf12, self.weights.storage()) {
            (Some(bf12), _) => bf12.bytes(),
            (_, Storage::F32(data) | Storage::F16(data)) => data.0.len(),
            (_, Storage::Lut(lut)) => lut.bytes(),
            (_, Storage::Affine(affine)) => affine.bytes(),
        }
    }

    /// Whether these can be read side by side.
    pub(crate) fn is_like(self, other: Read<'_>) -> bool {
        let kind = |read: Read<'_>| {
            (
                read.bf12.is_some(),
                std::mem::discriminant(read.weights.storage()),
            )
        };
        kind(self) == kind(other)
    }

    /// Where `count` streams of `each` rows that follow each other from row `first` on begin, `most` bytes of each.
    pub(crate) fn streams(self, first: usize, each: usize, count: usize, most: usize) -> Lines {
        let row = self.row_bytes();
        Lines {
            first: self.numbers().0.as_ptr().wrapping_add(first * row),
            step: each * row,
            rows: count,
            bytes: most.min(each * row),
        }
    }

    /// Bytes of a row, of the whole ones where numbers lie across them.
    pub(crate) fn row_bytes(self) -> usize {
        self.cols() * self.numbers().1 / 8
    }

    /// What is stored for each number, apart from tables and scales, and its bits.
    fn numbers(self) -> (&'a [u8], usize) {
        match (self.bf12, self.weights.storage()) {
            (Some(bf12), _) => (bf12.data(), 12),
            (_, Storage::F32(data)) => (&data.0, 32),
            (_, Storage::F16(data)) => (&data.0, 16),
            (_, Storage::Lut(lut)) => (&lut.indices, lut.bits as usize),
            (_, Storage::Affine(affine)) => (&affine.data, affine.bits as usize),
        }
    }
}

/// Whether reading is what products of few tokens wait for. Elsewhere than on x86-64 unpacking was not measured.
fn packing_pays() -> bool {
    #[cfg(target_arch = "x86_64")]
    return crate::simd::has_avx2();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Numbers rounded to bf16, as many as there is room for.
pub(crate) struct Round<'a, T>(pub &'a [T], pub &'a mut [bf16]);

impl<T: Stored> Kernel for Round<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Round(from, to) = self;
        assert_eq!(from.len(), to.len(), "as many numbers as room");
        let mut at = 0;
        while at + 2 * S::LANES <= to.len() {
            let from = from.as_ptr().wrapping_add(at);
            // SAFETY: two vectors of both.
            unsafe {
                let both = [T::load(s, from), T::load(s, from.add(S::LANES))];
                s.store_bf16_twice(to.as_mut_ptr().add(at), both);
            }
            at += 2 * S::LANES;
        }
        if at + S::LANES <= to.len() {
            // SAFETY: a vector of both.
            unsafe { s.store_bf16(to.as_mut_ptr().add(at), T::load(s, from.as_ptr().add(at))) };
            at += S::LANES;
        }
        for (to, from) in to[at..].iter_mut().zip(&from[at..]) {
            *to = bf16::from_f32(from.widen());
        }
    }
}

/// Some columns of some rows of a dense matrix.
pub(crate) struct RowsOf<'a, T> {
    all: &'a [T],
    cols: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl<'a, T> RowsOf<'a, T> {
    /// Of the matrix `all`, whose rows have `cols` elements.
    pub(crate) fn new(all: &'a [T], cols: usize, rows: Range<usize>, columns: Range<usize>) -> Self {
        RowsOf {
            all,
            cols,
            rows,
            columns,
        }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [T] {
        &self.all[row * self.cols..(row + 1) * self.cols][self.columns.clone()]
    }
}

/// Rows as `f32`, so many elements apart.
struct Widened<'a, T>(RowsOf<'a, T>, &'a mut [f32], usize);

impl<T: Stored> Kernel for Widened<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Widened(block, out, step) = self;
        for (row, out) in block.rows.clone().zip(out.chunks_exact_mut(step)) {
            let from = block.row(row);
            let (to, count) = (&mut out[..from.len()], from.len() / S::LANES * S::LANES);
            for at in (0..count).step_by(S::LANES) {
                // SAFETY: a vector of both.
                unsafe { s.store(to.as_mut_ptr().add(at), T::load(s, from.as_ptr().add(at))) };
            }
            for (to, from) in to[count..].iter_mut().zip(&from[count..]) {
                *to = from.widen();
            }
        }
    }
}

/// Rows rounded to bf16, with zeros up to so many elements, so many apart.
pub(crate) struct RoundedRows<'a, T>(pub RowsOf<'a, T>, pub usize, pub &'a mut [bf16], pub usize);

impl<T: Stored> Kernel for RoundedRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let RoundedRows(block, whole, out, step) = self;
        for (row, out) in block.rows.clone().zip(out.chunks_exact_mut(step)) {
            let from = block.row(row);
            let (to, zeros) = out[..whole].split_at_mut(from.len());
            Round(from, to).run(s);
            zeros.fill(bf16::ZERO);
        }
    }
}

/// Equal stretches of memory, a step apart.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lines {
    pub first: *const u8,
    pub step: usize,
    pub rows: usize,
    pub bytes: usize,
}

impl Lines {
    /// Lines of cache.
    pub(crate) fn len(&self) -> usize {
        self.rows * self.bytes.div_ceil(64)
    }

    /// Walks over the lines of cache.
    #[inline(always)]
    pub(crate) fn walk(self) -> Walk {
        Walk {
            lines: self,
            row: self.first,
            at: 0,
        }
    }
}

/// A walk over [`Lines`], which goes on behind them where it is not ended: addresses alone are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    lines: Lines,
    row: *const u8,
    at: usize,
}

impl Walk {
    /// The next line.
    #[inline(always)]
    pub(crate) fn step(&mut self) -> *const u8 {
        let line = self.row.wrapping_add(self.at);
        self.at += 64;
        if self.at >= self.lines.bytes {
            self.row = self.row.wrapping_add(self.lines.step);
            self.at = 0;
        }
        line
    }
}

fn count(rows: usize, cols: usize) -> Result<usize, WeightsError> {
    // Eight bits an entry of headroom, so that counts of bits and bytes are safe as well.
    let cells = rows
        .checked_mul(cols)
        .filter(|cells| *cells <= isize::MAX as usize / 64);
    cells.ok_or(WeightsError::TooLarge { rows, cols })
}

fn expect_len(
    part: &'static str,
    found: usize,
    needed: Option<usize>,
    (rows, cols): (usize, usize),
) -> Result<(), WeightsError> {
    let needed = needed.ok_or(WeightsError::TooLarge { rows, cols })?;
    if found == needed {
        Ok(())
    } else {
        Err(WeightsError::Length {
            part,
            found,
            needed,
            rows,
            cols,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_not_fit_are_named() {
        let bytes = |n: usize| Bytes::from(vec![0_u8; n]);
        let cases: Vec<(Result<Weights, WeightsError>, &str)> = vec![
            (
                Weights::from_f32(2, 3, bytes(23)),
                "data (bytes) has 23 entries, the matrix of 2 x 3 needs 24",
            ),
            (Weights::from_f16(usize::MAX, 3, bytes(23)), "too large"),
            (
                Weights::lut(2, 3, 5, bytes(4), vec![0.0; 32], 1, 3),
                "5 bits an entry are not supported",
            ),
            (
                Weights::lut(2, 3, 4, bytes(4), vec![0.0; 32], 1, 3),
                "indices (bytes) has 4 entries",
            ),
            (
                Weights::lut(2, 3, 4, bytes(3), vec![0.0; 16], 1, 3),
                "table has 16 entries",
            ),
            (
                Weights::lut(2, 3, 4, bytes(3), vec![0.0; 32], 0, 3),
                "row_group is 0",
            ),
            (
                Weights::affine(2, 4, 8, true, bytes(8), vec![1.0; 3], None, 1, 4),
                "scale has 3 entries",
            ),
            (
                Weights::affine(2, 4, 8, true, bytes(8), vec![1.0; 2], Some(vec![]), 1, 4),
                "zero has 0 entries",
            ),
            (
                Weights::affine(2, 4, 2, true, bytes(8), vec![1.0; 2], None, 1, 4),
                "2 bits an entry",
            ),
        ];
        for (result, expected) in cases {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(expected), "{text:?} lacks {expected:?}");
        }
    }

    #[test]
    fn unaligned_data_is_read_all_the_same() {
        let mut raw = vec![0_u8; 9 * 4];
        for offset in 0..4 {
            raw[offset..offset + 32]
                .copy_from_slice(bytemuck::cast_slice(&[1.0_f32, 2., 3., 4., 5., 6., 7., 8.]));
            let data = Bytes::copy_from_slice(&raw).slice(offset..offset + 32);
            let weights = Weights::from_f32(2, 4, data).unwrap();
            let mut row = [0.0; 4];
            weights.row(1, &mut row);
            assert_eq!(row, [5.0, 6.0, 7.0, 8.0]);
        }
    }
}
