//! Rows of weight matrices times one vector, in streams of memory that lie far apart and are not interrupted.

use super::{LONG, Stored, dot_streams};
use crate::simd::{Kernel, Memory, Simd, dispatch, memory};
use crate::weights::{Storage, Weights};
use half::f16;

/// Rows that are read side by side.
pub(crate) const STREAMS: usize = 4;

/// Whether [`dot_far`] suits these weights on this processor.
pub(crate) fn suits(w: &Weights) -> bool {
    let stored = matches!(w.storage(), Storage::F32(_) | Storage::F16(_));
    stored && w.cols() >= LONG && memory() != Memory::OneStream
}

/// Whether these can be read side by side.
pub(crate) fn alike(a: &Weights, b: &Weights) -> bool {
    std::mem::discriminant(a.storage()) == std::mem::discriminant(b.storage())
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
/// When the matrices are not [`alike`] and what [`suits`], or have other columns or too few rows.
pub(crate) fn dot_far(streams: [(&Weights, usize); STREAMS], x: &[f32], count: Count<'_>, sums: &mut [f32]) {
    match streams[0].0.storage() {
        Storage::F32(_) => dot_stored::<f32>(streams, x, count, sums),
        _ => dot_stored::<f16>(streams, x, count, sums),
    }
}

fn dot_stored<T: Stored>(
    streams: [(&Weights, usize); STREAMS],
    x: &[f32],
    count: Count<'_>,
    sums: &mut [f32],
) {
    let (cols, most) = (x.len(), sums.len() / STREAMS);
    let w = streams.map(|(w, row)| {
        assert_eq!(w.cols(), cols, "matvec: columns");
        let all = T::all(w).expect("matrices in far streams are stored alike");
        &all[row * cols..(row + most) * cols]
    });
    dispatch(Far { w, x, count, sums });
}

struct Far<'a, 'm, T> {
    w: [&'a [T]; STREAMS],
    x: &'a [f32],
    count: Count<'m>,
    sums: &'a mut [f32],
}

impl<T: Stored> Kernel for Far<'_, '_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match memory() {
            Memory::FourStreams => self.rows::<S, 2, false>(s, 512),
            Memory::OneStream | Memory::FarStreams => self.rows::<S, 4, true>(s, 1024),
        }
    }
}

impl<T: Stored> Far<'_, '_, T> {
    /// In `A` sums for each row, asking memory for what lies `ahead` bytes behind, where `SECOND` to the second cache.
    #[inline(always)]
    fn rows<S: Simd, const A: usize, const SECOND: bool>(self, s: S, ahead: usize) {
        let (cols, most) = (self.x.len(), self.sums.len() / STREAMS);
        let (mut row, mut rows) = (0, self.count.rows);
        loop {
            while row < rows {
                let w = std::array::from_fn(|r| &self.w[r][row * cols..(row + 1) * cols]);
                let sums = dot_streams::<S, T, STREAMS, A, SECOND>(s, w, self.x, ahead);
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
