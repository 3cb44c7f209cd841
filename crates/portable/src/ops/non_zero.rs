//! Places of elements. Source: coremltools 9.0, `mil/ops/defs/iOS15/tensor_operation.py`.

use crate::error::OpResult;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, req};
use candle_coreml_mil::DType;

/// `non_zero(x [*d, T]) -> [n, rank] i32`: the index of every element that is not 0, in row-major order. `n` depends on
/// the elements, so it is evaluated when they are known.
fn lower_non_zero(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let Some(c) = cx.constant(x) else {
        return Err(crate::OpError::Dynamic("x".into()));
    };
    let found: Vec<usize> = match c.ints() {
        Some(v) => places(v, |v| *v != 0),
        None => places(c.floats(), |v| *v != 0.0),
    };
    let mut out = Vec::with_capacity(found.len() * shape.len());
    for at in &found {
        push_index(*at, &shape, &mut out);
    }
    let y = cx.add_i32(DType::Int32, &[found.len(), shape.len()], out);
    cx.result(y)
}

fn places<T>(values: &[T], wanted: impl Fn(&T) -> bool) -> Vec<usize> {
    let each = values.iter().enumerate();
    each.filter(|(_, v)| wanted(v)).map(|(i, _)| i).collect()
}

/// Appends the index along each dimension of element `at` of a row-major value.
fn push_index(at: usize, shape: &Shape, out: &mut Vec<i32>) {
    let mut size: usize = shape.iter().product();
    let mut rest = at;
    for &d in shape {
        size /= d.max(1);
        out.push(i32::try_from(rest / size.max(1)).unwrap_or(i32::MAX));
        rest %= size.max(1);
    }
}

/// This file's rows.
pub const OPS: &[&OpSpec] = &[&OpSpec {
    name: "non_zero",
    family: "tensor_operation",
    since: "iOS15",
    inputs: &[req("x")],
    outputs: Some(1),
    support: Support::Full,
    tolerance: 0.0,
    lower: lower_non_zero,
}];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_counts_along_each_dimension() {
        let mut out = Vec::new();
        push_index(17, &[2usize, 3, 4].as_slice().into(), &mut out);
        assert_eq!(out, [1, 1, 1]);
        out.clear();
        push_index(0, &Shape::new(), &mut out);
        assert!(out.is_empty());
    }
}
