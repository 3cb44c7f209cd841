//! `y = f(x)` element by element, and `cast`. Source: coremltools 9.0, `mil/ops/defs/iOS15/elementwise_unary.py`, iOS17.

use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::Layout;
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, opt, req};
use candle_coreml_kernels::{self as kernels, Binary, Unary};
use candle_coreml_mil::DType;

/// `y = op(x)` on floats.
#[derive(Debug, Clone)]
pub struct UnaryNode(pub Unary);

impl Op for UnaryNode {
    fn name(&self) -> &'static str {
        "unary"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let y = args.out_f32(0)?;
        if args.is_result(0) {
            kernels::unary_inplace(args.pool, self.0, y);
        } else {
            kernels::unary(args.pool, self.0, args.f32(0)?, y);
        }
        Ok(())
    }
}

/// `y = op(x)` on integers.
#[derive(Debug, Clone)]
pub struct UnaryIntNode(pub Unary);

impl Op for UnaryIntNode {
    fn name(&self) -> &'static str {
        "unary_int"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::I32
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let y = args.out_i32(0)?;
        kernels::unary_i32(args.pool, self.0, args.i32(0)?, y);
        Ok(())
    }
}

/// Converts between floats and integers, or narrows integers to the range of their type.
#[derive(Debug, Clone)]
pub struct Cast {
    /// Type of the elements that come.
    pub from: DType,
    /// Type of the elements that go.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16 && layout.is_contiguous()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        match (args.inputs.first().copied(), Storage::of(self.to)) {
            (Some(In::F32(x)), Storage::I32) => {
                let y = args.out_i32(0)?;
                kernels::cast_f32_i32(args.pool, x, y);
            }
            (Some(In::I32(x)), Storage::F32) => {
                let y = args.out_f32(0)?;
                kernels::cast_i32_f32(args.pool, x, y);
            }
            (Some(In::I32(_)), _) => {
                let x = args.i32s(0)?;
                let mut y = args.out_i32(0)?;
                let y = y.as_slice().ok_or("internal: cast writes row-major")?;
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = narrow(x, self.to);
                }
            }
            _ => {
                let x = args.f32s(0)?;
                let mut y = args.out_f32(0)?;
                y.as_slice()
                    .ok_or("internal: cast writes row-major")?
                    .copy_from_slice(x);
            }
        }
        Ok(())
    }
}

/// An integer as `to` holds it: wrapped to the width, truth for `bool`.
fn narrow(x: i32, to: DType) -> i32 {
    match to {
        DType::Bool => i32::from(x != 0),
        DType::Int8 => i32::from(x as i8),
        DType::Uint8 => i32::from(x as u8),
        DType::Int16 => i32::from(x as i16),
        DType::Uint16 => i32::from(x as u16),
        _ => x,
    }
}

/// A MIL type by the name `cast` uses.
pub fn dtype_named(name: &str) -> Option<DType> {
    use DType::*;
    [
        Bool, Fp16, Fp32, Fp64, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, String,
    ]
    .into_iter()
    .find(|d| d.name() == name)
}

impl OpCx<'_, '_> {
    /// `op(x)`.
    pub fn unary(&mut self, op: Unary, x: ValueId) -> OpResult<ValueId> {
        let (dtype, shape) = (self.dtype(x), self.shape(x));
        if dtype.is_float() {
            self.emit(UnaryNode(op), &[x], dtype, &shape)
        } else {
            self.emit(UnaryIntNode(op), &[x], dtype, &shape)
        }
    }

    /// `x` as `to`: rounded toward zero to integers, wrapped to narrower integers, "not zero" to `bool`.
    pub fn cast(&mut self, x: ValueId, to: DType) -> OpResult<ValueId> {
        let (from, shape) = (self.dtype(x), self.shape(x));
        let widens = matches!(
            (from, to),
            (_, DType::Int32 | DType::Int64 | DType::Uint32 | DType::Uint64)
                | (DType::Bool, _)
                | (DType::Int8, DType::Int16)
                | (DType::Uint8, DType::Int16 | DType::Uint16)
        );
        match (Storage::of(from), Storage::of(to)) {
            _ if from == to => Ok(x),
            (Storage::F32, Storage::F32) if !self.faithful() || from == DType::Fp16 => self.same(x, to),
            (Storage::I32, Storage::I32) if widens => self.same(x, to),
            (Storage::F32, Storage::I32) if to == DType::Bool => {
                let zero = self.add_f32(from, &[], vec![0.0]);
                self.compare(kernels::Compare::Ne, x, zero)
            }
            (Storage::F32, Storage::I32) => {
                let whole = self.emit(
                    Cast {
                        from,
                        to: DType::Int32,
                    },
                    &[x],
                    DType::Int32,
                    &shape,
                )?;
                self.cast(whole, to)
            }
            _ => self.emit(Cast { from, to }, &[x], to, &shape),
        }
    }
}

fn lower_cast(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let name = cx.text("dtype")?.ok_or("parameter \"dtype\" is missing")?;
    let to = dtype_named(&name).ok_or_else(|| format!("type {name:?} is not one that cast knows"))?;
    let y = cx.cast(x, to)?;
    cx.result(y)
}

