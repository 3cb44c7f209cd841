//! [`dot_rows`](super::dot_rows) in vectors of 64 bytes, for processors with AVX-512 VNNI and VBMI.
//!
//! A block of 64 indices of 6 bits is brought to the bytes of a register by one shift of many, and looked up among 64 bytes by one permute.
//! Indices of 4 bits are looked up where they lie: two blocks are 32 words of four, a permute of words looks at the lowest five bits of
//! each, and with the table written twice the fifth does not matter. Products are summed in pairs as they are made.

use super::{BLOCK, FixedX};
use std::arch::x86_64::*;

/// Rows that [`dot_quads`] asks for early.
const AHEAD: usize = 8;

/// Whether this processor has the instructions.
pub(crate) fn there() -> bool {
    crate::simd::isa() == crate::simd::Isa::Avx512
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// The bytes of a table's 16-bit entries, and the places of the bytes that eight indices lie in.
struct Table {
    low: __m512i,
    high: __m512i,
    spread: __m512i,
}

impl Table {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    #[inline]
    fn load(planes: &[u8]) -> Self {
        assert_eq!(planes.len(), 128, "two bytes an entry");
        let mut spread = [0_u8; 64];
        for (i, place) in spread.iter_mut().enumerate() {
            *place = (i / 8 * 6 + (i % 8).min(5)) as u8;
        }
        // SAFETY: a plane is 64 bytes, and so is `spread`.
        unsafe {
            Table {
                low: _mm512_loadu_si512(planes.as_ptr().cast()),
                high: _mm512_loadu_si512(planes.as_ptr().add(64).cast()),
                spread: _mm512_loadu_si512(spread.as_ptr().cast()),
            }
        }
    }

    /// Low and high bytes of the entries of a block.
    ///
    /// # Safety
    /// A whole block of indices is readable at `p`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    #[inline]
    unsafe fn look_up(&self, p: *const u8) -> [__m512i; 2] {
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
unsafe fn block_sum(table: &Table, p: *const u8, x: [__m512i; 2], scale: __m512, sum: __m512) -> __m512 {
    // SAFETY: the caller's.
    let [low, high] = unsafe { table.look_up(p) };
    let first = _mm512_madd_epi16(_mm512_unpacklo_epi8(low, high), x[0]);
    let both = _mm512_dpwssd_epi32(first, _mm512_unpackhi_epi8(low, high), x[1]);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, sum)
}

/// [`dot_rows`](super::dot_rows) for indices of 6 bits.
///
/// # Safety
/// As there, and the processor has what [`there`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(crate) unsafe fn dot_sixes<const R: usize>(
    rows: *const u8,
    stride: usize,
    cols: usize,
    planes: &[u8],
    x: FixedX<'_>,
) -> [f32; R] {
    let table = Table::load(planes);
    let mut sums = [_mm512_setzero_ps(); R];
    let block_bytes = BLOCK * 6 / 8;
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
    let rest = (cols % BLOCK * 6).div_ceil(8);
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

/// Whether rows of indices of 4 bits, `columns` of them to a table, are multiplied by [`dot_quads`].
pub(crate) fn takes_quads(columns: usize, cols: usize) -> bool {
    (columns >= cols || columns.is_multiple_of(2 * BLOCK)) && there()
}

/// Puts the columns of each two blocks, the last of which may be missing, in the order of [`Order::Quads`](super::Order::Quads): those
/// that are first of four, second, third, fourth.
///
/// # Safety
/// The processor has what [`there`] asks for; `values` are whole pairs of blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(crate) unsafe fn to_quads(values: &mut [i16]) {
    let mut order = [0_i16; 64];
    for (i, from) in order.iter_mut().enumerate() {
        *from = (i % 16 * 4 + i / 16) as i16;
    }
    for pair in values.chunks_exact_mut(2 * BLOCK) {
        let at = pair.as_mut_ptr();
        // SAFETY: two blocks of 64 values, which are two vectors each; so is `order`.
        unsafe {
            let order = [0, 32].map(|i| _mm512_loadu_si512(order.as_ptr().add(i).cast()));
            let [a, b, c, d] = [0, 32, 64, 96].map(|i| _mm512_loadu_si512(at.add(i).cast()));
            let (first, second) = (
                [
                    _mm512_permutex2var_epi16(a, order[0], b),
                    _mm512_permutex2var_epi16(a, order[1], b),
                ],
                [
                    _mm512_permutex2var_epi16(c, order[0], d),
                    _mm512_permutex2var_epi16(c, order[1], d),
                ],
            );
            for half in 0..2 {
                let low = _mm512_shuffle_i64x2::<0b01_00_01_00>(first[half], second[half]);
                let high = _mm512_shuffle_i64x2::<0b11_10_11_10>(first[half], second[half]);
                _mm512_storeu_si512(at.add(64 * half).cast(), low);
                _mm512_storeu_si512(at.add(64 * half + 32).cast(), high);
            }
        }
    }
}

/// [`dot_rows`](super::dot_rows) for indices of 4 bits and values in the order of [`Order::Quads`](super::Order::Quads).
///
/// # Safety
/// As there, and the processor has what [`there`] asks for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
pub(crate) unsafe fn dot_quads<const R: usize>(
    rows: *const u8,
    stride: usize,
    cols: usize,
    planes: &[u8],
    x: FixedX<'_>,
) -> [f32; R] {
    const BYTES: usize = BLOCK;
    assert_eq!(planes.len(), 32, "two bytes an entry");
    // SAFETY: a plane is 16 bytes.
    let table = unsafe {
        let plane = |n: usize| _mm_loadu_si128(planes.as_ptr().add(16 * n).cast());
        let (low, high) = (
            _mm_unpacklo_epi8(plane(0), plane(1)),
            _mm_unpackhi_epi8(plane(0), plane(1)),
        );
        _mm512_broadcast_i64x4(_mm256_set_m128i(high, low))
    };
    let mut sums = [_mm512_setzero_ps(); R];
    let bytes = cols.div_ceil(2);
    for pair in 0..bytes.div_ceil(BYTES) {
        let here = pair * BYTES;
        let there = u64::MAX >> (BYTES - (bytes - here).min(BYTES));
        // SAFETY: the pair has 128 values, and a scale for each block of it that is there.
        let (values, scales) = unsafe {
            let at = x.values.as_ptr().add(2 * BLOCK * pair);
            let values = [0, 32, 64, 96].map(|i| _mm512_loadu_si512(at.add(i).cast()));
            let scale = |block: usize| _mm512_set1_ps(x.scales.get(block).copied().unwrap_or(0.0));
            (
                values,
                _mm512_mask_blend_ps(0xff00, scale(2 * pair), scale(2 * pair + 1)),
            )
        };
        for r in 0..R {
            let at = rows.wrapping_add(r * stride + here);
            // The rows of the next calls follow these. To the first cache, or twice as early, was 1.04 to 1.09 times slower on Zen 4.
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD * stride).cast());
            // SAFETY: so many bytes of row `r` exist.
            let words = unsafe { _mm512_maskz_loadu_epi8(there, at.cast()) };
            let entries = [
                _mm512_permutexvar_epi16(words, table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(words), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(words), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(words), table),
            ];
            let first = _mm512_dpwssd_epi32(_mm512_madd_epi16(entries[0], values[0]), entries[1], values[1]);
            let second = _mm512_dpwssd_epi32(_mm512_madd_epi16(entries[2], values[2]), entries[3], values[3]);
            let both = _mm512_add_ps(_mm512_cvtepi32_ps(first), _mm512_cvtepi32_ps(second));
            sums[r] = _mm512_fmadd_ps(both, scales, sums[r]);
        }
    }
    let mut results = [0.0; R];
    for (result, sum) in results.iter_mut().zip(sums) {
        *result = _mm512_reduce_add_ps(sum);
    }
    results
}
