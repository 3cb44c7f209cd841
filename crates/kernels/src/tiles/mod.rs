//! Intel's matrix units (AMX): products of bf16 pairs, sixteen rows by sixteen columns by sixteen pairs an instruction.
//!
//! Eight registers hold tiles of sixteen rows of 64 bytes. A product of two tiles of rows and two of columns has its sums in four of them
//! and reads each tile twice. Compilers have no stable intrinsics for them: a whole product is one piece of assembly. A
//! processor without the units is made to run it in tests (`emulator`).

#[cfg(test)]
pub(crate) mod emulator;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile, and columns of 32-bit numbers, and pairs.
pub(crate) const SIDE: usize = 16;
/// Bytes of a row of a tile.
const LINE: usize = 64;

/// Proof of the units, and of the system's leave to use them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit(());

/// The units of this processor, where it has them.
pub(crate) fn unit() -> Option<Unit> {
    #[cfg(test)]
    if emulator::is_on() {
        return Some(Unit(()));
    }
    static THERE: OnceLock<bool> = OnceLock::new();
    THERE
        .get_or_init(|| there() && allowed() && right(Unit(())))
        .then_some(Unit(()))
}

/// Whether the processor has the units, as large as they are used here, and the system knows of them.
fn there() -> bool {
    const SYSTEM_SAVES: u32 = 1 << 27;
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 0x1d || __cpuid(1).ecx & SYSTEM_SAVES == 0 {
        return false;
    }
    if __cpuid_count(7, 0).edx & BF16_AND_TILES != BF16_AND_TILES {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: the system says that it enabled the instruction; it reads a register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    let state = u64::from(high) << 32 | u64::from(low);
    let palette = __cpuid_count(0x1d, 1);
    let (bytes_of_row, names, rows) = (palette.ebx & 0xffff, palette.ebx >> 16, palette.ecx & 0xffff);
    state & TILE_STATE == TILE_STATE && bytes_of_row as usize == LINE && names >= 8 && rows as usize >= SIDE
}

/// Asks the system for leave: processes that do not are spared saving eight kilobytes a thread.
#[cfg(target_os = "linux")]
fn allowed() -> bool {
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: it changes what this process may do, and nothing else.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> bool {
    false
}

/// Whether a small product is what it must be: virtual machines have been known to say more than they do.
fn right(unit: Unit) -> bool {
    // Small whole numbers, exact in bf16: a[r][k] = r - k, b[k][c] = (k + 2 c) mod 5.
    let pair = |low: f32, high: f32| f32::from_bits(low.to_bits() >> 16 | high.to_bits() & 0xffff_0000);
    let (left, right) = (
        |r: usize, k: usize| r as f32 - k as f32,
        |k: usize, c: usize| ((k + 2 * c) % 5) as f32,
    );
    let (mut a, mut b, mut c) = ([[0.0; SIDE]; SIDE], [[0.0; SIDE]; SIDE], [[0.0; SIDE]; SIDE]);
    for i in 0..SIDE {
        for j in 0..SIDE {
            a[i][j] = pair(left(i, 2 * j), left(i, 2 * j + 1));
            b[i][j] = pair(right(2 * i, j), right(2 * i + 1, j));
        }
    }
    let part = Part {
        a: [a.as_ptr().cast(); 2],
        a_step: LINE,
        b: b.as_ptr().cast(),
        b_step: LINE,
        chunks: 1,
    };
    // SAFETY: a tile each.
    unsafe { Session::new(unit).product::<1, 1>([SIDE, 0], &[part], c.as_mut_ptr().cast(), SIDE, false) };
    (0..SIDE).all(|r| {
        (0..SIDE).all(|j| {
            let exact: f32 = (0..2 * SIDE).map(|k| left(r, k) * right(k, j)).sum();
            c[r][j] == exact
        })
    })
}

/// A stretch of the inner dimension: `chunks` times sixteen pairs.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Part {
    /// Where the rows of the first and the second tile of rows begin. A chunk is 64 bytes of each.
    pub a: [*const u8; 2],
    /// Bytes from row to row.
    pub a_step: usize,
    /// Lines of a pair of every column; those of the second tile of columns lie 64 bytes behind those of the first.
    pub b: *const u8,
    /// Bytes from line to line; a chunk has sixteen of them.
    pub b_step: usize,
    /// Not zero.
    pub chunks: usize,
}

impl Part {
    /// Nothing, to make arrays of.
    pub(crate) const NONE: Part = Part {
        a: [std::ptr::null(); 2],
        a_step: 0,
        b: std::ptr::null(),
        b_step: 0,
        chunks: 0,
    };
}

/// How the registers are divided.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    zeros: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

/// Products on this thread, one after the other; dividing the registers anew costs more than a product of tiles.
pub(crate) struct Session {
    /// Rows of the two tiles of rows.
    rows: [usize; 2],
    /// The state is the thread's.
    _here: PhantomData<*const ()>,
}

impl Session {
    pub(crate) fn new(_: Unit) -> Self {
        Session {
            rows: [0; 2],
            _here: PhantomData,
        }
    }

    /// Sets the rows of the tiles, of which the second may have none.
    fn divide(&mut self, rows: [usize; 2]) {
        if self.rows == rows {
            return;
        }
        assert!((1..=SIDE).contains(&rows[0]) && rows[1] <= SIDE, "tiles: rows");
        // The second tile of rows is not used where it has none; the units refuse one that is empty.
        let [first, second] = rows.map(|r| r.max(1) as u8);
        let (whole, mut of) = (SIDE as u8, [0; 16]);
        of[..8].copy_from_slice(&[first, first, second, second, first, second, whole, whole]);
        let mut bytes_of_row = [0; 16];
        bytes_of_row[..8].fill(LINE as u16);
        let configuration = Configuration {
            palette: 1,
            start_row: 0,
            zeros: [0; 14],
            bytes_of_row,
            rows: of,
        };
        // SAFETY: a `Session` has the units, and the configuration is one they know.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly)) };
        self.rows = rows;
    }

    /// Writes the sums over all `parts` of the products of `A` tiles of rows and `B` of columns to `c`, whose rows lie `line` numbers
    /// apart, or adds them to what is there. The first tile has `rows[0]` rows, the second `rows[1]`.
    ///
    /// # Safety
    /// The parts are readable, every chunk whole: rows as many as there are, lines of columns sixteen. The sums are writable.
    pub(crate) unsafe fn product<const A: usize, const B: usize>(
        &mut self,
        rows: [usize; 2],
        parts: &[Part],
        c: *mut f32,
        line: usize,
        add: bool,
    ) {
        const { assert!(A >= 1 && A <= 2 && B >= 1 && B <= 2) };
        debug_assert!(parts.iter().all(|p| p.chunks > 0) && (A == 1) == (rows[1] == 0));
        self.divide(rows);
        let below = c.wrapping_add(rows[0] * line);
        let all = parts.as_ptr_range();
        // SAFETY: the caller's. Nothing but this keeps anything in tiles.
        unsafe {
            asm!(
                "test {n}, {n}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {line}*1]",
                ".if {b} == 2",
                "tileloadd tmm1, [{c} + {line}*1 + 64]",
                ".endif",
                ".if {a} == 2",
                "tileloadd tmm2, [{below} + {line}*1]",
                ".if {b} == 2",
                "tileloadd tmm3, [{below} + {line}*1 + 64]",
                ".endif",
                ".endif",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                ".if {b} == 2",
                "tilezero tmm1",
                ".endif",
                ".if {a} == 2",
                "tilezero tmm2",
                ".if {b} == 2",
                "tilezero tmm3",
                ".endif",
                ".endif",
                "3:",
                "cmp {part}, {end}",
                "jae 6f",
                "4:",
                "mov {a0}, [{part}]",
                ".if {a} == 2",
                "mov {a1}, [{part} + 8]",
                ".endif",
                "mov {a_step}, [{part} + 16]",
                "mov {b0}, [{part} + 24]",
                "mov {b_step}, [{part} + 32]",
                "mov {n}, [{part} + 40]",
                "5:",
                "tileloadd tmm6, [{b0} + {b_step}*1]",
                "tileloadd tmm4, [{a0} + {a_step}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                ".if {b} == 2",
                "tileloadd tmm7, [{b0} + {b_step}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                ".endif",
                ".if {a} == 2",
                "tileloadd tmm5, [{a1} + {a_step}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                ".if {b} == 2",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".endif",
                "add {a1}, 64",
                ".endif",
                "add {a0}, 64",
                "lea {b0}, [{b0} + {b_step}*8]",
                "lea {b0}, [{b0} + {b_step}*8]",
                "dec {n}",
                "jnz 5b",
                "add {part}, {part_size}",
                "cmp {part}, {end}",
                "jb 4b",
                "6:",
                "tilestored [{c} + {line}*1], tmm0",
                ".if {b} == 2",
                "tilestored [{c} + {line}*1 + 64], tmm1",
                ".endif",
                ".if {a} == 2",
                "tilestored [{below} + {line}*1], tmm2",
                ".if {b} == 2",
                "tilestored [{below} + {line}*1 + 64], tmm3",
                ".endif",
                ".endif",
                a = const A,
                b = const B,
                part_size = const size_of::<Part>(),
                part = inout(reg) all.start => _,
                end = in(reg) all.end,
                c = in(reg) c,
                below = in(reg) below,
                line = in(reg) line * size_of::<f32>(),
                n = inout(reg) usize::from(add) => _,
                a0 = out(reg) _,
                a1 = out(reg) _,
                a_step = out(reg) _,
                b0 = out(reg) _,
                b_step = out(reg) _,
                options(nostack),
            );
        }
    }
}

impl Drop for Session {
    /// Gives the registers back: what they hold is saved at every change of threads otherwise.
    fn drop(&mut self) {
        if self.rows[0] > 0 {
            // SAFETY: a `Session` has the units.
            unsafe { asm!("tilerelease", options(nomem, nostack)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use half::bf16;

    #[test]
    fn the_units_are_right() {
        let (right, products) = emulator::with(|| right(unit().expect("they are on")));
        assert!(right);
        assert!(products.is_none_or(|count| count == 1));
    }

    /// Rows of any number and distance, several parts, on top of what was there.
    #[test]
    fn products_of_tiles_agree_with_the_definition() {
        fn check<const A: usize, const B: usize>(rows: [usize; 2], chunks: &[usize], add: bool) {
            let mut seed = 11;
            let (apart, line, width) = (7 * SIDE, 37, 2 * SIDE);
            let mut numbers =
                |len: usize| -> Vec<bf16> { (0..len).map(|_| bf16::from_f32(random(&mut seed))).collect() };
            let high = rows[0] + rows[1];
            let pairs = chunks.iter().sum::<usize>() * SIDE;
            let a = numbers(high * apart * 2);
            let b = numbers(pairs * width * 2);
            let before: Vec<f32> = (0..high * line).map(|i| i as f32 / 64.0).collect();
            let mut c = before.clone();
            let mut start = 0;
            let parts: Vec<Part> = chunks
                .iter()
                .map(|&chunks| {
                    let first = start;
                    start += chunks * SIDE;
                    Part {
                        a: [0, rows[0]]
                            .map(|row| a[2 * (row.min(high - 1) * apart + first)..].as_ptr().cast()),
                        a_step: apart * 4,
                        b: b[2 * first * width..].as_ptr().cast(),
                        b_step: width * 4,
                        chunks,
                    }
                })
                .collect();
            // SAFETY: rows, lines and sums are there.
            let product = |c: *mut f32| unsafe {
                Session::new(unit().expect("they are on")).product::<A, B>(rows, &parts, c, line, add);
            };
            let ((), count) = emulator::with(|| product(c.as_mut_ptr()));
            assert!(count.is_none_or(|count| count == A * B * chunks.iter().sum::<usize>()));
            for row in 0..high {
                for column in 0..line {
                    let at = row * line + column;
                    let mut exact = f64::from(if add { before[at] } else { 0.0 });
                    for k in 0..2 * pairs {
                        let w = 2 * (k / 2 * width + column.min(width - 1)) + k % 2;
                        exact += f64::from(a[row * apart * 2 + k].to_f32()) * f64::from(b[w].to_f32());
                    }
                    let expected = if column < B * SIDE {
                        exact
                    } else {
                        f64::from(before[at])
                    };
                    assert!(
                        (f64::from(c[at]) - expected).abs() < 1e-4,
                        "{rows:?} {chunks:?} {row} {column}: {} {expected}",
                        c[at]
                    );
                }
            }
        }
        for add in [false, true] {
            check::<2, 2>([16, 16], &[1, 3], add);
            check::<2, 2>([16, 5], &[2], add);
            check::<2, 1>([13, 1], &[1, 1, 1], add);
            check::<1, 2>([1, 0], &[4], add);
            check::<1, 1>([9, 0], &[5], add);
        }
    }
}
