"""Choosing, ordering, moving and filling."""

import itertools

import numpy as np

from golden import In, Text, family


@family("control_flow")
def control_flow(f):
    cond = f.integers(0, 2, 2, 1, 4) > 0
    f.case("select", {"cond": In(cond), "a": In(f.normal(3, 4)), "b": In(f.normal(2, 3, 1))}, lambda cond, a, b: np.where(cond, a, b))
    whole = f.integers(-9, 9, 2, 3, 4)
    f.case("select", {"cond": In(cond), "a": In(whole), "b": 7}, lambda cond, a, b: np.where(cond, a, b).astype(np.int32), "integers")
    f.case(
        "select",
        {"cond": True, "a": In(f.normal(3)), "b": In(f.normal(3))},
        lambda cond, a, b: a,
        "one choice for all",
    )


@family("random")
def random(f):
    """Draws that have one outcome; distributions are tested beside the operators."""
    shape = np.array([2, 3])
    f.case("random_normal", {"shape": shape, "mean": 2.5, "stddev": 0.0, "seed": 1}, lambda mean, **_: np.full((2, 3), mean))
    f.case("random_uniform", {"shape": shape, "low": 0.5, "high": 0.5, "seed": 1}, lambda low, **_: np.full((2, 3), low))
    for p in (0.0, 1.0):
        f.case("random_bernoulli", {"shape": shape, "prob": p, "seed": 1}, lambda prob, **_: np.full((2, 3), prob), str(p))
    f.case(
        "random_categorical",
        {"x": In(np.array([[0, 1, 0], [0, 0, 2]], np.float32)), "mode": "probs", "size": 4, "seed": 1},
        lambda x, **_: np.repeat(x.argmax(1, keepdims=True), 4, axis=1).astype(np.float64),
        "certain",
    )
    f.case(
        "random_categorical",
        {"x": In(np.array([[0, 800, 0], [900, 0, 0]], np.float32)), "seed": 1},
        lambda x, **_: x.argmax(1, keepdims=True).astype(np.float64),
        "certain logits",
    )


def combine(mode, old, new):
    return {
        "update": lambda: new,
        "add": lambda: old + new,
        "sub": lambda: old - new,
        "mul": lambda: old * new,
        "div": lambda: old / new,
        "max": lambda: max(old, new),
        "min": lambda: min(old, new),
    }[mode]()


