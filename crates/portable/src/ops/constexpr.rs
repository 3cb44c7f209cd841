//! Compressed constants. Source: coremltools 9.0, `mil/ops/defs/iOS16/constexpr_ops.py` and iOS18 `compression.py`.

use crate::constant::{Affine, Const, ConstData, Lut, decode_f32, decode_i32, unpack_bits};
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, opt, req};
use bytes::Bytes;
use candle_coreml_mil::DType;
use smallvec::smallvec;
use std::sync::Arc;

type Packed = (Bytes, DType, Vec<usize>);
type Table = (Vec<f32>, Vec<usize>);

fn packed(cx: &mut OpCx<'_, '_>, param: &str) -> OpResult<Packed> {
    cx.packed(param)?
        .ok_or_else(|| format!("parameter {param:?} is missing").into())
}

fn floats((bytes, dtype, shape): &Packed) -> Vec<f32> {
    let mut v = if dtype.is_float() {
        decode_f32(*dtype, bytes)
    } else {
        decode_i32(*dtype, bytes, elements(shape))
            .into_iter()
            .map(|x| x as f32)
            .collect()
    };
    v.truncate(elements(shape));
    v
}

/// Numbers and shape of a parameter that may be written in the file or made by a constexpr operator before: scales and
/// tables are compressed themselves in joint forms.
fn numbers(cx: &mut OpCx<'_, '_>, param: &str) -> OpResult<Option<(Vec<f32>, Vec<usize>)>> {
    if let Ok(found) = cx.packed(param) {
        return Ok(found.map(|p| (floats(&p), p.2)));
    }
    let id = cx.value(param)?;
    let shape = cx.shape(id).to_vec();
    Ok(cx.floats(param)?.map(|v| (v, shape)))
}

fn needed(cx: &mut OpCx<'_, '_>, param: &str) -> OpResult<(Vec<f32>, Vec<usize>)> {
    numbers(cx, param)?.ok_or_else(|| format!("parameter {param:?} is missing").into())
}

/// The type of the dense result as the file declares it.
fn result_dtype(cx: &OpCx<'_, '_>) -> OpResult<DType> {
    cx.declared(0)
        .map(|t| t.dtype)
        .ok_or_else(|| "the result must be a tensor".into())
}

fn lower_lut_to_dense(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (indices, lut) = (packed(cx, "indices")?, needed(cx, "lut")?);
    let dtype = result_dtype(cx)?;
    let (constant, shape) = match cx.ints("shape")? {
        Some(shape) => old_lut(indices, &lut, &shape)?,
        None => {
            let axis = cx.int("vector_axis")?;
            new_lut(indices, &lut, axis)?
        }
    };
    let y = cx.add_const(Const::new(dtype, &shape, ConstData::Lut(Arc::new(constant))));
    cx.result(y)
}

/// iOS16: one table, indices packed into bytes, the shape apart.
fn old_lut(indices: Packed, lut: &Table, shape: &[i32]) -> OpResult<(Lut, Shape)> {
    let shape = shape
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<Result<Shape, _>>();
    let shape = shape.map_err(|_| OpError::new("shape has a negative dimension"))?;
    let count = crate::layout::checked_elements(&shape).ok_or("shape is too large")?;
    let table = lut.0.clone();
    let bits = table.len().trailing_zeros() as usize;
    if !table.len().is_power_of_two() || bits == 0 || bits > 8 {
        return Err(format!("a table of {} entries is not 2^n for n in 1..=8", table.len()).into());
    }
    if indices.0.len() * 8 < count * bits {
        return Err(format!(
            "{} bytes of indices are too few for {count} of {bits} bits",
            indices.0.len()
        )
        .into());
    }
    let groups = smallvec![1; shape.len()];
    let index_shape = shape.clone();
    Ok((
        Lut {
            bits,
            indices: indices.0,
            index_shape,
            table,
            groups,
            vector: 1,
            vector_axis: 0,
        },
        shape,
    ))
}

