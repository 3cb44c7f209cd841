"""Writes the golden cases of every operator: `python make_golden.py` (numpy alone is needed).

Each expected value is computed here, in numpy, from the operator's documentation (coremltools 9.0,
`converters/mil/mil/ops/defs`), never by the engine under test.
"""

import golden
import golden_elementwise  # noqa: F401, the modules register their families
import golden_flow  # noqa: F401
import golden_images  # noqa: F401
import golden_layers  # noqa: F401
import golden_tensors  # noqa: F401
import golden_weights  # noqa: F401
import golden_windows  # noqa: F401

if __name__ == "__main__":
    golden.FOLDER.mkdir(exist_ok=True)
    for run in golden.FAMILIES:
        run()
