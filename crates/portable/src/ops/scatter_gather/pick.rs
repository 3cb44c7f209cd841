//! `gather_along_axis` and `gather_nd`: elements, or slabs of them, picked one by one.

use super::out_of_range;
use crate::error::OpResult;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use crate::ops::dense::Pair;
use candle_coreml_kernels as kernels;

/// `y[o, i, n] = x[o, indices[o, i, n], n]`.
#[derive(Debug)]
pub struct GatherAlong {
    /// Length of the axis in `x`.
    have: usize,
    /// Length of the axis in `indices`.
    want: usize,
    /// Elements behind the axis.
    inner: usize,
}

impl GatherAlong {
    fn pick<T: Copy>(&self, x: &[T], indices: &[i32], y: &mut [T]) -> OpResult<()> {
        for (p, (y, &i)) in y.iter_mut().zip(indices).enumerate() {
            let (outer, inner) = (p / (self.want * self.inner), p % self.inner);
            let at = kernels::wrap_index(i, self.have).ok_or_else(|| out_of_range(i, self.have))?;
            *y = x[(outer * self.have + at) * self.inner + inner];
        }
        Ok(())
    }
}

impl Op for GatherAlong {
    fn name(&self) -> &'static str {
        "gather_along_axis"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let indices = args.i32s(1)?;
        match args.pair()? {
            Pair::F32(x, y) => self.pick(x, indices, y),
            Pair::I32(x, y) => self.pick(x, indices, y),
        }
    }
}

/// Lowers `gather_along_axis`.
pub fn lower_along(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, indices) = (cx.value("x")?, cx.value("indices")?);
    let (have, at) = (cx.shape(x), cx.shape(indices));
    let axis = cx.axis("axis", have.len(), Some(0))?;
    check_along(&have, &at, axis)?;
    let op = GatherAlong {
        have: have[axis],
        want: at[axis],
        inner: elements(&have[axis + 1..]),
    };
    let y = cx.emit(op, &[x, indices], cx.dtype(x), &at)?;
    cx.result(y)
}

/// Fails unless the shapes agree in all dimensions but `axis`.
pub(super) fn check_along(have: &[usize], at: &[usize], axis: usize) -> OpResult<()> {
    let fits = have.len() == at.len() && (0..have.len()).all(|i| i == axis || have[i] == at[i]);
    if fits {
        return Ok(());
    }
    Err(format!("indices {at:?} may differ from {have:?} along axis {axis} only").into())
}

/// Where a tuple of indices points: the first dimensions of a value, counted in slabs of what lies behind them.
#[derive(Debug)]
pub(super) struct Tuples {
    /// Tuples of each batch.
    pub per_batch: usize,
    /// Dimensions the tuples index.
    pub dims: Shape,
    /// Elements of a slab.
    pub slab: usize,
}

impl Tuples {
    /// Reads the shapes of `x` and `indices`, `batch_dims` leading ones in common.
    pub fn new(have: &[usize], at: &[usize], batch_dims: usize) -> OpResult<Tuples> {
        let depth = *at.last().ok_or("indices need at least one dimension")?;
        let lead = &at[..at.len() - 1];
        let fits = batch_dims <= lead.len()
            && batch_dims + depth <= have.len()
            && have[..batch_dims] == lead[..batch_dims];
        if !fits {
            return Err(
                format!("indices {at:?} with {batch_dims} batch dimensions do not fit {have:?}").into(),
            );
        }
        Ok(Tuples {
            per_batch: elements(&lead[batch_dims..]),
            dims: have[batch_dims..batch_dims + depth].into(),
            slab: elements(&have[batch_dims + depth..]),
        })
    }

    /// First element of the slab of tuple `n`.
    pub fn start(&self, n: usize, indices: &[i32]) -> OpResult<usize> {
        let wrap = |i, d| kernels::wrap_index(i, d).ok_or_else(|| out_of_range(i, d));
        self.start_by(n, indices, |i, d| wrap(i, d).map(Some))
            .map(|at| at.unwrap_or(0))
    }

    /// First element of the slab of tuple `n`, each index made a place by `place`; none where one index has none.
    pub fn start_by(
        &self,
        n: usize,
        indices: &[i32],
        place: impl Fn(i32, usize) -> OpResult<Option<usize>>,
    ) -> OpResult<Option<usize>> {
        let depth = self.dims.len();
        let mut at = n / self.per_batch.max(1);
        for (&i, &d) in indices.iter().skip(n * depth).zip(&self.dims) {
            let Some(place) = place(i, d)? else {
                return Ok(None);
            };
            at = at * d + place;
        }
        Ok(Some(at * self.slab))
    }
}

/// `y[b.., k..] = x[b.., indices[b.., k.., :]]`.
#[derive(Debug)]
pub struct GatherNd(Tuples);

impl GatherNd {
    fn pick<T: Copy>(&self, x: &[T], indices: &[i32], y: &mut [T]) -> OpResult<()> {
        if self.0.slab == 0 {
            return Ok(());
        }
        for (n, y) in y.chunks_exact_mut(self.0.slab).enumerate() {
            let from = self.0.start(n, indices)?;
            y.copy_from_slice(&x[from..from + self.0.slab]);
        }
        Ok(())
    }
}

impl Op for GatherNd {
    fn name(&self) -> &'static str {
        "gather_nd"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let indices = args.i32s(1)?;
        match args.pair()? {
            Pair::F32(x, y) => self.pick(x, indices, y),
            Pair::I32(x, y) => self.pick(x, indices, y),
        }
    }
}

/// Lowers `gather_nd`.
pub fn lower_nd(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, indices) = (cx.value("x")?, cx.value("indices")?);
    let (have, at) = (cx.shape(x), cx.shape(indices));
    let batch_dims = cx.int("batch_dims")?.unwrap_or(0);
    let batch_dims = usize::try_from(batch_dims).map_err(|_| "batch_dims must be 0 or more")?;
    let tuples = Tuples::new(&have, &at, batch_dims)?;
    let mut shape: Shape = at[..at.len() - 1].into();
    shape.extend_from_slice(&have[batch_dims + tuples.dims.len()..]);
    let y = cx.emit(GatherNd(tuples), &[x, indices], cx.dtype(x), &shape)?;
    cx.result(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tuples_point_at_slabs_behind_their_batch() {
        let tuples = Tuples::new(&[2, 3, 4, 5], &[2, 7, 1], 1).expect("fits");
        assert_eq!((tuples.per_batch, tuples.slab), (7, 20));
        let mut indices = [0; 14];
        indices[8] = -1;
        assert_eq!(tuples.start(8, &indices).expect("inside"), (3 + 2) * 20);
        indices[8] = 3;
        assert!(tuples.start(8, &indices).is_err());
        assert!(Tuples::new(&[2, 3], &[4, 3], 0).is_err());
    }
}
