//! Pooling. Source: coremltools 9.0, `mil/ops/defs/iOS15/pool.py`.

use super::conv::{channels_first, channels_last, padding, sizes, three};
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::{Layout, Shape};
use crate::lower::OpCx;
use crate::op::{Args, Op, OpSpec, Param, Support, opt, req};
use candle_coreml_kernels::{self as kernels, ConvParams, Pooling};
use smallvec::smallvec;

/// `y[n, c, ..]` from windows of `x[n, c, ..]`.
#[derive(Debug)]
pub struct Pool {
    kind: Pooling,
    params: ConvParams,
}

impl Op for Pool {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::pool_windows(args.pool, self.kind, x, &self.params, y);
        Ok(())
    }
}

/// `y[n, h, w, c]` from windows of `x[n, h, w, c]`.
#[derive(Debug)]
pub struct PoolLast {
    kind: Pooling,
    params: ConvParams,
}

/// Fewer channels do not fill a vector.
const LEAST_CHANNELS: usize = 4;

impl Op for PoolLast {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && layout.strides.last() == Some(&1)
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::pool_last(args.pool, self.kind, x, &self.params, y);
        Ok(())
    }
}

/// Length of one output dimension. In ceiling mode the last window may reach past the end, but not start there.
fn output_len(padded: usize, kernel: usize, stride: usize, ceil: Option<usize>) -> Option<usize> {
    let room = padded.checked_sub(kernel)?;
    let Some(last_start) = ceil else {
        return Some(room / stride + 1);
    };
    let n = room.div_ceil(stride) + 1;
    let outside = (n - 1) * stride >= last_start;
    Some(if outside { n - 1 } else { n })
}

fn lower_pool(cx: &mut OpCx<'_, '_>, kind: Pooling) -> OpResult<()> {
    let x = cx.value("x")?;
    let have = cx.shape(x);
    if !(3..=5).contains(&have.len()) {
        return Err(format!("x {:?} must have rank 3 to 5", have.as_slice()).into());
    }
    let spatial = &have[2..];
    let n = spatial.len();
    let kernel = sizes(cx, "kernel_sizes", n, 1)?;
    let stride = sizes(cx, "strides", n, 1)?;
    if kernel.contains(&0) || stride.contains(&0) {
        return Err("kernel_sizes and strides of 0 are not allowed".into());
    }
    let (before, after) = padding(cx, spatial, &kernel, &stride, &vec![1; n])?;
    let ceil = cx.flag("ceil_mode", false)?;
    let mut shape: Shape = smallvec![have[0], have[1]];
    for i in 0..n {
        // With padding a window that starts in the padding behind the input is dropped; without it there is none.
        let start = if before[i] + after[i] > 0 {
            spatial[i] + before[i]
        } else {
            usize::MAX
        };
        let padded = spatial[i] + before[i] + after[i];
        let len = output_len(padded, kernel[i], stride[i], ceil.then_some(start));
        shape.push(
            len.ok_or_else(|| OpError::new(format!("the window {kernel:?} does not fit {spatial:?}")))?,
        );
    }
    let params = ConvParams {
        kernel: three(&kernel, 1),
        stride: three(&stride, 1),
        pad_before: three(&before, 0),
        pad_after: three(&after, 0),
        ..ConvParams::default()
    };
    let dtype = cx.dtype(x);
    if have.len() > 4 || have[1] < LEAST_CHANNELS {
        let y = cx.emit(Pool { kind, params }, &[x], dtype, &shape)?;
        return cx.result(y);
    }
    let x = channels_last(cx, x)?;
    let height = if n == 2 { shape[2] } else { 1 };
    let last = [shape[0], height, shape[n + 1], shape[1]];
    let y = cx.emit(PoolLast { kind, params }, &[x], dtype, &last)?;
    let y = channels_first(cx, y, have.len())?;
    cx.result(y)
}

fn lower_avg(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let count_include_pad = !cx.flag("exclude_padding_from_average", false)?;
    lower_pool(cx, Pooling::Average { count_include_pad })
}

const PARAMS: [Param; 6] = [
    req("x"),
    req("kernel_sizes"),
    opt("strides"),
    req("pad_type"),
    opt("pad"),
    opt("ceil_mode"),
];

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "pool",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-6,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "avg_pool",
        &[
            req("x"),
            req("kernel_sizes"),
            opt("strides"),
            req("pad_type"),
            opt("pad"),
            opt("ceil_mode"),
            opt("exclude_padding_from_average"),
        ],
        lower_avg
    ),
    row!("l2_pool", &PARAMS, |cx| lower_pool(cx, Pooling::L2)),
    row!("max_pool", &PARAMS, |cx| lower_pool(cx, Pooling::Max)),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceiling_mode_keeps_windows_that_start_inside() {
        // (padded, kernel, stride, ceiling with the last start) -> length
        let rows = [
            ((7, 2, 2, None), Some(3)),
            ((7, 2, 2, Some(usize::MAX)), Some(4)),
            ((7, 2, 4, Some(6)), Some(2)),
            ((6, 1, 4, Some(4)), Some(2)),
            ((2, 3, 1, None), None),
        ];
        for ((padded, kernel, stride, ceil), want) in rows {
            assert_eq!(
                output_len(padded, kernel, stride, ceil),
                want,
                "{padded} {kernel} {stride}"
            );
        }
    }
}
