//! Few tokens: matrix times vector, token by token, reading weights as they are stored.

use super::*;

/// Rows in a chunk of each layer, so that all layers together make enough chunks of a useful size.
fn chunk_rows(pool: &Pool, layer: &Layer<'_>, tokens: usize, total_bytes: usize) -> usize {
    let twice = if layer.up.is_some() { 2 } else { 1 };
    let row_bytes = (layer.w.bytes() * twice / layer.w.rows().max(1)).max(1);
    let least = (CHUNK_BYTES / tokens.max(1)).max(total_bytes / (pool.threads() * 3));
    (least / row_bytes).max(1).next_multiple_of(8)
}

/// Working memory of [`few`] for `m` tokens of `k`.
pub(super) fn few_space(m: usize, k: usize) -> usize {
    m * (k.next_multiple_of(16) + matvec::prepared_len(k))
}

/// Each token by itself: matrix times vector. `space` is [`few_space`].
pub(super) fn few(pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], space: &mut [f32]) {
    let lanes = Lanes::of(pool, layers.iter().map(|layer| (layer.w, layer.up)));
    few_in(lanes, pool, x, layers, space);
}

/// As [`few`], spread over lanes in far streams where that suits.
pub(super) fn few_in(
    lanes: Option<Lanes>,
    pool: &Pool,
    x: View<'_, f32>,
    layers: &[Layer<'_>],
    mut space: &mut [f32],
) {
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
pub(super) struct Lanes {
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
    pub(super) fn of<'a>(
        pool: &Pool,
        layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)> + Clone,
    ) -> Option<Lanes> {
        Lanes::suit(pool, layers.clone()).then(|| Lanes::spread(pool, layers))
    }

    fn suit<'a>(pool: &Pool, mut layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)>) -> bool {
        let suits = |w: Read<'_>| far::suits(w) && w.bytes() >= 2 * CHUNK_BYTES * pool.lanes();
        layers.all(|(w, up)| suits(w) && up.is_none_or(|up| w.is_like(up)))
    }

    pub(super) fn spread<'a>(
        pool: &Pool,
        layers: impl Iterator<Item = (Read<'a>, Option<Read<'a>>)>,
    ) -> Lanes {
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
