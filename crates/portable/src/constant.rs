//! Constants as they are kept: dense, as stored in a mapped file, or compressed.

use crate::layout::{Shape, elements};
use bytes::Bytes;
use candle_coreml_kernels::{Arithmetic, ConvParams, PackedConv, Weights};
use candle_coreml_mil::DType;
use half::{bf16, f16};
use std::sync::{Arc, OnceLock};

/// A constant value.
#[derive(Debug)]
pub struct Const {
    /// The type in the file.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Shape,
    /// The elements.
    pub data: ConstData,
    dense: OnceLock<Arc<[f32]>>,
    /// The matrix asked for first; few constants are asked for as two.
    matrix: OnceLock<Weights>,
    /// The same in 16 bits.
    half: OnceLock<Weights>,
    /// Weights of a convolution packed for the window asked for first.
    packed: OnceLock<Arc<PackedConv>>,
}

/// Elements of a constant.
#[derive(Debug, Clone)]
pub enum ConstData {
    /// Floats.
    F32(Arc<[f32]>),
    /// Integers and booleans.
    I32(Arc<[i32]>),
    /// 32-bit floats as the file has them, usually mapped; aligned for them.
    Stored(Bytes),
    /// 16-bit floats as the file has them, usually mapped.
    F16(Bytes),
    /// Indices into lookup tables.
    Lut(Arc<Lut>),
    /// Integers with scales.
    Affine(Arc<Affine>),
    /// Texts.
    Strings(Arc<[String]>),
}

/// Palettized weights: `indices` of `bits` bits each, packed lowest bits first, into tables of `2^bits` vectors.
#[derive(Debug)]
pub struct Lut {
    /// Bits an index takes.
    pub bits: usize,
    /// Packed indices, row-major over `index_shape`.
    pub indices: Bytes,
    /// Shape of the indices: the value's shape, with the vector axis divided by the vector's length.
    pub index_shape: Shape,
    /// Table entries, `[groups.., 2^bits, vector]`.
    pub table: Vec<f32>,
    /// Number of tables along each dimension.
    pub groups: Shape,
    /// Elements an index stands for.
    pub vector: usize,
    /// The dimension along which a vector is laid out.
    pub vector_axis: usize,
}

/// Quantized weights: `(data - offset) * scale`, with one scale for each block.
#[derive(Debug)]
pub struct Affine {
    /// Bits an element takes.
    pub bits: usize,
    /// Elements are two's complement.
    pub signed: bool,
    /// Packed elements, row-major.
    pub data: Bytes,
    /// One for each block.
    pub scale: Vec<f32>,
    /// One for each block; zero where absent.
    pub offset: Option<Vec<f32>>,
    /// Number of blocks along each dimension.
    pub groups: Shape,
}

/// Element `index` of a stream of `bits`-bit unsigned numbers, lowest bits first; zero past the end.
pub fn unpack_bits(bytes: &[u8], bits: usize, index: usize) -> u32 {
    let bit = index * bits;
    let byte = |i: usize| bytes.get(i).copied().unwrap_or(0) as u32;
    let first = bit / 8;
    let word = byte(first) | byte(first + 1) << 8 | byte(first + 2) << 16 | byte(first + 3) << 24;
    if bits == 32 {
        word
    } else {
        (word >> (bit % 8)) & ((1u32 << bits) - 1)
    }
}

/// Floats of any stored type; integer types give their numbers.
pub fn decode_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::Fp32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        DType::Fp16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        DType::Bf16 => bytes
            .chunks_exact(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        DType::Fp64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32)
            .collect(),
        _ => decode_i32(dtype, bytes, usize::MAX)
            .into_iter()
            .map(|v| v as f32)
            .collect(),
    }
}