@family("scatter_gather")
def scatter_gather(f):
    x = f.normal(2, 3, 4)
    whole = f.integers(-9, 9, 2, 3, 4)

    def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
        axis = axis % x.ndim
        if batch_dims == 0:
            return np.take(x, indices, axis)
        rows = [gather(x[n], indices[n], axis - 1, batch_dims - 1) for n in range(len(x))]
        return np.stack(rows)

    for axis in (0, 1, -1):
        indices = f.integers(-2, 2, 2, 3)
        f.case("gather", {"x": In(x), "indices": In(indices), "axis": axis}, gather, f"axis {axis}", opset="ios15")
    f.case("gather", {"x": In(x), "indices": In(np.array([1, 0, 1]))}, gather, "default axis")
    f.case("gather", {"x": In(x), "indices": 1, "axis": 1}, gather, "scalar index")
    f.case("gather", {"x": In(whole), "indices": In(np.array([1, 2])), "axis": 2}, gather, "integers")
    for axis in (1, 2):
        f.case(
            "gather",
            {"x": In(x), "indices": In(f.integers(0, 3, 2, 5)), "axis": axis, "batch_dims": 1, "validate_indices": True},
            gather,
            f"batches, axis {axis}",
        )
    f.case("gather", {"x": f.normal(9, 8), "indices": In(f.integers(0, 9, 2, 3))}, gather, "rows of a table", half=False)

    def along(x, indices, axis=0, validate_indices=False):
        return np.take_along_axis(x, indices, axis)

    for axis in (0, 1, -1):
        shape = list(x.shape)
        shape[axis] = 5
        indices = In(f.integers(-2, 2, *shape))
        f.case("gather_along_axis", {"x": In(x), "indices": indices, "axis": axis}, along, f"axis {axis}", opset="ios16")
        f.case("gather_along_axis", {"x": In(whole), "indices": indices, "axis": axis}, along, f"integers, axis {axis}", opset="ios16")
    f.case(
        "gather_along_axis",
        {"x": In(x), "indices": In(f.integers(0, 2, 1, 3, 4)), "validate_indices": True},
        along,
        "default axis",
    )

    def gather_nd(x, indices, batch_dims=0, validate_indices=False):
        lead = indices.shape[batch_dims:-1]
        out = []
        for b in np.ndindex(*x.shape[:batch_dims]):
            rows = [x[b][tuple(indices[b][k])] for k in np.ndindex(*lead)]
            out.append(np.reshape(rows, lead + x.shape[batch_dims + indices.shape[-1] :]))
        return np.reshape(out, indices.shape[:-1] + x.shape[batch_dims + indices.shape[-1] :])

    for depth in (1, 2, 3):
        f.case("gather_nd", {"x": In(x), "indices": In(f.integers(-2, 2, 4, depth))}, gather_nd, f"depth {depth}", opset="ios15")
    f.case("gather_nd", {"x": In(whole), "indices": In(f.integers(0, 2, 2, 2, 2))}, gather_nd, "integers")
    f.case(
        "gather_nd",
        {"x": In(x), "indices": In(f.integers(0, 3, 2, 5, 1)), "batch_dims": 1},
        gather_nd,
        "batches of slabs",
    )
    f.case(
        "gather_nd",
        {"x": In(x), "indices": In(f.integers(0, 3, 2, 2, 5, 2)), "batch_dims": 1, "validate_indices": True},
        gather_nd,
        "batches of elements",
    )

    def scatter(data, indices, updates, axis=0, mode="add", validate_indices=False):
        out = np.moveaxis(data.copy(), axis, 0)
        new = np.moveaxis(updates, axis, 0)
        for n, i in enumerate(indices):
            for place in np.ndindex(*out.shape[1:]):
                out[(i, *place)] = combine(mode, out[(i, *place)], new[(n, *place)])
        return np.moveaxis(out, 0, axis)

    def scatter_along(data, indices, updates, axis=0, mode="add", validate_indices=False):
        out = data.copy()
        for place in np.ndindex(*indices.shape):
            to = list(place)
            to[axis] = indices[place]
            out[tuple(to)] = combine(mode, out[tuple(to)], updates[place])
        return out

    def scatter_nd(data, indices, updates, mode="add", validate_indices=False):
        out = data.copy()
        for k in np.ndindex(*indices.shape[:-1]):
            at = tuple(indices[k])
            for place in np.ndindex(*out[at].shape):
                out[at + place] = combine(mode, out[at + place], updates[k + place])
        return out

    data = np.abs(x) + 0.5
    for mode, axis in itertools.product(["update", "add", "sub", "mul", "div", "max", "min"], [0, 1, -1]):
        size = data.shape[axis]
        shape = list(data.shape)
        shape[axis] = 2
        picks = f.random.permutation(size)[:2].astype(np.int32)
        updates = np.abs(f.normal(*shape)) + 0.5
        options = {"axis": axis, "mode": mode}
        name = f"{mode} axis {axis}"
        f.case("scatter", {"data": In(data), "indices": In(picks), "updates": In(updates), **options}, scatter, name)
        places = np.take(f.random.random(data.shape).argsort(axis), range(2), axis).astype(np.int32)
        f.case(
            "scatter_along_axis",
            {"data": In(data), "indices": In(places), "updates": In(updates), **options},
            scatter_along,
            name,
        )
    for mode in ("update", "add", "sub", "mul", "div", "max", "min"):
        for depth in (1, 2, 3):
            cells = np.array(list(np.ndindex(*data.shape[:depth])))
            cells = cells[f.random.permutation(len(cells))[:2]].astype(np.int32)
            updates = np.abs(f.normal(2, *data.shape[depth:])) + 0.5
            f.case(
                "scatter_nd",
                {"data": In(data), "indices": In(cells), "updates": In(updates), "mode": mode},
                scatter_nd,
                f"{mode} depth {depth}",
            )
    twice = {"data": In(whole), "indices": In(np.array([1, 1, -2])), "updates": In(f.integers(1, 9, 3, 3, 4))}
    f.case("scatter", twice, scatter, "integers, one index twice", opset="ios15")
    f.case("scatter", {**twice, "mode": "sub"}, scatter, "integers taken away", opset="ios15")
    f.case(
        "scatter_nd",
        {
            "data": In(whole),
            "indices": In(np.array([[0, 1], [0, 1]])),
            "updates": In(f.integers(1, 9, 2, 4)),
            "validate_indices": True,
        },
        scatter_nd,
        "integers, one place twice",
    )
    f.case(
        "scatter_along_axis",
        {"data": In(whole), "indices": In(np.zeros((2, 3, 4), np.int32)), "updates": In(whole), "axis": 1},
        scatter_along,
        "integers to one row",
    )


