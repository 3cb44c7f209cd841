//! The contract of an operation: what the planner asks of it and how it is run.

use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::Layout;
use crate::lower::OpCx;
use candle_coreml_kernels::{Pool, Scratch, View, ViewMut};
use candle_coreml_mil::DType;
use half::f16;
use smallvec::SmallVec;
use std::any::Any;
use std::fmt::Debug;

/// An operation with its attributes resolved. One value of it belongs to one node of one graph.
pub trait Op: Any + Debug + Send + Sync {
    /// The name in plans and profiles.
    fn name(&self) -> &'static str;

    /// For operations that only look at their input differently: how, or `None` when this input must be copied first.
    fn view(&self, _input: &Layout) -> Option<Layout> {
        None
    }

    /// True when [`Op::view`] can answer.
    fn is_view(&self) -> bool {
        false
    }

    /// Whether input `index` may have this memory; it is copied to row-major 32-bit elements where not.
    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage != Storage::F16 && layout.is_contiguous()
    }

    /// True when inputs are repeated to the shape of result 0 as numpy does.
    fn broadcasts(&self) -> bool {
        false
    }

    /// True when constant inputs make constant results.
    fn foldable(&self) -> bool {
        true
    }

    /// Memory of the results where it is not row-major: elementwise operations keep the order of their input.
    fn output_layout(&self, _inputs: &[&Layout], shape: &[usize]) -> Layout {
        Layout::contiguous(shape)
    }

    /// Inputs whose memory result 0 may take over when nobody needs them any more.
    fn in_place(&self) -> &'static [usize] {
        &[]
    }

    /// The input of which result 0 is a changed copy: taken over where possible, copied where not.
    fn updates(&self) -> Option<usize> {
        None
    }

    /// Equal for operations that give equal results on equal inputs; `None` where that is not worth knowing.
    fn key(&self) -> Option<String> {
        None
    }

    /// Computes the results.
    ///
    /// # Errors
    /// Only what depends on values, not on types and shapes: those were checked when the node was made.
    fn run(&self, args: &mut Args<'_>) -> OpResult<()>;

    /// Multiplications and additions one run takes, for reports; 0 where moving the elements is what costs.
    fn flops(&self, _inputs: &[&Layout], _outputs: &[&Layout]) -> u64 {
        0
    }

    /// Bytes of weights one run reads.
    fn weight_bytes(&self) -> usize {
        0
    }

    /// Whether a run reads its weights row by row, as products of few tokens do: then [`Op::expect`] has an effect.
    fn reads_rows(&self, _inputs: &[&Layout]) -> bool {
        false
    }

    /// Announces to the threads of `pool` that they read the weights of this operation next.
    fn expect(&self, _pool: &Pool) {}
}

/// What one run of an operation reads and writes.
pub struct Args<'a> {
    /// One an input.
    pub inputs: SmallVec<[In<'a>; 6]>,
    /// One a result.
    pub outputs: SmallVec<[Option<Out<'a>>; 4]>,
    /// Threads to share the work.
    pub pool: &'a Pool,
    /// Reused temporary memory of the kernels.
    pub scratch: &'a mut Scratch,
    /// The operation whose weights are read row by row next: announced already, for who announces others meanwhile.
    pub then: Option<&'a dyn Op>,
}

/// An input.
#[derive(Clone, Copy)]
pub enum In<'a> {
    /// 32-bit floats.
    F32(View<'a, f32>),
    /// 16-bit floats.
    F16(View<'a, f16>),
    /// 32-bit integers.
    I32(View<'a, i32>),
    /// The memory of result 0, which holds this input's elements when the run starts.
    Result,
}

/// A result.
pub enum Out<'a> {
    /// 32-bit floats.
    F32(ViewMut<'a, f32>),
    /// 16-bit floats.
    F16(ViewMut<'a, f16>),
    /// 32-bit integers.
    I32(ViewMut<'a, i32>),
}

impl<'a> Args<'a> {
    /// Input `index` as floats.
    pub fn f32(&self, index: usize) -> OpResult<View<'a, f32>> {
        match self.inputs.get(index) {
            Some(In::F32(v)) => Ok(*v),
            _ => Err(self.mismatch("input", index, "32-bit floats")),
        }
    }

    /// Input `index` as integers.
    pub fn i32(&self, index: usize) -> OpResult<View<'a, i32>> {
        match self.inputs.get(index) {
            Some(In::I32(v)) => Ok(*v),
            _ => Err(self.mismatch("input", index, "integers")),
        }
    }

    /// Input `index` as row-major floats.
    pub fn f32s(&self, index: usize) -> OpResult<&'a [f32]> {
        self.f32(index)?
            .as_slice()
            .ok_or_else(|| self.mismatch("input", index, "row-major memory"))
    }

    /// Input `index` as row-major integers.
    pub fn i32s(&self, index: usize) -> OpResult<&'a [i32]> {
        self.i32(index)?
            .as_slice()
            .ok_or_else(|| self.mismatch("input", index, "row-major memory"))
    }

    /// True when input `index` lies in the memory of result 0.
    pub fn is_result(&self, index: usize) -> bool {
        matches!(self.inputs.get(index), Some(In::Result))
    }

    /// Takes result `index` as floats; a result is taken once a run.
    pub fn out_f32(&mut self, index: usize) -> OpResult<ViewMut<'a, f32>> {
        match self.outputs.get_mut(index).and_then(Option::take) {
            Some(Out::F32(v)) => Ok(v),
            _ => Err(self.mismatch("result", index, "32-bit floats")),
        }
    }

    /// Takes result `index` as integers.
    pub fn out_i32(&mut self, index: usize) -> OpResult<ViewMut<'a, i32>> {
        match self.outputs.get_mut(index).and_then(Option::take) {
            Some(Out::I32(v)) => Ok(v),
            _ => Err(self.mismatch("result", index, "integers")),
        }
    }

    fn mismatch(&self, what: &str, index: usize, wanted: &str) -> OpError {
        OpError::new(format!("internal: {what} {index} is not {wanted}"))
    }
}

/// What the engine knows of a MIL operator before it sees a use of it: one row of `docs/OPS.md`.
#[derive(Debug)]
pub struct OpSpec {
    /// MIL name.
    pub name: &'static str,
    /// coremltools' name of the family.
    pub family: &'static str,
    /// First opset, `iOS15` to `iOS26`.
    pub since: &'static str,
    /// Parameters by name.
    pub inputs: &'static [Param],
    /// Number of results; `None` for as many as the file declares.
    pub outputs: Option<usize>,
    /// How far it is implemented.
    pub support: Support,
    /// Largest error of a result relative to exact arithmetic on the same inputs, used by tests.
    pub tolerance: f32,
    /// Turns one use into nodes.
    pub lower: fn(&mut OpCx<'_, '_>) -> OpResult<()>,
}

/// A parameter of an operator.
#[derive(Debug)]
pub struct Param {
    /// MIL name.
    pub name: &'static str,
    /// Must be given.
    pub required: bool,
}

/// How far an operator is implemented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// Everything the MIL reference allows.
    Full,
    /// All but what the text says, which is refused by name at load.
    Partial(&'static str),
}

/// A required parameter.
pub const fn req(name: &'static str) -> Param {
    Param { name, required: true }
}

/// An optional parameter.
pub const fn opt(name: &'static str) -> Param {
    Param {
        name,
        required: false,
    }
}

/// Types that hold whole numbers or truth values.
pub fn is_integer(dtype: DType) -> bool {
    !dtype.is_float() && dtype != DType::String
}
