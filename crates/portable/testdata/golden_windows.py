"""Pooling and convolutions."""

import itertools

import numpy as np

from golden import In, channels, family


def windows(x, kernel, stride, before, after, out, fill):
    """Padded windows [n, c, *out, *kernel] and the mask of what is input, and of what is input or padding."""
    n = len(kernel)
    reach = [(out[i] - 1) * stride[i] + kernel[i] for i in range(n)]
    end = [max(reach[i] - before[i] - x.shape[2 + i], after[i]) for i in range(n)]
    width = [(0, 0), (0, 0)] + [(before[i], end[i]) for i in range(n)]
    mask = np.pad(np.ones(x.shape, bool), width)
    inside = np.pad(
        np.pad(np.ones(x.shape, bool), [(0, 0), (0, 0)] + list(zip(before, after)), constant_values=True),
        [(0, 0), (0, 0)] + [(0, max(end[i] - after[i], 0)) for i in range(n)],
    )
    padded = np.pad(x, width, constant_values=fill)
    result = []
    for a in (padded, mask, inside):
        view = np.lib.stride_tricks.sliding_window_view(a, kernel, axis=tuple(range(2, 2 + n)))
        index = (slice(None), slice(None)) + tuple(slice(0, out[i] * stride[i], stride[i]) for i in range(n))
        result.append(view[index])
    return result


