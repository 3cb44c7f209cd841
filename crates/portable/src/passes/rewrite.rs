//! Walks a graph once and builds it anew, node by node, with a chance to replace each.

use crate::graph::{Graph, Miss, Node, Source, ValueId};
use crate::layout::Shape;
use crate::op::Op;
use crate::ops::view::View;
use candle_coreml_mil::DType;
use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;

/// The graph so far.
pub struct Rewriter {
    graph: Graph,
    done: Vec<Node>,
    /// For each value, the place in `done` of the node that gives it.
    by: Vec<Option<u32>>,
    uses: Vec<u32>,
    /// For each value, the one that is read in its place.
    instead: Vec<Option<ValueId>>,
    misses: RefCell<Vec<Miss>>,
}

/// Rebuilds `graph`; `visit` gives true when it has dealt with the node itself (by [`Rewriter::replace`], [`Rewriter::alias`]).
pub fn rewrite(mut graph: Graph, mut visit: impl FnMut(&mut Rewriter, &Node) -> bool) -> Graph {
    let uses = graph.uses();
    let nodes = std::mem::take(&mut graph.nodes);
    let mut r = Rewriter {
        graph,
        done: Vec::with_capacity(nodes.len()),
        by: vec![None; uses.len()],
        instead: vec![None; uses.len()],
        uses,
        misses: RefCell::default(),
    };
    for mut node in nodes {
        for v in &mut node.inputs {
            *v = r.current(*v);
        }
        if !visit(&mut r, &node) {
            r.push(node);
        }
    }
    r.finish()
}

impl Rewriter {
    fn current(&self, v: ValueId) -> ValueId {
        self.instead.get(v.0 as usize).copied().flatten().unwrap_or(v)
    }

    fn push(&mut self, node: Node) {
        for &o in &node.outputs {
            set(
                &mut self.by,
                o,
                u32::try_from(self.done.len()).expect("fewer than 2^32 nodes"),
            );
        }
        self.done.push(node);
    }

    fn finish(mut self) -> Graph {
        let instead = std::mem::take(&mut self.instead);
        let current = |v: &mut ValueId| *v = instead.get(v.0 as usize).copied().flatten().unwrap_or(*v);
        self.graph.outputs.iter_mut().for_each(|(_, v)| current(v));
        self.graph.states.iter_mut().for_each(|s| current(&mut s.last));
        self.graph.nodes = self.done;
        self.graph.misses.extend(self.misses.into_inner());
        super::clean(self.graph)
    }

    /// The node that gives a value.
    pub fn producer(&self, v: ValueId) -> Option<&Node> {
        let at = self.by.get(v.0 as usize).copied().flatten()?;
        self.done.get(at as usize)
    }

    /// The node that gives a value, if its operation is a `T`.
    pub fn find<T: Op>(&self, v: ValueId) -> Option<(&T, &Node)> {
        let node = self.producer(v)?;
        as_op::<T>(node).map(|op| (op, node))
    }

    /// Notes why a pattern whose beginning is at `node` ended there. Gives nothing, for the pattern to return.
    pub fn miss<T>(&self, pattern: &'static str, node: &Node, why: impl Into<String>) -> Option<T> {
        let (node, why) = (node.name.clone(), why.into());
        self.misses.borrow_mut().push(Miss { pattern, node, why });
        None
    }

    /// The inputs of a sum, the one that `fits` first. `fits` says nothing of a value that is no beginning of the pattern, and why one
    /// that is does not fit.
    pub fn addends(
        &self,
        pattern: &'static str,
        sum: &Node,
        fits: impl Fn(ValueId, ValueId) -> Option<Result<(), &'static str>>,
    ) -> Option<(ValueId, ValueId)> {
        let (a, b) = (sum.inputs[0], sum.inputs[1]);
        match (fits(a, b), fits(b, a)) {
            (Some(Ok(())), _) => Some((a, b)),
            (_, Some(Ok(()))) => Some((b, a)),
            (Some(Err(why)), _) | (None, Some(Err(why))) => self.miss(pattern, sum, why),
            (None, None) => None,
        }
    }

    /// Whether nothing but one node reads the value.
    pub fn used_once(&self, v: ValueId) -> bool {
        self.uses.get(v.0 as usize).copied() == Some(1)
    }

    /// Dimensions of a value.
    pub fn shape(&self, v: ValueId) -> Shape {
        self.graph.value(v).shape.clone()
    }

    /// Type of a value.
    pub fn dtype(&self, v: ValueId) -> DType {
        self.graph.value(v).dtype
    }

    /// The number a one-element constant holds.
    pub fn scalar(&self, v: ValueId) -> Option<f32> {
        self.graph.constant(v).and_then(|c| c.scalar())
    }

    /// The elements of a constant of integers.
    pub fn ints(&self, v: ValueId) -> Option<&[i32]> {
        self.graph.constant(v).and_then(|c| c.ints())
    }

    /// The elements of a constant.
    pub fn constant(&self, v: ValueId) -> Option<Arc<[f32]>> {
        self.graph.constant(v).map(|c| c.dense())
    }

    /// The elements of a constant that is one vector along the last dimension, as a value of `len` elements.
    pub fn vector(&self, v: ValueId, len: usize) -> Option<Arc<[f32]>> {
        let c = self.graph.constant(v)?;
        let flat = c.shape.last() == Some(&len) && c.shape.iter().rev().skip(1).all(|&d| d == 1);
        flat.then(|| c.dense())
    }

    /// Adds a node of one result before the one being visited.
    pub fn emit(
        &mut self,
        at: &Node,
        op: impl Op,
        inputs: &[ValueId],
        dtype: DType,
        shape: &[usize],
    ) -> ValueId {
        let id = self.graph.add_value(at.name.clone(), dtype, shape, Source::Node);
        self.uses.push(inputs.len() as u32);
        let node = Node {
            name: at.name.clone(),
            op: Arc::new(op),
            inputs: inputs.into(),
            outputs: smallvec::smallvec![id],
        };
        self.push(node);
        id
    }

    /// A value under another shape of as many elements.
    pub fn reshape(&mut self, at: &Node, v: ValueId, shape: &[usize]) -> ValueId {
        if self.shape(v).as_slice() == shape {
            return v;
        }
        let dtype = self.dtype(v);
        self.emit(at, View::Reshape(shape.into()), &[v], dtype, shape)
    }

    /// Puts an operation with other inputs in the place of the node being visited.
    pub fn replace(&mut self, node: &Node, op: Arc<dyn Op>, inputs: &[ValueId]) {
        self.push(Node {
            op,
            inputs: inputs.into(),
            ..node.clone()
        });
    }

    /// Makes every later reader of the node's result read `v` instead.
    pub fn alias(&mut self, node: &Node, v: ValueId) {
        if let Some(&o) = node.outputs.first() {
            self.uses[v.0 as usize] += self.uses[o.0 as usize].saturating_sub(1);
            set(&mut self.instead, o, v);
        }
    }
}

/// Notes something about a value.
fn set<T: Copy>(table: &mut Vec<Option<T>>, v: ValueId, to: T) {
    let at = v.0 as usize;
    if at >= table.len() {
        table.resize(at + 1, None);
    }
    table[at] = Some(to);
}

/// The operation of a node as a `T`.
pub fn as_op<T: Op>(node: &Node) -> Option<&T> {
    let op: &dyn Any = &*node.op;
    op.downcast_ref::<T>()
}
