//! `MILSpec.Program` of the protobuf becomes a [`Program`].

use bytes::Bytes;
use coreml_proto::proto::mil_spec as pb;
use pb::tensor_value::Value as Elements;
use pb::value::immediate_value::Value as Immediate;

use crate::blob::padding_bits;
use crate::check::check_count;
use crate::element::{Number, Packer};
use crate::error::{Problem, problem};
use crate::program::*;
use crate::wire::{self, Entry, read_map};

type Result<T> = std::result::Result<T, Problem>;

/// The first specification version whose programs Core ML compiles with bare scalars: that of iOS 18.
const BARE_SCALARS: i32 = 9;

/// Reads a program; the specification version of its model says in which dialect it is printed. Functions, attributes and
/// arguments, which the protobuf keeps in unordered maps, are sorted by name.
pub(crate) fn convert(program: wire::Program, specification_version: i32) -> Result<Program> {
    if program.version != 1 {
        return Err(problem!(
            "program version {}, version 1 is supported",
            program.version
        ));
    }
    let functions = read_map(program.functions, |name, f| {
        function(name, f).map_err(|p| p.within(format!("function {name:?}")))
    })?;
    Ok(Program {
        version: match specification_version {
            BARE_SCALARS.. => ProgramVersion::V1_3,
            _ => ProgramVersion::V1_0,
        },
        functions: functions.into_iter().map(|(_, f)| f).collect(),
        attributes: attributes(program.attributes)?,
    })
}

fn function(name: &str, f: wire::Function) -> Result<Function> {
    let found: Vec<_> = f
        .block_specializations
        .iter()
        .map(|entry| entry.key.clone())
        .collect();
    let body = f
        .block_specializations
        .into_iter()
        .rfind(|entry| entry.key == f.opset)
        .and_then(|entry| entry.value)
        .ok_or_else(|| problem!("no block for its operation set {:?}, only for {found:?}", f.opset))?;
    Ok(Function {
        name: name.to_string(),
        opset: f.opset,
        inputs: named_types(f.inputs).map_err(|p| p.within("input"))?,
        attributes: attributes(f.attributes)?,
        body: block(body)?,
    })
}

fn block(b: wire::Block) -> Result<Block> {
    let mut operations = Vec::with_capacity(b.operations.len());
    for (i, op) in b.operations.into_iter().enumerate() {
        let op_type = op.op_type.clone();
        let output = op.outputs.first().map(|o| o.name.clone()).unwrap_or_default();
        let converted = operation(op);
        operations.push(converted.map_err(|p| p.within(format!("operation {i} {output:?} ({op_type})")))?);
    }
    Ok(Block {
        inputs: named_types(b.inputs).map_err(|p| p.within("block input"))?,
        operations,
        outputs: b.outputs,
        attributes: attributes(b.attributes)?,
    })
}

fn operation(op: wire::Operation) -> Result<Operation> {
    let inputs = read_map(op.inputs, |name, argument| {
        let bindings: Result<_> = argument.arguments.into_iter().map(binding).collect();
        bindings.map_err(|p| p.within(format!("input {name:?}")))
    })?;
    let blocks = op.blocks.into_iter().enumerate();
    Ok(Operation {
        op_type: op.op_type,
        inputs,
        outputs: named_types(op.outputs).map_err(|p| p.within("output"))?,
        attributes: attributes(op.attributes)?,
        blocks: blocks
            .map(|(i, b)| block(b).map_err(|p| p.within(format!("block {i}"))))
            .collect::<Result<_>>()?,
    })
}

fn binding(b: pb::argument::Binding) -> Result<Argument> {
    match b.binding.ok_or_else(|| problem!("bound to nothing"))? {
        pb::argument::binding::Binding::Name(name) => Ok(Argument::Name(name)),
        pb::argument::binding::Binding::Value(v) => Ok(Argument::Value(value(v)?)),
    }
}

fn attributes(map: Vec<Entry<pb::Value>>) -> Result<Attributes> {
    read_map(map, |name, v| {
        value(v).map_err(|p| p.within(format!("attribute {name:?}")))
    })
}

fn named_types(list: Vec<pb::NamedValueType>) -> Result<Vec<NamedType>> {
    let read = |n: pb::NamedValueType| match optional_type(n.r#type.as_ref()) {
        Ok(ty) => Ok(NamedType { name: n.name, ty }),
        Err(p) => Err(p.within(format!("{:?}", n.name))),
    };
    list.into_iter().map(read).collect()
}

