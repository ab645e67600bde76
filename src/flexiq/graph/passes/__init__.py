"""Rewrites of a graph; the verifier runs after each."""

from __future__ import annotations

from collections.abc import Callable

from flexiq.graph.ir import Graph
from flexiq.graph.passes.fold import batch_norm_to_conv, fold_batch_norm
from flexiq.graph.passes.fuse import fuse
from flexiq.graph.passes.simplify import simplify
from flexiq.graph.verify import verify

PASSES: tuple[Callable[[Graph], Graph], ...] = (simplify, fold_batch_norm, batch_norm_to_conv, fuse, simplify)


def optimize(graph: Graph) -> Graph:
    """Simplify, fold BatchNorm, fuse: the graph on which everything later works. The input graph is not changed."""
    verify(graph)
    for rewrite in PASSES:
        graph = rewrite(graph)
        verify(graph)
    return graph


__all__ = ["PASSES", "batch_norm_to_conv", "fold_batch_norm", "fuse", "optimize", "simplify"]
