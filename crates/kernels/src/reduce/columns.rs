//! Reductions whose kept elements lie side by side: many results at once, the reduced axes outside.

use super::Reduce;
use crate::loops::Nest;
use crate::simd::{Kernel, Simd};

/// Results that are summed together.
const WIDTH: usize = 32;

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
    fn run<S: Simd>(self, _: S) {
        for first in (0..self.len).step_by(WIDTH) {
            let width = WIDTH.min(self.len - first);
            match self.op {
                Reduce::Max => self.part(first, width, f32::NEG_INFINITY, |a, b| {
                    if b > a || b.is_nan() { b } else { a }
                }),
                Reduce::Min => self.part(first, width, f32::INFINITY, |a, b| {
                    if b < a || b.is_nan() { b } else { a }
                }),
                Reduce::SumSquare | Reduce::L2 => {
                    self.part(first, width, 0.0_f64, |sum, x| sum + f64::from(x) * f64::from(x));
                }
                Reduce::L1 => self.part(first, width, 0.0_f64, |sum, x| sum + f64::from(x.abs())),
                _ => self.part(first, width, 0.0_f64, |sum, x| sum + f64::from(x)),
            }
        }
    }
}

impl Columns<'_> {
    #[inline(always)]
    fn part<T: Copy + Into<f64>>(&self, first: usize, width: usize, start: T, f: impl Fn(T, f32) -> T) {
        let mut totals = [start; WIDTH];
        let (len, [step]) = self.nest.inner();
        self.nest.for_rows(0..self.nest.rows(), |_, at| {
            for i in 0..len as isize {
                let from = self.x.wrapping_offset(at[0] + i * step).wrapping_add(first);
                // SAFETY: `width` kept elements beside each other, inside the view.
                let line = unsafe { std::slice::from_raw_parts(from, width) };
                if let Ok(line) = <&[f32; WIDTH]>::try_from(line) {
                    for (total, x) in totals.iter_mut().zip(line) {
                        *total = f(*total, *x);
                    }
                } else {
                    for (total, x) in totals.iter_mut().zip(line) {
                        *total = f(*total, *x);
                    }
                }
            }
        });
        for (i, total) in totals.into_iter().enumerate().take(width) {
            let total: f64 = total.into();
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
                    let same = (a - b).abs() < 1e-5 || (a.is_nan() && b.is_nan());
                    assert!(same, "{op:?} of {rows} x {columns}: {a} {b}");
                }
            }
        }
    }
}