fn optional_type(ty: Option<&pb::ValueType>) -> Result<ValueType> {
    value_type(ty.ok_or_else(|| problem!("has no type"))?)
}

fn value_type(ty: &pb::ValueType) -> Result<ValueType> {
    use pb::value_type::Type;
    Ok(match ty.r#type.as_ref().ok_or_else(|| problem!("has no type"))? {
        Type::TensorType(t) => ValueType::Tensor(tensor_type(t)?),
        Type::ListType(l) => {
            let len = match l.length.as_ref().map(dimension).transpose()? {
                Some(Dim::Fixed(n)) => Some(n),
                Some(Dim::Unknown | Dim::Variadic) | None => None,
            };
            ValueType::List {
                element: Box::new(optional_type(l.r#type.as_deref())?),
                len,
            }
        }
        Type::TupleType(t) => ValueType::Tuple(t.types.iter().map(value_type).collect::<Result<_>>()?),
        Type::DictionaryType(d) => ValueType::Dictionary {
            key: Box::new(optional_type(d.key_type.as_deref())?),
            value: Box::new(optional_type(d.value_type.as_deref())?),
        },
        Type::StateType(s) => ValueType::State(Box::new(optional_type(s.wrapped_type.as_deref())?)),
    })
}

fn tensor_type(t: &pb::TensorType) -> Result<TensorType> {
    let dtype = dtype(t.data_type)?;
    if t.rank < 0 {
        return Err(problem!("tensors of variable rank are not supported"));
    }
    if t.rank as u64 != t.dimensions.len() as u64 {
        return Err(problem!("rank {} with {} dimensions", t.rank, t.dimensions.len()));
    }
    Ok(TensorType {
        dtype,
        shape: t.dimensions.iter().map(dimension).collect::<Result<_>>()?,
    })
}

fn dimension(d: &pb::Dimension) -> Result<Dim> {
    use pb::dimension::Dimension;
    match d.dimension {
        Some(Dimension::Constant(c)) => usize::try_from(c.size)
            .map(Dim::Fixed)
            .map_err(|_| problem!("dimension {} is too large", c.size)),
        Some(Dimension::Unknown(u)) if u.variadic => Ok(Dim::Variadic),
        Some(Dimension::Unknown(_)) => Ok(Dim::Unknown),
        None => Err(problem!("a dimension that is neither constant nor unknown")),
    }
}

/// Element types by their protobuf numbers (`mlmodel/format/MIL.proto`, `DataType`).
pub(crate) const DTYPES: [(pb::DataType, DType); 22] = [
    (pb::DataType::Bool, DType::Bool),
    (pb::DataType::String, DType::String),
    (pb::DataType::Float8e4m3fn, DType::Fp8E4M3FN),
    (pb::DataType::Float8e5m2, DType::Fp8E5M2),
    (pb::DataType::Float16, DType::Fp16),
    (pb::DataType::Float32, DType::Fp32),
    (pb::DataType::Float64, DType::Fp64),
    (pb::DataType::Bfloat16, DType::Bf16),
    (pb::DataType::Int8, DType::Int8),
    (pb::DataType::Int16, DType::Int16),
    (pb::DataType::Int32, DType::Int32),
    (pb::DataType::Int64, DType::Int64),
    (pb::DataType::Int4, DType::Int4),
    (pb::DataType::Uint8, DType::Uint8),
    (pb::DataType::Uint16, DType::Uint16),
    (pb::DataType::Uint32, DType::Uint32),
    (pb::DataType::Uint64, DType::Uint64),
    (pb::DataType::Uint4, DType::Uint4),
    (pb::DataType::Uint2, DType::Uint2),
    (pb::DataType::Uint1, DType::Uint1),
    (pb::DataType::Uint6, DType::Uint6),
    (pb::DataType::Uint3, DType::Uint3),
];

fn dtype(number: i32) -> Result<DType> {
    DTYPES
        .iter()
        .find(|(p, _)| *p as i32 == number)
        .map(|(_, d)| *d)
        .ok_or_else(|| problem!("unknown element type {number}"))
}

fn value(v: pb::Value) -> Result<Value> {
    let ty = optional_type(v.r#type.as_ref())?;
    let data = match v.value.ok_or_else(|| problem!("has no value"))? {
        pb::value::Value::BlobFileValue(b) => ValueData::Blob(BlobRef {
            path: b.file_name,
            offset: b.offset,
        }),
        pb::value::Value::ImmediateValue(i) => {
            immediate(&ty, i.value.ok_or_else(|| problem!("has no value"))?)?
        }
    };
    Ok(Value { ty, data })
}

fn immediate(ty: &ValueType, v: Immediate) -> Result<ValueData> {
    let values = |list: Vec<pb::Value>| list.into_iter().map(value).collect::<Result<_>>();
    match (ty, v) {
        (ValueType::Tensor(t), Immediate::Tensor(v)) => tensor_data(t, v.value),
        (ValueType::List { .. }, Immediate::List(l)) => values(l.values).map(ValueData::List),
        (ValueType::Tuple(_), Immediate::Tuple(t)) => values(t.values).map(ValueData::Tuple),
        (ValueType::Dictionary { .. }, Immediate::Dictionary(d)) => {
            let half = |v: Option<pb::Value>| value(v.ok_or_else(|| problem!("half a pair"))?);
            let pairs = d
                .values
                .into_iter()
                .map(|pair| Ok((half(pair.key)?, half(pair.value)?)));
            Ok(ValueData::Dictionary(pairs.collect::<Result<_>>()?))
        }
        _ => Err(problem!("the value is of another kind than its type")),
    }
}

/// Elements in the dtype's own width. Which list of the message holds them depends on the dtype and on who wrote it.
fn tensor_data(ty: &TensorType, elements: Option<Elements>) -> Result<ValueData> {
    let dtype = ty.dtype;
    let bytes = match elements {
        Some(Elements::Strings(s)) if dtype == DType::String => {
            check_count(ty, s.values.len())?;
            return Ok(ValueData::Strings(s.values));
        }
        None if dtype == DType::String => return empty(ty).map(|()| ValueData::Strings(Vec::new())),
        None => return empty(ty).map(|()| ValueData::Tensor(Bytes::new())),
        Some(Elements::Bytes(b)) => {
            check_byte_len(ty, b.values.len())?;
            if dtype == DType::Bool && b.values.iter().any(|b| *b > 1) {
                return Err(problem!("a boolean that is neither 0 nor 1"));
            }
            without_padding(ty, b.values)
        }
        Some(Elements::Floats(f)) if dtype == DType::Fp32 => {
            check_count(ty, f.values.len())?;
            f.values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Some(Elements::Doubles(f)) if dtype == DType::Fp64 => {
            check_count(ty, f.values.len())?;
            f.values.iter().flat_map(|x| x.to_le_bytes()).collect()
        }
        Some(Elements::Floats(f)) => pack(ty, f.values.iter().map(|x| Number::Float(f64::from(*x))))?,
        Some(Elements::Doubles(f)) => pack(ty, f.values.iter().map(|x| Number::Float(*x)))?,
        Some(Elements::Ints(n)) => pack(ty, n.values.iter().map(|n| wrapped(dtype, i64::from(*n))))?,
        Some(Elements::LongInts(n)) => pack(ty, n.values.iter().map(|n| wrapped(dtype, *n)))?,
        Some(Elements::Bools(b)) => pack(ty, b.values.iter().map(|b| Number::Int(i128::from(*b))))?,
        Some(Elements::Strings(_)) => return Err(problem!("strings for a tensor of {dtype}")),
    };
    Ok(ValueData::Tensor(bytes.into()))
}

/// Clears the bits behind the last packed element, which some writers leave as they were.
fn without_padding(ty: &TensorType, mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(last) = bytes.last_mut() {
        *last &= 0xff >> padding_bits(ty);
    }
    bytes
}

/// Unsigned types as wide as the list they are kept in use its sign bit.
fn wrapped(dtype: DType, n: i64) -> Number {
    Number::Int(match dtype {
        DType::Uint64 => i128::from(n as u64),
        DType::Uint32 if n < 0 => i128::from(n as i32 as u32),
        _ => i128::from(n),
    })
}

fn pack(ty: &TensorType, numbers: impl ExactSizeIterator<Item = Number>) -> Result<Vec<u8>> {
    check_count(ty, numbers.len())?;
    let mut packer = Packer::new(ty.dtype);
    for (i, number) in numbers.enumerate() {
        if !packer.push(number) {
            return Err(problem!("element {i}, {number:?}, is no {}", ty.dtype));
        }
    }
    Ok(packer.finish())
}

fn empty(ty: &TensorType) -> Result<()> {
    if ty.shape.contains(&Dim::Fixed(0)) {
        Ok(())
    } else {
        Err(problem!("no elements for {ty}"))
    }
}

fn check_byte_len(ty: &TensorType, len: usize) -> Result<()> {
    let ok = match ty.element_count() {
        Some(_) => ty.byte_len() == Some(len),
        None => {
            let bits = ty.dtype.bits().filter(|bits| *bits >= 8);
            bits.is_some_and(|bits| len.is_multiple_of(bits / 8) && check_count(ty, len / (bits / 8)).is_ok())
        }
    };
    if ok {
        Ok(())
    } else {
        Err(problem!("{len} bytes for {ty}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(dtype: DType, shape: &[usize]) -> TensorType {
        TensorType::fixed(dtype, shape)
    }

    fn ints(values: &[i32]) -> Elements {
        Elements::Ints(pb::tensor_value::RepeatedInts {
            values: values.to_vec(),
        })
    }

    fn longs(values: &[i64]) -> Elements {
        Elements::LongInts(pb::tensor_value::RepeatedLongInts {
            values: values.to_vec(),
        })
    }

    fn bytes(values: &[u8]) -> Elements {
        Elements::Bytes(pb::tensor_value::RepeatedBytes {
            values: values.to_vec(),
        })
    }

    #[test]
    fn immediate_elements_become_bytes_of_their_own_width() {
        let floats = Elements::Floats(pb::tensor_value::RepeatedFloats {
            values: vec![1.0, -0.0],
        });
        let bools = Elements::Bools(pb::tensor_value::RepeatedBools {
            values: vec![true, false],
        });
        let cases: [(TensorType, Elements, &[u8]); 11] = [
            (
                tensor(DType::Fp16, &[2]),
                bytes(&[0, 0x3c, 1, 0]),
                &[0, 0x3c, 1, 0],
            ),
            (
                tensor(DType::Fp32, &[2]),
                floats.clone(),
                &[0, 0, 0x80, 0x3f, 0, 0, 0, 0x80],
            ),
            (tensor(DType::Fp16, &[2]), floats, &[0, 0x3c, 0, 0x80]),
            (tensor(DType::Int8, &[2]), ints(&[-1, 2]), &[255, 2]),
            (tensor(DType::Int16, &[2]), ints(&[-1, 2]), &[255, 255, 2, 0]),
            (tensor(DType::Int32, &[]), ints(&[-2]), &[254, 255, 255, 255]),
            (
                tensor(DType::Int64, &[1]),
                longs(&[-2]),
                &[254, 255, 255, 255, 255, 255, 255, 255],
            ),
            (tensor(DType::Uint32, &[1]), ints(&[-1]), &[255; 4]),
            (tensor(DType::Uint64, &[1]), longs(&[-1]), &[255; 8]),
            (tensor(DType::Bool, &[2]), bools, &[1, 0]),
            (tensor(DType::Uint4, &[3]), bytes(&[0x21, 0xf3]), &[0x21, 3]),
        ];
        for (ty, elements, expected) in cases {
            let found = tensor_data(&ty, Some(elements));
            assert_eq!(
                found,
                Ok(ValueData::Tensor(Bytes::copy_from_slice(expected))),
                "{ty}"
            );
        }
    }

    #[test]
    fn element_counts_that_disagree_with_the_shape_are_refused() {
        let any = |dims: &[Dim]| TensorType {
            dtype: DType::Int32,
            shape: dims.to_vec(),
        };
        let cases = [
            (tensor(DType::Int32, &[3]), ints(&[1, 2])),
            (tensor(DType::Int32, &[1 << 40, 1 << 40]), ints(&[1])),
            (tensor(DType::Fp16, &[2]), bytes(&[0; 3])),
            (tensor(DType::Uint4, &[3]), bytes(&[0; 3])),
            (tensor(DType::Int8, &[1]), ints(&[300])),
            (tensor(DType::String, &[1]), ints(&[1])),
            (any(&[Dim::Unknown, Dim::Unknown]), ints(&[1])),
            (any(&[Dim::Unknown, Dim::Fixed(2)]), ints(&[1, 2, 3])),
        ];
        for (ty, elements) in cases {
            assert!(tensor_data(&ty, Some(elements)).is_err(), "{ty}");
        }
        assert!(tensor_data(&any(&[Dim::Unknown, Dim::Fixed(2)]), Some(ints(&[1, 2, 3, 4]))).is_ok());
        assert!(tensor_data(&tensor(DType::Int32, &[1]), None).is_err());
        assert!(tensor_data(&tensor(DType::Int32, &[0]), None).is_ok());
    }
}