def suppress(boxes, scores, iou_threshold, max_boxes, score_threshold=-np.inf, per_class_suppression=False):
    n, _, k = scores.shape
    outs = np.zeros((n, max_boxes, 4)), np.zeros((n, max_boxes, k)), np.full((n, max_boxes), -1), np.zeros(n, np.int32)
    for b in range(n):
        best, kind = scores[b].max(1), scores[b].argmax(1)
        low, high = boxes[b, :, :2] - boxes[b, :, 2:] / 2, boxes[b, :, :2] + boxes[b, :, 2:] / 2
        kept = []
        for i in np.argsort(-best, kind="stable"):
            if best[i] <= score_threshold or len(kept) == max_boxes:
                continue
            free = True
            for j in kept:
                both = np.prod(np.maximum(np.minimum(high[i], high[j]) - np.maximum(low[i], low[j]), 0))
                union = np.prod(boxes[b, i, 2:]) + np.prod(boxes[b, j, 2:]) - both
                rival = not per_class_suppression or kind[i] == kind[j]
                free &= not (rival and union > 0 and both / union > iou_threshold)
            if free:
                kept.append(i)
        kept = kept or [int(best.argmax())]
        outs[0][b, : len(kept)], outs[1][b, : len(kept)] = boxes[b, kept], scores[b, kept]
        outs[2][b, : len(kept)], outs[3][b] = kept, len(kept)
    return outs


