//! Attention of a few queries: products with keys and values where they lie.

use super::{Call, Runs};
use crate::elementwise::math::exp;
use crate::loops::Shared;
use crate::matmul::Source;
use crate::matvec::Stored;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, dispatch};
use std::cell::RefCell;
use std::ops::Range;

/// Queries that share a pass over the keys.
const ROWS: usize = 3;

thread_local! {
    /// Queries, scores, results and, for keys that lie apart, their copy.
    static WORK: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Key positions a job reads at least, where those of a head are divided to give every thread work.
const LEAST_KEYS: usize = 64;

/// Scores and values a job should see before another one is worth claiming.
const LEAST_WORK: usize = 10_000;

/// One job per head of keys and few queries; where that leaves threads idle, per part of the positions too.
pub(super) fn run(pool: &Pool, call: &Call, runs: &[Range<usize>], scratch: &mut Scratch) {
    let visible: usize = runs.iter().map(Range::len).sum();
    let rows = call.group() * call.queries;
    let blocks = rows.div_ceil(ROWS);
    let jobs = call.kv_heads * blocks;
    let parts = parts(pool.threads(), jobs, visible);
    let work = rows.min(ROWS) * visible * (call.size + call.v_size) / parts;
    let line = call.v_size + 2;
    let space = if parts == 1 {
        0
    } else {
        call.heads * call.queries * parts * line
    };
    let partial = scratch.f32(space);
    let target = Shared(partial.as_mut_ptr());
    pool.run_ranges(jobs * parts, (LEAST_WORK / work.max(1)).max(1), &|range| {
        WORK.with_borrow_mut(|work| {
            for job in range {
                let (block, part) = (job / parts, job % parts);
                let first = block / blocks * rows;
                let start = block % blocks * ROWS;
                let rows = first + start..first + (start + ROWS).min(rows);
                if parts == 1 {
                    head(call, runs, rows, work, None);
                } else {
                    let own = within(runs, visible * part / parts..visible * (part + 1) / parts);
                    head(call, &own, rows, work, Some((target, part, parts)));
                }
            }
        });
    });
    if parts > 1 {
        for (row, partial) in partial.chunks_exact_mut(parts * line).enumerate() {
            merge(partial, parts, line);
            store(call, row, &partial[2..line]);
        }
    }
}

/// Into how many parts the positions are divided.
fn parts(threads: usize, jobs: usize, visible: usize) -> usize {
    if threads == 1 || (jobs >= threads && jobs.is_multiple_of(threads)) || jobs >= 8 * threads {
        return 1;
    }
    (4 * threads).div_ceil(jobs).min(visible / LEAST_KEYS).max(1)
}

/// The positions whose places among the visible ones are in `range`.
fn within(runs: &[Range<usize>], range: Range<usize>) -> Runs {
    let mut own = Runs::new();
    let mut before = 0;
    for run in runs {
        let start = range.start.max(before);
        let end = range.end.min(before + run.len());
        if start < end {
            own.push(run.start + start - before..run.start + end - before);
        }
        before += run.len();
    }
    own
}

/// Joins the parts of one row, `[maximum, sum, values..]` each, to the values in the first of them.
fn merge(partial: &mut [f32], parts: usize, line: usize) {
    let max = partial.chunks_exact(line).map(|part| part[0]);
    let max = max.fold(
        f32::NEG_INFINITY,
        |max, m| if m > max || m.is_nan() { m } else { max },
    );
    if max == f32::NEG_INFINITY {
        return partial[2..line].fill(0.0);
    }
    let total: f32 = partial
        .chunks_exact(line)
        .map(|part| part[1] * (part[0] - max).exp())
        .sum();
    let (first, rest) = partial.split_at_mut(line);
    let factor = (first[0] - max).exp() / total;
    first[2..].iter_mut().for_each(|value| *value *= factor);
    for part in rest.chunks_exact(line).take(parts - 1) {
        let factor = (part[0] - max).exp() / total;
        first[2..]
            .iter_mut()
            .zip(&part[2..])
            .for_each(|(sum, value)| *sum += value * factor);
    }
}

/// Writes the values of a row (head, query), which is this thread's.
fn store(call: &Call, row: usize, values: &[f32]) {
    let (h, s) = (row / call.queries, row % call.queries);
    let (y, steps) = call.y;
    for (d, value) in values.iter().enumerate() {
        let at = h as isize * steps[0] + s as isize * steps[1] + d as isize * steps[2];
        // SAFETY: inside the shape of the output, and the row belongs to this thread.
        unsafe { *y.at(at) = *value };
    }
}

/// Rows (head, query) `rows`, which read the same keys, over the positions in `runs`. The results are written out, or kept as
/// part `.1` of `.2` for [`merge`].
fn head(
    call: &Call,
    runs: &[Range<usize>],
    rows: Range<usize>,
    work: &mut Vec<f32>,
    partial: Option<(Shared<f32>, usize, usize)>,
) {
    let visible: usize = runs.iter().map(Range::len).sum();
    let count = rows.len();
    let place = |row: usize| (row / call.queries, row % call.queries);
    let kv = place(rows.start).0 / call.group();
    // Rows that are read where they lie need no copy.
    let (k, v) = (call.k.1, call.v.1);
    let k_wide = if k[2] == 1 || k[1] == 1 { 0 } else { call.size };
    let v_wide = if v[2] == 1 { 0 } else { call.v_size };
    let wide = k_wide.max(v_wide);
    // As much as the last position needs, so that a text that grows does not allocate on its way.
    let most = ROWS * (call.size + call.keys + call.v_size) + call.keys * wide;
    work.reserve(most.saturating_sub(work.len()));
    work.resize(count * (call.size + visible + call.v_size) + visible * wide, 0.0);
    let (q, rest) = work.split_at_mut(count * call.size);
    let (scores, rest) = rest.split_at_mut(count * visible);
    let (out, copy) = rest.split_at_mut(count * call.v_size);
    for (row, q) in rows.clone().zip(q.chunks_exact_mut(call.size.max(1))) {
        let (h, s) = place(row);
        let ((p, steps), scale) = (call.q, call.scale);
        for (d, q) in q.iter_mut().enumerate() {
            let at = h as isize * steps[0] + s as isize * steps[1] + d as isize * steps[2];
            // SAFETY: inside the shape of the queries.
            *q = scale * unsafe { *p.at(at) };
        }
    }
    score(call, runs, kv, (q, call.size), scores, copy);
    let mut totals = [(f32::NEG_INFINITY, 0.0); ROWS];
    for ((row, scores), total) in rows
        .clone()
        .zip(scores.chunks_exact_mut(visible.max(1)))
        .zip(&mut totals)
    {
        add_mask(call, runs, place(row), scores);
        *total = dispatch(Exps { scores });
    }
    mix(call, runs, kv, (scores, visible), out, copy);
    for ((row, out), (max, sum)) in rows.zip(out.chunks_exact_mut(call.v_size)).zip(totals) {
        if let Some((target, part, parts)) = partial {
            let line = call.v_size + 2;
            let to = target.at(((row * parts + part) * line) as isize);
            // SAFETY: each row and part has its own line.
            let to = unsafe { std::slice::from_raw_parts_mut(to, line) };
            (to[0], to[1]) = (max, sum);
            to[2..].copy_from_slice(out);
            continue;
        }
        if max == f32::NEG_INFINITY {
            out.fill(0.0);
        }
        let factor = if max == f32::NEG_INFINITY { 0.0 } else { 1.0 / sum };
        out.iter_mut().for_each(|value| *value *= factor);
        store(call, row, out);
    }
}

/// Adds the mask of head and query `place` to the scores of the positions in `runs`.
fn add_mask(call: &Call, runs: &[Range<usize>], (h, s): (usize, usize), mut scores: &mut [f32]) {
    let Some((p, steps)) = call.mask else {
        return;
    };
    let add = |score: &mut f32, mask: f32| {
        *score = if mask == f32::NEG_INFINITY {
            mask
        } else {
            *score + mask
        };
    };
    for run in runs {
        let (now, rest) = scores.split_at_mut(run.len());
        scores = rest;
        if steps[2] == 1 {
            let first = h as isize * steps[0] + s as isize * steps[1] + run.start as isize;
            // SAFETY: the positions of the run in a dense row of the mask.
            let mask = unsafe { std::slice::from_raw_parts(p.at(first), run.len()) };
            now.iter_mut()
                .zip(mask)
                .for_each(|(score, mask)| add(score, *mask));
        } else {
            let masks = run.clone().map(|t| call.mask_at(h, s, t));
            now.iter_mut()
                .zip(masks)
                .for_each(|(score, mask)| add(score, mask));
        }
    }
}

/// `scores[r, i] = q[r] . k[t_i]` over the visible keys.
fn score(
    call: &Call,
    runs: &[Range<usize>],
    kv: usize,
    (q, size): (&[f32], usize),
    scores: &mut [f32],
    copy: &mut [f32],
) {
    let (source, steps) = call.k;
    let base = kv as isize * steps[0];
    match source {
        Source::F32(p) if steps[2] == 1 => {
            dispatch(Dots {
                m: p.at(base).cast_const(),
                step: steps[1],
                runs,
                q,
                size,
                scores,
            });
        }
        Source::F16(p) if steps[2] == 1 => {
            dispatch(Dots {
                m: p.at(base).cast_const(),
                step: steps[1],
                runs,
                q,
                size,
                scores,
            });
        }
        Source::F32(p) if steps[1] == 1 => {
            dispatch(Mix {
                m: p.at(base).cast_const(),
                row_step: steps[2],
                runs,
                a: q,
                size,
                out: scores,
            });
        }
        Source::F16(p) if steps[1] == 1 => {
            dispatch(Mix {
                m: p.at(base).cast_const(),
                row_step: steps[2],
                runs,
                a: q,
                size,
                out: scores,
            });
        }
        _ => {
            call.pack(true, kv, runs, [size, 1], copy);
            let visible = runs.iter().map(Range::len).sum();
            let all = [0..visible];
            dispatch(Dots {
                m: copy.as_ptr(),
                step: size as isize,
                runs: &all,
                q,
                size,
                scores,
            });
        }
    }
}

/// `out[r, d] = sum_i p[r, i] * v[t_i, d]` over the visible keys.
fn mix(
    call: &Call,
    runs: &[Range<usize>],
    kv: usize,
    (p, visible): (&[f32], usize),
    out: &mut [f32],
    copy: &mut [f32],
) {
    let (source, steps) = call.v;
    let base = kv as isize * steps[0];
    match source {
        Source::F32(v) if steps[2] == 1 => {
            dispatch(Sum {
                m: v.at(base).cast_const(),
                step: steps[1],
                runs,
                p,
                visible,
                out,
                size: call.v_size,
            });
        }
        Source::F16(v) if steps[2] == 1 => {
            dispatch(Sum {
                m: v.at(base).cast_const(),
                step: steps[1],
                runs,
                p,
                visible,
                out,
                size: call.v_size,
            });
        }
        _ => {
            let size = call.v_size;
            call.pack(false, kv, runs, [size, 1], copy);
            let all = [0..visible];
            dispatch(Sum {
                m: copy.as_ptr(),
                step: size as isize,
                runs: &all,
                p,
                visible,
                out,
                size,
            });
        }
    }
}

/// `scores[r][i] = q[r] . m[t_i]`, rows of `m` dense and `step` apart. The three kernels read a head of keys or
/// values that [`Call`] checked, at the positions in `runs`.
struct Dots<'a, T> {
    m: *const T,
    step: isize,
    runs: &'a [Range<usize>],
    q: &'a [f32],
    size: usize,
    scores: &'a mut [f32],
}

