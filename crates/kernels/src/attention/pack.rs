//! Keys and values of one head as rows of a product.

use super::Call;
use crate::gemm::SQUARE;
use crate::matmul::Source;
use crate::matvec::Stored;
use crate::simd::{Kernel, Simd, dispatch_pairs};
use crate::weights::Round;
use half::bf16;
use std::ops::Range;

impl Call {
    /// Keys or values, with their steps and size.
    fn side(&self, keys: bool) -> (Source, [isize; 3], usize) {
        let ((source, steps), size) = if keys {
            (self.k, self.size)
        } else {
            (self.v, self.v_size)
        };
        (source, steps, size)
    }

    /// Copies the visible rows of keys or values of one head into `out`, element `[i, d]` at `i * to[0] + d * to[1]`.
    pub(super) fn pack(
        &self,
        keys: bool,
        head: usize,
        runs: &[Range<usize>],
        to: [usize; 2],
        out: &mut [f32],
    ) {
        let (source, steps, size) = self.side(keys);
        if let (Source::F32(p), 1, 1) = (source, steps[2], to[0]) {
            let p = p.at(head as isize * steps[0]).cast_const();
            // SAFETY: the visible rows of the operand.
            return unsafe { transposed(p, steps[1], size, runs, to[1], out) };
        }
        for (i, t) in runs.iter().cloned().flatten().enumerate() {
            let base = head as isize * steps[0] + t as isize * steps[1];
            if steps[2] == 1 && to[1] == 1 {
                let out = &mut out[i * to[0]..][..size];
                match source {
                    Source::F32(p) => {
                        // SAFETY: a row of the operand.
                        let row = unsafe { std::slice::from_raw_parts(p.at(base).cast_const(), size) };
                        out.copy_from_slice(row);
                    }
                    Source::F16(p) => {
                        // SAFETY: a row of the operand.
                        let row = unsafe { std::slice::from_raw_parts(p.at(base).cast_const(), size) };
                        crate::copy::f16_to_f32(row, out);
                    }
                }
                continue;
            }
            for d in 0..size {
                // SAFETY: inside the operand's shape.
                out[i * to[0] + d * to[1]] = unsafe { source.get(base + d as isize * steps[2]) };
            }
        }
    }

    /// [`Call::pack`] in pairs of bf16, rows of `line` pairs with zeros behind: keys as rows along the head size, values as rows along
    /// the visible positions.
    pub(super) fn pack_pairs(
        &self,
        keys: bool,
        head: usize,
        runs: &[Range<usize>],
        line: usize,
        out: &mut [f32],
    ) {
        let (source, steps, size) = self.side(keys);
        let first = head as isize * steps[0];
        match source {
            Source::F32(p) => pairs((p.at(first).cast_const(), steps, size), keys, runs, line, out),
            Source::F16(p) => pairs((p.at(first).cast_const(), steps, size), keys, runs, line, out),
        }
    }
}

/// See [`Call::pack_pairs`]: element `d` of position `t` is at `t * steps[1] + d * steps[2]` behind `x`, for positions that the
/// operand has.
fn pairs<T: Stored>(
    (x, steps, size): (*const T, [isize; 3], usize),
    keys: bool,
    runs: &[Range<usize>],
    line: usize,
    out: &mut [f32],
) {
    let [_, step, inner] = steps;
    let place = |t: usize, d: usize| x.wrapping_offset(t as isize * step + d as isize * inner);
    let rows = out.chunks_exact_mut(line.max(1));
    if keys && inner == 1 {
        for (t, row) in runs.iter().cloned().flatten().zip(rows) {
            let (to, zeros) = bytemuck::cast_slice_mut::<f32, bf16>(row).split_at_mut(size);
            // SAFETY: a row of the operand.
            dispatch_pairs(Round(
                unsafe { std::slice::from_raw_parts(place(t, 0), size) },
                to,
            ));
            zeros.fill(bf16::ZERO);
        }
    } else if !keys && step == 1 {
        for (d, row) in (0..size).zip(rows) {
            let mut rest = bytemuck::cast_slice_mut::<f32, bf16>(row);
            for run in runs {
                let to;
                (to, rest) = rest.split_at_mut(run.len());
                // SAFETY: positions of the operand, side by side.
                let from = unsafe { std::slice::from_raw_parts(place(run.start, d), run.len()) };
                dispatch_pairs(Round(from, to));
            }
            rest.fill(bf16::ZERO);
        }
    } else if !keys && inner == 1 {
        dispatch_pairs(Turned {
            x,
            step,
            size,
            runs,
            line,
            out,
        });
    } else {
        out.fill(0.0);
        let out = bytemuck::cast_slice_mut::<f32, bf16>(out);
        for (i, t) in runs.iter().cloned().flatten().enumerate() {
            for d in 0..size {
                // SAFETY: inside the operand's shape.
                let value = bf16::from_f32(unsafe { *place(t, d) }.widen());
                let (row, column) = if keys { (i, d) } else { (d, i) };
                out[2 * row * line + column] = value;
            }
        }
    }
}

