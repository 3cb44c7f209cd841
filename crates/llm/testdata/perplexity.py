"""The perplexity of story.txt to the checkpoint behind the demo model, in plain numpy at float64: what `eval perplexity` must find.

    pip install numpy safetensors tokenizers
    python crates/llm/testdata/perplexity.py ../shared/models/tales-hf [WINDOW STRIDE]

The windows are those of `crates/llm/src/evaluation.rs`: every token once, after all tokens of its window before it.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

folder = Path(sys.argv[1])
window, stride = (int(n) for n in sys.argv[2:4]) if len(sys.argv) > 3 else (128, 64)
config = json.loads((folder / "config.json").read_text())
weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
heads, kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * gain


def rotate(x):
    half = width // 2
    angles = np.arange(len(x))[:, None] * config["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def log_probabilities(ids):
    """[tokens, vocabulary], each row after the tokens up to its own."""
    x = weights["model.embed_tokens.weight"][ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(config["num_hidden_layers"]):
        w = lambda name: weights[f"model.layers.{layer}.{name}.weight"]
        h = norm(x, w("input_layernorm"))
        q, k, v = ((h @ w(f"self_attn.{n}_proj").T).reshape(len(ids), -1, width) for n in "qkv")
        q, k = rotate(norm(q, w("self_attn.q_norm"))), rotate(norm(k, w("self_attn.k_norm")))
        k, v = (np.repeat(t, heads // kv, 1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width) + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(ids), -1) @ w("self_attn.o_proj").T
        h = norm(x, w("post_attention_layernorm"))
        gate = h @ w("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    logits = norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


text = (Path(__file__).parent / "story.txt").read_text()
ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
surprises, start, scored = [], 0, 1
while scored < len(ids):
    end = min(len(ids), start + window)
    rows = log_probabilities(ids[start:end])
    surprises += [-rows[at - start - 1, ids[at]] for at in range(scored, end)]
    start, scored = min(start + stride, end - 1), end
surprises = np.array(surprises)
mean, error = surprises.mean(), surprises.std(ddof=1) / np.sqrt(len(surprises))
print(f"{len(surprises)} tokens, mean nll {mean:.6f} ± {error:.6f}, perplexity {np.exp(mean):.4f}")