/// Integers of any stored type, `count` of them at most; 64-bit ones are clamped.
pub fn decode_i32(dtype: DType, bytes: &[u8], count: usize) -> Vec<i32> {
    match dtype {
        DType::Int32 => bytes
            .chunks_exact(4)
            .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        DType::Uint32 => {
            let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            bytes
                .chunks_exact(4)
                .map(|b| i32::try_from(word(b)).unwrap_or(i32::MAX))
                .collect()
        }
        DType::Int16 => bytes
            .chunks_exact(2)
            .map(|b| i16::from_le_bytes([b[0], b[1]]).into())
            .collect(),
        DType::Uint16 => bytes
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]).into())
            .collect(),
        DType::Int8 => bytes.iter().map(|&b| (b as i8).into()).collect(),
        DType::Uint8 => bytes.iter().map(|&b| b.into()).collect(),
        DType::Bool => bytes.iter().map(|&b| i32::from(b != 0)).collect(),
        DType::Int64 | DType::Uint64 => bytes
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .map(|v| v.clamp(i32::MIN.into(), i32::MAX.into()) as i32)
            .collect(),
        _ => {
            let bits = dtype.bits().unwrap_or(8);
            let n = (bytes.len() * 8 / bits).min(count);
            let sign = dtype == DType::Int4;
            (0..n)
                .map(|i| widen(unpack_bits(bytes, bits, i), bits, sign))
                .collect()
        }
    }
}

fn widen(v: u32, bits: usize, signed: bool) -> i32 {
    let sign_bit = 1u32 << (bits - 1);
    if signed && v & sign_bit != 0 {
        v as i32 - (1i32 << bits)
    } else {
        v as i32
    }
}

impl Const {
    /// A constant of the given elements.
    pub fn new(dtype: DType, shape: &[usize], data: ConstData) -> Const {
        Const {
            dtype,
            shape: shape.into(),
            data,
            dense: OnceLock::new(),
            matrix: OnceLock::new(),
            half: OnceLock::new(),
            packed: OnceLock::new(),
        }
    }

    /// Floats.
    pub fn f32(dtype: DType, shape: &[usize], data: Vec<f32>) -> Const {
        Const::new(dtype, shape, ConstData::F32(data.into()))
    }

    /// Integers.
    pub fn i32(dtype: DType, shape: &[usize], data: Vec<i32>) -> Const {
        Const::new(dtype, shape, ConstData::I32(data.into()))
    }

    /// The integers, where they are integers.
    pub fn ints(&self) -> Option<&[i32]> {
        match &self.data {
            ConstData::I32(v) => Some(v),
            _ => None,
        }
    }

    /// All elements as floats: decompressed and widened once, then kept.
    pub fn dense(&self) -> Arc<[f32]> {
        self.dense_ref().clone()
    }

    /// As [`Const::dense`], borrowed.
    pub fn floats(&self) -> &[f32] {
        if let ConstData::Stored(b) = &self.data
            && let Ok(floats) = bytemuck::try_cast_slice(b)
        {
            return floats;
        }
        self.dense_ref()
    }

    fn dense_ref(&self) -> &Arc<[f32]> {
        if let ConstData::F32(v) = &self.data {
            return v;
        }
        self.dense.get_or_init(|| match &self.data {
            ConstData::F32(v) => v.clone(),
            ConstData::I32(v) => v.iter().map(|&x| x as f32).collect(),
            ConstData::Stored(b) => decode_f32(DType::Fp32, b).into(),
            ConstData::F16(b) => decode_f32(DType::Fp16, b).into(),
            ConstData::Lut(l) => l.dense(&self.shape).into(),
            ConstData::Affine(a) => a.dense(&self.shape).into(),
            ConstData::Strings(_) => Arc::from([]),
        })
    }

    /// The 16-bit floats as stored, where they lie so in memory.
    pub fn halves(&self) -> Option<&[f16]> {
        match &self.data {
            ConstData::F16(b) => bytemuck::try_cast_slice(b).ok(),
            _ => None,
        }
    }

    /// The one float of a scalar or one-element constant.
    pub fn scalar(&self) -> Option<f32> {
        if elements(&self.shape) != 1 {
            return None;
        }
        match &self.data {
            ConstData::I32(v) => v.first().map(|&x| x as f32),
            _ => self.dense().first().copied(),
        }
    }

