"""Integers and masks, choices by them, and look-ups of rows: launches of csrc/cuda/elements.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitdial.engines.cuda import arguments as kernels
from bitdial.engines.cuda.arguments import ElementsArgs, Launch, WholeRowsArgs
from bitdial.engines.cuda.elementwise import blocks, places_of, pointwise
from bitdial.engines.cuda.values import TYPES, Frame, LookUp, Offsets, Seen, Values, broadcast, seen
from bitdial.engines.memory import Unsupported, arguments, common_type
from bitdial.engines.views import sizes_of
from bitdial.graph.ir import TensorType
from bitdial.quantization.instructions import Float

KINDS: dict[str, Callable[[Any], bool | int | float]] = {"float32": float, "int64": int, "bool": bool}
WHOLE_ROWS = 128  # of a block
Handler = Callable[[Values, Float], None]


def elements(
    c: Values, name: str, op: int, kind: str, operands: Sequence[Seen], table: int | None = None, value: str | None = None,
    target: Offsets | None = None, n_rows: int = 0,
) -> None:  # fmt: skip
    """One launch over a result, or over the part of it at `target`. kind: the type that is computed in."""
    value = value or name
    y = c.buffer(value)
    fields = {"float32": "yf", "int64": "y64", "bool": "y8"}
    if y.dtype not in fields:
        raise Unsupported(f"it gives {y.dtype or '8-bit values'}")
    (start, place, channel), (places, channels) = places_of(y, target)

    def launch(frame: Frame) -> Launch:
        given: dict[str, Any] = {fields[y.dtype]: frame.span(value).at(start * y.bytes)}
        args = ElementsArgs(
            rows=None if table is None else frame.pool.at(table), n_rows=n_rows, y_sample=y.item, y_place=place,
            y_channel=channel, samples=frame.batch, places=places, channels=channels, op=op, real=int(kind == "float32"), **given,
        )  # fmt: skip
        for field, operand in zip("abc", operands, strict=False):
            setattr(args, field, operand.operand(frame))
        return Launch("elements_kernel", blocks(frame.batch * places * channels), args)

    c.add(name, tuple(v for o in operands for v in o.reads), launch, value)


def step_of(c: Values, name: str, op: int, kind: str, values: Sequence[Any]) -> None:
    """Elements of any type but int32: operands of `kind`, and a condition behind them for ELEMENT_WHERE."""
    if kind not in KINDS:
        raise Unsupported(f"it computes in {kind}")
    types = [kind, kind, "bool"]
    elements(c, name, op, kind, [_operand(c, name, v, t) for v, t in zip(values, types, strict=False)])


def _operand(c: Values, name: str, value: Any, dtype: str) -> Seen:
    own = dtype_of(c, value)
    if own not in TYPES:
        raise Unsupported("it reads 8-bit values" if value in c.program.qparams else f"it reads {own}")
    if own == "float32" and dtype != "float32":
        raise Unsupported("it makes integers of real numbers")
    if dtype == "bool" and own != "bool":
        raise Unsupported(f"it reads {own} as a condition")
    return broadcast(c, value, c.buffer(name), sizes_of(c.types[name])[1], dtype)


def dtype_of(c: Values, value: Any) -> str:
    if not isinstance(value, str):
        return "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) else "float32"
    return c.types[value].dtype


def copied(c: Values, name: str, source: Seen, value: str | None = None, target: Offsets | None = None) -> None:
    """Elements of any type as they are."""
    dtype = c.buffer(value or name).dtype
    if dtype in ("", "float32"):
        pointwise(c, name, kernels.OP_COPY, [source], value=value, target=target)
    else:
        elements(c, name, kernels.ELEMENT_COPY, dtype, [source], value=value, target=target)


def comparison(op: int, turned: bool = False) -> Handler:
    def handler(c: Values, step: Float) -> None:
        (a, b), _ = arguments(step)
        step_of(c, step.name, op, common_type([dtype_of(c, v) for v in (a, b)]), [b, a] if turned else [a, b])

    return handler


def logic(op: int) -> Handler:
    """Of truth values; op ELEMENT_EQ: not."""

    def handler(c: Values, step: Float) -> None:
        values, _ = arguments(step)
        if c.types[step.name].dtype != "bool":
            raise Unsupported(f"{step.operation} of {c.types[step.name].dtype}")
        kind = common_type([dtype_of(c, v) for v in values])
        step_of(c, step.name, op, kind, [values[0], KINDS[kind](0)] if op == kernels.ELEMENT_EQ else values)

    return handler


def extreme(op: int) -> Handler:
    def handler(c: Values, step: Float) -> None:
        values, _ = arguments(step)
        step_of(c, step.name, op, c.types[step.name].dtype, values)

    return handler


def where(c: Values, step: Float) -> None:
    (condition, a, b), _ = arguments(step)
    step_of(c, step.name, kernels.ELEMENT_WHERE, c.types[step.name].dtype, [a, b, condition])


def masked_fill(c: Values, step: Float) -> None:
    (x, mask, value), _ = arguments(step)
    dtype = c.types[step.name].dtype
    if dtype not in KINDS:
        raise Unsupported(f"{step.operation} of {dtype}")
    number = value if isinstance(value, str) else KINDS[dtype](value)
    step_of(c, step.name, kernels.ELEMENT_WHERE, dtype, [number, x, mask])


def convert(c: Values, step: Float) -> None:
    (x, *_), kwargs = arguments(step)
    dtype, own = c.types[step.name].dtype, dtype_of(c, x)
    if kwargs.keys() - {"dtype", "memory_format", "non_blocking", "copy", "layout", "device", "pin_memory"}:
        raise Unsupported(f"{step.operation} with {sorted(kwargs)}")
    if dtype not in KINDS or x in c.program.qparams:
        raise Unsupported(f"it makes {dtype} of {own}")
    if own == dtype:
        c.views[step.name] = c.view(x)
    elif dtype == "bool":
        kind = common_type([dtype_of(c, x)])
        step_of(c, step.name, kernels.ELEMENT_NE, kind, [x, KINDS[kind](0)])
    else:
        copied(c, step.name, _operand(c, step.name, x, dtype))


def filled(number: int | None) -> Handler:
    """zeros_like, ones_like, full_like."""

    def handler(c: Values, step: Float) -> None:
        args, _ = arguments(step)
        dtype = c.types[step.name].dtype
        if dtype not in KINDS:
            raise Unsupported(f"it gives {dtype}")
        copied(c, step.name, _operand(c, step.name, KINDS[dtype](args[1] if number is None else number), dtype))

    return handler


def sum_integers(c: Values, name: str, value: str, length: int, inner: int, running: bool = False) -> None:
    """Rows of integers or truth values, summed to one place or to every place."""
    if c.buffer(name).dtype != "int64":
        raise Unsupported(f"a sum of {c.types[value].dtype} gives {c.types[name].dtype}")
    if c.types[value].dtype != "int64":
        whole = f"{name}:int64"
        c.types[whole] = TensorType(c.types[value].shape, "int64")
        copied(c, whole, _operand(c, whole, value, "int64"))
        value = whole
    per = math.prod(c.buffer(value).shape) // length

    def launch(frame: Frame) -> Launch:
        args = WholeRowsArgs(x=frame.span(value), y=frame.span(name), rows=frame.batch * per, length=length, inner=inner,
                             running=int(running))  # fmt: skip
        return Launch("whole_rows_kernel", (-(-frame.batch * per // WHOLE_ROWS), 1, 1), args)

    c.add(name, (value,), launch)


def running_sum(c: Values, step: Float) -> None:
    (value, axis, *_), _ = arguments(step)
    sizes, place = sizes_of(c.types[value])
    axis = int(axis) % len(sizes)
    if axis == place:
        raise Unsupported("a running sum over samples")
    sum_integers(c, step.name, value, sizes[axis], math.prod(sizes[axis + 1 :]), True)


def look_up(c: Values, step: Float) -> None:
    """Rows of a constant table. What numbers lie outside of it is looked for on the host: `Values.look_ups`."""
    (table, ids, *_), _ = arguments(step)
    if table not in c.program.constants:
        raise Unsupported("it looks up rows of a value")
    rows = np.asarray(c.program.constants[table])
    if rows.dtype != np.float32 or rows.ndim != 2:
        raise Unsupported("its table is not one of float32 rows")
    if dtype_of(c, ids) not in ("int64", "int32") or ids in c.program.constants:
        raise Unsupported("its numbers are not integers of the batch")
    y = c.buffer(step.name)
    source, offsets = c.view(ids)
    if source in c.program.constants or tuple(y.shape) != (*offsets.shape, rows.shape[1]) or not y.is_float:
        raise Unsupported("its numbers are not integers of the batch")
    number = seen(c, source, np.repeat(offsets.reshape(-1, 1), rows.shape[1], axis=1))
    elements(c, step.name, kernels.ELEMENT_LOOK_UP, "int64", [number], c.constant(table), n_rows=len(rows))
    c.look_ups.append(LookUp(step.name, source, offsets[offsets >= 0], len(rows)))


_COMPARISONS = {  # the last two with their operands turned around
    "eq": (kernels.ELEMENT_EQ, False), "ne": (kernels.ELEMENT_NE, False), "lt": (kernels.ELEMENT_LT, False),
    "le": (kernels.ELEMENT_LE, False), "gt": (kernels.ELEMENT_LT, True), "ge": (kernels.ELEMENT_LE, True),
}  # fmt: skip
OPERATORS: dict[str, Handler] = {
    "aten.embedding.default": look_up, "aten.to.dtype": convert, "aten._to_copy.default": convert,
    **{f"aten.where.{kind}": where for kind in ("self", "ScalarOther", "ScalarSelf")},
    **{f"aten.masked_fill.{kind}": masked_fill for kind in ("Scalar", "Tensor")},
    "aten.maximum.default": extreme(kernels.ELEMENT_MAX), "aten.minimum.default": extreme(kernels.ELEMENT_MIN),
    "aten.zeros_like.default": filled(0), "aten.ones_like.default": filled(1), "aten.full_like.default": filled(None),
    "aten.cumsum.default": running_sum,
    "aten.logical_not.default": logic(kernels.ELEMENT_EQ), "aten.bitwise_not.default": logic(kernels.ELEMENT_EQ),
    "aten.logical_and.default": logic(kernels.ELEMENT_AND), "aten.bitwise_and.Tensor": logic(kernels.ELEMENT_AND),
    "aten.logical_or.default": logic(kernels.ELEMENT_OR), "aten.bitwise_or.Tensor": logic(kernels.ELEMENT_OR),
    "aten.logical_xor.default": logic(kernels.ELEMENT_XOR),
    **{f"aten.{name}.{kind}": comparison(*how) for name, how in _COMPARISONS.items() for kind in ("Tensor", "Scalar")},
}  # fmt: skip
