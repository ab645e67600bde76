"""Float operators, integer inputs and masks as steps of the extension, in the arithmetic of the reference engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bitdial.engines.cpu.compile_rounding import layer_norm
from bitdial.engines.cpu.operands import (
    INFINITY,
    MOST_AXES,
    as_type,
    combine,
    dtype_of,
    made,
    operand_of,
    walk,
    whole_step,
)  # fmt: skip
from bitdial.engines.cpu.values import Values, is_move
from bitdial.engines.memory import Unsupported, arguments, clamp_limits, common_type
from bitdial.engines.views import Axis, View, common_axes, size_of, sizes_of
from bitdial.graph.ir import Node, TensorType
from bitdial.quantization.instructions import Float


def float_operator(c: Values, step: Float) -> None:
    """One `Float` instruction. Raises Unsupported."""
    if is_move(step):
        c.move(step.name, step.node, step.inputs[0])
        return
    handler = OPERATORS.get(step.operation)
    if handler is None:
        raise Unsupported(step.reason or f"{step.operation} runs in float")
    handler(c, step)


# ---- element by element --------------------------------------------------------------------------------------------------


def _activation(step: Float) -> tuple[float, float]:
    activation = step.node.attrs.get("activation")
    if activation is None:
        return -INFINITY, INFINITY
    return (0.0, INFINITY) if activation["kind"] == "relu" else (float(activation["lo"]), float(activation["hi"]))


def _binary(op: str) -> Callable[[Values, Float], None]:
    """add and mul of the graph."""

    def handler(c: Values, step: Float) -> None:
        a, b = step.inputs
        for value, number in ((a, b), (b, a)):
            lazy = c.lazy.get(value)
            scalar = c.program.constants.get(number)
            plain = op == "mul" and "activation" not in step.node.attrs
            number_at_hand = scalar is not None and np.ndim(scalar) == 0 and np.asarray(scalar).dtype == np.float32
            if plain and number_at_hand and lazy is not None and lazy.factor is not None:
                c.lazy[step.name] = replace(lazy, scalars=(*lazy.scalars, (op, float(np.asarray(scalar)))))
                return
        combine(c, step.name, op, a, b, *_activation(step))

    return handler


def _arithmetic(op: str, turned: bool = False) -> Callable[[Values, Float], None]:
    """aten add, sub, rsub, mul, div."""

    def handler(c: Values, step: Float) -> None:
        (a, b, *more), kwargs = arguments(step)
        if kwargs.get("alpha", more[0] if more else 1) != 1 or kwargs.get("rounding_mode") is not None:
            raise Unsupported(f"{step.operation} with alpha or a rounding mode")
        a, b = (b, a) if turned else (a, b)
        dtype = c.types[step.name].dtype
        if dtype == "float32":
            combine(c, step.name, op, a, b)
        elif dtype == "int64" and op != "div":
            whole_step(c, step.name, op, "int64", [a, b])
        else:
            raise Unsupported(f"{step.operation} gives {dtype}")

    return handler


def _comparison(op: str, turned: bool = False) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (a, b), _ = arguments(step)
        a, b = (b, a) if turned else (a, b)
        whole_step(c, step.name, op, common_type([dtype_of(c, v) for v in (a, b)]), [a, b])

    return handler


def _logic(op: str) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        values, _ = arguments(step)
        if c.types[step.name].dtype != "bool":
            raise Unsupported(f"{step.operation} of {c.types[step.name].dtype}")
        if op == "not":
            kind = common_type([dtype_of(c, v) for v in values])
            whole_step(c, step.name, "eq", kind, [values[0], False if kind == "bool" else 0])
        else:
            kinds = common_type([dtype_of(c, v) for v in values])
            whole_step(c, step.name, op, kinds, values)

    return handler


def _where(c: Values, step: Float) -> None:
    (condition, a, b), _ = arguments(step)
    dtype = c.types[step.name].dtype
    whole_step(c, step.name, "where", dtype, [a, b, condition])


def _masked_fill(c: Values, step: Float) -> None:
    (x, mask, value), _ = arguments(step)
    dtype = c.types[step.name].dtype
    kinds: dict[str, Callable[[Any], bool | int | float]] = {"float32": float, "int64": int, "bool": bool}
    if dtype not in kinds:
        raise Unsupported(f"{step.operation} of {dtype}")
    number = value if isinstance(value, str) else kinds[dtype](value)
    whole_step(c, step.name, "where", dtype, [number, x, mask])


def _convert(c: Values, step: Float) -> None:
    (x, *more), kwargs = arguments(step)
    dtype = c.types[step.name].dtype
    if kwargs.keys() - {"dtype", "memory_format", "non_blocking", "copy", "layout", "device", "pin_memory"}:
        raise Unsupported(f"{step.operation} with {sorted(kwargs)}")
    if c.types.get(x) is None or dtype not in ("float32", "int64", "bool"):
        raise Unsupported(f"it gives {dtype}")
    if c.types[x].dtype == dtype:
        c.move(step.name, _same_shape(c, step.name, x), x)
        return
    operand = operand_of(c, x)
    if operand.dtype == "float32":
        raise Unsupported("it makes integers of real numbers")
    y = c.buffer(step.name)
    extents, strides, offsets, tensors = walk(c, step.name, [operand], y)
    c.native.add_elementwise(step.name, "convert", operand.dtype, dtype, tensors, y.tensor, extents, strides, offsets)


def _same_shape(c: Values, name: str, value: str) -> Node:
    rank = len(c.types[name].shape)
    return Node(name, "permute", [value], {"axes": list(range(rank))})


def _extreme(op: str) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (a, b), _ = arguments(step)
        dtype = c.types[step.name].dtype
        if dtype not in ("float32", "int64"):
            raise Unsupported(f"{step.operation} gives {dtype}")
        whole_step(c, step.name, op, dtype, [a, b])

    return handler


def _limited(limits: Callable[[Float], tuple[float, float]]) -> Callable[[Values, Float], None]:
    """relu, clamp and their like: times one, then bounded."""

    def handler(c: Values, step: Float) -> None:
        if c.types[step.name].dtype != "float32" or c.types[step.inputs[0]].dtype != "float32":
            raise Unsupported(f"{step.operation} of {c.types[step.inputs[0]].dtype}")
        combine(c, step.name, "mul", step.inputs[0], 1.0, *limits(step))

    return handler


def _negative(c: Values, step: Float) -> None:
    if c.types[step.name].dtype != "float32":
        raise Unsupported(f"{step.operation} of {c.types[step.name].dtype}")
    combine(c, step.name, "mul", step.inputs[0], -1.0)


def _square(c: Values, step: Float) -> None:
    args, _ = arguments(step)
    if c.types[step.name].dtype != "float32" or (len(args) > 1 and args[1] != 2):
        raise Unsupported(f"{step.operation} of this power or type")
    combine(c, step.name, "mul", args[0], args[0])


def _root(c: Values, step: Float) -> None:
    x = c.floats(step.inputs[0])
    y = c.buffer(step.name)
    c.native.add_reduce(step.name, x.tensor, y.tensor, math.prod(y.shape), 1, 1, 0.0, False, True)


# ---- sums ----------------------------------------------------------------------------------------------------------------


def _reduced(
    c: Values, step: Float, axes: Sequence[int] | None, mean: bool, square: bool = False, root: bool = False
) -> None:
    value = step.inputs[0]
    shape, place = sizes_of(c.types[value])
    if axes is None or not len(axes):
        raise Unsupported("it sums over the batch")
    over = sorted(int(a) % len(shape) for a in axes)
    if place in over:
        raise Unsupported("it sums over the batch")
    count = math.prod(shape[a] for a in over)
    if c.types[value].dtype != "float32":
        _sum_whole(c, step, over)
        return
    kept = [a for a in range(len(shape)) if a not in over]
    if over == list(range(over[0], over[-1] + 1)):
        x = c.floats(value)
        outer, inner = math.prod(shape[: over[0]]), math.prod(shape[over[-1] + 1 :])
    else:
        order = [*kept, *over]
        turned = f"{step.name}:order"
        c.types[turned] = TensorType(tuple(c.types[value].shape[a] for a in order), "float32")
        c.move(turned, Node(turned, "permute", [value], {"axes": order}), value)
        x = c.floats(turned)
        outer, inner = math.prod(shape[a] for a in kept), 1
    y = c.buffer(step.name)
    c.native.add_reduce(
        step.name, x.tensor, y.tensor, outer, count, inner, float(count) if mean else 0.0, square, root
    )


def _sum_whole(c: Values, step: Float, over: Sequence[int]) -> None:
    """Integers: added one by one to zeros, in any order."""
    value = step.inputs[0]
    if c.types[step.name].dtype != "int64":
        raise Unsupported("it averages integers")
    x = as_type(c, value, "int64")
    y = c.buffer(step.name)
    zero = operand_of(c, 0, "int64")
    extents, strides, offsets, tensors = walk(c, step.name, [zero], y)
    c.native.add_elementwise(step.name, "convert", "int64", "int64", tensors, y.tensor, extents, strides, offsets)
    shape, _ = sizes_of(c.types[value])
    rows = list(y.view().axes)
    if len(rows) != len(shape):
        for a in over:
            rows.insert(a, ())
    still: list[Axis] = [((size, 0),) if size != 1 else () for size in shape]
    target = View(0, tuple(still[i] if i in over else rows[i] for i in range(len(shape))))
    x = made(c, x)
    loops = common_axes([target, x.view, target])
    if loops is None or len(loops[0]) > MOST_AXES:
        raise Unsupported("its operands lie in memory in too many ways")
    c.native.add_elementwise(
        step.name, "add", "int64", "int64", [y.tensor, x.buffer.tensor], y.tensor, loops[0], loops[1],
        [0, x.view.offset, 0],
    )  # fmt: skip


def _mean(c: Values, step: Float) -> None:
    _reduced(c, step, step.node.attrs["axes"], True)


def _aten_sum(mean: bool) -> Callable[[Values, Float], None]:
    def handler(c: Values, step: Float) -> None:
        (_, axes, *_), _ = arguments(step)
        _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], mean)

    return handler


def _norm(c: Values, step: Float) -> None:
    (_, *rest), kwargs = arguments(step)
    order, axes = [*rest, *[2, None][len(rest) :]][:2]
    if order != 2 or kwargs.get("dtype") is not None:
        raise Unsupported("a norm other than the second")
    _reduced(c, step, axes if isinstance(axes, list) or axes is None else [axes], False, True, True)


# ---- concatenation and look-ups ------------------------------------------------------------------------------------------


def _concat(c: Values, step: Float) -> None:
    values, axis = list(step.inputs), step.node.attrs.get("axis")
    if step.operation != "concat":
        args, kwargs = arguments(step)
        values, axis = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if step.node.attrs.get("activation") is not None:
        raise Unsupported("an activation behind a concatenation in float")
    y = c.buffer(step.name)
    assert axis is not None and y.place is not None
    axis = int(axis) % len(y.shape)
    if axis == y.place:
        raise Unsupported("it concatenates samples")
    whole, start = y.view(), 0
    for value in values:
        dtype = dtype_of(c, value)
        if dtype != y.dtype:
            raise Unsupported(f"it concatenates {dtype} with {y.dtype}")
        buffer, view = c.view_of(value)
        size = size_of(view.axes[axis])
        (_, stride), = whole.axes[axis] or ((1, 0),)
        part = View(start * stride, tuple(
            (((size, stride),) if size != 1 else ()) if i == axis else own_axis for i, own_axis in enumerate(whole.axes)
        ))  # fmt: skip
        if view.shape != part.shape:
            raise Unsupported("its operands do not go together")
        if not c.copy(step.name, buffer, view, y, part):
            buffer = c.buffer(value)
            if not c.copy(step.name, buffer, buffer.view(), y, part):
                raise Unsupported("its operands lie in memory in two ways")
        start += size


def _filled(number: int | None) -> Callable[[Values, Float], None]:
    """zeros_like, ones_like, full_like."""

    def handler(c: Values, step: Float) -> None:
        args, _ = arguments(step)
        y = c.buffer(step.name)
        kinds: dict[str, Callable[[Any], Any]] = {"float32": float, "int64": int, "bool": bool}
        if y.dtype not in kinds:
            raise Unsupported(f"it gives {y.dtype}")
        value = operand_of(c, kinds[y.dtype](args[1] if number is None else number), y.dtype)
        extents, strides, offsets, tensors = walk(c, step.name, [value], y)
        if y.dtype == "float32":
            c.native.add_rearrange(step.name, tensors[0], y.tensor, extents, strides, offsets)
        else:
            c.native.add_elementwise(step.name, "convert", y.dtype, y.dtype, tensors, y.tensor, extents, strides, offsets)

    return handler


def _running_sum(c: Values, step: Float) -> None:
    """Of integers: every element is the one before it and its own."""
    (value, axis, *_), _ = arguments(step)
    shape, place = sizes_of(c.types[value])
    axis = int(axis) % len(shape)
    if c.types[step.name].dtype != "int64" or axis == place:
        raise Unsupported("a running sum of real numbers, or over samples")
    x = as_type(c, value, "int64")
    y = c.buffer(step.name)
    extents, strides, offsets, tensors = walk(c, step.name, [x], y)
    c.native.add_elementwise(step.name, "convert", "int64", "int64", tensors, y.tensor, extents, strides, offsets)
    if shape[axis] == 1:
        return
    own = y.view()
    stride = own.axes[axis][0][1]
    cut = own.axes[:axis] + (((shape[axis] - 1, stride),) if shape[axis] > 2 else (),) + own.axes[axis + 1 :]
    loops = common_axes([View(0, cut)], 1 << 62)
    assert loops is not None
    if len(loops[0]) > MOST_AXES:
        raise Unsupported("it has too many axes")
    c.native.add_elementwise(
        step.name, "add", "int64", "int64", [y.tensor, y.tensor], y.tensor, loops[0], loops[1] * 3, [0, stride, stride]
    )


def _embedding(c: Values, step: Float) -> None:
    (table, ids, *_), _ = arguments(step)
    if table not in c.program.constants:
        raise Unsupported("it looks up rows of a value")
    rows = c.constant(table)
    if not rows.is_float or len(rows.shape) != 2:
        raise Unsupported("its table is not one of float32 rows")
    if dtype_of(c, ids) not in ("int64", "int32") or ids in c.program.constants:
        raise Unsupported("its numbers are not integers of the batch")
    operand = as_type(c, ids, "int64")
    numbers = c.buffer(operand.name) if operand.name is not None else operand.buffer
    c.native.add_embedding(step.name, numbers.tensor, rows.tensor, c.buffer(step.name).tensor)


_COMPARISONS = {"eq": ("eq", False), "ne": ("ne", False), "lt": ("lt", False), "le": ("le", False), "gt": ("lt", True),
                "ge": ("le", True)}  # fmt: skip
OPERATORS: dict[str, Callable[[Values, Float], None]] = {
    "layer_norm": layer_norm, "add": _binary("add"), "mul": _binary("mul"), "concat": _concat, "mean": _mean,
    "relu": _limited(lambda step: (0.0, INFINITY)), "relu6": _limited(lambda step: (0.0, 6.0)),
    "clamp": _limited(lambda step: (float(step.node.attrs["lo"]), float(step.node.attrs["hi"]))),
    "aten.embedding.default": _embedding, "aten.to.dtype": _convert, "aten._to_copy.default": _convert,
    "aten.where.self": _where, "aten.where.ScalarOther": _where, "aten.where.ScalarSelf": _where,
    "aten.masked_fill.Scalar": _masked_fill, "aten.masked_fill.Tensor": _masked_fill,
    "aten.sum.dim_IntList": _aten_sum(False), "aten.mean.dim": _aten_sum(True), "aten.linalg_vector_norm.default": _norm,
    "aten.maximum.default": _extreme("max"), "aten.minimum.default": _extreme("min"), "aten.neg.default": _negative,
    "aten.square.default": _square, "aten.pow.Tensor_Scalar": _square, "aten.sqrt.default": _root,
    "aten.zeros_like.default": _filled(0), "aten.ones_like.default": _filled(1), "aten.full_like.default": _filled(None),
    "aten.cumsum.default": _running_sum, "aten.cat.default": _concat,
    "aten.logical_not.default": _logic("not"), "aten.bitwise_not.default": _logic("not"),
    "aten.logical_and.default": _logic("and"), "aten.logical_or.default": _logic("or"),
    "aten.logical_xor.default": _logic("xor"), "aten.bitwise_and.Tensor": _logic("and"),
    "aten.bitwise_or.Tensor": _logic("or"), "aten.rsub.Scalar": _arithmetic("sub", True),
    "aten.rsub.Tensor": _arithmetic("sub", True), "aten.relu.default": _limited(lambda step: (0.0, INFINITY)),
    **{f"aten.{name}.default": _limited(clamp_limits) for name in ("clamp", "clamp_min", "clamp_max")},
    **{f"aten.{op}.{kind}": _arithmetic(op) for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.{kind}": _comparison(*how) for name, how in _COMPARISONS.items() for kind in ("Tensor", "Scalar")},
}  # fmt: skip

