use super::*;
use crate::gemm::Arithmetic;
use crate::matvec::tests::random;
use crate::strided::dense_strides;
use crate::weights::Weights;
use crate::{Conv, conv};
use proptest::prelude::*;

/// A case: batch, height, width, channels, outputs, window.
#[derive(Debug, Clone, Copy)]
struct Case {
    n: usize,
    size: [usize; 2],
    channels: usize,
    outputs: usize,
    params: ConvParams,
}

/// The largest difference to the channels-first convolution, relative to the largest result or, where an activation has cut
/// that, to the size that sums of this length have; none when the window does not fit. `extras` adds bias, activations and a residual.
fn difference(case: Case, extras: usize, exact: bool, seed: &mut u64) -> Option<(f32, &'static str)> {
    let Case {
        n,
        size: [h, w],
        channels,
        outputs,
        params,
    } = case;
    let (oh, ow) = (params.output_len(1, h)?, params.output_len(2, w)?);
    let cells = params.kernel[1] * params.kernel[2];
    let numbers = |len: usize, seed: &mut u64| (0..len).map(|_| random(seed)).collect::<Vec<f32>>();
    let x = numbers(n * h * w * channels, seed);
    let weights = numbers(outputs * channels / params.groups * cells, seed);
    let bytes = bytemuck::cast_slice(&weights).to_vec().into();
    let weights = Weights::from_f32(outputs, channels / params.groups * cells, bytes).ok()?;
    let (bias, residual) = (numbers(outputs, seed), numbers(n * oh * ow * outputs, seed));
    let bias = (extras > 0).then_some(bias.as_slice());
    let swish = Unary::HardSwish {
        from: -3.0,
        alpha: 1.0 / 6.0,
        beta: 0.5,
    };
    let (silu, clip) = (Unary::Silu, Unary::Relu6);
    let activation = [
        None,
        Some(clip),
        Some(swish),
        Some(Unary::Tanh),
        Some(silu),
        Some(swish),
    ][extras];
    let last = [None, None, Some(Unary::Relu), Some(Unary::Sigmoid), None, None][extras];
    let turned = |[n, h, w, c]: [usize; 4]| -> ([usize; 4], [isize; 4]) {
        let step = |i: usize| i as isize;
        ([n, c, h, w], [step(h * w * c), 1, step(w * c), step(c)])
    };
    // The same memory, channels first by its strides.
    let (xs, xd) = turned([n, h, w, channels]);
    let (ys, yd) = turned([n, oh, ow, outputs]);
    let (pool, mut scratch) = (Pool::new(2), Scratch::new());
    let mut expected = vec![0.0; n * oh * ow * outputs];
    conv(
        &pool,
        View::new(&x, 0, &xs, &xd)?,
        &Conv {
            weights: &weights,
            bias,
            activation,
            residual: matches!(extras, 2 | 3).then_some(View::new(&residual, 0, &ys, &yd)?),
            params,
        },
        ViewMut::new(&mut expected, 0, &ys, &yd)?,
        &mut scratch,
    );
    if let Some(op) = last {
        crate::elementwise::apply_slice(op, &mut expected);
    }
    let packed = PackedConv::new(
        &weights,
        &params,
        [oh, ow],
        if exact {
            Arithmetic::InOrder
        } else {
            Arithmetic::F32
        },
    );
    let mut y = if extras == 3 {
        residual.clone()
    } else {
        vec![f32::NAN; expected.len()]
    };
    let beside = match extras {
        2 => Beside::In(&residual),
        3 => Beside::Result,
        _ => Beside::None,
    };
    let (xd, yd) = ([n, h, w, channels], [n, oh, ow, outputs]);
    conv_last(
        &pool,
        View::new(&x, 0, &xd, &dense_strides(&xd)[..4])?,
        &ConvLast {
            packed: &packed,
            bias,
            activation,
            residual: beside,
            last,
        },
        ViewMut::new(&mut y, 0, &yd, &dense_strides(&yd)[..4])?,
        &mut scratch,
    );
    let usual = ((channels / params.groups * cells) as f32).sqrt();
    let most = expected.iter().fold(usual, |m, v| m.max(v.abs()));
    let error = expected
        .iter()
        .zip(&y)
        .map(|(a, b)| {
            let error = (a - b).abs() / most;
            if error.is_nan() { f32::INFINITY } else { error }
        })
        .fold(0.0, f32::max);
    Some((error, packed.method()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn every_window_agrees_with_the_convolution_of_channels_first(
        n in 1_usize..3, size in (1_usize..20, 1_usize..20), channels in 1_usize..40, outputs in 1_usize..70,
        kernel in (1_usize..5, 1_usize..5), stride in (1_usize..4, 1_usize..4), dilation in (1_usize..3, 1_usize..3),
        pad in (0_usize..3, 0_usize..3, 0_usize..3, 0_usize..3), depthwise in any::<bool>(), extras in 0_usize..6,
        seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let params = ConvParams {
            kernel: [1, kernel.0, kernel.1],
            stride: [1, stride.0, stride.1],
            dilation: [1, dilation.0, dilation.1],
            pad_before: [0, pad.0, pad.1],
            pad_after: [0, pad.2, pad.3],
            groups: if depthwise { channels } else { 1 },
        };
        let outputs = if depthwise { channels } else { outputs };
        let case = Case { n, size: [size.0, size.1], channels, outputs, params };
        if let Some((error, method)) = difference(case, extras, true, &mut seed) {
            prop_assert!(error < 1e-5, "{case:?} {method}: {error}");
        }
    }
}

#[test]
fn transformed_windows_agree_within_the_rounding_of_the_transform() {
    let mut seed = 11;
    // size, channels, outputs, padding before and after, the way it is computed
    let rows = [
        ([24, 30], 32, 48, [1, 1], "winograd 4x4"),
        ([27, 26], 64, 32, [0, 0], "winograd 4x4"),
        ([29, 24], 32, 32, [2, 1], "winograd 4x4"),
        ([14, 14], 64, 64, [1, 1], "winograd 2x2"),
        ([11, 13], 48, 80, [0, 1], "winograd 2x2"),
        ([14, 14], 40, 64, [1, 1], "direct"),
        ([7, 7], 64, 64, [1, 1], "direct"),
    ];
    for (size, channels, outputs, pad, expected) in rows {
        for extras in 0..6 {
            let params = ConvParams {
                kernel: [1, 3, 3],
                pad_before: [0, pad[0], pad[0]],
                pad_after: [0, pad[1], pad[1]],
                ..ConvParams::default()
            };
            let case = Case {
                n: 2,
                size,
                channels,
                outputs,
                params,
            };
            let (error, method) = difference(case, extras, false, &mut seed).unwrap();
            assert_eq!(method, expected, "{case:?}");
            // F(4x4) multiplies by up to 8 and 1/24 on its way.
            let allowed = if method == "winograd 4x4" { 1e-5 } else { 3e-6 };
            assert!(error < allowed, "{case:?} {method} {extras}: {error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn a_chain_gives_what_its_convolutions_give(
        n in 1_usize..3, size in (1_usize..40, 1_usize..20), channels in (5_usize..40, 1_usize..70, 1_usize..40),
        kernel in 1_usize..6, stride in 1_usize..4, pad in 0_usize..3, ends in 0_usize..4, residual in any::<bool>(),
        bf16 in any::<bool>(), threads in 1_usize..4, seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let (expand, project) = (ends & 1 > 0, ends & 2 > 0);
        let (first, middle) = (if expand { channels.0 } else { channels.1.max(5) }, channels.1.max(5));
        let last = if project { channels.2 } else { middle };
        let arithmetic = if bf16 { Arithmetic::Bf16 } else { Arithmetic::F32 };
        let window = ConvParams {
            kernel: [1, kernel, kernel],
            stride: [1, stride, stride],
            pad_before: [0, pad, pad],
            pad_after: [0, pad.min(1), pad],
            groups: middle,
            ..ConvParams::default()
        };
        let (Some(oh), Some(ow)) = (window.output_len(1, size.0), window.output_len(2, size.1)) else { return Ok(()) };
        let numbers = |len: usize, seed: &mut u64| (0..len).map(|_| random(seed)).collect::<Vec<f32>>();
        let pack = |outputs: usize, cols: usize, params: &ConvParams, pixels: [usize; 2], seed: &mut u64| {
            let bytes = bytemuck::cast_slice(&numbers(outputs * cols, seed)).to_vec().into();
            PackedConv::new(&Weights::from_f32(outputs, cols, bytes).unwrap(), params, pixels, arithmetic)
        };
        let packed = [
            pack(middle, first, &ConvParams::default(), [size.0, size.1], &mut seed),
            pack(middle, kernel * kernel, &window, [oh, ow], &mut seed),
            pack(last, middle, &ConvParams::default(), [oh, ow], &mut seed),
        ];
        let biases = [middle, middle, last].map(|len| numbers(len, &mut seed));
        let x = numbers(n * size.0 * size.1 * first, &mut seed);
        let beside = numbers(n * oh * ow * last, &mut seed);
        let layer = |i: usize, activation: Option<Unary>| ConvLast {
            packed: &packed[i],
            bias: Some(&biases[i]),
            activation,
            residual: if i == 2 && residual { Beside::In(&beside) } else { Beside::None },
            last: None,
        };
        let chain = ConvChain {
            expand: expand.then(|| layer(0, Some(Unary::Relu6))),
            depthwise: layer(1, Some(Unary::Tanh)),
            project: project.then(|| layer(2, None)),
        };
        prop_assert!(has_conv_chain(&chain));
        let pool = Pool::new(threads);
        let mut scratch = Scratch::new();
        let (mut wanted, mut dims) = (x.clone(), [n, size.0, size.1, first]);
        let layers = [(chain.expand, [size.0, size.1], middle), (Some(chain.depthwise), [oh, ow], middle), (chain.project, [oh, ow], last)];
        for (call, [h, w], outputs) in layers {
            let Some(call) = call else { continue };
            let next = [n, h, w, outputs];
            let mut y = vec![f32::NAN; next.iter().product()];
            let (xd, yd) = (dense_strides(&dims), dense_strides(&next));
            let from = View::new(&wanted, 0, &dims, &xd[..4]).unwrap();
            conv_last(&pool, from, &call, ViewMut::new(&mut y, 0, &next, &yd[..4]).unwrap(), &mut scratch);
            (wanted, dims) = (y, next);
        }
        let (xs, ys) = ([n, size.0, size.1, first], [n, oh, ow, last]);
        let (xd, yd) = (dense_strides(&xs), dense_strides(&ys));
        let mut y = vec![f32::NAN; ys.iter().product()];
        let from = View::new(&x, 0, &xs, &xd[..4]).unwrap();
        conv_chain(&pool, from, &chain, ViewMut::new(&mut y, 0, &ys, &yd[..4]).unwrap(), &mut scratch);
        // The same sums in the same order, but for activations, which take what is left of a line one by one.
        let most = wanted.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
        let bound = if bf16 { 1e-2 } else { 1e-6 };
        for (i, (a, b)) in y.iter().zip(&wanted).enumerate() {
            prop_assert!((a - b).abs() <= bound * most, "{i}: {a} is not {b}");
        }
    }
}
