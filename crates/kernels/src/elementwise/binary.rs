//! Functions of two operands on vectors.

use super::ops::Binary;
use super::{PIECE, read_piece, write_piece};
use crate::simd::{Kernel, Simd, dispatch};

/// `y = op(a, b)` for `n` elements at any steps; step 0 repeats an element.
///
/// # Safety
/// The elements are readable and writable; `y` is `a` at the same step, or overlaps no operand.
pub(super) unsafe fn apply_strided(
    op: Binary,
    a: (*const f32, isize),
    b: (*const f32, isize),
    y: (*mut f32, isize),
    n: usize,
) {
    if y.1 == 1 && matches!(a.1, 0 | 1) && matches!(b.1, 0 | 1) {
        return dispatch(Zip {
            op,
            a: a.0,
            b: b.0,
            steps: [a.1 == 1, b.1 == 1],
            y: y.0,
            n,
        });
    }
    let (mut left, mut right) = ([0.0; PIECE], [0.0; PIECE]);
    for start in (0..n).step_by(PIECE) {
        let count = PIECE.min(n - start);
        let at = start as isize;
        // SAFETY: the caller's.
        unsafe { read_piece(a.0.wrapping_offset(at * a.1), a.1, &mut left[..count]) };
        // SAFETY: the caller's.
        unsafe { read_piece(b.0.wrapping_offset(at * b.1), b.1, &mut right[..count]) };
        let out = left.as_mut_ptr();
        dispatch(Zip {
            op,
            a: out,
            b: right.as_ptr(),
            steps: [true; 2],
            y: out,
            n: count,
        });
        // SAFETY: the caller's.
        unsafe { write_piece(y.0.wrapping_offset(at * y.1), y.1, &left[..count]) };
    }
}

/// [`apply_strided`] for `rows` rows whose elements lie side by side, or are one repeated; each operand has the step from row to row,
/// and whether its elements step.
///
/// # Safety
/// As there.
pub(super) unsafe fn apply_rows(
    op: Binary,
    a: (*const f32, isize, bool),
    b: (*const f32, isize, bool),
    y: (*mut f32, isize),
    (rows, n): (usize, usize),
) {
    dispatch(Rows {
        first: Zip {
            op,
            a: a.0,
            b: b.0,
            steps: [a.2, b.2],
            y: y.0,
            n,
        },
        steps: [a.1, b.1, y.1],
        rows,
    });
}

/// Rows of one length. Made by [`apply_rows`] alone.
struct Rows {
    first: Zip,
    steps: [isize; 3],
    rows: usize,
}

impl Kernel for Rows {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut row = self.first;
        for _ in 0..self.rows {
            row.run(s);
            row.a = row.a.wrapping_offset(self.steps[0]);
            row.b = row.b.wrapping_offset(self.steps[1]);
            row.y = row.y.wrapping_offset(self.steps[2]);
        }
    }
}

/// `n` elements side by side, or repeated where `steps` is false. Made by [`apply_strided`] alone, on its caller's
/// word that the places are readable and writable.
#[derive(Clone, Copy)]
struct Zip {
    op: Binary,
    a: *const f32,
    b: *const f32,
    steps: [bool; 2],
    y: *mut f32,
    n: usize,
}

