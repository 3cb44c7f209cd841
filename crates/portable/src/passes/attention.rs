//! Attention out of matrix products, softmax, scale and mask, with heads that converters repeat read once.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::layout::{Shape, elements};
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::linear::MatMul;
use crate::ops::normalization::Softmax;
use crate::ops::transformers::Attention;
use crate::ops::view::View;
use candle_coreml_kernels::{Arithmetic, Binary};
use std::sync::Arc;

/// Recognises `softmax(q kᵀ * scale + mask) v`.
pub fn fuse(graph: Graph, arithmetic: Arithmetic) -> Graph {
    let graph = rewrite(graph, |r, node| spelled(r, node, arithmetic).is_some());
    rewrite(graph, |r, node| ungroup_inputs(r, node).is_some())
}

/// What the scores are made of.
struct Scores {
    q: ValueId,
    k: Keys,
    mask: Option<ValueId>,
    scale: f32,
}

/// The right side of the product of queries and keys.
#[derive(Clone, Copy)]
enum Keys {
    /// `[.., T, D]`, of which the product reads the transposed form.
    Rows(ValueId),
    /// `[.., D, T]`: a converter has joined the transposition with the one that splits the heads.
    Columns(ValueId),
}

impl Keys {
    /// The shape of the keys as rows.
    fn shape(self, r: &Rewriter) -> Shape {
        match self {
            Keys::Rows(k) => r.shape(k),
            Keys::Columns(turned) => {
                let mut shape = r.shape(turned);
                let rank = shape.len();
                if rank >= 2 {
                    shape.swap(rank - 2, rank - 1);
                }
                shape
            }
        }
    }

    /// The keys as rows.
    fn rows(self, r: &mut Rewriter, at: &Node) -> ValueId {
        let turned = match self {
            Keys::Rows(k) => return k,
            Keys::Columns(turned) => turned,
        };
        let (shape, dtype) = (self.shape(r), r.dtype(turned));
        let mut perm: Shape = (0..shape.len()).collect();
        perm.swap(shape.len() - 2, shape.len() - 1);
        r.emit(at, View::Permute(perm), &[turned], dtype, &shape)
    }
}

fn spelled(r: &mut Rewriter, node: &Node, arithmetic: Arithmetic) -> Option<()> {
    as_op::<MatMul>(node)?;
    let (weights, v) = (node.inputs[0], node.inputs[1]);
    let (_, softmax) = r.find::<Softmax>(through_reshape(r, weights))?;
    let Some(scores) = scores(r, softmax.inputs[0]) else {
        let why = "under the softmax is no product with keys, times a number, plus a mask";
        return r.miss(ATTENTION, node, why);
    };
    let (sq, sk, sv) = (r.shape(scores.q), scores.k.shape(r), r.shape(v));
    let rank = sq.len();
    if rank < 3 || sk.len() != rank || sv.len() < 2 || sq[..rank - 3] != sk[..rank - 3] {
        return r.miss(ATTENTION, node, other_heads(&sq, &sk, &sv));
    }
    let (heads, keys, size) = (sq[rank - 3], sk[rank - 2], sv[sv.len() - 1]);
    // The values may have lost leading dimensions of 1 on the way.
    let whole = elements(&sq[..rank - 3]) * heads * keys * size == elements(&sv);
    if !whole || sk[rank - 3] != heads || sv[sv.len() - 2] != keys {
        return r.miss(ATTENTION, node, other_heads(&sq, &sk, &sv));
    }
    let mut wide: Shape = sq[..rank - 2].into();
    wide.extend_from_slice(&[keys, size]);
    let v = r.reshape(node, v, &wide);
    let k = scores.k.rows(r, node);
    let mut inputs = vec![scores.q, k, v];
    inputs.extend(scores.mask);
    let mut shape: Shape = sq[..rank - 1].into();
    shape.push(size);
    let out = node.outputs[0];
    let op = Attention {
        scale: scores.scale,
        arithmetic,
    };
    if r.shape(out) == shape {
        r.replace(node, Arc::new(op), &inputs);
    } else {
        let y = r.emit(node, op, &inputs, r.dtype(out), &shape);
        let target = r.shape(out);
        r.replace(node, Arc::new(View::Reshape(target)), &[y]);
    }
    Some(())
}

const ATTENTION: &str = "attention";

fn other_heads(q: &[usize], k: &[usize], v: &[usize]) -> String {
    format!("queries {q:?}, keys {k:?} and values {v:?} are not all [.., heads, positions, size]")
}

