"""Rounding with straight-through gradients: the steps of the integer engine, differentiable.

Forward, each function computes what the reference engine computes, on integers held in a float type. Backward, rounding
counts as the identity and clamping passes the gradient of what lies inside (straight-through estimator: Bengio et al. 2013;
with clipping: Choi et al., PACT, 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Requantize(torch.autograd.Function):
    """clamp(rne(acc * multiplier + bias)) in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, acc: Tensor, multiplier: Tensor, bias: Tensor, lo: float, hi: float, dtype: torch.dtype
    ) -> Tensor:
        t = torch.addcmul(bias, acc.float(), multiplier)
        ctx.save_for_backward(t, multiplier, acc if ctx.needs_input_grad[1] else torch.empty(0))
        ctx.limits, ctx.dtype, ctx.bias_shape = (lo, hi), acc.dtype, bias.shape
        return t.clamp(lo, hi).round_().to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        t, multiplier, acc = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0].float(), t, *ctx.limits)
        grad_multiplier = (grad * acc).sum_to_size(multiplier.shape) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[2] else None
        grad_acc = (grad * multiplier).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_acc, grad_multiplier, grad_bias, None, None, None


def requantize(
    acc: Tensor, multiplier: Tensor, bias: Tensor, lo: float, hi: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """clamp(rne(acc * multiplier + bias), lo, hi), integers in `dtype`.

    acc: any float type; multiplier and bias: float32, broadcastable against acc (bias in steps of the output). Gradients
    reach all three.
    """
    result: Tensor = _Requantize.apply(  # type: ignore[no-untyped-call]
        acc, multiplier, bias, float(lo), float(hi), dtype
    )
    return result


class _RoundClamp(torch.autograd.Function):
    """clamp(rne(t))."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, lo: float, hi: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(t)
        ctx.limits = (lo, hi)
        return t.clamp(lo, hi).round_().to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (t,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0].to(t.dtype), t, *ctx.limits), None, None, None


def round_clamp(t: Tensor, lo: float, hi: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """clamp(rne(t), lo, hi), integers in `dtype`; the gradient passes where lo < t < hi."""
    result: Tensor = _RoundClamp.apply(t, float(lo), float(hi), dtype)  # type: ignore[no-untyped-call]
    return result


class _Lower(torch.autograd.Function):
    """clamp(rne(x * inverse), lo, hi) * power; gradient 1 where nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor, power: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        t = (x * inverse).round_()
        clipped = torch.maximum(torch.minimum(t, hi), lo)
        ctx.save_for_backward(t, clipped)
        return clipped * power

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        t, clipped = ctx.saved_tensors
        return grads[0] * t.eq(clipped), None, None, None, None


def lower(x: Tensor, inverse: Tensor, power: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Values read back from low precision: clamp(rne(x * inverse), lo, hi) * power, all broadcastable, in x's type.

    inverse = 2^-shift, power = 2^shift; where a channel stays at 8 bits both are 1 and lo, hi its 8-bit range. Exact in
    bfloat16 too: 8-bit integers and powers of two have no more than its 8 bits of precision.
    """
    result: Tensor = _Lower.apply(x, inverse, power, lo, hi)  # type: ignore[no-untyped-call]
    return result
