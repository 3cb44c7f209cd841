//! What follows the sums of a convolution: bias, activation, residual, last activation.

use super::{Beside, ConvLast};
use crate::elementwise::math::{hard_swish, silu};
use crate::elementwise::{Unary, apply_slice};
use crate::loops::Shared;
use crate::simd::{Kernel, Simd, dispatch};

/// The steps after the sums, with the frequent activations told apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Epilogue<'a> {
    bias: Option<&'a [f32]>,
    activation: Act,
    /// Row-major memory of the shape of the result.
    residual: Option<Shared<f32>>,
    last: Act,
    steps: Steps,
}

/// The combinations that tiles finish without asking again for every vector.
#[derive(Debug, Clone, Copy)]
enum Steps {
    /// The activation is a clip, or none; nothing follows.
    Clip([f32; 2]),
    /// The activation is a hard swish; nothing follows.
    HardSwish([f32; 3]),
    /// The activation is a SiLU; nothing follows.
    Silu,
    /// A clip, a residual and another clip, where each clip may be none.
    Residual(Shared<f32>, [[f32; 2]; 2]),
    /// Others in registers.
    Registers,
    /// Something that works on memory.
    Memory,
}

impl Steps {
    fn of(activation: Act, residual: Option<Shared<f32>>, last: Act) -> Steps {
        let clip = |act: Act| match act {
            Act::None => Some([f32::NEG_INFINITY, f32::INFINITY]),
            Act::Clip(lo, hi) => Some([lo, hi]),
            Act::HardSwish(_) | Act::Silu | Act::Other(_) => None,
        };
        match (activation, residual, last) {
            (Act::Other(_), ..) | (.., Act::Other(_)) => Steps::Memory,
            (Act::HardSwish(parameters), None, Act::None) => Steps::HardSwish(parameters),
            (Act::Silu, None, Act::None) => Steps::Silu,
            (_, None, Act::None) => clip(activation).map_or(Steps::Registers, Steps::Clip),
            (_, Some(residual), _) => match (clip(activation), clip(last)) {
                (Some(first), Some(last)) => Steps::Residual(residual, [first, last]),
                _ => Steps::Registers,
            },
            _ => Steps::Registers,
        }
    }
}

/// An activation.
#[derive(Debug, Clone, Copy)]
enum Act {
    None,
    /// `min(max(x, lo), hi)`, in registers.
    Clip(f32, f32),
    /// [`Unary::HardSwish`] with its parameters, in registers.
    HardSwish([f32; 3]),
    /// [`Unary::Silu`], in registers.
    Silu,
    /// Any other, on numbers in memory.
    Other(Unary),
}

impl Act {
    fn of(op: Option<Unary>) -> Act {
        match op {
            None | Some(Unary::Identity) => Act::None,
            Some(Unary::Relu) => Act::Clip(0.0, f32::INFINITY),
            Some(Unary::Relu6) => Act::Clip(0.0, 6.0),
            Some(Unary::Clip { lo, hi }) => Act::Clip(lo, hi),
            Some(Unary::HardSwish { from, alpha, beta }) => Act::HardSwish([from, alpha, beta]),
            Some(Unary::Silu) => Act::Silu,
            Some(op) => Act::Other(op),
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, s: S, x: S::F) -> S::F {
        match self {
            // NaN stays: it is the second operand.
            Act::Clip(lo, hi) => s.min(s.splat(hi), s.max(s.splat(lo), x)),
            Act::HardSwish(parameters) => hard_swish(s, x, parameters),
            Act::Silu => silu(s, x),
            Act::None | Act::Other(_) => x,
        }
    }

    fn slice(self, x: &mut [f32]) {
        match self {
            Act::None => {}
            Act::Clip(lo, hi) => apply_slice(Unary::Clip { lo, hi }, x),
            Act::HardSwish([from, alpha, beta]) => apply_slice(Unary::HardSwish { from, alpha, beta }, x),
            Act::Silu => apply_slice(Unary::Silu, x),
            Act::Other(op) => apply_slice(op, x),
        }
    }
}

/// Where vector `v` of some outputs begins among them, and how many of the `there` outputs it has.
#[inline(always)]
fn part_of<S: Simd>(v: usize, there: usize) -> (usize, usize) {
    let beside = v * S::LANES;
    (beside, there.saturating_sub(beside).min(S::LANES))
}

impl<'a> Epilogue<'a> {
    /// The epilogue of a call whose result is `len` numbers at `y`.
    pub(super) fn new(conv: &ConvLast<'a>, y: Shared<f32>, len: usize) -> Self {
        let residual = match conv.residual {
            Beside::None => None,
            Beside::In(data) => {
                assert_eq!(data.len(), len, "conv: residual shape");
                Some(Shared::of(data.as_ptr()))
            }
            Beside::Result => Some(y),
        };
        let (activation, last) = (Act::of(conv.activation), Act::of(conv.last));
        Epilogue {
            bias: conv.bias,
            activation,
            residual,
            last,
            steps: Steps::of(activation, residual, last),
        }
    }

