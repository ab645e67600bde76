"""Operations that ONNX writes in parts, put together again, so that an imported network has the layers it was written with.

Each rewrite changes one node to the whole operation and leaves its parts to be dropped where nothing else reads them.
"""

from __future__ import annotations

from bitdial.graph.ir import Graph
from bitdial.graph.onnx import functions, layer_patterns
from bitdial.graph.onnx.matching import Matcher
from bitdial.graph.passes.edit import drop_unused


def recognize(graph: Graph) -> Graph:
    """The graph with decomposed operations whole. The graph given is changed."""
    drop_unused(graph)
    for rewrites in (functions.REWRITES, layer_patterns.REWRITES):
        matcher = Matcher(graph)
        for node in list(graph.nodes):
            for op, rewrite in rewrites:
                if node.op == op and rewrite(matcher, node):
                    matcher = Matcher(graph)
                    break
        drop_unused(graph)
    return graph
