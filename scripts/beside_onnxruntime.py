"""Networks beside onnxruntime: the same weights, the same inputs, engines taking turns.

    cargo build --release -p candle-coreml --example timed
    python scripts/bench_models.py FOLDER
    python scripts/beside_onnxruntime.py FOLDER [NAME,NAME...]

Prints, for each model, medians of a prediction in milliseconds, their time over ours as a ratio (the median of the ratios of
turns that follow each other), the relative error of each against PyTorch, open to first prediction, and peak memory. An error
above what the arithmetic allows ends it with 1. Needs numpy, onnxruntime and Linux.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

import onnxruntime

THREADS = 2
ROUNDS = 12
NAMES = ["resnet50", "mobilenet_v2", "mobilenet_v3", "minilm32", "minilm128", "whisper", "yolo", "unet", "vad"]
TIMED = pathlib.Path(__file__).parent.parent / "target/release/examples/timed"
# Relative errors that f32 arithmetic in another order makes, and fp16 weights; random weights amplify the second.
LIMITS = {"onnxruntime": 1e-4, "openvino": 5e-2, "fp32": 1e-4, "fast": 2e-2, "fp16": 2e-2}

# A process of its own for each engine, so that peak memory is its own.
ONNX = """
import json, sys, time
import numpy as np, onnxruntime
model, given, wanted, threads = sys.argv[1:]
x = {n: v.astype(np.int64) if v.dtype == np.int32 else v for n, v in np.load(given).items()}
start = time.perf_counter()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
results = session.run(None, x)
first = time.perf_counter()
names = [o.name for o in session.get_outputs()]
norm = np.linalg.norm
error = max(float(norm(y - w) / norm(w)) for y, w in ((results[names.index(n)], w) for n, w in np.load(wanted).items()))
print(json.dumps({"load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - start), "error": error}), flush=True)
for line in sys.stdin:
    if not line.strip():
        status = open("/proc/self/status").read()
        print(status.split("VmHWM:")[1].split()[0], flush=True)
        continue
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        session.run(None, x)
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps(times), flush=True)
"""


OPENVINO = """
import json, sys, time
import numpy as np, openvino
model, given, wanted, threads = sys.argv[1:]
start = time.perf_counter()
core = openvino.Core()
options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY"}
compiled = core.compile_model(core.read_model(model), "CPU", options)
request = compiled.create_infer_request()
names = {i.get_any_name() for i in compiled.inputs}
x = {n: v.astype(np.int64) if v.dtype == np.int32 else v for n, v in np.load(given).items() if n in names}
loaded = time.perf_counter()
results = request.infer(x)
first = time.perf_counter()
norm = np.linalg.norm
error = max(float(norm(results[n] - w) / norm(w)) for n, w in np.load(wanted).items())
print(json.dumps({"load_ms": 1e3 * (loaded - start), "first_ms": 1e3 * (first - start), "error": error}), flush=True)
for line in sys.stdin:
    if not line.strip():
        status = open("/proc/self/status").read()
        print(status.split("VmHWM:")[1].split()[0], flush=True)
        continue
    times = []
    for _ in range(int(line)):
        start = time.perf_counter()
        request.infer(x, share_inputs=True)
        times.append(1e3 * (time.perf_counter() - start))
    print(json.dumps(times), flush=True)
"""


class Engine:
    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self.process.stdout.readline())
        self.turns = []

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        peak = self.ask("") / 1024
        self.process.stdin.close()
        self.process.wait()
        return peak


def start(folder, name, label):
    files = [str(folder / f"{name}.{kind}.npz") for kind in ("in", "out")]
    others = {"onnxruntime": ONNX, "openvino": OPENVINO}
    if label in others:
        return Engine([sys.executable, "-c", others[label], str(folder / f"{name}.onnx"), *files, str(THREADS)])
    ending, numerics = {"fp32": ("", "default"), "fp16": ("_fp16", "default"), "fast": ("", "fast")}[label]
    return Engine([str(TIMED), str(folder / f"{name}{ending}.mlpackage"), *files, str(THREADS), numerics])


def measure(folder, name, labels=("fp32", "fp16"), rounds=ROUNDS):
    """For each engine: median in ms, ratio, spread, error, open to first prediction in ms, peak in MB."""
    labels = ["onnxruntime", *labels]
    firsts = {label: [] for label in labels}
    for _ in range(2):
        for label in labels:
            engine = start(folder, name, label)
            firsts[label].append(engine.facts["first_ms"])
            engine.end()
    engines = {label: start(folder, name, label) for label in labels}
    # As many predictions a turn as take about 60 ms.
    once = max(statistics.median(engine.ask(3)) for engine in engines.values())
    count = max(3, min(200, int(60 / once)))
    for _ in range(rounds):
        for engine in engines.values():
            # Threads of onnxruntime spin for up to 60 ms after its turn.
            time.sleep(0.1)
            engine.turns.append(statistics.median(engine.ask(count)))
    rows = {}
    base = engines["onnxruntime"].turns
    for label, engine in engines.items():
        median = statistics.median(engine.turns)
        low, _, high = statistics.quantiles(engine.turns, n=4)
        rows[label] = {
            "ms": median,
            "turns": engine.turns,
            "ratio": statistics.median(b / o for b, o in zip(base, engine.turns)),
            "spread": (high - low) / median,
            "error": engine.facts["error"],
            "first_ms": min([*firsts[label], engine.facts["first_ms"]]),
            "peak_mb": engine.end(),
        }
    return rows


def show(name, label, row):
    return (
        f"{name:<13} {label:<12} {row['ms']:8.2f} ms  ratio {row['ratio']:5.2f}  spread {row['spread']:4.0%}  "
        f"error {row['error']:.0e}  first {row['first_ms']:6.0f} ms  peak {row['peak_mb']:5.0f} MB"
    )


def wrong(label, row):
    return not row["error"] <= LIMITS[label]


def main():
    folder = pathlib.Path(sys.argv[1])
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else NAMES
    print(f"onnxruntime {onnxruntime.__version__}, {THREADS} threads")
    failed = []
    for name in names:
        for label, row in measure(folder, name).items():
            print(show(name, label, row), flush=True)
            if wrong(label, row):
                failed.append(f"{name} {label}: error {row['error']:.1e} is above {LIMITS[label]:.0e}")
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
