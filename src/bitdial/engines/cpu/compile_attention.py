"""Products of two activations, softmax, and attention (one step of both), read and written where the moves around them lead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.attention import Attention, Joined
from bitdial.engines.cpu.compile_rounding import table_of
from bitdial.engines.cpu.operands import Operand, spread
from bitdial.engines.cpu.values import Buffer, Values, own
from bitdial.engines.memory import Unsupported
from bitdial.engines.views import Axis, View, dense, element_offsets, sizes_of, strided, unit_index
from bitdial.graph.operators import softmax_axis
from bitdial.quantization.instructions import Float, MatMul, Move, Quantize

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Strided:
    """Element (head, outer, inner) of a sample lies heads[head] + outer * `outer` + inner * `inner` elements behind the origin of
    a tensor. table: uint8 [256] that replaces stored bytes, or None. zero: what these are more than their values."""

    tensor: int
    outer: int
    inner: int
    heads: Index
    table: npt.NDArray[np.uint8] | None = None
    zero: int = 0

    @property
    def native(self) -> tuple[Any, ...]:
        return (self.tensor, self.outer, self.inner, own(self.heads, np.int64), self.table, self.zero)


def _along(axis: Axis, size: int) -> Index:
    """Offsets along an axis of a view, repeated where one element is read `size` times."""
    offsets = np.zeros(1, np.int64)
    for extent, stride in axis:
        offsets = (offsets[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    return np.repeat(offsets, size) if offsets.size == 1 else offsets


def _step(offsets: Index) -> int:
    """The one step along an axis. Raises Unsupported if there are several."""
    step = int(offsets[1] - offsets[0]) if offsets.size > 1 else 0
    if (np.diff(offsets) != step).any():
        raise Unsupported("an operand of a product of two activations has no fixed strides")
    return step


def _strides(view: View, shape: Sequence[int], transposed: bool = False) -> tuple[int, int, Index]:
    """As `strided`, of a view [.., outer, inner], or [.., inner, outer] if `transposed`, that broadcasts to a shape."""
    axes = [_along(axis, size) for axis, size in zip(view.axes, shape, strict=True)]
    outer, inner = (axes[-1], axes[-2]) if transposed else (axes[-2], axes[-1])
    heads = np.array([view.offset], np.int64)
    for axis in axes[:-2]:
        heads = (heads[:, None] + axis).reshape(-1)
    return _step(outer), _step(inner), heads


# ---- operands --------------------------------------------------------------------------------------------------------------


def _operand(c: Values, value: str, result: Sequence[int], transposed: bool, table: Quantize | None = None) -> Strided:
    """An 8-bit operand [.., outer, inner], or [.., inner, outer] if `transposed`, of a product of shape `result` (for a batch of
    one). table: what makes it of dequantized values, and is not compiled itself."""
    sizes, place = sizes_of(c.types[value])
    if place != 0 or len(sizes) != len(result):
        raise Unsupported("an operand of a product of two activations has other axes than its result")
    replaced = None
    if table is None:
        buffer, view = c.view_of(value)
    else:
        lazy = c.lazy[table.inputs[0]]
        assert lazy.view is not None
        buffer, view = c.source(lazy), lazy.view
        replaced = table_of(lazy, buffer.signed, table, c.program.qparams[value].signed)
    if buffer.dtype != "8-bit":
        raise Unsupported("an operand of a product of two activations is float")
    outer, inner, heads = _strides(view, (*result[:-2], *sizes[-2:]), transposed)
    return Strided(buffer.tensor, outer, inner, heads, replaced, 128 if c.program.qparams[value].signed else 0)


def _result(c: Values, step: MatMul) -> tuple[Strided, list[str]]:
    """(where the elements of a product go: behind the moves that alone read it, as far as strides allow; those moves)."""
    shape, _ = sizes_of(c.types[step.name])
    moves: list[Move] = []
    ends: list[tuple[str, int]] = [(step.name, 0)]
    while True:
        value = ends[-1][0]
        readers = c.readers.get(value, [])
        reader = readers[0] if len(readers) == 1 and value not in c.program.outputs else None
        if not isinstance(reader, Move) or reader.operation not in ("reshape", "permute") or not c.stays(reader):
            break
        moves.append(reader)
        ends.append((reader.name, len(moves)))
    for value, count in reversed(ends):
        if value in c.lazy:
            continue
        fresh = value not in c.buffers
        try:
            buffer = c.buffer(value)
            if count:
                index, _ = unit_index(shape, [m.node for m in moves[:count]], False)
                offsets = np.empty(math.prod(shape), np.int64)
                offsets[index] = element_offsets(buffer.view())
                outer, inner, heads = strided(offsets.reshape(-1, *shape[-2:]))
            else:
                outer, inner, heads = _strides(buffer.view(), shape)
        except Unsupported:
            if fresh:
                c.buffers.pop(value, None)
            continue
        return Strided(buffer.tensor, outer, inner, heads), [m.name for m in moves[:count]]
    raise Unsupported("the result of a product of two activations has no fixed strides")


def _sizes(c: Values, step: MatMul) -> tuple[list[int], int]:
    """(shape of a product for a batch of one, length of what is contracted)."""
    sizes, place = sizes_of(c.types[step.name])
    if place != 0 or len(sizes) < 3 or 0 in sizes:
        raise Unsupported("a product of two activations without a batch")
    return sizes, sizes_of(c.types[step.inputs[0]])[0][-1]


def matmul(c: Values, step: MatMul) -> None:
    """One product. Raises Unsupported."""
    sizes, depth = _sizes(c, step)
    left = _operand(c, step.inputs[0], sizes, False)
    right = _operand(c, step.inputs[1], sizes, not step.transpose_b)
    out, done = _result(c, step)
    c.done.update(done)
    rows_columns_depth = (sizes[-2], sizes[-1], depth)
    c.native.add_matmul(
        step.name, left.native, right.native, out.native, rows_columns_depth, float(step.layer.multiplier[0]), *step.limits
    )  # fmt: skip


# ---- softmax ---------------------------------------------------------------------------------------------------------------


def softmax(c: Values, step: Float) -> None:
    """Over any axis but the batch's; a Quantize that alone reads the result is part of it. Raises Unsupported."""
    axis, value = softmax_axis(step.node), step.operands()[0]
    x = c.floats(value)
    if axis is None or x.place is None or axis % len(x.shape) == x.place or not x.own_order:
        raise Unsupported("softmax over samples")
    axis %= len(x.shape)
    length, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    readers = c.readers.get(step.name, [])
    rounding = readers[0] if len(readers) == 1 and step.name not in c.program.outputs else None
    if isinstance(rounding, Quantize) and inner == 1:
        y = c.buffer(rounding.name)
        view = y.view()
        _, column, rows = _strides(replace(view, axes=(*view.axes[:-1], (), view.axes[-1])), (*x.shape[:-1], 1, length))
        c.done.add(rounding.name)
        limits = rounding.factor, float(rounding.lo), float(rounding.hi)
        c.native.add_softmax(step.name, x.tensor, y.tensor, length, 1, own(rows, np.int64), column, *limits)
        return
    y = c.buffer(step.name)
    if not y.own_order:
        raise Unsupported("its result lies in memory in another order")
    c.native.add_softmax(step.name, x.tensor, y.tensor, length, inner, np.zeros(0, np.int64), 1, 1.0, 0.0, 0.0)


