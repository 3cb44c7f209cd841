//! A depthwise convolution with the windows of one pixel before and behind it, row by row: what lies between them stays in the
//! cache of the thread that makes it.

use super::depthwise::{Lines, Row, inside};
use super::direct::{Part, Product, Rounded, Runs};
use super::epilogue::Epilogue;
use super::packed::Way;
use super::{Beside, Call, ConvLast};
use crate::conv::ConvParams;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{dispatch, dispatch_pairs};
use crate::strided::{View, ViewMut};
use std::ops::Range;

/// Convolutions that are computed together: each takes what the one before it gives.
#[derive(Debug, Clone, Copy)]
pub struct ConvChain<'a> {
    /// A window of one pixel.
    pub expand: Option<ConvLast<'a>>,
    /// One channel a group.
    pub depthwise: ConvLast<'a>,
    /// A window of one pixel; it alone may have a residual.
    pub project: Option<ConvLast<'a>>,
}

/// Rows of results a thread computes in a go, at least.
const LEAST_ROWS: usize = 4;

fn is_pixel(conv: &ConvLast<'_>) -> bool {
    let pixel = ConvParams {
        kernel: [1; 3],
        ..ConvParams::default()
    };
    *conv.packed.params() == pixel && matches!(conv.packed.way(), Way::Direct | Way::Pairs)
}

/// Whether [`conv_chain`] computes these convolutions, in order: of one pixel, depthwise, of one pixel, without the first or the
/// last of them, or both.
pub fn has_conv_chain(chain: &ConvChain<'_>) -> bool {
    let middle = &chain.depthwise.packed;
    middle.way() == Way::Depthwise
        && middle.params().dilation == [1; 3]
        && chain
            .expand
            .is_none_or(|e| is_pixel(&e) && !e.packed.planes() && e.packed.outputs() == middle.channels())
        && chain
            .project
            .is_none_or(|p| is_pixel(&p) && !p.packed.planes() && p.packed.channels() == middle.channels())
}

/// Computes `y[n, h, w, o]` (row-major) from `x[n, h, w, c]`, whose channels lie side by side.
///
/// # Panics
/// When [`has_conv_chain`] says no, the shapes do not fit each other, or another than the last has a residual.
pub fn conv_chain(
    pool: &Pool,
    x: View<'_, f32>,
    chain: &ConvChain<'_>,
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let four = |shape: &[usize]| <[usize; 4]>::try_from(shape).expect("conv: a picture has four dimensions");
    let (x_dims, y_dims) = (four(x.shape()), four(y.shape()));
    let middle = chain.depthwise.packed;
    let (params, channels) = (*middle.params(), middle.channels());
    let first = chain.expand.map_or(channels, |e| e.packed.channels());
    let last = chain.project.map_or(channels, |p| p.packed.outputs());
    let fits = x_dims[0] == y_dims[0]
        && x_dims[3] == first
        && y_dims[3] == last
        && params.output_len(1, x_dims[1]) == Some(y_dims[1])
        && params.output_len(2, x_dims[2]) == Some(y_dims[2]);
    assert!(
        fits && has_conv_chain(chain),
        "conv: a chain from {x_dims:?} to {y_dims:?}"
    );
    assert!(
        (x.strides()[3] == 1 || x_dims[3] == 1) && y.is_contiguous(),
        "conv: channels side by side"
    );
    assert!(
        chain.depthwise.bias.is_none_or(|bias| bias.len() == channels),
        "conv: one bias per output"
    );
    let alone = |c: &ConvLast<'_>| matches!(c.residual, Beside::None);
    assert!(
        chain.expand.is_none_or(|e| alone(&e)) && alone(&chain.depthwise),
        "conv: a residual inside a chain"
    );
    if y_dims.contains(&0) {
        return;
    }
    let target = Shared(y.ptr());
    let nowhere = Shared(std::ptr::null_mut());
    let [_, height, width, _] = y_dims;
    let call = Call {
        packed: middle,
        params,
        epilogue: Epilogue::new(&chain.depthwise, nowhere, 0),
        x: Shared::of(x.ptr()),
        x_dims: [x_dims[0], x_dims[1], x_dims[2], channels],
        x_steps: [x.strides()[0], x.strides()[1], x.strides()[2]],
        channel_step: 1,
        y: target,
        y_dims: [x_dims[0], height, width, channels],
    };
    let work = Work {
        call,
        expand: chain.expand.map(|e| Pixels::new(&e, nowhere, 0)),
        project: chain.project.map(|p| Pixels::new(&p, target, y.len())),
    };
    // Rows at the borders of chunks are expanded twice.
    let chunks = if chain.expand.is_some() { 2 } else { 4 };
    let rows = height.div_ceil(chunks * pool.threads()).max(LEAST_ROWS);
    let each = height.div_ceil(rows);
    let space = work.space();
    let memory = Shared(scratch.f32(pool.threads() * space).as_mut_ptr());
    pool.run_indexed(y_dims[0] * each, &|worker, chunk| {
        let (sample, start) = (chunk / each, chunk % each * rows);
        // SAFETY: each worker has its own part of the memory.
        let own = unsafe { std::slice::from_raw_parts_mut(memory.at((worker * space) as isize), space) };
        work.rows(sample, start..(start + rows).min(height), own);
    });
}

/// A convolution of one pixel.
struct Pixels<'a> {
    product: Product<'a>,
    epilogue: Epilogue<'a>,
    channels: usize,
    pairs: bool,
}

