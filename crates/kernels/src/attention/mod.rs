//! Scaled dot-product attention with grouped heads.
//!
//! Key positions that a mask hides from every query are found first and left out. Few queries (decoding) go through
//! dot products over keys as stored; many (prefill) through the blocked product, queries as lanes.

mod few;
mod many;
mod pack;

pub(crate) use few::{few_rows, softmax};

use crate::gemm::Arithmetic;
use crate::loops::Shared;
use crate::matmul::{Operand, Source};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use smallvec::SmallVec;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// For each key position, whether a query sees it.
    static SEEN: RefCell<Vec<bool>> = const { RefCell::new(Vec::new()) };
}

/// Ranges of key positions. A causal mask leaves one, a window two at most.
type Runs = SmallVec<[Range<usize>; 4]>;

/// Up to this many query positions are handled one by one.
const FEW_QUERIES: usize = 4;

/// Queries, keys and values of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// `[H, S, D]`: heads, query positions, head size.
    pub q: View<'a, f32>,
    /// `[Hkv, T, D]`; `H` is a multiple of `Hkv`, and head `h` reads keys of head `h / (H / Hkv)`.
    pub k: Operand<'a>,
    /// `[Hkv, T, Dv]`.
    pub v: Operand<'a>,
    /// Added to the scores: `[1 or H, 1 or S, T]`.
    pub mask: Option<View<'a, f32>>,
    /// Multiplies the scores before the mask is added.
    pub scale: f32,
    /// How sums are made when there are many queries; few are always multiplied in 32 bits.
    pub arithmetic: Arithmetic,
}

/// A checked call: sizes, steps, and first elements.
#[derive(Debug, Clone, Copy)]
struct Call {
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    size: usize,
    v_size: usize,
    q: (Shared<f32>, [isize; 3]),
    k: (Source, [isize; 3]),
    v: (Source, [isize; 3]),
    mask: Option<(Shared<f32>, [isize; 3])>,
    y: (Shared<f32>, [isize; 3]),
    scale: f32,
    /// Many queries are multiplied in pairs of bf16.
    pairs: bool,
}

/// `y[h, s] = softmax_t(scale * q[h, s] . k[h, t] + mask[h, s, t]) . v[h, t]`, `y` is `[H, S, Dv]`.
///
/// The softmax subtracts the maximum and works in `f32`. Key positions whose mask is minus infinity for every query
/// are not read; a query position where all are masked gives 0.
///
/// # Panics
/// When the shapes do not fit.
pub fn attention(pool: &Pool, call: &Attention<'_>, y: ViewMut<'_, f32>, scratch: &mut Scratch) {
    let call = Call::new(call, y);
    if call.heads * call.queries * call.v_size == 0 {
        return;
    }
    let runs = call.visible();
    if call.queries <= FEW_QUERIES {
        few::run(pool, &call, &runs, scratch);
    } else {
        many::run(pool, &call, &runs, scratch);
    }
}

fn steps(strides: &[isize]) -> [isize; 3] {
    [strides[0], strides[1], strides[2]]
}

