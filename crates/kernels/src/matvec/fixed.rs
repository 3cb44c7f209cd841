//! Palettised and integer rows times a vector in 16-bit fixed point, for processors with AVX2.
//!
//! A table becomes 16-bit integers with one scale, a vector 15-bit integers with one scale per block of 64 columns.
//! Indices pick the two bytes of an integer by register permutes, products are summed in 32-bit integers, which
//! cannot overflow, and blocks are summed in `f32`.
//!
//! Error: an entry of `x` is off by at most half a step of a 16,383rd of the greatest magnitude in its block, 1/32,766; a
//! table entry by at most half a step of a 32,767th of the greatest magnitude in its table, 1/65,534. Rounding `x` to `f16`,
//! as Core ML does, is off by `2^-11` of each entry. Tables of 15 bits would let twice as many products be summed as
//! integers; with them SmolLM2 chose other tokens at margins up to 0.0033.

pub(crate) mod wide;

use crate::weights::FixedTables;
use half::f16;
use std::arch::x86_64::*;

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 64;

/// Greatest magnitude of a fixed-point activation. Four products with table entries stay below `2^31`.
const X_MAX: f32 = 16383.0;
/// Greatest magnitude of a table entry.
const TABLE_MAX: f32 = 32767.0;

/// Where [`quantise`] puts the columns of a block, so that they meet the unpacked indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Of indices of 4 bits: even columns before odd ones, in halves of a register.
    Nibbles,
    /// Of indices of 6 bits.
    Sixes,
    /// As they are, for integers of 8 bits.
    Bytes,
    /// Of indices of 4 bits that are looked up where they lie: every fourth column of two blocks, beginning with the first, the second,
    /// the third and the fourth.
    Quads,
}

/// A vector in fixed point: `values` are whole blocks, the last one filled up with zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FixedX<'a> {
    pub scales: &'a [f32],
    pub values: &'a [i16],
    /// Sums of each 32 columns, for integers with a zero point.
    pub sums: &'a [f32],
}

/// Fills `sums` with the sum of each 32 columns.
pub(crate) fn sum_halves(order: Order, scales: &[f32], values: &[i16], sums: &mut [f32]) {
    for ((values, scale), sums) in values
        .chunks_exact(BLOCK)
        .zip(scales)
        .zip(sums.chunks_exact_mut(2))
    {
        let mut halves = [0_i32; 2];
        for (i, part) in values.chunks_exact(8).enumerate() {
            // In the other orders each eight values alternate between the two halves.
            let half = if order == Order::Bytes { i / 4 } else { i % 2 };
            halves[half] += part.iter().map(|value| i32::from(*value)).sum::<i32>();
        }
        sums.copy_from_slice(&halves.map(|sum| sum as f32 * scale));
    }
}

/// A row of integers: `cols` of them at `data`, and a scale and a zero point for each `1 << block_shift` columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IntRow<'a> {
    pub data: *const u8,
    pub cols: usize,
    pub signed: bool,
    pub scales: &'a [f32],
    pub zeros: Option<&'a [f32]>,
    /// At least 5.
    pub block_shift: u32,
}

/// `sum (q - zero) * scale * x` for integers of `BITS` bits, 4 or 8.
///
/// # Safety
/// The processor has AVX2 and FMA; the row is readable; `x` is of its length, in the order for `BITS`, with sums.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn dot_ints<const BITS: usize>(row: &IntRow<'_>, x: FixedX<'_>) -> f32 {
    let block_bytes = BLOCK * BITS / 8;
    let mut sum = _mm256_setzero_ps();
    let mut offset = 0.0;
    for block in 0..row.cols.div_ceil(BLOCK) {
        let first = block * BLOCK;
        let from = row.data.wrapping_add(block * block_bytes);
        let rest = ((row.cols - first).min(BLOCK) * BITS).div_ceil(8);
        let mut tail = [0_u8; BLOCK];
        let from = if rest == block_bytes {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(2048).cast());
            from
        } else {
            // SAFETY: the bytes that are left of the row.
            unsafe { from.copy_to_nonoverlapping(tail.as_mut_ptr(), rest) };
            tail.as_ptr()
        };
        // SAFETY: a whole block of integers, and one of `x`.
        let [low, high] = unsafe { int_block::<BITS>(from, row.signed, x, block) };
        let parts = [
            first >> row.block_shift,
            (first + 32).min(row.cols - 1) >> row.block_shift,
        ];
        let scales = parts.map(|part| row.scales[part]);
        // Half bytes are read as 0 to 15; signed ones were 8 less.
        let bias = if row.signed && BITS == 4 { 8.0 } else { 0.0 };
        for half in 0..2 {
            let zero = row.zeros.map_or(0.0, |zeros| zeros[parts[half]]) + bias;
            offset += scales[half] * zero * x.sums[2 * block + half];
        }
        let scale = _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[block]));
        let joined = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(joined), scale, sum);
    }
    horizontal(sum) - offset
}

