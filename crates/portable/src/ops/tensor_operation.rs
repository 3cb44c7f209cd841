//! Joining, repeating, padding and shapes. Source: coremltools 9.0, `mil/ops/defs/iOS15/tensor_operation.py`.

mod nms;
mod scan;
mod sort;

use crate::error::{OpError, OpResult};
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Out, Support, opt, req};
use crate::ops::view::unit_steps;
use candle_coreml_kernels as kernels;
use candle_coreml_mil::DType;
use smallvec::smallvec;

/// Inputs one after the other along an axis.
#[derive(Debug)]
pub struct Concat {
    /// The axis.
    pub axis: usize,
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, _storage: Storage) -> bool {
        true
    }

    fn output_layout(&self, inputs: &[&Layout], shape: &[usize]) -> Layout {
        // The order of dimensions that all inputs have in memory: pictures stay with channels last.
        let like = |l: &&Layout| {
            let whole = Layout {
                shape: shape.into(),
                ..(*l).clone()
            };
            let known = l
                .shape
                .iter()
                .zip(shape)
                .all(|(have, want)| *have != 1 || *want == 1);
            known.then(|| whole.dense_like())
        };
        match inputs.first().and_then(like) {
            Some(first) if inputs.iter().all(|l| like(l).as_ref() == Some(&first)) => first,
            _ => Layout::contiguous(shape),
        }
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let mut out = args
            .outputs
            .first_mut()
            .and_then(Option::take)
            .ok_or("internal: no result")?;
        let mut at = 0;
        for i in 0..args.inputs.len() {
            let pool = args.pool;
            let n = match (&mut out, args.inputs[i]) {
                (Out::F32(y), In::F32(x)) => put(pool, x, y, self.axis, at)?,
                (Out::F32(y), In::F16(x)) => put(pool, x, y, self.axis, at)?,
                (Out::I32(y), In::I32(x)) => put(pool, x, y, self.axis, at)?,
                _ => return Err("internal: inputs and result of concat differ in kind".into()),
            };
            at += n;
        }
        Ok(())
    }
}

/// Copies `x` into `y` from index `at` of `axis`; gives the length of `x` there.
fn put<S: kernels::ConvertTo<D>, D: Copy + Send + Sync>(
    pool: &kernels::Pool,
    x: kernels::View<'_, S>,
    y: &mut kernels::ViewMut<'_, D>,
    axis: usize,
    at: usize,
) -> OpResult<usize> {
    let whole = Layout {
        offset: y.offset(),
        shape: y.shape().into(),
        strides: y.strides().into(),
    };
    let mut begin: Shape = smallvec![0; whole.shape.len()];
    begin[axis] = at;
    let part = whole.slice(&begin, &unit_steps(begin.len()), x.shape());
    let y = kernels::ViewMut::new(y.reborrow().into_data(), part.offset, &part.shape, &part.strides);
    kernels::copy(pool, x, y.ok_or("internal: a part lies outside its value")?);
    Ok(x.shape()[axis])
}

impl OpCx<'_, '_> {
    /// Values one after the other along `axis`.
    pub fn concat(&mut self, values: &[ValueId], axis: usize) -> OpResult<ValueId> {
        let [first, rest @ ..] = values else {
            return Err("concat needs a value".into());
        };
        if rest.is_empty() {
            return Ok(*first);
        }
        let mut shape = self.shape(*first);
        for &v in rest {
            let other = self.shape(v);
            let fits =
                other.len() == shape.len() && (0..shape.len()).all(|i| i == axis || other[i] == shape[i]);
            if !fits {
                let (a, b) = (shape.as_slice(), other.as_slice());
                return Err(format!("shapes {a:?} and {b:?} do not join along axis {axis}").into());
            }
            shape[axis] += other[axis];
        }
        let dtype = self.dtype(*first);
        self.emit(Concat { axis }, values, dtype, &shape)
    }
}

fn lower_concat(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let values = cx.values("values")?;
    let rank = values.first().map_or(0, |v| cx.shape(*v).len());
    if rank == 0 {
        // Scalars join to a vector.
        let flat = values
            .iter()
            .map(|&v| cx.reshape(v, &[1]))
            .collect::<OpResult<Vec<_>>>()?;
        let y = cx.concat(&flat, 0)?;
        return cx.result(y);
    }
    let axis = cx.axis("axis", rank, None)?;
    if !cx.flag("interleave", false)? {
        let y = cx.concat(&values, axis)?;
        return cx.result(y);
    }
    // Interleaving is joining along a new axis behind, then flattening the two.
    let mut shape = cx.shape(values[0]);
    let stacked = stack(cx, &values, axis + 1)?;
    shape[axis] *= values.len();
    let y = cx.reshape(stacked, &shape)?;
    cx.result(y)
}

