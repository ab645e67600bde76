"""The other operators on 8-bit values (`bitdial.quantization.program` says what each computes).

Every product and sum of the reference engine is one ONNX operator here, so that each is rounded once, in the same order.
One input of `add` is multiplied by a Mul and not by its DequantizeLinear: between a pair of these and a QuantizeLinear
runtimes put 8-bit additions of their own, which round differently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitdial.export.onnx.builder import FLOAT, INT32
from bitdial.export.onnx.floats import window_sum
from bitdial.export.onnx.writer import Writer
from bitdial.graph.ir import BatchDim, Node

EXACT_FLOAT32 = 1 << 24


def _factors(w: Writer, node: Node) -> list[float]:
    return [float(f) for f in w.program.factors[node.name]]


def _scaled(w: Writer, node: Node, total: str, factor: float) -> str:
    t = w.b.emit("Mul", [total, w.b.scalar(factor)], f"{node.name}/t")
    return w.store(t, node, *w.limits(node))


def quantize(w: Writer, node: Node) -> str:
    """By the inverse scale, as the reference engine: dividing by the scale would round differently."""
    return _scaled(w, node, w.value(node.inputs[0]), _factors(w, node)[0])


def dequantize(w: Writer, node: Node) -> str:
    scale = w.b.scalar(_factors(w, node)[0])
    inputs = [w.value(node.inputs[0]), scale, w.zero(w.signed(node.inputs[0]))]
    return w.b.emit("DequantizeLinear", inputs, node.name, output=node.name)


def table(w: Writer, node: Node) -> str:
    """A Gather; negative indices count from the end, so the entries of negative values stand there."""
    entries = w.program.tables[node.name]
    if w.signed(node.inputs[0]):
        entries = np.roll(entries, -128)
    index = w.b.cast(w.value(node.inputs[0]), INT32, f"{node.name}/index")
    return w.b.emit("Gather", [w.b.constant(entries, f"{node.name}/table"), index], node.name, output=node.name, axis=0)


def add(w: Writer, node: Node) -> str:
    first, second = _factors(w, node)
    left = w.b.emit("Mul", [w.dequantized(node.inputs[0]), w.b.scalar(first)], f"{node.name}/a")
    t = w.b.emit("Add", [left, w.dequantized(node.inputs[1], second)], f"{node.name}/t")
    return w.store(t, node, *w.limits(node))


def mul(w: Writer, node: Node) -> str:
    product = w.b.emit("Mul", [w.dequantized(v) for v in node.inputs], f"{node.name}/product")
    return _scaled(w, node, product, _factors(w, node)[0])


def concat(w: Writer, node: Node) -> str:
    encoding = w.encoding(node.name)
    assert encoding is not None
    lo, hi = w.limits(node)
    parts = []
    for i, (value, factor) in enumerate(zip(node.inputs, _factors(w, node), strict=True)):
        own = w.encoding(value)
        assert own is not None
        if factor == 1.0 and own.signed == encoding.signed and lo <= own.qmin and hi >= own.qmax:
            parts.append(w.value(value))
            continue
        t = w.dequantized(value)
        if factor != 1.0:
            t = w.b.emit("Mul", [t, w.b.scalar(factor)], f"{node.name}/t")
        parts.append(w.store(t, node, lo, hi, output=w.b.fresh(f"{node.name}/{i}")))
    return w.b.emit("Concat", parts, node.name, output=node.name, axis=node.attrs["axis"])


def mean(w: Writer, node: Node) -> str:
    a = node.attrs
    shape = w.shape(node.inputs[0])
    cells = 1
    for axis in a["axes"]:
        size = shape[axis]
        if isinstance(size, BatchDim):
            raise w.unsupported(node, "it averages over the batch")
        cells *= size
    if cells * 255 < EXACT_FLOAT32:
        total = w.b.reduce("ReduceSum", w.dequantized(node.inputs[0]), a["axes"], a["keepdim"], f"{node.name}/sum")
    else:
        wide = w.b.cast(w.value(node.inputs[0]), INT32, f"{node.name}/wide")
        total = w.b.reduce("ReduceSum", wide, a["axes"], a["keepdim"], f"{node.name}/sum")
        total = w.b.cast(total, FLOAT, f"{node.name}/sum")
    return _scaled(w, node, total, _factors(w, node)[0])


def avg_pool(w: Writer, node: Node) -> str:
    padding = node.attrs["padding"]
    total = window_sum(w, node, w.dequantized(node.inputs[0]), [*padding, *padding])
    return _scaled(w, node, total, _factors(w, node)[0])


INTEGER_OPS: dict[str, Callable[[Writer, Node], str]] = {
    "add": add, "mul": mul, "concat": concat, "mean": mean, "avg_pool": avg_pool, "table": table, "quantize": quantize,
}  # fmt: skip
