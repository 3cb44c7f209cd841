//! Attention of many queries: blocked products with queries as lanes.

use super::Call;
use crate::elementwise::math::exp;
use crate::gemm::{Gemm, Rows, block_space, panel_width};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch};
use crate::weights::Lines;
use std::ops::Range;

pub(super) fn run(pool: &Pool, call: &Call, runs: &[Range<usize>], scratch: &mut Scratch) {
    let visible: usize = runs.iter().map(Range::len).sum();
    let width = panel_width();
    let kv = visible * (call.size + call.v_size);
    let each = (call.size + visible + call.v_size) * width + block_space(visible.max(call.v_size));
    let each = each.next_multiple_of(16);
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
            (0, visible * call.size)
        } else {
            (visible * call.size, visible * call.v_size)
        };
        // SAFETY: each job has its own part of the packed keys and values.
        let out = unsafe { std::slice::from_raw_parts_mut(target.at((head * kv + start) as isize), len) };
        // Keys as rows along the head size, values as rows along the positions.
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
            (runs, visible),
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
    (runs, visible): (&[Range<usize>], usize),
    sight: &dyn Fn(usize, usize) -> Option<[usize; 2]>,
    (head, lanes): (usize, Range<usize>),
    packed: &[f32],
    work: &mut [f32],
) {
    let width = panel_width();
    let place = |lane: usize| (head * call.group() + lane / call.queries, lane % call.queries);
    let (q, rest) = work.split_at_mut(call.size * width);
    let (scores, rest) = rest.split_at_mut(visible * width);
    let (out, space) = rest.split_at_mut(call.v_size * width);
    let (p, steps) = call.q;
    for lane in 0..width {
        let from = (lane < lanes.len()).then(|| {
            let (h, s) = place(lanes.start + lane);
            h as isize * steps[0] + s as isize * steps[1]
        });
        for d in 0..call.size {
            // SAFETY: inside the shape of the queries.
            let value = from.map_or(0.0, |from| unsafe { *p.at(from + d as isize * steps[2]) });
            q[d * width + lane] = value * call.scale;
        }
    }
    // Keys past the last one that these queries see are left out; with a causal mask that is half of them.
    let last = |(h, s)| sight(h, s).map_or(visible, |[_, seen]| seen);
    let seen = lanes.clone().map(place).map(last).max().unwrap_or(0).min(visible);
    let keys = Rows::Dense {
        first: Shared::of(packed.as_ptr()),
        stride: call.size as isize,
    };
    // SAFETY: the packed keys are `[visible, size]`.
    unsafe {
        Gemm {
            panels: q,
            k: call.size,
            rows: keys,
            then: Lines::default(),
            pairs: false,
        }
        .block(0..seen, 0..1, scores, space)
    };
    for (lane, (h, s)) in lanes.clone().map(place).enumerate() {
        if let Some(sight) = sight(h, s) {
            add_mask(call, runs, (h, s), sight, &mut scores[..seen * width], lane);
        }
    }
    dispatch(Softmax {
        scores: &mut scores[..seen * width],
    });
    let values = Shared::of(packed[visible * call.size..].as_ptr());
    let values = Rows::Dense {
        first: values,
        stride: visible as isize,
    };
    // SAFETY: the packed values are `[v_size, visible]`, and `seen` is not more than `visible`.
    unsafe {
        Gemm {
            panels: scores,
            k: seen,
            rows: values,
            then: Lines::default(),
            pairs: false,
        }
        .block(0..call.v_size, 0..1, out, space)
    };
    let (y, steps) = call.y;
    for (lane, (h, s)) in lanes.map(place).enumerate() {
        let to = h as isize * steps[0] + s as isize * steps[1];
        for d in 0..call.v_size {
            // SAFETY: inside the shape of the output, and the row belongs to this thread.
            unsafe { *y.at(to + d as isize * steps[2]) = out[d * width + lane] };
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

/// Softmax down the columns of `[keys][panel]`, in place; zeros where everything is minus infinity.
struct Softmax<'a> {
    scores: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
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
            for row in self.scores.chunks_exact_mut(line) {
                let at = row.as_mut_ptr().wrapping_add(half);
                // SAFETY: as above.
                unsafe { s.store(at, s.mul(s.load(at), factor)) };
            }
        }
    }
}