impl<T: Stored> Kernel for Dots<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let visible: usize = self.runs.iter().map(Range::len).sum();
        let size = self.size;
        let rows = self.scores.len().checked_div(visible).unwrap_or(0);
        assert!(self.q.len() == rows * size || visible == 0, "attention: queries");
        let mut i = 0;
        for run in self.runs {
            let mut start = run.start;
            while start + 8 <= run.end {
                let keys = self.m.wrapping_offset(start as isize * self.step);
                for r in 0..rows {
                    let q = &self.q[r * size..][..size];
                    let out = &mut self.scores[r * visible + i..][..8];
                    // SAFETY: eight rows of keys.
                    unsafe { dot_eight(s, keys, self.step, q, out) };
                }
                i += 8;
                start += 8;
            }
            for t in start..run.end {
                let key = self.m.wrapping_offset(t as isize * self.step);
                match rows {
                    3 => self::dot::<S, T, 3>(s, key, self.q, size, visible, &mut self.scores[i..]),
                    2 => self::dot::<S, T, 2>(s, key, self.q, size, visible, &mut self.scores[i..]),
                    _ => self::dot::<S, T, 1>(s, key, self.q, size, visible, &mut self.scores[i..]),
                }
                i += 1;
            }
        }
    }
}

/// `out[n] = q . keys[n]` for eight rows, `step` apart.
///
/// # Safety
/// The rows have the elements of `q`.
#[inline(always)]
unsafe fn dot_eight<S: Simd, T: Stored>(s: S, keys: *const T, step: isize, q: &[f32], out: &mut [f32]) {
    let mut sums = [s.zero(); 8];
    let mut d = 0;
    while d + S::LANES <= q.len() {
        // SAFETY: a vector of the query.
        let part = unsafe { s.load(q.as_ptr().add(d)) };
        for (n, sum) in sums.iter_mut().enumerate() {
            let key = keys.wrapping_offset(n as isize * step).wrapping_add(d);
            // SAFETY: a vector inside the row.
            *sum = s.fma(part, unsafe { T::load(s, key) }, *sum);
        }
        d += S::LANES;
    }
    let sums = s.sum_each(sums);
    for (n, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        *out = sum;
        for (d, q) in q.iter().enumerate().skip(d) {
            let key = keys.wrapping_offset(n as isize * step).wrapping_add(d);
            // SAFETY: inside the row.
            *out += q * unsafe { *key }.widen();
        }
    }
}

