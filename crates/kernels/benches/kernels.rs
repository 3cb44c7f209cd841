//! Speed of the kernels on the shapes of small language and vision models.
//!
//! `cargo bench -p candle-coreml-kernels -- matvec`

use candle_coreml_kernels::Arithmetic;
use candle_coreml_kernels::attention::{Attention, attention};
use candle_coreml_kernels::elementwise::{Unary, unary};
use candle_coreml_kernels::linear::{Epilogue, gated, linear, linear_many};
use candle_coreml_kernels::matmul::Operand;
use candle_coreml_kernels::norm::{rms_norm, softmax};
use candle_coreml_kernels::pool::Pool;
use candle_coreml_kernels::scratch::Scratch;
use candle_coreml_kernels::strided::{View, ViewMut, dense_strides};
use candle_coreml_kernels::weights::Weights;
use divan::Bencher;
use divan::counter::ItemsCount;
use half::f16;

fn main() {
    divan::main();
}

/// How a matrix is stored.
#[derive(Debug, Clone, Copy)]
enum Kind {
    F32,
    F16,
    Lut4,
    Lut6,
    Int8,
    Int4,
}

use Kind::{F16, F32, Int4, Int8, Lut4, Lut6};

fn bytes(count: usize) -> Vec<u8> {
    let mut state = 1_u64;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        })
        .collect()
}

fn numbers(count: usize) -> Vec<f32> {
    bytes(count)
        .into_iter()
        .map(|byte| f32::from(byte) / 128.0 - 1.0)
        .collect()
}

fn weights(kind: Kind, rows: usize, cols: usize) -> Weights {
    let table = |bits: u32| numbers(rows.div_ceil(8) << bits);
    match kind {
        F32 => Weights::from_f32(
            rows,
            cols,
            bytemuck::cast_slice(&numbers(rows * cols)).to_vec().into(),
        ),
        F16 => {
            let data: Vec<f16> = numbers(rows * cols).into_iter().map(f16::from_f32).collect();
            Weights::from_f16(rows, cols, bytemuck::cast_slice(&data).to_vec().into())
        }
        Lut4 => Weights::lut(rows, cols, 4, bytes(rows * cols / 2).into(), table(4), 8, cols),
        Lut6 => Weights::lut(
            rows,
            cols,
            6,
            bytes(rows * cols * 3 / 4).into(),
            table(6),
            8,
            cols,
        ),
        Int8 => Weights::affine(
            rows,
            cols,
            8,
            true,
            bytes(rows * cols).into(),
            numbers(rows),
            None,
            1,
            cols,
        ),
        Int4 => {
            let scale = numbers(rows * cols / 32);
            Weights::affine(
                rows,
                cols,
                4,
                true,
                bytes(rows * cols / 2).into(),
                scale,
                None,
                1,
                32,
            )
        }
    }
    .expect("a matrix that fits")
}

/// A dense layer call with its buffers.
struct Layer {
    w: Vec<Weights>,
    x: Vec<f32>,
    y: Vec<f32>,
    shapes: ([usize; 2], [usize; 2]),
    scratch: Scratch,
}

impl Layer {
    fn new(kind: Kind, m: usize, (rows, cols): (usize, usize)) -> Layer {
        // As many copies as leave the caches cold, as they are in a model.
        let copies = (64_000_000 / (rows * cols)).clamp(1, 64);
        let w = (0..copies).map(|_| weights(kind, rows, cols)).collect();
        let shapes = ([m, cols], [m, rows]);
        Layer {
            w,
            x: numbers(m * cols),
            y: vec![0.0; m * rows],
            shapes,
            scratch: Scratch::new(),
        }
    }

    fn run(&mut self, pool: &Pool, copy: usize, arithmetic: Arithmetic) {
        let (xs, ys) = ([self.shapes.0[1] as isize, 1], [self.shapes.1[1] as isize, 1]);
        let x = View::new(&self.x, 0, &self.shapes.0, &xs).expect("dense");
        let y = ViewMut::new(&mut self.y, 0, &self.shapes.1, &ys).expect("dense");
        let w = &self.w[copy % self.w.len()];
        let epilogue = Epilogue {
            arithmetic,
            ..Epilogue::default()
        };
        linear(pool, x, w, y, &epilogue, &mut self.scratch);
    }
}

