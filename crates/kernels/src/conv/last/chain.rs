//! A depthwise convolution with the windows of one pixel before and behind it: what lies between them stays in the caches of the
//! thread that makes it.
//!
//! A thread has some rows of the result. It expands the picture by a panel of channels at a time, of which the depthwise windows
//! need no more than a few rows (a ring in the first cache); their results, of all panels, are what the last convolution reads.

use super::depthwise::{Lines, Row, inside};
use super::direct::{Part, Product, Rounded, Runs};
use super::epilogue::Epilogue;
use super::packed::Way;
use super::{Beside, Call, ConvLast};
use crate::conv::ConvParams;
use crate::gemm::panel_width;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{dispatch, dispatch_pairs};
use crate::strided::{View, ViewMut};
use half::bf16;
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
    let space = work.space(rows);
    let (_, memory) = scratch.with_own(0, pool.threads(), space);
    pool.run_indexed(y_dims[0] * each, &|worker, chunk| {
        let (sample, start) = (chunk / each, chunk % each * rows);
        // SAFETY: each worker has its own part of the memory.
        let own = unsafe { memory.of(worker) };
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
            apart: 0,
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

    /// Elements of a pixel: in pairs, half as many as channels.
    fn len(&self) -> usize {
        self.product.runs.len
    }

    /// Rounds pixels of `x`, which lie `step` apart, as many as `to` has room for.
    ///
    /// # Safety
    /// The pixels are readable.
    unsafe fn round(&self, x: *const f32, step: isize, to: &mut [f32]) {
        dispatch_pairs(Rounded {
            from: x,
            step,
            channel_step: 1,
            channels: self.channels,
            to: bytemuck::cast_slice_mut(to),
            to_step: 2 * self.len(),
        });
    }

    /// Computes outputs `outputs` of the pixels `range` of `y`, `line` apart, from as many at `x`, which lie `step` apart.
    ///
    /// # Safety
    /// The pixels are readable, rounded where they must be, and those of `y` are this thread's.
    unsafe fn run(
        &self,
        (x, step): (*const f32, isize),
        range: Range<usize>,
        outputs: Range<usize>,
        (y, line): (Shared<f32>, usize),
    ) {
        let x = Shared::of(x);
        let starts = |first: usize, starts: &mut [*const f32]| {
            for (i, start) in starts.iter_mut().enumerate() {
                *start = x.at((first - range.start + i) as isize * step);
            }
        };
        let part = Part {
            product: self.product,
            starts: &starts,
            pixels: range.clone(),
            outputs,
            epilogue: self.epilogue,
            y,
            line,
        };
        if self.pairs {
            part.run::<true>();
        } else {
            part.run::<false>();
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
    /// Rows of the picture that the windows of row `out` of the result read.
    fn above(&self, out: usize) -> Range<usize> {
        let cells = inside(&self.call, 1, out, self.call.x_dims[1]);
        let top =
            (out * self.call.params.stride[1] + cells.start).saturating_sub(self.call.params.pad_before[1]);
        top..top + cells.len()
    }

    /// Channels that are computed together: with nothing to expand, all of them.
    fn panel(&self) -> usize {
        let channels = self.call.x_dims[3];
        self.expand
            .as_ref()
            .map_or(channels, |_| panel_width().min(channels))
    }

    /// Pixels of a row of the ring: the padding of the depthwise windows is written out there.
    fn padded(&self) -> usize {
        self.call.params.pad_before[2] + self.call.x_dims[2] + self.call.params.pad_after[2]
    }

    /// Numbers of working memory that `rows` rows need: the rounded picture, the ring, a row and all rows between the last two
    /// convolutions.
    fn lens(&self, rows: usize) -> [usize; 4] {
        let ([_, _, wide, channels], width) = (self.call.x_dims, self.call.y_dims[2]);
        let params = &self.call.params;
        let pairs = |pixels: &Option<Pixels<'_>>| pixels.as_ref().filter(|p| p.pairs).map(Pixels::len);
        let above = rows.saturating_sub(1) * params.stride[1] + params.kernel[1];
        let picture = pairs(&self.expand).map_or(0, |len| above * wide * len);
        let ring = match &self.expand {
            Some(_) => params.kernel[1] * self.padded() * self.panel(),
            None => 0,
        };
        let between = pairs(&self.project);
        let row = between.map_or(0, |_| width * self.panel());
        let kept = if self.panel() < channels { rows } else { 1 };
        let all = match &self.project {
            Some(_) => kept * width * between.unwrap_or(channels),
            None => 0,
        };
        [picture, ring, row, all].map(|len| len.next_multiple_of(16))
    }

    /// Numbers of working memory that `rows` rows need.
    fn space(&self, rows: usize) -> usize {
        self.lens(rows).iter().sum()
    }

    /// Rows `rows` of the result of a sample, which are this thread's.
    fn rows(&self, sample: usize, rows: Range<usize>, space: &mut [f32]) {
        let [picture_len, ring_len, row_len, _] = self.lens(rows.len());
        let (rounded, rest) = space.split_at_mut(picture_len);
        let (ring, rest) = rest.split_at_mut(ring_len);
        let (row, all) = rest.split_at_mut(row_len);
        // The columns beside the picture stay zeros.
        ring.fill(0.0);
        let (mut window, each) = (self.call, self.panel());
        if self.expand.is_some() {
            window.x_steps[2] = each as isize;
            window.x_dims[2] = self.padded();
            (window.params.pad_before[2], window.params.pad_after[2]) = (0, 0);
        }
        let mut chunk = Chunk {
            work: self,
            window,
            picture: self.call.x.at(sample as isize * self.call.x_steps[0]),
            top: self.above(rows.start).start,
            rounded,
            ring,
            row,
            all,
        };
        let [_, height, width, channels] = self.call.y_dims;
        let first = (sample * height + rows.start) * width;
        // SAFETY: these rows of the result are this thread's, and so are all that are read of the picture.
        unsafe {
            chunk.round(self.above(rows.end - 1).end);
            for start in (0..channels).step_by(each.max(1)) {
                let panel = start..(start + each).min(channels);
                let mut expanded = chunk.top;
                for (index, out) in rows.clone().enumerate() {
                    // Rows of the window before are there already.
                    let above = self.above(out);
                    for row in expanded.max(above.start)..above.end {
                        chunk.expand(row, panel.clone());
                    }
                    expanded = expanded.max(above.end);
                    let pixel = first + index * width;
                    if each < channels {
                        chunk.window(out, panel.clone(), (index, pixel));
                    } else {
                        // With one panel, a row is finished before the next one.
                        chunk.window(out, panel.clone(), (0, pixel));
                        chunk.project(pixel..pixel + width);
                    }
                }
            }
            if each < channels {
                chunk.project(first..first + rows.len() * width);
            }
        }
    }
}

/// Some rows of the result of a sample, on one thread.
struct Chunk<'a> {
    work: &'a Work<'a>,
    /// The depthwise convolution as it reads the ring.
    window: Call<'a>,
    picture: *const f32,
    /// The first row that is read of the picture.
    top: usize,
    /// The picture from there on, where it is expanded in pairs.
    rounded: &'a mut [f32],
    ring: &'a mut [f32],
    row: &'a mut [f32],
    all: &'a mut [f32],
}

impl Chunk<'_> {
    fn picture_row(&self, row: usize) -> *const f32 {
        self.picture
            .wrapping_offset(row as isize * self.work.call.x_steps[1])
    }

    /// Rounds the rows of the picture up to `end`, where they are expanded in pairs.
    ///
    /// # Safety
    /// They exist.
    unsafe fn round(&mut self, end: usize) {
        let Some(expand) = self.work.expand.as_ref().filter(|e| e.pairs) else {
            return;
        };
        let (wide, step) = (self.work.call.x_dims[2], self.work.call.x_steps[2]);
        for row in self.top..end {
            let from = self.picture_row(row);
            let line = wide * expand.len();
            let to = &mut self.rounded[(row - self.top) * line..][..line];
            // SAFETY: a row of the picture.
            unsafe { expand.round(from, step, to) };
        }
    }

    /// Expands a row of the picture to some channels, where there is anything to expand.
    ///
    /// # Safety
    /// The row exists, and is rounded where it must be.
    unsafe fn expand(&mut self, row: usize, panel: Range<usize>) {
        let Some(expand) = &self.work.expand else {
            return;
        };
        let call = &self.work.call;
        let (wide, each) = (call.x_dims[2], self.work.panel());
        let from = if expand.pairs {
            let line = wide * expand.len();
            let from = self.rounded[(row - self.top) * line..][..line].as_ptr();
            (from, expand.len() as isize)
        } else {
            (self.picture_row(row), call.x_steps[2])
        };
        let line = self.work.padded() * each;
        let to = &mut self.ring[row % call.params.kernel[1] * line..][..line];
        let to = to.as_mut_ptr().wrapping_add(call.params.pad_before[2] * each);
        // SAFETY: the row is the caller's, its place in the ring was just looked up.
        unsafe {
            expand.run(
                from,
                0..wide,
                panel.clone(),
                (Shared(to.wrapping_sub(panel.start)), each),
            )
        };
    }

    /// The depthwise windows of row `out` of the result, for some channels; they go to row `index` of those that are kept, or to
    /// the result itself from pixel `pixel` on.
    ///
    /// # Safety
    /// The rows they read are expanded, and the row of the result is this thread's.
    unsafe fn window(&mut self, out: usize, panel: Range<usize>, (index, pixel): (usize, usize)) {
        let work = self.work;
        let (width, channels, each) = (self.window.y_dims[2], self.window.y_dims[3], work.panel());
        let pairs = work.project.as_ref().filter(|p| p.pairs);
        let lines = if work.expand.is_some() {
            Lines::Ring {
                first: Shared(self.ring.as_mut_ptr().wrapping_sub(panel.start)),
                rows: self.window.params.kernel[1],
                line: work.padded() * each,
            }
        } else {
            Lines::Picture {
                first: Shared::of(self.picture),
                step: self.window.x_steps[1],
            }
        };
        let (y, at, step) = if pairs.is_some() {
            assert!(self.row.len() >= width * each, "conv: a row between");
            (Shared(self.row.as_mut_ptr().wrapping_sub(panel.start)), 0, each)
        } else if work.project.is_some() {
            let line = width * channels;
            let to = self.all[index * line..][..line].as_mut_ptr();
            (Shared(to), 0, channels)
        } else {
            (work.call.y, pixel * channels, channels)
        };
        dispatch(Row {
            call: &self.window,
            lines,
            row: out,
            channels: panel.clone(),
            y,
            at,
            step,
        });
        if let Some(project) = pairs {
            let line = width * project.len();
            let to: &mut [bf16] = bytemuck::cast_slice_mut(&mut self.all[index * line..][..line]);
            dispatch_pairs(Rounded {
                from: self.row.as_ptr(),
                step: each as isize,
                channel_step: 1,
                channels: panel.len(),
                to: &mut to[panel.start..],
                to_step: 2 * project.len(),
            });
        }
    }

    /// The last convolution, where there is one, from the rows that are kept to pixels `pixels` of the result.
    ///
    /// # Safety
    /// They are this thread's.
    unsafe fn project(&self, pixels: Range<usize>) {
        let Some(project) = &self.work.project else {
            return;
        };
        let (len, outputs) = (project.len(), project.product.outputs);
        let from = self.all[..pixels.len() * len].as_ptr();
        // SAFETY: the rows were just looked up, those of the result are the caller's.
        unsafe {
            project.run(
                (from, len as isize),
                pixels,
                0..outputs,
                (self.work.call.y, outputs),
            )
        };
    }
}
