//! A plan as people read it: each step with its memory, weights and arithmetic.

use crate::graph::{Graph, Miss};
use crate::layout::{Layout, elements};
use crate::plan::{Operand, Place, Plan};
use std::collections::HashSet;

/// What a function does for its default shapes.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// The function's name.
    pub function: String,
    /// In the order they run.
    pub steps: Vec<StepReport>,
    /// Bytes of intermediate values.
    pub arena_bytes: usize,
    /// Patterns that are there in part and were left as they are, each once.
    pub misses: Vec<MissReport>,
}

/// A pattern that a pass recognises, not merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissReport {
    /// What would have been made of it: `attention`, `gated MLP`.
    pub pattern: &'static str,
    /// The first node's name in the file.
    pub name: String,
    /// Nodes that miss the pattern for the same reason.
    pub count: usize,
    /// What is not as the pattern wants it.
    pub why: String,
}

/// One step of a plan.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// The node's name in the file.
    pub name: String,
    /// Kind of operation: `linear`, `attention`, `copy`.
    pub kind: &'static str,
    /// The operation with its attributes.
    pub operation: String,
    /// Shapes of the inputs.
    pub inputs: Vec<Vec<usize>>,
    /// Shapes of the results.
    pub outputs: Vec<Vec<usize>>,
    /// Where the first result lies: `arena`, `state`, or `in place`.
    pub place: &'static str,
    /// Bytes of values read and written, weights aside.
    pub moved_bytes: usize,
    /// Bytes of weights read.
    pub weight_bytes: usize,
    /// Multiplications and additions.
    pub flops: u64,
}

impl Explanation {
    pub(crate) fn of(function: &str, plan: &Plan, graph: &Graph) -> Explanation {
        let layouts = |o: &[Operand]| o.iter().map(|o| o.layout.clone()).collect::<Vec<Layout>>();
        let steps = plan.steps.iter().map(|s| {
            let (inputs, outputs) = (layouts(&s.inputs), layouts(&s.outputs));
            let shapes = |l: &[Layout]| l.iter().map(|l| l.shape.to_vec()).collect::<Vec<_>>();
            let (i, o) = (
                inputs.iter().collect::<Vec<_>>(),
                outputs.iter().collect::<Vec<_>>(),
            );
            let updates = s.op.updates();
            // An update in place touches what it writes, not the whole of its result.
            let reads = s
                .inputs
                .iter()
                .enumerate()
                .filter(|(n, _)| updates != Some(*n))
                .map(|(_, o)| bytes(o));
            let writes = s
                .outputs
                .iter()
                .map(|o| if updates.is_some() { 0 } else { bytes(o) });
            StepReport {
                name: s.name.to_string(),
                kind: s.op.name(),
                operation: format!("{:?}", s.op),
                inputs: shapes(&inputs),
                outputs: shapes(&outputs),
                place: place(&s.inputs, &s.outputs),
                moved_bytes: reads.chain(writes).sum(),
                weight_bytes: s.op.weight_bytes(),
                flops: s.op.flops(&i, &o),
            }
        });
        Explanation {
            function: function.into(),
            steps: steps.collect(),
            arena_bytes: plan.arena_bytes(),
            misses: misses(graph),
        }
    }
}

/// The misses at nodes that are there to the end, those for one reason together.
fn misses(graph: &Graph) -> Vec<MissReport> {
    let there: HashSet<&str> = graph.nodes.iter().map(|n| &*n.name).collect();
    let mut seen = HashSet::new();
    let mut all: Vec<MissReport> = Vec::new();
    for Miss { pattern, node, why } in &graph.misses {
        if !there.contains(&**node) || !seen.insert((*pattern, &**node)) {
            continue;
        }
        match all.iter_mut().find(|m| m.pattern == *pattern && m.why == *why) {
            Some(same) => same.count += 1,
            None => all.push(MissReport {
                pattern,
                name: node.to_string(),
                count: 1,
                why: why.clone(),
            }),
        }
    }
    all
}

fn bytes(o: &Operand) -> usize {
    elements(&o.layout.shape)
        * if o.storage == crate::graph::Storage::F16 {
            2
        } else {
            4
        }
}

fn place(inputs: &[Operand], outputs: &[Operand]) -> &'static str {
    match outputs.first().map(|o| &o.place) {
        Some(Place::State(_)) => "state",
        _ if inputs.iter().any(|o| matches!(o.place, Place::Result)) => "in place",
        _ => "arena",
    }
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, s) in self.steps.iter().enumerate() {
            let shapes =
                |all: &[Vec<usize>]| all.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>().join(" ");
            write!(
                f,
                "{i:5} {:<9} {} {} <- {}",
                s.place,
                s.operation,
                shapes(&s.outputs),
                shapes(&s.inputs)
            )?;
            writeln!(
                f,
                "  {:.1} KB, weights {:.1} KB, {:.2} Mflop",
                kb(s.moved_bytes),
                kb(s.weight_bytes),
                s.flops as f64 / 1e6
            )?;
        }
        for m in &self.misses {
            let times = if m.count > 1 {
                format!(" and {} more", m.count - 1)
            } else {
                String::new()
            };
            writeln!(f, "not merged: {} at {:?}{times}: {}", m.pattern, m.name, m.why)?;
        }
        let weights: usize = self.steps.iter().map(|s| s.weight_bytes).sum();
        let moved: usize = self.steps.iter().map(|s| s.moved_bytes).sum();
        let flops: u64 = self.steps.iter().map(|s| s.flops).sum();
        writeln!(
            f,
            "function {:?}: {} steps, arena {:.1} KB, values moved {:.1} KB, weights read {:.1} KB, {:.1} Mflop",
            self.function,
            self.steps.len(),
            kb(self.arena_bytes),
            kb(moved),
            kb(weights),
            flops as f64 / 1e6
        )
    }
}

fn kb(bytes: usize) -> f64 {
    bytes as f64 / 1024.0
}
