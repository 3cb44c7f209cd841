//! Rewrites of a graph. Each pass keeps results within the tolerance of the operations it touches.

mod arithmetic;
mod attention;
mod bounds;
mod conv;
mod group;
mod linear;
mod norm;
mod rewrite;
mod rotary;
mod views;

use crate::graph::{Graph, Node, Source};
use crate::plan::Copy;
use candle_coreml_kernels::Arithmetic;
use std::sync::Arc;

/// All passes, in order, for a machine of `threads`; what they make sums products by `arithmetic`.
pub fn optimize(graph: Graph, arithmetic: Arithmetic, threads: usize) -> Graph {
    let graph = views::simplify(clean(graph));
    let graph = norm::rms_norm(self::arithmetic::simplify(graph));
    let graph = norm::softmax(graph);
    let graph = group::fuse(graph);
    let graph = rotary::fuse(graph);
    let graph = attention::fuse(graph, arithmetic);
    let graph = views::simplify(graph);
    // One step passes one view; sequences have a permutation and a reshape.
    let graph = views::simplify(views::sink(graph));
    let graph = views::simplify(views::sink(graph));
    let graph = group::activations(conv::epilogues(linear::epilogues(graph)));
    let graph = bounds::of_updates(views::simplify(graph));
    conv::chains(linear::share_input(linear::mlps(graph)), threads)
}

/// Gives what only looks at the elements of another value memory of its own, so that every value is computed by a step.
pub fn every_value(mut graph: Graph) -> Graph {
    for node in std::mem::take(&mut graph.nodes) {
        let (true, [out]) = (node.op.is_view(), node.outputs.as_slice()) else {
            graph.nodes.push(node);
            continue;
        };
        let (out, value) = (*out, graph.value(node.outputs[0]).clone());
        let seen = graph.add_value(value.name, value.dtype, &value.shape, Source::Node);
        let copy = Node {
            name: node.name.clone(),
            op: Arc::new(Copy),
            inputs: smallvec::smallvec![seen],
            outputs: smallvec::smallvec![out],
        };
        let outputs = smallvec::smallvec![seen];
        graph.nodes.extend([Node { outputs, ..node }, copy]);
    }
    graph
}

/// Drops nodes whose results nobody reads.
pub fn clean(mut graph: Graph) -> Graph {
    let mut uses = graph.uses();
    let mut keep = vec![true; graph.nodes.len()];
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        if node.outputs.iter().all(|o| uses[o.0 as usize] == 0) {
            keep[i] = false;
            node.inputs.iter().for_each(|v| uses[v.0 as usize] -= 1);
        }
    }
    let mut keep = keep.into_iter();
    graph.nodes.retain(|_| keep.next().unwrap_or(true));
    graph
}
