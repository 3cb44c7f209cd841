//! N-dimensional strided views over slices, checked once when they are made.

/// Most dimensions a view may have.
pub const MAX_RANK: usize = 8;

/// A read-only strided view: element `[i0, i1, ..]` is `data[offset + i0 * strides[0] + i1 * strides[1] + ..]`.
/// Strides count elements; 0 repeats (broadcasts), negative ones run backwards.
#[derive(Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    offset: usize,
    shape: &'a [usize],
    strides: &'a [isize],
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

/// A strided view that may be written; no two of its elements share a place.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    data: &'a mut [T],
    offset: usize,
    shape: &'a [usize],
    strides: &'a [isize],
}

/// Whether every element of the view lies inside `len` elements.
fn in_bounds(len: usize, offset: usize, shape: &[usize], strides: &[isize]) -> Option<()> {
    if shape.len() != strides.len() || shape.len() > MAX_RANK {
        return None;
    }
    if shape.contains(&0) {
        return Some(());
    }
    let (mut low, mut high) = (isize::try_from(offset).ok()?, isize::try_from(offset).ok()?);
    let mut count = 1_usize;
    for (&dim, &stride) in shape.iter().zip(strides) {
        count = count.checked_mul(dim)?;
        let reach = isize::try_from(dim - 1).ok()?.checked_mul(stride)?;
        if reach < 0 {
            low = low.checked_add(reach)?;
        } else {
            high = high.checked_add(reach)?;
        }
    }
    isize::try_from(count).ok()?;
    (low >= 0 && usize::try_from(high).ok()? < len).then_some(())
}

/// Whether the strides, taken from the smallest to the largest, each step over everything below them. That is
/// sufficient for no two elements to coincide, and true of every permuted or sliced dense layout.
fn is_injective(shape: &[usize], strides: &[isize]) -> bool {
    let mut dims: [(usize, usize); MAX_RANK] = [(0, 1); MAX_RANK];
    let mut rank = 0;
    for (&dim, &stride) in shape.iter().zip(strides) {
        if dim == 0 {
            return true;
        }
        if dim > 1 {
            dims[rank] = (stride.unsigned_abs(), dim);
            rank += 1;
        }
    }
    let dims = &mut dims[..rank];
    dims.sort_unstable();
    let mut reach = 0_usize;
    dims.iter().all(|&(stride, dim)| {
        let free = stride > reach;
        reach = reach.saturating_add(stride.saturating_mul(dim - 1));
        free
    })
}

/// Row-major strides of a dense tensor of `shape`, in the first `shape.len()` places.
///
/// # Panics
/// When there are more than [`MAX_RANK`] dimensions.
pub fn dense_strides(shape: &[usize]) -> [isize; MAX_RANK] {
    let mut strides = [0; MAX_RANK];
    let mut step = 1_isize;
    for (stride, &dim) in strides[..shape.len()].iter_mut().zip(shape).rev() {
        *stride = step;
        step = step.saturating_mul(isize::try_from(dim).unwrap_or(isize::MAX));
    }
    strides
}