/// iOS18: `indices` of an unsigned type of n bits, `lut` of shape `[groups.., 2^n, vector]`.
fn new_lut(indices: Packed, lut: &Table, vector_axis: Option<i32>) -> OpResult<(Lut, Shape)> {
    let bits = indices
        .1
        .bits()
        .filter(|_| !indices.1.is_float())
        .ok_or("indices must be integers")?;
    let rank = indices.2.len();
    let (Some((groups, [entries, vector])), true) = (lut.1.split_last_chunk::<2>(), lut.1.len() == rank + 2)
    else {
        return Err(format!(
            "lut {:?} must have two dimensions more than indices {:?}",
            lut.1, indices.2
        )
        .into());
    };
    if bits > 8 || *entries != 1 << bits {
        return Err(format!("a table of {entries} entries does not fit indices of {bits} bits").into());
    }
    check_groups(&indices.2, groups)?;
    let vector_axis = match vector_axis {
        Some(a) => crate::lower::normalize_axis(a, rank)?,
        None if *vector == 1 => 0,
        None => return Err("vector palettes need \"vector_axis\"".into()),
    };
    let index_shape: Shape = indices.2.as_slice().into();
    let mut shape = index_shape.clone();
    if let Some(d) = shape.get_mut(vector_axis) {
        *d *= vector;
    }
    let groups: Shape = groups.into();
    let table = lut.0.clone();
    Ok((
        Lut {
            bits,
            indices: indices.0,
            index_shape,
            table,
            groups,
            vector: *vector,
            vector_axis,
        },
        shape,
    ))
}

fn check_groups(shape: &[usize], groups: &[usize]) -> OpResult<()> {
    let fits = shape.len() == groups.len()
        && shape
            .iter()
            .zip(groups)
            .all(|(&d, &g)| g > 0 && d.is_multiple_of(g));
    if fits {
        Ok(())
    } else {
        Err(format!("blocks {groups:?} do not divide shape {shape:?}").into())
    }
}

fn lower_affine_dequantize(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (data, dtype, shape) = packed(cx, "quantized_data")?;
    let (scale, zero) = (needed(cx, "scale")?.0, needed(cx, "zero_point")?.0);
    let axis = cx.axis("axis", shape.len(), None)?;
    let n = scale.len().max(zero.len());
    if n != 1 && n != shape[axis]
        || scale.len() != n && scale.len() != 1
        || zero.len() != n && zero.len() != 1
    {
        let (s, z) = (scale.len(), zero.len());
        return Err(
            format!("{s} scales and {z} zero points do not fit axis {axis} of shape {shape:?}").into(),
        );
    }
    let widen = |v: Vec<f32>| if v.len() == n { v } else { vec![v[0]; n] };
    let mut groups: Shape = smallvec![1; shape.len()];
    groups[axis] = n;
    let bits = dtype.bits().unwrap_or(8);
    let signed = dtype == DType::Int8;
    let (scale, offset) = (widen(scale), Some(widen(zero)));
    let constant = Affine {
        bits,
        signed,
        data,
        scale,
        offset,
        groups,
    };
    let out = result_dtype(cx)?;
    let y = cx.add_const(Const::new(out, &shape, ConstData::Affine(Arc::new(constant))));
    cx.result(y)
}

fn lower_blockwise_shift_scale(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (scale, groups) = needed(cx, "scale")?;
    let offset = numbers(cx, "offset")?;
    let offset = offset.map(|o| if o.1 == groups { Ok(o.0) } else { Err(o.1) });
    let offset = offset
        .transpose()
        .map_err(|s| format!("offset {s:?} does not fit scale {groups:?}"))?;
    let groups: Shape = groups.as_slice().into();
    let out = result_dtype(cx)?;
    let Ok((data, dtype, shape)) = packed(cx, "data") else {
        // Made by another constexpr operator, whose numbers are unpacked already.
        let (data, shape) = needed(cx, "data")?;
        check_groups(&shape, &groups)?;
        let constant = scaled_floats(&data, &shape, &groups, &scale, offset.as_deref());
        let y = cx.add_const(Const::new(out, &shape, constant));
        return cx.result(y);
    };
    check_groups(&shape, &groups)?;
    let constant = if dtype.is_float() {
        // Float data (fp8, fp16) has no packed form here: it is scaled once.
        scaled_floats(
            &floats(&(data, dtype, shape.clone())),
            &shape,
            &groups,
            &scale,
            offset.as_deref(),
        )
    } else {
        let bits = dtype.bits().ok_or("data must be numbers")?;
        let signed = matches!(dtype, DType::Int4 | DType::Int8 | DType::Int16 | DType::Int32);
        ConstData::Affine(Arc::new(Affine {
            bits,
            signed,
            data,
            scale,
            offset,
            groups,
        }))
    };
    let y = cx.add_const(Const::new(out, &shape, constant));
    cx.result(y)
}

fn scaled_floats(
    data: &[f32],
    shape: &[usize],
    groups: &[usize],
    scale: &[f32],
    offset: Option<&[f32]>,
) -> ConstData {
    let mut out = data.to_vec();
    crate::constant::for_each_block(shape, groups, |i, block| {
        let o = offset.and_then(|o| o.get(block)).copied().unwrap_or(0.0);
        if let (Some(v), Some(s)) = (out.get_mut(i), scale.get(block)) {
            *v = (*v - o) * s;
        }
    });
    ConstData::F32(out.into())
}

