//! Rotary position embedding.

use crate::loops::Shared;
use crate::pool::Pool;
use crate::strided::{View, ViewMut};

/// Rotates the halves of each vector: with `x = [x1, x2]` along the last axis,
/// `y = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]`.
///
/// `x` and `y` are `[H, S, D]` (heads, positions, head size, even), `cos` and `sin` `[S, D / 2]`.
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
        cos.shape() == [positions, size / 2] && sin.shape() == cos.shape(),
        "rotate_half: cos and sin"
    );
    let (sx, sc, ss, sy) = (x.strides(), cos.strides(), sin.strides(), y.strides());
    let (px, pc, ps, py) = (
        Shared::of(x.ptr()),
        Shared::of(cos.ptr()),
        Shared::of(sin.ptr()),
        Shared(y.ptr()),
    );
    let half = (size / 2) as isize;
    pool.run_ranges(heads * positions, (16384 / size.max(1)).max(1), &|rows| {
        for row in rows {
            let (h, p) = ((row / positions) as isize, (row % positions) as isize);
            let (x0, y0) = (h * sx[0] + p * sx[1], h * sy[0] + p * sy[1]);
            for d in 0..half {
                // SAFETY: every index is inside the shapes checked above, and one thread has this row of `y`.
                unsafe {
                    let (cos, sin) = (*pc.at(p * sc[0] + d * sc[1]), *ps.at(p * ss[0] + d * ss[1]));
                    let (x1, x2) = (*px.at(x0 + d * sx[2]), *px.at(x0 + (d + half) * sx[2]));
                    *py.at(y0 + d * sy[2]) = x1 * cos - x2 * sin;
                    *py.at(y0 + (d + half) * sy[2]) = x2 * cos + x1 * sin;
                }
            }
        }
    });
}
