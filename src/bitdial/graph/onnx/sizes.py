"""Arithmetic on sizes: what exporters write between `Shape` and `Reshape`, evaluated with the batch size left open.

Arrays are int64 or bool, or of dtype object where an entry is a `BatchDim`: so many times the batch size, which is no
particular number (it equals none) and at least 1. What would make the result depend on it in another way is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bitdial.graph.ir import Array, BatchDim

if TYPE_CHECKING:
    from bitdial.graph.onnx.call import Call

_MOST = 1 << 20  # entries; a shape has a handful, an index of positions some thousands


class NotASize(ValueError):
    """The result is no multiple of the batch size and no plain number."""


def plain(array: Array) -> Array:
    """Object arrays without a `BatchDim` as int64."""
    if array.dtype == object and not any(isinstance(v, BatchDim) for v in array.flat):
        return array.astype(np.int64)
    return array


def is_size(value: Any) -> bool:
    """Whether a constant is one that the functions here compute with."""
    return isinstance(value, np.ndarray) and value.size <= _MOST and value.dtype.kind in "Oib"


def _multiply(a: Any, b: Any) -> Any:
    if isinstance(a, BatchDim) and isinstance(b, BatchDim):
        raise NotASize("the square of the batch size")
    factor, other = (a.factor, b) if isinstance(a, BatchDim) else (b.factor, a)
    if factor * other < 0:
        raise NotASize("a negative multiple of the batch size")
    return BatchDim(int(factor * other)) if other else 0


def _divide(a: Any, b: Any) -> Any:
    divisor = b.factor if isinstance(b, BatchDim) else int(b)
    if isinstance(a, BatchDim) and divisor > 0 and a.factor % divisor == 0:
        quotient = a.factor // divisor
        return quotient if isinstance(b, BatchDim) else BatchDim(quotient)
    raise NotASize(f"{a} / {b}")


def _add(a: Any, b: Any, sign: int = 1) -> Any:
    if isinstance(a, BatchDim) and isinstance(b, BatchDim):
        total = a.factor + sign * b.factor
        if total < 0:
            raise NotASize(f"{a} - {b}")
        return BatchDim(total) if total else 0
    if not isinstance(b, BatchDim) and b == 0:
        return a
    if not isinstance(a, BatchDim) and a == 0 and sign == 1:
        return b
    raise NotASize(f"{a} {'+' if sign == 1 else '-'} {b}")


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, BatchDim) and not isinstance(b, BatchDim) and b < 1:
        return False
    if isinstance(b, BatchDim) and not isinstance(a, BatchDim) and a < 1:
        return True
    raise NotASize(f"{a} < {b}")


def _truncated(a: int, b: int) -> int:
    if b == 0:
        raise NotASize("a division by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int:
    if b == 0:
        raise NotASize("a division by zero")
    return a % b


def _refused(a: Any, b: Any) -> Any:
    raise NotASize(f"a comparison of {a} with {b}")


# (for plain integers, where a BatchDim takes part)
_BINARY: dict[str, tuple[Callable[[int, int], Any], Callable[[Any, Any], Any]]] = {
    "Add": (operator.add, _add),
    "Sub": (operator.sub, lambda a, b: _add(a, b, -1)),
    "Mul": (operator.mul, _multiply),
    "Div": (_truncated, _divide),
    "Mod": (_remainder, _refused),
    "Equal": (operator.eq, operator.eq),
    "Less": (operator.lt, _less),
    "Greater": (operator.gt, lambda a, b: _less(b, a)),
    "Min": (min, _refused),
    "Max": (max, _refused),
    "And": (lambda a, b: bool(a and b), _refused),
    "Or": (lambda a, b: bool(a or b), _refused),
}


def _binary(call: Call, op: str) -> Array:
    numbers, batch = _BINARY[op]
    inputs: list[Array] = list(call.inputs)
    result = inputs[0]
    for other in inputs[1:]:
        a, b = np.broadcast_arrays(result, other)
        if a.size > _MOST:
            raise NotASize("so many numbers")
        cells = [
            batch(x, y) if isinstance(x, BatchDim) or isinstance(y, BatchDim) else numbers(int(x), int(y))
            for x, y in zip(a.flat, b.flat, strict=True)
        ]
        result = _filled(cells, a.shape)
    return result


def _filled(cells: list[Any], shape: tuple[int, ...]) -> Array:
    if cells and all(isinstance(v, bool) for v in cells):
        return np.array(cells, bool).reshape(shape)
    result = np.empty(len(cells), object)
    result[:] = cells
    return plain(result.reshape(shape))


def _where(call: Call) -> Array:
    condition, a, b = np.broadcast_arrays(*call.inputs)
    if condition.size > _MOST:
        raise NotASize("so many numbers")
    return _filled([x if c else y for c, x, y in zip(condition.flat, a.flat, b.flat, strict=True)], condition.shape)


def _gather(call: Call) -> Array:
    data, indices = call.inputs
    if data.size and indices.size * data.size // max(1, data.shape[call.attribute("axis", 0)]) > _MOST:
        raise NotASize("so many numbers")
    return np.asarray(np.take(data, indices.astype(np.int64), axis=call.attribute("axis", 0)))


def _slice(call: Call) -> Array:
    data = call.inputs[0]
    starts, ends = call.ints(1), call.ints(2)
    axes = call.ints(3) if call.given(3) else list(range(len(starts)))
    steps = call.ints(4) if call.given(4) else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        data = np.take(data, list(positions(data.shape[axis], start, end, step)), axis=axis)
    return np.asarray(data)


def positions(size: int, start: int, end: int, step: int) -> range:
    """The positions that a slice of ONNX takes of an axis. Raises ValueError for a step of 0."""
    start, end = start + size if start < 0 else start, end + size if end < 0 else end
    if step < 0:  # other than Python's, a start before the axis is its first position
        return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)
    return range(min(max(start, 0), size), min(max(end, 0), size), step)


def _unsqueeze(call: Call) -> Array:
    axes = call.axes()
    rank = call.inputs[0].ndim + len(axes or [])
    return np.asarray(np.expand_dims(call.inputs[0], tuple(a % rank for a in axes or [])))


def _squeeze(call: Call) -> Array:
    axes = call.axes()
    return np.asarray(np.squeeze(call.inputs[0], None if axes is None else tuple(axes)))


def _reshape(call: Call) -> Array:
    return np.asarray(call.inputs[0].reshape(call.ints(1)))


def _concat(call: Call) -> Array:
    return np.concatenate(call.inputs, axis=call.attribute("axis", 0))


def _product(call: Call) -> Array:
    cells = list(call.inputs[0].flat)
    total: Any = 1
    for value in cells:
        both = isinstance(value, BatchDim) or isinstance(total, BatchDim)
        total = _multiply(total, value) if both else int(total) * int(value)
    return _filled([total], (1,) * call.inputs[0].ndim if call.attribute("keepdims", 1) else ())


_STRUCTURE: dict[str, Callable[[Call], Array]] = {
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Concat": _concat,
    "Identity": lambda call: np.asarray(call.inputs[0]),
    "ReduceProd": _product,
}


def computes(call: Call) -> bool:
    """Whether `evaluate` takes this node: an operator of sizes on constants only."""
    if call.op == "Cast":  # of sizes to integers; numbers are cast as any others
        array = call.inputs[0]
        return isinstance(array, np.ndarray) and array.dtype == object
    if call.op == "ReduceProd" and (call.axes() not in (None, [0], [-1])):
        return False
    known = call.op in _BINARY or call.op in _STRUCTURE
    return known and bool(call.inputs) and all(value is None or is_size(value) for value in call.inputs)


def evaluate(call: Call) -> Array:
    """The constant that a node of sizes gives. Raises NotASize, or what NumPy raises for operands that do not fit."""
    if call.op == "Cast":
        return np.asarray(call.inputs[0])  # whatever number type it becomes, it stays a size
    if call.op in _BINARY:
        return _binary(call, call.op)
    return plain(_STRUCTURE[call.op](call))
