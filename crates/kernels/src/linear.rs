//! Linear layers: activations times a stored weight matrix, with bias, activation and residual fused.
//!
//! Few tokens go vector by vector, reading the weights as stored; more go through the blocked product in `gemm`.

use crate::elementwise::{Unary, apply_slice};
use crate::gemm::{
    Arithmetic, Gemm, Rows, SQUARE, block_space, by_tiles, opening, pack_pairs, pack_panels, panel_width,
};
use crate::loops::Shared;
use crate::matvec::far::{self, Count, STREAMS};
use crate::matvec::{self, Prepared};
use crate::pool::{More, Pool};
use crate::scratch::{Own, Scratch};
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs, has_pairs};
use crate::strided::{View, ViewMut};
use crate::weights::{Lines, Read, Weights};
use std::cell::RefCell;
use std::ops::Range;

/// Up to this many tokens are multiplied one by one.
const FEW_TOKENS: usize = 4;

/// Rows handled between two looks at the output.
const ROW_BLOCK: usize = 256;

/// Weight bytes a thread should read before a second one is worth waking.
const CHUNK_BYTES: usize = 16 * 1024;

/// Rows of weights decoded together, and tokens they are multiplied with, in the blocked product.
const GEMM_ROWS: usize = 48;
const GEMM_TOKENS: usize = 256;

/// Layers dispatched together at most; more go in turns.
const TOGETHER: usize = 8;

/// How a result is made, and what happens to it before it is stored: `activation(sum + bias) + residual`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value per output, N of them.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// Added last, `[m, n]`.
    pub residual: Option<View<'a, f32>>,
    /// How sums are made when there are many rows of `x`; few are multiplied as the weights are stored.
    pub arithmetic: Arithmetic,
}

/// One weight matrix applied to the common input.
#[derive(Debug, Clone, Copy)]
struct Layer<'a> {
    w: Read<'a>,
    /// Multiplies the activated result.
    up: Option<Read<'a>>,
    bias: Option<&'a [f32]>,
    activation: Option<Unary>,
    residual: Option<(Shared<f32>, [isize; 2])>,
    y: Shared<f32>,
    steps: [isize; 2],
    /// Many tokens are multiplied in pairs of bf16.
    pairs: bool,
    /// Results of many tokens go into these panels of the next product, not into `y`.
    panels: Option<Shared<f32>>,
}

impl<'a> Layer<'a> {
    fn new(w: &'a Weights, x: &View<'_, f32>, y: &mut ViewMut<'_, f32>, epilogue: &Epilogue<'a>) -> Self {
        let &[m, k] = x.shape() else {
            panic!("a linear layer takes matrices")
        };
        Layer::of(w, (m, k), y, epilogue)
    }

    /// Of an input of `m` tokens of `k`.
    fn of(w: &'a Weights, (m, k): (usize, usize), y: &mut ViewMut<'_, f32>, epilogue: &Epilogue<'a>) -> Self {
        let &[ym, n] = y.shape() else {
            panic!("a linear layer gives a matrix")
        };
        assert!(
            m == ym && k == w.cols() && n == w.rows(),
            "linear: x is {m} x {k}, weights {} x {}, y {ym} x {n}",
            w.rows(),
            w.cols()
        );
        assert!(
            epilogue.bias.is_none_or(|bias| bias.len() == n),
            "linear: one bias per output"
        );
        let residual = epilogue.residual.map(|r| {
            assert_eq!(r.shape(), [m, n], "linear: residual shape");
            (Shared::of(r.ptr()), [r.strides()[0], r.strides()[1]])
        });
        Layer {
            residual,
            y: Shared(y.ptr()),
            steps: [y.strides()[0], y.strides()[1]],
            ..Layer::bare(w, epilogue)
        }
    }

    /// Without an output and a residual.
    fn bare(w: &'a Weights, epilogue: &Epilogue<'a>) -> Self {
        Layer {
            w: Read::of(w),
            up: None,
            bias: epilogue.bias,
            activation: epilogue.activation,
            residual: None,
            y: Shared(std::ptr::null_mut()),
            steps: [0, 1],
            pairs: epilogue.arithmetic == Arithmetic::Bf16 && has_pairs(),
            panels: None,
        }
    }

    /// Adds the bias of row `row` and activates, for the sums of one row.
    fn finish_row(&self, row: usize, sums: &mut [f32]) {
        if let Some(bias) = self.bias {
            sums.iter_mut().for_each(|sum| *sum += bias[row]);
        }
        if let Some(op) = self.activation {
            apply_slice(op, sums);
        }
    }

    /// Adds the biases of `rows` and activates, for one sum per row.
    fn finish_token(&self, rows: Range<usize>, sums: &mut [f32]) {
        if let Some(bias) = self.bias {
            sums.iter_mut()
                .zip(&bias[rows])
                .for_each(|(sum, bias)| *sum += bias);
        }
        if let Some(op) = self.activation {
            apply_slice(op, sums);
        }
    }

    /// Adds the residual and stores `sums`, which are of rows `rows.start..` for token `token`.
    ///
    /// # Safety
    /// `token` and the rows are inside the output, and no other thread has them.
    unsafe fn store_token(&self, token: usize, first: usize, sums: impl Iterator<Item = f32>) {
        let to = self
            .y
            .at(token as isize * self.steps[0] + first as isize * self.steps[1]);
        match self.residual {
            None if self.steps[1] == 1 => {
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_add(i) = sum };
                }
            }
            None => {
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_offset(i as isize * self.steps[1]) = sum };
                }
            }
            Some((residual, [line, 1])) if self.steps[1] == 1 => {
                let from = residual.at(token as isize * line + first as isize);
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's; the residual has the shape of the output.
                    unsafe { *to.wrapping_add(i) = sum + *from.wrapping_add(i) };
                }
            }
            Some((residual, steps)) => {
                let from = residual.at(token as isize * steps[0] + first as isize * steps[1]);
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the residual has the shape of the output.
                    let sum = sum + unsafe { *from.wrapping_offset(i as isize * steps[1]) };
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_offset(i as isize * self.steps[1]) = sum };
                }
            }
        }
    }
}

