//! The portable form: arrays of four numbers, which compilers turn into whatever the target has.

use super::Simd;
use half::f16;

/// Needs nothing of the processor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

type F = [f32; 4];
type I = [i32; 4];

#[inline(always)]
fn map2<A: Copy, B: Copy, R>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> R) -> [R; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    const LANES: usize = 4;
    type F = F;
    type I = I;
    type M = [bool; 4];

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller's.
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: F) {
        // SAFETY: the caller's.
        unsafe { p.cast::<F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> F {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: F) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f16; 4]>().write_unaligned(x.map(f16::from_f32)) }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        map2(map2(a, b, |a, b| a * b), c, |ab, c| ab + c)
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: F) -> F {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn floor(self, a: F) -> F {
        a.map(f32::floor)
    }
    #[inline(always)]
    fn ceil(self, a: F) -> F {
        a.map(f32::ceil)
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn lt(self, a: F, b: F) -> [bool; 4] {
        map2(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn eq(self, a: F, b: F) -> [bool; 4] {
        map2(a, b, |a, b| a == b)
    }
    #[inline(always)]
    fn select(self, m: [bool; 4], a: F, b: F) -> F {
        std::array::from_fn(|i| if m[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn any(self, m: [bool; 4]) -> bool {
        m.contains(&true)
    }
    #[inline(always)]
    fn int(self, x: i32) -> I {
        [x; 4]
    }
    #[inline(always)]
    fn to_int(self, x: F) -> I {
        x.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn from_int(self, x: I) -> F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn bits(self, x: F) -> I {
        x.map(|x| x.to_bits().cast_signed())
    }
    #[inline(always)]
    fn from_bits(self, x: I) -> F {
        x.map(|x| f32::from_bits(x.cast_unsigned()))
    }
    #[inline(always)]
    fn int_add(self, a: I, b: I) -> I {
        map2(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn int_sub(self, a: I, b: I) -> I {
        map2(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn int_and(self, a: I, b: I) -> I {
        map2(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn int_or(self, a: I, b: I) -> I {
        map2(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: I) -> I {
        a.map(|a| a << N)
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: I) -> I {
        a.map(|a| a >> N)
    }
    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        (x[0] + x[2]) + (x[1] + x[3])
    }
    #[inline(always)]
    fn largest(self, x: F) -> f32 {
        x[0].max(x[1]).max(x[2].max(x[3]))
    }
}
