use super::few::*;
use super::*;
use crate::matvec::tests::random;
use crate::strided::dense_strides;
use half::{bf16, f16};
use proptest::prelude::*;

fn weights(rows: usize, cols: usize, kind: usize, seed: &mut u64) -> Weights {
    let mut data: Vec<f32> = (0..rows * cols).map(|_| random(seed)).collect();
    let bytes: Vec<u8> = (0..rows * cols)
        .map(|_| (random(seed) * 128.0 + 128.0) as u8)
        .collect();
    if kind >= 6 {
        data.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        data.iter_mut().step_by(977).for_each(|x| *x = 2.0_f32.powi(-20));
        let packed = weights_of(rows, cols, kind - 6, &data, &bytes, seed);
        packed.pack(&Pool::new(1));
        assert_eq!(packed.bf12().is_some(), cols.is_multiple_of(64));
        return packed;
    }
    weights_of(rows, cols, kind, &data, &bytes, seed)
}

fn weights_of(rows: usize, cols: usize, kind: usize, data: &[f32], bytes: &[u8], seed: &mut u64) -> Weights {
    match kind {
        0 => Weights::from_f32(rows, cols, bytemuck::cast_slice(data).to_vec().into()),
        1 => {
            let data: Vec<f16> = data.iter().map(|x| f16::from_f32(*x)).collect();
            Weights::from_f16(rows, cols, bytemuck::cast_slice(&data).to_vec().into())
        }
        2 | 3 => {
            let bits = if kind == 2 { 4 } else { 6 };
            let table: Vec<f32> = (0..rows.div_ceil(8) << bits)
                .map(|_| f16::from_f32(random(seed)).to_f32())
                .collect();
            let indices = bytes[..(rows * cols * bits as usize).div_ceil(8)].to_vec();
            Weights::lut(rows, cols, bits, indices.into(), table, 8, cols)
        }
        4 => Weights::affine(
            rows,
            cols,
            8,
            true,
            bytes.to_vec().into(),
            vec![0.01; rows],
            Some(vec![3.0; rows]),
            1,
            cols,
        ),
        _ => {
            let blocks = rows * cols.div_ceil(32);
            let data = bytes[..(rows * cols).div_ceil(2)].to_vec();
            Weights::affine(
                rows,
                cols,
                4,
                false,
                data.into(),
                vec![0.1; blocks],
                Some(vec![8.0; blocks]),
                1,
                32,
            )
        }
    }
    .unwrap()
}

