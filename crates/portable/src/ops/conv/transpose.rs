//! `conv_transpose`: the gradient of a convolution with respect to its input.

use super::{check_bias, emit_conv, phases, sizes, three};
use crate::error::OpResult;
use crate::layout::Shape;
use crate::lower::OpCx;
use candle_coreml_kernels::ConvParams;
use smallvec::smallvec;

/// Window geometry along the spatial dimensions of one use.
struct Axes {
    stride: Vec<usize>,
    /// Cells from the first to the last of the window.
    reach: Vec<usize>,
    spatial: Vec<usize>,
}

impl Axes {
    /// Output length without any padding.
    fn full(&self, i: usize) -> Option<usize> {
        let steps = self.spatial[i].checked_sub(1)?.checked_mul(self.stride[i])?;
        steps.checked_add(self.reach[i])
    }

    /// Lengths of the output and padding before it. What `pad` and `output_shape` leave open goes to the end.
    fn lengths(
        &self,
        pad_type: &str,
        pad: &[usize],
        wanted: Option<&[usize]>,
    ) -> OpResult<(Vec<usize>, Vec<usize>)> {
        let (mut lengths, mut before) = (Vec::new(), Vec::new());
        for i in 0..self.spatial.len() {
            let full = self.full(i).ok_or("a spatial dimension of x is 0 or too large")?;
            let wanted = wanted.map(|w| w[i]);
            let same = self.spatial[i] * self.stride[i];
            let (len, first) = match pad_type {
                "valid" => (wanted.unwrap_or(full), 0),
                "custom" => {
                    let cut = pad[2 * i] + pad[2 * i + 1];
                    let len = full.checked_sub(cut).ok_or("pad is larger than the output")?;
                    (wanted.unwrap_or(len), pad[2 * i])
                }
                // The padding of the convolution that gives x from the output.
                "same" => {
                    let len = wanted.unwrap_or(same);
                    (len, full.saturating_sub(len) / 2)
                }
                "same_lower" => {
                    let len = wanted.unwrap_or(same);
                    (len, full.saturating_sub(len).div_ceil(2))
                }
                other => {
                    return Err(
                        format!("pad_type {other:?} is not valid, custom, same or same_lower").into(),
                    );
                }
            };
            lengths.push(len);
            before.push(first);
        }
        Ok((lengths, before))
    }
}

/// Lowers `conv_transpose`.
pub fn lower_transpose(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, w) = (cx.value("x")?, cx.value("weight")?);
    let bias = cx.optional("bias")?;
    let (have, weight) = (cx.shape(x), cx.shape(w));
    let groups = usize::try_from(cx.int("groups")?.unwrap_or(1)).map_err(|_| "groups must be positive")?;
    let fits = have.len() == weight.len()
        && (3..=5).contains(&have.len())
        && groups > 0
        && weight[0] == have[1]
        && have[1].is_multiple_of(groups);
    let outputs = weight.get(1).and_then(|o| o.checked_mul(groups)).filter(|_| fits);
    let outputs = outputs.ok_or_else(|| {
        let (x, w) = (have.as_slice(), weight.as_slice());
        format!("x {x:?} does not fit weight {w:?} in {groups} groups")
    })?;
    check_bias(cx, bias, outputs)?;
    let n = have.len() - 2;
    let stride = sizes(cx, "strides", n, 1)?;
    let dilation = sizes(cx, "dilations", n, 1)?;
    let kernel = &weight[2..];
    if stride.contains(&0) || dilation.contains(&0) || kernel.contains(&0) {
        return Err("strides, dilations and kernels of 0 are not allowed".into());
    }
    let axes = Axes {
        reach: (0..n).map(|i| (kernel[i] - 1) * dilation[i] + 1).collect(),
        spatial: have[2..].to_vec(),
        stride,
    };
    let pad_type = cx
        .text("pad_type")?
        .unwrap_or_else(|| "valid".into())
        .to_lowercase();
    let pad = sizes(cx, "pad", 2 * n, 0)?;
    let wanted = output_shape(cx, have[0], outputs, n)?;
    let (lengths, before) = axes.lengths(&pad_type, &pad, wanted.as_deref())?;
    let mut shape: Shape = smallvec![have[0], outputs];
    shape.extend(lengths);
    let params = ConvParams {
        kernel: three(kernel, 1),
        stride: three(&axes.stride, 1),
        dilation: three(&dilation, 1),
        pad_before: three(&before, 0),
        pad_after: [0; 3],
        groups,
    };
    let y = match phases::lower(cx, (x, w, bias), &params, &shape)? {
        Some(y) => y,
        None => emit_conv(cx, (x, w, bias), params, &shape, true)?,
    };
    cx.result(y)
}

/// The spatial part of `output_shape`, where it is given.
fn output_shape(
    cx: &mut OpCx<'_, '_>,
    batch: usize,
    outputs: usize,
    n: usize,
) -> OpResult<Option<Vec<usize>>> {
    if cx.optional("output_shape")?.is_none() {
        return Ok(None);
    }
    let all = sizes(cx, "output_shape", n + 2, 0)?;
    if all[..2] != [batch, outputs] {
        return Err(format!("output_shape {all:?} must start with [{batch}, {outputs}]").into());
    }
    Ok(Some(all[2..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_follow_the_padding() {
        let axes = Axes {
            stride: vec![2],
            reach: vec![3],
            spatial: vec![4],
        };
        // (pad_type, pad, output length asked for) -> (length, padding before)
        let rows = [
            (("valid", [0, 0], None), (9, 0)),
            (("valid", [0, 0], Some([10])), (10, 0)),
            (("custom", [1, 2], None), (6, 1)),
            (("custom", [1, 1], Some([8])), (8, 1)),
            (("same", [0, 0], None), (8, 0)),
            (("same", [0, 0], Some([7])), (7, 1)),
            (("same_lower", [0, 0], None), (8, 1)),
        ];
        for ((kind, pad, wanted), (len, before)) in rows {
            let got = axes.lengths(kind, &pad, wanted.as_ref().map(|w| w.as_slice()));
            assert_eq!(
                got.expect("fits"),
                (vec![len], vec![before]),
                "{kind} {pad:?} {wanted:?}"
            );
        }
    }
}
