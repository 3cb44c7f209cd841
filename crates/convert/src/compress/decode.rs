//! The values a compressed weight stands for, computed from what is about to be written.

use candle_coreml_mil::{DType, TensorType, Value, ValueData};
use half::f16;

use super::{Encoded, Part};

/// Elements of a part as numbers, with their shape.
type Numbers = (Vec<f32>, Vec<usize>);

/// What the last of `steps` gives; `None` for steps that nothing here writes.
pub(crate) fn decode(steps: &[Encoded]) -> Option<Vec<f32>> {
    let mut before: Vec<Vec<f32>> = Vec::new();
    for step in steps {
        let shape = step.outputs.first()?.fixed_shape()?;
        let get = |name: &str| -> Option<Numbers> {
            let (_, part) = step.inputs.iter().find(|(n, _)| *n == name)?;
            match part {
                Part::Tensor(ty, bytes) => Some((numbers(ty, bytes)?, ty.fixed_shape()?)),
                Part::Literal(value) => literal(value),
                Part::Before(n) => Some((before.get(*n)?.clone(), Vec::new())),
            }
        };
        before = match step.op {
            "const" => vec![get("val")?.0],
            "constexpr_lut_to_dense" => vec![from_tables(&shape, &get("indices")?.0, &get("lut")?)?],
            "constexpr_blockwise_shift_scale" => vec![scaled(&shape, get("data")?.0, &get("scale")?)?],
            "constexpr_lut_to_sparse" => {
                let (table, codes) = (get("lut")?.0, get("indices_nonzero_data")?.0);
                let data = codes.iter().map(|&c| table.get(c as usize).copied());
                vec![get("indices_mask")?.0, data.collect::<Option<_>>()?]
            }
            "constexpr_sparse_blockwise_shift_scale" => {
                let mask = get("data_mask")?.0;
                let dense = scaled(&shape, spread(&mask, &get("nonzero_data")?.0)?, &get("scale")?)?;
                let kept = dense.iter().zip(&mask).filter(|(_, m)| **m != 0.0);
                let kept = kept.map(|(v, _)| *v).collect();
                vec![mask, kept]
            }
            "constexpr_sparse_to_dense" => vec![spread(&get("mask")?.0, &get("nonzero_data")?.0)?],
            _ => return None,
        };
    }
    before.into_iter().next()
}

fn literal(value: &Value) -> Option<Numbers> {
    let ty = value.ty.tensor()?;
    match &value.data {
        ValueData::Tensor(bytes) => Some((numbers(ty, bytes)?, ty.fixed_shape()?)),
        _ => None,
    }
}

fn numbers(ty: &TensorType, bytes: &[u8]) -> Option<Vec<f32>> {
    let count = ty.element_count()?;
    let halves = bytes.as_chunks::<2>().0;
    Some(match ty.dtype {
        DType::Fp16 => halves.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        DType::Int8 => bytes.iter().map(|&b| f32::from(b as i8)).collect(),
        DType::Int4 => unpack(bytes, 4, count)
            .map(|v| f32::from((v << 4) as i8 >> 4))
            .collect(),
        DType::Uint1 | DType::Uint2 | DType::Uint3 | DType::Uint4 | DType::Uint6 | DType::Uint8 => {
            unpack(bytes, ty.dtype.bits()?, count).map(f32::from).collect()
        }
        DType::Int32 => {
            let words = bytes.as_chunks::<4>().0;
            words.iter().map(|b| i32::from_le_bytes(*b) as f32).collect()
        }
        _ => return None,
    })
}

/// The other way round than [`super::pack_bits`].
fn unpack(bytes: &[u8], bits: usize, count: usize) -> impl Iterator<Item = u8> + '_ {
    (0..count).map(move |i| {
        let at = i * bits;
        let byte = |n: usize| u16::from(bytes.get(n).copied().unwrap_or(0));
        let pair = byte(at / 8) | byte(at / 8 + 1) << 8;
        ((pair >> (at % 8)) & ((1 << bits) - 1)) as u8
    })
}

/// Tables lie along the first dimension, vectors too.
fn from_tables(shape: &[usize], codes: &[f32], (table, lut): &Numbers) -> Option<Vec<f32>> {
    let [.., entries, vector] = lut[..] else {
        return None;
    };
    let (outer, groups) = (*shape.first()?, *lut.first()?);
    let row: usize = shape[1..].iter().product();
    let each = outer / groups;
    let mut out = Vec::with_capacity(outer * row);
    for channel in 0..outer {
        let codes = codes.get(channel / vector * row..)?.get(..row)?;
        let first = channel / each * entries;
        for &code in codes {
            out.push(*table.get((first + code as usize) * vector + channel % vector)?);
        }
    }
    Some(out)
}

/// Scales lie along the first two dimensions.
fn scaled(shape: &[usize], mut values: Vec<f32>, (scale, scales): &Numbers) -> Option<Vec<f32>> {
    let (outer, inner) = (*shape.first()?, shape.get(1).copied().unwrap_or(1));
    let width: usize = shape.get(2..).unwrap_or_default().iter().product();
    let (across, along) = (*scales.first()?, scales.get(1).copied().unwrap_or(1));
    for (i, v) in values.iter_mut().enumerate() {
        let (channel, input) = (i / (inner * width), i / width % inner);
        let at = channel * across / outer * along + input * along / inner;
        *v *= scale.get(at)?;
    }
    Some(values)
}

fn spread(mask: &[f32], data: &[f32]) -> Option<Vec<f32>> {
    let mut rest = data.iter();
    let pick = |&m: &f32| if m == 0.0 { Some(0.0) } else { rest.next().copied() };
    mask.iter().map(pick).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Compression;
    use super::*;

    #[test]
    fn every_form_stands_for_values_near_its_own() {
        let shape = [16, 12, 1, 1];
        let value = |i: usize| f16::from_f32(((i * 37 % 101) as f32 - 50.0) / 60.0);
        let values: Vec<f16> = (0..16 * 12).map(value).collect();
        for (how, most) in [
            ("none", 0.0),
            ("palette:8", 0.01),
            ("palette:6:group=4", 0.03),
            ("palette:3", 0.15),
            ("palette:1", 0.5),
            ("palette:8:group=8:vector=2", 0.01),
            ("palette:6:vector=4", 0.4),
            ("palette:8:table=int8", 0.02),
            ("int8", 0.02),
            ("int4", 0.15),
            ("int4:block=4", 0.15),
            ("sparse:0.1", 0.11),
            ("sparse:0.1+palette:6", 0.12),
            ("sparse:0.1+palette:6:table=int8", 0.12),
            ("sparse:0.1+int8", 0.12),
            ("sparse:0.1+int4", 0.2),
        ] {
            let how: Compression = how.parse().unwrap();
            let back = decode(&how.encode(&shape, &values).unwrap()).unwrap();
            assert_eq!(back.len(), values.len(), "{how}");
            let off = back.iter().zip(&values).map(|(a, b)| (a - b.to_f32()).abs());
            let off = off.fold(0.0, f32::max);
            assert!(off <= most, "{how}: off by {off}, at most {most}");
        }
    }
}
