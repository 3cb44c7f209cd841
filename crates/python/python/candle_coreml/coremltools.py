"""Puts this engine under coremltools: ``predict``, ``make_state``, ``CompiledMLModel`` and the rest work on any machine.

    import candle_coreml.coremltools
    import coremltools as ct

    ct.models.MLModel("model.mlpackage").predict({"x": x})

It may be imported before coremltools or after it. coremltools reaches Core ML through one compiled module,
``coremltools.libcoremlpython``, which its wheels have for macOS alone; this module takes its place, with the same
behaviour: arrays of any number type are taken for an input, float16 outputs come as float32, pictures as RGBA. coremltools
is then told that the system has Core ML, as macOS 15 has it.

``configure`` chooses numerics and threads for the models that are loaded afterwards; so do the environment variables
``CANDLE_COREML_NUMERICS`` and ``CANDLE_COREML_THREADS``.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
import types

import numpy as np

from . import _native

__all__ = ["configure"]

#: The macOS whose Core ML does what this engine does: states, functions, and programs of iOS 18.
_MACOS = (15, 5)
#: Specification version of iOS 26, the newest that coremltools writes.
_NEWEST_SPECIFICATION = 10

_choices = {
    "numerics": os.environ.get("CANDLE_COREML_NUMERICS", "faithful"),
    "threads": int(os.environ.get("CANDLE_COREML_THREADS", "0")),
}


def configure(*, numerics=None, threads=None):
    """Chooses how models that are loaded from now on compute.

    numerics: "faithful" (every result is rounded to the type that is written in the program: what coremltools is used
    for is to see what a converted model does), "default" (fp16 programs are computed in 32 bits, which is faster) or "fast".
    threads: 0 for as many as there are processors.
    """
    if numerics is not None:
        if numerics not in ("default", "faithful", "fast"):
            raise ValueError(f'numerics {numerics!r}; allowed: "default", "faithful", "fast"')
        _choices["numerics"] = numerics
    if threads is not None:
        _choices["threads"] = int(threads)


_COMPUTE_UNITS = {
    "ALL": "all",
    "CPU_ONLY": "cpu_only",
    "CPU_AND_GPU": "cpu_and_gpu",
    "CPU_AND_NE": "cpu_and_ne",
}


def _given(feature, value):
    """A value in the form in which the model takes it: Core ML casts numbers, and takes images in several modes."""
    if feature.kind == "multiarray":
        if isinstance(value, (str, bytes, dict)) or hasattr(value, "mode"):
            raise RuntimeError(f"input {feature.name!r} is a multi-array; {type(value).__name__} was given")
        array = np.asarray(value)
        if array.dtype != feature.dtype:
            with np.errstate(over="ignore"):
                array = array.astype(feature.dtype)
        if array.ndim == 0 and feature.shape == (1,):
            array = array.reshape(1)
        return array
    if feature.kind == "image" and hasattr(value, "convert"):
        if feature.color in ("rgb", "bgr") and value.mode != "RGB":
            return value.convert("RGB")
        if feature.color == "grayscale" and value.mode != "L":
            return value.convert("L")
        return value
    if feature.kind in ("int64", "double") and isinstance(value, np.ndarray):
        return value.item()
    if feature.kind in ("int64", "double") and isinstance(value, np.generic):
        return value.item()
    return value


def _received(value):
    """A value in the form in which coremltools hands it out."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == np.float16 else value
    if hasattr(value, "convert") and value.mode == "RGB":
        return value.convert("RGBA")
    return value


class _State:
    def __init__(self, state):
        self._state = state

    def read_state(self, name):
        return _received(self._state.read(name))

    def write_state(self, name, value):
        feature = next((f for f in self._state.features if f.name == name), None)
        value = np.asarray(value)
        if feature is not None and value.dtype != feature.dtype:
            value = value.astype(feature.dtype)
        self._state.write(name, value)


class _MLModelAssetProxy:
    """A model whose files are in memory, or at a path."""

    def __init__(self, path=None, files=None):
        self.path = path
        self.files = files


class _MLComputePlanProxy:
    """Compute plans are CoreML.framework's own."""


class _MLCPUComputeDeviceProxy:
    """The processor, the only device there is here."""


class _MLGPUComputeDeviceProxy:
    """Never made: the engine runs on the processor."""


class _MLNeuralEngineComputeDeviceProxy:
    """Never made: the engine runs on the processor."""