@family("tensor_operation")
def tensor_operation(f):
    x = f.normal(2, 3, 5)
    whole = f.integers(-3, 4, 2, 3, 5)

    def argsort(x, axis=-1, ascending=False):
        return np.argsort(x if ascending else -x, axis, kind="stable").astype(np.int32)

    for axis, ascending in itertools.product([0, 1, -1], [True, False]):
        options = {"axis": axis, "ascending": ascending}
        f.case("argsort", {"x": In(x), **options}, argsort, f"{axis} {ascending}")
        f.case("argsort", {"x": In(whole), **options}, argsort, f"integers with ties {axis} {ascending}")
    f.case("argsort", {"x": In(x)}, argsort, "defaults")

    def topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True, output_indices_dtype="int32"):
        order = argsort(x, axis, ascending)
        order = np.take(order, range(x.shape[axis] if k == -1 else k), axis)
        values = np.take_along_axis(x, order, axis)
        return (values, order.astype(output_indices_dtype)) if return_indices else values

    for axis, ascending in itertools.product([0, 1, -1], [True, False]):
        params = {"x": In(x), "k": 2, "axis": axis, "ascending": ascending}
        f.case("topk", params, topk, f"{axis} {ascending}", opset="ios15")
    f.case("topk", {"x": In(x)}, topk, "defaults", opset="ios15")
    f.case("topk", {"x": In(whole), "k": 3}, topk, "integers with ties")
    f.case("topk", {"x": In(x), "k": -1, "output_indices_dtype": "uint16"}, topk, "all, uint16")
    f.case("topk", {"x": In(x), "k": 2, "sort": True, "return_indices": False}, topk, "values alone", opset="ios16")
    f.case("topk", {"x": In(f.normal(2, 70)), "k": 3}, topk, "few of many")

    def band_part(x, lower=-1, upper=-1):
        m, n = np.indices(x.shape[-2:])
        return np.where(((lower < 0) | (m - n <= lower)) & ((upper < 0) | (n - m <= upper)), x, 0).astype(x.dtype)

    for lower, upper in [(0, -1), (-1, 0), (0, 0), (1, 2)]:
        f.case("band_part", {"x": In(x), "lower": lower, "upper": upper}, band_part, f"{lower} {upper}")
    f.case("band_part", {"x": In(whole), "lower": 1}, band_part, "integers")
    f.case("band_part", {"x": In(whole > 0), "upper": 1}, band_part, "truth")

    def cumsum(x, axis=0, exclusive=False, reverse=False):
        x = np.flip(x, axis) if reverse else x
        y = np.cumsum(x, axis) - (x if exclusive else 0)
        return (np.flip(y, axis) if reverse else y).astype(x.dtype)

    for axis, exclusive, reverse in itertools.product([0, 1, -1], [True, False], [True, False]):
        options = {"axis": axis, "exclusive": exclusive, "reverse": reverse}
        f.case("cumsum", {"x": In(x), **options}, cumsum, f"{axis} {exclusive} {reverse}")
    f.case("cumsum", {"x": In(whole)}, cumsum, "integers")

    def fill_like(ref_tensor, value=0.0):
        return np.full(ref_tensor.shape, value)

    f.case("fill_like", {"ref_tensor": In(x)}, lambda ref_tensor: np.zeros(x.shape, np.float32), "default", half=False)
    f.case("fill_like", {"ref_tensor": In(whole), "value": 2.5}, fill_like, "float like integers")
    f.case("fill_like", {"ref_tensor": In(x), "value": 7}, fill_like, "integer like floats")
    f.case("fill_like", {"ref_tensor": In(x), "value": True}, fill_like, "truth")

    def one_hot(indices, one_hot_vector_size, axis=-1, on_value=1, off_value=0):
        hit = np.moveaxis(indices[..., None] == np.arange(one_hot_vector_size), -1, axis)
        return np.where(hit, on_value, off_value)

    places = np.array([[0, 2, 3], [1, -1, 0]])
    for axis in (-1, 0, 1, 2, -2):
        f.case("one_hot", {"indices": In(places), "one_hot_vector_size": 4, "axis": axis}, one_hot, f"axis {axis}")
    f.case(
        "one_hot",
        {"indices": In(places), "one_hot_vector_size": 3, "on_value": 2.0, "off_value": 0.5},
        lambda **k: one_hot(**k).astype(np.float64),
        "floats",
    )
    f.case(
        "one_hot", {"indices": In(places), "one_hot_vector_size": 3, "on_value": True, "off_value": False}, one_hot, "truth"
    )
    boxes = np.concatenate([f.uniform(0, 6, 2, 9, 2), f.uniform(1, 4, 2, 9, 2)], axis=2)
    scores = f.normal(2, 9, 3)
    for iou, least, count, per_class in [
        (0.25, -9.0, 5, False),
        (0.25, -9.0, 9, True),
        (0.5, 0.75, 9, False),
        (0.25, 99.0, 3, False),
    ]:
        params = {"boxes": In(boxes), "scores": In(scores), "iou_threshold": iou, "max_boxes": count}
        params["per_class_suppression"] = per_class
        f.case(
            "non_maximum_suppression",
            {**params, "score_threshold": least},
            suppress,
            f"{iou} {least} {count} {per_class}",
            opset="ios15",
            half=False,
        )

        def turned(boxes, scores, **options):
            b, s, i, _ = suppress(boxes.swapaxes(1, 2), scores.swapaxes(1, 2), **options)
            return b.swapaxes(1, 2), s.swapaxes(1, 2), i

        params["boxes"], params["scores"] = In(boxes.swapaxes(1, 2)), In(scores.swapaxes(1, 2))
        f.case("non_maximum_suppression", params, turned, f"turned {iou} {count} {per_class}", half=False)
    joining(f, x, whole)