/// `y[m, n] = activation(sum_k x[m, k] * w[n, k] + bias[n]) + residual[m, n]`.
///
/// Weights of 4- and 6-bit palettes are multiplied in 16-bit fixed point when `m` is small: an activation is then off
/// by at most `2^-15` of the greatest magnitude among its 64 neighbours. Everything else is `f32`.
///
/// # Panics
/// When the shapes do not fit.
pub fn linear(
    pool: &Pool,
    x: View<'_, f32>,
    w: &Weights,
    mut y: ViewMut<'_, f32>,
    epilogue: &Epilogue<'_>,
    scratch: &mut Scratch,
) {
    let tokens = x.shape()[0];
    if tokens <= FEW_TOKENS {
        w.used(pool, None);
    }
    let layer = Layer::new(w, &x, &mut y, epilogue);
    if tokens <= FEW_TOKENS {
        few(pool, x, &[layer], scratch.f32(few_space(tokens, x.shape()[1])));
    } else {
        many(pool, x, &[layer], scratch);
    }
}

/// `y[m, n] = act(sum_k x[m, k] * gate[n, k]) * sum_k x[m, k] * up[n, k]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn gated(
    pool: &Pool,
    x: View<'_, f32>,
    (gate, up): (&Weights, &Weights),
    (act, arithmetic): (Unary, Arithmetic),
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    assert!(
        up.rows() == gate.rows() && up.cols() == gate.cols(),
        "gated: two matrices of one shape"
    );
    let epilogue = Epilogue {
        activation: Some(act),
        arithmetic,
        ..Epilogue::default()
    };
    let tokens = x.shape()[0];
    if tokens <= FEW_TOKENS {
        gate.used(pool, Some(up));
    }
    let layer = Layer {
        up: Some(Read::of(up)),
        ..Layer::new(gate, &x, &mut y, &epilogue)
    };
    if tokens <= FEW_TOKENS {
        few(pool, x, &[layer], scratch.f32(few_space(tokens, x.shape()[1])));
    } else {
        many(pool, x, &[layer], scratch);
    }
}

/// A gated MLP: `down(act(x gateᵀ) * (x upᵀ))`.
#[derive(Debug, Clone, Copy)]
pub struct Mlp<'a> {
    /// `[n, k]`.
    pub gate: &'a Weights,
    /// `[n, k]`.
    pub up: &'a Weights,
    /// Applied to the gate's product.
    pub activation: Unary,
    /// `[l, n]`.
    pub down: &'a Weights,
}

/// `y[m, l] = mlp(x[m, k])` with the epilogue of its last product. What lies between the products is not stored where they read it from.
/// `next` is called when the last product begins, and may say with [`expect`] what is read after it.
///
/// # Panics
/// When the shapes do not fit.
pub fn mlp(
    pool: &Pool,
    x: View<'_, f32>,
    mlp: &Mlp<'_>,
    (mut y, epilogue): (ViewMut<'_, f32>, &Epilogue<'_>),
    next: &dyn Fn(),
    scratch: &mut Scratch,
) {
    let (&[m, k], n) = (x.shape(), mlp.gate.rows()) else {
        panic!("a linear layer takes matrices")
    };
    assert!(
        mlp.up.rows() == n && mlp.up.cols() == k && mlp.gate.cols() == k && mlp.down.cols() == n,
        "mlp: weights fit each other"
    );
    let between = Epilogue {
        activation: Some(mlp.activation),
        arithmetic: epilogue.arithmetic,
        ..Epilogue::default()
    };
    if m <= FEW_TOKENS {
        mlp.gate.used(pool, Some(mlp.up));
        mlp.down.used(pool, None);
        let space = scratch.f32(few_space(m, k) + few_space(m, n) + m * n);
        let (first, space) = space.split_at_mut(few_space(m, k));
        let (second, hidden) = space.split_at_mut(few_space(m, n));
        let gate = Layer {
            up: Some(Read::of(mlp.up)),
            y: Shared(hidden.as_mut_ptr()),
            steps: [n as isize, 1],
            ..Layer::bare(mlp.gate, &between)
        };
        expect(pool, std::iter::once((mlp.down, None)));
        few(pool, x, &[gate], first);
        let (shape, strides) = ([m, n], [n as isize, 1]);
        let hidden = View::new(hidden, 0, &shape, &strides).expect("so many numbers were asked for");
        let down = Layer::new(mlp.down, &hidden, &mut y, epilogue);
        next();
        return few(pool, hidden, &[down], second);
    }
    let gate = Layer {
        up: Some(Read::of(mlp.up)),
        ..Layer::bare(mlp.gate, &between)
    };
    let down = Layer::of(mlp.down, (m, n), &mut y, epilogue);
    let [first, second] = [k, n].map(|k| Tokens::new(m, k, gate.pairs));
    let (space, work) = scratch.with_own(first.len() + second.len(), pool.threads(), first.work());
    let (packed, hidden) = space.split_at_mut(first.len());
    count_pairs(pool, &[gate, down]);
    pack_tokens(pool, &x, first, packed);
    let panels = Some(Shared(hidden.as_mut_ptr()));
    products(pool, (packed, first), &[Layer { panels, ..gate }], work);
    next();
    products(pool, (hidden, second), &[down], work);
}

