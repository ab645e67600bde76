"""Modules that are tricky to capture, each with a maker of example inputs for any batch size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # for float_operators

Case = tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]


def image(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(n: int) -> tuple[Tensor, ...]:
        return (torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)),)

    return make


class Fn(nn.Module):
    """A module around a function of (module, *inputs); parts become submodules or parameters."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.relu(self.a(left)) + self.b(right)


class Swin(nn.Module):
    """Windows of 2x2 folded into the batch, with a cyclic shift, as in Swin."""

    def __init__(self, shift: int = 1) -> None:
        super().__init__()
        self.shift, self.norm, self.qkv, self.proj = shift, nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, c)
        y = self.proj(y).view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        out: Tensor = self.last(x * gate)
        return out


class Attention(nn.Module):
    def __init__(self, causal: bool = False, mask: str = "none", batch_first: bool = True) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.causal, self.kind = causal, mask
        bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
        self.register_buffer("mask", (bias > -0.5) | torch.eye(5, dtype=torch.bool) if mask == "bool" else bias)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q = self.q(x).view(n, t, 2, 4).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, 2, 4).permute(2, 0, 3, 1, 4)
        mask = None if self.kind == "none" else self.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).reshape(n, t, c))
        return out


class TorchAttention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention, self.batch_first = nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = self.last(y if self.batch_first else y.transpose(0, 1))
        return out


def _shuffle(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = m.a(x).view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)
    out: Tensor = m.b(F.relu(x))
    return out


