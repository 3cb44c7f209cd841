"""Bundles written here are run as ANEMLL's own programs run them: coremltools, compiled models, one state for all functions.

    cargo build --workspace
    cargo xtask python --quick
    target/python/venv/bin/python -m pytest crates/convert/tests/coremltools/test_anemll.py

Needs coremltools 9, pytest, safetensors, PyYAML and this project's Python package, which runs the models off the Mac. What the programs do
was read in ANEMLL's repository (`tests/chat.py`, version 0.3.4): names made of meta.yaml, batches filled up with zeros, masks cut
from one square, an `update_mask` that no function takes any more, logits joined by number.
"""

from pathlib import Path

import numpy as np
import pytest

ct = pytest.importorskip("coremltools")
bridge = pytest.importorskip("candle_coreml.coremltools")
yaml = pytest.importorskip("yaml")
safetensors = pytest.importorskip("safetensors.numpy")
from test_packages import DATA, DECODERS, run  # noqa: E402

CONTEXT = 32
# As in golden.rs: rotary tables and small constants are 16-bit floats, sums are not.
FLOAT16 = 0.02


@pytest.fixture(autouse=True)
def numerics():
    bridge.configure(numerics="default")
    yield
    bridge.configure(numerics="faithful")


class Program:
    """The parts of a bundle, opened by the names that meta.yaml leads to."""

    def __init__(self, folder):
        parameters = yaml.safe_load((folder / "meta.yaml").read_text())["model_info"]["parameters"]
        self.batch = int(parameters["batch_size"])
        self.context = int(parameters["context_length"])
        self.splits = int(parameters["split_lm_head"])
        chunks = int(parameters["num_chunks"])
        lut = {part: parameters[f"lut_{part}"] for part in ("embeddings", "ffn", "lmhead")}
        lut = {part: "" if bits == "none" else f"_lut{bits}" for part, bits in lut.items()}
        prefix = parameters["model_prefix"]
        name = lambda part: folder / f"{prefix}_{part}.mlpackage"  # noqa: E731
        self.embeddings = self.open(name(f"embeddings{lut['embeddings']}"))
        self.head = self.open(name(f"lm_head{lut['lmhead']}"))
        packages = [name(f"FFN_PF{lut['ffn']}_chunk_{i:02}of{chunks:02}") for i in range(1, chunks + 1)]
        self.chunks = [{f: self.open(p, f) for f in ("infer", "prefill")} for p in packages]
        self.state = self.chunks[0]["prefill"].make_state()
        rows, columns = np.arange(self.context)[:, None], np.arange(self.context)[None, :]
        self.mask = np.where(columns <= rows, 0, -np.inf).astype(np.float16)[None, None]

    @staticmethod
    def open(package, function=None):
        units = ct.ComputeUnit.CPU_AND_NE
        compiled = ct.models.MLModel(str(package), compute_units=units).get_compiled_model_path()
        more = {} if function is None else {"function_name": function}
        return ct.models.CompiledMLModel(compiled, units, **more)

    def prefill(self, tokens):
        for start in range(0, len(tokens), self.batch):
            batch = np.zeros((1, self.batch), dtype=np.int32)
            now = tokens[start : start + self.batch]
            batch[0, : len(now)] = now
            hidden = self.embeddings.predict({"input_ids": batch})["hidden_states"]
            for chunk in self.chunks:
                inputs = {
                    "hidden_states": hidden,
                    "position_ids": np.arange(start, start + self.batch, dtype=np.int32),
                    "causal_mask": self.mask[:, :, start : start + self.batch],
                    "current_pos": np.array([start], dtype=np.int32),
                }
                hidden = chunk["prefill"].predict(inputs, self.state)["output_hidden_states"]

    def logits(self, tokens, position):
        """After the token at `position - 1`, which goes through once more."""
        token = np.array([[tokens[position - 1]]], dtype=np.int32)
        hidden = self.embeddings.predict({"input_ids": token})["hidden_states"]
        update = np.zeros((1, 1, self.context, 1), dtype=np.float16)
        update[0, 0, position - 1, 0] = 1
        here = np.array([position - 1], dtype=np.int32)
        for chunk in self.chunks:
            inputs = {
                "hidden_states": hidden,
                "update_mask": update,
                "position_ids": here,
                "causal_mask": self.mask[:, :, position - 1 : position],
                "current_pos": here,
            }
            hidden = chunk["infer"].predict(inputs, self.state)["output_hidden_states"]
        parts = self.head.predict({"hidden_states": hidden})
        return np.concatenate([parts[f"logits{i}"] for i in range(1, self.splits + 1)], axis=-1)[0, -1]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_bundles_run_as_anemlls_programs_run_them(name, chunks, tmp_path):
    golden = safetensors.load_file(DATA / name / "golden.safetensors")
    tokens, expected = golden["tokens"].tolist(), golden["logits"]
    run("convert", DATA / name, tmp_path / "out", "--context", CONTEXT, "--batch", 8, "--chunks", chunks)
    program = Program(tmp_path / "out")
    # A prompt of more than one batch, the last one not full; then token after token.
    prompt = len(tokens) - 4
    assert prompt > program.batch and prompt % program.batch
    program.prefill(tokens[:prompt])
    for position in range(prompt, len(tokens) + 1):
        off = np.abs(program.logits(tokens, position) - expected[position - 1]).max()
        assert off < FLOAT16, f"{name} at {position}: off by {off}"
