//! Shapes, orders and parts: mostly views. Source: coremltools 9.0, `mil/ops/defs/iOS15/tensor_transformation.py`, iOS16
//! to iOS18.

mod blocks;
mod bounds;
mod lines;

use crate::error::{OpError, OpResult};
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, Strides, elements};
use crate::lower::{OpCx, normalize_axis};
use crate::op::{Args, In, Op, OpSpec, Out, Support, opt, req};
use crate::ops::view::unit_steps;
use candle_coreml_kernels as kernels;
use smallvec::{SmallVec, smallvec};
use std::sync::Arc;

pub use bounds::{Bound, Bounds};

/// `axes` normalised for a value of rank `rank`, sorted.
pub fn sorted_axes(axes: &[i32], rank: usize) -> OpResult<SmallVec<[usize; 6]>> {
    let mut out = axes
        .iter()
        .map(|&a| normalize_axis(a, rank))
        .collect::<OpResult<SmallVec<[usize; 6]>>>()?;
    out.sort_unstable();
    if out.windows(2).any(|w| w[0] == w[1]) {
        return Err(format!("axes {axes:?} name a dimension twice").into());
    }
    Ok(out)
}

fn lower_expand_dims(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let axes = cx.ints("axes")?.ok_or("parameter \"axes\" is missing")?;
    let mut shape = cx.shape(x);
    for a in sorted_axes(&axes, shape.len() + axes.len())? {
        shape.insert(a, 1);
    }
    let y = cx.reshape(x, &shape)?;
    cx.result(y)
}

fn lower_squeeze(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axes = match cx.ints("axes")? {
        Some(axes) => sorted_axes(&axes, shape.len())?,
        None => (0..shape.len()).filter(|&i| shape[i] == 1).collect(),
    };
    // Named dimensions of another size stay, as the operator's documentation says.
    let kept: Shape = (0..shape.len())
        .filter(|i| !axes.contains(i) || shape[*i] != 1)
        .map(|i| shape[i])
        .collect();
    let y = cx.reshape(x, &kept)?;
    cx.result(y)
}

/// The shape a `reshape` asks for: 0 is the input's dimension at the same place from the right, or 1 where it has none; one -1 is
/// whatever is left.
fn wanted_shape(have: &[usize], want: &[i32]) -> OpResult<Shape> {
    let fail = || OpError::new(format!("shape {want:?} does not fit the elements of {have:?}"));
    let mut shape: Shape = SmallVec::new();
    let mut open = None;
    for (i, &w) in want.iter().enumerate() {
        shape.push(match w {
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            0 if elements(have) != 0 => {
                let from_the_right = want.len() - i;
                have.len().checked_sub(from_the_right).map_or(1, |at| have[at])
            }
            w => usize::try_from(w).map_err(|_| fail())?,
        });
    }
    if let Some(i) = open {
        let known = elements(&shape);
        if known == 0 || !elements(have).is_multiple_of(known) {
            return Err(fail());
        }
        shape[i] = elements(have) / known;
    }
    if elements(&shape) == elements(have) {
        Ok(shape)
    } else {
        Err(fail())
    }
}

fn lower_reshape(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let want = cx.ints("shape")?.ok_or("parameter \"shape\" is missing")?;
    let shape = wanted_shape(&cx.shape(x), &want)?;
    let y = cx.reshape(x, &shape)?;
    cx.result(y)
}

fn lower_transpose(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let perm = cx.ints("perm")?.ok_or("parameter \"perm\" is missing")?;
    let rank = cx.shape(x).len();
    let axes = perm
        .iter()
        .map(|&p| normalize_axis(p, rank))
        .collect::<OpResult<SmallVec<[usize; 6]>>>()?;
    if sorted_axes(&perm, rank)?.len() != rank {
        return Err(format!("perm {perm:?} does not name each of {rank} dimensions once").into());
    }
    let y = cx.permute(x, &axes)?;
    cx.result(y)
}

