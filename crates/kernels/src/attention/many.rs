//! Attention of many queries: blocked products with queries as lanes.

use super::Call;
use crate::elementwise::math::exp;
use crate::gemm::{Gemm, Rows, SQUARE, WHOLE, block_space, pack_panels, panel_width};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs};
use crate::weights::{Lines, RoundedRows, RowsOf};
use std::ops::Range;

/// Sizes of what is packed: in pairs of bf16 half as many elements as numbers, and rows of whole chunks.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    visible: usize,
    /// Elements of a row of keys, and of a row of values (along the positions).
    keys: usize,
    values: usize,
    /// Elements of a query.
    query: usize,
}

impl Sizes {
    fn new(call: &Call, visible: usize) -> Self {
        let row = |numbers: usize| {
            if call.pairs {
                numbers.div_ceil(2).next_multiple_of(WHOLE)
            } else {
                numbers
            }
        };
        Sizes {
            visible,
            keys: row(call.size),
            values: row(visible),
            query: if call.pairs {
                call.size.div_ceil(2)
            } else {
                call.size
            },
        }
    }

    /// Elements of the keys of a head, and of its values.
    fn packed(&self, call: &Call) -> [usize; 2] {
        [self.visible * self.keys, call.v_size * self.values]
    }

    /// Numbers of working memory of a thread: queries as rows and as a panel, scores, results, and what products need.
    fn work(&self, call: &Call) -> [usize; 5] {
        let width = panel_width();
        // Rounded queries lie behind those that are not.
        let rounded = if call.pairs { self.query } else { 0 };
        [
            (call.size + rounded) * width,
            self.query * width,
            self.visible * width,
            call.v_size * width,
            block_space(self.visible.max(call.v_size)),
        ]
        .map(|len| len.next_multiple_of(16))
    }
}

pub(super) fn run(pool: &Pool, call: &Call, runs: &[Range<usize>], scratch: &mut Scratch) {
    let visible: usize = runs.iter().map(Range::len).sum();
    let width = panel_width();
    let sizes = Sizes::new(call, visible);
    let [keys_len, values_len] = sizes.packed(call);
    let kv = keys_len + values_len;
    let each = sizes.work(call).iter().sum();
    let (mask_heads, mask_queries) = call.mask_rows();
    let sights_len = (2 * mask_heads * mask_queries).next_multiple_of(16);
    let packed_len = (call.kv_heads * kv).next_multiple_of(16);
    let (space, work) = scratch.with_own(sights_len + packed_len, pool.threads(), each);
    let (sights, packed) = space.split_at_mut(sights_len);
    let sights: &mut [[u32; 2]] = bytemuck::cast_slice_mut(sights);
    for (at, sight) in sights.iter_mut().take(mask_heads * mask_queries).enumerate() {
        *sight = look(call, runs, (at / mask_queries, at % mask_queries));
    }
    let sights = &*sights;
    let sight = |h: usize, s: usize| {
        let at = h % mask_heads.max(1) * mask_queries + s % mask_queries.max(1);
        sights.get(at).map(|sight| sight.map(|n| n as usize))
    };
    let target = Shared(packed.as_mut_ptr());
    pool.run(call.kv_heads * 2, &|job| {
        let (head, keys) = (job / 2, job % 2 == 0);
        let (start, len) = if keys {
            (0, keys_len)
        } else {
            (keys_len, values_len)
        };
        // SAFETY: each job has its own part of the packed keys and values.
        let out = unsafe { std::slice::from_raw_parts_mut(target.at((head * kv + start) as isize), len) };
        // Keys as rows along the head size, values as rows along the positions.
        if call.pairs {
            let line = if keys { sizes.keys } else { sizes.values };
            return call.pack_pairs(keys, head, runs, line, out);
        }
        let to = if keys { [call.size, 1] } else { [1, visible] };
        call.pack(keys, head, runs, to, out);
    });
    let packed = &*packed;
    let lanes = call.group() * call.queries;
    let panels = lanes.div_ceil(width);
    pool.run_indexed(call.kv_heads * panels, &|worker, job| {
        // SAFETY: each worker has its own part.
        let work = unsafe { work.of(worker) };
        let (head, first) = (job / panels, job % panels * width);
        panel(
            call,
            (runs, sizes),
            &sight,
            (head, first..(first + width).min(lanes)),
            &packed[head * kv..],
            work,
        );
    });
}

