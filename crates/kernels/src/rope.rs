//! Rotary position embedding.

use crate::loops::Shared;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{View, ViewMut};

/// Rotates the halves of each vector: with `x = [x1, x2]` along the last axis,
/// `y = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]`.
///
/// `x` and `y` are `[H, S, D]` (heads, positions, head size, even), `cos` and `sin` `[S, D / 2]`, or `[S, D]` where the second
/// half of the result takes factors of its own.
///
/// # Panics
/// When the shapes do not fit.
pub fn rotate_half(
    pool: &Pool,
    x: View<'_, f32>,
    cos: View<'_, f32>,
    sin: View<'_, f32>,
    mut y: ViewMut<'_, f32>,
) {
    let &[heads, positions, size] = x.shape() else {
        panic!("rotate_half takes rank 3")
    };
    assert!(
        y.shape() == x.shape() && size % 2 == 0,
        "rotate_half of {:?} into {:?}",
        x.shape(),
        y.shape()
    );
    assert!(
        (cos.shape() == [positions, size / 2] || cos.shape() == [positions, size])
            && sin.shape() == cos.shape(),
        "rotate_half: cos and sin"
    );
    let (sx, sc, ss, sy) = (x.strides(), cos.strides(), sin.strides(), y.strides());
    let (px, pc, ps, py) = (
        Shared::of(x.ptr()),
        Shared::of(cos.ptr()),
        Shared::of(sin.ptr()),
        Shared(y.ptr()),
    );
    let half = size / 2;
    let upper = cos.shape()[1] - half;
    pool.run_ranges(heads * positions, (16384 / size.max(1)).max(1), &|rows| {
        for row in rows {
            let (h, p) = ((row / positions) as isize, (row % positions) as isize);
            let (x0, y0) = (h * sx[0] + p * sx[1], h * sy[0] + p * sy[1]);
            dispatch(Row {
                x: (px.at(x0), sx[2]),
                cos: (pc.at(p * sc[0]), sc[1]),
                sin: (ps.at(p * ss[0]), ss[1]),
                y: (py.at(y0), sy[2]),
                half,
                upper,
            });
        }
    });
}

/// One vector. Made by [`rotate_half`] alone, from rows inside checked views, of which `y` is one thread's.
struct Row {
    x: (*const f32, isize),
    cos: (*const f32, isize),
    sin: (*const f32, isize),
    y: (*mut f32, isize),
    half: usize,
    /// Where the second half's factors start in the tables: 0 where both halves share them.
    upper: usize,
}

impl Kernel for Row {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row {
            x,
            cos,
            sin,
            y,
            half,
            upper,
        } = self;
        let mut d = 0;
        if [x.1, cos.1, sin.1, y.1] == [1; 4] {
            while d + S::LANES <= half {
                // SAFETY: vectors inside the halves.
                unsafe {
                    let (x1, x2) = (s.load(x.0.add(d)), s.load(x.0.add(d + half)));
                    let (c1, s1) = (s.load(cos.0.add(d)), s.load(sin.0.add(d)));
                    let (c2, s2) = (s.load(cos.0.add(d + upper)), s.load(sin.0.add(d + upper)));
                    s.store(y.0.add(d), s.fnma(x2, s1, s.mul(x1, c1)));
                    s.store(y.0.add(d + half), s.fma(x1, s2, s.mul(x2, c2)));
                }
                d += S::LANES;
            }
        }
        let (first, second) = (
            |d: usize, step: isize| d as isize * step,
            |d: usize, step: isize| (d + half) as isize * step,
        );
        for d in d..half {
            // SAFETY: elements of the halves.
            unsafe {
                let (c1, s1) = (
                    *cos.0.wrapping_offset(first(d, cos.1)),
                    *sin.0.wrapping_offset(first(d, sin.1)),
                );
                let (c2, s2) = (
                    *cos.0.wrapping_offset(first(d + upper, cos.1)),
                    *sin.0.wrapping_offset(first(d + upper, sin.1)),
                );
                let x1 = *x.0.wrapping_offset(first(d, x.1));
                let x2 = *x.0.wrapping_offset(second(d, x.1));
                *y.0.wrapping_offset(first(d, y.1)) = x1 * c1 - x2 * s1;
                *y.0.wrapping_offset(second(d, y.1)) = x2 * c2 + x1 * s2;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strided::dense_strides;

    #[test]
    fn halves_are_rotated_in_dense_and_permuted_layouts() {
        for (size, width) in [
            (2, 1),
            (6, 3),
            (16, 8),
            (64, 32),
            (70, 35),
            (6, 6),
            (64, 64),
            (70, 70),
        ] {
            let (shape, table) = ([3, 5, size], [5, width]);
            let x: Vec<f32> = (0..15 * size).map(|i| (i as f32 * 0.3).sin()).collect();
            let cos: Vec<f32> = (0..5 * width).map(|i| (i as f32 * 0.1).cos()).collect();
            let sin: Vec<f32> = (0..5 * width).map(|i| (i as f32 * 0.1).sin()).collect();
            let t = dense_strides(&table);
            for strides in [
                [5 * size as isize, size as isize, 1],
                [size as isize, 3 * size as isize, 1],
                [1, 3, 15],
            ] {
                let mut y = vec![f32::NAN; 15 * size];
                let dense = dense_strides(&shape);
                rotate_half(
                    &Pool::new(2),
                    View::new(&x, 0, &shape, &strides).unwrap(),
                    View::new(&cos, 0, &table, &t[..2]).unwrap(),
                    View::new(&sin, 0, &table, &t[..2]).unwrap(),
                    ViewMut::new(&mut y, 0, &shape, &dense[..3]).unwrap(),
                );
                let at = |h: usize, p: usize, d: usize| {
                    x[(h as isize * strides[0] + p as isize * strides[1] + d as isize * strides[2]) as usize]
                };
                for (i, found) in y.iter().enumerate() {
                    let (h, p, d) = (i / (5 * size), i / size % 5, i % size);
                    let half = size / 2;
                    let angle = p * width + if width == size { d } else { d % half };
                    let expected = if d < half {
                        at(h, p, d) * cos[angle] - at(h, p, d + half) * sin[angle]
                    } else {
                        at(h, p, d) * cos[angle] + at(h, p, d - half) * sin[angle]
                    };
                    assert!(
                        (found - expected).abs() < 1e-6,
                        "{size} {strides:?} {i}: {found} is not {expected}"
                    );
                }
            }
        }
    }
}
