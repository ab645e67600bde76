"""Rewrites of a graph; the verifier runs after each."""

from __future__ import annotations

from collections.abc import Callable

from bitdial.graph.ir import Graph
from bitdial.graph.passes.fold import batch_norm_to_conv, fold_batch_norm
from bitdial.graph.passes.fuse import Choice, add_options, fuse
from bitdial.graph.passes.simplify import simplify
from bitdial.graph.verify import verify

PASSES: tuple[Callable[[Graph], Graph], ...] = (simplify, fold_batch_norm, batch_norm_to_conv, fuse, simplify)


def optimize(graph: Graph) -> Graph:
    """Simplify, fold BatchNorm, fuse: the graph on which everything later works. The input graph is not changed."""
    verify(graph)
    for rewrite in PASSES:
        graph = rewrite(graph)
        verify(graph)
    return graph


def fold(graph: Graph) -> Graph:
    """`optimize` without fusing: the graph that `fused` makes its variants of. The input graph is not changed."""
    verify(graph)
    for rewrite in (simplify, fold_batch_norm, batch_norm_to_conv, simplify):
        graph = rewrite(graph)
        verify(graph)
    return graph


def fused(graph: Graph, choice: Choice | None = None) -> tuple[Graph, dict[str, str]]:
    """A legal fusion of a graph that `fold` returned, and for every value of it the one of `graph` that it equals."""
    origins: dict[str, str] = {}
    result = fuse(graph, choice, origins)
    verify(result)
    result = simplify(result)
    verify(result)
    return result, {v: origins.get(v, v) for v in (*result.inputs, *(n.name for n in result.nodes))}


__all__ = [
    "PASSES",
    "Choice",
    "add_options",
    "batch_norm_to_conv",
    "fold",
    "fold_batch_norm",
    "fuse",
    "fused",
    "optimize",
    "simplify",
]
