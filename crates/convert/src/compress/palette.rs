//! Palettes: `constexpr_lut_to_dense`, one table a tensor or a group of output channels.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::{Encoded, Part, f16_bytes, kmeans, map_parallel, pack_bits};

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

pub(super) fn encode(
    shape: &[usize],
    values: &[f16],
    bits: u32,
    group: Option<usize>,
) -> Result<Vec<Encoded>, String> {
    let dtype = index_type(bits)?;
    let outer = shape
        .first()
        .copied()
        .filter(|&n| n > 0)
        .ok_or("a scalar has no palette")?;
    let group = group.unwrap_or(outer);
    if group == 0 || outer % group != 0 {
        return Err(format!(
            "groups of {group} channels do not divide shape {shape:?}"
        ));
    }
    let size = values.len() / outer * group;
    let groups: Vec<&[f16]> = values.chunks(size.max(1)).collect();
    let coded = map_parallel(groups.len(), |i| kmeans::palette(groups[i], bits));
    let mut table = Vec::with_capacity(coded.len() << bits);
    let mut indices = Vec::with_capacity(values.len());
    for (entries, codes) in coded {
        table.extend(entries);
        indices.extend(codes);
    }
    let mut lut_shape = vec![1; shape.len() + 2];
    lut_shape[0] = outer / group;
    lut_shape[shape.len()] = 1 << bits;
    let lut = Part::Tensor(TensorType::fixed(DType::Fp16, &lut_shape), f16_bytes(&table));
    let indices = Part::Tensor(TensorType::fixed(dtype, shape), pack_bits(&indices, bits));
    Ok(vec![Encoded {
        op: "constexpr_lut_to_dense",
        inputs: vec![("indices", indices), ("lut", lut)],
        outputs: vec![TensorType::fixed(DType::Fp16, shape)],
    }])
}
