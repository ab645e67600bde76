"""Quantize, and LayerNorm, whose result is as a rule rounded in the same step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.engines.cpu.values import Buffer, Lazy, Values, is_move, own
from bitdial.engines.memory import Unsupported
from bitdial.engines.views import dense, sizes_of
from bitdial.graph.ir import TensorType
from bitdial.quantization.instructions import Float, Instruction, Quantize

# ---- quantization --------------------------------------------------------------------------------------------------------


def quantize(c: Values, step: Quantize) -> None:
    """Moved values are moved as bytes, behind the rounding; dequantized ones become a table."""
    name, value = step.name, step.inputs[0]
    lazy = c.lazy.get(value)
    if lazy is not None and lazy.factor is not None:
        _quantize_by_table(c, step, lazy)
        return
    source = value if lazy is None else lazy.source
    done = c.quantized.get((source, *_rounding(c, step)))
    if done is not None:
        c.lazy[name] = Lazy(done, () if lazy is None else lazy.nodes, None if lazy is None else lazy.view)
        if lazy is None:
            c.lazy[name] = replace(c.lazy[name], view=c.buffers[done].view())
        return
    if lazy is not None and source not in c.program.constants:
        origin = c.source(lazy)
        sizes, _ = sizes_of(c.types[name])
        if origin.own_order and origin.is_float and math.prod(sizes) >= math.prod(origin.shape):
            inner, y = c.temporary(name, TensorType(c.types[source].shape, c.types[name].dtype), _signed(c, step))
            _emit_quantize(c, step, c.laid_out_as(source, y), y, False)
            c.lazy[name] = Lazy(inner, lazy.nodes, lazy.view)
            return
    x = c.buffer(value)
    if not x.is_float:
        raise Unsupported("its input is not float")
    y = c.buffer(name)
    _emit_quantize(c, step, c.laid_out_as(value, y), y, value in c.program.inputs)


def _emit_quantize(c: Values, step: Quantize, tensor: int, y: Buffer, counted: bool) -> None:
    c.native.add_quantize(step.name, tensor, y.tensor, step.factor, float(step.lo), float(step.hi), counted)


def _signed(c: Values, step: Quantize) -> bool:
    return c.program.qparams[step.name].signed


def _rounding(c: Values, step: Quantize) -> tuple[Any, ...]:
    return step.factor, step.lo, step.hi, _signed(c, step)


def _quantize_by_table(c: Values, step: Quantize, lazy: Lazy) -> None:
    """Dequantize, products with numbers and Quantize take a byte to a byte."""
    assert lazy.factor is not None
    x = c.moved_source(step.inputs[0], lazy)
    y = c.buffer(step.name)
    if x.channels_first != y.channels_first:
        raise Unsupported("its operands lie in memory in two ways")
    c.native.add_table(step.name, x.tensor, y.tensor, table_of(lazy, x.signed, step, y.signed))


def table_of(lazy: Lazy, signed: bool, step: Quantize, to_signed: bool) -> npt.NDArray[np.uint8]:
    """uint8 [256]: the stored byte that every stored byte behind a dequantized value becomes."""
    assert lazy.factor is not None
    stored = np.arange(256, dtype=np.float32) - np.float32(128 if signed else 0)
    with np.errstate(all="ignore"):
        t = stored * np.float32(lazy.factor)
        for op, number in lazy.scalars:
            t = _FUNCTIONS[op](t, np.float32(number))
        t = np.rint(np.clip(t * np.float32(step.factor), np.float32(step.lo), np.float32(step.hi)))
    values = np.where(np.isnan(t), np.float32(step.lo), t).astype(np.int16) + (128 if to_signed else 0)
    return own(values, np.uint8)


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
}  # fmt: skip


# ---- LayerNorm -----------------------------------------------------------------------------------------------------------


def layer_norm(c: Values, step: Float) -> None:
    value, *affine = step.node.inputs
    x = c.floats(value)
    columns = math.prod(int(d) for d in step.node.attrs["normalized_shape"])
    axes = len(step.node.attrs["normalized_shape"])
    if x.place is None or x.place >= len(x.shape) - axes or math.prod(x.shape[-axes:]) != columns:
        raise Unsupported("it normalizes over the batch")
    weight, bias = [c.constant(v).tensor for v in affine] + [-1] * (2 - len(affine))
    rounding, whole = _quantized_at_once(c, step)
    y, bytes_, limits = -1, -1, {}
    if rounding is not None:
        inner, buffer = c.temporary(step.name, TensorType(c.types[step.name].shape, c.types[rounding.name].dtype),
                                    _signed(c, rounding))  # fmt: skip
        c.quantized[(step.name, *_rounding(c, rounding))] = inner
        bytes_ = buffer.tensor
        limits = {"factor": rounding.factor, "lo": float(rounding.lo), "hi": float(rounding.hi)}
    if rounding is None or not whole:
        y = c.buffer(step.name).tensor
    else:
        c.types.setdefault(step.name, c.program.types[step.name])
        c.lazy[step.name] = Lazy(step.name, (), dense(sizes_of(c.types[step.name])[0]))
    c.native.add_layer_norm(
        step.name, src=x.tensor, weight=weight, bias=bias, columns=columns, dst=y, bytes=bytes_,
        eps=float(step.node.attrs["eps"]), **limits,
    )  # fmt: skip


def _quantized_at_once(c: Values, step: Instruction) -> tuple[Quantize | None, bool]:
    """(a Quantize that reads the result, moved or not; whether nothing reads it otherwise)."""
    found: list[Quantize] = []
    whole = step.name not in c.program.outputs
    open_values = [step.name]
    count = math.prod(sizes_of(c.types[step.name])[0])
    while open_values:
        value = open_values.pop()
        for reader in c.readers.get(value, []):
            if isinstance(reader, Quantize):
                found.append(reader)
            elif is_move(reader) and value not in c.program.outputs and math.prod(
                sizes_of(c.types[reader.name])[0]
            ) >= count and c.stays(reader):
                open_values.append(reader.name)
            else:
                whole = False
        whole = whole and value not in c.program.outputs
    if not found:
        return None, False
    first = _rounding(c, found[0])
    return found[0], whole and all(_rounding(c, q) == first for q in found)
