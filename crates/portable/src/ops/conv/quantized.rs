//! `conv_quantized`: a convolution whose weights are `weight * quant_scale + quant_bias`.

use super::{Geometry, check_bias, window_conv};
use crate::error::OpResult;
use crate::layout::elements;
use crate::lower::OpCx;

/// Lowers `conv_quantized`; weights, scales and offsets are constants.
pub fn lower_quantized(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, w) = (cx.value("x")?, cx.value("weight")?);
    let bias = cx.optional("bias")?;
    match cx.text("quantization_type")?.as_deref() {
        Some("linear") => {}
        other => return Err(format!("quantization_type {other:?} is not linear").into()),
    }
    let (have, weight) = (cx.shape(x), cx.shape(w));
    let Geometry { params, shape } = Geometry::read(cx, &have, &weight)?;
    check_bias(cx, bias, weight[0])?;
    let quantized = cx.floats("weight")?.ok_or("parameter \"weight\" is missing")?;
    let scale = per_row(cx, "quant_scale", weight[0])?;
    let offset = per_row(cx, "quant_bias", weight[0])?;
    let cols = elements(&weight[1..]).max(1);
    let rows = quantized.chunks(cols).zip(scale.iter().zip(&offset));
    let dense: Vec<f32> = rows
        .flat_map(|(row, (s, o))| row.iter().map(move |q| q * s + o))
        .collect();
    let w = cx.add_f32(cx.dtype(x), &weight, dense);
    let bias = match bias {
        Some(b) => Some(cx.cast(b, cx.dtype(x))?),
        None => None,
    };
    let y = window_conv(cx, (x, w, bias), params, &shape)?;
    cx.result(y)
}

/// One number an output channel; a single number counts for all.
fn per_row(cx: &mut OpCx<'_, '_>, param: &str, rows: usize) -> OpResult<Vec<f32>> {
    match cx.floats(param)? {
        Some(v) if v.len() == rows => Ok(v),
        Some(v) if v.len() == 1 => Ok(vec![v[0]; rows]),
        Some(v) => Err(format!("{param} needs 1 or {rows} elements, it has {}", v.len()).into()),
        None => Err(format!("parameter {param:?} is missing").into()),
    }
}
