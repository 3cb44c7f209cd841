//! `quantize` and `dequantize`. Source: coremltools 9.0, `mil/ops/defs/iOS17/quantization_ops.py`.

use crate::error::OpResult;
use crate::graph::ValueId;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, opt, req};
use candle_coreml_kernels::{Binary, Unary};
use candle_coreml_mil::DType;

/// A scale or zero point so that it broadcasts over `rank` dimensions: a vector lies along `axis`.
fn along_axis(cx: &mut OpCx<'_, '_>, p: ValueId, like: &[usize]) -> OpResult<ValueId> {
    let have = cx.shape(p);
    if have.is_empty() {
        return Ok(p);
    }
    let axis = cx.axis("axis", like.len(), None)?;
    if have.as_slice() != [like[axis]] {
        let have = have.as_slice();
        return Err(format!("scale and zero_point {have:?} do not fit axis {axis} of {like:?}").into());
    }
    let mut wide: Shape = smallvec::smallvec![1; like.len()];
    wide[axis] = like[axis];
    cx.reshape(p, &wide)
}

fn lower_quantize(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, scale) = (cx.value("input")?, cx.value("scale")?);
    let shape = cx.shape(x);
    let (to, low, high) = match cx.text("output_dtype")?.as_deref() {
        Some("int8") => (DType::Int8, -128.0, 127.0),
        Some("uint8") => (DType::Uint8, 0.0, 255.0),
        other => return Err(format!("output_dtype {other:?} is not int8 or uint8").into()),
    };
    // In 32 bits throughout: a quotient of fp16 numbers is not rounded to fp16 before it is rounded to an integer.
    let wide = cx.cast(x, DType::Fp32)?;
    let scale = cx.cast(scale, DType::Fp32)?;
    let scale = along_axis(cx, scale, &shape)?;
    let quotient = cx.binary(Binary::Div, wide, scale)?;
    let mut q = cx.unary(Unary::Round, quotient)?;
    if let Some(zero) = cx.optional("zero_point")? {
        let zero = cx.cast(zero, DType::Fp32)?;
        let zero = along_axis(cx, zero, &shape)?;
        q = cx.binary(Binary::Add, q, zero)?;
    }
    let q = cx.unary(Unary::Clip { lo: low, hi: high }, q)?;
    let y = cx.cast(q, to)?;
    cx.result(y)
}

fn lower_dequantize(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, scale) = (cx.value("input")?, cx.value("scale")?);
    let (shape, dtype) = (cx.shape(x), cx.dtype(scale));
    let mut y = cx.cast(x, dtype)?;
    if let Some(zero) = cx.optional("zero_point")? {
        let zero = cx.cast(zero, dtype)?;
        let zero = along_axis(cx, zero, &shape)?;
        y = cx.binary(Binary::Sub, y, zero)?;
    }
    let scale = along_axis(cx, scale, &shape)?;
    let y = cx.binary(Binary::Mul, y, scale)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $tolerance:expr, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "quantization_ops",
            since: "iOS17",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: $tolerance,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "dequantize",
        1e-6,
        &[req("input"), opt("zero_point"), req("scale"), opt("axis")],
        lower_dequantize
    ),
    row!(
        "quantize",
        0.0,
        &[
            req("input"),
            opt("zero_point"),
            req("scale"),
            opt("axis"),
            req("output_dtype"),
        ],
        lower_quantize
    ),
];
