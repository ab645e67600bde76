"""Movement operators and dequantization: remembered, and made by what reads them (`bitdial.engines.cpu.values`)."""

from __future__ import annotations

from bitdial.engines.cpu.values import Lazy, Values
from bitdial.quantization.instructions import Dequantize, Float, Move


def move(c: Values, step: Move | Float) -> None:
    if step.name in c.pads:
        return
    c.move(step.name, step.node, step.inputs[0])


def dequantize(c: Values, step: Dequantize) -> None:
    value = step.inputs[0]
    base = c.lazy.get(value)
    if base is None:
        c.eight(value)
        base = Lazy(value, (), c.buffers[value].view())
    c.lazy[step.name] = Lazy(base.source, base.nodes, base.view, step.factor)