/// `out[r * line] = q[r] . key` for `R` queries of `size` elements.
#[inline(always)]
fn dot<S: Simd, T: Stored, const R: usize>(
    s: S,
    key: *const T,
    q: &[f32],
    size: usize,
    line: usize,
    out: &mut [f32],
) {
    let mut sums = [s.zero(); R];
    let mut d = 0;
    while d + S::LANES <= size {
        // SAFETY: a vector inside the row.
        let k = unsafe { T::load(s, key.add(d)) };
        for r in 0..R {
            let q = &q[r * size + d..][..S::LANES];
            // SAFETY: one vector.
            sums[r] = s.fma(k, unsafe { s.load(q.as_ptr()) }, sums[r]);
        }
        d += S::LANES;
    }
    for r in 0..R {
        let mut rest = 0.0;
        for d in d..size {
            // SAFETY: inside the row.
            rest += q[r * size + d] * unsafe { *key.add(d) }.widen();
        }
        out[r * line] = s.sum(sums[r]) + rest;
    }
}

/// `out[r][i] = sum_d a[r][d] * m[d][t_i]`: keys stored with positions side by side, rows `row_step` apart.
struct Mix<'a, T> {
    m: *const T,
    row_step: isize,
    runs: &'a [Range<usize>],
    a: &'a [f32],
    size: usize,
    out: &'a mut [f32],
}

