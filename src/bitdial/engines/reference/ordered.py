"""Float operators whose sums have a fixed order, so that every engine can give the same bits.

Everything is built from float32 additions, subtractions, multiplications and divisions, each rounded once: no fused
multiply-add, no approximate reciprocal, no library function. The CPU engine's kernels do the very same in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdial.errors import InputError
from bitdial.graph.ir import Node

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
        for part in x.narrow(dim, 0, whole).reshape(*x.shape[:dim], -1, LANES, *x.shape[dim + 1 :]).unbind(dim):
            lanes += part
    rest = x.shape[dim] - whole
    if rest:
        lanes.narrow(dim, 0, rest).add_(x.narrow(dim, whole, rest))
    width = LANES // 2
    while width:
        lanes = lanes.narrow(dim, 0, width) + lanes.narrow(dim, width, width)
        width //= 2
    return lanes


def over_axes(x: Tensor, axes: Sequence[int], keepdim: bool, mean: bool = False) -> Tensor:
    """Sum, or fl(sum / n), over axes, whose elements count in the order of the axes."""
    over = sorted({a % x.dim() for a in axes})
    kept = [a for a in range(x.dim()) if a not in over]
    place = len(kept) if over[-1] - over[0] >= len(over) else over[0]
    flat = x.permute([*kept, *over]) if place == len(kept) else x
    flat = flat.flatten(place, place + len(over) - 1)
    total = ordered_sum(flat, place)
    if mean:
        total = divided(total, flat.shape[place])
    return total.reshape([1 if a in over else s for a, s in enumerate(x.shape) if keepdim or a in kept])


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float) -> Tensor:
    """LayerNorm over the last `axes` axes.

    mean = fl(sum / n); d = fl(x - mean); var = fl(sum(fl(d * d)) / n); inv = fl(1 / fl(sqrt(fl(var + eps))));
    y = fl(fl(fl(d * inv) * weight) + bias), weight and bias only where they are given.
    """
    flat = x.flatten(x.dim() - axes)
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


# ---- operators of the graph ------------------------------------------------------------------------------------------------


def _layer_norm(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    if any(v.dtype != torch.float32 for v in x):
        return None
    weight, bias = x[1] if len(x) > 1 else None, x[2] if len(x) > 2 else None
    return layer_norm(x[0], weight, bias, len(node.attrs["normalized_shape"]), node.attrs["eps"])


def _mean(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    return over_axes(x[0], node.attrs["axes"], node.attrs["keepdim"], mean=True) if _summed(node.attrs["axes"], x[0]) else None


def _summed(axes: Any, x: Tensor) -> bool:
    """Whether a sum over these axes is one of float32 numbers with axes named."""
    return x.dtype == torch.float32 and isinstance(axes, (list, tuple)) and len(axes) > 0 and x.numel() > 0


def _arguments(node: Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """An aten operator's arguments behind the first, by position or by name."""
    args, kwargs = list(node.attrs["args"])[1:], node.attrs["kwargs"]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if given.keys() - set(names) or given.get("dtype") is not None:
        raise KeyError
    return [given.get(name, default) for name, default in zip(names, defaults, strict=True)]


def _aten_sum(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    try:
        axes, keepdim, _ = _arguments(node, ("dim", "keepdim", "dtype"), (None, False, None))
    except KeyError:
        return None
    axes = [axes] if isinstance(axes, int) else axes
    return over_axes(x[0], axes, bool(keepdim), node.op == "aten.mean.dim") if _summed(axes, x[0]) else None


def _norm(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    try:
        order, axes, keepdim, _ = _arguments(node, ("ord", "dim", "keepdim", "dtype"), (2, None, False, None))
    except KeyError:
        return None
    axes = [axes] if isinstance(axes, int) else axes
    return square_root(over_axes(x[0] * x[0], axes, bool(keepdim))) if order == 2 and _summed(axes, x[0]) else None


def _root(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    return square_root(x[0] + 0.0) if x[0].dtype == torch.float32 else None


def _embedding(node: Node, x: Sequence[Tensor]) -> Tensor | None:
    table, ids = x[:2]
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < table.shape[0]):
        wrong = ids[(ids < 0) | (ids >= table.shape[0])].flatten()[0]
        raise InputError(
            f"the batch holds numbers outside of a table: '{node.name}' looks up row {int(wrong)} of {table.shape[0]}"
        )
    return None


# Those whose last bit would depend on the order of additions or on a library; None: evaluate the node as ever.
OPERATORS: dict[str, Callable[[Node, Sequence[Tensor]], Tensor | None]] = {
    "layer_norm": _layer_norm, "mean": _mean, "aten.sum.dim_IntList": _aten_sum, "aten.mean.dim": _aten_sum,
    "aten.linalg_vector_norm.default": _norm, "aten.sqrt.default": _root, "aten.embedding.default": _embedding,
}  # fmt: skip