fn lower_clip(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    if !cx.dtype(x).is_float() {
        let (lo, hi) = (whole_limit(cx, x, "alpha")?, whole_limit(cx, x, "beta")?);
        let y = cx.binary(Binary::Max, x, lo)?;
        let y = cx.binary(Binary::Min, y, hi)?;
        return cx.result(y);
    }
    let lo = cx.float("alpha")?.ok_or("parameter \"alpha\" is missing")?;
    let hi = cx.float("beta")?.ok_or("parameter \"beta\" is missing")?;
    let y = cx.unary(Unary::Clip { lo, hi }, x)?;
    cx.result(y)
}

fn lower_threshold(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let y = if cx.dtype(x).is_float() {
        let alpha = cx.float("alpha")?.ok_or("parameter \"alpha\" is missing")?;
        cx.unary(Unary::Threshold { alpha }, x)?
    } else {
        let alpha = whole_limit(cx, x, "alpha")?;
        cx.binary(Binary::Max, x, alpha)?
    };
    cx.result(y)
}

/// A limit of integers `x`, which may be written as a float.
fn whole_limit(cx: &mut OpCx<'_, '_>, x: ValueId, param: &str) -> OpResult<ValueId> {
    let limit = cx.value(param)?;
    let whole = cx.cast(limit, DType::Int32)?;
    let dtype = cx.dtype(x);
    cx.same(whole, dtype)
}

/// A unary operator without attributes: its kernel.
macro_rules! plain {
    ($name:literal, $kernel:expr, $tolerance:expr) => {
        &OpSpec {
            name: $name,
            family: "elementwise_unary",
            since: "iOS15",
            inputs: &[req("x")],
            outputs: Some(1),
            support: Support::Full,
            tolerance: $tolerance,
            lower: |cx| {
                let x = cx.value("x")?;
                let y = cx.unary($kernel, x)?;
                cx.result(y)
            },
        }
    };
}

/// A unary operator with an `epsilon`.
macro_rules! with_epsilon {
    ($name:literal, $kernel:ident, $default:expr) => {
        &OpSpec {
            name: $name,
            family: "elementwise_unary",
            since: "iOS15",
            inputs: &[req("x"), opt("epsilon")],
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-6,
            lower: |cx| {
                let x = cx.value("x")?;
                let eps = cx.float("epsilon")?.unwrap_or($default);
                let y = cx.unary(Unary::$kernel { eps }, x)?;
                cx.result(y)
            },
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    plain!("abs", Unary::Abs, 0.0),
    plain!("acos", Unary::Acos, 1e-6),
    plain!("asin", Unary::Asin, 1e-6),
    plain!("atan", Unary::Atan, 1e-6),
    plain!("atanh", Unary::Atanh, 1e-6),
    plain!("ceil", Unary::Ceil, 0.0),
    plain!("cos", Unary::Cos, 1e-6),
    plain!("cosh", Unary::Cosh, 1e-6),
    plain!("erf", Unary::Erf, 1e-6),
    plain!("exp", Unary::Exp, 1e-6),
    plain!("exp2", Unary::Exp2, 1e-6),
    plain!("floor", Unary::Floor, 0.0),
    plain!("round", Unary::Round, 0.0),
    plain!("sign", Unary::Sign, 0.0),
    plain!("sin", Unary::Sin, 1e-6),
    plain!("sinh", Unary::Sinh, 1e-6),
    plain!("sqrt", Unary::Sqrt, 1e-6),
    plain!("square", Unary::Square, 1e-6),
    plain!("tan", Unary::Tan, 1e-6),
    plain!("tanh", Unary::Tanh, 1e-6),
    with_epsilon!("inverse", Inverse, 1e-4),
    with_epsilon!("log", Log, 1e-45),
    with_epsilon!("rsqrt", Rsqrt, 1e-12),
    &OpSpec {
        name: "logical_not",
        family: "elementwise_unary",
        since: "iOS15",
        inputs: &[req("x")],
        outputs: Some(1),
        support: Support::Full,
        tolerance: 0.0,
        lower: |cx| {
            let x = cx.value("x")?;
            let zero = cx.add_i32(DType::Bool, &[], vec![0]);
            let y = cx.compare(kernels::Compare::Eq, x, zero)?;
            cx.result(y)
        },
    },
    &OpSpec {
        name: "threshold",
        family: "elementwise_unary",
        since: "iOS15",
        inputs: &[req("x"), req("alpha")],
        outputs: Some(1),
        support: Support::Full,
        tolerance: 0.0,
        lower: lower_threshold,
    },
    &OpSpec {
        name: "clip",
        family: "elementwise_unary",
        since: "iOS15",
        inputs: &[req("x"), req("alpha"), req("beta")],
        outputs: Some(1),
        support: Support::Full,
        tolerance: 0.0,
        lower: lower_clip,
    },
    &OpSpec {
        name: "cast",
        family: "elementwise_unary",
        since: "iOS15",
        inputs: &[req("x"), req("dtype")],
        outputs: Some(1),
        support: Support::Full,
        tolerance: 0.0,
        lower: lower_cast,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_wrap_to_narrower_types() {
        let rows = [
            (300, DType::Uint8, 44),
            (-1, DType::Uint16, 65_535),
            (40_000, DType::Int16, -25_536),
            (200, DType::Int8, -56),
            (7, DType::Bool, 1),
        ];
        for (x, to, want) in rows {
            assert_eq!(narrow(x, to), want, "{x} as {to}");
        }
    }
}