/// The queries `lanes` (head in the group, position) of one head of keys, a panel of them.
fn panel(
    call: &Call,
    (runs, sizes): (&[Range<usize>], Sizes),
    sight: &dyn Fn(usize, usize) -> Option<[usize; 2]>,
    (head, lanes): (usize, Range<usize>),
    packed: &[f32],
    work: &mut [f32],
) {
    let width = panel_width();
    let visible = sizes.visible;
    let place = |lane: usize| (head * call.group() + lane / call.queries, lane % call.queries);
    let [rows, panel, scores, results, _] = sizes.work(call);
    let (rows, rest) = work.split_at_mut(rows);
    let (q, rest) = rest.split_at_mut(panel);
    let (scores, rest) = rest.split_at_mut(scores);
    let (out, space) = rest.split_at_mut(results);
    gather(call, sizes, (lanes.clone(), &place), rows, q);
    // Keys past the last one that these queries see are left out; with a causal mask that is half of them.
    let last = |(h, s)| sight(h, s).map_or(visible, |[_, seen]| seen);
    let seen = lanes.clone().map(place).map(last).max().unwrap_or(0).min(visible);
    let [keys_len, _] = sizes.packed(call);
    let product = |panels, k, first: &[f32], stride: usize| Gemm {
        panels,
        k,
        rows: Rows::Dense {
            first: Shared::of(first.as_ptr()),
            stride: stride as isize,
        },
        then: Lines::default(),
        pairs: call.pairs,
    };
    // SAFETY: the packed keys are `[visible, size]`.
    unsafe { product(q, call.size, packed, sizes.keys).block(0..seen, 0..1, scores, space) };
    let scores = &mut scores[..seen * width];
    for (lane, (h, s)) in lanes.clone().map(place).enumerate() {
        if let Some(sight) = sight(h, s) {
            add_mask(call, runs, (h, s), sight, scores, lane);
        }
    }
    let lines = if call.pairs {
        dispatch_pairs(Softmax::<true> { scores });
        seen.div_ceil(2)
    } else {
        dispatch(Softmax::<false> { scores });
        seen
    };
    let values = &packed[keys_len..];
    // SAFETY: the packed values are `[v_size, visible]`, and `seen` is not more than `visible`.
    unsafe {
        product(&scores[..lines * width], seen, values, sizes.values).block(0..call.v_size, 0..1, out, space);
    }
    dispatch(Scatter {
        call,
        lanes: (lanes, &place),
        out,
    });
}

/// Where a lane of a panel is: its head and position.
type Place<'a> = &'a dyn Fn(usize) -> (usize, usize);

/// The queries `lanes` times the scale as a panel, by way of rows.
fn gather(
    call: &Call,
    sizes: Sizes,
    (lanes, place): (Range<usize>, Place<'_>),
    rows: &mut [f32],
    panel: &mut [f32],
) {
    let width = panel_width();
    let (rows, rounded) = rows.split_at_mut(call.size * width);
    let (p, steps) = call.q;
    for (lane, row) in rows.chunks_exact_mut(call.size.max(1)).take(width).enumerate() {
        if lane >= lanes.len() {
            row.fill(0.0);
            continue;
        }
        let (h, s) = place(lanes.start + lane);
        let from = h as isize * steps[0] + s as isize * steps[1];
        if steps[2] == 1 {
            // SAFETY: a row of the queries.
            let query = unsafe { std::slice::from_raw_parts(p.at(from).cast_const(), call.size) };
            for (to, x) in row.iter_mut().zip(query) {
                *to = x * call.scale;
            }
            continue;
        }
        for (d, to) in row.iter_mut().enumerate() {
            // SAFETY: inside the shape of the queries.
            *to = call.scale * unsafe { *p.at(from + d as isize * steps[2]) };
        }
    }
    let source = if call.pairs {
        if call.size > 0 {
            let (line, all) = (2 * sizes.query, &mut rounded[..sizes.query * width]);
            let block = RowsOf::new(rows, call.size, 0..width, 0..call.size);
            dispatch_pairs(RoundedRows(block, line, bytemuck::cast_slice_mut(all), line));
        }
        Shared::of(rounded.as_ptr())
    } else {
        Shared::of(rows.as_ptr())
    };
    // SAFETY: `width` rows of so many elements.
    unsafe { pack_panels(source, [sizes.query as isize, 1], width, sizes.query, 0..1, panel) };
}

/// Writes the results, `[number][lane]`, of queries that are this thread's; by squares turned in registers where numbers lie side by side.
struct Scatter<'a> {
    call: &'a Call,
    lanes: (Range<usize>, Place<'a>),
    out: &'a [f32],
}

impl Kernel for Scatter<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (width, size) = (2 * S::LANES, self.call.v_size);
        let ((lanes, place), (y, steps)) = (self.lanes, self.call.y);
        assert!(self.out.len() >= size * width, "attention: results");
        let whole = if steps[2] == 1 { size / SQUARE * SQUARE } else { 0 };
        let mut square = [[0.0; SQUARE]; SQUARE];
        for first in (0..lanes.len()).step_by(SQUARE) {
            let count = SQUARE.min(lanes.len() - first);
            let mut to = [y.at(0); SQUARE];
            for (i, to) in to.iter_mut().enumerate().take(count) {
                let (head, position) = place(lanes.start + first + i);
                *to = y.at(head as isize * steps[0] + position as isize * steps[1]);
            }
            for d in (0..whole).step_by(SQUARE) {
                let from = self.out[d * width + first..].as_ptr();
                // SAFETY: eight rows of `width` numbers, of which eight are there from `first` on: `width` is a multiple of eight.
                unsafe { s.turn(from, width as isize, square.as_mut_ptr().cast(), SQUARE as isize) };
                for (to, square) in to.iter().zip(&square).take(count) {
                    // SAFETY: inside the shape of the output, and the row belongs to this thread.
                    unsafe { std::slice::from_raw_parts_mut(to.wrapping_add(d), SQUARE) }
                        .copy_from_slice(square);
                }
            }
            for d in whole..size {
                for (i, to) in to.iter().enumerate().take(count) {
                    // SAFETY: as above.
                    unsafe { *to.wrapping_offset(d as isize * steps[2]) = self.out[d * width + first + i] };
                }
            }
        }
    }
}

