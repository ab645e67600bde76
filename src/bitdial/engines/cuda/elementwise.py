"""Instructions that make each element from at most two others, and pools: launches of csrc/cuda/pointwise.h."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bitdial.engines import memory
from bitdial.engines.cuda import arguments
from bitdial.engines.cuda.arguments import Epilogue, Launch, PointwiseArgs, WindowArgs
from bitdial.engines.cuda.values import Buffer, Frame, Offsets, Seen, Values, affine, broadcast, grid, seen
from bitdial.engines.memory import Unsupported
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
    where = grid(y.offsets(), y.channels_first) if target is None else target
    strides = affine(where)
    if strides is None:
        raise Unsupported("it writes to positions that are not evenly spaced")
    start, place, channel = strides
    places, channels = where.shape
    factor_a, factor_b = (*factors, 0.0, 0.0)[:2]

    def launch(frame: Frame) -> Launch:
        samples = frame.batch * y.factor
        span = frame.span(value).at(start * (4 if y.is_float else 1))
        args = PointwiseArgs(
            a=operands[0].operand(frame), y8=None if y.is_float else span, yf=span if y.is_float else None,
            lookup=None if lookup is None else frame.pool.at(lookup), y_sample=y.sample, y_place=place, y_channel=channel,
            samples=samples, places=places, channels=channels, op=op, factor_a=factor_a, factor_b=factor_b, lo=lo, hi=hi,
        )  # fmt: skip
        if len(operands) > 1:
            args.b = operands[1].operand(frame)
        return Launch("pointwise_kernel", blocks(samples * places * channels), args)

    c.add(name, tuple(o.name for o in operands), launch, value)


# ---- instructions ----------------------------------------------------------------------------------------------------------


def quantize(c: Values, step: Quantize) -> None:
    if not c.buffer(step.inputs[0]).is_float:
        raise Unsupported("its input is not float")
    x = broadcast(c, step.inputs[0], c.buffer(step.name))
    pointwise(c, step.name, arguments.OP_SCALE, [x], float(step.lo), float(step.hi), (step.factor,))


def dequantize(c: Values, step: Dequantize) -> None:
    c.eight(step.inputs[0])
    x = broadcast(c, step.inputs[0], c.buffer(step.name))
    pointwise(c, step.name, arguments.OP_SCALE, [x], factors=(step.factor,))


def lookup(c: Values, step: Lookup) -> None:
    c.eight(step.inputs[0])
    x = broadcast(c, step.inputs[0], c.buffer(step.name))
    table = -1 if c.dry else c.pool.add(np.ascontiguousarray(step.table).view(np.uint8))
    pointwise(c, step.name, arguments.OP_LOOKUP, [x], lookup=table)


def add(c: Values, step: Add) -> None:
    _pair(c, step, arguments.OP_ADD, step.factors)


def mul(c: Values, step: Mul) -> None:
    _pair(c, step, arguments.OP_MUL, (step.factor,))


def _pair(c: Values, step: Add | Mul, op: int, factors: tuple[float, ...]) -> None:
    for value in step.inputs:
        c.eight(value)
    y = c.buffer(step.name)
    operands = [broadcast(c, value, y) for value in step.inputs]
    pointwise(c, step.name, op, operands, float(step.lo), float(step.hi), factors)


def concat(c: Values, step: Concat) -> None:
    y = c.buffer(step.name)
    axis = step.axis % (len(y.shape) + 1) - 1
    if axis < 0:
        raise Unsupported("concatenation along the batch")
    offsets, start = y.offsets(), 0
    for value, factor in zip(step.inputs, step.factors, strict=True):
        x = c.eight(value)
        part = np.take(offsets, np.arange(start, start + x.shape[axis]), axis=axis)
        start += x.shape[axis]
        source = seen(c, value, grid(x.offsets(), y.channels_first))
        op = arguments.OP_COPY if factor == 1.0 else arguments.OP_SCALE
        limits = (-INFINITY, INFINITY) if factor == 1.0 else (float(step.lo), float(step.hi))
        pointwise(c, f"{step.name}/{value}", op, [source], *limits, (factor,), value=step.name,
                  target=grid(part, y.channels_first))  # fmt: skip


def move(c: Values, step: Move | Float) -> None:
    """Nothing where the result is the same memory; else a copy."""
    if step.name in c.pads:
        return
    value = step.inputs[0] if isinstance(step, Move) else step.node.inputs[0]
    x, y = c.buffer(value), c.buffer(step.name)
    if x.factor != y.factor:
        raise Unsupported(f"this {step.operation} moves values between samples")
    as_move = step if isinstance(step, Move) else Move(step.name, (value,), step.source, step.node)
    flat, _, out_shape = memory.moved_index(as_move, c.program)
    start = x.offsets().reshape(-1)
    source = np.where(flat < 0, -1, start[np.maximum(flat, 0)]).reshape(out_shape)
    if x.sample == y.sample and x.type == y.type and np.array_equal(source, y.offsets()):
        c.same[step.name] = value
        return
    pointwise(c, step.name, arguments.OP_COPY, [seen(c, value, grid(source, y.channels_first))])


# ---- windows ---------------------------------------------------------------------------------------------------------------


def sum_pool(c: Values, step: SumPool) -> None:
    x = c.eight(step.inputs[0])
    window = memory.sum_window(step, x, len(x.shape) + 1)
    _pool(c, step, window, {"factor": step.factor, "lo": float(step.lo), "hi": float(step.hi)})


def max_pool(c: Values, step: MaxPool) -> None:
    _pool(c, step, memory.plane_window(step.window), {"greatest": 1})


def _pool(c: Values, step: SumPool | MaxPool, window: Window, values: dict[str, float]) -> None:
    x, y = c.eight(step.inputs[0]), c.buffer(step.name)
    if len(x.shape) == 3 and not x.channels_first:
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
