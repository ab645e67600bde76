"""The graph as plain JSON and back. Constants are tensors of the file and not handled here.

Node: {"name", "op", "inputs"} and, unless empty, "attrs", "weight", "bias", "residual", "source".
Type: [dtype, [dimensions]], a dimension being an int or ["N", k] for k times the batch size.
"structure", where the outputs are more than one value or a tuple of values: see `bitdial.graph.structure`.
"""

from __future__ import annotations

from typing import Any

from bitdial.artifact.jsontext import Fields, from_plain, to_plain
from bitdial.errors import ArtifactError
from bitdial.graph.ir import BatchDim, Dim, Graph, Node, TensorType
from bitdial.quantization.program import QuantizedLayer


def stored_constants(graph: Graph, layers: dict[str, QuantizedLayer]) -> list[str]:
    """Names of the constants that a file needs, sorted: those that are used otherwise than as weight or bias of a
    quantized layer, which keeps its own in integers."""
    used = set(graph.outputs)
    for node in graph.nodes:
        used.update(node.data_operands() if node.name in layers else node.operands())
    return sorted(used & graph.constants.keys())


def graph_to_json(graph: Graph, constants: list[str]) -> dict[str, Any]:
    """The graph without its constants, of which only those in `constants` will exist after loading.

    A quantized layer whose weight or bias is not among them no longer names it.
    """
    kept = {*graph.inputs, *(node.name for node in graph.nodes), *constants}
    nodes = []
    for node in graph.nodes:
        item: dict[str, Any] = {"name": node.name, "op": node.op, "inputs": list(node.inputs)}
        optional = {
            "attrs": to_plain(node.attrs, f"attributes of node '{node.name}'"),
            "weight": node.weight if node.weight in kept else None,
            "bias": node.bias if node.bias in kept else None,
            "residual": node.residual,
            "source": node.source,
        }
        nodes.append(item | {key: value for key, value in optional.items() if value})
    types = {name: [t.dtype, [_dim_to_json(d) for d in t.shape]] for name, t in graph.types.items() if name in kept}
    result = {"inputs": list(graph.inputs), "outputs": list(graph.outputs), "nodes": nodes, "types": types}
    return result if graph.structure is None else result | {"structure": to_plain(graph.structure, "output structure")}


def graph_from_json(value: Any, where: str) -> Graph:
    """Undo `graph_to_json`; the constants are still empty and the graph unverified. Raises ArtifactError."""
    fields = Fields(value, f"{where}: graph")
    nodes = [_node(item, f"{where}: node {i}") for i, item in enumerate(fields.rows("nodes"))]
    types = {name: _type(item, f"{where}: type of '{name:.80}'") for name, item in fields.mapping("types").items()}
    structure = fields.optional_rows("structure")  # files from before there was one have none
    graph = Graph(fields.strings("inputs"), fields.strings("outputs"), nodes, {}, types, structure)
    fields.done()
    return graph


def _node(value: Any, where: str) -> Node:
    fields = Fields(value, where)
    node = Node(
        name=fields.text("name"),
        op=fields.text("op"),
        inputs=fields.strings("inputs"),
        attrs=from_plain(fields.mapping("attrs", {}), f"{where}: attributes"),
        weight=fields.optional_str("weight"),
        bias=fields.optional_str("bias"),
        residual=fields.optional_str("residual"),
        source=fields.optional_str("source") or "",
    )
    fields.done()
    if not isinstance(node.attrs, dict) or not node.name:
        raise ArtifactError(f"{where}: no name, or malformed attributes; get a sound copy of the file")
    return node


def _dim_to_json(dim: Dim) -> Any:
    return ["N", dim.factor] if isinstance(dim, BatchDim) else int(dim)


def _type(value: Any, where: str) -> TensorType:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not isinstance(value[0], str)
        or not isinstance(value[1], list)
    ):
        raise ArtifactError(f"{where}: malformed; get a sound copy of the file")
    return TensorType(tuple(_dim(d, where) for d in value[1]), value[0])


def _dim(value: Any, where: str) -> Dim:
    batch = isinstance(value, list) and len(value) == 2 and value[0] == "N"
    size = value[1] if batch else value
    if not isinstance(size, int) or isinstance(size, bool):
        raise ArtifactError(f"{where}: malformed dimension {value!r:.40}; get a sound copy of the file")
    return BatchDim(size) if batch else size