/// Rows `runs` of `size` numbers, `step` apart, as columns of rows of `line` pairs. Made for rows that are readable.
struct Turned<'a, T> {
    x: *const T,
    step: isize,
    size: usize,
    runs: &'a [Range<usize>],
    line: usize,
    out: &'a mut [f32],
}

impl<T: Stored> Kernel for Turned<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (size, line) = (self.size, self.line);
        let mut positions = self.runs.iter().cloned().flatten();
        let mut rows = [self.x; 2 * SQUARE];
        let mut first = 0;
        loop {
            let mut count = 0_usize;
            for (row, t) in rows.iter_mut().zip(&mut positions) {
                *row = self.x.wrapping_offset(t as isize * self.step);
                count += 1;
            }
            let there = count.div_ceil(2);
            if there < SQUARE {
                // No more whole squares follow.
                for row in self.out.chunks_exact_mut(line.max(1)).take(size) {
                    row[first + there..].fill(0.0);
                }
            }
            if count == 0 {
                return;
            }
            let mut squares = [[0.0; 16]; SQUARE];
            for d in (0..size).step_by(S::LANES) {
                let wide = S::LANES.min(size - d);
                for (p, to) in squares.iter_mut().enumerate().take(there) {
                    // SAFETY: `wide` numbers of rows that are there; no vector is longer than sixteen lanes.
                    unsafe {
                        let low = load(s, rows[2 * p].wrapping_add(d), wide);
                        let high = if 2 * p + 1 < count {
                            load(s, rows[2 * p + 1].wrapping_add(d), wide)
                        } else {
                            s.zero()
                        };
                        s.store(to.as_mut_ptr(), s.pairs(low, high));
                    }
                }
                for beside in (0..wide).step_by(SQUARE) {
                    let high = SQUARE.min(wide - beside);
                    let to = &mut self.out[(d + beside) * line + first..][..(high - 1) * line + there];
                    if there == SQUARE && high == SQUARE {
                        let from = squares[0][beside..].as_ptr();
                        // SAFETY: the squares have eight rows, and so has the place for them, which was checked.
                        unsafe { s.turn(from, 16, to.as_mut_ptr(), line as isize) };
                        continue;
                    }
                    for c in 0..high {
                        for (p, square) in squares.iter().enumerate().take(there) {
                            to[c * line + p] = square[beside + c];
                        }
                    }
                }
            }
            first += there;
            if there < SQUARE {
                return;
            }
        }
    }
}

/// The first `count` numbers at `p`, zeros behind them.
///
/// # Safety
/// They are readable; they are no more than there are lanes.
#[inline(always)]
unsafe fn load<S: Simd, T: Stored>(s: S, p: *const T, count: usize) -> S::F {
    if count == S::LANES {
        // SAFETY: a whole vector.
        return unsafe { T::load(s, p) };
    }
    let mut buffer = [0.0; 16];
    for (i, to) in buffer.iter_mut().enumerate().take(count) {
        // SAFETY: the caller's.
        *to = unsafe { *p.add(i) }.widen();
    }
    // SAFETY: no vector is longer than sixteen lanes.
    unsafe { s.load(buffer.as_ptr()) }
}

/// Rows `runs` of `size` numbers, `step` apart, as columns of lines of `line` numbers: whole pieces of a line are written at once.
///
/// # Safety
/// The rows are readable.
unsafe fn transposed(
    x: *const f32,
    step: isize,
    size: usize,
    runs: &[Range<usize>],
    line: usize,
    out: &mut [f32],
) {
    /// Rows that become one piece of every line.
    const PIECE: usize = 8;
    let mut at = 0;
    for run in runs {
        let mut t = run.start;
        while t < run.end {
            let count = PIECE.min(run.end - t);
            let rows: [*const f32; PIECE] =
                std::array::from_fn(|i| x.wrapping_offset((t + i.min(count - 1)) as isize * step));
            for d in 0..size {
                // SAFETY: every pointer is to a row that is there.
                let piece = rows.map(|row| unsafe { *row.add(d) });
                out[d * line + at..][..count].copy_from_slice(&piece[..count]);
            }
            (at, t) = (at + count, t + count);
        }
    }
}
