"""Which layers of a program run on the array, and their plans. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitdial.engines.npu.plan import Design, Geometry, LayerPlan, dense_chunks, plan_layer
from bitdial.errors import EngineError
from bitdial.graph.ir import BatchDim
from bitdial.quantization.instructions import Contract, MatMul
from bitdial.quantization.program import Program

LOW_TOP = {True: 7, False: 15}  # largest low activation by signedness: what the array's edge clamps to
LOW_WEIGHT = 7


@dataclass(frozen=True)
class Lowered:
    """plans: by layer name, one sample each. host: layers that the host computes -> why. reorders: of channels, which the layout
    left -> bytes of a sample. all in the program's order."""

    plans: Mapping[str, LayerPlan]
    host: Mapping[str, str]
    reorders: Mapping[str, int]


def lower(program: Program, design: Design, pad_groups: bool = False) -> Lowered:
    """Plans of all layers that the array can run.

    Raises EngineError, naming the layer and the remedy, for groups that gain nothing on this array (see `dense_chunks`) and for
    layers too large for its buffers.
    """
    plans: dict[str, LayerPlan] = {}
    host: dict[str, str] = {}
    reorders: dict[str, int] = {}
    for step in program.instructions:
        if step.operation == "gather":
            reorders[step.name] = _sample_bytes(program, step.name)
        if isinstance(step, MatMul):
            host[step.name] = "a product of two activations: the array keeps weights"
        if not isinstance(step, Contract):
            continue
        reason = outside(program, step)
        if reason:
            host[step.name] = reason
        else:
            plans[step.name] = _plan(program, step, design, pad_groups)
    return Lowered(plans, host, reorders)


def outside(program: Program, step: Contract) -> str:
    """Why the array does not run a layer, "" if it does."""
    layer = step.layer
    assert layer.weight is not None
    signed = program.qparams[step.inputs[0]].signed
    if step.window is not None and len(step.window.kernel) != 2:
        return f"a convolution over {len(step.window.kernel)} axes; the sequencer walks two"
    if _sample_shape(program, step) is None:
        return "the size of its input is not fixed"
    if not layer.low.any():
        return ""
    if layer.conv_groups > 1:
        return "a grouped convolution with low channels: block-diagonal tiles are 8-bit; keep it at 8 bits"
    if program.extraction == "dynamic":
        return "dynamic extraction; the array's shifts are static: quantize with extraction='static'"
    if layer.amax != LOW_TOP[signed] or layer.wmax > LOW_WEIGHT:
        return f"its low range of {layer.amax} and {layer.wmax} is not that of 4 bits; quantize with target='npu'"
    return ""


def _sample_shape(program: Program, step: Contract) -> tuple[int, ...] | None:
    """Of the input, without the batch axis; a factor of it becomes an axis. None if a size is open."""
    first, *rest = program.types[step.inputs[0]].shape
    if not isinstance(first, BatchDim) or not all(isinstance(d, int) for d in rest):
        return None
    if step.window is not None:
        return tuple(int(d) for d in rest) if first.factor == 1 else None  # type: ignore[arg-type]
    return (first.factor, *(int(d) for d in rest))  # type: ignore[arg-type]


def _sample_bytes(program: Program, value: str) -> int:
    """Of a value, for one sample; sizes that are open count as 1."""
    kind = program.types[value]
    sizes = [d.factor if isinstance(d, BatchDim) else d for d in kind.shape]
    width = 1 if value in program.qparams else np.dtype(kind.dtype).itemsize
    return width * math.prod(int(d) for d in sizes if isinstance(d, int))


def _plan(program: Program, step: Contract, design: Design, pad_groups: bool) -> LayerPlan:
    layer, shape = step.layer, _sample_shape(program, step)
    assert layer.weight is not None and shape is not None
    outputs = len(layer.weight)
    if step.window is None:
        rows = 1
        for size in shape[:-1]:
            rows *= size
        geometry = Geometry.linear(shape[-1], outputs, rows)
    else:
        geometry = Geometry(shape[0], outputs, (shape[1], shape[2]), step.window, layer.conv_groups)
    if layer.conv_groups > 1:
        return plan_layer(step.name, geometry, [], design, len(program.ratios))
    chunks = dense_chunks(step.name, layer.group_bounds, layer.low, layer.activation_shift, design.rows, pad_groups)
    return plan_layer(step.name, geometry, chunks, design, len(program.ratios))


def needed(program: Program, lowered: Lowered) -> None:
    """Raise EngineError where nothing is left for the array."""
    if not lowered.plans:
        why = "; ".join(f"'{name}': {reason}" for name, reason in lowered.host.items()) or "it has no integer layers"
        raise EngineError(f"npu: no layer of this model runs on the array ({why})")
