"""Golden cases of the operators whose path or shape depends on values: branches, loops, lists, places of elements."""

import numpy as np

from golden import entry, family


@family("loops")
def loops(f):
    add = "tensor<fp32, [2]> p = add(x = x, y = fp32(0x1p+0));"
    double = "tensor<fp32, [2]> q = mul(x = x, y = fp32(0x1p+1));"
    for sign in (1, -1):
        x = (sign * np.array([1.5, 0.25])).astype(np.float32)
        body = (
            "tensor<fp32, []> s = reduce_sum(axes = tensor<int32, [1]>([0]), keep_dims = bool(false), x = x); "
            "bool positive = greater(x = s, y = fp32(0x0p+0)); "
            f"tensor<fp32, [2]> y = cond(pred = positive) () {{ {add} }} -> (p) () {{ {double} }} -> (q);"
        )
        expected = x + 1 if x.sum() > 0 else x * 2
        f.raw("cond", body, [entry("x", x, "fp32")], [entry("y", expected, "fp32")], f"sum {x.sum()}")
    for start in (0, 3, 9):
        x = np.array([1.0, -0.5], np.float32)
        n = np.array([start], np.int32)
        body = (
            "tensor<int32, [1]> i, tensor<fp32, [2]> y = while_loop(loop_vars = (n, x)) "
            "(tensor<int32, [1]> a, tensor<fp32, [2]> b) { tensor<bool, [1]> more = less(x = a, y = tensor<int32, [1]>([5])); } -> (more) "
            "(tensor<int32, [1]> a, tensor<fp32, [2]> b) { tensor<int32, [1]> next = add(x = a, y = tensor<int32, [1]>([1])); "
            "tensor<fp32, [2]> grown = mul(x = b, y = fp32(0x1.8p+0)); } -> (next, grown);"
        )
        value, i = x.copy(), start
        while i < 5:
            value, i = value * np.float32(1.5), i + 1
        outputs = [entry("i", np.array([i], np.int32), "int32"), entry("y", value, "fp32")]
        f.raw("while_loop", body, [entry("n", n, "int32"), entry("x", x, "fp32")], outputs, f"from {start}")


@family("lists")
def lists(f):
    a, b = np.array([1.0, 3.0], np.float32), np.array([2.0, -4.0], np.float32)
    given = [entry("a", a, "fp32"), entry("b", b, "fp32")]
    kind = "list<tensor<fp32, [2]>, ?>"
    make = f'{kind} l0 = make_list(init_length = int32(1), dynamic_length = bool(true), elem_shape = (int32(2)), dtype = string("fp32"));'
    write = f"{kind} l1 = list_write(ls = l0, index = int32(0), value = a); {kind} l2 = list_write(ls = l1, index = int32(1), value = b);"
    read = "tensor<fp32, [2]> y = list_read(ls = l2, index = int32(1)); tensor<fp32, [2]> z = list_read(ls = l0, index = int32(0));"
    outputs = [entry("y", b, "fp32"), entry("z", np.zeros(2, np.float32), "fp32")]
    for op in ("make_list", "list_write", "list_read"):
        f.raw(op, f"{make} {write} {read}", given, outputs)
    gather = "tensor<fp32, [3, 2]> y = list_gather(ls = l2, indices = tensor<int32, [3]>([1, 0, 1]));"
    f.raw("list_gather", f"{make} {write} {gather}", given, [entry("y", np.stack([b, a, b]), "fp32")])
    scatter = (
        "tensor<fp32, [2, 2]> both = stack(axis = int32(0), values = (a, b)); "
        f"{kind} l3 = list_scatter(ls = l2, indices = tensor<int32, [2]>([1, 2]), value = both); "
        "tensor<fp32, [3, 2]> y = list_gather(ls = l3, indices = tensor<int32, [3]>([0, 1, 2]));"
    )
    f.raw("list_scatter", f"{make} {write} {scatter}", given, [entry("y", np.stack([a, a, b]), "fp32")])
    length = "int32 n = list_length(ls = l2); tensor<int32, [1]> y = expand_dims(axes = tensor<int32, [1]>([0]), x = n);"
    f.raw("list_length", f"{make} {write} {length}", given, [entry("y", np.array([2], np.int32), "int32")])



@family("classify")
def classify(f):
    classes = [7, -3, 1 << 40]
    written = f"list<int64, 3>([{', '.join(map(str, classes))}])"
    body = f"int64 label, dict<int64, fp64> p = classify(probabilities = x, classes = {written});"
    # Of equal probabilities the first counts.
    for values in ([0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.5, 0.5, 0.0]):
        x = np.array([values], np.float32)
        label = np.array(classes[int(x.argmax())], np.int64)
        outputs = [entry("label", label, "int64"), entry("p", x[0], "fp64")]
        f.raw("classify", body, [entry("x", x, "fp32")], outputs, f"class {label}")


@family("places")
def places(f):
    for count in (0, 2, 6):
        x = np.zeros(6, np.float32)
        x[np.random.default_rng(count).permutation(6)[:count]] = 1.5
        x = x.reshape(2, 3)
        # The number of places is known only when the model runs: their sum and one gathered value have a fixed shape.
        body = (
            "tensor<int32, [?, 2]> at = non_zero(x = x); "
            "tensor<int32, [2]> y = reduce_sum(axes = tensor<int32, [1]>([0]), keep_dims = bool(false), x = at);"
        )
        f.raw("non_zero", body, [entry("x", x, "fp32")], [entry("y", np.argwhere(x).sum(0).astype(np.int32), "int32")], f"{count} places")