fn product(x: &[f32], w: &Weights, i: usize, j: usize) -> f32 {
    let mut row = vec![0.0; w.cols()];
    w.row(j, &mut row);
    let sum: f64 = row
        .iter()
        .zip(&x[i * w.cols()..])
        .map(|(w, x)| f64::from(*w) * f64::from(*x))
        .sum();
    sum as f32
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn layers_of_any_size_storage_and_layout_agree_with_the_definition(
        m in 1_usize..40, n in 1_usize..120, k in 1_usize..330, kind in 0_usize..8, seed in any::<u64>(),
        transposed in any::<bool>(), extras in 0_usize..4, threads in 1_usize..4,
    ) {
        let pool = Pool::new(threads);
        let mut seed = seed;
        let k = if kind >= 6 { k.next_multiple_of(64) } else { k };
        let w = weights(n, k, kind, &mut seed);
        let up = weights(n, k, kind, &mut seed);
        let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
        let bias: Vec<f32> = (0..n).map(|_| random(&mut seed)).collect();
        let residual: Vec<f32> = (0..m * n).map(|_| random(&mut seed)).collect();
        let xt: Vec<f32> = (0..m * k).map(|at| x[at % m * k + at / m]).collect();
        let shape = [m, k];
        let (x_data, x_strides) = if transposed { (&xt, [1, m as isize]) } else { (&x, [k as isize, 1]) };
        let view = View::new(x_data, 0, &shape, &x_strides).unwrap();
        let out_shape = [m, n];
        let out_strides = if transposed { [1, m as isize] } else { [n as isize, 1] };
        let mut y = vec![f32::NAN; m * n];
        let mut scratch = Scratch::new();
        let dense = dense_strides(&out_shape);
        let epilogue = Epilogue {
            arithmetic: Arithmetic::F32,
            bias: (extras > 0).then_some(&bias[..]),
            activation: (extras == 2).then_some(Unary::Silu),
            residual: (extras > 1).then(|| View::new(&residual, 0, &out_shape, &dense[..2]).unwrap()),
        };
        let out = ViewMut::new(&mut y, 0, &out_shape, &out_strides).unwrap();
        if extras == 3 {
            gated(&pool, view, (&w, &up), (Unary::Tanh, Arithmetic::F32), out, &mut scratch);
        } else {
            linear(&pool, view, &w, out, &epilogue, &mut scratch);
        }
        for i in 0..m {
            for j in 0..n {
                let sum = product(&x, &w, i, j);
                let other = if extras == 3 { product(&x, &up, i, j) } else { 0.0 };
                let expected = match extras {
                    0 => sum,
                    1 => sum + bias[j],
                    2 => Unary::Silu.apply(sum + bias[j]) + residual[i * n + j],
                    _ => sum.tanh() * other,
                };
                let found = y[(i as isize * out_strides[0] + j as isize * out_strides[1]) as usize];
                // Fixed point with few tokens: 2^-15 a product, k of them, at the size of the other factor.
                let bound = 1e-4 * (1.0 + (k as f32).sqrt()) * (1.0 + sum.abs().sqrt()) * (1.0 + other.abs());
                prop_assert!((found - expected).abs() < bound, "[{i}, {j}] {found} is not {expected}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn far_streams_agree_with_the_definition_for_any_number_of_rows(
        m in 1_usize..=FEW_TOKENS, n in 1_usize..1500, more in 1_usize..40, k in 1_usize..70, wide in any::<bool>(),
        kind in 0_usize..4, extras in 0_usize..4, threads in 1_usize..10, seed in any::<u64>(),
    ) {
        let pool = Pool::new(threads);
        let mut seed = seed;
        // Rows so long that a chunk has few of them, or many short ones.
        let (n, k) = if wide { (n / 10 + 1, k * 16) } else { (n, k) };
        let (kind, k) = if kind >= 2 { (kind + 4, k.next_multiple_of(64)) } else { (kind, k) };
        let all = [weights(n, k, kind, &mut seed), weights(more, k, kind, &mut seed)];
        let up = weights(n, k, kind, &mut seed);
        let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
        let (bias, residual): (Vec<f32>, Vec<f32>) =
            ((0..n).map(|_| random(&mut seed)).collect(), (0..m * n).map(|_| random(&mut seed)).collect());
        let (x_shape, shape, strides) = ([m, k], [m, n], [n as isize, 1]);
        let x_strides = [k as isize, 1];
        let view = View::new(&x, 0, &x_shape, &x_strides).unwrap();
        let epilogue = Epilogue {
            bias: (extras > 0).then_some(&bias[..]),
            activation: (extras > 1).then_some(Unary::Tanh),
            residual: (extras == 2).then(|| View::new(&residual, 0, &shape, &strides).unwrap()),
            arithmetic: Arithmetic::F32,
        };
        let (mut y, mut other) = (vec![f32::NAN; m * n], vec![f32::NAN; m * more]);
        let (other_shape, other_strides) = ([m, more], [more as isize, 1]);
        let mut out = ViewMut::new(&mut y, 0, &shape, &strides).unwrap();
        let mut other_out = ViewMut::new(&mut other, 0, &other_shape, &other_strides).unwrap();
        let mut layer = Layer::new(&all[0], &view, &mut out, &epilogue);
        layer.up = (extras == 3).then_some(Read::of(&up));
        let layers = [layer, Layer::new(&all[1], &view, &mut other_out, &Epilogue::default())];
        let lanes = Lanes::spread(&pool, layers.iter().map(|layer| (layer.w, layer.up)));
        few_in(Some(lanes), &pool, view, &layers, &mut vec![f32::NAN; few_space(m, k)]);
        let bound = |sum: f32| 1e-4 * (1.0 + (k as f32).sqrt()) * (1.0 + sum.abs());
        for i in 0..m {
            for j in 0..n {
                let sum = product(&x, &all[0], i, j) + if extras > 0 { bias[j] } else { 0.0 };
                let expected = match extras {
                    0 | 1 => sum,
                    2 => sum.tanh() + residual[i * n + j],
                    _ => sum.tanh() * product(&x, &up, i, j),
                };
                prop_assert!((y[i * n + j] - expected).abs() < bound(expected), "[{i}, {j}]");
            }
            for j in 0..more {
                let expected = product(&x, &all[1], i, j);
                prop_assert!((other[i * more + j] - expected).abs() < bound(expected), "other [{i}, {j}]");
            }
        }
    }
}

#[test]
fn a_gate_may_be_stored_otherwise_than_what_it_is_multiplied_with() {
    let (pool, mut seed) = (Pool::new(2), 5);
    let (n, k) = (300, 320);
    let x: Vec<f32> = (0..k).map(|_| random(&mut seed)).collect();
    for kinds in [(0, 1), (1, 0), (1, 2), (4, 1), (6, 0), (1, 7), (6, 7)] {
        let (gate, up) = (
            weights(n, k, kinds.0, &mut seed),
            weights(n, k, kinds.1, &mut seed),
        );
        let mut y = vec![f32::NAN; n];
        let (x_shape, shape) = ([1, k], [1, n]);
        let view = View::new(&x, 0, &x_shape, &[320, 1]).unwrap();
        let out = ViewMut::new(&mut y, 0, &shape, &[300, 1]).unwrap();
        expect(&pool, std::iter::once((&gate, Some(&up))));
        let how = (Unary::Tanh, Arithmetic::F32);
        gated(&pool, view, (&gate, &up), how, out, &mut Scratch::new());
        for (j, found) in y.iter().enumerate() {
            let (sum, other) = (product(&x, &gate, 0, j), product(&x, &up, 0, j));
            let bound = 2e-3 * (1.0 + other.abs());
            assert!((found - sum.tanh() * other).abs() < bound, "{kinds:?} [{j}]");
        }
    }
}

/// What tells how far `found` is from `exact`: the length of the difference over that of `exact`.
fn distance(found: &[f32], exact: &[f32]) -> f32 {
    let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    length(&mut found.iter().zip(exact).map(|(x, y)| x - y)) / length(&mut exact.iter().copied())
}

#[test]
fn rounded_weights_are_used_and_come_close() {
    let (pool, mut seed) = (Pool::new(2), 9);
    for (m, n, k, kind, transposed) in [
        (64, 100, 577, 0, false),
        (33, 49, 1100, 1, true),
        (300, 12, 96, 1, false),
        (70, 1, 576, 6, true),
        (64, 61, 640, 7, false),
    ] {
        let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
        let (w, up) = (weights(n, k, kind, &mut seed), weights(n, k, kind, &mut seed));
        let (x_shape, shape) = ([m, k], [m, n]);
        let steps = |width: usize| {
            if transposed {
                [1, m as isize]
            } else {
                [width as isize, 1]
            }
        };
        let (x_strides, strides) = (steps(k), steps(n));
        let run = |arithmetic| {
            let mut y = vec![f32::NAN; m * n];
            let x = View::new(&x, 0, &x_shape, &x_strides).unwrap();
            let out = ViewMut::new(&mut y, 0, &shape, &strides).unwrap();
            gated(
                &pool,
                x,
                (&w, &up),
                (Unary::Identity, arithmetic),
                out,
                &mut Scratch::new(),
            );
            y
        };
        let exact = run(Arithmetic::F32);
        assert!(w.int8().is_none(), "rounded only where it is wanted");
        w.round(&pool);
        up.round(&pool);
        let fast = run(Arithmetic::Int8);
        assert_eq!(
            run(Arithmetic::F32),
            exact,
            "exact products do not read what is rounded"
        );
        let error = distance(&fast, &exact);
        let rounded = Arithmetic::Int8.in_bytes();
        let most = if rounded { 0.02 } else { 0.005 };
        assert!(error < most, "[{m}, {n}, {k}], kind {kind}: {error}");
        assert!(
            !rounded || error > 5e-3,
            "[{m}, {n}, {k}], kind {kind}: not rounded"
        );
    }
}

#[test]
fn weights_are_rounded_at_the_first_fast_product_of_many_tokens_and_their_data_is_let_go() {
    let (pool, mut seed) = (Pool::new(2), 4);
    let (m, n, k) = (32, 96, 192);
    let w = weights(n, k, 1, &mut seed);
    let freed = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = freed.clone();
    w.pack_when_used(move || {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
    let run = |m: usize, arithmetic| {
        let (x_shape, shape, mut y) = ([m, k], [m, n], vec![f32::NAN; m * n]);
        let x = View::new(&x, 0, &x_shape, &[192, 1]).unwrap();
        let out = ViewMut::new(&mut y, 0, &shape, &[96, 1]).unwrap();
        let epilogue = Epilogue {
            arithmetic,
            ..Epilogue::default()
        };
        linear(&pool, x, &w, out, &epilogue, &mut Scratch::new());
    };
    run(m, Arithmetic::F32);
    run(1, Arithmetic::Int8);
    assert!(w.int8().is_none());
    run(m, Arithmetic::Int8);
    run(m, Arithmetic::Int8);
    assert_eq!(w.int8().is_some(), Arithmetic::Int8.in_bytes());
    assert_eq!(
        freed.load(std::sync::atomic::Ordering::Relaxed),
        usize::from(w.int8().is_some())
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn an_mlp_gives_what_its_products_give(
        m in 1_usize..70, n in 1_usize..300, k in 1_usize..200, l in 1_usize..120, kind in 0_usize..8, seed in any::<u64>(),
        fast in 0_usize..3, threads in 1_usize..4, with_residual in any::<bool>(),
    ) {
        let (pool, mut seed) = (Pool::new(threads), seed);
        let [n, k] = [n, k].map(|size| if kind >= 6 { size.next_multiple_of(64) } else { size });
        let w = [(n, k), (n, k), (l, n)].map(|(rows, cols)| weights(rows, cols, kind, &mut seed));
        let numbers = |count: usize, seed: &mut u64| -> Vec<f32> { (0..count).map(|_| random(seed)).collect() };
        let (x, bias, residual) = (numbers(m * k, &mut seed), numbers(l, &mut seed), numbers(m * l, &mut seed));
        let arithmetic = [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8][fast];
        if fast > 1 {
            w.iter().for_each(|w| w.round(&pool));
        }
        let (x_shape, inner, shape) = ([m, k], [m, n], [m, l]);
        let (x_strides, inner_strides, strides) = ([k as isize, 1], [n as isize, 1], [l as isize, 1]);
        let view = View::new(&x, 0, &x_shape, &x_strides).unwrap();
        let epilogue = Epilogue {
            bias: Some(&bias),
            activation: None,
            residual: with_residual.then(|| View::new(&residual, 0, &shape, &strides).unwrap()),
            arithmetic,
        };
        let (mut hidden, mut apart, mut together) =
            (vec![f32::NAN; m * n], vec![f32::NAN; m * l], vec![f32::NAN; m * l]);
        let out = ViewMut::new(&mut hidden, 0, &inner, &inner_strides).unwrap();
        gated(&pool, view, (&w[0], &w[1]), (Unary::Silu, arithmetic), out, &mut Scratch::new());
        let view_of_hidden = View::new(&hidden, 0, &inner, &inner_strides).unwrap();
        let out = ViewMut::new(&mut apart, 0, &shape, &strides).unwrap();
        linear(&pool, view_of_hidden, &w[2], out, &epilogue, &mut Scratch::new());
        let out = ViewMut::new(&mut together, 0, &shape, &strides).unwrap();
        let call = Mlp { gate: &w[0], up: &w[1], activation: Unary::Silu, down: &w[2] };
        let called = std::cell::Cell::new(0);
        let next = || called.set(called.get() + 1);
        mlp(&pool, view, &call, (out, &epilogue), &next, &mut Scratch::new());
        prop_assert_eq!(apart, together);
        prop_assert_eq!(called.get(), 1);
    }
}

#[test]
fn layers_together_give_what_they_give_alone() {
    let pool = Pool::new(3);
    let mut seed = 3;
    for m in [1, 3, 9] {
        let x: Vec<f32> = (0..m * 64).map(|_| random(&mut seed)).collect();
        let x_shape = [m, 64];
        let view = View::new(&x, 0, &x_shape, &[64, 1]).unwrap();
        let all = [
            weights(24, 64, 2, &mut seed),
            weights(100, 64, 3, &mut seed),
            weights(7, 64, 0, &mut seed),
        ];
        let bias = vec![0.25; 100];
        let mut together: Vec<Vec<f32>> = all.iter().map(|w| vec![f32::NAN; m * w.rows()]).collect();
        let shapes: Vec<[usize; 2]> = all.iter().map(|w| [m, w.rows()]).collect();
        let strides: Vec<[isize; 2]> = all.iter().map(|w| [w.rows() as isize, 1]).collect();
        let mut outputs: Vec<_> = (together.iter_mut().zip(&shapes).zip(&strides))
            .map(|((y, shape), strides)| ViewMut::new(y, 0, shape, strides).unwrap())
            .collect();
        let layers = [(&all[0], None), (&all[1], Some(&bias[..])), (&all[2], None)];
        linear_many(
            &pool,
            view,
            &layers,
            Arithmetic::F32,
            &mut outputs,
            &mut Scratch::new(),
        );
        for (i, (w, bias)) in layers.into_iter().enumerate() {
            let mut alone = vec![f32::NAN; m * w.rows()];
            let out = ViewMut::new(&mut alone, 0, &shapes[i], &strides[i]).unwrap();
            let epilogue = Epilogue {
                bias,
                ..Epilogue::default()
            };
            linear(&pool, view, w, out, &epilogue, &mut Scratch::new());
            assert_eq!(alone, together[i], "{m} tokens, layer {i}");
        }
    }
}
