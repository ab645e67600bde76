"""Files of version 1, which hold a graph with tables beside it: from these to the instructions that version 2 holds.

A node of that graph is {"name", "op", "inputs"} and, unless empty, "attrs", "weight", "bias", "residual", "source". Additional
operators: quantize, dequantize, table ({"function", ..}). attrs["clamp"]: [lo, hi] of an 8-bit result. Factors by operator:

  add [Ra, Rb]   mul [M]   concat [R...]   mean, avg_pool [F]   quantize [inverse scale]   dequantize [scale]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact.instruction_json import instruction_to_json, layer_from_json, node_attributes, types_from_json
from bitdial.artifact.jsontext import Fields
from bitdial.errors import ArtifactError, GraphError
from bitdial.graph.ir import Node, TensorType
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
from bitdial.quantization.layer import QParams, QuantizedLayer

Array = npt.NDArray[Any]


@dataclass
class Tables:
    """What version 1 has beside its graph, by the name of a node or value. types: of values, for the axes of a mean."""

    types: Mapping[str, TensorType]
    qparams: Mapping[str, QParams] = field(default_factory=dict)
    layers: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    tables: Mapping[str, Array] = field(default_factory=dict)
    factors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    float_reasons: Mapping[str, str] = field(default_factory=dict)


def lower(nodes: list[Node], beside: Tables) -> list[Instruction]:
    """The instructions of a graph's nodes, one per node, in order. `Contract` and `MatMul` share the layers.

    Raises GraphError for an 8-bit value whose operator has no integer form, or a table or factor that is missing.
    """
    return [_lower(beside, node) for node in nodes]


def from_version_1(manifest: dict[str, Any], tensors: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Manifest and tensors of version 2; reading that looks at the rest. Raises ArtifactError and GraphError."""
    manifest, tensors = dict(manifest), dict(tensors)
    where = "version 1"
    graph = Fields(manifest.pop("graph", None), f"{where}: graph")
    nodes = [_node(item, f"{where}: node {i}") for i, item in enumerate(graph.rows("nodes"))]
    types = graph.mapping("types")
    for key in ("inputs", "outputs"):
        manifest[key] = graph.any(key)
    structure = graph.optional_rows("structure")  # files from before there was one have none
    graph.done()
    rows = [_layer_row(item, f"{where}: layer {i}") for i, item in enumerate(manifest.pop("layers"))]
    luts = tensors.pop("scalars/luts").reshape(-1, 256)
    tables = {name: lut.view(dtype) for (name, dtype), lut in zip(manifest.pop("tables"), luts, strict=True)}
    flat, factors = tensors.pop("scalars/factors"), {}
    for name, length in manifest.pop("factors"):
        factors[name], flat = flat[:length], flat[length:]
    if flat.size or flat.dtype != np.float32 or not {*tables, *factors} <= {node.name for node in nodes}:
        raise ArtifactError.damaged(where, "'scalars/factors' or tables that no node has")
    beside = Tables(
        types_from_json(types, where),
        {name: QParams(1.0, signed) for name, signed in manifest["qparams"]},  # only their signs are looked at
        {layer.name: layer for layer, _ in rows},
        tables,
        factors,
        manifest.pop("float_reasons"),
    )
    steps = lower(nodes, beside)
    by_name = {layer.name: row for layer, row in rows}
    of_layers = [step.name for step in steps if isinstance(step, (Contract, MatMul))]
    if of_layers != [layer.name for layer, _ in rows]:
        raise ArtifactError.damaged(where, "the layers are not those of the graph, in its order")
    reasons = {step.name for step in steps if isinstance(step, Float)}
    if not reasons >= beside.float_reasons.keys():
        raise ArtifactError.damaged(where, "a float reason for what is no float operator")
    manifest["instructions"] = [instruction_to_json(step, by_name.get(step.name)) for step in steps]
    manifest["types"] = types
    if structure is not None:
        manifest["structure"] = structure
    parts = [step.table.view(np.uint8) for step in steps if isinstance(step, Lookup)]
    tensors["scalars/luts"] = np.concatenate([np.zeros(0, np.uint8), *parts])
    return manifest, tensors


def _layer_row(item: Any, where: str) -> tuple[QuantizedLayer, dict[str, Any]]:
    """The layer as far as `lower` looks at it, and its row in version 2."""
    row = Fields(item, where)
    name, kind = row.text("name"), row.text("kind")
    rest = {key: value for key, value in item.items() if key not in ("name", "kind")} | {"plane": False}
    head = layer_from_json(rest, name, kind, where)
    if head.shape is not None:
        head.layer.weight = np.broadcast_to(np.int8(0), head.shape)
    return head.layer, rest


def _node(item: Any, where: str) -> Node:
    row = Fields(item, where)
    node = Node(
        name=row.text("name"),
        op=row.text("op"),
        inputs=row.strings("inputs"),
        attrs=node_attributes(row.mapping("attrs", {}), f"{where}: attributes"),
        weight=row.optional_str("weight"),
        bias=row.optional_str("bias"),
        residual=row.optional_str("residual"),
        source=row.optional_str("source") or "",
    )
    row.done()
    return node


