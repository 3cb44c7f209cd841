//! Each pass on the spelling it is made for: the merged operation is there, and results with passes on and off agree.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_mil::{self as mil, Dim, Source};
use candle_coreml_portable::{Array, Data, Model, Options, OwnedArray};
use std::sync::Arc;

/// A spelling: its name, the body of the program, and the operations that must appear (and must not) after the passes.
struct Case {
    name: &'static str,
    program: &'static str,
    expect: &'static [&'static str],
    gone: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "RMS norm of a doubled vector",
        program: "func main<ios17>(tensor<fp16, [1, 3, 8]> x) {
            tensor<fp16, [1, 3, 8]> minus = mul(x = x, y = fp16(-0x1p+0));
            tensor<fp16, [1, 3, 16]> both = concat(axis = int32(-1), interleave = bool(false), values = (x, minus));
            tensor<fp16, [1, 3, 16]> normed = layer_norm(axes = tensor<int32, [1]>([-1]), epsilon = fp16(0x1p-14), x = both);
            tensor<fp16, [1, 3, 8]> half = slice_by_index(begin = tensor<int32, [3]>([0, 0, 0]), end = tensor<int32, [3]>([1, 3, 8]),
                end_mask = tensor<bool, [3]>([true, true, false]), x = normed);
            tensor<fp16, [1, 3, 8]> y = mul(x = half, y = tensor<fp16, [8]>([0x1p+0, 0x1p-1, 0x1p-2, 0x1p+1, 0x1p+0, 0x1p+0, 0x1p-1, 0x1p+2]));
        } -> (y);",
        expect: &["RmsNorm(eps 6.1035156e-5, weight)"],
        gone: &["LayerNorm", "Concat"],
    },
    Case {
        name: "RMS norm by mean and reciprocal root",
        program: "func main<ios17>(tensor<fp16, [1, 3, 8]> x) {
            tensor<fp32, [1, 3, 8]> wide = cast(dtype = string(\"fp32\"), x = x);
            tensor<fp32, [1, 3, 8]> square = pow(x = wide, y = fp32(0x1p+1));
            tensor<fp32, [1, 3, 1]> mean = reduce_mean(axes = tensor<int32, [1]>([-1]), keep_dims = bool(true), x = square);
            tensor<fp32, [1, 3, 1]> safe = add(x = mean, y = fp32(0x1p-14));
            tensor<fp32, [1, 3, 1]> root = rsqrt(epsilon = fp32(0x1p-40), x = safe);
            tensor<fp16, [1, 3, 1]> factor = cast(dtype = string(\"fp16\"), x = root);
            tensor<fp16, [1, 3, 8]> y = mul(x = x, y = factor);
        } -> (y);",
        expect: &["RmsNorm"],
        gone: &["Rsqrt", "ReduceNode"],
    },
    Case {
        name: "softmax spelled out",
        program: "func main<ios17>(tensor<fp16, [2, 3, 8]> x) {
            tensor<fp16, [2, 3, 1]> top = reduce_max(axes = tensor<int32, [1]>([-1]), keep_dims = bool(true), x = x);
            tensor<fp16, [2, 3, 8]> low = sub(x = x, y = top);
            tensor<fp16, [2, 3, 8]> e = exp(x = low);
            tensor<fp16, [2, 3, 1]> sum = reduce_sum(axes = tensor<int32, [1]>([-1]), keep_dims = bool(true), x = e);
            tensor<fp16, [2, 3, 8]> y = real_div(x = e, y = sum);
        } -> (y);",
        expect: &["Softmax"],
        gone: &["Exp", "ReduceNode"],
    },
    Case {
        name: "SiLU as a product with a sigmoid",
        program: "func main<ios17>(tensor<fp16, [2, 3, 8]> x) {
            tensor<fp16, [2, 3, 8]> gate = sigmoid(x = x);
            tensor<fp16, [2, 3, 8]> y = mul(x = gate, y = x);
        } -> (y);",
        expect: &["Silu"],
        gone: &["Sigmoid", "BinaryNode"],
    },
    Case {
        name: "hard swish as converters from PyTorch spell it",
        program: "func main<ios17>(tensor<fp16, [2, 3, 8]> x) {
            tensor<fp16, [2, 3, 8]> cut = thresholded_relu(alpha = fp16(-0x1.8p+1), x = x);
            tensor<fp16, [2, 3, 8]> gate = sigmoid_hard(alpha = fp16(0x1.554p-3), beta = fp16(0x1p-1), x = cut);
            tensor<fp16, [2, 3, 8]> y = mul(x = cut, y = gate);
        } -> (y);",
        expect: &["HardSwish { from: -3.0"],
        gone: &["SigmoidHard", "ThresholdedRelu", "BinaryNode"],
    },
    Case {
        name: "rotary embedding on halves",
        program: "func main<ios17>(tensor<fp16, [1, 2, 3, 8]> x, tensor<fp16, [1, 1, 3, 4]> cos, tensor<fp16, [1, 1, 3, 4]> sin) {
            tensor<fp16, [1, 2, 3, 4]> a = slice_by_index(begin = tensor<int32, [4]>([0, 0, 0, 0]), end = tensor<int32, [4]>([1, 2, 3, 4]), x = x);
            tensor<fp16, [1, 2, 3, 4]> b = slice_by_index(begin = tensor<int32, [4]>([0, 0, 0, 4]), end = tensor<int32, [4]>([1, 2, 3, 8]), x = x);
            tensor<fp16, [1, 2, 3, 4]> ac = mul(x = a, y = cos);
            tensor<fp16, [1, 2, 3, 4]> bs = mul(x = b, y = sin);
            tensor<fp16, [1, 2, 3, 4]> low = sub(x = ac, y = bs);
            tensor<fp16, [1, 2, 3, 4]> bc = mul(x = b, y = cos);
            tensor<fp16, [1, 2, 3, 4]> as = mul(x = a, y = sin);
            tensor<fp16, [1, 2, 3, 4]> high = add(x = bc, y = as);
            tensor<fp16, [1, 2, 3, 8]> y = concat(axis = int32(-1), interleave = bool(false), values = (low, high));
        } -> (y);",
        expect: &["Rotary"],
        gone: &["Concat", "BinaryNode"],
    },
    Case {
        name: "rotary embedding with swapped halves and full tables",
        program: "func main<ios17>(tensor<fp16, [1, 2, 3, 8]> x, tensor<fp16, [1, 1, 3, 8]> cos, tensor<fp16, [1, 1, 3, 8]> sin) {
            tensor<fp16, [1, 2, 3, 8]> straight = mul(x = x, y = cos);
            tensor<fp16, [1, 2, 3, 4]> a = slice_by_index(begin = tensor<int32, [4]>([0, 0, 0, 0]), end = tensor<int32, [4]>([1, 2, 3, 4]), x = x);
            tensor<fp16, [1, 2, 3, 4]> b = slice_by_index(begin = tensor<int32, [4]>([0, 0, 0, 4]), end = tensor<int32, [4]>([1, 2, 3, 8]), x = x);
            tensor<fp16, [1, 2, 3, 4]> minus = mul(x = b, y = fp16(-0x1p+0));
            tensor<fp16, [1, 2, 3, 8]> turned = concat(axis = int32(-1), interleave = bool(false), values = (minus, a));
            tensor<fp16, [1, 2, 3, 8]> crossed = mul(x = turned, y = sin);
            tensor<fp16, [1, 2, 3, 8]> y = add(x = straight, y = crossed);
        } -> (y);",
        expect: &["Rotary"],
        gone: &["Concat", "BinaryNode"],
    },
    Case {
        name: "attention with repeated heads, scale and mask",
        program: "func main<ios17>(tensor<fp16, [1, 4, 3, 8]> q, tensor<fp16, [2, 5, 8]> k, tensor<fp16, [2, 5, 8]> v, tensor<fp16, [1, 1, 3, 5]> mask) {
            tensor<fp16, [2, 1, 5, 8]> k1 = expand_dims(axes = tensor<int32, [1]>([1]), x = k);
            tensor<fp16, [2, 2, 5, 8]> k2 = tile(reps = tensor<int32, [4]>([1, 2, 1, 1]), x = k1);
            tensor<fp16, [1, 4, 5, 8]> k3 = reshape(shape = tensor<int32, [4]>([1, -1, 5, 8]), x = k2);
            tensor<fp16, [2, 1, 5, 8]> v1 = expand_dims(axes = tensor<int32, [1]>([1]), x = v);
            tensor<fp16, [2, 2, 5, 8]> v2 = tile(reps = tensor<int32, [4]>([1, 2, 1, 1]), x = v1);
            tensor<fp16, [4, 5, 8]> v3 = reshape(shape = tensor<int32, [3]>([4, 5, 8]), x = v2);
            tensor<fp16, [1, 4, 3, 5]> raw = matmul(transpose_x = bool(false), transpose_y = bool(true), x = q, y = k3);
            tensor<fp16, [1, 4, 3, 5]> scaled = mul(x = raw, y = fp16(0x1.6ap-2));
            tensor<fp16, [1, 4, 3, 5]> masked = add(x = scaled, y = mask);
            tensor<fp16, [1, 4, 3, 5]> weights = softmax(axis = int32(-1), x = masked);
            tensor<fp16, [4, 3, 5]> flat = reshape(shape = tensor<int32, [3]>([4, 3, 5]), x = weights);
            tensor<fp16, [4, 3, 8]> mixed = matmul(transpose_x = bool(false), transpose_y = bool(false), x = flat, y = v3);
            tensor<fp16, [1, 4, 3, 8]> y = reshape(shape = tensor<int32, [4]>([1, 4, 3, 8]), x = mixed);
        } -> (y);",
        expect: &["Attention { scale: 0.35351563, arithmetic: F32 }"],
        gone: &["MatMul", "Softmax", "Broadcast"],
    },
    Case {
        name: "update of a slice whose bounds are concatenated",
        program: "func main<ios18>(tensor<fp16, [4, 2, 6, 8]> cache, tensor<fp16, [1, 2, 1, 8]> x, tensor<int32, [1]> position) {
            tensor<int32, [1]> next = add(x = position, y = int32(1));
            tensor<int32, [4]> begin = concat(axis = int32(0), interleave = bool(false),
                values = (tensor<int32, [1]>([2]), tensor<int32, [1]>([0]), position, tensor<int32, [1]>([0])));
            tensor<int32, [4]> end = concat(axis = int32(0), interleave = bool(false),
                values = (tensor<int32, [2]>([3, 2]), next, tensor<int32, [1]>([8])));
            tensor<fp16, [4, 2, 6, 8]> y = slice_update(begin = begin, end = end, update = x, x = cache);
        } -> (y);",
        expect: &["begin: Each([2, 0, input 2, 0]), end: Each([3, 2, input 3, 8])"],
        gone: &["Concat"],
    },
    Case {
        name: "attention with keys split and transposed at once",
        program: "func main<ios17>(tensor<fp16, [1, 3, 8]> q, tensor<fp16, [1, 5, 8]> k, tensor<fp16, [1, 5, 8]> v) {
            tensor<fp16, [1, 3, 2, 4]> q1 = reshape(shape = tensor<int32, [4]>([1, 3, 2, 4]), x = q);
            tensor<fp16, [1, 2, 3, 4]> q2 = transpose(perm = tensor<int32, [4]>([0, 2, 1, 3]), x = q1);
            tensor<fp16, [1, 5, 2, 4]> k1 = reshape(shape = tensor<int32, [4]>([1, 5, 2, 4]), x = k);
            tensor<fp16, [1, 2, 4, 5]> k2 = transpose(perm = tensor<int32, [4]>([0, 2, 3, 1]), x = k1);
            tensor<fp16, [1, 5, 2, 4]> v1 = reshape(shape = tensor<int32, [4]>([1, 5, 2, 4]), x = v);
            tensor<fp16, [1, 2, 5, 4]> v2 = transpose(perm = tensor<int32, [4]>([0, 2, 1, 3]), x = v1);
            tensor<fp16, [1, 2, 3, 5]> raw = matmul(transpose_x = bool(false), transpose_y = bool(false), x = q2, y = k2);
            tensor<fp16, [1, 2, 3, 5]> scaled = mul(x = raw, y = fp16(0x1p-1));
            tensor<fp16, [1, 2, 3, 5]> weights = softmax(axis = int32(-1), x = scaled);
            tensor<fp16, [1, 2, 3, 4]> mixed = matmul(transpose_x = bool(false), transpose_y = bool(false), x = weights, y = v2);
            tensor<fp16, [1, 3, 2, 4]> back = transpose(perm = tensor<int32, [4]>([0, 2, 1, 3]), x = mixed);
            tensor<fp16, [1, 3, 8]> y = reshape(shape = tensor<int32, [3]>([1, 3, 8]), x = back);
        } -> (y);",
        expect: &["Attention { scale: 0.5, arithmetic: F32 }"],
        gone: &["MatMul", "Softmax", "BinaryNode"],
    },
    Case {
        name: "gated MLP of pointwise convolutions with a residual",
        program: "func main<ios17>(tensor<fp16, [1, 3, 2]> x) {
            tensor<fp16, [1, 2, 3]> turned = transpose(perm = tensor<int32, [3]>([0, 2, 1]), x = x);
            tensor<fp16, [1, 2, 1, 3]> image = expand_dims(axes = tensor<int32, [1]>([2]), x = turned);
            tensor<fp16, [1, 4, 1, 3]> gate = conv(x = image, weight = tensor<fp16, [4, 2, 1, 1]>([[[[0x1p+0]], [[0x1p-1]]], [[[-0x1p+0]], [[0x1p-2]]], [[[0x1p+1]], [[0x1p+0]]], [[[0x1p-3]], [[-0x1p+0]]]]));
            tensor<fp16, [1, 4, 1, 3]> up = conv(x = image, weight = tensor<fp16, [4, 2, 1, 1]>([[[[0x1p-1]], [[0x1p-1]]], [[[0x1p+0]], [[0x1p-2]]], [[[0x1p-1]], [[-0x1p+0]]], [[[0x1p-3]], [[0x1p+0]]]]));
            tensor<fp16, [1, 4, 1, 3]> act = silu(x = gate);
            tensor<fp16, [1, 4, 1, 3]> inner = mul(x = act, y = up);
            tensor<fp16, [1, 2, 1, 3]> down = conv(x = inner, weight = tensor<fp16, [2, 4, 1, 1]>([[[[0x1p+0]], [[0x1p-1]], [[0x1p-2]], [[0x1p+0]]], [[[-0x1p+0]], [[0x1p+0]], [[0x1p-1]], [[0x1p-2]]]]));
            tensor<fp16, [1, 2, 3]> back = squeeze(axes = tensor<int32, [1]>([2]), x = down);
            tensor<fp16, [1, 3, 2]> rows = transpose(perm = tensor<int32, [3]>([0, 2, 1]), x = back);
            tensor<fp16, [1, 3, 2]> y = add(x = x, y = rows);
        } -> (y);",
        expect: &["Mlp(Gated[4, 2]+Silu, Linear[2, 4])"],
        gone: &["UnaryNode", "BinaryNode", "Permute"],
    },
    Case {
        name: "products of one input",
        program: "func main<ios17>(tensor<fp16, [1, 2]> x) {
            tensor<fp16, [1, 3]> a = linear(x = x, weight = tensor<fp16, [3, 2]>([[0x1p+0, 0x1p-1], [0x1p+1, -0x1p+0], [0x1p-2, 0x1p+0]]));
            tensor<fp16, [1, 2]> b = linear(x = x, weight = tensor<fp16, [2, 2]>([[0x1p-1, 0x1p+0], [0x1p+0, 0x1p+0]]), bias = tensor<fp16, [2]>([0x1p+0, 0x1p+1]));
        } -> (a, b);",
        expect: &["LinearMany"],
        gone: &[],
    },
    Case {
        name: "convolution with activation, residual and activation",
        program: "func main<ios17>(tensor<fp16, [1, 1, 3, 3]> x) {
            tensor<fp16, [1, 1, 3, 3]> a = conv(x = x, pad_type = string(\"same\"), weight = tensor<fp16, [1, 1, 3, 3]>([[[[0x1p+0, 0x1p-1, 0x1p-2], [0x1p-3, 0x1p+1, -0x1p+0], [0x1p-2, 0x1p-1, 0x1p+0]]]]));
            tensor<fp16, [1, 1, 3, 3]> b = relu(x = a);
            tensor<fp16, [1, 1, 3, 3]> c = conv(x = b, pad_type = string(\"same\"), weight = tensor<fp16, [1, 1, 3, 3]>([[[[-0x1p+0, 0x1p-1, 0x1p-2], [0x1p-3, 0x1p+1, 0x1p+0], [0x1p-2, -0x1p-1, 0x1p+0]]]]), bias = tensor<fp16, [1]>([0x1p-1]));
            tensor<fp16, [1, 1, 3, 3]> d = add(x = c, y = b);
            tensor<fp16, [1, 1, 3, 3]> y = silu(x = d);
        } -> (y);",
        expect: &["ConvLast"],
        gone: &["UnaryNode", "BinaryNode"],
    },
    Case {
        name: "convolution over a sequence with an activation",
        program: "func main<ios17>(tensor<fp16, [1, 2, 5]> x) {
            tensor<fp16, [1, 2, 5]> a = conv(x = x, pad_type = string(\"same\"), weight = tensor<fp16, [2, 2, 3]>([[[0x1p+0, 0x1p-1, 0x1p-2], [0x1p-3, 0x1p+1, -0x1p+0]], [[0x1p-2, 0x1p-1, 0x1p+0], [0x1p+0, 0x1p-1, 0x1p-2]]]));
            tensor<fp16, [1, 2, 5]> b = gelu(mode = string(\"EXACT\"), x = a);
            tensor<fp16, [1, 2, 5]> c = conv(x = b, pad_type = string(\"same\"), weight = tensor<fp16, [2, 2, 3]>([[[0x1p+0, 0x1p-1, 0x1p-2], [0x1p-3, 0x1p+1, -0x1p+0]], [[0x1p-2, 0x1p-1, 0x1p+0], [0x1p+0, 0x1p-1, 0x1p-2]]]));
            tensor<fp16, [1, 2, 5]> d = add(x = c, y = b);
            tensor<fp16, [1, 2, 5]> y = relu(x = d);
        } -> (y);",
        expect: &["ConvLast"],
        gone: &["UnaryNode", "BinaryNode"],
    },
    Case {
        name: "squares written as powers",
        program: "func main<ios17>(tensor<fp16, [1, 4]> x) {
            tensor<fp16, [1, 4]> y = pow(x = x, y = fp16(0x1p+1));
        } -> (y);",
        expect: &["Square"],
        gone: &["Pow"],
    },
    Case {
        name: "group norm of a picture",
        program: "func main<ios17>(tensor<fp16, [1, 4, 2, 3]> x) {
            tensor<fp16, [1, 2, 2, 2, 3]> split = reshape(shape = tensor<int32, [5]>([1, 2, 2, 2, 3]), x = x);
            tensor<fp16, [1, 2, 1, 1, 1]> mean = reduce_mean(axes = tensor<int32, [3]>([2, 3, 4]), keep_dims = bool(true), x = split);
            tensor<fp16, [1, 2, 2, 2, 3]> low = sub(x = split, y = mean);
            tensor<fp16, [1, 2, 2, 2, 3]> square = square(x = low);
            tensor<fp16, [1, 2, 1, 1, 1]> variance = reduce_mean(axes = tensor<int32, [3]>([2, 3, 4]), keep_dims = bool(true), x = square);
            tensor<fp16, [1, 2, 1, 1, 1]> safe = add(x = variance, y = fp16(0x1p-10));
            tensor<fp16, [1, 2, 1, 1, 1]> root = sqrt(x = safe);
            tensor<fp16, [1, 2, 2, 2, 3]> normed = real_div(x = low, y = root);
            tensor<fp16, [1, 4, 2, 3]> whole = reshape(shape = tensor<int32, [4]>([1, 4, 2, 3]), x = normed);
            tensor<fp16, [1, 4, 2, 3]> scaled = mul(x = whole, y = tensor<fp16, [1, 4, 1, 1]>([[[[0x1p+0]], [[0x1p-1]], [[0x1p+1]], [[-0x1p+0]]]]));
            tensor<fp16, [1, 4, 2, 3]> moved = add(x = scaled, y = tensor<fp16, [1, 4, 1, 1]>([[[[0x1p+0]], [[0x0p+0]], [[-0x1p+1]], [[0x1p-3]]]]));
            tensor<fp16, [1, 4, 2, 3]> y = silu(x = moved);
        } -> (y);",
        expect: &["GroupNorm { groups: 2, eps: 0.0009765625, weighted }+Silu"],
        gone: &["ReduceNode", "BinaryNode", "UnaryNode"],
    },
    Case {
        name: "transposes around elementwise operations",
        program: "func main<ios17>(tensor<fp16, [1, 2, 3]> x) {
            tensor<fp16, [1, 2, 3]> squashed = sigmoid(x = x);
            tensor<fp16, [1, 3, 2]> a = transpose(perm = tensor<int32, [3]>([0, 2, 1]), x = squashed);
            tensor<fp16, [1, 3, 2]> b = exp(x = a);
            tensor<fp16, [1, 3, 2]> c = mul(x = b, y = fp16(0x1p-1));
            tensor<fp16, [1, 2, 3]> d = transpose(perm = tensor<int32, [3]>([0, 2, 1]), x = c);
            tensor<fp16, [6]> e = reshape(shape = tensor<int32, [1]>([6]), x = d);
            tensor<fp16, [1, 2, 3]> y = reshape(shape = tensor<int32, [3]>([1, 2, 3]), x = e);
        } -> (y);",
        expect: &["Exp"],
        gone: &["Permute", "Reshape"],
    },
];

/// A program that has part of a pattern, and what is said about the part that is missing.
const MISSES: &[(&str, &str, &str)] = &[
    (
        "func main<ios17>(tensor<fp16, [1, 2, 3, 4]> q, tensor<fp16, [1, 2, 5, 3]> s, tensor<fp16, [1, 2, 5, 4]> v) {
            tensor<fp16, [1, 2, 5, 3]> weights = softmax(axis = int32(-1), x = s);
            tensor<fp16, [1, 2, 5, 4]> y = matmul(x = weights, y = q);
        } -> (y);",
        "attention at \"y\"",
        "under the softmax is no product with keys",
    ),
    (
        "func main<ios17>(tensor<fp16, [1, 3, 8]> x) {
            tensor<fp16, [1, 3, 8]> square = mul(x = x, y = x);
            tensor<fp16, [1, 1, 8]> mean = reduce_mean(axes = tensor<int32, [1]>([1]), keep_dims = bool(true), x = square);
            tensor<fp16, [1, 1, 8]> root = rsqrt(epsilon = fp16(0x1p-14), x = mean);
            tensor<fp16, [1, 3, 8]> y = mul(x = x, y = root);
        } -> (y);",
        "RMS norm at \"y\"",
        "over the last dimension",
    ),
    (
        "func main<ios17>(tensor<fp16, [2, 3, 8]> x) {
            tensor<fp16, [2, 3, 8]> e = exp(x = x);
            tensor<fp16, [2, 3, 1]> sum = reduce_sum(axes = tensor<int32, [1]>([-1]), keep_dims = bool(true), x = e);
            tensor<fp16, [2, 3, 8]> y = real_div(x = e, y = sum);
        } -> (y);",
        "softmax at \"y\"",
        "the maximum over the last dimension is not subtracted first",
    ),
    (
        "func main<ios17>(tensor<fp16, [1, 2]> x, tensor<fp16, [1, 1]> r) {
            tensor<fp16, [1, 3]> a = linear(x = x, weight = tensor<fp16, [3, 2]>([[0x1p+0, 0x1p-1], [0x1p+1, -0x1p+0], [0x1p-2, 0x1p+0]]));
            tensor<fp16, [1, 3]> y = add(x = a, y = r);
        } -> (y);",
        "residual of a product at \"y\"",
        "the shapes of product and residual differ",
    ),
    (
        "func main<ios17>(tensor<fp16, [1, 2]> x) {
            tensor<fp16, [1, 2]> a = linear(x = x, weight = tensor<fp16, [2, 2]>([[0x1p+0, 0x1p-1], [0x1p+1, -0x1p+0]]));
            tensor<fp16, [1, 2]> b = silu(x = a);
        } -> (a, b);",
        "activation of a product at \"b\"",
        "the product is read elsewhere too",
    ),
];

