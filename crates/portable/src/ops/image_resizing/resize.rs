//! `resize`, `resize_*` and `upsample_*`: the last dimensions at another size.

use super::grid::Sampling;
use crate::error::OpResult;
use crate::graph::ValueId;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use crate::ops::conv::{channels_first, channels_last};
use crate::ops::dense::Pair;
use candle_coreml_kernels::{self as kernels, Tap};
use candle_coreml_mil::DType;

/// The last two dimensions of `x[.., h, w]` read through taps.
pub struct Resize {
    from: [usize; 2],
    rows: Vec<Tap>,
    cols: Vec<Tap>,
}

impl std::fmt::Debug for Resize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Resize({:?} to {:?})",
            self.from,
            [self.rows.len(), self.cols.len()]
        )
    }
}

impl Resize {
    /// Integers are picked, never mixed.
    fn pick(&self, x: &[i32], y: &mut [i32]) {
        let [h, w] = self.from;
        let to = self.rows.len() * self.cols.len();
        for (x, y) in x.chunks_exact((h * w).max(1)).zip(y.chunks_exact_mut(to.max(1))) {
            for (y, row) in y.chunks_exact_mut(self.cols.len()).zip(&self.rows) {
                for (y, col) in y.iter_mut().zip(&self.cols) {
                    *y = x[row.low * w + col.low];
                }
            }
        }
    }
}

impl Op for Resize {
    fn name(&self) -> &'static str {
        "resize"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        match args.pair()? {
            Pair::F32(x, y) => kernels::resize(args.pool, x, self.from, &self.rows, &self.cols, y),
            Pair::I32(x, y) => self.pick(x, y),
        }
        Ok(())
    }
}

/// As [`Resize`] for pictures with channels last, `[n, h, w, c]`.
pub struct ResizeLast(Resize);

impl std::fmt::Debug for ResizeLast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, channels last", self.0)
    }
}

impl Op for ResizeLast {
    fn name(&self) -> &'static str {
        "resize"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let Resize { from, rows, cols } = &self.0;
        let channels = args.f32(0)?.shape().last().copied().unwrap_or(1);
        match args.pair()? {
            Pair::F32(x, y) => {
                kernels::resize_last(args.pool, x, [from[0], from[1], channels], rows, cols, y)
            }
            Pair::I32(..) => return Err("internal: integers have no channels".into()),
        }
        Ok(())
    }
}

/// Fewer channels do not fill a vector.
const LEAST_CHANNELS: usize = 8;

fn identity(len: usize) -> Vec<Tap> {
    (0..len).map(Tap::exact).collect()
}

/// The last two dimensions of `x` through `rows` and `cols`.
fn planes(cx: &mut OpCx<'_, '_>, x: ValueId, rows: Vec<Tap>, cols: Vec<Tap>) -> OpResult<ValueId> {
    let mut shape = cx.shape(x);
    let n = shape.len();
    let from = [shape[n - 2], shape[n - 1]];
    if from.contains(&0) {
        return Err(format!("a resized dimension of {:?} is 0", shape.as_slice()).into());
    }
    (shape[n - 2], shape[n - 1]) = (rows.len(), cols.len());
    let (op, dtype) = (Resize { from, rows, cols }, cx.dtype(x));
    if n != 4 || shape[1] < LEAST_CHANNELS || !dtype.is_float() {
        return cx.emit(op, &[x], dtype, &shape);
    }
    let x = channels_last(cx, x)?;
    let last = [shape[0], shape[2], shape[3], shape[1]];
    let y = cx.emit(ResizeLast(op), &[x], dtype, &last)?;
    channels_first(cx, y, 4)
}

fn rank_two(cx: &mut OpCx<'_, '_>) -> OpResult<(ValueId, [usize; 2])> {
    let x = cx.value("x")?;
    match cx.shape(x).last_chunk::<2>() {
        Some(&hw) => Ok((x, hw)),
        None => Err("x must have rows and columns".into()),
    }
}

/// Output sizes by scale factors, rounded down.
fn scaled(cx: &mut OpCx<'_, '_>, hw: [usize; 2]) -> OpResult<[usize; 2]> {
    let mut out = hw;
    for (o, param) in out.iter_mut().zip(["scale_factor_height", "scale_factor_width"]) {
        let scale = cx.float(param)?.unwrap_or(1.0);
        // A factor such as 1/3 lies beside its fraction; sizes a rounding error below a whole number are that number.
        let size = f64::from(scale) * *o as f64;
        let near = size.round();
        let size = if (size - near).abs() < 1e-5 {
            near
        } else {
            size.floor()
        };
        if !(1.0..=65_536.0).contains(&size) {
            return Err(format!("{param} {scale} makes a dimension of {size}").into());
        }
        *o = size as usize;
    }
    Ok(out)
}

