//! AVX2 with FMA and F16C, and AVX-512.

use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Upper bytes of bf16 with sign and three bits of exponent.
static UPPER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 128, 129, 130, 131, 132, 133, 134, 135];

/// The numbers of a block of 12 bits, as upper halves of `f32`: a number of the first quarter and one of the second by turns, then of the others.
///
/// # Safety
/// A block is readable at `block`; the processor has AVX-512 with bytes.
#[inline(always)]
unsafe fn bf12_words(block: *const u8) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let low = _mm512_loadu_si512(block.cast());
        let pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256(block.add(64).cast()));
        let down = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(4));
        let pairs = _mm512_srlv_epi32(pairs, down);
        let places = _mm512_and_si512(pairs, _mm512_set1_epi8(15));
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(UPPER.as_ptr().cast()));
        let upper = _mm512_shuffle_epi8(table, places);
        [_mm512_unpacklo_epi8(low, upper), _mm512_unpackhi_epi8(low, upper)]
    }
}

/// Runs `kernel` with AVX2.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn with_avx2<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx2(()))
}

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The processor has AVX-512 F and BW, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(super) unsafe fn with_avx512<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<PLAIN>(()))
}

/// Runs `kernel` with AVX-512 and its products of bf16.
///
/// # Safety
/// As [`with_avx512`], and the processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn with_avx512_bf16<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<BF16>(()))
}

/// Runs `kernel` with AVX-512 and its products of bytes.
///
/// # Safety
/// As [`with_avx512`], and the processor has AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn with_avx512_vnni<K: Kernel>(kernel: K) -> K::Out {
    kernel.run(Avx512::<VNNI>(()))
}

/// Who made this processor, and its family.
fn processor() -> ([u8; 12], u32) {
    static IS: OnceLock<([u8; 12], u32)> = OnceLock::new();
    *IS.get_or_init(|| {
        let (maker, version) = (__cpuid(0), __cpuid(1).eax);
        let mut name = [0; 12];
        for (name, part) in name.chunks_exact_mut(4).zip([maker.ebx, maker.edx, maker.ecx]) {
            name.copy_from_slice(&part.to_le_bytes());
        }
        (name, (version >> 8 & 15) + (version >> 20 & 255))
    })
}

/// Whether this is AMD's family of Zen 5.
pub(super) fn is_zen5() -> bool {
    const ZEN5: u32 = 0x1a;
    processor() == (*b"AuthenticAMD", ZEN5)
}

/// Whether this is one of Intel's processors.
pub(super) fn is_intel() -> bool {
    processor().0 == *b"GenuineIntel"
}

/// Proof of AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

/// In each half of four: `a0 + a2, b0 + b2, a1 + a3, b1 + b3`.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn halves(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe { _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)) }
}

/// In each half of four: `a0 + a2, a1 + a3, b0 + b2, b1 + b3`.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn quarters(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the caller's.
    unsafe {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        let (low, high) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
        _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high))
    }
}

