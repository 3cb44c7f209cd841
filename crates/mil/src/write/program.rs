//! A [`Program`] becomes `MILSpec.Program` of the protobuf.

use coreml_proto::proto::mil_spec as pb;
use pb::tensor_value::Value as Elements;

use crate::program::*;
use crate::spec::DTYPES;
use crate::wire::{self, Entry, write_map};

/// The message of a program that [`Program::check`] accepts.
pub(super) fn convert(program: &Program) -> wire::Program {
    wire::Program {
        version: 1,
        functions: write_map(program.functions.iter().map(|f| (&f.name, f)), function),
        attributes: attributes(&program.attributes),
    }
}

fn function(f: &Function) -> wire::Function {
    let body = Entry {
        key: f.opset.clone(),
        value: Some(block(&f.body)),
    };
    wire::Function {
        inputs: named_types(&f.inputs),
        opset: f.opset.clone(),
        block_specializations: vec![body],
        attributes: attributes(&f.attributes),
    }
}

fn block(b: &Block) -> wire::Block {
    wire::Block {
        inputs: named_types(&b.inputs),
        outputs: b.outputs.clone(),
        operations: b.operations.iter().map(operation).collect(),
        attributes: attributes(&b.attributes),
    }
}

fn operation(op: &Operation) -> wire::Operation {
    let argument = |list: &Vec<Argument>| pb::Argument {
        arguments: list.iter().map(binding).collect(),
    };
    wire::Operation {
        op_type: op.op_type.clone(),
        inputs: write_map(pairs(&op.inputs), argument),
        outputs: named_types(&op.outputs),
        blocks: op.blocks.iter().map(block).collect(),
        attributes: attributes(&op.attributes),
    }
}

fn pairs<T>(list: &[(String, T)]) -> impl Iterator<Item = (&String, &T)> {
    list.iter().map(|(name, item)| (name, item))
}

fn binding(argument: &Argument) -> pb::argument::Binding {
    use pb::argument::binding::Binding;
    let binding = match argument {
        Argument::Name(name) => Binding::Name(name.clone()),
        Argument::Value(v) => Binding::Value(value(v)),
    };
    pb::argument::Binding {
        binding: Some(binding),
    }
}

fn attributes(list: &Attributes) -> Vec<Entry<pb::Value>> {
    write_map(pairs(list), value)
}

fn named_types(list: &[NamedType]) -> Vec<pb::NamedValueType> {
    list.iter()
        .map(|n| pb::NamedValueType {
            name: n.name.clone(),
            r#type: Some(value_type(&n.ty)),
        })
        .collect()
}

