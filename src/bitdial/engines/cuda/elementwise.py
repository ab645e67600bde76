"""Instructions that make each element from at most two others, and pools: launches of csrc/cuda/pointwise.h."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bitdial.engines import memory
from bitdial.engines.cuda import arguments
from bitdial.engines.cuda.arguments import Epilogue, Launch, PointwiseArgs, WindowArgs
from bitdial.engines.cuda.values import Buffer, Frame, Offsets, Seen, Values, affine, broadcast, grid, seen
from bitdial.engines.memory import Unsupported
from bitdial.engines.views import check_samples_stay, sizes_of, unit_index
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Dequantize,
    Float,
    Lookup,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
    Window,
)

THREADS = 256
INFINITY = math.inf


def blocks(elements: int) -> tuple[int, int, int]:
    return -(-elements // THREADS), 1, 1


def pointwise(
    c: Values, name: str, op: int, operands: list[Seen], lo: float = -INFINITY, hi: float = INFINITY,
    factors: tuple[float, ...] = (), lookup: int | None = None, value: str | None = None, target: Offsets | None = None,
) -> None:  # fmt: skip
    """One launch over a result, or over a part of it: target holds the part's offsets [positions, channels]."""
    value = value or name
    y = c.buffer(value)
    if y.dtype not in ("", "float32"):
        raise Unsupported(f"it gives {y.dtype}")
    (start, place, channel), (places, channels) = places_of(y, target)
    factor_a, factor_b = (*factors, 0.0, 0.0)[:2]

    def launch(frame: Frame) -> Launch:
        samples = frame.batch
        span = frame.span(value).at(start * y.bytes)
        args = PointwiseArgs(
            a=operands[0].operand(frame), y8=None if y.is_float else span, yf=span if y.is_float else None,
            lookup=None if lookup is None else frame.pool.at(lookup), y_sample=y.item, y_place=place, y_channel=channel,
            samples=samples, places=places, channels=channels, op=op, factor_a=factor_a, factor_b=factor_b, lo=lo, hi=hi,
        )  # fmt: skip
        if len(operands) > 1:
            args.b = operands[1].operand(frame)
        return Launch("pointwise_kernel", blocks(samples * places * channels), args)

    c.add(name, tuple(v for o in operands for v in o.reads), launch, value)


def places_of(y: Buffer, target: Offsets | None = None) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """((offset, per position, per channel) in elements, (positions, channels)) of a result, or of the part at `target`."""
    where = grid(y.offsets(), y.channels_first) if target is None else target
    strides = affine(where)
    if strides is None:
        raise Unsupported("it writes to positions that are not evenly spaced")
    return strides, (where.shape[0], where.shape[1])


# ---- instructions ----------------------------------------------------------------------------------------------------------


def _operand(c: Values, name: str, value: str | float) -> Seen:
    return broadcast(c, value, c.buffer(name), sizes_of(c.types[name])[1])


def _eight(c: Values, name: str, value: str) -> Seen:
    if value not in c.program.qparams:
        raise Unsupported(f"it reads '{value}' in float")
    return _operand(c, name, value)


def quantize(c: Values, step: Quantize) -> None:
    if step.inputs[0] in c.program.qparams:
        raise Unsupported("its input is not float")
    x = _operand(c, step.name, step.inputs[0])
    pointwise(c, step.name, arguments.OP_SCALE, [x], float(step.lo), float(step.hi), (step.factor,))


def dequantize(c: Values, step: Dequantize) -> None:
    x = _eight(c, step.name, step.inputs[0])
    pointwise(c, step.name, arguments.OP_SCALE, [x], factors=(step.factor,))


def lookup(c: Values, step: Lookup) -> None:
    x = _eight(c, step.name, step.inputs[0])
    table = -1 if c.dry else c.pool.add(np.ascontiguousarray(step.table).view(np.uint8))
    pointwise(c, step.name, arguments.OP_LOOKUP, [x], lookup=table)


def add(c: Values, step: Add) -> None:
    _pair(c, step, arguments.OP_ADD, step.factors)


def mul(c: Values, step: Mul) -> None:
    _pair(c, step, arguments.OP_MUL, (step.factor,))


def _pair(c: Values, step: Add | Mul, op: int, factors: tuple[float, ...]) -> None:
    operands = [_eight(c, step.name, value) for value in step.inputs]
    pointwise(c, step.name, op, operands, float(step.lo), float(step.hi), factors)


def combine(
    c: Values, name: str, op: int, values: Sequence[str | float], lo: float = -INFINITY, hi: float = INFINITY
) -> None:
    """A float32 operator of values, constants and numbers."""
    if not c.buffer(name).is_float or any(isinstance(v, str) and (v in c.program.qparams) for v in values):
        raise Unsupported("it reads or gives 8-bit values or integers")
    pointwise(c, name, op, [_operand(c, name, v) for v in values], lo, hi, (1.0,))