/// The value a reshape that keeps the last two dimensions looks at.
fn through_reshape(r: &Rewriter, v: ValueId) -> ValueId {
    match r.find::<View>(v) {
        Some((View::Reshape(_), n)) => {
            let (from, to) = (r.shape(n.inputs[0]), r.shape(v));
            if from.last_chunk::<2>() == to.last_chunk::<2>() {
                n.inputs[0]
            } else {
                v
            }
        }
        _ => v,
    }
}

fn scores(r: &Rewriter, v: ValueId) -> Option<Scores> {
    let mut at = v;
    let mut mask = None;
    if let Some((BinaryNode(Binary::Add), n)) = r.find::<BinaryNode>(at) {
        // The side that is a product of matrices (scaled or not) is the scores, the other the mask.
        let product = |v: ValueId| product(r, v).is_some();
        let (a, b) = (n.inputs[0], n.inputs[1]);
        (at, mask) = if product(a) { (a, Some(b)) } else { (b, Some(a)) };
        if r.shape(at) != r.shape(v) {
            return None;
        }
    }
    let (q, k, scale) = product(r, at)?;
    Some(Scores { q, k, mask, scale })
}

/// `q kᵀ`, perhaps times a number or divided by one.
fn product(r: &Rewriter, v: ValueId) -> Option<(ValueId, Keys, f32)> {
    let (at, scale) = match r.find::<BinaryNode>(v) {
        Some((BinaryNode(Binary::Mul), n)) => {
            let (a, b) = (n.inputs[0], n.inputs[1]);
            r.scalar(b)
                .map(|s| (a, s))
                .or_else(|| r.scalar(a).map(|s| (b, s)))?
        }
        Some((BinaryNode(Binary::Div), n)) => (n.inputs[0], 1.0 / r.scalar(n.inputs[1])?),
        _ => (v, 1.0),
    };
    let (_, n) = r.find::<MatMul>(at)?;
    let keys = match r.find::<View>(n.inputs[1]) {
        Some((View::Permute(perm), turned)) if swaps_last_two(perm) => Keys::Rows(turned.inputs[0]),
        _ => Keys::Columns(n.inputs[1]),
    };
    Some((n.inputs[0], keys, scale))
}

fn swaps_last_two(perm: &[usize]) -> bool {
    let rank = perm.len();
    rank >= 2
        && perm[..rank - 2].iter().enumerate().all(|(i, &p)| i == p)
        && perm[rank - 2..] == [rank - 1, rank - 2]
}

/// Reads repeated keys and values where they were before the repetition.
fn ungroup_inputs(r: &mut Rewriter, node: &Node) -> Option<()> {
    let op = as_op::<Attention>(node)?.clone();
    let (k, v) = (node.inputs[1], node.inputs[2]);
    let (groups_k, from_k) = repeated_heads(r, k)?;
    let (groups_v, from_v) = repeated_heads(r, v)?;
    if groups_k != groups_v {
        return None;
    }
    let before = |r: &mut Rewriter, from: ValueId, v: ValueId| {
        let mut shape = r.shape(v);
        let heads = shape.len() - 3;
        shape[heads] /= groups_k;
        r.reshape(node, from, &shape)
    };
    let mut inputs = node.inputs.clone();
    inputs[1] = before(r, from_k, k);
    inputs[2] = before(r, from_v, v);
    r.replace(node, Arc::new(op), &inputs);
    Some(())
}

/// For `[1.., H, T, D]` made by repeating each of `H / g` heads `g` times in a row: g, and the value before.
fn repeated_heads(r: &Rewriter, v: ValueId) -> Option<(usize, ValueId)> {
    let shape = r.shape(v);
    let (heads, inner) = (
        *shape.get(shape.len().checked_sub(3)?)?,
        elements(&shape[shape.len() - 2..]),
    );
    if elements(&shape) != heads * inner {
        return None;
    }
    let mut at = v;
    loop {
        let (view, node) = r.find::<View>(at)?;
        let from = node.inputs[0];
        match view {
            View::Reshape(_) => at = from,
            View::Broadcast(wide) => {
                let narrow = r.shape(from);
                let grown: Vec<usize> = (0..wide.len())
                    .filter(|&i| narrow.get(i) != wide.get(i))
                    .collect();
                let &[d] = grown.as_slice() else { return None };
                let right = elements(&wide[d + 1..]);
                return (narrow.len() == wide.len() && right == inner).then(|| (wide[d], from));
            }
            _ => return None,
        }
    }
}
