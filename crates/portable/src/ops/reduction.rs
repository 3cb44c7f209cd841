//! Sums, extremes and their places. Source: coremltools 9.0, `mil/ops/defs/iOS15/reduction.py`, iOS17.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, Shape};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, opt, req};
use crate::ops::tensor_transformation::sorted_axes;
use candle_coreml_kernels::{self as kernels, Reduce};
use candle_coreml_mil::DType;

/// A reduction over some dimensions, which are kept with size 1.
#[derive(Debug, Clone)]
pub struct ReduceNode {
    /// What is computed.
    pub kind: Reduce,
    /// Dimensions that go.
    pub axes: Shape,
}

impl Op for ReduceNode {
    fn name(&self) -> &'static str {
        "reduce"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        if let Some(In::I32(x)) = args.inputs.first().copied() {
            let y = args.out_i32(0)?;
            kernels::reduce_i32(args.pool, self.kind, x, &self.axes, y);
        } else {
            let (x, y) = (args.f32(0)?, args.out_f32(0)?);
            kernels::reduce(args.pool, self.kind, x, &self.axes, y);
        }
        Ok(())
    }
}

/// The place of the first greatest or least element along a dimension, which is kept with size 1.
#[derive(Debug, Clone)]
pub struct ArgExtreme {
    max: bool,
    axis: usize,
}

impl Op for ArgExtreme {
    fn name(&self) -> &'static str {
        "arg_extreme"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let y = args.out_i32(0)?;
        match args.inputs.first().copied() {
            Some(In::I32(x)) => kernels::arg_extreme(args.pool, self.max, x, self.axis, y),
            _ => kernels::arg_extreme(args.pool, self.max, args.f32(0)?, self.axis, y),
        }
        Ok(())
    }
}

fn lower_reduce(cx: &mut OpCx<'_, '_>, kind: Reduce) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axes = match cx.ints("axes")? {
        Some(a) => sorted_axes(&a, shape.len())?,
        None => (0..shape.len()).collect(),
    };
    let keep = cx.flag("keep_dims", false)?;
    let kept: Shape = (0..shape.len())
        .map(|i| if axes.contains(&i) { 1 } else { shape[i] })
        .collect();
    let dropped: Shape = (0..shape.len())
        .filter(|i| !axes.contains(i))
        .map(|i| shape[i])
        .collect();
    let dtype = cx.dtype(x);
    let axes: Shape = axes.iter().copied().collect();
    let y = cx.emit(ReduceNode { kind, axes }, &[x], dtype, &kept)?;
    let y = if keep { y } else { cx.reshape(y, &dropped)? };
    cx.result(y)
}

fn lower_arg(cx: &mut OpCx<'_, '_>, max: bool) -> OpResult<()> {
    let x = cx.value("x")?;
    let mut shape = cx.shape(x);
    let axis = cx.axis("axis", shape.len(), Some(-1))?;
    if shape[axis] == 0 {
        return Err("an empty dimension has no extreme".into());
    }
    let keep = cx.flag("keep_dims", false)?;
    let out = match cx.text("output_dtype")?.as_deref() {
        None | Some("int32") => DType::Int32,
        Some("uint16") => DType::Uint16,
        Some(other) => return Err(format!("output_dtype {other:?} is not int32 or uint16").into()),
    };
    shape[axis] = 1;
    let mut y = cx.emit(ArgExtreme { max, axis }, &[x], out, &shape)?;
    if !keep {
        shape.remove(axis);
        y = cx.reshape(y, &shape)?;
    }
    cx.result(y)
}

macro_rules! reduce {
    ($name:literal, $kind:ident) => {
        &OpSpec {
            name: $name,
            family: "reduction",
            since: "iOS15",
            inputs: &[req("x"), opt("axes"), opt("keep_dims")],
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-5,
            lower: |cx| lower_reduce(cx, Reduce::$kind),
        }
    };
}

macro_rules! arg {
    ($name:literal, $max:expr) => {
        &OpSpec {
            name: $name,
            family: "reduction",
            since: "iOS15",
            inputs: &[req("x"), opt("axis"), opt("keep_dims"), opt("output_dtype")],
            outputs: Some(1),
            support: Support::Full,
            tolerance: 0.0,
            lower: |cx| lower_arg(cx, $max),
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    arg!("reduce_argmax", true),
    arg!("reduce_argmin", false),
    reduce!("reduce_l1_norm", L1),
    reduce!("reduce_l2_norm", L2),
    reduce!("reduce_log_sum", LogSum),
    reduce!("reduce_log_sum_exp", LogSumExp),
    reduce!("reduce_max", Max),
    reduce!("reduce_mean", Mean),
    reduce!("reduce_min", Min),
    reduce!("reduce_prod", Prod),
    reduce!("reduce_sum", Sum),
    reduce!("reduce_sum_square", SumSquare),
];
