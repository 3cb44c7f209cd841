//! Integer weights with a scale and a zero point per block.

use super::{WeightsError, count, expect_len};
use bytes::Bytes;

/// See [`super::Weights::affine`].
#[derive(Debug)]
pub(crate) struct Affine {
    pub cols: usize,
    pub bits: u32,
    pub signed: bool,
    pub data: Bytes,
    pub scale: Vec<f32>,
    pub zero: Option<Vec<f32>>,
    pub row_block: usize,
    pub col_block: usize,
    pub col_blocks: usize,
}

impl Affine {
    pub(super) fn new(
        (rows, cols): (usize, usize),
        (bits, signed): (u32, bool),
        data: Bytes,
        (scale, zero): (Vec<f32>, Option<Vec<f32>>),
        (row_block, col_block): (usize, usize),
    ) -> Result<Affine, WeightsError> {
        if !matches!(bits, 4 | 8) {
            return Err(WeightsError::Bits {
                kind: "integers",
                bits,
                allowed: "4, 8",
            });
        }
        for (part, block) in [("row_block", row_block), ("col_block", col_block)] {
            if block == 0 {
                return Err(WeightsError::Group { part });
            }
        }
        let needed = (count(rows, cols)? * bits as usize).div_ceil(8);
        expect_len("data (bytes)", data.len(), Some(needed), (rows, cols))?;
        let col_blocks = cols.div_ceil(col_block);
        let blocks = rows.div_ceil(row_block).checked_mul(col_blocks);
        expect_len("scale", scale.len(), blocks, (rows, cols))?;
        if let Some(zero) = &zero {
            expect_len("zero", zero.len(), blocks, (rows, cols))?;
        }
        Ok(Affine {
            cols,
            bits,
            signed,
            data,
            scale,
            zero,
            row_block,
            col_block,
            col_blocks,
        })
    }

    /// The integer at entry `at` of the row-major stream.
    pub(crate) fn integer(&self, at: usize) -> f32 {
        let byte = self.data[at * self.bits as usize / 8];
        let raw = if self.bits == 8 {
            byte
        } else {
            byte >> (at % 2 * 4) << 4
        };
        // The four bits sit in the upper half of `raw`, so that one arithmetic shift reads them with their sign.
        match (self.signed, self.bits) {
            (true, 8) => f32::from(raw as i8),
            (true, _) => f32::from(raw as i8 >> 4),
            (false, 8) => f32::from(raw),
            (false, _) => f32::from(raw >> 4),
        }
    }

    /// Scale and zero point of an entry.
    pub(crate) fn block(&self, row: usize, col: usize) -> (f32, f32) {
        let block = row / self.row_block * self.col_blocks + col / self.col_block;
        (
            self.scale[block],
            self.zero.as_ref().map_or(0.0, |zero| zero[block]),
        )
    }

    pub(crate) fn decode(&self, row: usize, first: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let (scale, zero) = self.block(row, first + i);
            *out = (self.integer(row * self.cols + first + i) - zero) * scale;
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let zero = self.zero.as_ref().map_or(0, |zero| size_of_val(&zero[..]));
        self.data.len() + size_of_val(&self.scale[..]) + zero
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_both_widths_and_signs_are_scaled_by_their_block() {
        let cases: &[(u32, bool, &[u8], [f32; 4])] = &[
            (8, true, &[255, 1, 128, 127], [-1.0, 1.0, -128.0, 127.0]),
            (8, false, &[255, 1, 128, 127], [255.0, 1.0, 128.0, 127.0]),
            (4, true, &[0x1f, 0x78], [-1.0, 1.0, -8.0, 7.0]),
            (4, false, &[0x1f, 0x78], [15.0, 1.0, 8.0, 7.0]),
        ];
        for &(bits, signed, data, integers) in cases {
            let data = Bytes::copy_from_slice(data);
            let scale = (vec![2.0, 0.5], Some(vec![1.0, -3.0]));
            let affine = Affine::new((1, 4), (bits, signed), data, scale, (1, 2)).unwrap();
            let mut out = [0.0; 4];
            affine.decode(0, 0, &mut out);
            let [a, b, c, d] = integers;
            assert_eq!(
                out,
                [(a - 1.0) * 2.0, (b - 1.0) * 2.0, (c + 3.0) * 0.5, (d + 3.0) * 0.5]
            );
        }
    }
}
