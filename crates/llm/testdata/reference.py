"""The tiny model of the test bundles as plain numpy: what every packaging of it must say.

A decoder as Llama is one: RMS norm, rotary positions, gated MLP, no biases, all gains 1. Float64 throughout,
no cache: every step computes the whole conversation anew. Weights are rounded to float16, as packages store them.
"""

from dataclasses import dataclass

import numpy as np

VOCABULARY, HIDDEN, HEADS, HEAD, MLP = 96, 16, 2, 8, 32
LAYERS, CONTEXT, BATCH, WINDOW = 2, 64, 8, 16
EPSILON = 1e-5
END = 1


@dataclass
class Layer:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    local: bool


def f16(x):
    return np.asarray(x).astype(np.float16)


class Model:
    """Weights from one seed. With `window`, the first layer sees the last WINDOW tokens only."""

    def __init__(self, window, seed=20):
        rng = np.random.default_rng(seed)
        normal = lambda rows, columns, scale=1.0: f16(rng.standard_normal((rows, columns)) * scale / np.sqrt(columns))
        self.embeddings = f16(rng.standard_normal((VOCABULARY, HIDDEN)))
        self.layers = [
            Layer(
                q=normal(HEADS * HEAD, HIDDEN, 1.6),
                k=normal(HEADS * HEAD, HIDDEN, 1.6),
                v=normal(HEADS * HEAD, HIDDEN, 1.5),
                o=normal(HIDDEN, HEADS * HEAD, 1.5),
                gate=normal(MLP, HIDDEN),
                up=normal(MLP, HIDDEN),
                down=normal(HIDDEN, MLP, 1.5),
                local=window and i == 0,
            )
            for i in range(LAYERS)
        ]
        self.head = normal(VOCABULARY, HIDDEN, 4.0)
        angles = np.arange(2 * CONTEXT)[:, None] / 100.0 ** (np.arange(0, HEAD, 2) / HEAD)
        # Longer than the context, as converters write them.
        self.cos = f16(np.concatenate([np.cos(angles)] * 2, -1))
        self.sin = f16(np.concatenate([np.sin(angles)] * 2, -1))

    def logits(self, tokens):
        """Logits after the last of `tokens`."""
        n = len(tokens)
        x = self.embeddings[tokens].astype(np.float64)
        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        for layer in self.layers:
            seen = (distance >= 0) & (distance < (WINDOW if layer.local else n))
            h = norm(x)
            q = self.rotate(heads(h @ layer.q.T.astype(np.float64), HEADS))
            k = self.rotate(heads(h @ layer.k.T.astype(np.float64), HEADS))
            v = heads(h @ layer.v.T.astype(np.float64), HEADS)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(HEAD)
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (weights / weights.sum(-1, keepdims=True)) @ v
            x = x + mixed.transpose(1, 0, 2).reshape(n, -1) @ layer.o.T.astype(np.float64)
            h = norm(x)
            gate = h @ layer.gate.T.astype(np.float64)
            x = x + (gate / (1 + np.exp(-gate)) * (h @ layer.up.T.astype(np.float64))) @ layer.down.T.astype(np.float64)
        return norm(x[-1]) @ self.head.T.astype(np.float64)

    def rotate(self, x):
        n = x.shape[1]
        left, right = np.split(x, 2, axis=-1)
        turned = np.concatenate([-right, left], -1)
        return x * self.cos[:n].astype(np.float64) + turned * self.sin[:n].astype(np.float64)

    def greedy(self, prompt):
        """The best tokens after `prompt` until the context is full, and by how much each is the best."""
        tokens, margins = list(prompt), []
        while len(tokens) <= CONTEXT:
            logits = self.logits(tokens)
            best = int(np.argmax(logits))
            margins.append(float(logits[best] - np.max(np.delete(logits, best))))
            tokens.append(best)
        return tokens[len(prompt) :], margins


def norm(x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON)


def heads(x, count):
    return x.reshape(x.shape[0], count, HEAD).transpose(1, 0, 2)


LENGTHS = [1, 2, BATCH, BATCH + 1, WINDOW - 1, WINDOW, WINDOW + 1, 30, 45, CONTEXT - 1, CONTEXT]
LEAST_MARGIN = 0.02


def golden(model):
    """One prompt of each length, drawn until every step's margin is comfortable and the answer is no loop of few tokens."""
    rng = np.random.default_rng(7)
    cases = []
    for length in LENGTHS:
        while True:
            prompt = [int(t) for t in rng.integers(2, VOCABULARY, length)]
            tokens, margins = model.greedy(prompt)
            if min(margins) >= LEAST_MARGIN and len(set(tokens)) >= len(tokens) // 4:
                break
        cases.append({"prompt": prompt, "tokens": tokens, "least_margin": round(min(margins), 4)})
    return cases


if __name__ == "__main__":
    for window in (False, True):
        for case in golden(Model(window)):
            print(len(case["prompt"]), case["least_margin"], case["tokens"][:40])
