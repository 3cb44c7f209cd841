//! Elements by index. Source: coremltools 9.0, `mil/ops/defs/iOS15/scatter_gather.py`, iOS17.

mod pick;
mod scatter;

use crate::constant::ConstData;
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Out, Support, opt, req};
use candle_coreml_kernels::{self as kernels, Weights};

/// Rows of a constant table, as stored: `y[i.., :] = table[indices[i..], :]`.
pub struct GatherRows {
    /// The table.
    pub table: Weights,
}

impl std::fmt::Debug for GatherRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GatherRows[{}, {}]", self.table.rows(), self.table.cols())
    }
}

fn out_of_range(index: i32, dim: usize) -> OpError {
    OpError::new(format!("index {index} is outside -{dim}..{dim}"))
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let indices = args.i32s(0)?;
        let mut y = args.out_f32(0)?;
        let data = y.as_slice().ok_or("internal: gather writes row-major")?;
        let (shape, strides) = (
            [indices.len(), self.table.cols()],
            [self.table.cols() as isize, 1],
        );
        let y = kernels::ViewMut::new(data, 0, &shape, &strides).ok_or("internal: gather's result")?;
        kernels::gather_rows(args.pool, &self.table, indices, y)
            .map_err(|i| out_of_range(i, self.table.rows()))
    }
}

/// `y[b, o, i.., r] = x[b, o, indices[b, i..], r]`: `batch` leading dimensions in common, then `outer`, the axis, the rest.
#[derive(Debug)]
pub struct Gather {
    batch: usize,
    outer: usize,
    axis: usize,
    inner: usize,
}

impl Gather {
    /// Gathers along `axis` of a value of shape `have`, of which `batch_dims` leading dimensions are those of the indices.
    pub(super) fn new(have: &[usize], axis: usize, batch_dims: usize) -> Gather {
        Gather {
            batch: elements(&have[..batch_dims]),
            outer: elements(&have[batch_dims..axis]),
            axis: have[axis],
            inner: elements(&have[axis + 1..]),
        }
    }

    fn rows<S: Copy, D>(
        &self,
        x: &[S],
        indices: &[i32],
        y: &mut [D],
        convert: impl Fn(S) -> D,
    ) -> OpResult<()> {
        let per_batch = indices.len() / self.batch.max(1);
        let mut out = y.iter_mut();
        for b in 0..self.batch {
            let Some(wanted) = indices.get(b * per_batch..(b + 1) * per_batch) else {
                break;
            };
            for o in 0..self.outer {
                let base = (b * self.outer + o) * self.axis;
                for &i in wanted {
                    let at = kernels::wrap_index(i, self.axis).ok_or_else(|| out_of_range(i, self.axis))?;
                    let from = (base + at) * self.inner;
                    for (&x, y) in x[from..from + self.inner]
                        .iter()
                        .zip(out.by_ref().take(self.inner))
                    {
                        *y = convert(x);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn accepts(&self, _index: usize, layout: &Layout, _storage: Storage) -> bool {
        layout.is_contiguous()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let indices = args.i32s(1)?;
        let bad = "internal: gather reads and writes row-major";
        let out = args.outputs.first_mut().and_then(Option::take);
        match (args.inputs.first(), out) {
            (Some(In::F32(x)), Some(Out::F32(mut y))) => {
                self.rows(x.as_slice().ok_or(bad)?, indices, y.as_slice().ok_or(bad)?, |v| v)
            }
            (Some(In::F16(x)), Some(Out::F32(mut y))) => {
                self.rows(x.as_slice().ok_or(bad)?, indices, y.as_slice().ok_or(bad)?, |v| {
                    v.to_f32()
                })
            }
            (Some(In::I32(x)), Some(Out::I32(mut y))) => {
                self.rows(x.as_slice().ok_or(bad)?, indices, y.as_slice().ok_or(bad)?, |v| v)
            }
            _ => Err(bad.into()),
        }
    }
}

fn lower_gather(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, indices) = (cx.value("x")?, cx.value("indices")?);
    let (have, at) = (cx.shape(x), cx.shape(indices));
    if have.is_empty() {
        return Err("x must have at least one dimension".into());
    }
    let axis = cx.axis("axis", have.len(), Some(0))?;
    let batch_dims = cx.int("batch_dims")?.unwrap_or(0);
    let b = usize::try_from(batch_dims)
        .ok()
        .filter(|&b| b <= axis && b <= at.len() && have[..b] == at[..b]);
    let b = b.ok_or_else(|| format!("batch_dims {batch_dims} does not fit x {have:?} and indices {at:?}"))?;
    let mut shape: Shape = have[..axis].into();
    shape.extend_from_slice(&at[b..]);
    shape.extend_from_slice(&have[axis + 1..]);
    let dtype = cx.dtype(x);
    // Tables stay as stored when whole rows are read, leading dimensions of 1 aside.
    let lead = elements(&have[..axis]);
    let packed = cx.constant(x).filter(|c| {
        matches!(
            c.data,
            ConstData::F16(_) | ConstData::Lut(_) | ConstData::Affine(_)
        )
    });
    if lead == 1
        && b == 0
        && let Some(table) = packed
    {
        let table = table.weights(have[axis], elements(&have[axis + 1..]))?;
        let y = cx.emit(GatherRows { table }, &[indices], dtype, &shape)?;
        return cx.result(y);
    }
    let y = cx.emit(Gather::new(&have, axis, b), &[x, indices], dtype, &shape)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "scatter_gather",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-6,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "gather",
        &[
            req("x"),
            req("indices"),
            opt("axis"),
            opt("batch_dims"),
            opt("validate_indices"),
        ],
        lower_gather
    ),
    row!(
        "gather_along_axis",
        &[req("x"), req("indices"), opt("axis"), opt("validate_indices")],
        pick::lower_along
    ),
    row!(
        "gather_nd",
        &[
            req("x"),
            req("indices"),
            opt("batch_dims"),
            opt("validate_indices")
        ],
        pick::lower_nd
    ),
    row!(
        "scatter",
        &[
            req("data"),
            req("indices"),
            req("updates"),
            opt("axis"),
            opt("mode"),
            opt("validate_indices"),
        ],
        scatter::lower_axis
    ),
    row!(
        "scatter_along_axis",
        &[
            req("data"),
            req("indices"),
            req("updates"),
            opt("axis"),
            opt("mode"),
            opt("validate_indices"),
        ],
        scatter::lower_along
    ),
    row!(
        "scatter_nd",
        &[
            req("data"),
            req("indices"),
            req("updates"),
            opt("mode"),
            opt("validate_indices"),
        ],
        scatter::lower_nd
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathering_counts_batches_and_refuses_bad_indices() {
        let op = Gather {
            batch: 2,
            outer: 1,
            axis: 3,
            inner: 1,
        };
        let mut y = [0; 4];
        op.rows(&[1, 2, 3, 4, 5, 6], &[0, -1, 2, 1], &mut y, |v| v)
            .expect("indices are inside");
        assert_eq!(y, [1, 3, 6, 5]);
        assert!(
            op.rows(&[1, 2, 3, 4, 5, 6], &[0, 3, 0, 0], &mut y, |v| v)
                .is_err()
        );
    }
}
