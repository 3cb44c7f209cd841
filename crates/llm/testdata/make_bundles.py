"""Makes `bundles/`: one tiny model packaged in every layout that language models for Core ML come in, and `bundles/golden.json`
with what it says, computed by `reference.py`. Needs coremltools 9 and numpy.

    python make_bundles.py

Weights come from one seed, so all bundles without a sliding window say the same, and so do all with one.
"""

import json
import shutil
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.converters.mil.mil.program import get_new_symbol

import reference as ref
from reference import BATCH, CONTEXT, HEAD, HEADS, HIDDEN, LAYERS, VOCABULARY, WINDOW

HERE = Path(__file__).parent / "bundles"
TARGET = ct.target.iOS18
F16, I32 = types.fp16, types.int32


# Packages.


def function(inputs, body):
    """A function with the inputs `{name: (shape, type)}` and states `{name: [shape]}`."""
    placeholders = {
        name: mb.state_tensor_placeholder(shape=spec[0], dtype=F16)
        if isinstance(spec, list)
        else mb.placeholder(shape=spec[0], dtype=spec[1])
        for name, spec in inputs.items()
    }
    with Function(placeholders, opset_version=TARGET) as f:
        outputs = body(f.inputs)
        f.set_outputs([mb.identity(x=value, name=name) for name, value in outputs.items()])
    return f


def save(functions, path, flexible=None, metadata=None):
    """Writes functions by name as one package, `flexible` being shapes of the inputs of a single one."""
    program = Program()
    for name, f in functions.items():
        program.add_function(name, f)
    if list(functions) != ["main"]:
        program.default_function_name = list(functions)[0]
        program.export_as_multifunction = True
        # Weights are stored once for all functions.
        PASS_REGISTRY["common::const_deduplication"]._deduplicate_const_across_functions(program)
        model = mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=9,
            compute_units=ct.ComputeUnit.CPU_ONLY,
            skip_model_load=True,
        )
    else:
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=TARGET,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
            inputs=flexible,
        )
    model.author, model.license = "candle-coreml", "MIT OR Apache-2.0"
    model.short_description = "one tiny language model in every layout"
    for key, value in (metadata or {}).items():
        model.user_defined_metadata[key] = value
    model.save(str(path))
    # Identifiers are random and the date is today's; fixed ones keep the files the same from run to run.
    manifest = json.loads((path / "Manifest.json").read_text())
    entries = sorted(manifest["itemInfoEntries"].items(), key=lambda e: e[1]["path"])
    ids = {old: f"00000000-0000-0000-0000-{i:012}" for i, (old, _) in enumerate(entries)}
    manifest["itemInfoEntries"] = {ids[old]: entry for old, entry in entries}
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    spec_path = path / "Data/com.apple.CoreML/model.mlmodel"
    spec = ct.utils.load_spec(str(spec_path))
    spec.description.metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    spec_path.write_bytes(spec.SerializeToString(deterministic=True))


# The model, as operators.


def norm(x):
    mean = mb.reduce_mean(x=mb.square(x=x), axes=[-1], keep_dims=True)
    return mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=np.float16(ref.EPSILON)))


def split_heads(x, count):
    """[1, rows, count * HEAD] to [1, count, rows, HEAD]."""
    return mb.transpose(x=mb.reshape(x=x, shape=[1, -1, count, HEAD]), perm=[0, 2, 1, 3])


def turned(x, cos, sin):
    left, right = mb.split(x=x, num_splits=2, axis=-1)
    other = mb.concat(values=[mb.mul(x=right, y=np.float16(-1)), left], axis=-1)
    return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=other, y=sin))


def attend(q, keys, values, mask):
    scores = mb.matmul(x=q, y=keys, transpose_y=True)
    scores = mb.add(x=mb.mul(x=scores, y=np.float16(HEAD**-0.5)), y=mask)
    mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=values)
    return mb.reshape(x=mb.transpose(x=mixed, perm=[0, 2, 1, 3]), shape=[1, -1, HEADS * HEAD])