/// Several linear layers on one `x`, dispatched together: `outputs[i] = x * layers[i].0^T + layers[i].1`.
///
/// # Panics
/// When the shapes do not fit, or there are not as many outputs as layers.
pub fn linear_many(
    pool: &Pool,
    x: View<'_, f32>,
    layers: &[(&Weights, Option<&[f32]>)],
    arithmetic: Arithmetic,
    outputs: &mut [ViewMut<'_, f32>],
    scratch: &mut Scratch,
) {
    assert_eq!(layers.len(), outputs.len(), "as many outputs as layers");
    for (layers, outputs) in layers.chunks(TOGETHER).zip(outputs.chunks_mut(TOGETHER)) {
        let tokens = x.shape()[0];
        if tokens <= FEW_TOKENS {
            layers.iter().for_each(|(w, _)| w.used(pool, None));
        }
        let mut parts: [Option<Layer<'_>>; TOGETHER] = [None; TOGETHER];
        for ((part, (w, bias)), y) in parts.iter_mut().zip(layers).zip(outputs) {
            *part = Some(Layer::new(
                w,
                &x,
                y,
                &Epilogue {
                    bias: *bias,
                    arithmetic,
                    ..Epilogue::default()
                },
            ));
        }
        let Some(first) = parts[0] else { return };
        let parts = parts.map(|part| part.unwrap_or(first));
        if tokens <= FEW_TOKENS {
            few(
                pool,
                x,
                &parts[..layers.len()],
                scratch.f32(few_space(tokens, x.shape()[1])),
            );
        } else {
            many(pool, x, &parts[..layers.len()], scratch);
        }
    }
}

/// Rows in a chunk of each layer, so that all layers together make enough chunks of a useful size.
fn chunk_rows(pool: &Pool, layer: &Layer<'_>, tokens: usize, total_bytes: usize) -> usize {
    let twice = if layer.up.is_some() { 2 } else { 1 };
    let row_bytes = (layer.w.bytes() * twice / layer.w.rows().max(1)).max(1);
    let least = (CHUNK_BYTES / tokens.max(1)).max(total_bytes / (pool.threads() * 3));
    (least / row_bytes).max(1).next_multiple_of(8)
}

/// Working memory of [`few`] for `m` tokens of `k`.
fn few_space(m: usize, k: usize) -> usize {
    m * (k.next_multiple_of(16) + matvec::prepared_len(k))
}

/// Each token by itself: matrix times vector. `space` is [`few_space`].
fn few(pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], space: &mut [f32]) {
    let lanes = Lanes::of(pool, layers.iter().map(|layer| (layer.w, layer.up)));
    few_in(lanes, pool, x, layers, space);
}

/// As [`few`], spread over lanes in far streams where that suits.
fn few_in(lanes: Option<Lanes>, pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], mut space: &mut [f32]) {
    let [m, k] = [x.shape()[0], x.shape()[1]];
    if m == 0 {
        return;
    }
    let mut all: [&Weights; 16] = [layers[0].w.weights; 16];
    for (i, layer) in layers.iter().enumerate() {
        all[2 * i] = layer.w.weights;
        all[2 * i + 1] = layer.up.unwrap_or(layer.w).weights;
    }
    let empty: &[f32] = &[];
    let mut tokens = [matvec::unprepared(empty); FEW_TOKENS];
    for (i, token) in tokens.iter_mut().enumerate().take(m) {
        let (row, rest) = space.split_at_mut(k.next_multiple_of(16));
        let (prepared, rest) = rest.split_at_mut(matvec::prepared_len(k));
        let row = if x.strides()[1] == 1 {
            let from = x.ptr().wrapping_offset(i as isize * x.strides()[0]);
            // SAFETY: the row is inside the view, its elements side by side.
            unsafe { std::slice::from_raw_parts(from, k) }
        } else {
            gather_row(&x, i, &mut row[..k]);
            &row[..k]
        };
        *token = matvec::prepare(row, &all[..2 * layers.len()], prepared);
        space = rest;
    }
    if let Some(lanes) = lanes {
        return pool.run_lanes(lanes.chunks, &|lane, chunk, more| {
            let (which, part) = lanes.part(chunk);
            far_rows(&layers[which], &tokens[..m], (&lanes, which), (lane, part), more);
        });
    }
    let bytes = |layer: &Layer<'_>| layer.w.bytes() + layer.up.map_or(0, Read::bytes);
    let total: usize = layers.iter().map(bytes).sum();
    let mut ends = [0_usize; 8];
    let mut chunks = 0;
    for (end, layer) in ends.iter_mut().zip(layers) {
        chunks += layer.w.rows().div_ceil(chunk_rows(pool, layer, m, total));
        *end = chunks;
    }
    pool.run(chunks, &|chunk| {
        let (which, part) = part_of(&ends, chunk);
        let layer = &layers[which];
        let rows = chunk_rows(pool, layer, m, total);
        let first = part * rows;
        few_rows(layer, &tokens[..m], first..(first + rows).min(layer.w.rows()));
    });
}

/// The layer that a chunk belongs to, `ends` being where the chunks of each end, and which of its chunks it is.
fn part_of(ends: &[usize], chunk: usize) -> (usize, usize) {
    let which = ends.iter().position(|end| chunk < *end);
    let which = which.expect("chunks were counted over the layers");
    (which, chunk - if which == 0 { 0 } else { ends[which - 1] })
}

/// Bytes of a chunk that a thread takes without leaving its streams.
const FAR_BYTES: usize = 32 * 1024;

/// Rows of a stream between two looks at the output.
const FAR_ROWS: usize = 256;

/// Bytes that a thread asks for while it waits for the job that reads them: what it can ask for while another one rotates, normalises
/// and attends, a part of its second cache.
const AHEAD_BYTES: usize = 256 * 1024;

thread_local! {
    /// Sums of a stream's rows, stream by stream.
    static SUMS: RefCell<[f32; STREAMS * FAR_ROWS]> = const { RefCell::new([0.0; STREAMS * FAR_ROWS]) };
}

/// How layers that are read in far streams are spread over the lanes of a pool: each lane has its rows of every layer, layer by layer,
/// and reads them in streams of equal length that all go on from one chunk to the next.
#[derive(Debug, Clone, Copy, Default)]
struct Lanes {
    lanes: usize,
    /// Streams in the rows of each layer: the others are those of what it is multiplied with.
    streams: [usize; 8],
    /// Rows of each stream in a chunk.
    step: [usize; 8],
    /// Chunks of a lane up to the end of each layer.
    ends: [usize; 8],
    /// All chunks of a lane.
    chunks: usize,
}

impl Lanes {
    /// None where other ways suit the weights.
    fn of<'a>(
        pool: &Pool,
        layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)> + Clone,
    ) -> Option<Lanes> {
        Lanes::suit(pool, layers.clone()).then(|| Lanes::spread(pool, layers))
    }

    fn suit<'a>(pool: &Pool, mut layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)>) -> bool {
        let suits = |w: Read<'_>| far::suits(w) && w.bytes() >= 2 * CHUNK_BYTES * pool.lanes();
        layers.all(|(w, up)| suits(w) && up.is_none_or(|up| w.is_like(up)))
    }

    fn spread<'a>(pool: &Pool, layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)>) -> Lanes {
        let mut all = Lanes {
            lanes: pool.lanes(),
            ..Lanes::default()
        };
        for (i, (w, up)) in layers.enumerate() {
            all.streams[i] = streams_of(up);
            // Rows of the longest stream: lanes differ by a row. One chunk has what is left by streams of equal length.
            let each = w.rows().div_ceil(all.lanes) / all.streams[i];
            let sets = if up.is_some() { 2 } else { 1 };
            // Threads that share a lane leave their streams behind every chunk.
            let bytes = match pool.threads() {
                threads if threads > all.lanes => (w.bytes() * sets / (3 * threads)).max(FAR_BYTES),
                _ => FAR_BYTES,
            };
            all.step[i] = (bytes / (STREAMS * w.row_bytes()).max(1)).clamp(1, FAR_ROWS);
            all.chunks += each.div_ceil(all.step[i]).max(1);
            all.ends[i] = all.chunks;
        }
        all
    }

    /// The layer that a chunk of a lane belongs to, and which of its chunks it is.
    fn part(&self, chunk: usize) -> (usize, usize) {
        part_of(&self.ends, chunk)
    }

    /// Rows of layer `which` in a lane, and those of each stream.
    fn rows(&self, w: Read<'_>, which: usize, lane: usize) -> (Range<usize>, usize) {
        let rows = rows_of_lane(w, lane, self.lanes);
        let each = rows.len() / self.streams[which];
        (rows, each)
    }
}

