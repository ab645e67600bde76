"""The compiled element-wise steps of training: one pass over memory where torch takes five to ten.

Each function returns None where they cannot be used (another device or type, an odd layout, no compiled extension); the caller
then goes torch's way, which is the definition. Forward results are the same but for rounding ties of float32; tests compare
both, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitdial.engines.cpu.native import choose_isa, extension, missing

_TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float32, torch.bfloat16): 2,
}  # as `Types` in csrc/cpu/training/training.h
_enabled = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Everything by torch, for comparison."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@functools.cache
def _steps(isa: str, threads: int) -> Any:
    return extension().Training(isa, threads)


def steps() -> Any:
    """The compiled steps, on as many threads as torch has."""
    return _steps(choose_isa(), torch.get_num_threads())


def usable(source: Tensor, result: torch.dtype) -> bool:
    """Whether there are kernels for this device and these types at all."""
    return (
        _enabled
        and source.device.type == "cpu"
        and (source.dtype, result) in _TYPES
        and source.numel() > 0
        and not missing()
    )


def dense_rows(t: Tensor, axis: int | None) -> tuple[int, int] | None:
    """(rows, channels) of a tensor whose channels along `axis` lie next to each other and whose rows fill its memory; None if
    they do not. axis: 1 (rows are the other axes), -1, or None where any dense tensor will do."""
    if t.dim() == 0:
        return None
    if axis != 1 and t.is_contiguous():
        return t.numel() // t.shape[-1], t.shape[-1]
    if (axis == 1 or axis is None) and t.dim() > 2 and t.permute(0, *range(2, t.dim()), 1).is_contiguous():
        return t.numel() // t.shape[1], t.shape[1]
    return None


def channel_axis(vector: Tensor) -> int | None:
    """Along which axis a broadcastable vector runs: 1 for [1, C, 1, ..], -1 for [C] or [1, .., C], None if it is no vector."""
    if vector.dim() > 2 and vector.shape[1] == vector.numel():
        return 1
    return -1 if vector.dim() > 0 and vector.shape[-1] == vector.numel() else None


def like(t: Tensor, template: Tensor) -> Tensor:
    """`t` laid out in memory as `template` (of the same shape)."""
    if t.stride() == template.stride():
        return t
    return torch.empty_like(template, dtype=t.dtype).copy_(t)


def flat(vector: Tensor) -> Tensor:
    """Contiguous float32."""
    return vector.detach().to(torch.float32).reshape(-1).contiguous()


@dataclass(frozen=True)
class Requantized:
    """What `requantize` computed, and what its gradient needs. rows: (rows, channels) as the kernels see them."""

    out: Tensor
    inside: Tensor
    multiplier: Tensor
    rows: tuple[int, int]
    types: int


def requantize(
    acc: Tensor, multiplier: Tensor | float, bias: Tensor | None, residual: Tensor | None, factor: float, lo: float,
    hi: float, dtype: torch.dtype,
) -> Requantized | None:  # fmt: skip
    """clamp(rne(acc * multiplier + bias + residual * factor), lo, hi) in `dtype`, with where nothing was clipped."""
    if not usable(acc, dtype):
        return None
    axis = channel_axis(multiplier) if isinstance(multiplier, Tensor) else None
    if isinstance(multiplier, Tensor) and axis is None:
        return None
    rows = dense_rows(acc, axis)
    if rows is None or (isinstance(multiplier, Tensor) and multiplier.numel() != rows[1]):
        return None
    if bias is not None and bias.numel() != rows[1]:
        return None
    if residual is not None:
        if residual.shape != acc.shape or residual.dtype != dtype:
            return None
        residual = like(residual.detach(), acc)
    scales = flat(multiplier) if isinstance(multiplier, Tensor) else torch.full((rows[1],), multiplier)
    added = torch.zeros(rows[1]) if bias is None else flat(bias)
    out, inside = torch.empty_like(acc, dtype=dtype), torch.empty_like(acc, dtype=torch.uint8)
    types = _TYPES[acc.dtype, dtype]
    steps().requantize(
        types, acc.data_ptr(), scales.data_ptr(), added.data_ptr(), 0 if residual is None else residual.data_ptr(),
        factor, lo, hi, out.data_ptr(), inside.data_ptr(), *rows,
    )  # fmt: skip
    return Requantized(out, inside, scales, rows, types)


def requantize_grad(
    grad: Tensor, inside: Tensor, multiplier: Tensor, factor: float, rows: tuple[int, int], types: int,
    source: torch.dtype, *, residual: bool, bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of acc, residual and bias (float32 [C]) from that of the result."""
    grad = like(grad, inside)
    of_acc = torch.empty_like(inside, dtype=source)
    of_residual = torch.empty_like(inside, dtype=grad.dtype) if residual else None
    of_bias = torch.empty(rows[1]) if bias else None
    steps().requantize_grad(
        types, grad.data_ptr(), inside.data_ptr(), multiplier.data_ptr(), factor, of_acc.data_ptr(),
        0 if of_residual is None else of_residual.data_ptr(), 0 if of_bias is None else of_bias.data_ptr(), *rows,
    )  # fmt: skip
    return of_acc, of_residual, of_bias


def extract(x: Tensor, inverse: Tensor, power: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor] | None:
    """(clamp(rne(x * inverse), lo, hi) * power, where nothing was clipped), vectors over one axis."""
    if not usable(x, x.dtype):
        return None
    axis = channel_axis(inverse)
    rows = None if axis is None else dense_rows(x, axis)
    if rows is None or inverse.numel() != rows[1]:
        return None
    vectors = [flat(v) for v in (inverse, power, lo, hi)]
    out, inside = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    addresses = [v.data_ptr() for v in vectors]
    steps().extract_floats(
        _TYPES[x.dtype, x.dtype], x.data_ptr(), *addresses, out.data_ptr(), inside.data_ptr(), *rows
    )  # fmt: skip
    return out, inside


def pass_through(grad: Tensor, inside: Tensor) -> Tensor:
    """The gradient where `inside`, else 0."""
    grad = like(grad, inside)
    out = torch.empty_like(grad)
    steps().pass_through(
        _TYPES[grad.dtype, grad.dtype], grad.data_ptr(), inside.data_ptr(), out.data_ptr(), grad.numel(), 1
    )  # fmt: skip
    return out


def look_up(x: Tensor, values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor] | None:
    """(values at x, slopes at x): x integers from -128 to 255, tables float32 [256] by their lowest eight bits."""
    if not usable(x, x.dtype):
        return None
    rows = dense_rows(x, None)
    if rows is None:
        return None
    out, slope = torch.empty_like(x), torch.empty_like(x)
    steps().look_up(
        _TYPES[x.dtype, x.dtype], x.data_ptr(), values.data_ptr(), slopes.data_ptr(), out.data_ptr(),
        slope.data_ptr(), *rows,
    )  # fmt: skip
    return out, slope
