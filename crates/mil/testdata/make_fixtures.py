"""Makes the packages in this folder: tiny models, every weight from one seed. Needs coremltools 9 and numpy.

    python make_fixtures.py

The compiled forms (`*.mlmodelc`) are written by hand in the form Apple's compiler uses.
"""

import json
import shutil
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.program import get_new_symbol
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobStorageWriter

HERE = Path(__file__).parent
rng = np.random.default_rng(7)


def weights(*shape, dtype=np.float16):
    return rng.standard_normal(shape).astype(dtype)


def save(model, name):
    path = HERE / f"{name}.mlpackage"
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))
    # Identifiers are random; fixed ones keep the files the same from run to run.
    manifest = json.loads((path / "Manifest.json").read_text())
    entries = sorted(manifest["itemInfoEntries"].items(), key=lambda e: e[1]["path"])
    ids = {old: f"00000000-0000-0000-0000-{i:012}" for i, (old, _) in enumerate(entries)}
    manifest["itemInfoEntries"] = {ids[old]: entry for old, entry in entries}
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")
    spec_path = path / "Data/com.apple.CoreML/model.mlmodel"
    spec = ct.utils.load_spec(str(spec_path))
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    spec_path.write_bytes(spec.SerializeToString(deterministic=True))


def convert(program, target, **options):
    options.setdefault("compute_precision", ct.precision.FLOAT32)
    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True, **options
    )
    model.author = "candle-coreml"
    model.short_description = "a fixture"
    model.license = "MIT OR Apache-2.0"
    return model


def control_flow():
    """while_loop and cond, iOS 16."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(16,)), mb.TensorSpec(shape=(1,), dtype=types.fp32)],
        opset_version=ct.target.iOS16,
    )
    def program(x, limit):
        w = mb.const(val=weights(16, dtype=np.float32))

        def go(i, a):
            return mb.less(x=i, y=np.float32(3.0))

        def step(i, a):
            big = mb.greater(x=mb.reduce_sum(x=a, axes=[0]), y=limit)
            flag = mb.squeeze(x=big, axes=[0])
            a = mb.cond(pred=flag, _true_fn=lambda: mb.mul(x=a, y=w), _false_fn=lambda: mb.add(x=a, y=w))
            return mb.add(x=i, y=np.float32(1.0)), a

        return mb.while_loop(_cond=go, _body=step, loop_vars=(np.float32(0.0), x))

    return convert(program, ct.target.iOS16)


def stateful():
    """A state, constants of several types in the weight file, iOS 18."""

    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 8), dtype=types.fp16),
            mb.StateTensorSpec(shape=(1, 16), dtype=types.fp16),
        ],
        opset_version=ct.target.iOS18,
    )
    def program(x, cache):
        nibbles = rng.integers(0, 16, size=(16, 8)).astype(types.np_uint4_dtype)
        w = mb.constexpr_lut_to_dense(indices=nibbles, lut=weights(1, 1, 16, 1))
        scaled = rng.integers(-8, 8, size=(16, 16)).astype(types.np_int4_dtype)
        v = mb.constexpr_blockwise_shift_scale(data=scaled, scale=weights(16, 1))
        y = mb.linear(x=x, weight=w)
        old = mb.read_state(input=cache)
        new = mb.coreml_update_state(state=cache, value=mb.add(x=old, y=y))
        return mb.linear(x=new, weight=v, name="y")

    return convert(program, ct.target.iOS18, compute_precision=ct.precision.FLOAT16)


def flexible():
    """A range of sizes, iOS 17."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(get_new_symbol("n"), 3))],
        opset_version=ct.target.iOS17,
    )
    def program(x):
        return mb.softmax(x=mb.mul(x=x, y=np.float32(0.1)), axis=-1, name="y")

    shape = ct.Shape((ct.RangeDim(1, 8, default=2), 3))
    return convert(program, ct.target.iOS17, inputs=[ct.TensorType(name="x", shape=shape)])


def every_dtype():
    """A compiled model whose weight file coremltools' own writer made: each weight stands in the text as well."""
    folder = HERE / "every_dtype.mlmodelc"
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    path = folder / "weights/weight.bin"
    path.unlink(missing_ok=True)
    writer = BlobStorageWriter(str(path))
    lines = []
    for name in ["int4", "int8", "int16", "int32", "uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "uint16", "uint32"]:
        bits = int(name.lstrip("uint"))
        low, high = (0, 2**bits) if name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        values = rng.integers(low, high, size=13)
        width = max(8, bits)
        offset = getattr(writer, f"write_{name}_data")(values.astype(f"{name.rstrip('0123456789')}{width}"))
        lines.append((name, offset, ", ".join(map(str, values))))
    floats = weights(13, dtype=np.float32)
    lines.append(("fp32", writer.write_float_data(floats), ", ".join(hexfloat(x) for x in floats)))
    halves = weights(13)
    lines.append(("fp16", writer.write_fp16_data(halves.view(np.uint16)), ", ".join(hexfloat(x) for x in halves)))
    text = 'program(1.3)\n[buildInfo = dict<string, string>({{"coremlc-version", "3600.25.1"}})]\n{\n'
    text += "    func main<ios18>() {\n"
    for name, offset, values in lines:
        ty = f"tensor<{name}, [13]>"
        blob = f'BLOBFILE(path = string("@model_path/weights/weight.bin"), offset = uint64({offset}))'
        text += f"            {ty} file_{name} = const()[val = {ty}({blob})];\n"
        text += f"            {ty} text_{name} = const()[val = {ty}([{values}])];\n"
    text += "        } -> (file_fp16);\n}"
    (folder / "model.mil").write_text(text)


def hexfloat(x):
    """As C's %a without trailing zeros."""
    mantissa, exponent = float(x).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"


if __name__ == "__main__":
    save(control_flow(), "control_flow")
    save(stateful(), "stateful")
    save(flexible(), "flexible")
    every_dtype()
