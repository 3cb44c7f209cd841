//! Elementwise operations in a cheaper form that gives the same numbers.

use super::rewrite::{as_op, rewrite};
use crate::graph::Graph;
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use candle_coreml_kernels::{Binary, Unary};
use std::sync::Arc;

/// Squares in the place of powers of 2.
pub fn simplify(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        let Some(BinaryNode(Binary::Pow)) = as_op::<BinaryNode>(node) else {
            return false;
        };
        let (x, y) = (node.inputs[0], node.inputs[1]);
        if r.scalar(y) != Some(2.0) || r.shape(x) != r.shape(node.outputs[0]) {
            return false;
        }
        r.replace(node, Arc::new(UnaryNode(Unary::Square)), &[x]);
        true
    })
}
