//! Activations. Source: coremltools 9.0, `mil/ops/defs/iOS15/activation.py`, iOS17.

use crate::error::OpResult;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, opt, req};
use candle_coreml_kernels::{Binary, Unary};

fn number(cx: &mut OpCx<'_, '_>, name: &str, default: f32) -> OpResult<f32> {
    Ok(cx.float(name)?.unwrap_or(default))
}

fn lower_gelu(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let mode = cx.text("mode")?.unwrap_or_else(|| "EXACT".into());
    let kernel = match mode.as_str() {
        "EXACT" => Unary::GeluExact,
        "TANH_APPROXIMATION" => Unary::GeluTanh,
        "SIGMOID_APPROXIMATION" => Unary::GeluSigmoid,
        _ => {
            return Err(
                format!("mode {mode:?} is not EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION").into(),
            );
        }
    };
    let y = cx.unary(kernel, x)?;
    cx.result(y)
}

/// A per-channel parameter of shape [C] as [C, 1, ..] so that it broadcasts over `[N, C, ..]`.
fn per_channel(cx: &mut OpCx<'_, '_>, name: &str, rank: usize) -> OpResult<crate::graph::ValueId> {
    let p = cx.value(name)?;
    let n = cx.shape(p).iter().product();
    let mut shape = vec![1; rank.saturating_sub(1)];
    match shape.first_mut() {
        Some(first) => *first = n,
        None => return Ok(p),
    }
    cx.reshape(p, &shape)
}

fn lower_prelu(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let alpha = per_channel(cx, "alpha", cx.shape(x).len())?;
    let positive = cx.unary(Unary::Relu, x)?;
    let negative = cx.binary(Binary::Sub, x, positive)?;
    let scaled = cx.binary(Binary::Mul, negative, alpha)?;
    let y = cx.binary(Binary::Add, positive, scaled)?;
    cx.result(y)
}

fn lower_softplus_parametric(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let rank = cx.shape(x).len();
    let (alpha, beta) = (per_channel(cx, "alpha", rank)?, per_channel(cx, "beta", rank)?);
    let scaled = cx.binary(Binary::Mul, x, beta)?;
    let soft = cx.unary(Unary::Softplus, scaled)?;
    let y = cx.binary(Binary::Mul, soft, alpha)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $tolerance:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "activation",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: $tolerance,
            lower: $lower,
        }
    };
}

/// An activation whose kernel takes these scalar attributes, with their defaults.
macro_rules! simple {
    ($name:literal, $tolerance:expr, $kernel:ident) => {
        row!($name, &[req("x")], $tolerance, |cx| {
            let x = cx.value("x")?;
            let y = cx.unary(Unary::$kernel, x)?;
            cx.result(y)
        })
    };
    ($name:literal, $tolerance:expr, $kernel:ident { alpha: $a:expr }) => {
        row!($name, &[req("x"), opt("alpha")], $tolerance, |cx| {
            let x = cx.value("x")?;
            let alpha = number(cx, "alpha", $a)?;
            let y = cx.unary(Unary::$kernel { alpha }, x)?;
            cx.result(y)
        })
    };
    ($name:literal, $tolerance:expr, $kernel:ident { alpha: $a:expr, beta: $b:expr }) => {
        row!($name, &[req("x"), opt("alpha"), opt("beta")], $tolerance, |cx| {
            let x = cx.value("x")?;
            let (alpha, beta) = (number(cx, "alpha", $a)?, number(cx, "beta", $b)?);
            let y = cx.unary(Unary::$kernel { alpha, beta }, x)?;
            cx.result(y)
        })
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    simple!("relu", 0.0, Relu),
    simple!("relu6", 0.0, Relu6),
    simple!("sigmoid", 1e-6, Sigmoid),
    simple!("silu", 1e-6, Silu),
    simple!("softplus", 1e-6, Softplus),
    simple!("softsign", 1e-6, Softsign),
    simple!("elu", 1e-6, Elu { alpha: 1.0 }),
    simple!("leaky_relu", 1e-6, LeakyRelu { alpha: 0.01 }),
    simple!("thresholded_relu", 0.0, ThresholdedRelu { alpha: 1.0 }),
    simple!(
        "clamped_relu",
        1e-6,
        ClampedRelu {
            alpha: 0.0,
            beta: 0.0
        }
    ),
    simple!(
        "linear_activation",
        1e-6,
        LinearActivation {
            alpha: 1.0,
            beta: 0.0
        }
    ),
    simple!(
        "scaled_tanh",
        1e-6,
        ScaledTanh {
            alpha: 1.0,
            beta: 1.0
        }
    ),
    simple!(
        "sigmoid_hard",
        1e-6,
        SigmoidHard {
            alpha: 0.2,
            beta: 0.5
        }
    ),
    row!("gelu", &[req("x"), opt("mode")], 1e-6, lower_gelu),
    row!("prelu", &[req("x"), req("alpha")], 1e-6, lower_prelu),
    row!(
        "softplus_parametric",
        &[req("x"), req("alpha"), req("beta")],
        1e-6,
        lower_softplus_parametric
    ),
];