fn open(program: &str, passes: bool) -> Model {
    let text = format!("program(1.3) {{ {program} }}");
    let source = Source::memory([("case.mlmodelc/model.mil".to_string(), text.into())].into());
    let file = mil::Model::open_source(source, "case.mlmodelc").unwrap();
    Model::load(
        Arc::new(file),
        None,
        Options {
            passes,
            wide_outputs: true,
            ..Options::default()
        },
    )
    .unwrap()
}

/// Numbers between -2 and 2 that depend on the seed alone.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn run(model: &Model, seed: u64) -> Vec<(String, OwnedArray)> {
    let function = &model.file().program().unwrap().functions[0];
    // Integers are places in small dimensions.
    let places = |numbers: &[f32]| -> Vec<i32> { numbers.iter().map(|n| (n.abs() * 2.0) as i32).collect() };
    let inputs: Vec<_> = function
        .inputs
        .iter()
        .enumerate()
        .map(|(i, input)| {
            let ty = input.ty.tensor().unwrap();
            let shape: Vec<usize> = ty
                .shape
                .iter()
                .map(|d| if let Dim::Fixed(n) = d { *n } else { 1 })
                .collect();
            let data = numbers(seed + i as u64, shape.iter().product());
            let whole = (!ty.dtype.is_float()).then(|| places(&data));
            (input.name.clone(), shape, data, whole)
        })
        .collect();
    let arrays: Vec<(&str, Array<'_>)> = inputs
        .iter()
        .map(|(name, shape, data, whole)| {
            let data = whole.as_deref().map_or(Data::F32(data), Data::I32);
            (name.as_str(), Array { shape, data })
        })
        .collect();
    model.predict(&arrays, None).unwrap()
}