    /// The elements as a matrix `[rows, cols]` for the kernels, compressed as they are where the kernels read that.
    pub fn weights(&self, rows: usize, cols: usize) -> Result<Weights, String> {
        if let Some(known) = self.matrix.get()
            && (known.rows(), known.cols()) == (rows, cols)
        {
            return Ok(known.clone());
        }
        let made = self.make_weights(rows, cols)?;
        // Another thread may have been first: what it made is as good.
        let _ = self.matrix.set(made.clone());
        Ok(made)
    }

    /// As [`Const::weights`], 32-bit floats rounded to 16 bits where all of them are in their range: half as much to read.
    pub fn half_weights(&self, rows: usize, cols: usize) -> Result<Weights, String> {
        if !matches!(self.data, ConstData::F32(_) | ConstData::Stored(_)) {
            return self.weights(rows, cols);
        }
        if let Some(known) = self.half.get()
            && (known.rows(), known.cols()) == (rows, cols)
        {
            return Ok(known.clone());
        }
        let wide = self.make_weights(rows, cols)?;
        let (mut row, mut halves) = (vec![0.0; cols], Vec::with_capacity(rows * cols));
        for r in 0..rows {
            wide.row(r, &mut row);
            if row.iter().any(|x| x.abs() > f16::MAX.to_f32() || x.is_nan()) {
                return self.weights(rows, cols);
            }
            halves.extend(row.iter().map(|&x| f16::from_f32(x)));
        }
        let bytes = Bytes::from_owner(HalfBytes(halves));
        let made = Weights::from_f16(rows, cols, bytes).map_err(|e| e.to_string())?;
        let _ = self.half.set(made.clone());
        Ok(made)
    }

    /// The elements as the weights `[rows, cols]` of a channels-last convolution with `pixels` rows and columns of results.
    pub fn packed(
        &self,
        (rows, cols): (usize, usize),
        params: &ConvParams,
        pixels: [usize; 2],
        arithmetic: Arithmetic,
    ) -> Result<Arc<PackedConv>, String> {
        let fits = |known: &&Arc<PackedConv>| known.serves(params, pixels, arithmetic);
        if let Some(known) = self.packed.get().filter(fits) {
            return Ok(known.clone());
        }
        let weights = self.make_weights(rows, cols)?;
        let made = Arc::new(PackedConv::new(&weights, params, pixels, arithmetic));
        // Another thread, or another window, may have been first.
        let _ = self.packed.set(made.clone());
        Ok(made)
    }

    fn make_weights(&self, rows: usize, cols: usize) -> Result<Weights, String> {
        let packed = match &self.data {
            ConstData::Stored(b) => Some(Weights::from_f32(rows, cols, b.clone())),
            ConstData::F16(b) => Some(Weights::from_f16(rows, cols, b.clone())),
            ConstData::Lut(l) => l.weights(rows, cols, &self.shape),
            ConstData::Affine(a) => a.weights(rows, cols, &self.shape),
            _ => None,
        };
        if let Some(Ok(w)) = packed {
            return Ok(w);
        }
        let dense = self.dense();
        let bytes = Bytes::from_owner(DenseBytes(dense));
        Weights::from_f32(rows, cols, bytes).map_err(|e| e.to_string())
    }

    /// Bytes the elements take as they are kept, dense copies not counted.
    pub fn stored_bytes(&self) -> usize {
        match &self.data {
            ConstData::F32(v) => v.len() * 4,
            ConstData::I32(v) => v.len() * 4,
            ConstData::Stored(b) | ConstData::F16(b) => b.len(),
            ConstData::Lut(l) => l.indices.len() + l.table.len() * 4,
            ConstData::Affine(a) => a.data.len() + a.scale.len() * 4,
            ConstData::Strings(_) => 0,
        }
    }

