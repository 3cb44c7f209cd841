//! Integers with scales: `constexpr_blockwise_shift_scale`, symmetric about 0.

use candle_coreml_mil::{DType, TensorType};
use half::f16;

use super::{Encoded, Part, f16_bytes, map_parallel, pack_bits};

/// The element type of integers of that many bits.
pub(super) fn data_type(bits: u32) -> Result<DType, String> {
    match bits {
        4 => Ok(DType::Int4),
        8 => Ok(DType::Int8),
        other => Err(format!("integers of {other} bits; 4 and 8 are allowed")),
    }
}

pub(super) fn encode(
    shape: &[usize],
    values: &[f16],
    bits: u32,
    block: Option<usize>,
) -> Result<Vec<Encoded>, String> {
    let dtype = data_type(bits)?;
    let &[outer, inner, ref rest @ ..] = shape else {
        return Err(format!("shape {shape:?} has no input channels"));
    };
    let width: usize = rest.iter().product();
    let block = block.unwrap_or(inner);
    if block == 0 || inner % block != 0 {
        return Err(format!("blocks of {block} inputs do not divide shape {shape:?}"));
    }
    // Row-major: the inputs of a block and everything behind them lie next to each other.
    let size = (block * width).max(1);
    let blocks: Vec<&[f16]> = values.chunks(size).collect();
    let coded = map_parallel(blocks.len(), |i| quantize(blocks[i], bits));
    let scales: Vec<f16> = coded.iter().map(|(s, _)| *s).collect();
    let data: Vec<u8> = coded.into_iter().flat_map(|(_, d)| d).collect();
    let mut scale_shape = vec![1; shape.len()];
    (scale_shape[0], scale_shape[1]) = (outer, inner / block);
    let scale = Part::Tensor(TensorType::fixed(DType::Fp16, &scale_shape), f16_bytes(&scales));
    let data = Part::Tensor(TensorType::fixed(dtype, shape), pack_bits(&data, bits));
    Ok(vec![Encoded {
        op: "constexpr_blockwise_shift_scale",
        inputs: vec![("data", data), ("scale", scale)],
        outputs: vec![TensorType::fixed(DType::Fp16, shape)],
    }])
}

/// The scale with the least squared error among a few, and the integers' lowest bits.
pub(super) fn quantize(values: &[f16], bits: u32) -> (f16, Vec<u8>) {
    let largest = values.iter().fold(0f32, |m, v| m.max(v.to_f32().abs()));
    let top = f32::from((1u8 << (bits - 1)) - 1);
    let code = |v: f16, scale: f32| (v.to_f32() / scale).round_ties_even().clamp(-top - 1.0, top);
    let error = |scale: f32| -> f64 {
        values
            .iter()
            .map(|&v| f64::from(code(v, scale) * scale - v.to_f32()).powi(2))
            .sum()
    };
    // With few bits, clipping the largest values a little costs less than coarser steps for all others.
    let tries = if bits == 4 { 12u8 } else { 1 };
    let scales = (0..tries).map(|i| f16::from_f32(largest / top * (1.0 - f32::from(i) * 0.04)));
    let usable = scales
        .filter(|s| s.to_f32() > 0.0)
        .map(|s| (error(s.to_f32()), s));
    let best = usable
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(f16::ONE, |(_, s)| s);
    let codes = values
        .iter()
        .map(|&v| code(v, best.to_f32()) as i8 as u8)
        .collect();
    (best, codes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_times_their_scale_are_near_the_values() {
        let values: Vec<f16> = (0..64).map(|i| f16::from_f32((i as f32 - 31.5) / 40.0)).collect();
        for (bits, most) in [(8, 0.004), (4, 0.07)] {
            let (scale, codes) = quantize(&values, bits);
            for (v, c) in values.iter().zip(codes) {
                let back = f32::from(c as i8) * scale.to_f32();
                assert!(
                    (back - v.to_f32()).abs() <= most,
                    "{bits} bits: {v} became {back}"
                );
            }
        }
        assert_eq!(quantize(&[f16::ZERO; 3], 8), (f16::ONE, vec![0; 3]));
    }

    #[test]
    fn blocks_that_do_not_divide_are_refused() {
        assert!(encode(&[2, 6], &[f16::ONE; 12], 4, Some(4)).is_err());
        assert!(encode(&[2, 6], &[f16::ONE; 12], 5, None).is_err());
    }
}
