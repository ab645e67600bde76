"""Which axis of a value holds the batch, and how samples lie along it. From the shapes alone.

Dynamic extraction needs it: windows folded into the batch belong to one sample, and attention layers of PyTorch compute
on [tokens, batch, features] and even [tokens * batch, features], so that the first axis need not be the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitdial.graph.ir import BatchDim, Graph, Node, Shape


@dataclass(frozen=True)
class BatchAxis:
    """`axis` has the size outer * N * inner, row-major: position p belongs to sample p // inner % N."""

    axis: int
    outer: int = 1
    inner: int = 1


def batch_axes(graph: Graph) -> dict[str, BatchAxis | None]:
    """Value name -> its batch axis; None where there is none, or where it cannot be told (after some aten operators)."""
    result: dict[str, BatchAxis | None] = dict.fromkeys(graph.constants)
    for name in graph.inputs:
        found = _find(graph.types[name].shape)
        result[name] = None if found is None else BatchAxis(found[0], 1, found[1])
    for node in graph.nodes:
        result[node.name] = _of_node(node, graph, result)
    return result


def _find(shape: Shape) -> tuple[int, int] | None:
    """(axis, factor) of the only batch dimension of a shape."""
    found = [(i, d.factor) for i, d in enumerate(shape) if isinstance(d, BatchDim)]
    return found[0] if len(found) == 1 else None


def _of_node(node: Node, graph: Graph, known: dict[str, BatchAxis | None]) -> BatchAxis | None:
    shape = graph.types[node.name].shape
    found = _find(shape)
    if found is None:
        return None
    axis, factor = found
    if factor == 1:
        return BatchAxis(axis)
    batched = [v for v in node.data_operands() if v in graph.types and _find(graph.types[v].shape) is not None]
    sources = [(graph.types[v].shape, known[v]) for v in batched]
    if not sources:  # a constant expanded over the batch: all samples are alike
        return BatchAxis(axis, 1, factor)
    if node.op == "reshape":
        return _reshaped(sources[0], shape, axis, factor)
    choices = set()
    for source_shape, source in sources:
        same = _find(source_shape) == found if node.op.startswith("aten.") else True
        fits = source is not None and source.outer * source.inner == factor and same
        choices.add((source.outer, source.inner) if fits and source is not None else None)
    if len(choices) != 1:
        return None
    choice = choices.pop()
    return None if choice is None else BatchAxis(axis, *choice)


def _reshaped(source: tuple[Shape, BatchAxis | None], shape: Shape, axis: int, factor: int) -> BatchAxis | None:
    """Row-major order stays, so what lies outside the batch in the flat order is the same number before and after."""
    before, place = source
    if place is None:
        return None
    outside = math.prod(d for d in before[: place.axis] if isinstance(d, int)) * place.outer
    ahead = math.prod(d for d in shape[:axis] if isinstance(d, int))
    if ahead == 0 or outside % ahead or factor % (outside // ahead):
        return None
    return BatchAxis(axis, outside // ahead, factor // (outside // ahead))
