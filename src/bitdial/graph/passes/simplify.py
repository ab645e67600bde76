"""Remove what computes nothing: dead nodes, reshapes to the same shape, chains of reshapes, identity permutes."""

from __future__ import annotations

from bitdial.graph.ir import Graph
from bitdial.graph.passes.edit import drop_unused, rename_value


def simplify(graph: Graph) -> Graph:
    """Return a graph without dead nodes, no-op movements, and with reshape(reshape(x)) and relu(relu(x)) merged."""
    graph = graph.copy()
    drop_unused(graph)
    producers = graph.producers()
    for node in list(graph.nodes):
        x = node.inputs[0] if node.inputs else ""
        before = producers.get(x)
        if node.op == "reshape" and before is not None and before.op == "reshape":
            node.inputs = list(before.inputs)
            x = node.inputs[0]
        no_op = (
            (node.op in ("reshape", "expand") and x in graph.types and graph.types[x] == graph.types[node.name])
            or (node.op == "permute" and node.attrs["axes"] == list(range(len(node.attrs["axes"]))))
            or (node.op == "relu" and before is not None and before.op in ("relu", "relu6"))
        )
        if no_op and node.name not in graph.outputs:
            rename_value(graph, node.name, x)
    drop_unused(graph)
    return graph