/// Products of a block, summed to four integers for each 32 columns.
///
/// # Safety
/// As [`dot_ints`], for the block at `p`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn int_block<const BITS: usize>(
    p: *const u8,
    signed: bool,
    x: FixedX<'_>,
    block: usize,
) -> [__m128i; 2] {
    // SAFETY: the block has 64 values.
    let x_at = |i: usize| unsafe { _mm256_loadu_si256(x.values.as_ptr().add(block * BLOCK + 16 * i).cast()) };
    if BITS == 4 {
        // SAFETY: 32 bytes.
        let packed = unsafe { _mm256_loadu_si256(p.cast()) };
        let packed = if signed {
            _mm256_xor_si256(packed, _mm256_set1_epi8(-120))
        } else {
            packed
        };
        let (low, zero) = (_mm256_set1_epi8(15), _mm256_setzero_si256());
        let even = _mm256_and_si256(packed, low);
        let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low);
        let a = _mm256_madd_epi16(_mm256_unpacklo_epi8(even, zero), x_at(0));
        let b = _mm256_madd_epi16(_mm256_unpackhi_epi8(even, zero), x_at(1));
        let c = _mm256_madd_epi16(_mm256_unpacklo_epi8(odd, zero), x_at(2));
        let d = _mm256_madd_epi16(_mm256_unpackhi_epi8(odd, zero), x_at(3));
        let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
        return [_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum)];
    }
    let words = |i: usize| {
        // SAFETY: 16 bytes of the block's 64.
        let bytes = unsafe { _mm_loadu_si128(p.add(16 * i).cast()) };
        if signed {
            _mm256_cvtepi8_epi16(bytes)
        } else {
            _mm256_cvtepu8_epi16(bytes)
        }
    };
    let low = _mm256_add_epi32(
        _mm256_madd_epi16(words(0), x_at(0)),
        _mm256_madd_epi16(words(1), x_at(1)),
    );
    let high = _mm256_add_epi32(
        _mm256_madd_epi16(words(2), x_at(2)),
        _mm256_madd_epi16(words(3), x_at(3)),
    );
    let fold = |v: __m256i| _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    [fold(low), fold(high)]
}

/// Fills `scales` and `values` from `x`; false when `x` has an infinity or NaN, which fixed point cannot hold.
///
/// # Safety
/// The processor has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn quantise(x: &[f32], order: Order, scales: &mut [f32], values: &mut [i16]) -> bool {
    let blocks = x.len().div_ceil(BLOCK);
    let mut finite = true;
    for ((block, scale), values) in x
        .chunks(BLOCK)
        .zip(&mut scales[..blocks])
        .zip(values[..blocks * BLOCK].chunks_exact_mut(BLOCK))
    {
        let mut full = [0.0; BLOCK];
        full[..block.len()].copy_from_slice(block);
        finite &= quantise_block(&full, order, scale, values);
    }
    finite
}

