//! Integer weights with a scale and a zero point per block.

use super::{WeightsError, count, expect_len};
use crate::simd::{Kernel, Simd, dispatch};
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
    /// Base-2 logarithm of the columns of a block, where this processor has a kernel in fixed point for the layout.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    // the vector kernels of x86 alone ask for it
    pub block_shift: Option<u32>,
}

fn block_shift(bits: u32, cols: usize, col_block: usize) -> Option<u32> {
    #[cfg(target_arch = "x86_64")]
    {
        let whole_bytes = (cols * bits as usize).is_multiple_of(8);
        if !whole_bytes || !crate::simd::has_avx2() {
            return None;
        }
        if col_block >= cols {
            return Some(usize::BITS - 1);
        }
        (col_block.is_power_of_two() && col_block >= 32).then(|| col_block.trailing_zeros())
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (bits, cols, col_block);
        None
    }
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
        let block_shift = block_shift(bits, cols, col_block);
        Ok(Affine {
            block_shift,
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
        dispatch(Decode {
            affine: self,
            row,
            first,
            out,
        });
    }

    pub(crate) fn bytes(&self) -> usize {
        let zero = self.zero.as_ref().map_or(0, |zero| size_of_val(&zero[..]));
        self.data.len() + size_of_val(&self.scale[..]) + zero
    }
}

/// [`Affine::decode`]. The loops are plain; what matters is that they are compiled for the processor's vectors.
struct Decode<'a> {
    affine: &'a Affine,
    row: usize,
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for Decode<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Decode {
            affine,
            row,
            first,
            out,
        } = self;
        let mut done = 0;
        while done < out.len() {
            let col = first + done;
            let count = (out.len() - done).min(affine.col_block - col % affine.col_block);
            let (scale, zero) = affine.block(row, col);
            let (at, part) = (row * affine.cols + col, &mut out[done..done + count]);
            done += count;
            if affine.bits == 8 {
                let data = &affine.data[at..at + count];
                if affine.signed {
                    part.iter_mut()
                        .zip(data)
                        .for_each(|(out, q)| *out = (f32::from(*q as i8) - zero) * scale);
                } else {
                    part.iter_mut()
                        .zip(data)
                        .for_each(|(out, q)| *out = (f32::from(*q) - zero) * scale);
                }
            } else if at.is_multiple_of(2) && count.is_multiple_of(2) {
                // Flipping the top bit of a signed half byte adds 8 to it, without sign from there on.
                let (flip, zero) = if affine.signed {
                    (0x88, zero + 8.0)
                } else {
                    (0, zero)
                };
                for (pair, q) in part.chunks_exact_mut(2).zip(&affine.data[at / 2..]) {
                    let q = q ^ flip;
                    pair[0] = (f32::from(q & 15) - zero) * scale;
                    pair[1] = (f32::from(q >> 4) - zero) * scale;
                }
            } else {
                for (i, out) in part.iter_mut().enumerate() {
                    *out = (affine.integer(at + i) - zero) * scale;
                }
            }
        }
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
