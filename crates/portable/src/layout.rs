//! Where a value lies in its buffer: offset, shape and strides, and the arithmetic of views.

use smallvec::SmallVec;

/// Dimensions of a value, outermost first.
pub type Shape = SmallVec<[usize; 6]>;
/// Elements to step for each dimension; 0 repeats, negative runs backwards.
pub type Strides = SmallVec<[isize; 6]>;

/// Number of elements of a shape.
///
/// Shapes inside a graph were checked with [`checked_elements`], so the product cannot overflow.
pub fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Most elements one value may have: 2^31, twice what fits the largest buffers seen in language models.
pub const MAX_ELEMENTS: usize = 1 << 31;

/// Number of elements, `None` above [`MAX_ELEMENTS`].
pub fn checked_elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    let mut n = 1usize;
    for &d in shape {
        n = n.checked_mul(d).filter(|&n| n <= MAX_ELEMENTS)?;
    }
    Some(n)
}

/// A strided view of a buffer. Strides and offset count elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Index of element [0, 0, ...].
    pub offset: usize,
    /// Dimensions, outermost first.
    pub shape: Shape,
    /// One stride a dimension.
    pub strides: Strides,
}

/// Row-major strides of `shape`.
pub fn row_major(shape: &[usize]) -> Strides {
    let mut strides: Strides = SmallVec::from_elem(0, shape.len());
    let mut step = 1isize;
    for (s, &d) in strides.iter_mut().zip(shape).rev() {
        *s = step;
        step *= d.max(1) as isize;
    }
    strides
}

impl Layout {
    /// Row-major from element 0.
    pub fn contiguous(shape: &[usize]) -> Layout {
        Layout {
            offset: 0,
            shape: shape.into(),
            strides: row_major(shape),
        }
    }

    /// True when elements follow each other in row-major order (dimensions of size 1 may have any stride).
    pub fn is_contiguous(&self) -> bool {
        let mut step = 1isize;
        for (&d, &s) in self.shape.iter().zip(&self.strides).rev() {
            if d == 0 {
                return true;
            }
            if d != 1 {
                if s != step {
                    return false;
                }
                step *= d as isize;
            }
        }
        true
    }

    /// Dimensions in another order: output dimension `i` is input dimension `perm[i]`.
    pub fn permute(&self, perm: &[usize]) -> Layout {
        Layout {
            offset: self.offset,
            shape: perm.iter().map(|&p| self.shape[p]).collect(),
            strides: perm.iter().map(|&p| self.strides[p]).collect(),
        }
    }

    /// Every `step[i]`-th element from `begin[i]`, `size[i]` of them; a negative step runs backwards.
    pub fn slice(&self, begin: &[usize], step: &[isize], size: &[usize]) -> Layout {
        let mut offset = self.offset as isize;
        if size.iter().all(|&n| n > 0) {
            for (&b, &s) in begin.iter().zip(&self.strides) {
                offset += b as isize * s;
            }
        }
        Layout {
            offset: offset as usize,
            shape: size.into(),
            strides: self.strides.iter().zip(step).map(|(a, b)| a * b).collect(),
        }
    }

    /// The same elements repeated to `shape` (numpy broadcasting, aligned at the last dimension).
    pub fn broadcast(&self, shape: &[usize]) -> Option<Layout> {
        let lead = shape.len().checked_sub(self.shape.len())?;
        let mut strides: Strides = SmallVec::from_elem(0, shape.len());
        for i in 0..self.shape.len() {
            let (have, want) = (self.shape[i], shape[lead + i]);
            if have == want {
                strides[lead + i] = self.strides[i];
            } else if have != 1 {
                return None;
            }
        }
        Some(Layout {
            offset: self.offset,
            shape: shape.into(),
            strides,
        })
    }

