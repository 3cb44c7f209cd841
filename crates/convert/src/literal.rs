//! Values written in a program: `literal::int(3)`, `literal::half(0.5)`, `literal::text("valid")`.

use candle_coreml_mil::{DType, TensorType, Value, ValueData, ValueType};
use half::f16;

fn tensor(dtype: DType, shape: &[usize], bytes: Vec<u8>) -> Value {
    Value {
        ty: ValueType::Tensor(TensorType::fixed(dtype, shape)),
        data: ValueData::Tensor(bytes.into()),
    }
}

/// A scalar integer.
pub fn int(value: i32) -> Value {
    tensor(DType::Int32, &[], value.to_le_bytes().to_vec())
}

/// A vector of integers.
pub fn ints(values: &[i32]) -> Value {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(DType::Int32, &[values.len()], bytes)
}

/// Integers in a shape; there is one for each element.
pub fn int_tensor(values: &[i32], shape: &[usize]) -> Value {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(DType::Int32, shape, bytes)
}

/// A truth value.
pub fn flag(value: bool) -> Value {
    tensor(DType::Bool, &[], vec![u8::from(value)])
}

/// A vector of truth values.
pub fn flags(values: &[bool]) -> Value {
    tensor(
        DType::Bool,
        &[values.len()],
        values.iter().map(|&v| u8::from(v)).collect(),
    )
}

/// A 16-bit float, rounded to the nearest.
pub fn half(value: f32) -> Value {
    tensor(DType::Fp16, &[], f16::from_f32(value).to_le_bytes().to_vec())
}

/// 16-bit floats in a shape; there is one for each element.
pub fn halves(values: &[f16], shape: &[usize]) -> Value {
    tensor(
        DType::Fp16,
        shape,
        values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    )
}

/// A 32-bit float.
pub fn float(value: f32) -> Value {
    tensor(DType::Fp32, &[], value.to_le_bytes().to_vec())
}

/// A string.
pub fn text(value: &str) -> Value {
    Value {
        ty: ValueType::Tensor(TensorType {
            dtype: DType::String,
            shape: Vec::new(),
        }),
        data: ValueData::Strings(vec![value.to_owned()]),
    }
}
