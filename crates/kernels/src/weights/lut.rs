//! Palettised weights: a table of values per group and a packed index per entry.

use super::{WeightsError, count, expect_len};
use bytes::Bytes;

/// See [`super::Weights::lut`].
#[derive(Debug)]
pub(crate) struct Lut {
    pub cols: usize,
    pub bits: u32,
    pub indices: Bytes,
    pub table: Vec<f32>,
    pub row_group: usize,
    pub col_group: usize,
    pub col_groups: usize,
    /// For kernels in fixed point, where this processor has one for the layout.
    pub fixed: Option<FixedTables>,
}

/// Tables as 16-bit integers: per table the low bytes of its entries, then the high bytes; entry = integer * scale.
#[derive(Debug)]
#[allow(dead_code)] // not every architecture has the kernels
pub(crate) struct FixedTables {
    pub planes: Vec<u8>,
    pub scales: Vec<f32>,
    /// The bytes of the entries as `f16` in the same order, when all are exactly that.
    pub halves: Option<Vec<u8>>,
}

fn fix(table: &[f32], bits: u32, cols: usize, col_group: usize) -> Option<FixedTables> {
    #[cfg(target_arch = "x86_64")]
    {
        let whole_bytes = (cols * bits as usize).is_multiple_of(8);
        let whole_blocks = col_group >= cols || col_group.is_multiple_of(crate::matvec::fixed::BLOCK);
        let fits = matches!(bits, 4 | 6) && whole_bytes && whole_blocks && crate::simd::has_avx2();
        if fits {
            crate::matvec::fixed::fix_tables(table, bits)
        } else {
            None
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (table, bits, cols, col_group);
        None
    }
}

impl Lut {
    pub(super) fn new(
        (rows, cols): (usize, usize),
        bits: u32,
        indices: Bytes,
        table: Vec<f32>,
        (row_group, col_group): (usize, usize),
    ) -> Result<Lut, WeightsError> {
        if !matches!(bits, 1 | 2 | 3 | 4 | 6 | 8) {
            return Err(WeightsError::Bits {
                kind: "palettes",
                bits,
                allowed: "1, 2, 3, 4, 6, 8",
            });
        }
        for (part, group) in [("row_group", row_group), ("col_group", col_group)] {
            if group == 0 {
                return Err(WeightsError::Group { part });
            }
        }
        let needed = (count(rows, cols)? * bits as usize).div_ceil(8);
        expect_len("indices (bytes)", indices.len(), Some(needed), (rows, cols))?;
        let col_groups = cols.div_ceil(col_group);
        let tables = rows.div_ceil(row_group).checked_mul(col_groups);
        expect_len(
            "table",
            table.len(),
            tables.and_then(|tables| tables.checked_mul(1 << bits)),
            (rows, cols),
        )?;
        let fixed = fix(&table, bits, cols, col_group);
        Ok(Lut {
            fixed,
            cols,
            bits,
            indices,
            table,
            row_group,
            col_group,
            col_groups,
        })
    }

    /// The index of entry `at` of the row-major stream.
    pub(crate) fn index(&self, at: usize) -> usize {
        let bit = at * self.bits as usize;
        let low = u16::from(self.indices[bit / 8]);
        let high = self.indices.get(bit / 8 + 1).copied().map_or(0, u16::from);
        usize::from((high << 8 | low) >> (bit % 8)) & ((1 << self.bits) - 1)
    }

    /// The table of a row's group and column group.
    pub(crate) fn table(&self, row: usize, col: usize) -> &[f32] {
        let group = row / self.row_group * self.col_groups + col / self.col_group;
        &self.table[group << self.bits..(group + 1) << self.bits]
    }

    pub(crate) fn decode(&self, row: usize, first: usize, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let col = first + done;
            let count = (out.len() - done).min(self.col_group - col % self.col_group);
            self.decode_group(row, col, &mut out[done..done + count]);
            done += count;
        }
    }

    /// Decodes entries of one row that share a table.
    fn decode_group(&self, row: usize, col: usize, out: &mut [f32]) {
        let at = row * self.cols + col;
        #[cfg(target_arch = "x86_64")]
        if let Some(halves) = self.fixed.as_ref().and_then(|fixed| fixed.halves.as_ref())
            && (at * self.bits as usize).is_multiple_of(8)
        {
            let group = row / self.row_group * self.col_groups + col / self.col_group;
            let planes = &halves[group << (self.bits + 1)..(group + 1) << (self.bits + 1)];
            let bytes = &self.indices[at * self.bits as usize / 8..];
            assert!(
                bytes.len() >= (out.len() * self.bits as usize).div_ceil(8),
                "palette: indices end early"
            );
            // SAFETY: these planes are made only on processors with the instructions, for 4 or 6 bits; the indices
            // were checked to be there.
            unsafe {
                match self.bits {
                    4 => crate::matvec::fixed::decode::<4>(bytes.as_ptr(), planes, out),
                    _ => crate::matvec::fixed::decode::<6>(bytes.as_ptr(), planes, out),
                }
            }
            return;
        }
        let table = self.table(row, col);
        if self.bits == 8 {
            let indices = &self.indices[at..at + out.len()];
            out.iter_mut()
                .zip(indices)
                .for_each(|(out, index)| *out = table[usize::from(*index)]);
            return;
        }
        for (i, out) in out.iter_mut().enumerate() {
            *out = table[self.index(at + i)];
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let fixed = self.fixed.as_ref().map_or(0, |fixed| {
            let halves = fixed.halves.as_ref().map_or(0, Vec::len);
            fixed.planes.len() + halves + size_of_val(&fixed.scales[..])
        });
        self.indices.len() + size_of_val(&self.table[..]) + fixed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_of_every_width_are_read_from_the_packed_stream() {
        for bits in [1_u32, 2, 3, 4, 6, 8] {
            let (rows, cols) = (5, 7);
            let wanted: Vec<usize> = (0..rows * cols).map(|i| (i * 37 + 11) % (1 << bits)).collect();
            let mut packed = vec![0_u8; (rows * cols * bits as usize).div_ceil(8)];
            for (i, index) in wanted.iter().enumerate() {
                for bit in 0..bits as usize {
                    let at = i * bits as usize + bit;
                    packed[at / 8] |= ((index >> bit & 1) as u8) << (at % 8);
                }
            }
            let table: Vec<f32> = (0..6 << bits).map(|i| i as f32).collect();
            let lut = Lut::new((rows, cols), bits, packed.into(), table, (2, 4)).unwrap();
            for row in 0..rows {
                let mut out = vec![0.0; cols - 1];
                lut.decode(row, 1, &mut out);
                for (i, value) in out.iter().enumerate() {
                    let group = row / 2 * 2 + (i + 1) / 4;
                    assert_eq!(
                        *value,
                        ((group << bits) + wanted[row * cols + i + 1]) as f32,
                        "{bits} bits"
                    );
                }
            }
        }
    }
}
