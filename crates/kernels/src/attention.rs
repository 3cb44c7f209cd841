//! Scaled dot-product attention with grouped heads.

use crate::loops::Shared;
use crate::matmul::Operand;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};

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
}

/// `y[h, s] = softmax_t(scale * q[h, s] . k[h, t] + mask[h, s, t]) . v[h, t]`, `y` is `[H, S, Dv]`.
///
/// The softmax subtracts the maximum and works in `f32`. Key positions whose mask is minus infinity are not read; a
/// query position where all are masked gives 0.
///
/// # Panics
/// When the shapes do not fit.
pub fn attention(pool: &Pool, call: &Attention<'_>, mut y: ViewMut<'_, f32>, _scratch: &mut Scratch) {
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
        kv_heads > 0 && heads % kv_heads == 0,
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
    let (sq, sk, sv, sy) = (call.q.strides(), call.k.strides(), call.v.strides(), y.strides());
    let (pq, pk, pv, py) = (
        Shared::of(call.q.ptr()),
        call.k.source(),
        call.v.source(),
        Shared(y.ptr()),
    );
    pool.run_ranges(heads * queries, 1, &|rows| {
        let mut scores = vec![0.0_f32; keys];
        for row in rows {
            let (h, s) = ((row / queries) as isize, (row % queries) as isize);
            let g = h / (heads / kv_heads) as isize;
            for (t, score) in scores.iter_mut().enumerate() {
                let t = t as isize;
                // SAFETY: inside the shapes checked above, as are the accesses below.
                let masked = mask.map_or(0.0, |(p, s3)| unsafe { *p.at(h * s3[0] + s * s3[1] + t * s3[2]) });
                let mut dot = 0.0;
                for d in 0..size as isize {
                    // SAFETY: as above.
                    dot += unsafe {
                        *pq.at(h * sq[0] + s * sq[1] + d * sq[2]) * pk.get(g * sk[0] + t * sk[1] + d * sk[2])
                    };
                }
                *score = if masked == f32::NEG_INFINITY {
                    masked
                } else {
                    dot * call.scale + masked
                };
            }
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for score in &mut scores {
                *score = if max == f32::NEG_INFINITY {
                    0.0
                } else {
                    (*score - max).exp()
                };
                sum += *score;
            }
            for d in 0..v_size as isize {
                let mut total = 0.0;
                for (t, score) in scores.iter().enumerate().filter(|(_, score)| **score != 0.0) {
                    // SAFETY: as above.
                    total += score * unsafe { pv.get(g * sv[0] + t as isize * sv[1] + d * sv[2]) };
                }
                // SAFETY: as above; one thread has this row.
                unsafe {
                    *py.at(h * sy[0] + s * sy[1] + d * sy[2]) = if sum > 0.0 { total / sum } else { 0.0 }
                };
            }
        }
    });
}
