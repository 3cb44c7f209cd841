//! Fewer views: chains become one, equal ones are shared, and elementwise operations move in front of them, so that later
//! passes see matrix products and what follows them side by side.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::layout::{Shape, elements};
use crate::ops::conv::ConvLast;
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use crate::ops::linear::Linear;
use crate::ops::pool::PoolLast;
use crate::ops::view::View;
use std::collections::HashMap;
use std::sync::Arc;

/// Merges chains of views and shares equal ones.
pub fn simplify(graph: Graph) -> Graph {
    let mut seen: HashMap<(View, ValueId), ValueId> = HashMap::new();
    rewrite(graph, |r, node| {
        let Some(view) = as_op::<View>(node) else {
            return false;
        };
        let (x, out) = (node.inputs[0], node.outputs[0]);
        if let View::Same = view {
            r.alias(node, x);
            return true;
        }
        let (view, x) = shortest(r, view, x, &r.shape(out));
        if matches!(&view, View::Reshape(s) if *s == r.shape(x)) {
            r.alias(node, x);
            return true;
        }
        let key = (view.clone(), x);
        if let Some(&same) = seen.get(&key) {
            r.alias(node, same);
            return true;
        }
        seen.insert(key, out);
        r.replace(node, Arc::new(view), &[x]);
        true
    })
}

/// The same view from as far back as one step reaches.
fn shortest(r: &Rewriter, view: &View, x: ValueId, target: &[usize]) -> (View, ValueId) {
    let mut best = (view.clone(), x);
    // Only the order of dimensions other than 1 matters; `order` holds, for each of them in the target, its place in the source.
    let Some(mut order) = unit_order(view, &r.shape(x), target) else {
        // Reshapes of reshapes: the inner one does not matter.
        if let (View::Reshape(_), Some((View::Reshape(_), inner))) = (view, r.find::<View>(x)) {
            return (view.clone(), inner.inputs[0]);
        }
        return best;
    };
    let mut at = x;
    loop {
        if order.iter().enumerate().all(|(i, &o)| i == o) {
            best = (View::Reshape(target.into()), at);
        }
        let Some((view, node)) = r.find::<View>(at) else {
            break;
        };
        let from = node.inputs[0];
        match unit_order(view, &r.shape(from), &r.shape(at)) {
            Some(inner) => order = order.iter().map(|&o| inner[o]).collect(),
            None => {
                if let (View::Reshape(target), View::Reshape(_)) = (&best.0, view)
                    && best.1 == at
                {
                    best = (View::Reshape(target.clone()), from);
                }
                break;
            }
        }
        at = from;
    }
    best
}

/// For each dimension of `to` that is not 1, its rank among those of `from`; `None` when the view does more than that.
fn unit_order(view: &View, from: &[usize], to: &[usize]) -> Option<Shape> {
    let big = |s: &[usize]| -> Vec<usize> { s.iter().copied().filter(|&d| d != 1).collect() };
    match view {
        View::Reshape(_) => (big(from) == big(to)).then(|| (0..big(to).len()).collect()),
        View::Permute(perm) => {
            let rank = |p: usize| from[..p].iter().filter(|&&d| d != 1).count();
            Some(perm.iter().filter(|&&p| from[p] != 1).map(|&p| rank(p)).collect())
        }
        _ => None,
    }
}

/// The view that undoes this one on a value of the shape it gives.
fn inverse(view: &View, from: &[usize]) -> Option<View> {
    match view {
        View::Reshape(_) => Some(View::Reshape(from.into())),
        View::Permute(perm) => {
            let mut back: Shape = perm.clone();
            for (i, &p) in perm.iter().enumerate() {
                back[p] = i;
            }
            Some(View::Permute(back))
        }
        _ => None,
    }
}

/// Moves elementwise operations in front of the reshape or permutation of a matrix product, a convolution or a pooling they
/// follow.
pub fn sink(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        if as_op::<UnaryNode>(node).is_some() {
            sink_unary(r, node).is_some()
        } else if as_op::<BinaryNode>(node).is_some() {
            sink_binary(r, node).is_some()
        } else {
            false
        }
    })
}

