//! Second half of planning: results take over the memory of inputs that die, and what is left gets its place in the arena.

use super::layout::{Buffer, BufferId, Draft, DraftStep, Home};
use super::{Copy, Operand, Place, Plan, Slot, Step};
use crate::graph::{Graph, Storage};
use crate::layout::{Layout, elements};
use candle_coreml_kernels::ALIGN_ELEMENTS;
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

/// When a buffer is first written and last used, in steps; results of the plan are used after the last step.
#[derive(Debug, Clone, Copy)]
struct Life {
    first: usize,
    last: usize,
}

impl Life {
    fn overlaps(self, other: Life) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

struct Memory {
    buffers: Vec<Buffer>,
    lives: Vec<Life>,
    /// The buffer each one was merged into, itself where it was not.
    merged: Vec<BufferId>,
}

/// Lays out the draft.
pub(super) fn place(graph: &Graph, mut draft: Draft) -> Plan {
    add_update_copies(&mut draft);
    let mut memory = Memory::new(&draft);
    let in_place: Vec<Option<usize>> = draft
        .steps
        .iter()
        .enumerate()
        .map(|(i, s)| memory.merge(i, s))
        .collect();
    let (ranges, arena_elements) = memory.assign();
    let finish = |home: &Home| memory.operand(home, &ranges);
    let mut steps = Vec::with_capacity(draft.steps.len());
    for (step, in_place) in draft.steps.iter().zip(in_place) {
        let mut inputs: SmallVec<[Operand; 4]> = step.inputs.iter().map(finish).collect();
        if let Some(i) = in_place {
            inputs[i].place = Place::Result;
        }
        let outputs: SmallVec<[Operand; 2]> = step.outputs.iter().map(finish).collect();
        let (name, op, dtypes) = (step.name.clone(), step.op.clone(), step.dtypes.clone());
        if !is_idle_copy(step, &memory) {
            steps.push(Step {
                name,
                op,
                inputs,
                outputs,
                dtypes,
                then: None,
            });
        }
    }
    find_next_readers(&mut steps);
    let slot = |name: String, dtype, home: &Home| Slot {
        name,
        dtype,
        operand: finish(home),
    };
    let inputs = graph.inputs.iter().zip(&draft.inputs);
    let outputs = graph.outputs.iter().zip(&draft.outputs);
    Plan {
        steps,
        arena_elements,
        inputs: inputs
            .map(|(&id, h)| slot(graph.value(id).name.to_string(), graph.value(id).dtype, h))
            .collect(),
        outputs: outputs
            .map(|((n, id), h)| slot(n.clone(), graph.value(*id).dtype, h))
            .collect(),
        states: graph
            .states
            .iter()
            .map(|s| (s.name.clone(), s.dtype, s.shape.clone()))
            .collect(),
    }
}

/// Finds for every step that reads weights row by row the next one that does.
fn find_next_readers(steps: &mut [Step]) {
    let mut next = None;
    for (i, step) in steps.iter_mut().enumerate().rev() {
        let inputs: SmallVec<[&Layout; 4]> = step.inputs.iter().map(|input| &input.layout).collect();
        if step.op.reads_rows(&inputs) {
            step.then = next.replace(i);
        }
    }
}

/// A copy of a state's value into the state, when the value already is the state's memory.
fn is_idle_copy(step: &DraftStep, memory: &Memory) -> bool {
    let ([from], [to]) = (step.inputs.as_slice(), step.outputs.as_slice()) else {
        return false;
    };
    let op: &dyn std::any::Any = &*step.op;
    op.is::<Copy>() && memory.root(from.buffer) == memory.root(to.buffer) && from.layout == to.layout
}

/// Puts a copy in front of every update whose old value is still needed, or lies where it cannot be written, so that
/// every update can be done in place.
fn add_update_copies(draft: &mut Draft) {
    let mut last_read = vec![0usize; draft.buffers.len()];
    for (i, s) in draft.steps.iter().enumerate() {
        s.inputs.iter().for_each(|h| last_read[h.buffer] = i);
    }
    draft
        .outputs
        .iter()
        .for_each(|h| last_read[h.buffer] = usize::MAX);
    let mut memory: Vec<BufferId> = (0..draft.buffers.len()).collect();
    for (i, mut step) in std::mem::take(&mut draft.steps).into_iter().enumerate() {
        if let Some(from) = step.op.updates() {
            let old = step.inputs[from].clone();
            let shared = |(n, h): (usize, &Home)| n != from && memory[h.buffer] == memory[old.buffer];
            let free = last_read[old.buffer] <= i
                && old.layout == Layout::contiguous(&old.layout.shape)
                && fills(&draft.buffers[memory[old.buffer]], &old)
                && !step.inputs.iter().enumerate().any(shared);
            let target = if free {
                old.buffer
            } else {
                copy_before(draft, &mut step, from, old)
            };
            memory.resize_with(draft.buffers.len(), || target);
            if let Some(out) = step.outputs.first() {
                memory[out.buffer] = memory[target];
            }
        }
        draft.steps.push(step);
    }
}

/// Adds the copy of input `from` to a buffer of its own and makes the step update that.
fn copy_before(draft: &mut Draft, step: &mut DraftStep, from: usize, old: Home) -> BufferId {
    let layout = Layout::contiguous(&old.layout.shape);
    let to = Home {
        buffer: draft.buffers.len(),
        layout,
        storage: old.storage,
    };
    draft.buffers.push(Buffer::Arena {
        elements: elements(&to.layout.shape),
        storage: to.storage,
    });
    step.inputs[from] = to.clone();
    let buffer = to.buffer;
    draft.steps.push(DraftStep {
        name: step.name.clone(),
        op: Arc::new(Copy),
        inputs: smallvec::smallvec![old],
        outputs: smallvec::smallvec![to],
        dtypes: step.dtypes.clone(),
    });
    buffer
}

/// True when a value covers all of a buffer that may be written.
fn fills(buffer: &Buffer, home: &Home) -> bool {
    match buffer {
        Buffer::Arena { elements: n, storage } => {
            *n == elements(&home.layout.shape) && *storage == home.storage
        }
        Buffer::State(_) => true,
        Buffer::Const(_) => false,
    }
}

impl Memory {
    fn new(draft: &Draft) -> Memory {
        let mut lives = vec![
            Life {
                first: usize::MAX,
                last: 0
            };
            draft.buffers.len()
        ];
        let mut touch = |b: BufferId, at: usize| {
            lives[b].first = lives[b].first.min(at);
            lives[b].last = lives[b].last.max(at);
        };
        for h in &draft.inputs {
            touch(h.buffer, 0);
        }
        for (i, s) in draft.steps.iter().enumerate() {
            s.inputs.iter().chain(&s.outputs).for_each(|h| touch(h.buffer, i));
        }
        for h in &draft.outputs {
            touch(h.buffer, usize::MAX);
        }
        Memory {
            buffers: draft.buffers.clone(),
            lives,
            merged: (0..draft.buffers.len()).collect(),
        }
    }

