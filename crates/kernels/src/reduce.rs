//! Reductions over chosen axes.

mod columns;

use crate::loops::{Nest, Shared};
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{MAX_RANK, View, ViewMut};
use std::ops::Range;

/// What the elements of a slice are reduced to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Sum.
    Sum,
    /// Sum divided by the count.
    Mean,
    /// Greatest.
    Max,
    /// Least.
    Min,
    /// Product.
    Prod,
    /// Logarithm of the sum.
    LogSum,
    /// Logarithm of the sum of exponentials, the maximum subtracted first.
    LogSumExp,
    /// Sum of squares.
    SumSquare,
    /// Sum of absolute values.
    L1,
    /// Root of the sum of squares.
    L2,
}

/// Loops over the kept axes (operand 0 the output) and over the reduced ones.
fn split<Y, X>(x: &View<'_, X>, axes: &[usize], y: &ViewMut<'_, Y>) -> (Nest<2>, Nest<1>) {
    let rank = x.shape().len();
    let (mut kept, mut reduced) = ([1; MAX_RANK], [1; MAX_RANK]);
    for (axis, &dim) in x.shape().iter().enumerate() {
        if axes.contains(&axis) {
            reduced[axis] = dim;
        } else {
            kept[axis] = dim;
        }
    }
    assert_eq!(
        y.shape(),
        &kept[..rank],
        "reduce: the output keeps reduced axes with length 1"
    );
    (
        Nest::new(&kept[..rank], [y.strides(), x.strides()]),
        Nest::new(&reduced[..rank], [x.strides()]),
    )
}

/// Reduces `axes` of `x` into `y`, which has length 1 there.
///
/// # Panics
/// When `y` has another shape.
pub fn reduce(pool: &Pool, op: Reduce, x: View<'_, f32>, axes: &[usize], mut y: ViewMut<'_, f32>) {
    let (outer, inner) = split(&x, axes, &y);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = outer.inner().1;
    let count = inner.rows() * inner.inner().0;
    let columns = columns::possible(op, steps) && inner.inner().1 != [1];
    let side_by_side = |range: Range<usize>, at: [isize; 2]| {
        dispatch(columns::Columns {
            op,
            nest: &inner,
            count,
            x: px.at(at[1] + range.start as isize),
            y: py.at(at[0] + range.start as isize),
            len: range.len(),
        });
    };
    if columns && outer.rows() == 1 {
        // One line of results: threads share its columns.
        let len = outer.inner().0;
        outer.for_rows(0..1, |_, at| {
            // A thread walks over the lines once, in whole vectors, and has enough to add up.
            let least = (8192 / count.max(1)).max(len.div_ceil(pool.threads()));
            let each = least.max(1).next_multiple_of(columns::BLOCK);
            pool.run(len.div_ceil(each), &|chunk| {
                side_by_side(chunk * each..((chunk + 1) * each).min(len), at);
            });
        });
        return;
    }
    outer.run(pool, &|len, at| {
        if columns {
            return side_by_side(0..len, at);
        }
        for i in 0..len as isize {
            let x = px.at(at[1] + i * steps[1]).cast_const();
            let value = dispatch(Slice {
                op,
                nest: &inner,
                count,
                x,
            });
            // SAFETY: `Nest` visits each element of `y` on one thread.
            unsafe { *py.at(at[0] + i * steps[0]) = value };
        }
    });
}

/// Folds the elements of `nest` from `x` on.
///
/// # Safety
/// The elements are readable.
#[inline(always)]
unsafe fn fold<T: Copy, A>(nest: &Nest<1>, x: *const T, start: A, f: impl Fn(A, T) -> A) -> A
where
    A: Copy,
{
    let (len, [step]) = nest.inner();
    let mut total = start;
    nest.for_rows(0..nest.rows(), |_, at| {
        for i in 0..len as isize {
            // SAFETY: the caller's.
            total = f(total, unsafe { *x.wrapping_offset(at[0] + i * step) });
        }
    });
    total
}

/// The sum of `f` over the elements of `nest`, kept in eight sums of `f64` where they lie side by side.
///
/// # Safety
/// The elements are readable.
#[inline(always)]
unsafe fn sum(nest: &Nest<1>, x: *const f32, f: impl Fn(f64) -> f64) -> f64 {
    let (len, [step]) = nest.inner();
    if step != 1 {
        // SAFETY: the caller's.
        return unsafe { fold(nest, x, 0.0, |sum, x| sum + f(f64::from(x))) };
    }
    let mut sums = [0.0; 8];
    nest.for_rows(0..nest.rows(), |_, at| {
        // SAFETY: `len` elements side by side, the caller's.
        let row = unsafe { std::slice::from_raw_parts(x.wrapping_offset(at[0]), len) };
        let mut eights = row.chunks_exact(8);
        for eight in &mut eights {
            sums.iter_mut()
                .zip(eight)
                .for_each(|(sum, x)| *sum += f(f64::from(*x)));
        }
        sums.iter_mut()
            .zip(eights.remainder())
            .for_each(|(sum, x)| *sum += f(f64::from(*x)));
    });
    sums.iter().sum()
}