impl<T: Stored> Kernel for Mix<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let visible: usize = self.runs.iter().map(Range::len).sum();
        if visible == 0 {
            return;
        }
        for (r, out) in self.out.chunks_exact_mut(visible).enumerate() {
            let a = &self.a[r * self.size..][..self.size];
            let mut i = 0;
            for run in self.runs {
                let out = &mut out[i..i + run.len()];
                i += run.len();
                let start = self.m.wrapping_add(run.start);
                let mut t = 0;
                while t + 4 * S::LANES <= out.len() {
                    let mut sums = [s.zero(); 4];
                    for (d, a) in a.iter().enumerate() {
                        let at = start.wrapping_offset(d as isize * self.row_step).wrapping_add(t);
                        let a = s.splat(*a);
                        for (n, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: positions of the run, in row `d`.
                            *sum = s.fma(a, unsafe { T::load(s, at.add(n * S::LANES)) }, *sum);
                        }
                    }
                    for (n, sum) in sums.into_iter().enumerate() {
                        let out = &mut out[t + n * S::LANES..][..S::LANES];
                        // SAFETY: one vector.
                        unsafe { s.store(out.as_mut_ptr(), sum) };
                    }
                    t += 4 * S::LANES;
                }
                for t in t..out.len() {
                    let value = |d: usize| {
                        // SAFETY: a position of the run, in row `d`.
                        unsafe { *start.wrapping_offset(d as isize * self.row_step).wrapping_add(t) }.widen()
                    };
                    out[t] = a.iter().enumerate().map(|(d, a)| a * value(d)).sum();
                }
            }
        }
    }
}

