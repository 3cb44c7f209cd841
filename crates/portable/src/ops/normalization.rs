//! Normalisations. Source: coremltools 9.0, `mil/ops/defs/iOS15/normalization.py`, and `softmax` of activation.py.

mod group;
mod spatial;

pub use group::GroupNorm;

use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::{OpCx, normalize_axis};
use crate::op::{Args, Op, OpSpec, Support, opt, req};
use crate::ops::tensor_transformation::sorted_axes;
use candle_coreml_kernels::{self as kernels, Binary, Unary};
use candle_coreml_mil::DType;
use std::sync::Arc;

/// `y = (x - mean) / sqrt(variance + eps) * gamma + beta` over the last `axes` dimensions.
#[derive(Clone)]
pub struct LayerNorm {
    /// How many trailing dimensions are normalised together.
    pub axes: usize,
    /// One a normalised element.
    pub gamma: Option<Arc<[f32]>>,
    /// One a normalised element.
    pub beta: Option<Arc<[f32]>>,
    /// Added to the variance.
    pub eps: f32,
}

impl std::fmt::Debug for LayerNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LayerNorm(last {}, eps {:e})", self.axes, self.eps)
    }
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && last_is_inner(layout)
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let norm = kernels::LayerNorm {
            axes: self.axes,
            gamma: self.gamma.as_deref(),
            beta: self.beta.as_deref(),
            eps: self.eps,
        };
        kernels::layer_norm(args.pool, x, norm, y);
        Ok(())
    }
}

/// True when the last dimension's elements lie next to each other.
pub fn last_is_inner(layout: &Layout) -> bool {
    layout.shape.last().is_none_or(|&d| d <= 1) || layout.strides.last() == Some(&1)
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
#[derive(Clone)]
pub struct RmsNorm {
    /// One a normalised element.
    pub weight: Option<Arc<[f32]>>,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl std::fmt::Debug for RmsNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "RmsNorm(eps {:e}{})",
            self.eps,
            if self.weight.is_some() { ", weight" } else { "" }
        )
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && last_is_inner(layout)
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::rms_norm(args.pool, x, self.weight.as_deref(), self.eps, y);
        Ok(())
    }
}

/// `y = exp(x - max) / sum` over the last dimension.
#[derive(Debug, Clone)]
pub struct Softmax;

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && last_is_inner(layout)
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::softmax(args.pool, x, y);
        Ok(())
    }
}

/// `y[n, c, ..] = x[n, c, ..] * scale[c] + shift[c]`.
#[derive(Clone)]
pub struct ScaleShift {
    /// One a channel.
    pub scale: Arc<[f32]>,
    /// One a channel.
    pub shift: Arc<[f32]>,
}

impl std::fmt::Debug for ScaleShift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ScaleShift[{}]", self.scale.len())
    }
}

impl Op for ScaleShift {
    fn name(&self) -> &'static str {
        "scale_shift"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::scale_shift(args.pool, x, &self.scale, &self.shift, y);
        Ok(())
    }
}

impl OpCx<'_, '_> {
    /// Runs `f` on `x` with `axes` moved to the end, and moves them back.
    pub fn with_axes_last(
        &mut self,
        x: ValueId,
        axes: &[usize],
        f: impl FnOnce(&mut Self, ValueId) -> OpResult<ValueId>,
    ) -> OpResult<ValueId> {
        let rank = self.shape(x).len();
        let mut perm: Shape = (0..rank).filter(|i| !axes.contains(i)).collect();
        perm.extend_from_slice(axes);
        let mut back: Shape = smallvec::smallvec![0; rank];
        for (i, &p) in perm.iter().enumerate() {
            back[p] = i;
        }
        let moved = self.permute(x, &perm)?;
        let y = f(self, moved)?;
        self.permute(y, &back)
    }

    /// Softmax along one axis.
    pub fn softmax(&mut self, x: ValueId, axis: usize) -> OpResult<ValueId> {
        let dtype = self.dtype(x);
        self.with_axes_last(x, &[axis], |cx, x| {
            let shape = cx.shape(x);
            cx.emit(Softmax, &[x], dtype, &shape)
        })
    }
}

fn lower_softmax(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let rank = cx.shape(x).len();
    let axis = normalize_axis(cx.int("axis")?.unwrap_or(-1), rank)?;
    let y = cx.softmax(x, axis)?;
    cx.result(y)
}

