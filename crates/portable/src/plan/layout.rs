//! First half of planning: the buffer and the layout of every value, views resolved, copies added where an operation
//! cannot take its input as it lies.

use super::Copy;
use crate::Error;
use crate::constant::{Const, ConstData};
use crate::graph::{Graph, Node, Source, Storage, ValueId};
use crate::layout::{Layout, elements};
use crate::op::Op;
use candle_coreml_mil::DType;
use smallvec::SmallVec;
use std::sync::Arc;

/// Index of a buffer of the draft.
pub(super) type BufferId = usize;

/// Memory a value may live in, before the arena is laid out.
#[derive(Debug, Clone)]
pub(super) enum Buffer {
    /// So many elements of the arena.
    Arena { elements: usize, storage: Storage },
    /// A constant.
    Const(Arc<Const>),
    /// A state, by position.
    State(usize),
}

/// A value in a buffer.
#[derive(Debug, Clone)]
pub(super) struct Home {
    pub buffer: BufferId,
    pub layout: Layout,
    pub storage: Storage,
}

/// A step with buffers instead of places.
#[derive(Debug)]
pub(super) struct DraftStep {
    pub name: Arc<str>,
    pub op: Arc<dyn Op>,
    pub inputs: SmallVec<[Home; 4]>,
    pub outputs: SmallVec<[Home; 2]>,
    pub dtypes: SmallVec<[DType; 2]>,
}

/// All steps and buffers, and where border values live.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pub steps: Vec<DraftStep>,
    pub buffers: Vec<Buffer>,
    pub inputs: Vec<Home>,
    pub outputs: Vec<Home>,
}

struct Drafter<'g> {
    graph: &'g Graph,
    draft: Draft,
    homes: Vec<Option<Home>>,
}

/// Walks the graph once.
pub(super) fn draft(graph: &Graph) -> Result<Draft, Error> {
    let mut d = Drafter {
        graph,
        draft: Draft::default(),
        homes: vec![None; graph.values.len()],
    };
    // States come first, so that buffer i is state i.
    for (i, s) in graph.states.iter().enumerate() {
        d.draft.buffers.push(Buffer::State(i));
        let home = Home {
            buffer: i,
            layout: Layout::contiguous(&s.shape),
            storage: Storage::of(s.dtype),
        };
        d.homes[s.first.0 as usize] = Some(home);
    }
    for &id in &graph.inputs {
        let v = graph.value(id);
        let home = d.fresh(Layout::contiguous(&v.shape), Storage::of(v.dtype));
        d.homes[id.0 as usize] = Some(home.clone());
        d.draft.inputs.push(home);
    }
    for node in &graph.nodes {
        d.node(node)?;
    }
    for (_, id) in &graph.outputs {
        let home = d.home(*id)?;
        let home = d.safe_from_stores(home, None);
        d.draft.outputs.push(home);
    }
    let last: Vec<Home> = graph
        .states
        .iter()
        .enumerate()
        .map(|(i, s)| d.home(s.last).map(|home| d.safe_from_stores(home, Some(i))))
        .collect::<Result<_, _>>()?;
    for ((i, s), from) in graph.states.iter().enumerate().zip(last) {
        if s.first != s.last {
            d.store_state(i, from);
        }
    }
    Ok(d.draft)
}