    /// The same elements in row-major order under another shape; `None` when no strides can express it.
    pub fn reshape(&self, shape: &[usize]) -> Option<Layout> {
        if elements(shape) != elements(&self.shape) {
            return None;
        }
        if elements(shape) == 0 || self.is_contiguous() {
            return Some(Layout {
                offset: self.offset,
                shape: shape.into(),
                strides: row_major(shape),
            });
        }
        // Runs of old dimensions that are contiguous among themselves can be cut anywhere.
        let mut runs: SmallVec<[(usize, isize); 6]> = SmallVec::new();
        for (&d, &s) in self.shape.iter().zip(&self.strides) {
            if d == 1 {
                continue;
            }
            match runs.last_mut() {
                Some((n, last)) if *last == s * d as isize => {
                    *n *= d;
                    *last = s;
                }
                _ => runs.push((d, s)),
            }
        }
        let mut strides: Strides = SmallVec::from_elem(0, shape.len());
        let mut left = 1usize;
        let mut stride = 1isize;
        for (i, &d) in shape.iter().enumerate().rev() {
            if d == 1 {
                strides[i] = stride;
                continue;
            }
            if left == 1 {
                (left, stride) = runs.pop()?;
            }
            if !left.is_multiple_of(d) {
                return None;
            }
            strides[i] = stride;
            left /= d;
            stride *= d as isize;
        }
        Some(Layout {
            offset: self.offset,
            shape: shape.into(),
            strides,
        })
    }

    /// A dense layout whose dimensions lie in the same order in memory, with no gaps, if this one only permutes.
    ///
    /// Elementwise results take it, so that a transposed value stays transposed instead of being copied back and forth.
    pub fn dense_like(&self) -> Layout {
        let mut order: SmallVec<[usize; 6]> = (0..self.shape.len()).filter(|&i| self.shape[i] != 1).collect();
        if order.iter().any(|&i| self.strides[i] <= 0) {
            return Layout::contiguous(&self.shape);
        }
        order.sort_by_key(|&i| std::cmp::Reverse(self.strides[i]));
        let mut strides: Strides = SmallVec::from_elem(1, self.shape.len());
        let mut step = 1isize;
        for &i in order.iter().rev() {
            strides[i] = step;
            step *= self.shape[i].max(1) as isize;
        }
        Layout {
            offset: 0,
            shape: self.shape.clone(),
            strides,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_value_reshapes_where_strides_allow() {
        // x [1, 64, 576] seen as [1, 576, 1, 64], heads split off, then heads and positions swapped.
        let x = Layout::contiguous(&[1, 64, 576]).permute(&[0, 2, 1]);
        let heads = x
            .reshape(&[1, 9, 64, 64])
            .expect("splitting channels needs no copy");
        assert_eq!(heads.strides[1..], [64, 1, 576]);
        assert!(heads.permute(&[0, 1, 3, 2]).reshape(&[9, 64 * 64]).is_none());
    }

    #[test]
    fn reshape_of_contiguous_values_is_row_major() {
        let l = Layout::contiguous(&[2, 3, 4])
            .reshape(&[6, 4])
            .expect("contiguous");
        assert_eq!(l, Layout::contiguous(&[6, 4]));
        assert!(l.reshape(&[5, 5]).is_none());
    }

    #[test]
    fn slices_step_backwards_and_broadcasts_repeat() {
        let l = Layout::contiguous(&[4, 5]).slice(&[3, 0], &[-1, 2], &[4, 3]);
        assert_eq!((l.offset, l.strides.as_slice()), (15, &[-5, 2][..]));
        let b = Layout::contiguous(&[3, 1])
            .broadcast(&[2, 3, 4])
            .expect("broadcastable");
        assert_eq!(b.strides.as_slice(), &[0, 1, 0]);
        assert!(Layout::contiguous(&[3]).broadcast(&[2, 4]).is_none());
    }

    #[test]
    fn dense_like_keeps_the_order_in_memory() {
        let x = Layout::contiguous(&[1, 64, 576]).permute(&[0, 2, 1]);
        assert_eq!(x.dense_like().strides.as_slice(), &[1, 1, 576]);
        let half = Layout::contiguous(&[9, 64]).slice(&[0, 32], &[1, 1], &[9, 32]);
        assert_eq!(half.dense_like(), Layout::contiguous(&[9, 32]));
    }

    #[test]
    fn absurd_shapes_have_no_element_count() {
        assert_eq!(checked_elements(&[1 << 40, 1 << 40]), None);
        assert_eq!(checked_elements(&[1 << 40, 0]), Some(0));
        assert_eq!(checked_elements(&[3, 4]), Some(12));
    }
}
