//! What surrounds a matrix product, done inside it: activation, residual, the gate of an MLP and its last product, products that share an
//! input.

use super::rewrite::{Rewriter, as_op, rewrite};
use crate::graph::{Graph, Node, ValueId};
use crate::ops::elementwise_binary::BinaryNode;
use crate::ops::elementwise_unary::UnaryNode;
use crate::ops::linear::{Gated, Linear, LinearMany, Mlp};
use candle_coreml_kernels::Binary;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;

/// Takes activations and residuals into the products before them, and recognises gated MLPs.
pub fn epilogues(graph: Graph) -> Graph {
    let graph = rewrite(graph, |r, node| activation(r, node).is_some());
    rewrite(graph, |r, node| {
        gated(r, node).or_else(|| residual(r, node)).is_some()
    })
}

/// Takes the gate of an MLP into the product that reads it.
pub fn mlps(graph: Graph) -> Graph {
    rewrite(graph, |r, node| mlp(r, node).is_some())
}

/// `linear(gated(x))`.
fn mlp(r: &mut Rewriter, node: &Node) -> Option<()> {
    let down = as_op::<Linear>(node)?;
    let inner = node.inputs[0];
    let (gated, source) = r.find::<Gated>(inner)?;
    let why = [
        (
            down.packed.is_none(),
            "the weights of the last product are packed",
        ),
        (
            down.arithmetic == gated.arithmetic,
            "the products are made otherwise",
        ),
        (
            r.used_once(inner),
            "what lies between the products is read elsewhere too",
        ),
    ];
    if let Some((_, why)) = why.into_iter().find(|(holds, _)| !holds) {
        return r.miss("MLP", node, why);
    }
    let op = Mlp {
        gated: gated.clone(),
        down: down.clone(),
    };
    let mut inputs: SmallVec<[ValueId; 2]> = smallvec::smallvec![source.inputs[0]];
    inputs.extend(node.inputs.get(1).copied());
    r.replace(node, Arc::new(op), &inputs);
    Some(())
}

/// `act(linear(x))`.
fn activation(r: &mut Rewriter, node: &Node) -> Option<()> {
    let act = as_op::<UnaryNode>(node)?.0;
    let product = node.inputs[0];
    let (linear, source) = r.find::<Linear>(product)?;
    let taken = if linear.activation.is_some() {
        Some("the product has an activation already")
    } else if source.inputs.len() > 1 {
        Some("the product has a residual already")
    } else {
        (!r.used_once(product)).then_some("the product is read elsewhere too")
    };
    if let Some(why) = taken {
        return r.miss("activation of a product", node, why);
    }
    let (op, x) = (
        Linear {
            activation: Some(act),
            ..linear.clone()
        },
        source.inputs[0],
    );
    r.replace(node, Arc::new(op), &[x]);
    Some(())
}

/// `act(x Wgᵀ) * (x Wuᵀ)`.
fn gated(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Mul) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let (a, b) = (node.inputs[0], node.inputs[1]);
    gated_of(r, node, a, b).or_else(|| gated_of(r, node, b, a))
}

const GATED: &str = "gated MLP";

fn gated_of(r: &mut Rewriter, node: &Node, gate: ValueId, up: ValueId) -> Option<()> {
    let (g, gate_node) = r.find::<Linear>(gate)?;
    let (u, up_node) = r.find::<Linear>(up)?;
    // With the other way round, the gate may be the one that is activated.
    if g.activation.is_none() && u.activation.is_some() {
        return None;
    }
    let Some(activation) = g.activation else {
        return r.miss(GATED, node, "neither product is activated");
    };
    let plain = g.bias.is_none() && u.bias.is_none() && u.activation.is_none();
    let same = gate_node.inputs.as_slice() == up_node.inputs.as_slice() && gate_node.inputs.len() == 1;
    let alone = r.used_once(gate) && r.used_once(up) && r.shape(gate) == r.shape(up);
    let stored = g.packed.is_none() && u.packed.is_none();
    let why = [
        (stored, "the weights are packed: each product is faster by itself"),
        (plain, "the products have biases, or both are activated"),
        (same, "the products have different inputs, or residuals"),
        (alone, "a product is read elsewhere too, or their shapes differ"),
    ];
    if let Some((_, why)) = why.into_iter().find(|(holds, _)| !holds) {
        return r.miss(GATED, node, why);
    }
    let op = Gated {
        gate: g.weights.clone(),
        up: u.weights.clone(),
        activation,
        arithmetic: g.arithmetic,
    };
    let x = gate_node.inputs[0];
    r.replace(node, Arc::new(op), &[x]);
    Some(())
}

/// `linear(x) + r`.
fn residual(r: &mut Rewriter, node: &Node) -> Option<()> {
    let BinaryNode(Binary::Add) = as_op::<BinaryNode>(node)? else {
        return None;
    };
    let out = r.shape(node.outputs[0]);
    let (product, other) = r.addends("residual of a product", node, |product, other| {
        let (_, n) = r.find::<Linear>(product)?;
        Some(if n.inputs.len() > 1 {
            Err("the product has a residual already")
        } else if !r.used_once(product) {
            Err("the product is read elsewhere too")
        } else if r.shape(product) != out || r.shape(other) != out {
            Err("the shapes of product and residual differ")
        } else {
            Ok(())
        })
    })?;
    let (linear, source) = r.find::<Linear>(product)?;
    let (op, x) = (linear.clone(), source.inputs[0]);
    r.replace(node, Arc::new(op), &[x, other]);
    Some(())
}

/// Runs plain products of one input together: one pass over the input, one start of the threads.
pub fn share_input(mut graph: Graph) -> Graph {
    let plain = |n: &Node| {
        let alone = |l: &Linear| l.activation.is_none() && l.packed.is_none();
        as_op::<Linear>(n).is_some_and(alone) && n.inputs.len() == 1
    };
    let mut groups: HashMap<ValueId, Vec<usize>> = HashMap::new();
    for (i, node) in graph.nodes.iter().enumerate().filter(|(_, n)| plain(n)) {
        groups.entry(node.inputs[0]).or_default().push(i);
    }
    let mut first: HashMap<usize, Node> = HashMap::new();
    let mut gone = vec![false; graph.nodes.len()];
    for (x, members) in groups.into_iter().filter(|(_, m)| m.len() > 1) {
        let layers: Vec<Linear> = members
            .iter()
            .filter_map(|&i| as_op::<Linear>(&graph.nodes[i]).cloned())
            .collect();
        let outputs: SmallVec<_> = members
            .iter()
            .flat_map(|&i| graph.nodes[i].outputs.clone())
            .collect();
        let at = members[0];
        members.iter().for_each(|&i| gone[i] = true);
        let name = graph.nodes[at].name.clone();
        first.insert(
            at,
            Node {
                name,
                op: Arc::new(LinearMany { layers }),
                inputs: smallvec::smallvec![x],
                outputs,
            },
        );
    }
    let nodes = std::mem::take(&mut graph.nodes);
    for (i, node) in nodes.into_iter().enumerate() {
        match first.remove(&i) {
            Some(joined) => graph.nodes.push(joined),
            None if gone[i] => {}
            None => graph.nodes.push(node),
        }
    }
    graph
}