#[target_feature(enable = "avx2,fma")]
fn quantise_block(x: &[f32; BLOCK], order: Order, scale: &mut f32, values: &mut [i16]) -> bool {
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    let mut vectors = [_mm256_setzero_ps(); 8];
    for (i, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: eight vectors of eight are the 64 numbers of the block.
        *vector = unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) };
    }
    let x = vectors;
    // The maximum takes the second operand when one is NaN, so a NaN would be lost; integers keep the order of
    // magnitudes and put NaN above infinity.
    let mut max = _mm256_setzero_si256();
    for x in x {
        max = _mm256_max_epi32(max, _mm256_castps_si256(_mm256_and_ps(x, magnitude)));
    }
    let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
    let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
    let max = f32::from_bits(_mm_cvtsi128_si32(max).cast_unsigned());
    // Below this, the reciprocal would overflow; such a block is nothing next to any other.
    let tiny = max < 1e-30;
    *scale = if tiny { 0.0 } else { max / X_MAX };
    let factor = _mm256_set1_ps(if tiny { 0.0 } else { X_MAX / max });
    let mut ints = [_mm256_setzero_si256(); 8];
    for (int, x) in ints.iter_mut().zip(x) {
        *int = _mm256_cvtps_epi32(_mm256_mul_ps(x, factor));
    }
    let pack = |i: usize| {
        let packed = _mm256_packs_epi32(ints[i], ints[i + 1]);
        _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
    };
    let ordered = match order {
        // The last comes after the others, for two blocks together.
        Order::Bytes | Order::Quads => [pack(0), pack(2), pack(4), pack(6)],
        Order::Sixes => {
            let (a, b, c, d) = (pack(0), pack(2), pack(4), pack(6));
            [
                _mm256_permute2x128_si256::<0x20>(a, b),
                _mm256_permute2x128_si256::<0x31>(a, b),
                _mm256_permute2x128_si256::<0x20>(c, d),
                _mm256_permute2x128_si256::<0x31>(c, d),
            ]
        }
        Order::Nibbles => {
            let (a, b, c, d) = (pack(0), pack(2), pack(4), pack(6));
            let split = |low: __m256i, high: __m256i, odd: bool| {
                let part = |v: __m256i| {
                    if odd {
                        _mm256_srai_epi32::<16>(v)
                    } else {
                        _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(v))
                    }
                };
                let (low, high) = (part(low), part(high));
                _mm256_packs_epi32(
                    _mm256_permute2x128_si256::<0x20>(low, high),
                    _mm256_permute2x128_si256::<0x31>(low, high),
                )
            };
            [
                split(a, c, false),
                split(b, d, false),
                split(a, c, true),
                split(b, d, true),
            ]
        }
    };
    let values = &mut values[..BLOCK];
    for (i, v) in ordered.into_iter().enumerate() {
        // SAFETY: four vectors of sixteen are the 64 values of the block.
        unsafe { _mm256_storeu_si256(values.as_mut_ptr().add(16 * i).cast(), v) };
    }
    max.is_finite()
}

/// `out[r] = sum over blocks` for `R` rows that share one table. `rows` starts at the first row's indices of the first
/// block, rows are `stride` bytes apart, and `cols` columns are summed.
///
/// # Safety
/// The processor has AVX2 and FMA; `R` rows of `cols` packed indices are readable at `rows`; `x` has
/// `ceil(cols / 64)` blocks in the order for `BITS`; `BITS` is 4 or 6 and the planes are of that width.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn dot_rows<const BITS: usize, const R: usize>(
    rows: *const u8,
    stride: usize,
    cols: usize,
    planes: &[u8],
    x: FixedX<'_>,
) -> [f32; R] {
    let table = Table::<BITS>::load(planes);
    let mut sums = [_mm256_setzero_ps(); R];
    let block_bytes = BLOCK * BITS / 8;
    let whole = cols / BLOCK;
    for block in 0..whole {
        for r in 0..R {
            // The rows of the next calls follow these. Hardware prefetchers lose the thread between several rows.
            _mm_prefetch::<_MM_HINT_T0>(
                rows.wrapping_add((r + 4 * R) * stride + block * block_bytes)
                    .cast(),
            );
            // SAFETY: block `block` of row `r` and of `x` exist.
            sums[r] = unsafe {
                block_sum(
                    &table,
                    rows.add(r * stride + block * block_bytes),
                    x,
                    block,
                    sums[r],
                )
            };
        }
    }
    let rest = (cols % BLOCK * BITS).div_ceil(8);
    if rest > 0 {
        for r in 0..R {
            let mut tail = [0_u8; 48];
            // SAFETY: the row's last `rest` bytes.
            unsafe {
                rows.add(r * stride + whole * block_bytes)
                    .copy_to_nonoverlapping(tail.as_mut_ptr(), rest)
            };
            // SAFETY: `tail` is a whole block, and `x` has one more, zero where the columns end.
            sums[r] = unsafe { block_sum(&table, tail.as_ptr(), x, whole, sums[r]) };
        }
    }
    let mut results = [0.0; R];
    for (result, sum) in results.iter_mut().zip(sums) {
        *result = horizontal(sum);
    }
    results
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn horizontal(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// `sum` plus one block's products.
///
/// # Safety
/// As [`dot_rows`], for a whole block of indices at `indices` and block `block` of `x`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn block_sum<const BITS: usize>(
    table: &Table<BITS>,
    indices: *const u8,
    x: FixedX<'_>,
    block: usize,
    sum: __m256,
) -> __m256 {
    // SAFETY: the caller's.
    let indices = unsafe { unpack::<BITS>(indices) };
    let [(a_low, a_high), (b_low, b_high)] = table.look_up(indices);
    let words = [
        _mm256_unpacklo_epi8(a_low, a_high),
        _mm256_unpackhi_epi8(a_low, a_high),
        _mm256_unpacklo_epi8(b_low, b_high),
        _mm256_unpackhi_epi8(b_low, b_high),
    ];
    // SAFETY: the block has 64 values.
    let x_at = |i: usize| unsafe { _mm256_loadu_si256(x.values.as_ptr().add(block * BLOCK + 16 * i).cast()) };
    let first = _mm256_add_epi32(
        _mm256_madd_epi16(words[0], x_at(0)),
        _mm256_madd_epi16(words[1], x_at(1)),
    );
    let second = _mm256_add_epi32(
        _mm256_madd_epi16(words[2], x_at(2)),
        _mm256_madd_epi16(words[3], x_at(3)),
    );
    // SAFETY: every block has a scale.
    let scale = _mm256_set1_ps(unsafe { *x.scales.get_unchecked(block) });
    let both = _mm256_add_ps(_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second));
    _mm256_fmadd_ps(both, scale, sum)
}

