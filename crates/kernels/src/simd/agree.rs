//! Kernels under every instruction set that this processor has give what they give under the portable one.
//!
//! Sizes are odd, slices begin anywhere. One thread runs a kernel, since the choice of instructions is the thread's.

use super::{Isa, forced, has_pairs, isa};
use crate::attention::{Attention, attention};
use crate::conv::{Conv, ConvLast, ConvParams, PackedConv, conv, conv_last};
use crate::elementwise::{Binary, Unary, binary, unary};
use crate::gemm::Arithmetic;
use crate::linear::{Epilogue, gated, linear};
use crate::matmul::Operand;
use crate::matvec::tests::random;
use crate::norm::{LayerNorm, layer_norm, rms_norm, softmax};
use crate::pool::Pool;
use crate::pooling::{Pooling, pool_last};
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut, dense_strides};
use crate::weights::Weights;
use half::{bf16, f16};
use proptest::prelude::*;

/// What this processor has besides the portable set.
pub(crate) fn sets() -> Vec<Isa> {
    match isa() {
        Isa::Avx512 => vec![Isa::Avx2, Isa::Avx512],
        Isa::Portable => vec![],
        best => vec![best],
    }
}

/// Compares `kernel` under every set with the portable one: `bound` times the largest result, or 1 where that is less.
fn same(
    what: &str,
    bound: f32,
    kernel: impl Fn(&Pool, &mut Scratch) -> Vec<f32>,
) -> Result<(), TestCaseError> {
    let run = |set: Isa| forced(set, || kernel(&Pool::new(1), &mut Scratch::new()));
    let wanted = run(Isa::Portable);
    let most = wanted.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    for set in sets() {
        let found = run(set);
        prop_assert_eq!(found.len(), wanted.len());
        for (i, (a, b)) in found.iter().zip(&wanted).enumerate() {
            prop_assert!(
                (a - b).abs() <= bound * most,
                "{} with {:?}: {} at {} is not {}",
                what,
                set,
                a,
                i,
                b
            );
        }
    }
    Ok(())
}

/// Compares `kernel`, which multiplies pairs of bf16, by matrix units with itself by vectors: only the order of sums differs. `bound`
/// is times the largest result, or 1 where that is less.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn same_in_units(
    what: &str,
    bound: f32,
    kernel: impl Fn(&Pool, &mut Scratch) -> Vec<f32>,
) -> Result<(), TestCaseError> {
    if !has_pairs() || crate::tiles::unit().is_some() {
        // Without pairs there is nothing to compare; with units, vectors are not used.
        return Ok(());
    }
    let wanted = kernel(&Pool::new(1), &mut Scratch::new());
    let (found, products) = crate::tiles::emulator::with(|| kernel(&Pool::new(1), &mut Scratch::new()));
    prop_assert!(
        products.is_some_and(|count| count > 0),
        "{}: units are there and not used",
        what
    );
    let most = wanted.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    prop_assert_eq!(found.len(), wanted.len());
    for (i, (a, b)) in found.iter().zip(&wanted).enumerate() {
        prop_assert!(
            (a - b).abs() <= bound * most,
            "{}: {} at {} is not {}",
            what,
            a,
            i,
            b
        );
    }
    Ok(())
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn same_in_units(_: &str, _: f32, _: impl Fn(&Pool, &mut Scratch) -> Vec<f32>) -> Result<(), TestCaseError> {
    Ok(())
}

/// `len` numbers that begin `offset` numbers behind an allocation.
struct Numbers(Vec<f32>, usize);

impl Numbers {
    fn new(len: usize, offset: usize, seed: &mut u64) -> Numbers {
        Numbers((0..offset + len).map(|_| random(seed)).collect(), offset)
    }

    fn all(&self) -> &[f32] {
        &self.0[self.1..]
    }

    fn view<'a>(&'a self, shape: &'a [usize], strides: &'a [isize]) -> View<'a, f32> {
        View::new(self.all(), 0, shape, &strides[..shape.len()]).unwrap()
    }
}

