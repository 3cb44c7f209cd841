//! Choices. Source: coremltools 9.0, `mil/ops/defs/iOS15/control_flow.py`.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::Layout;
use crate::lower::OpCx;
use crate::op::{Args, Op, OpSpec, Out, Support, req};
use crate::ops::{broadcast_shape, elementwise_binary::elementwise_layout};
use candle_coreml_kernels as kernels;

/// `a` where `cond` holds, `b` elsewhere.
#[derive(Debug)]
pub struct Select;

impl Op for Select {
    fn name(&self) -> &'static str {
        "select"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16
    }

    fn broadcasts(&self) -> bool {
        true
    }

    fn output_layout(&self, inputs: &[&Layout], shape: &[usize]) -> Layout {
        elementwise_layout(inputs, shape)
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let cond = args.i32(0)?;
        match args.outputs.first_mut().and_then(Option::take) {
            Some(Out::F32(y)) => kernels::select_f32(args.pool, cond, args.f32(1)?, args.f32(2)?, y),
            Some(Out::I32(y)) => kernels::select_i32(args.pool, cond, args.i32(1)?, args.i32(2)?, y),
            _ => return Err("internal: select has one result".into()),
        }
        Ok(())
    }
}

fn lower_select(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (cond, a, b) = (cx.value("cond")?, cx.value("a")?, cx.value("b")?);
    let shape = broadcast_shape(&broadcast_shape(&cx.shape(cond), &cx.shape(a))?, &cx.shape(b))?;
    let dtype = cx.dtype(a);
    let y = cx.emit(Select, &[cond, a, b], dtype, &shape)?;
    cx.result(y)
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[&OpSpec {
    name: "select",
    family: "control_flow",
    since: "iOS15",
    inputs: &[req("cond"), req("a"), req("b")],
    outputs: Some(1),
    support: Support::Full,
    tolerance: 0.0,
    lower: lower_select,
}];
