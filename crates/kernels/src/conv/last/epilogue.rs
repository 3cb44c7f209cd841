//! What follows the sums of a convolution: bias, activation, residual, last activation.

use super::{Beside, ConvLast};
use crate::elementwise::{Unary, apply_slice};
use crate::loops::Shared;
use crate::simd::Simd;

/// The steps after the sums, with the frequent activations told apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Epilogue<'a> {
    bias: Option<&'a [f32]>,
    activation: Act,
    /// Row-major memory of the shape of the result.
    residual: Option<Shared<f32>>,
    last: Act,
}

/// An activation.
#[derive(Debug, Clone, Copy)]
enum Act {
    None,
    /// `min(max(x, lo), hi)`, in registers.
    Clip(f32, f32),
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
            Some(op) => Act::Other(op),
        }
    }

    #[inline(always)]
    fn vector<S: Simd>(self, s: S, x: S::F) -> S::F {
        match self {
            // NaN stays: it is the second operand.
            Act::Clip(lo, hi) => s.min(s.splat(hi), s.max(s.splat(lo), x)),
            _ => x,
        }
    }

    fn slice(self, x: &mut [f32]) {
        match self {
            Act::None => {}
            Act::Clip(lo, hi) => apply_slice(Unary::Clip { lo, hi }, x),
            Act::Other(op) => apply_slice(op, x),
        }
    }
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
        Epilogue {
            bias: conv.bias,
            activation: Act::of(conv.activation),
            residual,
            last: Act::of(conv.last),
        }
    }

    /// Nothing follows.
    pub(super) fn none() -> Self {
        Epilogue {
            bias: None,
            activation: Act::None,
            residual: None,
            last: Act::None,
        }
    }

    /// True when [`Epilogue::put`] takes all of it, so that nothing has to go through memory.
    #[inline(always)]
    pub(super) fn in_registers(&self) -> bool {
        !matches!(self.activation, Act::Other(_)) && !matches!(self.last, Act::Other(_))
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

    /// Finishes the sums of several pixels: lines of `line` numbers of which the first `there` are outputs `output..`; the
    /// first pixel's go to element `at` of the result, the next one's `step` behind.
    ///
    /// # Safety
    /// As [`Epilogue::put_slice`], for each line.
    #[allow(clippy::too_many_arguments)] // the geometry of a tile
    pub(super) unsafe fn put_lines(
        &self,
        sums: &mut [f32],
        line: usize,
        there: usize,
        output: usize,
        y: Shared<f32>,
        at: usize,
        step: usize,
    ) {
        if let Some(bias) = self.bias {
            for sums in sums.chunks_exact_mut(line) {
                sums.iter_mut()
                    .zip(&bias[output..output + there])
                    .for_each(|(sum, b)| *sum += b);
            }
        }
        self.activation.slice(sums);
        if let Some(residual) = self.residual {
            for (i, sums) in sums.chunks_exact_mut(line).enumerate() {
                let from = residual.at((at + i * step) as isize);
                for (j, sum) in sums[..there].iter_mut().enumerate() {
                    // SAFETY: the caller's.
                    *sum += unsafe { *from.add(j) };
                }
            }
        }
        self.last.slice(sums);
        for (i, sums) in sums.chunks_exact(line).enumerate() {
            // SAFETY: the caller's; the sums are memory of their own.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), y.at((at + i * step) as isize), there) };
        }
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
