//! Elementwise operations over strided operands of one shape (broadcasting is stride 0).

mod ops;

pub use ops::{Binary, Compare, Logical, Unary};

use crate::loops::{Nest, Shared};
use crate::pool::Pool;
use crate::strided::{View, ViewMut};

/// `y = f(x)` for any element type.
fn map1<A: Copy + Sync + Send, Y: Copy + Sync + Send>(
    pool: &Pool,
    x: View<'_, A>,
    mut y: ViewMut<'_, Y>,
    f: impl Fn(A) -> Y + Sync,
) {
    assert_eq!(x.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), x.strides()]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            // SAFETY: the views were checked to hold every index of their shape, and `Nest` visits each index of
            // `y`, which has no two elements in one place, on one thread.
            unsafe { *py.at(at[0] + i * steps[0]) = f(*px.at(at[1] + i * steps[1])) };
        }
    });
}

/// `y = f(a, b)` for any element types.
fn map2<A: Copy + Sync + Send, Y: Copy + Sync + Send>(
    pool: &Pool,
    a: View<'_, A>,
    b: View<'_, A>,
    mut y: ViewMut<'_, Y>,
    f: impl Fn(A, A) -> Y + Sync,
) {
    assert_eq!(a.shape(), y.shape(), "operands of different shapes");
    assert_eq!(b.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), a.strides(), b.strides()]);
    let (py, pa, pb) = (Shared(y.ptr()), Shared::of(a.ptr()), Shared::of(b.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            // SAFETY: as in `map1`.
            unsafe {
                *py.at(at[0] + i * steps[0]) = f(*pa.at(at[1] + i * steps[1]), *pb.at(at[2] + i * steps[2]));
            }
        }
    });
}

/// `y = op(x)`.
///
/// # Panics
/// When the shapes differ; so do all functions of this module.
pub fn unary(pool: &Pool, op: Unary, x: View<'_, f32>, y: ViewMut<'_, f32>) {
    map1(pool, x, y, |x| op.apply(x));
}

/// `y = op(y)`.
pub fn unary_inplace(pool: &Pool, op: Unary, mut y: ViewMut<'_, f32>) {
    let nest = Nest::new(y.shape(), [y.strides()]);
    let py = Shared(y.ptr());
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            let y = py.at(at[0] + i * steps[0]);
            // SAFETY: as in `map1`.
            unsafe { *y = op.apply(*y) };
        }
    });
}

/// `y = op(a, b)`.
pub fn binary(pool: &Pool, op: Binary, a: View<'_, f32>, b: View<'_, f32>, y: ViewMut<'_, f32>) {
    map2(pool, a, b, y, |a, b| op.apply(a, b));
}

/// `y = op(y, b)`.
pub fn binary_inplace(pool: &Pool, op: Binary, mut y: ViewMut<'_, f32>, b: View<'_, f32>) {
    assert_eq!(b.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), b.strides()]);
    let (py, pb) = (Shared(y.ptr()), Shared::of(b.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            let y = py.at(at[0] + i * steps[0]);
            // SAFETY: as in `map1`.
            unsafe { *y = op.apply(*y, *pb.at(at[1] + i * steps[1])) };
        }
    });
}

/// Absolute value, negation, sign, square, clipping and the like on integers: `y = f(x)`.
pub fn unary_i32(pool: &Pool, op: Unary, x: View<'_, i32>, y: ViewMut<'_, i32>) {
    map1(pool, x, y, |x| match op {
        Unary::Abs => x.wrapping_abs(),
        Unary::Neg => x.wrapping_neg(),
        Unary::Sign => x.signum(),
        Unary::Square => x.wrapping_mul(x),
        Unary::Relu => x.max(0),
        Unary::LogicalNot => i32::from(x == 0),
        Unary::Identity | Unary::Ceil | Unary::Floor | Unary::Round => x,
        // The functions that remain are defined on reals; the nearest integer toward zero is what a cast gives.
        _ => op.apply(x as f32) as i32,
    });
}

/// `y = op(a, b)` on integers, see [`Binary::apply_i32`].
pub fn binary_i32(pool: &Pool, op: Binary, a: View<'_, i32>, b: View<'_, i32>, y: ViewMut<'_, i32>) {
    map2(pool, a, b, y, |a, b| op.apply_i32(a, b));
}

/// `y = a op b` as 0 or 1; comparisons with NaN are false, inequality true.
pub fn compare_f32(pool: &Pool, op: Compare, a: View<'_, f32>, b: View<'_, f32>, y: ViewMut<'_, i32>) {
    map2(pool, a, b, y, |a, b| i32::from(op.apply(a, b)));
}

/// `y = a op b` as 0 or 1.
pub fn compare_i32(pool: &Pool, op: Compare, a: View<'_, i32>, b: View<'_, i32>, y: ViewMut<'_, i32>) {
    map2(pool, a, b, y, |a, b| i32::from(op.apply(a, b)));
}

/// `y = a op b` as 0 or 1; operands other than 0 count as true.
pub fn logical(pool: &Pool, op: Logical, a: View<'_, i32>, b: View<'_, i32>, y: ViewMut<'_, i32>) {
    map2(pool, a, b, y, |a, b| i32::from(op.apply(a, b)));
}

fn select<T: Copy + Sync + Send>(
    pool: &Pool,
    cond: View<'_, i32>,
    a: View<'_, T>,
    b: View<'_, T>,
    mut y: ViewMut<'_, T>,
) {
    assert_eq!(cond.shape(), y.shape(), "operands of different shapes");
    assert_eq!(a.shape(), y.shape(), "operands of different shapes");
    assert_eq!(b.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), cond.strides(), a.strides(), b.strides()]);
    let (py, pc, pa, pb) = (
        Shared(y.ptr()),
        Shared::of(cond.ptr()),
        Shared::of(a.ptr()),
        Shared::of(b.ptr()),
    );
    let s = nest.inner().1;
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            // SAFETY: as in `map1`.
            unsafe {
                let a = *pa.at(at[2] + i * s[2]);
                let b = *pb.at(at[3] + i * s[3]);
                *py.at(at[0] + i * s[0]) = if *pc.at(at[1] + i * s[1]) != 0 { a } else { b };
            }
        }
    });
}

/// `y = a` where `cond` is not 0, else `b`.
pub fn select_f32(pool: &Pool, cond: View<'_, i32>, a: View<'_, f32>, b: View<'_, f32>, y: ViewMut<'_, f32>) {
    select(pool, cond, a, b, y);
}

/// `y = a` where `cond` is not 0, else `b`.
pub fn select_i32(pool: &Pool, cond: View<'_, i32>, a: View<'_, i32>, b: View<'_, i32>, y: ViewMut<'_, i32>) {
    select(pool, cond, a, b, y);
}

/// Truncates toward zero; values outside the range give its ends, NaN gives 0.
pub fn cast_f32_i32(pool: &Pool, x: View<'_, f32>, y: ViewMut<'_, i32>) {
    map1(pool, x, y, |x| x as i32);
}

/// The nearest `f32`.
pub fn cast_i32_f32(pool: &Pool, x: View<'_, i32>, y: ViewMut<'_, f32>) {
    map1(pool, x, y, |x| x as f32);
}