const SHAPES: [(usize, usize); 6] = [
    (576, 576),
    (192, 576),
    (1536, 576),
    (576, 1536),
    (6144, 576),
    (256, 256),
];
const KINDS: [Kind; 6] = [F32, F16, Lut4, Lut6, Int8, Int4];

fn layer_bench(
    bencher: Bencher<'_, '_>,
    kind: Kind,
    m: usize,
    shape: (usize, usize),
    arithmetic: Arithmetic,
) {
    let pool = Pool::shared();
    let mut layer = Layer::new(kind, m, shape);
    if arithmetic == Arithmetic::Int8 {
        layer.w.iter().for_each(|w| w.pack_when_used(|| {}));
        // Rounded before time is taken.
        for copy in 0..layer.w.len() {
            layer.run(&pool, copy, arithmetic);
        }
    }
    let mut copy = 0;
    // Counted in multiply-adds.
    bencher
        .counter(ItemsCount::new(m * shape.0 * shape.1))
        .bench_local(|| {
            copy += 1;
            layer.run(&pool, copy, arithmetic);
        });
}

#[divan::bench(args = SHAPES, consts = [0, 1, 2, 3, 4, 5])]
fn matvec<const KIND: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    layer_bench(bencher, KINDS[KIND], 1, shape, Arithmetic::F32);
}

#[divan::bench(args = SHAPES, consts = [0, 1, 2, 3, 4, 5])]
fn gemm64<const KIND: usize>(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    layer_bench(bencher, KINDS[KIND], 64, shape, Arithmetic::F32);
}

/// In blocks of 8-bit integers where the processor multiplies them.
#[divan::bench(args = SHAPES)]
fn gemm64_in_bytes(bencher: Bencher<'_, '_>, shape: (usize, usize)) {
    layer_bench(bencher, F16, 64, shape, Arithmetic::Int8);
}

/// One layer of SmolLM2-135M.
struct Block {
    qkv: [Weights; 3],
    out: Weights,
    gate: Weights,
    up: Weights,
    down: Weights,
}

/// Every linear layer of SmolLM2-135M (30 blocks and the head) for `m` tokens.
fn model(bencher: Bencher<'_, '_>, body: Kind, head: Kind, m: usize) {
    let pool = Pool::shared();
    let block = || Block {
        qkv: [(576, 576), (192, 576), (192, 576)].map(|(rows, cols)| weights(body, rows, cols)),
        out: weights(body, 576, 576),
        gate: weights(body, 1536, 576),
        up: weights(body, 1536, 576),
        down: weights(body, 576, 1536),
    };
    let blocks: Vec<Block> = (0..30).map(|_| block()).collect();
    let head: Vec<Weights> = (0..8).map(|_| weights(head, 6144, 576)).collect();
    let x = numbers(m * 1536);
    let (mut a, mut b, mut c) = (vec![0.0; m * 1536], vec![0.0; m * 192], vec![0.0; m * 192]);
    let mut logits = vec![0.0; m * 6144];
    let mut scratch = Scratch::new();
    let shape = |n: usize| ([m, n], [n as isize, 1]);
    let (small, middle, large, huge) = (shape(192), shape(576), shape(1536), shape(6144));
    bencher.bench_local(|| {
        let x576 = View::new(&x, 0, &middle.0, &middle.1).expect("dense");
        let x1536 = View::new(&x, 0, &large.0, &large.1).expect("dense");
        for block in &blocks {
            let mut outputs = [
                ViewMut::new(&mut a, 0, &middle.0, &middle.1).expect("dense"),
                ViewMut::new(&mut b, 0, &small.0, &small.1).expect("dense"),
                ViewMut::new(&mut c, 0, &small.0, &small.1).expect("dense"),
            ];
            let [q, k, v] = &block.qkv;
            linear_many(
                &pool,
                x576,
                &[(q, None), (k, None), (v, None)],
                Arithmetic::F32,
                &mut outputs,
                &mut scratch,
            );
            let y = ViewMut::new(&mut a, 0, &middle.0, &middle.1).expect("dense");
            linear(&pool, x576, &block.out, y, &Epilogue::default(), &mut scratch);
            let y = ViewMut::new(&mut a, 0, &large.0, &large.1).expect("dense");
            gated(
                &pool,
                x576,
                (&block.gate, &block.up),
                (Unary::Silu, Arithmetic::F32),
                y,
                &mut scratch,
            );
            let y = ViewMut::new(&mut a, 0, &middle.0, &middle.1).expect("dense");
            linear(&pool, x1536, &block.down, y, &Epilogue::default(), &mut scratch);
        }
        for head in &head {
            let y = ViewMut::new(&mut logits, 0, &huge.0, &huge.1).expect("dense");
            linear(&pool, x576, head, y, &Epilogue::default(), &mut scratch);
        }
    });
}

