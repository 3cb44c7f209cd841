//! Weights in the order the kernels read them.

use super::winograd;
use crate::conv::ConvParams;
use crate::gemm::{Arithmetic, panel_width};
use crate::scratch::Scratch;
use crate::weights::Weights;
use half::bf16;

/// Channels of pictures that come from outside.
const FEW: usize = 4;

/// How a convolution is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Windows read where they lie.
    Direct,
    /// The same in pairs of bf16: two channels lie where one does otherwise.
    Pairs,
    /// One channel a group.
    Depthwise,
    /// Winograd's F(4x4, 3x3).
    Winograd4,
    /// Winograd's F(2x2, 3x3).
    Winograd2,
}

/// The weights of a convolution, decoded to `f32` and packed for the vectors of this processor.
#[derive(Debug)]
pub struct PackedConv {
    way: Way,
    params: ConvParams,
    channels: usize,
    outputs: usize,
    data: Scratch,
    len: usize,
}

impl PackedConv {
    /// Packs `weights`, `[o, c / groups * kernel]` as files have them, for pictures whose results have `pixels` rows and
    /// columns.
    ///
    /// # Panics
    /// When [`has_conv_last`](super::has_conv_last) says no, or the weights do not fit the window.
    pub fn new(
        weights: &Weights,
        params: &ConvParams,
        pixels: [usize; 2],
        arithmetic: Arithmetic,
    ) -> PackedConv {
        let cells = params.kernel[1] * params.kernel[2];
        let outputs = weights.rows();
        let channels = weights.cols() / cells.max(1) * params.groups;
        assert!(
            super::has_conv_last(params, channels, outputs)
                && weights.cols() * params.groups == channels * cells,
            "conv: weights"
        );
        let way = best_way(params, [channels, outputs], pixels, arithmetic);
        let mut packed = PackedConv {
            way,
            params: *params,
            channels,
            outputs,
            data: Scratch::new(),
            len: 0,
        };
        match way {
            Way::Depthwise => packed.pack_depthwise(weights, cells),
            Way::Direct => packed.pack_direct(weights, cells),
            Way::Pairs => packed.pack_pairs(weights, cells),
            Way::Winograd4 => winograd::pack::<winograd::Four>(&mut packed, weights),
            Way::Winograd2 => winograd::pack::<winograd::Two>(&mut packed, weights),
        }
        packed
    }

    /// True when packing weights of the same file for this window and result would give the same.
    pub fn serves(&self, params: &ConvParams, pixels: [usize; 2], arithmetic: Arithmetic) -> bool {
        let sizes = [self.channels, self.outputs];
        self.params == *params && self.way == best_way(params, sizes, pixels, arithmetic)
    }

    /// `[cell][channel]`
    fn pack_depthwise(&mut self, weights: &Weights, cells: usize) {
        let outputs = self.outputs;
        let mut row = vec![0.0; cells];
        let out = self.grow(cells * outputs);
        for o in 0..outputs {
            weights.decode(o, 0, &mut row);
            for (cell, w) in row.iter().enumerate() {
                out[cell * outputs + o] = *w;
            }
        }
    }

    /// `[panel][cell][channel][width]`, or `[panel][channel][cell][width]` for [`PackedConv::planes`].
    fn pack_direct(&mut self, weights: &Weights, cells: usize) {
        let (channels, outputs) = (self.channels, self.outputs);
        let planes = self.planes();
        let mut row = vec![0.0; cells * channels];
        let out = self.grow(padded(outputs) * cells * channels);
        for o in 0..outputs {
            weights.decode(o, 0, &mut row);
            let (start, width) = panel_of(o, outputs, cells * channels);
            for (c, part) in row.chunks_exact(cells).enumerate() {
                for (cell, w) in part.iter().enumerate() {
                    let at = if planes {
                        c * cells + cell
                    } else {
                        cell * channels + c
                    };
                    out[start + at * width] = *w;
                }
            }
        }
    }

