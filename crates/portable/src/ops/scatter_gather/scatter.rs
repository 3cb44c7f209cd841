//! `scatter`, `scatter_along_axis` and `scatter_nd`: a copy of `data` in which indexed elements are combined with updates.

use super::out_of_range;
use super::pick::{Tuples, check_along};
use crate::error::OpResult;
use crate::graph::ValueId;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use crate::ops::dense::Pair;
use candle_coreml_kernels::{self as kernels, Binary};

/// Where updates go.
#[derive(Debug)]
enum Place {
    /// `data[o, indices[i], :] <- updates[o, i, :]`, an axis of length `len` in slabs of `inner` elements.
    Axis { len: usize, inner: usize },
    /// `data[o, indices[o, i, n], n] <- updates[o, i, n]`.
    Along { len: usize, count: usize, inner: usize },
    /// `data[indices[k.., :]] <- updates[k..]`.
    Nd(Tuples),
}

/// What an index outside its axis means.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Outside {
    /// Negative ones count from the end, others are errors: before iOS 17.
    Wraps,
    /// Negative ones are outside too, and all of them are errors: `validate_indices`.
    Fails,
    /// Negative ones are outside too, and their updates go nowhere.
    Skips,
}

impl Outside {
    fn place(self, index: i32, len: usize) -> OpResult<Option<usize>> {
        let inside = match self {
            Outside::Wraps => kernels::wrap_index(index, len),
            _ => usize::try_from(index).ok().filter(|&i| i < len),
        };
        match self {
            Outside::Skips => Ok(inside),
            Outside::Wraps => inside.map(Some).ok_or_else(|| out_of_range(index, len)),
            Outside::Fails => inside
                .map(Some)
                .ok_or_else(|| format!("index {index} is outside 0..{len}").into()),
        }
    }
}

/// The three operators of this family.
#[derive(Debug)]
pub struct Scatter {
    place: Place,
    /// How an update meets what is there; replaces it when `None`.
    mode: Option<Binary>,
    outside: Outside,
}

impl Scatter {
    /// Calls `f` with the start of each run of elements in the data and in the updates.
    fn runs(&self, indices: &[i32], updates: usize, mut f: impl FnMut(usize, usize)) -> OpResult<()> {
        match &self.place {
            Place::Axis { len, inner } => {
                let outer = updates / (indices.len() * inner).max(1);
                for (n, o) in (0..outer).flat_map(|o| (0..indices.len()).map(move |n| (n, o))) {
                    if let Some(at) = self.outside.place(indices[n], *len)? {
                        f((o * len + at) * inner, (o * indices.len() + n) * inner);
                    }
                }
            }
            Place::Along { len, count, inner } => {
                for (n, &i) in indices.iter().enumerate() {
                    if let Some(at) = self.outside.place(i, *len)? {
                        f((n / (count * inner) * len + at) * inner + n % inner, n);
                    }
                }
            }
            Place::Nd(tuples) => {
                for n in 0..tuples.per_batch {
                    let start = tuples.start_by(n, indices, |i, d| self.outside.place(i, d))?;
                    if let Some(start) = start {
                        f(start, n * tuples.slab);
                    }
                }
            }
        }
        Ok(())
    }

    fn run_length(&self) -> usize {
        match &self.place {
            Place::Axis { inner, .. } => *inner,
            Place::Along { .. } => 1,
            Place::Nd(tuples) => tuples.slab,
        }
    }

    fn write<T: Copy>(
        &self,
        indices: &[i32],
        updates: &[T],
        y: &mut [T],
        combine: impl Fn(Binary, T, T) -> T,
    ) -> OpResult<()> {
        let n = self.run_length();
        self.runs(indices, updates.len(), |to, from| {
            for (y, &u) in y[to..to + n].iter_mut().zip(&updates[from..from + n]) {
                *y = self.mode.map_or(u, |mode| combine(mode, *y, u));
            }
        })
    }
}

impl Op for Scatter {
    fn name(&self) -> &'static str {
        "scatter"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let indices = args.i32s(1)?;
        match args.pair()? {
            Pair::F32(data, y) => {
                y.copy_from_slice(data);
                self.write(indices, args.f32s(2)?, y, Binary::apply)
            }
            Pair::I32(data, y) => {
                y.copy_from_slice(data);
                self.write(indices, args.i32s(2)?, y, Binary::apply_i32)
            }
        }
    }
}

