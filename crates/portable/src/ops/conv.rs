//! Convolutions. Source: coremltools 9.0, `mil/ops/defs/iOS15/conv.py`, iOS17.

mod chain;
mod computed;
mod last;
mod phases;
mod quantized;
mod transpose;

use crate::error::{OpError, OpResult};
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, opt, req};
use candle_coreml_kernels::{self as kernels, ConvParams, Unary, Weights};
use std::sync::Arc;

pub use chain::ConvChain;
pub use last::ConvLast;
pub(super) use last::{channels_first, channels_last};

/// A convolution with constant weights; the optional second input is a residual added last.
#[derive(Clone)]
pub struct Conv {
    /// `[O, C / groups * kernel]`; transposed: `[C, O / groups * kernel]`.
    pub weights: Weights,
    /// `[O]`.
    pub bias: Option<Arc<[f32]>>,
    /// Applied before the residual.
    pub activation: Option<Unary>,
    /// Window geometry.
    pub params: ConvParams,
    /// Whether it is `conv_transpose`.
    pub transposed: bool,
}

impl std::fmt::Debug for Conv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.params;
        write!(f, "Conv{:?} stride {:?} groups {}", p.kernel, p.stride, p.groups)?;
        self.activation.map_or(Ok(()), |a| write!(f, "+{a:?}"))
    }
}

impl Op for Conv {
    fn name(&self) -> &'static str {
        if self.transposed { "conv_transpose" } else { "conv" }
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let positions = if self.transposed {
            &inputs[0].shape
        } else {
            &outputs[0].shape
        };
        2 * (elements(positions) * self.weights.cols()) as u64
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let residual = match args.inputs.get(1) {
            Some(In::F32(r)) => Some(*r),
            _ => None,
        };
        let call = kernels::Conv {
            weights: &self.weights,
            bias: self.bias.as_deref(),
            activation: self.activation,
            residual,
            params: self.params,
        };
        if self.transposed {
            kernels::conv_transpose(args.pool, x, &call, y, args.scratch);
        } else {
            kernels::conv(args.pool, x, &call, y, args.scratch);
        }
        Ok(())
    }
}

/// A list of one number a spatial dimension as the last entries of three.
pub(super) fn three(values: &[usize], default: usize) -> [usize; 3] {
    let mut out = [default; 3];
    let from = 3usize.saturating_sub(values.len());
    for (o, &v) in out.iter_mut().skip(from).zip(values) {
        *o = v;
    }
    out
}

pub(super) fn sizes(
    cx: &mut OpCx<'_, '_>,
    param: &str,
    count: usize,
    default: usize,
) -> OpResult<Vec<usize>> {
    let Some(v) = cx.ints(param)? else {
        return Ok(vec![default; count]);
    };
    let v: Vec<usize> = v.iter().filter_map(|&x| usize::try_from(x).ok()).collect();
    if v.len() == count {
        Ok(v)
    } else {
        Err(format!("{param} needs {count} numbers of 0 and more").into())
    }
}

/// Padding before and after each dimension, by the rules of `pad_type`.
pub fn padding(
    cx: &mut OpCx<'_, '_>,
    spatial: &[usize],
    kernel: &[usize],
    stride: &[usize],
    dilation: &[usize],
) -> OpResult<(Vec<usize>, Vec<usize>)> {
    let n = spatial.len();
    let pad_type = cx
        .text("pad_type")?
        .unwrap_or_else(|| "valid".into())
        .to_lowercase();
    let total = |i: usize| {
        let reach = (kernel[i].max(1) - 1) * dilation[i] + 1;
        let out = spatial[i].div_ceil(stride[i].max(1));
        (out.saturating_sub(1) * stride[i] + reach).saturating_sub(spatial[i])
    };
    match pad_type.as_str() {
        "valid" => Ok((vec![0; n], vec![0; n])),
        "custom" => {
            let pad = sizes(cx, "pad", 2 * n, 0)?;
            Ok((
                pad.iter().step_by(2).copied().collect(),
                pad.iter().skip(1).step_by(2).copied().collect(),
            ))
        }
        "same" => Ok((
            (0..n).map(|i| total(i) / 2).collect(),
            (0..n).map(|i| total(i) - total(i) / 2).collect(),
        )),
        "same_lower" => Ok((
            (0..n).map(|i| total(i) - total(i) / 2).collect(),
            (0..n).map(|i| total(i) / 2).collect(),
        )),
        other => Err(format!("pad_type {other:?} is not valid, custom, same or same_lower").into()),
    }
}