class _MLModelProxy:
    def __init__(self, path, compute_units="ALL", function="", optimization_hints=None, asset=None):
        started = time.perf_counter_ns()
        if compute_units not in _COMPUTE_UNITS:
            raise RuntimeError(f"compute units {compute_units!r}; allowed: {', '.join(_COMPUTE_UNITS)}")
        if asset is not None and asset.path is not None:
            path = asset.path
        self._path = path
        self._function = function or None
        self._asset = asset
        self._compiled = None
        self._predicted = None
        choices = {"numerics": _choices["numerics"], "threads": _choices["threads"]}
        # coremltools sees float16 as float32 anyway: only where rounding is asked for is it rounded.
        choices["wide"] = _choices["numerics"] != "faithful"
        if asset is not None and asset.files is not None:
            self._model = _native.Model.from_memory(asset.files, "model.mlmodel", self._function, **choices)
        else:
            units = _COMPUTE_UNITS[compute_units]
            self._model = _native.Model(path, self._function, compute_units=units, engine="portable", **choices)
        self._inputs = {feature.name: feature for feature in self._model.inputs}
        if self._path and os.path.isfile(self._path):
            # coremltools deletes a temporary file as soon as it is loaded, and may ask for the compiled model later.
            with open(self._path, "rb") as file:
                self._asset = _MLModelAssetProxy(files={"model.mlmodel": file.read()})
        self._loaded = time.perf_counter_ns() - started

    def predict(self, data, state=None):
        started = time.perf_counter_ns()
        # Core ML asks for the inputs it has; what else is given is left alone.
        given = {name: _given(self._inputs[name], value) for name, value in data.items() if name in self._inputs}
        try:
            outputs = self._model.predict(given, None if state is None else state._state)
        except _native.Error as error:
            # Core ML's words come first: programs look for them.
            raise RuntimeError(f"Unable to compute the prediction using ML Program. {error}") from error
        self._predicted = time.perf_counter_ns() - started
        return {name: _received(value) for name, value in outputs.items()}

    def batchPredict(self, batch):
        return [self.predict(data) for data in batch]

    def newState(self):
        return _State(self._model.make_state())

    def get_compiled_model_path(self):
        if self._path and self._path.rstrip("/").endswith(".mlmodelc"):
            return self._path
        if self._compiled is None:
            path = self._path
            if self._asset is not None and self._asset.files is not None:
                folder = _temporary()
                path = os.path.join(folder, "model.mlmodel")
                for name, content in self._asset.files.items():
                    target = os.path.join(folder, name)
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as file:
                        file.write(content)
            self._compiled = _MLModelProxy.compileModel(path)
        return self._compiled

    def get_load_duration_in_nano_seconds(self):
        return self._loaded

    def get_last_predict_duration_in_nano_seconds(self):
        return self._predicted

    @staticmethod
    def compileModel(path):
        name = os.path.splitext(os.path.basename(path.rstrip("/")))[0]
        target = os.path.join(_temporary(), f"{name}.mlmodelc")
        _native.compile_model(path, target)
        return target

    @staticmethod
    def maximum_supported_specification_version():
        return _NEWEST_SPECIFICATION

    @staticmethod
    def auto_set_specification_version(specification):
        return specification

    @staticmethod
    def create_model_asset_from_path(path):
        return _asset(_MLModelAssetProxy(path=path))

    @staticmethod
    def create_model_asset_from_memory(specification, blobs):
        files = {"model.mlmodel": bytes(specification)}
        for name, content in blobs.items():
            files[name] = bytes(content)
        return _asset(_MLModelAssetProxy(files=files))

    @staticmethod
    def get_available_compute_devices():
        return _MLModelProxy.get_all_compute_devices()

    @staticmethod
    def get_all_compute_devices():
        from coremltools.models.compute_device import MLCPUComputeDevice

        return [MLCPUComputeDevice(_MLCPUComputeDeviceProxy())]

    @staticmethod
    def get_compute_plan(path, compute_units):
        raise RuntimeError("compute plans are CoreML.framework's own; here every operation runs on the CPU")

    @staticmethod
    def get_model_structure(path):
        raise RuntimeError("model structures are CoreML.framework's own; MLModel.get_spec() has the program")


def _asset(proxy):
    from coremltools.models.model import MLModelAsset

    return MLModelAsset(proxy)


def _temporary():
    """A folder that is gone when Python ends."""
    folder = tempfile.mkdtemp(prefix="candle-coreml-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _bridge():
    """The module in the place of coremltools' compiled one."""
    module = types.ModuleType("coremltools.libcoremlpython", "Core ML by candle-coreml.")
    parts = (
        _MLModelProxy,
        _State,
        _MLModelAssetProxy,
        _MLComputePlanProxy,
        _MLCPUComputeDeviceProxy,
        _MLGPUComputeDeviceProxy,
        _MLNeuralEngineComputeDeviceProxy,
    )
    for part in parts:
        setattr(module, part.__name__, part)
    return module, parts


def _install():
    if sys.platform == "darwin":
        # coremltools has the real thing there.
        return
    module, parts = _bridge()
    sys.modules[module.__name__] = module
    import coremltools
    from coremltools import _deps
    from coremltools.models import utils

    coremltools.libcoremlpython = module
    # Modules hold these two functions by name, so they are changed in place.
    macos = _MACOS
    utils._is_macos.__code__ = (lambda: True).__code__
    utils._macos_version.__wrapped__.__code__ = _answer(macos)
    utils._macos_version.cache_clear()
    _deps._MACOS_VERSION = _deps.MACOS_VERSION = macos
    # Modules that were loaded before hold what they found then.
    for name, loaded in list(sys.modules.items()):
        if name.partition(".")[0] != "coremltools" or loaded is None or loaded is module:
            continue
        names = vars(loaded)
        if "_IS_MACOS" in names:
            loaded._IS_MACOS = True
        for part in parts:
            if part.__name__ in names and names[part.__name__] is None:
                setattr(loaded, part.__name__, part)


def _answer(version):
    """The code of a function that gives `version` and needs nothing around it."""
    return eval(f"lambda: {tuple(version)!r}").__code__


_install()
