"""Small causal transformer (Vaswani et al. 2017, pre-norm as in GPT-2) that predicts the next character."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdial.errors import ConfigError

CONTEXT = 128
VOCABULARY = 65  # characters of the tinyshakespeare text
EMBEDDING_STD = 0.02


class CausalBlock(nn.Module):
    """Pre-norm block on tokens [N, T, dim]: attention to the token itself and those before, then a GELU perceptron."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"dim {dim} is not divisible by {heads} heads; choose a multiple")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def attention(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + hidden


class CharTransformer(nn.Module):
    """Token and learned position embeddings, `depth` blocks, LayerNorm, linear head (not tied to the embedding).

    Input int64 [N, T] token indices with T <= context, output float32 logits [N, T, vocabulary]: at position t those of
    token t + 1, given tokens 0 to t. Raises ConfigError for sizes that do not fit together.
    """

    def __init__(
        self, vocabulary: int = VOCABULARY, dim: int = 128, depth: int = 4, heads: int = 4, context: int = CONTEXT
    ) -> None:
        super().__init__()
        if min(vocabulary, dim, depth, heads, context) < 1:
            raise ConfigError("vocabulary, dim, depth, heads and context must be at least 1")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.zeros(context, dim))
        self.blocks = nn.Sequential(*(CausalBlock(dim, heads, 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)
        self._initialize(depth)

    def _initialize(self, depth: int) -> None:
        nn.init.normal_(self.position, std=EMBEDDING_STD)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # layers that write into the residual stream start smaller, so that depth does not add up (GPT-2)
                residual = name.endswith((".proj", ".fc2"))
                gain = 1.0 / math.sqrt(2 * depth) if residual else 1.0
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise ConfigError(f"{length} tokens exceed the context of {self.context}: cut the text into shorter pieces")
        x = self.embedding(tokens) + self.position[:length]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def char_transformer(vocabulary: int = VOCABULARY) -> CharTransformer:
    """The language model of 0.8 M parameters: four blocks of width 128 with four heads, context 128."""
    return CharTransformer(vocabulary)