#[test]
fn spellings_are_merged() {
    let mut failures = Vec::new();
    for case in CASES {
        let model = open(case.program, true);
        let graph = model.graph(&model.default_shapes().unwrap()).unwrap().to_string();
        for want in case.expect.iter().filter(|w| !graph.contains(**w)) {
            failures.push(format!("{}: no {want} in\n{graph}", case.name));
        }
        for gone in case.gone.iter().filter(|g| graph.contains(**g)) {
            failures.push(format!("{}: still {gone} in\n{graph}", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_text_of_each_spelling_before_and_after_is_as_kept() {
    for case in CASES {
        let text = |passes: bool| {
            let model = open(case.program, passes);
            model.graph(&model.default_shapes().unwrap()).unwrap().to_string()
        };
        let both = format!("{}becomes\n{}", text(false), text(true));
        insta::assert_snapshot!(case.name.replace([' ', ','], "_"), both);
    }
}

#[test]
fn a_pattern_that_is_there_in_part_is_explained() {
    let mut failures = Vec::new();
    for (program, at, why) in MISSES {
        let text = open(program, true).explain().unwrap().to_string();
        let said = text
            .lines()
            .any(|line| line.starts_with(&format!("not merged: {at}")) && line.contains(why));
        if !said {
            failures.push(format!("no {at:?} with {why:?} in\n{text}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn results_with_passes_on_and_off_agree() {
    let mut failures = Vec::new();
    for case in CASES {
        let (on, off) = (open(case.program, true), open(case.program, false));
        for seed in 1..6 {
            for ((name, a), (_, b)) in run(&on, seed).iter().zip(&run(&off, seed)) {
                let (a, b) = (a.to_f32(), b.to_f32());
                let worst = a
                    .iter()
                    .zip(&b)
                    .map(|(x, y)| (x - y).abs() / (1.0 + y.abs()))
                    .fold(0.0, f32::max);
                // Sums are taken in another order: a few units in the last place of f32.
                if a.len() != b.len() || worst.is_nan() || worst > 2e-6 {
                    failures.push(format!("{} {name}: error {worst:e} with seed {seed}", case.name));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// `const tensor<fp16, [..]>` of small numbers in turn.
fn weights(shape: [usize; 4]) -> String {
    fn list(shape: &[usize], next: &mut usize) -> String {
        let Some((count, rest)) = shape.split_first() else {
            *next += 1;
            return ["0x1p-2", "-0x1p-3", "0x1p-4", "0x1p-3", "-0x1p-2"][*next % 5].to_string();
        };
        let parts: Vec<String> = (0..*count).map(|_| list(rest, next)).collect();
        format!("[{}]", parts.join(", "))
    }
    let dims = shape.map(|d| d.to_string()).join(", ");
    format!("tensor<fp16, [{dims}]>({})", list(&shape, &mut 0))
}

/// A picture of 200 by 200 with five channels, six after `a`; what is computed and given is the caller's.
fn pictures(steps: &str) -> String {
    let size = |channels: usize| format!("tensor<fp16, [1, {channels}, 200, 200]>");
    format!("func main<ios17>({} x) {{ {steps} }} -> (y);", size(5))
        .replace("FIVE", &size(5))
        .replace("SIX", &size(6))
        .replace("EXPAND", &weights([6, 5, 1, 1]))
        .replace("DEPTH", &weights([6, 1, 3, 3]))
        .replace("PROJECT", &weights([5, 6, 1, 1]))
}

#[test]
fn convolutions_around_a_depthwise_one_are_computed_together() {
    let expand = "SIX a = conv(x = x, weight = EXPAND); SIX b = relu6(x = a);";
    let depthwise = "SIX c = conv(x = b, pad_type = string(\"same\"), groups = int32(6), weight = DEPTH); SIX d = relu(x = c);";
    let cases = [
        (
            format!(
                "{expand} {depthwise} FIVE e = conv(x = d, weight = PROJECT); FIVE y = add(x = e, y = x);"
            ),
            "ConvChain[ConvLast[1, 1] stride [1, 1] direct+Relu6, ConvLast[3, 3] stride [1, 1] depthwise+Relu, ConvLast[1, 1] stride [1, 1] direct]",
        ),
        (
            format!("{expand} {depthwise} SIX y = sqrt(x = d);"),
            "ConvChain[ConvLast[1, 1] stride [1, 1] direct+Relu6, ConvLast[3, 3] stride [1, 1] depthwise+Relu]",
        ),
        (
            format!(
                "{expand} {depthwise} FIVE e = conv(x = d, weight = PROJECT); FIVE g = conv(x = b, weight = PROJECT); FIVE y = add(x = e, y = g);"
            ),
            "ConvChain[ConvLast[3, 3] stride [1, 1] depthwise+Relu, ConvLast[1, 1] stride [1, 1] direct]",
        ),
        (
            format!(
                "{expand} {depthwise} FIVE e = conv(x = d, weight = PROJECT); FIVE y = avg_pool(x = e, kernel_sizes = tensor<int32, [2]>([1, 1]), pad_type = string(\"valid\"), strides = tensor<int32, [2]>([1, 1]));"
            ),
            "ConvChain",
        ),
    ];
    for (steps, wanted) in cases {
        let program = pictures(&steps);
        let open = |passes: bool, threads: usize| {
            let text = format!("program(1.3) {{ {program} }}");
            let source = Source::memory([("case.mlmodelc/model.mil".to_string(), text.into())].into());
            let file = Arc::new(mil::Model::open_source(source, "case.mlmodelc").unwrap());
            let options = Options {
                passes,
                wide_outputs: true,
                pool: Some(candle_coreml_kernels::Pool::new(threads)),
                ..Options::default()
            };
            Model::load(file, None, options).unwrap()
        };
        let (on, off, many) = (open(true, 2), open(false, 2), open(true, 30));
        let graph = |model: &Model| model.graph(&model.default_shapes().unwrap()).unwrap().to_string();
        assert!(graph(&on).contains(wanted), "no {wanted} in\n{}", graph(&on));
        assert!(
            !graph(&many).contains("ConvChain"),
            "200 rows are few for 30 threads:\n{}",
            graph(&many)
        );
        for ((name, a), (_, b)) in run(&on, 7).iter().zip(&run(&off, 7)) {
            let (a, b) = (a.to_f32(), b.to_f32());
            assert_eq!(a.len(), b.len(), "{name}");
            for (x, y) in a.iter().zip(&b) {
                assert!(
                    (x - y).abs() <= 2e-6 * (1.0 + y.abs()),
                    "{name}: {x} is not {y} in\n{steps}"
                );
            }
        }
    }
}