def run_layer(model, i, x, positions, attention):
    """One layer over `x` [1, rows, HIDDEN]; `attention` gets queries, new keys and new values."""
    layer = model.layers[i]
    cos, sin = (mb.gather(x=table, indices=positions, axis=0) for table in (model.cos, model.sin))
    h = norm(x)
    q = turned(split_heads(mb.linear(x=h, weight=layer.q), HEADS), cos, sin)
    k = turned(split_heads(mb.linear(x=h, weight=layer.k), HEADS), cos, sin)
    v = split_heads(mb.linear(x=h, weight=layer.v), HEADS)
    x = mb.add(x=x, y=mb.linear(x=attention(i, q, k, v), weight=layer.o))
    h = norm(x)
    gated = mb.mul(x=mb.silu(x=mb.linear(x=h, weight=layer.gate)), y=mb.linear(x=h, weight=layer.up))
    return mb.add(x=x, y=mb.linear(x=gated, weight=layer.down))


# Caches as ANEMLL keeps them: [2 * layers, kv heads, slots, HEAD], keys first.


class State:
    """A state and the value it has now: reading it anew would be taken for the same reading."""

    def __init__(self, state):
        self.state, self.value, self.shape = state, mb.read_state(input=state), state.shape

    def update(self, begin, end, value):
        whole = mb.slice_update(x=self.value, update=value, begin=begin, end=end)
        self.value = mb.coreml_update_state(state=self.state, value=whole)

    def slot(self, row):
        return mb.slice_by_size(x=self.value, begin=[row] + [0] * (len(self.shape) - 1), size=[1, *self.shape[1:]])


def put(cache, row, begin, end, value):
    """Writes `value` into one row of the cache, slots begin..end (numbers or rank-1 values)."""
    at = lambda slots, rest: mb.concat(values=[np.int32([rest[0], rest[1]]), slots, np.int32([rest[2]])], axis=0)
    if isinstance(begin, int):
        begin, end = np.int32([begin]), np.int32([end])
    cache.update(at(begin, [row, 0, 0]), at(end, [row + 1, HEADS, HEAD]), value)


class Caches:
    """Attention over caches in states.

    `caches` are `{layer: (state, row of keys, row of values)}`; `rotate` moves local caches instead of writing at the
    position, `loose` as the converter does it for batches: rows see what later rows of their batch wrote.
    """

    def __init__(self, caches, inputs, rows, rotate=False, loose=False, stuck=False):
        self.caches, self.inputs, self.rows = caches, inputs, rows
        self.rotate, self.loose, self.stuck = rotate, loose, stuck

    def __call__(self, i, q, k, v):
        cache, key_row, value_row = self.caches[i]
        slots = cache.shape[2]
        mask = self.inputs["causal_mask"]
        if slots < CONTEXT:
            mask = mb.slice_by_size(x=mask, begin=[0, 0, 0, 0], size=[1, 1, self.rows, slots])
        rolls = self.rotate and slots < CONTEXT
        wide = [self.store(cache, row, value, rolls) for row, value in ((key_row, k), (value_row, v))]
        if rolls and self.rows > 1 and not self.loose:
            distance = slots + np.arange(self.rows)[:, None] - np.arange(slots + self.rows)[None, :]
            seen = (distance >= 0) & (distance < slots)
            return attend(q, *wide, np.where(seen, 0, -np.inf).astype(np.float16)[None, None])
        return attend(q, cache.slot(key_row), cache.slot(value_row), mask)

    def store(self, cache, row, value, rolls):
        """Writes new keys or values; gives the old cache with the new ones behind it when it rolls."""
        slots, rows = cache.shape[2], self.rows
        if rolls:
            wide = mb.concat(values=[cache.slot(row), value], axis=2)
            kept = mb.slice_by_size(x=wide, begin=[0, 0, rows, 0], size=[1, HEADS, slots, HEAD])
            put(cache, row, 0, slots, kept)
            return wide
        if "update_mask" in self.inputs:
            mask = mb.slice_by_size(x=self.inputs["update_mask"], begin=[0] * 4, size=[1, 1, slots, rows])
            hit = mb.clip(x=mb.reduce_sum(x=mask, axes=[-1], keep_dims=True), alpha=np.float16(0), beta=np.float16(1))
            masks = mb.tile(x=mask, reps=[1, HEADS, 1, 1])
            kept = mb.mul(x=cache.slot(row), y=mb.sub(x=np.float16(1), y=hit))
            put(cache, row, 0, slots, mb.add(x=kept, y=mb.matmul(x=masks, y=value)))
            return None
        if self.stuck:
            put(cache, row, 0, rows, value)
            return None
        start = self.inputs["current_pos"]
        put(cache, row, start, mb.add(x=start, y=np.int32(rows)), value)
        return None


