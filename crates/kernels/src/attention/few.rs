//! Attention of a few queries: products with keys and values where they lie.

use super::Call;
use crate::elementwise::math::exp;
use crate::matmul::Source;
use crate::matvec::Stored;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};
use std::cell::RefCell;
use std::ops::Range;

/// Queries that share a pass over the keys.
const ROWS: usize = 3;

thread_local! {
    /// Queries, scores, results and, for keys that lie apart, their copy.
    static WORK: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One job per head of keys, or per query head where that leaves threads idle.
pub(super) fn run(pool: &Pool, call: &Call, runs: &[Range<usize>]) {
    let visible: usize = runs.iter().map(Range::len).sum();
    let rows = call.group() * call.queries;
    let each = if call.kv_heads < pool.threads() {
        call.queries
    } else {
        rows
    };
    let jobs = call.kv_heads * rows / each;
    let work = each * visible * (call.size + call.v_size);
    pool.run_ranges(jobs, (40_000 / work.max(1)).max(1), &|range| {
        WORK.with_borrow_mut(|work| {
            for job in range {
                let first = job * each;
                for start in (0..each).step_by(ROWS) {
                    let rows = first + start..first + (start + ROWS).min(each);
                    head(call, runs, visible, rows, work);
                }
            }
        });
    });
}

/// Rows (head, query) `rows`, which read the same keys.
fn head(call: &Call, runs: &[Range<usize>], visible: usize, rows: Range<usize>, work: &mut Vec<f32>) {
    let count = rows.len();
    let place = |row: usize| (row / call.queries, row % call.queries);
    let kv = place(rows.start).0 / call.group();
    let wide = call.size.max(call.v_size);
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
    for (row, scores) in rows.clone().zip(scores.chunks_exact_mut(visible.max(1))) {
        let (h, s) = place(row);
        if call.mask.is_some() {
            let keys = runs.iter().cloned().flatten();
            keys.zip(scores.iter_mut()).for_each(|(t, score)| {
                let mask = call.mask_at(h, s, t);
                *score = if mask == f32::NEG_INFINITY {
                    mask
                } else {
                    *score + mask
                };
            });
        }
        dispatch(Softmax { scores });
    }
    mix(call, runs, kv, (scores, visible), out, copy);
    for (row, out) in rows.zip(out.chunks_exact(call.v_size)) {
        let (h, s) = place(row);
        let (y, steps) = call.y;
        for (d, value) in out.iter().enumerate() {
            let at = h as isize * steps[0] + s as isize * steps[1] + d as isize * steps[2];
            // SAFETY: inside the shape of the output, and the row belongs to this thread.
            unsafe { *y.at(at) = *value };
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
            for t in run.clone() {
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
                    let p: [S::F; R] = std::array::from_fn(|r| s.splat(p[r * visible + i]));
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

/// Softmax in place; zeros where everything is minus infinity.
struct Softmax<'a> {
    scores: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        softmax(s, self.scores);
    }
}

/// See [`Softmax`].
#[inline(always)]
pub(crate) fn softmax<S: Simd>(s: S, x: &mut [f32]) {
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
        return;
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
    let factor = s.splat(1.0 / sum);
    for x in head.chunks_exact_mut(S::LANES) {
        // SAFETY: one vector.
        unsafe { s.store(x.as_mut_ptr(), s.mul(s.load(x.as_ptr()), factor)) };
    }
    tail.iter_mut().for_each(|x| *x /= sum);
}
