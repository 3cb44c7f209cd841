//! `crop_resize`: boxes cut out of images and brought to one size.

use super::grid::Sampling;
use crate::error::{OpError, OpResult};
use crate::graph::ValueId;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_kernels::{self as kernels, Beside, Sampler};
use candle_coreml_mil::DType;
use smallvec::smallvec;

/// What the four numbers of a box are.
#[derive(Debug, Clone, Copy)]
struct BoxRule {
    /// Centre and size instead of two corners.
    center: bool,
    /// Width before height.
    width_first: bool,
    /// Numbers from 0 to 1 instead of pixels.
    normalized: bool,
    /// Multiplies pixels.
    scale: f32,
}

impl BoxRule {
    fn read(cx: &mut OpCx<'_, '_>) -> OpResult<BoxRule> {
        let mode = cx.text("box_coordinate_mode")?;
        let (center, width_first) = match mode.as_deref() {
            None | Some("CORNERS_HEIGHT_FIRST") => (false, false),
            Some("CORNERS_WIDTH_FIRST") => (false, true),
            Some("CENTER_SIZE_HEIGHT_FIRST") => (true, false),
            Some("CENTER_SIZE_WIDTH_FIRST") => (true, true),
            Some(other) => {
                let known = "CORNERS_HEIGHT_FIRST, CORNERS_WIDTH_FIRST, CENTER_SIZE_HEIGHT_FIRST or \
                             CENTER_SIZE_WIDTH_FIRST";
                return Err(format!("box_coordinate_mode {other:?} is not {known}").into());
            }
        };
        Ok(BoxRule {
            center,
            width_first,
            normalized: cx.flag("normalized_coordinates", false)?,
            scale: cx.float("spatial_scale")?.unwrap_or(1.0),
        })
    }

    /// First and last row, first and last column.
    fn ends(self, numbers: &[f32], [h, w]: [usize; 2]) -> [(f32, f32); 2] {
        let n = |i: usize| numbers.get(i).copied().unwrap_or(0.0) * self.scale;
        let (rows, cols) = if self.width_first {
            ((n(1), n(3)), (n(0), n(2)))
        } else {
            ((n(0), n(2)), (n(1), n(3)))
        };
        [(rows, h), (cols, w)].map(|((a, b), len)| {
            let unit = if self.normalized { len as f32 - 1.0 } else { 1.0 };
            let (a, b) = if self.center {
                (a - b / 2.0, a + b / 2.0)
            } else {
                (a, b)
            };
            (a * unit, b * unit)
        })
    }
}

/// Which images a box is cut from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Images {
    /// Each box from each image.
    All,
    /// The first of five numbers of a box says which.
    InBox,
    /// A second input says which.
    Indices,
}

/// Boxes `[n, 4 or 5]` of `x[b, c, h, w]` at one size.
#[derive(Debug)]
pub struct CropResize {
    image: [usize; 4],
    size: [usize; 2],
    rule: BoxRule,
    images: Images,
    sampling: Sampling,
    beside: Beside,
}

impl CropResize {
    /// The images of box `n`.
    fn images_of(&self, n: usize, numbers: &[f32], indices: &[i32]) -> OpResult<std::ops::Range<usize>> {
        let index = match self.images {
            Images::All => return Ok(0..self.image[0]),
            Images::InBox => numbers.first().copied().unwrap_or(0.0) as i64,
            Images::Indices => indices.get(n).copied().unwrap_or(0).into(),
        };
        let at = usize::try_from(index).ok().filter(|&i| i < self.image[0]);
        let at = at.ok_or_else(|| OpError::new(format!("box {n}: there is no image {index}")))?;
        Ok(at..at + 1)
    }
}

impl Op for CropResize {
    fn name(&self) -> &'static str {
        "crop_resize"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, boxes) = (args.f32s(0)?, args.f32s(1)?);
        let indices = if self.images == Images::Indices {
            args.i32s(2)?
        } else {
            &[]
        };
        let ([_, c, h, w], [rows, cols]) = (self.image, self.size);
        let (numbers, skip) = if self.images == Images::InBox {
            (5, 1)
        } else {
            (4, 0)
        };
        let sampler = Sampler {
            bilinear: true,
            beside: self.beside,
        };
        let (image, cut) = (c * h * w, c * rows * cols);
        let mut out = args.result_f32(0)?.chunks_exact_mut(cut.max(1));
        for (n, one) in boxes.chunks_exact(numbers).enumerate() {
            let [tall, wide] = self.rule.ends(&one[skip..], [h, w]);
            let places = |_: usize, i: usize| {
                [
                    self.sampling.place(tall, i / cols, rows),
                    self.sampling.place(wide, i % cols, cols),
                ]
            };
            for i in self.images_of(n, one, indices)? {
                let Some(y) = out.next() else { return Ok(()) };
                let x = &x[i * image..(i + 1) * image];
                kernels::sample(args.pool, x, [1, c, h, w], (rows * cols, &places), sampler, y);
            }
        }
        Ok(())
    }
}

