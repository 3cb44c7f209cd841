//! `resample` and `affine`: an image read at places the model computes.

use crate::error::OpResult;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_kernels::{self as kernels, Beside, Sampler};
use candle_coreml_mil::DType;
use smallvec::smallvec;

/// What coordinates count.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Unit {
    /// Pixels from the centre of the first one.
    Pixels,
    /// From 0 to 1 over the image.
    Zero,
    /// From -1 to 1 over the image.
    MinusOne,
}

/// Coordinates of an image, in both directions.
#[derive(Debug, Clone, Copy)]
struct Coordinates {
    unit: Unit,
    /// The ends are the centres of the border pixels, not the edges of the image.
    align_corners: bool,
}

impl Coordinates {
    fn read(cx: &mut OpCx<'_, '_>) -> OpResult<Coordinates> {
        let unit = match cx
            .text("coordinates_mode")?
            .unwrap_or_default()
            .to_lowercase()
            .as_str()
        {
            "unnormalized" => Unit::Pixels,
            "normalized_zero_to_one" => Unit::Zero,
            "normalized_minus_one_to_one" => Unit::MinusOne,
            other => {
                let known = "unnormalized, normalized_zero_to_one or normalized_minus_one_to_one";
                return Err(format!("coordinates_mode {other:?} is not {known}").into());
            }
        };
        Ok(Coordinates {
            unit,
            align_corners: cx.flag("align_corners", true)?,
        })
    }

    /// Pixels from the centre of the first one, on an axis of `len`.
    fn to_pixels(self, at: f32, len: usize) -> f32 {
        let at = match self.unit {
            Unit::Pixels => return at,
            Unit::Zero => at,
            Unit::MinusOne => (at + 1.0) / 2.0,
        };
        if self.align_corners {
            at * (len as f32 - 1.0)
        } else {
            at * len as f32 - 0.5
        }
    }

    /// The coordinate of pixel `i` of `len`.
    fn of_pixel(self, i: usize, len: usize) -> f32 {
        let i = i as f32;
        let at = match (self.unit, self.align_corners) {
            (Unit::Pixels, _) => return i,
            (_, true) if len == 1 => 0.5,
            (_, true) => i / (len as f32 - 1.0),
            (_, false) => (i + 0.5) / len as f32,
        };
        if self.unit == Unit::Zero {
            at
        } else {
            2.0 * at - 1.0
        }
    }
}

fn read_sampler(cx: &mut OpCx<'_, '_>) -> OpResult<Sampler> {
    let bilinear = match cx
        .text("sampling_mode")?
        .unwrap_or_default()
        .to_lowercase()
        .as_str()
    {
        "bilinear" => true,
        "nearest" => false,
        other => return Err(format!("sampling_mode {other:?} is not bilinear or nearest").into()),
    };
    let beside = match cx
        .text("padding_mode")?
        .unwrap_or_default()
        .to_lowercase()
        .as_str()
    {
        "constant" => Beside::Constant(cx.float("padding_value")?.unwrap_or(0.0)),
        "border" => Beside::Border,
        "reflection" => Beside::Reflection,
        "symmetric" => Beside::Symmetric,
        other => {
            let known = "constant, border, reflection or symmetric";
            return Err(format!("padding_mode {other:?} is not {known}").into());
        }
    };
    Ok(Sampler { bilinear, beside })
}

fn image(shape: &[usize]) -> OpResult<[usize; 4]> {
    match shape {
        &[b, c, h, w] if h > 0 && w > 0 => Ok([b, c, h, w]),
        _ => Err(format!("x {shape:?} must be [batch, channels, height, width]").into()),
    }
}

/// `y[b, c, i, j] = x[b, c]` at `coordinates[b, i, j]`, which are `(x, y)`.
#[derive(Debug)]
pub struct Resample {
    image: [usize; 4],
    sampler: Sampler,
    coordinates: Coordinates,
}