/// What a row of the mask lets its queries see: how many visible keys come before the first whose mask is not 0, and how many up to
/// the last that is not hidden.
fn look(call: &Call, runs: &[Range<usize>], (h, s): (usize, usize)) -> [u32; 2] {
    let (mut visible, mut clear, mut seen) = (0, None, 0);
    for run in runs {
        if let Some(row) = call.mask_row(h, s, run.clone()) {
            if clear.is_none() {
                clear = row.iter().position(|mask| *mask != 0.0).map(|at| visible + at);
            }
            if let Some(at) = row.iter().rposition(|mask| *mask != f32::NEG_INFINITY) {
                seen = visible + at + 1;
            }
        } else {
            for (at, t) in (visible..).zip(run.clone()) {
                let mask = call.mask_at(h, s, t);
                if mask != 0.0 {
                    clear.get_or_insert(at);
                }
                if mask != f32::NEG_INFINITY {
                    seen = at + 1;
                }
            }
        }
        visible += run.len();
    }
    let clear = clear.unwrap_or(visible).min(seen);
    [clear, seen].map(|n| u32::try_from(n).unwrap_or(u32::MAX))
}

/// Adds the mask of head and query `(h, s)` to column `lane` of `[keys][panel]`, where it is not 0.
fn add_mask(
    call: &Call,
    runs: &[Range<usize>],
    (h, s): (usize, usize),
    [clear, seen]: [usize; 2],
    scores: &mut [f32],
    lane: usize,
) {
    let mut lines = scores.chunks_exact_mut(panel_width()).skip(clear);
    let mut keys = runs.iter().cloned().flatten().skip(clear);
    for (line, t) in lines.by_ref().take(seen - clear).zip(&mut keys) {
        let mask = call.mask_at(h, s, t);
        if mask == f32::NEG_INFINITY {
            line[lane] = mask;
        } else {
            line[lane] += mask;
        }
    }
    lines.for_each(|line| line[lane] = f32::NEG_INFINITY);
}

/// Softmax down the columns of `[keys][panel]`, in place; zeros where everything is minus infinity. Where `PAIRS`, two lines become
/// one of pairs of bf16.
struct Softmax<'a, const PAIRS: bool> {
    scores: &'a mut [f32],
}

impl<const PAIRS: bool> Kernel for Softmax<'_, PAIRS> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let line = 2 * S::LANES;
        for half in [0, S::LANES] {
            let mut max = s.splat(f32::NEG_INFINITY);
            for row in self.scores.chunks_exact(line) {
                // SAFETY: half a line is one vector.
                max = s.max(max, unsafe { s.load(row.as_ptr().add(half)) });
            }
            // With nothing to see, the scores are minus infinity, and so they stay without a NaN.
            let max = s.select(s.eq(max, s.splat(f32::NEG_INFINITY)), s.zero(), max);
            let mut sum = s.zero();
            for row in self.scores.chunks_exact_mut(line) {
                // SAFETY: as above.
                let score = unsafe { s.load(row.as_ptr().add(half)) };
                let e = exp(s, s.sub(score, max));
                let e = s.select(s.eq(score, s.splat(f32::NEG_INFINITY)), s.zero(), e);
                sum = s.add(sum, e);
                // SAFETY: as above.
                unsafe { s.store(row.as_mut_ptr().add(half), e) };
            }
            let factor = s.select(s.eq(sum, s.zero()), s.zero(), s.div(s.splat(1.0), sum));
            if PAIRS {
                let lines = self.scores.len() / line;
                let first = self.scores.as_mut_ptr().wrapping_add(half);
                for i in 0..lines.div_ceil(2) {
                    // SAFETY: line `2 i` is there, and line `i` was read before.
                    unsafe {
                        let low = s.mul(s.load(first.add(2 * i * line)), factor);
                        let high = if 2 * i + 1 < lines {
                            s.mul(s.load(first.add((2 * i + 1) * line)), factor)
                        } else {
                            s.zero()
                        };
                        s.store(first.add(i * line), s.pairs(low, high));
                    }
                }
                continue;
            }
            for row in self.scores.chunks_exact_mut(line) {
                let at = row.as_mut_ptr().wrapping_add(half);
                // SAFETY: as above.
                unsafe { s.store(at, s.mul(s.load(at), factor)) };
            }
        }
    }
}
