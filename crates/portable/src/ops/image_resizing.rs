//! Images at other sizes. Source: coremltools 9.0, `mil/ops/defs/iOS15/image_resizing.py`, iOS16, iOS17.

mod crop_resize;
mod grid;
mod resize;
mod sample;

use crate::error::OpResult;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, opt, req};
use crate::ops::view::unit_steps;
use smallvec::smallvec;

fn lower_crop(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let have = cx.shape(x);
    if have.len() < 2 {
        return Err(format!("x {:?} must have rows and columns", have.as_slice()).into());
    }
    let lead = have.len() - 2;
    let (mut begin, mut size): (crate::layout::Shape, _) = (smallvec![0; have.len()], have.clone());
    for (i, param) in ["crop_height", "crop_width"].into_iter().enumerate() {
        let cut = cx
            .ints(param)?
            .ok_or_else(|| format!("parameter {param:?} is missing"))?;
        let dim = have[lead + i];
        let fits = match cut.as_slice() {
            [a, b] => usize::try_from(*a).ok().zip(usize::try_from(*b).ok()),
            _ => None,
        };
        let cut = fits.filter(|(a, b)| a.saturating_add(*b) <= dim);
        let (a, b) = cut.ok_or_else(|| format!("{param} does not fit a dimension of {dim}"))?;
        begin[lead + i] = a;
        size[lead + i] = dim - a - b;
    }
    let y = cx.slice(x, &begin, &unit_steps(have.len()), &size)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $since:literal, $support:expr, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "image_resizing",
            since: $since,
            inputs: $inputs,
            outputs: Some(1),
            support: $support,
            tolerance: 1e-5,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "affine",
        "iOS15",
        Support::Full,
        &[
            req("x"),
            req("transform_matrix"),
            req("output_height"),
            req("output_width"),
            req("sampling_mode"),
            req("padding_mode"),
            req("padding_value"),
            req("coordinates_mode"),
            req("align_corners"),
        ],
        sample::lower_affine
    ),
    row!(
        "crop",
        "iOS15",
        Support::Full,
        &[req("x"), req("crop_height"), req("crop_width")],
        lower_crop
    ),
    row!(
        "crop_resize",
        "iOS15",
        Support::Full,
        &[
            req("x"),
            opt("roi"),
            opt("boxes"),
            opt("box_indices"),
            opt("target_height"),
            opt("target_width"),
            opt("normalized_coordinates"),
            opt("spatial_scale"),
            opt("box_coordinate_mode"),
            opt("sampling_mode"),
            opt("pad_value"),
        ],
        crop_resize::lower_crop_resize
    ),
    row!(
        "resample",
        "iOS15",
        Support::Full,
        &[
            req("x"),
            req("coordinates"),
            req("sampling_mode"),
            req("padding_mode"),
            req("padding_value"),
            req("coordinates_mode"),
            req("align_corners"),
        ],
        sample::lower_resample
    ),
    row!(
        "resize",
        "iOS17",
        Support::Full,
        &[
            req("x"),
            req("shape"),
            req("resized_dims"),
            opt("interpolation_mode"),
            opt("sampling_mode"),
        ],
        resize::lower_resize
    ),
    row!(
        "resize_bilinear",
        "iOS15",
        Support::Full,
        &[
            req("x"),
            opt("target_size_height"),
            opt("target_size_width"),
            opt("sampling_mode"),
        ],
        resize::lower_resize_bilinear
    ),
    row!(
        "resize_nearest_neighbor",
        "iOS15",
        Support::Full,
        &[req("x"), req("target_size_height"), req("target_size_width")],
        resize::lower_resize_nearest
    ),
    row!(
        "upsample_bilinear",
        "iOS15",
        Support::Full,
        &[
            req("x"),
            opt("scale_factor_height"),
            opt("scale_factor_width"),
            opt("align_corners"),
            opt("half_pixel_centers"),
        ],
        resize::lower_upsample_bilinear
    ),
    row!(
        "upsample_nearest_neighbor",
        "iOS15",
        Support::Full,
        &[req("x"), opt("scale_factor_height"), opt("scale_factor_width")],
        resize::lower_upsample_nearest
    ),
];
