"""Activations and elementwise operators."""

import math

import numpy as np

from golden import In, channels, family, sigmoid


def erf(x):
    return np.vectorize(math.erf)(x)


@family("activation")
def activation(f):
    x = np.concatenate([f.normal(2, 3, 5) * 2, np.zeros((2, 3, 1), np.float32)], axis=2)
    plain = {
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "sigmoid": sigmoid,
        "silu": lambda x: x * sigmoid(x),
        "softplus": lambda x: np.log1p(np.exp(x)),
        "softsign": lambda x: x / (1 + np.abs(x)),
    }
    for op, compute in plain.items():
        f.case(op, {"x": In(x * 4)}, compute)
    alpha = {
        "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
        "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
        "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
    }
    for op, compute in alpha.items():
        f.case(op, {"x": In(x), "alpha": 0.75}, compute)
    both = {
        "clamped_relu": lambda x, alpha, beta: np.where(x >= 0, np.minimum(beta, x), np.minimum(beta, alpha * x)),
        "linear_activation": lambda x, alpha, beta: x * alpha + beta,
        "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
        "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    }
    for op, compute in both.items():
        f.case(op, {"x": In(x), "alpha": 0.25, "beta": 0.625}, compute)
    gelu = {
        "EXACT": lambda x, mode: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        "TANH_APPROXIMATION": lambda x, mode: 0.5
        * x
        * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "SIGMOID_APPROXIMATION": lambda x, mode: x * sigmoid(1.702 * x),
    }
    for mode, compute in gelu.items():
        f.case("gelu", {"x": In(x), "mode": mode}, compute, mode)
    for shape in [(2, 3), (1, 3, 4), (2, 3, 2, 2), (1, 3, 2, 2, 2)]:
        x = f.normal(*shape)
        f.case(
            "prelu",
            {"x": In(x), "alpha": np.array([0.5, -1.5, 2.0], np.float32)},
            lambda x, alpha: np.where(x > 0, x, channels(alpha, x.ndim) * x),
            f"rank {len(shape)}",
        )
        f.case(
            "softplus_parametric",
            {
                "x": In(x),
                "alpha": np.array([0.5, -1.5, 2.0], np.float32),
                "beta": np.array([1.0, 0.5, -2.0], np.float32),
            },
            lambda x, alpha, beta: channels(alpha, x.ndim) * np.log1p(np.exp(x * channels(beta, x.ndim))),
            f"rank {len(shape)}",
        )

    def softmax(x, axis=-1):
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    x = f.normal(2, 5, 3) * 5
    f.case("softmax", {"x": In(x)}, softmax)
    for axis in (0, 1, -1):
        f.case("softmax", {"x": In(x), "axis": axis}, softmax, f"axis {axis}")


@family("elementwise_unary")
def elementwise_unary(f):
    x = f.normal(2, 3, 7)
    table = {
        "abs": (x, np.abs),
        "acos": (np.tanh(x), np.arccos),
        "asin": (np.tanh(x), np.arcsin),
        "atan": (x * 4, np.arctan),
        "atanh": (np.tanh(x) * 0.9, np.arctanh),
        "ceil": (x * 4, np.ceil),
        "cos": (x * 4, np.cos),
        "cosh": (x * 2, np.cosh),
        "erf": (x, erf),
        "exp": (x * 3, np.exp),
        "exp2": (x * 4, np.exp2),
        "floor": (x * 4, np.floor),
        "round": (np.round(x * 8) / 4, np.round),
        "sign": (np.round(x), np.sign),
        "sin": (x * 4, np.sin),
        "sinh": (x * 2, np.sinh),
        "sqrt": (np.abs(x), np.sqrt),
        "square": (x, np.square),
        "tan": (np.tanh(x) * 1.4, np.tan),
        "tanh": (x * 2, np.tanh),
    }
    for op, (value, compute) in table.items():
        f.case(op, {"x": In(value)}, lambda x, g=compute: g(x))
    whole = f.integers(-20, 20, 3, 4)
    f.case("abs", {"x": In(whole)}, np.abs, "integers")
    f.case("sign", {"x": In(whole)}, np.sign, "integers")
    f.case("square", {"x": In(whole)}, np.square, "integers")
    f.case("exp2", {"x": In(np.abs(whole))}, lambda x: 2**x, "integers")
    positive = np.abs(x) + 0.25
    f.case("inverse", {"x": In(positive), "epsilon": 0.5}, lambda x, epsilon: 1 / (x + epsilon))
    f.case("inverse", {"x": In(positive)}, lambda x: 1 / (x + 1e-4), "default epsilon")
    f.case("rsqrt", {"x": In(positive), "epsilon": 0.5}, lambda x, epsilon: 1 / np.sqrt(x + epsilon))
    f.case("rsqrt", {"x": In(positive)}, lambda x: 1 / np.sqrt(x + 1e-12), "default epsilon")
    f.case("log", {"x": In(positive), "epsilon": 0.5}, lambda x, epsilon: np.log(x + epsilon))
    f.case("log", {"x": In(positive)}, np.log, "default epsilon")
    f.case("logical_not", {"x": In(whole > 0)}, np.logical_not)
    f.case("threshold", {"x": In(x), "alpha": 0.25}, lambda x, alpha: np.maximum(x, alpha))
    f.case("threshold", {"x": In(whole), "alpha": -3}, lambda x, alpha: np.maximum(x, alpha), "integers")
    f.case("clip", {"x": In(x), "alpha": -0.5, "beta": 0.75}, lambda x, alpha, beta: np.clip(x, alpha, beta))
    wide = np.array([[-(2**30) - 1, 2**30 + 1, 7]], np.int32)
    f.case(
        "clip",
        {"x": In(wide), "alpha": -(2**30), "beta": 2**30},
        lambda x, alpha, beta: np.clip(x, alpha, beta).astype(np.int32),
        "integers beyond 24 bits",
    )
    numbers = np.array([[-2.75, -1.0, 0.0], [0.5, 3.25, 100.0]], np.float32)
    f.case("cast", {"x": In(numbers), "dtype": "int32"}, lambda x, dtype: x.astype(np.int32), "float to integer")
    f.case("cast", {"x": In(numbers), "dtype": "bool"}, lambda x, dtype: x != 0, "float to bool")
    f.case("cast", {"x": In(numbers), "dtype": "int8"}, lambda x, dtype: x.astype(np.int8), "float to int8")
    f.case("cast", {"x": In(whole), "dtype": "fp32"}, lambda x, dtype: x.astype(np.float32), "integer to float")
    f.case("cast", {"x": In(whole), "dtype": "fp16"}, lambda x, dtype: x.astype(np.float16), "integer to fp16")
    f.case("cast", {"x": In(whole * 100), "dtype": "uint8"}, lambda x, dtype: x.astype(np.uint8), "wraps")
    f.case("cast", {"x": In(whole * 4000), "dtype": "int16"}, lambda x, dtype: x.astype(np.int16), "wraps to 16 bits")
    f.case("cast", {"x": In(whole), "dtype": "bool"}, lambda x, dtype: x != 0, "integer to bool")
    f.case("cast", {"x": In(whole > 3), "dtype": "fp32"}, lambda x, dtype: x.astype(np.float32), "bool to float")
    f.case(
        "cast",
        {"x": In(numbers * 1.001), "dtype": "fp16"},
        lambda x, dtype: x.astype(np.float32).astype(np.float16),
        "float to fp16",
        half=False,
    )


@family("elementwise_binary")
def elementwise_binary(f):
    floats = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "real_div": np.divide,
        "floor_div": np.floor_divide,
        "mod": np.mod,
        "maximum": np.maximum,
        "minimum": np.minimum,
        "pow": lambda x, y: np.abs(x) ** y,
    }
    x = np.round(f.normal(2, 3, 4) * 16) / 4
    y = np.round(np.abs(f.normal(3, 1)) * 4) / 4 + 0.5
    for op, compute in floats.items():
        left = np.abs(x) + 0.25 if op == "pow" else x
        f.case(op, {"x": In(left), "y": In(y)}, lambda x, y, g=compute: g(x, y), "broadcast")
        f.case(op, {"x": In(left), "y": 1.5}, lambda x, y, g=compute: g(x, y), "scalar")
    compare = {
        "equal": np.equal,
        "not_equal": np.not_equal,
        "less": np.less,
        "less_equal": np.less_equal,
        "greater": np.greater,
        "greater_equal": np.greater_equal,
    }
    a, b = f.integers(-3, 4, 2, 5), f.integers(-3, 4, 5)
    for op, compute in compare.items():
        f.case(op, {"x": In(a), "y": In(b)}, lambda x, y, g=compute: g(x, y), "integers")
        f.case(
            op,
            {"x": In(a.astype(np.float32)), "y": In(b.astype(np.float32))},
            lambda x, y, g=compute: g(x, y),
            "floats",
        )
    p, q = f.integers(-9, 10, 3, 6), np.array([-4, -3, 2, 3, 5, -1], np.int32)
    whole = dict(floats)
    whole["real_div"] = lambda x, y: np.trunc(x / y).astype(np.int32)
    for op, compute in whole.items():
        if op == "pow":
            f.case(op, {"x": In(p), "y": In(np.abs(q))}, lambda x, y: x**y, "integers")
        else:
            f.case(op, {"x": In(p), "y": In(q)}, lambda x, y, g=compute: g(x, y), "integers")
    s, t = f.integers(0, 2, 2, 6) > 0, f.integers(0, 2, 6) > 0
    for op, compute in {
        "logical_and": np.logical_and,
        "logical_or": np.logical_or,
        "logical_xor": np.logical_xor,
    }.items():
        f.case(op, {"x": In(s), "y": In(t)}, lambda x, y, g=compute: g(x, y))
