//! Copies between strided layouts, and conversions between `f32` and `f16`.

use crate::loops::{Nest, Plane, Shared};
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use crate::strided::{View, ViewMut};
use half::f16;

mod sealed {
    pub trait Sealed<D> {}
}

/// Element pairs that [`copy`] knows: `f32`, `f16` and `i32` to themselves, `f32` to `f16` and back.
pub trait ConvertTo<D>: sealed::Sealed<D> + Copy + Send + Sync + 'static {
    #[doc(hidden)]
    fn convert(self) -> D;
    #[doc(hidden)]
    fn convert_slice(from: &[Self], to: &mut [D]);
}

macro_rules! conversions {
    ($($source:ty => $target:ty, $x:ident: $value:expr, $slice:path;)*) => {$(
        impl sealed::Sealed<$target> for $source {}
        impl ConvertTo<$target> for $source {
            #[inline(always)]
            fn convert(self) -> $target {
                let $x = self;
                $value
            }
            fn convert_slice(from: &[Self], to: &mut [$target]) {
                $slice(from, to);
            }
        }
    )*};
}

fn same<T: Copy>(from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}

conversions! {
    f32 => f32, x: x, same;
    f16 => f16, x: x, same;
    i32 => i32, x: x, same;
    u8 => u8, x: x, same;
    f32 => f16, x: f16::from_f32(x), f32_to_f16;
    f16 => f32, x: x.to_f32(), f16_to_f32;
}

/// Copies every element of `source` to the same index of `target`, converting where the types differ (to the
/// nearest `f16`, overflow to infinity).
///
/// # Panics
/// When the shapes differ.
pub fn copy<S: ConvertTo<D>, D: Copy + Send + Sync>(
    pool: &Pool,
    source: View<'_, S>,
    mut target: ViewMut<'_, D>,
) {
    assert_eq!(source.shape(), target.shape(), "copy between different shapes");
    let nest = Nest::new(target.shape(), [target.strides(), source.strides()]);
    let (to, from) = (Shared(target.ptr()), Shared::of(source.ptr()));
    let steps = nest.inner().1;
    if let Some(plane) = nest.plane() {
        return transpose(pool, &nest, plane, to, from);
    }
    nest.run(pool, &|len, at| {
        let (to, from) = (to.at(at[0]), from.at(at[1]).cast_const());
        if steps == [1, 1] {
            // SAFETY: both views hold every index of their shape, these are `len` side by side, and each element of
            // the target is written by one thread only.
            let (to, from) = unsafe {
                (
                    std::slice::from_raw_parts_mut(to, len),
                    std::slice::from_raw_parts(from, len),
                )
            };
            return S::convert_slice(from, to);
        }
        for i in 0..len as isize {
            // SAFETY: as above.
            unsafe { *to.wrapping_offset(i * steps[0]) = (*from.wrapping_offset(i * steps[1])).convert() };
        }
    });
}

/// Side of the squares a transposed plane is copied in.
const SQUARE: usize = 16;

/// Copies planes whose rows are read where columns are written, square by square, so that neither side strides
/// through memory a whole row at a time.
fn transpose<S: ConvertTo<D>, D: Copy + Send + Sync>(
    pool: &Pool,
    nest: &Nest<2>,
    plane: Plane<2>,
    to: Shared<D>,
    from: Shared<S>,
) {
    let bands = plane.outer.0.div_ceil(SQUARE);
    let band_elements = SQUARE * plane.inner.0;
    pool.run_ranges(
        nest.planes() * bands,
        (16384 / band_elements.max(1)).max(1),
        &|range| {
            for job in range {
                let first = job % bands * SQUARE;
                let rows = first..(first + SQUARE).min(plane.outer.0);
                let at = nest.plane_offsets(job / bands);
                for start in (0..plane.inner.0).step_by(SQUARE) {
                    for i in start..(start + SQUARE).min(plane.inner.0) {
                        for row in rows.clone() {
                            let offset = |n: usize| {
                                at[n] + row as isize * plane.outer.1[n] + i as isize * plane.inner.1[n]
                            };
                            // SAFETY: as in `copy`.
                            unsafe { *to.at(offset(0)) = (*from.at(offset(1))).convert() };
                        }
                    }
                }
            }
        },
    );
}

/// Widens `x` into `y`.
///
/// # Panics
/// When the lengths differ; so do the other functions on slices.
pub fn f16_to_f32(x: &[f16], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "conversion between different lengths");
    dispatch(Widen { x, y });
}

/// Rounds `x` to the nearest `f16` (ties to even, overflow to infinity).
pub fn f32_to_f16(x: &[f32], y: &mut [f16]) {
    assert_eq!(x.len(), y.len(), "conversion between different lengths");
    dispatch(Narrow { x, y });
}