/// [`Simd::turn`].
///
/// # Safety
/// Its own, and the processor has AVX.
#[inline(always)]
unsafe fn turn(from: *const f32, from_step: isize, to: *mut f32, to_step: isize) {
    // SAFETY: the caller's.
    unsafe {
        let mut rows = [_mm256_setzero_ps(); 8];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = _mm256_loadu_ps(from.wrapping_offset(r as isize * from_step));
        }
        // Pairs, then fours within each half, then halves.
        let mut pairs = rows;
        for i in [0, 2, 4, 6] {
            pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        }
        let mut fours = pairs;
        for i in [0, 1, 4, 5] {
            let (a, b) = (_mm256_castps_pd(pairs[i]), _mm256_castps_pd(pairs[i + 2]));
            let to = i / 4 * 4 + i % 4 * 2;
            fours[to] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            fours[to + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
        for c in 0..4 {
            let (a, b) = (fours[c], fours[c + 4]);
            let low = to.wrapping_offset(c as isize * to_step);
            _mm256_storeu_ps(low, _mm256_permute2f128_ps::<0x20>(a, b));
            _mm256_storeu_ps(
                low.wrapping_offset(4 * to_step),
                _mm256_permute2f128_ps::<0x31>(a, b),
            );
        }
    }
}

/// A mask of the first `count` lanes.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn first_lanes(count: usize) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        _mm256_cmpgt_epi32(
            _mm256_set1_epi32(count as i32),
            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
        )
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;
    type I = __m256i;
    type M = __m256;
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: the token says that the processor has the instruction; no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_later(self, p: *const u8) {
        // SAFETY: the token says that the processor has the instruction; no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, from_step: isize, to: *mut f32, to_step: isize) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { turn(from, from_step, to, to_step) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    fn sum_each(self, x: [Self::F; 8]) -> [f32; 8] {
        let mut sums = [0.0; 8];
        // SAFETY: the token says that the processor has the instructions; eight numbers are written.
        unsafe {
            let first = quarters(halves(x[0], x[1]), halves(x[2], x[3]));
            let second = quarters(halves(x[4], x[5]), halves(x[6], x[7]));
            let sum = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(first, second),
                _mm256_permute2f128_ps::<0x31>(first, second),
            );
            _mm256_storeu_ps(sums.as_mut_ptr(), sum);
        }
        sums
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, count: usize) -> Self::F {
        // SAFETY: the caller's for the lanes that are read, the token's for the instructions.
        unsafe { _mm256_maskload_ps(p, first_lanes(count)) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: Self::F, count: usize) {
        // SAFETY: the caller's for the lanes that are written, the token's for the instructions.
        unsafe { _mm256_maskstore_ps(p, first_lanes(count), x) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn int(self, x: i32) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_cvtps_epi32(x) }
    }
    #[inline(always)]
    fn from_int(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn bits(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_castps_si256(x) }
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_castsi256_ps(x) }
    }
    #[inline(always)]
    fn int_add(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    fn int_sub(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn int_and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    fn int_or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn load_bf12(self, block: *const u8, part: usize) -> [Self::F; 4] {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe {
            let low = _mm256_loadu_si256(block.add(32 * part).cast());
            let pairs = _mm256_loadu_si256(block.add(64).cast());
            let pairs = _mm256_srlv_epi32(pairs, _mm256_set1_epi32(4 * part as i32));
            let places = _mm256_and_si256(pairs, _mm256_set1_epi8(15));
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(UPPER.as_ptr().cast()));
            let upper = _mm256_shuffle_epi8(table, places);
            let (first, second) = (_mm256_unpacklo_epi8(low, upper), _mm256_unpackhi_epi8(low, upper));
            let high = _mm256_set1_epi32(!0xffff);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
                _mm256_castsi256_ps(_mm256_and_si256(first, high)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
                _mm256_castsi256_ps(_mm256_and_si256(second, high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::F {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: Self::F) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn floor(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_floor_ps(a) }
    }
    #[inline(always)]
    fn ceil(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_ceil_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_blendv_ps(b, a, m) }
    }
    #[inline(always)]
    fn any(self, m: Self::M) -> bool {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_movemask_ps(m) != 0 }
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm256_srai_epi32::<N>(a) }
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
}

/// Nothing more than AVX-512 F and BW.
const PLAIN: u8 = 0;
/// AVX-512 BF16 too.
const BF16: u8 = 1;
/// AVX-512 VNNI too.
const VNNI: u8 = 2;

/// Proof of AVX-512 F and BW, of what `MORE` says, and of what [`Avx2`] proves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const MORE: u8>(());

impl<const MORE: u8> Simd for Avx512<MORE> {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type F = __m512;
    type I = __m512i;
    type M = __mmask16;
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: the token says that the processor has the instruction; no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_second(self, p: *const u8) {
        // SAFETY: the token says that the processor has the instruction; no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_later(self, p: *const u8) {
        // To the first cache, which is larger here: products in bf16 were 1.09 times as fast as with the second.
        // SAFETY: the token says that the processor has the instruction; no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, from_step: isize, to: *mut f32, to_step: isize) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { turn(from, from_step, to, to_step) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, count: usize) -> Self::F {
        // SAFETY: the caller's for the lanes that are read, the token's for the instructions.
        unsafe { _mm512_maskz_loadu_ps(((1_u32 << count) - 1) as __mmask16, p) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: Self::F, count: usize) {
        // SAFETY: the caller's for the lanes that are written, the token's for the instructions.
        unsafe { _mm512_mask_storeu_ps(p, ((1_u32 << count) - 1) as __mmask16, x) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn int(self, x: i32) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn to_int(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_cvtps_epi32(x) }
    }
    #[inline(always)]
    fn from_int(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn bits(self, x: Self::F) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_castps_si512(x) }
    }
    #[inline(always)]
    fn from_bits(self, x: Self::I) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_castsi512_ps(x) }
    }
    #[inline(always)]
    fn int_add(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn int_sub(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn int_and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn int_or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn load_bf12(self, block: *const u8, _: usize) -> [Self::F; 4] {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe {
            let [first, second] = bf12_words(block);
            let high = _mm512_set1_epi32(!0xffff);
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(first)),
                _mm512_castsi512_ps(_mm512_and_si512(first, high)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(second)),
                _mm512_castsi512_ps(_mm512_and_si512(second, high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn widen_bf12(self, block: *const u8, up: u16, to: *mut bf16) {
        /// Puts the first of every two words before the second ones.
        static APART: [i16; 32] = {
            let mut at = [0; 32];
            let mut i = 0;
            while i < 32 {
                at[i as usize] = i % 16 * 2 + i / 16;
                i += 1;
            }
            at
        };
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe {
            let at = _mm512_loadu_si512(APART.as_ptr().cast());
            let up = _mm512_set1_epi16((up << 7).cast_signed());
            for (half, words) in bf12_words(block).into_iter().enumerate() {
                let there = _mm512_test_epi16_mask(words, words);
                let words = _mm512_mask_add_epi16(words, there, words, up);
                _mm512_storeu_si512(to.add(32 * half).cast(), _mm512_permutexvar_epi16(at, words));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::F {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, x: Self::F) {
        // SAFETY: the caller's for the memory, the token's for the instructions.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn floor(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEG_INF>(a) }
    }
    #[inline(always)]
    fn ceil(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_POS_INF>(a) }
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(a) }
    }
    #[inline(always)]
    fn lt(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn eq(self, a: Self::F, b: Self::F) -> Self::M {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_sllv_epi32(a, _mm512_set1_epi32(N)) }
    }
    #[inline(always)]
    fn shr<const N: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_srav_epi32(a, _mm512_set1_epi32(N)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: Self::F) {
        if MORE != BF16 {
            // SAFETY: the caller's.
            return unsafe { super::store_bf16_apart(self, p, x) };
        }
        // SAFETY: the caller's for the memory, the token's for the instructions; the types are of one size.
        unsafe {
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
            _mm256_storeu_si256(p.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_twice(self, p: *mut bf16, [x, y]: [Self::F; 2]) {
        // SAFETY: the caller's for the memory, the token's for the instructions; the types are of one size.
        unsafe {
            if MORE != BF16 {
                super::store_bf16_apart(self, p, x);
                return super::store_bf16_apart(self, p.add(Self::LANES), y);
            }
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x));
            _mm512_storeu_si512(p.cast(), halves);
        }
    }
    #[inline(always)]
    fn pairs(self, low: Self::F, high: Self::F) -> Self::F {
        if MORE != BF16 {
            return super::pairs_apart(self, low, high);
        }
        /// Turns two halves into pairs.
        static TOGETHER: [i16; 32] = {
            let mut at = [0; 32];
            let mut i = 0;
            while i < 32 {
                at[i as usize] = i / 2 + i % 2 * 16;
                i += 1;
            }
            at
        };
        // SAFETY: the token says that the processor has the instructions; the types are of one size.
        unsafe {
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            let at = _mm512_loadu_si512(TOGETHER.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(at, halves))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        if MORE != BF16 {
            return super::dot_pairs_apart(self, a, b, c);
        }
        // SAFETY: the token says that the processor has the instruction; the types are of one size.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(a);
            let b = std::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(c, a, b)
        }
    }
    #[inline(always)]
    fn dot_bytes(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        if MORE != VNNI {
            return super::dot_bytes_apart(self, a, b, c);
        }
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_dpbusd_epi32(c, a, b) }
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    fn sum_each(self, x: [Self::F; 8]) -> [f32; 8] {
        // SAFETY: the token says that the processor has the instructions.
        unsafe {
            let mut folded = [_mm256_setzero_ps(); 8];
            for (folded, x) in folded.iter_mut().zip(x) {
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
                *folded = _mm256_add_ps(_mm512_castps512_ps256(x), high);
            }
            Avx2(()).sum_each(folded)
        }
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: the token says that the processor has the instruction.
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    fn any(self, m: Self::M) -> bool {
        m != 0
    }
}
