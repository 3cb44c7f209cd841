"""Compressed constants, and values quantised while the model runs."""

import numpy as np

from golden import In, Text, family, nested, tensor


def stored(dtype, value):
    """A literal of a type numpy does not have."""
    value = np.asarray(value)
    return Text(f"{tensor(dtype, value.shape)}({nested(value)})", value)


@family("quantization_ops")
def quantization(f):
    x = f.normal(2, 3, 4) * 9

    def spread(p, axis, rank):
        return p if np.ndim(p) == 0 else p.reshape([-1 if i == axis % rank else 1 for i in range(rank)])

    def quantize(input, scale, output_dtype, zero_point=0, axis=0):
        low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
        q = np.round(input / spread(scale, axis, input.ndim)) + spread(np.asarray(zero_point, np.float64), axis, input.ndim)
        return np.clip(q, low, high).astype(output_dtype)

    def dequantize(input, scale, zero_point=0, axis=0):
        zero = spread(np.asarray(zero_point, np.float64), axis, input.ndim)
        return (input - zero) * spread(scale, axis, input.ndim)

    scales = np.array([0.5, 0.25, 2.0], np.float32)
    for dtype in ("int8", "uint8"):
        zeros = np.array([3, 7, 0], dtype)
        f.case("quantize", {"input": In(x), "scale": 0.125, "output_dtype": dtype}, quantize, f"{dtype} scalar")
        f.case(
            "quantize",
            {"input": In(x), "scale": 0.25, "zero_point": np.array(5, dtype), "output_dtype": dtype},
            quantize,
            f"{dtype} scalar zero point",
        )
        f.case(
            "quantize",
            {"input": In(x), "scale": scales, "zero_point": zeros, "axis": -2, "output_dtype": dtype},
            quantize,
            f"{dtype} vector",
        )
        q = In(f.integers(0, 100, 2, 3, 4).astype(dtype))
        f.case("dequantize", {"input": q, "scale": np.float32(0.5)}, dequantize, f"{dtype} scalar")
        f.case(
            "dequantize",
            {"input": q, "scale": scales, "zero_point": zeros, "axis": 1},
            dequantize,
            f"{dtype} vector",
        )


