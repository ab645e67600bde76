"""Small edits that the passes share."""

from __future__ import annotations

from bitdial.graph.ir import Array, Graph


def fresh_constant(graph: Graph, hint: str, array: Array) -> str:
    """Add a constant under `hint` or the next free name after it; return the name."""
    name = graph.fresh_name(hint)
    graph.constants[name] = array
    return name


def rename_value(graph: Graph, old: str, new: str) -> None:
    """Let every reader of `old` (nodes and outputs) read `new`."""
    for node in graph.nodes:
        node.replace_operand(old, new)
    graph.outputs = [new if v == old else v for v in graph.outputs]


def drop_unused(graph: Graph) -> None:
    """Remove nodes and constants that nothing reads, and types of values that are gone."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.operands())
    graph.nodes = kept[::-1]
    graph.constants = {k: v for k, v in graph.constants.items() if k in needed}
    alive = {n.name for n in graph.nodes} | set(graph.inputs)
    graph.types = {k: v for k, v in graph.types.items() if k in alive}
