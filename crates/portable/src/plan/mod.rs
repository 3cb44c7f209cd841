//! A graph laid out in memory: which step reads and writes what, where, in which order.

mod layout;
mod memory;

use crate::constant::Const;
use crate::error::OpResult;
use crate::graph::{Graph, Storage};
use crate::layout::{Layout, Shape};
use crate::op::{Args, In, Op, Out};
use candle_coreml_kernels as kernels;
use candle_coreml_mil::DType;
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

/// What a function does for one set of input shapes: immutable, shared by threads.
#[derive(Debug)]
pub struct Plan {
    /// In the order they run.
    pub steps: Vec<Step>,
    /// 4-byte elements of the arena.
    pub arena_elements: usize,
    /// Values given by the caller.
    pub inputs: Vec<Slot>,
    /// Values given back.
    pub outputs: Vec<Slot>,
    /// Name, type and shape of each state.
    pub states: Vec<(String, DType, Shape)>,
}

/// A named value at the border of a plan.
#[derive(Debug)]
pub struct Slot {
    /// The name predictions use.
    pub name: String,
    /// The type in the file.
    pub dtype: DType,
    /// Where it lies.
    pub operand: Operand,
}

/// One operation with its memory.
#[derive(Debug)]
pub struct Step {
    /// The node's name in the file.
    pub name: Arc<str>,
    /// What it computes.
    pub op: Arc<dyn Op>,
    /// Memory it reads.
    pub inputs: SmallVec<[Operand; 4]>,
    /// Memory it writes.
    pub outputs: SmallVec<[Operand; 2]>,
    /// Written type of each result.
    pub dtypes: SmallVec<[DType; 2]>,
    /// Where this step and a later one read weights row by row: the next such step. Its weights are announced to the threads before
    /// this one runs, who ask memory for them while they wait.
    pub then: Option<usize>,
}

/// A strided piece of memory.
#[derive(Debug, Clone)]
pub struct Operand {
    /// Which memory.
    pub place: Place,
    /// Offset (from the start of that memory), shape and strides.
    pub layout: Layout,
    /// Element type.
    pub storage: Storage,
}

/// Which memory an operand lies in.
#[derive(Debug, Clone)]
pub enum Place {
    /// A range of the arena, in 4-byte elements.
    Arena(Range<usize>),
    /// A constant.
    Const(Arc<Const>),
    /// A state, by position.
    State(usize),
    /// The memory of the step's first result.
    Result,
}

impl Plan {
    /// Lays out a graph.
    ///
    /// # Errors
    /// When the graph is inconsistent, which is a mistake of the engine.
    pub fn new(graph: &Graph) -> Result<Plan, crate::Error> {
        let draft = layout::draft(graph)?;
        Ok(memory::place(graph, draft))
    }

    /// Bytes of intermediate values.
    pub fn arena_bytes(&self) -> usize {
        self.arena_elements * 4
    }
}

/// Copies its input: to row-major memory, to 32-bit elements, into a state.
#[derive(Debug, Clone)]
pub struct Copy;

impl Op for Copy {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, _storage: Storage) -> bool {
        true
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let out = args.outputs.first_mut().and_then(Option::take);
        let pool = args.pool;
        match (args.inputs.first().copied(), out) {
            (Some(In::F32(x)), Some(Out::F32(y))) => kernels::copy(pool, x, y),
            (Some(In::F32(x)), Some(Out::F16(y))) => kernels::copy(pool, x, y),
            (Some(In::F16(x)), Some(Out::F32(y))) => kernels::copy(pool, x, y),
            (Some(In::F16(x)), Some(Out::F16(y))) => kernels::copy(pool, x, y),
            (Some(In::I32(x)), Some(Out::I32(y))) => kernels::copy(pool, x, y),
            _ => return Err("internal: a copy between floats and integers".into()),
        }
        Ok(())
    }
}
