//! Vectors of `f32`, one trait for every instruction set, and the run-time choice between them.
//!
//! A kernel is written once, generic over [`Simd`]. The value of a `Simd` type is proof that the processor has the
//! instructions: [`dispatch`] makes it after asking, and nothing else does.

#[cfg(test)]
pub(crate) mod agree;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use scalar::Scalar;

use half::{bf16, f16};

/// Operations on vectors of [`Simd::LANES`] numbers. `min`, `max`: when a lane of either operand is NaN, the result
/// is NaN or the second operand.
#[allow(clippy::wrong_self_convention)] // `self` is the token, not the value converted
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    const LANES: usize;
    /// Vectors that registers hold.
    const REGISTERS: usize = 16;
    /// `LANES` numbers.
    type F: Copy;
    /// `LANES` 32-bit integers.
    type I: Copy;
    /// `LANES` truth values.
    type M: Copy;

    fn splat(self, x: f32) -> Self::F;
    /// # Safety
    /// `LANES` numbers are readable at `p`, which needs no alignment.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// # Safety
    /// `LANES` numbers are writable at `p`, which needs no alignment.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// The first `count` lanes from `p`, zeros in the others.
    /// # Safety
    /// `count` numbers are readable at `p`, which needs no alignment; `count` is at most `LANES`.
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, count: usize) -> Self::F {
        let mut buffer = [0.0; 16];
        // SAFETY: the caller's; no vector is longer than sixteen lanes.
        unsafe {
            p.copy_to_nonoverlapping(buffer.as_mut_ptr(), count);
            self.load(buffer.as_ptr())
        }
    }
    /// Stores the first `count` lanes at `p`.
    /// # Safety
    /// `count` numbers are writable at `p`, which needs no alignment; `count` is at most `LANES`.
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: Self::F, count: usize) {
        let mut buffer = [0.0; 16];
        // SAFETY: the caller's; no vector is longer than sixteen lanes.
        unsafe {
            self.store(buffer.as_mut_ptr(), x);
            p.copy_from_nonoverlapping(buffer.as_ptr(), count);
        }
    }
    /// [`Simd::load_part`] where `PART`, else [`Simd::load`].
    /// # Safety
    /// As the one it stands for.
    #[inline(always)]
    unsafe fn load_some<const PART: bool>(self, p: *const f32, count: usize) -> Self::F {
        // SAFETY: the caller's.
        unsafe {
            if PART {
                self.load_part(p, count)
            } else {
                self.load(p)
            }
        }
    }
    /// [`Simd::store_part`] where `PART`, else [`Simd::store`].
    /// # Safety
    /// As the one it stands for.
    #[inline(always)]
    unsafe fn store_some<const PART: bool>(self, p: *mut f32, x: Self::F, count: usize) {
        // SAFETY: the caller's.
        unsafe {
            if PART {
                self.store_part(p, x, count)
            } else {
                self.store(p, x)
            }
        }
    }
    /// # Safety
    /// `LANES` numbers are readable at `p`, which needs no alignment.
    unsafe fn load_f16(self, p: *const f16) -> Self::F;
    /// `LANES` numbers of each quarter of a block of [`bf12`], from `LANES * part` on.
    ///
    /// [`bf12`]: crate::weights::bf12
    /// # Safety
    /// A block is readable at `block`, which needs no alignment; `part` is below `16 / LANES`.
    #[inline(always)]
    unsafe fn load_bf12(self, block: *const u8, part: usize) -> [Self::F; 4] {
        // SAFETY: the caller's.
        unsafe { crate::weights::bf12::load_apart(self, block, part) }
    }
    /// The numbers of a block of [`bf12`], whose exponents are raised by `up`.
    ///
    /// [`bf12`]: crate::weights::bf12
    /// # Safety
    /// A block is readable at `block`, and 64 numbers are writable at `to`; neither needs alignment.
    #[inline(always)]
    unsafe fn widen_bf12(self, block: *const u8, up: u16, to: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { crate::weights::bf12::widen_apart(self, block, up, to) }
    }
    /// Rounds to nearest even.
    /// # Safety
    /// `LANES` numbers are writable at `p`, which needs no alignment.
    unsafe fn store_f16(self, p: *mut f16, x: Self::F);

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn sqrt(self, a: Self::F) -> Self::F;
    fn floor(self, a: Self::F) -> Self::F;
    fn ceil(self, a: Self::F) -> Self::F;
    /// To the nearest integer, halves to even.
    fn round(self, a: Self::F) -> Self::F;

    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    fn eq(self, a: Self::F, b: Self::F) -> Self::M;
    /// `a` where `m` holds, else `b`.
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// Whether `m` holds in any lane.
    fn any(self, m: Self::M) -> bool;

    fn int(self, x: i32) -> Self::I;
    /// The nearest integers of numbers within their range.
    fn to_int(self, x: Self::F) -> Self::I;
    fn from_int(self, x: Self::I) -> Self::F;
    fn bits(self, x: Self::F) -> Self::I;
    fn from_bits(self, x: Self::I) -> Self::F;
    fn int_add(self, a: Self::I, b: Self::I) -> Self::I;
    fn int_sub(self, a: Self::I, b: Self::I) -> Self::I;
    fn int_and(self, a: Self::I, b: Self::I) -> Self::I;
    fn int_or(self, a: Self::I, b: Self::I) -> Self::I;
    fn shl<const N: i32>(self, a: Self::I) -> Self::I;
    /// With copies of the sign.
    fn shr<const N: i32>(self, a: Self::I) -> Self::I;

    /// Rounds to bf16, nearest even.
    /// # Safety
    /// `LANES` numbers are writable at `p`, which needs no alignment.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, x: Self::F) {
        // SAFETY: the caller's.
        unsafe { store_bf16_apart(self, p, x) }
    }
    /// [`Simd::store_bf16`] of two vectors, one behind the other.
    /// # Safety
    /// `2 * LANES` numbers are writable at `p`, which needs no alignment.
    #[inline(always)]
    unsafe fn store_bf16_twice(self, p: *mut bf16, [x, y]: [Self::F; 2]) {
        // SAFETY: the caller's.
        unsafe {
            self.store_bf16(p, x);
            self.store_bf16(p.add(Self::LANES), y);
        }
    }
    /// Pairs of bf16, rounded to nearest even, with `low` in the lower bits.
    #[inline(always)]
    fn pairs(self, low: Self::F, high: Self::F) -> Self::F {
        pairs_apart(self, low, high)
    }
    /// `c` plus the products of two pairs of bf16 in every lane, which hold the first of a pair in their lower bits.
    #[inline(always)]
    fn dot_pairs(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        dot_pairs_apart(self, a, b, c)
    }
    /// `c` plus the products of four bytes in every lane: those of `a` are 0 to 255, those of `b` -128 to 127.
    #[inline(always)]
    fn dot_bytes(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        dot_bytes_apart(self, a, b, c)
    }

    fn sum(self, x: Self::F) -> f32;
    /// The sum of each of eight vectors.
    #[inline(always)]
    fn sum_each(self, x: [Self::F; 8]) -> [f32; 8] {
        let mut sums = [0.0; 8];
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = self.sum(x);
        }
        sums
    }
    fn largest(self, x: Self::F) -> f32;

    /// Turns a square of 8 by 8 numbers: `to[c * to_step + r]` becomes `from[r * from_step + c]`.
    ///
    /// # Safety
    /// The eight rows of `from` are readable and those of `to` writable, and none of the latter lies in the former.
    #[inline(always)]
    unsafe fn turn(self, from: *const f32, from_step: isize, to: *mut f32, to_step: isize) {
        for r in 0..8 {
            for c in 0..8 {
                // SAFETY: the caller's.
                unsafe { *to.offset(c * to_step + r) = *from.offset(r * from_step + c) };
            }
        }
    }

    /// Asks memory for the line at `p`, which may be any address.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    /// As [`Simd::prefetch`], to the second cache where there is a choice.
    #[inline(always)]
    fn prefetch_second(self, p: *const u8) {
        self.prefetch(p);
    }

    /// As [`Simd::prefetch`], for what is needed after the work at hand: to the cache that is best for it.
    #[inline(always)]
    fn prefetch_later(self, _p: *const u8) {}

    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    #[inline(always)]
    fn neg(self, x: Self::F) -> Self::F {
        self.from_bits(self.int_sub(self.bits(x), self.int(i32::MIN)))
    }

    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        self.from_bits(self.int_and(self.bits(x), self.int(i32::MAX)))
    }

    /// The magnitude of `x` with the sign of `sign`; `x` is not negative.
    #[inline(always)]
    fn with_sign(self, x: Self::F, sign: Self::F) -> Self::F {
        let sign = self.int_and(self.bits(sign), self.int(i32::MIN));
        self.from_bits(self.int_or(self.bits(x), sign))
    }

    /// `c - a * b`
    #[inline(always)]
    fn fnma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.fma(self.neg(a), b, c)
    }

    /// Calls `f` on every lane.
    #[inline(always)]
    fn lanes(self, x: Self::F, f: impl Fn(f32) -> f32) -> Self::F {
        let mut buffer = [0.0; 16];
        // SAFETY: no vector is longer than sixteen lanes.
        unsafe { self.store(buffer.as_mut_ptr(), x) };
        buffer[..Self::LANES].iter_mut().for_each(|x| *x = f(*x));
        // SAFETY: as above.
        unsafe { self.load(buffer.as_ptr()) }
    }
}

