//! Tensor elements between numbers and the packed little-endian bytes of [`crate::ValueData::Tensor`].

use half::{bf16, f16};

use crate::program::DType;

/// A number read from a literal or a protobuf list.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Number {
    Int(i128),
    Float(f64),
    /// A NaN with these bits.
    Bits(u64),
}

/// Collects elements of one dtype as bytes.
#[derive(Debug)]
pub(crate) struct Packer {
    dtype: DType,
    bytes: Vec<u8>,
    count: usize,
}

impl Packer {
    pub(crate) fn new(dtype: DType) -> Self {
        Packer {
            dtype,
            bytes: Vec::new(),
            count: 0,
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// Adds one element; false when the number does not fit the dtype.
    #[must_use]
    pub(crate) fn push(&mut self, number: Number) -> bool {
        let Some(raw) = encode(self.dtype, number) else {
            return false;
        };
        let bits = self.dtype.bits().unwrap_or(8);
        if bits >= 8 {
            self.bytes.extend(raw.to_le_bytes().iter().take(bits / 8));
        } else {
            self.push_bits(raw, bits);
        }
        self.count += 1;
        true
    }

    fn push_bits(&mut self, raw: u64, bits: usize) {
        for i in 0..bits {
            let position = self.count * bits + i;
            if position.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((raw >> i & 1) as u8) << (position % 8);
            }
        }
    }
}

/// The raw bits of element `index`, zero-extended; `None` past the end.
pub(crate) fn raw_bits(dtype: DType, bytes: &[u8], index: usize) -> Option<u64> {
    let bits = dtype.bits()?;
    let start = index.checked_mul(bits)?;
    if bits >= 8 {
        let chunk = bytes.get(start / 8..(start / 8).checked_add(bits / 8)?)?;
        return Some(chunk.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
    }
    let mut raw = 0;
    for i in 0..bits {
        let byte = bytes.get((start + i) / 8)?;
        raw |= u64::from(byte >> ((start + i) % 8) & 1) << i;
    }
    Some(raw)
}

/// The integer that raw bits stand for (booleans and unsigned ones as they are, signed ones extended).
pub(crate) fn int_value(dtype: DType, raw: u64) -> i128 {
    let bits = dtype.bits().unwrap_or(64);
    let signed = matches!(
        dtype,
        DType::Int4 | DType::Int8 | DType::Int16 | DType::Int32 | DType::Int64
    );
    let value = i128::from(raw);
    if signed && raw >> (bits - 1) & 1 == 1 {
        value - (1i128 << bits)
    } else {
        value
    }
}

/// The number that raw bits of a float type stand for; exact, since every float type here is within `f64`.
pub(crate) fn float_value(dtype: DType, raw: u64) -> f64 {
    match dtype {
        DType::Fp16 => f16::from_bits(raw as u16).to_f64(),
        DType::Bf16 => bf16::from_bits(raw as u16).to_f64(),
        DType::Fp32 => f64::from(f32::from_bits(raw as u32)),
        DType::Fp8E5M2 => f16::from_bits((raw as u16) << 8).to_f64(),
        DType::Fp8E4M3FN => e4m3fn_value(raw as u8),
        _ => f64::from_bits(raw),
    }
}

/// The bits of the NaN that `nan` stands for.
pub(crate) fn nan_bits(dtype: DType) -> u64 {
    match dtype {
        DType::Fp16 => 0x7e00,
        DType::Bf16 => 0x7fc0,
        DType::Fp32 => 0x7fc0_0000,
        DType::Fp8E5M2 => 0x7e,
        DType::Fp8E4M3FN => 0x7f,
        _ => 0x7ff8_0000_0000_0000,
    }
}

fn encode(dtype: DType, number: Number) -> Option<u64> {
    let bits = dtype.bits()?;
    if dtype.is_float() {
        return match number {
            Number::Int(n) => encode_float(dtype, n as f64),
            Number::Float(x) => encode_float(dtype, x),
            Number::Bits(raw) => (float_value(dtype, raw).is_nan()
                && raw.checked_shr(bits as u32).unwrap_or(0) == 0)
                .then_some(raw),
        };
    }
    let Number::Int(n) = number else { return None };
    let (low, high) = match dtype {
        DType::Bool => (0, 1),
        DType::Int4 | DType::Int8 | DType::Int16 | DType::Int32 | DType::Int64 => {
            (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
        }
        _ => (0, (1i128 << bits) - 1),
    };
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    (low..=high).contains(&n).then_some(n as u64 & mask)
}

/// Rounds to the nearest, ties to even; `None` when a finite number is beyond the type's largest.
fn encode_float(dtype: DType, x: f64) -> Option<u64> {
    if x.is_nan() {
        return Some(nan_bits(dtype));
    }
    let raw = match dtype {
        DType::Fp16 => u64::from(f16::from_f64(x).to_bits()),
        DType::Bf16 => u64::from(bf16::from_f64(x).to_bits()),
        DType::Fp32 => u64::from((x as f32).to_bits()),
        DType::Fp8E5M2 | DType::Fp8E4M3FN => encode_fp8(dtype, x)?,
        _ => x.to_bits(),
    };
    (float_value(dtype, raw).is_finite() == x.is_finite()).then_some(raw)
}

fn encode_fp8(dtype: DType, x: f64) -> Option<u64> {
    let sign = u64::from(x.is_sign_negative()) << 7;
    let magnitude = x.abs();
    let largest = if dtype == DType::Fp8E5M2 { 0x7b } else { 0x7e };
    if magnitude.is_infinite() {
        return (dtype == DType::Fp8E5M2).then_some(sign | 0x7c);
    }
    let distance = |code: &u64| (float_value(dtype, *code) - magnitude).abs();
    let nearest = (0..=largest)
        .min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))))
        .unwrap_or(0);
    let step = float_value(dtype, largest) - float_value(dtype, largest - 1);
    (magnitude < float_value(dtype, largest) + step / 2.0).then_some(sign | nearest)
}

