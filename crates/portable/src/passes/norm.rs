//! RMS normalisation and softmax out of what converters spell them with.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::layout::Shape;
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use crate::ops::normalization::{LayerNorm, RmsNorm, Softmax};
use crate::ops::reduction::ReduceNode;
use crate::ops::tensor_operation::Concat;
use crate::ops::view::View;
use candle_coreml_kernels::{Binary, Reduce, Unary};
use std::sync::Arc;

/// Recognises RMS normalisation in three spellings, and takes up the multiplication with a weight that follows.
pub fn rms_norm(graph: Graph) -> Graph {
    let graph = rewrite(graph, |r, node| {
        let found = doubled(r, node).or_else(|| spelled_out(r, node));
        let Some((x, eps)) = found else { return false };
        r.replace(node, Arc::new(RmsNorm { weight: None, eps }), &[x]);
        true
    });
    rewrite(graph, |r, node| weighted(r, node).is_some())
}

const RMS_NORM: &str = "RMS norm";

/// `layer_norm(concat(x, -x))` with the first half kept: the mean of the doubled vector is 0 and its variance is mean(x²).
fn doubled(r: &Rewriter, node: &Node) -> Option<(ValueId, f32)> {
    let View::Slice { begin, step, size } = as_op::<View>(node)? else {
        return None;
    };
    let (norm, normed) = r.find::<LayerNorm>(node.inputs[0])?;
    let (concat, joined) = r.find::<Concat>(normed.inputs[0])?;
    let &[x, negative] = joined.inputs.as_slice() else {
        return None;
    };
    let shape = r.shape(x);
    let first_half = begin.iter().all(|&b| b == 0) && step.iter().all(|&s| s == 1) && *size == shape;
    let plain =
        norm.axes == 1 && norm.gamma.is_none() && norm.beta.is_none() && concat.axis + 1 == shape.len();
    if !is_negative(r, negative, x) {
        return None;
    }
    if !(first_half && plain) {
        let why = "of the norm of a doubled vector, the first half must be kept, the last dimension alone normalised, without weights";
        return r.miss(RMS_NORM, node, why);
    }
    Some((x, norm.eps))
}

fn is_negative(r: &Rewriter, v: ValueId, x: ValueId) -> bool {
    if let Some((UnaryNode(Unary::Neg), n)) = r.find::<UnaryNode>(v) {
        return n.inputs[0] == x;
    }
    let Some((BinaryNode(Binary::Mul), n)) = r.find::<BinaryNode>(v) else {
        return false;
    };
    let (a, b) = (n.inputs[0], n.inputs[1]);
    (a == x && r.scalar(b) == Some(-1.0)) || (b == x && r.scalar(a) == Some(-1.0))
}

/// `x * rsqrt(mean(x²) + eps)`, or `x / sqrt(mean(x²) + eps)`.
fn spelled_out(r: &Rewriter, node: &Node) -> Option<(ValueId, f32)> {
    let op = as_op::<BinaryNode>(node)?.0;
    let (a, b) = (node.inputs[0], node.inputs[1]);
    match op {
        Binary::Mul => rms_of(r, node, a, b).or_else(|| rms_of(r, node, b, a)),
        Binary::Div => {
            let (UnaryNode(Unary::Sqrt), root) = r.find::<UnaryNode>(b)? else {
                return None;
            };
            let Some(eps) = mean_square(r, root.inputs[0], a) else {
                return r.miss(RMS_NORM, node, NO_MEAN_SQUARE);
            };
            Some((a, eps))
        }
        _ => None,
    }
}

const NO_MEAN_SQUARE: &str =
    "the root is not of the mean, over the last dimension, of the squares of what it divides";

fn rms_of(r: &Rewriter, node: &Node, x: ValueId, factor: ValueId) -> Option<(ValueId, f32)> {
    let (UnaryNode(Unary::Rsqrt { eps }), root) = r.find::<UnaryNode>(factor)? else {
        return None;
    };
    let Some(inner) = mean_square(r, root.inputs[0], x) else {
        return r.miss(RMS_NORM, node, NO_MEAN_SQUARE);
    };
    Some((x, inner + eps))
}