# ---- attention -------------------------------------------------------------------------------------------------------------


def settled(c: Values, found: Attention) -> tuple[Attention, Quantize | None]:
    """(attention with `rounding` only where a table makes queries of bytes; what else is to be compiled before)."""
    lazy = None if found.rounding is None else c.lazy.get(found.rounding.inputs[0])
    if found.rounding is None or (lazy is not None and lazy.factor is not None and lazy.view is not None):
        return found, None
    return found.without_rounding(), found.rounding


def attention(c: Values, found: Attention) -> None:
    """One step. Raises Unsupported where it takes more."""
    scores, values = found.scores, found.values
    sizes, depth = _sizes(c, scores)
    shape, _ = _sizes(c, values)
    if shape[:-1] != sizes[:-1] or sizes_of(c.types[found.weights.name])[0] != sizes:
        raise Unsupported("attention whose products broadcast")
    terms = [_term(c, joined) for joined in found.joined]
    q = _operand(c, scores.inputs[0], sizes, False, found.rounding)
    k = _operand(c, scores.inputs[1], sizes, not scores.transpose_b)
    v = _operand(c, values.inputs[1], shape, not values.transpose_b)
    out, done = _result(c, values)
    c.done.update(done)
    lo, hi = values.limits
    c.native.add_attention(
        name=values.name, scores=scores.name, q=q.native, k=k.native, v=v.native, out=out.native,
        sizes=(sizes[-2], sizes[-1], depth, shape[-1]), factor=float(scores.layer.multiplier[0]), terms=terms,
        p=(found.weights.factor, float(found.weights.lo), float(found.weights.hi)),
        out_factor=float(values.layer.multiplier[0]), lo=lo, hi=hi,
    )  # fmt: skip


def _term(c: Values, joined: Joined) -> tuple[Any, ...]:
    """As the extension takes it."""
    value, dtype = joined.operand, "bool" if joined.op in ("fill", "keep") else "float32"
    buffer: Buffer
    if not isinstance(value, str):
        buffer = c.constant_array(f"number {value!r}", np.asarray(value, np.float32))
        operand = Operand(buffer, dense(()))
    elif value in c.program.constants:
        buffer = c.constant(value)
        operand = Operand(buffer, dense(buffer.shape))
    else:
        buffer, view = c.view_of(value)
        operand = Operand(buffer, view, value, sizes_of(c.types[value])[1])
    if buffer.dtype != dtype:
        raise Unsupported(f"scores meet {buffer.dtype} values")
    row, column, heads = _strides(spread(operand, joined.shape, 0), joined.shape)
    if column not in (0, 1):
        if value not in c.lazy:
            raise Unsupported("scores meet a value whose rows do not adjoin")
        c.buffer(str(value))  # moved, that is, and now a copy
        return _term(c, joined)
    return (buffer.tensor, row, column, own(heads, np.int64), joined.op, joined.number)