/// 64 indices as bytes, in the order [`Order`] names.
///
/// # Safety
/// A whole block of indices is readable at `p`.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn unpack<const BITS: usize>(p: *const u8) -> [__m256i; 2] {
    if BITS == 4 {
        // SAFETY: 32 bytes.
        let packed = unsafe { _mm256_loadu_si256(p.cast()) };
        let low = _mm256_set1_epi8(15);
        return [
            _mm256_and_si256(packed, low),
            _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low),
        ];
    }
    // Three bytes hold four indices; `spread` makes them two 16-bit words, bytes 0-1 and bytes 1-2.
    let spread = _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
    let late = _mm_add_epi8(spread, _mm_set1_epi8(4));
    // SAFETY: the loads end at byte 16, 28, 40 and 48 of 48; the last starts 4 bytes early, hence `late`.
    let parts = unsafe {
        [
            _mm_shuffle_epi8(_mm_loadu_si128(p.cast()), spread),
            _mm_shuffle_epi8(_mm_loadu_si128(p.add(12).cast()), spread),
            _mm_shuffle_epi8(_mm_loadu_si128(p.add(24).cast()), spread),
            _mm_shuffle_epi8(_mm_loadu_si128(p.add(32).cast()), late),
        ]
    };
    let join = |low: __m128i, high: __m128i| {
        let v = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
        // Index 0 of four is in bits 0-5 of the first word, 1 in 6-11; 2 in bits 4-9 of the second, 3 in 10-15. Left
        // shifts (as products) bring each to the top of its word, one right shift to its byte.
        let even = _mm256_srli_epi16::<10>(_mm256_mullo_epi16(v, _mm256_set1_epi32(1 << 22 | 1 << 10)));
        let odd = _mm256_srli_epi16::<2>(_mm256_mullo_epi16(v, _mm256_set1_epi32(1 << 16 | 1 << 4)));
        _mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16(0x3f00)))
    };
    [join(parts[0], parts[1]), join(parts[2], parts[3])]
}

/// The bytes of a table's 16-bit entries, in registers.
struct Table<const BITS: usize> {
    low: [__m256i; 4],
    high: [__m256i; 4],
}

impl<const BITS: usize> Table<BITS> {
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load(planes: &[u8]) -> Self {
        let entries = 1 << BITS;
        assert_eq!(planes.len(), 2 * entries, "two bytes an entry");
        let part = |plane: usize, n: usize| {
            let at = plane * entries + if BITS == 4 { 0 } else { 16 * n };
            // SAFETY: sixteen bytes inside `planes`, whose length was checked.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(planes.as_ptr().add(at).cast()) })
        };
        Table {
            // Functions of the library would call one for each instruction.
            low: [part(0, 0), part(0, 1), part(0, 2), part(0, 3)],
            high: [part(1, 0), part(1, 1), part(1, 2), part(1, 3)],
        }
    }

    /// Low and high bytes of the entries at two vectors of indices.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn look_up(&self, [a, b]: [__m256i; 2]) -> [(__m256i, __m256i); 2] {
        if BITS == 4 {
            let (low, high) = (self.low[0], self.high[0]);
            return [
                (_mm256_shuffle_epi8(low, a), _mm256_shuffle_epi8(high, a)),
                (_mm256_shuffle_epi8(low, b), _mm256_shuffle_epi8(high, b)),
            ];
        }
        // A byte's top bit selects; bits 4 and 5 of the index are moved there.
        let a = (a, _mm256_slli_epi16::<3>(a), _mm256_slli_epi16::<2>(a));
        let b = (b, _mm256_slli_epi16::<3>(b), _mm256_slli_epi16::<2>(b));
        let (low_a, low_b) = (pick(&self.low, a), pick(&self.low, b));
        [(low_a, pick(&self.high, a)), (low_b, pick(&self.high, b))]
    }
}

