//! Elementwise operations over strided operands of one shape (broadcasting is stride 0).

mod binary;
pub(crate) mod math;
mod ops;

pub use ops::{Binary, Compare, Logical, Unary};

use crate::loops::{Nest, PARALLEL_ELEMENTS, Plane, Shared};
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{View, ViewMut};

/// `x = op(x)` on this thread.
pub(crate) fn apply_slice(op: Unary, x: &mut [f32]) {
    let (data, n) = (x.as_mut_ptr(), x.len());
    // SAFETY: in place over one slice.
    unsafe { apply(op, data, data, n) };
}

/// `y = op(x)` for `n` numbers, on this thread.
///
/// # Safety
/// As [`math::map`].
unsafe fn apply(op: Unary, x: *const f32, y: *mut f32, n: usize) {
    dispatch(Map { op, x, y, n });
}

struct Map {
    op: Unary,
    x: *const f32,
    y: *mut f32,
    n: usize,
}

impl Kernel for Map {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: made by `apply` alone, on its caller's word.
        unsafe { math::map(s, self.op, self.x, self.y, self.n) };
    }
}

/// Elements that go through the stack when they do not lie side by side.
const PIECE: usize = 256;

/// Reads `n` elements, `step` apart.
///
/// # Safety
/// They are readable.
unsafe fn read_piece(from: *const f32, step: isize, piece: &mut [f32]) {
    for (i, value) in piece.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *value = unsafe { *from.wrapping_offset(i as isize * step) };
    }
}

/// Writes `piece`, `step` apart.
///
/// # Safety
/// The places are writable.
unsafe fn write_piece(to: *mut f32, step: isize, piece: &[f32]) {
    for (i, value) in piece.iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { *to.wrapping_offset(i as isize * step) = *value };
    }
}

/// `y = op(x)` for `n` elements at any steps.
///
/// # Safety
/// The elements are readable and writable, and `y` is `x` or does not overlap it.
unsafe fn apply_strided(op: Unary, x: (*const f32, isize), y: (*mut f32, isize), n: usize) {
    if x.1 == 1 && y.1 == 1 {
        // SAFETY: the caller's.
        return unsafe { apply(op, x.0, y.0, n) };
    }
    let mut piece = [0.0; PIECE];
    for start in (0..n).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(n - start)];
        let at = start as isize;
        // SAFETY: the caller's.
        unsafe { read_piece(x.0.wrapping_offset(at * x.1), x.1, piece) };
        apply_slice(op, piece);
        // SAFETY: the caller's.
        unsafe { write_piece(y.0.wrapping_offset(at * y.1), y.1, piece) };
    }
}

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
pub fn unary(pool: &Pool, op: Unary, x: View<'_, f32>, mut y: ViewMut<'_, f32>) {
    assert_eq!(x.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), x.strides()]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        // SAFETY: as in `map1`; the views are borrowed differently, so they do not overlap.
        unsafe { apply_strided(op, (px.at(at[1]), steps[1]), (py.at(at[0]), steps[0]), len) };
    });
}

/// `y = op(y)`.
pub fn unary_inplace(pool: &Pool, op: Unary, mut y: ViewMut<'_, f32>) {
    let nest = Nest::new(y.shape(), [y.strides()]);
    let py = Shared(y.ptr());
    let step = nest.inner().1[0];
    nest.run(pool, &|len, at| {
        let y = py.at(at[0]);
        // SAFETY: as in `map1`, in place.
        unsafe { apply_strided(op, (y, step), (y, step), len) };
    });
}

/// `y = op(a, b)`.
pub fn binary(pool: &Pool, op: Binary, a: View<'_, f32>, b: View<'_, f32>, mut y: ViewMut<'_, f32>) {
    assert_eq!(a.shape(), y.shape(), "operands of different shapes");
    assert_eq!(b.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), a.strides(), b.strides()]);
    let (py, pa, pb) = (Shared(y.ptr()), Shared::of(a.ptr()), Shared::of(b.ptr()));
    if binary_rows(pool, op, &nest, [py, pa, pb]) {
        return;
    }
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        let (a, b) = (
            (pa.at(at[1]).cast_const(), steps[1]),
            (pb.at(at[2]).cast_const(), steps[2]),
        );
        // SAFETY: as in `map1`.
        unsafe { binary::apply_strided(op, a, b, (py.at(at[0]), steps[0]), len) };
    });
}

/// [`binary`] for rows of few elements, many of them in one call of the kernel; false where they are none. `places` are those of
/// the result and the operands, as in the nest.
fn binary_rows(pool: &Pool, op: Binary, nest: &Nest<3>, places: [Shared<f32>; 3]) -> bool {
    /// Elements of a row that make up for a call of their own.
    const MANY: usize = 4096;
    let Some(Plane { outer, inner }) = nest.matrix() else {
        return false;
    };
    let (rows, [y_step, a_step, b_step]) = outer;
    let (len, [y_inner, a_inner, b_inner]) = inner;
    let side_by_side = y_inner == 1 && [a_inner, b_inner].iter().all(|step| matches!(step, 0 | 1));
    if len >= MANY || !side_by_side {
        return false;
    }
    pool.run_ranges(rows, PARALLEL_ELEMENTS.div_ceil(len.max(1)), &|range| {
        let first = range.start as isize;
        let [y, a, b] = places;
        let a = (a.at(first * a_step).cast_const(), a_step, a_inner == 1);
        let b = (b.at(first * b_step).cast_const(), b_step, b_inner == 1);
        let y = (y.at(first * y_step), y_step);
        // SAFETY: as in `map1`.
        unsafe { binary::apply_rows(op, a, b, y, (range.len(), len)) };
    });
    true
}

