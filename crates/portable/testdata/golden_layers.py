"""Products, norms, recurrent layers, reductions, attention and states."""

import itertools

import numpy as np

from golden import In, channels, entry, family, sigmoid


@family("linear")
def linear(f):
    x, w, b = f.normal(2, 3, 5), f.normal(4, 5), f.normal(4)

    def apply(x, weight, bias=0):
        return x @ weight.T + bias

    f.case("linear", {"x": In(x), "weight": w, "bias": b}, apply)
    f.case("linear", {"x": In(x), "weight": w}, apply, "no bias")
    f.case("linear", {"x": In(x[0, 0]), "weight": w, "bias": b}, apply, "vector")
    f.case("linear", {"x": In(x), "weight": In(w)}, apply, "computed weight")

    def matmul(x, y, transpose_x=False, transpose_y=False):
        x = np.swapaxes(x, -1, -2) if transpose_x else x
        y = np.swapaxes(y, -1, -2) if transpose_y else y
        return x @ y

    for tx, ty in itertools.product([False, True], repeat=2):
        left = f.normal(2, 1, 5, 3) if tx else f.normal(2, 1, 3, 5)
        right = f.normal(4, 6, 5) if ty else f.normal(4, 5, 6)
        f.case(
            "matmul",
            {"x": In(left), "y": In(right), "transpose_x": tx, "transpose_y": ty},
            matmul,
            f"batches {tx} {ty}",
        )
    f.case("matmul", {"x": In(x), "y": f.normal(5, 4)}, matmul, "constant")
    f.case("matmul", {"x": In(x), "y": f.normal(4, 5), "transpose_y": True}, matmul, "constant transposed")
    f.case("matmul", {"x": In(x), "y": In(f.normal(5))}, matmul, "vector")
    f.case(
        "matmul", {"x": In(f.integers(-5, 5, 2, 3)), "y": In(f.integers(-5, 5, 3, 4))}, matmul, "integers"
    )
    # 32-bit floats hold integers up to 2^24.
    large, small = f.integers(-(2**28), 2**28, 3, 2, 3), f.integers(-3, 3, 4, 3)
    f.case("matmul", {"x": In(large), "y": In(small.T)}, matmul, "large integers")
    f.case("matmul", {"x": In(large), "y": small, "transpose_y": True}, matmul, "large integers, constant")
    f.case("linear", {"x": In(large), "weight": small, "bias": f.integers(-9, 9, 4)}, apply, "large integers")
    equations = {
        "nchw,nwhu->nchu": ((2, 3, 4, 5), (2, 5, 4, 6)),
        "chw,whr->chr": ((3, 4, 5), (5, 4, 6)),
        "abcd,adce->abce": ((1, 3, 1, 5), (2, 5, 4, 6)),
        "bqhd,bkhd->bhqk": ((2, 3, 4, 5), (2, 6, 4, 5)),
        "ij,jk->ki": ((2, 3), (3, 4)),
    }

    def einsum(values, equation):
        a, b = values
        left, right = equation.split("->")[0].split(",")
        size = {c: max(dict(zip(left, a.shape)).get(c, 1), dict(zip(right, b.shape)).get(c, 1)) for c in left + right}
        a = np.broadcast_to(a, [size[c] for c in left])
        b = np.broadcast_to(b, [size[c] for c in right])
        return np.einsum(equation, a, b)

    for equation, (a, b) in equations.items():
        f.case("einsum", {"values": [In(f.normal(*a)), In(f.normal(*b))], "equation": equation}, einsum, equation)

    # From iOS 17 on a constant may have a type of its own; the result has that of the computed value.
    def like(dtype):
        return lambda x, y: (x.astype(np.float64) @ y.astype(np.float64)).astype(dtype)

    for kind in (np.float32, np.float16):
        half, whole = f.normal(2, 5).astype(kind), f.integers(-9, 9, 5, 3)
        name = f"{np.dtype(kind).name} and integers"
        f.add("matmul", {"x": In(half), "y": whole}, like(kind), f"{name}, constant right", "ios17", kind, ())
        f.add("matmul", {"x": whole.T, "y": In(half.T)}, like(kind), f"{name}, constant left", "ios17", kind, ())
        f.add("matmul", {"x": In(whole.T), "y": half.T}, like(np.int32), f"{name}, computed left", "ios17", kind, ())
        f.add("matmul", {"x": half, "y": In(whole)}, like(np.int32), f"{name}, computed right", "ios17", kind, ())
    wide, narrow = f.normal(2, 5), f.normal(5, 3).astype(np.float16)
    f.add("matmul", {"x": In(wide), "y": narrow}, like(np.float32), "a constant of 16 bits", "ios17", np.float32, ())


