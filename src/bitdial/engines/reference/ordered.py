"""Float operators whose sums have a fixed order, so that every engine can give the same bits.

Everything is built from float32 additions, subtractions, multiplications and divisions, each rounded once: no fused
multiply-add, no approximate reciprocal, no library function. The CPU engine's kernels do the very same in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 16


def ordered_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Sum along an axis, which keeps size 1, in the order that vectors of 16 give.

    Sixteen lanes start at +0; lane i adds elements i, i + 16, i + 32, ...; then lane i adds lane i + 8, of those that are left
    lane i + 4, then i + 2, then i + 1.
    """
    dim %= x.dim()
    whole = x.shape[dim] // LANES * LANES
    lanes = x.new_zeros([*x.shape[:dim], LANES, *x.shape[dim + 1 :]])
    if whole:
        for part in x.narrow(dim, 0, whole).unflatten(dim, (-1, LANES)).unbind(dim):
            lanes += part
    rest = x.shape[dim] - whole
    if rest:
        lanes.narrow(dim, 0, rest).add_(x.narrow(dim, whole, rest))
    width = LANES // 2
    while width:
        lanes = lanes.narrow(dim, 0, width) + lanes.narrow(dim, width, width)
        width //= 2
    return lanes


def ordered_mean(x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    """fl(sum / n) over axes, their elements in row-major order."""
    axes = sorted(a % x.dim() for a in axes)
    kept = [a for a in range(x.dim()) if a not in axes]
    flat = x.permute([*kept, *axes]).flatten(len(kept)) if axes != list(range(axes[0], axes[-1] + 1)) else x.flatten(
        axes[0], axes[-1]
    )
    place = len(kept) if flat.dim() == len(kept) + 1 and axes != list(range(axes[0], axes[-1] + 1)) else axes[0]
    mean = divided(ordered_sum(flat, place), flat.shape[place])
    shape = [1 if a in axes else s for a, s in enumerate(x.shape)] if keepdim else [x.shape[a] for a in kept]
    return mean.reshape(shape)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, normalized: int, eps: float) -> Tensor:
    """LayerNorm over the last `normalized` axes.

    mean = fl(sum / n); d = fl(x - mean); var = fl(sum(fl(d * d)) / n); inv = fl(1 / fl(sqrt(fl(var + eps))));
    y = fl(fl(fl(d * inv) * weight) + bias), weight and bias only where they are given.
    """
    flat = x.flatten(x.dim() - normalized)
    count = flat.shape[-1]
    d = flat - divided(ordered_sum(flat), count)
    var = divided(ordered_sum(d * d), count)
    inverse = torch.div(torch.ones_like(var), square_root(var + eps))
    y = d.mul_(inverse)
    if weight is not None:
        y.mul_(weight.reshape(-1))
    if bias is not None:
        y.add_(bias.reshape(-1))
    return y.reshape(x.shape)


def divided(x: Tensor, by: float) -> Tensor:
    """fl(x / by): a division, not a multiplication by the reciprocal, which some devices take for a number."""
    return torch.div(x, torch.full((1,), float(by), dtype=x.dtype, device=x.device))


def square_root(x: Tensor) -> Tensor:
    """The float32 square root, rounded once whatever library computes it: from one in float64, whose error is too small to
    reach a midpoint between two numbers of float32."""
    return x.double().sqrt().float()
