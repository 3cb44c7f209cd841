//! Lowers a run of operations inside a block, as far as that is possible without knowing computed values.

use super::{LowerOptions, Lowering, node_error};
use crate::constant::Const;
use crate::error::{Error, OpError, OpResult};
use crate::graph::{Graph, Source, ValueId};
use crate::item::Item;
use candle_coreml_mil as mil;
use std::collections::HashMap;

/// Values that operations before the piece have given.
#[derive(Default)]
pub(crate) struct Outside<'m> {
    /// Computed values.
    pub items: HashMap<&'m str, Item>,
    /// Constants of the file that are in scope.
    pub literals: HashMap<&'m str, &'m mil::Value>,
    /// The elements of `items` may be used, not only their types and shapes: what is lowered runs once.
    pub known: bool,
}

/// Operations lowered together.
pub(crate) struct Piece<'m> {
    /// Its inputs are the values of `used` that are not fixed; its outputs the needed results that are computed.
    pub graph: Graph,
    /// How many operations were lowered.
    pub count: usize,
    /// Outside values that were used, in order.
    pub used: Vec<&'m str>,
    /// Needed results that are constant or no tensors.
    pub items: Vec<(&'m str, Item)>,
    /// Why the next operation was not lowered.
    pub cut: Option<Error>,
}

/// Lowers `operations` up to the first that needs an unknown value. `needed` says, for the number of operations lowered,
/// which of their results are used later.
///
/// # Errors
/// When an operation does not fit its operator.
pub(crate) fn lower_piece<'m>(
    model: &'m mil::Model,
    function: &'m mil::Function,
    operations: &'m [mil::Operation],
    outside: Outside<'m>,
    options: &'m LowerOptions,
    needed: &dyn Fn(usize) -> Vec<&'m str>,
) -> Result<Piece<'m>, Error> {
    let mut low = Lowering::new(model, function, options);
    for input in &function.inputs {
        if matches!(input.ty, mil::ValueType::State(_)) {
            low.add_parameter(input, &HashMap::new())?;
        }
    }
    low.literals = outside.literals.clone();
    low.outside = outside;
    let mut count = 0;
    let mut cut = None;
    for op in operations {
        match low.operation(op) {
            Ok(()) => count += 1,
            Err(e @ OpError::Dynamic(_)) => {
                cut = Some(node_error(op, e));
                break;
            }
            Err(e) => return Err(node_error(op, e)),
        }
    }
    let known = low.outside.known;
    let mut items = Vec::new();
    for name in needed(count) {
        if let Some(item) = low.items.remove(name) {
            items.push((name, item));
        } else if let Some(&id) = low.names.get(name) {
            match low.graph.constant(id) {
                Some(value) => items.push((
                    name,
                    Item::Tensor {
                        value: value.clone(),
                        fixed: !known,
                    },
                )),
                None => low.graph.outputs.push((name.to_string(), id)),
            }
        }
    }
    Ok(Piece {
        graph: low.graph,
        count,
        used: low.used,
        items,
        cut,
    })
}

/// Where a lowering stood before an operation.
pub(super) struct Mark {
    nodes: usize,
    inputs: usize,
    used: usize,
    states: Vec<ValueId>,
}

impl<'m> Lowering<'m> {
    pub(super) fn mark(&self) -> Mark {
        Mark {
            nodes: self.graph.nodes.len(),
            inputs: self.graph.inputs.len(),
            used: self.used.len(),
            states: self.graph.states.iter().map(|s| s.last).collect(),
        }
    }

    /// Forgets what an operation added to the graph.
    pub(super) fn rewind(&mut self, mark: Mark, op: &'m mil::Operation) {
        self.graph.nodes.truncate(mark.nodes);
        self.graph.inputs.truncate(mark.inputs);
        for name in self.used.drain(mark.used..) {
            self.names.remove(name);
        }
        for (state, last) in self.graph.states.iter_mut().zip(mark.states) {
            state.last = last;
        }
        for out in &op.outputs {
            self.names.remove(out.name.as_str());
            self.items.remove(out.name.as_str());
        }
    }

    /// Makes an outside value part of the graph: as a constant where its elements may be used, as an input where not.
    pub(super) fn enter(&mut self, name: &'m str) -> OpResult<Option<ValueId>> {
        let (value, fixed) = match self.outside.items.get(name) {
            None => return Ok(None),
            Some(Item::Tensor { value, fixed }) => (value.clone(), *fixed),
            Some(other) => return Err(format!("{name:?} is {}, a tensor is needed", other.kind()).into()),
        };
        self.used.push(name);
        if fixed || self.outside.known {
            return Ok(Some(self.add_const(name, value)));
        }
        let index = self.graph.inputs.len();
        let id = self
            .graph
            .add_value(name.into(), value.dtype, &value.shape, Source::Input(index));
        self.graph.inputs.push(id);
        Ok(Some(id))
    }

    /// Adds a value that only types and shapes are known of.
    pub(super) fn pretend(&mut self, name: &'m str, ty: &mil::TensorType) -> Option<()> {
        let shape = ty.fixed_shape()?;
        let index = self.graph.inputs.len();
        let id = self
            .graph
            .add_value(name.into(), ty.dtype, &shape, Source::Input(index));
        self.graph.inputs.push(id);
        self.names.insert(name, id);
        Some(())
    }
}

impl Const {
    /// The one integer of a constant, truth values as 0 and 1.
    pub(crate) fn int(&self) -> Option<i32> {
        match self.ints() {
            Some([one]) => Some(*one),
            _ => None,
        }
    }
}