/// `y = op(y, b)`.
pub fn binary_inplace(pool: &Pool, op: Binary, mut y: ViewMut<'_, f32>, b: View<'_, f32>) {
    assert_eq!(b.shape(), y.shape(), "operands of different shapes");
    let nest = Nest::new(y.shape(), [y.strides(), y.strides(), b.strides()]);
    let (py, pb) = (Shared(y.ptr()), Shared::of(b.ptr()));
    if binary_rows(pool, op, &nest, [py, py, pb]) {
        return;
    }
    let nest = Nest::new(y.shape(), [y.strides(), b.strides()]);
    let (py, pb) = (Shared(y.ptr()), Shared::of(b.ptr()));
    let steps = nest.inner().1;
    nest.run(pool, &|len, at| {
        let (y, b) = ((py.at(at[0]), steps[0]), (pb.at(at[1]).cast_const(), steps[1]));
        // SAFETY: as in `map1`; `y` is read before it is written.
        unsafe { binary::apply_strided(op, (y.0.cast_const(), y.1), b, y, len) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use proptest::prelude::*;

    /// Strides of `shape` with the axes in another order, some repeated or reversed, and where to start.
    fn layout(shape: &[usize], seed: &mut u64, repeats: bool) -> (usize, Vec<isize>, usize) {
        let mut order: Vec<usize> = (0..shape.len()).collect();
        order.sort_by(|_, _| random(seed).total_cmp(&0.0));
        let mut strides = vec![0; shape.len()];
        let (mut step, mut offset) = (1_isize, 0_isize);
        for axis in order {
            if repeats && random(seed) < -0.6 {
                continue;
            }
            strides[axis] = step;
            step *= shape[axis] as isize + isize::from(random(seed) > 0.7);
            if random(seed) > 0.5 {
                offset += strides[axis] * (shape[axis] as isize - 1);
                strides[axis] = -strides[axis];
            }
        }
        (offset as usize, strides, step as usize + 1)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn operands_of_any_layout_meet_at_the_same_index(
            shape in proptest::collection::vec(1_usize..9, 1..5), seed in any::<u64>(), wide in any::<bool>(),
        ) {
            let mut seed = seed;
            let mut shape = shape;
            if wide {
                shape.push(300);
            }
            let pool = Pool::new(2);
            let a = layout(&shape, &mut seed, true);
            let b = layout(&shape, &mut seed, true);
            let y = layout(&shape, &mut seed, false);
            let a_data: Vec<f32> = (0..a.2).map(|_| random(&mut seed)).collect();
            let b_data: Vec<f32> = (0..b.2).map(|_| random(&mut seed)).collect();
            let mut y_data = vec![0.25; y.2];
            let mut expected = y_data.clone();
            let place = |layout: &(usize, Vec<isize>, usize), index: &[usize]| {
                let at: isize = layout.1.iter().zip(index).map(|(s, i)| s * *i as isize).sum();
                (layout.0 as isize + at) as usize
            };
            for flat in 0..shape.iter().product::<usize>() {
                let mut rest = flat;
                let index: Vec<usize> = shape.iter().map(|dim| { let i = rest % dim; rest /= dim; i }).collect();
                let (a, b) = (a_data[place(&a, &index)], b_data[place(&b, &index)]);
                let sum = (a - b).abs();
                expected[place(&y, &index)] = sum * b + (sum * b * 0.5);
            }
            let a = View::new(&a_data, a.0, &shape, &a.1).unwrap();
            let b = View::new(&b_data, b.0, &shape, &b.1).unwrap();
            let mut out = ViewMut::new(&mut y_data, y.0, &shape, &y.1).unwrap();
            binary(&pool, Binary::Sub, a, b, out.reborrow());
            unary_inplace(&pool, Unary::Abs, out.reborrow());
            binary_inplace(&pool, Binary::Mul, out.reborrow(), b);
            let copy = out.view();
            let half_shape = shape.clone();
            let mut half = vec![0.0; copy.len()];
            let dense = crate::strided::dense_strides(&half_shape);
            let mut half_out = ViewMut::new(&mut half, 0, &half_shape, &dense[..shape.len()]).unwrap();
            unary(&pool, Unary::LinearActivation { alpha: 0.5, beta: 0.0 }, copy, half_out.reborrow());
            binary_inplace(&pool, Binary::Add, out, half_out.view());
            for (found, expected) in y_data.iter().zip(&expected) {
                prop_assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
            }
        }
    }
}