/// The epsilon of `mean(x²) + eps` over the last dimension.
fn mean_square(r: &Rewriter, v: ValueId, x: ValueId) -> Option<f32> {
    let (mean, eps) = match r.find::<BinaryNode>(v) {
        Some((BinaryNode(Binary::Add), n)) => {
            let (a, b) = (n.inputs[0], n.inputs[1]);
            r.scalar(b)
                .map(|e| (a, e))
                .or_else(|| r.scalar(a).map(|e| (b, e)))?
        }
        _ => (v, 0.0),
    };
    let (reduce, node) = r.find::<ReduceNode>(mean)?;
    let last: Shape = smallvec::smallvec![r.shape(x).len().checked_sub(1)?];
    if reduce.axes != last {
        return None;
    }
    match reduce.kind {
        Reduce::Mean => is_square(r, node.inputs[0], x).then_some(eps),
        _ => None,
    }
}

pub fn is_square(r: &Rewriter, v: ValueId, x: ValueId) -> bool {
    if let Some((UnaryNode(Unary::Square), n)) = r.find::<UnaryNode>(v) {
        return n.inputs[0] == x;
    }
    match r.find::<BinaryNode>(v) {
        Some((BinaryNode(Binary::Mul), n)) => n.inputs.iter().all(|&i| i == x),
        Some((BinaryNode(Binary::Pow), n)) => n.inputs[0] == x && r.scalar(n.inputs[1]) == Some(2.0),
        _ => false,
    }
}

fn weighted(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Mul) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let (normed, weight) = if r.find::<RmsNorm>(a).is_some() {
        (a, b)
    } else {
        (b, a)
    };
    let (norm, source) = r.find::<RmsNorm>(normed)?;
    let shape = r.shape(normed);
    let why = if !r.used_once(normed) {
        "the norm's result is read elsewhere too"
    } else if norm.weight.is_some() {
        "the norm has a weight already"
    } else {
        "what the norm is multiplied with is no constant vector along its last dimension"
    };
    let vector = shape.last().and_then(|&len| r.vector(weight, len));
    let free = norm.weight.is_none() && r.used_once(normed) && r.shape(node.outputs[0]) == shape;
    let Some(vector) = vector.filter(|_| free) else {
        return r.miss("weight of an RMS norm", node, why);
    };
    let (op, x) = (
        RmsNorm {
            weight: Some(vector),
            eps: norm.eps,
        },
        source.inputs[0],
    );
    r.replace(node, Arc::new(op), &[x]);
    Some(())
}

/// `exp(x - max(x)) / sum(exp(x - max(x)))` over the last dimension.
pub fn softmax(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        let Some(x) = spelled_softmax(r, node) else {
            return false;
        };
        r.replace(node, Arc::new(Softmax), &[x]);
        true
    })
}

const SOFTMAX: &str = "softmax";

fn spelled_softmax(r: &Rewriter, node: &Node) -> Option<ValueId> {
    let BinaryNode(Binary::Div) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (exp, sum) = (node.inputs[0], node.inputs[1]);
    let over_last = |v: ValueId, kind: Reduce| {
        let (op, n) = r.find::<ReduceNode>(v)?;
        let rank = r.shape(n.inputs[0]).len();
        (op.kind == kind && op.axes.as_slice() == [rank - 1]).then(|| n.inputs[0])
    };
    let (UnaryNode(Unary::Exp), e) = r.find::<UnaryNode>(exp)? else {
        return None;
    };
    r.find::<ReduceNode>(sum).filter(|(_, n)| n.inputs[0] == exp)?;
    if over_last(sum, Reduce::Sum) != Some(exp) {
        return r.miss(
            SOFTMAX,
            node,
            "the exponentials are not summed over the last dimension",
        );
    }
    let shifted = r
        .find::<BinaryNode>(e.inputs[0])
        .filter(|(op, _)| op.0 == Binary::Sub);
    let x = shifted.map(|(_, s)| (s.inputs[0], s.inputs[1]));
    match x {
        Some((x, top)) if over_last(top, Reduce::Max) == Some(x) => Some(x),
        _ => r.miss(
            SOFTMAX,
            node,
            "the maximum over the last dimension is not subtracted first",
        ),
    }
}