fn lower_reverse(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axes = match cx.ints("axes")? {
        Some(axes) => sorted_axes(&axes, shape.len())?,
        None => (0..shape.len()).collect(),
    };
    let mut begin: Shape = smallvec![0; shape.len()];
    let mut step = unit_steps(shape.len());
    for a in axes {
        begin[a] = shape[a].saturating_sub(1);
        step[a] = -1;
    }
    let y = cx.slice(x, &begin, &step, &shape)?;
    cx.result(y)
}

/// First index and length along one dimension, by Python's rules for `begin:end:step`; `None` bounds are masked.
fn python_range(dim: usize, begin: Option<i32>, end: Option<i32>, step: i32) -> (usize, usize) {
    let d = dim as i64;
    let step = i64::from(step);
    let clamp = |v: i32, low: i64, high: i64| {
        let v = i64::from(v);
        (if v < 0 { v + d } else { v }).clamp(low, high)
    };
    let (first, last) = if step > 0 {
        (
            begin.map_or(0, |b| clamp(b, 0, d)),
            end.map_or(d, |e| clamp(e, 0, d)),
        )
    } else {
        (
            begin.map_or(d - 1, |b| clamp(b, -1, d - 1)),
            end.map_or(-1, |e| clamp(e, -1, d - 1)),
        )
    };
    let n = if step > 0 {
        (last - first + step - 1) / step
    } else {
        (first - last - step - 1) / -step
    };
    let n = n.max(0);
    (if n == 0 { 0 } else { first as usize }, n as usize)
}

/// `begin`, `end`, `stride` and the masks of one slice, with defaults filled in for `rank` dimensions.
struct Masks {
    stride: Vec<i32>,
    begin: Vec<bool>,
    end: Vec<bool>,
    squeeze: Vec<bool>,
}

impl Masks {
    fn read(cx: &mut OpCx<'_, '_>, rank: usize) -> OpResult<Masks> {
        let masks = Masks {
            stride: cx.ints("stride")?.unwrap_or_else(|| vec![1; rank]),
            begin: cx.bools("begin_mask")?.unwrap_or_else(|| vec![false; rank]),
            end: cx.bools("end_mask")?.unwrap_or_else(|| vec![false; rank]),
            squeeze: cx.bools("squeeze_mask")?.unwrap_or_else(|| vec![false; rank]),
        };
        let lengths = [
            masks.stride.len(),
            masks.begin.len(),
            masks.end.len(),
            masks.squeeze.len(),
        ];
        if lengths.iter().any(|&n| n != rank) {
            return Err(format!("stride and masks need {rank} entries, they have {lengths:?}").into());
        }
        if masks.stride.contains(&0) {
            return Err("a stride of 0 is not allowed".into());
        }
        Ok(masks)
    }

    /// First index and length along dimension `i`.
    fn range(&self, i: usize, dim: usize, begin: i32, end: i32) -> OpResult<(usize, usize)> {
        if self.squeeze[i] {
            let at = if begin < 0 {
                i64::from(begin) + dim as i64
            } else {
                i64::from(begin)
            };
            let at = if self.begin[i] { 0 } else { at };
            return match usize::try_from(at) {
                Ok(at) if at < dim => Ok((at, 1)),
                _ => Err(format!("index {begin} is outside dimension {i} of size {dim}").into()),
            };
        }
        let bound = |masked: bool, v: i32| if masked { None } else { Some(v) };
        Ok(python_range(
            dim,
            bound(self.begin[i], begin),
            bound(self.end[i], end),
            self.stride[i],
        ))
    }