fn lower_layer_norm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axes = match cx.ints("axes")? {
        Some(a) => sorted_axes(&a, shape.len())?,
        None => (0..shape.len()).collect(),
    };
    let eps = cx.float("epsilon")?.unwrap_or(1e-5);
    let (gamma, beta) = (cx.optional("gamma")?, cx.optional("beta")?);
    let count: usize = axes.iter().map(|&a| shape[a]).product();
    for p in [gamma, beta].into_iter().flatten() {
        if elements(&cx.shape(p)) != count {
            return Err(format!(
                "gamma and beta need {count} elements, not {:?}",
                cx.shape(p).as_slice()
            )
            .into());
        }
    }
    let dense = |cx: &OpCx<'_, '_>, p: Option<ValueId>| p.map(|p| cx.constant(p).map(|c| c.dense()));
    let (g, b) = (dense(cx, gamma), dense(cx, beta));
    let computed = matches!(g, Some(None)) || matches!(b, Some(None));
    let dtype = cx.dtype(x);
    let (g, b) = if computed {
        (None, None)
    } else {
        (g.flatten(), b.flatten())
    };
    let y = cx.with_axes_last(x, &axes, |cx, x| {
        let shape = cx.shape(x);
        let norm = LayerNorm {
            axes: axes.len(),
            gamma: g,
            beta: b,
            eps,
        };
        let mut y = cx.emit(norm, &[x], dtype, &shape)?;
        if computed {
            for (p, op) in [(gamma, Binary::Mul), (beta, Binary::Add)] {
                if let Some(p) = p {
                    let tail: Shape = shape[shape.len() - axes.len()..].into();
                    let p = cx.reshape(p, &tail)?;
                    y = cx.binary(op, y, p)?;
                }
            }
        }
        Ok(y)
    })?;
    cx.result(y)
}

fn lower_batch_norm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let channels = *shape.get(1).ok_or("x needs a channel dimension")?;
    let eps = cx.float("epsilon")?.unwrap_or(1e-5);
    let (mean, variance) = (cx.value("mean")?, cx.value("variance")?);
    let (gamma, beta) = (cx.optional("gamma")?, cx.optional("beta")?);
    for p in [Some(mean), Some(variance), gamma, beta].into_iter().flatten() {
        if elements(&cx.shape(p)) != channels {
            return Err(format!("mean, variance, gamma and beta need {channels} elements").into());
        }
    }
    // What lies between is no result of the program: only y is rounded to its type.
    let mean = cx.cast(mean, DType::Fp32)?;
    let variance = cx.cast(variance, DType::Fp32)?;
    let mut wide = |p: Option<ValueId>| p.map(|p| cx.cast(p, DType::Fp32)).transpose();
    let (gamma, beta) = (wide(gamma)?, wide(beta)?);
    // y = x * scale + (beta - mean * scale) with scale = gamma / sqrt(variance + eps); constants fold to two vectors.
    let root = cx.unary(Unary::Rsqrt { eps }, variance)?;
    let scale = match gamma {
        Some(gamma) => cx.binary(Binary::Mul, gamma, root)?,
        None => root,
    };
    let back = cx.binary(Binary::Mul, mean, scale)?;
    let shift = match beta {
        Some(beta) => cx.binary(Binary::Sub, beta, back)?,
        None => cx.unary(Unary::Neg, back)?,
    };
    let y = match (cx.constant(scale), cx.constant(shift)) {
        (Some(scale), Some(shift)) => {
            let op = ScaleShift {
                scale: scale.dense(),
                shift: shift.dense(),
            };
            cx.emit(op, &[x], cx.dtype(x), &shape)?
        }
        _ => {
            let mut wide: Shape = smallvec::smallvec![1; shape.len() - 1];
            wide[0] = channels;
            let (scale, shift) = (cx.reshape(scale, &wide)?, cx.reshape(shift, &wide)?);
            let dtype = cx.dtype(x);
            let x = cx.cast(x, DType::Fp32)?;
            let scaled = cx.binary(Binary::Mul, x, scale)?;
            let y = cx.binary(Binary::Add, scaled, shift)?;
            cx.cast(y, dtype)?
        }
    };
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        row!($name, "normalization", $inputs, $lower)
    };
    ($name:literal, $family:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: $family,
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-5,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "batch_norm",
        &[
            req("x"),
            req("mean"),
            req("variance"),
            opt("gamma"),
            opt("beta"),
            opt("epsilon")
        ],
        lower_batch_norm
    ),
    row!(
        "layer_norm",
        &[req("x"), opt("axes"), opt("gamma"), opt("beta"), opt("epsilon")],
        lower_layer_norm
    ),
    row!(
        "instance_norm",
        &[req("x"), opt("gamma"), opt("beta"), opt("epsilon")],
        spatial::lower_instance_norm
    ),
    row!("l2_norm", &[req("x"), opt("epsilon")], spatial::lower_l2_norm),
    row!(
        "local_response_norm",
        &[req("x"), req("size"), opt("alpha"), opt("beta"), opt("k")],
        spatial::lower_local_response_norm
    ),
    row!("softmax", "activation", &[req("x"), opt("axis")], lower_softmax),
];