    /// `[panel][cell][pair of channels][width]`
    fn pack_pairs(&mut self, weights: &Weights, cells: usize) {
        let (channels, outputs) = (self.channels, self.outputs);
        let pairs = channels.div_ceil(2);
        let mut row = vec![0.0; cells * channels];
        let out = self.grow(padded(outputs) * cells * pairs);
        for o in 0..outputs {
            weights.decode(o, 0, &mut row);
            let (start, width) = panel_of(o, outputs, cells * pairs);
            for (c, part) in row.chunks_exact(cells).enumerate() {
                for (cell, w) in part.iter().enumerate() {
                    let bits = u32::from(bf16::from_f32(*w).to_bits()) << (c % 2 * 16);
                    let at = &mut out[start + (cell * pairs + c / 2) * width];
                    *at = f32::from_bits(at.to_bits() | bits);
                }
            }
        }
    }

    /// Room for `len` zeros.
    pub(super) fn grow(&mut self, len: usize) -> &mut [f32] {
        self.len = len;
        let out = self.data.f32(len);
        out.fill(0.0);
        out
    }

    pub(super) fn data(&self) -> &[f32] {
        self.data.as_f32(self.len)
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    /// The window.
    pub fn params(&self) -> &ConvParams {
        &self.params
    }

    /// Input channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Output channels.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether pictures may come with their channels apart: they are copied once anyway, or small.
    pub fn gathers(&self) -> bool {
        matches!(self.way, Way::Direct | Way::Pairs) && self.channels <= FEW
    }

    /// Whether pictures are copied to a plane for each channel: the cells of a row of the window lie side by side there, and few
    /// channels do not make a stretch worth walking.
    pub(super) fn planes(&self) -> bool {
        self.way == Way::Direct && self.gathers() && self.params.dilation[2] == 1
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<f32>()
    }

    /// What the kernel does, for reports: `direct`, `bf16 pairs`, `depthwise`, `winograd 4x4`, `winograd 2x2`.
    pub fn method(&self) -> &'static str {
        match self.way {
            Way::Direct => "direct",
            Way::Pairs => "bf16 pairs",
            Way::Depthwise => "depthwise",
            Way::Winograd4 => "winograd 4x4",
            Way::Winograd2 => "winograd 2x2",
        }
    }
}

fn best_way(
    params: &ConvParams,
    [channels, outputs]: [usize; 2],
    pixels: [usize; 2],
    arithmetic: Arithmetic,
) -> Way {
    if params.groups > 1 {
        return Way::Depthwise;
    }
    /// Sums a pixel of few channels takes from which pairs make up for rounding it, channel by channel.
    const LEAST_SUMS: usize = 1024;
    let transformed = winograd::worth(params, channels, outputs, pixels);
    let cells = params.kernel[1] * params.kernel[2];
    let pays = channels > FEW || cells * outputs >= LEAST_SUMS;
    match arithmetic {
        Arithmetic::InOrder => Way::Direct,
        _ if pays && arithmetic.in_pairs() => Way::Pairs,
        Arithmetic::F32 | Arithmetic::Bf16 | Arithmetic::Int8 => transformed,
    }
}

/// Outputs with the zeros behind the last one: whole vectors.
pub(super) fn padded(outputs: usize) -> usize {
    outputs.next_multiple_of(panel_width() / 2)
}

/// Width of the panel whose first output is `first`: two vectors, or one where one is enough.
pub(super) fn width_at(first: usize, outputs: usize) -> usize {
    let width = panel_width();
    if outputs - first <= width / 2 {
        width / 2
    } else {
        width
    }
}

/// Where the weights of output `o` begin among panels of depth `k`, and how far apart they are.
pub(super) fn panel_of(o: usize, outputs: usize, k: usize) -> (usize, usize) {
    let first = o / panel_width() * panel_width();
    (first * k + (o - first), width_at(first, outputs))
}
