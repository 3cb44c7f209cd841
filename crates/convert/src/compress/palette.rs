//! Palettes: `constexpr_lut_to_dense`, one table a tensor or a group of output channels.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::how::{Palette, Table};
use super::{Encoded, Part, f16_bytes, kmeans, map_parallel, pack_bits, vectors};
use crate::literal;

/// The element type of indices of that many bits.
pub(super) fn index_type(bits: u32) -> Result<DType, String> {
    Ok(match bits {
        1 => DType::Uint1,
        2 => DType::Uint2,
        3 => DType::Uint3,
        4 => DType::Uint4,
        6 => DType::Uint6,
        8 => DType::Uint8,
        other => {
            return Err(format!(
                "palettes of {other} bits; 1, 2, 3, 4, 6 and 8 are allowed"
            ));
        }
    })
}

pub(super) fn encode(shape: &[usize], values: &[f16], how: Palette) -> Result<Vec<Encoded>, String> {
    let dtype = index_type(how.bits)?;
    let outer = shape.first().copied().filter(|&n| n > 0);
    let outer = outer.ok_or("a scalar has no palette")?;
    let group = how.group.unwrap_or(outer);
    if group == 0 || how.vector == 0 || outer % group != 0 || !group.is_multiple_of(how.vector) {
        return Err(format!(
            "groups of {group} channels with vectors of {} do not divide shape {shape:?}",
            how.vector
        ));
    }
    let row = values.len() / outer;
    let groups: Vec<&[f16]> = values.chunks((row * group).max(1)).collect();
    let coded: Vec<(Vec<f16>, Vec<u8>)> = if how.vector == 1 {
        map_parallel(groups.len(), |i| kmeans::palette(groups[i], how.bits))
    } else {
        vectors::palettes(&groups, row, how)
    };
    let mut table = Vec::with_capacity(coded.len() << how.bits);
    let mut indices = Vec::with_capacity(values.len());
    for (entries, codes) in coded {
        table.extend(entries);
        indices.extend(codes);
    }
    let mut index_shape = shape.to_vec();
    index_shape[0] /= how.vector;
    let mut lut_shape = vec![1; shape.len() + 2];
    lut_shape[0] = outer / group;
    lut_shape[shape.len()] = 1 << how.bits;
    lut_shape[shape.len() + 1] = how.vector;
    let (lut, scale) = entries(&table, &lut_shape, how.table);
    let packed = Part::Tensor(
        TensorType::fixed(dtype, &index_shape),
        pack_bits(&indices, how.bits),
    );
    let mut inputs = vec![("indices", packed), ("lut", lut)];
    if how.vector != 1 {
        inputs.push(("vector_axis", Part::Literal(literal::int(0))));
    }
    let stored = if scale.is_some() { DType::Int8 } else { DType::Fp16 };
    let mut steps = vec![Encoded {
        op: "constexpr_lut_to_dense",
        inputs,
        outputs: vec![TensorType::fixed(stored, shape)],
    }];
    if let Some(scale) = scale {
        steps.push(Encoded {
            op: "constexpr_blockwise_shift_scale",
            inputs: vec![
                ("data", Part::Before(0)),
                ("scale", one_scale(scale, shape.len())),
            ],
            outputs: vec![TensorType::fixed(DType::Fp16, shape)],
        });
    }
    Ok(steps)
}

/// The tables' entries as they are stored, and the scale that integers are multiplied with.
pub(super) fn entries(table: &[f16], shape: &[usize], how: Table) -> (Part, Option<f16>) {
    if how == Table::Half {
        let ty = TensorType::fixed(DType::Fp16, shape);
        return (Part::Tensor(ty, f16_bytes(table)), None);
    }
    let largest = table.iter().fold(0f32, |m, v| m.max(v.to_f32().abs()));
    let scale = f16::from_f32(largest / 127.0);
    // A largest entry too small for a 16-bit scale: everything is as good as 0.
    let scale = if scale > f16::ZERO { scale } else { f16::ONE };
    let code = |v: &f16| (v.to_f32() / scale.to_f32()).round().clamp(-128.0, 127.0) as i8;
    let bytes = table.iter().map(|v| code(v) as u8).collect();
    let ty = TensorType::fixed(DType::Int8, shape);
    (Part::Tensor(ty, bytes), Some(scale))
}

/// A scale for all elements of a weight of that rank.
pub(super) fn one_scale(scale: f16, rank: usize) -> Part {
    Part::Literal(literal::halves(&[scale], &vec![1; rank]))
}
