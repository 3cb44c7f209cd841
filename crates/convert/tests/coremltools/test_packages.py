"""What is written here opens in coremltools 9 and means the same there.

    cargo build -p candle-coreml-cli
    python -m pytest crates/convert/tests/coremltools

Needs coremltools 9 and pytest. CANDLE_COREML names the command; without it that of target/release or target/debug is used.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

ct = pytest.importorskip("coremltools")
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.frontend.milproto import load as milproto  # noqa: E402
from coremltools.optimize import coreml as cto  # noqa: E402

ROOT = Path(__file__).resolve().parents[4]
DATA = ROOT / "crates/convert/testdata"
FORMS = [
    "--palettize 1", "--palettize 2 --group 4", "--palettize 3", "--palettize 4 --group 8", "--palettize 6 --group 16",
    "--palettize 8", "--palettize 4 --vector 2", "--palettize 6 --group 8 --vector 4", "--quantize 8", "--quantize 4",
    "--quantize 4 --block 16", "--prune 0.4", "--prune 0.4 --palettize 4", "--prune 0.4 --quantize 8", "--prune 0.4 --quantize 4",
    "--prune 0.4 --palettize 6 --int8-tables", "--palettize 4 --int8-tables",
]
# The portable engine has no int8 tables of dense weights: coremltools alone reads them.
NOT_RUN_HERE = {"--palettize 4 --int8-tables"}


def command():
    named = os.environ.get("CANDLE_COREML")
    built = [ROOT / "target" / kind / "candle-coreml" for kind in ("release", "debug")]
    for path in [Path(named)] if named else built:
        if path.exists():
            return path
    pytest.skip("candle-coreml is not built")


def run(*words):
    done = subprocess.run([command(), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(package, tmp_path):
    """Opens, passes the loader of MIL programs, and is the same after it was saved again."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    program = milproto.load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    assert sum(len(f.operations) for f in program.functions.values()) > 0
    again = tmp_path / f"again-{package.name}"
    model.save(str(again))
    saved = ct.models.MLModel(str(again), skip_model_load=True)
    assert saved.get_spec().SerializeToString(deterministic=True) == spec.SerializeToString(deterministic=True)
    one, two = (Path(m.weights_dir) / "weight.bin" for m in (model, saved))
    assert one.exists() == two.exists()
    assert not one.exists() or one.read_bytes() == two.read_bytes()
    run("inspect", again)
    return program


def packages(folder):
    found = sorted(folder.glob("*.mlpackage"))
    assert found
    return found


CHECKPOINTS = sorted(p.parent.name for p in DATA.glob("*/golden.safetensors"))
ENCODERS = ["bert", "roberta"]
DECODERS = [name for name in CHECKPOINTS if name not in ENCODERS]
LAYOUTS = ["--layout anemll --chunks 2 --batch 8", "--layout anemll --batch 8 --argmax", "--layout stateful"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DECODERS)
def test_language_models_open(name, layout, tmp_path):
    run("convert", DATA / name, tmp_path / "out", "--context", "32", *layout.split())
    for package in packages(tmp_path / "out"):
        check(package, tmp_path)


@pytest.mark.parametrize("size", ["", "--tokens 16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_open(name, size, tmp_path):
    run("convert", DATA / name, tmp_path / "out", *size.split())
    for package in packages(tmp_path / "out"):
        check(package, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_compressed_language_models_open(form, tmp_path):
    layout = ["--context", "32", "--batch", "8", "--embeddings", "int8"]
    run("convert", DATA / "llama3", tmp_path / "out", *layout, *form.split())
    for package in packages(tmp_path / "out"):
        program = check(package, tmp_path)
        ops = {op.op_type for f in program.functions.values() for op in f.operations}
        assert any(op.startswith("constexpr") for op in ops)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A package made by coremltools: y = x W, W [64, 48]."""
    weight = np.random.default_rng(3).standard_normal((64, 48)).astype(np.float16)

    @mb.program(input_specs=[mb.TensorSpec(shape=(48, 48))], opset_version=ct.target.iOS18)
    def program(x):
        return mb.linear(x=x, weight=weight.astype(np.float32), name="y")

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT16)
    path = tmp_path_factory.mktemp("dense") / "dense.mlpackage"
    model.save(str(path))
    return path, weight


@pytest.mark.parametrize("form", FORMS)
def test_coremltools_decompresses_to_what_is_read_here(form, dense, tmp_path):
    path, weight = dense
    package = tmp_path / "small.mlpackage"
    run("compress", path, package, "--least", "1", *form.split())
    check(package, tmp_path)
    model = ct.models.MLModel(str(package), skip_model_load=True)
    theirs = [w.val for w in cto.get_weights_metadata(cto.decompress_weights(model), weight_threshold=1).values()]
    theirs = next(w for w in theirs if w.shape == weight.shape).astype(np.float32)
    np.save(tmp_path / "x.npy", np.eye(48, dtype=np.float32))
    if form not in NOT_RUN_HERE:
        run("predict", package, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "y.npz")
        ours = np.load(tmp_path / "y.npz")["y"].astype(np.float32).T
        np.testing.assert_array_equal(ours, theirs)
    off = np.abs(theirs - weight.astype(np.float32)).mean()
    assert off < {"1": 0.7, "2": 0.4}.get(form.split()[1], 0.36)
