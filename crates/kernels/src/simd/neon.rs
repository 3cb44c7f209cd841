//! NEON.

use super::{Kernel, Simd};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::arch::aarch64::*;

/// Runs `kernel` with NEON.
///
/// # Safety
/// The processor has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn with_neon<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Neon(()))
}

/// Proof of NEON.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon(());

impl Simd for Neon {
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    type F = float32x4_t;
    type I = int32x4_t;
    type M = uint32x4_t;
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { vst1q_f32(p, x) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vfmsq_f32(c, a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vminq_f32(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vmaxq_f32(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vsqrtq_f32(a) }
    }
    #[inline(always)]
    fn floor(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vrndmq_f32(a) }
    }
    #[inline(always)]
    fn ceil(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vrndpq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vcltq_f32(a, b) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vceqq_f32(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vbslq_f32(m, a, b) }
    }
    #[inline(always)]
    fn any(self, m: Self::M) -> bool {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vmaxvq_u32(m) != 0 }
    }
    #[inline(always)]
    fn int(self, x: i32) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vdupq_n_s32(x) }
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vcvtnq_s32_f32(x) }
    }
    #[inline(always)]
    fn from_int(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vcvtq_f32_s32(x) }
    }
    #[inline(always)]
    fn bits(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vreinterpretq_s32_f32(x) }
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vreinterpretq_f32_s32(x) }
    }
    #[inline(always)]
    fn int_add(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vaddq_s32(a, b) }
    }
    #[inline(always)]
    fn int_sub(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vsubq_s32(a, b) }
    }
    #[inline(always)]
    fn int_and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vandq_s32(a, b) }
    }
    #[inline(always)]
    fn int_or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vorrq_s32(a, b) }
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vshlq_s32(a, vdupq_n_s32(N)) }
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vshlq_s32(a, vdupq_n_s32(-N)) }
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vaddvq_f32(x) }
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { vmaxvq_f32(x) }
    }
    // The intrinsics for half precision are not stable; `half` uses them where the compiler allows.
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::F {
        let mut wide = [0.0; 4];
        // SAFETY: the caller's.
        let narrow = unsafe { p.cast::<[f16; 4]>().read_unaligned() };
        narrow.convert_to_f32_slice(&mut wide);
        // SAFETY: four numbers on the stack.
        unsafe { self.load(wide.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: Self::F) {
        let (mut wide, mut narrow) = ([0.0; 4], [f16::ZERO; 4]);
        // SAFETY: four numbers on the stack.
        unsafe { self.store(wide.as_mut_ptr(), x) };
        narrow.convert_from_f32_slice(&wide);
        // SAFETY: the caller's.
        unsafe { p.cast::<[f16; 4]>().write_unaligned(narrow) }
    }
}