/// [`Simd::store_bf16`] one by one.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn store_bf16_apart<S: Simd>(s: S, p: *mut bf16, x: S::F) {
    let mut buffer = [0.0; 16];
    // SAFETY: the caller's; no vector is longer than sixteen lanes.
    unsafe {
        s.store(buffer.as_mut_ptr(), x);
        for (i, x) in buffer.into_iter().enumerate().take(S::LANES) {
            *p.add(i) = bf16::from_f32(x);
        }
    }
}

/// [`Simd::pairs`] by integers.
#[inline(always)]
fn pairs_apart<S: Simd>(s: S, low: S::F, high: S::F) -> S::F {
    let (low, high) = (rounded_bits(s, low), rounded_bits(s, high));
    let low = s.int_and(s.shr::<16>(low), s.int(0xffff));
    s.from_bits(s.int_or(low, s.shl::<16>(s.shr::<16>(high))))
}

/// Bits whose upper half is `x` rounded to bf16; a NaN stays one.
#[inline(always)]
fn rounded_bits<S: Simd>(s: S, x: S::F) -> S::I {
    let bits = s.bits(x);
    let odd = s.int_and(s.shr::<16>(bits), s.int(1));
    let up = s.int_add(bits, s.int_add(s.int(0x7fff), odd));
    let quiet = s.int_or(bits, s.int(0x40_0000));
    s.bits(s.select(s.eq(x, x), s.from_bits(up), s.from_bits(quiet)))
}