/// Kernel, stride, dilation and padding of one use.
pub fn window(
    cx: &mut OpCx<'_, '_>,
    spatial: &[usize],
    kernel: &[usize],
    groups: usize,
) -> OpResult<ConvParams> {
    let n = spatial.len();
    let stride = sizes(cx, "strides", n, 1)?;
    let dilation = sizes(cx, "dilations", n, 1)?;
    if stride.contains(&0) || dilation.contains(&0) {
        return Err("strides and dilations of 0 are not allowed".into());
    }
    let (before, after) = padding(cx, spatial, kernel, &stride, &dilation)?;
    Ok(ConvParams {
        kernel: three(kernel, 1),
        stride: three(&stride, 1),
        dilation: three(&dilation, 1),
        pad_before: three(&before, 0),
        pad_after: three(&after, 0),
        groups,
    })
}

/// Spatial sizes of the result.
pub fn output_sizes(spatial: &[usize], params: &ConvParams) -> OpResult<Shape> {
    let lead = 3 - spatial.len();
    let size = |(i, &d): (usize, &usize)| {
        params
            .output_len(lead + i, d)
            .ok_or_else(|| OpError::new(format!("the window does not fit {spatial:?}")))
    };
    spatial.iter().enumerate().map(size).collect()
}

/// Shapes of a convolution, checked against each other.
struct Geometry {
    params: ConvParams,
    shape: Shape,
}

impl Geometry {
    fn read(cx: &mut OpCx<'_, '_>, have: &[usize], weight: &[usize]) -> OpResult<Geometry> {
        let groups = cx.int("groups")?.unwrap_or(1);
        let groups = usize::try_from(groups).map_err(|_| "groups must be positive")?;
        let fits = have.len() == weight.len()
            && (3..=5).contains(&have.len())
            && groups > 0
            && weight[1].checked_mul(groups) == Some(have[1])
            && weight[0].is_multiple_of(groups);
        if !fits {
            return Err(format!("x {have:?} does not fit weight {weight:?} in {groups} groups").into());
        }
        let params = window(cx, &have[2..], &weight[2..], groups)?;
        let mut shape: Shape = smallvec::smallvec![have[0], weight[0]];
        shape.extend(output_sizes(&have[2..], &params)?);
        Ok(Geometry { params, shape })
    }
}

fn lower_conv(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, w) = (cx.value("x")?, cx.value("weight")?);
    let bias = cx.optional("bias")?;
    let (have, weight) = (cx.shape(x), cx.shape(w));
    let Geometry { params, shape } = Geometry::read(cx, &have, &weight)?;
    check_bias(cx, bias, weight[0])?;
    // Rows and columns mean a picture; anything else is the [1, C, 1, S] of language models, a matrix.
    let picture = have.len() == 4 && have[2] > 1 && have[3] > 1;
    let pointwise = !picture
        && elements(&weight[2..]) == 1
        && params.groups == 1
        && params.stride == [1; 3]
        && params.pad_before == [0; 3]
        && params.pad_after == [0; 3];
    let y = if pointwise {
        pointwise_conv(cx, x, w, bias)?
    } else if let Some(y) = last::lower(cx, (x, w, bias), &params)? {
        y
    } else {
        window_conv(cx, (x, w, bias), params, &shape)?
    };
    cx.result(y)
}

