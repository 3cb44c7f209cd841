//! Sparse weights: a mask and the values that are not 0, as floats, indices into a table or integers.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::how::{Kept, Table};
use super::palette::{entries, index_type, one_scale};
use super::{Encoded, Part, f16_bytes, integers, kmeans, pack_bits};

pub(super) fn encode(shape: &[usize], values: &[f16], zeros: f32, how: Kept) -> Result<Vec<Encoded>, String> {
    if !(0.0..1.0).contains(&zeros) {
        return Err(format!("a share of {zeros} zeros; 0 to below 1 is allowed"));
    }
    let kept = keep(values, zeros);
    let mask_ty = TensorType::fixed(DType::Uint1, shape);
    let bits: Vec<u8> = kept.iter().map(|&k| u8::from(k)).collect();
    let mask = Part::Tensor(mask_ty, pack_bits(&bits, 1));
    let data: Vec<f16> = values
        .iter()
        .zip(&kept)
        .filter(|(_, k)| **k)
        .map(|(v, _)| *v)
        .collect();
    if data.is_empty() {
        return Err("every value is 0".to_owned());
    }
    let dense = TensorType::fixed(DType::Fp16, shape);
    let mut steps = match how {
        Kept::Half => {
            let data_ty = TensorType::fixed(DType::Fp16, &[data.len()]);
            return Ok(vec![Encoded {
                op: "constexpr_sparse_to_dense",
                inputs: vec![
                    ("nonzero_data", Part::Tensor(data_ty, f16_bytes(&data))),
                    ("mask", mask),
                ],
                outputs: vec![dense],
            }]);
        }
        Kept::Palette { bits, table } => palette(shape, &data, mask, bits, table)?,
        Kept::Linear { bits } => vec![integers(shape, values, &kept, mask, bits)?],
    };
    steps.push(Encoded {
        op: "constexpr_sparse_to_dense",
        inputs: vec![("nonzero_data", Part::Before(1)), ("mask", Part::Before(0))],
        outputs: vec![dense],
    });
    Ok(steps)
}

fn results(shape: &[usize], dtype: DType, count: usize) -> Vec<TensorType> {
    vec![
        TensorType::fixed(DType::Uint1, shape),
        TensorType::fixed(dtype, &[count]),
    ]
}

/// Indices of the kept values into one table, whose integers another operation scales.
fn palette(
    shape: &[usize],
    data: &[f16],
    mask: Part,
    bits: u32,
    table: Table,
) -> Result<Vec<Encoded>, String> {
    let (numbers, codes) = kmeans::palette(data, bits);
    let mut lut_shape = vec![1; shape.len() + 2];
    lut_shape[shape.len()] = numbers.len();
    let indices = TensorType::fixed(index_type(bits)?, &[codes.len()]);
    let (lut, scale) = entries(&numbers, &lut_shape, table);
    let stored = if scale.is_some() { DType::Int8 } else { DType::Fp16 };
    let mut steps = vec![Encoded {
        op: "constexpr_lut_to_sparse",
        inputs: vec![
            ("indices_mask", mask),
            (
                "indices_nonzero_data",
                Part::Tensor(indices, pack_bits(&codes, bits)),
            ),
            ("lut", lut),
        ],
        outputs: results(shape, stored, data.len()),
    }];
    if let Some(scale) = scale {
        steps.push(Encoded {
            op: "constexpr_sparse_blockwise_shift_scale",
            inputs: vec![
                ("data_mask", Part::Before(0)),
                ("nonzero_data", Part::Before(1)),
                ("scale", one_scale(scale, shape.len())),
            ],
            outputs: results(shape, DType::Fp16, data.len()),
        });
    }
    Ok(steps)
}

/// The kept values as integers, with a scale for each output channel.
fn integers(
    shape: &[usize],
    values: &[f16],
    kept: &[bool],
    mask: Part,
    bits: u32,
) -> Result<Encoded, String> {
    let dtype = integers::data_type(bits)?;
    let outer = shape.first().copied().filter(|&n| n > 0);
    let outer = outer.ok_or("a scalar has no channels")?;
    let row = (values.len() / outer).max(1);
    let (mut scales, mut codes) = (Vec::with_capacity(outer), Vec::new());
    for (values, kept) in values.chunks(row).zip(kept.chunks(row)) {
        let stay: Vec<f16> = values
            .iter()
            .zip(kept)
            .filter(|(_, k)| **k)
            .map(|(v, _)| *v)
            .collect();
        let (scale, integers) = integers::quantize(&stay, bits);
        scales.push(scale);
        codes.extend(integers);
    }
    let mut scale_shape = vec![1; shape.len()];
    scale_shape[0] = outer;
    let data = Part::Tensor(TensorType::fixed(dtype, &[codes.len()]), pack_bits(&codes, bits));
    let count = codes.len();
    Ok(Encoded {
        op: "constexpr_sparse_blockwise_shift_scale",
        inputs: vec![
            ("data_mask", mask),
            ("nonzero_data", data),
            (
                "scale",
                Part::Tensor(TensorType::fixed(DType::Fp16, &scale_shape), f16_bytes(&scales)),
            ),
        ],
        outputs: results(shape, DType::Fp16, count),
    })
}

/// True for the values that stay: all but the smallest `zeros` of them, and none that is 0 already.
fn keep(values: &[f16], zeros: f32) -> Vec<bool> {
    let mut sizes: Vec<u16> = values.iter().map(|v| v.to_bits() & 0x7fff).collect();
    // Rounding down keeps a value more rather than one less.
    let drop = (values.len() as f64 * f64::from(zeros)) as usize;
    let least = match drop.checked_sub(1) {
        None => 0,
        Some(last) => *sizes.select_nth_unstable(last).1,
    };
    values.iter().map(|v| v.to_bits() & 0x7fff > least).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_values_and_zeros_are_left_out() {
        let values = [0.5, -0.1, 0.0, 2.0, 0.2, -3.0].map(f16::from_f32);
        assert_eq!(keep(&values, 0.5), [true, false, false, true, false, true]);
        assert_eq!(keep(&values, 0.0), [true, true, false, true, true, true]);
        assert!(encode(&[2, 3], &[f16::ZERO; 6], 0.0, Kept::Half).is_err());
        assert!(encode(&[2, 3], &values, 1.0, Kept::Half).is_err());
    }
}
