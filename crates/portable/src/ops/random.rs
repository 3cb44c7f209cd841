//! Random numbers. Source: coremltools 9.0, `mil/ops/defs/iOS15/random.py`.
//!
//! With a seed of 0 and more every run gives the same numbers; they are not those of Apple's generator. Without a seed each
//! run gives others.

use crate::error::{OpError, OpResult};
use crate::layout::{Shape, checked_elements};
use crate::lower::OpCx;
use crate::op::{Args, Op, OpSpec, Support, opt, req};
use candle_coreml_mil::DType;
use std::hash::{BuildHasher, Hasher, RandomState};

/// SplitMix64: a counter through a mixing function. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014.
struct Numbers(u64);

impl Numbers {
    fn new(seed: Option<u64>) -> Numbers {
        Numbers(seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to but not 1, all 24 bits an `f32` can tell apart there.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Two independent ones of the standard normal distribution, by Box and Muller.
    fn normal(&mut self) -> [f32; 2] {
        let radius = (-2.0 * f64::from(1.0 - self.unit()).ln()).sqrt();
        let (sin, cos) = (f64::from(self.unit()) * std::f64::consts::TAU).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    }
}

/// What is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Draw {
    Normal { mean: f32, deviation: f32 },
    Uniform { low: f32, high: f32 },
    Bernoulli { probability: f32 },
}

/// Independent numbers of one distribution.
#[derive(Debug)]
pub struct Random {
    draw: Draw,
    seed: Option<u64>,
}

impl Random {
    fn fill(&self, y: &mut [f32]) {
        let mut numbers = Numbers::new(self.seed);
        match self.draw {
            Draw::Normal { mean, deviation } => {
                for pair in y.chunks_mut(2) {
                    for (y, n) in pair.iter_mut().zip(numbers.normal()) {
                        *y = mean + deviation * n;
                    }
                }
            }
            Draw::Uniform { low, high } => {
                // Rounding may reach `high`, which is outside.
                y.fill_with(|| (low + (high - low) * numbers.unit()).min(high.next_down().max(low)));
            }
            Draw::Bernoulli { probability } => {
                y.fill_with(|| f32::from(numbers.unit() < probability));
            }
        }
    }
}

impl Op for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn foldable(&self) -> bool {
        false
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        self.fill(args.result_f32(0)?);
        Ok(())
    }
}

/// Indices drawn with the weights of the last dimension, each with replacement: `[.., n] -> [.., count]`.
#[derive(Debug)]
pub struct Categorical {
    logits: bool,
    count: usize,
    seed: Option<u64>,
}

impl Categorical {
    fn fill(&self, x: &[f32], classes: usize, y: &mut [f32]) {
        let mut numbers = Numbers::new(self.seed);
        let mut sums = vec![0.0f64; classes];
        for (x, y) in x
            .chunks_exact(classes.max(1))
            .zip(y.chunks_exact_mut(self.count.max(1)))
        {
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for (sum, &x) in sums.iter_mut().zip(x) {
                total += f64::from(if self.logits { (x - max).exp() } else { x.max(0.0) });
                *sum = total;
            }
            y.fill_with(|| {
                let at = f64::from(numbers.unit()) * total;
                let index = sums.partition_point(|&sum| sum <= at);
                index.min(classes.saturating_sub(1)) as f32
            });
        }
    }
}

impl Op for Categorical {
    fn name(&self) -> &'static str {
        "random_categorical"
    }

    fn foldable(&self) -> bool {
        false
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let classes = args.f32(0)?.shape().last().copied().unwrap_or(1);
        self.fill(args.f32s(0)?, classes, args.result_f32(0)?);
        Ok(())
    }
}

fn seed(cx: &mut OpCx<'_, '_>) -> OpResult<Option<u64>> {
    Ok(cx.int("seed")?.and_then(|seed| u64::try_from(seed).ok()))
}

fn lower_draw(cx: &mut OpCx<'_, '_>, draw: Draw, typed: &[&str]) -> OpResult<()> {
    let dims = cx.ints("shape")?.ok_or("parameter \"shape\" is missing")?;
    let shape = dims
        .iter()
        .map(|&d| usize::try_from(d))
        .collect::<Result<Shape, _>>();
    let shape = shape.map_err(|_| OpError::new(format!("shape {dims:?} has a negative dimension")))?;
    checked_elements(&shape).ok_or_else(|| format!("shape {dims:?} is too large"))?;
    let mut dtype = DType::Fp32;
    for param in typed {
        if let Some(v) = cx.optional(param)? {
            dtype = cx.dtype(v);
        }
    }
    let seed = seed(cx)?;
    let y = cx.emit(Random { draw, seed }, &[], dtype, &shape)?;
    cx.result(y)
}

