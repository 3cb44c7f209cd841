//! Elementwise operations in a cheaper form that gives the same numbers.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use candle_coreml_kernels::{Binary, Unary};
use std::sync::Arc;

/// Squares in the place of powers of 2, one activation in the place of a product with a gate.
pub fn simplify(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        square(r, node).or_else(|| gated(r, node)).is_some()
    })
}

/// `x ^ 2`.
fn square(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Pow) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (x, y) = (node.inputs[0], node.inputs[1]);
    if r.scalar(y) != Some(2.0) || r.shape(x) != r.shape(node.outputs[0]) {
        return None;
    }
    r.replace(node, Arc::new(UnaryNode(Unary::Square)), &[x]);
    Some(())
}

/// `x * sigmoid(x)`, and `x * hard_sigmoid(x)` where `x` may be cut off below.
fn gated(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Mul) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let gate_of = |gate: ValueId, x: ValueId| {
        let (UnaryNode(op), source) = r.find::<UnaryNode>(gate)?;
        (source.inputs[0] == x && r.used_once(gate)).then_some((*op, x))
    };
    let (gate, x) = gate_of(a, b).or_else(|| gate_of(b, a))?;
    match gate {
        Unary::Sigmoid => r.replace(node, Arc::new(UnaryNode(Unary::Silu)), &[x]),
        Unary::SigmoidHard { alpha, beta } => {
            let (from, x) = match r.find::<UnaryNode>(x) {
                Some((UnaryNode(Unary::ThresholdedRelu { alpha }), n)) => (*alpha, n.inputs[0]),
                _ => (f32::NEG_INFINITY, x),
            };
            r.replace(
                node,
                Arc::new(UnaryNode(Unary::HardSwish { from, alpha, beta })),
                &[x],
            );
        }
        _ => return None,
    }
    Some(())
}
