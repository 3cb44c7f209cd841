//! Lists of tensors. Source: coremltools 9.0, `mil/ops/defs/iOS15/control_flow.py`.
//!
//! A list is known only when the model runs: all of these are evaluated between stages. A list that nobody needs any more
//! is changed in place, so that a loop appends in constant time.

use crate::constant::{Const, ConstData};
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::item::{Item, List};
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, opt, req};
use candle_coreml_mil::{DType, Dim, ValueType};
use std::sync::Arc;

/// A parameter's elements, which are known when lists are.
fn known(cx: &mut OpCx<'_, '_>, param: &str) -> OpResult<Arc<Const>> {
    let id = cx.value(param)?;
    cx.constant(id).ok_or_else(|| OpError::Dynamic(param.into()))
}

/// The shape of a new list's elements; the declared type of the result says it where `elem_shape` is left out.
fn element_shape(cx: &mut OpCx<'_, '_>) -> OpResult<Vec<Option<usize>>> {
    if cx.operation().input("elem_shape").is_none() {
        let declared = cx.operation().outputs.first().map(|out| &out.ty);
        let Some(ValueType::List { element, .. }) = declared else {
            return Ok(Vec::new());
        };
        let dims = element.tensor().map(|t| t.shape.as_slice()).unwrap_or_default();
        let size = |d: &Dim| match d {
            Dim::Fixed(n) => Some(*n),
            Dim::Unknown | Dim::Variadic => None,
        };
        return Ok(dims.iter().map(size).collect());
    }
    let mut shape = Vec::new();
    for id in cx.values("elem_shape")? {
        match cx.constant(id).map(|c| c.data.clone()) {
            Some(ConstData::I32(dims)) => {
                for &d in dims.iter() {
                    let size = usize::try_from(d).map_err(|_| format!("elem_shape has {d}"))?;
                    shape.push(Some(size));
                }
            }
            // A name stands for a dimension that is known when the first element is written.
            Some(ConstData::Strings(_)) => shape.push(None),
            _ => return Err("elem_shape must be integers or names".into()),
        }
    }
    Ok(shape)
}

fn lower_make_list(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let dtype = cx.text("dtype")?;
    let dtype = dtype.as_deref().unwrap_or("fp32");
    let dtype = DType::from_name(dtype).ok_or_else(|| format!("dtype {dtype:?} is not known"))?;
    let element = element_shape(cx)?;
    let dynamic = cx.flag("dynamic_length", true)?;
    cx.needs_values("init_length")?;
    let length = cx.int("init_length")?.unwrap_or(1);
    let list = List::new(dtype, element, length, dynamic)?;
    cx.result_item(Item::List(Arc::new(list)))
}

fn lower_list_length(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let list = cx.list("ls")?;
    let length = i32::try_from(list.len()).unwrap_or(i32::MAX);
    let y = cx.add_i32(DType::Int32, &[], vec![length]);
    cx.result(y)
}

fn lower_list_read(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let list = cx.list("ls")?;
    let index = cx.int("index")?.ok_or("parameter \"index\" is missing")?;
    let y = cx.add_shared(list.read(index)?);
    cx.result(y)
}

fn lower_list_write(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let mut list = cx.list("ls")?;
    let index = cx.int("index")?.ok_or("parameter \"index\" is missing")?;
    let value = known(cx, "value")?;
    Arc::make_mut(&mut list).write(index, value)?;
    cx.result_item(Item::List(list))
}

fn lower_list_gather(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let list = cx.list("ls")?;
    let indices = cx.ints("indices")?.ok_or("parameter \"indices\" is missing")?;
    let y = cx.add_const(list.gather(&indices)?);
    cx.result(y)
}

fn lower_list_scatter(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let mut list = cx.list("ls")?;
    let indices = cx.ints("indices")?.ok_or("parameter \"indices\" is missing")?;
    let values = known(cx, "value")?;
    let changed = Arc::make_mut(&mut list);
    for (&index, row) in indices.iter().zip(rows(&values, indices.len())?) {
        changed.write(index, Arc::new(row))?;
    }
    cx.result_item(Item::List(list))
}

/// The parts of a value along its first dimension, which must be `count`.
fn rows(value: &Const, count: usize) -> OpResult<Vec<Const>> {
    let Some((&have, rest)) = value.shape.split_first().filter(|(n, _)| **n == count) else {
        return Err(format!(
            "value {:?} does not give {count} elements",
            value.shape.as_slice()
        )
        .into());
    };
    let shape: Shape = rest.into();
    let size = elements(&shape);
    let part = |i: usize| match Storage::of(value.dtype) {
        Storage::I32 => {
            let all = value.ints().unwrap_or(&[]);
            let one = all.get(i * size..(i + 1) * size).unwrap_or(&[]);
            Const::i32(value.dtype, &shape, one.to_vec())
        }
        _ => {
            let one = value.floats().get(i * size..(i + 1) * size).unwrap_or(&[]);
            Const::f32(value.dtype, &shape, one.to_vec())
        }
    };
    Ok((0..have).map(part).collect())
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "control_flow",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This file's rows.
pub const OPS: &[&OpSpec] = &[
    row!("list_gather", &[req("ls"), req("indices")], lower_list_gather),
    row!("list_length", &[req("ls")], lower_list_length),
    row!("list_read", &[req("ls"), req("index")], lower_list_read),
    row!(
        "list_scatter",
        &[req("ls"), req("indices"), req("value")],
        lower_list_scatter
    ),
    row!(
        "list_write",
        &[req("ls"), req("index"), req("value")],
        lower_list_write
    ),
    row!(
        "make_list",
        &[
            opt("init_length"),
            opt("dynamic_length"),
            opt("elem_shape"),
            opt("dtype")
        ],
        lower_make_list
    ),
];