    /// A few words for printed graphs: the value of a small constant, the type of a large one.
    pub fn short(&self) -> String {
        let small = elements(&self.shape) <= 6;
        match &self.data {
            ConstData::F32(v) if small => format!("{v:?}"),
            ConstData::I32(v) if small => format!("{v:?}"),
            ConstData::Stored(_) | ConstData::F16(_) if small => format!("{:?}", self.dense()),
            ConstData::Strings(v) => format!("{v:?}"),
            ConstData::Lut(l) => format!("const {}{:?} lut{}", self.dtype, self.shape.as_slice(), l.bits),
            ConstData::Affine(a) => format!("const {}{:?} int{}", self.dtype, self.shape.as_slice(), a.bits),
            _ => format!("const {}{:?}", self.dtype, self.shape.as_slice()),
        }
    }
}

struct DenseBytes(Arc<[f32]>);

impl AsRef<[u8]> for DenseBytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

struct HalfBytes(Vec<f16>);

impl AsRef<[u8]> for HalfBytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Calls `f` with each element's position in a block grid: `groups[d]` equal blocks along dimension `d` of `shape`.
pub fn for_each_block(shape: &[usize], groups: &[usize], mut f: impl FnMut(usize, usize)) {
    let n = elements(shape);
    let size: Shape = shape
        .iter()
        .zip(groups)
        .map(|(&d, &g)| (d / g.max(1)).max(1))
        .collect();
    let mut at: Shape = smallvec::smallvec![0; shape.len()];
    for i in 0..n {
        let block = at
            .iter()
            .zip(&size)
            .zip(groups)
            .fold(0, |b, ((&x, &s), &g)| b * g + x / s);
        f(i, block);
        for d in (0..shape.len()).rev() {
            at[d] += 1;
            if at[d] < shape[d] {
                break;
            }
            at[d] = 0;
        }
    }
}

/// Rows and columns a block spans when `groups` divide a `[rows, cols..]` value along its first two dimensions only.
fn matrix_blocks(shape: &[usize], groups: &[usize], rows: usize, cols: usize) -> Option<(usize, usize)> {
    if shape.first() != Some(&rows) || groups.len() != shape.len() || groups.iter().skip(2).any(|&g| g != 1) {
        return None;
    }
    let col_groups = groups.get(1).copied().unwrap_or(1);
    Some((rows / groups.first()?, cols / col_groups.max(1)))
}

impl Lut {
    /// All elements of a value of shape `shape`.
    pub fn dense(&self, shape: &[usize]) -> Vec<f32> {
        let mut out = vec![0.0; elements(shape)];
        let inner: usize = shape.iter().skip(self.vector_axis + 1).product();
        let axis = self.index_shape.get(self.vector_axis).copied().unwrap_or(1);
        let entries = 1usize << self.bits;
        for_each_block(&self.index_shape, &self.groups, |i, block| {
            let index = unpack_bits(&self.indices, self.bits, i) as usize;
            let entry = (block * entries + index) * self.vector;
            // Element i of the indices is [outer, a, inner]; its vector goes to [outer, a * vector + v, inner].
            let (outer, a, rest) = (i / (axis * inner), i / inner % axis, i % inner);
            for v in 0..self.vector {
                let at = (outer * axis * self.vector + a * self.vector + v) * inner + rest;
                if let (Some(o), Some(t)) = (out.get_mut(at), self.table.get(entry + v)) {
                    *o = *t;
                }
            }
        });
        out
    }

    fn weights(
        &self,
        rows: usize,
        cols: usize,
        shape: &[usize],
    ) -> Option<Result<Weights, candle_coreml_kernels::WeightsError>> {
        if self.vector != 1 {
            return None;
        }
        let (row_group, col_group) = matrix_blocks(shape, &self.groups, rows, cols)?;
        let (indices, table) = (self.indices.clone(), self.table.clone());
        Some(Weights::lut(
            rows,
            cols,
            self.bits as u32,
            indices,
            table,
            row_group,
            col_group,
        ))
    }
}

impl Affine {
    /// All elements of a value of shape `shape`.
    pub fn dense(&self, shape: &[usize]) -> Vec<f32> {
        let mut out = vec![0.0; elements(shape)];
        for_each_block(shape, &self.groups, |i, block| {
            let q = widen(unpack_bits(&self.data, self.bits, i), self.bits, self.signed) as f32;
            let offset = self
                .offset
                .as_ref()
                .and_then(|o| o.get(block))
                .copied()
                .unwrap_or(0.0);
            if let (Some(o), Some(s)) = (out.get_mut(i), self.scale.get(block)) {
                *o = (q - offset) * s;
            }
        });
        out
    }

