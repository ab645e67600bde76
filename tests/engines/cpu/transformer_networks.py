"""Small transformers, and a convolutional network in their manner: what the CPU engine runs without leaving the extension."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from cpu_networks import QUICK
from torch import Tensor, nn

from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.program import Program

Inputs = list[npt.NDArray[Any]]


class Attention(nn.Module):
    """Heads over tokens [N, T, dim]. tokens: of a window, with a bias for every pair of them, as Swin has it."""

    def __init__(self, dim: int, heads: int, tokens: int = 0) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(1, heads, tokens, tokens)) if tokens else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias
            if mask is not None:
                by_window = scores.view(-1, len(mask), self.heads, t, t) + mask[None, :, None]
                scores = by_window.view(-1, self.heads, t, t)
            mixed = scores.softmax(-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, dim))
        return out


def perceptron(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, heads), perceptron(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Vit(nn.Module):
    """Patches of 4 x 4, a class token, positions; images of 12 x 12."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 10, dim))
        self.block, self.norm, self.head = Block(dim, 3), nn.LayerNorm(dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y: Tensor = self.head(self.norm(self.block(x))[:, 0])
        return y


class SwinBlock(nn.Module):
    """Attention in windows of a [N, size, size, dim] map, shifted or not, with the mask of shifted windows."""

    def __init__(self, dim: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = Attention(dim, heads, window * window), perceptron(dim)
        mask = None
        if shift:
            band = torch.arange(size)
            band = (band >= size - window).int() + (band >= size - shift).int()
            region = (3 * band[:, None] + band).view(size // window, window, size // window, window).permute(0, 2, 1, 3)
            region = region.reshape(-1, window * window)
            mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        (n, h, w, c), k = x.shape, self.window
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, c)
        y = self.attention(y, self.mask)
        y = y.view(-1, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = (x + y).reshape(n, -1, c)
        return (x + self.mlp(self.norm2(x))).reshape(n, h, w, c)


class Swin(nn.Module):
    """Windows, shifted windows, patch merging; images of 16 x 16."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patches, self.norm1 = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.still, self.shifted = SwinBlock(dim, 2, 8, 4, 0), SwinBlock(dim, 2, 8, 4, 2)
        self.merged, self.reduced = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)
        self.last, self.norm2, self.head = SwinBlock(2 * dim, 2, 4, 2, 1), nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shifted(self.still(self.norm1(self.patches(x).permute(0, 2, 3, 1))))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        x = self.norm2(self.last(self.reduced(self.merged(x))))
        y: Tensor = self.head(x.mean((1, 2)))
        return y


class ConvNext(nn.Module):
    """LayerNorm over channels between convolutions, in either order of axes; residuals scaled per channel."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.mixed, self.down = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, 2 * dim, 2, 2)
        self.mlp, self.scale = perceptron(dim), nn.Parameter(torch.randn(dim))
        self.last, self.norm3, self.head = nn.Conv2d(2 * dim, 24, 3), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.mixed(x).permute(0, 2, 3, 1)
        x = x + (self.mlp(self.norm2(y)) * self.scale).permute(0, 3, 1, 2)
        x = self.norm4(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.last(self.down(x))
        y: Tensor = self.head(self.norm3(x.mean((2, 3))))
        return y


class Encoder(nn.Module):
    """Token numbers and mask [N, 12] -> embeddings of length 1, the mean over the tokens; one layer of BERT."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(40, dim), nn.Embedding(16, dim), nn.Embedding(2, dim)
        self.norm, self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.inner, self.outer = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.words(ids) + self.kinds(torch.zeros_like(ids)) + self.places(torch.arange(t)[None])
        x = self.norm(x)
        barred = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        q, k, v = (part(x).view(n, t, 3, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=barred).transpose(1, 2).reshape(n, t, -1)
        x = self.norm1(self.out(mixed) + x)
        x = self.norm2(self.outer(F.gelu(self.inner(x))) + x)
        kept = mask.unsqueeze(-1).expand(x.shape).float()
        return F.normalize((x * kept).sum(1) / torch.clamp(kept.sum(1), min=1e-9), p=2.0, dim=1)


class Character(nn.Module):
    """Token numbers [N, 9] -> logits at every position; sees what came before."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(30, dim), nn.Parameter(torch.randn(9, dim))
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.last, self.head = nn.LayerNorm(dim), nn.Linear(dim, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        n, t, dim = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, dim // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, dim))
        y: Tensor = self.head(self.last(x))
        return y


class Rotary(nn.Module):
    """Attention over the columns of an image whose queries and keys are turned by their place, in float."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Conv2d(3, dim, (8, 1)), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 5)
        angle = torch.arange(8)[:, None] * 0.3 ** torch.arange(dim // 4)
        self.register_buffer("cos", angle.cos().repeat_interleave(2, 1))
        self.register_buffer("sin", angle.sin().repeat_interleave(2, 1))

    def turned(self, x: Tensor) -> Tensor:
        across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.cos + across * self.sin

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        n, t, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, dim // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, dim))
        y: Tensor = self.head(x.mean(1))
        return y


def images(size: int, n: int, seed: int) -> Inputs:
    return [np.random.default_rng(seed).normal(0, 1, (n, 3, size, size)).astype(np.float32)]


def sentences(n: int, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, (n, 12)), (np.arange(12) < rng.integers(2, 13, (n, 1))).astype(np.int64)]


NETWORKS: dict[str, tuple[type[nn.Module], Any]] = {
    "vit": (Vit, lambda n, seed: images(12, n, seed)),
    "swin": (Swin, lambda n, seed: images(16, n, seed)),
    "convnext": (ConvNext, lambda n, seed: images(16, n, seed)),
    "rotary": (Rotary, lambda n, seed: images(8, n, seed)),
    "encoder": (Encoder, sentences),
    "character": (Character, lambda n, seed: [np.random.default_rng(seed).integers(0, 30, (n, 9))]),
}


@cache
def transformer(name: str) -> tuple[Program, Inputs]:
    """A quantized network with random weights, and a batch of five."""
    torch.manual_seed(0)
    network, data = NETWORKS[name]
    config = QUICK.updated(bias_correction=False, low_weights="derived", lower_first_last=True)
    calibration = [torch.from_numpy(a) for a in data(8, 1)]
    return quantize_prepared(prepare(network().eval(), calibration, config), config), data(5, 2)
