"""Samples of what each layer multiplies its weights with: rows of the im2col matrix, in 8-bit integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.executor import Executor
from bitdial.graph.ir import Node
from bitdial.quantization.calibration import rows_of
from bitdial.quantization.program import QuantizedLayer

Patches = npt.NDArray[np.integer]
IMAGES_PER_BATCH = 16  # unfolded at once: bounds memory at large resolutions


class PatchSampler:
    """Collects up to `count` rows [C, taps] per layer while the 8-bit model runs; deterministic for a seed."""

    def __init__(self, executor: Executor, layers: Sequence[str], n_batches: int, count: int, seed: int) -> None:
        self.per_batch = max(1, -(-count // max(1, n_batches)))
        self.generator = torch.Generator().manual_seed(seed)
        self.readers: dict[str, list[tuple[Node, QuantizedLayer]]] = {}
        for name in layers:
            node = executor.instructions[name].as_node()
            self.readers.setdefault(node.inputs[0], []).append((node, executor.program.layers[name]))
        self.parts: dict[str, list[Tensor]] = {}

    def __call__(self, value: str, x: Tensor) -> None:
        for node, layer in self.readers.get(value, []):
            kind = torch.int16 if x.is_floating_point() else x.dtype
            self.parts.setdefault(node.name, []).append(self._rows(node, layer, x.cpu()).to(kind))

    def _rows(self, node: Node, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """int [rows, C, taps]."""
        assert layer.weight is not None
        return patch_rows(node, layer.weight.shape, x, self.generator, self.per_batch)

    def patches(self) -> dict[str, Patches]:
        """Layer name -> [rows, C, taps], int16 or bytes as the values came in."""
        return {name: torch.cat(parts).numpy() for name, parts in self.parts.items()}


def patch_rows(
    node: Node, weight_shape: Sequence[int], x: Tensor, generator: torch.Generator, count: int
) -> Tensor:
    """[rows, C, taps], dtype of x (float32 for convolutions over two axes): at most `count` rows of what the layer multiplies
    its weights with, at random positions of at most IMAGES_PER_BATCH samples of x; rows of one sample stay together."""

    def pick(available: int) -> Tensor:
        return torch.randperm(available, generator=generator)[:count].sort().values

    if node.op == "linear":
        flat = x.reshape(-1, x.shape[-1])
        return flat[pick(flat.shape[0])][:, :, None]
    taps = math.prod(weight_shape[2:])
    images = x[torch.randperm(x.shape[0], generator=generator)[:IMAGES_PER_BATCH]]
    if x.dim() != 4:  # 1-D and 3-D convolutions: every tap sees the value at its own position
        flat = images.movedim(1, -1).reshape(-1, x.shape[1])
        return flat[pick(flat.shape[0])][:, :, None].expand(-1, -1, taps)
    return windows(images, node, weight_shape[2:], pick).float()


def windows(x: Tensor, node: Node, kernel: Sequence[int], pick: Callable[[int], Tensor]) -> Tensor:
    """[rows, C, taps]: the chosen ones of all windows of a convolution's input [n, C, *space]; the others are never made
    (`unfold` makes all). pick: places of the chosen ones, given how many windows there are."""
    stride, padding, dilation = (node.attrs[name] for name in ("stride", "padding", "dilation"))
    space = x.shape[2:]
    axes = list(zip(space, kernel, stride, padding, dilation, strict=True))
    sizes = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in axes]
    inner = math.prod(sizes)
    chosen = pick(len(x) * inner)
    sample, place = chosen // inner, chosen % inner
    pixel, outside = sample[:, None], torch.zeros(1, 1, dtype=torch.bool)  # [rows, taps]: place in samples and space
    for size, (length, k, t, p, d) in zip(sizes, axes, strict=True):
        inner //= size
        own = (place // inner % size * t - p)[:, None] + d * torch.arange(k)
        outside = (outside[:, :, None] | ((own < 0) | (own >= length))[:, None, :]).flatten(1)
        pixel = (pixel[:, :, None] * length + own.clamp(0, length - 1)[:, None, :]).flatten(1)
    found = rows_of(x, 1)[pixel].transpose(1, 2)
    return found.masked_fill_(outside[:, None], 0) if any(padding) else found