fn check_bias(cx: &OpCx<'_, '_>, bias: Option<ValueId>, channels: usize) -> OpResult<()> {
    match bias.map(|b| cx.shape(b)) {
        Some(shape) if elements(&shape) != channels => {
            Err(format!("bias {:?} needs {channels} elements", shape.as_slice()).into())
        }
        _ => Ok(()),
    }
}

/// A 1x1 convolution is a matrix product over channels: channels go last and come back, both without moving anything.
fn pointwise_conv(cx: &mut OpCx<'_, '_>, x: ValueId, w: ValueId, bias: Option<ValueId>) -> OpResult<ValueId> {
    let rank = cx.shape(x).len();
    let mut last: Shape = smallvec::smallvec![0];
    last.extend(2..rank);
    last.push(1);
    let mut back: Shape = smallvec::smallvec![0, rank - 1];
    back.extend(1..rank - 1);
    let rows = cx.permute(x, &last)?;
    let y = cx.linear(rows, w, bias)?;
    cx.permute(y, &back)
}

fn window_conv(
    cx: &mut OpCx<'_, '_>,
    (x, w, bias): (ValueId, ValueId, Option<ValueId>),
    params: ConvParams,
    shape: &[usize],
) -> OpResult<ValueId> {
    emit_conv(cx, (x, w, bias), params, shape, false)
}

/// Adds the node of a convolution, or of its transpose, into a value of shape `shape`.
fn emit_conv(
    cx: &mut OpCx<'_, '_>,
    (x, w, bias): (ValueId, ValueId, Option<ValueId>),
    params: ConvParams,
    shape: &[usize],
    transposed: bool,
) -> OpResult<ValueId> {
    let weight = cx.shape(w);
    let dtype = cx.dtype(x);
    let constant = match bias {
        None => Some(None),
        Some(b) => cx.constant(b).map(|c| Some(c.dense())),
    };
    let known_bias = constant.clone().flatten();
    let y = match cx.weights(w, weight[0], elements(&weight[1..]))? {
        Some(weights) => {
            let op = Conv {
                weights,
                bias: known_bias,
                activation: None,
                params,
                transposed,
            };
            cx.emit(op, &[x], dtype, shape)?
        }
        None => {
            let op = computed::ComputedConv {
                bias: known_bias,
                params,
                transposed,
            };
            cx.emit(op, &[x, w], dtype, shape)?
        }
    };
    match (constant, bias) {
        (None, Some(b)) => {
            let mut wide: Shape = smallvec::smallvec![1; shape.len() - 1];
            wide[0] = shape[1];
            let b = cx.reshape(b, &wide)?;
            cx.binary(kernels::Binary::Add, y, b)
        }
        _ => Ok(y),
    }
}

macro_rules! row {
    ($name:literal, $support:expr, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "conv",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: $support,
            tolerance: 1e-5,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "conv",
        Support::Full,
        &[
            req("x"),
            req("weight"),
            opt("bias"),
            opt("strides"),
            opt("pad_type"),
            opt("pad"),
            opt("dilations"),
            opt("groups"),
        ],
        lower_conv
    ),
    row!(
        "conv_quantized",
        Support::Partial("quantization_type lut, for which the operator has no table"),
        &[
            req("x"),
            req("weight"),
            opt("bias"),
            req("quantization_type"),
            opt("nbits"),
            req("quant_scale"),
            req("quant_bias"),
            opt("strides"),
            opt("pad_type"),
            opt("pad"),
            opt("dilations"),
            opt("groups"),
        ],
        quantized::lower_quantized
    ),
    row!(
        "conv_transpose",
        Support::Full,
        &[
            req("x"),
            req("weight"),
            opt("bias"),
            opt("pad"),
            opt("output_shape"),
            opt("pad_type"),
            opt("strides"),
            opt("dilations"),
            opt("groups"),
        ],
        transpose::lower_transpose
    ),
];