    fn root(&self, mut b: BufferId) -> BufferId {
        while self.merged[b] != b {
            b = self.merged[b];
        }
        b
    }

    /// Lets the step's first result take over the memory of an input; gives that input's index.
    fn merge(&mut self, at: usize, step: &DraftStep) -> Option<usize> {
        let out = step.outputs.first()?;
        let candidates: &[usize] = match step.op.updates() {
            Some(ref i) => &[*i],
            None => step.op.in_place(),
        };
        let index = candidates.iter().copied().find(|&i| self.can_take(at, step, i))?;
        let root = self.root(step.inputs[index].buffer);
        let last = self.lives[out.buffer].last;
        self.lives[root].last = self.lives[root].last.max(last);
        self.merged[out.buffer] = root;
        Some(index)
    }

    fn can_take(&self, at: usize, step: &DraftStep, index: usize) -> bool {
        let (Some(input), Some(out)) = (step.inputs.get(index), step.outputs.first()) else {
            return false;
        };
        let root = self.root(input.buffer);
        let update = step.op.updates().is_some();
        let memory = match &self.buffers[root] {
            Buffer::State(_) => update,
            Buffer::Arena { .. } => true,
            Buffer::Const(_) => false,
        };
        // A state lives on, but what this step reads of it is its last use as that value.
        let dies = match &self.buffers[root] {
            Buffer::State(_) => true,
            _ => self.lives[root].last <= at,
        };
        let alone = step
            .inputs
            .iter()
            .enumerate()
            .all(|(i, h)| i == index || self.root(h.buffer) != root);
        memory
            && dies
            && alone
            && input.storage == out.storage
            && input.layout == out.layout
            && fills(&self.buffers[root], input)
    }

    /// A range of the arena for each root buffer, and the arena's size: largest first, each at the lowest free place.
    fn assign(&self) -> (Vec<Range<usize>>, usize) {
        let mut ranges = vec![0..0; self.buffers.len()];
        let mut order: Vec<(usize, BufferId)> = Vec::new();
        for (b, buffer) in self.buffers.iter().enumerate() {
            if let Buffer::Arena { elements, storage } = buffer
                && self.merged[b] == b
                && self.lives[b].first != usize::MAX
            {
                let units = if *storage == Storage::F16 {
                    elements.div_ceil(2)
                } else {
                    *elements
                };
                order.push((units.max(1).next_multiple_of(ALIGN_ELEMENTS), b));
            }
        }
        order.sort_by_key(|&(units, b)| (std::cmp::Reverse(units), b));
        // In the order of their places.
        let mut placed: Vec<(Range<usize>, Life)> = Vec::new();
        let mut total = 0;
        for (units, b) in order {
            let mut at = 0;
            for (range, life) in &placed {
                if range.start >= at + units {
                    break;
                }
                if life.overlaps(self.lives[b]) {
                    at = at.max(range.end);
                }
            }
            let range = at..at + units;
            let behind = placed.partition_point(|(r, _)| r.start <= at);
            placed.insert(behind, (range.clone(), self.lives[b]));
            total = total.max(range.end);
            ranges[b] = range;
        }
        (ranges, total)
    }

    fn operand(&self, home: &Home, ranges: &[Range<usize>]) -> Operand {
        let root = self.root(home.buffer);
        let place = match &self.buffers[root] {
            Buffer::Arena { .. } => Place::Arena(ranges[root].clone()),
            Buffer::Const(c) => Place::Const(c.clone()),
            Buffer::State(i) => Place::State(*i),
        };
        Operand {
            place,
            layout: home.layout.clone(),
            storage: home.storage,
        }
    }
}