/// Replaces each value by the nearest one that an `f16` holds (overflow to infinity).
pub fn round_to_f16(y: &mut [f32]) {
    dispatch(Round { y });
}

struct Widen<'a> {
    x: &'a [f16],
    y: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (mut x, mut y) = (self.x.chunks_exact(S::LANES), self.y.chunks_exact_mut(S::LANES));
        for (x, y) in (&mut x).zip(&mut y) {
            // SAFETY: both chunks are one vector long.
            unsafe { s.store(y.as_mut_ptr(), s.load_f16(x.as_ptr())) };
        }
        y.into_remainder()
            .iter_mut()
            .zip(x.remainder())
            .for_each(|(y, x)| *y = x.to_f32());
    }
}

struct Narrow<'a> {
    x: &'a [f32],
    y: &'a mut [f16],
}

impl Kernel for Narrow<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (mut x, mut y) = (self.x.chunks_exact(S::LANES), self.y.chunks_exact_mut(S::LANES));
        for (x, y) in (&mut x).zip(&mut y) {
            // SAFETY: both chunks are one vector long.
            unsafe { s.store_f16(y.as_mut_ptr(), s.load(x.as_ptr())) };
        }
        y.into_remainder()
            .iter_mut()
            .zip(x.remainder())
            .for_each(|(y, x)| *y = f16::from_f32(*x));
    }
}

struct Round<'a> {
    y: &'a mut [f32],
}

impl Kernel for Round<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut half = [f16::ZERO; 16];
        let mut y = self.y.chunks_exact_mut(S::LANES);
        for y in &mut y {
            // SAFETY: one vector, of sixteen lanes at most.
            unsafe {
                s.store_f16(half.as_mut_ptr(), s.load(y.as_ptr()));
                s.store(y.as_mut_ptr(), s.load_f16(half.as_ptr()));
            }
        }
        y.into_remainder()
            .iter_mut()
            .for_each(|y| *y = f16::from_f32(*y).to_f32());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permuted_and_repeated_layouts_are_copied_element_by_element() {
        let pool = Pool::new(3);
        let shape = [3, 37, 2, 65];
        let len: usize = shape.iter().product();
        let dense = crate::strided::dense_strides(&shape);
        let source: Vec<f32> = (0..len).map(|i| (i % 2039) as f32).collect();
        for order in [
            [0, 1, 2, 3],
            [3, 2, 1, 0],
            [0, 3, 2, 1],
            [1, 0, 3, 2],
            [2, 3, 0, 1],
            [3, 1, 0, 2],
        ] {
            for repeat in [None, Some(1), Some(3)] {
                // The source has its axes laid out in `order`, one of them repeated.
                let mut strides = [0_isize; 4];
                let mut step = 1;
                for axis in order.into_iter().rev() {
                    strides[axis] = if repeat == Some(axis) { 0 } else { step };
                    step *= shape[axis] as isize;
                }
                let mut half = vec![f16::ZERO; len];
                let mut back = vec![0.0; len];
                let view = View::new(&source, 0, &shape, &strides).unwrap();
                copy(
                    &pool,
                    view,
                    ViewMut::new(&mut half, 0, &shape, &dense[..4]).unwrap(),
                );
                let wide = View::new(&half, 0, &shape, &dense[..4]).unwrap();
                copy(
                    &pool,
                    wide,
                    ViewMut::new(&mut back, 0, &shape, &dense[..4]).unwrap(),
                );
                for (flat, found) in back.iter().enumerate() {
                    let index = [
                        flat / (65 * 2 * 37),
                        flat / (65 * 2) % 37,
                        flat / 65 % 2,
                        flat % 65,
                    ];
                    let at: isize = index.iter().zip(strides).map(|(i, s)| *i as isize * s).sum();
                    assert_eq!(*found, source[at as usize], "{order:?} {repeat:?} {index:?}");
                }
            }
        }
    }

    #[test]
    fn slices_of_any_length_convert_as_single_numbers_do() {
        let edges = [
            0.0,
            -0.0,
            1.0,
            65504.0,
            65520.0,
            1e9,
            -1e9,
            6e-8,
            2.9e-8,
            1e-9,
            0.1,
            f32::INFINITY,
            2049.0,
        ];
        for len in 0..40 {
            let x: Vec<f32> = (0..len).map(|i| edges[i % edges.len()]).collect();
            let narrow: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
            let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
            let (mut found, mut back, mut rounded) = (vec![f16::ONE; len], vec![9.0; len], x.clone());
            f32_to_f16(&x, &mut found);
            f16_to_f32(&narrow, &mut back);
            round_to_f16(&mut rounded);
            assert_eq!((found, &back, &rounded), (narrow, &wide, &wide));
        }
    }
}
