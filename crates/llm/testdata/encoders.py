"""Small seeded text encoders as coremltools writes them, with vectors computed by numpy; all-MiniLM-L6-v2 the same way.

    python crates/llm/testdata/encoders.py                    writes crates/llm/testdata/encoders
    python crates/llm/testdata/encoders.py MINILM_FOLDER OUT  writes a package of the checkpoint, and golden.json

Needs coremltools (made with 9.0), numpy and, for a checkpoint, safetensors. The expectation is independent of the engine:
words are cut into pieces here, the encoder is computed here, in 64 bits from the weights as the package stores them.
"""

import json
import math
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types

HERE = Path(__file__).parent / "encoders"
WORDS = ("the a cat dog sits sat on mat rain sun falls shines and is not my friend loves music song sings red blue run fast "
         "##ning ##ner ##s ##ing ##ed sing play un ##happ ##y , . ! ? 1 2 3").split()
TEXTS = ["The cat sits on the mat.", "A dog sat on my mat!", "rain falls and the sun shines", "My friend sings; unhappy songs",
         "", "runner, running, runs... 123", "Play the blue song, play the red song, and play and play and sing the song of rain and sun 1 2 3 ?"]
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.", "A cheetah is running behind its prey.",
             "How do I reset my password?", "Café naïve — Zürich, 東京 2024!", "",
             "Core ML packages run on Linux too. " * 40]


# The text.