    fn weights(
        &self,
        rows: usize,
        cols: usize,
        shape: &[usize],
    ) -> Option<Result<Weights, candle_coreml_kernels::WeightsError>> {
        if self.bits != 4 && self.bits != 8 {
            return None;
        }
        let (row_block, col_block) = matrix_blocks(shape, &self.groups, rows, cols)?;
        let (data, scale, offset) = (self.data.clone(), self.scale.clone(), self.offset.clone());
        Some(Weights::affine(
            rows,
            cols,
            self.bits as u32,
            self.signed,
            data,
            scale,
            offset,
            row_block,
            col_block,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_bits_are_read_lowest_first_across_bytes() {
        // 6-bit numbers 1, 2, 3, 63 packed: 0b000001, 0b000010, 0b000011, 0b111111.
        let bytes = [0b10_000001, 0b0011_0000, 0b1111_1100];
        let got: Vec<u32> = (0..4).map(|i| unpack_bits(&bytes, 6, i)).collect();
        assert_eq!(got, [1, 2, 3, 63]);
        assert_eq!(decode_i32(DType::Int4, &[0xF8, 0x17], 3), [-8, -1, 7]);
    }

    #[test]
    fn half_weights_are_rounded_unless_one_of_them_is_too_large() {
        let row = |weights: &Weights| {
            let mut row = vec![0.0; 3];
            weights.row(0, &mut row);
            row
        };
        let c = Const::f32(DType::Fp32, &[1, 3], vec![1.0 + 1.0 / 4096.0, -65504.0, 1e-9]);
        assert_eq!(row(&c.half_weights(1, 3).unwrap()), [1.0, -65504.0, 0.0]);
        assert_eq!(
            row(&c.weights(1, 3).unwrap()),
            [1.0 + 1.0 / 4096.0, -65504.0, 1e-9]
        );
        for outside in [65520.0, f32::INFINITY, f32::NAN] {
            let c = Const::f32(DType::Fp32, &[1, 3], vec![1.0 + 1.0 / 4096.0, 0.0, outside]);
            assert_eq!(
                row(&c.half_weights(1, 3).unwrap())[0],
                1.0 + 1.0 / 4096.0,
                "{outside}"
            );
        }
    }

    #[test]
    fn grouped_tables_and_vectors_are_decompressed() {
        // Two groups of one row each, 1 bit, tables [10, 20] and [30, 40].
        let lut = Lut {
            bits: 1,
            indices: Bytes::from_static(&[0b0110]),
            index_shape: [2usize, 2].as_slice().into(),
            table: vec![10.0, 20.0, 30.0, 40.0],
            groups: [2usize, 1].as_slice().into(),
            vector: 1,
            vector_axis: 0,
        };
        assert_eq!(lut.dense(&[2, 2]), [10.0, 20.0, 40.0, 30.0]);
        // One table of two vectors of length 2 laid along axis 0.
        let vectors = Lut {
            bits: 1,
            indices: Bytes::from_static(&[0b10]),
            index_shape: [1usize, 2].as_slice().into(),
            table: vec![1.0, 2.0, 3.0, 4.0],
            groups: [1usize, 1].as_slice().into(),
            vector: 2,
            vector_axis: 0,
        };
        assert_eq!(vectors.dense(&[2, 2]), [1.0, 3.0, 2.0, 4.0]);
    }

    #[test]
    fn blockwise_scales_apply_to_their_blocks() {
        let a = Affine {
            bits: 4,
            signed: true,
            data: Bytes::from_static(&[0x21, 0xF3]),
            scale: vec![1.0, 10.0],
            offset: Some(vec![0.0, 1.0]),
            groups: [1usize, 2].as_slice().into(),
        };
        assert_eq!(a.dense(&[1, 4]), [1.0, 2.0, 20.0, -20.0]);
    }
}
