"""Core ML models on any machine.

    model = candle_coreml.Model("model.mlpackage")
    outputs = model.predict({"x": x})

On Apple systems models run on CoreML.framework, everywhere else (and with ``engine="portable"``) on an engine that reads
the same files and runs the program itself. ``import candle_coreml.coremltools`` puts that engine under coremltools.
"""

from ._native import Error, Feature, Model, State, __version__, compile_model

__all__ = ["Error", "Feature", "Model", "State", "__version__", "compile_model"]