/// `out[r][d] = sum_i p[r][i] * m[t_i][d]`, rows of `m` dense and `step` apart.
struct Sum<'a, T> {
    m: *const T,
    step: isize,
    runs: &'a [Range<usize>],
    p: &'a [f32],
    visible: usize,
    size: usize,
    out: &'a mut [f32],
}

impl<T: Stored> Kernel for Sum<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.out.len() / self.size {
            3 => self.rows::<S, 3>(s),
            2 => self.rows::<S, 2>(s),
            _ => self.rows::<S, 1>(s),
        }
    }
}

impl<T: Stored> Sum<'_, T> {
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(self, s: S) {
        let Sum {
            m,
            step,
            runs,
            p,
            visible,
            size,
            out,
        } = self;
        assert!(
            p.len() == R * visible && out.len() == R * size,
            "attention: scores"
        );
        let mut d = 0;
        while d + S::LANES <= size {
            let vectors = ((size - d) / S::LANES).min(4);
            let mut sums = [[s.zero(); 4]; R];
            let mut i = 0;
            for run in runs {
                for t in run.clone() {
                    let row = m.wrapping_offset(t as isize * step).wrapping_add(d);
                    let mut factors = [s.zero(); R];
                    for (r, factor) in factors.iter_mut().enumerate() {
                        *factor = s.splat(p[r * visible + i]);
                    }
                    let p = factors;
                    i += 1;
                    if vectors == 4 {
                        for n in 0..4 {
                            // SAFETY: four vectors inside the row.
                            let v = unsafe { T::load(s, row.add(n * S::LANES)) };
                            for r in 0..R {
                                sums[r][n] = s.fma(p[r], v, sums[r][n]);
                            }
                        }
                    } else {
                        for n in 0..vectors {
                            // SAFETY: `vectors` vectors inside the row.
                            let v = unsafe { T::load(s, row.add(n * S::LANES)) };
                            for r in 0..R {
                                sums[r][n] = s.fma(p[r], v, sums[r][n]);
                            }
                        }
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                for (n, sum) in sums.into_iter().enumerate().take(vectors) {
                    let out = &mut out[r * size + d + n * S::LANES..][..S::LANES];
                    // SAFETY: one vector.
                    unsafe { s.store(out.as_mut_ptr(), sum) };
                }
            }
            d += vectors * S::LANES;
        }
        for d in d..size {
            for r in 0..R {
                let mut sum = 0.0;
                for (i, t) in runs.iter().cloned().flatten().enumerate() {
                    // SAFETY: inside the row.
                    sum +=
                        p[r * visible + i] * unsafe { *m.wrapping_offset(t as isize * step).add(d) }.widen();
                }
                out[r * size + d] = sum;
            }
        }
    }
}

/// `out[r, i] = rows[r] . m[i]` for up to three dense rows of `k` and `count` items of `m`, which are `item` apart with
/// elements `step` apart; one of the two is 1.
///
/// # Safety
/// The items are readable.
pub(crate) unsafe fn few_rows<T: Stored>(
    m: *const T,
    (item, step): (isize, isize),
    (count, k): (usize, usize),
    rows: &[f32],
    out: &mut [f32],
) {
    if step == 1 {
        dispatch(Dots {
            m,
            step: item,
            runs: std::slice::from_ref(&(0..count)),
            q: rows,
            size: k,
            scores: out,
        });
    } else {
        assert_eq!(item, 1, "items or their elements lie side by side");
        let all = [0..k];
        dispatch(Sum {
            m,
            step,
            runs: &all,
            p: rows,
            visible: k,
            size: count,
            out,
        });
    }
}

/// Exponentials in place of scores; gives the maximum that was subtracted and their sum.
struct Exps<'a> {
    scores: &'a mut [f32],
}

