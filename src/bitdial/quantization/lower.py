"""From a program's graph and tables to its instructions: what every engine and exporter runs. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bitdial.errors import GraphError
from bitdial.graph.ir import Node
from bitdial.graph.operators import MOVEMENT
from bitdial.quantization.instructions import (
    Add,
    Concat,
    Contract,
    Dequantize,
    Float,
    Instruction,
    Lookup,
    MatMul,
    MaxPool,
    Move,
    Mul,
    Quantize,
    SumPool,
    Window,
)
from bitdial.quantization.program import Program


def lower(program: Program) -> list[Instruction]:
    """The instructions of a program, one per node of its graph, in its order.

    `Contract` and `MatMul` share the program's layers: tables that change in them change here. Raises GraphError for an 8-bit
    value whose operator has no integer form.
    """
    return [_lower(program, node) for node in program.graph.nodes]


def _lower(program: Program, node: Node) -> Instruction:
    head: dict[str, Any] = {"name": node.name, "inputs": tuple(node.inputs), "source": node.source}
    if node.name in program.layers:
        return _product(program, node, head)
    if node.op == "dequantize":
        return Dequantize(**head, factor=float(program.factors[node.name][0]))
    encoding = program.qparams.get(node.name)
    if encoding is None:
        return Float(**head, node=node, reason=program.float_reasons.get(node.name, ""))
    if node.op == "max_pool":
        return MaxPool(**head, window=Window.of(node.attrs), ceil_mode=bool(node.attrs["ceil_mode"]))
    if node.op in MOVEMENT:
        return Move(**head, node=node)
    make = _ROUNDING.get(node.op)
    if make is None:
        raise GraphError(f"node '{node.name}' ({node.op}) has an 8-bit result but no integer form")
    lo, hi = node.attrs.get("clamp", (encoding.qmin, encoding.qmax))
    return make(program, node, head | {"lo": int(lo), "hi": int(hi)})


def _factors(program: Program, node: Node) -> tuple[float, ...]:
    return tuple(float(f) for f in program.factors[node.name])


def _product(program: Program, node: Node, head: dict[str, Any]) -> Instruction:
    eight = node.name in program.qparams
    head |= {
        "layer": program.layers[node.name],
        "clamp": (int(node.attrs["clamp"][0]), int(node.attrs["clamp"][1])) if eight else None,
        "activation": None if eight else node.attrs.get("activation"),
    }
    if node.op == "matmul":
        a = node.attrs
        return MatMul(**head, transpose_b=bool(a.get("transpose_b")), scale=float(a.get("scale", 1.0)))
    window = None
    if node.op == "conv":
        weight = program.layers[node.name].weight
        assert weight is not None
        window = Window.of(node.attrs, weight.shape[2:])
    return Contract(**head, residual=node.residual, window=window)


def _lookup(program: Program, node: Node, head: dict[str, Any]) -> Instruction:
    attrs = {k: v for k, v in node.attrs.items() if k not in ("function", "clamp")}
    offset = 128 if program.qparams[node.inputs[0]].signed else 0
    return Lookup(
        **head, table=program.tables[node.name], offset=offset, function=node.attrs.get("function", ""), attrs=attrs
    )


def _sum_pool(program: Program, node: Node, head: dict[str, Any]) -> Instruction:
    factor = _factors(program, node)[0]
    if node.op == "avg_pool":
        window = Window.of(node.attrs)
        cells, ceil = math.prod(window.kernel), bool(node.attrs["ceil_mode"])
        return SumPool(**head, factor=factor, window=window, ceil_mode=ceil, axes=None, keepdim=True, cells=cells)
    shape = program.graph.types[node.inputs[0]].shape
    axes = tuple(sorted(int(v) % len(shape) for v in node.attrs["axes"]))
    cells = math.prod(d for i in axes if isinstance(d := shape[i], int))
    keep = bool(node.attrs["keepdim"])
    return SumPool(**head, factor=factor, window=None, ceil_mode=False, axes=axes, keepdim=keep, cells=cells)


_ROUNDING: dict[str, Callable[[Program, Node, dict[str, Any]], Instruction]] = {
    "quantize": lambda p, n, head: Quantize(**head, factor=_factors(p, n)[0]),
    "table": _lookup,
    "add": lambda p, n, head: Add(**head, factors=_factors(p, n)),
    "mul": lambda p, n, head: Mul(**head, factor=_factors(p, n)[0]),
    "concat": lambda p, n, head: Concat(**head, factors=_factors(p, n), axis=int(n.attrs["axis"])),
    "mean": _sum_pool,
    "avg_pool": _sum_pool,
}