fn stack(cx: &mut OpCx<'_, '_>, values: &[ValueId], axis: usize) -> OpResult<ValueId> {
    let mut wide = Vec::with_capacity(values.len());
    for &v in values {
        let mut shape = cx.shape(v);
        shape.insert(axis, 1);
        wide.push(cx.reshape(v, &shape)?);
    }
    cx.concat(&wide, axis)
}

fn lower_stack(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let values = cx.values("values")?;
    let rank = values.first().map_or(0, |v| cx.shape(*v).len());
    let axis = cx.axis("axis", rank + 1, None)?;
    let y = stack(cx, &values, axis)?;
    cx.result(y)
}

fn lower_split(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axis = cx.axis("axis", shape.len(), None)?;
    let sizes: Vec<usize> = match (cx.ints("split_sizes")?, cx.int("num_splits")?) {
        (Some(s), _) => s
            .iter()
            .map(|&n| usize::try_from(n).unwrap_or(usize::MAX))
            .collect(),
        (None, Some(n)) if n > 0 && shape[axis].is_multiple_of(n as usize) => {
            vec![shape[axis] / n as usize; n as usize]
        }
        (None, n) => return Err(format!("size {} does not split into {n:?} parts", shape[axis]).into()),
    };
    let total = sizes.iter().try_fold(0usize, |a, &b| a.checked_add(b));
    if total != Some(shape[axis]) {
        return Err(format!("split_sizes {sizes:?} do not add up to {}", shape[axis]).into());
    }
    let mut begin: Shape = smallvec![0; shape.len()];
    for n in sizes {
        let mut size = shape.clone();
        size[axis] = n;
        let part = cx.slice(x, &begin, &unit_steps(shape.len()), &size)?;
        cx.result(part)?;
        begin[axis] += n;
    }
    Ok(())
}

fn lower_tile(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let reps = cx.ints("reps")?.ok_or("parameter \"reps\" is missing")?;
    if reps.len() != shape.len() || reps.iter().any(|&r| r < 0) {
        return Err(format!("reps {reps:?} do not fit shape {:?}", shape.as_slice()).into());
    }
    // Each repeated dimension d becomes [r, d] with a stride of 0, then both are one again.
    let (mut split, mut wide, mut out): (Shape, Shape, Shape) = Default::default();
    for (&d, &r) in shape.iter().zip(&reps) {
        let r = r as usize;
        if r != 1 {
            split.push(1);
            wide.push(r);
        }
        split.push(d);
        wide.push(d);
        out.push(d.checked_mul(r).ok_or("a repeated dimension is too large")?);
    }
    let parts = cx.reshape(x, &split)?;
    let repeated = cx.broadcast(parts, &wide)?;
    let y = cx.reshape(repeated, &out)?;
    cx.result(y)
}

/// How `pad` fills what it adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PadMode {
    Constant,
    Reflect,
    Replicate,
}

/// `pad`: elements added before and after along each dimension.
#[derive(Debug)]
pub struct Pad {
    before: Shape,
    mode: PadMode,
    fill: f32,
}

impl Pad {
    /// The index of the input an output index shows; `None` for a constant.
    fn source(&self, out: usize, before: usize, dim: usize) -> Option<usize> {
        let i = out as i64 - before as i64;
        let last = dim as i64 - 1;
        let i = match self.mode {
            _ if (0..=last).contains(&i) => i,
            PadMode::Constant => return None,
            PadMode::Replicate => i.clamp(0, last),
            PadMode::Reflect => {
                let i = i.abs();
                if i > last { 2 * last - i } else { i }
            }
        };
        usize::try_from(i).ok()
    }

    fn fill_from<T: Copy>(&self, x: &[T], have: &[usize], y: &mut [T], want: &[usize], fill: T) {
        let maps: Vec<Vec<Option<usize>>> = (0..have.len())
            .map(|d| {
                (0..want[d])
                    .map(|o| self.source(o, self.before[d], have[d]))
                    .collect()
            })
            .collect();
        let Some((inner, outer)) = maps.split_last() else {
            return y.copy_from_slice(x);
        };
        let row = inner.len();
        let mut at: Shape = smallvec![0; outer.len()];
        for y in y.chunks_mut(row.max(1)) {
            let base = outer
                .iter()
                .zip(&at)
                .zip(have)
                .try_fold(0, |b, ((m, &i), &d)| m[i].map(|s| b * d + s));
            match base {
                None => y.fill(fill),
                Some(base) => {
                    let base = base * have[have.len() - 1];
                    for (y, s) in y.iter_mut().zip(inner) {
                        *y = s.and_then(|s| x.get(base + s)).copied().unwrap_or(fill);
                    }
                }
            }
            for d in (0..outer.len()).rev() {
                at[d] += 1;
                if at[d] < want[d] {
                    break;
                }
                at[d] = 0;
            }
        }
    }
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        match args.outputs.first_mut().and_then(Option::take) {
            Some(Out::F32(mut y)) => {
                let want: Shape = y.shape().into();
                let x = args.f32(0)?;
                let y = y.as_slice().ok_or("internal: pad writes row-major")?;
                self.fill_from(args.f32s(0)?, x.shape(), y, &want, self.fill);
            }
            Some(Out::I32(mut y)) => {
                let want: Shape = y.shape().into();
                let x = args.i32(0)?;
                let y = y.as_slice().ok_or("internal: pad writes row-major")?;
                self.fill_from(args.i32s(0)?, x.shape(), y, &want, self.fill as i32);
            }
            _ => return Err("internal: pad has one result".into()),
        }
        Ok(())
    }
}

