//! Convolution of single channels: a padded copy of the plane, then sums of shifted rows.

use super::Call;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch};

/// The padded plane. A row is kept as `stride` rows, each with every `stride`-th element, so that the inputs of
/// neighbouring outputs lie side by side.
#[derive(Debug, Clone, Copy)]
struct Plane {
    rows: usize,
    /// Elements of one of the parts of a row, with room for a vector past the end.
    part: usize,
    /// Parts of a row.
    parts: usize,
}

pub(super) fn run(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) {
    let params = &call.params;
    let [_, _, _, high, wide] = call.y_dims;
    let parts = params.stride[2];
    // The last vector of a row may begin at any of its outputs.
    let reach = wide + (params.kernel[2] - 1) * params.dilation[2] / parts + 1;
    let plane = Plane {
        rows: (high - 1) * params.stride[1] + (params.kernel[1] - 1) * params.dilation[1] + 1,
        part: reach + 64,
        parts,
    };
    let line = (wide + 64).next_multiple_of(16);
    let each = (plane.rows * plane.part * parts + line + call.weights.cols()).next_multiple_of(16);
    let (_, work) = scratch.with_own(0, pool.threads(), each);
    let jobs = call.x_dims[0] * call.x_dims[1];
    pool.run_indexed(jobs, &|worker, job| {
        // SAFETY: each worker has its own part.
        let work = unsafe { work.of(worker) };
        channel(call, &plane, (job / call.x_dims[1], job % call.x_dims[1]), work);
    });
}

/// All outputs of one input channel.
fn channel(call: &Call<'_>, plane: &Plane, (n, c): (usize, usize), work: &mut [f32]) {
    let size = plane.rows * plane.part * plane.parts;
    let (padded, rest) = work.split_at_mut(size);
    let (weights, line) = rest.split_at_mut(call.weights.cols());
    fill(call, plane, (n, c), padded);
    let [_, _, _, high, wide] = call.y_dims;
    let params = &call.params;
    for o in c * call.outputs..(c + 1) * call.outputs {
        call.weights.row(o, weights);
        for y in 0..high {
            dispatch(Line {
                rows: &padded[y * params.stride[1] * plane.part * plane.parts..],
                row_step: params.dilation[1] * plane.part * plane.parts,
                part: plane.part,
                stride: params.stride[2],
                dilation: params.dilation[2],
                cells: [params.kernel[1], params.kernel[2]],
                weights,
                count: wide,
                out: line,
            });
            // SAFETY: this channel belongs to this thread.
            unsafe { call.finish((n, o), y * wide, &mut line[..wide]) };
        }
    }
}

/// Copies a channel between its padding.
fn fill(call: &Call<'_>, plane: &Plane, (n, c): (usize, usize), padded: &mut [f32]) {
    let [_, _, _, high, wide] = call.x_dims;
    let [top, left] = [call.params.pad_before[1], call.params.pad_before[2]];
    let steps = call.x_steps;
    padded.fill(0.0);
    for (row, padded) in padded.chunks_exact_mut(plane.part * plane.parts).enumerate() {
        let Some(y) = row.checked_sub(top).filter(|y| *y < high) else {
            continue;
        };
        let from = call
            .x
            .at(n as isize * steps[0] + c as isize * steps[1] + y as isize * steps[3]);
        for x in 0..wide {
            let at = x + left;
            let to = at % plane.parts * plane.part + at / plane.parts;
            if at / plane.parts >= plane.part {
                break;
            }
            // SAFETY: inside the input.
            padded[to] = unsafe { *from.wrapping_offset(x as isize * steps[4]) };
        }
    }
}

/// One output row: `out[i] = sum weights[cell] * rows[cell's row][cell's part][i + cell's shift]`.
struct Line<'a> {
    rows: &'a [f32],
    row_step: usize,
    part: usize,
    stride: usize,
    dilation: usize,
    cells: [usize; 2],
    weights: &'a [f32],
    count: usize,
    out: &'a mut [f32],
}

impl Kernel for Line<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Line {
            rows,
            row_step,
            part,
            stride,
            dilation,
            cells,
            weights,
            count,
            out,
        } = self;
        let step = 2 * S::LANES;
        // The last input that the last vector reads, which the room behind each part covers.
        let shift = |cell: usize| cell * dilation % stride * part + cell * dilation / stride;
        for i in (0..count).step_by(step) {
            let mut sums = [s.zero(); 2];
            for row in 0..cells[0] {
                for cell in 0..cells[1] {
                    let from = &rows[row * row_step + shift(cell) + i..][..step];
                    let w = s.splat(weights[row * cells[1] + cell]);
                    for (half, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: two vectors.
                        *sum = s.fma(w, unsafe { s.load(from.as_ptr().add(half * S::LANES)) }, *sum);
                    }
                }
            }
            let out = &mut out[i..i + step];
            for (half, sum) in sums.into_iter().enumerate() {
                // SAFETY: two vectors.
                unsafe { s.store(out.as_mut_ptr().add(half * S::LANES), sum) };
            }
        }
    }
}