/// [`Simd::dot_pairs`] of numbers widened to 32 bits.
#[inline(always)]
fn dot_pairs_apart<S: Simd>(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
    let (a, b) = (s.bits(a), s.bits(b));
    let high = s.shl::<16>(s.int(-1));
    let low = s.fma(s.from_bits(s.shl::<16>(a)), s.from_bits(s.shl::<16>(b)), c);
    s.fma(
        s.from_bits(s.int_and(a, high)),
        s.from_bits(s.int_and(b, high)),
        low,
    )
}

/// [`Simd::dot_bytes`] byte by byte, in floats, which hold such sums.
#[inline(always)]
fn dot_bytes_apart<S: Simd>(s: S, a: S::I, b: S::I, c: S::I) -> S::I {
    let product = |a: S::I, b: S::I| {
        let a = s.from_int(s.int_and(a, s.int(255)));
        s.mul(a, s.from_int(s.shr::<24>(b)))
    };
    let low = s.add(product(a, s.shl::<24>(b)), product(s.shr::<8>(a), s.shl::<16>(b)));
    let high = s.add(product(s.shr::<16>(a), s.shl::<8>(b)), product(s.shr::<24>(a), b));
    s.int_add(c, s.to_int(s.add(low, high)))
}

/// A computation written for any instruction set. `run` must be `#[inline(always)]`, and so must what it calls with
/// the token, for the instructions to be used. A closure is inlined where the compiler sees fit, and calls a function for each
/// instruction where it is not: vectors are made and added up in loops. `cargo xtask inlined` looks for such calls.
pub(crate) trait Kernel {
    type Out;
    fn run<S: Simd>(self, simd: S) -> Self::Out;
}

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code)] // which of them are made depends on the architecture
pub(crate) enum Isa {
    Portable,
    Avx2,
    Avx512,
    Neon,
}

#[cfg(test)]
thread_local! {
    /// What a test wants this thread to use.
    static FORCED: std::cell::Cell<Option<Isa>> = const { std::cell::Cell::new(None) };
}

/// Runs `f` with an instruction set that this processor has, on this thread only.
#[cfg(test)]
pub(crate) fn forced<T>(set: Isa, f: impl FnOnce() -> T) -> T {
    FORCED.set(Some(set));
    let result = f();
    FORCED.set(None);
    result
}

/// The best instruction set of this processor.
#[inline]
pub(crate) fn isa() -> Isa {
    #[cfg(test)]
    if let Some(set) = FORCED.get() {
        return set;
    }
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && has_avx2() {
            return Isa::Avx512;
        }
        if has_avx2() {
            return Isa::Avx2;
        }
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("neon") {
        return Isa::Neon;
    }
    Isa::Portable
}

