"""coremltools' own predict, off the Mac."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("coremltools")
import candle_coreml.coremltools  # noqa: E402
import coremltools as ct  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="coremltools has Core ML itself there")


def convert(program, **options):
    return ct.convert(program, convert_to="mlprogram", **options)


@mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))])
def SOFTMAX(x):
    return mb.softmax(x=x, axis=-1, name="y")


def test_predict_works_and_gives_float32():
    model = convert(SOFTMAX, minimum_deployment_target=ct.target.iOS16)
    y = model.predict({"x": np.array([[0, 0, 0, np.log(3)]], np.float32)})["y"]
    np.testing.assert_allclose(y, [[1 / 6, 1 / 6, 1 / 6, 1 / 2]], rtol=2e-3)
    assert y.dtype == np.float32
    batch = model.predict([{"x": np.zeros((1, 4))}, {"x": np.eye(4)[:1]}])
    assert [list(b) for b in batch] == [["y"], ["y"]]
    assert model.load_duration_in_nano_seconds > 0 and model.last_predict_duration_in_nano_seconds > 0


def test_compiled_models_and_assets_work():
    model = convert(SOFTMAX)
    compiled = ct.models.CompiledMLModel(model.get_compiled_model_path())
    given = {"x": np.zeros((1, 4), np.float32)}
    np.testing.assert_array_equal(compiled.predict(given)["y"], model.predict(given)["y"])
    asset = ct.models.model.MLModelAsset.from_memory(spec_data=model.get_spec().SerializeToString())
    from_asset = ct.models.CompiledMLModel.from_asset(asset=asset)
    np.testing.assert_array_equal(from_asset.predict(given)["y"], model.predict(given)["y"])


def test_states_work():
    @mb.program(
        input_specs=[mb.TensorSpec((2,), dtype=types.fp16), mb.StateTensorSpec((2,), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x, total):
        new = mb.add(x=mb.read_state(input=total), y=x)
        return mb.identity(x=mb.coreml_update_state(state=total, value=new), name="y")

    model = convert(program, minimum_deployment_target=ct.target.iOS18)
    state = model.make_state()
    state.write_state("total", np.array([1.0, 2.0]))
    assert model.predict({"x": np.ones(2)}, state)["y"].tolist() == [2.0, 3.0]
    assert state.read_state("total").tolist() == [2.0, 3.0]


def test_functions_of_one_package_are_loaded_by_name(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(2,))], opset_version=ct.target.iOS18)
    def plus(x):
        return mb.add(x=x, y=1.0, name="y")

    @mb.program(input_specs=[mb.TensorSpec(shape=(2,))], opset_version=ct.target.iOS18)
    def minus(x):
        return mb.sub(x=x, y=1.0, name="y")

    parts = ct.utils.MultiFunctionDescriptor()
    for name, program in (("plus", plus), ("minus", minus)):
        path = str(tmp_path / f"{name}.mlpackage")
        convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True).save(path)
        parts.add_function(path, "main", name)
    parts.default_function_name = "plus"
    whole = str(tmp_path / "both.mlpackage")
    ct.utils.save_multifunction(parts, whole)
    for name, expected in (("plus", [2.0, 2.0]), ("minus", [0.0, 0.0])):
        model = ct.models.MLModel(whole, function_name=name)
        assert model.predict({"x": np.ones(2)})["y"].tolist() == expected


def test_images_and_classifiers_work():
    image = pytest.importorskip("PIL.Image")

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 4, 4))])
    def program(x):
        return mb.softmax(x=mb.reduce_mean(x=x, axes=[2, 3]), axis=-1, name="p")

    model = convert(
        program,
        inputs=[ct.ImageType(name="x", shape=(1, 3, 4, 4), scale=1 / 255)],
        classifier_config=ct.ClassifierConfig(["red", "green", "blue"]),
    )
    for colour, at in (("red", 0), ("green", 1), ("blue", 2)):
        pixel = tuple(255 if n == at else 0 for n in range(3))
        outputs = model.predict({"x": image.new("RGB", (4, 4), pixel)})
        assert outputs["classLabel"] == colour
        (probabilities,) = [v for v in outputs.values() if isinstance(v, dict)]
        assert max(probabilities, key=probabilities.get) == colour


def test_failures_are_those_that_callers_of_coremltools_expect():
    model = convert(SOFTMAX)
    with pytest.raises(RuntimeError, match="Unable to compute the prediction using ML Program.*allowed: \\[1, 4\\]"):
        model.predict({"x": np.zeros((2, 4))})


@pytest.mark.parametrize("order", ["candle_coreml.coremltools, coremltools", "coremltools, candle_coreml.coremltools"])
def test_the_order_of_imports_does_not_matter(order):
    program = f"""
import {order}
from coremltools.models.utils import _is_macos, _macos_version
from coremltools._deps import _IS_MACOS
from coremltools.models.model import _MLModelProxy
assert _is_macos() and _IS_MACOS and _macos_version() >= (15, 0) and _MLModelProxy is not None
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_numerics_are_a_choice():
    with pytest.raises(ValueError, match="allowed"):
        candle_coreml.coremltools.configure(numerics="exact")

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))])
    def program(x):
        return mb.sub(x=mb.add(x=x, y=2048.0), y=2048.0, name="y")

    given = {"x": np.array([0.25], np.float32)}
    results = {}
    for numerics in ("default", "faithful"):
        candle_coreml.coremltools.configure(numerics=numerics)
        results[numerics] = convert(program).predict(given)["y"].item()
    # float16 has no 2048.25.
    assert results == {"default": 0.25, "faithful": 0.0}


def test_float16_inputs_and_outputs_are_rounded_when_results_are():
    @mb.program(input_specs=[mb.TensorSpec(shape=(1,), dtype=types.fp16)], opset_version=ct.target.iOS16)
    def program(x):
        return mb.mul(x=x, y=np.float16(2.0), name="y")

    given = {"x": np.array([0.1], np.float32)}
    results = {}
    for numerics in ("default", "faithful"):
        candle_coreml.coremltools.configure(numerics=numerics)
        model = convert(program, minimum_deployment_target=ct.target.iOS16, outputs=[ct.TensorType("y", dtype=np.float16)])
        results[numerics] = model.predict(given)["y"].item()
    assert results == {"default": np.float32(0.1) * 2, "faithful": np.float16(0.1) * 2}
