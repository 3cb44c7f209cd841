"""Models made by coremltools, run by the module itself."""

import gc
import os
import pathlib
import threading

import numpy as np
import pytest

import candle_coreml

ct = pytest.importorskip("coremltools")
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402


def save(program, folder, **options):
    options = {"convert_to": "mlprogram", "skip_model_load": True, **options}
    path = str(folder / "model.mlpackage")
    ct.convert(program, **options).save(path)
    return path


@pytest.fixture(scope="module")
def scale(tmp_path_factory):
    """y = 2 * x + 1, float32 [2, 3]."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 3))])
    def program(x):
        return mb.add(x=mb.mul(x=x, y=2.0), y=1.0, name="y")

    return save(program, tmp_path_factory.mktemp("scale"), compute_precision=ct.precision.FLOAT32)


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    """Adds x to a state and gives it: float16 [3]."""

    @mb.program(
        input_specs=[mb.TensorSpec((3,), dtype=types.fp16), mb.StateTensorSpec((3,), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x, total):
        new = mb.add(x=mb.read_state(input=total), y=x)
        return mb.identity(x=mb.coreml_update_state(state=total, value=new), name="y")

    return save(program, tmp_path_factory.mktemp("counter"), minimum_deployment_target=ct.target.iOS18)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_model_says_what_it_takes_and_gives(scale):
    model = candle_coreml.Model(scale)
    (x,), (y,) = model.inputs, model.outputs
    assert (x.name, x.kind, x.dtype, x.shape, x.optional) == ("x", "multiarray", "float32", (2, 3), False)
    assert (y.name, y.dtype) == ("y", "float32")
    assert model.functions == ["main"] and model.function == "main"
    assert model.engine == "portable" and model.states == []
    assert model.specification_version == 6
    assert repr(model) == "Model(main(x) -> y)"
    assert "com.github.apple.coremltools.version" in model.metadata


@pytest.mark.parametrize(
    "given",
    [
        X,
        X.astype(np.float64),
        X.astype(np.float16),
        X.astype(np.int64),
        X.astype(np.uint8),
        X.astype(np.int8),
        X.astype(">f4"),
        np.asfortranarray(X),
        np.repeat(X, 2, axis=1)[:, ::2],
        X.tolist(),
    ],
    ids=lambda g: f"{type(g).__name__} {getattr(g, 'dtype', '')} {getattr(g, 'strides', '')}",
)
def test_arrays_of_every_kind_are_taken(scale, given):
    y = candle_coreml.Model(scale).predict({"x": given})["y"]
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, 2 * X + 1)


def test_outputs_outlive_the_model_and_can_be_written_to(scale):
    y = candle_coreml.Model(scale).predict({"x": X})["y"]
    gc.collect()
    y += 1
    np.testing.assert_array_equal(y, 2 * X + 2)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({}, 'function "main" was not given: "x" (a tensor fp32 [2, 3])'),
        ({"z": X}, 'function "main" has no input "z"'),
        ({"x": X[0]}, 'input "x": shape [3] is not allowed; allowed: [2, 3]'),
        ({"x": "text"}, 'input "x"'),
        ({"x": np.array(["a"])}, 'input "x": an array of <U1 was given'),
    ],
)
def test_wrong_inputs_are_told_what_is_allowed(scale, inputs, words):
    with pytest.raises(candle_coreml.Error) as error:
        candle_coreml.Model(scale).predict(inputs)
    assert words in str(error.value)


def test_models_that_are_none_and_choices_that_are_none_are_refused(scale, tmp_path):
    with pytest.raises(candle_coreml.Error, match="nothing.mlpackage"):
        candle_coreml.Model(str(tmp_path / "nothing.mlpackage"))
    with pytest.raises(candle_coreml.Error, match='no function "prefill"'):
        candle_coreml.Model(scale, "prefill")
    with pytest.raises(ValueError, match='allowed: "default", "faithful", "fast"'):
        candle_coreml.Model(scale, numerics="exact")


def test_a_state_remembers_and_is_read_written_forked_and_reset(counter):
    model = candle_coreml.Model(pathlib.Path(counter))
    assert [s.name for s in model.states] == ["total"]
    one, state = np.ones(3, np.float16), model.make_state()
    with pytest.raises(candle_coreml.Error, match="keeps state"):
        model.predict({"x": one})
    for n in (1, 2):
        assert model.predict({"x": one}, state)["y"].tolist() == [n] * 3
    fork = state.fork()
    state.write("total", [10, 20, 30])
    assert model.predict({"x": one}, state)["y"].tolist() == [11, 21, 31]
    assert fork.read("total").tolist() == [2] * 3 and fork.read("total").dtype == np.float16
    state.reset()
    assert state.read("total").tolist() == [0] * 3
    with pytest.raises(candle_coreml.Error, match='no state "other"; the states are: "total"'):
        state.read("other")


def test_threads_predict_at_once_and_share_a_state_in_turns(counter):
    model, one = candle_coreml.Model(counter), np.ones(3, np.float16)
    state = model.make_state()
    threads = [
        threading.Thread(target=lambda: [model.predict({"x": one}, state) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.read("total").tolist() == [200] * 3


def test_a_model_in_memory_is_the_model_on_disk(scale):
    files = {}
    for folder, _, names in os.walk(scale):
        for name in names:
            path = os.path.join(folder, name)
            files[os.path.relpath(path, scale).replace(os.sep, "/")] = open(path, "rb").read()
    model = candle_coreml.Model.from_memory(files, "")
    np.testing.assert_array_equal(model.predict({"x": X})["y"], 2 * X + 1)


def test_a_compiled_model_is_the_model(scale, tmp_path):
    target = tmp_path / "model.mlmodelc"
    candle_coreml.compile_model(scale, target)
    assert "func main<ios15>" in (target / "model.mil").read_text()
    np.testing.assert_array_equal(candle_coreml.Model(target).predict({"x": X})["y"], 2 * X + 1)


def test_wide_models_take_and_give_float16_values_as_they_are(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(2,), dtype=types.fp16)], opset_version=ct.target.iOS16)
    def program(x):
        return mb.mul(x=x, y=np.float16(3.0), name="y")

    path = save(
        program,
        tmp_path,
        compute_precision=ct.precision.FLOAT16,
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS16,
    )
    x = np.array([0.1, 2048.25], np.float32)
    narrow, wide = candle_coreml.Model(path), candle_coreml.Model(path, wide=True)
    assert narrow.inputs[0].dtype == narrow.outputs[0].dtype == "float16"
    assert wide.inputs[0].dtype == wide.outputs[0].dtype == "float32"
    given = narrow.predict({"x": x})["y"]
    assert given.dtype == np.float16
    np.testing.assert_array_equal(given, (x.astype(np.float16).astype(np.float32) * 3).astype(np.float16))
    given = wide.predict({"x": x})["y"]
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, x * np.float32(3.0))


def test_a_small_model_loads_in_a_moment(scale):
    import time

    times = []
    for _ in range(20):
        started = time.perf_counter()
        candle_coreml.Model(scale).predict({"x": X})
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005, f"{min(times) * 1e3:.2f} ms to load and predict once"