#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    #[cfg(test)]
    if FORCED.get() == Some(Isa::Portable) {
        return false;
    }
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Runs `kernel` with the best instruction set of this processor.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Out {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` found the instructions.
        Isa::Avx512 => unsafe { x86::with_avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` found the instructions.
        Isa::Avx2 => unsafe { x86::with_avx2(kernel) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: `isa` found the instructions.
        Isa::Neon => unsafe { neon::with_neon(kernel) },
        _ => kernel.run(Scalar),
    }
}

/// Asks memory for a line, where `SECOND` to the second cache, as far as the processor can be told: any address will do.
#[inline(always)]
pub(crate) fn ask_line<const SECOND: bool>(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction; no address makes it fail.
        unsafe {
            if SECOND {
                _mm_prefetch::<_MM_HINT_T1>(line.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(line.cast());
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// How rows that do not fit in caches are read fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "only processors with AVX-512 were measured to differ")
)]
pub(crate) enum Memory {
    /// One after the other, asked for nearly a page early: a quarter more than four on Zen 5.
    OneStream,
    /// Four that lie far apart, asked for a kilobyte early to the second cache: on Zen 4 half as fast again as one stream asked for a
    /// page early, and 1.02 to 1.06 times as fast as two. A thread reads its streams without a break: each costs half a microsecond.
    /// Processors that were not measured are taken to be like it.
    FarStreams,
    /// Four that lie far apart, for AVX2: Zen 3 waits for a few lines of one stream at a time, and neighbouring rows are one. They are
    /// not interrupted either: 1.07 to 1.1 times as fast, with AVX2 on Zen 4.
    FourStreams,
}

/// What suits this processor.
pub(crate) fn memory() -> Memory {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        return if x86::is_zen5() {
            Memory::OneStream
        } else {
            Memory::FarStreams
        };
    }
    Memory::FourStreams
}

/// Whether this processor multiplies pairs of bf16 in one instruction.
pub(crate) fn has_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether products of pairs of bf16 are faster than those of floats. Intel's processors without matrix units multiply half as many numbers
/// in a cycle (measured on one of the fifth generation), others twice as many.
pub(crate) fn pairs_pay() -> bool {
    #[cfg(target_arch = "x86_64")]
    let fast = cfg!(test) || !x86::is_intel() || crate::tiles::unit().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    let fast = true;
    has_pairs() && fast
}

/// Whether this processor multiplies bytes in one instruction: [`dispatch_bytes`] pays.
pub(crate) fn has_bytes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() == Isa::Avx512 && is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// As [`dispatch`], for a kernel of products of bytes.
#[inline]
pub(crate) fn dispatch_bytes<K: Kernel>(kernel: K) -> K::Out {
    #[cfg(target_arch = "x86_64")]
    if has_bytes() {
        // SAFETY: the instructions were found.
        return unsafe { x86::with_avx512_vnni(kernel) };
    }
    dispatch(kernel)
}

/// The matrix units of this processor, where it has them and multiplies pairs of bf16 otherwise too.
#[cfg(target_arch = "x86_64")]
pub(crate) fn matrix_unit() -> Option<crate::tiles::Unit> {
    if has_pairs() { crate::tiles::unit() } else { None }
}

/// As [`dispatch`], for a kernel of pairs of bf16: with the portable set where the processor has none, for tests alone.
#[inline]
pub(crate) fn dispatch_pairs<K: Kernel>(kernel: K) -> K::Out {
    #[cfg(target_arch = "x86_64")]
    if has_pairs() {
        // SAFETY: the instructions were found.
        return unsafe { x86::with_avx512_bf16(kernel) };
    }
    kernel.run(Scalar)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation on fixed operands, as one list of numbers.
    struct Everything;

    impl Kernel for Everything {
        type Out = Vec<Vec<f32>>;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Out {
            let numbers: Vec<f32> = (0..80).map(|i| (i as f32 - 20.0) * 0.37 + 0.011).collect();
            let mut all = vec![Vec::new(); 29];
            for at in (0..48).step_by(S::LANES) {
                // SAFETY: 80 numbers, and no vector is longer than 16.
                let (a, b, c) = unsafe {
                    (
                        s.load(&numbers[at]),
                        s.load(&numbers[at + 7]),
                        s.load(&numbers[at + 9]),
                    )
                };
                for (n, sum) in s.sum_each([a, b, c, a, b, c, a, b]).into_iter().enumerate() {
                    assert!((sum - s.sum([a, b, c][n % 3])).abs() < 1e-3, "sum {n}: {sum}");
                }
                for count in 0..=S::LANES {
                    let (mut whole, mut part) = ([0.0; 16], [-1.0; 17]);
                    // SAFETY: no vector is longer than 16, and `count` numbers are there.
                    unsafe {
                        s.store(whole.as_mut_ptr(), s.load_part(&numbers[at], count));
                        s.store_part(part.as_mut_ptr(), a, count);
                    }
                    assert_eq!(whole[..count], numbers[at..at + count], "lanes below {count}");
                    assert!(whole[count..].iter().all(|x| *x == 0.0), "lanes from {count} on");
                    assert_eq!(part[..count], numbers[at..at + count], "lanes below {count}");
                    assert!(part[count..].iter().all(|x| *x == -1.0), "lanes from {count} on");
                }
                let pair = |i: usize| {
                    let bits = |i: usize| u32::from(bf16::from_f32(numbers[i]).to_bits());
                    f32::from_bits(bits(i) | bits(i + 1) << 16)
                };
                let lines: [[f32; 16]; 2] = [at, at + 11].map(|from| std::array::from_fn(|i| pair(from + i)));
                // SAFETY: sixteen numbers each.
                let pairs = unsafe { [s.load(lines[0].as_ptr()), s.load(lines[1].as_ptr())] };
                let mask = s.lt(a, b);
                let (ia, ib) = (s.to_int(a), s.to_int(b));
                let results = [
                    s.add(a, b),
                    s.sub(a, b),
                    s.mul(a, b),
                    s.div(a, b),
                    s.fma(a, b, c),
                    s.fnma(a, b, c),
                    s.min(a, c),
                    s.max(a, c),
                    s.sqrt(s.abs(a)),
                    s.floor(a),
                    s.ceil(a),
                    s.round(a),
                    s.select(mask, a, c),
                    s.select(s.eq(a, a), b, c),
                    s.from_int(ia),
                    s.from_int(s.int_add(ia, ib)),
                    s.from_int(s.int_sub(ia, ib)),
                    s.from_int(s.int_and(ia, ib)),
                    s.from_int(s.int_or(ia, ib)),
                    s.from_int(s.shl::<3>(ia)),
                    s.from_int(s.shr::<1>(ia)),
                    s.neg(a),
                    s.with_sign(s.abs(b), a),
                    s.splat(if s.any(mask) { 1.0 } else { 0.0 }),
                    s.lanes(a, |x| x * 2.0),
                    s.dot_pairs(pairs[0], pairs[1], c),
                    s.dot_pairs(s.pairs(a, b), s.pairs(c, a), b),
                ];
                for (n, result) in results.into_iter().enumerate() {
                    let mut out = [0.0; 16];
                    let mut half = [f16::ZERO; 16];
                    // SAFETY: no vector is longer than 16.
                    unsafe { s.store(out.as_mut_ptr(), result) };
                    all[n].extend(&out[..S::LANES]);
                    // SAFETY: as above.
                    unsafe { s.store_f16(half.as_mut_ptr(), result) };
                    // SAFETY: as above.
                    let back = unsafe { s.load_f16(half.as_ptr()) };
                    // SAFETY: as above.
                    unsafe { s.store(out.as_mut_ptr(), back) };
                    all[27].extend(&out[..S::LANES]);
                    let mut short = [bf16::ZERO; 16];
                    // SAFETY: as above.
                    unsafe { s.store_bf16(short.as_mut_ptr(), result) };
                    all[28].extend(short[..S::LANES].iter().map(|x| x.to_f32()));
                    let sum: f32 = s.sum(result) - all[n][all[n].len() - S::LANES..].iter().sum::<f32>();
                    assert!(sum.abs() < 1e-1, "sum {sum}");
                    let largest = all[n][all[n].len() - S::LANES..]
                        .iter()
                        .copied()
                        .fold(f32::MIN, f32::max);
                    assert_eq!(s.largest(result), largest);
                }
            }
            all[27].sort_by(f32::total_cmp);
            all[28].sort_by(f32::total_cmp);
            all
        }
    }

    #[test]
    fn the_best_instruction_set_agrees_with_the_portable_one() {
        let portable = Everything.run(Scalar);
        agrees(dispatch(Everything), &portable);
        agrees(dispatch_pairs(Everything), &portable);
    }

    fn agrees(best: Vec<Vec<f32>>, portable: &[Vec<f32>]) {
        for (n, (best, portable)) in best.iter().zip(portable).enumerate() {
            assert_eq!(best.len(), portable.len());
            for (a, b) in best.iter().zip(portable) {
                assert!(
                    (a - b).abs() <= 1e-5 * b.abs().max(1.0),
                    "operation {n}: {a} is not {b}"
                );
            }
        }
    }
}