/// Elements of `values` at the set bits of `mask`, 0 elsewhere.
fn spread(mask: &[u8], count: usize, values: &[f32]) -> OpResult<Vec<f32>> {
    let mut rest = values.iter();
    let mut out = Vec::with_capacity(count);
    for i in 0..count {
        let set = unpack_bits(mask, 1, i) != 0;
        out.push(if set {
            *rest
                .next()
                .ok_or("the mask has more bits set than there are values")?
        } else {
            0.0
        });
    }
    Ok(out)
}

/// The mask of a sparse constant: packed bits, either of the file or made by a sparse operator before.
fn mask(cx: &mut OpCx<'_, '_>, param: &str, count: usize) -> OpResult<Vec<u8>> {
    if let Some((bytes, dtype, _)) = cx.packed(param).ok().flatten() {
        let bits = if dtype == DType::Bool { 8 } else { 1 };
        if bytes.len() * 8 < count * bits {
            return Err(format!("{} bytes of mask are too few for {count} elements", bytes.len()).into());
        }
        if bits == 1 {
            return Ok(bytes.to_vec());
        }
        return Ok(pack_mask(bytes.iter().map(|&b| b != 0)));
    }
    let made = cx.ints(param)?.ok_or("the mask is missing")?;
    Ok(pack_mask(made.iter().map(|&v| v != 0)))
}

fn pack_mask(bits: impl Iterator<Item = bool>) -> Vec<u8> {
    let mut out = Vec::new();
    for (i, b) in bits.enumerate() {
        if i % 8 == 0 {
            out.push(0);
        }
        if let (Some(last), true) = (out.last_mut(), b) {
            *last |= 1u8 << (i % 8);
        }
    }
    out
}

fn lower_sparse_to_dense(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let declared = cx.declared(0).and_then(|t| t.fixed_shape());
    let shape = declared.ok_or("the result needs a fixed shape")?;
    let count = crate::layout::checked_elements(&shape).ok_or("the result is too large")?;
    let mask = mask(cx, "mask", count)?;
    let values = cx
        .floats("nonzero_data")?
        .ok_or("parameter \"nonzero_data\" is missing")?;
    let dtype = result_dtype(cx)?;
    let dense = spread(&mask, count, &values)?;
    let y = match Storage::of(dtype) {
        Storage::I32 => cx.add_i32(dtype, &shape, dense.iter().map(|&v| v as i32).collect()),
        _ => cx.add_f32(dtype, &shape, dense),
    };
    cx.result(y)
}

/// Gives the two results of the sparse operators: the mask and the values where it is set.
fn sparse_results(cx: &mut OpCx<'_, '_>, mask: &[u8], count: usize, values: Vec<f32>) -> OpResult<()> {
    let shape = cx
        .declared(0)
        .and_then(|t| t.fixed_shape())
        .ok_or("the mask needs a fixed shape")?;
    let bits = (0..count).map(|i| unpack_bits(mask, 1, i) as i32).collect();
    let out = cx.add_i32(DType::Uint1, &shape, bits);
    cx.result(out)?;
    let dtype = cx.declared(1).map_or(DType::Fp32, |t| t.dtype);
    let n = values.len();
    let out = cx.add_f32(dtype, &[n], values);
    cx.result(out)
}

/// Position of each set bit of the mask.
fn set_bits(mask: &[u8], count: usize) -> impl Iterator<Item = usize> + '_ {
    (0..count).filter(move |&i| unpack_bits(mask, 1, i) != 0)
}

fn lower_lut_to_sparse(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    // Smaller than the result's where each index stands for a vector.
    let shape = match cx.packed("indices_mask") {
        Ok(Some((_, _, shape))) => shape,
        _ => {
            let id = cx.value("indices_mask")?;
            cx.shape(id).to_vec()
        }
    };
    let count = crate::layout::checked_elements(&shape).ok_or("the result is too large")?;
    let mask = mask(cx, "indices_mask", count)?;
    let (indices, dtype, _) = packed(cx, "indices_nonzero_data")?;
    let lut = needed(cx, "lut")?;
    let axis = cx.int("vector_axis")?;
    // The dense form decides which table and which entry an element takes; unset ones are dropped again.
    let bits = dtype.bits().ok_or("indices must be integers")?;
    let mut full = vec![0u8; (count * bits).div_ceil(8)];
    for (n, i) in set_bits(&mask, count).enumerate() {
        let v = unpack_bits(&indices, bits, n);
        for b in 0..bits {
            if let (Some(byte), true) = (full.get_mut((i * bits + b) / 8), v >> b & 1 == 1) {
                *byte |= 1u8 << ((i * bits + b) % 8);
            }
        }
    }
    let (lut, dense_shape) = new_lut((full.into(), dtype, shape), &lut, axis)?;
    if lut.vector != 1 {
        return sparse_vectors(cx, &mask, &lut, &dense_shape);
    }
    let dense = lut.dense(&dense_shape);
    let values = set_bits(&mask, count).map(|i| dense[i]).collect();
    sparse_results(cx, &mask, count, values)
}