def cache_shapes(window):
    """States of a chunk with all layers: {name: shape}, {layer: (name, row of keys, row of values)}."""
    if not window:
        rows = {i: ("model_model_kv_cache_0", i, LAYERS + i) for i in range(LAYERS)}
        return {"model_model_kv_cache_0": (2 * LAYERS, HEADS, CONTEXT, HEAD)}, rows
    shapes = {"kv_cache_local": (2, HEADS, WINDOW, HEAD), "kv_cache_global": (2, HEADS, CONTEXT, HEAD)}
    return shapes, {0: ("kv_cache_local", 0, 1), 1: ("kv_cache_global", 0, 1)}


def step(model, rows, layers=range(LAYERS), states=None, rotate=False, update_mask=False, ids=False, finish=None, **how):
    """A function of a chunk: `rows` tokens through `layers`."""
    shapes, places = states or cache_shapes(model.layers[0].local)
    first = {"input_ids": ((1, rows), I32)} if ids else {"hidden_states": ((1, rows, HIDDEN), F16)}
    inputs = {
        **first,
        "position_ids": ((rows,), I32),
        "causal_mask": ((1, 1, rows, CONTEXT), F16),
        "current_pos": ((1,), I32),
        **({"update_mask": ((1, 1, CONTEXT, rows), F16)} if update_mask else {}),
        **{name: [shape] for name, shape in shapes.items()},
    }

    def body(given):
        x = mb.gather(x=model.embeddings, indices=given["input_ids"], axis=0) if ids else given["hidden_states"]
        states = {name: State(given[name]) for name in shapes}
        caches = {i: (states[name], k, v) for i, (name, k, v) in places.items()}
        attention = Caches(caches, given, rows, rotate, **how)
        for i in layers:
            x = run_layer(model, i, x, given["position_ids"], attention)
        if finish:
            return finish(x)
        return {"output_hidden_states": x}

    return function(inputs, body)


def embeddings(model, path, shapes=(1, BATCH)):
    n = get_new_symbol("n") if len(shapes) > 1 else 1
    f = function(
        {"input_ids": ((1, n), I32)},
        lambda given: {"hidden_states": mb.gather(x=model.embeddings, indices=given["input_ids"], axis=0)},
    )
    shape = ct.EnumeratedShapes([(1, rows) for rows in shapes], default=(1, 1)) if len(shapes) > 1 else (1, 1)
    save({"main": f}, path, [ct.TensorType(name="input_ids", shape=shape, dtype=np.int32)])


def part_logits(model, x, sizes):
    starts = np.cumsum([0, *sizes[:-1]])
    return [mb.linear(x=norm(x), weight=model.head[s : s + n]) for s, n in zip(starts, sizes)]


def parts_output(model, sizes):
    return lambda x: {f"logits{i + 1}": part for i, part in enumerate(part_logits(model, x, sizes))}


