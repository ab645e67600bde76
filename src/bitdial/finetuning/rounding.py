"""Rounding with straight-through gradients: the steps of the integer engine, differentiable.

Forward, each function computes what the reference engine computes, on integers held in a float type. Backward, rounding
counts as the identity and clamping passes the gradient of what lies inside (straight-through estimator: Bengio et al. 2013;
with clipping: Choi et al., PACT, 2018). On a CPU compiled kernels do it in one pass each where they can (`kernels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitdial.finetuning import kernels


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


class _CompiledRequantize(torch.autograd.Function):
    """The same, and with a residual, by compiled kernels; `done` is what they computed."""

    @staticmethod
    def forward(
        ctx: Any, acc: Tensor, bias: Tensor | None, residual: Tensor | None, factor: float, done: kernels.Requantized
    ) -> Tensor:
        ctx.save_for_backward(done.inside, done.multiplier)
        ctx.rows, ctx.types, ctx.factor, ctx.source = done.rows, done.types, factor, acc.dtype
        ctx.bias_shape = None if bias is None else bias.shape
        return done.out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        inside, multiplier = ctx.saved_tensors
        acc, residual, bias = kernels.requantize_grad(
            grads[0], inside, multiplier, ctx.factor, ctx.rows, ctx.types, ctx.source,
            residual=ctx.needs_input_grad[2], bias=ctx.needs_input_grad[1],
        )  # fmt: skip
        return acc, None if bias is None else bias.reshape(ctx.bias_shape), residual, None, None


def requantize(
    acc: Tensor,
    multiplier: Tensor | float,
    bias: Tensor | None,
    lo: float,
    hi: float,
    dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
    factor: Tensor | float = 1.0,
) -> Tensor:
    """clamp(rne(acc * multiplier + bias + residual * factor), lo, hi), integers in `dtype`.

    acc: any float type; multiplier and bias: float32, broadcastable against acc (bias in steps of the output; without one
    the multiplier may be a float); residual: of acc's shape. Gradients reach all of them.
    """
    lo, hi = float(lo), float(hi)
    learned = any(isinstance(v, Tensor) and v.requires_grad for v in (multiplier, factor))
    if not learned and not isinstance(factor, Tensor):
        with torch.no_grad():
            done = kernels.requantize(acc, multiplier, bias, residual, factor, lo, hi, dtype)
        if done is not None:
            result: Tensor = _CompiledRequantize.apply(acc, bias, residual, factor, done)  # type: ignore[no-untyped-call]
            return result
    if residual is None and bias is not None:
        plain: Tensor = _Requantize.apply(acc, multiplier, bias, lo, hi, dtype)  # type: ignore[no-untyped-call]
        return plain
    if bias is None:
        t = acc.float() * multiplier
    else:
        assert isinstance(multiplier, Tensor)
        t = torch.addcmul(bias, acc.float(), multiplier)
    return round_clamp(t if residual is None else t + residual.float() * factor, lo, hi, dtype)


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


class _Extract(torch.autograd.Function):
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


class _Computed(torch.autograd.Function):
    """What a kernel computed of x, element by element: `out`; `gradient(grad, kept)` is the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, kept: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.gradient = gradient
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.gradient(grads[0], *ctx.saved_tensors), None, None, None


def extract(x: Tensor, inverse: Tensor, power: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Values read back from low precision: clamp(rne(x * inverse), lo, hi) * power, all broadcastable, in x's type.

    inverse = 2^-shift, power = 2^shift; where a channel stays at 8 bits both are 1 and lo, hi its 8-bit range. Exact in
    bfloat16 too: 8-bit integers and powers of two have no more than its 8 bits of precision.
    """
    with torch.no_grad():
        done = kernels.extract(x, inverse, power, lo, hi)
    if done is not None:
        compiled: Tensor = _Computed.apply(x, *done, kernels.pass_through)  # type: ignore[no-untyped-call]
        return compiled
    result: Tensor = _Extract.apply(x, inverse, power, lo, hi)  # type: ignore[no-untyped-call]
    return result


def keep_some(x: Tensor, source: torch.Generator) -> Tensor:
    """bool, shape and memory layout of x (dense): True with probability 1/2, each element by itself, in few draws."""
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=source)
    bits = words.view(torch.int8)[: x.numel()] < 0
    layout = torch.empty_like(x, dtype=torch.bool, device="cpu")
    return bits.as_strided(layout.shape, layout.stride()).to(x.device)


def read_back(low: Tensor, power: Tensor, limit: Tensor) -> Tensor:
    """Low weights before their shift, rounded, and read back: clamp(rne(low), -limit, limit) * power.

    The gradient of `low` is that of the result times the power, and 0 where the rounded value is clipped.
    """
    one = low.new_ones(())
    return extract(low, one, one, -limit, limit) * power


def function_table(function: Callable[[Tensor], Tensor], signed: bool) -> tuple[Tensor, Tensor]:
    """Values and slopes, float32 [256], of a function of 8-bit integers, by their lowest eight bits."""
    integers = torch.arange(256, dtype=torch.float32)
    if signed:
        integers = torch.where(integers > 127, integers - 256, integers)
    with torch.enable_grad():
        integers.requires_grad_()
        values = function(integers)
        (slopes,) = torch.autograd.grad(values.sum(), integers)
    return values.detach().float().contiguous(), slopes.contiguous()


def look_up(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor | None:
    """A `function_table` applied to integers x; None where that is not compiled for them."""
    with torch.no_grad():
        done = kernels.look_up(x, *table)
    if done is None:
        return None
    result: Tensor = _Computed.apply(x, *done, torch.mul)  # type: ignore[no-untyped-call]
    return result