/// Chunk `part` of what a lane has of a layer (nothing, where lanes are shorter than the longest), and those behind it as long as
/// `more` gives them, for every token.
fn far_rows(
    layer: &Layer<'_>,
    tokens: &[Prepared<'_>],
    (lanes, which): (&Lanes, usize),
    (lane, part): (usize, usize),
    more: &mut More<'_>,
) {
    let (streams, step) = (lanes.streams[which], lanes.step[which]);
    let (rows, each) = lanes.rows(layer.w, which, lane);
    let at = (part * step).min(each);
    let most = (FAR_ROWS / step * step).min(each - at);
    let first = |stream: usize| rows.start + stream % streams * each + at;
    let matrix = |stream: usize| {
        if stream < streams {
            layer.w
        } else {
            layer.up.unwrap_or(layer.w)
        }
    };
    let places = std::array::from_fn(|stream| (matrix(stream), first(stream)));
    let mut count = step.min(most);
    SUMS.with_borrow_mut(|space| {
        for (token, x) in tokens.iter().enumerate() {
            let sums = &mut space[..STREAMS * most];
            let rows = count;
            let more = &mut || {
                // What one token meets, all meet.
                let longer = token == 0 && count < most && more();
                longer.then(|| {
                    count = (count + step).min(most);
                    count
                })
            };
            far::dot_far(places, x.x, Count { rows, more }, sums);
            let (sums, ups) = sums.split_at_mut(streams * most);
            for (stream, sums) in sums.chunks_exact_mut(most.max(1)).enumerate() {
                let (rows, sums) = (first(stream)..first(stream) + count, &mut sums[..count]);
                layer.finish_token(rows.clone(), sums);
                if layer.up.is_some() {
                    let ups = &ups[stream * most..stream * most + count];
                    sums.iter_mut().zip(ups).for_each(|(sum, up)| *sum *= *up);
                }
                // SAFETY: inside the output, and these rows belong to this thread.
                unsafe { layer.store_token(token, rows.start, sums.iter().copied()) };
            }
        }
    });
    // The chunk that ends the streams has what they leave; those behind it, of a shorter lane, have nothing.
    if at + count == each && (count > 0 || part == 0) {
        few_rows(layer, tokens, rows.start + each * streams..rows.end);
    }
}

/// Says that these matrices, each with what it is multiplied with, are read next by a call for few tokens: threads that wait ask
/// memory for them. Without effect where that does not pay.
pub fn expect<'a>(pool: &Pool, layers: impl Iterator<Item = (&'a Weights, Option<&'a Weights>)> + Clone) {
    let layers = layers.take(TOGETHER);
    let layers = layers.map(|(w, up)| (Read::of(w), up.map(Read::of)));
    let Some((w, up)) = layers.clone().next() else {
        return;
    };
    if pool.threads() == 1 || !Lanes::suit(pool, layers) {
        return;
    }
    let count = streams_of(up);
    for lane in 0..pool.lanes() {
        let rows = rows_of_lane(w, lane, pool.lanes());
        let each = rows.len() / count;
        let streams = |w: Read<'_>| w.streams(rows.start, each, count, AHEAD_BYTES / STREAMS);
        pool.announce(lane, [streams(w), up.map_or(Lines::default(), streams)]);
    }
}

/// Streams in the rows of a matrix; the others are those of `up`, what it is multiplied with.
fn streams_of(up: Option<Read<'_>>) -> usize {
    if up.is_some() { STREAMS / 2 } else { STREAMS }
}

fn rows_of_lane(w: Read<'_>, lane: usize, lanes: usize) -> Range<usize> {
    w.rows() * lane / lanes..w.rows() * (lane + 1) / lanes
}

fn gather_row(x: &View<'_, f32>, row: usize, out: &mut [f32]) {
    let from = x.ptr().wrapping_offset(row as isize * x.strides()[0]);
    let step = x.strides()[1];
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: row and column are inside the view.
        *out = unsafe { *from.wrapping_offset(i as isize * step) };
    }
}

/// Rows `rows` of a layer for every token; the rows are this thread's.
fn few_rows(layer: &Layer<'_>, tokens: &[Prepared<'_>], rows: Range<usize>) {
    let (mut sums, mut ups) = ([0.0; ROW_BLOCK], [0.0; ROW_BLOCK]);
    let mut start = rows.start;
    while start < rows.end {
        let block = start..(start + ROW_BLOCK).min(rows.end);
        for (token, x) in tokens.iter().enumerate() {
            let sums = &mut sums[..block.len()];
            matvec::dot(layer.w, x, block.clone(), sums);
            layer.finish_token(block.clone(), sums);
            if let Some(up) = layer.up {
                let ups = &mut ups[..block.len()];
                matvec::dot(up, x, block.clone(), ups);
                sums.iter_mut().zip(ups).for_each(|(sum, up)| *sum *= *up);
            }
            // SAFETY: inside the output, and these rows belong to this thread.
            unsafe { layer.store_token(token, start, sums.iter().copied()) };
        }
        start = block.end;
    }
}

/// Tokens packed for the blocked product.
#[derive(Debug, Clone, Copy)]
struct Tokens {
    m: usize,
    k: usize,
    pairs: bool,
    panels: usize,
    /// Panels multiplied together.
    panels_each: usize,
}

impl Tokens {
    fn new(m: usize, k: usize, pairs: bool) -> Tokens {
        let width = panel_width();
        let panels = m.div_ceil(width);
        let panels_each = (GEMM_TOKENS / width).min(panels).max(1);
        Tokens {
            m,
            k,
            pairs,
            panels,
            panels_each,
        }
    }

    /// Lines of a panel: numbers of a token, or pairs.
    fn lines(self) -> usize {
        if self.pairs { self.k.div_ceil(2) } else { self.k }
    }

    /// Numbers of all panels.
    fn len(self) -> usize {
        self.panels * self.lines() * panel_width()
    }

    /// Working memory of a thread.
    fn work(self) -> usize {
        block_space(GEMM_ROWS) + 2 * GEMM_ROWS * self.panels_each * panel_width()
    }
}

/// All tokens at once: the blocked product.
fn many(pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], scratch: &mut Scratch) {
    let tokens = Tokens::new(x.shape()[0], x.shape()[1], layers[0].pairs);
    let (packed, work) = scratch.with_own(tokens.len(), pool.threads(), tokens.work());
    count_pairs(pool, layers);
    pack_tokens(pool, &x, tokens, packed);
    products(pool, (packed, tokens), layers, work);
}

