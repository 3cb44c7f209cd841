//! Convolution as a blocked product: output positions are lanes, gathered panel by panel from the input.

use super::Call;
use crate::gemm::{Gemm, Rows, block_space, panel_width};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::weights::{Lines, Storage};
use std::ops::Range;

/// Output channels multiplied together.
const ROW_BLOCK: usize = 48;

/// Elements of gathered panels in one job; they should stay in the second-level cache.
const PANEL_ELEMENTS: usize = 48 * 1024;

/// Most panels in one job.
const PANELS: usize = 8;

/// No lane is wider than this.
const WIDEST: usize = 32;

pub(super) fn run(pool: &Pool, call: &Call<'_>, scratch: &mut Scratch) {
    let width = panel_width();
    let k = call.weights.cols();
    let positions: usize = call.y_dims[2..].iter().product();
    let panels = positions.div_ceil(width);
    let together = (PANEL_ELEMENTS / (k * width).max(1)).clamp(1, PANELS).min(panels);
    let blocks = panels.div_ceil(together);
    let planes = call.y_dims[0] * call.params.groups;
    // With few positions the output channels are split as well, at the price of gathering twice.
    let wanted = pool.threads() * 3;
    let parts = wanted
        .div_ceil(planes * blocks)
        .min(call.outputs.div_ceil(ROW_BLOCK))
        .max(1);
    let each = together * width * k + ROW_BLOCK * together * width + block_space(ROW_BLOCK);
    let each = each.next_multiple_of(16);
    let (_, work) = scratch.with_own(0, pool.threads(), each);
    pool.run_indexed(planes * blocks * parts, &|worker, job| {
        // SAFETY: each worker has its own part.
        let work = unsafe { work.of(worker) };
        let (part, job) = (job % parts, job / parts);
        let (block, plane) = (job % blocks, job / blocks);
        let outputs = call.outputs * part / parts..call.outputs * (part + 1) / parts;
        let start = block * together * width;
        let lanes = start..(start + together * width).min(positions);
        positions_of(
            call,
            (plane / call.params.groups, plane % call.params.groups),
            lanes,
            outputs,
            work,
        );
    });
}

/// Output channels `outputs` of a group at positions `lanes`.
fn positions_of(
    call: &Call<'_>,
    (sample, group): (usize, usize),
    lanes: Range<usize>,
    outputs: Range<usize>,
    work: &mut [f32],
) {
    let (width, k) = (panel_width(), call.weights.cols());
    let count = lanes.len().div_ceil(width);
    let (panels, rest) = work.split_at_mut(count * width * k);
    let (c, space) = rest.split_at_mut(ROW_BLOCK * count * width);
    for (p, panel) in panels.chunks_exact_mut((width * k).max(1)).enumerate() {
        let first = lanes.start + p * width;
        gather(
            call,
            (sample, group),
            first..(first + width).min(lanes.end),
            panel,
        );
    }
    let line = count * width;
    let top = group * call.outputs;
    let rows = match call.weights.storage() {
        Storage::F32(data) => {
            let first = data.f32()[top * k..].as_ptr();
            Rows::Dense {
                first: Shared::of(first),
                stride: k as isize,
            }
        }
        _ => Rows::Part {
            weights: call.weights,
            first: (top, 0),
        },
    };
    let mut row = outputs.start;
    while row < outputs.end {
        let block = row..(row + ROW_BLOCK).min(outputs.end);
        let gemm = Gemm {
            panels,
            k,
            rows,
            then: Lines::default(),
            pairs: false,
        };
        // SAFETY: the rows of the group, `k` elements each.
        unsafe { gemm.block(block.clone(), 0..count, c, space) };
        for (o, values) in block.clone().zip(c.chunks_exact_mut(line)) {
            // SAFETY: these channels and positions belong to this thread.
            unsafe { call.finish((sample, top + o), lanes.start, &mut values[..lanes.len()]) };
        }
        row = block.end;
    }
}

/// The inputs of positions `lanes` of one group, as a panel `[channel][cell][lane]`, zeros for padding.
fn gather(call: &Call<'_>, (sample, group): (usize, usize), lanes: Range<usize>, panel: &mut [f32]) {
    let (params, width) = (&call.params, panel_width());
    let cells: usize = params.kernel.iter().product();
    let [_, _, _, high, wide] = call.y_dims;
    let steps = call.x_steps;
    let base = sample as isize * steps[0] + (group * call.channels) as isize * steps[1];
    for cell in 0..cells {
        let inside = [
            cell / (params.kernel[1] * params.kernel[2]),
            cell / params.kernel[2] % params.kernel[1],
        ];
        let inside = [inside[0], inside[1], cell % params.kernel[2]];
        let mut offsets: [Option<isize>; WIDEST] = [None; WIDEST];
        for (lane, offset) in lanes.clone().zip(&mut offsets) {
            let at = [lane / (high * wide), lane / wide % high, lane % wide];
            *offset = (0..3).try_fold(0, |sum, a| {
                let place = super::input_position(at[a], inside[a], params, a, call.x_dims[a + 2])?;
                Some(sum + place as isize * steps[a + 2])
            });
        }
        let offsets = &offsets[..width];
        let first = offsets[0].unwrap_or(0);
        let dense = offsets
            .iter()
            .enumerate()
            .all(|(i, offset)| *offset == Some(first + i as isize));
        for c in 0..call.channels {
            let line = &mut panel[(c * cells + cell) * width..][..width];
            let from = call.x.at(base + c as isize * steps[1]);
            if dense {
                // SAFETY: every offset was made from a position inside the input, and they follow each other.
                line.copy_from_slice(unsafe {
                    std::slice::from_raw_parts(from.wrapping_offset(first), width)
                });
                continue;
            }
            for (value, offset) in line.iter_mut().zip(offsets) {
                // SAFETY: as above.
                *value = offset.map_or(0.0, |offset| unsafe { *from.wrapping_offset(offset) });
            }
        }
    }
}
