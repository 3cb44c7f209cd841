//! What can be counted in a model's file: operators and weights.

use std::collections::{BTreeMap, BTreeSet};

use candle_coreml_mil::{Argument, BlobRef, Block, DType, Operation, Program, Value, ValueData};

/// Operators by name, with how often each occurs. Constants are no operators.
pub fn operators(block: &Block) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    each(block, &mut |operation| {
        if operation.op_type != "const" {
            *counts.entry(operation.op_type.clone()).or_insert(0) += 1;
        }
    });
    counts
}

/// Stored weights of one element type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// How many tensors.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Weights in the weight files by element type; one that several functions use counts once.
pub fn weights(program: &Program) -> BTreeMap<DType, Stored> {
    let mut seen: BTreeSet<(String, u64)> = BTreeSet::new();
    let mut stored: BTreeMap<DType, Stored> = BTreeMap::new();
    let mut count = |dtype: DType, elements: u64, blob: &BlobRef| {
        if seen.insert((blob.path.clone(), blob.offset)) {
            let entry = stored.entry(dtype).or_default();
            entry.tensors += 1;
            let bits = elements.saturating_mul(dtype.bits().unwrap_or(0) as u64);
            entry.bytes = entry.bytes.saturating_add(bits.div_ceil(8));
        }
    };
    for function in &program.functions {
        each(&function.body, &mut |operation| {
            let written = operation
                .inputs
                .iter()
                .flat_map(|(_, arguments)| arguments)
                .filter_map(|a| match a {
                    Argument::Value(value) => Some(value),
                    Argument::Name(_) => None,
                });
            for value in written.chain(operation.attributes.iter().map(|(_, value)| value)) {
                if let Some((dtype, elements, blob)) = in_weight_file(value) {
                    count(dtype, elements, blob);
                }
            }
        });
    }
    stored
}

fn in_weight_file(value: &Value) -> Option<(DType, u64, &BlobRef)> {
    let ValueData::Blob(blob) = &value.data else {
        return None;
    };
    let ty = value.ty.tensor()?;
    let elements = ty
        .fixed_shape()?
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n as u64))?;
    Some((ty.dtype, elements, blob))
}

fn each<'a>(block: &'a Block, visit: &mut impl FnMut(&'a Operation)) {
    let mut waiting = vec![block];
    while let Some(block) = waiting.pop() {
        for operation in &block.operations {
            visit(operation);
            waiting.extend(&operation.blocks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_coreml_mil::{Function, TensorType, ValueType};

    fn constant(offset: u64) -> Operation {
        let ty = ValueType::Tensor(TensorType::fixed(DType::Uint4, &[3, 3]));
        let blob = BlobRef {
            path: "w".to_owned(),
            offset,
        };
        let value = Value {
            ty,
            data: ValueData::Blob(blob),
        };
        Operation {
            op_type: "const".to_owned(),
            attributes: vec![("val".to_owned(), value)],
            ..Default::default()
        }
    }

    fn operation(name: &str, blocks: Vec<Block>) -> Operation {
        Operation {
            op_type: name.to_owned(),
            blocks,
            ..Default::default()
        }
    }

    fn block(operations: Vec<Operation>) -> Block {
        Block {
            operations,
            ..Default::default()
        }
    }

    #[test]
    fn operators_inside_loops_count_and_constants_do_not() {
        let inner = block(vec![operation("add", vec![]), constant(1)]);
        let outer = block(vec![
            operation("add", vec![]),
            operation("while_loop", vec![inner]),
        ]);
        let expected = [("add".to_owned(), 2), ("while_loop".to_owned(), 1)];
        assert_eq!(operators(&outer), expected.into());
    }

    #[test]
    fn weights_that_functions_share_count_once() {
        let function = |offsets: &[u64]| Function {
            name: "f".to_owned(),
            opset: "CoreML8".to_owned(),
            inputs: vec![],
            attributes: vec![],
            body: block(offsets.iter().map(|&o| constant(o)).collect()),
        };
        let program = Program {
            functions: vec![function(&[64, 128]), function(&[64])],
            ..Default::default()
        };
        assert_eq!(
            weights(&program),
            [(
                DType::Uint4,
                Stored {
                    tensors: 2,
                    bytes: 10
                }
            )]
            .into()
        );
    }
}