/// 1 sign, 4 exponent, 3 mantissa bits; bias 7, no infinities, NaN is all ones.
fn e4m3fn_value(raw: u8) -> f64 {
    let sign = if raw & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(raw >> 3 & 15);
    let mantissa = f64::from(raw & 7);
    match (exponent, raw & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa * 2f64.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_small_types_survives_a_round_trip() {
        for dtype in DType::ALL
            .into_iter()
            .filter(|d| d.bits().is_some_and(|b| b <= 16) && *d != DType::Bool)
        {
            let bits = dtype.bits().unwrap();
            let mut packer = Packer::new(dtype);
            let count = 1usize << bits;
            for raw in 0..count as u64 {
                let number = if !dtype.is_float() {
                    Number::Int(int_value(dtype, raw))
                } else if float_value(dtype, raw).is_nan() {
                    Number::Bits(raw)
                } else {
                    Number::Float(float_value(dtype, raw))
                };
                assert!(packer.push(number), "{dtype} {raw:#x}");
            }
            let bytes = packer.finish();
            assert_eq!(Some(bytes.len()), dtype.byte_len(count), "{dtype}");
            for raw in 0..count {
                assert_eq!(raw_bits(dtype, &bytes, raw), Some(raw as u64), "{dtype}");
            }
        }
    }

    #[test]
    fn numbers_outside_a_type_are_refused() {
        let cases = [
            (DType::Bool, Number::Int(2)),
            (DType::Int4, Number::Int(8)),
            (DType::Int4, Number::Int(-9)),
            (DType::Uint3, Number::Int(8)),
            (DType::Uint64, Number::Int(-1)),
            (DType::Int64, Number::Int(1 << 63)),
            (DType::Int32, Number::Float(1.0)),
            (DType::Fp16, Number::Float(65520.0)),
            (DType::Fp32, Number::Float(1e39)),
            (DType::Fp8E4M3FN, Number::Float(470.0)),
            (DType::Fp8E4M3FN, Number::Float(f64::INFINITY)),
            (DType::Fp8E5M2, Number::Float(62000.0)),
            (DType::Fp16, Number::Bits(0x3c00)),
            (DType::Fp16, Number::Bits(0x1_7e01)),
            (DType::String, Number::Int(1)),
        ];
        for (dtype, number) in cases {
            assert!(!Packer::new(dtype).push(number), "{dtype} {number:?}");
        }
    }

    #[test]
    fn packed_elements_start_in_the_lowest_bits_and_straddle_bytes() {
        let mut packer = Packer::new(DType::Uint3);
        for n in [1, 2, 7, 4] {
            assert!(packer.push(Number::Int(n)));
        }
        assert_eq!(packer.finish(), [0b11_010_001, 0b1001]);
    }
}
