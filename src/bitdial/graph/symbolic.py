"""Types of captured values: torch's symbolic sizes as dimensions of the graph, and how converted arguments are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bitdial.errors import CaptureError
from bitdial.graph.ir import BatchDim, Dim, Shape, TensorType


class Ref(str):
    """A graph value among converted arguments (tells it from a string argument)."""


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def tensor_type(value: Tensor, where: str) -> TensorType:
    """The type that torch.export recorded. Raises CaptureError for a size that is no multiple of the batch size."""
    return TensorType(shape_of(value.shape, where), dtype_name(value))


def shape_of(shape: Sequence[Any], where: str) -> Shape:
    return tuple(dim_of(d, where) for d in shape)


def dim_of(d: Any, where: str) -> Dim:
    """int or SymInt -> Dim. Raises CaptureError where a size is not a multiple of the batch size."""
    if isinstance(d, int):
        return d
    expression = d.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return int(expression)
    if len(symbols) == 1 and not str(symbols[0]).startswith("u"):  # "u": a size that depends on the data
        factor = expression / symbols[0]
        if factor.is_Integer:
            return BatchDim(int(factor))
        samples = [expression.subs(symbols[0], n) for n in (2, 3, 5, 8)]  # floor divisions that come out even
        if all(s.is_Integer and s * 2 == samples[0] * n for s, n in zip(samples, (2, 3, 5, 8), strict=True)):
            return BatchDim(int(samples[0]) // 2)
    raise CaptureError(
        f"'{where}' has the size {expression}, which is no multiple of the batch size: only the batch dimension may be dynamic"
    )