    fn ranges(&self, shape: &[usize], begin: &[i32], end: &[i32]) -> OpResult<(Shape, Shape)> {
        if begin.len() != shape.len() || end.len() != shape.len() {
            let text = format!(
                "begin and end need {} entries, they have {} and {}",
                shape.len(),
                begin.len(),
                end.len()
            );
            return Err(text.into());
        }
        let (mut firsts, mut sizes) = (Shape::new(), Shape::new());
        for (i, &len) in shape.iter().enumerate() {
            let (first, size) = self.range(i, len, begin[i], end[i])?;
            firsts.push(first);
            sizes.push(size);
        }
        Ok((firsts, sizes))
    }

    fn steps(&self) -> Strides {
        let one = |(&s, &squeezed): (&i32, &bool)| if squeezed { 1 } else { s as isize };
        self.stride.iter().zip(&self.squeeze).map(one).collect()
    }

    fn squeezed(&self, size: &[usize]) -> Shape {
        size.iter()
            .zip(&self.squeeze)
            .filter(|(_, s)| !**s)
            .map(|(n, _)| *n)
            .collect()
    }
}

fn lower_slice_by_index(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, begin, end) = (cx.value("x")?, cx.value("begin")?, cx.value("end")?);
    let shape = cx.shape(x);
    let masks = Masks::read(cx, shape.len())?;
    let (Some(b), Some(e)) = (cx.constant(begin), cx.constant(end)) else {
        return lower_moving_slice(cx, x, begin, end, masks);
    };
    let (b, e) = (
        b.ints().ok_or("begin must be integers")?,
        e.ints().ok_or("end must be integers")?,
    );
    let (first, size) = masks.ranges(&shape, b, e)?;
    let part = cx.slice(x, &first, &masks.steps(), &size)?;
    let y = cx.reshape(part, &masks.squeezed(&size))?;
    cx.result(y)
}

/// A slice whose place is known only when the model runs, while its shape is declared by the file.
fn lower_moving_slice(
    cx: &mut OpCx<'_, '_>,
    x: ValueId,
    begin: ValueId,
    end: ValueId,
    masks: Masks,
) -> OpResult<()> {
    let declared = cx.declared(0).and_then(|t| t.fixed_shape());
    let kept: Shape = declared.ok_or_else(|| OpError::Dynamic("begin".into()))?.into();
    let mut size: Shape = SmallVec::new();
    let mut rest = kept.iter();
    for &squeezed in &masks.squeeze {
        size.push(if squeezed {
            1
        } else {
            *rest.next().ok_or("the declared shape has too few dimensions")?
        });
    }
    let dtype = cx.dtype(x);
    let region = Region {
        shape: cx.shape(x),
        size: size.clone(),
        masks,
    };
    let part = cx.emit(MovingSlice(region), &[x, begin, end], dtype, &size)?;
    let y = cx.reshape(part, &kept)?;
    cx.result(y)
}

/// A part of a value that starts where the model's own numbers say.
#[derive(Debug)]
struct Region {
    shape: Shape,
    size: Shape,
    masks: Masks,
}

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stride {:?}", self.stride)
    }
}

impl Region {
    /// The layout of a part without masks and strides whose bounds lie inside: most are like this.
    fn plain(&self, whole: &Layout, begin: &[i32], end: &[i32]) -> Option<Layout> {
        let Masks {
            stride,
            begin: masked,
            end: open,
            squeeze,
        } = &self.masks;
        let plain =
            stride.iter().all(|&n| n == 1) && ![masked, open, squeeze].iter().any(|m| m.contains(&true));
        if !plain || begin.len() != self.size.len() || end.len() != self.size.len() {
            return None;
        }
        let mut part = Layout {
            offset: whole.offset,
            shape: self.size.clone(),
            strides: whole.strides.clone(),
        };
        for (i, &size) in self.size.iter().enumerate() {
            let (first, last) = (usize::try_from(begin[i]).ok()?, usize::try_from(end[i]).ok()?);
            if last > self.shape[i] || first.checked_add(size) != Some(last) {
                return None;
            }
            part.offset = part
                .offset
                .checked_add_signed(first as isize * whole.strides[i])?;
        }
        Some(part)
    }

