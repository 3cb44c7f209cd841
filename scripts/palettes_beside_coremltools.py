"""Palettes of a package's weights beside those of coremltools' k-means: reconstruction error and time, the same weights.

    cargo build --release -p candle-coreml-cli
    python scripts/palettes_beside_coremltools.py MODEL.mlpackage [--bits 4] [--group 8] [--sample 7]

Compresses the whole package with `candle-coreml compress`, and a sample of its weights with what
`coremltools.optimize.coreml.palettize_weights` calls for each. Prints for each weight of the sample the root of the mean squared
error as a share of the weight's own root mean square, then the time of both, coremltools' scaled from the sample to all values.
Ends with 1 when an error here is larger. Needs coremltools 9 and scikit-learn; CANDLE_COREML names the command.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

logging.disable(logging.WARNING)  # what coremltools lacks off the Mac is of no use here

import coremltools as ct  # noqa: E402
import numpy as np
from coremltools.converters.mil.frontend.milproto import load as milproto
from coremltools.optimize.coreml._quantization_passes import palettize_weights

ROOT = Path(__file__).parent.parent
# Tables are 16-bit floats in both: centres may be rounded the other way.
ROUNDING = 1.0005


def command():
    named = os.environ.get("CANDLE_COREML")
    found = [Path(named)] if named else [ROOT / "target" / kind / "candle-coreml" for kind in ("release", "debug")]
    return next((p for p in found if p.exists()), None) or sys.exit("candle-coreml is not built")


def weights(package):
    """Weights of two or more dimensions by name, as the program's operators see them."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = milproto.load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    found = {}
    for op in (op for function in program.functions.values() for op in function.operations):
        name = op.outputs[0].name
        if name not in found and op.op_type == "const":
            found[name] = op.outputs[0].val
        elif name not in found and op.op_type.startswith("constexpr"):
            found[name] = op.materialized_val_inference()
    big = {n: v for n, v in found.items() if isinstance(v, np.ndarray) and v.ndim >= 2 and v.size >= 2048}
    return {n: v.astype(np.float32) for n, v in big.items() if v.dtype == np.float16}


def relative(made, weight):
    return float(np.sqrt(np.mean((made - weight) ** 2) / np.mean(weight**2)))


def theirs(weight, bits, group):
    """The weight as coremltools palettizes it."""
    sizes = [group] + [0] * (weight.ndim - 1)
    made = palettize_weights.blockwise_compress(weight, "KMEANS", bits, sizes)
    return np.asarray(palettize_weights.decompress(made), np.float32)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("--bits", type=int, default=4)
    words.add_argument("--group", type=int, default=8)
    words.add_argument("--sample", type=int, default=7)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.mlpackage"
        line = [command(), "compress", given.model, small, "--palettize", given.bits, "--group", given.group, "--json"]
        report = json.loads(subprocess.run([*map(str, line)], check=True, capture_output=True, text=True).stdout)
        ours = weights(small)
    values = report["packages"][0]["values"]
    kept = {k["weight"] for k in report["packages"][0]["kept"]}
    original = {n: w for n, w in weights(given.model).items() if n in ours and n not in kept and len(w) % given.group == 0}
    names = sorted(original)
    # Spread over the model, each kind of weight in turn.
    step = max(1, len(names) // given.sample) | 1
    sample = names[::step][: given.sample]
    seconds, counted, worse = 0.0, 0, []
    print(f"{'weight':48} {'shape':>18} {'here':>9} {'coremltools':>12}")
    for name in sample:
        weight = original[name]
        start = time.perf_counter()
        other = relative(theirs(weight, given.bits, given.group), weight)
        seconds += time.perf_counter() - start
        counted += weight.size
        here = relative(ours[name], weight)
        print(f"{name[:48]:48} {'x'.join(map(str, weight.shape)):>18} {here:9.5f} {other:12.5f}", flush=True)
        if here > other * ROUNDING:
            worse.append(name)
    whole = seconds * values / counted
    print(f"{values} values: {report['seconds']:.1f} s here; coremltools {seconds:.1f} s for {counted}, {whole:.0f} s for all at that pace")
    if worse or not sample:
        sys.exit(f"larger errors here: {', '.join(worse)}" if worse else "no weight to compare")


if __name__ == "__main__":
    main()
