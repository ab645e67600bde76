"""Compiles a program to the flat list of steps of the extension.

Every value gets a tensor (see `bitdial.engines.cpu.values`) with the margin that its convolutions need. Instructions without a
compiled form become `FallbackNode` items between runs of compiled steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bitdial.engines import memory
from bitdial.engines.attention import Attention, find_attention
from bitdial.engines.cpu import compile_attention, compile_float, compile_moves, compile_rounding
from bitdial.engines.cpu.values import Buffer, Values, own
from bitdial.engines.memory import Unsupported
from bitdial.graph.batch_axis import batch_axes
from bitdial.graph.operators import softmax_axis
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Contract,
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
from bitdial.quantization.program import Program

FOLD_BELOW = 16  # input channels; below, a row of a filter is one contiguous run of bytes


@dataclass
class FallbackNode:
    """An instruction that runs in the reference engine, and why."""

    step: Instruction
    reason: str


@dataclass
class Compiled:
    """What the compiler made of a program.

    items: (from, to) ranges of compiled steps and `FallbackNode`s, in order. buffers: value -> tensor. reasons: instruction ->
    why it runs in the reference engine. unchecked: float inputs that steps read without looking for NaN. parts: layers that one
    step computes, by its name. pads: padded value -> what convolutions read in its place, and its margins (top, bottom,
    left, right).
    """

    items: list[tuple[int, int] | FallbackNode]
    buffers: dict[str, Buffer]
    reasons: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)
    pads: dict[str, tuple[str, tuple[int, int, int, int]]] = field(default_factory=dict)


class Compiler(Values):
    """One use: `Compiler(program, native).run()`. native: a `_native.Program` without steps."""

    def __init__(self, program: Program, native: Any, accumulators: bool = False) -> None:
        super().__init__(program, native)
        self.accumulators = accumulators  # store int32 accumulators in float outputs: for tests of the kernels
        self.reasons: dict[str, str] = {}
        self.batch_axes = batch_axes(program.graph) if program.extraction == "dynamic" else {}
        self.items: list[tuple[int, int] | FallbackNode] = []
        self.closed = 0  # steps within them
        self.fused: set[str] = set()

    def run(self) -> Compiled:
        for name in self.program.inputs:
            self.try_buffer(name, external=True)
        attention = find_attention(self.program, self.readers)
        self.done.update(part.name for a in attention.values() for part in a.parts)
        for step in self.steps:
            if step.name in attention:
                self._attention(attention[step.name])
            elif step.name not in self.done:
                self._compile(step)
        for name in self.program.outputs:
            self.settle(name)
        self._close()
        parts = {name: a.layers for name, a in attention.items() if name in self.fused}
        return Compiled(self.items, self.buffers, self.reasons, self.unchecked_inputs(), parts, self.pads)

    def _attention(self, attention: Attention) -> None:
        """One step, or its instructions one by one."""
        attention, before = compile_attention.settled(self, attention)
        if before is not None:
            self._compile(before)
        try:
            compile_attention.attention(self, attention)
            self.fused.add(attention.values.name)
        except Unsupported:
            self.done.difference_update(part.name for part in attention.parts)
            for part in attention.parts:
                if part.name not in self.done:  # softmax may round its result itself
                    self._compile(part)

    def _compile(self, step: Instruction) -> None:
        try:
            HANDLERS[type(step)](self, step)
        except Unsupported as reason:
            for value in step.operands():
                self.settle(value)
            self._close()
            self.items.append(FallbackNode(step, str(reason)))
            self.reasons[step.name] = str(reason)
            self.try_buffer(step.name)

    def _close(self) -> None:
        """End a run of compiled steps."""
        now = len(self.native.steps())
        if now > self.closed:
            self.items.append((self.closed, now))
            self.closed = now


# ---- instructions --------------------------------------------------------------------------------------------------------


def _contract(c: Compiler, step: Contract) -> None:
    layer = step.layer
    assert layer.weight is not None
    source, (top, _, left, _) = c.pads.get(step.inputs[0], (step.inputs[0], (0, 0, 0, 0)))
    x = c.eight(source)
    memory.check_contract(step, x, c.program)
    y = c.buffer(step.name)
    residual = -1 if step.residual is None else c.laid_out_as(step.residual, y)
    lo, hi = step.limits
    weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
    kernel, stride, pad, dilation = (step.window or memory.UNIT).pairs
    pad = pad[0] + top, pad[1] + left
    low = np.ascontiguousarray(layer.low).astype(np.uint8)
    any_low = bool(low.any()) if low.size else False
    dynamic = any_low and c.program.extraction == "dynamic"
    if dynamic and ((axis := c.batch_axes[step.inputs[0]]) is None or axis.outer != 1):  # kernels take a sample in one piece
        raise Unsupported("its samples lie apart in its input, or it cannot be told how they lie")
    groups = layer.conv_groups
    depthwise = groups > 1 and weight.shape[1] == 1 and not any_low and not y.is_float
    if depthwise and (residual < 0 or step.residual in c.program.qparams):
        per = np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)
        c.native.add_depthwise(
            step.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
            weight=per.reshape(-1), kernel=kernel, stride=stride, pad=pad, dilation=dilation,
            multiplicity=weight.shape[0] // groups, bias=own(layer.bias, np.int32),
            multiplier=own(layer.multiplier, np.float32), macs=int(layer.macs),
        )  # fmt: skip
        return
    if any_low:
        bounds, shifts, weight_shift = layer.group_bounds, layer.activation_shift, layer.weight_shift
        stored = None if layer.low_weight is None else own(layer.low_weight.reshape(weight.shape), np.int8)
    else:  # one group is as good as many
        bounds = np.arange(groups + 1, dtype=np.int32) * weight.shape[1]
        shifts, weight_shift = np.zeros(groups, np.uint8), np.zeros((weight.shape[0], 1), np.uint8)
        low, stored = np.zeros((len(layer.bias), groups), dtype=np.uint8), None
    folded = not any_low and groups == 1 and weight.shape[1] < FOLD_BELOW and kernel[1] > 1 and dilation[1] == 1
    c.native.add_conv(
        step.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
        accumulators=c.accumulators and y.is_float, folded=folded, weight=own(weight, np.int8),
        stride=stride, pad=pad, dilation=dilation, conv_groups=groups,
        amax=layer.amax, wmax=layer.wmax, input_signed=x.signed, bounds=own(bounds, np.int32),
        activation_shift=own(shifts, np.uint8), weight_shift=own(weight_shift, np.uint8), low=low,
        bias=own(layer.bias, np.int32), multiplier=own(layer.multiplier, np.float32), low_weight=stored, dynamic=dynamic,
    )  # fmt: skip


def _float(c: Compiler, step: Float) -> None:
    if softmax_axis(step.node) is not None:
        compile_attention.softmax(c, step)
    else:
        compile_float.float_operator(c, step)


def _lookup(c: Compiler, step: Lookup) -> None:
    x, y = c.eight(step.inputs[0]), c.buffer(step.name)
    values = step.table.astype(np.int16)  # indexed by q, or q + 128: the stored byte in both cases
    stored = (values + (128 if y.signed else 0)).astype(np.uint8)
    c.native.add_table(step.name, x.tensor, y.tensor, np.ascontiguousarray(stored))


def _pair_of(c: Compiler, step: Add | Mul) -> tuple[Buffer, Buffer, bool]:
    """Both operands, exchanged (True) where the first broadcasts: that is written for the second."""
    a, b = (c.eight(v) for v in step.inputs)
    types = [c.program.types[v].shape for v in step.inputs]
    out = c.program.types[step.name].shape
    exchange = types[0] != out
    if exchange:
        a, b = b, a
        types.reverse()
    narrow = any(d != e and d != 1 for d, e in zip(types[1], out, strict=False))
    if types[0] != out or len(types[1]) != len(out) or narrow:
        raise Unsupported("it broadcasts both operands")
    if types[1] != out and not a.channels_first and len(out) > 3:
        raise Unsupported("it broadcasts along inner axes")
    return a, b, exchange


def _add(c: Compiler, step: Add) -> None:
    a, b, exchange = _pair_of(c, step)
    factors = step.factors[::-1] if exchange else step.factors
    y = c.buffer(step.name)
    c.native.add_add(step.name, a.tensor, b.tensor, y.tensor, *factors, float(step.lo), float(step.hi))


def _mul(c: Compiler, step: Mul) -> None:
    a, b, _ = _pair_of(c, step)
    y = c.buffer(step.name)
    c.native.add_mul(step.name, a.tensor, b.tensor, y.tensor, step.factor, float(step.lo), float(step.hi))


def _concat(c: Compiler, step: Concat) -> None:
    rank = len(c.program.types[step.name].shape)
    axis = step.axis % rank
    parts = [c.eight(v) for v in step.inputs]
    y = c.buffer(step.name)
    places = {1: 3, 2: 1, 3: 2} if y.channels_first else {rank - 1: 3, rank - 2: 2} if rank < 4 else {rank - 1: 3}
    native_axis = places.get(axis)
    if native_axis is None or axis == 0:
        raise Unsupported(f"concatenation along axis {axis} of {rank}")
    offset = 0
    for part, f in zip(parts, step.factors, strict=True):
        c.native.add_rescale(
            step.name, part.tensor, y.tensor, native_axis, offset, f, float(step.lo), float(step.hi)
        )
        offset += {1: part.h, 2: part.w, 3: part.c}[native_axis]


def _sum_pool(c: Compiler, step: SumPool) -> None:
    x = c.eight(step.inputs[0])
    rank = len(c.program.types[step.inputs[0]].shape)
    kernel, stride, pad, _ = memory.sum_window(step, x, rank).pairs
    y = c.buffer(step.name)
    c.native.add_sum_pool(
        step.name, x.tensor, y.tensor, kernel, stride, pad, step.factor, float(step.lo), float(step.hi)
    )


def _max_pool(c: Compiler, step: MaxPool) -> None:
    x = c.eight(step.inputs[0])
    window = memory.plane_window(step.window)
    y = c.buffer(step.name)
    c.native.add_max_pool(step.name, x.tensor, y.tensor, *window.pairs)


HANDLERS: dict[type[Instruction], Callable[[Compiler, Any], None]] = {
    Quantize: compile_rounding.quantize, Dequantize: compile_moves.dequantize, Contract: _contract,
    MatMul: compile_attention.matmul, Lookup: _lookup, Add: _add, Mul: _mul, Concat: _concat, SumPool: _sum_pool,
    MaxPool: _max_pool, Move: compile_moves.move, Float: _float,
}  # fmt: skip
