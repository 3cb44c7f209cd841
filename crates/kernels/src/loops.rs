//! Iteration over several strided operands of one shape at once.

use crate::pool::Pool;
use crate::strided::MAX_RANK;
use std::ops::Range;

/// Elements a thread should have before a second one is worth waking.
pub(crate) const PARALLEL_ELEMENTS: usize = 16 * 1024;

/// Longest stretch of the innermost dimension handed to a kernel at once.
const BLOCK: usize = 4096;

/// A pointer that may cross threads. Each use says why the accesses behind it do not collide.
#[derive(Debug)]
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: the pointer itself is plain data; dereferencing it is unsafe and argued where it happens.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn of(ptr: *const T) -> Self {
        Shared(ptr.cast_mut())
    }

    /// The pointer `offset` elements on; computing it is always defined.
    pub(crate) fn at(self, offset: isize) -> *mut T {
        self.0.wrapping_offset(offset)
    }
}

/// The loops over `N` operands: dimensions of length 1 dropped, the rest ordered so that operand 0 is walked in
/// memory order, and merged where every operand allows it.
#[derive(Debug, Clone)]
pub(crate) struct Nest<const N: usize> {
    dims: [usize; MAX_RANK],
    strides: [[isize; N]; MAX_RANK],
    rank: usize,
}

/// Two dimensions, each with its length and steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plane<const N: usize> {
    pub outer: (usize, [isize; N]),
    pub inner: (usize, [isize; N]),
}

impl<const N: usize> Nest<N> {
    pub(crate) fn new(shape: &[usize], operands: [&[isize]; N]) -> Self {
        let mut axes: [(usize, [isize; N]); MAX_RANK] = [(1, [0; N]); MAX_RANK];
        let mut rank = 0;
        for (axis, &dim) in shape.iter().enumerate() {
            if dim != 1 {
                axes[rank] = (dim, operands.map(|strides| strides[axis]));
                rank += 1;
            }
        }
        axes[..rank].sort_by_key(|(_, strides)| std::cmp::Reverse(strides[0].unsigned_abs()));
        // A dimension that another operand walks element by element goes next to the innermost one.
        if N == 2
            && rank > 2
            && axes[rank - 1].1[1] != 1
            && let Some(dense) = axes[..rank - 1].iter().position(|(_, strides)| strides[1] == 1)
        {
            axes[dense..rank - 1].rotate_left(1);
        }
        let mut nest = Nest {
            dims: [1; MAX_RANK],
            strides: [[0; N]; MAX_RANK],
            rank: 0,
        };
        for &(dim, strides) in &axes[..rank] {
            nest.push(dim, strides);
        }
        nest.rank = nest.rank.max(1);
        nest
    }

    /// Appends a dimension inside the others, merging it into the last one when it continues that one.
    fn push(&mut self, dim: usize, strides: [isize; N]) {
        if let Some(last) = self.rank.checked_sub(1) {
            let merges = (0..N).all(|n| {
                isize::try_from(dim)
                    .ok()
                    .and_then(|dim| strides[n].checked_mul(dim))
                    == Some(self.strides[last][n])
            });
            if merges {
                self.dims[last] *= dim;
                self.strides[last] = strides;
                return;
            }
        }
        self.dims[self.rank] = dim;
        self.strides[self.rank] = strides;
        self.rank += 1;
    }

    /// Length and steps of the innermost dimension.
    pub(crate) fn inner(&self) -> (usize, [isize; N]) {
        (self.dims[self.rank - 1], self.strides[self.rank - 1])
    }

    /// The two innermost dimensions when operand 0 walks one of them element by element and operand 1 the other, as in
    /// a transpose.
    pub(crate) fn plane(&self) -> Option<Plane<N>> {
        let outer = self.rank.checked_sub(2)?;
        let (inner, steps) = self.inner();
        let swaps = steps[0] == 1 && steps[1] != 1 && steps[1] != 0 && self.strides[outer][1] == 1;
        swaps.then(|| Plane {
            outer: (self.dims[outer], self.strides[outer]),
            inner: (inner, steps),
        })
    }

    /// Both dimensions, when there are two.
    pub(crate) fn matrix(&self) -> Option<Plane<N>> {
        (self.rank == 2).then(|| Plane {
            outer: (self.dims[0], self.strides[0]),
            inner: (self.dims[1], self.strides[1]),
        })
    }

    /// Number of planes, see [`Nest::plane`].
    pub(crate) fn planes(&self) -> usize {
        self.dims[..self.rank.saturating_sub(2)].iter().product()
    }