fn target(cx: &mut OpCx<'_, '_>, param: &str, default: Option<i32>) -> OpResult<usize> {
    let size = cx.int(param)?.or(default);
    let size = size.ok_or_else(|| format!("parameter {param:?} is missing"))?;
    usize::try_from(size).map_err(|_| format!("{param} {size} is negative").into())
}

/// Lowers `upsample_nearest_neighbor`.
pub fn lower_upsample_nearest(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, hw) = rank_two(cx)?;
    let [h, w] = scaled(cx, hw)?;
    let taps = |len: usize, n: usize| (0..n).map(|i| Tap::exact(i * len / n)).collect();
    let y = planes(cx, x, taps(hw[0], h), taps(hw[1], w))?;
    cx.result(y)
}

/// Lowers `upsample_bilinear`.
pub fn lower_upsample_bilinear(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, hw) = rank_two(cx)?;
    let [h, w] = scaled(cx, hw)?;
    let align = cx.flag("align_corners", true)?;
    let half = cx.flag("half_pixel_centers", !align)?;
    let mode = match (align, half) {
        (true, false) => Sampling::StrictAlignCorners,
        (false, true) => Sampling::UnalignCorners,
        (false, false) => Sampling::Default,
        (true, true) => return Err("align_corners and half_pixel_centers exclude each other".into()),
    };
    let y = planes(cx, x, mode.taps(hw[0], h), mode.taps(hw[1], w))?;
    cx.result(y)
}

/// Lowers `resize_nearest_neighbor`.
pub fn lower_resize_nearest(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, hw) = rank_two(cx)?;
    let h = target(cx, "target_size_height", None)?;
    let w = target(cx, "target_size_width", None)?;
    let mode = Sampling::Default;
    let y = planes(cx, x, mode.nearest(hw[0], h), mode.nearest(hw[1], w))?;
    cx.result(y)
}

fn sampling(cx: &mut OpCx<'_, '_>) -> OpResult<Sampling> {
    Sampling::named(&cx.text("sampling_mode")?.unwrap_or_else(|| "DEFAULT".into()))
}

/// Lowers `resize_bilinear`.
pub fn lower_resize_bilinear(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, hw) = rank_two(cx)?;
    let h = target(cx, "target_size_height", Some(1))?;
    let w = target(cx, "target_size_width", Some(1))?;
    let mode = sampling(cx)?;
    let y = planes(cx, x, mode.taps(hw[0], h), mode.taps(hw[1], w))?;
    cx.result(y)
}

/// Lowers `resize`: the last `resized_dims` dimensions, the last two at once and the others one by one.
pub fn lower_resize(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let have = cx.shape(x);
    let wanted = cx.ints("shape")?.ok_or("parameter \"shape\" is missing")?;
    let count = target(cx, "resized_dims", None)?;
    if count > wanted.len() || wanted.len() > have.len() {
        let text = format!(
            "resized_dims {count}, shape {wanted:?} and x {:?} do not fit",
            have.as_slice()
        );
        return Err(text.into());
    }
    let mode = sampling(cx)?;
    let linear = match cx.text("interpolation_mode")?.as_deref() {
        None | Some("LINEAR") => true,
        Some("NEAREST_NEIGHBOR") => false,
        Some(other) => {
            return Err(format!("interpolation_mode {other:?} is not LINEAR or NEAREST_NEIGHBOR").into());
        }
    };
    let dtype = cx.dtype(x);
    let mix_integers = linear && !dtype.is_float();
    let mut y = if mix_integers { cx.cast(x, DType::Fp32)? } else { x };
    for i in 0..count {
        let axis = have.len() - count + i;
        let n = match wanted[wanted.len() - count + i] {
            0 => have[axis],
            n => usize::try_from(n).map_err(|_| format!("shape {wanted:?} has a negative dimension"))?,
        };
        let taps = if linear {
            mode.taps(have[axis], n)
        } else {
            mode.nearest(have[axis], n)
        };
        y = along(cx, y, axis, taps)?;
    }
    let y = if mix_integers { cx.cast(y, dtype)? } else { y };
    cx.result(y)
}

/// One dimension of `x` through `taps`.
fn along(cx: &mut OpCx<'_, '_>, x: ValueId, axis: usize, taps: Vec<Tap>) -> OpResult<ValueId> {
    let mut shape = cx.shape(x);
    let flat: Shape = smallvec::smallvec![
        elements(&shape[..axis]),
        shape[axis],
        elements(&shape[axis + 1..])
    ];
    shape[axis] = taps.len();
    let inner = flat[2];
    let flat = cx.reshape(x, &flat)?;
    let y = planes(cx, flat, taps, identity(inner))?;
    cx.reshape(y, &shape)
}
