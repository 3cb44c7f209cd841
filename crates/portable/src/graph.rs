//! The lowered program: values with a type and a shape each, and the operations between them.

use crate::constant::Const;
use crate::layout::Shape;
use crate::op::Op;
use candle_coreml_mil::DType;
use smallvec::SmallVec;
use std::sync::Arc;

/// Index of a value in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// How elements are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 32-bit floats: every floating-point value but states.
    F32,
    /// 16-bit floats: constants as stored.
    F16,
    /// 32-bit integers: every integer type, and booleans as 0 and 1.
    I32,
}

impl Storage {
    /// How computed values of this type are held.
    pub fn of(dtype: DType) -> Storage {
        if dtype.is_float() {
            Storage::F32
        } else {
            Storage::I32
        }
    }
}

/// A value: an edge of the graph.
#[derive(Debug, Clone)]
pub struct Value {
    /// The name in the file.
    pub name: Arc<str>,
    /// The type in the file.
    pub dtype: DType,
    /// Every dimension known.
    pub shape: Shape,
    /// Where it comes from.
    pub source: Source,
}

/// Where a value comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The caller, by position in [`Graph::inputs`].
    Input(usize),
    /// A state's content when the prediction starts, by position in [`Graph::states`].
    State(usize),
    /// The file.
    Const(Arc<Const>),
    /// A node.
    Node,
}

/// One operation.
#[derive(Debug, Clone)]
pub struct Node {
    /// The name in the file.
    pub name: Arc<str>,
    /// What it computes.
    pub op: Arc<dyn Op>,
    /// Values it reads.
    pub inputs: SmallVec<[ValueId; 4]>,
    /// Values it gives.
    pub outputs: SmallVec<[ValueId; 2]>,
}

/// A persistent buffer and the value it holds when the prediction ends.
#[derive(Debug, Clone)]
pub struct StateSlot {
    /// The state's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Its shape.
    pub shape: Shape,
    /// The content at the start.
    pub first: ValueId,
    /// The content at the end; the same value when it is never written.
    pub last: ValueId,
}

/// A function lowered for one set of input shapes.
///
/// Values are defined once. States are values too: `read_state` gives the current one and `write_state` names the next, so
/// that order is a matter of data flow alone.
#[derive(Debug, Clone, Default)]
pub struct Graph {
    /// All values.
    pub values: Vec<Value>,
    /// In an order in which every value is defined before it is used.
    pub nodes: Vec<Node>,
    /// Values given by the caller.
    pub inputs: Vec<ValueId>,
    /// Name and value of each result.
    pub outputs: Vec<(String, ValueId)>,
    /// Persistent buffers.
    pub states: Vec<StateSlot>,
    /// Patterns that the passes began to recognise and gave up.
    pub misses: Vec<Miss>,
}

/// A pattern of a pass that was there in part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// What would have been made of it: `attention`, `gated MLP`.
    pub pattern: &'static str,
    /// The node's name in the file.
    pub node: Arc<str>,
    /// What was not as the pattern wants it.
    pub why: String,
}

impl Graph {
    /// Adds a value.
    pub fn add_value(&mut self, name: Arc<str>, dtype: DType, shape: &[usize], source: Source) -> ValueId {
        let id = ValueId(u32::try_from(self.values.len()).expect("fewer than 2^32 values"));
        self.values.push(Value {
            name,
            dtype,
            shape: shape.into(),
            source,
        });
        id
    }

    /// The value behind an id.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Dimensions of a value.
    pub fn shape(&self, id: ValueId) -> &[usize] {
        &self.value(id).shape
    }

    /// The constant a value is, if it is one.
    pub fn constant(&self, id: ValueId) -> Option<&Arc<Const>> {
        match &self.value(id).source {
            Source::Const(c) => Some(c),
            _ => None,
        }
    }

    /// For each value the node that gives it.
    pub fn producers(&self) -> Vec<Option<usize>> {
        let mut by = vec![None; self.values.len()];
        for (i, node) in self.nodes.iter().enumerate() {
            for o in &node.outputs {
                by[o.0 as usize] = Some(i);
            }
        }
        by
    }

    /// For each value how often it is read, results and final states included.
    pub fn uses(&self) -> Vec<u32> {
        let mut n = vec![0; self.values.len()];
        let nodes = self.nodes.iter().flat_map(|node| node.inputs.iter().copied());
        let outputs = self.outputs.iter().map(|(_, v)| *v);
        let states = self.states.iter().map(|s| s.last);
        for v in nodes.chain(outputs).chain(states) {
            n[v.0 as usize] += 1;
        }
        n
    }
}

impl std::fmt::Display for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |id: &ValueId| match self.constant(*id) {
            Some(c) => c.short(),
            None => self.value(*id).name.to_string(),
        };
        for node in &self.nodes {
            let outs: Vec<String> = node
                .outputs
                .iter()
                .map(|o| {
                    let v = self.value(*o);
                    format!("{} {}{:?}", v.name, v.dtype, v.shape.as_slice())
                })
                .collect();
            let ins: Vec<String> = node.inputs.iter().map(show).collect();
            writeln!(f, "{} = {:?}({})", outs.join(", "), node.op, ins.join(", "))?;
        }
        for (name, v) in &self.outputs {
            writeln!(f, "-> {name} = {}", show(v))?;
        }
        for s in self.states.iter().filter(|s| s.first != s.last) {
            writeln!(f, "-> state {} = {}", s.name, show(&s.last))?;
        }
        Ok(())
    }
}
