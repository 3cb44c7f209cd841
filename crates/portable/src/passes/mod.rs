//! Rewrites of a graph. Each pass keeps results within the tolerance of the operations it touches.

use crate::graph::Graph;

/// All passes, in order.
pub fn optimize(graph: Graph) -> Graph {
    clean(graph)
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