impl Op for Resample {
    fn name(&self) -> &'static str {
        "resample"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, at) = (args.f32s(0)?, args.f32s(1)?);
        let [b, _, h, w] = self.image;
        let count = at.len() / 2 / b.max(1);
        let places = |b: usize, i: usize| {
            let at = &at[2 * (b * count + i)..][..2];
            [
                self.coordinates.to_pixels(at[1], h),
                self.coordinates.to_pixels(at[0], w),
            ]
        };
        let y = args.result_f32(0)?;
        kernels::sample(args.pool, x, self.image, (count, &places), self.sampler, y);
        Ok(())
    }
}

/// Lowers `resample`.
pub fn lower_resample(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, at) = (cx.value("x")?, cx.value("coordinates")?);
    let image = image(&cx.shape(x))?;
    let places = cx.shape(at);
    let (h, w) = match *places.as_slice() {
        [b, h, w, 2] if b == image[0] => (h, w),
        _ => return Err(format!("coordinates {:?} do not fit x {image:?}", places.as_slice()).into()),
    };
    let at = if cx.dtype(at).is_float() {
        at
    } else {
        cx.cast(at, DType::Fp32)?
    };
    let op = Resample {
        image,
        sampler: read_sampler(cx)?,
        coordinates: Coordinates::read(cx)?,
    };
    let shape: Shape = smallvec![image[0], image[1], h, w];
    let y = cx.emit(op, &[x, at], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// `y[b, c, i, j] = x[b, c]` at `(a0 j + a1 i + a2, b0 j + b1 i + b2)`, coordinates of both images by one rule.
#[derive(Debug)]
pub struct Affine {
    image: [usize; 4],
    size: [usize; 2],
    sampler: Sampler,
    coordinates: Coordinates,
}

impl Op for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, matrices) = (args.f32s(0)?, args.f32s(1)?);
        let ([_, _, h, w], [rows, cols]) = (self.image, self.size);
        let c = self.coordinates;
        let places = |b: usize, i: usize| {
            // One matrix for each image, or one for all.
            let m = &matrices[if matrices.len() > 6 { 6 * b } else { 0 }..][..6];
            let (x, y) = (c.of_pixel(i % cols, cols), c.of_pixel(i / cols, rows));
            [
                c.to_pixels(m[3] * x + m[4] * y + m[5], h),
                c.to_pixels(m[0] * x + m[1] * y + m[2], w),
            ]
        };
        let y = args.result_f32(0)?;
        kernels::sample(args.pool, x, self.image, (rows * cols, &places), self.sampler, y);
        Ok(())
    }
}

/// Lowers `affine`.
pub fn lower_affine(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, matrix) = (cx.value("x")?, cx.value("transform_matrix")?);
    let image = image(&cx.shape(x))?;
    let have = cx.shape(matrix);
    if have.len() != 2 || have[1] != 6 || (have[0] != 1 && have[0] != image[0]) {
        return Err(format!("transform_matrix {:?} does not fit x {image:?}", have.as_slice()).into());
    }
    let mut size = [0; 2];
    for (n, param) in size.iter_mut().zip(["output_height", "output_width"]) {
        let v = cx.int(param)?.and_then(|v| usize::try_from(v).ok());
        *n = v.ok_or_else(|| format!("{param} must be a number of 0 and more"))?;
    }
    let op = Affine {
        image,
        size,
        sampler: read_sampler(cx)?,
        coordinates: Coordinates::read(cx)?,
    };
    let shape: Shape = smallvec![image[0], image[1], size[0], size[1]];
    let y = cx.emit(op, &[x, matrix], cx.dtype(x), &shape)?;
    cx.result(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_of_pixels_lead_back_to_them() {
        for unit in [Unit::Pixels, Unit::Zero, Unit::MinusOne] {
            for align_corners in [true, false] {
                let c = Coordinates { unit, align_corners };
                for i in 0..5 {
                    let back = c.to_pixels(c.of_pixel(i, 5), 5);
                    assert!((back - i as f32).abs() < 1e-6, "{c:?} {i}: {back}");
                }
            }
        }
        let ends = Coordinates {
            unit: Unit::MinusOne,
            align_corners: false,
        };
        assert_eq!((ends.to_pixels(-1.0, 4), ends.to_pixels(1.0, 4)), (-0.5, 3.5));
    }
}
