//! Convolutions of pictures whose channels lie side by side (`[n, h, w, c]`), with weights packed once.
//!
//! Pixels are the rows of a matrix product that is never written down: a tile of six or twelve pixels reads its windows where they
//! lie, a panel of output channels reads its weights in order, and the sums stay in registers. Depthwise convolutions
//! run along the channels. 3x3 windows over large pictures go through Winograd's transform.

mod chain;
mod depthwise;
mod direct;
mod epilogue;
mod packed;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod winograd;

pub use packed::PackedConv;

use crate::conv::ConvParams;
use crate::elementwise::Unary;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use epilogue::Epilogue;
use packed::Way;

/// A convolution over the channels-last picture `x`, with what follows it:
/// `y = last(activation(conv(x) + bias) + residual)`.
#[derive(Debug, Clone, Copy)]
pub struct ConvLast<'a> {
    /// The weights and the window.
    pub packed: &'a PackedConv,
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// What is added to the result.
    pub residual: Beside<'a>,
    /// Applied at the end.
    pub last: Option<Unary>,
}

/// Where the residual of a convolution is.
#[derive(Debug, Clone, Copy, Default)]
pub enum Beside<'a> {
    /// There is none.
    #[default]
    None,
    /// Row-major memory of the shape of the result.
    In(&'a [f32]),
    /// The memory of the result, which holds it when the call starts.
    Result,
}

/// A call with its geometry: what all ways of computing it need.
#[derive(Debug, Clone, Copy)]
struct Call<'a> {
    packed: &'a PackedConv,
    params: ConvParams,
    epilogue: Epilogue<'a>,
    x: Shared<f32>,
    /// `[n, h, w, c]`
    x_dims: [usize; 4],
    /// Of `n`, `h`, `w`.
    x_steps: [isize; 3],
    /// Of `c`: 1 but for direct windows.
    channel_step: isize,
    y: Shared<f32>,
    /// `[n, h, w, o]`, row-major.
    y_dims: [usize; 4],
}

impl Call<'_> {
    /// Output pixels.
    fn pixels(&self) -> usize {
        self.y_dims[..3].iter().product()
    }

    /// Calls `task` with the index and the sample, row and column in the picture of `count` output pixels from `first` on.
    fn each_place(&self, first: usize, count: usize, mut task: impl FnMut(usize, [usize; 3])) {
        let [_, height, width, _] = self.y_dims;
        let [mut n, mut h, mut w] = self.place(first);
        for i in 0..count {
            task(i, [n, h * self.params.stride[1], w * self.params.stride[2]]);
            w += 1;
            if w == width {
                (w, h) = (0, h + 1);
            }
            if h == height {
                (h, n) = (0, n + 1);
            }
        }
    }

    /// Sample, row and column of output pixel `index`.
    fn place(&self, index: usize) -> [usize; 3] {
        let [_, height, width, _] = self.y_dims;
        [index / (height * width), index / width % height, index % width]
    }
}

/// Whether [`conv_last`] has a way for the window: two spatial dimensions at most, and either one group or one channel
/// of input and output a group.
pub fn has_conv_last(params: &ConvParams, channels: usize, outputs: usize) -> bool {
    let flat = params.kernel[0] == 1 && params.pad_before[0] == 0 && params.pad_after[0] == 0;
    let depthwise = params.groups == channels && params.groups == outputs;
    flat && params.stride[0] == 1 && (params.groups == 1 || depthwise)
}

/// Computes `y[n, h, w, o]` (row-major) from `x[n, h, w, c]`. Channels lie side by side, or anywhere when
/// [`PackedConv::gathers`].
///
/// # Panics
/// When the shapes do not fit each other or the packed weights.
pub fn conv_last(
    pool: &Pool,
    x: View<'_, f32>,
    conv: &ConvLast<'_>,
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let params = *conv.packed.params();
    let four = |shape: &[usize]| <[usize; 4]>::try_from(shape).expect("conv: a picture has four dimensions");
    let (x_dims, y_dims) = (four(x.shape()), four(y.shape()));
    let channel_step = if x_dims[3] == 1 { 1 } else { x.strides()[3] };
    assert!(
        (channel_step == 1 || conv.packed.gathers()) && y.is_contiguous(),
        "conv: channels side by side"
    );
    let fits = x_dims[0] == y_dims[0]
        && x_dims[3] == conv.packed.channels()
        && y_dims[3] == conv.packed.outputs()
        && params.output_len(1, x_dims[1]) == Some(y_dims[1])
        && params.output_len(2, x_dims[2]) == Some(y_dims[2]);
    assert!(fits, "conv: {x_dims:?} to {y_dims:?}");
    assert!(
        conv.bias.is_none_or(|bias| bias.len() == y_dims[3]),
        "conv: one bias per output"
    );
    if y_dims.contains(&0) {
        return;
    }
    let target = Shared(y.ptr());
    let call = Call {
        packed: conv.packed,
        params,
        epilogue: Epilogue::new(conv, target, y.len()),
        x: Shared::of(x.ptr()),
        x_dims,
        x_steps: [x.strides()[0], x.strides()[1], x.strides()[2]],
        channel_step,
        y: target,
        y_dims,
    };
    match conv.packed.way() {
        Way::Direct => direct::run::<false>(pool, &call, scratch),
        Way::Pairs => direct::run::<true>(pool, &call, scratch),
        Way::Depthwise => depthwise::run(pool, &call),
        Way::Winograd4 => winograd::run::<winograd::Four>(pool, &call, scratch),
        Way::Winograd2 => winograd::run::<winograd::Two>(pool, &call, scratch),
    }
}

pub use chain::{ConvChain, conv_chain, has_conv_chain};

#[cfg(test)]
mod tests;
