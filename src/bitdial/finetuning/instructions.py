"""What the differentiable twin computes for the instructions other than convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.engines.reference import arithmetic
from bitdial.engines.reference.executor import max_pool, move_values
from bitdial.finetuning.kernels import usable
from bitdial.finetuning.rounding import function_table, look_up, requantize, round_clamp
from bitdial.graph.interpreter import apply_activation, evaluate_node
from bitdial.graph.ir import Node
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Dequantize,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
)

if TYPE_CHECKING:
    from bitdial.finetuning.network import TrainableNetwork as Net


def _quantize(net: Net, step: Quantize, x: list[Tensor], batch: int) -> Tensor:
    inverse = 1.0 / net.scale(step.name)
    return arithmetic.channels_last(requantize(x[0], inverse, None, step.lo, step.hi, net.dtype))


def _dequantize(net: Net, step: Dequantize, x: list[Tensor], batch: int) -> Tensor:
    return x[0].float() * net.scale(step.inputs[0])


def _matmul(net: Net, step: MatMul, x: list[Tensor], batch: int) -> Tensor:
    acc = torch.matmul(x[0], x[1].transpose(-1, -2) if step.transpose_b else x[1])
    factor = net.scale(step.inputs[0]) * net.scale(step.inputs[1]) * step.scale
    if step.clamp is not None:
        return requantize(acc, factor / net.scale(step.name), None, *net.limits(step.name, step.clamp), net.dtype)
    return apply_activation(acc.float() * factor, step.activation)


def _add(net: Net, step: Add, x: list[Tensor], batch: int) -> Tensor:
    factors, (lo, hi) = net.factors(step), net.limits(step.name, (step.lo, step.hi))
    return requantize(x[0], factors[0], None, lo, hi, net.dtype, x[1], factors[1])


def _mul(net: Net, step: Mul, x: list[Tensor], batch: int) -> Tensor:
    factor = net.factors(step)[0] * net.scale(step.inputs[1])
    return round_clamp(x[0].float() * x[1].float() * factor, *net.limits(step.name, (step.lo, step.hi)), net.dtype)


def _concat(net: Net, step: Concat, x: list[Tensor], batch: int) -> Tensor:
    lo, hi = net.limits(step.name, (step.lo, step.hi))
    parts = [
        v if net.same_scale(name, step.name) else round_clamp(v.float() * f, lo, hi, net.dtype)
        for name, v, f in zip(step.inputs, x, net.factors(step), strict=True)
    ]
    return torch.cat(parts, dim=step.axis)


def _sum_pool(net: Net, step: SumPool, x: list[Tensor], batch: int) -> Tensor:
    if step.window is None:
        y = x[0].float().mean(dim=step.axes, keepdim=step.keepdim)
    else:
        y = F.avg_pool2d(x[0].float(), *step.window.pairs[:3])
    return round_clamp(y * net.factors(step)[0], *net.limits(step.name, (step.lo, step.hi)), net.dtype)


def _lookup(net: Net, step: Lookup, x: list[Tensor], batch: int) -> Tensor:
    """A function of one 8-bit value; from a table where scales are fixed and the processor has the kernel."""
    q, source = net.program.qparams[step.name], net.program.qparams[step.inputs[0]]
    function = Node(step.name, step.function, list(step.inputs), step.attrs)
    unit, out = net.scale(step.inputs[0]), net.scale(step.name)

    def apply(integers: Tensor) -> Tensor:
        return round_clamp(evaluate_node(function, [integers * unit], batch) / out, q.qmin, q.qmax, net.dtype)

    found = None
    if not net.learn_scales and usable(x[0], x[0].dtype):
        if step.name not in net.tables:
            net.tables[step.name] = function_table(apply, source.signed)
        found = look_up(x[0], net.tables[step.name])
    return apply(x[0].float()) if found is None else found


def _float(net: Net, step: Float, x: list[Tensor], batch: int) -> Tensor:
    return evaluate_node(step.node, x, batch)


HANDLERS: dict[type[Instruction], Callable[[Net, Any, list[Tensor], int], Tensor]] = {
    Quantize: _quantize, Dequantize: _dequantize, MatMul: _matmul, Lookup: _lookup, Add: _add, Mul: _mul, Concat: _concat,
    SumPool: _sum_pool, MaxPool: max_pool, Move: move_values, Float: _float,
}  # fmt: skip
