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
        Ok(Lut {
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
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.table(row, first + i)[self.index(row * self.cols + first + i)];
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.indices.len() + size_of_val(&self.table[..])
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
            let table: Vec<f32> = (0..3 * 2 << bits).map(|i| i as f32).collect();
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