/// The bytes of a plane of 64 at an index, given with its bits 4 and 5 at the top of each byte.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn pick(plane: &[__m256i; 4], (index, bit4, bit5): (__m256i, __m256i, __m256i)) -> __m256i {
    let quarter = |n: usize| _mm256_shuffle_epi8(plane[n], index);
    let lower = _mm256_blendv_epi8(quarter(0), quarter(1), bit4);
    let upper = _mm256_blendv_epi8(quarter(2), quarter(3), bit4);
    _mm256_blendv_epi8(lower, upper, bit5)
}

/// Decodes `out.len()` palettised entries into `f32`, exactly, from planes of `f16`.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; as many packed indices as `out` is long are readable at `indices`; `BITS` is
/// 4 or 6 and the planes are of that width.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn decode<const BITS: usize>(indices: *const u8, planes: &[u8], out: &mut [f32]) {
    let table = Table::<BITS>::load(planes);
    let block_bytes = BLOCK * BITS / 8;
    let mut at = indices;
    let mut blocks = out.chunks_exact_mut(BLOCK);
    for out in &mut blocks {
        // SAFETY: a whole block of indices, and of output.
        unsafe { decode_block::<BITS>(&table, at, out.as_mut_ptr()) };
        at = at.wrapping_add(block_bytes);
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        let (mut tail, mut full) = ([0_u8; 48], [0.0; BLOCK]);
        // SAFETY: the bytes of the remaining indices.
        unsafe { at.copy_to_nonoverlapping(tail.as_mut_ptr(), (rest.len() * BITS).div_ceil(8)) };
        // SAFETY: both are whole blocks.
        unsafe { decode_block::<BITS>(&table, tail.as_ptr(), full.as_mut_ptr()) };
        rest.copy_from_slice(&full[..rest.len()]);
    }
}

/// # Safety
/// As [`decode`], for one block; `out` has room for it.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn decode_block<const BITS: usize>(table: &Table<BITS>, indices: *const u8, out: *mut f32) {
    // SAFETY: the caller's.
    let [a, b] = unsafe { unpack::<BITS>(indices) };
    let (a, b) = if BITS == 4 {
        let (even, odd) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        (
            _mm256_permute2x128_si256::<0x20>(even, odd),
            _mm256_permute2x128_si256::<0x31>(even, odd),
        )
    } else {
        (a, b)
    };
    // Both halves hold 32 columns in order now.
    for (half, (low, high)) in table.look_up([a, b]).into_iter().enumerate() {
        let (first, second) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        // SAFETY: 32 numbers of the block's 64.
        unsafe {
            let out = out.add(32 * half);
            _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(first)));
            _mm256_storeu_ps(out.add(8), _mm256_cvtph_ps(_mm256_castsi256_si128(second)));
            _mm256_storeu_ps(out.add(16), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(first)));
            _mm256_storeu_ps(
                out.add(24),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(second)),
            );
        }
    }
}

/// The bytes of the entries as `f16`, low bytes of a table before high ones; none when an entry is not an `f16`.
pub(crate) fn half_planes(table: &[f32], bits: u32) -> Option<Vec<u8>> {
    let mut planes = Vec::with_capacity(table.len() * 2);
    for table in table.chunks_exact(1 << bits) {
        for byte in 0..2 {
            for value in table {
                let half = f16::from_f32(*value);
                if half.to_f32() != *value {
                    return None;
                }
                planes.push(half.to_le_bytes()[byte]);
            }
        }
    }
    Some(planes)
}

/// Makes the planes of `tables` tables of `2^bits` entries; none when an entry is not finite.
pub(crate) fn fix_tables(table: &[f32], bits: u32) -> Option<FixedTables> {
    let entries = 1_usize << bits;
    let mut planes = Vec::with_capacity(table.len() * 2);
    let mut scales = Vec::with_capacity(table.len() / entries);
    for table in table.chunks_exact(entries) {
        let max = table.iter().fold(0.0_f32, |max, x| {
            if x.is_finite() {
                max.max(x.abs())
            } else {
                f32::INFINITY
            }
        });
        if !max.is_finite() {
            return None;
        }
        let scale = if max < 1e-30 { 0.0 } else { max / TABLE_MAX };
        let fixed = |x: &f32| {
            if scale == 0.0 {
                0
            } else {
                (x / scale).round_ties_even() as i16
            }
        };
        planes.extend(table.iter().map(|x| fixed(x).to_le_bytes()[0]));
        planes.extend(table.iter().map(|x| fixed(x).to_le_bytes()[1]));
        scales.push(scale);
    }
    Some(FixedTables {
        planes,
        scales,
        halves: half_planes(table, bits),
    })
}