/// The moved form of a value: view, its input and that input's shape, when the input is computed by such an operation or
/// by elementwise work.
fn movable(r: &Rewriter, v: ValueId) -> Option<(View, ValueId, Shape)> {
    let (view, node) = r.find::<View>(v)?;
    let x = node.inputs[0];
    let shape = r.shape(x);
    inverse(view, &shape)?;
    (r.used_once(v) && worth(r, x)).then(|| (view.clone(), x, shape))
}

/// Whether something gains from an elementwise operation right behind `x`: what computes it, or what does so behind more views.
fn worth(r: &Rewriter, mut x: ValueId) -> bool {
    /// More views than this behind each other are no converter's work.
    const MOST_VIEWS: usize = 8;
    for _ in 0..MOST_VIEWS {
        let Some(source) = r.producer(x) else {
            return false;
        };
        if let Some(View::Reshape(_) | View::Permute(_)) = as_op::<View>(source) {
            if !r.used_once(x) {
                return false;
            }
            x = source.inputs[0];
            continue;
        }
        return as_op::<Linear>(source).is_some()
            || as_op::<ConvLast>(source).is_some()
            || as_op::<PoolLast>(source).is_some()
            || as_op::<UnaryNode>(source).is_some()
            || as_op::<BinaryNode>(source).is_some();
    }
    false
}

fn sink_unary(r: &mut Rewriter, node: &Node) -> Option<()> {
    let op = as_op::<UnaryNode>(node)?.clone();
    let (view, x, shape) = movable(r, node.inputs[0])?;
    let y = r.emit(node, op, &[x], r.dtype(x), &shape);
    r.replace(node, Arc::new(view), &[y]);
    Some(())
}

/// An operation with one number, which is as good in front of a view as behind it.
fn sink_scaled(r: &mut Rewriter, node: &Node) -> Option<()> {
    let op = as_op::<BinaryNode>(node)?.clone();
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let v = match (r.scalar(a), r.scalar(b)) {
        (None, Some(_)) => a,
        (Some(_), None) => b,
        _ => return None,
    };
    if r.shape(v) != r.shape(node.outputs[0]) {
        return None;
    }
    let (view, x, shape) = movable(r, v)?;
    let number = if v == a { b } else { a };
    if r.shape(number).len() > shape.len() {
        return None;
    }
    let inputs = if v == a { [x, b] } else { [a, x] };
    let y = r.emit(node, op, &inputs, r.dtype(node.outputs[0]), &shape);
    r.replace(node, Arc::new(view), &[y]);
    Some(())
}

fn sink_binary(r: &mut Rewriter, node: &Node) -> Option<()> {
    let op = as_op::<BinaryNode>(node)?.clone();
    if let Some(()) = sink_scaled(r, node) {
        return Some(());
    }
    let (a, b) = (node.inputs[0], node.inputs[1]);
    let out = r.shape(node.outputs[0]);
    if r.shape(a) != out || r.shape(b) != out || elements(&out) == 0 {
        return None;
    }
    let (left, right) = (movable(r, a), movable(r, b));
    let (view, shape) = left
        .as_ref()
        .or(right.as_ref())
        .map(|(v, _, s)| (v.clone(), s.clone()))?;
    let moved = |r: &mut Rewriter, v: ValueId, known: Option<(View, ValueId, Shape)>| match known {
        Some((w, x, _)) if w == view && r.shape(x) == shape => Some(x),
        _ => {
            let back = inverse(&view, &shape)?;
            let dtype = r.dtype(v);
            Some(r.emit(node, back, &[v], dtype, &shape))
        }
    };
    let x = moved(r, a, left)?;
    let y = moved(r, b, right)?;
    let z = r.emit(node, op, &[x, y], r.dtype(a), &shape);
    r.replace(node, Arc::new(view), &[z]);
    Some(())
}
