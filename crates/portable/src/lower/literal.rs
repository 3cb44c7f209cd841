//! Literals and blobs of the file as constants.

use crate::constant::{Const, ConstData, decode_f32, decode_i32};
use crate::error::OpError;
use crate::layout::checked_elements;
use candle_coreml_mil::{self as mil, DType, ValueData};

/// Elements of a constant that is widened and copied: less than keeping a part of a file is worth.
const SMALL: usize = 64;

/// Whether the bytes of a file are 32-bit floats where they lie.
fn is_floats(bytes: &[u8]) -> bool {
    cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, f32>(bytes).is_ok()
}

/// Reads a literal; floats in a weight file stay there.
pub fn read(model: &mil::Model, value: &mil::Value) -> Result<Const, OpError> {
    let ty = value
        .ty
        .tensor()
        .ok_or_else(|| format!("a constant of type {:?} is not a tensor", value.ty))?;
    let shape = ty.fixed_shape().ok_or("a constant needs a fixed shape")?;
    let count = checked_elements(&shape).ok_or_else(|| format!("shape {shape:?} is too large"))?;
    let bytes = match &value.data {
        ValueData::Tensor(bytes) => bytes.clone(),
        ValueData::Blob(blob) => model.blob(blob, ty).map_err(|e| e.to_string())?,
        ValueData::Strings(s) => {
            return Ok(Const::new(
                ty.dtype,
                &shape,
                ConstData::Strings(s.as_slice().into()),
            ));
        }
        _ => return Err("a constant must be a tensor".into()),
    };
    let data = match ty.dtype {
        DType::Fp16 if count > SMALL => ConstData::F16(bytes),
        DType::Fp32 if count > SMALL && is_floats(&bytes) => ConstData::Stored(bytes),
        t if t.is_float() => ConstData::F32(decode_f32(t, &bytes).into()),
        t => ConstData::I32(decode_i32(t, &bytes, count).into()),
    };
    let have = match &data {
        ConstData::F32(v) => v.len(),
        ConstData::I32(v) => v.len(),
        ConstData::Stored(b) => b.len() / 4,
        ConstData::F16(b) => b.len() / 2,
        _ => count,
    };
    if have != count {
        return Err(format!("{have} elements are given for shape {shape:?}, which has {count}").into());
    }
    Ok(Const::new(ty.dtype, &shape, data))
}

/// The packed bytes and tensor type of a literal, for the compressed forms that must not be widened.
pub fn packed(model: &mil::Model, value: &mil::Value) -> Result<(bytes::Bytes, DType, Vec<usize>), OpError> {
    let ty = value.ty.tensor().ok_or("packed data must be a tensor")?;
    let shape = ty.fixed_shape().ok_or("packed data needs a fixed shape")?;
    checked_elements(&shape).ok_or_else(|| format!("shape {shape:?} is too large"))?;
    let bytes = match &value.data {
        ValueData::Tensor(bytes) => bytes.clone(),
        ValueData::Blob(blob) => model.blob(blob, ty).map_err(|e| e.to_string())?,
        _ => return Err("packed data must be a tensor".into()),
    };
    Ok((bytes, ty.dtype, shape))
}