fn lower_normal(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (mean, deviation) = (
        cx.float("mean")?.unwrap_or(0.0),
        cx.float("stddev")?.unwrap_or(1.0),
    );
    lower_draw(cx, Draw::Normal { mean, deviation }, &["mean", "stddev"])
}

fn lower_uniform(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (low, high) = (cx.float("low")?.unwrap_or(0.0), cx.float("high")?.unwrap_or(1.0));
    lower_draw(cx, Draw::Uniform { low, high }, &["low", "high"])
}

fn lower_bernoulli(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let probability = cx.float("prob")?.unwrap_or(0.5);
    lower_draw(cx, Draw::Bernoulli { probability }, &["prob"])
}

fn lower_categorical(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let mut shape = cx.shape(x);
    let logits = match cx.text("mode")?.as_deref() {
        None | Some("logits") => true,
        Some("probs") => false,
        Some(other) => return Err(format!("mode {other:?} is not logits or probs").into()),
    };
    let count = usize::try_from(cx.int("size")?.unwrap_or(1)).map_err(|_| "size must be 0 or more")?;
    match shape.last_mut() {
        Some(last) if *last > 0 => *last = count,
        _ => return Err("x needs a last dimension of 1 and more".into()),
    }
    let seed = seed(cx)?;
    let op = Categorical { logits, count, seed };
    let y = cx.emit(op, &[x], cx.dtype(x), &shape)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "random",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "random_bernoulli",
        &[req("shape"), opt("prob"), opt("seed")],
        lower_bernoulli
    ),
    row!(
        "random_categorical",
        &[req("x"), opt("mode"), opt("size"), opt("seed")],
        lower_categorical
    ),
    row!(
        "random_normal",
        &[req("shape"), opt("mean"), opt("stddev"), opt("seed")],
        lower_normal
    ),
    row!(
        "random_uniform",
        &[req("shape"), opt("low"), opt("high"), opt("seed")],
        lower_uniform
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(draw: Draw, seed: Option<u64>) -> Vec<f32> {
        let mut y = vec![0.0; 20_001];
        Random { draw, seed }.fill(&mut y);
        y
    }

    #[test]
    fn distributions_have_their_mean_spread_and_range() {
        // (what is drawn, mean, standard deviation, least, end)
        let rows = [
            (
                Draw::Normal {
                    mean: 3.0,
                    deviation: 2.0,
                },
                3.0,
                2.0,
                f32::NEG_INFINITY,
                f32::INFINITY,
            ),
            (
                Draw::Uniform { low: -1.0, high: 5.0 },
                2.0,
                6.0 / 12f32.sqrt(),
                -1.0,
                5.0,
            ),
            (
                Draw::Bernoulli { probability: 0.25 },
                0.25,
                0.1875f32.sqrt(),
                0.0,
                1.5,
            ),
        ];
        for (draw, mean, spread, least, end) in rows {
            let y = drawn(draw, Some(7));
            let n = y.len() as f32;
            let m = y.iter().sum::<f32>() / n;
            let s = (y.iter().map(|v| (v - m) * (v - m)).sum::<f32>() / n).sqrt();
            assert!(
                (m - mean).abs() < 0.06 && (s - spread).abs() < 0.06,
                "{draw:?}: {m} {s}"
            );
            assert!(y.iter().all(|v| (least..end).contains(v)), "{draw:?}");
        }
    }

    #[test]
    fn a_seed_repeats_and_no_seed_does_not() {
        let draw = Draw::Uniform { low: 0.0, high: 1.0 };
        assert_eq!(drawn(draw, Some(3)), drawn(draw, Some(3)));
        assert_ne!(drawn(draw, Some(3)), drawn(draw, Some(4)));
        assert_ne!(drawn(draw, None), drawn(draw, None));
    }

    #[test]
    fn classes_come_as_often_as_their_weights_say() {
        for (logits, x) in [
            (false, [1.0, 0.0, 3.0]),
            (true, [0.0, f32::NEG_INFINITY, 3f32.ln()]),
        ] {
            let op = Categorical {
                logits,
                count: 10_000,
                seed: Some(1),
            };
            let mut y = vec![0.0; 10_000];
            op.fill(&x, 3, &mut y);
            let share = |c: f32| y.iter().filter(|&&v| v == c).count();
            assert!(
                share(1.0) == 0 && share(0.0).abs_diff(2500) < 150,
                "{logits} {}",
                share(0.0)
            );
        }
    }
}
