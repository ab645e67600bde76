"""Compiles a program to the flat list of steps of the extension.

Every value gets a tensor (see `bitdial.engines.memory`) with the margin that its convolutions need. Instructions without a
compiled form become `FallbackNode` items between runs of compiled steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines import memory
from bitdial.engines.memory import Unsupported
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
class Buffer(memory.Buffer):
    """Where a value lies: a tensor of the extension."""

    tensor: int = -1


@dataclass
class FallbackNode:
    """An instruction that runs in the reference engine, and why."""

    step: Instruction
    reason: str


@dataclass
class Compiled:
    """What the compiler made of a program.

    items: (from, to) ranges of compiled steps and `FallbackNode`s, in order. buffers: value -> tensor. reasons: instruction ->
    why it runs in the reference engine.
    """

    items: list[tuple[int, int] | FallbackNode]
    buffers: dict[str, Buffer]
    reasons: dict[str, str] = field(default_factory=dict)


class Compiler:
    """One use: `Compiler(program, native).run()`. native: a `_native.Program` without steps."""

    def __init__(self, program: Program, native: Any, accumulators: bool = False) -> None:
        self.program, self.native = program, native
        self.accumulators = accumulators  # store int32 accumulators in float outputs: for tests of the kernels
        self.steps = program.instructions
        self.buffers: dict[str, Buffer] = {}
        self.pads = self._pads()
        self.halos = self._halos()
        self.reasons: dict[str, str] = {}

    def run(self) -> Compiled:
        items: list[tuple[int, int] | FallbackNode] = []
        done = 0
        for name in self.program.inputs:
            self._try_buffer(name, external=True)
        for step in self.steps:
            try:
                HANDLERS[type(step)](self, step)
            except Unsupported as reason:
                now = len(self.native.steps())
                if now > done:
                    items.append((done, now))
                    done = now
                items.append(FallbackNode(step, str(reason)))
                self.reasons[step.name] = str(reason)
                self._try_buffer(step.name)
        now = len(self.native.steps())
        if now > done:
            items.append((done, now))
        return Compiled(items, self.buffers, self.reasons)

    # ---- tensors ---------------------------------------------------------------------------------------------------------

    def _pads(self) -> dict[str, tuple[str, tuple[int, int, int, int]]]:
        """Moves that pad images for convolutions alone -> what they pad, and by how much (top, bottom, left, right). No step
        runs for them: the convolutions find the zeros in the margin of the value itself."""
        readers: dict[str, list[Instruction]] = {}
        for step in self.steps:
            for value in step.operands():
                readers.setdefault(value, []).append(step)
        pads = {}
        for step in self.steps:
            if not isinstance(step, Move) or step.node.op != "pad" or step.name in self.program.outputs:
                continue
            around = [tuple(p) for p in step.node.attrs["pads"]]
            fits = len(around) == 4 and around[:2] == [(0, 0), (0, 0)] and min(min(p) for p in around) >= 0
            if fits and all(
                isinstance(r, Contract) and r.window is not None and r.residual is None for r in readers.get(step.name, [])
            ):
                pads[step.name] = step.inputs[0], (*around[2], *around[3])
        return pads

    def _halos(self) -> dict[str, tuple[int, int]]:
        """Margin that the convolutions reading a value need."""
        halos: dict[str, tuple[int, int]] = {}
        for step in self.steps:
            if isinstance(step, Contract) and step.window is not None and len(step.window.kernel) == 2:
                value, (top, bottom, left, right) = self.pads.get(step.inputs[0], (step.inputs[0], (0, 0, 0, 0)))
                old, pad = halos.get(value, (0, 0)), step.window.padding
                halos[value] = max(old[0], pad[0] + max(top, bottom)), max(old[1], pad[1] + max(left, right))
        return halos

    def buffer(self, name: str, external: bool = False) -> Buffer:
        """The tensor of a value, made at first use."""
        buffer = self.buffers.get(name)
        if buffer is not None:
            return buffer
        type_ = self.program.types[name]
        if name in self.program.constants:
            raise Unsupported("it reads a constant")
        q = self.program.qparams.get(name)
        if q is None and type_.dtype != "float32":
            raise Unsupported(f"it reads {type_.dtype}")
        factor, h, w, c, first = memory.physical(type_)
        halo = (0, 0) if q is None else self.halos.get(name, (0, 0))
        signed = q is not None and q.signed
        tensor = self.native.add_tensor(
            h=h, w=w, c=c, is_float=q is None, channels_first=first, external=external,
            zero=128 if signed else 0, factor=factor, halo=halo,
        )  # fmt: skip
        self.buffers[name] = Buffer(h, w, c, first, signed, q is None, factor, halo, tensor)
        return self.buffers[name]

    def _try_buffer(self, name: str, external: bool = False) -> None:
        """A tensor for a value made elsewhere, if the extension can hold it."""
        try:
            self.buffer(name, external)
        except Unsupported:
            return

    def eight(self, name: str) -> Buffer:
        buffer = self.buffer(name)
        if buffer.is_float:
            raise Unsupported(f"it reads '{name}' in float")
        return buffer


# ---- instructions --------------------------------------------------------------------------------------------------------


def _quantize(c: Compiler, step: Quantize) -> None:
    x = c.buffer(step.inputs[0])
    if not x.is_float:
        raise Unsupported("its input is not float")
    y = c.buffer(step.name)
    c.native.add_quantize(step.name, x.tensor, y.tensor, step.factor, float(step.lo), float(step.hi))


def _dequantize(c: Compiler, step: Dequantize) -> None:
    x, y = c.eight(step.inputs[0]), c.buffer(step.name)
    c.native.add_dequantize(step.name, x.tensor, y.tensor, step.factor)


def _contract(c: Compiler, step: Contract) -> None:
    layer = step.layer
    assert layer.weight is not None
    source, (top, _, left, _) = c.pads.get(step.inputs[0], (step.inputs[0], (0, 0, 0, 0)))
    x = c.eight(source)
    memory.check_contract(step, x, c.program)
    residual = -1 if step.residual is None else c.buffer(step.residual).tensor
    y = c.buffer(step.name)
    lo, hi = step.limits
    weight = layer.weight if layer.weight.ndim == 4 else layer.weight[:, :, None, None]
    kernel, stride, pad, dilation = (step.window or memory.UNIT).pairs
    pad = pad[0] + top, pad[1] + left
    low = np.ascontiguousarray(layer.low).astype(np.uint8)
    any_low = bool(low.any()) if low.size else False
    groups = layer.conv_groups
    depthwise = groups > 1 and weight.shape[1] == 1 and not any_low and not y.is_float
    if depthwise and (residual < 0 or step.residual in c.program.qparams):
        per = np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)
        c.native.add_depthwise(
            step.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
            weight=per.reshape(-1), kernel=kernel, stride=stride, pad=pad, dilation=dilation,
            multiplicity=weight.shape[0] // groups, bias=_own(layer.bias, np.int32),
            multiplier=_own(layer.multiplier, np.float32), macs=int(layer.macs),
        )  # fmt: skip
        return
    if any_low:
        bounds, shifts, weight_shift = layer.group_bounds, layer.activation_shift, layer.weight_shift
        stored = None if layer.low_weight is None else _own(layer.low_weight.reshape(weight.shape), np.int8)
    else:  # one group is as good as many
        bounds = np.arange(groups + 1, dtype=np.int32) * weight.shape[1]
        shifts, weight_shift = np.zeros(groups, np.uint8), np.zeros((weight.shape[0], 1), np.uint8)
        low, stored = np.zeros((len(layer.bias), groups), dtype=np.uint8), None
    folded = not any_low and groups == 1 and weight.shape[1] < FOLD_BELOW and kernel[1] > 1 and dilation[1] == 1
    c.native.add_conv(
        step.name, src=x.tensor, dst=y.tensor, residual=residual, residual_factor=layer.residual_factor, lo=lo, hi=hi,
        accumulators=c.accumulators and y.is_float, folded=folded, weight=_own(weight, np.int8),
        stride=stride, pad=pad, dilation=dilation, conv_groups=groups,
        amax=layer.amax, wmax=layer.wmax, input_signed=x.signed, bounds=_own(bounds, np.int32),
        activation_shift=_own(shifts, np.uint8), weight_shift=_own(weight_shift, np.uint8), low=low,
        bias=_own(layer.bias, np.int32), multiplier=_own(layer.multiplier, np.float32), low_weight=stored,
    )  # fmt: skip


def _matmul(c: Compiler, step: MatMul) -> None:
    raise Unsupported("product of two activations")


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
    native_axis = {(4, 1): 3, (4, 2): 1, (4, 3): 2, (3, 2): 3, (3, 1): 2, (2, 1): 3}.get((rank, axis))
    if native_axis is None:
        raise Unsupported(f"concatenation along axis {axis} of {rank}")
    parts = [c.eight(v) for v in step.inputs]
    y = c.buffer(step.name)
    offset = 0
    for part, f in zip(parts, step.factors, strict=True):
        c.native.add_rescale(
            step.name, part.tensor, y.tensor, native_axis, offset, f, float(step.lo), float(step.hi)
        )
        offset += {1: part.h, 2: part.w, 3: part.c}[native_axis]


def _sum_pool(c: Compiler, step: SumPool) -> None:
    x = c.eight(step.inputs[0])
    kernel, stride, pad, _ = memory.sum_window(step, x, len(c.program.types[step.inputs[0]].shape)).pairs
    y = c.buffer(step.name)
    c.native.add_sum_pool(
        step.name, x.tensor, y.tensor, kernel, stride, pad, step.factor, float(step.lo), float(step.hi)
    )


def _max_pool(c: Compiler, step: MaxPool) -> None:
    x = c.eight(step.inputs[0])
    window = memory.plane_window(step.window)
    y = c.buffer(step.name)
    c.native.add_max_pool(step.name, x.tensor, y.tensor, *window.pairs)


def _move(c: Compiler, step: Move) -> None:
    if step.name in c.pads:
        return
    x = c.eight(step.inputs[0])
    y = c.buffer(step.name)
    if x.signed != y.signed or x.factor != y.factor:
        raise Unsupported("it folds other axes into the batch")
    flat, in_shape, out_shape = memory.moved_index(step, c.program)
    start, end = memory.offsets_of(x), memory.offsets_of(y)
    loops = memory.copy_loops(flat, start, end, in_shape, out_shape)
    if loops is not None:
        c.native.add_copy(step.name, x.tensor, y.tensor, *loops, [], -1, False)
        return
    keep = flat >= 0
    start, end = start[flat[keep]], end[keep]
    order = np.argsort(end, kind="stable")  # bytes that stay adjacent next to each other
    c.native.add_move(
        step.name, x.tensor, y.tensor, _own(start[order], np.int32), _own(end[order], np.int32), not keep.all()
    )


def _float(c: Compiler, step: Float) -> None:
    raise Unsupported(step.reason or f"{step.operation} runs in float")


HANDLERS: dict[type[Instruction], Callable[[Compiler, Any], None]] = {
    Quantize: _quantize, Dequantize: _dequantize, Contract: _contract, MatMul: _matmul, Lookup: _lookup, Add: _add, Mul: _mul,
    Concat: _concat, SumPool: _sum_pool, MaxPool: _max_pool, Move: _move, Float: _float,
}  # fmt: skip


def _own(array: npt.ArrayLike, dtype: Any) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array, dtype=dtype)
