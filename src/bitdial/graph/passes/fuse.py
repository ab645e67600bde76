"""Fuse conv/linear + residual add + activation, and activations into add, matmul and concat.

Quantize/dequantize pairs then exist only at the borders of fused operations. Several fusions of one graph are legal: either
side of an add may take it where both are conv or linear layers, or none. `add_options` lists them, `fuse` takes a choice. A
`pad` by zeros, as wide on either side, is the padding of the convolution that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitdial.graph.ir import Graph, Node
from bitdial.graph.operators import OPERATORS
from bitdial.graph.passes.edit import drop_unused, rename_value

Choice = Mapping[str, str]  # add node -> the layer that takes it; "": it stays an operation of its own


def fuse(graph: Graph, choice: Choice | None = None, origins: dict[str, str] | None = None) -> Graph:
    """Fuse residual adds, then activations. A value read by several nodes, or an output of the graph, is never fused
    away. Where both sides of an add are conv or linear layers, the later one takes the add, unless `choice` names another.

    origins: filled with fused node -> value of `graph` that it now computes, for nodes that took others.
    """
    graph = graph.copy()
    names = {} if origins is None else origins
    _fuse_pads(graph)
    for node in [n for n in graph.nodes if n.op == "add"]:
        _fuse_add(graph, node, None if choice is None else choice.get(node.name), names)
    for node in [n for n in graph.nodes if n.op in ("relu", "relu6", "clamp")]:
        _fuse_activation(graph, node, names)
    drop_unused(graph)
    return graph


def _fuse_pads(graph: Graph) -> None:
    pads = {n.name: n for n in graph.nodes if n.op == "pad" and float(n.attrs.get("value", 0.0)) == 0.0}
    for node in graph.nodes:
        pad = pads.get(node.inputs[0]) if node.op == "conv" else None
        if pad is None:
            continue
        outer, space = pad.attrs["pads"][:2], pad.attrs["pads"][2:]
        if not any(map(any, outer)) and all(before == after >= 0 for before, after in space):
            node.inputs[0] = pad.inputs[0]
            node.attrs["padding"] = [own + more for own, (more, _) in zip(node.attrs["padding"], space, strict=True)]


def add_options(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Add node of an unfused graph -> what may become of it: the layers that may take it, the default first, then "".
    Adds that no layer can take are left out."""
    result = {}
    for node in graph.nodes:
        if node.op == "add":
            takers = [graph.nodes[i].name for i, _ in sorted(_takers(graph, node), reverse=True)]
            if takers:
                result[node.name] = (*takers, "")
    return result


def _private(graph: Graph, node: Node) -> bool:
    """Exactly one node reads it, once, and it is no output."""
    readers = [n for n in graph.nodes if node.name in n.operands()]
    return len(readers) == 1 and readers[0].operands().count(node.name) == 1 and node.name not in graph.outputs


def _takers(graph: Graph, add: Node) -> list[tuple[int, int]]:
    """(index of a conv or linear node that may take the add, its place among the add's inputs)."""
    order = {n.name: i for i, n in enumerate(graph.nodes)}
    candidates = []
    for position, value in enumerate(add.inputs):
        i = order.get(value)
        if i is None:
            continue
        node = graph.nodes[i]
        fits = node.op in ("conv", "linear") and node.residual is None and "activation" not in node.attrs
        other = add.inputs[1 - position]
        same_type = other in graph.types and graph.types[other] == graph.types[value]
        if fits and same_type and _private(graph, node):
            candidates.append((i, position))
    return candidates


def _fuse_add(graph: Graph, add: Node, taker: str | None, origins: dict[str, str]) -> None:
    candidates = _takers(graph, add)
    if taker is not None:
        candidates = [(i, position) for i, position in candidates if graph.nodes[i].name == taker]
    if not candidates:
        return
    i, position = max(candidates)
    node = graph.nodes[i]
    node.residual = add.inputs[1 - position]
    graph.nodes.remove(node)
    graph.nodes[graph.nodes.index(add)] = node  # after both operands
    if "activation" in add.attrs:
        node.attrs["activation"] = add.attrs["activation"]
    rename_value(graph, add.name, node.name)
    origins[node.name] = origins.pop(add.name, add.name)


def _activation(node: Node) -> dict[str, Any]:
    if node.op == "relu":
        return {"kind": "relu"}
    if node.op == "relu6":
        return {"kind": "clamp", "lo": 0.0, "hi": 6.0}
    return {"kind": "clamp", "lo": node.attrs["lo"], "hi": node.attrs["hi"]}


def _fuse_activation(graph: Graph, node: Node, origins: dict[str, str]) -> None:
    before = next((n for n in graph.nodes if n.name == node.inputs[0]), None)
    carries = before is not None and before.op in OPERATORS and OPERATORS[before.op].fuses
    if before is None or not carries or "activation" in before.attrs or not _private(graph, before):
        return
    before.attrs["activation"] = _activation(node)
    graph.nodes.remove(node)
    rename_value(graph, node.name, before.name)
    origins[before.name] = origins.pop(node.name, node.name)
