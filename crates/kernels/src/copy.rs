//! Copies between strided layouts, and conversions between `f32` and `f16`.

use crate::loops::{Nest, Shared};
use crate::pool::Pool;
use crate::strided::{View, ViewMut};
use half::f16;

mod sealed {
    pub trait Sealed<D> {}
}

/// Element pairs that [`copy`] knows: `f32`, `f16` and `i32` to themselves, `f32` to `f16` and back.
pub trait ConvertTo<D>: sealed::Sealed<D> + Copy + Send + Sync + 'static {
    #[doc(hidden)]
    fn convert(self) -> D;
}

macro_rules! conversions {
    ($($source:ty => $target:ty, $x:ident: $value:expr;)*) => {$(
        impl sealed::Sealed<$target> for $source {}
        impl ConvertTo<$target> for $source {
            #[inline(always)]
            fn convert(self) -> $target {
                let $x = self;
                $value
            }
        }
    )*};
}

conversions! {
    f32 => f32, x: x;
    f16 => f16, x: x;
    i32 => i32, x: x;
    u8 => u8, x: x;
    f32 => f16, x: f16::from_f32(x);
    f16 => f32, x: x.to_f32();
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
    nest.run(pool, &|len, at| {
        for i in 0..len as isize {
            // SAFETY: both views hold every index of their shape, and each element of the target is written by
            // one thread only.
            unsafe { *to.at(at[0] + i * steps[0]) = (*from.at(at[1] + i * steps[1])).convert() };
        }
    });
}

/// Widens `x` into `y`.
///
/// # Panics
/// When the lengths differ; so do the other functions on slices.
pub fn f16_to_f32(x: &[f16], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "conversion between different lengths");
    y.iter_mut().zip(x).for_each(|(y, x)| *y = x.to_f32());
}

/// Rounds `x` to the nearest `f16` (ties to even, overflow to infinity).
pub fn f32_to_f16(x: &[f32], y: &mut [f16]) {
    assert_eq!(x.len(), y.len(), "conversion between different lengths");
    y.iter_mut().zip(x).for_each(|(y, x)| *y = f16::from_f32(*x));
}

/// Replaces each value by the nearest one that an `f16` holds (overflow to infinity).
pub fn round_to_f16(y: &mut [f32]) {
    y.iter_mut().for_each(|y| *y = f16::from_f32(*y).to_f32());
}