/// Counts products in pairs, where weights are packed for them.
fn count_pairs(pool: &Pool, layers: &[Layer<'_>]) {
    for layer in layers.iter().filter(|layer| layer.pairs && !by_tiles()) {
        layer.w.weights.used_in_pairs(pool);
        layer.up.inspect(|up| up.weights.used_in_pairs(pool));
    }
}

fn pack_tokens(pool: &Pool, x: &View<'_, f32>, tokens: Tokens, packed: &mut [f32]) {
    let Tokens {
        m, k, pairs, panels, ..
    } = tokens;
    let each = panel_width() * tokens.lines();
    let target = Shared(packed.as_mut_ptr());
    let (source, steps) = (Shared::of(x.ptr()), [x.strides()[0], x.strides()[1]]);
    pool.run_ranges(panels, (16384 / each.max(1)).max(1), &|range| {
        let to = target.at((range.start * each) as isize);
        // SAFETY: the panels of `range` are this thread's part of `packed`.
        let to = unsafe { std::slice::from_raw_parts_mut(to, range.len() * each) };
        // SAFETY: the source holds `m` tokens of `k` elements.
        unsafe {
            if pairs {
                pack_pairs(source, steps, m, k, range, to);
            } else {
                pack_panels(source, steps, m, k, range, to);
            }
        }
    });
}

/// Every layer for all tokens.
fn products(pool: &Pool, (packed, tokens): (&[f32], Tokens), layers: &[Layer<'_>], work: Own) {
    let Tokens {
        m,
        k,
        pairs,
        panels,
        panels_each,
    } = tokens;
    let token_blocks = panels.div_ceil(panels_each);
    let mut ends = [0_usize; 8];
    let mut chunks = 0;
    for (end, layer) in ends.iter_mut().zip(layers) {
        chunks += layer.w.rows().div_ceil(GEMM_ROWS) * token_blocks;
        *end = chunks;
    }
    let part = |chunk: usize| {
        let which = ends.iter().position(|end| chunk < *end)?;
        let layer = &layers[which];
        let chunk = chunk - if which == 0 { 0 } else { ends[which - 1] };
        let first = chunk / token_blocks * GEMM_ROWS;
        let rows = first..(first + GEMM_ROWS).min(layer.w.rows());
        let start = chunk % token_blocks * panels_each;
        Some((layer, rows, start..(start + panels_each).min(panels)))
    };
    pool.run_indexed(chunks, &|worker, chunk| {
        let (layer, rows, range) = part(chunk).expect("chunks were counted over the layers");
        // A thread has its chunks one after the other.
        let then = part(chunk + 1).map_or(Lines::default(), |(next, rows, _)| {
            opening(next.w.weights, rows, pairs)
        });
        // SAFETY: each worker has its own part of `work`.
        let work = unsafe { work.of(worker) };
        many_rows(layer, packed, (m, k), (rows, then), range, work);
    });
}

/// Rows `rows` of a layer for the tokens of panels `panels`, which are this thread's; `then` is what it reads after them.
fn many_rows(
    layer: &Layer<'_>,
    packed: &[f32],
    (m, k): (usize, usize),
    (rows, then): (Range<usize>, Lines),
    panels: Range<usize>,
    work: &mut [f32],
) {
    let width = panel_width();
    let line = panels.len() * width;
    let (space, sums) = work.split_at_mut(block_space(GEMM_ROWS));
    let (sums, ups) = sums.split_at_mut(sums.len() / 2);
    let first = panels.start * width;
    let count = line.min(m - first);
    let rows_of = |w| {
        if layer.pairs { Rows::Stored(w) } else { Rows::of(w) }
    };
    // SAFETY: the rows of a weight matrix have its columns, `k` of them.
    unsafe {
        Gemm {
            panels: packed,
            k,
            rows: rows_of(layer.w.weights),
            pairs: layer.pairs,
            then: layer
                .up
                .map_or(then, |up| opening(up.weights, rows.clone(), layer.pairs)),
        }
        .block(rows.clone(), panels.clone(), sums, space)
    };
    for (row, sums) in rows.clone().zip(sums.chunks_exact_mut(line)) {
        layer.finish_row(row, &mut sums[..count]);
    }
    if let Some(up) = layer.up {
        // SAFETY: as above; `up` has the shape of `w`.
        unsafe {
            Gemm {
                panels: packed,
                k,
                rows: rows_of(up.weights),
                pairs: layer.pairs,
                then,
            }
            .block(rows.clone(), panels.clone(), ups, space)
        };
        let used = rows.len() * line;
        sums[..used]
            .iter_mut()
            .zip(&ups[..used])
            .for_each(|(sum, up)| *sum *= up);
    }
    if let Some(to) = layer.panels {
        let lines = if layer.pairs {
            layer.w.rows().div_ceil(2)
        } else {
            layer.w.rows()
        };
        return dispatch_pairs_if(
            layer.pairs,
            IntoPanels {
                sums,
                line,
                rows,
                first: to.at((panels.start * lines * width) as isize),
                step: lines * width,
                pairs: layer.pairs,
            },
        );
    }
    // Results are `[row][token]`. Rows go out as they are when tokens lie side by side, else by small squares.
    if layer.steps[0] == 1 && layer.residual.is_none_or(|(_, steps)| steps[0] == 1) {
        for (row, sums) in rows.zip(sums.chunks_exact(line)) {
            let to = layer.y.at(first as isize + row as isize * layer.steps[1]);
            let Some((residual, steps)) = layer.residual else {
                // SAFETY: inside the output; these rows and tokens belong to this thread.
                unsafe { std::slice::from_raw_parts_mut(to, count) }.copy_from_slice(&sums[..count]);
                continue;
            };
            let from = residual.at(first as isize + row as isize * steps[1]);
            for (i, sum) in sums[..count].iter().enumerate() {
                // SAFETY: as above; the residual has the shape of the output, in whose place it may lie.
                unsafe { *to.wrapping_add(i) = sum + *from.wrapping_add(i) };
            }
        }
        return;
    }
    dispatch(Turned {
        layer,
        sums,
        line,
        rows,
        tokens: first..first + count,
    });
}

/// Runs `kernel` with instructions for pairs of bf16 where `pairs`.
fn dispatch_pairs_if<K: Kernel>(pairs: bool, kernel: K) -> K::Out {
    if pairs {
        dispatch_pairs(kernel)
    } else {
        dispatch(kernel)
    }
}

/// Stores sums `[row][token]` as panels of the next product, whose depth these rows are.
struct IntoPanels<'a> {
    sums: &'a [f32],
    line: usize,
    /// An even first one.
    rows: Range<usize>,
    /// The first panel of these tokens, and how far it is to the next.
    first: *mut f32,
    step: usize,
    pairs: bool,
}

impl Kernel for IntoPanels<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (width, each) = (2 * S::LANES, if self.pairs { 2 } else { 1 });
        assert!(
            self.sums.len() >= self.rows.len() * self.line && self.line.is_multiple_of(width),
            "linear: sums"
        );
        for panel in 0..self.line / width {
            for row in (0..self.rows.len()).step_by(each) {
                let to = self
                    .first
                    .wrapping_add(panel * self.step + (self.rows.start + row) / each * width);
                for half in 0..2 {
                    let at = row * self.line + panel * width + half * S::LANES;
                    // SAFETY: vectors of the sums of a row and the next, where there is one; the line of the panel is this thread's.
                    unsafe {
                        let mut x = s.load(self.sums.as_ptr().add(at));
                        if self.pairs {
                            let there = row + 1 < self.rows.len();
                            let high = if there {
                                s.load(self.sums.as_ptr().add(at + self.line))
                            } else {
                                s.zero()
                            };
                            x = s.pairs(x, high);
                        }
                        s.store(to.add(half * S::LANES), x);
                    }
                }
            }
        }
    }
}