def joining(f, x, whole):
    """Operators of the family that join, repeat and describe."""

    def concat(values, axis, interleave=False):
        if not interleave:
            return np.concatenate(values, axis)
        y = np.stack(values, axis % values[0].ndim + 1)
        return y.reshape([s * len(values) if i == axis % values[0].ndim else s for i, s in enumerate(values[0].shape)])

    for axis in (0, 1, -1):
        f.case("concat", {"values": [In(x), In(x[:1] if axis == 0 else x)], "axis": axis}, concat, f"axis {axis}")
        f.case(
            "concat", {"values": [In(x), In(x * 2)], "axis": axis, "interleave": True}, concat, f"interleaved, axis {axis}"
        )
        f.case("stack", {"values": [In(x), In(x + 1)], "axis": axis}, lambda values, axis: np.stack(values, axis), f"axis {axis}")
    f.case("concat", {"values": [In(whole), In(whole)], "axis": 1}, concat, "integers")
    f.case(
        "fill", {"shape": np.array([2, 3]), "value": 1.5}, lambda shape, value: np.full([int(s) for s in shape], value)
    )
    f.case("fill", {"shape": np.array([2]), "value": 7}, lambda shape, value: np.full(2, value), "integers")
    for axis in (0, 1, 2, -1):
        f.case(
            "flatten2d",
            {"x": In(x), "axis": axis},
            lambda x, axis: x.reshape(int(np.prod(x.shape[:axis])), -1),
            f"axis {axis}",
        )
    f.case("identity", {"x": In(x)}, lambda x: x)
    pads = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    for mode, kind in pads.items():
        extra = {"constant_values": 2.5} if mode == "constant" else {}
        f.case(
            "pad",
            {"x": In(x), "pad": np.array([1, 2, 0, 3]), "mode": mode, "constant_val": 2.5},
            lambda x, pad, kind=kind, extra=extra, **_: np.pad(x, [(0, 0), (1, 2), (0, 3)], kind, **extra),
            mode,
        )
    f.case("range_1d", {"start": 2, "end": 11, "step": 3}, lambda start, end, step: np.arange(2, 11, 3), "integers")
    f.case("range_1d", {"start": 5, "end": -2, "step": -2}, lambda start, end, step: np.arange(5, -2, -2), "down")
    f.case("range_1d", {"start": 0.5, "end": 3.0, "step": 0.75}, lambda start, end, step: np.arange(0.5, 3.0, 0.75), "floats")
    f.case("shape", {"x": In(x)}, lambda x: np.array(x.shape))
    f.case("split", {"x": In(x), "num_splits": 3, "axis": 1}, lambda x, **_: tuple(np.split(x, 3, 1)), "equal")
    f.case(
        "split",
        {"x": In(x), "split_sizes": np.array([1, 4]), "axis": -1},
        lambda x, **_: tuple(np.split(x, [1], 2)),
        "sizes",
    )
    f.case("tile", {"x": In(x), "reps": np.array([2, 1, 3])}, lambda x, reps: np.tile(x, reps))
    f.case("tile", {"x": In(whole), "reps": np.array([1, 2, 1])}, lambda x, reps: np.tile(x, reps), "integers")


def slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask):
    index = []
    for b, e, s, bm, em, q in zip(begin, end, stride, begin_mask, end_mask, squeeze_mask):
        index.append(int(b) if q else slice(None if bm else int(b), None if em else int(e), int(s)))
    return tuple(index)