    /// Offsets of the operands at the start of a plane.
    pub(crate) fn plane_offsets(&self, plane: usize) -> [isize; N] {
        let mut offsets = [0; N];
        let mut rest = plane;
        for axis in (0..self.rank.saturating_sub(2)).rev() {
            let index = (rest % self.dims[axis].max(1)) as isize;
            rest /= self.dims[axis].max(1);
            for (offset, stride) in offsets.iter_mut().zip(self.strides[axis]) {
                *offset += stride * index;
            }
        }
        offsets
    }

    /// Number of innermost rows.
    pub(crate) fn rows(&self) -> usize {
        self.dims[..self.rank - 1].iter().product()
    }

    /// Calls `body` with the offsets of the operands for each row in `rows`.
    pub(crate) fn for_rows(&self, rows: Range<usize>, mut body: impl FnMut(usize, [isize; N])) {
        let outer = self.rank - 1;
        let mut index = [0_usize; MAX_RANK];
        let mut offsets = [0_isize; N];
        let mut rest = rows.start;
        for axis in (0..outer).rev() {
            index[axis] = rest % self.dims[axis].max(1);
            rest /= self.dims[axis].max(1);
            for n in 0..N {
                offsets[n] += self.strides[axis][n] * index[axis] as isize;
            }
        }
        for row in rows {
            body(row, offsets);
            for axis in (0..outer).rev() {
                index[axis] += 1;
                let wraps = index[axis] == self.dims[axis];
                let back = if wraps { self.dims[axis] as isize } else { 0 };
                for n in 0..N {
                    offsets[n] += self.strides[axis][n] * (1 - back);
                }
                if !wraps {
                    break;
                }
                index[axis] = 0;
            }
        }
    }

    /// Calls `body` with `(length, offsets)` for stretches of the innermost dimension that cover everything,
    /// spread over the pool when there is enough of it.
    pub(crate) fn run(&self, pool: &Pool, body: &(dyn Fn(usize, [isize; N]) + Sync)) {
        let (inner, steps) = self.inner();
        if inner == 0 {
            return;
        }
        let blocks = inner.div_ceil(BLOCK);
        let stretch = inner.div_ceil(blocks);
        let grain = PARALLEL_ELEMENTS.div_ceil(stretch);
        pool.run_ranges(self.rows() * blocks, grain, &|range: Range<usize>| {
            let rows = range.start / blocks..range.end.div_ceil(blocks);
            self.for_rows(rows, |row, offsets| {
                let first = range.start.saturating_sub(row * blocks);
                let last = (range.end - row * blocks).min(blocks);
                for block in first..last {
                    let start = block * stretch;
                    let len = stretch.min(inner.saturating_sub(start));
                    let offsets = std::array::from_fn(|n| offsets[n] + steps[n] * start as isize);
                    if len > 0 {
                        body(len, offsets);
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strided::dense_strides;

    #[test]
    fn dense_operands_become_one_loop() {
        let shape = [2, 3, 4];
        let dense = dense_strides(&shape);
        let nest = Nest::new(&shape, [&dense[..3], &dense[..3]]);
        assert_eq!((nest.rows(), nest.inner()), (1, (24, [1, 1])));
        let nest = Nest::new(&shape, [&dense[..3], &[0, 4, 1]]);
        assert_eq!((nest.rows(), nest.inner()), (2, (12, [1, 1])));
    }

    #[test]
    fn every_element_is_visited_once_from_any_range() {
        let pool = Pool::new(3);
        for shape in [
            vec![],
            vec![5],
            vec![3, 1, 70],
            vec![2, 9000],
            vec![40, 3, 5, 7, 11],
            vec![3, 0, 2],
        ] {
            let len: usize = shape.iter().product();
            let dense = dense_strides(&shape);
            let reversed: Vec<isize> = dense[..shape.len()].iter().map(|stride| -stride).collect();
            let nest = Nest::new(&shape, [&dense[..shape.len()], &reversed]);
            let hits: Vec<_> = (0..len).map(|_| std::sync::atomic::AtomicUsize::new(0)).collect();
            let steps = nest.inner().1;
            nest.run(&pool, &|count, offsets| {
                assert_eq!(offsets[0], -offsets[1]);
                for i in 0..count {
                    let at = (offsets[0] + steps[0] * i as isize) as usize;
                    hits[at].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
            assert!(
                hits.iter()
                    .all(|hit| hit.load(std::sync::atomic::Ordering::Relaxed) == 1),
                "{shape:?}"
            );
        }
    }
}
