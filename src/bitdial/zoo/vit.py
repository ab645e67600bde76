"""Small vision transformer (Dosovitskiy et al. 2021) for 32 x 32 images, with convolutional stem (Xiao et al. 2021)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdial.errors import ConfigError

LAYER_NORM_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block on tokens [N, T, dim]: attention, then a two-layer perceptron with GELU."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"dim {dim} is not divisible by {heads} heads; choose a multiple")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def attention(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        width = dim // self.heads
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * (1 / math.sqrt(width)), dim=-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, dim))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + hidden


class CifarViT(nn.Module):
    """Six blocks of width 128 with four heads over an 8 x 8 grid of tokens and a class token.

    Input float32 [N, 3, 32, 32], output float32 logits [N, num_classes].
    """

    def __init__(self, num_classes: int = 10, dim: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, dim, 3, padding=1),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit(num_classes: int = 10) -> CifarViT:
    """The ViT of 1.3 M parameters."""
    return CifarViT(num_classes)