@family("constexpr_ops")
def constexpr(f):
    q = f.integers(-8, 8, 4, 6).astype(np.int8)
    scale, zero = f.uniform(0.5, 2, 4), f.integers(-3, 3, 4).astype(np.int8)

    def affine(quantized_data, scale, zero_point, axis):
        return (quantized_data.astype(np.float64) - zero_point.reshape(4, 1)) * scale.reshape(4, 1)

    params = {"quantized_data": q, "scale": scale, "zero_point": zero, "axis": 0}
    f.case("constexpr_affine_dequantize", params, affine, opset="ios16", attributes=tuple(params))

    table = f.normal(4)
    indices = f.integers(0, 4, 3, 8).astype(np.uint8)
    packed = sum(indices.reshape(-1, 4)[:, i].astype(np.int32) << (2 * i) for i in range(4)).astype(np.uint8)
    params = {
        "indices": packed,
        "lut": table,
        "shape": Text("tensor<uint32, [2]>([3, 8])", None),
    }
    f.case(
        "constexpr_lut_to_dense",
        params,
        lambda lut, at=indices, **_: lut[at],
        "packed bits",
        opset="ios16",
        attributes=tuple(params),
    )
    tables = f.normal(1, 2, 16, 1)
    places = f.integers(0, 16, 4, 6)
    f.case(
        "constexpr_lut_to_dense",
        {"indices": stored("uint4", places), "lut": tables},
        lambda indices, lut: np.stack([lut[0, c // 3, indices[:, c], 0] for c in range(6)], axis=1),
        "a table for each group of columns",
        opset="ios18",
    )
    vectors = f.normal(1, 1, 4, 2)
    places = f.integers(0, 4, 3, 5)
    f.case(
        "constexpr_lut_to_dense",
        {"indices": stored("uint2", places), "lut": vectors, "vector_axis": 0},
        lambda indices, lut, vector_axis: np.moveaxis(lut[0, 0][indices], -1, 1).reshape(6, 5),
        "vectors",
        opset="ios18",
    )
    data = f.integers(-8, 8, 4, 6)
    f.case(
        "constexpr_blockwise_shift_scale",
        {"data": stored("int4", data), "scale": f.uniform(0.5, 2, 4, 2)},
        lambda data, scale: data * np.repeat(scale, 3, axis=1),
        "int4 in blocks",
        opset="ios18",
    )
    data = f.integers(0, 256, 4, 6).astype(np.uint8)
    f.case(
        "constexpr_blockwise_shift_scale",
        {
            "data": data,
            "scale": f.uniform(0.5, 2, 4, 1),
            "offset": f.integers(0, 256, 4, 1).astype(np.uint8),
        },
        lambda data, scale, offset: (data.astype(np.float64) - offset) * scale,
        "uint8 with offsets",
        opset="ios18",
    )
    source = f.normal(5).astype(np.float16)
    f.case(
        "constexpr_cast",
        {"source_val": source, "output_dtype": "fp32"},
        lambda source_val, output_dtype: source_val,
        opset="ios16",
        attributes=("source_val", "output_dtype"),
    )
    mask = f.integers(0, 2, 3, 8)
    values = f.normal(int(mask.sum()))

    def dense(mask, values):
        y = np.zeros(mask.shape)
        y[mask != 0] = values
        return y

    bits = np.packbits(mask.astype(bool).ravel(), bitorder="little")
    params = {"mask": bits, "nonzero_data": values, "shape": Text("tensor<uint32, [2]>([3, 8])")}
    f.case(
        "constexpr_sparse_to_dense",
        params,
        lambda nonzero_data, mask=None, shape=None, at=mask: dense(at, nonzero_data),
        "packed mask",
        opset="ios16",
        attributes=tuple(params),
    )
    f.case(
        "constexpr_sparse_to_dense",
        {"mask": stored("uint1", mask), "nonzero_data": values},
        lambda mask, nonzero_data: dense(mask, nonzero_data),
        "mask of bits",
        opset="ios18",
    )
    sparse_chains(f, mask, dense)


def sparse_chains(f, mask, dense):
    """The two operators that give sparse values, followed by the one that spreads them."""
    count = int(mask.sum())
    at = stored("uint1", mask)
    shape = tensor("fp32", mask.shape)
    pair = f"{tensor('uint1', mask.shape)} m, {tensor('fp32', (count,))} v"
    spread = f"{shape} y = constexpr_sparse_to_dense(mask = m, nonzero_data = v);"

    def chain(op, arguments, expected):
        body = f"{pair} = {op}({arguments}); {spread}"
        output = {"name": "y", "dtype": "fp32", "shape": list(mask.shape), "data": [float(v) for v in expected.ravel()]}
        f.raw(op, body, [], [output], opset="ios18")

    indices = f.integers(0, 4, count)
    table = f.normal(1, 1, 4, 1)
    chain(
        "constexpr_lut_to_sparse",
        f"indices_mask = {at.text}, indices_nonzero_data = {stored('uint2', indices).text}, "
        f"lut = {stored('fp32', table).text}",
        dense(mask, table[0, 0, indices, 0]),
    )
    data = f.integers(-8, 8, count)
    scale = f.uniform(0.5, 2, 3, 1)
    chain(
        "constexpr_sparse_blockwise_shift_scale",
        f"data_mask = {at.text}, nonzero_data = {stored('int4', data).text}, scale = {stored('fp32', scale).text}",
        dense(mask, data) * scale,
    )
    joint_chains(f, mask, dense)


def joint_chains(f, mask, dense):
    """Vectors at the set bits of a mask; tables that are quantized; entries of a table that are scaled afterwards."""
    count = int(mask.sum())
    rows, columns = mask.shape
    wide = np.repeat(mask, 2, axis=0)
    vectors, indices = f.normal(1, 1, 4, 2), f.integers(0, 4, count)
    places = np.zeros(mask.shape, int)
    places[mask != 0] = indices
    full = np.moveaxis(vectors[0, 0][places], -1, 1).reshape(2 * rows, columns) * wide
    pair = f"{tensor('uint1', wide.shape)} m, {tensor('fp32', (2 * count,))} v"
    body = (
        f"{pair} = constexpr_lut_to_sparse(indices_mask = {stored('uint1', mask).text}, "
        f"indices_nonzero_data = {stored('uint2', indices).text}, lut = {stored('fp32', vectors).text}, "
        f"vector_axis = {stored('int32', np.array(0)).text}); "
        f"{tensor('fp32', wide.shape)} y = constexpr_sparse_to_dense(mask = m, nonzero_data = v);"
    )
    f.raw("constexpr_lut_to_sparse", body, [], [whole(full)], "vectors", "ios18")
    table, scale = f.integers(-8, 8, 1, 1, 4, 1), f.uniform(0.5, 2, 1, 1, 1, 1)
    indices = f.integers(0, 4, 3, 8)
    body = (
        f"{tensor('fp32', table.shape)} t = constexpr_blockwise_shift_scale(data = {stored('int4', table).text}, "
        f"scale = {stored('fp32', scale).text}); "
        f"{tensor('fp32', indices.shape)} y = constexpr_lut_to_dense(indices = {stored('uint2', indices).text}, lut = t);"
    )
    expected = (table * scale)[0, 0, indices, 0]
    f.raw("constexpr_lut_to_dense", body, [], [whole(expected)], "a quantized table", "ios18")
    scale, offset = f.uniform(0.5, 2, 3, 2), f.integers(-8, 8, 3, 2)
    body = (
        f"{tensor('int8', indices.shape)} d = constexpr_lut_to_dense(indices = {stored('uint2', indices).text}, "
        f"lut = {stored('int8', table).text}); "
        f"{tensor('fp32', indices.shape)} y = constexpr_blockwise_shift_scale(data = d, "
        f"scale = {stored('fp32', scale).text}, offset = {stored('int8', offset).text});"
    )
    spread = np.repeat(scale, 4, axis=1), np.repeat(offset, 4, axis=1)
    expected = (table[0, 0, indices, 0] - spread[1]) * spread[0]
    f.raw("constexpr_blockwise_shift_scale", body, [], [whole(expected)], "entries of a table", "ios18")


def whole(values):
    """The output `y` with these values."""
    return {"name": "y", "dtype": "fp32", "shape": list(values.shape), "data": [float(v) for v in values.ravel()]}