fn is_dense(shape: &[usize], strides: &[isize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let dense = dense_strides(shape);
    shape
        .iter()
        .zip(strides)
        .zip(dense)
        .all(|((&dim, &stride), dense)| dim == 1 || stride == dense)
}

impl<'a, T> View<'a, T> {
    /// A view of `data`; none when an element would lie outside it, the lengths of `shape` and `strides` differ,
    /// or there are more than [`MAX_RANK`] dimensions.
    pub fn new(data: &'a [T], offset: usize, shape: &'a [usize], strides: &'a [isize]) -> Option<Self> {
        in_bounds(data.len(), offset, shape, strides)?;
        Some(View {
            data,
            offset,
            shape,
            strides,
        })
    }

    /// Everything the view lies in.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// Index in the data of element `[0, 0, ..]`.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Length of each dimension, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Step of each dimension in elements.
    pub fn strides(&self) -> &'a [isize] {
        self.strides
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        is_dense(self.shape, self.strides)
    }

    /// The elements as a slice when they are contiguous.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        if self.is_empty() {
            return Some(&[]);
        }
        self.is_contiguous()
            .then(|| &self.data[self.offset..self.offset + self.len()])
    }

    pub(crate) fn ptr(&self) -> *const T {
        self.data.as_ptr().wrapping_add(self.offset)
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// A view of `data` to write to; none when an element would lie outside it, two elements could coincide, the
    /// lengths of `shape` and `strides` differ, or there are more than [`MAX_RANK`] dimensions.
    pub fn new(data: &'a mut [T], offset: usize, shape: &'a [usize], strides: &'a [isize]) -> Option<Self> {
        in_bounds(data.len(), offset, shape, strides)?;
        is_injective(shape, strides).then_some(ViewMut {
            data,
            offset,
            shape,
            strides,
        })
    }

    /// Everything the view lies in.
    pub fn into_data(self) -> &'a mut [T] {
        self.data
    }

    /// Index in the data of element `[0, 0, ..]`.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Length of each dimension, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Step of each dimension in elements.
    pub fn strides(&self) -> &'a [isize] {
        self.strides
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        is_dense(self.shape, self.strides)
    }

    /// The elements as a slice when they are contiguous.
    pub fn as_slice(&mut self) -> Option<&mut [T]> {
        let len = self.len();
        if len == 0 {
            return Some(&mut []);
        }
        if !self.is_contiguous() {
            return None;
        }
        Some(&mut self.data[self.offset..self.offset + len])
    }

    /// The same elements, read only.
    pub fn view(&self) -> View<'_, T> {
        View {
            data: self.data,
            offset: self.offset,
            shape: self.shape,
            strides: self.strides,
        }
    }

    /// The same elements, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            data: self.data,
            offset: self.offset,
            shape: self.shape,
            strides: self.strides,
        }
    }

    pub(crate) fn ptr(&mut self) -> *mut T {
        self.data.as_mut_ptr().wrapping_add(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_outside_their_data_are_refused() {
        let data = [0_u8; 12];
        let cases: &[(usize, &[usize], &[isize], bool)] = &[
            (0, &[3, 4], &[4, 1], true),
            (1, &[3, 4], &[4, 1], false),
            (11, &[3, 4], &[-4, -1], true),
            (10, &[3, 4], &[-4, -1], false),
            (0, &[100, 4], &[0, 1], true),
            (0, &[2], &[1, 1], false),
            (99, &[0, 4], &[4, 1], true),
            (0, &[usize::MAX, 2], &[0, 1], false),
            (0, &[2, 2], &[isize::MAX, isize::MAX], false),
            (12, &[], &[], false),
            (11, &[], &[], true),
        ];
        for &(offset, shape, strides, allowed) in cases {
            let view = View::new(&data, offset, shape, strides);
            assert_eq!(view.is_some(), allowed, "{offset} {shape:?} {strides:?}");
        }
    }

    #[test]
    fn writable_views_that_may_overlap_themselves_are_refused() {
        let mut data = [0_u8; 24];
        let cases: &[(&[usize], &[isize], bool)] = &[
            (&[2, 3, 4], &[12, 4, 1], true),
            (&[4, 3, 2], &[1, 4, 12], true),
            (&[2, 3], &[0, 1], false),
            (&[1, 3], &[0, 1], true),
            (&[3, 3], &[1, 2], false),
            (&[2, 2], &[3, 5], true),
        ];
        for &(shape, strides, allowed) in cases {
            assert_eq!(
                ViewMut::new(&mut data, 0, shape, strides).is_some(),
                allowed,
                "{shape:?} {strides:?}"
            );
        }
    }

    #[test]
    fn contiguous_views_give_their_slice() {
        let data: Vec<u32> = (0..12).collect();
        assert_eq!(
            View::new(&data, 4, &[2, 4], &[4, 1]).unwrap().as_slice().unwrap()[0],
            4
        );
        assert_eq!(
            View::new(&data, 4, &[1, 8], &[99, 1])
                .unwrap()
                .as_slice()
                .unwrap()
                .len(),
            8
        );
        assert!(
            View::new(&data, 0, &[4, 3], &[1, 4])
                .unwrap()
                .as_slice()
                .is_none()
        );
        assert!(
            View::new(&data, 0, &[0, 3], &[1, 4])
                .unwrap()
                .as_slice()
                .unwrap()
                .is_empty()
        );
    }
}
