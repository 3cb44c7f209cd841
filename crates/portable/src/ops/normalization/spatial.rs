//! `instance_norm`, `l2_norm` and `local_response_norm`.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, Shape};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_kernels::{self as kernels, Binary, LocalResponse};
use std::sync::Arc;

/// `y = (x - mean) / sqrt(variance + eps) * gamma[c] + beta[c]`, statistics of each channel of each sample of `x[n, c, ..]`.
pub struct InstanceNorm {
    gamma: Option<Arc<[f32]>>,
    beta: Option<Arc<[f32]>>,
    eps: f32,
}

impl std::fmt::Debug for InstanceNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InstanceNorm(eps {:e})", self.eps)
    }
}

impl Op for InstanceNorm {
    fn name(&self) -> &'static str {
        "instance_norm"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let scale = (self.gamma.as_deref(), self.beta.as_deref());
        kernels::instance_norm(args.pool, x, scale, self.eps, y);
        Ok(())
    }
}

/// Lowers `instance_norm`.
pub fn lower_instance_norm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    if shape.len() < 3 {
        return Err(format!("x {:?} must be [n, channels, ..]", shape.as_slice()).into());
    }
    let eps = cx.float("epsilon")?.unwrap_or(1e-5);
    let params = [cx.optional("gamma")?, cx.optional("beta")?];
    for p in params.into_iter().flatten() {
        if cx.shape(p).as_slice() != [shape[1]] {
            return Err(format!("gamma and beta must be [{}]", shape[1]).into());
        }
    }
    let constant = params.map(|p| p.and_then(|p| cx.constant(p)).map(|c| c.dense()));
    let computed = params
        .iter()
        .zip(&constant)
        .any(|(p, c)| p.is_some() && c.is_none());
    let [gamma, beta] = if computed { [None, None] } else { constant };
    let mut y = cx.emit(InstanceNorm { gamma, beta, eps }, &[x], cx.dtype(x), &shape)?;
    if computed {
        let mut wide: Shape = smallvec::smallvec![1; shape.len() - 1];
        wide[0] = shape[1];
        for (p, op) in params.into_iter().zip([Binary::Mul, Binary::Add]) {
            if let Some(p) = p {
                let p = cx.reshape(p, &wide)?;
                y = cx.binary(op, y, p)?;
            }
        }
    }
    cx.result(y)
}

/// `y = x / sqrt(sum x^2 + eps)` over the last `axes` dimensions.
#[derive(Debug)]
pub struct L2Norm {
    axes: usize,
    eps: f32,
}

impl Op for L2Norm {
    fn name(&self) -> &'static str {
        "l2_norm"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::l2_norm(args.pool, x, self.axes, self.eps, y);
        Ok(())
    }
}

/// Lowers `l2_norm`: the last three dimensions are normalised together.
pub fn lower_l2_norm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    if shape.len() < 3 {
        return Err(format!("x {:?} must have rank 3 or more", shape.as_slice()).into());
    }
    let eps = cx.float("epsilon")?.unwrap_or(1e-6);
    let y = cx.emit(L2Norm { axes: 3, eps }, &[x], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// `y[n, c, ..] = x[n, c, ..] / (k + alpha / size * sum over neighbouring channels of x^2)^beta`.
#[derive(Debug)]
pub struct LocalResponseNorm(LocalResponse);

impl Op for LocalResponseNorm {
    fn name(&self) -> &'static str {
        "local_response_norm"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        kernels::local_response_norm(args.pool, x, self.0, y);
        Ok(())
    }
}

/// Lowers `local_response_norm`.
pub fn lower_local_response_norm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let size = cx.int("size")?.ok_or("parameter \"size\" is missing")?;
    let size = usize::try_from(size).ok().filter(|&s| s > 0);
    let norm = LocalResponse {
        size: size.ok_or("size must be 1 or more")?,
        alpha: cx.float("alpha")?.unwrap_or(1e-4),
        beta: cx.float("beta")?.unwrap_or(0.75),
        k: cx.float("k")?.unwrap_or(1.0),
    };
    if shape.len() < 2 {
        return Err(format!("x {:?} must be [n, channels, ..]", shape.as_slice()).into());
    }
    let dtype = cx.dtype(x);
    let [a, b, c] = *shape.as_slice() else {
        let y = cx.emit(LocalResponseNorm(norm), &[x], dtype, &shape)?;
        return cx.result(y);
    };
    // The documentation has [n, channels, length]; Core ML takes it for [channels, height, width], as coremltools' tests
    // show by their numbers.
    let x = cx.reshape(x, &[1, a, b, c])?;
    let y = cx.emit(LocalResponseNorm(norm), &[x], dtype, &[1, a, b, c])?;
    let y = cx.reshape(y, &shape)?;
    cx.result(y)
}