impl Kernel for Zip {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Zip {
            op,
            a,
            b,
            steps,
            y,
            n,
        } = self;
        macro_rules! each {
            ($a:ident, $b:ident => $vector:expr) => {{
                if n == 0 {
                    return;
                }
                // SAFETY: both operands have an element.
                let a0 = s.splat(unsafe { *a });
                // SAFETY: as above.
                let b0 = s.splat(unsafe { *b });
                let mut i = 0;
                while i + S::LANES <= n {
                    let ($a, $b) = (vector(s, a, steps[0], i, a0), vector(s, b, steps[1], i, b0));
                    let value = $vector;
                    // SAFETY: as above.
                    unsafe { s.store(y.add(i), value) };
                    i += S::LANES;
                }
                let rest = n - i;
                if rest > 0 {
                    let ($a, $b) = (
                        part(s, a, steps[0], i, rest, a0),
                        part(s, b, steps[1], i, rest, b0),
                    );
                    let value = $vector;
                    // SAFETY: as above.
                    unsafe { s.store_part(y.add(i), value, rest) };
                }
            }};
        }
        match op {
            Binary::Add => each!(a, b => s.add(a, b)),
            Binary::Sub => each!(a, b => s.sub(a, b)),
            Binary::Mul => each!(a, b => s.mul(a, b)),
            Binary::Div => each!(a, b => s.div(a, b)),
            Binary::FloorDiv => each!(a, b => s.floor(s.div(a, b))),
            Binary::Mod => each!(a, b => s.sub(a, s.mul(b, s.floor(s.div(a, b))))),
            Binary::Max => each!(a, b => s.max(a, b)),
            Binary::Min => each!(a, b => s.min(a, b)),
            Binary::SquaredDifference => each!(a, b => s.mul(s.sub(a, b), s.sub(a, b))),
            Binary::Pow => each!(a, b => power(s, a, b)),
        }
    }
}

/// The vector at `i` of a stepping operand, or the repeated element. Called by [`Zip`] alone, for whole vectors.
#[inline(always)]
fn vector<S: Simd>(s: S, x: *const f32, steps: bool, i: usize, repeated: S::F) -> S::F {
    if steps {
        // SAFETY: a whole vector of a stepping operand lies at `i`.
        unsafe { s.load(x.add(i)) }
    } else {
        repeated
    }
}

/// The last `count` elements from `i` on of a stepping operand, or the repeated element. Called by [`Zip`] alone.
#[inline(always)]
fn part<S: Simd>(s: S, x: *const f32, steps: bool, i: usize, count: usize, repeated: S::F) -> S::F {
    if steps {
        // SAFETY: as many elements of a stepping operand lie at `i`.
        unsafe { s.load_part(x.add(i), count) }
    } else {
        repeated
    }
}

/// Lane by lane; there is no vector form.
#[inline(always)]
fn power<S: Simd>(s: S, a: S::F, b: S::F) -> S::F {
    let (mut x, mut y) = ([0.0; 16], [0.0; 16]);
    // SAFETY: no vector is longer than sixteen.
    unsafe { s.store(x.as_mut_ptr(), a) };
    // SAFETY: as above.
    unsafe { s.store(y.as_mut_ptr(), b) };
    for (x, y) in x[..S::LANES].iter_mut().zip(y) {
        *x = x.powf(y);
    }
    // SAFETY: as above.
    unsafe { s.load(x.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_agrees_with_its_definition_at_any_length() {
        let ops = [
            Binary::Add,
            Binary::Sub,
            Binary::Mul,
            Binary::Div,
            Binary::FloorDiv,
            Binary::Mod,
            Binary::Pow,
            Binary::Max,
            Binary::Min,
            Binary::SquaredDifference,
        ];
        let a: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin() * 4.0 + 5.0).collect();
        let b: Vec<f32> = (0..300).map(|i| (i as f32 * 0.73).cos() * 2.0 + 2.5).collect();
        for op in ops {
            for (n, steps) in [
                (0, [1, 1]),
                (1, [1, 1]),
                (9, [1, 0]),
                (40, [0, 1]),
                (67, [0, 0]),
                (290, [1, 1]),
            ] {
                let mut y = vec![0.0; 300];
                // SAFETY: all within 300 elements.
                unsafe {
                    apply_strided(
                        op,
                        (a.as_ptr(), steps[0]),
                        (b.as_ptr(), steps[1]),
                        (y.as_mut_ptr(), 1),
                        n,
                    )
                };
                for i in 0..n {
                    let expected = op.apply(a[i * steps[0] as usize], b[i * steps[1] as usize]);
                    assert!(
                        (y[i] - expected).abs() <= 1e-6 * expected.abs(),
                        "{op:?} {i}: {} {expected}",
                        y[i]
                    );
                }
                assert!(y[n..].iter().all(|y| *y == 0.0));
            }
        }
    }
}
