//! Checks what can be checked of a function that cannot be lowered as a whole: every operation whose inputs have declared
//! types, in nested blocks too.

use super::{LowerOptions, Lowering, check_parameters, node_error};
use crate::error::{Error, OpError};
use crate::layout::Shape;
use crate::ops;
use candle_coreml_mil as mil;
use std::collections::{HashMap, HashSet};

/// Lowers operation after operation, taking declared types where values are computed, and forgets the result.
///
/// # Errors
/// The first operation that does not fit its operator whatever the values are.
pub(crate) fn check_function(
    model: &mil::Model,
    function: &mil::Function,
    shapes: &HashMap<&str, Shape>,
    options: &LowerOptions,
) -> Result<(), Error> {
    let mut low = Lowering::new(model, function, options);
    for input in &function.inputs {
        low.add_parameter(input, shapes)?;
    }
    let mut check = Check {
        low,
        unknown: HashSet::new(),
    };
    check.block(&function.body)
}

struct Check<'m> {
    low: Lowering<'m>,
    /// Values of which not even the shape is known.
    unknown: HashSet<&'m str>,
}

impl<'m> Check<'m> {
    fn block(&mut self, block: &'m mil::Block) -> Result<(), Error> {
        for input in &block.inputs {
            self.declare(input);
        }
        for op in &block.operations {
            self.operation(op)?;
        }
        let defined = block.operations.iter().flat_map(|op| &op.outputs);
        for out in defined.chain(&block.inputs) {
            self.low.names.remove(out.name.as_str());
            self.low.literals.remove(out.name.as_str());
            self.unknown.remove(out.name.as_str());
        }
        Ok(())
    }

    fn operation(&mut self, op: &'m mil::Operation) -> Result<(), Error> {
        let arguments = op.inputs.iter().flat_map(|(_, arguments)| arguments);
        let vague =
            |a: &mil::Argument| matches!(a, mil::Argument::Name(n) if self.unknown.contains(n.as_str()));
        if arguments.into_iter().any(vague) {
            if let Some(spec) = ops::spec(&op.op_type) {
                check_parameters(op, spec).map_err(|e| node_error(op, e))?;
            }
        } else {
            match self.low.operation(op) {
                Ok(()) => return Ok(()),
                Err(OpError::Dynamic(_)) => {}
                Err(e) => return Err(node_error(op, e)),
            }
        }
        for block in &op.blocks {
            self.block(block)?;
        }
        op.outputs.iter().for_each(|out| self.declare(out));
        Ok(())
    }

    fn declare(&mut self, named: &'m mil::NamedType) {
        let tensor = match &named.ty {
            mil::ValueType::Tensor(t) if t.dtype != mil::DType::String => Some(t),
            _ => None,
        };
        if tensor.and_then(|t| self.low.pretend(&named.name, t)).is_none() {
            self.unknown.insert(&named.name);
        }
    }
}