def argmax_output(model, sizes):
    def finish(x):
        parts = part_logits(model, x, sizes)
        index = [mb.reshape(x=mb.reduce_argmax(x=part, axis=-1), shape=[1]) for part in parts]
        value = [mb.reshape(x=mb.reduce_max(x=part, axes=[-1]), shape=[1]) for part in parts]
        return {"argmax_idx": mb.concat(values=index, axis=0), "argmax_val": mb.concat(values=value, axis=0)}

    return finish


def head(path, finish):
    save({"main": function({"hidden_states": ((1, 1, HIDDEN), F16)}, lambda given: finish(given["hidden_states"]))}, path)


# Files beside the packages.


def folder(name, meta=None, config=None):
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    words = {"<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    special = lambda i, text: dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<end>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if meta is not None:
        lines = ["model_info:", f"  name: {name}", f"  version: {meta.pop('version')}", "  architecture: tiny"]
        if "model_type" in meta:
            lines.append(f"  model_type: {meta.pop('model_type')}")
        lines += ["  parameters:", *(f"    {key}: {value}" for key, value in meta.items())]
        (path / "meta.yaml").write_text("\n".join(lines) + "\n")
    return path


COMMON = {"model_prefix": "tiny", "context_length": CONTEXT, "batch_size": BATCH}
CONFIG = {"vocab_size": VOCABULARY, "eos_token_id": ref.END}


def chunks(model):
    """Two chunks, a head in four uneven parts, one state."""
    path = folder("chunks", {"version": "0.3.4", **COMMON, "num_chunks": 2, "split_lm_head": 4}, CONFIG)
    embeddings(model, path / "tiny_embeddings.mlpackage")
    for i in range(2):
        steps = {name: step(model, rows, layers=[i]) for name, rows in (("prefill", BATCH), ("infer", 1))}
        save(steps, path / f"tiny_FFN_PF_chunk_{i + 1:02}of02.mlpackage")
    head(path / "tiny_lm_head.mlpackage", parts_output(model, [30, 26, 20, 20]))


def argmax(model):
    """Update masks for both functions, the best token chosen in the model."""
    sizes = [40, 30, 26]
    meta = {"version": "0.3.5", **COMMON, "num_chunks": 1, "lut_ffn": "6,4", "update_mask_prefill": "true", "argmax_in_model": "true"}
    path = folder("argmax", {**meta, "vocab_size": VOCABULARY, "lm_head_chunk_sizes": sizes})
    embeddings(model, path / "tiny_embeddings.mlpackage")
    steps = {name: step(model, rows, update_mask=True) for name, rows in (("infer", 1), ("prefill", BATCH))}
    save(steps, path / "tiny_FFN_PF_lut6_chunk_01of01.mlpackage")
    head(path / "tiny_lm_head.mlpackage", argmax_output(model, sizes))


def one_by_one(model):
    """Batches that write the first slots wherever they start; a state for each chunk; sizes in the packages' own metadata."""
    path = folder("one-by-one", {"version": "0.3.5", "model_prefix": "tiny", "num_chunks": 2}, {"eos_token_id": ref.END})
    embeddings(model, path / "tiny_embeddings.mlpackage")
    facts = {"com.anemll.context_length": str(CONTEXT), "com.anemll.state_length": str(CONTEXT), "com.anemll.vocab_size": str(VOCABULARY)}
    for i in range(2):
        states = {f"model_kv_cache_{i}": (2, HEADS, CONTEXT, HEAD)}, {i: (f"model_kv_cache_{i}", 0, 1)}
        steps = {name: step(model, rows, [i], states=states, stuck=rows > 1) for name, rows in (("prefill", BATCH), ("infer", 1))}
        save(steps, path / f"tiny_FFN_PF_chunk_{i + 1:02}of02.mlpackage", metadata=facts)
    head(path / "tiny_lm_head.mlpackage", lambda x: {"output_logits": part_logits(model, x, [VOCABULARY])[0]})


FOUR = (("infer", 1, False), ("prefill", BATCH, False), ("infer_rotate", 1, True), ("prefill_rotate", BATCH, True))
ROTATING = {**COMMON, "num_chunks": 1, "sliding_window": WINDOW, "prefill_dynamic_slice": "true"}


def rotate(model):
    """A window that rolls, all four functions in one file."""
    path = folder("rotate", {"version": "0.3.5", **ROTATING}, CONFIG)
    embeddings(model, path / "tiny_embeddings.mlpackage")
    save({name: step(model, rows, rotate=r) for name, rows, r in FOUR}, path / "tiny_FFN_PF_chunk_01of01.mlpackage")
    head(path / "tiny_lm_head.mlpackage", parts_output(model, [48, 48]))


def rotate_files(model):
    """The same with `prefill_rotate` in a second file, and as the converter writes it: not causal inside a batch."""
    path = folder("rotate-files", {"version": "0.3.5", **ROTATING}, CONFIG)
    embeddings(model, path / "tiny_embeddings.mlpackage")
    save({name: step(model, rows, rotate=r) for name, rows, r in FOUR[:3]}, path / "tiny_FFN_PF_chunk_01of01.mlpackage")
    loose = {"prefill_rotate": step(model, BATCH, rotate=True, loose=True), "infer_rotate": step(model, 1, rotate=True)}
    save(loose, path / "tiny_FFN_PF_chunk_01of01_rot.mlpackage")
    head(path / "tiny_lm_head.mlpackage", parts_output(model, [48, 48]))


def monolith(model):
    """One file from token ids to parts of logits."""
    meta = {"version": "0.3.5", "model_type": "monolithic", **COMMON, "lut_bits": 6, "prefill_dynamic_slice": "true"}
    path = folder("monolith", meta, CONFIG)
    finish = parts_output(model, [30, 26, 20, 20])
    steps = {name: step(model, rows, ids=True, finish=finish if rows == 1 else None) for name, rows in (("infer", 1), ("prefill", BATCH))}
    save(steps, path / "tiny_monolithic_full_lut6.mlpackage")


def monolith_rotate(model):
    """One file with a window that rolls, the best token chosen in the model."""
    sizes = [48, 48]
    meta = {"version": "0.3.5", "model_type": "monolithic", **ROTATING, "argmax_in_model": "true", "vocab_size": VOCABULARY}
    path = folder("monolith-rotate", meta)
    finish = argmax_output(model, sizes)
    save({name: step(model, rows, ids=True, rotate=r, finish=finish) for name, rows, r in FOUR[::2]}, path / "tiny_monolithic_full.mlpackage")


def component(file, inputs, outputs, functions=()):
    tensor = lambda name, spec: {"name": name, "shape": spec[0], "data_type": spec[1]}
    return {
        "file_path": file,
        "inputs": {name: tensor(name, spec) for name, spec in inputs.items()},
        "outputs": {name: tensor(name, spec) for name, spec in outputs.items()},
        "functions": list(functions),
    }


def model_config(path, rows, components):
    """`ModelConfig` of candle-coreml 0.3: what each file takes and gives."""
    config = {
        "model_info": {"model_id": f"test/{path.name}", "path": "/where/it/was/made", "model_type": "tiny"},
        "shapes": {"batch_size": rows, "context_length": CONTEXT, "hidden_size": HIDDEN, "vocab_size": VOCABULARY},
        "components": components,
        "naming": {},
    }
    if rows > 1:
        config["ffn_execution"] = "split"
    (path / f"{path.name}.json").write_text(json.dumps(config, indent=1) + "\n")


def described(rows):
    inputs = {
        "hidden_states": ([1, rows, HIDDEN], "FLOAT16"),
        "position_ids": ([rows], "INT32"),
        "causal_mask": ([1, 1, rows, CONTEXT], "FLOAT16"),
        "current_pos": ([1], "INT32"),
    }
    return inputs, {"output_hidden_states": ([1, rows, HIDDEN], "FLOAT16")}


def config_unified(model):
    """`ModelConfig`, one file for both functions, which take one token each; paths of the machine it was made on."""
    path = folder("config-unified", config=CONFIG)
    embeddings(model, path / "embed.mlpackage", shapes=(1,))
    save({"prefill": step(model, 1), "infer": step(model, 1)}, path / "layers.mlpackage")
    head(path / "head.mlpackage", parts_output(model, [56, 40]))
    ids, hidden = {"input_ids": ([1, 1], "INT32")}, {"hidden_states": ([1, 1, HIDDEN], "FLOAT16")}
    logits = {f"logits{i + 1}": ([1, 1, n], "FLOAT16") for i, n in enumerate([56, 40])}
    model_config(
        path,
        1,
        {
            "embeddings": component("/where/it/was/made/embed.mlmodelc", ids, hidden),
            "ffn_prefill": component("/where/it/was/made/layers.mlpackage", *described(1), ["prefill", "infer"]),
            "lm_head": component("head.mlpackage", hidden, logits),
        },
    )


def config_split(model):
    """`ModelConfig`, a file for each function, batches, an input of another name."""
    path = folder("config-split", config=CONFIG)
    embeddings(model, path / "embed.mlpackage")
    for name, rows in (("prefill", BATCH), ("infer", 1)):
        save({"main": step(model, rows)}, path / f"ffn_{name}.mlpackage")
    take = function({"last_row": ((1, 1, HIDDEN), F16)}, lambda given: {"scores": part_logits(model, given["last_row"], [VOCABULARY])[0]})
    save({"main": take}, path / "head.mlpackage")
    ids, hidden = {"input_ids": ([1, BATCH], "INT32")}, {"hidden_states": ([1, BATCH, HIDDEN], "FLOAT16")}
    model_config(
        path,
        BATCH,
        {
            "embeddings": component("embed.mlpackage", ids, hidden),
            "ffn_prefill": component("ffn_prefill.mlpackage", *described(BATCH), ["prefill"]),
            "ffn_infer": component("ffn_infer.mlpackage", *described(1), ["infer"]),
            "lm_head": component("head.mlpackage", {"last_row": ([1, 1, HIDDEN], "FLOAT16")}, {"scores": ([1, 1, VOCABULARY], "FLOAT16")}),
        },
    )


def stateful(model):
    """One package with flexible numbers of tokens and two states."""
    path = folder("stateful", config=CONFIG)
    q, k = get_new_symbol("q"), get_new_symbol("k")
    shape = (LAYERS, 1, HEADS, CONTEXT, HEAD)
    inputs = {"inputIds": ((1, q), I32), "causalMask": ((1, 1, q, k), F16), "keyCache": [shape], "valueCache": [shape]}

    def body(given):
        size = lambda name, axis: mb.slice_by_size(x=mb.shape(x=given[name]), begin=[axis], size=[1])
        rows, end = size("inputIds", 1), size("causalMask", 3)
        start = mb.sub(x=end, y=rows)
        scalar = lambda x: mb.squeeze(x=x, axes=[0])
        positions = mb.range_1d(start=scalar(start), end=scalar(end), step=np.int32(1))
        caches = {name: State(given[name]) for name in ("keyCache", "valueCache")}

        def attention(i, queries, keys, values):
            def stored(name, value):
                at = lambda first, slots, last: mb.concat(values=[np.int32([first, 0, 0]), slots, np.int32([0])], axis=0)
                end_at = mb.concat(values=[np.int32([i + 1, 1, HEADS]), end, np.int32([HEAD])], axis=0)
                begin = at(i, start, 0)
                caches[name].update(begin, end_at, mb.expand_dims(x=value, axes=[0]))
                row = mb.squeeze(x=caches[name].slot(i), axes=[0])
                last = mb.concat(values=[np.int32([1, HEADS]), end, np.int32([HEAD])], axis=0)
                return mb.slice_by_index(x=row, begin=[0] * 4, end=last, end_mask=[True, True, False, True])

            return attend(queries, stored("keyCache", keys), stored("valueCache", values), given["causalMask"])

        x = mb.gather(x=model.embeddings, indices=given["inputIds"], axis=0)
        for i in range(LAYERS):
            x = run_layer(model, i, x, positions, attention)
        return {"logits": part_logits(model, x, [VOCABULARY])[0]}

    tokens, slots = ct.RangeDim(1, CONTEXT, default=1), ct.RangeDim(1, CONTEXT, default=1)
    flexible = [
        ct.TensorType(name="inputIds", shape=(1, tokens), dtype=np.int32),
        ct.TensorType(name="causalMask", shape=(1, 1, tokens, slots), dtype=np.float16),
    ]
    save({"main": function(inputs, body)}, path / "StatefulTiny.mlpackage", flexible)


def stateful_fixed(model):
    """One package with a state that takes one token and its position."""
    path = folder("stateful-fixed", config=CONFIG)
    logits = lambda x: {"logits": part_logits(model, x, [VOCABULARY])[0]}
    save({"main": step(model, 1, ids=True, finish=logits)}, path / "tiny.mlpackage")


def stateless(model, name, sizes):
    """One package that computes its whole window; with several sizes it takes an attention mask too."""
    path = folder(name, config=CONFIG)
    several = len(sizes) > 1
    n = get_new_symbol("n") if several else sizes[0]
    inputs = {"input_ids": ((1, n), I32), **({"attention_mask": ((1, n), I32)} if several else {})}
    triangle = np.triu(np.full((CONTEXT, CONTEXT), -np.inf), 1).astype(np.float16)

    def body(given):
        x = mb.gather(x=model.embeddings, indices=given["input_ids"], axis=0)
        if several:
            rows = mb.slice_by_size(x=mb.shape(x=given["input_ids"]), begin=[1], size=[1])
            mask = mb.slice_by_index(x=triangle, begin=[0, 0], end=mb.concat(values=[rows, rows], axis=0))
            positions = mb.range_1d(start=np.int32(0), end=mb.squeeze(x=rows, axes=[0]), step=np.int32(1))
            hidden = mb.sub(x=np.float16(1), y=mb.cast(x=given["attention_mask"], dtype="fp16"))
            padding = mb.expand_dims(x=mb.mul(x=hidden, y=np.float16(-1e4)), axes=[1, 2])
            mask = mb.add(x=mb.expand_dims(x=mask, axes=[0, 1]), y=padding)
        else:
            mask, positions = triangle[None, None, : sizes[0], : sizes[0]], np.arange(sizes[0], dtype=np.int32)
        for i in range(LAYERS):
            x = run_layer(model, i, x, positions, lambda i, q, k, v: attend(q, k, v, mask))
        return {"logits": part_logits(model, x, [VOCABULARY])[0]}

    shape = ct.EnumeratedShapes([(1, size) for size in sizes], default=(1, sizes[0])) if several else (1, sizes[0])
    save({"main": function(inputs, body)}, path / "model.mlpackage", [ct.TensorType(name=i, shape=shape, dtype=np.int32) for i in inputs])


def main():
    full, window = ref.Model(False), ref.Model(True)
    for make in (chunks, argmax, one_by_one, monolith, config_unified, config_split, stateful, stateful_fixed):
        make(full)
    stateless(full, "stateless", [32])
    stateless(full, "stateless-sizes", [16, 32, CONTEXT])
    for make in (rotate, rotate_files, monolith_rotate):
        make(window)
    golden = {"context": CONTEXT, "full": ref.golden(full), "window": ref.golden(window)}
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
