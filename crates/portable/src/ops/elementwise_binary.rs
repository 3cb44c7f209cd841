//! `z = f(x, y)` element by element with broadcasting. Source: coremltools 9.0,
//! `mil/ops/defs/iOS15/elementwise_binary.py`.

use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::Layout;
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, req};
use crate::ops::broadcast_shape;
use candle_coreml_kernels::{self as kernels, Binary, Compare, Logical};
use candle_coreml_mil::DType;

/// `z = op(x, y)` on floats.
#[derive(Debug, Clone)]
pub struct BinaryNode(pub Binary);

/// The memory order of the first input that is not repeated.
pub fn elementwise_layout(inputs: &[&Layout], shape: &[usize]) -> Layout {
    let own = |l: &&&Layout| {
        l.shape.as_slice() == shape && l.strides.iter().zip(shape).all(|(&s, &d)| s != 0 || d == 1)
    };
    inputs
        .iter()
        .find(own)
        .map_or_else(|| Layout::contiguous(shape), |l| l.dense_like())
}

impl Op for BinaryNode {
    fn name(&self) -> &'static str {
        "binary"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32
    }

    fn broadcasts(&self) -> bool {
        true
    }

    fn output_layout(&self, inputs: &[&Layout], shape: &[usize]) -> Layout {
        elementwise_layout(inputs, shape)
    }

    fn in_place(&self) -> &'static [usize] {
        &[0]
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let z = args.out_f32(0)?;
        if args.is_result(0) {
            kernels::binary_inplace(args.pool, self.0, z, args.f32(1)?);
        } else {
            kernels::binary(args.pool, self.0, args.f32(0)?, args.f32(1)?, z);
        }
        Ok(())
    }
}

/// `z = op(x, y)` on integers: wrapping; a division by 0 gives 0.
#[derive(Debug, Clone)]
pub struct BinaryIntNode(pub Binary);

impl Op for BinaryIntNode {
    fn name(&self) -> &'static str {
        "binary_int"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::I32
    }

    fn broadcasts(&self) -> bool {
        true
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let z = args.out_i32(0)?;
        kernels::binary_i32(args.pool, self.0, args.i32(0)?, args.i32(1)?, z);
        Ok(())
    }
}

/// `z = x op y` as a truth value.
#[derive(Debug, Clone)]
pub struct CompareNode(pub Compare);

impl Op for CompareNode {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16
    }

    fn broadcasts(&self) -> bool {
        true
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let z = args.out_i32(0)?;
        match args.inputs.first() {
            Some(In::F32(x)) => kernels::compare_f32(args.pool, self.0, *x, args.f32(1)?, z),
            _ => kernels::compare_i32(args.pool, self.0, args.i32(0)?, args.i32(1)?, z),
        }
        Ok(())
    }
}

/// `z = op(x, y)` on truth values.
#[derive(Debug, Clone)]
pub struct LogicalNode(pub Logical);

impl Op for LogicalNode {
    fn name(&self) -> &'static str {
        "logical"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::I32
    }

    fn broadcasts(&self) -> bool {
        true
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let z = args.out_i32(0)?;
        kernels::logical(args.pool, self.0, args.i32(0)?, args.i32(1)?, z);
        Ok(())
    }
}

impl OpCx<'_, '_> {
    fn pair(&mut self, x: ValueId, y: ValueId) -> OpResult<crate::layout::Shape> {
        if Storage::of(self.dtype(x)) != Storage::of(self.dtype(y)) {
            return Err(format!("types {} and {} do not mix", self.dtype(x), self.dtype(y)).into());
        }
        Ok(broadcast_shape(&self.shape(x), &self.shape(y))?)
    }

    /// `op(x, y)`.
    pub fn binary(&mut self, op: Binary, x: ValueId, y: ValueId) -> OpResult<ValueId> {
        let shape = self.pair(x, y)?;
        let dtype = self.dtype(x);
        if dtype.is_float() {
            self.emit(BinaryNode(op), &[x, y], dtype, &shape)
        } else {
            self.emit(BinaryIntNode(op), &[x, y], dtype, &shape)
        }
    }

    /// `x op y`.
    pub fn compare(&mut self, op: Compare, x: ValueId, y: ValueId) -> OpResult<ValueId> {
        let shape = self.pair(x, y)?;
        self.emit(CompareNode(op), &[x, y], DType::Bool, &shape)
    }
}

fn lower_real_div(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, y) = (cx.value("x")?, cx.value("y")?);
    // On integers the quotient is cut to an integer, as in coremltools' own evaluation.
    let z = cx.binary(Binary::Div, x, y)?;
    cx.result(z)
}

macro_rules! row {
    ($name:literal, $tolerance:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "elementwise_binary",
            since: "iOS15",
            inputs: &[req("x"), req("y")],
            outputs: Some(1),
            support: Support::Full,
            tolerance: $tolerance,
            lower: $lower,
        }
    };
}

macro_rules! arithmetic {
    ($name:literal, $kernel:ident, $tolerance:expr) => {
        row!($name, $tolerance, |cx| {
            let (x, y) = (cx.value("x")?, cx.value("y")?);
            let z = cx.binary(Binary::$kernel, x, y)?;
            cx.result(z)
        })
    };
}

macro_rules! comparison {
    ($name:literal, $kernel:ident) => {
        row!($name, 0.0, |cx| {
            let (x, y) = (cx.value("x")?, cx.value("y")?);
            let z = cx.compare(Compare::$kernel, x, y)?;
            cx.result(z)
        })
    };
}

macro_rules! logical {
    ($name:literal, $kernel:ident) => {
        row!($name, 0.0, |cx| {
            let (x, y) = (cx.value("x")?, cx.value("y")?);
            let shape = cx.pair(x, y)?;
            let z = cx.emit(LogicalNode(Logical::$kernel), &[x, y], DType::Bool, &shape)?;
            cx.result(z)
        })
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    arithmetic!("add", Add, 1e-6),
    arithmetic!("floor_div", FloorDiv, 0.0),
    arithmetic!("maximum", Max, 0.0),
    arithmetic!("minimum", Min, 0.0),
    arithmetic!("mod", Mod, 1e-6),
    arithmetic!("mul", Mul, 1e-6),
    arithmetic!("pow", Pow, 1e-5),
    arithmetic!("sub", Sub, 1e-6),
    row!("real_div", 1e-6, lower_real_div),
    comparison!("equal", Eq),
    comparison!("greater", Gt),
    comparison!("greater_equal", Ge),
    comparison!("less", Lt),
    comparison!("less_equal", Le),
    comparison!("not_equal", Ne),
    logical!("logical_and", And),
    logical!("logical_or", Or),
    logical!("logical_xor", Xor),
];
