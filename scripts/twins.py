#!/usr/bin/env python3
"""Compares Core ML models with the ONNX twins that PyPI packages carry, through the command line's `predict`.

Usage: python scripts/twins.py MODELS_FOLDER [candle-coreml]

MODELS_FOLDER holds silero-vad-unified.mlpackage and basic-pitch.mlpackage. Needs the packages onnxruntime, numpy, and,
installed without their dependencies, silero-vad 6.1.0 (6.2 has other weights) and basic-pitch 0.4.0. Inputs are seeded. Exits with 1 when an error is above
what fp16 weights and the models' own added constants allow; the limits are stated beside each comparison.
"""
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import onnxruntime


def onnx_file(package, path):
    root = pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0])
    return str(root / path)


def predict(binary, model, inputs):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        command = [binary, "predict", str(model), "--output", str(folder / "out")]
        for name, value in inputs.items():
            file = folder / f"{name}.npy"
            np.save(file, value)
            command += ["--input", f"{name}={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {p.stem: np.load(p) for p in (folder / "out").glob("*.npy")}


def speech(rng, count):
    """A voiced-like signal: a gliding tone with harmonics under a slow envelope, and a little noise."""
    t = np.arange(count) / 16000.0
    pitch = 120 + 30 * np.sin(2 * np.pi * 1.5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 16000.0
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * 2.5 * t), 0, 1)
    return (0.2 * voice * envelope + 0.003 * rng.standard_normal(count)).astype(np.float32)


def silero(binary, folder):
    """40 frames of 32 ms in a row, the state carried by each engine for itself: errors may add up."""
    session = onnxruntime.InferenceSession(onnx_file("silero_vad", "data/silero_vad_16k_op15.onnx"))
    signal = speech(np.random.default_rng(1), 64 + 512 * 40)
    state = np.zeros((2, 1, 128), np.float32)
    hidden, cell = np.zeros((1, 128), np.float32), np.zeros((1, 128), np.float32)
    worst, seen = 0.0, []
    for frame in range(40):
        audio = signal[frame * 512 : frame * 512 + 576][None]
        probability, state = session.run(None, {"input": audio, "state": state, "sr": np.array(16000, np.int64)})
        ours = predict(binary, folder / "silero-vad-unified.mlpackage",
                       {"audio_input": audio, "hidden_state": hidden, "cell_state": cell})
        hidden, cell = ours["new_hidden_state"], ours["new_cell_state"]
        seen.append(float(probability[0, 0]))
        worst = max(worst, abs(seen[-1] - float(ours["vad_output"].ravel()[0])))
    print(f"silero-vad: probabilities {min(seen):.4f}..{max(seen):.4f}, largest error {worst:.2e} (limit 2e-3: fp16 weights, "
          "2^-24 added under the root)")
    return worst <= 2e-3


def basic_pitch(binary, folder):
    session = onnxruntime.InferenceSession(onnx_file("basic_pitch", "saved_models/icassp_2022/nmp.onnx"))
    rng = np.random.default_rng(2)
    t = np.arange(43844) / 22050.0
    audio = sum(np.sin(2 * np.pi * f * t) for f in (220.0, 277.18, 329.63)) / 4 + 0.01 * rng.standard_normal(t.size)
    audio = audio.astype(np.float32)[None, :, None]
    theirs = session.run(None, {session.get_inputs()[0].name: audio})
    ours = predict(binary, folder / "basic-pitch.mlpackage", {"input_2": audio})
    good = True
    # The outputs carry other names: each of ours is compared with the twin of the same shape that is nearest.
    for name, value in sorted(ours.items()):
        error = min(np.abs(value - t).max() for t in theirs if t.shape == value.shape)
        print(f"basic-pitch {name} {list(value.shape)}: values {value.min():.4f}..{value.max():.4f}, largest error {error:.2e} "
              "(limit 1e-5: the weights are stored in 32 bits)")
        good &= bool(error <= 1e-5)
    return good


def main():
    folder = pathlib.Path(sys.argv[1])
    binary = sys.argv[2] if len(sys.argv) > 2 else "target/release/candle-coreml"
    results = [silero(binary, folder), basic_pitch(binary, folder)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
