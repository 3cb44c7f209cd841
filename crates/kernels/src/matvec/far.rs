//! Rows of weight matrices times one vector, in streams of memory that lie far apart and are not interrupted.

use super::{LONG, Stored, dot_streams};
use crate::simd::{Kernel, Memory, Simd, dispatch, memory};
use crate::weights::{Storage, Weights};

/// Rows that are read side by side.
pub(crate) const STREAMS: usize = 4;

/// Whether [`dot_far`] suits these weights on this processor.
pub(crate) fn suits(w: &Weights) -> bool {
    let stored = matches!(w.storage(), Storage::F32(_) | Storage::F16(_));
    stored && w.cols() >= LONG && memory() != Memory::OneStream
}

/// Bytes of a stored number, where [`suits`] says yes.
pub(crate) fn element_bytes(w: &Weights) -> usize {
    match w.storage() {
        Storage::F32(_) => 4,
        _ => 2,
    }
}

/// Multiplies `count` rows of each stream, a matrix and its first row, and as many more as `more` gives, which is asked for the new
/// count until it gives none; says how many. `sums` has room for the most rows, one stream behind the other.
///
/// # Panics
/// When the matrices are not stored alike in what [`suits`], or have other columns or too few rows.
pub(crate) fn dot_far(
    streams: [(&Weights, usize); STREAMS],
    x: &[f32],
    count: usize,
    sums: &mut [f32],
    more: &mut dyn FnMut() -> Option<usize>,
) -> usize {
    let (cols, most) = (x.len(), sums.len() / STREAMS);
    assert!(
        streams
            .iter()
            .all(|(w, row)| w.cols() == cols && row + most <= w.rows()),
        "matvec: rows and columns"
    );
    let part = |row: usize| row * cols..(row + most) * cols;
    match streams[0].0.storage() {
        Storage::F32(_) => dispatch(Far {
            w: streams.map(|(w, row)| match w.storage() {
                Storage::F32(data) => &data.f32()[part(row)],
                _ => panic!("matvec: matrices that are not stored alike"),
            }),
            x,
            count,
            sums,
            more,
        }),
        Storage::F16(_) => dispatch(Far {
            w: streams.map(|(w, row)| match w.storage() {
                Storage::F16(data) => &data.f16()[part(row)],
                _ => panic!("matvec: matrices that are not stored alike"),
            }),
            x,
            count,
            sums,
            more,
        }),
        _ => panic!("matvec: palettes and integers are not read in far streams"),
    }
}

struct Far<'a, 'm, T> {
    w: [&'a [T]; STREAMS],
    x: &'a [f32],
    count: usize,
    sums: &'a mut [f32],
    more: &'a mut (dyn FnMut() -> Option<usize> + 'm),
}

impl<T: Stored> Kernel for Far<'_, '_, T> {
    type Out = usize;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        match memory() {
            Memory::FourStreams => self.rows::<S, 2, false>(s, 512),
            Memory::OneStream | Memory::FarStreams => self.rows::<S, 4, true>(s, 1024),
        }
    }
}

impl<T: Stored> Far<'_, '_, T> {
    /// In `A` sums for each row, asking memory for what lies `ahead` bytes behind, where `SECOND` to the second cache.
    #[inline(always)]
    fn rows<S: Simd, const A: usize, const SECOND: bool>(mut self, s: S, ahead: usize) -> usize {
        let (cols, most) = (self.x.len(), self.sums.len() / STREAMS);
        let mut row = 0;
        loop {
            while row < self.count {
                let rows = std::array::from_fn(|r| &self.w[r][row * cols..(row + 1) * cols]);
                let sums = dot_streams::<S, T, STREAMS, A, SECOND>(s, rows, self.x, ahead);
                for (stream, sum) in sums.into_iter().enumerate() {
                    self.sums[stream * most + row] = sum;
                }
                row += 1;
            }
            match (self.more)() {
                Some(count) => self.count = count,
                None => return row,
            }
        }
    }
}
