//! Smaller weights: palettes, integers and sparse forms, as the `constexpr_*` operators of iOS 18 read them.

mod integers;
mod kmeans;
mod package;
mod palette;
mod parallel;
mod sparse;

use candle_coreml_mil::{TensorType, Value, ValueData, ValueType};
use half::f16;

pub use package::{CompressOptions, CompressReport, Progress, compress_package};
pub(crate) use parallel::map_parallel;

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Compression {
    /// 16-bit floats as they are.
    #[default]
    None,
    /// Indices into tables of 2^`bits` values that make the squared error least.
    Palette {
        /// 1, 2, 3, 4, 6 or 8.
        bits: u32,
        /// Output channels that share a table; `None` for one table.
        group: Option<usize>,
    },
    /// Integers times a scale: one an output channel, or one a block of inputs.
    Linear {
        /// 4 or 8.
        bits: u32,
        /// Inputs that share a scale; `None` for a whole channel.
        block: Option<usize>,
    },
    /// Zeros left out.
    Sparse {
        /// Share of the values, the smallest ones, that become 0; from 0 to 1.
        zeros: f32,
        /// Bits of the palette of the values that stay; `None` for floats.
        palette: Option<u32>,
    },
}

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
    /// The operations that give `values` back. The text of an error is for whoever knows the tensor's name.
    pub(crate) fn encode(&self, shape: &[usize], values: &[f16]) -> Result<Vec<Encoded>, String> {
        match *self {
            Compression::None => Ok(vec![plain(shape, values)]),
            Compression::Palette { bits, group } => palette::encode(shape, values, bits, group),
            Compression::Linear { bits, block } => integers::encode(shape, values, bits, block),
            Compression::Sparse { zeros, palette } => sparse::encode(shape, values, zeros, palette),
        }
    }

    /// True when a weight of this shape can be stored so; others stay as they are.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let divides = |n: Option<usize>, at: usize| match (n, shape.get(at)) {
            (None, _) => true,
            (Some(n), Some(size)) => n > 0 && size % n == 0,
            (Some(_), None) => false,
        };
        shape.len() >= 2
            && match *self {
                Compression::Palette { group, .. } => divides(group, 0),
                Compression::Linear { block, .. } => divides(block, 1),
                Compression::None | Compression::Sparse { .. } => true,
            }
    }

    /// Bits of a palette, what `_lutN` in file names says.
    pub fn palette_bits(&self) -> Option<u32> {
        match *self {
            Compression::Palette { bits, .. } => Some(bits),
            _ => None,
        }
    }

    /// Bytes that `count` values take, tables and scales not counted.
    pub(crate) fn estimated_bytes(&self, count: u64) -> u64 {
        match *self {
            Compression::None => count * 2,
            Compression::Palette { bits, .. } | Compression::Linear { bits, .. } => {
                (count * u64::from(bits)).div_ceil(8)
            }
            Compression::Sparse { zeros, palette } => {
                let kept = (count as f64 * f64::from(1.0 - zeros)) as u64;
                count.div_ceil(8) + (kept * u64::from(palette.unwrap_or(16))).div_ceil(8)
            }
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

    #[test]
    fn shapes_that_groups_do_not_divide_do_not_fit() {
        let grouped = Compression::Palette {
            bits: 4,
            group: Some(8),
        };
        assert!(grouped.fits(&[16, 3]) && !grouped.fits(&[12, 3]) && !grouped.fits(&[16]));
        assert!(
            !Compression::Linear {
                bits: 4,
                block: Some(32)
            }
            .fits(&[8, 48, 1, 1])
        );
    }
}