fn value_type(ty: &ValueType) -> pb::ValueType {
    use pb::value_type::Type;
    let boxed = |ty: &ValueType| Some(Box::new(value_type(ty)));
    let ty = match ty {
        ValueType::Tensor(t) => Type::TensorType(tensor_type(t)),
        ValueType::List { element, len } => Type::ListType(Box::new(pb::ListType {
            r#type: boxed(element),
            length: Some(dimension(len.map_or(Dim::Unknown, Dim::Fixed))),
        })),
        ValueType::Tuple(types) => Type::TupleType(pb::TupleType {
            types: types.iter().map(value_type).collect(),
        }),
        ValueType::Dictionary { key, value } => Type::DictionaryType(Box::new(pb::DictionaryType {
            key_type: boxed(key),
            value_type: boxed(value),
        })),
        ValueType::State(inner) => Type::StateType(Box::new(pb::StateType {
            wrapped_type: boxed(inner),
        })),
    };
    pb::ValueType { r#type: Some(ty) }
}

fn tensor_type(t: &TensorType) -> pb::TensorType {
    let data_type = DTYPES
        .iter()
        .find(|(_, d)| *d == t.dtype)
        .map_or(0, |(p, _)| *p as i32);
    pb::TensorType {
        data_type,
        rank: t.shape.len() as i64,
        dimensions: t.shape.iter().copied().map(dimension).collect(),
        ..pb::TensorType::default()
    }
}

fn dimension(dim: Dim) -> pb::Dimension {
    use pb::dimension::{ConstantDimension, Dimension, UnknownDimension};
    pb::Dimension {
        dimension: Some(match dim {
            Dim::Fixed(n) => Dimension::Constant(ConstantDimension { size: n as u64 }),
            Dim::Unknown => Dimension::Unknown(UnknownDimension { variadic: false }),
            Dim::Variadic => Dimension::Unknown(UnknownDimension { variadic: true }),
        }),
    }
}

fn value(v: &Value) -> pb::Value {
    use pb::value::immediate_value::Value as Immediate;
    let immediate =
        |value| pb::value::Value::ImmediateValue(pb::value::ImmediateValue { value: Some(value) });
    let values = |list: &[Value]| list.iter().map(value).collect();
    let data = match &v.data {
        ValueData::Blob(blob) => pb::value::Value::BlobFileValue(pb::value::BlobFileValue {
            file_name: blob.path.clone(),
            offset: blob.offset,
        }),
        ValueData::Strings(strings) => {
            let strings = pb::tensor_value::RepeatedStrings {
                values: strings.clone(),
            };
            immediate(Immediate::Tensor(pb::TensorValue {
                value: Some(Elements::Strings(strings)),
            }))
        }
        ValueData::Tensor(bytes) => {
            let dtype = v.ty.tensor().map_or(DType::Uint8, |t| t.dtype);
            immediate(Immediate::Tensor(pb::TensorValue {
                value: Some(elements(dtype, bytes)),
            }))
        }
        ValueData::List(list) => immediate(Immediate::List(pb::ListValue { values: values(list) })),
        ValueData::Tuple(list) => immediate(Immediate::Tuple(pb::TupleValue { values: values(list) })),
        ValueData::Dictionary(pairs) => {
            let pair = |(k, v): &(Value, Value)| pb::dictionary_value::KeyValuePair {
                key: Some(value(k)),
                value: Some(value(v)),
            };
            immediate(Immediate::Dictionary(pb::DictionaryValue {
                values: pairs.iter().map(pair).collect(),
            }))
        }
    };
    pb::Value {
        doc_string: String::new(),
        r#type: Some(value_type(&v.ty)),
        value: Some(data),
    }
}

/// Elements in the list that Core ML reads them from: it depends on the dtype (coremltools 9,
/// `converters/mil/backend/mil/helper.py`).
fn elements(dtype: DType, bytes: &[u8]) -> Elements {
    match dtype {
        DType::Bool => Elements::Bools(pb::tensor_value::RepeatedBools {
            values: words(bytes, |[b]| b != 0),
        }),
        DType::Fp32 => Elements::Floats(pb::tensor_value::RepeatedFloats {
            values: words(bytes, f32::from_le_bytes),
        }),
        DType::Fp64 => Elements::Doubles(pb::tensor_value::RepeatedDoubles {
            values: words(bytes, f64::from_le_bytes),
        }),
        DType::Int16 => ints(words(bytes, |b| i32::from(i16::from_le_bytes(b)))),
        DType::Uint16 => ints(words(bytes, |b| i32::from(u16::from_le_bytes(b)))),
        DType::Int32 => ints(words(bytes, i32::from_le_bytes)),
        DType::Int64 | DType::Uint64 => Elements::LongInts(pb::tensor_value::RepeatedLongInts {
            values: words(bytes, i64::from_le_bytes),
        }),
        _ => Elements::Bytes(pb::tensor_value::RepeatedBytes {
            values: bytes.to_vec(),
        }),
    }
}

fn ints(values: Vec<i32>) -> Elements {
    Elements::Ints(pb::tensor_value::RepeatedInts { values })
}

fn words<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|word| read(*word)).collect()
}