/// A mask bit stands for a whole vector: it is repeated along the vector's axis.
fn sparse_vectors(cx: &mut OpCx<'_, '_>, mask: &[u8], lut: &Lut, shape: &[usize]) -> OpResult<()> {
    let ones = Lut {
        bits: 1,
        indices: Bytes::copy_from_slice(mask),
        index_shape: lut.index_shape.clone(),
        table: [vec![0.0; lut.vector], vec![1.0; lut.vector]].concat(),
        groups: smallvec![1; lut.index_shape.len()],
        vector: lut.vector,
        vector_axis: lut.vector_axis,
    };
    let wide = pack_mask(ones.dense(shape).iter().map(|&v| v != 0.0));
    let dense = lut.dense(shape);
    let values = set_bits(&wide, dense.len()).map(|i| dense[i]).collect();
    sparse_results(cx, &wide, dense.len(), values)
}

fn lower_sparse_blockwise(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let shape = cx
        .declared(0)
        .and_then(|t| t.fixed_shape())
        .ok_or("the mask needs a fixed shape")?;
    let count = crate::layout::checked_elements(&shape).ok_or("the result is too large")?;
    let mask = mask(cx, "data_mask", count)?;
    // The data may come from `constexpr_lut_to_sparse`, whose values are already numbers.
    let values = match cx.packed("nonzero_data") {
        Ok(Some(p)) => floats(&p),
        _ => cx
            .floats("nonzero_data")?
            .ok_or("parameter \"nonzero_data\" is missing")?,
    };
    let (scale, groups) = needed(cx, "scale")?;
    check_groups(&shape, &groups)?;
    let offset = numbers(cx, "offset")?.map(|o| o.0);
    let dense = spread(&mask, count, &values)?;
    let ConstData::F32(scaled) = scaled_floats(&dense, &shape, &groups, &scale, offset.as_deref()) else {
        return Err("internal: scaled data are floats".into());
    };
    let kept = set_bits(&mask, count).map(|i| scaled[i]).collect();
    sparse_results(cx, &mask, count, kept)
}

fn lower_constexpr_cast(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("source_val")?;
    let to = result_dtype(cx)?;
    let y = cx.cast(x, to)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $since:literal, $inputs:expr, $outputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "constexpr_ops",
            since: $since,
            inputs: $inputs,
            outputs: Some($outputs),
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "constexpr_affine_dequantize",
        "iOS16",
        &[
            req("quantized_data"),
            req("zero_point"),
            req("scale"),
            req("axis")
        ],
        1,
        lower_affine_dequantize
    ),
    row!(
        "constexpr_blockwise_shift_scale",
        "iOS18",
        &[req("data"), req("scale"), opt("offset")],
        1,
        lower_blockwise_shift_scale
    ),
    row!(
        "constexpr_cast",
        "iOS16",
        &[req("source_val"), opt("output_dtype")],
        1,
        lower_constexpr_cast
    ),
    row!(
        "constexpr_lut_to_dense",
        "iOS16",
        &[req("indices"), req("lut"), opt("shape"), opt("vector_axis")],
        1,
        lower_lut_to_dense
    ),
    row!(
        "constexpr_lut_to_sparse",
        "iOS18",
        &[
            req("indices_mask"),
            req("indices_nonzero_data"),
            req("lut"),
            opt("vector_axis")
        ],
        2,
        lower_lut_to_sparse
    ),
    row!(
        "constexpr_sparse_blockwise_shift_scale",
        "iOS18",
        &[req("data_mask"), req("nonzero_data"), req("scale"), opt("offset")],
        2,
        lower_sparse_blockwise
    ),
    row!(
        "constexpr_sparse_to_dense",
        "iOS16",
        &[req("nonzero_data"), req("mask"), opt("shape")],
        1,
        lower_sparse_to_dense
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_values_go_where_the_mask_is_set() {
        assert_eq!(
            spread(&[0b0101], 4, &[1.0, 2.0]).expect("enough values"),
            [1.0, 0.0, 2.0, 0.0]
        );
        assert!(spread(&[0b0111], 4, &[1.0, 2.0]).is_err());
        assert_eq!(pack_mask([true, false, true].into_iter()), [0b101]);
    }
}
