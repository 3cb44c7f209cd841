//! Functions on vectors. Each states its greatest error in units in the last place (ulp), which the tests hold it to.

use super::ops::{GELU_CUBIC, GELU_SIGMOID, GELU_SLOPE, Unary};
use crate::simd::Simd;

/// `c[0] + c[1] * x + ..`
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F, c: [f32; N]) -> S::F {
    let mut sum = s.splat(c[N - 1]);
    let mut n = N - 1;
    while n > 0 {
        n -= 1;
        sum = s.fma(sum, x, s.splat(c[n]));
    }
    sum
}

/// `x` as `n * ln 2 + r` with `|r| <= ln 2 / 2`: gives `n` and `exp(r) - 1`.
#[inline(always)]
fn reduced_exp<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fnma(n, s.splat(0.693_359_4), x);
    let r = s.fnma(n, s.splat(-2.121_944_4e-4), r);
    let p = polynomial(
        s,
        r,
        [0.5, 0.166_665_12, 0.041_666_187, 0.008_369_599, 0.001_395_171_7],
    );
    (n, s.fma(s.mul(p, r), r, r))
}

/// `x * 2^n` for integers `n` of -252 to 254, in two steps so that results below the normal range round once.
#[inline(always)]
fn scale<S: Simd>(s: S, x: S::F, n: S::F) -> S::F {
    let n = s.to_int(n);
    let half = s.shr::<1>(n);
    s.mul(s.mul(x, power(s, half)), power(s, s.int_sub(n, half)))
}

/// `2^n` within the normal range.
#[inline(always)]
fn power<S: Simd>(s: S, n: S::I) -> S::F {
    s.from_bits(s.shl::<23>(s.int_add(n, s.int(127))))
}

/// 2 ulp.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // NaN is the second operand, which survives.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let (n, e) = reduced_exp(s, x);
    scale(s, s.add(e, s.splat(1.0)), n)
}

/// `exp(x) - 1` for `x <= 0`, 3 ulp.
#[inline(always)]
fn exp_m1_below_zero<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-20.0), x);
    let (n, e) = reduced_exp(s, x);
    let power = scale(s, s.splat(1.0), n);
    s.fma(power, e, s.sub(power, s.splat(1.0)))
}

/// 2 ulp.
#[inline(always)]
fn exp2<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.max(s.splat(-151.0), s.min(s.splat(129.0), x));
    let n = s.round(x);
    let r = s.mul(s.sub(x, n), s.splat(std::f32::consts::LN_2));
    let p = polynomial(
        s,
        r,
        [0.5, 0.166_665_12, 0.041_666_187, 0.008_369_599, 0.001_395_171_7],
    );
    scale(s, s.add(s.fma(s.mul(p, r), r, r), s.splat(1.0)), n)
}

/// 2 ulp.
#[inline(always)]
fn log<S: Simd>(s: S, x: S::F) -> S::F {
    // Numbers below the normal range are moved into it.
    let small = s.lt(x, s.splat(f32::MIN_POSITIVE));
    let scaled = s.select(small, s.mul(x, s.splat(8_388_608.0)), x);
    let shift = s.select(small, s.splat(-23.0), s.zero());
    // The mantissa is taken between the square roots of 1/2 and 2.
    let exponent = s.shr::<23>(s.int_sub(s.bits(scaled), s.int(0x3f35_04f3)));
    let mantissa = s.from_bits(s.int_sub(s.bits(scaled), s.shl::<23>(exponent)));
    let e = s.add(s.from_int(exponent), shift);
    let f = s.sub(mantissa, s.splat(1.0));
    let p = polynomial(
        s,
        f,
        [
            0.333_333_1,
            -0.249_999_87,
            0.200_022_27,
            -0.166_692_51,
            0.142_186_58,
            -0.123_843_48,
            0.118_729_76,
            -0.117_898_08,
            0.069_153_68,
        ],
    );
    let square = s.mul(f, f);
    let tail = s.fma(s.mul(p, square), f, s.mul(e, s.splat(-2.121_944_4e-4)));
    let tail = s.fma(square, s.splat(-0.5), tail);
    let value = s.fma(e, s.splat(0.693_359_4), s.add(f, tail));
    let value = s.select(s.eq(x, s.splat(f32::INFINITY)), x, value);
    let value = s.select(s.eq(x, s.zero()), s.splat(f32::NEG_INFINITY), value);
    let value = s.select(s.lt(x, s.zero()), s.splat(f32::NAN), value);
    s.select(s.eq(x, x), value, x)
}