/// The boxes as floats `[n, 4 or 5]`, where their images come from, and the shape of the result.
struct Boxes {
    values: Vec<ValueId>,
    images: Images,
    shape: Shape,
}

impl Boxes {
    fn read(cx: &mut OpCx<'_, '_>, [b, c, ..]: [usize; 4]) -> OpResult<Boxes> {
        if let Some(roi) = cx.optional("roi")? {
            let (n, images, copies) = match *cx.shape(roi).as_slice() {
                [n, 1, 4, 1, 1] => (n, Images::All, b),
                [n, 1, 5, 1, 1] => (n, Images::InBox, 1),
                ref other => return Err(format!("roi {other:?} must be [n, 1, 4 or 5, 1, 1]").into()),
            };
            return Ok(Boxes {
                values: vec![roi],
                images,
                shape: smallvec![n, copies, c],
            });
        }
        let mut boxes = cx.value("boxes")?;
        let n = match *cx.shape(boxes).as_slice() {
            [n, 4] => n,
            ref other => return Err(format!("boxes {other:?} must be [n, 4]").into()),
        };
        if !cx.dtype(boxes).is_float() {
            boxes = cx.cast(boxes, DType::Fp32)?;
        }
        let indices = match cx.optional("box_indices")? {
            Some(i) => i,
            None => {
                let all = (0..n).map(|i| i32::try_from(i).unwrap_or(i32::MAX)).collect();
                cx.add_i32(DType::Int32, &[n], all)
            }
        };
        if cx.shape(indices).as_slice() != [n] {
            return Err(format!("box_indices must be [{n}]").into());
        }
        Ok(Boxes {
            values: vec![boxes, indices],
            images: Images::Indices,
            shape: smallvec![n, c],
        })
    }
}

/// Lowers `crop_resize` of every opset.
pub fn lower_crop_resize(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let image = match *cx.shape(x).as_slice() {
        [b, c, h, w] if h > 0 && w > 0 => [b, c, h, w],
        ref other => return Err(format!("x {other:?} must be [batch, channels, height, width]").into()),
    };
    let mut size = [1; 2];
    for (n, param) in size.iter_mut().zip(["target_height", "target_width"]) {
        let v = usize::try_from(cx.int(param)?.unwrap_or(1))
            .ok()
            .filter(|&v| v > 0);
        *n = v.ok_or_else(|| format!("{param} must be 1 or more"))?;
    }
    let Boxes {
        values,
        images,
        mut shape,
    } = Boxes::read(cx, image)?;
    shape.extend(size);
    let op = CropResize {
        image,
        size,
        rule: BoxRule::read(cx)?,
        images,
        sampling: Sampling::named(&cx.text("sampling_mode")?.unwrap_or_else(|| "DEFAULT".into()))?,
        beside: Beside::Outside(cx.float("pad_value")?.unwrap_or(0.0)),
    };
    let mut inputs = vec![x];
    inputs.extend(values);
    let y = cx.emit(op, &inputs, cx.dtype(x), &shape)?;
    cx.result(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_have_their_ends_in_pixels() {
        let rule = |center, width_first, normalized| BoxRule {
            center,
            width_first,
            normalized,
            scale: 1.0,
        };
        // An image of 5 rows and 9 columns.
        let rows = [
            (
                rule(false, false, false),
                [1.0, 2.0, 3.0, 4.0],
                [(1.0, 3.0), (2.0, 4.0)],
            ),
            (
                rule(false, true, true),
                [0.5, 0.25, 1.0, 0.75],
                [(1.0, 3.0), (4.0, 8.0)],
            ),
            (
                rule(true, false, false),
                [2.0, 4.0, 2.0, 6.0],
                [(1.0, 3.0), (1.0, 7.0)],
            ),
            (
                rule(true, true, false),
                [4.0, 2.0, 6.0, 2.0],
                [(1.0, 3.0), (1.0, 7.0)],
            ),
        ];
        for (rule, numbers, want) in rows {
            assert_eq!(rule.ends(&numbers, [5, 9]), want, "{rule:?}");
        }
    }
}
