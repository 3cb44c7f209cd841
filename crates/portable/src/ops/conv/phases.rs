//! Transposed convolutions as convolutions: an output position belongs to one of `stride` phases, and the positions of a phase
//! are a convolution with step 1 of every `stride`-th cell of the window. All phases are computed as channels of one
//! convolution with channels last; then they are laid out side by side.

use super::{ConvLast, ConvParams, channels_first, channels_last};
use crate::constant::Const;
use crate::error::OpResult;
use crate::graph::ValueId;
use crate::layout::elements;
use crate::lower::OpCx;
use candle_coreml_mil::DType;

/// The phases of one spatial dimension.
#[derive(Debug, PartialEq, Eq)]
struct Phases {
    /// How far before a position of `x` the window begins.
    before: usize,
    /// Positions of `x` that the windows of all phases together reach.
    taps: usize,
    /// For each cell of the transposed window and each phase: the tap at which the phase reads the cell.
    tap_of: Vec<Vec<Option<usize>>>,
    /// Positions of the result of each phase.
    each: usize,
}

impl Phases {
    /// For `len` positions of the result; `None` where numbers are out of any use.
    fn new(params: &ConvParams, axis: usize, len: usize) -> Option<Phases> {
        let signed = |n: usize| i64::try_from(n).ok();
        let (stride, dilation) = (signed(params.stride[axis])?, signed(params.dilation[axis])?);
        let pad = signed(params.pad_before[axis])?;
        // Position `stride * q + phase` reads cell `j` where `x` is at `q + offset`.
        let offset = |cell: i64, phase: i64| {
            let at = phase + pad - cell * dilation;
            (at % stride == 0).then(|| at / stride)
        };
        let cells = signed(params.kernel[axis])?;
        let all = || (0..cells).flat_map(|cell| (0..stride).filter_map(move |phase| offset(cell, phase)));
        let (low, high) = (all().min()?.min(0), all().max()?.max(0));
        let tap = |cell, phase| usize::try_from(offset(cell, phase)? - low).ok();
        Some(Phases {
            before: usize::try_from(-low).ok()?,
            taps: usize::try_from(high - low + 1).ok()?,
            tap_of: (0..cells)
                .map(|cell| (0..stride).map(|phase| tap(cell, phase)).collect())
                .collect(),
            each: len.div_ceil(params.stride[axis]),
        })
    }
}

/// The weights `[c, o, cells..]` of the transposed convolution as those of the convolution, `[phase, o, c, taps..]`.
fn rearranged(weights: &[f32], [channels, outputs]: [usize; 2], [rows, columns]: [&Phases; 2]) -> Vec<f32> {
    let (row_phases, column_phases) = (rows.tap_of[0].len(), columns.tap_of[0].len());
    let taps = rows.taps * columns.taps;
    let cells = rows.tap_of.len() * columns.tap_of.len();
    let mut out = vec![0.0; row_phases * column_phases * outputs * channels * taps];
    for (i, row) in rows.tap_of.iter().enumerate() {
        for (j, column) in columns.tap_of.iter().enumerate() {
            let cell = i * columns.tap_of.len() + j;
            for (p, row_tap) in row.iter().enumerate() {
                for (q, column_tap) in column.iter().enumerate() {
                    let (Some(row_tap), Some(column_tap)) = (row_tap, column_tap) else {
                        continue;
                    };
                    let tap = row_tap * columns.taps + column_tap;
                    let first = (p * column_phases + q) * outputs;
                    for o in 0..outputs {
                        for c in 0..channels {
                            out[((first + o) * channels + c) * taps + tap] =
                                weights[(c * outputs + o) * cells + cell];
                        }
                    }
                }
            }
        }
    }
    out
}

/// Multiplications the convolution may have for one of the transposed one: phases of different widths share a window.
const MOST_WASTE: usize = 4;

/// Pairs of a cell and a phase in one dimension. No network has so many; a file may say it has.
const MOST_PAIRS: usize = 1 << 16;