fn mode(cx: &mut OpCx<'_, '_>) -> OpResult<Option<Binary>> {
    Ok(match cx.text("mode")?.as_deref() {
        Some("update") => None,
        None | Some("add") => Some(Binary::Add),
        Some("sub") => Some(Binary::Sub),
        Some("mul") => Some(Binary::Mul),
        Some("div") => Some(Binary::Div),
        Some("max") => Some(Binary::Max),
        Some("min") => Some(Binary::Min),
        Some(other) => {
            return Err(format!("mode {other:?} is not update, add, sub, mul, div, max or min").into());
        }
    })
}

/// The three values every scatter has.
struct Parts {
    data: ValueId,
    indices: ValueId,
    updates: ValueId,
}

impl Parts {
    fn read(cx: &mut OpCx<'_, '_>) -> OpResult<Parts> {
        Ok(Parts {
            data: cx.value("data")?,
            indices: cx.value("indices")?,
            updates: cx.value("updates")?,
        })
    }

    fn emit(self, cx: &mut OpCx<'_, '_>, place: Place, wanted: &[usize]) -> OpResult<()> {
        let have = cx.shape(self.updates);
        if have.as_slice() != wanted {
            return Err(format!("updates {:?} must have shape {wanted:?}", have.as_slice()).into());
        }
        let op = Scatter {
            place,
            mode: mode(cx)?,
            outside: match (cx.opset() >= 7, cx.flag("validate_indices", false)?) {
                (false, _) => Outside::Wraps,
                (true, true) => Outside::Fails,
                (true, false) => Outside::Skips,
            },
        };
        let (dtype, shape) = (cx.dtype(self.data), cx.shape(self.data));
        let y = cx.emit(op, &[self.data, self.indices, self.updates], dtype, &shape)?;
        cx.result(y)
    }
}

/// Lowers `scatter`.
pub fn lower_axis(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let parts = Parts::read(cx)?;
    let (data, at) = (cx.shape(parts.data), cx.shape(parts.indices));
    let axis = cx.axis("axis", data.len(), Some(0))?;
    let mut wanted: Shape = data[..axis].into();
    wanted.extend_from_slice(&at);
    wanted.extend_from_slice(&data[axis + 1..]);
    let place = Place::Axis {
        len: data[axis],
        inner: elements(&data[axis + 1..]),
    };
    parts.emit(cx, place, &wanted)
}

/// Lowers `scatter_along_axis`.
pub fn lower_along(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let parts = Parts::read(cx)?;
    let (data, at) = (cx.shape(parts.data), cx.shape(parts.indices));
    let axis = cx.axis("axis", data.len(), Some(0))?;
    check_along(&data, &at, axis)?;
    let place = Place::Along {
        len: data[axis],
        count: at[axis],
        inner: elements(&data[axis + 1..]),
    };
    parts.emit(cx, place, &at)
}

/// Lowers `scatter_nd`.
pub fn lower_nd(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let parts = Parts::read(cx)?;
    let (data, at) = (cx.shape(parts.data), cx.shape(parts.indices));
    let tuples = Tuples::new(&data, &at, 0)?;
    let mut wanted: Shape = at[..at.len() - 1].into();
    wanted.extend_from_slice(&data[tuples.dims.len()..]);
    parts.emit(cx, Place::Nd(tuples), &wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_meet_what_is_there_in_order() {
        let scatter = Scatter {
            place: Place::Axis { len: 2, inner: 3 },
            mode: Some(Binary::Add),
            outside: Outside::Wraps,
        };
        let mut y = [1, 2, 3, 4, 5, 6];
        scatter
            .write(&[1, 0], &[5, 6, 7, 8, 9, 10], &mut y, Binary::apply_i32)
            .expect("indices are inside");
        assert_eq!(y, [9, 11, 13, 9, 11, 13]);
        for (outside, allowed) in [
            (Outside::Wraps, true),
            (Outside::Fails, false),
            (Outside::Skips, true),
        ] {
            let scatter = Scatter {
                outside,
                place: Place::Axis { len: 2, inner: 3 },
                mode: None,
            };
            let mut y = [0; 6];
            let written = scatter.write(&[-1], &[1, 1, 1], &mut y, Binary::apply_i32);
            assert_eq!(written.is_ok(), allowed, "{outside:?}");
            assert_eq!(y[5], i32::from(outside == Outside::Wraps), "{outside:?}");
            let beyond = scatter.write(&[2], &[1, 1, 1], &mut y, Binary::apply_i32);
            assert_eq!(beyond.is_ok(), outside == Outside::Skips, "{outside:?}");
        }
    }
}
