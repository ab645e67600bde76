"""The other operators on 8-bit values (`bitdial.quantization.instructions` says what each computes).

Every product and sum of the reference engine is one ONNX operator here, so that each is rounded once, in the same order.
One input of `add` is multiplied by a Mul and not by its DequantizeLinear: between a pair of these and a QuantizeLinear
runtimes put 8-bit additions of their own, which round differently.
"""

from __future__ import annotations

import numpy as np

from bitdial.export.onnx.builder import FLOAT, INT32
from bitdial.export.onnx.floats import window_sum
from bitdial.export.onnx.writer import Writer
from bitdial.graph.ir import BatchDim
from bitdial.quantization.instructions import Add, Concat, Dequantize, Lookup, Mul, Quantize, SumPool

EXACT_FLOAT32 = 1 << 24


def _scaled(w: Writer, step: Quantize | Mul | SumPool, total: str) -> str:
    t = w.b.emit("Mul", [total, w.b.scalar(step.factor)], f"{step.name}/t")
    return w.store(t, step.name, step.lo, step.hi)


def quantize(w: Writer, step: Quantize) -> str:
    """By the inverse scale, as the reference engine: dividing by the scale would round differently."""
    return _scaled(w, step, w.value(step.inputs[0]))


def dequantize(w: Writer, step: Dequantize) -> str:
    scale = w.b.scalar(step.factor)
    inputs = [w.value(step.inputs[0]), scale, w.zero(w.signed(step.inputs[0]))]
    return w.b.emit("DequantizeLinear", inputs, step.name, output=step.name)


def lookup(w: Writer, step: Lookup) -> str:
    """A Gather; negative indices count from the end, so the entries of negative values stand there."""
    entries = np.roll(step.table, -step.offset)
    index = w.b.cast(w.value(step.inputs[0]), INT32, f"{step.name}/index")
    return w.b.emit("Gather", [w.b.constant(entries, f"{step.name}/table"), index], step.name, output=step.name, axis=0)


def add(w: Writer, step: Add) -> str:
    first, second = step.factors
    left = w.b.emit("Mul", [w.dequantized(step.inputs[0]), w.b.scalar(first)], f"{step.name}/a")
    t = w.b.emit("Add", [left, w.dequantized(step.inputs[1], second)], f"{step.name}/t")
    return w.store(t, step.name, step.lo, step.hi)


def mul(w: Writer, step: Mul) -> str:
    product = w.b.emit("Mul", [w.dequantized(v) for v in step.inputs], f"{step.name}/product")
    return _scaled(w, step, product)


def concat(w: Writer, step: Concat) -> str:
    encoding = w.encoding(step.name)
    assert encoding is not None
    lo, hi = step.lo, step.hi
    parts = []
    for i, (value, factor) in enumerate(zip(step.inputs, step.factors, strict=True)):
        own = w.encoding(value)
        assert own is not None
        if factor == 1.0 and own.signed == encoding.signed and lo <= own.qmin and hi >= own.qmax:
            parts.append(w.value(value))
            continue
        t = w.dequantized(value)
        if factor != 1.0:
            t = w.b.emit("Mul", [t, w.b.scalar(factor)], f"{step.name}/t")
        parts.append(w.store(t, step.name, lo, hi, output=w.b.fresh(f"{step.name}/{i}")))
    return w.b.emit("Concat", parts, step.name, output=step.name, axis=step.axis)


def sum_pool(w: Writer, step: SumPool) -> str:
    value = step.inputs[0]
    if step.window is not None:
        padding = step.window.padding
        return _scaled(w, step, window_sum(w, step.name, value, step.window, w.dequantized(value), [*padding, *padding]))
    assert step.axes is not None
    if any(isinstance(w.shape(value)[axis], BatchDim) for axis in step.axes):
        raise w.unsupported(step, "it averages over the batch")
    if step.cells * 255 < EXACT_FLOAT32:
        total = w.b.reduce("ReduceSum", w.dequantized(value), step.axes, step.keepdim, f"{step.name}/sum")
    else:
        wide = w.b.cast(w.value(value), INT32, f"{step.name}/wide")
        total = w.b.reduce("ReduceSum", wide, step.axes, step.keepdim, f"{step.name}/sum")
        total = w.b.cast(total, FLOAT, f"{step.name}/sum")
    return _scaled(w, step, total)