def pieces(text, vocabulary):
    """Ids of BERT's uncased word pieces."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    split = "".join(f" {c} " if is_apart(c) else c for c in text)
    ids = []
    for word in split.split():
        found, start = [], 0
        while start < len(word):
            end = len(word)
            while end > start and ("##" if start else "") + word[start:end] not in vocabulary:
                end -= 1
            if end == start:
                found = [vocabulary["[UNK]"]]
                break
            found.append(vocabulary[("##" if start else "") + word[start:end]])
            start = end
        ids += found
    return ids


def is_apart(c):
    code = ord(c)
    ascii_sign = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_sign or unicodedata.category(c).startswith("P") or 0x4E00 <= code <= 0x9FFF


def encode(text, vocabulary, most):
    return [vocabulary["[CLS]"]] + pieces(text, vocabulary)[: most - 2] + [vocabulary["[SEP]"]]


# The encoder in numpy.

def forward(w, c, ids):
    """Vectors of the tokens [n, hidden] and the pooler's [hidden]."""
    h, heads = c["hidden_size"], c["num_attention_heads"]
    norm = lambda x, name: ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c["layer_norm_eps"])
                            * w[name + ".weight"] + w[name + ".bias"])
    linear = lambda x, name: x @ w[name + ".weight"].T + w[name + ".bias"]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    erf = np.vectorize(math.erf, otypes=[np.float64])
    for layer in range(c["num_hidden_layers"]):
        p = f"encoder.layer.{layer}."
        split = lambda name: linear(x, p + "attention.self." + name).reshape(len(ids), heads, h // heads).transpose(1, 0, 2)
        q, k, v = split("query"), split("key"), split("value")
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(h // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        seen = (scores @ v).transpose(1, 0, 2).reshape(len(ids), h)
        x = norm(x + linear(seen, p + "attention.output.dense"), p + "attention.output.LayerNorm")
        y = linear(x, p + "intermediate.dense")
        y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
        x = norm(x + linear(y, p + "output.dense"), p + "output.LayerNorm")
    return x, np.tanh(linear(x[0], "pooler.dense"))


# The encoder as a program.

def program(w, c, shape, outputs, names, target):
    """MIL of the encoder for inputs of `shape` (None: any number of tokens), with the outputs asked for."""
    h, heads, n = c["hidden_size"], c["num_attention_heads"], shape[1]
    const = lambda name: w[name].astype(np.float32)
    flexible = shape[0] != 1 or n is None
    rows = get_new_symbol() if shape[0] != 1 else 1
    tokens = n or get_new_symbol()

    def body(ids, mask, kinds):
        norm = lambda x, name: mb.layer_norm(x=x, axes=[-1], gamma=const(name + ".weight"), beta=const(name + ".bias"),
                                             epsilon=np.float32(c["layer_norm_eps"]))
        linear = lambda x, name: mb.linear(x=x, weight=const(name + ".weight"), bias=const(name + ".bias"))
        words = mb.gather(x=const("embeddings.word_embeddings.weight"), indices=ids, axis=0)
        positions = const("embeddings.position_embeddings.weight")
        if flexible:
            end = mb.slice_by_index(x=mb.shape(x=ids), begin=[1], end=[2])
            end = mb.concat(values=[end, [h]], axis=0)
            positions = mb.slice_by_size(x=positions, begin=[0, 0], size=end)
        else:
            positions = positions[:n]
        positions = mb.expand_dims(x=positions, axes=[0])
        x = mb.add(x=words, y=positions)
        kinds = mb.gather(x=const("embeddings.token_type_embeddings.weight"), indices=kinds, axis=0)
        x = norm(mb.add(x=x, y=kinds), "embeddings.LayerNorm")
        shown = mb.cast(x=mask, dtype="fp32")
        hidden = mb.mul(x=mb.sub(x=np.float32(1), y=shown), y=np.float32(-30000))
        hidden = mb.expand_dims(x=hidden, axes=[1, 2])
        for layer in range(c["num_hidden_layers"]):
            p = f"encoder.layer.{layer}."

            def split(name):
                y = linear(x, p + "attention.self." + name)
                y = mb.reshape(x=y, shape=mb.concat(values=[mb.shape(x=ids), [heads, h // heads]], axis=0))
                return mb.transpose(x=y, perm=[0, 2, 1, 3])

            q, k, v = split("query"), split("key"), split("value")
            q = mb.mul(x=q, y=np.float32(1 / math.sqrt(h // heads)))
            scores = mb.add(x=mb.matmul(x=q, y=k, transpose_y=True), y=hidden)
            seen = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)
            seen = mb.reshape(x=mb.transpose(x=seen, perm=[0, 2, 1, 3]), shape=mb.concat(values=[mb.shape(x=ids), [h]], axis=0))
            x = norm(mb.add(x=x, y=linear(seen, p + "attention.output.dense")), p + "attention.output.LayerNorm")
            y = mb.gelu(x=linear(x, p + "intermediate.dense"), mode="EXACT")
            x = norm(mb.add(x=x, y=linear(y, p + "output.dense")), p + "output.LayerNorm")
        made = []
        if "last_hidden_state" in outputs:
            made.append(mb.identity(x=x, name="last_hidden_state"))
        if "pooler_output" in outputs:
            first = mb.squeeze(x=mb.slice_by_index(x=x, begin=[0, 0, 0], end=[0, 1, 0], end_mask=[True, False, True]), axes=[1])
            made.append(mb.tanh(x=linear(first, "pooler.dense"), name="pooler_output"))
        if "sentence_embedding" in outputs:
            count = mb.reduce_sum(x=shown, axes=[1], keep_dims=True)
            sums = mb.reduce_sum(x=mb.mul(x=x, y=mb.expand_dims(x=shown, axes=[2])), axes=[1])
            mean = mb.real_div(x=sums, y=count)
            length = mb.reduce_l2_norm(x=mean, axes=[1], keep_dims=True)
            made.append(mb.real_div(x=mean, y=length, name="sentence_embedding"))
        return tuple(made)

    if len(names) == 3:
        source = lambda input_ids, attention_mask, token_type_ids: body(input_ids, attention_mask, token_type_ids)
    else:
        source = lambda input_ids, attention_mask: body(input_ids, attention_mask, mb.mul(x=attention_mask, y=0))
    return mb.program(input_specs=[mb.TensorSpec(shape=(rows, tokens), dtype=types.int32) for _ in names], opset_version=target)(source)


def package(w, c, path, sizes, outputs, names, target, precision):
    """`sizes`: a shape, a list of shapes, or a pair of RangeDim."""
    fixed = isinstance(sizes[0], int) and isinstance(sizes[1], int)
    shape = sizes if fixed else (2, None)
    one_row = not fixed and (sizes[0] == 1 if not isinstance(sizes, list) else False)
    source = program(w, c, (1, None) if one_row else shape, outputs, names, target)
    kinds = ct.EnumeratedShapes(shapes=sizes) if isinstance(sizes, list) else sizes
    inputs = [ct.TensorType(name=name, shape=kinds, dtype=np.int32) for name in names]
    model = ct.convert(source, inputs=inputs, minimum_deployment_target=target, compute_precision=precision,
                       convert_to="mlprogram", skip_model_load=True)
    shutil.rmtree(path, ignore_errors=True)
    model.save(str(path))


# The folders.

def weights(c, random):
    h, inner = c["hidden_size"], c["intermediate_size"]
    w = {}
    put = lambda name, *shape, scale=0.3, plus=0.0: w.__setitem__(
        name, (random.standard_normal(shape) * scale + plus).astype(np.float16).astype(np.float64))

    def linear(name, out, into):
        put(name + ".weight", out, into)
        put(name + ".bias", out)

    def norm(name):
        put(name + ".weight", h, scale=0.2, plus=1.0)
        put(name + ".bias", h)

    for name, rows in [("word", c["vocab_size"]), ("position", c["max_position_embeddings"]), ("token_type", 2)]:
        put(f"embeddings.{name}_embeddings.weight", rows, h, scale=0.8)
    norm("embeddings.LayerNorm")
    for layer in range(c["num_hidden_layers"]):
        p = f"encoder.layer.{layer}."
        for part in ["query", "key", "value"]:
            linear(p + "attention.self." + part, h, h)
        linear(p + "attention.output.dense", h, h)
        norm(p + "attention.output.LayerNorm")
        linear(p + "intermediate.dense", inner, h)
        linear(p + "output.dense", h, inner)
        norm(p + "output.LayerNorm")
    linear("pooler.dense", h, h)
    return w


def pooled(hidden, pooler, how, normalize):
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.max(0), "pooler": pooler}[how]
    return vector / np.linalg.norm(vector) if normalize else vector


def golden(w, c, texts, vocabulary, most, how, normalize):
    rows = []
    for text in texts:
        ids = encode(text, vocabulary, most)
        cut = len(pieces(text, vocabulary)) - (len(ids) - 2)
        vector = pooled(*forward(w, c, np.array(ids)), how, normalize)
        rows.append(dict(text=text, ids=ids, cut=cut, vector=[float(f"{v:.8g}") for v in vector]))
    return rows


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def modules(*kinds):
    return [dict(idx=i, name=str(i), path="" if i == 0 else f"{i}_{kind}", type=f"sentence_transformers.models.{kind}")
            for i, kind in enumerate(kinds)]


def tokenizer(vocabulary):
    special = [t for t in vocabulary if t.startswith("[")]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [dict(id=vocabulary[t], content=t, single_word=False, lstrip=False, rstrip=False, normalized=False,
                              special=True) for t in special],
        "normalizer": dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True),
        "pre_tokenizer": dict(type="BertPreTokenizer"),
        "post_processor": dict(type="BertProcessing", sep=["[SEP]", vocabulary["[SEP]"]], cls=["[CLS]", vocabulary["[CLS]"]]),
        "decoder": dict(type="WordPiece", prefix="##", cleanup=True),
        "model": dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##", max_input_chars_per_word=100,
                      vocab=vocabulary),
    }


def small():
    shutil.rmtree(HERE, ignore_errors=True)
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    c = dict(model_type="bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             vocab_size=len(vocabulary), max_position_embeddings=32, layer_norm_eps=1e-7, pad_token_id=0)
    three = ["input_ids", "attention_mask", "token_type_ids"]
    variants = {
        # Any length; vectors of tokens and the pooler's; sentence-transformers' files.
        "ranged": (11, (1, ct.RangeDim(1, 32, default=8)), ["last_hidden_state", "pooler_output"], three, ct.target.iOS16,
                   ct.precision.FLOAT32, "mean", True, 32),
        # One length, 16-bit, the first token, no normalisation; BERT's own vocabulary file.
        "fixed": (12, (1, 16), ["last_hidden_state"], three[:2], ct.target.iOS16, ct.precision.FLOAT16, "cls", False, 16),
        # Several shapes of several texts; the text's own vector.
        "enumerated": (13, [(1, 8), (1, 32), (4, 8), (4, 32)], ["sentence_embedding"], three, ct.target.iOS18,
                       ct.precision.FLOAT32, "mean", True, 32),
    }
    for name, (seed, sizes, outputs, names, target, precision, how, normalize, most) in variants.items():
        folder, w = HERE / name, weights(c, np.random.default_rng(seed))
        folder.mkdir(parents=True)
        package(w, c, folder / f"{name}.mlpackage", sizes, outputs, names, target, precision)
        write(folder / "config.json", c)
        if name == "fixed":
            write(folder / "vocab.txt", "\n".join(vocabulary) + "\n")
        else:
            write(folder / "tokenizer.json", json.dumps(tokenizer(vocabulary)))
        if name != "enumerated":
            write(folder / "modules.json", modules("Transformer", "Pooling", *(["Normalize"] if normalize else [])))
            write(folder / "1_Pooling/config.json", {"word_embedding_dimension": 16, "pooling_mode_cls_token": how == "cls",
                                                     "pooling_mode_mean_tokens": how == "mean"})
        rows = golden(w, c, TEXTS, vocabulary, most, how, normalize)
        if name == "ranged":
            for other in ["cls", "last", "max", "pooler"]:
                for row, more in zip(rows, golden(w, c, TEXTS, vocabulary, most, other, False)):
                    row[other] = more["vector"]
        write(folder / "golden.json", json.dumps(rows))
    total = sum(f.stat().st_size for f in HERE.rglob("*") if f.is_file())
    print(f"{total / 1e3:.0f} kB")


def checkpoint(folder, out):
    """all-MiniLM-L6-v2, or another BERT of sentence-transformers with mean pooling."""
    from safetensors.numpy import load_file

    c = json.loads((folder / "config.json").read_text())
    w = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()
         if value.dtype.kind == "f"}
    vocabulary = {t: i for i, t in enumerate((folder / "vocab.txt").read_text().splitlines())}
    most = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    three = ["input_ids", "attention_mask", "token_type_ids"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, precision in [("float32", ct.precision.FLOAT32), ("float16", ct.precision.FLOAT16)]:
        to = out / name
        to.mkdir()
        package(w, c, to / "model.mlpackage", (1, ct.RangeDim(1, 512, default=64)), ["last_hidden_state"], three,
                ct.target.iOS17, precision)
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
                     "1_Pooling/config.json"]:
            (to / file).parent.mkdir(exist_ok=True)
            shutil.copy(folder / file, to / file)
    write(out / "golden.json", golden(w, c, SENTENCES, vocabulary, most, "mean", True))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        small()
