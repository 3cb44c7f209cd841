//! Sparse weights: a mask and the values that are not 0, perhaps palettised.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::palette::index_type;
use super::{Encoded, Part, f16_bytes, kmeans, pack_bits};

pub(super) fn encode(
    shape: &[usize],
    values: &[f16],
    zeros: f32,
    palette: Option<u32>,
) -> Result<Vec<Encoded>, String> {
    if !(0.0..=1.0).contains(&zeros) {
        return Err(format!("a share of {zeros} zeros; 0 to 1 is allowed"));
    }
    let kept = keep(values, zeros);
    let mask_ty = TensorType::fixed(DType::Uint1, shape);
    let bits: Vec<u8> = kept.iter().map(|&k| u8::from(k)).collect();
    let mask = Part::Tensor(mask_ty.clone(), pack_bits(&bits, 1));
    let data: Vec<f16> = values
        .iter()
        .zip(&kept)
        .filter(|(_, k)| **k)
        .map(|(v, _)| *v)
        .collect();
    if data.is_empty() {
        return Err("every value is 0".to_owned());
    }
    let data_ty = TensorType::fixed(DType::Fp16, &[data.len()]);
    let dense = TensorType::fixed(DType::Fp16, shape);
    let Some(bits) = palette else {
        let data = Part::Tensor(data_ty, f16_bytes(&data));
        return Ok(vec![Encoded {
            op: "constexpr_sparse_to_dense",
            inputs: vec![("nonzero_data", data), ("mask", mask)],
            outputs: vec![dense],
        }]);
    };
    let (table, codes) = kmeans::palette(&data, bits);
    let mut lut_shape = vec![1; shape.len() + 2];
    lut_shape[shape.len()] = table.len();
    let indices = TensorType::fixed(index_type(bits)?, &[codes.len()]);
    let sparse = Encoded {
        op: "constexpr_lut_to_sparse",
        inputs: vec![
            ("indices_mask", mask),
            (
                "indices_nonzero_data",
                Part::Tensor(indices, pack_bits(&codes, bits)),
            ),
            (
                "lut",
                Part::Tensor(TensorType::fixed(DType::Fp16, &lut_shape), f16_bytes(&table)),
            ),
        ],
        outputs: vec![mask_ty, data_ty],
    };
    let spread = Encoded {
        op: "constexpr_sparse_to_dense",
        inputs: vec![("nonzero_data", Part::Before(1)), ("mask", Part::Before(0))],
        outputs: vec![dense],
    };
    Ok(vec![sparse, spread])
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
        assert!(encode(&[2, 3], &[f16::ZERO; 6], 0.0, None).is_err());
        assert!(encode(&[2, 3], &values, 1.5, None).is_err());
    }
}