    /// Nothing follows.
    pub(super) fn none() -> Self {
        Epilogue {
            bias: None,
            activation: Act::None,
            residual: None,
            last: Act::None,
            steps: Steps::of(Act::None, None, Act::None),
        }
    }

    /// True when [`Epilogue::put`] takes all of it, so that nothing has to go through memory.
    #[inline(always)]
    pub(super) fn in_registers(&self) -> bool {
        !matches!(self.steps, Steps::Memory)
    }

    /// Finishes the sums of outputs `output..`, of which `there` are there, of `R` pixels; the first pixel's go to element `at` of
    /// the result `y`, the next one's `line` behind.
    ///
    /// # Safety
    /// Bias, result and residual have these elements, and they are this thread's.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        sums: [[S::F; V]; R],
        outputs: (usize, usize),
        place: (Shared<f32>, usize, usize),
    ) {
        let whole = outputs.1 == V * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            match self.steps {
                Steps::Clip(_) | Steps::HardSwish(_) | Steps::Silu | Steps::Residual(..) if whole => {
                    self.finish_in_registers::<S, R, V, false>(s, sums, outputs, place);
                }
                Steps::Clip(_) | Steps::Residual(..) => {
                    self.finish_in_registers::<S, R, V, true>(s, sums, outputs, place);
                }
                _ => self.finish_in_memory(s, sums, outputs, place),
            }
        }
    }

    /// [`Epilogue::finish`] for frequent steps: any of those told apart where all lanes are outputs, and, where `PART`, a clip or a
    /// residual. It is compiled for every size of tile, so it has no more than pays.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with iterators the sums leave their registers
    unsafe fn finish_in_registers<S: Simd, const R: usize, const V: usize, const PART: bool>(
        &self,
        s: S,
        sums: [[S::F; V]; R],
        (output, there): (usize, usize),
        (y, at, line): (Shared<f32>, usize, usize),
    ) {
        let mut counts = [S::LANES; V];
        for (v, count) in counts.iter_mut().enumerate() {
            *count = part_of::<S>(v, there).1;
        }
        let mut vectors = [s.zero(); V];
        if let Some(bias) = self.bias {
            for (v, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: the caller's.
                *vector = unsafe {
                    s.load_some::<PART>(bias.as_ptr().wrapping_add(output + v * S::LANES), counts[v])
                };
            }
        }
        let bias = vectors;
        let clip = |[lo, hi]: [f32; 2]| [s.splat(lo), s.splat(hi)];
        // NaN stays: it is the second operand.
        let clipped = |[lo, hi]: [S::F; 2], x: S::F| s.min(hi, s.max(lo, x));
        let place = |r: usize, v: usize| (at + r * line + v * S::LANES) as isize;
        macro_rules! each {
            ($x:ident, $at:ident, $count:ident => $value:expr) => {
                for r in 0..R {
                    for v in 0..V {
                        let ($x, $at, $count) = (s.add(sums[r][v], bias[v]), place(r, v), counts[v]);
                        let value = $value;
                        // SAFETY: the caller's.
                        unsafe { s.store_some::<PART>(y.at($at), value, $count) };
                    }
                }
            };
        }
        match self.steps {
            Steps::Clip(range) => {
                let range = clip(range);
                each!(x, at, count => clipped(range, x));
            }
            Steps::HardSwish(parameters) if !PART => each!(x, at, count => hard_swish(s, x, parameters)),
            Steps::Silu if !PART => each!(x, at, count => silu(s, x)),
            Steps::Residual(residual, [first, last]) => {
                let (first, last) = (clip(first), clip(last));
                each!(x, at, count => {
                    // SAFETY: the caller's.
                    let beside = unsafe { s.load_some::<PART>(residual.at(at), count) };
                    clipped(last, s.add(clipped(first, x), beside))
                });
            }
            _ => unreachable!("asked before"),
        }
    }

    /// Finishes `LANES` sums of outputs `output..` and stores them at element `at` of the result `y`.
    ///
    /// # Safety
    /// Bias, result and residual have these elements, and they are this thread's.
    #[inline(always)]
    pub(super) unsafe fn put<S: Simd>(&self, s: S, mut sum: S::F, output: usize, y: Shared<f32>, at: usize) {
        if let Some(bias) = self.bias {
            // SAFETY: the caller's.
            sum = s.add(sum, unsafe { s.load(bias.as_ptr().add(output)) });
        }
        sum = self.activation.vector(s, sum);
        if let Some(residual) = self.residual {
            // SAFETY: the caller's.
            sum = s.add(sum, unsafe { s.load(residual.at(at as isize)) });
        }
        sum = self.last.vector(s, sum);
        // SAFETY: the caller's.
        unsafe { s.store(y.at(at as isize), sum) };
    }

    /// [`Epilogue::finish`] for any epilogue: activations work on memory.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn finish_in_memory<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        sums: [[S::F; V]; R],
        outputs: (usize, usize),
        place: (Shared<f32>, usize, usize),
    ) {
        // A tile has 24 vectors at most, of sixteen lanes.
        let mut memory = [0.0; 24 * 16];
        let line = V * S::LANES;
        assert!(R * line <= memory.len(), "conv: a tile");
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: vector `v` of line `r` of the tile.
                unsafe { s.store(memory.as_mut_ptr().add(r * line + v * S::LANES), *sum) };
            }
        }
        // Once for all sizes of tiles.
        dispatch(InMemory {
            epilogue: self,
            tile: &mut memory[..R * line],
            line,
            outputs,
            place,
        });
    }

    /// Finishes the sums of outputs `output..` of one pixel and stores them at element `at` of the result `y`.
    ///
    /// # Safety
    /// Result and residual have these elements, and they are this thread's.
    pub(super) unsafe fn put_slice(&self, sums: &mut [f32], output: usize, y: Shared<f32>, at: usize) {
        if let Some(bias) = self.bias {
            sums.iter_mut()
                .zip(&bias[output..])
                .for_each(|(sum, b)| *sum += b);
        }
        self.activation.slice(sums);
        if let Some(residual) = self.residual {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's.
                *sum += unsafe { *residual.at((at + i) as isize) };
            }
        }
        self.last.slice(sums);
        for (i, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { *y.at((at + i) as isize) = *sum };
        }
    }
}