#[divan::bench(args = [(Lut4, Lut6), (Lut6, Lut6), (F16, F16), (Int8, Int8), (Int4, Int4)])]
fn decode_one_token(bencher: Bencher<'_, '_>, (body, head): (Kind, Kind)) {
    model(bencher, body, head, 1);
}

#[divan::bench(args = [(Lut4, Lut6), (F16, F16)])]
fn prefill_64_tokens(bencher: Bencher<'_, '_>, (body, head): (Kind, Kind)) {
    model(bencher, body, head, 64);
}

#[divan::bench(args = [(1, 64), (1, 512), (64, 64), (64, 512)])]
fn attention_9_heads(bencher: Bencher<'_, '_>, (s, t): (usize, usize)) {
    let pool = Pool::shared();
    let (q, mut y) = (numbers(9 * s * 64), vec![0.0; 9 * s * 64]);
    let cache: Vec<f16> = numbers(3 * t * 64).into_iter().map(f16::from_f32).collect();
    let mask = vec![0.0; s * t];
    let (q_shape, kv_shape, m_shape) = ([9, s, 64], [3, t, 64], [1, s, t]);
    let (qs, ks, ms) = (
        dense_strides(&q_shape),
        dense_strides(&kv_shape),
        dense_strides(&m_shape),
    );
    let mut scratch = Scratch::new();
    bencher.bench_local(|| {
        let call = Attention {
            q: View::new(&q, 0, &q_shape, &qs[..3]).expect("dense"),
            k: Operand::F16(View::new(&cache, 0, &kv_shape, &ks[..3]).expect("dense")),
            v: Operand::F16(View::new(&cache, 0, &kv_shape, &ks[..3]).expect("dense")),
            mask: View::new(&mask, 0, &m_shape, &ms[..3]),
            scale: 0.125,
            arithmetic: Arithmetic::F32,
        };
        let y = ViewMut::new(&mut y, 0, &q_shape, &qs[..3]).expect("dense");
        attention(&pool, &call, y, &mut scratch);
    });
}

#[divan::bench(args = [Unary::Exp, Unary::Sigmoid, Unary::Silu, Unary::Tanh, Unary::GeluExact, Unary::Log { eps: 0.0 }, Unary::Sin])]
fn elementwise_64k(bencher: Bencher<'_, '_>, op: Unary) {
    let pool = Pool::shared();
    let (x, mut y) = (numbers(65536), vec![0.0; 65536]);
    bencher.counter(ItemsCount::new(65536_usize)).bench_local(|| {
        let x = View::new(&x, 0, &[65536], &[1]).expect("dense");
        unary(
            &pool,
            op,
            x,
            ViewMut::new(&mut y, 0, &[65536], &[1]).expect("dense"),
        );
    });
}

#[divan::bench(args = [(1536, 128), (1, 49152), (9, 512)])]
fn softmax_rows(bencher: Bencher<'_, '_>, (rows, n): (usize, usize)) {
    let pool = Pool::shared();
    let (x, mut y) = (numbers(rows * n), vec![0.0; rows * n]);
    let (shape, strides) = ([rows, n], [n as isize, 1]);
    bencher.counter(ItemsCount::new(rows * n)).bench_local(|| {
        let x = View::new(&x, 0, &shape, &strides).expect("dense");
        softmax(
            &pool,
            x,
            ViewMut::new(&mut y, 0, &shape, &strides).expect("dense"),
        );
    });
}

#[divan::bench(args = [(1, 576), (64, 576)])]
fn rms_norm_rows(bencher: Bencher<'_, '_>, (rows, n): (usize, usize)) {
    let pool = Pool::shared();
    let (x, mut y, w) = (numbers(rows * n), vec![0.0; rows * n], numbers(n));
    let (shape, strides) = ([rows, n], [n as isize, 1]);
    bencher.counter(ItemsCount::new(rows * n)).bench_local(|| {
        let x = View::new(&x, 0, &shape, &strides).expect("dense");
        rms_norm(
            &pool,
            x,
            Some(&w),
            1e-5,
            ViewMut::new(&mut y, 0, &shape, &strides).expect("dense"),
        );
    });
}
