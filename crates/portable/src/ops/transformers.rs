//! Attention. Source: coremltools 9.0, `mil/ops/defs/iOS18/transformers.py`.

use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, opt, req};
use crate::ops::broadcast_shape;
use crate::ops::linear::{batch, layout_of};
use candle_coreml_kernels::{self as kernels, Arithmetic, Operand};
use candle_coreml_mil::DType;

/// `softmax(scale * q kᵀ + mask) v` for `q [.., H, S, D]`, `k, v [.., Hkv, T, D]`, H a multiple of Hkv, an optional mask that
/// broadcasts to `[.., H, S, T]`.
///
/// Key positions whose mask is minus infinity for every query are not read.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Multiplies the scores.
    pub scale: f32,
    /// How sums are made when there are many queries.
    pub arithmetic: Arithmetic,
}

fn operand<'a>(input: &In<'a>, l: &'a Layout) -> OpResult<Operand<'a>> {
    let bad = "internal: a head lies outside its value";
    Ok(match input {
        In::F32(v) => Operand::F32(kernels::View::new(v.data(), l.offset, &l.shape, &l.strides).ok_or(bad)?),
        In::F16(v) => Operand::F16(kernels::View::new(v.data(), l.offset, &l.shape, &l.strides).ok_or(bad)?),
        _ => return Err("internal: attention reads floats".into()),
    })
}

fn input_layout(input: &In<'_>) -> OpResult<Layout> {
    match input {
        In::F32(v) => Ok(layout_of(v)),
        In::F16(v) => Ok(layout_of(v)),
        _ => Err("internal: attention reads floats".into()),
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn accepts(&self, index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 || ((index == 1 || index == 2) && storage == Storage::F16)
    }

    fn output_layout(&self, _inputs: &[&Layout], shape: &[usize]) -> Layout {
        // Positions before heads in memory: what the output projection reads next.
        let rank = shape.len();
        let mut order: Shape = (0..rank).collect();
        order.swap(rank - 3, rank - 2);
        let turned: Shape = order.iter().map(|&i| shape[i]).collect();
        Layout::contiguous(&turned).permute(&order)
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        // Scores and mixing over every key; masked ones, which are not read, included.
        let keys = inputs[1].shape[inputs[1].shape.len() - 2];
        2 * keys as u64 * (elements(&inputs[0].shape) + elements(&outputs[0].shape)) as u64
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (q, y) = (args.f32(0)?, args.out_f32(0)?);
        let (k, v) = (args.inputs[1], args.inputs[2]);
        let (lq, lk, lv) = (layout_of(&q), input_layout(&k)?, input_layout(&v)?);
        let ly = Layout {
            offset: y.offset(),
            shape: y.shape().into(),
            strides: y.strides().into(),
        };
        let y = y.into_data();
        let lead = lq.shape.len() - 2;
        let mut scores: Shape = lq.shape[..lead + 1].into();
        scores.push(lk.shape[lead]);
        let mask = match args.inputs.get(3) {
            Some(In::F32(m)) => {
                let l = layout_of(m)
                    .broadcast(&scores)
                    .ok_or("internal: the mask does not broadcast")?;
                Some((m.data(), l))
            }
            _ => None,
        };
        for i in 0..elements(&lq.shape[..lead - 1]) {
            let (bq, bk, bv) = (batch(&lq, lead, i), batch(&lk, lead, i), batch(&lv, lead, i));
            let by = batch(&ly, lead, i);
            let bm = mask.as_ref().map(|(data, l)| (*data, batch(l, lead, i)));
            let bad = "internal: a head lies outside its value";
            let mask = match &bm {
                Some((data, l)) => Some(kernels::View::new(data, l.offset, &l.shape, &l.strides).ok_or(bad)?),
                None => None,
            };
            let call = kernels::Attention {
                q: kernels::View::new(q.data(), bq.offset, &bq.shape, &bq.strides).ok_or(bad)?,
                k: operand(&k, &bk)?,
                v: operand(&v, &bv)?,
                mask,
                scale: self.scale,
                arithmetic: self.arithmetic,
            };
            let out = kernels::ViewMut::new(y, by.offset, &by.shape, &by.strides).ok_or(bad)?;
            kernels::attention(args.pool, &call, out, args.scratch);
        }
        Ok(())
    }
}

/// A truth mask as numbers to add: 0 where it holds, minus infinity elsewhere.
fn additive(cx: &mut OpCx<'_, '_>, mask: ValueId, dtype: DType) -> OpResult<ValueId> {
    if cx.dtype(mask).is_float() {
        return Ok(mask);
    }
    let zero = cx.add_f32(dtype, &[], vec![0.0]);
    let low = cx.add_f32(dtype, &[], vec![f32::NEG_INFINITY]);
    let shape = cx.shape(mask);
    cx.emit(super::control_flow::Select, &[mask, zero, low], dtype, &shape)
}

fn lower_attention(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (mut q, mut k, mut v) = (cx.value("query")?, cx.value("key")?, cx.value("value")?);
    let mask = cx.optional("attn_mask")?;
    let dtype = cx.dtype(q);
    let declared_rank = cx.shape(q).len();
    if declared_rank == 3 {
        // One head: the batch takes its place.
        for x in [&mut q, &mut k, &mut v] {
            let mut shape = cx.shape(*x);
            shape.insert(1, 1);
            *x = cx.reshape(*x, &shape)?;
        }
    }
    let (sq, sk, sv) = (cx.shape(q), cx.shape(k), cx.shape(v));
    let rank = sq.len();
    let text = || {
        format!(
            "query {:?}, key {:?} and value {:?} do not fit",
            sq.as_slice(),
            sk.as_slice(),
            sv.as_slice()
        )
    };
    if rank < 3 || sk.len() != rank || sv.len() != rank {
        return Err(text().into());
    }
    let (lead, d) = (rank - 2, sq[rank - 1]);
    let batch_shape = broadcast_shape(&broadcast_shape(&sq[..lead], &sk[..lead])?, &sv[..lead])?;
    if sk[rank - 1] != d || sk[lead] != sv[lead] {
        return Err(text().into());
    }
    let widen = |cx: &mut OpCx<'_, '_>, x: ValueId, s: &[usize]| {
        let mut shape = batch_shape.clone();
        shape.extend_from_slice(&s[lead..]);
        cx.broadcast(x, &shape)
    };
    let (q, k, v) = (widen(cx, q, &sq)?, widen(cx, k, &sk)?, widen(cx, v, &sv)?);
    let mut inputs = vec![q, k, v];
    if let Some(m) = mask {
        let m = additive(cx, m, dtype)?;
        let mut shape = cx.shape(m);
        if declared_rank == 3 && shape.len() == 3 {
            shape.insert(1, 1);
        }
        inputs.push(cx.reshape(m, &shape)?);
    }
    let mut shape = batch_shape;
    shape.extend_from_slice(&[sq[lead], sv[rank - 1]]);
    let scale = 1.0 / (d as f32).sqrt();
    let arithmetic = cx.arithmetic();
    let mut y = cx.emit(Attention { scale, arithmetic }, &inputs, dtype, &shape)?;
    if declared_rank == 3 {
        shape.remove(1);
        y = cx.reshape(y, &shape)?;
    }
    cx.result(y)
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[&OpSpec {
    name: "scaled_dot_product_attention",
    family: "transformers",
    since: "iOS18",
    inputs: &[req("query"), req("key"), req("value"), opt("attn_mask")],
    outputs: Some(1),
    support: Support::Full,
    tolerance: 1e-5,
    lower: lower_attention,
}];