def pool_geometry(spatial, kernel, stride, pad_type, pad, ceil_mode):
    n = len(kernel)
    before, after = [0] * n, [0] * n
    if pad_type == "custom":
        before, after = list(pad[::2]), list(pad[1::2])
    if pad_type in ("same", "same_lower"):
        for i in range(n):
            total = max((-(-spatial[i] // stride[i]) - 1) * stride[i] + kernel[i] - spatial[i], 0)
            small, large = total // 2, total - total // 2
            before[i], after[i] = (small, large) if pad_type == "same" else (large, small)
    out = []
    for i in range(n):
        room = spatial[i] + before[i] + after[i] - kernel[i]
        length = (room + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and before[i] + after[i] > 0 and (length - 1) * stride[i] >= spatial[i] + before[i]:
            length -= 1
        out.append(length)
    return before, after, out


def pool(kind, exclude=False):
    def compute(x, kernel_sizes, pad_type, strides=None, pad=None, ceil_mode=False, **_):
        kernel = [int(k) for k in kernel_sizes]
        stride = [1] * len(kernel) if strides is None else [int(s) for s in strides]
        before, after, out = pool_geometry(x.shape[2:], kernel, stride, pad_type, pad, ceil_mode)
        fill = -np.inf if kind == "max" else 0
        view, mask, inside = windows(x, kernel, stride, before, after, out, fill)
        axes = tuple(range(2 + len(kernel), 2 + 2 * len(kernel)))
        if kind == "max":
            return view.max(axes)
        if kind == "l2":
            return np.sqrt((view**2).sum(axes))
        return view.sum(axes) / (mask if exclude else inside).sum(axes)

    return compute


@family("pool")
def pooling(f):
    shapes = {1: (2, 2, 9), 2: (1, 2, 7, 6), 3: (1, 2, 5, 4, 6)}
    for rank, shape in shapes.items():
        x = f.normal(*shape)
        kernel, strides = np.array([3, 2, 2][:rank]), np.array([2, 2, 3][:rank])
        pads = [("valid", None), ("same", None), ("same_lower", None), ("custom", np.array([1, 0, 1, 1, 0, 1][: 2 * rank]))]
        ops = [("max_pool", "max"), ("avg_pool", "avg")] + ([("l2_pool", "l2")] if rank < 3 else [])
        for (op, kind), (pad_type, pad) in itertools.product(ops, pads):
            params = {"x": In(x), "kernel_sizes": kernel, "strides": strides, "pad_type": pad_type}
            if pad is not None:
                params["pad"] = pad
            f.case(op, params, pool(kind), f"{rank}-D {pad_type}")
            if kind == "avg":
                params["exclude_padding_from_average"] = True
                f.case(op, params, pool(kind, exclude=True), f"{rank}-D {pad_type} without padding", half=False)
        if rank < 3:
            for (op, kind), pad in itertools.product(ops, [0, 1]):
                params = {
                    "x": In(x),
                    "kernel_sizes": np.array([3, 3][:rank]),
                    "strides": np.array([4, 2][:rank]),
                    "pad_type": "custom",
                    "pad": np.array([pad] * (2 * rank)),
                    "ceil_mode": True,
                }
                f.case(op, params, pool(kind), f"{rank}-D ceiling, pad {pad}")
    f.case(
        "max_pool",
        {"x": In(f.normal(1, 1, 5)), "kernel_sizes": np.array([2]), "pad_type": "valid"},
        pool("max"),
        "default strides",
    )


def convolve(x, weight, bias, stride, dilation, before, after, groups):
    n = weight.ndim - 2
    spread = np.zeros(
        weight.shape[:2] + tuple((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation)), weight.dtype
    )
    spread[(slice(None), slice(None)) + tuple(slice(None, None, d) for d in dilation)] = weight
    x = np.pad(x, [(0, 0), (0, 0)] + list(zip(before, after)))
    view = np.lib.stride_tricks.sliding_window_view(x, spread.shape[2:], axis=tuple(range(2, 2 + n)))
    view = view[(slice(None), slice(None)) + tuple(slice(None, None, s) for s in stride)]
    per_in, per_out = x.shape[1] // groups, weight.shape[0] // groups
    letters = "xyz"[:n]
    parts = [
        np.einsum(
            f"bc{letters.upper()}{letters},oc{letters}->bo{letters.upper()}",
            view[:, g * per_in : (g + 1) * per_in],
            spread[g * per_out : (g + 1) * per_out],
        )
        for g in range(groups)
    ]
    y = np.concatenate(parts, axis=1)
    return y if bias is None else y + channels(bias, y.ndim)


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    n = weight.ndim - 2
    stride = [1] * n if strides is None else [int(s) for s in strides]
    dilation = [1] * n if dilations is None else [int(d) for d in dilations]
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation)]
    before, after, _ = pool_geometry(x.shape[2:], reach, stride, pad_type, pad, False)
    return convolve(x, weight, bias, stride, dilation, before, after, groups)


def conv_transpose(
    x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1, output_shape=None
):
    n = weight.ndim - 2
    stride = [1] * n if strides is None else [int(s) for s in strides]
    dilation = [1] * n if dilations is None else [int(d) for d in dilations]
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation)]
    spatial = x.shape[2:]
    full = [(spatial[i] - 1) * stride[i] + reach[i] for i in range(n)]
    out = list(full)
    before = [0] * n
    if pad_type == "custom" and pad is not None:
        before = [int(p) for p in pad[::2]]
        out = [full[i] - int(pad[2 * i]) - int(pad[2 * i + 1]) for i in range(n)]
    if pad_type == "same":
        out = [spatial[i] * stride[i] for i in range(n)]
    if output_shape is not None:
        out = [int(v) for v in output_shape[2:]]
    if pad_type == "same":
        before = [max(full[i] - out[i], 0) // 2 for i in range(n)]
    c_out = weight.shape[1] * groups
    room = [max(full[i], before[i] + out[i]) for i in range(n)]
    y = np.zeros((x.shape[0], c_out, *room))
    per_in, per_out = x.shape[1] // groups, weight.shape[1]
    for place in np.ndindex(*spatial):
        for cell in np.ndindex(*weight.shape[2:]):
            at = tuple(place[i] * stride[i] + cell[i] * dilation[i] for i in range(n))
            for g in range(groups):
                value = x[(slice(None), slice(g * per_in, (g + 1) * per_in)) + place]
                w = weight[(slice(g * per_in, (g + 1) * per_in), slice(None)) + cell]
                y[(slice(None), slice(g * per_out, (g + 1) * per_out)) + at] += value @ w
    y = y[(slice(None), slice(None)) + tuple(slice(before[i], before[i] + out[i]) for i in range(n))]
    return y if bias is None else y + channels(bias, y.ndim)


@family("conv")
def convolutions(f):
    shapes = {1: (2, 4, 8), 2: (1, 4, 5, 4), 3: (1, 4, 4, 3, 3)}
    for rank, shape in shapes.items():
        kernel = (3, 2, 2)[:rank]
        x = f.normal(*shape)
        pads = [("valid", None), ("same", None), ("same_lower", None), ("custom", np.array([1, 2, 0, 1, 1, 0][: 2 * rank]))]
        for groups, (pad_type, pad) in itertools.product([1, 2, 4], pads):
            params = {
                "x": In(x),
                "weight": f.normal(4, 4 // groups, *kernel),
                "bias": f.normal(4),
                "strides": np.array([2, 1, 2][:rank]),
                "dilations": np.array([1, 2, 1][:rank]),
                "pad_type": pad_type,
                "groups": groups,
            }
            if pad is not None:
                params["pad"] = pad
            f.case("conv", params, conv, f"{rank}-D {pad_type} in {groups} groups", half=groups == 1)
        f.case(
            "conv",
            {"x": In(x), "weight": In(f.normal(3, 4, *kernel)), "pad_type": "valid"},
            conv,
            f"{rank}-D computed weight",
        )
        f.case(
            "conv",
            {"x": In(x), "weight": f.normal(3, 4, *(1,) * rank), "bias": f.normal(3), "pad_type": "valid"},
            conv,
            f"{rank}-D pointwise",
        )
        for groups, bias in [(1, True), (2, False)]:
            base = {
                "x": In(x[..., :4]),
                "weight": f.normal(4, 2, *kernel),
                "strides": np.array([2, 1, 2][:rank]),
                "dilations": np.array([1, 2, 1][:rank]),
                "groups": groups,
            }
            if bias:
                base["bias"] = f.normal(2 * groups)
            f.case("conv_transpose", {**base, "pad_type": "valid"}, conv_transpose, f"{rank}-D valid")
            custom = {**base, "pad_type": "custom", "pad": np.array([1, 1, 0, 1, 1, 0][: 2 * rank])}
            f.case("conv_transpose", custom, conv_transpose, f"{rank}-D custom")
            f.case("conv_transpose", {**base, "pad_type": "same"}, conv_transpose, f"{rank}-D same")
            y = conv_transpose(**{k: getattr(v, "value", v) for k, v in custom.items()})
            larger = np.array(y.shape) + np.array([0, 0] + [1] + [0] * (rank - 1))
            f.case(
                "conv_transpose", {**custom, "output_shape": larger}, conv_transpose, f"{rank}-D output_shape", half=False
            )
    f.case(
        "conv_transpose",
        {"x": In(f.normal(1, 2, 4)), "weight": In(f.normal(2, 3, 2))},
        conv_transpose,
        "computed weight",
    )
    f.case(
        "conv_quantized",
        {
            "x": In(f.normal(1, 2, 5, 5)),
            "weight": f.integers(0, 256, 3, 2, 2, 2).astype(np.uint8),
            "quantization_type": "linear",
            "nbits": 8,
            "quant_scale": np.array([0.5, 0.25, 0.125], np.float32),
            "quant_bias": np.array([-32.0, 1.0, 0.0], np.float32),
        },
        lambda x, weight, quant_scale, quant_bias, **_: conv(
            x, weight * quant_scale.reshape(3, 1, 1, 1) + quant_bias.reshape(3, 1, 1, 1)
        ),
    )
