//! Numbers that are concatenated only to say where a part of a value lies are read one by one: a decoder does this for every key and
//! value it keeps.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::layout::elements;
use crate::ops::tensor_operation::Concat;
use crate::ops::tensor_transformation::{Bound, Bounds, SliceUpdate};
use smallvec::SmallVec;
use std::sync::Arc;

/// Takes the concatenations in front of updates of slices into them.
pub fn of_updates(graph: Graph) -> Graph {
    rewrite(graph, |r, node| update(r, node).is_some())
}

fn update(r: &mut Rewriter, node: &Node) -> Option<()> {
    let op = as_op::<SliceUpdate>(node)?;
    let [x, part, begin, end] = *node.inputs.as_slice() else {
        return None;
    };
    if [begin, end]
        .iter()
        .all(|bound| r.find::<Concat>(*bound).is_none())
    {
        return None;
    }
    let mut inputs: SmallVec<[ValueId; 6]> = SmallVec::from_slice(&[x, part]);
    let begin = numbers(r, begin, &mut inputs)?;
    let end = numbers(r, end, &mut inputs)?;
    let op = op.with_bounds(begin, end);
    r.replace(node, Arc::new(op), &inputs);
    Some(())
}

/// The numbers of a bound one by one; what the running model computes is added to `inputs`.
fn numbers(r: &Rewriter, bounds: ValueId, inputs: &mut SmallVec<[ValueId; 6]>) -> Option<Bounds> {
    let parts = match r.find::<Concat>(bounds) {
        Some((_, node)) => node.inputs.iter().copied().collect(),
        None => vec![bounds],
    };
    let mut all = SmallVec::new();
    for part in parts {
        if let Some(known) = r.ints(part) {
            all.extend(known.iter().map(|n| Bound::Known(*n)));
        } else if elements(&r.shape(part)) == 1 {
            let index = inputs.iter().position(|input| *input == part);
            all.push(Bound::Input(index.unwrap_or(inputs.len())));
            if index.is_none() {
                inputs.push(part);
            }
        } else {
            return None;
        }
    }
    Some(Bounds::Each(all))
}