def _lower(beside: Tables, node: Node) -> Instruction:
    head: dict[str, Any] = {"name": node.name, "inputs": tuple(node.inputs), "source": node.source}
    if node.name in beside.layers:
        return _product(beside, node, head)
    if node.op == "dequantize":
        return Dequantize(**head, factor=_factors(beside, node)[0])
    encoding = beside.qparams.get(node.name)
    if encoding is None:
        return Float(**head, node=node, reason=beside.float_reasons.get(node.name, ""))
    if node.op == "max_pool":
        return MaxPool(**head, window=Window.of(node.attrs), ceil_mode=bool(node.attrs["ceil_mode"]))
    if node.op in MOVEMENT:
        attrs = {key: value for key, value in node.attrs.items() if key != "clamp"}
        return Move(**head, node=Node(node.name, node.op, node.inputs, attrs, source=node.source))
    make = _ROUNDING.get(node.op)
    if make is None:
        raise GraphError(f"node '{node.name}' ({node.op}) has an 8-bit result but no integer form")
    lo, hi = _clamp(node, encoding)
    return make(beside, node, head | {"lo": lo, "hi": hi})


def _clamp(node: Node, encoding: QParams) -> tuple[int, int]:
    """Limits beyond the range, which calibration on odd data could give, are its ends: no value is another for it."""
    lo, hi = node.attrs.get("clamp", (encoding.qmin, encoding.qmax))
    hi = min(max(int(hi), encoding.qmin), encoding.qmax)
    return min(max(int(lo), encoding.qmin), hi), hi


def _factors(beside: Tables, node: Node) -> tuple[float, ...]:
    factors = beside.factors.get(node.name)
    if factors is None or not factors.size:
        raise GraphError(f"node '{node.name:.80}' ({node.op:.40}) has no factor")
    return tuple(float(f) for f in factors)


def _factor(beside: Tables, node: Node) -> float:
    factors = _factors(beside, node)
    if len(factors) != 1:
        raise GraphError(f"node '{node.name:.80}' ({node.op:.40}) has {len(factors)} factors instead of 1")
    return factors[0]


def _product(beside: Tables, node: Node, head: dict[str, Any]) -> Instruction:
    layer, encoding = beside.layers[node.name], beside.qparams.get(node.name)
    if layer.kind != node.op:
        raise GraphError(f"layer '{node.name:.80}' is a {layer.kind:.20}, its node a {node.op:.40}")
    clamp = None if encoding is None else _clamp(node, encoding)
    head |= {"layer": layer, "clamp": clamp, "activation": node.attrs.get("activation")}
    if node.op == "matmul":
        a = node.attrs
        return MatMul(**head, transpose_b=bool(a.get("transpose_b")), scale=float(a.get("scale", 1.0)))
    window = None
    if node.op == "conv":
        assert layer.weight is not None
        window = Window.of(node.attrs, layer.weight.shape[2:])
        if node.attrs.get("groups", 1) != layer.conv_groups:
            raise GraphError(f"layer '{node.name:.80}': conv_groups differs from the node's groups")
    return Contract(**head, residual=node.residual, window=window)


def _lookup(beside: Tables, node: Node, head: dict[str, Any]) -> Instruction:
    if node.name not in beside.tables:
        raise GraphError(f"node '{node.name:.80}' has no table")
    attrs = {k: v for k, v in node.attrs.items() if k not in ("function", "clamp")}
    offset = 128 if beside.qparams[node.inputs[0]].signed else 0
    return Lookup(
        **head, table=beside.tables[node.name], offset=offset, function=node.attrs.get("function", ""), attrs=attrs
    )


def _sum_pool(beside: Tables, node: Node, head: dict[str, Any]) -> Instruction:
    factor = _factor(beside, node)
    if node.op == "avg_pool":
        window = Window.of(node.attrs)
        cells, ceil = math.prod(window.kernel), bool(node.attrs["ceil_mode"])
        return SumPool(**head, factor=factor, window=window, ceil_mode=ceil, axes=None, keepdim=True, cells=cells)
    shape = beside.types[node.inputs[0]].shape
    axes = tuple(sorted(int(v) % len(shape) for v in node.attrs["axes"]))
    cells = math.prod(d for i in axes if isinstance(d := shape[i], int))
    keep = bool(node.attrs["keepdim"])
    return SumPool(**head, factor=factor, window=None, ceil_mode=False, axes=axes, keepdim=keep, cells=cells)


_ROUNDING: dict[str, Callable[[Tables, Node, dict[str, Any]], Instruction]] = {
    "quantize": lambda b, n, head: Quantize(**head, factor=_factor(b, n)),
    "table": _lookup,
    "add": lambda b, n, head: Add(**head, activation=n.attrs.get("activation"), factors=_factors(b, n)),
    "mul": lambda b, n, head: Mul(**head, factor=_factor(b, n)),
    "concat": lambda b, n, head: Concat(
        **head, activation=n.attrs.get("activation"), factors=_factors(b, n), axis=int(n.attrs["axis"])
    ),
    "mean": _sum_pool,
    "avg_pool": _sum_pool,
}
