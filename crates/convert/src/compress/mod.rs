//! Smaller weights: palettes, integers and sparse forms, as the `constexpr_*` operators of iOS 18 read them.

mod decode;
mod how;
mod integers;
mod kmeans;
mod package;
mod palette;
mod parallel;
mod sparse;
mod vectors;

use candle_coreml_mil::{TensorType, Value, ValueData, ValueType};
use half::f16;

pub(crate) use decode::decode;
pub use how::{Compression, Kept, Palette, Table};
pub use package::{CompressOptions, CompressReport, Progress, compress_package};
pub(crate) use parallel::map_parallel;

/// One operation of a stored weight before it is written.
#[derive(Debug, Clone)]
pub(crate) struct Encoded {
    pub(crate) op: &'static str,
    pub(crate) inputs: Vec<(&'static str, Part)>,
    pub(crate) outputs: Vec<TensorType>,
}

#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// Elements for the weight file.
    Tensor(TensorType, Vec<u8>),
    /// A value written in the program.
    Literal(Value),
    /// A result of the operation before.
    Before(usize),
}

impl Compression {
    /// What a weight of this shape is after it was stored so and read again.
    ///
    /// # Errors
    /// What does not fit the shape.
    pub fn round_trip(&self, shape: &[usize], values: &[f16]) -> Result<Vec<f32>, String> {
        decode(&self.encode(shape, values)?).ok_or_else(|| format!("{self} is not read back"))
    }

    /// The operations that give `values` back. The text of an error is for whoever knows the tensor's name.
    pub(crate) fn encode(&self, shape: &[usize], values: &[f16]) -> Result<Vec<Encoded>, String> {
        match *self {
            Compression::None => Ok(vec![plain(shape, values)]),
            Compression::Palette(how) => palette::encode(shape, values, how),
            Compression::Linear { bits, block } => integers::encode(shape, values, bits, block),
            Compression::Sparse { zeros, kept } => sparse::encode(shape, values, zeros, kept),
        }
    }
}

pub(crate) fn plain(shape: &[usize], values: &[f16]) -> Encoded {
    let ty = TensorType::fixed(candle_coreml_mil::DType::Fp16, shape);
    let bytes = f16_bytes(values);
    // As coremltools does it: short constants lie in the program.
    let part = if values.len() < 10 {
        Part::Literal(Value {
            ty: ValueType::Tensor(ty.clone()),
            data: ValueData::Tensor(bytes.into()),
        })
    } else {
        Part::Tensor(ty.clone(), bytes)
    };
    Encoded {
        op: "const",
        inputs: vec![("val", part)],
        outputs: vec![ty],
    }
}

/// Little-endian bytes of 16-bit floats.
pub(crate) fn f16_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Packs the lowest `bits` of each element, the first element in the lowest bits of the first byte.
pub(crate) fn pack_bits(elements: &[u8], bits: u32) -> Vec<u8> {
    if bits >= 8 {
        return elements.to_vec();
    }
    let mut out = Vec::with_capacity((elements.len() * bits as usize).div_ceil(8));
    let (mut buffer, mut held) = (0u32, 0u32);
    for &e in elements {
        buffer |= (u32::from(e) & ((1 << bits) - 1)) << held;
        held += bits;
        while held >= 8 {
            out.push(buffer as u8);
            buffer >>= 8;
            held -= 8;
        }
    }
    if held > 0 {
        out.push(buffer as u8);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_packed_from_the_lowest_bit_across_bytes() {
        assert_eq!(pack_bits(&[1, 2, 7, 4], 3), [0b11_010_001, 0b1001]);
        assert_eq!(pack_bits(&[1, 0, 1], 1), [0b101]);
        assert_eq!(
            pack_bits(&[63, 0, 63, 0], 6),
            [0b0011_1111, 0b1111_0000, 0b0000_0011]
        );
        assert_eq!(pack_bits(&[200, 3], 8), [200, 3]);
    }
}