impl Drafter<'_> {
    fn fresh(&mut self, layout: Layout, storage: Storage) -> Home {
        self.draft.buffers.push(Buffer::Arena {
            elements: elements(&layout.shape),
            storage,
        });
        Home {
            buffer: self.draft.buffers.len() - 1,
            layout,
            storage,
        }
    }

    fn home(&mut self, id: ValueId) -> Result<Home, Error> {
        if let Some(h) = &self.homes[id.0 as usize] {
            return Ok(h.clone());
        }
        let Source::Const(c) = &self.graph.value(id).source else {
            let message = format!(
                "value {:?} is used before it is computed",
                self.graph.value(id).name
            );
            return Err(Error::Internal { message });
        };
        let storage = match &c.data {
            ConstData::I32(_) => Storage::I32,
            ConstData::F16(_) if c.halves().is_some() => Storage::F16,
            _ => Storage::F32,
        };
        self.draft.buffers.push(Buffer::Const(c.clone()));
        let home = Home {
            buffer: self.draft.buffers.len() - 1,
            layout: Layout::contiguous(&c.shape),
            storage,
        };
        self.homes[id.0 as usize] = Some(home.clone());
        Ok(home)
    }

    fn node(&mut self, node: &Node) -> Result<(), Error> {
        let homes = node
            .inputs
            .iter()
            .map(|&i| self.home(i))
            .collect::<Result<SmallVec<[Home; 4]>, _>>()?;
        if node.op.is_view() {
            return self.view(node, &homes);
        }
        let out = node
            .outputs
            .first()
            .map(|o| self.graph.value(*o).shape.clone())
            .unwrap_or_default();
        let mut inputs: SmallVec<[Home; 4]> = SmallVec::new();
        for (i, home) in homes.into_iter().enumerate() {
            let ready = self.ready(node, i, home);
            inputs.push(if node.op.broadcasts() {
                broadcast(node, ready, &out)?
            } else {
                ready
            });
        }
        let mut outputs: SmallVec<[Home; 2]> = SmallVec::new();
        for (i, &o) in node.outputs.iter().enumerate() {
            let v = self.graph.value(o);
            let layouts: SmallVec<[&Layout; 4]> = inputs.iter().map(|h| &h.layout).collect();
            let (layout, storage) = match node.op.updates() {
                Some(from) if i == 0 => (Layout::contiguous(&v.shape), inputs[from].storage),
                _ if i == 0 => (node.op.output_layout(&layouts, &v.shape), Storage::of(v.dtype)),
                _ => (Layout::contiguous(&v.shape), Storage::of(v.dtype)),
            };
            let home = self.fresh(layout, storage);
            self.homes[o.0 as usize] = Some(home.clone());
            outputs.push(home);
        }
        let dtypes = node.outputs.iter().map(|&o| self.graph.value(o).dtype).collect();
        self.draft.steps.push(DraftStep {
            name: node.name.clone(),
            op: node.op.clone(),
            inputs,
            outputs,
            dtypes,
        });
        Ok(())
    }

    fn view(&mut self, node: &Node, homes: &[Home]) -> Result<(), Error> {
        let wrong = || Error::Internal {
            message: format!("node {:?}: a view has one input and one result", node.name),
        };
        let ([home], [out]) = (homes, node.outputs.as_slice()) else {
            return Err(wrong());
        };
        let mut home = home.clone();
        let layout = match node.op.view(&home.layout) {
            Some(layout) => layout,
            None => {
                home = self.copy(node, home);
                node.op.view(&home.layout).ok_or_else(wrong)?
            }
        };
        self.homes[out.0 as usize] = Some(Home { layout, ..home });
        Ok(())
    }

    /// The input as the operation takes it: as it lies, widened, or copied.
    fn ready(&mut self, node: &Node, index: usize, home: Home) -> Home {
        if node.op.accepts(index, &home.layout, home.storage) {
            return home;
        }
        // A constant of 16-bit floats is widened once for all, not in every run.
        let constant = matches!(self.draft.buffers[home.buffer], Buffer::Const(_));
        if constant && home.storage == Storage::F16 && node.op.accepts(index, &home.layout, Storage::F32) {
            return Home {
                storage: Storage::F32,
                ..home
            };
        }
        self.copy(node, home)
    }

    fn copy(&mut self, node: &Node, home: Home) -> Home {
        let storage = if home.storage == Storage::I32 {
            Storage::I32
        } else {
            Storage::F32
        };
        let to = self.fresh(Layout::contiguous(&home.layout.shape), storage);
        self.copy_step(node.name.clone(), home, to.clone());
        to
    }

    fn copy_step(&mut self, name: Arc<str>, from: Home, to: Home) {
        let dtype = if to.storage == Storage::I32 {
            DType::Int32
        } else {
            DType::Fp32
        };
        let (inputs, outputs) = (smallvec::smallvec![from], smallvec::smallvec![to]);
        self.draft.steps.push(DraftStep {
            name,
            op: Arc::new(Copy),
            inputs,
            outputs,
            dtypes: smallvec::smallvec![dtype],
        });
    }

    /// A value as it is before states are stored: what lies in a state that is overwritten, other than by itself, is
    /// copied.
    fn safe_from_stores(&mut self, home: Home, stored_in: Option<usize>) -> Home {
        let overwritten = match self.draft.buffers[home.buffer] {
            Buffer::State(i) => {
                stored_in != Some(i) && self.graph.states[i].first != self.graph.states[i].last
            }
            _ => false,
        };
        if !overwritten {
            return home;
        }
        let to = self.fresh(Layout::contiguous(&home.layout.shape), home.storage);
        self.copy_step("state".into(), home, to.clone());
        to
    }

    /// Adds the copy of a state's last value into its buffer; steps that update in place make it superfluous later.
    fn store_state(&mut self, index: usize, from: Home) {
        let s = &self.graph.states[index];
        let layout = Layout::contiguous(&s.shape);
        let to = Home {
            buffer: index,
            layout,
            storage: Storage::of(s.dtype),
        };
        self.copy_step(s.name.as_str().into(), from, to);
    }
}

fn broadcast(node: &Node, home: Home, shape: &[usize]) -> Result<Home, Error> {
    let layout = home.layout.broadcast(shape).ok_or_else(|| Error::Internal {
        message: format!(
            "node {:?}: {:?} does not broadcast to {shape:?}",
            node.name, home.layout.shape
        ),
    })?;
    Ok(Home { layout, ..home })
}
