//! Group and instance norms out of means, differences and roots, with the weights and the activation that follow.

use super::norm::is_square;
use super::rewrite::{Rewriter, as_op, rewrite};
use super::views;
use crate::graph::{Graph, Node, ValueId};
use crate::layout::elements;
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use crate::ops::normalization::GroupNorm;
use crate::ops::reduction::ReduceNode;
use crate::ops::view::View;
use candle_coreml_kernels::{Binary, Reduce, Unary};
use std::sync::Arc;

const GROUP_NORM: &str = "group norm";

/// Recognises the norm, then takes up the multiplication and the addition per channel that follow.
pub fn fuse(graph: Graph) -> Graph {
    let graph = rewrite(graph, |r, node| spelled(r, node).is_some());
    let graph = views::simplify(graph);
    let graph = rewrite(graph, |r, node| weighted(r, node, Binary::Mul).is_some());
    rewrite(graph, |r, node| weighted(r, node, Binary::Add).is_some())
}

/// Takes activations into the norms before them.
pub fn activations(graph: Graph) -> Graph {
    rewrite(graph, |r, node| activation(r, node).is_some())
}

/// `low / sqrt(mean(low²) + eps)` with `low = x - mean(x)`, means over all dimensions but the first two of `x`, which may be a
/// reshape that splits channels into groups.
fn spelled(r: &mut Rewriter, node: &Node) -> Option<()> {
    let (low, eps) = divided(r, node)?;
    let (BinaryNode(Binary::Sub), difference) = r.find::<BinaryNode>(low)? else {
        return None;
    };
    let split = difference.inputs[0];
    mean(r, difference.inputs[1], |v| v == split)?;
    let shape = r.shape(split);
    let (x, whole) = match r.find::<View>(split) {
        Some((View::Reshape(_), n)) => (n.inputs[0], r.shape(n.inputs[0])),
        _ => (split, shape.clone()),
    };
    let (samples, groups) = (shape[0], shape[1]);
    let fits = whole.len() >= 3 && whole[0] == samples && groups > 0 && whole[1].is_multiple_of(groups);
    if !fits || elements(&whole) == 0 {
        let why = format!("{shape:?} does not split the channels of {whole:?} into groups");
        return r.miss(GROUP_NORM, node, why);
    }
    let op = GroupNorm {
        groups,
        eps,
        gamma: None,
        beta: None,
        activation: None,
    };
    if x == split {
        r.replace(node, Arc::new(op), &[x]);
    } else {
        let y = r.emit(node, op, &[x], r.dtype(node.outputs[0]), &whole);
        r.replace(node, Arc::new(View::Reshape(shape)), &[y]);
    }
    Some(())
}

/// The numerator and the epsilon of `low / sqrt(mean(low²) + eps)` and of `low * rsqrt(mean(low²) + eps)`.
fn divided(r: &Rewriter, node: &Node) -> Option<(ValueId, f32)> {
    let op = as_op::<BinaryNode>(node)?.0;
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let root = |low: ValueId, v: ValueId| {
        let (UnaryNode(unary), n) = r.find::<UnaryNode>(unrepeated(r, v))?;
        let more = match (op, unary) {
            (Binary::Div, Unary::Sqrt) => 0.0,
            (Binary::Mul, Unary::Rsqrt { eps }) => *eps,
            _ => return None,
        };
        variance(r, n.inputs[0], low).map(|eps| (low, eps + more))
    };
    match op {
        Binary::Div => root(a, b),
        Binary::Mul => root(a, b).or_else(|| root(b, a)),
        _ => None,
    }
}

/// The epsilon of `mean(low²) + eps`.
fn variance(r: &Rewriter, v: ValueId, low: ValueId) -> Option<f32> {
    let (inner, eps) = match r.find::<BinaryNode>(v) {
        Some((BinaryNode(Binary::Add), n)) => {
            let (a, b) = (n.inputs[0], n.inputs[1]);
            let number = |v: ValueId| r.scalar(unrepeated(r, v));
            number(b).map(|e| (a, e)).or_else(|| number(a).map(|e| (b, e)))?
        }
        _ => (v, 0.0),
    };
    mean(r, inner, |square| is_square(r, square, low)).map(|()| eps)
}

/// Whether `v` is the mean over all dimensions but the first two of what `of` says.
fn mean(r: &Rewriter, v: ValueId, of: impl Fn(ValueId) -> bool) -> Option<()> {
    let (reduce, n) = r.find::<ReduceNode>(unrepeated(r, v))?;
    let rank = r.shape(n.inputs[0]).len();
    let all = rank >= 3 && reduce.axes.iter().copied().eq(2..rank);
    (reduce.kind == Reduce::Mean && all && of(n.inputs[0])).then_some(())
}

/// The value before it is repeated along dimensions.
fn unrepeated(r: &Rewriter, mut v: ValueId) -> ValueId {
    while let Some((View::Broadcast(_), n)) = r.find::<View>(v) {
        v = n.inputs[0];
    }
    v
}

/// `norm(x) * gamma`, `norm(x) + beta`.
fn weighted(r: &mut Rewriter, node: &Node, wanted: Binary) -> Option<()> {
    let op = as_op::<BinaryNode>(node)?.0;
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let (normed, weight) = if r.find::<GroupNorm>(a).is_some() {
        (a, b)
    } else {
        (b, a)
    };
    let (norm, source) = r.find::<GroupNorm>(normed)?;
    if op != wanted || !r.used_once(normed) || r.shape(normed) != r.shape(node.outputs[0]) {
        return None;
    }
    let mut norm = norm.clone();
    let Some(vector) = by_channel(r, unrepeated(r, weight), &r.shape(normed)) else {
        let why = "what follows the norm is no constant vector along its channels";
        return r.miss("weights of a group norm", node, why);
    };
    match op {
        Binary::Mul if norm.gamma.is_none() && norm.beta.is_none() => norm.gamma = Some(vector),
        Binary::Add if norm.beta.is_none() => norm.beta = Some(vector),
        _ => return None,
    }
    let x = source.inputs[0];
    r.replace(node, Arc::new(norm), &[x]);
    Some(())
}

/// The elements of a constant that is one vector along dimension 1 of `shape`, or one number.
fn by_channel(r: &Rewriter, v: ValueId, shape: &[usize]) -> Option<Arc<[f32]>> {
    let channels = shape[1];
    if let Some(number) = r.scalar(v) {
        return Some(vec![number; channels].into());
    }
    let own = r.shape(v);
    let lead = shape.len().checked_sub(own.len())?;
    let flat = own
        .iter()
        .enumerate()
        .all(|(i, &d)| d == if lead + i == 1 { channels } else { 1 });
    flat.then(|| r.constant(v))?
}

/// `act(norm(x))`.
fn activation(r: &mut Rewriter, node: &Node) -> Option<()> {
    let act = as_op::<UnaryNode>(node)?.0;
    let normed = node.inputs[0];
    let (norm, source) = r.find::<GroupNorm>(normed)?;
    if norm.activation.is_some() || !r.used_once(normed) {
        return None;
    }
    let op = GroupNorm {
        activation: Some(act),
        ..norm.clone()
    };
    let x = source.inputs[0];
    r.replace(node, Arc::new(op), &[x]);
    Some(())
}
