//! Blocks of pixels to channels or batches and back: a reshape, a permutation, a reshape.

use crate::error::{OpError, OpResult};
use crate::graph::ValueId;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::ops::tensor_operation::pad_zeros;
use crate::ops::view::unit_steps;
use smallvec::smallvec;

fn image(cx: &mut OpCx<'_, '_>) -> OpResult<(ValueId, [usize; 4])> {
    let x = cx.value("x")?;
    match *cx.shape(x).as_slice() {
        [n, c, h, w] => Ok((x, [n, c, h, w])),
        ref other => Err(format!("x {other:?} must be [n, channels, height, width]").into()),
    }
}

fn factor(cx: &mut OpCx<'_, '_>, param: &str) -> OpResult<usize> {
    let f = cx
        .int(param)?
        .and_then(|f| usize::try_from(f).ok())
        .filter(|&f| f > 0);
    f.ok_or_else(|| format!("{param} must be a number of 1 and more").into())
}

/// `a / b` where it is whole.
fn parts(a: usize, b: usize) -> OpResult<usize> {
    if b > 0 && a.is_multiple_of(b) {
        Ok(a / b)
    } else {
        Err(OpError::new(format!("{a} is not a multiple of {b}")))
    }
}

/// `x` as `split`, its dimensions as `perm` says, then as `shape`.
fn shuffle(
    cx: &mut OpCx<'_, '_>,
    x: ValueId,
    split: [usize; 6],
    perm: [usize; 6],
    shape: [usize; 4],
) -> OpResult<ValueId> {
    let x = cx.reshape(x, &split)?;
    let x = cx.permute(x, &perm)?;
    cx.reshape(x, &shape)
}

/// Lowers `depth_to_space`: a channel is `(row in block, column in block, rest)`.
pub fn lower_depth_to_space(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, h, w]) = image(cx)?;
    let b = factor(cx, "block_size")?;
    let d = parts(c, b * b)?;
    let y = shuffle(
        cx,
        x,
        [n, b, b, d, h, w],
        [0, 3, 4, 1, 5, 2],
        [n, d, h * b, w * b],
    )?;
    cx.result(y)
}

/// Lowers `space_to_depth`.
pub fn lower_space_to_depth(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, h, w]) = image(cx)?;
    let b = factor(cx, "block_size")?;
    let (h, w) = (parts(h, b)?, parts(w, b)?);
    let y = shuffle(
        cx,
        x,
        [n, c, h, b, w, b],
        [0, 3, 5, 1, 2, 4],
        [n, c * b * b, h, w],
    )?;
    cx.result(y)
}

/// Lowers `pixel_shuffle`: a channel is `(rest, row in block, column in block)`.
pub fn lower_pixel_shuffle(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, h, w]) = image(cx)?;
    let f = factor(cx, "upscale_factor")?;
    let d = parts(c, f * f)?;
    let y = shuffle(
        cx,
        x,
        [n, d, f, f, h, w],
        [0, 1, 4, 2, 5, 3],
        [n, d, h * f, w * f],
    )?;
    cx.result(y)
}

/// Lowers `pixel_unshuffle`.
pub fn lower_pixel_unshuffle(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, h, w]) = image(cx)?;
    let f = factor(cx, "downscale_factor")?;
    let (h, w) = (parts(h, f)?, parts(w, f)?);
    let y = shuffle(
        cx,
        x,
        [n, c, h, f, w, f],
        [0, 1, 3, 5, 2, 4],
        [n, c * f * f, h, w],
    )?;
    cx.result(y)
}

/// `block_shape`, and the margins `[[top, bottom], [left, right]]` of parameter `margins`.
fn blocks(cx: &mut OpCx<'_, '_>, margins: &str) -> OpResult<([usize; 2], [usize; 4])> {
    let mut numbers = |param: &str| -> OpResult<Vec<usize>> {
        let v = cx
            .ints(param)?
            .ok_or_else(|| format!("parameter {param:?} is missing"))?;
        Ok(v.iter().filter_map(|&v| usize::try_from(v).ok()).collect())
    };
    let (block, around) = (numbers("block_shape")?, numbers(margins)?);
    match (block.as_slice(), around.as_slice()) {
        (&[a, b], &[t, d, l, r]) if a > 0 && b > 0 => Ok(([a, b], [t, d, l, r])),
        _ => Err(format!("block_shape must be two numbers and {margins} [2, 2], none negative").into()),
    }
}

/// Lowers `space_to_batch`: batch becomes `(row in block, column in block, batch)`.
pub fn lower_space_to_batch(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, ..]) = image(cx)?;
    let ([a, b], [top, bottom, left, right]) = blocks(cx, "paddings")?;
    let x = pad_zeros(cx, x, &[0, 0, top, left], &[0, 0, bottom, right])?;
    let padded: Shape = cx.shape(x);
    let (h, w) = (parts(padded[2], a)?, parts(padded[3], b)?);
    let y = shuffle(
        cx,
        x,
        [n, c, h, a, w, b],
        [3, 5, 0, 1, 2, 4],
        [n * a * b, c, h, w],
    )?;
    cx.result(y)
}

/// Lowers `batch_to_space`.
pub fn lower_batch_to_space(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, [n, c, h, w]) = image(cx)?;
    let ([a, b], [top, bottom, left, right]) = blocks(cx, "crops")?;
    let n = parts(n, a * b)?;
    let (rows, cols) = (h * a, w * b);
    let y = shuffle(cx, x, [a, b, n, c, h, w], [2, 3, 4, 0, 5, 1], [n, c, rows, cols])?;
    let left_over = |all: usize, cut: usize| {
        all.checked_sub(cut)
            .ok_or_else(|| OpError::new(format!("crops of {cut} are more than {all}")))
    };
    let size: Shape = smallvec![
        n,
        c,
        left_over(rows, top + bottom)?,
        left_over(cols, left + right)?
    ];
    let y = cx.slice(y, &[0, 0, top, left], &unit_steps(4), &size)?;
    cx.result(y)
}
