//! `reverse_sequence`, `sliding_windows` and `reshape_like`.

use crate::error::{OpError, OpResult};
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use crate::ops::dense::Pair;
use crate::ops::scatter_gather::Gather;
use candle_coreml_mil::DType;

/// The first `lengths[b]` elements along one dimension in the opposite order, `b` the index along another.
#[derive(Debug)]
pub struct ReverseSequence {
    shape: Shape,
    seq: usize,
    batch: usize,
}

impl ReverseSequence {
    fn turn<T: Copy>(&self, x: &[T], lengths: &[i32], y: &mut [T]) -> OpResult<()> {
        let step = |axis: usize| elements(&self.shape[axis + 1..]);
        let (seq_step, batch_step) = (step(self.seq), step(self.batch));
        let (len, count) = (self.shape[self.seq], self.shape[self.batch]);
        for (i, y) in y.iter_mut().enumerate() {
            let (s, b) = (i / seq_step % len, i / batch_step % count);
            let n = lengths.get(b).copied().unwrap_or(0);
            let turned = usize::try_from(n).ok().filter(|&n| n <= len);
            let turned = turned.ok_or_else(|| OpError::new(format!("length {n} is outside 0..={len}")))?;
            let from = if s < turned { turned - 1 - s } else { s };
            *y = x[i - s * seq_step + from * seq_step];
        }
        Ok(())
    }
}

impl Op for ReverseSequence {
    fn name(&self) -> &'static str {
        "reverse_sequence"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let lengths = args.i32s(1)?;
        match args.pair()? {
            Pair::F32(x, y) => self.turn(x, lengths, y),
            Pair::I32(x, y) => self.turn(x, lengths, y),
        }
    }
}

/// Lowers `reverse_sequence`.
pub fn lower_reverse_sequence(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, lengths) = (cx.value("x")?, cx.value("lengths")?);
    let shape = cx.shape(x);
    let seq = cx.axis("seq_axis", shape.len(), None)?;
    let batch = cx.axis("batch_axis", shape.len(), Some(0))?;
    if cx.shape(lengths).as_slice() != [shape[batch]] {
        return Err(format!("lengths must be [{}]", shape[batch]).into());
    }
    let op = ReverseSequence {
        shape: shape.clone(),
        seq,
        batch,
    };
    let y = cx.emit(op, &[x, lengths], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// Lowers `sliding_windows`: elements gathered along the axis by the indices of the windows, `[windows, size]`.
pub fn lower_sliding_windows(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let have = cx.shape(x);
    let axis = cx.axis("axis", have.len(), None)?;
    let mut number = |param: &str, default: Option<i32>| -> OpResult<usize> {
        let v = cx.int(param)?.or(default).and_then(|v| usize::try_from(v).ok());
        v.filter(|&v| v > 0)
            .ok_or_else(|| format!("{param} must be a number of 1 and more").into())
    };
    let (size, stride) = (number("size", None)?, number("stride", Some(1))?);
    let room = have[axis].checked_sub(size);
    let room = room.ok_or_else(|| format!("windows of {size} do not fit a dimension of {}", have[axis]))?;
    let count = room / stride + 1;
    let index = |i: usize| i32::try_from(i / size * stride + i % size);
    let indices = (0..count * size).map(index).collect::<Result<Vec<i32>, _>>();
    let indices = indices.map_err(|_| "a dimension is too large for windows")?;
    let indices = cx.add_i32(DType::Int32, &[count, size], indices);
    let mut shape: Shape = have.clone();
    shape[axis] = count;
    shape.insert(axis + 1, size);
    let op = Gather::new(&have, axis, 0);
    let y = cx.emit(op, &[x, indices], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// Lowers `reshape_like`: the shape is put together from parts of the shapes of other values.
pub fn lower_reshape_like(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let like = cx.values("ref_tensors")?;
    let mut numbers = |param: &str| -> OpResult<Vec<i32>> {
        let mut all = Vec::new();
        for v in cx.values(param)? {
            let c = cx.constant(v).ok_or_else(|| OpError::Dynamic(param.into()))?;
            all.extend_from_slice(c.ints().ok_or_else(|| format!("{param} must be integers"))?);
        }
        Ok(all)
    };
    let (begins, ends, masks) = (numbers("begins")?, numbers("ends")?, numbers("end_masks")?);
    if [begins.len(), ends.len(), masks.len()] != [like.len(); 3] {
        return Err(format!("begins, ends and end_masks need {} entries", like.len()).into());
    }
    let mut shape = Shape::new();
    for (i, v) in like.into_iter().enumerate() {
        let dims = cx.shape(v);
        let rank = dims.len() as i64;
        let place = |at: i32| {
            let at = i64::from(at);
            (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize
        };
        let (from, to) = (
            place(begins[i]),
            if masks[i] != 0 { dims.len() } else { place(ends[i]) },
        );
        shape.extend_from_slice(dims.get(from..to).unwrap_or_default());
    }
    if elements(&shape) != elements(&cx.shape(x)) {
        let (have, want) = (cx.shape(x), shape.as_slice());
        return Err(format!(
            "shape {want:?} does not fit the elements of {:?}",
            have.as_slice()
        )
        .into());
    }
    let y = cx.reshape(x, &shape)?;
    cx.result(y)
}