fn lower_pad(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let pad = cx.ints("pad")?.ok_or("parameter \"pad\" is missing")?;
    let mode = match cx.text("mode")?.as_deref() {
        None | Some("constant") => PadMode::Constant,
        Some("reflect") => PadMode::Reflect,
        Some("replicate") => PadMode::Replicate,
        Some(other) => return Err(format!("mode {other:?} is not constant, reflect or replicate").into()),
    };
    let fill = cx.float("constant_val")?.unwrap_or(0.0);
    let padded = pad.len() / 2;
    if !pad.len().is_multiple_of(2) || padded > shape.len() || pad.iter().any(|&p| p < 0) {
        return Err(format!("pad {pad:?} does not fit shape {:?}", shape.as_slice()).into());
    }
    let lead = shape.len() - padded;
    let mut before: Shape = smallvec![0; shape.len()];
    let mut out = shape.clone();
    for (i, p) in pad.chunks_exact(2).enumerate() {
        let (b, a, d) = (p[0] as usize, p[1] as usize, shape[lead + i]);
        let limit = match mode {
            PadMode::Reflect => d.saturating_sub(1),
            PadMode::Replicate if d == 0 => 0,
            _ => usize::MAX,
        };
        if b > limit || a > limit {
            return Err(format!(
                "pad {pad:?} is too large for shape {:?} in this mode",
                shape.as_slice()
            )
            .into());
        }
        before[lead + i] = b;
        out[lead + i] = d + a + b;
    }
    let dtype = cx.dtype(x);
    let y = cx.emit(Pad { before, mode, fill }, &[x], dtype, &out)?;
    cx.result(y)
}

/// `x` with zeros before and after along each dimension.
pub(super) fn pad_zeros(
    cx: &mut OpCx<'_, '_>,
    x: ValueId,
    before: &[usize],
    after: &[usize],
) -> OpResult<ValueId> {
    let shape = cx.shape(x);
    let grow = |(d, (b, a)): (&usize, (&usize, &usize))| d.checked_add(*b).and_then(|d| d.checked_add(*a));
    let wide = shape
        .iter()
        .zip(before.iter().zip(after))
        .map(grow)
        .collect::<Option<Shape>>();
    let op = Pad {
        before: before.into(),
        mode: PadMode::Constant,
        fill: 0.0,
    };
    cx.emit(
        op,
        &[x],
        cx.dtype(x),
        &wide.ok_or("a padded dimension is too large")?,
    )
}

fn lower_shape(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let dims: Vec<i32> = cx
        .shape(x)
        .iter()
        .map(|&d| i32::try_from(d).unwrap_or(i32::MAX))
        .collect();
    let y = cx.add_i32(DType::Int32, &[dims.len()], dims);
    cx.result(y)
}

fn lower_range_1d(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let start = cx.value("start")?;
    let dtype = cx.dtype(start);
    let (a, b) = (cx.float("start")?.unwrap_or(0.0), cx.float("end")?.unwrap_or(0.0));
    let step = cx.float("step")?.unwrap_or(1.0);
    if step == 0.0 {
        return Err("a step of 0 is not allowed".into());
    }
    let n = (((f64::from(b) - f64::from(a)) / f64::from(step)).ceil().max(0.0)) as usize;
    if n > crate::layout::MAX_ELEMENTS {
        return Err(format!("a range of {n} elements is too large").into());
    }
    let at = |i: usize| f64::from(a) + i as f64 * f64::from(step);
    let y = match Storage::of(dtype) {
        Storage::I32 => cx.add_i32(dtype, &[n], (0..n).map(|i| at(i) as i32).collect()),
        _ => cx.add_f32(dtype, &[n], (0..n).map(|i| at(i) as f32).collect()),
    };
    cx.result(y)
}

