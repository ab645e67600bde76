"""How the files beside this one were made: `python tests/artifact/stored/write.py FOLDER`, with the code of that day.

Ten networks, small, but of all kinds: quantized, stored, and run at every ratio by the reference engine. `NAME.npz` has the
inputs and outputs. The files of the repository are those of the last code before programs became twelve instructions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdial.artifact import save_program
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig

CONFIG = QuantizeConfig(
    selector="greedy", calibration_images=16, search_images=8, batch_size=16, group_size=4, shift_choice="value_error",
    ratios=(0.0, 0.5, 1.0), low_bits=4,
)  # fmt: skip


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Residual sums, one of them with a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 8), conv(8, 8)
        self.d, self.e = conv(8, 16, stride=2), conv(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.c(F.relu(self.b(x))) + x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.e(F.relu(self.d(x))) + short)
        return self.head(x.mean((2, 3)))


class Plain(nn.Module):
    """Convolutions, max pooling, a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 12), nn.ReLU(), nn.MaxPool2d(2), conv(12, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 9, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Mobile(nn.Module):
    """An inverted residual with a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.up, self.deep, self.down = conv(8, 24, 1), conv(24, 24, groups=24), conv(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.down(F.relu6(self.deep(F.relu6(self.up(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Concatenations of several scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(16, 8), conv(24, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        c = F.relu(self.c(torch.cat([a, b], 1)))
        x = F.avg_pool2d(F.relu(self.d(torch.cat([a, b, c], 1))), 2, 2)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Unary functions by table, and a product of two values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 12), conv(12, 12)
        self.q, self.r = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = x * torch.sigmoid(self.r(F.silu(self.q(x.mean((2, 3), keepdim=True)))))
        return self.head(F.mish(self.b(x)).mean((2, 3)))


class Shuffled(nn.Module):
    """Grouped convolutions with shuffled channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 16, groups=2), conv(16, 16, groups=4, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.max_pool2d(F.relu(self.c(x)), 2).mean((2, 3)))


class Perceptron(nn.Module):
    """Linear layers only."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Linear(24, 32), nn.LeakyReLU(0.1), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 16), nn.Tanh(),
            nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Wave(nn.Module):
    """Convolutions over one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 12, 5, padding=2), nn.Conv1d(12, 16, 3, dilation=2)
        self.c = nn.Conv1d(16, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.c(F.elu(self.b(F.elu(self.a(x)))))).mean(2))


class Attention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 9, 16) * 0.1)
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        n, t, c = x.shape
        q, k, v = self.qkv(self.one(x)).reshape(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(n, t, c))
        x = x + self.down(F.gelu(self.up(self.two(x))))
        return self.head(x.mean(1))


class Windows(nn.Module):
    """Rolled windows; two inputs, two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix, self.tail = conv(3, 12), nn.Linear(6, 12), nn.Linear(12, 12), conv(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, more: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.a(x)) * self.b(more)[:, :, None, None]
        n, c, h, w = x.shape
        y = torch.roll(x, (2, 2), (2, 3)).reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        y = F.relu(self.mix(y.reshape(-1, 16, c))).reshape(n, h // 4, w // 4, 4, 4, c)
        y = y.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        z = F.relu(self.tail(x + torch.roll(y, (-2, -2), (2, 3))))
        return {"scores": self.head(z.mean((2, 3))), "map": z}


def pictures(n: int) -> list[Tensor]:
    return [torch.randn(n, 3, 12, 12)]


NETWORKS: dict[str, tuple[type[nn.Module], Callable[[int], list[Tensor]]]] = {
    "residual": (Residual, pictures),
    "plain": (Plain, pictures),
    "mobile": (Mobile, pictures),
    "dense": (Dense, pictures),
    "gated": (Gated, pictures),
    "shuffled": (Shuffled, pictures),
    "perceptron": (Perceptron, lambda n: [torch.randn(n, 24)]),
    "wave": (Wave, lambda n: [torch.randn(n, 2, 40)]),
    "attention": (Attention, pictures),
    "windows": (Windows, lambda n: [*pictures(n), torch.randn(n, 6)]),
}


def write(folder: Path) -> None:
    for seed, (name, (network, samples)) in enumerate(NETWORKS.items()):
        torch.manual_seed(seed)
        model = network()
        model(*samples(32))  # for the statistics of BatchNorm
        program = quantize_prepared(prepare(model.eval(), samples(16), CONFIG), CONFIG)
        save_program(program, folder / f"{name}.bitdial")
        x = [t.numpy() for t in samples(3)]
        held = {f"input{i}": v for i, v in enumerate(x)}
        engine = ReferenceEngine(program)
        for i, ratio in enumerate(program.ratios):
            found = engine.run(x if len(x) > 1 else x[0], ratio)
            for j, out in enumerate(found if isinstance(found, tuple) else (found,)):
                held[f"ratio{i}_output{j}"] = np.asarray(out)
        np.savez_compressed(folder / f"{name}.npz", **held)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
