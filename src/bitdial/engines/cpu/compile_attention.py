"""Products of two activations, softmax, and attention (one step of both), read and written where the moves around them lead.

Attention is recognized before anything is compiled, by instructions alone: a product, what is added to it or multiplied with
it, softmax, Quantize and the second product, where nothing else reads what lies in between. Those instructions are left out, and
one step is compiled in the place of the last. Where that proves impossible they are compiled one by one after all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu.compile_rounding import table_of
from bitdial.engines.cpu.operands import Operand, spread
from bitdial.engines.cpu.values import Buffer, Values, own
from bitdial.engines.memory import Unsupported, arguments
from bitdial.engines.views import Axis, View, check_samples_stay, dense, element_offsets, sizes_of, strided, unit_index
from bitdial.graph.operators import softmax_axis
from bitdial.quantization.instructions import Dequantize, Float, Instruction, MatMul, Move, Quantize
from bitdial.quantization.program import Program

MOST_TERMS = 4
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


@dataclass(frozen=True)
class Joined:
    """What scores meet. op: "add", "mul", "sub", "div" with `operand`; "fill", "keep": `number` or they stay where `operand`, of
    bool, is true. operand: a value, a constant or a number. shape: of the scores there, for a batch of one."""

    op: str
    operand: str | float
    shape: tuple[int, ...]
    number: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Instructions that become one step in the place of the last. rounding: what makes the queries of dequantized values."""

    scores: MatMul
    joined: tuple[Joined, ...]
    weights: Quantize
    values: MatMul
    rounding: Quantize | None
    parts: tuple[Instruction, ...]  # all of them, in order

    @property
    def layers(self) -> list[str]:
        return [self.scores.name, self.values.name]

    def settled(self, c: Values) -> tuple[Attention, Quantize | None]:
        """(itself, with `rounding` only where a table makes queries of bytes; what else is to be compiled before)."""
        lazy = None if self.rounding is None else c.lazy.get(self.rounding.inputs[0])
        if self.rounding is None or (lazy is not None and lazy.factor is not None and lazy.view is not None):
            return self, None
        return replace(self, rounding=None, parts=tuple(p for p in self.parts if p is not self.rounding)), self.rounding

    def compile(self, c: Values) -> None:
        """Raises Unsupported where it takes more than one step."""
        scores, values = self.scores, self.values
        sizes, depth = _sizes(c, scores)
        shape, _ = _sizes(c, values)
        if shape[:-1] != sizes[:-1] or sizes_of(c.types[self.weights.name])[0] != sizes:
            raise Unsupported("attention whose products broadcast")
        terms = [_term(c, joined) for joined in self.joined]
        q = _operand(c, scores.inputs[0], sizes, False, self.rounding)
        k = _operand(c, scores.inputs[1], sizes, not scores.transpose_b)
        v = _operand(c, values.inputs[1], shape, not values.transpose_b)
        out, done = _result(c, values)
        c.done.update(done)
        lo, hi = values.limits
        c.native.add_attention(
            name=values.name, scores=scores.name, q=q.native, k=k.native, v=v.native, out=out.native,
            sizes=(sizes[-2], sizes[-1], depth, shape[-1]), factor=float(scores.layer.multiplier[0]), terms=terms,
            p=(self.weights.factor, float(self.weights.lo), float(self.weights.hi)),
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


FUSE = True  # off in tests


def find_attention(program: Program, readers: dict[str, list[Instruction]]) -> dict[str, Attention]:
    """By the name of the second product."""
    if not FUSE:
        return {}
    finder = _Finder(program, readers)
    found = (finder.attention(step) for step in program.instructions if isinstance(step, MatMul))
    return {a.values.name: a for a in found if a is not None}


class _Finder:
    def __init__(self, program: Program, readers: dict[str, list[Instruction]]) -> None:
        self.program, self.readers = program, readers
        self.made = {step.name: step for step in program.instructions}
        self.place = {step.name: i for i, step in enumerate(program.instructions)}

    def _alone(self, value: str, step: Instruction) -> bool:
        """Whether an instruction is all that reads a value."""
        return self.readers.get(value) == [step] and value not in self.program.outputs

    def attention(self, step: MatMul) -> Attention | None:
        weights = self.made.get(step.inputs[0])
        if not isinstance(weights, Quantize) or not self._alone(weights.name, step):
            return None
        softmax_ = self.made.get(weights.inputs[0])
        if not isinstance(softmax_, Float) or not self._alone(softmax_.name, weights):
            return None
        axis, rank = softmax_axis(softmax_.node), len(self.program.types[softmax_.name].shape)
        if axis is None or axis % rank != rank - 1 or self.program.qparams[weights.name].signed:
            return None
        source = softmax_.operands()[0]
        found = self._scores(source) if self._alone(source, softmax_) else None
        if found is None:
            return None
        scores, joined, between = found
        if scores.clamp is not None or scores.activation is not None or len(joined) > MOST_TERMS:
            return None
        rounding = self._rounding(scores)
        parts = [scores, *between, softmax_, weights, step, *([] if rounding is None else [rounding])]
        parts.sort(key=lambda s: self.place[s.name])
        return Attention(scores, tuple(joined), weights, step, rounding, tuple(parts))

    def _scores(self, value: str) -> tuple[MatMul, list[Joined], list[Instruction]] | None:
        """(the product that scores come from, what joins them, the instructions behind it, in order), where nothing else reads
        what lies in between."""
        step = self.made.get(value)
        if isinstance(step, MatMul):
            return step, [], []
        if not isinstance(step, Float) or "activation" in step.node.attrs:
            return None
        operands, types = step.operands(), self.program.types
        if step.operation == "reshape":
            found = self._scores(operands[0]) if self._alone(operands[0], step) else None
            if found is None or not _stays(step, self.program):
                return None
            return found[0], found[1], [*found[2], step]
        for whole, joined in _meetings(step, self.program):
            same = whole not in self.program.constants and types[whole].shape == types[value].shape
            found = self._scores(whole) if same and self._alone(whole, step) else None
            if found is not None and sizes_of(types[value])[1] == 0:
                return found[0], [*found[1], joined], [*found[2], step]
        return None

    def _rounding(self, scores: MatMul) -> Quantize | None:
        """The Quantize of queries that are moved and multiplied by numbers in float, between 8-bit values."""
        rounding = self.made.get(scores.inputs[0])
        if not isinstance(rounding, Quantize) or not self._alone(rounding.name, scores):
            return None
        step = self.made.get(rounding.inputs[0])
        while isinstance(step, Float):
            step = self.made.get(next((v for v in step.operands() if v not in self.program.constants), ""))
        return rounding if isinstance(step, Dequantize) else None


def _meetings(step: Float, program: Program) -> list[tuple[str, Joined]]:
    """(what may be scores, what they meet), if an instruction is of the kind that they meet."""
    kind = program.types[step.name]
    shape, args = tuple(sizes_of(kind)[0]), list[Any]()
    if kind.dtype != "float32":
        return []
    if step.operation in ("add", "mul"):
        args, op = list(step.operands()), step.operation
    else:
        found = _ATEN.get(step.operation)
        if found is None:
            return []
        try:
            args, kwargs = arguments(step)
        except Unsupported:
            return []
        op = found
        if kwargs or len(args) != (3 if op in ("fill", "where") else 2):
            return []
    if op in ("fill", "where"):
        x, mask, number = args if op == "fill" else (args[1], args[0], args[2])
        turned = op == "where" and (not isinstance(x, str) or x in program.constants)
        x, number = (number, x) if turned else (x, number)
        if isinstance(number, str) and program.constants.get(number, np.zeros(2)).size == 1:
            number = float(program.constants[number].reshape(()))
        if not isinstance(x, str) or not isinstance(mask, str) or isinstance(number, str):
            return []
        return [(x, Joined("fill" if op == "fill" or turned else "keep", mask, shape, float(number)))]
    a, b = args
    pairs = ((a, b), (b, a)) if op in ("add", "mul") else ((a, b),)
    return [(x, Joined(op, y, shape)) for x, y in pairs if isinstance(x, str) and x != y]


_ATEN = {f"aten.{op}.{kind}": op for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")} | {
    "aten.masked_fill.Scalar": "fill", "aten.masked_fill.Tensor": "fill", "aten.where.self": "where",
    "aten.where.ScalarOther": "where", "aten.where.ScalarSelf": "where",
}  # fmt: skip


def _stays(step: Float, program: Program) -> bool:
    try:
        check_samples_stay(step.node, program.types[step.operands()[0]], program.types[step.name])
    except Unsupported:
        return False
    return True
