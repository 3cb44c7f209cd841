//! Programs with wrong numbers in them: an error with the node's name, never a panic.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_mil::{self as mil, Dim, Source};
use candle_coreml_portable::{Array, Data, Model, Options};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Valid programs to spoil: between them most attributes that carry shapes, axes, sizes or indices.
const PROGRAMS: &[&str] = &[
    "func main<ios17>(tensor<fp32, [1, 4, 6, 6]> x) {
        tensor<fp32, [1, 2, 3, 3]> a = conv(x = x, weight = tensor<fp32, [2, 2, 2, 2]>([[[[1, 2], [3, 4]], [[1, 2], [3, 4]]], [[[1, 2], [3, 4]], [[1, 2], [3, 4]]]]),
            strides = tensor<int32, [2]>([2, 2]), pad_type = string(\"custom\"), pad = tensor<int32, [4]>([0, 0, 0, 0]), dilations = tensor<int32, [2]>([1, 1]), groups = int32(2));
        tensor<fp32, [1, 9, 2]> b = reshape(shape = tensor<int32, [3]>([1, 9, 2]), x = a);
        tensor<fp32, [2, 1, 9]> c = transpose(perm = tensor<int32, [3]>([2, 0, 1]), x = b);
        tensor<fp32, [2, 1, 1]> d = reduce_sum(axes = tensor<int32, [1]>([2]), keep_dims = bool(true), x = c);
        tensor<fp32, [2, 1, 3]> e = slice_by_index(begin = tensor<int32, [3]>([0, 0, 2]), end = tensor<int32, [3]>([2, 1, 8]), stride = tensor<int32, [3]>([1, 1, 2]), x = c);
        tensor<fp32, [2, 1, 3]> f = mul(x = d, y = e);
    } -> (f);",
    "func main<ios17>(tensor<fp32, [3, 4]> x, tensor<int32, [2]> i) {
        tensor<fp32, [2, 4]> a = gather(axis = int32(0), batch_dims = int32(0), indices = i, validate_indices = bool(false), x = x);
        tensor<fp32, [4, 4]> b = tile(reps = tensor<int32, [2]>([2, 1]), x = a);
        tensor<fp32, [4, 7]> c = pad(pad = tensor<int32, [2]>([1, 2]), mode = string(\"reflect\"), x = b);
        tensor<fp32, [4, 3]> d, tensor<fp32, [4, 4]> e = split(axis = int32(1), split_sizes = tensor<int32, [2]>([3, 4]), x = c);
        tensor<fp32, [4, 7]> f = concat(axis = int32(1), interleave = bool(false), values = (d, e));
        tensor<fp32, [4, 7]> g = softmax(axis = int32(1), x = f);
        tensor<fp32, [4, 7]> h = layer_norm(axes = tensor<int32, [1]>([1]), epsilon = fp32(0x1p-10), x = g);
        tensor<fp32, [1, 4, 7]> k = expand_dims(axes = tensor<int32, [1]>([0]), x = h);
        tensor<int32, [1, 4]> m = reduce_argmax(axis = int32(2), keep_dims = bool(false), x = k);
    } -> (m);",
    "func main<ios17>(tensor<fp32, [1, 1, 2, 2]> x) {
        tensor<fp32, [1, 2, 5, 4]> a = conv_transpose(x = x, weight = tensor<fp32, [1, 2, 3, 2]>([[[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]]]]),
            strides = tensor<int32, [2]>([2, 2]), pad_type = string(\"custom\"), pad = tensor<int32, [4]>([0, 0, 0, 0]), dilations = tensor<int32, [2]>([1, 1]), groups = int32(1));
        tensor<fp32, [1, 2, 5, 4]> b = relu(x = a);
    } -> (b);",
    "func main<ios18>(tensor<fp16, [1, 2]> x, tensor<int32, [1]> at, state<tensor<fp16, [4, 2]>> cache) {
        tensor<fp16, [2, 2]> w = constexpr_lut_to_dense(indices = tensor<uint2, [2, 2]>([[0, 1], [2, 3]]), lut = tensor<fp16, [1, 1, 4, 1]>([[[[0x1p+0], [0x1p+1], [0x1p-1], [0x1p+2]]]]));
        tensor<fp16, [1, 2]> y = linear(x = x, weight = w);
        tensor<int32, [1]> next = add(x = at, y = int32(1));
        tensor<int32, [2]> begin = concat(axis = int32(0), interleave = bool(false), values = (at, tensor<int32, [1]>([0])));
        tensor<int32, [2]> end = concat(axis = int32(0), interleave = bool(false), values = (next, tensor<int32, [1]>([2])));
        tensor<fp16, [4, 2]> old = read_state(input = cache);
        tensor<fp16, [4, 2]> new = slice_update(begin = begin, end = end, update = y, x = old);
        write_state(data = new, input = cache);
        tensor<fp16, [4, 2]> all = read_state(input = cache);
        tensor<fp16, [4, 1]> z = matmul(transpose_x = bool(false), transpose_y = bool(true), x = all, y = y);
    } -> (z);",
];

/// What replaces a number.
const WRONG: &[&str] = &[
    "0",
    "-1",
    "1",
    "3",
    "7",
    "-9",
    "1000000",
    "2147483647",
    "-2147483648",
];

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// The text with one to three of its whole numbers replaced.
fn spoil(text: &str, random: &mut Random) -> String {
    let bytes = text.as_bytes();
    let starts = |i: usize| {
        bytes[i].is_ascii_digit() && !bytes[i - 1].is_ascii_alphanumeric() && !b"_.+-".contains(&bytes[i - 1])
    };
    let mut places: Vec<usize> = (1..bytes.len()).filter(|&i| starts(i)).collect();
    places.retain(|&i| !text[i..].starts_with("0x"));
    let mut out = text.to_string();
    let mut chosen: Vec<usize> = (0..1 + random.below(3))
        .map(|_| places[random.below(places.len())])
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    for at in chosen.into_iter().rev() {
        let end = at + text[at..].bytes().take_while(u8::is_ascii_digit).count();
        out.replace_range(at..end, WRONG[random.below(WRONG.len())]);
    }
    out
}

/// Opens and runs the program; errors are fine, so are results.
fn try_all(text: &str, passes: bool) {
    let text = format!("program(1.3) {{ {text} }}");
    let source = Source::memory([("case.mlmodelc/model.mil".to_string(), text.into())].into());
    let Ok(file) = mil::Model::open_source(source, "case.mlmodelc") else {
        return;
    };
    let options = Options {
        passes,
        ..Options::default()
    };
    let Ok(model) = Model::load(Arc::new(file), None, options) else {
        return;
    };
    let function = &model.file().program().unwrap().functions[0];
    let mut values = Vec::new();
    for input in function
        .inputs
        .iter()
        .filter(|i| !matches!(i.ty, mil::ValueType::State(_)))
    {
        let ty = input.ty.tensor().unwrap();
        let shape: Vec<usize> = ty
            .shape
            .iter()
            .map(|d| if let Dim::Fixed(n) = d { *n } else { 1 })
            .collect();
        let count: usize = shape.iter().product();
        if count > 1 << 16 {
            return;
        }
        let floats: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let ints: Vec<i32> = (0..count as i32).collect();
        values.push((input.name.clone(), shape, floats, ints, ty.dtype.is_float()));
    }
    let arrays: Vec<(&str, Array<'_>)> = values
        .iter()
        .map(|(name, shape, f, i, is_float)| {
            let data = if *is_float { Data::F32(f) } else { Data::I32(i) };
            (name.as_str(), Array { shape, data })
        })
        .collect();
    let mut state = model.make_state();
    let _ = model.predict(&arrays, Some(&mut state));
}

/// The result is small, so that only the step itself could cost anything.
#[test]
fn a_transposed_step_beyond_every_window_costs_nothing() {
    let conv = |strides: &str, dilations: &str, pad: &str| {
        format!(
            "func main<ios17>(tensor<fp32, [1, 1, 1, 1]> x) {{
        tensor<fp32, [1, 1, 2, 2]> a = conv_transpose(x = x, weight = tensor<fp32, [1, 1, 2, 2]>([[[[1, 2], [3, 4]]]]),
            strides = tensor<int32, [2]>([{strides}]), pad_type = string(\"custom\"), pad = tensor<int32, [4]>([{pad}]),
            dilations = tensor<int32, [2]>([{dilations}]), groups = int32(1));
    }} -> (a);"
        )
    };
    let start = std::time::Instant::now();
    for (strides, dilations, pad) in [
        ("2147483647, 2147483647", "1, 1", "0, 0, 0, 0"),
        (
            "1, 1",
            "2147483647, 2147483647",
            "1073741823, 1073741823, 1073741823, 1073741823",
        ),
        ("30000, 30000", "2147483647, 1", "1073741823, 1073741823, 0, 0"),
    ] {
        try_all(&conv(strides, dilations, pad), true);
    }
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

#[test]
fn programs_with_wrong_numbers_give_errors() {
    let mut random = Random(0x5EED);
    let mut panics = Vec::new();
    for (n, program) in PROGRAMS.iter().enumerate() {
        for round in 0..400 {
            let text = if round == 0 {
                program.to_string()
            } else {
                spoil(program, &mut random)
            };
            let passes = round % 2 == 0;
            if catch_unwind(AssertUnwindSafe(|| try_all(&text, passes))).is_err() {
                panics.push(format!("program {n}, round {round}:\n{text}"));
            }
        }
    }
    assert!(
        panics.is_empty(),
        "{} panics, the first:\n{}",
        panics.len(),
        panics[0]
    );
}

#[test]
fn the_programs_run_when_nothing_is_wrong() {
    for program in PROGRAMS {
        let text = format!("program(1.3) {{ {program} }}");
        let source = Source::memory([("case.mlmodelc/model.mil".to_string(), text.into())].into());
        let file = mil::Model::open_source(source, "case.mlmodelc").unwrap();
        Model::load(Arc::new(file), None, Options::default()).unwrap();
    }
}