/// Sums in lines of `line` numbers, finished by an epilogue. Made by [`Epilogue::finish_in_memory`] alone, on its caller's word.
struct InMemory<'a> {
    epilogue: &'a Epilogue<'a>,
    tile: &'a mut [f32],
    line: usize,
    /// The first output, and how many of a line there are.
    outputs: (usize, usize),
    /// The result, the element of the first line, and the way to the next one.
    place: (Shared<f32>, usize, usize),
}

impl Kernel for InMemory<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ((output, there), (y, at, step)) = (self.outputs, self.place);
        let (epilogue, lines) = (self.epilogue, self.tile.len() / self.line);
        let vectors = self.line / S::LANES;
        for r in 0..lines {
            for v in 0..vectors {
                let (beside, count) = part_of::<S>(v, there);
                let sum = self.tile[r * self.line + beside..].as_mut_ptr();
                if let Some(bias) = epilogue.bias {
                    // SAFETY: a vector of the tile, and as many biases as there are outputs.
                    unsafe {
                        let bias = s.load_part(bias.as_ptr().wrapping_add(output + beside), count);
                        s.store(sum, s.add(s.load(sum), bias));
                    }
                }
            }
        }
        epilogue.activation.slice(self.tile);
        if let Some(residual) = epilogue.residual {
            for r in 0..lines {
                for v in 0..vectors {
                    let (beside, count) = part_of::<S>(v, there);
                    let sum = self.tile[r * self.line + beside..].as_mut_ptr();
                    let from = residual.at((at + r * step + beside) as isize);
                    // SAFETY: as above; the residual has the outputs.
                    unsafe { s.store(sum, s.add(s.load(sum), s.load_part(from, count))) };
                }
            }
        }
        epilogue.last.slice(self.tile);
        for (r, line) in self.tile.chunks_exact(self.line).enumerate() {
            let to = y.at((at + r * step) as isize);
            // SAFETY: these outputs exist and are this thread's; the tile is memory of its own.
            unsafe { to.copy_from_nonoverlapping(line.as_ptr(), there) };
        }
    }
}