impl Kernel for Exps<'_> {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        exps(s, self.scores)
    }
}

/// Softmax in place; zeros where everything is minus infinity.
#[inline(always)]
pub(crate) fn softmax<S: Simd>(s: S, x: &mut [f32]) {
    let (max, sum) = exps(s, x);
    if max == f32::NEG_INFINITY {
        return;
    }
    let whole = x.len() / S::LANES * S::LANES;
    let (head, tail) = x.split_at_mut(whole);
    let factor = s.splat(1.0 / sum);
    for x in head.chunks_exact_mut(S::LANES) {
        // SAFETY: one vector.
        unsafe { s.store(x.as_mut_ptr(), s.mul(s.load(x.as_ptr()), factor)) };
    }
    tail.iter_mut().for_each(|x| *x /= sum);
}

/// See [`Exps`]; zeros, minus infinity and 0 where everything is minus infinity.
#[inline(always)]
fn exps<S: Simd>(s: S, x: &mut [f32]) -> (f32, f32) {
    let whole = x.len() / S::LANES * S::LANES;
    let (head, tail) = x.split_at_mut(whole);
    let mut most = s.splat(f32::NEG_INFINITY);
    for x in head.chunks_exact(S::LANES) {
        // SAFETY: one vector.
        most = s.max(most, unsafe { s.load(x.as_ptr()) });
    }
    let max = tail.iter().copied().fold(
        s.largest(most),
        |max, x| if x > max || x.is_nan() { x } else { max },
    );
    if max == f32::NEG_INFINITY {
        head.fill(0.0);
        tail.fill(0.0);
        return (max, 0.0);
    }
    let shift = s.splat(max);
    let mut sums = s.zero();
    for x in head.chunks_exact_mut(S::LANES) {
        // SAFETY: one vector.
        let e = exp(s, s.sub(unsafe { s.load(x.as_ptr()) }, shift));
        sums = s.add(sums, e);
        // SAFETY: one vector.
        unsafe { s.store(x.as_mut_ptr(), e) };
    }
    let mut sum = s.sum(sums);
    let mut rest = [f32::NEG_INFINITY; 16];
    rest[..tail.len()].copy_from_slice(tail);
    // SAFETY: no vector is longer than sixteen.
    let e = exp(s, s.sub(unsafe { s.load(rest.as_ptr()) }, shift));
    // SAFETY: as above.
    unsafe { s.store(rest.as_mut_ptr(), e) };
    sum += rest[..tail.len()].iter().sum::<f32>();
    tail.copy_from_slice(&rest[..tail.len()]);
    (max, sum)
}