@family("normalization")
def normalization(f):
    for shape in [(2, 3, 4), (2, 3, 4, 2), (1, 3, 2, 2, 3)]:
        x = f.normal(*shape)
        rank = len(shape)
        mean, variance = f.normal(3), f.uniform(0.5, 2, 3)
        gamma, beta = f.normal(3), f.normal(3)

        def batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
            y = (x - channels(mean, x.ndim)) / np.sqrt(channels(variance, x.ndim) + epsilon)
            y = y if gamma is None else y * channels(gamma, x.ndim)
            return y if beta is None else y + channels(beta, x.ndim)

        full = {"x": In(x), "mean": mean, "variance": variance, "gamma": gamma, "beta": beta, "epsilon": 0.01}
        f.case("batch_norm", full, batch_norm, f"rank {rank}")
        f.case("batch_norm", {k: full[k] for k in ("x", "mean", "variance")}, batch_norm, f"rank {rank} bare")
        computed = {k: (In(v) if isinstance(v, np.ndarray) else v) for k, v in full.items()}
        f.case("batch_norm", computed, batch_norm, f"rank {rank} computed", half=False)

        def instance_norm(x, gamma=None, beta=None, epsilon=1e-5):
            axes = tuple(range(2, x.ndim))
            y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
            y = y if gamma is None else y * channels(gamma, x.ndim)
            return y if beta is None else y + channels(beta, x.ndim)

        f.case("instance_norm", {"x": In(x)}, instance_norm, f"rank {rank}")
        f.case(
            "instance_norm",
            {"x": In(x), "gamma": gamma, "beta": beta, "epsilon": 0.01},
            instance_norm,
            f"rank {rank} scaled",
        )

        def l2_norm(x, epsilon=1e-6):
            return x / np.sqrt((x**2).sum((-1, -2, -3), keepdims=True) + epsilon)

        f.case("l2_norm", {"x": In(x)}, l2_norm, f"rank {rank}")
        f.case("l2_norm", {"x": In(x), "epsilon": 0.5}, l2_norm, f"rank {rank} epsilon")

    def layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5):
        axes = tuple(range(x.ndim)) if axes is None else tuple(int(a) % x.ndim for a in axes)
        shape = [x.shape[i] if i in axes else 1 for i in range(x.ndim)]
        y = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
        y = y if gamma is None else y * gamma.reshape(shape)
        return y if beta is None else y + beta.reshape(shape)

    x = f.normal(2, 3, 5)
    f.case("layer_norm", {"x": In(x)}, layer_norm, "all dimensions")
    for axes in ([2], [-1], [1, 2], [0], [1]):
        shape = [x.shape[a] for a in sorted(a % 3 for a in axes)]
        f.case(
            "layer_norm",
            {
                "x": In(x),
                "axes": np.array(axes),
                "gamma": f.normal(*shape),
                "beta": f.normal(*shape),
                "epsilon": 0.01,
            },
            layer_norm,
            f"axes {axes}",
        )

    def local_response_norm(x, size, alpha=1e-4, beta=0.75, k=1.0):
        if x.ndim == 3:  # [channels, height, width], as coremltools' own test has it
            return local_response_norm(x[None], size, alpha, beta, k)[0]
        y = np.zeros_like(x)
        for c in range(x.shape[1]):
            low, high = max(c - size // 2, 0), min(c + (size - 1) // 2, x.shape[1] - 1)
            total = (x[:, low : high + 1] ** 2).sum(1)
            y[:, c] = x[:, c] / (k + alpha / size * total) ** beta
        return y

    for size, shape in itertools.product([1, 3, 4], [(2, 6, 3), (1, 5, 2, 2)]):
        f.case(
            "local_response_norm",
            {"x": In(f.normal(*shape)), "size": size, "alpha": 0.5, "beta": 0.25, "k": 2.0},
            local_response_norm,
            f"size {size} of {shape}",
        )
    f.case("local_response_norm", {"x": In(f.normal(1, 4, 3) * 9), "size": 3}, local_response_norm, "defaults")


ACTIVATIONS = {
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
    "scaled_tanh": np.tanh,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "sigmoid_hard": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


def steps(x, walk):
    """Where the input of each step is and where its output goes: coremltools' tests of the op have it so."""
    order = range(len(x))
    walks = {"forward": zip(order, order), "reverse": zip(reversed(order), order), "back": [(n, n) for n in reversed(order)]}
    return walks[walk]


@family("recurrent")
def recurrent(f):
    t, b, i, h = 4, 2, 3, 5

    def rnn(x, initial_h, weight_ih, weight_hh, bias=0, direction="forward", output_sequence=False, activation="tanh"):
        state, out = initial_h, np.zeros((len(x), *initial_h.shape))
        for n, place in steps(x, direction):
            state = ACTIVATIONS[activation](x[n] @ weight_ih.T + state @ weight_hh.T + bias)
            out[place] = state
        return (out if output_sequence else state[None]), state

    def gru(
        x,
        initial_h,
        weight_ih,
        weight_hh,
        bias=None,
        direction="forward",
        output_sequence=False,
        recurrent_activation="sigmoid",
        activation="tanh",
        reset_after=False,
        input_bias=None,
    ):
        gate, act = ACTIVATIONS[recurrent_activation], ACTIVATIONS[activation]
        w_r, w_o, w_z = np.split(weight_ih, 3)
        r_r, r_o, r_z = np.split(weight_hh, 3)
        b_r, b_o, b_z = np.split(np.zeros(len(weight_ih)) if bias is None else bias, 3)
        c_r, c_o, c_z = np.split(np.zeros(len(weight_ih)) if input_bias is None else input_bias, 3)
        state, out = initial_h, np.zeros((len(x), *initial_h.shape))
        for n, place in steps(x, direction):
            z = gate(x[n] @ w_z.T + state @ r_z.T + b_z + c_z)
            r = gate(x[n] @ w_r.T + state @ r_r.T + b_r + c_r)
            if reset_after:
                o = act(x[n] @ w_o.T + c_o + r * (state @ r_o.T + b_o))
            else:
                o = act(x[n] @ w_o.T + c_o + b_o + (r * state) @ r_o.T)
            state = (1 - z) * o + z * state
            out[place] = state
        return (out if output_sequence else state[None]), state

    def lstm_one(x, hidden, cell, w, r, bias, peephole, walk, gate, cell_act, act, clip):
        w_i, w_f, w_o, w_z = np.split(w, 4)
        r_i, r_f, r_o, r_z = np.split(r, 4)
        b_i, b_f, b_o, b_z = np.split(np.zeros(len(w)) if bias is None else bias, 4)
        p_i, p_f, p_o = np.split(np.zeros(3 * cell.shape[1]) if peephole is None else peephole, 3)
        out = np.zeros((len(x), *hidden.shape))
        for n, place in steps(x, walk):
            enter = gate(x[n] @ w_i.T + hidden @ r_i.T + b_i + p_i * cell)
            stay = gate(x[n] @ w_f.T + hidden @ r_f.T + b_f + p_f * cell)
            cell = stay * cell + enter * cell_act(x[n] @ w_z.T + hidden @ r_z.T + b_z)
            if clip is not None:
                cell = np.clip(cell, -clip, clip)
            show = gate(x[n] @ w_o.T + hidden @ r_o.T + b_o + p_o * cell)
            hidden = show * act(cell)
            out[place] = hidden
        return out, hidden, cell

    def lstm(
        x,
        initial_h,
        initial_c,
        weight_ih,
        weight_hh,
        bias=None,
        peephole=None,
        weight_ih_back=None,
        weight_hh_back=None,
        bias_back=None,
        peephole_back=None,
        direction="forward",
        output_sequence=False,
        recurrent_activation="sigmoid",
        cell_activation="tanh",
        activation="tanh",
        clip=None,
    ):
        acts = ACTIVATIONS[recurrent_activation], ACTIVATIONS[cell_activation], ACTIVATIONS[activation]
        size = weight_hh.shape[1]
        walk = "forward" if direction == "bidirectional" else direction
        parts = [(weight_ih, weight_hh, bias, peephole, walk)]
        if direction == "bidirectional":
            parts.append((weight_ih_back, weight_hh_back, bias_back, peephole_back, "back"))
        results = []
        for n, part in enumerate(parts):
            own = slice(n * size, (n + 1) * size)
            results.append(lstm_one(x, initial_h[:, own], initial_c[:, own], *part, *acts, clip))
        out, hidden, cell = (np.concatenate(r, axis=-1) for r in zip(*results))
        return (out if output_sequence else hidden[None]), hidden, cell

    def layer(gates, directions=1):
        return {
            "x": In(f.normal(t, b, i)),
            "initial_h": In(f.normal(b, h * directions)),
            "weight_ih": f.normal(gates * h, i) / 2,
            "weight_hh": f.normal(gates * h, h) / 2,
        }

    for direction, sequence in itertools.product(["forward", "reverse"], [True, False]):
        options = {"direction": direction, "output_sequence": sequence}
        f.case("rnn", {**layer(1), "bias": f.normal(h), **options}, rnn, f"{direction} {sequence}")
        f.case("gru", {**layer(3), "bias": f.normal(3 * h), **options}, gru, f"{direction} {sequence}")
        after = {"bias": f.normal(3 * h), "input_bias": f.normal(3 * h), "reset_after": True}
        f.case("gru", {**layer(3), **after, **options}, gru, f"reset after {direction} {sequence}", opset="ios18")
        cell = {"initial_c": In(f.normal(b, h)), "bias": f.normal(4 * h)}
        f.case("lstm", {**layer(4), **cell, **options}, lstm, f"{direction} {sequence}")
    for activation in ["relu", "sigmoid", "linear", "scaled_tanh", "sigmoid_hard"]:
        f.case("rnn", {**layer(1), "activation": activation}, rnn, activation, half=False)
    f.case("gru", {**layer(3), "recurrent_activation": "tanh", "activation": "sigmoid"}, gru, "activations")
    f.case(
        "lstm",
        {
            **layer(4),
            "initial_c": In(f.normal(b, h)),
            "peephole": f.normal(3 * h),
            "clip": 0.25,
            "recurrent_activation": "hard_sigmoid",
            "cell_activation": "scaled_tanh",
            "activation": "relu",
            "output_sequence": True,
        },
        lstm,
        "peephole, clip, activations",
    )
    for sequence in (True, False):
        both = {
            **layer(4, 2),
            "initial_c": In(f.normal(b, 2 * h)),
            "bias": f.normal(4 * h),
            "weight_ih_back": f.normal(4 * h, i) / 2,
            "weight_hh_back": f.normal(4 * h, h) / 2,
            "bias_back": f.normal(4 * h),
            "direction": "bidirectional",
            "output_sequence": sequence,
        }
        f.case("lstm", both, lstm, f"bidirectional {sequence}")


@family("reduction")
def reduction(f):
    floats = {
        "reduce_l1_norm": lambda x, **k: np.abs(x).sum(**k),
        "reduce_l2_norm": lambda x, **k: np.sqrt((x**2).sum(**k)),
        "reduce_log_sum": lambda x, **k: np.log(x.sum(**k)),
        "reduce_log_sum_exp": lambda x, **k: np.log(np.exp(x).sum(**k)),
        "reduce_max": np.max,
        "reduce_mean": np.mean,
        "reduce_min": np.min,
        "reduce_prod": np.prod,
        "reduce_sum": np.sum,
        "reduce_sum_square": lambda x, **k: (x**2).sum(**k),
    }
    x = np.abs(f.normal(2, 3, 4)) + 0.25
    whole = f.integers(-4, 5, 2, 3, 4)
    for op, compute in floats.items():

        def reduce(x, axes=None, keep_dims=False, compute=compute):
            axis = None if axes is None else tuple(int(a) for a in axes)
            return np.asarray(compute(x, axis=axis, keepdims=bool(keep_dims)))

        f.case(op, {"x": In(x)}, reduce, "all")
        for axes, keep in [([0], True), ([-1], False), ([0, 2], False), ([1, -1], True), ([0, 1, 2], True)]:
            params = {"x": In(x), "axes": np.array(axes), "keep_dims": keep}
            f.case(op, params, reduce, f"axes {axes} keep {keep}", half=keep)
        if op not in ("reduce_log_sum", "reduce_log_sum_exp", "reduce_l2_norm", "reduce_mean"):
            f.case(op, {"x": In(whole), "axes": np.array([1])}, reduce, "integers")
    f.case(
        "reduce_mean",
        {"x": In(f.integers(0, 9, 2, 3, 4)), "axes": np.array([1])},
        lambda x, axes: x.sum(1) // 3,
        "integers",
    )
    for op, compute in {"reduce_argmax": np.argmax, "reduce_argmin": np.argmin}.items():
        value = f.normal(2, 3, 4)
        f.case(op, {"x": In(value)}, lambda x, g=compute: g(x, -1), "last")
        for axis, keep in itertools.product([0, 1, -1], [True, False]):
            f.case(
                op,
                {"x": In(value), "axis": axis, "keep_dims": keep},
                lambda x, axis, keep_dims, g=compute: g(x, axis, keepdims=keep_dims),
                f"axis {axis} keep {keep}",
            )
        f.case(op, {"x": In(whole), "axis": 1}, lambda x, axis, g=compute: g(x, axis), "integers")
        f.case(
            op,
            {"x": In(value), "axis": 1, "output_dtype": "uint16"},
            lambda x, axis, output_dtype, g=compute: g(x, axis).astype(np.uint16),
            "uint16",
        )


@family("transformers")
def transformers(f):
    def attention(query, key, value, attn_mask=None):
        scores = query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) @ value

    q, k, v = f.normal(2, 3, 4, 8), f.normal(2, 3, 5, 8), f.normal(2, 3, 5, 6)
    base = {"query": In(q), "key": In(k), "value": In(v)}
    mask = f.integers(0, 2, 4, 5) > 0
    mask[:, 0] = True
    op = "scaled_dot_product_attention"
    f.case(op, base, attention, "no mask", opset="ios18")
    f.case(op, {**base, "attn_mask": In(f.normal(4, 5))}, attention, "added mask", opset="ios18")
    f.case(op, {**base, "attn_mask": In(mask)}, attention, "truth mask", opset="ios18")
    f.case(
        op,
        {"query": In(q[0]), "key": In(k[0]), "value": In(v[0]), "attn_mask": In(f.normal(3, 4, 5))},
        attention,
        "rank 3",
        opset="ios18",
    )


@family("states")
def states(f):
    x = np.array([1.0, -2.0, 0.5], np.float16)
    before = "tensor<fp16, [3]> before = read_state(input = total);"
    after = "tensor<fp16, [3]> sum = add(x = before, y = x);"
    state = "state<tensor<fp16, [3]>> total"
    read = "tensor<fp16, [3]> y = read_state(input = total);"
    given, wanted = [entry("x", x, "fp16")], [entry("y", x, "fp16")]
    write = "write_state(data = sum, input = total);"
    f.raw("write_state", f"{before} {after} {write} {read}", given, wanted, opset="ios18", states=state)
    f.raw("read_state", f"{before} tensor<fp16, [3]> y = add(x = before, y = x);", given, wanted, opset="ios18", states=state)
    update = "tensor<fp16, [3]> y = coreml_update_state(state = total, value = sum);"
    f.raw("coreml_update_state", f"{before} {after} {update}", given, wanted, opset="ios18", states=state)
