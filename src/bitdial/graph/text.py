"""Printable text form of a graph, one line per node."""

from __future__ import annotations

import json

from bitdial.graph.ir import Graph, Node


def format_node(node: Node, graph: Graph) -> str:
    """One line: `name: type = op(inputs; weight=.., bias=..) {attributes}  # module path`."""
    parts = [", ".join(_operand(v, graph) for v in node.inputs)]
    for role in ("weight", "bias", "residual"):
        value = getattr(node, role)
        if value is not None:
            parts.append(f"{role}={_operand(value, graph)}")
    attrs = " " + json.dumps(node.attrs, sort_keys=True) if node.attrs else ""
    source = f"  # {node.source}" if node.source else ""
    return f"%{node.name}: {graph.types.get(node.name, '?')} = {node.op}({'; '.join(p for p in parts if p)}){attrs}{source}"


def format_graph(graph: Graph) -> str:
    """The whole graph as text: inputs, nodes in order, outputs, and a line on the constants."""
    lines = [f"graph({', '.join(f'%{v}: {graph.types[v]}' for v in graph.inputs)}):"]
    lines += ["  " + format_node(node, graph) for node in graph.nodes]
    lines.append(f"  return {', '.join('%' + v for v in graph.outputs)}")
    size = sum(array.nbytes for array in graph.constants.values())
    lines.append(f"# {len(graph.nodes)} nodes, {len(graph.constants)} constants of {size:,} bytes")
    return "\n".join(lines)


def _operand(value: str, graph: Graph) -> str:
    return ("$" if value in graph.constants else "%") + value