impl Call {
    fn new(call: &Attention<'_>, mut y: ViewMut<'_, f32>) -> Call {
        let &[heads, queries, size] = call.q.shape() else {
            panic!("attention takes queries of rank 3")
        };
        let (&[kv_heads, keys, k_size], &[v_heads, v_keys, v_size]) = (call.k.shape(), call.v.shape()) else {
            panic!("attention takes keys and values of rank 3")
        };
        assert!(
            k_size == size && v_heads == kv_heads && v_keys == keys,
            "attention: keys and values do not fit"
        );
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "attention: {heads} heads over {kv_heads}"
        );
        assert_eq!(y.shape(), [heads, queries, v_size], "attention: output shape");
        let mask = call.mask.map(|mask| {
            let &[mh, ms, mt] = mask.shape() else {
                panic!("attention takes a mask of rank 3")
            };
            assert!(
                (mh == 1 || mh == heads) && (ms == 1 || ms == queries) && mt == keys,
                "attention: mask shape"
            );
            let step = |axis: usize| {
                if mask.shape()[axis] == 1 {
                    0
                } else {
                    mask.strides()[axis]
                }
            };
            (Shared::of(mask.ptr()), [step(0), step(1), mask.strides()[2]])
        });
        Call {
            heads,
            kv_heads,
            queries,
            keys,
            size,
            v_size,
            q: (Shared::of(call.q.ptr()), steps(call.q.strides())),
            k: (call.k.source(), steps(call.k.strides())),
            v: (call.v.source(), steps(call.v.strides())),
            mask,
            y: (Shared(y.ptr()), steps(y.strides())),
            scale: call.scale,
            pairs: call.arithmetic.in_pairs(),
        }
    }

    /// Heads that share keys.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The mask at head `h`, query `s`, key `t`; 0 without one.
    fn mask_at(&self, h: usize, s: usize, t: usize) -> f32 {
        debug_assert!(h < self.heads && s < self.queries && t < self.keys);
        self.mask.map_or(0.0, |(p, steps)| {
            // SAFETY: the indices are inside the shape of the mask, where it is not repeated.
            unsafe { *p.at(h as isize * steps[0] + s as isize * steps[1] + t as isize * steps[2]) }
        })
    }

    /// The mask at head `h`, query `s` and some keys, where these lie side by side.
    fn mask_row(&self, h: usize, s: usize, keys: Range<usize>) -> Option<&[f32]> {
        let (p, steps) = self.mask.filter(|(_, steps)| steps[2] == 1)?;
        assert!(h < self.heads && s < self.queries && keys.start <= keys.end && keys.end <= self.keys);
        let first = p.at(h as isize * steps[0] + s as isize * steps[1] + keys.start as isize);
        // SAFETY: the indices are inside the shape of the mask, where it is not repeated.
        Some(unsafe { std::slice::from_raw_parts(first.cast_const(), keys.len()) })
    }

    /// Rows the mask has for heads and for queries; what is repeated counts once.
    fn mask_rows(&self) -> (usize, usize) {
        self.mask.map_or((0, 0), |(_, steps)| {
            let count = |step: isize, all: usize| if step == 0 { 1 } else { all };
            (count(steps[0], self.heads), count(steps[1], self.queries))
        })
    }

    /// Ranges of key positions that some query of some head sees.
    fn visible(&self) -> Runs {
        let mut runs = Runs::new();
        if self.mask.is_none() {
            runs.push(0..self.keys);
            return runs;
        }
        let (heads, queries) = self.mask_rows();
        if (heads, queries) == (1, 1)
            && let Some(row) = self.mask_row(0, 0, 0..self.keys)
        {
            return runs_of(row);
        }
        SEEN.with_borrow_mut(|seen| {
            seen.clear();
            seen.resize(self.keys, false);
            // Row by row, as the mask lies in memory.
            for (h, s) in (0..heads).flat_map(|h| (0..queries).map(move |s| (h, s))) {
                if let Some(row) = self.mask_row(h, s, 0..self.keys) {
                    for (seen, mask) in seen.iter_mut().zip(row) {
                        *seen |= *mask != f32::NEG_INFINITY;
                    }
                    continue;
                }
                for (t, seen) in seen.iter_mut().enumerate() {
                    *seen |= self.mask_at(h, s, t) != f32::NEG_INFINITY;
                }
            }
            for (t, _) in seen.iter().enumerate().filter(|(_, seen)| **seen) {
                add(&mut runs, t..t + 1);
            }
        });
        runs
    }
}

/// Adds positions behind all others.
fn add(runs: &mut Runs, positions: Range<usize>) {
    match runs.last_mut() {
        Some(run) if run.end == positions.start => run.end = positions.end,
        _ => runs.push(positions),
    }
}

