//! The parts of a decoder layer that both layouts share.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::tensors::Projection;
use crate::builder::{ProgramBuilder, Weight};
use crate::compress::Compression;
use crate::config::{DecoderConfig, Family};
use crate::error::Result;
use crate::function::{Arg, FunctionBuilder, Var};
use crate::layers::as_i32;
use crate::literal;

/// Cosines and sines, [positions, head_dim], for global and, in Gemma 3, local layers.
pub(super) struct RotaryTables {
    global: (Weight, Weight),
    local: Option<(Weight, Weight)>,
}

/// Rows of the tables at the positions of one call.
pub(super) struct Rotary {
    global: (Var, Var),
    local: Option<(Var, Var)>,
}

impl RotaryTables {
    pub(super) fn write(
        package: &mut ProgramBuilder,
        config: &DecoderConfig,
        positions: usize,
    ) -> Result<Self> {
        let mut pair = |name: &str, local: bool| -> Result<(Weight, Weight)> {
            let (cos, sin) = tables(&config.rope_frequencies(local), positions);
            let shape = [positions, config.head_dim];
            let mut write = |what: &str, values: &[f16]| {
                package.weight(
                    &format!("rotary_{name}{what}"),
                    &shape,
                    values,
                    &Compression::None,
                )
            };
            Ok((write("cos", &cos)?, write("sin", &sin)?))
        };
        let global = pair("", false)?;
        let local = if config.local_rope_theta.is_some() {
            Some(pair("local_", true)?)
        } else {
            None
        };
        Ok(RotaryTables { global, local })
    }

    /// The rows at `positions` [n], as [1, 1, n, head_dim].
    pub(super) fn at(&self, f: &mut FunctionBuilder, positions: &Var) -> Result<Rotary> {
        let mut rows = |table: &Weight| -> Result<Var> {
            let table = f.weight(table)?;
            let rows = f.gather(&table, positions, 0)?;
            let rows = f.expand_dims(&rows, 0)?;
            f.expand_dims(&rows, 0)
        };
        let global = (rows(&self.global.0)?, rows(&self.global.1)?);
        let local = match &self.local {
            Some((cos, sin)) => Some((rows(cos)?, rows(sin)?)),
            None => None,
        };
        Ok(Rotary { global, local })
    }
}

impl Rotary {
    /// Rotates `x` [1, heads, n, head_dim]: `x * cos + (-x2, x1) * sin` with x1 and x2 the halves of a head.
    pub(super) fn turn(&self, f: &mut FunctionBuilder, x: &Var, head_dim: usize, local: bool) -> Result<Var> {
        let (cos, sin) = self.local.as_ref().filter(|_| local).unwrap_or(&self.global);
        let low = f.slice(x, 3, 0, head_dim / 2)?;
        let high = f.slice(x, 3, head_dim / 2, head_dim)?;
        let negative = f.scale(&high, -1.0)?;
        let turned = f.concat(&[&negative, &low], 3)?;
        let straight = f.mul(x, cos)?;
        let turned = f.mul(&turned, sin)?;
        f.add(&straight, &turned)
    }
}

fn tables(frequencies: &[f64], positions: usize) -> (Vec<f16>, Vec<f16>) {
    let row = |p: usize| frequencies.iter().chain(frequencies).map(move |f| p as f64 * f);
    let angles = || (0..positions).flat_map(row);
    (
        angles().map(|a| f16::from_f64(a.cos())).collect(),
        angles().map(|a| f16::from_f64(a.sin())).collect(),
    )
}

/// `mask` [1, 1, n, k] without the keys that lie `window` or more positions before their query. `queries` holds the
/// positions of the n queries, `keys` those of the k keys.
pub(super) fn within_window(
    f: &mut FunctionBuilder,
    mask: &Var,
    queries: &Var,
    keys: Arg,
    window: usize,
) -> Result<Var> {
    let queries = f.reshape(queries, &[1, 1, -1, 1])?;
    let shape = mask.dims().to_vec();
    let of = |dtype: DType| TensorType {
        dtype,
        shape: shape.clone(),
    };
    let distance = f.op("sub", &[("x", (&queries).into()), ("y", keys)], &of(DType::Int32))?;
    let window = literal::int(as_i32(&[window])?[0]);
    let args = [("x", (&distance).into()), ("y", window.into())];
    let outside = f.op("greater_equal", &args, &of(DType::Bool))?;
    let args = [
        ("cond", (&outside).into()),
        ("a", literal::half(f32::NEG_INFINITY).into()),
        ("b", mask.into()),
    ];
    f.op("select", &args, mask.ty())
}

/// The projection's weight and bias in this function.
pub(super) fn parts(f: &mut FunctionBuilder, p: &Projection) -> Result<(Var, Option<Var>)> {
    let weight = f.weight(&p.weight)?;
    let bias = match &p.bias {
        Some(bias) => Some(f.weight(bias)?),
        None => None,
    };
    Ok((weight, bias))
}

pub(super) fn norm(f: &mut FunctionBuilder, x: &Var, weight: &Weight, config: &DecoderConfig) -> Result<Var> {
    let weight = f.weight(weight)?;
    f.rms_norm(x, &weight, config.rms_eps)
}

/// What the gate goes through.
pub(super) fn activate(f: &mut FunctionBuilder, x: &Var, config: &DecoderConfig) -> Result<Var> {
    if config.family == Family::Gemma3 {
        f.gelu(x, "TANH_APPROXIMATION")
    } else {
        f.unary("silu", x)
    }
}

/// `x + norm(y)`, without the norm where the family has none.
pub(super) fn add_residual(
    f: &mut FunctionBuilder,
    x: &Var,
    y: &Var,
    after: Option<&Weight>,
    config: &DecoderConfig,
) -> Result<Var> {
    match after {
        Some(weight) => {
            let y = norm(f, y, weight, config)?;
            f.add(x, &y)
        }
        None => f.add(x, y),
    }
}