    /// The layout of the part inside a value laid out as `whole`.
    fn locate(&self, whole: &Layout, begin: &[i32], end: &[i32]) -> OpResult<Layout> {
        if let Some(part) = self.plain(whole, begin, end) {
            return Ok(part);
        }
        let (first, size) = self.masks.ranges(&self.shape, begin, end)?;
        if size != self.size {
            let (have, want) = (size.as_slice(), self.size.as_slice());
            let text = format!(
                "begin {begin:?} and end {end:?} select {have:?} of shape {:?}, not {want:?}",
                self.shape.as_slice()
            );
            return Err(text.into());
        }
        Ok(whole.slice(&first, &self.masks.steps(), &self.size))
    }
}

/// `slice_by_index` with computed bounds.
#[derive(Debug)]
pub struct MovingSlice(Region);

impl Op for MovingSlice {
    fn name(&self) -> &'static str {
        "moving_slice"
    }

    fn accepts(&self, index: usize, layout: &Layout, _storage: Storage) -> bool {
        index == 0 || layout.is_contiguous()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (begin, end) = (args.i32s(1)?, args.i32s(2)?);
        let x = args.inputs.first().copied().ok_or("internal: no input")?;
        let whole = match x {
            In::F32(v) => layout_of(v.offset(), v.shape(), v.strides()),
            In::F16(v) => layout_of(v.offset(), v.shape(), v.strides()),
            In::I32(v) => layout_of(v.offset(), v.shape(), v.strides()),
            In::Result => return Err("internal: a slice is not made in place".into()),
        };
        let part = self.0.locate(&whole, begin, end)?;
        match x {
            In::F32(v) => {
                let y = args.out_f32(0)?;
                kernels::copy(args.pool, sub(v, &part)?, y);
            }
            In::F16(v) => {
                let y = args.out_f32(0)?;
                kernels::copy(args.pool, sub(v, &part)?, y);
            }
            In::I32(v) => {
                let y = args.out_i32(0)?;
                kernels::copy(args.pool, sub(v, &part)?, y);
            }
            In::Result => {}
        }
        Ok(())
    }
}

fn layout_of(offset: usize, shape: &[usize], strides: &[isize]) -> Layout {
    Layout {
        offset,
        shape: shape.into(),
        strides: strides.into(),
    }
}

fn sub<'a, T>(v: kernels::View<'a, T>, part: &'a Layout) -> OpResult<kernels::View<'a, T>> {
    kernels::View::new(v.data(), part.offset, &part.shape, &part.strides)
        .ok_or_else(|| "internal: a part lies outside its value".into())
}

/// `slice_update`: a copy of `x` with a part replaced; where nobody needs the old `x`, only the part is written.
#[derive(Debug)]
pub struct SliceUpdate {
    region: Arc<Region>,
    begin: Bounds,
    end: Bounds,
}

impl Op for SliceUpdate {
    fn name(&self) -> &'static str {
        "slice_update"
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        match index {
            0 => true,
            1 => storage != Storage::F16,
            _ => layout.is_contiguous(),
        }
    }

    fn updates(&self) -> Option<usize> {
        Some(0)
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (begin, end) = (self.begin.read(args)?, self.end.read(args)?);
        let (begin, end) = (begin.as_slice(), end.as_slice());
        let out = args
            .outputs
            .first_mut()
            .and_then(Option::take)
            .ok_or("internal: no result")?;
        match out {
            Out::F32(y) => self.write(args.pool, args.f32(1)?, y, begin, end),
            Out::F16(y) => self.write(args.pool, args.f32(1)?, y, begin, end),
            Out::I32(y) => self.write(args.pool, args.i32(1)?, y, begin, end),
        }
    }
}

impl SliceUpdate {
    /// The same with its part given otherwise.
    pub fn with_bounds(&self, begin: Bounds, end: Bounds) -> SliceUpdate {
        let region = self.region.clone();
        SliceUpdate { region, begin, end }
    }

