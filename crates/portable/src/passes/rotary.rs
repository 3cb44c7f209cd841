//! Rotary position embedding out of slices, products and sums.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use crate::ops::rotary::Rotary;
use crate::ops::tensor_operation::Concat;
use crate::ops::view::View;
use candle_coreml_kernels::{Binary, Unary};
use std::sync::Arc;

/// Recognises the rotation in both spellings: on halves, and with the halves swapped.
pub fn fuse(graph: Graph) -> Graph {
    rewrite(graph, |r, node| {
        let found = on_halves(r, node).or_else(|| swapped(r, node));
        let Some((x, cos, sin)) = found else { return false };
        if !fits(r, x, cos, sin) {
            let (x, cos, sin) = (r.shape(x), r.shape(cos), r.shape(sin));
            let why = format!("the tables {cos:?} and {sin:?} are not one row for each position of {x:?}");
            return r.miss::<()>(ROTARY, node, why).is_some();
        }
        r.replace(node, Arc::new(Rotary), &[x, cos, sin]);
        true
    })
}

const ROTARY: &str = "rotary embedding";

/// Tables must be `[.., 1, S, n]` beside `x [.., H, S, D]`: one row a position, the same for all heads.
fn fits(r: &Rewriter, x: ValueId, cos: ValueId, sin: ValueId) -> bool {
    let (sx, sc) = (r.shape(x), r.shape(cos));
    let rank = sx.len();
    let leading_ones = sc.len() >= 2 && sc[..sc.len() - 2].iter().all(|&d| d == 1);
    let batch_one = rank >= 3 && sx[..rank - 3].iter().all(|&d| d == 1);
    let rows = sc.len() >= 2 && rank >= 3 && sc[sc.len() - 2] == sx[rank - 2];
    let last = sx
        .last()
        .zip(sc.last())
        .is_some_and(|(&d, &n)| d % 2 == 0 && (n == d || n * 2 == d));
    leading_ones && batch_one && rows && last && sc == r.shape(sin)
}

fn binary(r: &Rewriter, v: ValueId, want: Binary) -> Option<(ValueId, ValueId)> {
    let (op, n) = r.find::<BinaryNode>(v)?;
    (op.0 == want).then(|| (n.inputs[0], n.inputs[1]))
}

/// The value whose lower (0) or upper (1) half along the last dimension this is.
fn half(r: &Rewriter, v: ValueId) -> Option<(ValueId, usize)> {
    let (View::Slice { begin, step, size }, n) = r.find::<View>(v)? else {
        return None;
    };
    let x = n.inputs[0];
    let shape = r.shape(x);
    let (last, lead) = (*shape.last()?, shape.len() - 1);
    let same = begin[..lead].iter().all(|&b| b == 0) && size[..lead] == shape[..lead];
    let h = last / 2;
    if !same || step.iter().any(|&s| s != 1) || last % 2 != 0 || size[lead] != h {
        return None;
    }
    match begin[lead] {
        0 => Some((x, 0)),
        b if b == h => Some((x, 1)),
        _ => None,
    }
}

/// A product of one half of something with a table: (source, which half, table).
fn half_times(r: &Rewriter, v: ValueId) -> Option<(ValueId, usize, ValueId)> {
    let (a, b) = binary(r, v, Binary::Mul)?;
    half(r, a)
        .map(|(x, h)| (x, h, b))
        .or_else(|| half(r, b).map(|(x, h)| (x, h, a)))
}

/// `concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`.
fn on_halves(r: &Rewriter, node: &Node) -> Option<(ValueId, ValueId, ValueId)> {
    let concat = as_op::<Concat>(node)?;
    let &[low, high] = node.inputs.as_slice() else {
        return None;
    };
    if concat.axis + 1 != r.shape(low).len() {
        return None;
    }
    let (a, b) = binary(r, low, Binary::Sub)?;
    let (x, h1, cos) = half_times(r, a)?;
    let (x2, h2, sin) = half_times(r, b)?;
    let (c, d) = binary(r, high, Binary::Add)?;
    let (third, fourth) = (half_times(r, c)?, half_times(r, d)?);
    let (cosine, sine) = if third.1 == 1 {
        (third, fourth)
    } else {
        (fourth, third)
    };
    let fits = h1 == 0 && h2 == 1 && x == x2 && cosine == (x, 1, cos) && sine == (x, 0, sin);
    if !fits {
        return r.miss(
            ROTARY,
            node,
            "the two halves do not meet the same cosines and sines crosswise",
        );
    }
    Some((x, cos, sin))
}

/// `x * cos + concat(-x2, x1) * sin`.
fn swapped(r: &Rewriter, node: &Node) -> Option<(ValueId, ValueId, ValueId)> {
    let BinaryNode(Binary::Add) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (a, b) = (node.inputs[0], node.inputs[1]);
    with_turned(r, node, a, b).or_else(|| with_turned(r, node, b, a))
}

fn with_turned(
    r: &Rewriter,
    node: &Node,
    straight: ValueId,
    turned: ValueId,
) -> Option<(ValueId, ValueId, ValueId)> {
    let (p, q) = binary(r, turned, Binary::Mul)?;
    let (x, sin) = match turned_source(r, p) {
        Some(x) => (x, q),
        None => (turned_source(r, q)?, p),
    };
    let (c, d) = binary(r, straight, Binary::Mul)?;
    let cos = if c == x {
        d
    } else if d == x {
        c
    } else {
        return r.miss(
            ROTARY,
            node,
            "what is multiplied with the cosines is not what was turned",
        );
    };
    Some((x, cos, sin))
}

/// The x of `concat(-x2, x1)` along the last dimension.
fn turned_source(r: &Rewriter, v: ValueId) -> Option<ValueId> {
    let (concat, n) = r.find::<Concat>(v)?;
    let &[low, high] = n.inputs.as_slice() else {
        return None;
    };
    let upper = match r.find::<UnaryNode>(low) {
        Some((UnaryNode(Unary::Neg), n)) => n.inputs[0],
        _ => {
            let (a, b) = binary(r, low, Binary::Mul)?;
            if r.scalar(b) == Some(-1.0) {
                a
            } else if r.scalar(a) == Some(-1.0) {
                b
            } else {
                return None;
            }
        }
    };
    let ((x2, 1), (x1, 0)) = (half(r, upper)?, half(r, high)?) else {
        return None;
    };
    (x1 == x2 && concat.axis + 1 == r.shape(v).len()).then_some(x1)
}
