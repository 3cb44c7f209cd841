//! [`dot_rows`](super::dot_rows) in vectors of 64 bytes, for processors with AVX-512 VNNI and VBMI.
//!
//! A block of 64 indices fills a register. Those of 6 bits are brought to bytes by one shift of many, and looked up among 64
//! bytes by one permute; products are summed in pairs as they are made.

use super::{BLOCK, FixedX};
use std::arch::x86_64::*;

/// Whether this processor has the instructions.
pub(crate) fn there() -> bool {
    crate::simd::isa() == crate::simd::Isa::Avx512
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// The bytes of a table's 16-bit entries, and the places of the bytes that eight indices of 6 bits lie in.
struct Table<const BITS: usize> {
    low: __m512i,
    high: __m512i,
    spread: __m512i,
}

impl<const BITS: usize> Table<BITS> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    #[inline]
    fn load(planes: &[u8]) -> Self {
        let entries = 1 << BITS;
        assert_eq!(planes.len(), 2 * entries, "two bytes an entry");
        let mut spread = [0_u8; 64];
        for (i, place) in spread.iter_mut().enumerate() {
            *place = (i / 8 * 6 + (i % 8).min(5)) as u8;
        }
        // SAFETY: a plane is 16 bytes or 64; `spread` is 64.
        unsafe {
            let plane = |n: usize| planes.as_ptr().add(n * entries);
            let [low, high] = if BITS == 4 {
                [
                    _mm512_broadcast_i32x4(_mm_loadu_si128(plane(0).cast())),
                    _mm512_broadcast_i32x4(_mm_loadu_si128(plane(1).cast())),
                ]
            } else {
                [
                    _mm512_loadu_si512(plane(0).cast()),
                    _mm512_loadu_si512(plane(1).cast()),
                ]
            };
            let spread = _mm512_loadu_si512(spread.as_ptr().cast());
            Table { low, high, spread }
        }
    }

    /// Low and high bytes of the entries of a block: of 4 bits, the even columns before the odd ones.
    ///
    /// # Safety
    /// A whole block of indices is readable at `p`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    #[inline]
    unsafe fn look_up(&self, p: *const u8) -> [__m512i; 2] {
        if BITS == 4 {
            // SAFETY: 32 bytes.
            let packed = unsafe { _mm256_loadu_si256(p.cast()) };
            let both =
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(packed), _mm256_srli_epi16::<4>(packed));
            let indices = _mm512_and_si512(both, _mm512_set1_epi8(15));
            return [
                _mm512_shuffle_epi8(self.low, indices),
                _mm512_shuffle_epi8(self.high, indices),
            ];
        }
        // SAFETY: 48 bytes.
        let packed = unsafe { _mm512_maskz_loadu_epi8((1 << 48) - 1, p.cast()) };
        let spread = _mm512_permutexvar_epi8(self.spread, packed);
        // Index `i` of eight begins at bit `6 i`; permutes look at six bits.
        let places = _mm512_set1_epi64(0x2a24_1e18_120c_0600);
        let indices = _mm512_multishift_epi64_epi8(places, spread);
        [
            _mm512_permutexvar_epi8(indices, self.low),
            _mm512_permutexvar_epi8(indices, self.high),
        ]
    }
}

/// The values of a block of `x`, as the halves of unpacked words meet them.
///
/// # Safety
/// `x` has block `block`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
#[inline]
unsafe fn values(x: FixedX<'_>, block: usize) -> [__m512i; 2] {
    // SAFETY: the block has 64 values.
    let part = |i: usize| unsafe { _mm256_loadu_si256(x.values.as_ptr().add(block * BLOCK + 16 * i).cast()) };
    [
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(part(0)), part(2)),
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(part(1)), part(3)),
    ]
}

/// `sum` plus one block's products.
///
/// # Safety
/// A whole block of indices is readable at `p`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
#[inline]
unsafe fn block_sum<const BITS: usize>(
    table: &Table<BITS>,
    p: *const u8,
    x: [__m512i; 2],
    scale: __m512,
    sum: __m512,
) -> __m512 {
    // SAFETY: the caller's.
    let [low, high] = unsafe { table.look_up(p) };
    let first = _mm512_madd_epi16(_mm512_unpacklo_epi8(low, high), x[0]);
    let both = _mm512_dpwssd_epi32(first, _mm512_unpackhi_epi8(low, high), x[1]);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, sum)
}

/// [`dot_rows`](super::dot_rows).
///
/// # Safety
/// As there, and the processor has what [`there`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(crate) unsafe fn dot_rows<const BITS: usize, const R: usize>(
    rows: *const u8,
    stride: usize,
    cols: usize,
    planes: &[u8],
    x: FixedX<'_>,
) -> [f32; R] {
    let table = Table::<BITS>::load(planes);
    let mut sums = [_mm512_setzero_ps(); R];
    let block_bytes = BLOCK * BITS / 8;
    let whole = cols / BLOCK;
    for block in 0..whole {
        // SAFETY: block `block` of `x` exists, and every block has a scale.
        let (values, scale) = unsafe { (values(x, block), _mm512_set1_ps(*x.scales.get_unchecked(block))) };
        for r in 0..R {
            // The rows of the next calls follow these.
            _mm_prefetch::<_MM_HINT_T0>(
                rows.wrapping_add((r + 4 * R) * stride + block * block_bytes)
                    .cast(),
            );
            let at = rows.wrapping_add(r * stride + block * block_bytes);
            // SAFETY: block `block` of row `r` exists.
            sums[r] = unsafe { block_sum(&table, at, values, scale, sums[r]) };
        }
    }
    let rest = (cols % BLOCK * BITS).div_ceil(8);
    if rest > 0 {
        // SAFETY: `x` has one more block, zero where the columns end.
        let (values, scale) = unsafe { (values(x, whole), _mm512_set1_ps(*x.scales.get_unchecked(whole))) };
        for r in 0..R {
            let mut tail = [0_u8; 48];
            // SAFETY: the row's last `rest` bytes.
            unsafe {
                rows.add(r * stride + whole * block_bytes)
                    .copy_to_nonoverlapping(tail.as_mut_ptr(), rest)
            };
            // SAFETY: `tail` is a whole block.
            sums[r] = unsafe { block_sum(&table, tail.as_ptr(), values, scale, sums[r]) };
        }
    }
    let mut results = [0.0; R];
    for (result, sum) in results.iter_mut().zip(sums) {
        *result = _mm512_reduce_add_ps(sum);
    }
    results
}