/// 2 ulp.
#[inline(always)]
fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let a = s.abs(x);
    let z = s.mul(x, x);
    let p = polynomial(
        s,
        z,
        [
            -0.333_332_54,
            0.133_306_24,
            -0.053_670_537,
            0.020_412_92,
            -0.005_453_498_6,
        ],
    );
    let near = s.fma(s.mul(p, z), x, x);
    let e = exp(s, s.add(a, a));
    let far = s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(e, s.splat(1.0))));
    s.select(s.lt(a, s.splat(0.65)), near, s.with_sign(far, x))
}

/// 3 ulp.
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.neg(x))))
}

/// 2 ulp.
#[inline(always)]
fn erf<S: Simd>(s: S, x: S::F) -> S::F {
    let z = s.mul(x, x);
    let p = polynomial(
        s,
        z,
        [
            0.128_379_15,
            -0.376_124_95,
            0.112_818_025,
            -0.026_765_566,
            0.004_990_98,
            -5.976_893_6e-4,
        ],
    );
    let near = s.fma(p, x, x);
    let t = s.min(s.splat(4.0), s.abs(x));
    let q = polynomial(
        s,
        t,
        [
            0.128_541_44,
            0.635_673_17,
            0.105_169_51,
            -0.022_575_635,
            0.002_869_134_8,
            -2.744_060_8e-5,
            -4.993_930_3e-5,
            5.296_896e-6,
        ],
    );
    let far = s.sub(s.splat(1.0), exp(s, s.neg(s.fma(q, t, t))));
    s.select(s.lt(t, s.splat(0.93)), near, s.with_sign(far, x))
}

/// Sine (`quarter` 0) or cosine (1), 2 ulp or, near zeros far from the origin, an absolute error of 1e-7.
#[inline(always)]
fn sin_cos<S: Simd>(s: S, x: S::F, quarter: i32) -> S::F {
    // Beyond this, three parts of pi/2 are not enough; infinities and NaN are left to the scalar form too.
    let limit = s.splat(10_000.0);
    let inside = s.lt(s.abs(x), limit);
    let k = s.round(s.mul(x, s.splat(std::f32::consts::FRAC_2_PI)));
    let r = s.fnma(k, s.splat(1.570_312_5), x);
    let r = s.fnma(k, s.splat(4.837_513e-4), r);
    let r = s.fnma(k, s.splat(7.549_79e-8), r);
    let z = s.mul(r, r);
    let sine = s.fma(
        s.mul(
            polynomial(s, z, [-0.166_666_54, 0.008_332_083, -1.950_431_6e-4]),
            z,
        ),
        r,
        r,
    );
    let p = polynomial(s, z, [0.041_666_646, -0.001_388_724_3, 2.442_388_7e-5]);
    let cosine = s.fma(s.mul(p, z), z, s.fma(z, s.splat(-0.5), s.splat(1.0)));
    let q = s.int_add(s.to_int(s.select(inside, k, s.zero())), s.int(quarter));
    let odd = s.eq(s.from_int(s.int_and(q, s.int(1))), s.splat(1.0));
    let value = s.select(odd, cosine, sine);
    let sign = s.shl::<30>(s.int_and(q, s.int(2)));
    let flipped = s.from_bits(s.int_sub(s.bits(value), sign));
    if s.any(s.lt(s.select(inside, s.zero(), s.splat(-1.0)), s.zero())) {
        return s.lanes(x, |x| if quarter == 0 { x.sin() } else { x.cos() });
    }
    flipped
}

/// `ln(1 + exp(x))`, 4 ulp.
#[inline(always)]
fn softplus<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    let u = exp(s, s.neg(s.abs(x)));
    let w = s.add(u, one);
    // The quotient undoes the rounding of `1 + u`.
    let log1p = s.mul(log(s, w), s.div(u, s.sub(w, one)));
    let log1p = s.select(s.eq(w, one), u, log1p);
    s.add(s.max(s.zero(), x), log1p)
}

