"""Networks for pictures and an encoder beside onnxruntime: the same weights, the same inputs, engines taking turns.

    cargo build --release -p candle-coreml --example timed
    python scripts/bench_models.py FOLDER
    python scripts/beside_onnxruntime.py FOLDER [NAME,NAME...]

Prints, for each model, medians of a prediction in milliseconds, ours over theirs as a speed ratio, the relative error of each
against PyTorch, open to first prediction, and peak memory. Needs numpy, onnxruntime and Linux.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import onnxruntime

THREADS = 2
ROUNDS = 8
NAMES = ["resnet50", "mobilenet_v2", "mobilenet_v3", "minilm32", "minilm128"]
TIMED = pathlib.Path(__file__).parent.parent / "target/release/examples/timed"

# A process of its own for each engine, so that peak memory is its own.
ONNX = """
import json, sys, time
import numpy as np, onnxruntime
model, given, threads = sys.argv[1:]
x = np.load(given)
x = x.astype(np.int64) if x.dtype == np.int32 else x
start = time.perf_counter()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
y = session.run(None, {"x": x})[0]
first = time.perf_counter()
wanted = np.load(given.replace(".in.npy", ".out.npy"))
error = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
print(json.dumps({"load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - start), "error": error}), flush=True)
for line in sys.stdin:
    if not line.strip():
        status = open("/proc/self/status").read()
        print(status.split("VmHWM:")[1].split()[0], flush=True)
        continue
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        session.run(None, {"x": x})
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps(times), flush=True)
"""


class Engine:
    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self.process.stdout.readline())
        self.times = []

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        peak = self.ask("") / 1024
        self.process.stdin.close()
        self.process.wait()
        return peak


def measure(folder, name):
    files = [str(folder / f"{name}.{kind}.npy") for kind in ("in", "out")]
    ours = [str(folder / f"{name}{form}.mlpackage") for form in ("", "_fp16")]
    engines = {"onnxruntime": Engine([sys.executable, "-c", ONNX, str(folder / f"{name}.onnx"), files[0], str(THREADS)])}
    for label, package in zip(("fp32", "fp16"), ours):
        engines[label] = Engine([str(TIMED), package, *files, str(THREADS), "default"])
    for _ in range(ROUNDS):
        for engine in engines.values():
            # Threads of the engine before still spin for a moment.
            time.sleep(0.05)
            engine.times += engine.ask(10)
    base = statistics.median(engines["onnxruntime"].times)
    for label, engine in engines.items():
        median, facts = statistics.median(engine.times), engine.facts
        spread = (max(engine.times) - min(engine.times)) / median
        print(
            f"{name:<14} {label:<12} {median:8.2f} ms  ratio {base / median:5.2f}  spread {spread:4.0%}  "
            f"error {facts['error']:.0e}  first {facts['first_ms']:6.0f} ms  peak {engine.end():5.0f} MB",
            flush=True,
        )


def main():
    folder = pathlib.Path(sys.argv[1])
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else NAMES
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, {THREADS} threads")
    for name in names:
        measure(folder, name)


if __name__ == "__main__":
    main()