/// Stores sums `[row][token]` by squares that are turned in registers.
struct Turned<'a> {
    layer: &'a Layer<'a>,
    sums: &'a [f32],
    /// Tokens of a row, those behind the last included.
    line: usize,
    rows: Range<usize>,
    tokens: Range<usize>,
}

impl Kernel for Turned<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (layer, line, count) = (self.layer, self.line, self.tokens.len());
        assert!(
            line.is_multiple_of(SQUARE) && self.sums.len() >= self.rows.len() * line,
            "linear: sums"
        );
        let dense = layer.steps[1] == 1 && layer.residual.is_none_or(|(_, steps)| steps[1] == 1);
        let mut square = [[0.0; SQUARE]; SQUARE];
        for row in (0..self.rows.len()).step_by(SQUARE) {
            let high = SQUARE.min(self.rows.len() - row);
            for token in (0..count).step_by(SQUARE) {
                let from = self.sums[row * line + token..].as_ptr();
                if high == SQUARE {
                    // SAFETY: eight rows of `line` sums, and eight of them from `token` on: `line` is a multiple of eight.
                    unsafe { s.turn(from, line as isize, square.as_mut_ptr().cast(), SQUARE as isize) };
                } else {
                    for r in 0..high {
                        for (t, sum) in self.sums[(row + r) * line + token..][..SQUARE].iter().enumerate() {
                            square[t][r] = *sum;
                        }
                    }
                }
                for (t, square) in square.iter_mut().enumerate().take(count - token) {
                    let (token, row) = (self.tokens.start + token + t, self.rows.start + row);
                    if !(dense && high == SQUARE) {
                        // SAFETY: inside the output, and these rows and tokens belong to this thread.
                        unsafe { layer.store_token(token, row, square[..high].iter().copied()) };
                        continue;
                    }
                    let at = |steps: [isize; 2]| token as isize * steps[0] + row as isize;
                    if let Some((residual, steps)) = layer.residual {
                        // SAFETY: the residual has the shape of the output.
                        let residual = unsafe { &*residual.at(at(steps)).cast::<[f32; SQUARE]>() };
                        square.iter_mut().zip(residual).for_each(|(sum, r)| *sum += r);
                    }
                    // SAFETY: as above.
                    unsafe { *layer.y.at(at(layer.steps)).cast::<[f32; SQUARE]>() = *square };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use crate::strided::dense_strides;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn weights(rows: usize, cols: usize, kind: usize, seed: &mut u64) -> Weights {
        let mut data: Vec<f32> = (0..rows * cols).map(|_| random(seed)).collect();
        let bytes: Vec<u8> = (0..rows * cols)
            .map(|_| (random(seed) * 128.0 + 128.0) as u8)
            .collect();
        if kind >= 6 {
            data.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            data.iter_mut().step_by(977).for_each(|x| *x = 2.0_f32.powi(-20));
            let packed = weights_of(rows, cols, kind - 6, &data, &bytes, seed);
            packed.pack(&Pool::new(1));
            assert_eq!(packed.bf12().is_some(), cols.is_multiple_of(64));
            return packed;
        }
        weights_of(rows, cols, kind, &data, &bytes, seed)
    }

    fn weights_of(
        rows: usize,
        cols: usize,
        kind: usize,
        data: &[f32],
        bytes: &[u8],
        seed: &mut u64,
    ) -> Weights {
        match kind {
            0 => Weights::from_f32(rows, cols, bytemuck::cast_slice(data).to_vec().into()),
            1 => {
                let data: Vec<f16> = data.iter().map(|x| f16::from_f32(*x)).collect();
                Weights::from_f16(rows, cols, bytemuck::cast_slice(&data).to_vec().into())
            }
            2 | 3 => {
                let bits = if kind == 2 { 4 } else { 6 };
                let table: Vec<f32> = (0..rows.div_ceil(8) << bits)
                    .map(|_| f16::from_f32(random(seed)).to_f32())
                    .collect();
                let indices = bytes[..(rows * cols * bits as usize).div_ceil(8)].to_vec();
                Weights::lut(rows, cols, bits, indices.into(), table, 8, cols)
            }
            4 => Weights::affine(
                rows,
                cols,
                8,
                true,
                bytes.to_vec().into(),
                vec![0.01; rows],
                Some(vec![3.0; rows]),
                1,
                cols,
            ),
            _ => {
                let blocks = rows * cols.div_ceil(32);
                let data = bytes[..(rows * cols).div_ceil(2)].to_vec();
                Weights::affine(
                    rows,
                    cols,
                    4,
                    false,
                    data.into(),
                    vec![0.1; blocks],
                    Some(vec![8.0; blocks]),
                    1,
                    32,
                )
            }
        }
        .unwrap()
    }

    fn product(x: &[f32], w: &Weights, i: usize, j: usize) -> f32 {
        let mut row = vec![0.0; w.cols()];
        w.row(j, &mut row);
        let sum: f64 = row
            .iter()
            .zip(&x[i * w.cols()..])
            .map(|(w, x)| f64::from(*w) * f64::from(*x))
            .sum();
        sum as f32
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        #[test]
        fn layers_of_any_size_storage_and_layout_agree_with_the_definition(
            m in 1_usize..40, n in 1_usize..120, k in 1_usize..330, kind in 0_usize..8, seed in any::<u64>(),
            transposed in any::<bool>(), extras in 0_usize..4, threads in 1_usize..4,
        ) {
            let pool = Pool::new(threads);
            let mut seed = seed;
            let k = if kind >= 6 { k.next_multiple_of(64) } else { k };
            let w = weights(n, k, kind, &mut seed);
            let up = weights(n, k, kind, &mut seed);
            let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
            let bias: Vec<f32> = (0..n).map(|_| random(&mut seed)).collect();
            let residual: Vec<f32> = (0..m * n).map(|_| random(&mut seed)).collect();
            let xt: Vec<f32> = (0..m * k).map(|at| x[at % m * k + at / m]).collect();
            let shape = [m, k];
            let (x_data, x_strides) = if transposed { (&xt, [1, m as isize]) } else { (&x, [k as isize, 1]) };
            let view = View::new(x_data, 0, &shape, &x_strides).unwrap();
            let out_shape = [m, n];
            let out_strides = if transposed { [1, m as isize] } else { [n as isize, 1] };
            let mut y = vec![f32::NAN; m * n];
            let mut scratch = Scratch::new();
            let dense = dense_strides(&out_shape);
            let epilogue = Epilogue {
                arithmetic: Arithmetic::F32,
                bias: (extras > 0).then_some(&bias[..]),
                activation: (extras == 2).then_some(Unary::Silu),
                residual: (extras > 1).then(|| View::new(&residual, 0, &out_shape, &dense[..2]).unwrap()),
            };
            let out = ViewMut::new(&mut y, 0, &out_shape, &out_strides).unwrap();
            if extras == 3 {
                gated(&pool, view, (&w, &up), (Unary::Tanh, Arithmetic::F32), out, &mut scratch);
            } else {
                linear(&pool, view, &w, out, &epilogue, &mut scratch);
            }
            for i in 0..m {
                for j in 0..n {
                    let sum = product(&x, &w, i, j);
                    let other = if extras == 3 { product(&x, &up, i, j) } else { 0.0 };
                    let expected = match extras {
                        0 => sum,
                        1 => sum + bias[j],
                        2 => Unary::Silu.apply(sum + bias[j]) + residual[i * n + j],
                        _ => sum.tanh() * other,
                    };
                    let found = y[(i as isize * out_strides[0] + j as isize * out_strides[1]) as usize];
                    // Fixed point with few tokens: 2^-15 a product, k of them, at the size of the other factor.
                    let bound = 1e-4 * (1.0 + (k as f32).sqrt()) * (1.0 + sum.abs().sqrt()) * (1.0 + other.abs());
                    prop_assert!((found - expected).abs() < bound, "[{i}, {j}] {found} is not {expected}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn far_streams_agree_with_the_definition_for_any_number_of_rows(
            m in 1_usize..=FEW_TOKENS, n in 1_usize..1500, more in 1_usize..40, k in 1_usize..70, wide in any::<bool>(),
            kind in 0_usize..4, extras in 0_usize..4, threads in 1_usize..10, seed in any::<u64>(),
        ) {
            let pool = Pool::new(threads);
            let mut seed = seed;
            // Rows so long that a chunk has few of them, or many short ones.
            let (n, k) = if wide { (n / 10 + 1, k * 16) } else { (n, k) };
            let (kind, k) = if kind >= 2 { (kind + 4, k.next_multiple_of(64)) } else { (kind, k) };
            let all = [weights(n, k, kind, &mut seed), weights(more, k, kind, &mut seed)];
            let up = weights(n, k, kind, &mut seed);
            let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
            let (bias, residual): (Vec<f32>, Vec<f32>) =
                ((0..n).map(|_| random(&mut seed)).collect(), (0..m * n).map(|_| random(&mut seed)).collect());
            let (x_shape, shape, strides) = ([m, k], [m, n], [n as isize, 1]);
            let x_strides = [k as isize, 1];
            let view = View::new(&x, 0, &x_shape, &x_strides).unwrap();
            let epilogue = Epilogue {
                bias: (extras > 0).then_some(&bias[..]),
                activation: (extras > 1).then_some(Unary::Tanh),
                residual: (extras == 2).then(|| View::new(&residual, 0, &shape, &strides).unwrap()),
                arithmetic: Arithmetic::F32,
            };
            let (mut y, mut other) = (vec![f32::NAN; m * n], vec![f32::NAN; m * more]);
            let (other_shape, other_strides) = ([m, more], [more as isize, 1]);
            let mut out = ViewMut::new(&mut y, 0, &shape, &strides).unwrap();
            let mut other_out = ViewMut::new(&mut other, 0, &other_shape, &other_strides).unwrap();
            let mut layer = Layer::new(&all[0], &view, &mut out, &epilogue);
            layer.up = (extras == 3).then_some(Read::of(&up));
            let layers = [layer, Layer::new(&all[1], &view, &mut other_out, &Epilogue::default())];
            let lanes = Lanes::spread(&pool, layers.iter().map(|layer| (layer.w, layer.up)));
            few_in(Some(lanes), &pool, view, &layers, &mut vec![f32::NAN; few_space(m, k)]);
            let bound = |sum: f32| 1e-4 * (1.0 + (k as f32).sqrt()) * (1.0 + sum.abs());
            for i in 0..m {
                for j in 0..n {
                    let sum = product(&x, &all[0], i, j) + if extras > 0 { bias[j] } else { 0.0 };
                    let expected = match extras {
                        0 | 1 => sum,
                        2 => sum.tanh() + residual[i * n + j],
                        _ => sum.tanh() * product(&x, &up, i, j),
                    };
                    prop_assert!((y[i * n + j] - expected).abs() < bound(expected), "[{i}, {j}]");
                }
                for j in 0..more {
                    let expected = product(&x, &all[1], i, j);
                    prop_assert!((other[i * more + j] - expected).abs() < bound(expected), "other [{i}, {j}]");
                }
            }
        }
    }

    #[test]
    fn a_gate_may_be_stored_otherwise_than_what_it_is_multiplied_with() {
        let (pool, mut seed) = (Pool::new(2), 5);
        let (n, k) = (300, 320);
        let x: Vec<f32> = (0..k).map(|_| random(&mut seed)).collect();
        for kinds in [(0, 1), (1, 0), (1, 2), (4, 1), (6, 0), (1, 7), (6, 7)] {
            let (gate, up) = (
                weights(n, k, kinds.0, &mut seed),
                weights(n, k, kinds.1, &mut seed),
            );
            let mut y = vec![f32::NAN; n];
            let (x_shape, shape) = ([1, k], [1, n]);
            let view = View::new(&x, 0, &x_shape, &[320, 1]).unwrap();
            let out = ViewMut::new(&mut y, 0, &shape, &[300, 1]).unwrap();
            expect(&pool, std::iter::once((&gate, Some(&up))));
            let how = (Unary::Tanh, Arithmetic::F32);
            gated(&pool, view, (&gate, &up), how, out, &mut Scratch::new());
            for (j, found) in y.iter().enumerate() {
                let (sum, other) = (product(&x, &gate, 0, j), product(&x, &up, 0, j));
                let bound = 2e-3 * (1.0 + other.abs());
                assert!((found - sum.tanh() * other).abs() < bound, "{kinds:?} [{j}]");
            }
        }
    }

    #[test]
    fn weights_packed_in_pairs_give_the_same_sums() {
        let (pool, mut seed) = (Pool::new(2), 9);
        for (m, n, k, kind) in [
            (64, 100, 577, 0),
            (33, 49, 1100, 1),
            (5, 12, 30, 2),
            (70, 1, 576, 6),
            (64, 61, 640, 7),
        ] {
            let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
            let (w, up) = (weights(n, k, kind, &mut seed), weights(n, k, kind, &mut seed));
            let (x_shape, x_strides, shape, strides) = ([m, k], [k as isize, 1], [m, n], [n as isize, 1]);
            let how = (Unary::Tanh, Arithmetic::Bf16);
            let run = || {
                let mut y = vec![f32::NAN; m * n];
                let x = View::new(&x, 0, &x_shape, &x_strides).unwrap();
                let out = ViewMut::new(&mut y, 0, &shape, &strides).unwrap();
                gated(&pool, x, (&w, &up), how, out, &mut Scratch::new());
                y
            };
            let before = run();
            w.pack_pairs(&pool);
            up.pack_pairs(&pool);
            assert_eq!(run(), before, "[{m}, {n}, {k}], kind {kind}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn an_mlp_gives_what_its_products_give(
            m in 1_usize..70, n in 1_usize..300, k in 1_usize..200, l in 1_usize..120, kind in 0_usize..8, seed in any::<u64>(),
            bf16 in any::<bool>(), threads in 1_usize..4, with_residual in any::<bool>(),
        ) {
            let (pool, mut seed) = (Pool::new(threads), seed);
            let [n, k] = [n, k].map(|size| if kind >= 6 { size.next_multiple_of(64) } else { size });
            let w = [(n, k), (n, k), (l, n)].map(|(rows, cols)| weights(rows, cols, kind, &mut seed));
            let numbers = |count: usize, seed: &mut u64| -> Vec<f32> { (0..count).map(|_| random(seed)).collect() };
            let (x, bias, residual) = (numbers(m * k, &mut seed), numbers(l, &mut seed), numbers(m * l, &mut seed));
            let arithmetic = if bf16 { Arithmetic::Bf16 } else { Arithmetic::F32 };
            let (x_shape, inner, shape) = ([m, k], [m, n], [m, l]);
            let (x_strides, inner_strides, strides) = ([k as isize, 1], [n as isize, 1], [l as isize, 1]);
            let view = View::new(&x, 0, &x_shape, &x_strides).unwrap();
            let epilogue = Epilogue {
                bias: Some(&bias),
                activation: None,
                residual: with_residual.then(|| View::new(&residual, 0, &shape, &strides).unwrap()),
                arithmetic,
            };
            let (mut hidden, mut apart, mut together) =
                (vec![f32::NAN; m * n], vec![f32::NAN; m * l], vec![f32::NAN; m * l]);
            let out = ViewMut::new(&mut hidden, 0, &inner, &inner_strides).unwrap();
            gated(&pool, view, (&w[0], &w[1]), (Unary::Silu, arithmetic), out, &mut Scratch::new());
            let view_of_hidden = View::new(&hidden, 0, &inner, &inner_strides).unwrap();
            let out = ViewMut::new(&mut apart, 0, &shape, &strides).unwrap();
            linear(&pool, view_of_hidden, &w[2], out, &epilogue, &mut Scratch::new());
            let out = ViewMut::new(&mut together, 0, &shape, &strides).unwrap();
            let call = Mlp { gate: &w[0], up: &w[1], activation: Unary::Silu, down: &w[2] };
            let called = std::cell::Cell::new(0);
            let next = || called.set(called.get() + 1);
            mlp(&pool, view, &call, (out, &epilogue), &next, &mut Scratch::new());
            prop_assert_eq!(apart, together);
            prop_assert_eq!(called.get(), 1);
        }
    }

    #[test]
    fn layers_together_give_what_they_give_alone() {
        let pool = Pool::new(3);
        let mut seed = 3;
        for m in [1, 3, 9] {
            let x: Vec<f32> = (0..m * 64).map(|_| random(&mut seed)).collect();
            let x_shape = [m, 64];
            let view = View::new(&x, 0, &x_shape, &[64, 1]).unwrap();
            let all = [
                weights(24, 64, 2, &mut seed),
                weights(100, 64, 3, &mut seed),
                weights(7, 64, 0, &mut seed),
            ];
            let bias = vec![0.25; 100];
            let mut together: Vec<Vec<f32>> = all.iter().map(|w| vec![f32::NAN; m * w.rows()]).collect();
            let shapes: Vec<[usize; 2]> = all.iter().map(|w| [m, w.rows()]).collect();
            let strides: Vec<[isize; 2]> = all.iter().map(|w| [w.rows() as isize, 1]).collect();
            let mut outputs: Vec<_> = (together.iter_mut().zip(&shapes).zip(&strides))
                .map(|((y, shape), strides)| ViewMut::new(y, 0, shape, strides).unwrap())
                .collect();
            let layers = [(&all[0], None), (&all[1], Some(&bias[..])), (&all[2], None)];
            linear_many(
                &pool,
                view,
                &layers,
                Arithmetic::F32,
                &mut outputs,
                &mut Scratch::new(),
            );
            for (i, (w, bias)) in layers.into_iter().enumerate() {
                let mut alone = vec![f32::NAN; m * w.rows()];
                let out = ViewMut::new(&mut alone, 0, &shapes[i], &strides[i]).unwrap();
                let epilogue = Epilogue {
                    bias,
                    ..Epilogue::default()
                };
                linear(&pool, view, w, out, &epilogue, &mut Scratch::new());
                assert_eq!(alone, together[i], "{m} tokens, layer {i}");
            }
        }
    }
}
