//! The units in software, so that what is written for them can be run by tests anywhere: a processor without them finds their
//! instructions illegal, and the signal's handler does what they do and steps over them.
//!
//! Sums are made in the order that Intel's manual gives, with its treatment of denormal numbers.

use super::{LINE, SIDE};
use std::cell::{Cell, UnsafeCell};
use std::sync::Once;

/// What the units hold on a thread.
struct State {
    configured: bool,
    rows: [usize; 8],
    bytes: [usize; 8],
    tiles: [[[u8; LINE]; SIDE]; 8],
}

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    static DONE: Cell<usize> = const { Cell::new(0) };
    static STATE: UnsafeCell<State> = const {
        UnsafeCell::new(State {
            configured: false,
            rows: [0; 8],
            bytes: [0; 8],
            tiles: [[[0; LINE]; SIDE]; 8],
        })
    };
}

/// Whether this thread has the units in software.
pub(crate) fn is_on() -> bool {
    ON.get()
}

/// Runs `f` with the units on this thread, in software where the processor has none. Gives what `f` does and how many products of tiles
/// it took, where they were counted.
pub(crate) fn with<T>(f: impl FnOnce() -> T) -> (T, Option<usize>) {
    if super::unit().is_some() {
        return (f(), None);
    }
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: zeros are a valid `sigaction`; the handler's type is the one that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handler;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        }
    });
    /// Off again, whatever happens.
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ON.set(false);
        }
    }
    let _off = Off;
    ON.set(true);
    DONE.set(0);
    let result = f();
    // SAFETY: no handler runs now on this thread.
    let given_back = STATE.with(|state| unsafe { !(*state.get()).configured });
    assert!(given_back, "the units were not given back");
    (result, Some(DONE.get()))
}

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the third argument of such a handler is this.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let length = ON
        .get()
        // SAFETY: the signal is of this thread's own instruction, so nothing else uses the state.
        .then(|| STATE.with(|state| unsafe { execute(&mut *state.get(), registers) }))
        .flatten();
    match length {
        Some(length) => registers[libc::REG_RIP as usize] += length as i64,
        // SAFETY: the instruction is met again, and ends the process as it would have.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

/// Does the instruction that `registers` are at and gives its length; none that is not the units', or that they would refuse.
///
/// # Safety
/// The registers are those of this thread, at an instruction.
unsafe fn execute(state: &mut State, registers: &[libc::greg_t; 23]) -> Option<usize> {
    const NUMBERED: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let register = |number: u8| registers[NUMBERED[number as usize] as usize] as usize;
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: an instruction; each byte is read when those before it say that it is there.
    let byte = |i: usize| unsafe { *at.add(i) };
    // Three bytes of prefix, inverted where they extend registers: the map 0F38, no wide operands, 128 bits.
    let (c4, first, second) = (byte(0), byte(1), byte(2));
    if c4 != 0xc4 || first & 0x1f != 2 || second & 0x84 != 0 {
        return None;
    }
    let [extends_reg, extends_index, extends_base] = [7, 6, 5].map(|bit| (first >> bit & 1 ^ 1) << 3);
    let (third_operand, prefix, code) = (!(second >> 3) & 15, second & 3, byte(3));
    let (mode, reg, low) = (byte(4) >> 6, byte(4) >> 3 & 7, byte(4) & 7);
    // The address, the step from row to row, and the length of the instruction.
    let memory = || {
        let mut length = 5;
        let (base, step) = if low == 4 {
            length = 6;
            let (scale, index, base) = (byte(5) >> 6, byte(5) >> 3 & 7 | extends_index, byte(5) & 7);
            let step = if index == 4 { 0 } else { register(index) << scale };
            (base, step)
        } else {
            (low, 0)
        };
        if mode == 0 && base == 5 {
            return None;
        }
        let start = register(base | extends_base);
        let beyond = match mode {
            0 => 0,
            1 => isize::from(byte(length) as i8),
            _ => i32::from_le_bytes(std::array::from_fn(|i| byte(length + i))) as isize,
        };
        length += [0, 1, 4][mode as usize];
        Some((start.wrapping_add_signed(beyond), step, length))
    };
    const NONE: u8 = 0;
    const P66: u8 = 1;
    const PF3: u8 = 2;
    const PF2: u8 = 3;
    let tile = reg as usize;
    if code != 0x49 && (!state.configured || extends_reg != 0) {
        return None;
    }
    match (code, prefix) {
        // ldtilecfg
        (0x49, NONE) if mode != 3 && reg == 0 => {
            let (address, _, length) = memory()?;
            // SAFETY: the instruction reads 64 bytes.
            let configuration = unsafe { *(address as *const [u8; 64]) };
            if configuration[0] != 1 || configuration[1..16].iter().any(|b| *b != 0) {
                return None;
            }
            for i in 0..8 {
                let bytes = u16::from_le_bytes([configuration[16 + 2 * i], configuration[17 + 2 * i]]);
                state.bytes[i] = usize::from(bytes);
                state.rows[i] = usize::from(configuration[48 + i]);
                if state.bytes[i] > LINE || state.rows[i] > SIDE || (bytes == 0) != (state.rows[i] == 0) {
                    return None;
                }
            }
            state.tiles = [[[0; LINE]; SIDE]; 8];
            state.configured = true;
            Some(length)
        }
        // tilerelease
        (0x49, NONE) if byte(4) == 0xc0 => {
            state.configured = false;
            Some(5)
        }
        // tilezero
        (0x49, PF2) if mode == 3 && low == 0 && state.configured => {
            state.tiles[tile] = [[0; LINE]; SIDE];
            Some(5)
        }
        // tileloadd, tileloaddt1
        (0x4b, PF2 | P66) if mode != 3 && low == 4 => {
            let (address, step, length) = memory()?;
            state.tiles[tile] = [[0; LINE]; SIDE];
            for row in 0..state.rows[tile] {
                let from = address.wrapping_add(row * step) as *const u8;
                let to = state.tiles[tile][row].as_mut_ptr();
                // SAFETY: the instruction reads these bytes.
                unsafe { from.copy_to_nonoverlapping(to, state.bytes[tile]) };
            }
            Some(length)
        }
        // tilestored
        (0x4b, PF3) if mode != 3 && low == 4 => {
            let (address, step, length) = memory()?;
            for row in 0..state.rows[tile] {
                let to = address.wrapping_add(row * step) as *mut u8;
                // SAFETY: the instruction writes these bytes.
                unsafe { to.copy_from_nonoverlapping(state.tiles[tile][row].as_ptr(), state.bytes[tile]) };
            }
            Some(length)
        }
        // tdpbf16ps
        (0x5c, PF3) if mode == 3 => {
            multiply(state, [tile, low as usize, third_operand as usize])?;
            DONE.set(DONE.get() + 1);
            Some(5)
        }
        _ => None,
    }
}

/// Adds the product of tiles `a` and `b` to tile `c`; none where their sizes do not fit.
fn multiply(state: &mut State, [c, a, b]: [usize; 3]) -> Option<()> {
    let apart = c != a && c != b && a != b && b < 8;
    let fits = state.rows[a] == state.rows[c] && state.bytes[a] / 4 == state.rows[b];
    if !apart || !fits || state.bytes[b] != state.bytes[c] {
        return None;
    }
    let number = |row: &[u8; LINE], i: usize| {
        let x = f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16);
        flushed(x)
    };
    for m in 0..state.rows[c] {
        let mut sums = [[0.0_f32; 2]; SIDE];
        for k in 0..state.rows[b] {
            for (n, sums) in sums.iter_mut().enumerate().take(state.bytes[c] / 4) {
                for (half, sum) in sums.iter_mut().enumerate() {
                    let x = number(&state.tiles[a][m], 2 * k + half);
                    let y = number(&state.tiles[b][k], 2 * n + half);
                    *sum = flushed(x.mul_add(y, *sum));
                }
            }
        }
        for (sums, to) in sums.iter().zip(state.tiles[c][m].as_chunks_mut::<4>().0) {
            *to = flushed(f32::from_le_bytes(*to) + flushed(sums[0] + sums[1])).to_le_bytes();
        }
    }
    Some(())
}

/// A zero for a denormal number.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}