/// Lowers a transposed convolution of sequences or pictures with constant weights in one group into a value of shape `shape`;
/// `None` for others, and where windows are much shorter than steps.
pub(super) fn lower(
    cx: &mut OpCx<'_, '_>,
    (x, w, bias): (ValueId, ValueId, Option<ValueId>),
    params: &ConvParams,
    shape: &[usize],
) -> OpResult<Option<ValueId>> {
    let (have, weight) = (cx.shape(x), cx.shape(w));
    let rank = have.len();
    let (Some(constant), 3..=4, 1) = (cx.constant(w), rank, params.groups) else {
        return Ok(None);
    };
    let bias = match bias.map(|b| cx.constant(b)) {
        None => None,
        Some(Some(bias)) => Some(bias.dense()),
        Some(None) => return Ok(None),
    };
    let (height, width) = if rank == 4 {
        (shape[2], shape[3])
    } else {
        (1, shape[2])
    };
    let phases = params.stride[1].saturating_mul(params.stride[2]);
    let cells = params.kernel[1] * params.kernel[2];
    let small = |axis: usize| params.kernel[axis].saturating_mul(params.stride[axis]) <= MOST_PAIRS;
    if phases > MOST_WASTE * cells || !small(1) || !small(2) {
        return Ok(None);
    }
    let (Some(rows), Some(columns)) = (Phases::new(params, 1, height), Phases::new(params, 2, width)) else {
        return Ok(None);
    };
    let taps = rows.taps.saturating_mul(columns.taps);
    if elements(shape) == 0 || phases.saturating_mul(taps) > MOST_WASTE * cells {
        return Ok(None);
    }
    let (channels, outputs) = (weight[0], weight[1]);
    let data = rearranged(constant.floats(), [channels, outputs], [&rows, &columns]);
    cx.release(&constant);
    let x_height = if rank == 4 { have[2] } else { 1 };
    let after = |p: &Phases, len: usize| (p.each + p.taps - 1).saturating_sub(p.before + len);
    let conv = ConvParams {
        kernel: [1, rows.taps, columns.taps],
        stride: [1; 3],
        dilation: [1; 3],
        pad_before: [0, rows.before, columns.before],
        pad_after: [0, after(&rows, x_height), after(&columns, have[rank - 1])],
        groups: 1,
    };
    let found = [conv.output_len(1, x_height), conv.output_len(2, have[rank - 1])];
    let [Some(found_rows), Some(found_columns)] = found else {
        return Ok(None);
    };
    let all = phases * outputs;
    let matrix = Const::f32(DType::Fp32, &[all, channels * taps], data);
    let packed = matrix.packed(
        (all, channels * taps),
        &conv,
        [found_rows, found_columns],
        cx.arithmetic(),
    )?;
    let op = ConvLast {
        packed,
        bias: bias.map(|b| b.iter().copied().cycle().take(all).collect()),
        activation: None,
        last: None,
    };
    let dtype = cx.dtype(x);
    let x = channels_last(cx, x)?;
    let y = cx.emit(op, &[x], dtype, &[have[0], found_rows, found_columns, all])?;
    let parts = [found_rows, found_columns, params.stride[1], params.stride[2]];
    let y = interleaved(cx, y, parts, outputs)?;
    let y = cx.slice(y, &[0; 4], &[1; 4], &[have[0], height, width, outputs])?;
    channels_first(cx, y, rank).map(Some)
}

/// `[n, h, w, phases * o]` as `[n, h * steps, w * steps, o]`.
fn interleaved(
    cx: &mut OpCx<'_, '_>,
    y: ValueId,
    [h, w, row_phases, column_phases]: [usize; 4],
    outputs: usize,
) -> OpResult<ValueId> {
    let n = cx.shape(y)[0];
    let y = cx.reshape(y, &[n, h, w, row_phases, column_phases, outputs])?;
    let y = cx.permute(y, &[0, 1, 3, 2, 4, 5])?;
    cx.reshape(y, &[n, h * row_phases, w * column_phases, outputs])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(kernel: usize, stride: usize, pad: usize, dilation: usize) -> ConvParams {
        ConvParams {
            kernel: [1, 1, kernel],
            stride: [1, 1, stride],
            dilation: [1, 1, dilation],
            pad_before: [0, 0, pad],
            pad_after: [0; 3],
            groups: 1,
        }
    }

    #[test]
    fn every_cell_of_every_phase_has_its_tap() {
        // (kernel, stride, pad, dilation), (before, taps)
        let rows = [
            ((2, 2, 0, 1), (0, 1)),
            ((4, 2, 1, 1), (1, 3)),
            ((3, 2, 1, 1), (0, 2)),
            ((3, 1, 1, 1), (1, 3)),
            ((16, 8, 4, 1), (1, 3)),
            ((3, 2, 0, 3), (3, 4)),
        ];
        let mut failures = Vec::new();
        for ((kernel, stride, pad, dilation), expected) in rows {
            let made = Phases::new(&params(kernel, stride, pad, dilation), 2, 40).expect("small numbers");
            if (made.before, made.taps) != expected {
                failures.push(format!("{kernel} {stride} {pad} {dilation}: {made:?}"));
            }
            // Position `t` of the result reads cell `j` of `x[(t + pad - j * dilation) / stride]`.
            for t in stride * 4..40 {
                for j in 0..kernel {
                    let at = (t + pad) as i64 - (j * dilation) as i64;
                    let place = (at % stride as i64 == 0).then_some(at / stride as i64);
                    let tap = made.tap_of[j][t % stride];
                    let found = tap.map(|tap| (t / stride + tap) as i64 - made.before as i64);
                    if found != place {
                        failures.push(format!(
                            "{kernel} {stride} {pad} {dilation}, {t} {j}: {found:?} {place:?}"
                        ));
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }
}