def _inplace(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y = F.relu(y, inplace=True)
    y += x
    y.mul_(0.5).clamp_(min=-1.0, max=1.0)
    out: Tensor = m.b(y)
    return out


def _split(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, dim=1)
    c, d, e = torch.split(b, [1, 2, 1], dim=1)
    return torch.cat([torch.sigmoid(a), c, torch.tanh(d), e[:, :, ::2].repeat(1, 1, 2, 1)[:, :, : e.shape[2]]], dim=1)


def _heads(m: Any, x: Tensor) -> dict[str, Any]:
    y = torch.relu(m.a(x))
    return {"logits": m.b(y.mean((2, 3))), "parts": (y.amax((2, 3)), [y[:, 0]])}


def _bn_shared(m: Any, x: Tensor) -> Tensor:
    """One conv under two batch norms: its weights must not be folded in place."""
    out: Tensor = m.bn1(m.conv(x)) + m.bn2(m.conv(torch.relu(x)))
    return out


def _conv(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


def _tied() -> nn.Module:
    model = Fn(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6, bias=False))
    model.b.weight = model.a.weight
    return model


def _norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(channels)
    norm: Any = kind(channels)
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.uniform_(norm.weight, -1.0, 1.5), nn.init.uniform_(norm.bias)
    return norm  # type: ignore[no-any-return]


CASES: dict[str, Case] = {
    "reused module": (
        lambda: Fn(lambda m, x: m.a(torch.relu(m.a(x))), a=nn.Conv2d(4, 4, 3, padding=1)),
        image(4, 5, 5),
    ),
    "shared weights": (_tied, image(6)),
    "shared conv, two norms": (
        lambda: Fn(_bn_shared, conv=nn.Conv2d(4, 4, 1), bn1=_norm(4), bn2=_norm(4)),
        image(4, 5, 5),
    ),
    "in-place": (lambda: Fn(_inplace, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), image(4, 5, 5)),
    "functional relu": (lambda: Fn(lambda m, x: F.relu(m.a(x)), a=nn.Linear(6, 6)), image(6)),
    "same value twice": (
        lambda: Fn(lambda m, x: m.b(torch.cat([m.a(x)] * 2, 1)), a=nn.Linear(6, 6), b=nn.Linear(12, 3)),
        image(6),
    ),
    "square and double": (lambda: Fn(lambda m, x: m.a(x * x) + (x + x), a=nn.Linear(6, 6)), image(6)),
    "gram matrix": (lambda: Fn(lambda m, x: (y := m.a(x)) @ y.transpose(1, 2), a=nn.Linear(6, 6)), image(3, 6)),
    "concat": (
        lambda: Fn(
            lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x), x], 1)),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 5, 1),
            c=nn.Conv2d(12, 4, 1),
        ),
        image(3, 5, 5),
    ),
    "split and chunk": (lambda: Fn(_split, a=nn.Conv2d(3, 8, 1)), image(3, 6, 6)),
    "channel shuffle": (
        lambda: Fn(_shuffle, a=nn.Conv2d(4, 8, 1, groups=2), b=nn.Conv2d(8, 4, 3, groups=2)),
        image(4, 5, 5),
    ),
    "torch channel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1)),
        image(4, 5, 5),
    ),
    "grouped": (_conv(6, 9, 3, groups=3, padding=1, stride=2), image(6, 7, 7)),
    "depthwise": (_conv(6, 12, 3, groups=6, dilation=2, padding=2), image(6, 7, 7)),
    "same padding, odd": (_conv(3, 4, 3, padding="same"), image(3, 6, 6)),
    "same padding, even": (_conv(3, 4, (2, 4), padding="same", dilation=(3, 1)), image(3, 8, 7)),
    "valid padding": (_conv(3, 4, 3, padding="valid"), image(3, 6, 6)),
    "reflect padding": (_conv(3, 4, 3, padding=1, padding_mode="reflect"), image(3, 6, 6)),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 6, 5, stride=2, padding=2), _norm(6, nn.BatchNorm1d), nn.ReLU()),
        image(3, 16),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), _norm(4, nn.BatchNorm3d), nn.MaxPool3d(2)), image(2, 5, 5, 5)),
    "conv transpose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        image(3, 4, 4),
    ),
    "squeeze-excite": (SqueezeExcite, image(3, 6, 6)),
    "torch attention": (lambda: TorchAttention(True), image(5, 8)),
    "torch attention, time first": (lambda: TorchAttention(False), image(5, 8)),
    "attention": (lambda: Attention(), image(5, 8)),
    "causal attention": (lambda: Attention(causal=True), image(5, 8)),
    "bool mask": (lambda: Attention(mask="bool"), image(5, 8)),
    "float mask": (lambda: Attention(mask="float"), image(5, 8)),
    "attention mask at run time": (
        lambda: Fn(
            lambda m, x: m.b(
                F.scaled_dot_product_attention(q := m.a(x), q, x, attn_mask=(x[:, None, :, 0] > -9.0).expand(-1, 5, -1))
            ),
            a=nn.Linear(8, 8),
            b=nn.Linear(8, 8),
        ),
        image(5, 8),
    ),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), image(5, 8)),
    "windows": (lambda: Swin(0), image(4, 6, 8)),
    "shifted windows": (lambda: Swin(1), image(4, 4, 8)),
    "einsum": (
        lambda: Fn(lambda m, x: m.b(torch.einsum("nij,nkj->nik", m.a(x), x)), a=nn.Linear(6, 6), b=nn.Linear(3, 2)),
        image(3, 6),
    ),
    "adaptive pools": (
        lambda: Fn(
            lambda m, x: torch.cat(
                [
                    F.adaptive_avg_pool2d(y := m.a(x), (3, 2)).flatten(1),
                    F.adaptive_avg_pool2d(y, (4, 5)).flatten(1),
                    F.adaptive_max_pool2d(y, 1).flatten(1),
                    F.adaptive_avg_pool2d(y, (6, 6)).flatten(1),
                ],
                1,
            ),
            a=nn.Conv2d(3, 4, 1),
        ),
        image(3, 6, 6),
    ),
    "pools": (
        lambda: Fn(
            lambda m, x: (
                F.max_pool2d(y := m.a(x), 3, 2, 1, ceil_mode=True)
                + F.avg_pool2d(y, 3, 2, 1, ceil_mode=True, count_include_pad=False)
            ),
            a=nn.Conv2d(3, 4, 1),
        ),
        image(3, 8, 8),
    ),
    "1d pools": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1)),
        image(3, 12),
    ),
    "activations": (
        lambda: nn.Sequential(
            nn.Linear(6, 6),
            nn.ReLU6(),
            nn.Linear(6, 6),
            nn.Hardtanh(-0.5, 0.5),
            nn.Linear(6, 6),
            nn.LeakyReLU(0.2),
            nn.ELU(0.7),
            nn.Linear(6, 6),
            nn.SiLU(),
            nn.Mish(),
            nn.Softplus(),
            nn.GELU(approximate="tanh"),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.PReLU(),
            nn.SELU(),
            nn.Softmax(-1),
        ),
        image(6),
    ),
    "clamps": (
        lambda: Fn(
            lambda m, x: m.a(m.a(x).clamp(min=0)).clamp(max=0.3).clamp(-0.2, 0.2).clamp_min(-0.1), a=nn.Linear(6, 6)
        ),
        image(6),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 2, 1)
        ),
        image(3, 5, 5),
    ),
    "pre-activation": (
        lambda: nn.Sequential(
            _norm(3), nn.ReLU(), nn.Conv2d(3, 6, 3), _norm(6), nn.ReLU(), _norm(6), nn.Conv2d(6, 2, 1)
        ),
        image(3, 6, 6),
    ),
    "linear and norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), _norm(8, nn.BatchNorm1d), nn.ReLU(), nn.Linear(8, 3, bias=False)),
        image(6),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Linear(6, 2)),
        image(6),
    ),
    "class token": (
        lambda: Fn(
            lambda m, x: m.a(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1))[:, 0],
            a=nn.Linear(6, 6),
            token=nn.Parameter(torch.randn(1, 1, 6)),
        ),
        image(4, 6),
    ),
    "zeros made for the batch": (
        lambda: Fn(
            lambda m, x: m.a(torch.cat([torch.zeros(x.shape[0], 2, 6), x, x.new_ones(x.shape[0], 1, 6)], 1)),
            a=nn.Linear(6, 6),
        ),
        image(4, 6),
    ),
    "embedding": (
        lambda: Fn(lambda m, x: m.b(m.a(x)), a=nn.Embedding(11, 6), b=nn.Linear(6, 3)),
        lambda n: (torch.arange(5 * n).reshape(n, 5) % 11,),
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)),
        image(3, 4, 4),
    ),
    "upsample": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 1)),
        image(3, 4, 4),
    ),
    "stack and unbind": (
        lambda: Fn(
            lambda m, x: torch.stack([t * (i + 1) for i, t in enumerate(m.a(x).unbind(1))], -1), a=nn.Linear(6, 6)
        ),
        image(3, 6),
    ),
    "pad and slice": (
        lambda: Fn(lambda m, x: m.a(F.pad(x[:, :, 1:-1, ::2], (1, 0, 2, 1)))[:, 1:3, -2:], a=nn.Conv2d(3, 4, 2)),
        image(3, 6, 6),
    ),
    "casts": (
        lambda: Fn(lambda m, x: m.a(x.double().float()).to(torch.float64).to(torch.float32) / 4, a=nn.Linear(6, 6)),
        image(6),
    ),
    "nothing": (nn.Identity, image(3)),
    "dict and tuple outputs": (lambda: Fn(_heads, a=nn.Conv2d(3, 4, 1), b=nn.Linear(4, 2)), image(3, 5, 5)),
    "two inputs": (TwoInputs, lambda n: (torch.randn(n, 6), torch.randn(n, 4))),
    "linear on a plane": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), image(3, 5, 6)),
}


@pytest.fixture(scope="session")
def case_maker() -> Callable[[str], Case]:
    def make(name: str) -> Case:
        return CASES[name]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Any test here with a parameter `case` runs on all of the modules."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(CASES))
