//! Rows of weight matrices times one vector, in streams of memory that lie far apart and are not interrupted.

use super::{LONG, Rows, Stored};
use crate::simd::{Kernel, Memory, Simd, dispatch, memory};
use crate::weights::{Read, Storage};
use half::f16;

/// Rows that are read side by side.
pub(crate) const STREAMS: usize = 4;

/// Whether [`dot_far`] suits these weights on this processor.
pub(crate) fn suits(w: Read<'_>) -> bool {
    let stored = matches!(w.weights.storage(), Storage::F32(_) | Storage::F16(_));
    stored && w.cols() >= LONG && memory() != Memory::OneStream
}

/// Rows to multiply: some, and more as long as `more` gives a new count.
pub(crate) struct Count<'m> {
    pub rows: usize,
    pub more: &'m mut dyn FnMut() -> Option<usize>,
}

/// Multiplies rows of each stream, a matrix and its first row, as many as `count` says. `sums` has room for the most
/// rows, one stream behind the other.
///
/// # Panics
/// When the matrices are not [alike](Read::is_like) and what [`suits`], or have other columns or too few rows.
pub(crate) fn dot_far(streams: [(Read<'_>, usize); STREAMS], x: &[f32], count: Count<'_>, sums: &mut [f32]) {
    let most = sums.len() / STREAMS;
    for (w, row) in streams {
        assert!(
            w.cols() == x.len() && row + most <= w.rows(),
            "matvec: rows and columns"
        );
    }
    let alike = "matrices in far streams are stored alike";
    if streams[0].0.bf12.is_some() {
        let w = streams.map(|(w, row)| (w.bf12.expect(alike), row));
        return dispatch(Far { w, x, count, sums });
    }
    match streams[0].0.weights.storage() {
        Storage::F32(_) => {
            let w = streams.map(|(w, row)| (f32::all(w.weights).expect(alike), row));
            dispatch(Far { w, x, count, sums });
        }
        _ => {
            let w = streams.map(|(w, row)| (f16::all(w.weights).expect(alike), row));
            dispatch(Far { w, x, count, sums });
        }
    }
}

/// Rows of matrices, each from a row on.
struct Far<'a, 'm, W> {
    w: [(W, usize); STREAMS],
    x: &'a [f32],
    count: Count<'m>,
    sums: &'a mut [f32],
}

impl<W: Rows> Kernel for Far<'_, '_, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match memory() {
            Memory::FourStreams => self.rows::<S, 2, false>(s, 512),
            Memory::OneStream | Memory::FarStreams => self.rows::<S, 4, true>(s, 1024),
        }
    }
}

impl<W: Rows> Far<'_, '_, W> {
    /// In `A` sums for each row, asking memory for what lies `ahead` bytes behind, where `SECOND` to the second cache.
    #[inline(always)]
    fn rows<S: Simd, const A: usize, const SECOND: bool>(self, s: S, ahead: usize) {
        let most = self.sums.len() / STREAMS;
        let (mut row, mut rows) = (0, self.count.rows);
        loop {
            while row < rows {
                let mut w = self.w;
                w.iter_mut().for_each(|(_, first)| *first += row);
                let sums = W::dot::<S, STREAMS, A, SECOND>(s, w, self.x, ahead);
                for (stream, sum) in sums.into_iter().enumerate() {
                    self.sums[stream * most + row] = sum;
                }
                row += 1;
            }
            match (self.count.more)() {
                Some(more) => rows = more,
                None => return,
            }
        }
    }
}
