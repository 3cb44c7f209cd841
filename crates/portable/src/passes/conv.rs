//! What follows a channels-last convolution, done inside it: activation, residual, and the activation behind that.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node};
use crate::ops::conv::ConvLast;
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use candle_coreml_kernels::Binary;
use std::sync::Arc;

/// Takes activations and residuals into the convolutions before them.
pub fn epilogues(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        activation(r, node).or_else(|| residual(r, node)).is_some()
    })
}

const ACTIVATION: &str = "activation of a convolution";

/// `act(conv(x))`, `act(conv(x) + r)`.
fn activation(r: &mut Rewriter, node: &Node) -> Option<()> {
    let act = as_op::<UnaryNode>(node)?.0;
    let sum = node.inputs[0];
    let (conv, source) = r.find::<ConvLast>(sum)?;
    let mut op = conv.clone();
    if conv.last.is_some() {
        return r.miss(ACTIVATION, node, "the convolution has a last activation already");
    }
    if !r.used_once(sum) {
        return r.miss(ACTIVATION, node, "the convolution is read elsewhere too");
    }
    if source.inputs.len() > 1 {
        op.last = Some(act);
    } else if conv.activation.is_none() {
        op.activation = Some(act);
    } else {
        return r.miss(ACTIVATION, node, "the convolution has an activation already");
    }
    let inputs = source.inputs.clone();
    r.replace(node, Arc::new(op), &inputs);
    Some(())
}

/// `conv(x) + r`.
fn residual(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Add) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let out = r.shape(node.outputs[0]);
    let (sum, other) = r.addends("residual of a convolution", node, |sum, other| {
        let (op, n) = r.find::<ConvLast>(sum)?;
        Some(if n.inputs.len() > 1 || op.last.is_some() {
            Err("the convolution has a residual already")
        } else if !r.used_once(sum) || sum == other {
            Err("the convolution is read elsewhere too")
        } else if r.shape(sum) != out || r.shape(other) != out {
            Err("the shapes of convolution and residual differ")
        } else {
            Ok(())
        })
    })?;
    let (conv, source) = r.find::<ConvLast>(sum)?;
    let (op, x) = (conv.clone(), source.inputs[0]);
    r.replace(node, Arc::new(op), &[x, other]);
    Some(())
}