    fn write<S, D>(
        &self,
        pool: &kernels::Pool,
        update: kernels::View<'_, S>,
        y: kernels::ViewMut<'_, D>,
        begin: &[i32],
        end: &[i32],
    ) -> OpResult<()>
    where
        S: kernels::ConvertTo<D>,
        D: Copy + Send + Sync,
    {
        let part = self
            .region
            .locate(&layout_of(y.offset(), y.shape(), y.strides()), begin, end)?;
        let from = layout_of(update.offset(), update.shape(), update.strides());
        let from = from
            .reshape(&self.region.size)
            .ok_or("internal: the update's shape does not fit")?;
        let y = kernels::ViewMut::new(y.into_data(), part.offset, &part.shape, &part.strides);
        let y = y.ok_or("internal: a part lies outside its value")?;
        kernels::copy(pool, sub(update, &from)?, y);
        Ok(())
    }
}

fn lower_slice_update(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, update) = (cx.value("x")?, cx.value("update")?);
    let (begin, end) = (cx.value("begin")?, cx.value("end")?);
    let shape = cx.shape(x);
    let masks = Masks::read(cx, shape.len())?;
    let given = cx.shape(update);
    let mut size: Shape = SmallVec::new();
    let mut rest = given.iter();
    for &squeezed in &masks.squeeze {
        size.push(if squeezed { 1 } else { *rest.next().unwrap_or(&1) });
    }
    if elements(&size) != elements(&given) {
        let text = format!(
            "update {:?} does not fit a part of {:?}",
            given.as_slice(),
            shape.as_slice()
        );
        return Err(text.into());
    }
    let dtype = cx.dtype(x);
    let region = Region {
        shape: shape.clone(),
        size,
        masks,
    };
    let op = SliceUpdate {
        region: Arc::new(region),
        begin: Bounds::Input(2),
        end: Bounds::Input(3),
    };
    let y = cx.emit(op, &[x, update, begin, end], dtype, &shape)?;
    cx.result(y)
}

