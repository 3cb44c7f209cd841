"""Writes golden cases: MIL text, inputs and the results numpy computes, one JSON file a family.

A case is one use of an operator. Floats are given in fp32 and, where asked for, in fp16 as well; expected values are computed
in float64 from the numbers as given.
"""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "golden"
NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bool": "bool",
    "int32": "int32",
    "int16": "int16",
    "uint16": "uint16",
    "int8": "int8",
    "uint8": "uint8",
    "uint32": "uint32",
}


class In:
    """A value the caller gives."""

    def __init__(self, value):
        self.value = np.asarray(value)
        if self.value.dtype == np.float64:
            self.value = self.value.astype(np.float32)
        if self.value.dtype == np.int64:
            self.value = self.value.astype(np.int32)


class Text:
    """A literal written as it stands, with the value it means."""

    def __init__(self, text, value=None):
        self.text, self.value = text, value


class Family:
    """The cases of one file."""

    def __init__(self, name, seed):
        self.name, self.cases, self.random = name, [], np.random.default_rng(seed)

    def normal(self, *shape):
        return self.random.standard_normal(shape).astype(np.float32)

    def uniform(self, low, high, *shape):
        return self.random.uniform(low, high, shape).astype(np.float32)

    def integers(self, low, high, *shape):
        return self.random.integers(low, high, shape).astype(np.int32)

    def case(self, op, params, compute, name="", opset="ios17", half=True, attributes=()):
        """Adds a use of `op`; `compute` takes the parameters' values by name and gives the result or a tuple of them."""
        kinds = [np.float32]
        floats = [p.value for p in params.values() if isinstance(p, In) and p.value.dtype == np.float32]
        if half and floats:
            kinds.append(np.float16)
        for kind in kinds:
            self.add(op, params, compute, name, opset, kind, attributes)

    def add(self, op, params, compute, name, opset, kind, attributes):
        given = {k: narrow(v, kind) for k, v in params.items()}
        with np.errstate(all="ignore"):
            values = {k: meaning(v) for k, v in given.items()}
            plain = isinstance(compute, np.ufunc)
            results = compute(*values.values()) if plain else compute(**values)
        results = results if isinstance(results, tuple) else (results,)
        results = [np.asarray(r) for r in results]
        types = [result_type(r, kind) for r in results]
        names = [f"out{i}" for i in range(len(results))] if len(results) > 1 else ["out"]
        left = ", ".join(f"{tensor(t, r.shape)} {n}" for t, r, n in zip(types, results, names))
        arguments, attrs = [], []
        for key in sorted(given):
            (attrs if key in attributes else arguments).append(f"{key} = {argument(key, given[key])}")
        tail = f"[{', '.join(attrs)}]" if attrs else ""
        body = f"{left} = {op}({', '.join(arguments)}){tail};"
        inputs = [entry(k, v.value, NAMES[str(v.value.dtype)]) for k, v in given.items() if isinstance(v, In)]
        for key, v in given.items():
            if isinstance(v, (list, tuple)):
                inputs += [
                    entry(f"{key}_{i}", e.value, NAMES[str(e.value.dtype)])
                    for i, e in enumerate(v)
                    if isinstance(e, In)
                ]
        outputs = [entry(n, r, t) for n, r, t in zip(names, results, types)]
        self.raw(op, body, inputs, outputs, name, opset)

    def raw(self, op, body, inputs, outputs, name="", opset="ios17", states=""):
        """Adds a program whose text stands for itself."""
        row = {"op": op, "name": name, "opset": opset, "body": body, "inputs": inputs, "outputs": outputs}
        if states:
            row["states"] = states
        self.cases.append(row)

    def write(self):
        rows = ",\n".join(json.dumps(c, separators=(",", ":")) for c in self.cases)
        (FOLDER / f"{self.name}.json").write_text(f"[\n{rows}\n]\n")


def narrow(value, kind):
    """`value` with its 32-bit floats as `kind`."""
    if isinstance(value, In):
        return In(value.value.astype(kind) if value.value.dtype == np.float32 else value.value)
    if isinstance(value, (list, tuple)):
        return [narrow(v, kind) for v in value]
    if isinstance(value, float):
        return np.array(value, kind)
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.astype(kind)
    return value


def meaning(value):
    """What `value` is to the computation: floats in float64."""
    if isinstance(value, (list, tuple)):
        return [meaning(v) for v in value]
    if isinstance(value, (In, Text)):
        value = value.value
    if isinstance(value, np.ndarray) and value.dtype in (np.float32, np.float16):
        return value.astype(np.float64)
    return value


def result_type(value, kind):
    if value.dtype == np.float64:
        return NAMES[str(np.dtype(kind))]
    if value.dtype == np.int64:
        return "int32"
    return NAMES[str(value.dtype)]


def tensor(dtype, shape):
    return f"tensor<{dtype}, [{', '.join(map(str, shape))}]>" if len(shape) else dtype


def number(value):
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        return repr(value) if np.isinf(value) or np.isnan(value) else value.hex()
    return str(int(value))


def nested(value):
    if value.ndim == 0:
        return number(value[()])
    return f"[{', '.join(nested(v) for v in value)}]"


def literal(value):
    if isinstance(value, Text):
        return value.text
    if isinstance(value, (bool, np.bool_)):
        return f"bool({number(value)})"
    if isinstance(value, int):
        return f"int32({value})"
    if isinstance(value, str):
        return f'string("{value}")'
    value = np.asarray(value)
    value = value.astype(np.int32) if value.dtype == np.int64 else value
    return f"{tensor(NAMES[str(value.dtype)], value.shape)}({nested(value)})"


def argument(name, value):
    if isinstance(value, In):
        return name
    if isinstance(value, (list, tuple)):
        return f"({', '.join(argument(f'{name}_{i}', v) for i, v in enumerate(value))})"
    return literal(value)


def shown(value, digits):
    value = float(value)
    if np.isnan(value) or np.isinf(value):
        return str(value)
    return float(f"{value:.{digits}g}")


def entry(name, value, dtype):
    value = np.asarray(value)
    if value.dtype in (np.float16, np.float32, np.float64):
        data = [shown(v, 6 if value.dtype == np.float16 else 9) for v in value.ravel()]
    else:
        data = [int(v) for v in value.ravel()]
    return {"name": name, "dtype": dtype, "shape": list(value.shape), "data": data}


FAMILIES = []


def family(name):
    """Registers a function that adds the cases of one family."""

    def register(build):
        def run():
            cases = Family(name, seed=sum(map(ord, name)))
            build(cases)
            cases.write()

        FAMILIES.append(run)
        return build

    return register


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def channels(p, rank):
    """A vector of channels so that it broadcasts over `[n, channels, ..]`."""
    return p.reshape((1, -1) + (1,) * (rank - 2))
