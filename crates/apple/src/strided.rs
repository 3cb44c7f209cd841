//! Copies between row-major memory without gaps and buffers with the strides Core ML gives.
//!
//! Core ML pads rows of its buffers, to 64 bytes for the Neural Engine, and says so in strides, counted in elements.

use std::ops::Range;

/// Shape and strides of a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    shape: Vec<usize>,
    strides: Vec<usize>,
    /// Elements from the first to the last, both counted; 0 when there are none.
    span: usize,
    count: usize,
}

/// Why a layout or a copy cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Shape and strides have different lengths.
    #[error("{strides} strides for {dimensions} dimensions")]
    Rank {
        /// How many dimensions there are.
        dimensions: usize,
        /// How many strides there are.
        strides: usize,
    },
    /// The numbers do not fit an address space.
    #[error("shape {shape:?} with strides {strides:?} is too large")]
    TooLarge {
        /// The shape.
        shape: Vec<usize>,
        /// The strides.
        strides: Vec<usize>,
    },
    /// A buffer is shorter than its layout, or row-major memory is not as long as the shape.
    #[error("{found} bytes where the layout needs {needed}")]
    Short {
        /// Size of the buffer.
        found: usize,
        /// Size the layout asks for.
        needed: usize,
    },
}

impl Layout {
    /// A layout with any strides, in elements.
    ///
    /// # Errors
    /// [`LayoutError::Rank`] and [`LayoutError::TooLarge`].
    pub fn new(shape: &[usize], strides: &[usize]) -> Result<Layout, LayoutError> {
        if shape.len() != strides.len() {
            return Err(LayoutError::Rank {
                dimensions: shape.len(),
                strides: strides.len(),
            });
        }
        let too_large = || LayoutError::TooLarge {
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let count = count.ok_or_else(too_large)?;
        let last = shape.iter().zip(strides).try_fold(0usize, |last, (&d, &s)| {
            last.checked_add(d.saturating_sub(1).checked_mul(s)?)
        });
        let span = if count == 0 {
            Some(0)
        } else {
            last.and_then(|n| n.checked_add(1))
        };
        // Elements have at most 8 bytes, and no buffer more than isize::MAX.
        let span = span
            .filter(|&n| n <= isize::MAX as usize / 8)
            .ok_or_else(too_large)?;
        Ok(Layout {
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            span,
            count,
        })
    }

    /// Row-major without gaps.
    ///
    /// # Errors
    /// [`LayoutError::TooLarge`].
    pub fn packed(shape: &[usize]) -> Result<Layout, LayoutError> {
        Layout::new(shape, &packed_strides(shape))
    }

    /// Outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// In elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements from the first to the last, gaps and both ends counted.
    pub fn span(&self) -> usize {
        self.span
    }

    /// Copies the elements out of `source` into row-major `packed`.
    ///
    /// # Errors
    /// [`LayoutError::Short`] when either is too small; nothing is copied then.
    pub fn gather(&self, element_bytes: usize, source: &[u8], packed: &mut [u8]) -> Result<(), LayoutError> {
        self.check(element_bytes, source.len(), packed.len())?;
        self.runs(element_bytes, |strided, row_major| {
            packed[row_major].copy_from_slice(&source[strided]);
        });
        Ok(())
    }

    /// Copies row-major `packed` to the elements' places in `target`; what is between them stays as it is.
    ///
    /// # Errors
    /// [`LayoutError::Short`] when either is too small; nothing is copied then.
    pub fn scatter(&self, element_bytes: usize, packed: &[u8], target: &mut [u8]) -> Result<(), LayoutError> {
        self.check(element_bytes, target.len(), packed.len())?;
        self.runs(element_bytes, |strided, row_major| {
            target[strided].copy_from_slice(&packed[row_major]);
        });
        Ok(())
    }

    fn check(&self, element_bytes: usize, strided: usize, packed: usize) -> Result<(), LayoutError> {
        let short = |found, needed| LayoutError::Short { found, needed };
        if strided < self.span * element_bytes {
            return Err(short(strided, self.span * element_bytes));
        }
        if packed != self.count * element_bytes {
            return Err(short(packed, self.count * element_bytes));
        }
        Ok(())
    }

    /// Calls `copy` with the byte ranges, strided and row-major, of every run of elements that lie together in both.
    fn runs(&self, element_bytes: usize, mut copy: impl FnMut(Range<usize>, Range<usize>)) {
        if self.count == 0 {
            return;
        }
        let (outer, run) = self.split();
        let bytes = run * element_bytes;
        let mut index = vec![0usize; outer];
        let mut strided = 0;
        for at in (0..self.count * element_bytes).step_by(bytes) {
            let from = strided * element_bytes;
            copy(from..from + bytes, at..at + bytes);
            for axis in (0..outer).rev() {
                index[axis] += 1;
                strided += self.strides[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                strided -= index[axis] * self.strides[axis];
                index[axis] = 0;
            }
        }
    }

    /// How many leading dimensions have to be walked, and how many elements lie together in the others.
    fn split(&self) -> (usize, usize) {
        let mut run = 1;
        for axis in (0..self.shape.len()).rev() {
            if self.shape[axis] != 1 && self.strides[axis] != run {
                return (axis + 1, run);
            }
            run *= self.shape[axis];
        }
        (0, run)
    }
}

/// Strides of a row-major array without gaps; saturating, [`Layout::new`] refuses what is too large.
pub fn packed_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements of one byte whose value is their row-major number plus one.
    fn numbered(count: usize) -> Vec<u8> {
        (1..=count).map(|v| v as u8).collect()
    }

    #[test]
    fn elements_survive_the_way_through_every_layout() {
        let rows: [(&[usize], &[usize]); 9] = [
            (&[], &[]),
            (&[5], &[1]),
            (&[5], &[3]),
            (&[2, 3], &[3, 1]),
            (&[2, 3], &[32, 1]),
            (&[2, 3, 4], &[64, 16, 1]),
            (&[2, 3, 4], &[1, 2, 6]),
            (&[1, 1, 4], &[999, 77, 1]),
            (&[3, 1, 2], &[2, 999, 1]),
        ];
        for (shape, strides) in rows {
            for width in [1, 2, 4, 8] {
                let layout = Layout::new(shape, strides).unwrap();
                let packed = numbered(layout.count() * width);
                let mut strided = vec![0xee; layout.span() * width];
                layout.scatter(width, &packed, &mut strided).unwrap();
                let gaps = strided.iter().filter(|&&b| b == 0xee).count();
                assert_eq!(gaps, (layout.span() - layout.count()) * width, "{layout:?}");
                let mut back = vec![0; packed.len()];
                layout.gather(width, &strided, &mut back).unwrap();
                assert_eq!(back, packed, "{layout:?} of {width} bytes");
            }
        }
    }

    #[test]
    fn a_padded_row_is_read_by_its_stride() {
        let layout = Layout::new(&[2, 2], &[4, 1]).unwrap();
        let mut packed = [0; 4];
        layout.gather(1, &[1, 2, 0, 0, 3, 4], &mut packed).unwrap();
        assert_eq!(packed, [1, 2, 3, 4]);
    }

    #[test]
    fn one_copy_serves_what_lies_together() {
        let calls = |shape: &[usize], strides: &[usize]| {
            let mut calls = 0;
            Layout::new(shape, strides).unwrap().runs(2, |_, _| calls += 1);
            calls
        };
        assert_eq!(calls(&[1, 64, 512], &[32768, 512, 1]), 1);
        assert_eq!(calls(&[1, 64, 500], &[32768, 512, 1]), 64);
        assert_eq!(calls(&[4, 64, 512], &[65536, 512, 1]), 4);
        assert_eq!(calls(&[0, 3], &[3, 1]), 0);
    }

    #[test]
    fn buffers_that_do_not_fit_their_layout_are_refused() {
        let layout = Layout::new(&[2, 3], &[4, 1]).unwrap();
        let mut packed = [0; 12];
        assert!(layout.gather(2, &[0; 14], &mut packed).is_ok());
        assert!(layout.gather(2, &[0; 13], &mut packed).is_err());
        assert!(layout.gather(2, &[0; 14], &mut [0; 11]).is_err());
        assert!(layout.scatter(2, &packed, &mut [0; 13]).is_err());
        assert!(Layout::new(&[1], &[]).is_err());
        for (shape, strides) in [
            ([usize::MAX, 2], [1, 1]),
            ([2, 2], [usize::MAX, 1]),
            ([2, 2], [1 << 61, 1]),
        ] {
            assert!(Layout::new(&shape, &strides).is_err(), "{shape:?} {strides:?}");
        }
        assert_eq!(Layout::new(&[0, usize::MAX], &[usize::MAX, 1]).unwrap().span(), 0);
    }
}
