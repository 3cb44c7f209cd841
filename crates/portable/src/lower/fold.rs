//! Evaluates a node whose inputs are all constant, with the same code that runs it in a plan.

use crate::constant::{Const, ConstData};
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::{Layout, Shape, elements};
use crate::op::{Args, In, Op, Out};
use candle_coreml_kernels::{Pool, Scratch, View, ViewMut, copy, round_to_f16};
use candle_coreml_mil::DType;
use std::sync::Arc;

enum Data {
    F32(Arc<[f32]>),
    I32(Arc<[i32]>),
}

impl Data {
    fn of(c: &Const) -> Data {
        match &c.data {
            ConstData::I32(v) => Data::I32(v.clone()),
            // Not kept beside the file.
            ConstData::Stored(_) => Data::F32(c.floats().into()),
            _ => Data::F32(c.dense()),
        }
    }
}

/// Runs `op` on constants.
pub fn evaluate(
    op: &dyn Op,
    inputs: &[&Const],
    outputs: &[(DType, Shape)],
    faithful: bool,
    pool: &Pool,
) -> OpResult<Vec<Const>> {
    if op.is_view() {
        let (Some(c), Some((dtype, _))) = (inputs.first(), outputs.first()) else {
            return Err("internal: a view has one input and one result".into());
        };
        let layout = op
            .view(&Layout::contiguous(&c.shape))
            .ok_or("internal: a row-major view failed")?;
        return Ok(vec![gather_view(c, *dtype, &layout, pool)?]);
    }
    let place = |c: &&Const| -> OpResult<(Data, Layout)> {
        let own = Layout::contiguous(&c.shape);
        let layout = match outputs.first() {
            Some((_, shape)) if op.broadcasts() => own.broadcast(shape).ok_or("shapes do not broadcast")?,
            _ => own,
        };
        Ok((Data::of(c), layout))
    };
    let data = inputs
        .iter()
        .map(place)
        .collect::<OpResult<Vec<(Data, Layout)>>>()?;
    let layouts: Vec<Layout> = outputs.iter().map(|(_, s)| Layout::contiguous(s)).collect();
    let mut floats: Vec<Vec<f32>> = Vec::new();
    let mut ints: Vec<Vec<i32>> = Vec::new();
    for (dtype, shape) in outputs {
        let n = elements(shape);
        let is_float = Storage::of(*dtype) == Storage::F32;
        floats.push(if is_float { vec![0.0; n] } else { Vec::new() });
        ints.push(if is_float { Vec::new() } else { vec![0; n] });
    }
    if let Some((d, _)) = op.updates().and_then(|i| data.get(i)) {
        // The result starts as a copy of the input it changes.
        match (d, floats.first_mut(), ints.first_mut()) {
            (Data::F32(v), Some(to), _) if to.len() == v.len() => to.copy_from_slice(v),
            (Data::I32(v), _, Some(to)) if to.len() == v.len() => to.copy_from_slice(v),
            _ => return Err("internal: an update of another kind".into()),
        }
    }
    let mut scratch = Scratch::default();
    let mut args = Args {
        inputs: Default::default(),
        outputs: Default::default(),
        pool,
        scratch: &mut scratch,
        then: None,
    };
    for (d, l) in &data {
        args.inputs.push(match d {
            Data::F32(v) => In::F32(view(v, l)?),
            Data::I32(v) => In::I32(view(v, l)?),
        });
    }
    for (((dtype, _), l), (f, i)) in outputs.iter().zip(&layouts).zip(floats.iter_mut().zip(&mut ints)) {
        args.outputs.push(Some(match Storage::of(*dtype) {
            Storage::I32 => Out::I32(view_mut(i, l)?),
            _ => Out::F32(view_mut(f, l)?),
        }));
    }
    op.run(&mut args)?;
    drop(args);
    let rows = outputs.iter().zip(floats.into_iter().zip(ints));
    Ok(rows
        .map(|((dtype, shape), (f, i))| finish(*dtype, shape, f, i, faithful))
        .collect())
}

fn finish(dtype: DType, shape: &[usize], mut floats: Vec<f32>, ints: Vec<i32>, faithful: bool) -> Const {
    if Storage::of(dtype) == Storage::I32 {
        return Const::i32(dtype, shape, ints);
    }
    if faithful && dtype == DType::Fp16 {
        round_to_f16(&mut floats);
    }
    Const::f32(dtype, shape, floats)
}

fn gather_view(c: &Const, dtype: DType, layout: &Layout, pool: &Pool) -> OpResult<Const> {
    if layout.is_contiguous()
        && layout.offset == 0
        && elements(&layout.shape) == elements(&c.shape)
        && let Some(same) = c.alias(dtype, &layout.shape)
    {
        return Ok(same);
    }
    let to = Layout::contiguous(&layout.shape);
    Ok(match Data::of(c) {
        Data::F32(v) => {
            let mut out = vec![0.0; elements(&to.shape)];
            copy(pool, view(&v, layout)?, view_mut(&mut out, &to)?);
            Const::f32(dtype, &to.shape, out)
        }
        Data::I32(v) => {
            let mut out = vec![0; elements(&to.shape)];
            copy(pool, view(&v, layout)?, view_mut(&mut out, &to)?);
            Const::i32(dtype, &to.shape, out)
        }
    })
}

fn view<'a, T>(data: &'a [T], l: &'a Layout) -> OpResult<View<'a, T>> {
    View::new(data, l.offset, &l.shape, &l.strides).ok_or_else(outside)
}

fn view_mut<'a, T>(data: &'a mut [T], l: &'a Layout) -> OpResult<ViewMut<'a, T>> {
    ViewMut::new(data, l.offset, &l.shape, &l.strides).ok_or_else(outside)
}

fn outside() -> OpError {
    OpError::new("internal: a view is outside its buffer")
}