def concat(c: Values, step: Concat) -> None:
    for value in step.inputs:
        if value not in c.program.qparams:
            raise Unsupported(f"it reads '{value}' in float")
    concatenate(c, step.name, step.inputs, step.axis, step.factors, float(step.lo), float(step.hi))


def concatenate(
    c: Values, name: str, values: Sequence[str], axis: int, factors: Sequence[float] = (), lo: float = -INFINITY,
    hi: float = INFINITY,
) -> None:  # fmt: skip
    """Parts side by side. factors: one per part, exactly 1.0 to copy it; none: copies."""
    y, place = c.buffer(name), sizes_of(c.types[name])[1]
    axis %= len(y.shape)
    if axis == place:
        raise Unsupported("concatenation along the batch")
    offsets, start = y.offsets(), 0
    for value, factor in zip(values, factors or [1.0] * len(values), strict=True):
        source, own = c.view(value)
        part = np.take(offsets, np.arange(start, start + own.shape[axis]), axis=axis)
        start += own.shape[axis]
        if own.shape != part.shape:
            raise Unsupported("its operands do not go together")
        x = seen(c, source, grid(own, y.channels_first), y.dtype or "float32")
        target = grid(part, y.channels_first)
        if factor == 1.0:
            c.copy(f"{name}/{value}", x, name, target)
        else:
            pointwise(c, f"{name}/{value}", arguments.OP_SCALE, [x], lo, hi, (factor,), value=name, target=target)


def move(c: Values, step: Move | Float) -> None:
    """A view; nothing runs until something reads it that takes no views."""
    if step.name in c.pads:
        return
    value, node = step.operands()[0], step.as_node()
    check_samples_stay(node, c.types[value], c.types[step.name])
    source, offsets = c.view(value)
    index, _ = unit_index(offsets.shape, [node], False)
    shape = sizes_of(c.types[step.name])[0]
    if index.size != math.prod(shape):
        raise Unsupported(f"this {step.operation} gives another shape than recorded")
    flat = offsets.reshape(-1)
    c.views[step.name] = source, np.where(index < 0, -1, flat[np.maximum(index, 0)]).reshape(shape)


# ---- windows ---------------------------------------------------------------------------------------------------------------


def sum_pool(c: Values, step: SumPool) -> None:
    x = c.eight(step.inputs[0])
    window = memory.sum_window(step, x, len(x.shape))
    _pool(c, step, window, {"factor": step.factor, "lo": float(step.lo), "hi": float(step.hi)})


def max_pool(c: Values, step: MaxPool) -> None:
    _pool(c, step, memory.plane_window(step.window), {"greatest": 1})


def _pool(c: Values, step: SumPool | MaxPool, window: Window, values: dict[str, float]) -> None:
    x, y = c.eight(step.inputs[0]), c.buffer(step.name)
    if len(x.shape) == 4 and not x.channels_first:
        raise Unsupported("it reads an image that lies row by row")
    mean = window.kernel == (x.h, x.w) and window.padding == (0, 0)
    size = (1, 1) if mean else (y.h, y.w)
    if not mean and not y.channels_first:
        raise Unsupported("it writes an image that lies row by row")

    def launch(frame: Frame) -> Launch:
        samples = frame.batch * x.factor
        args = WindowArgs(
            x=frame.span(step.inputs[0]), y=frame.span(step.name), x_sample=x.sample, x_place=x.pitch, y_sample=y.sample,
            y_place=y.pitch, samples=samples, x_signed=int(x.signed), channels=x.c, multiplicity=1, **values,
            **_geometry(window, x, size),
        )  # fmt: skip
        return Launch("pool_kernel", blocks(samples * size[0] * size[1] * x.c), args)

    c.add(step.name, step.inputs, launch)


def _geometry(window: Window, x: Buffer, size: tuple[int, int]) -> dict[str, int]:
    names = ("kernel", "stride", "pad", "dilation")
    pairs = {f"{name}_{axis}": pair[i] for name, pair in zip(names, window.pairs, strict=True) for i, axis in enumerate("yx")}
    return {"height": x.h, "width": x.w, "out_height": size[0], "out_width": size[1], **pairs}


def depthwise(
    c: Values, name: str, source: str, reads: tuple[str, ...], window: Window, weights: int, multiplicity: int, outputs: int,
    epilogue: Callable[[Frame], Epilogue], size: tuple[int, int],
) -> None:  # fmt: skip
    """A convolution of one input channel per output, all in 8 bits."""
    x = c.eight(source)

    def launch(frame: Frame) -> Launch:
        samples = frame.batch * x.factor
        args = WindowArgs(
            x=frame.span(source), weights=frame.pool.at(weights), out=epilogue(frame), x_sample=x.sample, x_place=x.pitch,
            samples=samples, x_signed=int(x.signed), channels=outputs, multiplicity=multiplicity, **_geometry(window, x, size),
        )  # fmt: skip
        return Launch("depthwise_kernel", blocks(samples * size[0] * size[1] * outputs), args)

    c.add(name, reads, launch)
