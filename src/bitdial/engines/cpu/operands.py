"""Operands of element-wise steps: values, constants and numbers, seen through views, converted and broadcast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitdial.engines.cpu.values import Buffer, Values
from bitdial.engines.memory import Unsupported
from bitdial.engines.views import View, common_axes, dense, size_of, sizes_of
from bitdial.graph.ir import TensorType

MOST_AXES = 7  # of an element-wise step, the samples' not counted
INFINITY = math.inf


@dataclass(frozen=True)
class Operand:
    """A tensor with a view of it. name: of the value, to be made where its view does not go with others; None for numbers.
    place: the value's axis that carries the batch."""

    buffer: Buffer
    view: View
    name: str | None = None
    place: int | None = None

    @property
    def dtype(self) -> str:
        return self.buffer.dtype


def operand_of(c: Values, value: Any, dtype: str | None = None) -> Operand:
    """A value by name, or a number as a constant."""
    if isinstance(value, str):
        buffer, view = c.view_of(value)
        if buffer.dtype == "8-bit":
            raise Unsupported("it reads 8-bit values")
        return Operand(buffer, view, value, None if value in c.program.constants else sizes_of(c.types[value])[1])
    array = np.asarray(value).astype(dtype or "float32")
    buffer = c.constant_array(f"number {value!r}", array)
    return Operand(buffer, dense(()))


def spread(operand: Operand, shape: Sequence[int], place: int) -> View:
    """The operand's view, broadcast to a shape whose batch is on an axis."""
    view, missing = operand.view, len(shape) - len(operand.view.axes)
    if missing < 0:
        raise Unsupported("its operands have more axes than its result")
    axes = [()] * missing + list(view.axes)
    if operand.place is not None and operand.place + missing != place:
        raise Unsupported("it broadcasts along the batch")
    if operand.place is None and size_of(axes[place]) != 1:
        raise Unsupported("it reads a constant for a fixed batch")
    for i, size in enumerate(shape):
        if size_of(axes[i]) != size:
            if size_of(axes[i]) != 1:
                raise Unsupported("its operands do not broadcast")
            axes[i] = ((size, 0),)
    return View(view.offset, tuple(axes))


def walk(
    c: Values, name: str, operands: Sequence[Operand], y: Buffer
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """(extents, strides, offsets, tensors) of operands and result; operands that do not fit are made first."""
    assert y.place is not None
    shape = list(y.shape)
    for attempt in range(2):
        views = [spread(o, shape, y.place) for o in operands] + [y.view()]
        loops = common_axes(views)
        if loops is not None and len(loops[0]) <= MOST_AXES:
            tensors = [o.buffer.tensor for o in operands]
            return loops[0], loops[1], [v.offset for v in views], tensors
        if attempt:
            break
        operands = [made(c, o) for o in operands]
    raise Unsupported("its operands lie in memory in too many ways")


def made(c: Values, operand: Operand) -> Operand:
    if operand.name is None or operand.place is None:
        return operand
    buffer = c.buffer(operand.name)
    return replace(operand, buffer=buffer, view=buffer.view())


def combine(
    c: Values, name: str, op: str, a: Any, b: Any, lo: float = -INFINITY, hi: float = INFINITY
) -> None:
    """float32 result; operands are names or numbers."""
    operands = [as_type(c, v, "float32") for v in (a, b)]
    y = c.buffer(name)
    extents, strides, offsets, tensors = walk(c, name, operands, y)
    if strides[2][-1] != 1:
        raise Unsupported("its result is not dense")
    c.native.add_combine(name, op, *tensors, y.tensor, extents, strides, offsets, lo, hi)


def whole_step(c: Values, name: str, op: str, kind: str, values: Sequence[Any]) -> None:
    """Elements of any type but int32: operands of `kind`, and a condition behind them for `where`."""
    if kind == "int32":
        raise Unsupported(f"{op} of int32")
    operands = [as_type(c, v, "bool" if op == "where" and i == 2 else kind) for i, v in enumerate(values)]
    y = c.buffer(name)
    extents, strides, offsets, tensors = walk(c, name, operands, y)
    c.native.add_elementwise(name, op, kind, y.dtype, tensors, y.tensor, extents, strides, offsets)


def as_type(c: Values, value: Any, dtype: str) -> Operand:
    """An operand, converted to a type where it has another."""
    if not isinstance(value, str):
        return operand_of(c, value, dtype)
    operand = operand_of(c, value)
    if operand.dtype == dtype:
        return operand
    if value in c.program.constants:
        array = np.asarray(c.program.constants[value]).astype(dtype)
        buffer = c.constant_array(value, array)
        return Operand(buffer, dense(array.shape), value)
    if operand.dtype == "float32":
        raise Unsupported("it makes integers of real numbers")
    inner, y = c.temporary(value, TensorType(c.types[value].shape, dtype), None)
    extents, strides, offsets, tensors = walk(c, inner, [operand], y)
    c.native.add_elementwise(inner, "convert", operand.dtype, dtype, tensors, y.tensor, extents, strides, offsets)
    return Operand(y, y.view(), inner, y.place)


def dtype_of(c: Values, value: Any) -> str:
    if not isinstance(value, str):
        return "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float32"
    if value in c.program.constants:
        return np.asarray(c.program.constants[value]).dtype.name
    return c.types[value].dtype