@family("tensor_transformation")
def tensor_transformation(f):
    x = f.normal(2, 3, 4)
    whole = f.integers(-9, 9, 2, 3, 4)
    f.case("expand_dims", {"x": In(x), "axes": np.array([0, -1])}, lambda x, axes: x[None, ..., None])
    f.case("expand_dims", {"x": In(x), "axes": np.array([1, 2])}, lambda x, axes: x[:, None, None], "middle")
    f.case("squeeze", {"x": In(x.reshape(1, 2, 1, 12))}, lambda x: x.reshape(2, 12), "all")
    f.case("squeeze", {"x": In(x.reshape(1, 2, 1, 12)), "axes": np.array([-2])}, lambda x, axes: x[:, :, 0], "one")
    f.case("squeeze", {"x": In(x.reshape(1, 2, 1, 12)), "axes": np.array([0, 1])}, lambda x, axes: x[0], "not of size 1")
    f.case("reshape", {"x": In(x), "shape": np.array([4, -1])}, lambda x, shape: x.reshape(4, 6), "left open")
    f.case("reshape", {"x": In(whole), "shape": np.array([0, 12, 1])}, lambda x, shape: x.reshape(2, 12, 1), "kept", opset="ios17")
    f.case("reshape", {"x": In(whole), "shape": np.array([0, 8])}, lambda x, shape: x.reshape(3, 8), "kept from the right")
    f.case(
        "reshape",
        {"x": In(whole[0]), "shape": np.array([1, 0, -1, 0])},
        lambda x, shape: x.reshape(1, 1, 3, 4),
        "kept where there is one",
    )
    f.case("transpose", {"x": In(x), "perm": np.array([2, 0, 1])}, lambda x, perm: x.transpose(2, 0, 1))
    f.case("transpose", {"x": In(whole), "perm": np.array([-1, -2, -3])}, lambda x, perm: x.transpose(2, 1, 0), "negative")
    f.case("reverse", {"x": In(x)}, lambda x: x[::-1, ::-1, ::-1], "all")
    f.case("reverse", {"x": In(whole), "axes": np.array([1, -1])}, lambda x, axes: x[:, ::-1, ::-1], "two")

    def by_index(x, begin, end, **masks):
        none = [False] * x.ndim
        stride = masks.get("stride", [1] * x.ndim)
        return x[slices(x, begin, end, stride, *(masks.get(m, none) for m in ("begin_mask", "end_mask", "squeeze_mask")))]

    table = [
        ({"begin": [0, 1, 1], "end": [2, 3, 3]}, "plain"),
        ({"begin": [0, 2, -1], "end": [2, 0, -4], "stride": [1, -1, -2]}, "backwards"),
        ({"begin": [0, 1, 9], "end": [9, 0, 0], "begin_mask": [True, False, True], "end_mask": [False, True, True]}, "masks"),
        ({"begin": [1, 0, -2], "end": [0, 2, 0], "squeeze_mask": [True, False, True]}, "squeezed"),
        ({"begin": [0, 0, 3], "end": [2, 3, 0], "stride": [1, 2, -1], "end_mask": [False, False, True]}, "to the start"),
    ]
    for params, name in table:
        f.case("slice_by_index", {"x": In(x), **{k: np.array(v) for k, v in params.items()}}, by_index, name)
    f.case(
        "slice_by_size",
        {"x": In(x), "begin": np.array([0, 1, 2]), "size": np.array([1, 2, -1])},
        lambda x, begin, size: x[0:1, 1:3, 2:],
    )

    def slice_update(x, update, begin, end, stride=(1, 1, 1)):
        y = x.copy()
        y[slices(x, begin, end, stride, *[[False] * 3] * 3)] = update
        return y

    f.case(
        "slice_update",
        {"x": In(x), "update": In(f.normal(1, 2, 4)), "begin": np.array([1, 1, 0]), "end": np.array([2, 3, 4])},
        slice_update,
        opset="ios18",
    )
    f.case(
        "slice_update",
        {
            "x": In(whole),
            "update": In(f.integers(0, 9, 2, 2, 2)),
            "begin": np.array([0, 0, 1]),
            "end": np.array([2, 3, 4]),
            "stride": np.array([1, 2, 2]),
        },
        slice_update,
        "integers, strided",
        opset="ios18",
    )
    blocks(f)

    def reverse_sequence(x, lengths, seq_axis, batch_axis=0):
        y = x.copy()
        for b, n in enumerate(lengths):
            part = np.moveaxis(y, [batch_axis, seq_axis], [0, 1])
            part[b, :n] = part[b, :n][::-1].copy()
        return y

    f.case(
        "reverse_sequence",
        {"x": In(x), "lengths": In(np.array([3, 1])), "seq_axis": 2, "batch_axis": 0},
        reverse_sequence,
    )
    f.case(
        "reverse_sequence",
        {"x": In(whole), "lengths": In(np.array([2, 0, 1])), "seq_axis": 0, "batch_axis": 1},
        reverse_sequence,
        "integers, sequence first",
    )

    def sliding_windows(x, axis, size, stride=1):
        axis = axis % x.ndim
        view = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis)
        return np.moveaxis(np.take(view, range(0, view.shape[axis], stride), axis), -1, axis + 1)

    for axis, size, stride in [(0, 2, 1), (1, 2, 1), (-1, 2, 2), (2, 3, 1)]:
        params = {"x": In(x), "axis": axis, "size": size, "stride": stride}
        f.case("sliding_windows", params, sliding_windows, f"{axis} {size} {stride}")
    f.case("sliding_windows", {"x": In(whole), "axis": 1, "size": 2}, sliding_windows, "integers")
    f.case(
        "reshape_like",
        {
            "x": In(f.normal(4, 15)),
            "ref_tensors": [In(f.normal(2, 2, 4)), In(whole[:, :1].reshape(8)[:5].reshape(1, 5)), In(f.normal(3))],
            "begins": [0, 1, -1],
            "ends": [2, 0, 1],
            "end_masks": [False, True, True],
        },
        lambda x, **_: x.reshape(2, 2, 5, 3),
        opset="ios16",
    )