impl<'a> Pixels<'a> {
    fn new(conv: &ConvLast<'a>, y: Shared<f32>, len: usize) -> Self {
        let pairs = conv.packed.way() == Way::Pairs;
        let channels = conv.packed.channels();
        let runs = Runs {
            rows: 1,
            columns: 1,
            steps: [0; 2],
            len: if pairs { channels.div_ceil(2) } else { channels },
        };
        let (weights, outputs) = (conv.packed.data(), conv.packed.outputs());
        assert!(
            conv.bias.is_none_or(|bias| bias.len() == outputs),
            "conv: one bias per output"
        );
        Pixels {
            product: Product {
                weights,
                outputs,
                runs,
            },
            epilogue: Epilogue::new(conv, y, len),
            channels,
            pairs,
        }
    }

    /// Computes the pixels `range` of `y` from as many at `x`, which lie `step` apart; `rounded` is memory for them in pairs.
    ///
    /// # Safety
    /// The pixels are readable, and those of `y` are this thread's.
    unsafe fn run(
        &self,
        x: *const f32,
        step: isize,
        range: Range<usize>,
        y: Shared<f32>,
        rounded: &mut [f32],
    ) {
        let len = self.product.runs.len;
        let (x, step) = if self.pairs {
            let to = &mut rounded[..range.len() * len];
            dispatch_pairs(Rounded {
                from: x,
                step,
                channel_step: 1,
                channels: self.channels,
                to: bytemuck::cast_slice_mut(to),
            });
            (to.as_ptr(), len as isize)
        } else {
            (x, step)
        };
        let x = Shared::of(x);
        let starts = |first: usize, starts: &mut [*const f32]| {
            for (i, start) in starts.iter_mut().enumerate() {
                *start = x.at((first - range.start + i) as isize * step);
            }
        };
        let (product, outputs) = (self.product, 0..self.product.outputs);
        let (pixels, epilogue) = (range.clone(), self.epilogue);
        if self.pairs {
            dispatch_pairs(Part::<_, true> {
                product,
                starts: &starts,
                pixels,
                outputs,
                epilogue,
                y,
            });
        } else {
            dispatch(Part::<_, false> {
                product,
                starts: &starts,
                pixels,
                outputs,
                epilogue,
                y,
            });
        }
    }
}

/// What all chunks of a chain share.
struct Work<'a> {
    /// The depthwise convolution from the picture to the result, where nothing is before and behind it.
    call: Call<'a>,
    expand: Option<Pixels<'a>>,
    project: Option<Pixels<'a>>,
}

impl Work<'_> {
    /// Expanded rows that are kept: those of a window.
    fn ring(&self) -> usize {
        if self.expand.is_some() {
            self.call.params.kernel[1]
        } else {
            0
        }
    }

    /// Numbers of the ring, of a row between the last two convolutions, and of a row in pairs.
    fn lens(&self) -> [usize; 3] {
        let ([_, _, wide, channels], width) = (self.call.x_dims, self.call.y_dims[2]);
        let row = if self.project.is_some() {
            width * channels
        } else {
            0
        };
        let pairs = |pixels: &Option<Pixels<'_>>, width: usize| {
            pixels
                .as_ref()
                .filter(|p| p.pairs)
                .map_or(0, |p| width * p.product.runs.len)
        };
        let rounded = pairs(&self.expand, wide).max(pairs(&self.project, width));
        [self.ring() * wide * channels, row, rounded].map(|len| len.next_multiple_of(16))
    }

    /// Numbers of working memory that [`Work::rows`] needs.
    fn space(&self) -> usize {
        self.lens().iter().sum()
    }

    /// Rows `rows` of the result of a sample, which are this thread's.
    fn rows(&self, sample: usize, rows: Range<usize>, space: &mut [f32]) {
        let [ring_len, row_len, _] = self.lens();
        let (ring, rest) = space.split_at_mut(ring_len);
        let (row, rounded) = rest.split_at_mut(row_len);
        let [_, tall, wide, channels] = self.call.x_dims;
        let [_, height, width, _] = self.call.y_dims;
        let ring = Shared(ring.as_mut_ptr());
        let picture = self.call.x.at(sample as isize * self.call.x_steps[0]);
        let mut call = self.call;
        let lines = if self.expand.is_some() {
            call.x_steps[2] = channels as isize;
            Lines::Ring {
                first: ring,
                rows: self.ring(),
                line: wide * channels,
            }
        } else {
            Lines::Picture {
                first: Shared(picture),
                step: call.x_steps[1],
            }
        };
        let mut expanded = 0;
        for out in rows {
            let cells = inside(&call, 1, out, tall);
            let top = (out * call.params.stride[1] + cells.start).saturating_sub(call.params.pad_before[1]);
            if let Some(expand) = &self.expand {
                // Rows of the window before are there already.
                expanded = expanded.max(top);
                while expanded < top + cells.len() {
                    let from = picture.wrapping_offset(expanded as isize * self.call.x_steps[1]);
                    let to = ring.at((expanded % self.ring() * wide * channels) as isize);
                    // SAFETY: a row of the picture, and one of this thread's ring.
                    unsafe { expand.run(from, self.call.x_steps[2], 0..wide, Shared(to), rounded) };
                    expanded += 1;
                }
            }
            let first = (sample * height + out) * width;
            let (y, at) = match &self.project {
                Some(_) => (Shared(row.as_mut_ptr()), 0),
                None => (call.y, first * channels),
            };
            dispatch(Row {
                call: &call,
                lines,
                row: out,
                y,
                at,
            });
            if let Some(project) = &self.project {
                // SAFETY: the row that was just made, and a row of the result, which is this thread's.
                unsafe {
                    project.run(
                        row.as_ptr(),
                        channels as isize,
                        first..first + width,
                        call.y,
                        rounded,
                    )
                };
            }
        }
    }
}
