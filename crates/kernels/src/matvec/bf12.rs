//! Rows of weights in 12 bits times one vector.

use super::{Rows, ask};
use crate::simd::{Kernel, Memory, Simd, memory};
use crate::weights::Bf12;
use crate::weights::bf12::{BLOCK, BLOCK_BYTES, SCALE};
use std::ops::Range;

impl Rows for &Bf12 {
    #[inline(always)]
    fn dot<S: Simd, const R: usize, const A: usize, const SECOND: bool>(
        s: S,
        w: [(Self, usize); R],
        x: &[f32],
        ahead: usize,
    ) -> [f32; R] {
        let mut rows = [&[][..]; R];
        for (to, (w, row)) in rows.iter_mut().zip(w) {
            *to = &w.data()[row * w.row_bytes()..(row + 1) * w.row_bytes()];
            assert_eq!(to.len(), x.len() / BLOCK * BLOCK_BYTES, "dot: columns");
        }
        for (w, row) in w {
            s.prefetch(w.tail(row + 64));
        }
        let scale = s.splat(SCALE);
        let mut sums = [[s.zero(); A]; R];
        for block in 0..x.len() / BLOCK {
            for row in rows {
                let at = row.as_ptr().wrapping_add(block * BLOCK_BYTES);
                ask::<S, SECOND>(s, at.wrapping_add(ahead), BLOCK_BYTES);
            }
            for part in 0..16 / S::LANES {
                let mut quarters = [s.zero(); 4];
                for (quarter, x4) in quarters.iter_mut().enumerate() {
                    // SAFETY: inside block `block` of `x`.
                    let x = unsafe { s.load(x.as_ptr().add(block * BLOCK + 16 * quarter + part * S::LANES)) };
                    *x4 = s.mul(x, scale);
                }
                for (row, sums) in rows.iter().zip(&mut sums) {
                    // SAFETY: rows have as many blocks as `x`.
                    let w = unsafe { s.load_bf12(row.as_ptr().add(block * BLOCK_BYTES), part) };
                    for quarter in 0..4 {
                        let n = (quarter * (16 / S::LANES) + part) % A;
                        sums[n] = s.fma(w[quarter], quarters[quarter], sums[n]);
                    }
                }
            }
        }
        let mut results = [0.0; R];
        for r in 0..R {
            let mut sum = sums[r][0];
            for part in &sums[r][1..] {
                sum = s.add(sum, *part);
            }
            let (w, row) = w[r];
            results[r] = w.finish(row, s.sum(sum), x);
        }
        results
    }
}

/// `out[i] = sum_k w[rows.start + i, k] * x[k]`.
pub(super) struct Dot<'a> {
    pub w: &'a Bf12,
    pub rows: Range<usize>,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for Dot<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match memory() {
            Memory::OneStream => self.streams::<S, 1, 4, false>(s, 3584),
            Memory::FarStreams => self.streams::<S, 4, 4, true>(s, 1024),
            Memory::FourStreams => self.streams::<S, 4, 2, false>(s, 512),
        }
    }
}

impl Dot<'_> {
    #[inline(always)]
    fn streams<S: Simd, const R: usize, const A: usize, const SECOND: bool>(&mut self, s: S, ahead: usize) {
        let (w, first) = (self.w, self.rows.start);
        let each = self.rows.len() / R;
        for at in 0..each {
            let rows = std::array::from_fn(|r| (w, first + r * each + at));
            let sums = <&Bf12>::dot::<S, R, A, SECOND>(s, rows, self.x, ahead);
            for (stream, sum) in sums.into_iter().enumerate() {
                self.out[stream * each + at] = sum;
            }
        }
        for row in R * each..self.rows.len() {
            let [sum] = <&Bf12>::dot::<S, 1, A, SECOND>(s, [(w, first + row)], self.x, ahead);
            self.out[row] = sum;
        }
    }
}
