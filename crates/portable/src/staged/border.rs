//! Values on their way into a staged run, between its segments and out of it.

use crate::array::{Array, Buffer, Data, OwnedArray};
use crate::constant::{Const, ConstData};
use crate::error::Error;
use crate::graph::Storage;
use crate::item::Item;
use crate::layout::elements;
use candle_coreml_kernels::{f16_to_f32, f32_to_f16};
use candle_coreml_mil::DType;
use half::f16;

/// A value of the caller.
pub(super) fn read(name: &str, dtype: DType, array: Array<'_>) -> Result<Const, Error> {
    let fail = |message: String| Error::Value {
        what: "input",
        name: name.into(),
        message,
    };
    let count = elements(array.shape);
    if array.data.len() != count {
        return Err(fail(format!(
            "{} elements came, {count} are needed",
            array.data.len()
        )));
    }
    match (array.data, Storage::of(dtype)) {
        (Data::F32(v), Storage::F32) => Ok(Const::f32(dtype, array.shape, v.to_vec())),
        (Data::F16(v), Storage::F32) => {
            let mut wide = vec![0.0; count];
            f16_to_f32(v, &mut wide);
            Ok(Const::f32(dtype, array.shape, wide))
        }
        (Data::I32(v), Storage::I32) => Ok(Const::i32(dtype, array.shape, v.to_vec())),
        _ => Err(fail(format!("elements of another kind came, {dtype} is needed"))),
    }
}

/// What a segment has computed, as a value for the next.
pub(super) fn keep(dtype: DType, array: OwnedArray) -> Const {
    match array.data {
        Buffer::F32(v) => Const::f32(dtype, &array.shape, v),
        Buffer::I32(v) => Const::i32(dtype, &array.shape, v),
        Buffer::Strings(v) => Const::new(dtype, &array.shape, ConstData::Strings(v.into())),
        Buffer::F16(_) | Buffer::I64(_) | Buffer::Dictionary(_) => {
            let wide = array.to_f32();
            Const::f32(dtype, &array.shape, wide)
        }
    }
}

/// A tensor as the caller gets it; fp16 ones as 32-bit floats when `wide`.
pub(super) fn array(value: &Const, wide: bool) -> OwnedArray {
    let data = match &value.data {
        ConstData::Strings(v) => Buffer::Strings(v.to_vec()),
        ConstData::I32(v) => Buffer::I32(v.to_vec()),
        _ if value.dtype == DType::Fp16 && !wide => {
            let mut narrow = vec![f16::ZERO; elements(&value.shape)];
            f32_to_f16(value.floats(), &mut narrow);
            Buffer::F16(narrow)
        }
        _ => Buffer::F32(value.floats().to_vec()),
    };
    OwnedArray {
        shape: value.shape.to_vec(),
        data,
    }
}

/// A result of the function.
pub(super) fn give(name: &str, item: Item, wide: bool) -> Result<OwnedArray, Error> {
    match item {
        Item::Tensor { value, .. } => Ok(array(&value, wide)),
        Item::Dictionary(pairs) => Ok(OwnedArray {
            shape: vec![pairs.len()],
            data: Buffer::Dictionary(pairs.to_vec()),
        }),
        Item::Number(label) => Ok(OwnedArray {
            shape: Vec::new(),
            data: Buffer::I64(vec![label]),
        }),
        Item::List(_) => Err(Error::Node {
            node: name.into(),
            op: "output".into(),
            message: "a list cannot be a result of the model".into(),
        }),
    }
}