/// The positions that one row of a mask shows.
fn runs_of(row: &[f32]) -> Runs {
    /// Positions looked at together: mostly all are seen, or none.
    const TOGETHER: usize = 32;
    let seen = |mask: &f32| *mask != f32::NEG_INFINITY;
    let mut runs = Runs::new();
    for (i, part) in row.chunks(TOGETHER).enumerate() {
        let start = i * TOGETHER;
        match part.iter().map(|mask| usize::from(seen(mask))).sum::<usize>() {
            0 => {}
            count if count == part.len() => add(&mut runs, start..start + count),
            _ => {
                for (t, _) in part.iter().enumerate().filter(|(_, mask)| seen(mask)) {
                    add(&mut runs, start + t..start + t + 1);
                }
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use half::f16;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn attention_agrees_with_its_definition(
            kv_heads in 1_usize..4, group in 1_usize..5, queries in 1_usize..40, keys in 1_usize..90,
            size in 1_usize..70, layout in 0_usize..4, masking in 0_usize..4, narrow in any::<bool>(),
            bf16 in any::<bool>(), seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let heads = kv_heads * group;
            let v_size = size / 2 + 1;
            let q: Vec<f32> = (0..heads * queries * size).map(|_| random(&mut seed) * 3.0).collect();
            let k: Vec<f16> = (0..kv_heads * keys * size).map(|_| f16::from_f32(random(&mut seed))).collect();
            let v: Vec<f16> = (0..kv_heads * keys * v_size).map(|_| f16::from_f32(random(&mut seed))).collect();
            let (k_wide, v_wide): (Vec<f32>, Vec<f32>) =
                (k.iter().map(|x| x.to_f32()).collect(), v.iter().map(|x| x.to_f32()).collect());
            let (mh, ms) = [(1, 1), (1, queries), (heads, queries), (1, 1)][masking];
            let mask: Vec<f32> = (0..mh * ms * keys)
                .map(|_| if random(&mut seed) > 0.2 { f32::NEG_INFINITY } else { random(&mut seed) })
                .collect();
            // Keys and values as [T, D], [D, T], or both transposed differently; queries and output likewise.
            let strides = |rows: usize, cols: usize, transposed: bool| {
                if transposed { [(rows * cols) as isize, 1, rows as isize] }
                else { [(rows * cols) as isize, cols as isize, 1] }
            };
            let (q_shape, k_shape, v_shape) = ([heads, queries, size], [kv_heads, keys, size], [kv_heads, keys, v_size]);
            let (y_shape, m_shape) = ([heads, queries, v_size], [mh, ms, keys]);
            let qs = strides(queries, size, layout == 3);
            let ks = strides(keys, size, layout & 1 == 1);
            let vs = strides(keys, v_size, layout & 2 == 2);
            let ys = strides(queries, v_size, layout == 3);
            let mstr = strides(ms, keys, false);
            let operand = |narrow_view, wide_view| if narrow { Operand::F16(narrow_view) } else { Operand::F32(wide_view) };
            let call = Attention {
                q: View::new(&q, 0, &q_shape, &qs).unwrap(),
                k: operand(View::new(&k, 0, &k_shape, &ks).unwrap(), View::new(&k_wide, 0, &k_shape, &ks).unwrap()),
                v: operand(View::new(&v, 0, &v_shape, &vs).unwrap(), View::new(&v_wide, 0, &v_shape, &vs).unwrap()),
                mask: (masking < 3).then(|| View::new(&mask, 0, &m_shape, &mstr).unwrap()),
                scale: 0.3,
                arithmetic: if bf16 { Arithmetic::Bf16 } else { Arithmetic::F32 },
            };
            let mut y = vec![f32::NAN; heads * queries * v_size];
            let pool = Pool::new(2);
            attention(&pool, &call, ViewMut::new(&mut y, 0, &y_shape, &ys).unwrap(), &mut Scratch::new());
            let in_pairs = bf16 && queries > FEW_QUERIES && Arithmetic::Bf16.in_pairs();
            let at = |s: [isize; 3], i: [usize; 3]| (0..3).map(|n| s[n] * i[n] as isize).sum::<isize>() as usize;
            for h in 0..heads {
                for s in 0..queries {
                    let scores: Vec<f64> = (0..keys).map(|t| {
                        let dot: f64 = (0..size)
                            .map(|d| f64::from(q[at(qs, [h, s, d])]) * f64::from(k_wide[at(ks, [h / group, t, d])]))
                            .sum();
                        let mask = if masking < 3 { mask[(h % mh * ms + s % ms) * keys + t] } else { 0.0 };
                        dot * 0.3 + f64::from(mask)
                    }).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    for d in 0..v_size {
                        let total: f64 = (0..keys)
                            .map(|t| (scores[t] - max).exp() * f64::from(v_wide[at(vs, [h / group, t, d])]))
                            .sum();
                        let expected = if max.is_finite() { total / sum } else { 0.0 };
                        let found = f64::from(y[at(ys, [h, s, d])]);
                        // Factors of 8 bits make scores err by hundredths, and weights with them.
                        let bound = if in_pairs { 0.05 } else { 2e-5 };
                        prop_assert!((found - expected).abs() < bound, "[{h}, {s}, {d}] {found} is not {expected}");
                    }
                }
            }
        }
    }
}