/// A reduction of the elements of `nest` from `x` on, compiled for the processor's vectors. Made by [`reduce`] alone,
/// from offsets inside a checked view.
struct Slice<'a> {
    op: Reduce,
    nest: &'a Nest<1>,
    count: usize,
    x: *const f32,
}

impl Kernel for Slice<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        // SAFETY: what the type says.
        unsafe { slice(self.op, self.nest, self.count, self.x) }
    }
}

/// # Safety
/// The elements are readable.
#[inline(always)]
unsafe fn slice(op: Reduce, nest: &Nest<1>, count: usize, x: *const f32) -> f32 {
    let greater = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    let lesser = |a: f32, b: f32| if b < a || b.is_nan() { b } else { a };
    // SAFETY: the caller's.
    let value = unsafe {
        match op {
            Reduce::Sum => sum(nest, x, |x| x),
            Reduce::Mean => sum(nest, x, |x| x) / count as f64,
            Reduce::Max => f64::from(fold(nest, x, f32::NEG_INFINITY, greater)),
            Reduce::Min => f64::from(fold(nest, x, f32::INFINITY, lesser)),
            Reduce::Prod => fold(nest, x, 1.0, |product, x| product * f64::from(x)),
            Reduce::LogSum => sum(nest, x, |x| x).ln(),
            Reduce::LogSumExp => {
                let max = f64::from(fold(nest, x, f32::NEG_INFINITY, greater));
                if max.is_finite() {
                    max + sum(nest, x, |x| (x - max).exp()).ln()
                } else {
                    max
                }
            }
            Reduce::SumSquare => sum(nest, x, |x| x * x),
            Reduce::L1 => sum(nest, x, f64::abs),
            Reduce::L2 => sum(nest, x, |x| x * x).sqrt(),
        }
    };
    value as f32
}

/// As [`reduce`] on integers, wrapping; the roots and logarithms are cut to integers, an empty mean is 0.
pub fn reduce_i32(pool: &Pool, op: Reduce, x: View<'_, i32>, axes: &[usize], mut y: ViewMut<'_, i32>) {
    let (outer, inner) = split(&x, axes, &y);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = outer.inner().1;
    let count = (inner.rows() * inner.inner().0) as i64;
    outer.run(pool, &|len, at| {
        for i in 0..len as isize {
            let value = slice_i32(op, &inner, count, px.at(at[1] + i * steps[1]));
            // SAFETY: as in `reduce`.
            unsafe { *py.at(at[0] + i * steps[0]) = value };
        }
    });
}

fn slice_i32(op: Reduce, nest: &Nest<1>, count: i64, x: *const i32) -> i32 {
    let (len, [step]) = nest.inner();
    let fold = |start: i64, f: &dyn Fn(i64, i64) -> i64| {
        let mut total = start;
        nest.for_rows(0..nest.rows(), |_, at| {
            for i in 0..len as isize {
                // SAFETY: as in `slice`.
                total = f(total, i64::from(unsafe { *x.wrapping_offset(at[0] + i * step) }));
            }
        });
        total
    };
    let sum = |total: i64, x: i64| total.wrapping_add(x);
    let squares = |total: i64, x: i64| total.wrapping_add(x.wrapping_mul(x));
    let value = match op {
        Reduce::Sum => fold(0, &sum),
        Reduce::Mean => fold(0, &sum).checked_div(count).unwrap_or(0),
        Reduce::Max => fold(i64::from(i32::MIN), &i64::max),
        Reduce::Min => fold(i64::from(i32::MAX), &i64::min),
        Reduce::Prod => fold(1, &|product, x| i64::from(product as i32).wrapping_mul(x)),
        Reduce::LogSum => return (fold(0, &sum) as f64).ln() as i32,
        Reduce::LogSumExp => {
            let max = fold(i64::from(i32::MIN), &i64::max);
            let mut total = 0.0;
            nest.for_rows(0..nest.rows(), |_, at| {
                for i in 0..len as isize {
                    // SAFETY: as in `slice`.
                    total +=
                        ((i64::from(unsafe { *x.wrapping_offset(at[0] + i * step) }) - max) as f64).exp();
                }
            });
            return (max as f64 + total.ln()) as i32;
        }
        Reduce::SumSquare => fold(0, &squares),
        Reduce::L1 => fold(0, &|total, x| total.wrapping_add(x.abs())),
        Reduce::L2 => return (fold(0, &squares) as f64).sqrt() as i32,
    };
    value as i32
}

