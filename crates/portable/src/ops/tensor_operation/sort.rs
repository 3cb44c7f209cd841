//! `argsort` and `topk`: order along a dimension, ties in the order of their places.

use crate::error::OpResult;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op};
use candle_coreml_mil::DType;
use std::cmp::Ordering;
use std::sync::Arc;

/// The first `count` places of the sorted order along a dimension of `len` elements, and their values when `values` is set.
#[derive(Debug)]
pub struct Sort {
    len: usize,
    inner: usize,
    count: usize,
    ascending: bool,
    /// Result 0 holds values, result 1 (where there is one) places; otherwise result 0 holds places.
    values: bool,
}

/// Calls `f` with the places in order of each line of `x`, and the line's outer and inner index.
fn for_lines<T: Copy>(
    sort: &Sort,
    x: &[T],
    compare: impl Fn(&T, &T) -> Ordering,
    mut f: impl FnMut(&[u32], usize, usize),
) {
    let (len, inner) = (sort.len, sort.inner);
    let mut order: Vec<u32> = Vec::with_capacity(len);
    for (outer, block) in x.chunks_exact((len * inner).max(1)).enumerate() {
        for i in 0..inner {
            let by = |&a: &u32, &b: &u32| {
                let (x, y) = (&block[a as usize * inner + i], &block[b as usize * inner + i]);
                let order = if sort.ascending {
                    compare(x, y)
                } else {
                    compare(y, x)
                };
                order.then(a.cmp(&b))
            };
            order.clear();
            order.extend(0..len as u32);
            if sort.count < len / 8 && sort.count > 0 {
                // A few of many: find them first, then sort them alone.
                order.select_nth_unstable_by(sort.count - 1, by);
                order.truncate(sort.count);
            }
            order.sort_unstable_by(by);
            f(&order[..sort.count], outer, i);
        }
    }
}

/// NaN counts as greater than every number, as in numpy.
fn compare_floats(a: &f32, b: &f32) -> Ordering {
    a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

impl Sort {
    fn write<T: Copy>(
        &self,
        x: &[T],
        compare: impl Fn(&T, &T) -> Ordering,
        mut values: Option<&mut [T]>,
        mut places: Option<&mut [i32]>,
    ) {
        for_lines(self, x, compare, |order, outer, i| {
            for (n, &p) in order.iter().enumerate() {
                let to = (outer * self.count + n) * self.inner + i;
                if let Some(values) = values.as_deref_mut() {
                    values[to] = x[(outer * self.len + p as usize) * self.inner + i];
                }
                if let Some(places) = places.as_deref_mut() {
                    places[to] = p as i32;
                }
            }
        });
    }
}

impl Op for Sort {
    fn name(&self) -> &'static str {
        "sort"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let at = usize::from(self.values);
        let given = args.outputs.len() > at;
        match args.inputs.first() {
            Some(In::F32(_)) => {
                let values = if self.values {
                    Some(args.result_f32(0)?)
                } else {
                    None
                };
                let places = if given { Some(args.result_i32(at)?) } else { None };
                self.write(args.f32s(0)?, compare_floats, values, places);
            }
            _ => {
                let values = if self.values {
                    Some(args.result_i32(0)?)
                } else {
                    None
                };
                let places = if given { Some(args.result_i32(at)?) } else { None };
                self.write(args.i32s(0)?, i32::cmp, values, places);
            }
        }
        Ok(())
    }
}

fn sort(shape: &[usize], axis: usize, count: usize, ascending: bool, values: bool) -> OpResult<Sort> {
    if u32::try_from(shape[axis]).is_err() {
        return Err(format!("a dimension of {} is too large to sort", shape[axis]).into());
    }
    Ok(Sort {
        len: shape[axis],
        inner: elements(&shape[axis + 1..]),
        count,
        ascending,
        values,
    })
}

/// Lowers `argsort`.
pub fn lower_argsort(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axis = cx.axis("axis", shape.len(), Some(-1))?;
    let ascending = cx.flag("ascending", false)?;
    let op = sort(&shape, axis, shape[axis], ascending, false)?;
    let y = cx.emit(op, &[x], DType::Int32, &shape)?;
    cx.result(y)
}

/// Lowers `topk`; its results are sorted whether or not `sort` asks for it.
pub fn lower_topk(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let mut shape: Shape = cx.shape(x);
    let axis = cx.axis("axis", shape.len(), Some(-1))?;
    let len = shape[axis];
    let k = cx.int("k")?.unwrap_or(1);
    let count = if k == -1 {
        Some(len)
    } else {
        usize::try_from(k).ok()
    };
    let count = count.filter(|&n| n <= len);
    let count = count.ok_or_else(|| format!("k {k} is outside 0..={len} and not -1"))?;
    let ascending = cx.flag("ascending", false)?;
    let places = cx.flag("return_indices", true)?;
    let index_type = match cx.text("output_indices_dtype")?.as_deref() {
        None | Some("int32") => DType::Int32,
        Some("uint16") => DType::Uint16,
        Some(other) => return Err(format!("output_indices_dtype {other:?} is not int32 or uint16").into()),
    };
    let op = Arc::new(sort(&shape, axis, count, ascending, true)?);
    shape[axis] = count;
    let mut results = vec![(cx.dtype(x), shape.clone())];
    if places {
        results.push((index_type, shape));
    }
    for id in cx.emit_many(op, &[x], &results)? {
        cx.result(id)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_of_many_are_the_first_of_all_sorted() {
        let x: Vec<f32> = (0..100).map(|i| ((i * 37) % 50) as f32).collect();
        for ascending in [true, false] {
            let run = |count: usize| {
                let mut places = vec![0; count];
                let sort = sort(&[100], 0, count, ascending, false).expect("small");
                sort.write(&x, compare_floats, None, Some(&mut places));
                places
            };
            assert_eq!(run(7), run(100)[..7], "{ascending}");
        }
    }

    #[test]
    fn a_nan_is_the_greatest() {
        let mut places = [0; 3];
        let sort = sort(&[3], 0, 3, false, false).expect("small");
        sort.write(&[1.0, f32::NAN, 2.0], compare_floats, None, Some(&mut places));
        assert_eq!(places, [1, 2, 0]);
    }
}
