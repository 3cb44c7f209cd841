//! Reductions whose kept elements lie side by side: many results at once, the reduced axes outside.

use super::Reduce;
use crate::loops::Nest;
use crate::simd::{Kernel, Simd};

/// Results that are reduced together.
const WIDTH: usize = 32;

/// Results that threads share lines by: a vector.
pub(super) const BLOCK: usize = 16;

/// Vectors of results that are summed together.
const VECTORS: usize = 4;

/// Lines that are summed as they are; their sums are summed in 64 bits.
const LINES: usize = 8;

/// Whether the operation can be done so, for steps of the output and the input from one result to the next.
pub(super) fn possible(op: Reduce, steps: [isize; 2]) -> bool {
    let simple = matches!(
        op,
        Reduce::Sum | Reduce::Mean | Reduce::SumSquare | Reduce::L1 | Reduce::L2 | Reduce::Max | Reduce::Min
    );
    simple && steps == [1, 1]
}

/// `len` results side by side. Made by [`reduce`](super::reduce) alone, from offsets inside checked views.
pub(super) struct Columns<'a> {
    pub op: Reduce,
    pub nest: &'a Nest<1>,
    pub count: usize,
    pub x: *const f32,
    pub y: *mut f32,
    pub len: usize,
}

impl Kernel for Columns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.op {
            Reduce::Max => self.each(f32::NEG_INFINITY, |a, b| if b > a || b.is_nan() { b } else { a }),
            Reduce::Min => self.each(f32::INFINITY, |a, b| if b < a || b.is_nan() { b } else { a }),
            _ => {
                for first in (0..self.len).step_by(VECTORS * S::LANES) {
                    if self.len - first >= VECTORS * S::LANES {
                        self.sums::<S, false>(s, first);
                    } else {
                        self.sums::<S, true>(s, first);
                    }
                }
            }
        }
    }
}