/// The index along `axis` of the greatest (`max`) or least element, the first of equals; NaN counts as the one
/// looked for. `y` has length 1 at `axis`.
///
/// # Panics
/// When `y` has another shape.
pub fn arg_extreme<T: Copy + PartialOrd + Send + Sync>(
    pool: &Pool,
    max: bool,
    x: View<'_, T>,
    axis: usize,
    mut y: ViewMut<'_, i32>,
) {
    let (outer, _) = split(&x, &[axis], &y);
    let (n, step) = (x.shape()[axis], x.strides()[axis]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = outer.inner().1;
    if n == 0 {
        return;
    }
    outer.run(pool, &|len, at| {
        for i in 0..len as isize {
            let from = at[1] + i * steps[1];
            // SAFETY: indices below `n` are inside `x`.
            let value = |j: usize| unsafe { *px.at(from + j as isize * step) };
            let is_nan = |v: T| v.partial_cmp(&v).is_none();
            let mut best = 0;
            for j in 1..n {
                let (new, old) = (value(j), value(best));
                let better = if max { new > old } else { new < old };
                if better || (is_nan(new) && !is_nan(old)) {
                    best = j;
                }
            }
            // SAFETY: as in `reduce`.
            unsafe { *py.at(at[0] + i * steps[0]) = best as i32 };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reduction_has_its_known_value_over_mixed_axes() {
        let x = [1.0_f32, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        let ops = [
            Reduce::Sum,
            Reduce::Mean,
            Reduce::Max,
            Reduce::Min,
            Reduce::Prod,
            Reduce::LogSum,
            Reduce::LogSumExp,
            Reduce::SumSquare,
            Reduce::L1,
            Reduce::L2,
        ];
        // Axes 0 and 2 of [2, 2, 2] are reduced; the first row of the middle axis is 1, 2, 5, 6.
        for op in ops {
            let mut y = [0.0; 2];
            let out = ViewMut::new(&mut y, 0, &[1, 2, 1], &[2, 1, 1]).unwrap();
            reduce(
                &Pool::new(2),
                op,
                View::new(&x, 0, &[2, 2, 2], &[4, 2, 1]).unwrap(),
                &[0, 2],
                out,
            );
            let rows = [[1.0_f32, 2.0, 5.0, 6.0], [-3.0, 4.0, 7.0, 8.0]];
            let expected = rows.map(|row| match op {
                Reduce::Sum => row.iter().sum(),
                Reduce::Mean => row.iter().sum::<f32>() / 4.0,
                Reduce::Max => row.iter().copied().fold(f32::MIN, f32::max),
                Reduce::Min => row.iter().copied().fold(f32::MAX, f32::min),
                Reduce::Prod => row.iter().product(),
                Reduce::SumSquare => row.iter().map(|x| x * x).sum(),
                Reduce::L1 => row.iter().map(|x| x.abs()).sum(),
                Reduce::LogSum => row.iter().sum::<f32>().ln(),
                Reduce::LogSumExp => row.iter().map(|x| x.exp()).sum::<f32>().ln(),
                Reduce::L2 => row.iter().map(|x| x * x).sum::<f32>().sqrt(),
            });
            assert!(
                y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 1e-5),
                "{op:?}: {y:?} is not {expected:?}"
            );
        }
    }

    #[test]
    fn the_first_of_equal_extremes_wins_and_nan_is_found() {
        let cases: [(&[f32], usize, usize); 3] = [
            (&[1.0, 3.0, 3.0, 1.0], 1, 0),
            (&[2.0, f32::NAN, 9.0, 0.0], 1, 1),
            (&[5.0, 4.0, 3.0, 3.0], 0, 2),
        ];
        for (x, greatest, least) in cases {
            for (max, expected) in [(true, greatest), (false, least)] {
                let mut y = [0];
                let out = ViewMut::new(&mut y, 0, &[1], &[1]).unwrap();
                arg_extreme(&Pool::new(1), max, View::new(x, 0, &[4], &[1]).unwrap(), 0, out);
                assert_eq!(y[0] as usize, expected, "{x:?} {max}");
            }
        }
    }
}