fn lower_slice_by_size(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let begin = cx.ints("begin")?.ok_or("parameter \"begin\" is missing")?;
    let size = cx.ints("size")?.ok_or("parameter \"size\" is missing")?;
    if begin.len() != shape.len() || size.len() != shape.len() {
        return Err(format!("begin and size need {} entries", shape.len()).into());
    }
    let mut first: Shape = SmallVec::new();
    let mut count: Shape = SmallVec::new();
    for ((&d, &b), &n) in shape.iter().zip(&begin).zip(&size) {
        let at = i64::from(b) + if b < 0 { d as i64 } else { 0 };
        let n = if n == -1 { d as i64 - at } else { i64::from(n) };
        if at < 0 || n < 0 || at + n > d as i64 {
            return Err(format!(
                "begin {begin:?} and size {size:?} leave shape {:?}",
                shape.as_slice()
            )
            .into());
        }
        first.push(at as usize);
        count.push(n as usize);
    }
    let y = cx.slice(x, &first, &unit_steps(shape.len()), &count)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $since:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "tensor_transformation",
            since: $since,
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "batch_to_space",
        "iOS15",
        &[req("x"), req("block_shape"), req("crops")],
        blocks::lower_batch_to_space
    ),
    row!(
        "depth_to_space",
        "iOS15",
        &[req("x"), req("block_size")],
        blocks::lower_depth_to_space
    ),
    row!(
        "pixel_shuffle",
        "iOS15",
        &[req("x"), req("upscale_factor")],
        blocks::lower_pixel_shuffle
    ),
    row!(
        "pixel_unshuffle",
        "iOS16",
        &[req("x"), req("downscale_factor")],
        blocks::lower_pixel_unshuffle
    ),
    row!(
        "reshape_like",
        "iOS16",
        &[
            req("x"),
            req("ref_tensors"),
            req("begins"),
            req("ends"),
            req("end_masks"),
        ],
        lines::lower_reshape_like
    ),
    row!(
        "reverse_sequence",
        "iOS15",
        &[req("x"), req("lengths"), opt("seq_axis"), opt("batch_axis")],
        lines::lower_reverse_sequence
    ),
    row!(
        "sliding_windows",
        "iOS15",
        &[req("x"), req("axis"), req("size"), opt("stride")],
        lines::lower_sliding_windows
    ),
    row!(
        "space_to_batch",
        "iOS15",
        &[req("x"), req("block_shape"), req("paddings")],
        blocks::lower_space_to_batch
    ),
    row!(
        "space_to_depth",
        "iOS15",
        &[req("x"), req("block_size")],
        blocks::lower_space_to_depth
    ),
    row!(
        "expand_dims",
        "iOS15",
        &[req("x"), req("axes")],
        lower_expand_dims
    ),
    row!("reshape", "iOS15", &[req("x"), req("shape")], lower_reshape),
    row!("reverse", "iOS15", &[req("x"), opt("axes")], lower_reverse),
    row!(
        "slice_by_size",
        "iOS15",
        &[req("x"), req("begin"), req("size")],
        lower_slice_by_size
    ),
    row!("squeeze", "iOS15", &[req("x"), opt("axes")], lower_squeeze),
    row!("transpose", "iOS15", &[req("x"), req("perm")], lower_transpose),
    row!(
        "slice_by_index",
        "iOS15",
        &[
            req("x"),
            req("begin"),
            req("end"),
            opt("stride"),
            opt("begin_mask"),
            opt("end_mask"),
            opt("squeeze_mask"),
        ],
        lower_slice_by_index
    ),
    row!(
        "slice_update",
        "iOS18",
        &[
            req("x"),
            req("update"),
            req("begin"),
            req("end"),
            opt("stride"),
            opt("begin_mask"),
            opt("end_mask"),
            opt("squeeze_mask"),
        ],
        lower_slice_update
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_follow_python() {
        // (dimension, begin, end, step) -> (first, length), checked against Python's slice.indices.
        let rows = [
            ((5, Some(1), Some(4), 1), (1, 3)),
            ((5, Some(-2), None, 1), (3, 2)),
            ((5, None, Some(-1), 2), (0, 2)),
            ((5, None, None, -1), (4, 5)),
            ((5, Some(3), Some(0), -2), (3, 2)),
            ((5, Some(4), Some(2), 1), (0, 0)),
            ((5, Some(0), Some(99), 3), (0, 2)),
            ((0, None, None, 1), (0, 0)),
        ];
        for ((dim, b, e, s), want) in rows {
            assert_eq!(python_range(dim, b, e, s), want, "{b:?}:{e:?}:{s} of {dim}");
        }
    }

    #[test]
    fn reshape_keeps_and_infers_dimensions() {
        let rows: [(&[usize], &[i32], &[usize]); 5] = [
            (&[2, 3, 4], &[0, -1, 1], &[2, 12, 1]),
            (&[2, 3, 4], &[-1, 0], &[6, 4]),
            (&[2, 3, 4], &[0, 8], &[3, 8]),
            (&[2, 50], &[1, 0, -1, 0], &[1, 1, 2, 50]),
            (&[], &[0, 0], &[1, 1]),
        ];
        for (have, want, shape) in rows {
            let found = wanted_shape(have, want).map(|s| s.to_vec());
            assert!(
                found.as_ref().is_ok_and(|s| s == shape),
                "{have:?} {want:?}: {found:?}"
            );
        }
        assert!(wanted_shape(&[2, 3], &[4, -1]).is_err());
        assert!(wanted_shape(&[2, 3], &[-1, -1]).is_err());
        assert!(wanted_shape(&[2, 3], &[7]).is_err());
    }
}
