//! Batched matrix products of activations.

use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use half::f16;

/// A read-only operand in either width.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Values as they are.
    F32(View<'a, f32>),
    /// Widened when read.
    F16(View<'a, f16>),
}

impl<'a> Operand<'a> {
    /// Length of each dimension, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        match self {
            Operand::F32(view) => view.shape(),
            Operand::F16(view) => view.shape(),
        }
    }

    /// Step of each dimension in elements.
    pub fn strides(&self) -> &'a [isize] {
        match self {
            Operand::F32(view) => view.strides(),
            Operand::F16(view) => view.strides(),
        }
    }

    pub(crate) fn source(&self) -> Source {
        match self {
            Operand::F32(view) => Source::F32(Shared::of(view.ptr())),
            Operand::F16(view) => Source::F16(Shared::of(view.ptr())),
        }
    }
}

/// An operand's first element.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    F32(Shared<f32>),
    F16(Shared<f16>),
}

impl Source {
    /// The element `at` steps on.
    ///
    /// # Safety
    /// `at` must be the offset of an index of the view this came from, which must be borrowed still.
    pub(crate) unsafe fn get(self, at: isize) -> f32 {
        match self {
            // SAFETY: the caller's.
            Source::F32(p) => unsafe { *p.at(at) },
            // SAFETY: the caller's.
            Source::F16(p) => unsafe { *p.at(at) }.to_f32(),
        }
    }
}

/// `y[b, m, n] = sum_k a[b, m, k] * b[b, k, n]`; transposed operands are strides, repeated batches stride 0.
///
/// # Panics
/// When the operands are not of rank 3 or their shapes do not fit.
pub fn matmul_f32(
    pool: &Pool,
    a: View<'_, f32>,
    b: Operand<'_>,
    mut y: ViewMut<'_, f32>,
    _scratch: &mut Scratch,
) {
    let (&[batch, m, k], &[bb, bk, n]) = (a.shape(), b.shape()) else {
        panic!("matmul takes rank 3")
    };
    assert!(
        bb == batch && bk == k && y.shape() == [batch, m, n],
        "matmul of {:?} by {:?}",
        a.shape(),
        b.shape()
    );
    let (sa, sb, sy) = (a.strides(), b.strides(), y.strides());
    let (pa, pb, py) = (Shared::of(a.ptr()), b.source(), Shared(y.ptr()));
    pool.run_ranges(batch * m, (16384 / (n * k).max(1)).max(1), &|rows| {
        for row in rows {
            let (g, i) = ((row / m) as isize, (row % m) as isize);
            for j in 0..n as isize {
                let mut sum = 0.0;
                for l in 0..k as isize {
                    // SAFETY: the indices are inside the shapes checked above.
                    sum += unsafe {
                        *pa.at(g * sa[0] + i * sa[1] + l * sa[2]) * pb.get(g * sb[0] + l * sb[1] + j * sb[2])
                    };
                }
                // SAFETY: inside the shape, and row `row` is this thread's.
                unsafe { *py.at(g * sy[0] + i * sy[1] + j * sy[2]) = sum };
            }
        }
    });
}