impl Columns<'_> {
    /// Results of an operation that keeps one of two numbers.
    #[inline(always)]
    fn each(&self, start: f32, f: impl Fn(f32, f32) -> f32) {
        let (len, [step]) = self.nest.inner();
        for first in (0..self.len).step_by(WIDTH) {
            let width = WIDTH.min(self.len - first);
            let mut kept = [start; WIDTH];
            self.nest.for_rows(0..self.nest.rows(), |_, at| {
                for i in 0..len as isize {
                    let from = self.x.wrapping_offset(at[0] + i * step).wrapping_add(first);
                    // SAFETY: `width` kept elements beside each other, inside the view.
                    let line = unsafe { std::slice::from_raw_parts(from, width) };
                    if let Ok(line) = <&[f32; WIDTH]>::try_from(line) {
                        kept.iter_mut().zip(line).for_each(|(a, b)| *a = f(*a, *b));
                    } else {
                        kept.iter_mut().zip(line).for_each(|(a, b)| *a = f(*a, *b));
                    }
                }
            });
            for (i, value) in kept.into_iter().enumerate().take(width) {
                // SAFETY: `Nest` visits each result on one thread, and these lie side by side.
                unsafe { *self.y.wrapping_add(first + i) = value };
            }
        }
    }

    /// Results from `first` on that are sums: [`VECTORS`] of them, or, where `PART`, the last ones.
    #[inline(always)]
    fn sums<S: Simd, const PART: bool>(&self, s: S, first: usize) {
        let width = (self.len - first).min(VECTORS * S::LANES);
        let mut counts = [S::LANES; VECTORS];
        for (v, count) in counts.iter_mut().enumerate() {
            *count = width.saturating_sub(v * S::LANES).min(S::LANES);
        }
        let mut totals = [0.0_f64; 16 * VECTORS];
        let (len, [step]) = self.nest.inner();
        for row in 0..self.nest.rows() {
            let mut offset = 0;
            self.nest.for_rows(row..row + 1, |_, at| offset = at[0]);
            let row = self.x.wrapping_offset(offset).wrapping_add(first);
            for block in (0..len).step_by(LINES) {
                let mut sums = [s.zero(); VECTORS];
                for i in block..(block + LINES).min(len) {
                    let from = row.wrapping_offset(i as isize * step);
                    for v in 0..VECTORS {
                        // SAFETY: kept elements beside each other, inside the view.
                        let x = unsafe { s.load_some::<PART>(from.wrapping_add(v * S::LANES), counts[v]) };
                        sums[v] = match self.op {
                            Reduce::SumSquare | Reduce::L2 => s.fma(x, x, sums[v]),
                            Reduce::L1 => s.add(sums[v], s.abs(x)),
                            _ => s.add(sums[v], x),
                        };
                    }
                }
                let mut line = [0.0_f32; 16 * VECTORS];
                for (v, sum) in sums.into_iter().enumerate() {
                    // SAFETY: no vector is longer than sixteen lanes.
                    unsafe { s.store(line.as_mut_ptr().add(v * S::LANES), sum) };
                }
                let finite = |all: bool, sum: &f32| all & sum.is_finite();
                if line.iter().fold(true, finite) {
                    totals
                        .iter_mut()
                        .zip(line)
                        .for_each(|(total, sum)| *total += f64::from(sum));
                    continue;
                }
                for (i, (total, sum)) in totals.iter_mut().zip(line).enumerate().take(width) {
                    if sum.is_finite() {
                        *total += f64::from(sum);
                        continue;
                    }
                    // What 32 bits cannot hold 64 may.
                    for at in block..(block + LINES).min(len) {
                        // SAFETY: a kept element of a line, inside the view.
                        let x =
                            f64::from(unsafe { *row.wrapping_offset(at as isize * step).wrapping_add(i) });
                        *total += match self.op {
                            Reduce::SumSquare | Reduce::L2 => x * x,
                            Reduce::L1 => x.abs(),
                            _ => x,
                        };
                    }
                }
            }
        }
        for (i, total) in totals.into_iter().enumerate().take(width) {
            let value = match self.op {
                Reduce::Mean => total / self.count as f64,
                Reduce::L2 => total.sqrt(),
                _ => total,
            };
            // SAFETY: `Nest` visits each result on one thread, and these lie side by side.
            unsafe { *self.y.wrapping_add(first + i) = value as f32 };
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::matvec::tests::random;
    use crate::pool::Pool;
    use crate::reduce::{Reduce, reduce};
    use crate::strided::{View, ViewMut};

    #[test]
    fn many_lines_of_nothing_have_no_results() {
        let mut y = [];
        let x = View::new(&[], 0, &[9000, 0], &[0, 1]).unwrap();
        let to = ViewMut::new(&mut y, 0, &[1, 0], &[0, 1]).unwrap();
        reduce(&Pool::new(2), Reduce::Sum, x, &[0], to);
    }

    #[test]
    fn columns_give_what_rows_give() {
        let mut seed = 3;
        let ops = [
            Reduce::Sum,
            Reduce::Mean,
            Reduce::SumSquare,
            Reduce::L1,
            Reduce::L2,
            Reduce::Max,
            Reduce::Min,
        ];
        for (rows, columns) in [(1, 1), (7, 70), (64, 33), (3, 300)] {
            let mut x: Vec<f32> = (0..rows * columns).map(|_| random(&mut seed)).collect();
            x[columns - 1] = f32::NAN;
            x[0] = 3e38;
            x[(rows - 1) * columns] = 3e38;
            let turned: Vec<f32> = (0..rows * columns)
                .map(|i| x[i % rows * columns + i / rows])
                .collect();
            for op in ops {
                let (mut found, mut expected) = (vec![0.0; columns], vec![0.0; columns]);
                let pool = Pool::new(2);
                reduce(
                    &pool,
                    op,
                    View::new(&x, 0, &[rows, columns], &[columns as isize, 1]).unwrap(),
                    &[0],
                    ViewMut::new(&mut found, 0, &[1, columns], &[columns as isize, 1]).unwrap(),
                );
                reduce(
                    &pool,
                    op,
                    View::new(&turned, 0, &[columns, rows], &[rows as isize, 1]).unwrap(),
                    &[1],
                    ViewMut::new(&mut expected, 0, &[columns, 1], &[1, 1]).unwrap(),
                );
                for (a, b) in found.iter().zip(&expected) {
                    // Large numbers are of the two that stand in the first column.
                    let bound = if b.abs() > 1e6 { 1e-6 * b.abs() } else { 1e-5 };
                    let same = (a - b).abs() < bound || a == b || (a.is_nan() && b.is_nan());
                    assert!(same, "{op:?} of {rows} x {columns}: {a} {b}");
                }
            }
        }
    }
}