def blocks(f):
    """Blocks of pixels to channels or batches and back."""
    x = f.normal(2, 8, 4, 6)

    def depth_to_space(x, block_size):
        n, c, h, w = x.shape
        b = block_size
        y = np.zeros((n, c // b**2, h * b, w * b))
        for i, j in np.ndindex(b, b):
            first = (i * b + j) * (c // b**2)
            y[:, :, i::b, j::b] = x[:, first : first + c // b**2]
        return y

    def space_to_depth(x, block_size):
        b = block_size
        return np.concatenate([x[:, :, i::b, j::b] for i in range(b) for j in range(b)], axis=1)

    def pixel_shuffle(x, upscale_factor):
        n, c, h, w = x.shape
        f = upscale_factor
        y = np.zeros((n, c // f**2, h * f, w * f))
        for i, j in np.ndindex(f, f):
            y[:, :, i::f, j::f] = x[:, i * f + j :: f**2]
        return y

    def pixel_unshuffle(x, downscale_factor):
        f = 2
        n, c, h, w = x.shape
        y = np.zeros((n, c * f**2, h // f, w // f))
        for i, j in np.ndindex(f, f):
            y[:, i * f + j :: f**2] = x[:, :, i::f, j::f]
        return y

    f.case("depth_to_space", {"x": In(x), "block_size": 2}, depth_to_space)
    f.case("space_to_depth", {"x": In(x), "block_size": 2}, space_to_depth)
    f.case("pixel_shuffle", {"x": In(x), "upscale_factor": 2}, pixel_shuffle)
    f.case("pixel_unshuffle", {"x": In(x), "downscale_factor": Text("uint32(2)")}, pixel_unshuffle, opset="ios16")

    def space_to_batch(x, block_shape, paddings):
        (a, b), pads = block_shape, paddings
        x = np.pad(x, [(0, 0), (0, 0), tuple(pads[0]), tuple(pads[1])])
        return np.concatenate([x[:, :, i::a, j::b] for i in range(a) for j in range(b)], axis=0)

    def batch_to_space(x, block_shape, crops):
        a, b = block_shape
        n, c, h, w = x.shape
        y = np.zeros((n // (a * b), c, h * a, w * b))
        for k, (i, j) in enumerate(np.ndindex(a, b)):
            y[:, :, i::a, j::b] = x[k * len(y) : (k + 1) * len(y)]
        (t, d), (l, r) = crops
        return y[:, :, t : h * a - d, l : w * b - r]

    f.case(
        "space_to_batch",
        {"x": In(x), "block_shape": np.array([2, 3]), "paddings": np.array([[1, 1], [0, 3]])},
        space_to_batch,
    )
    f.case(
        "batch_to_space",
        {"x": In(f.normal(12, 2, 3, 2)), "block_shape": np.array([2, 3]), "crops": np.array([[1, 0], [2, 1]])},
        batch_to_space,
    )