/// [`Unary::Silu`].
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    s.mul(x, sigmoid(s, x))
}

/// [`Unary::HardSwish`] with its `from`, `alpha` and `beta`.
#[inline(always)]
pub(crate) fn hard_swish<S: Simd>(s: S, x: S::F, [from, alpha, beta]: [f32; 3]) -> S::F {
    let x = s.select(s.lt(x, s.splat(from)), s.zero(), x);
    let gate = s.fma(x, s.splat(alpha), s.splat(beta));
    s.mul(x, s.min(s.splat(1.0), s.max(s.zero(), gate)))
}

/// Replaces `y` by `op` of `x`, `n` numbers each.
///
/// # Safety
/// `x` and `y` are the same place or do not overlap; `n` numbers are readable at `x` and writable at `y`.
#[inline(always)]
pub(crate) unsafe fn map<S: Simd>(s: S, op: Unary, x: *const f32, y: *mut f32, n: usize) {
    macro_rules! each {
        ($v:ident => $value:expr) => {{
            let mut i = 0;
            while i + S::LANES <= n {
                // SAFETY: a whole vector, the caller's.
                let $v = unsafe { s.load(x.add(i)) };
                let value = $value;
                // SAFETY: as above.
                unsafe { s.store(y.add(i), value) };
                i += S::LANES;
            }
            if i < n {
                let mut rest = [0.0_f32; 16];
                // SAFETY: less than a vector is left, and none is longer than sixteen.
                unsafe { x.add(i).copy_to_nonoverlapping(rest.as_mut_ptr(), n - i) };
                // SAFETY: as above.
                let $v = unsafe { s.load(rest.as_ptr()) };
                let value = $value;
                // SAFETY: as above.
                unsafe { s.store(rest.as_mut_ptr(), value) };
                // SAFETY: as above.
                unsafe { rest.as_ptr().copy_to_nonoverlapping(y.add(i), n - i) };
            }
        }};
    }
    let (zero, one) = (s.zero(), s.splat(1.0));
    // A NaN is kept by `min` and `max` when it is their second operand.
    match op {
        Unary::Abs => each!(v => s.abs(v)),
        Unary::Ceil => each!(v => s.ceil(v)),
        Unary::Clip { lo, hi } => each!(v => s.min(s.splat(hi), s.max(s.splat(lo), v))),
        Unary::ClampedRelu { alpha, beta } => {
            each!(v => s.min(s.splat(beta), s.fma(s.splat(alpha), s.min(zero, v), s.max(zero, v))))
        }
        Unary::Cos => each!(v => sin_cos(s, v, 1)),
        Unary::Elu { alpha } => {
            each!(v => s.fma(s.splat(alpha), exp_m1_below_zero(s, s.min(zero, v)), s.max(zero, v)))
        }
        Unary::Erf => each!(v => erf(s, v)),
        Unary::Exp => each!(v => exp(s, v)),
        Unary::Exp2 => each!(v => exp2(s, v)),
        Unary::Floor => each!(v => s.floor(v)),
        Unary::GeluExact => {
            let root = s.splat(std::f32::consts::FRAC_1_SQRT_2);
            each!(v => s.mul(s.mul(v, s.splat(0.5)), s.add(one, erf(s, s.mul(v, root)))))
        }
        Unary::GeluTanh => each!(v => {
            let inner = s.mul(s.fma(s.mul(s.mul(v, v), v), s.splat(GELU_CUBIC), v), s.splat(GELU_SLOPE));
            s.mul(s.mul(v, s.splat(0.5)), s.add(one, tanh(s, inner)))
        }),
        Unary::GeluSigmoid => each!(v => s.mul(v, sigmoid(s, s.mul(v, s.splat(GELU_SIGMOID))))),
        Unary::HardSwish { from, alpha, beta } => each!(v => hard_swish(s, v, [from, alpha, beta])),
        Unary::Identity => each!(v => v),
        Unary::Inverse { eps } => each!(v => s.div(one, s.add(v, s.splat(eps)))),
        Unary::LeakyRelu { alpha } => each!(v => s.fma(s.splat(alpha), s.min(zero, v), s.max(zero, v))),
        Unary::LinearActivation { alpha, beta } => each!(v => s.add(s.mul(v, s.splat(alpha)), s.splat(beta))),
        Unary::Log { eps } => each!(v => log(s, s.add(v, s.splat(eps)))),
        Unary::LogicalNot => each!(v => s.select(s.eq(v, zero), one, zero)),
        Unary::Neg => each!(v => s.neg(v)),
        Unary::Relu => each!(v => s.max(zero, v)),
        Unary::Relu6 => each!(v => s.min(s.splat(6.0), s.max(zero, v))),
        Unary::Round => each!(v => s.round(v)),
        Unary::Rsqrt { eps } => each!(v => s.div(one, s.sqrt(s.add(v, s.splat(eps))))),
        Unary::ScaledTanh { alpha, beta } => {
            each!(v => s.mul(s.splat(alpha), tanh(s, s.mul(v, s.splat(beta)))))
        }
        Unary::Sigmoid => each!(v => sigmoid(s, v)),
        Unary::SigmoidHard { alpha, beta } => {
            each!(v => s.min(one, s.max(zero, s.add(s.mul(v, s.splat(alpha)), s.splat(beta)))))
        }
        Unary::Silu => each!(v => silu(s, v)),
        Unary::Sin => each!(v => sin_cos(s, v, 0)),
        Unary::Softplus => each!(v => softplus(s, v)),
        Unary::Softsign => each!(v => s.div(v, s.add(one, s.abs(v)))),
        Unary::Sqrt => each!(v => s.sqrt(v)),
        Unary::Square => each!(v => s.mul(v, v)),
        Unary::Tanh => each!(v => tanh(s, v)),
        Unary::Threshold { alpha } => each!(v => s.max(s.splat(alpha), v)),
        Unary::ThresholdedRelu { alpha } => each!(v => s.select(s.lt(v, s.splat(alpha)), zero, v)),
        _ => each!(v => s.lanes(v, |x| op.apply(x))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::apply_slice;
    use crate::simd::{Kernel, Scalar};

    struct Portable<'a>(Unary, &'a mut [f32]);

    impl Kernel for Portable<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            // SAFETY: in place.
            unsafe { map(s, self.0, self.1.as_ptr(), self.1.as_mut_ptr(), self.1.len()) };
        }
    }

    /// Function, its value in `f64`, range, and allowed error in ulp plus an absolute part.
    type Row = (Unary, fn(f64) -> f64, (f32, f32), f64, f64);

    #[test]
    fn functions_keep_their_stated_error() {
        let table: [Row; 14] = [
            (Unary::Exp, f64::exp, (-87.0, 88.7), 2.0, 0.0),
            (Unary::Exp, f64::exp, (-104.0, -87.0), 2.0, 1.5e-45),
            (Unary::Exp2, f64::exp2, (-126.0, 127.9), 2.0, 0.0),
            (Unary::Log { eps: 0.0 }, f64::ln, (1e-40, 1e-30), 2.0, 0.0),
            (Unary::Log { eps: 0.0 }, f64::ln, (0.3, 3.0), 2.0, 0.0),
            (Unary::Log { eps: 0.0 }, f64::ln, (1.0, 1e6), 2.0, 0.0),
            (Unary::Tanh, f64::tanh, (-10.0, 10.0), 2.0, 0.0),
            (
                Unary::Sigmoid,
                |x| 1.0 / (1.0 + (-x).exp()),
                (-80.0, 80.0),
                3.0,
                0.0,
            ),
            (Unary::Silu, |x| x / (1.0 + (-x).exp()), (-80.0, 80.0), 4.0, 0.0),
            (Unary::Sin, f64::sin, (-1.5, 1.5), 2.0, 0.0),
            (Unary::Sin, f64::sin, (-9000.0, 20000.0), 2.0, 1e-7),
            (Unary::Cos, f64::cos, (-9000.0, 20000.0), 2.0, 1e-7),
            (
                Unary::Elu { alpha: 1.0 },
                |x| if x > 0.0 { x } else { x.exp_m1() },
                (-20.0, 2.0),
                3.0,
                0.0,
            ),
            (
                Unary::Softplus,
                |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
                (-80.0, 80.0),
                4.0,
                0.0,
            ),
        ];
        let mut failures = Vec::new();
        for (op, exact, (low, high), ulps, absolute) in table {
            let x: Vec<f32> = (0..40_001)
                .map(|i| low + (high - low) * (i as f32 / 40_000.0))
                .collect();
            let (mut y, mut portable) = (x.clone(), x.clone());
            apply_slice(op, &mut y);
            Portable(op, &mut portable).run(Scalar);
            for (name, y) in [("best", y), ("portable", portable)] {
                // Without a fused product the reduced argument keeps less, hence twice the error.
                let ulps = if name == "best" { ulps } else { 2.0 * ulps };
                let worst = x.iter().zip(&y).map(|(x, y)| {
                    let exact = exact(f64::from(*x));
                    let ulp = f64::from((exact as f32).abs().next_up() - (exact as f32).abs());
                    let error =
                        (f64::from(*y) - exact).abs() - absolute * if name == "best" { 1.0 } else { 20.0 };
                    (error / ulp, *x, *y)
                });
                let worst = worst.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
                if !worst.1.is_nan() && (worst.0 > ulps || worst.0.is_nan()) {
                    failures.push(format!("{op:?} {name}: {worst:?}"));
                }
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }

    #[test]
    fn every_function_agrees_with_its_definition_at_any_length_and_at_the_edges() {
        let (alpha, beta, eps) = (0.3, 0.6, 1e-3);
        let ops = [
            Unary::Abs,
            Unary::Ceil,
            Unary::Clip { lo: -1.0, hi: 0.5 },
            Unary::ClampedRelu { alpha, beta: 2.0 },
            Unary::Cos,
            Unary::Elu { alpha },
            Unary::Erf,
            Unary::Exp,
            Unary::Exp2,
            Unary::Floor,
            Unary::GeluExact,
            Unary::GeluTanh,
            Unary::GeluSigmoid,
            Unary::HardSwish {
                from: -3.0,
                alpha: 1.0 / 6.0,
                beta: 0.5,
            },
            Unary::Identity,
            Unary::Inverse { eps },
            Unary::LeakyRelu { alpha },
            Unary::LinearActivation { alpha, beta },
            Unary::Log { eps },
            Unary::LogicalNot,
            Unary::Neg,
            Unary::Relu,
            Unary::Relu6,
            Unary::Round,
            Unary::Rsqrt { eps },
            Unary::ScaledTanh { alpha, beta },
            Unary::Sigmoid,
            Unary::SigmoidHard { alpha, beta },
            Unary::Sign,
            Unary::Silu,
            Unary::Sin,
            Unary::Softplus,
            Unary::Softsign,
            Unary::Sqrt,
            Unary::Square,
            Unary::Tanh,
            Unary::Threshold { alpha },
            Unary::ThresholdedRelu { alpha },
            Unary::Acos,
            Unary::Sinh,
            Unary::Tan,
        ];
        let edges = [
            0.0,
            -0.0,
            0.5,
            -0.5,
            1.5,
            2.5,
            1.0,
            -1.0,
            3.7,
            -3.7,
            0.3,
            88.0,
            -88.0,
            1e4,
            -1e4,
            1e30,
            -1e30,
            1e-30,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            0.92,
            0.94,
            -0.649,
            0.651,
        ];
        let mut failures = Vec::new();
        for op in ops {
            for len in [0, 1, 7, 8, 9, 25] {
                let x = &edges[edges.len() - len..];
                let mut y = x.to_vec();
                apply_slice(op, &mut y);
                for (x, y) in x.iter().zip(&y) {
                    let expected = op.apply(*x);
                    let same = expected == *y || (expected.is_nan() && y.is_nan());
                    if !same && (expected - y).abs() > 2e-6 * expected.abs().max(1e-2) {
                        failures.push(format!("{op:?} of {x}: {y} is not {expected}"));
                    }
                }
            }
        }
        failures.dedup();
        assert!(failures.is_empty(), "{failures:#?}");
    }
}