fn weights(kind: usize, rows: usize, cols: usize, offset: usize, mut seed: u64) -> Weights {
    let seed = &mut seed;
    let bytes = |count: usize, seed: &mut u64| -> bytes::Bytes {
        let all: Vec<u8> = (0..count + offset)
            .map(|_| (random(seed) * 128.0 + 128.0) as u8)
            .collect();
        bytes::Bytes::from(all).slice(offset..)
    };
    let floats: Vec<f32> = (0..rows * cols).map(|_| random(seed)).collect();
    let table = |bits: u32, seed: &mut u64| -> Vec<f32> {
        (0..rows.div_ceil(4) << bits)
            .map(|_| f16::from_f32(random(seed)).to_f32())
            .collect()
    };
    let matrix = match kind {
        0 => Weights::from_f32(rows, cols, bytemuck::cast_slice(&floats).to_vec().into()),
        1 => {
            let halves: Vec<f16> = floats.into_iter().map(f16::from_f32).collect();
            Weights::from_f16(rows, cols, bytemuck::cast_slice(&halves).to_vec().into())
        }
        2 | 3 => {
            let bits = [4, 6][kind - 2];
            let indices = bytes((rows * cols * bits as usize).div_ceil(8), seed);
            Weights::lut(rows, cols, bits, indices, table(bits, seed), 4, cols)
        }
        4 => Weights::affine(
            rows,
            cols,
            8,
            true,
            bytes(rows * cols, seed),
            vec![0.01; rows],
            Some(vec![3.0; rows]),
            1,
            cols,
        ),
        6 => {
            let halves: Vec<f16> = floats
                .into_iter()
                .map(|x| f16::from_f32(bf16::from_f32(x).to_f32()))
                .collect();
            let weights =
                Weights::from_f16(rows, cols, bytemuck::cast_slice(&halves).to_vec().into()).unwrap();
            weights.pack(&Pool::new(1));
            assert!(weights.bf12().is_some());
            return weights;
        }
        _ => {
            let scale = vec![0.1; rows * cols.div_ceil(32)];
            let data = bytes((rows * cols).div_ceil(2), seed);
            Weights::affine(rows, cols, 4, false, data, scale, None, 1, 32)
        }
    };
    matrix.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn layers(
        m in 1_usize..24, n in 1_usize..70, k in 1_usize..600, kind in 0_usize..7, offset in 0_usize..5,
        double in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let k = if kind == 6 { k.next_multiple_of(64) } else { k };
        let x = Numbers::new(m * k, offset, &mut seed);
        let bias = Numbers::new(n, offset, &mut seed);
        // Sums of `k` in another order; few tokens meet compressed weights in fixed point.
        let fixed = (2..6).contains(&kind) && m <= 4;
        let bound = if fixed { 2e-4 * (k as f32).sqrt() } else { 2e-6 * (k as f32).sqrt() };
        same("a layer", bound, |pool, scratch| {
            let (xs, ys) = ([m, k], [m, n]);
            let (xd, yd) = (dense_strides(&xs), dense_strides(&ys));
            let mut y = vec![f32::NAN; m * n + offset];
            let out = ViewMut::new(&mut y[offset..], 0, &ys, &yd[..2]).unwrap();
            let w = weights(kind, n, k, offset, seed);
            if double {
                let up = weights(kind, n, k, offset, seed ^ 1);
                gated(pool, x.view(&xs, &xd), (&w, &up), (Unary::Tanh, Arithmetic::F32), out, scratch);
            } else {
                let epilogue = Epilogue { bias: Some(bias.all()), activation: Some(Unary::Silu), ..Epilogue::default() };
                linear(pool, x.view(&xs, &xd), &w, out, &epilogue, scratch);
            }
            y.split_off(offset)
        })?;
    }

    #[test]
    fn layers_in_bf16(
        m in 5_usize..70, n in 1_usize..70, k in 1_usize..1200, kind in 0_usize..7, offset in 0_usize..5,
        turned in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let k = if kind == 6 { k.next_multiple_of(64) } else { k };
        let x = Numbers::new(m * k, offset, &mut seed);
        let bias = Numbers::new(n, offset, &mut seed);
        // The portable set has no pairs of bf16. Factors have 8 bits.
        let kernel = |pool: &Pool, scratch: &mut Scratch| {
            let (xs, ys) = ([m, k], [m, n]);
            let xd = if turned { [1, m as isize] } else { [k as isize, 1] };
            let yd = dense_strides(&ys);
            let mut y = vec![f32::NAN; m * n];
            let out = ViewMut::new(&mut y, 0, &ys, &yd[..2]).unwrap();
            let w = weights(kind, n, k, offset, seed);
            let epilogue = Epilogue { bias: Some(bias.all()), arithmetic: Arithmetic::Bf16, ..Epilogue::default() };
            linear(pool, x.view(&xs, &xd), &w, out, &epilogue, scratch);
            y
        };
        same("a layer in bf16", 0.03, kernel)?;
        same_in_units("a layer in bf16", 1e-5, kernel)?;
    }

    #[test]
    fn windows_in_bf16(
        size in (1_usize..24, 1_usize..40), channels in 5_usize..70, outputs in 1_usize..70, kernel in 1_usize..4,
        stride in 1_usize..3, apart in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let channels = if apart { channels % 4 + 1 } else { channels };
        let pad = kernel / 2;
        let params = ConvParams {
            kernel: [1, kernel, kernel],
            stride: [1, stride, stride],
            pad_before: [0, pad, pad],
            pad_after: [0, pad, pad],
            ..ConvParams::default()
        };
        let (Some(oh), Some(ow)) = (params.output_len(1, size.0), params.output_len(2, size.1)) else { return Ok(()) };
        let (xs, ys) = ([2, size.0, size.1, channels], [2, oh, ow, outputs]);
        let plane = size.0 * size.1;
        let xd = if apart {
            [channels * plane, size.1, 1, plane].map(|step| step as isize)
        } else {
            [channels * plane, channels * size.1, channels, 1].map(|step| step as isize)
        };
        let yd = dense_strides(&ys);
        let x = Numbers::new(xs.iter().product(), 3, &mut seed);
        let bias = Numbers::new(outputs, 1, &mut seed);
        let w = weights(0, outputs, channels * kernel * kernel, 0, seed);
        let kernel = |pool: &Pool, scratch: &mut Scratch| {
            let packed = PackedConv::new(&w, &params, [oh, ow], Arithmetic::Bf16);
            assert!(!has_pairs() || apart || packed.method() != "direct", "pairs are there and not used");
            let mut y = vec![f32::NAN; ys.iter().product()];
            let out = ViewMut::new(&mut y, 0, &ys, &yd[..4]).unwrap();
            let call = ConvLast { packed: &packed, bias: Some(bias.all()), activation: Some(Unary::Relu), residual: Default::default(), last: None };
            conv_last(pool, x.view(&xs, &xd), &call, out, scratch);
            y
        };
        same("a window in bf16", 0.03, kernel)?;
        // Pictures whose channels lie apart may go by numbers.
        if !apart {
            same_in_units("a window in bf16", 1e-5, kernel)?;
        }
    }

    #[test]
    fn attentions(
        group in 1_usize..4, kv in 1_usize..4, queries in 1_usize..20, keys in 1_usize..90, size in 1_usize..70,
        offset in 0_usize..5, seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let heads = group * kv;
        let (qs, ks, ms) = ([heads, queries, size], [kv, keys, size], [1, queries, keys]);
        let (qd, kd, md) = (dense_strides(&qs), dense_strides(&ks), dense_strides(&ms));
        let q = Numbers::new(heads * queries * size, offset, &mut seed);
        let k = Numbers::new(kv * keys * size, offset, &mut seed);
        let v = Numbers::new(kv * keys * size, 1, &mut seed);
        let mut mask = Numbers::new(queries * keys, offset, &mut seed);
        for (i, value) in mask.0.iter_mut().enumerate() {
            if i % 3 == 1 {
                *value = f32::NEG_INFINITY;
            }
        }
        let kernel = |pool: &Pool, scratch: &mut Scratch, arithmetic: Arithmetic| {
            let call = Attention {
                q: q.view(&qs, &qd),
                k: Operand::F32(k.view(&ks, &kd)),
                v: Operand::F32(v.view(&ks, &kd)),
                mask: Some(mask.view(&ms, &md)),
                scale: 0.3,
                arithmetic,
            };
            let mut y = vec![f32::NAN; heads * queries * size];
            attention(pool, &call, ViewMut::new(&mut y, 0, &qs, &qd[..3]).unwrap(), scratch);
            y
        };
        same("attention", 2e-5, |pool, scratch| kernel(pool, scratch, Arithmetic::F32))?;
        let in_pairs = |pool: &Pool, scratch: &mut Scratch| kernel(pool, scratch, Arithmetic::Bf16);
        // Factors have 8 bits, scores of many numbers err by more, and weigh values by their exponentials.
        same("attention in bf16", 0.05, in_pairs)?;
        if queries > 4 {
            // Sums in another order are sometimes rounded to the neighbouring weight of 8 bits.
            same_in_units("attention in bf16", 2e-3, in_pairs)?;
        }
    }

    #[test]
    fn rows(rows in 1_usize..9, n in 1_usize..300, offset in 0_usize..5, kind in 0_usize..3, seed in any::<u64>()) {
        let mut seed = seed;
        let (shape, x) = ([rows, n], Numbers::new(rows * n, offset, &mut seed));
        let strides = dense_strides(&shape);
        let w = Numbers::new(n, offset, &mut seed);
        same("a row", 2e-5, |pool, _| {
            let mut y = vec![f32::NAN; rows * n + offset];
            let out = ViewMut::new(&mut y[offset..], 0, &shape, &strides[..2]).unwrap();
            match kind {
                0 => rms_norm(pool, x.view(&shape, &strides), Some(w.all()), 1e-5, out),
                1 => softmax(pool, x.view(&shape, &strides), out),
                _ => {
                    let norm = LayerNorm { axes: 1, gamma: Some(w.all()), beta: Some(w.all()), eps: 1e-3 };
                    layer_norm(pool, x.view(&shape, &strides), norm, out);
                }
            }
            y.split_off(offset)
        })?;
    }

    #[test]
    fn elements(n in 1_usize..200, offset in 0_usize..5, which in 0_usize..20, seed in any::<u64>()) {
        let mut seed = seed;
        let (shape, strides) = ([n], [1]);
        let (a, b) = (Numbers::new(n, offset, &mut seed), Numbers::new(n, 1, &mut seed));
        const UNARY: [Unary; 14] = [
            Unary::Abs, Unary::Exp, Unary::Erf, Unary::GeluExact, Unary::GeluTanh, Unary::GeluSigmoid, Unary::Silu,
            Unary::Sigmoid, Unary::Tanh, Unary::Relu6, Unary::Cos, Unary::Sin, Unary::Floor, Unary::Exp2,
        ];
        const BINARY: [Binary; 6] = [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min];
        same("an element", 2e-6, |pool, _| {
            let mut y = vec![f32::NAN; n + offset];
            let out = ViewMut::new(&mut y[offset..], 0, &shape, &strides).unwrap();
            match UNARY.get(which) {
                Some(op) => unary(pool, *op, a.view(&shape, &strides), out),
                None => binary(pool, BINARY[which - UNARY.len()], a.view(&shape, &strides), b.view(&shape, &strides), out),
            }
            y.split_off(offset)
        })?;
    }

    #[test]
    fn windows(
        size in (1_usize..24, 1_usize..24), channels in 1_usize..40, outputs in 1_usize..40, kernel in 1_usize..4,
        stride in 1_usize..3, depthwise in any::<bool>(), pooled in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut seed = seed;
        let (outputs, groups) = if depthwise { (channels, channels) } else { (outputs, 1) };
        let pad = kernel / 2;
        let params = ConvParams {
            kernel: [1, kernel, kernel],
            stride: [1, stride, stride],
            pad_before: [0, pad, pad],
            pad_after: [0, pad, pad],
            dilation: [1; 3],
            groups: if pooled { 1 } else { groups },
        };
        let (Some(oh), Some(ow)) = (params.output_len(1, size.0), params.output_len(2, size.1)) else { return Ok(()) };
        let xs = [1, size.0, size.1, channels];
        let ys = [1, oh, ow, if pooled { channels } else { outputs }];
        let (xd, yd) = (dense_strides(&xs), dense_strides(&ys));
        let x = Numbers::new(xs.iter().product(), 3, &mut seed);
        let depth = channels / groups * kernel * kernel;
        // Winograd's transforms add what the window does not have.
        same("a window", 2e-5 * (depth as f32).sqrt(), |pool, scratch| {
            let mut y = vec![f32::NAN; ys.iter().product()];
            if pooled {
                let out = ViewMut::new(&mut y, 0, &ys, &yd[..4]).unwrap();
                pool_last(pool, Pooling::Max, x.view(&xs, &xd), &params, out);
                return y;
            }
            let w = weights(0, outputs, depth, 0, seed);
            if crate::has_conv_last(&params, channels, outputs) {
                let packed = PackedConv::new(&w, &params, [oh, ow], Arithmetic::F32);
                let call = ConvLast { packed: &packed, bias: None, activation: None, residual: Default::default(), last: None };
                conv_last(pool, x.view(&xs, &xd), &call, ViewMut::new(&mut y, 0, &ys, &yd[..4]).unwrap(), scratch);
            } else {
                let (xf, yf) = ([1, channels, size.0, size.1], [1, outputs, oh, ow]);
                let (xfd, yfd) = (dense_strides(&xf), dense_strides(&yf));
                let call = Conv { weights: &w, bias: None, activation: None, residual: None, params };
                let out = ViewMut::new(&mut y, 0, &yf, &yfd[..4]).unwrap();
                conv(pool, x.view(&xf, &xfd), &call, out, scratch);
            }
            y
        })?;
    }
}
