//! What follows a channels-last convolution, done inside it: activation, residual, and the activation behind that.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node};
use crate::layout::elements;
use crate::ops::conv::{ConvChain, ConvLast};
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use candle_coreml_kernels::{self as kernels, Binary};
use std::sync::Arc;

/// Takes activations and residuals into the convolutions before them.
pub fn epilogues(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        activation(r, node).or_else(|| residual(r, node)).is_some()
    })
}

/// Depthwise convolutions of large pictures with the convolutions of one pixel around them, for a machine of `threads`.
pub fn chains(graph: Graph, threads: usize) -> Graph {
    let graph = rewrite(graph, |r, node| projected(r, node, threads).is_some());
    rewrite(graph, |r, node| expanded(r, node, threads).is_some())
}

const CHAIN: &str = "chain of convolutions";

/// Numbers between two convolutions from which they go to memory and back: more than a second-level cache holds.
const LARGE: usize = 200_000;

/// Rows of results that each thread should have: those at the borders are expanded twice.
const ROWS_EACH: usize = 8;

/// Whether a chain is worth it: with `between`, the most that lies between its convolutions.
fn worth(r: &Rewriter, chain: &ConvChain, node: &Node, between: usize, threads: usize) -> bool {
    let rows = r.shape(node.outputs[0]).get(1).copied().unwrap_or(0);
    let why = if !kernels::has_conv_chain(&chain.call(kernels::ConvBeside::None)) {
        return false;
    } else if between < LARGE {
        "what lies between the convolutions fits a cache"
    } else if rows < ROWS_EACH * threads {
        "the picture has few rows for the threads"
    } else {
        return true;
    };
    r.miss::<()>(CHAIN, node, why);
    false
}

/// `conv(depthwise(x))`, `conv(depthwise(conv(x)))`.
fn projected(r: &mut Rewriter, node: &Node, threads: usize) -> Option<()> {
    let project = as_op::<ConvLast>(node)?.clone();
    let between = node.inputs[0];
    let (depthwise, source) = r.find::<ConvLast>(between)?;
    if source.inputs.len() > 1 || !r.used_once(between) {
        return None;
    }
    let x = source.inputs[0];
    let mut chain = ConvChain {
        expand: None,
        depthwise: depthwise.clone(),
        project: Some(project),
    };
    let mut inputs = node.inputs.clone();
    inputs[0] = x;
    let first = r
        .find::<ConvLast>(x)
        .filter(|(_, n)| n.inputs.len() == 1 && r.used_once(x));
    if let Some((expand, first)) = first {
        chain.expand = Some(expand.clone());
        if worth(r, &chain, node, elements(&r.shape(x)), threads) {
            inputs[0] = first.inputs[0];
            r.replace(node, Arc::new(chain), &inputs);
            return Some(());
        }
        chain.expand = None;
    }
    if !worth(r, &chain, node, elements(&r.shape(between)), threads) {
        return None;
    }
    r.replace(node, Arc::new(chain), &inputs);
    Some(())
}

/// `depthwise(conv(x))`.
fn expanded(r: &mut Rewriter, node: &Node, threads: usize) -> Option<()> {
    let depthwise = as_op::<ConvLast>(node)?.clone();
    let between = node.inputs[0];
    let (expand, source) = r.find::<ConvLast>(between)?;
    if node.inputs.len() > 1 || source.inputs.len() > 1 || !r.used_once(between) {
        return None;
    }
    let chain = ConvChain {
        expand: Some(expand.clone()),
        depthwise,
        project: None,
    };
    if !worth(r, &chain, node, elements(&r.shape(between)), threads) {
        return None;
    }
    let x = source.inputs[0];
    r.replace(node, Arc::new(chain), &[x]);
    Some(())
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