fn lower_fill(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let dims = cx.ints("shape")?.ok_or("parameter \"shape\" is missing")?;
    let shape = dims
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<Result<Shape, _>>();
    let shape = shape.map_err(|_| OpError::new(format!("shape {dims:?} has a negative dimension")))?;
    crate::layout::checked_elements(&shape).ok_or_else(|| format!("shape {dims:?} is too large"))?;
    let value = match cx.optional("value")? {
        Some(v) => cx.reshape(v, &[])?,
        None => cx.add_f32(DType::Fp32, &[], vec![0.0]),
    };
    let y = cx.broadcast(value, &shape)?;
    cx.result(y)
}

fn lower_identity(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let dtype = cx.dtype(x);
    let y = cx.same(x, dtype)?;
    cx.result(y)
}

fn lower_flatten2d(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axis = cx.int("axis")?.unwrap_or(1);
    let axis = if axis < 0 { axis + shape.len() as i32 } else { axis };
    let axis = usize::try_from(axis)
        .ok()
        .filter(|&a| a <= shape.len())
        .ok_or("axis is outside the shape")?;
    let y = cx.reshape(x, &[elements(&shape[..axis]), elements(&shape[axis..])])?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $outputs:expr, $lower:expr) => {
        row!($name, "iOS15", 0.0, $inputs, $outputs, $lower)
    };
    ($name:literal, $since:literal, $tolerance:expr, $inputs:expr, $outputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "tensor_operation",
            since: $since,
            inputs: $inputs,
            outputs: $outputs,
            support: Support::Full,
            tolerance: $tolerance,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "argsort",
        &[req("x"), opt("axis"), opt("ascending")],
        Some(1),
        sort::lower_argsort
    ),
    row!(
        "band_part",
        &[req("x"), opt("lower"), opt("upper")],
        Some(1),
        scan::lower_band_part
    ),
    row!(
        "concat",
        &[req("values"), req("axis"), opt("interleave")],
        Some(1),
        lower_concat
    ),
    row!(
        "cumsum",
        "iOS15",
        1e-6,
        &[req("x"), opt("axis"), opt("exclusive"), opt("reverse")],
        Some(1),
        scan::lower_cumsum
    ),
    row!("fill", &[req("shape"), opt("value")], Some(1), lower_fill),
    row!(
        "fill_like",
        "iOS16",
        0.0,
        &[req("ref_tensor"), opt("value")],
        Some(1),
        scan::lower_fill_like
    ),
    row!("flatten2d", &[req("x"), opt("axis")], Some(1), lower_flatten2d),
    row!("identity", &[req("x")], Some(1), lower_identity),
    row!(
        "non_maximum_suppression",
        &[
            req("boxes"),
            req("scores"),
            req("iou_threshold"),
            opt("score_threshold"),
            req("max_boxes"),
            opt("per_class_suppression"),
        ],
        None,
        nms::lower_nms
    ),
    row!(
        "one_hot",
        &[
            req("indices"),
            req("one_hot_vector_size"),
            opt("axis"),
            opt("on_value"),
            opt("off_value"),
        ],
        Some(1),
        scan::lower_one_hot
    ),
    row!(
        "pad",
        &[req("x"), req("pad"), opt("mode"), opt("constant_val")],
        Some(1),
        lower_pad
    ),
    row!(
        "range_1d",
        &[req("start"), req("end"), req("step")],
        Some(1),
        lower_range_1d
    ),
    row!("shape", &[req("x")], Some(1), lower_shape),
    row!(
        "split",
        &[req("x"), opt("num_splits"), opt("split_sizes"), req("axis")],
        None,
        lower_split
    ),
    row!("stack", &[req("values"), req("axis")], Some(1), lower_stack),
    row!("tile", &[req("x"), req("reps")], Some(1), lower_tile),
    row!(
        "topk",
        &[
            req("x"),
            opt("k"),
            opt("axis"),
            opt("ascending"),
            opt("sort"),
            opt("return_indices"),
            opt("output_indices_dtype"),
        ],
        None,
        sort::lower_topk
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_shows_the_right_elements() {
        let pad = |mode| Pad {
            before: smallvec![0, 2],
            mode,
            fill: 9.0,
        };
        let rows = [
            (PadMode::Constant, [9, 9, 1, 2, 3, 9]),
            (PadMode::Reflect, [3, 2, 1, 2, 3, 2]),
            (PadMode::Replicate, [1, 1, 1, 2, 3, 3]),
        ];
        for (mode, want) in rows {
            let mut y = [0; 6];
            pad(mode).fill_from(&[1, 2, 3], &[1, 3], &mut y, &[1, 6], 9);
            assert_eq!(y, want, "{mode:?}");
        }
    }
}
