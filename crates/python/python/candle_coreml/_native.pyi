"""Types of the compiled module."""

import os
from collections.abc import Mapping
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

__version__: str

class Error(RuntimeError):
    """What went wrong with a model, an input or a state: where, what was found, what is allowed."""

@final
class Feature:
    """An input, output or state of a model."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def kind(
        self,
    ) -> Literal["multiarray", "image", "int64", "double", "string", "dictionary", "sequence", "state"]: ...
    @property
    def dtype(self) -> str | None:
        """Element type as numpy names it; None for what is no array."""
    @property
    def shape(self) -> tuple[int, ...] | None:
        """The default shape of a multi-array or state; (height, width) of an image."""
    @property
    def enumerated_shapes(self) -> list[tuple[int, ...]] | None: ...
    @property
    def shape_ranges(self) -> list[tuple[int, int | None]] | None: ...
    @property
    def color(self) -> Literal["grayscale", "grayscale_float16", "rgb", "bgr"] | None: ...
    @property
    def optional(self) -> bool: ...
    @property
    def default_value(self) -> float | None: ...

@final
class State:
    """What a model keeps between predictions, made by `Model.make_state()`."""

    @property
    def features(self) -> list[Feature]: ...
    @property
    def names(self) -> list[str]: ...
    def read(self, name: str) -> npt.NDArray[Any]: ...
    def write(self, name: str, value: npt.ArrayLike) -> None: ...
    def reset(self) -> None: ...
    def fork(self) -> State: ...

@final
class Model:
    """A Core ML model ready to run one of its functions. It may be used by several threads at once."""

    def __new__(
        cls,
        path: str | os.PathLike[str],
        function: str | None = None,
        *,
        numerics: Literal["default", "faithful", "fast"] = "default",
        compute_units: Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"] = "all",
        engine: Literal["auto", "portable", "apple"] = "auto",
        threads: int = 0,
        wide: bool = False,
    ) -> Model: ...
    @staticmethod
    def from_memory(
        files: Mapping[str, bytes],
        root: str,
        function: str | None = None,
        *,
        numerics: Literal["default", "faithful", "fast"] = "default",
        threads: int = 0,
        wide: bool = False,
    ) -> Model: ...
    def predict(self, inputs: dict[str, Any], state: State | None = None) -> dict[str, Any]: ...
    def make_state(self) -> State: ...
    def with_function(self, name: str) -> Model: ...
    def explain(self) -> str: ...
    @property
    def inputs(self) -> list[Feature]: ...
    @property
    def outputs(self) -> list[Feature]: ...
    @property
    def states(self) -> list[Feature]: ...
    @property
    def function(self) -> str: ...
    @property
    def functions(self) -> list[str]: ...
    @property
    def engine(self) -> Literal["portable", "apple"]: ...
    @property
    def specification_version(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str]: ...

def compile_model(path: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Writes the model at `path` as a compiled one (`.mlmodelc`)."""
