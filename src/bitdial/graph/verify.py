"""The checker that runs between passes: structure, dtypes, and shapes inferred again wherever the rule is known."""

from __future__ import annotations

from collections.abc import Set

from bitdial.errors import GraphError
from bitdial.graph.aten import ALLOWED
from bitdial.graph.bfloat16 import PRECISIONS, STORED, finite
from bitdial.graph.dtypes import check_dtypes
from bitdial.graph.ir import VALUE_DTYPES, Graph, Node, Shape
from bitdial.graph.operators import OPERATORS
from bitdial.graph.shapes import value_shape
from bitdial.graph.structure import check_structure


def verify(graph: Graph, encoded: Set[str] = frozenset()) -> None:
    """Check a graph. Raises GraphError naming the node and what is wrong.

    Checked: names are unique, operands exist before use, operators are known, conv/linear have constant weights of the
    right rank, every value has a type, and inferred dtypes and shapes agree with the recorded ones.

    encoded: the values of a quantized program that are 8-bit.
    """
    defined = set(graph.constants)
    for value in graph.inputs:
        if value in defined:
            raise GraphError(f"graph input '{value}' has the name of a constant")
        defined.add(value)
        if value not in graph.types:
            raise GraphError(f"graph input '{value}' has no type")
    for node in graph.nodes:
        if node.name in defined:
            raise GraphError(f"node '{node.name}': the name is taken already")
        if node.op not in OPERATORS and node.op not in ALLOWED:
            raise GraphError(f"node '{node.name}': unknown operator '{node.op}'")
        for operand in node.operands():
            if operand not in defined:
                raise GraphError(f"node '{node.name}': operand '{operand}' is not defined before it")
        if node.name not in graph.types:
            raise GraphError(f"node '{node.name}' has no type")
        _check_roles(node, graph)
        for operand in (*node.inputs, *((node.bias,) if node.bias is not None else ())):
            if operand in graph.constants and graph.constants[operand].dtype == STORED:
                raise GraphError(f"node '{node.name}': operand '{operand}' holds bit patterns, which only weights may")
        if graph.types[node.name].dtype not in VALUE_DTYPES:
            raise GraphError(f"node '{node.name}': values of {graph.types[node.name].dtype:.40} cannot be stored")
        try:
            check_dtypes(node, graph, encoded)
            shape = infer_shape(node, graph)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise GraphError(f"node '{node.name}' ({node.op}): malformed attributes or operands: {error!r}") from error
        if shape is not None and shape != graph.types[node.name].shape:
            raise GraphError(
                f"node '{node.name}' ({node.op}): recorded type {graph.types[node.name]} but the operands give shape "
                f"[{', '.join(map(str, shape))}]"
            )
        defined.add(node.name)
    for output in graph.outputs:
        if output not in defined:
            raise GraphError(f"graph output '{output}' is not defined")
    check_structure(graph.structure, len(graph.outputs))


def _check_roles(node: Node, graph: Graph) -> None:
    if node.op in ("conv", "linear"):
        if node.weight is None:
            raise GraphError(f"node '{node.name}': {node.op} has no weight")
        for role in (node.weight, node.bias):
            if role is not None and role not in graph.constants:
                raise GraphError(f"node '{node.name}': weight and bias must be constants, '{role}' is not")
        if len(node.inputs) != 1:
            raise GraphError(f"node '{node.name}': {node.op} takes one input, has {len(node.inputs)}")
        _check_precision(node, graph)
    elif node.weight is not None or node.bias is not None or node.residual is not None or "precision" in node.attrs:
        raise GraphError(f"node '{node.name}': only conv and linear have weight, bias, residual and precision")
    if node.residual is not None and node.residual not in graph.types:
        raise GraphError(f"node '{node.name}': residual '{node.residual}' is a constant")
    if node.residual is not None and graph.types[node.residual].shape != graph.types[node.name].shape:
        raise GraphError(f"node '{node.name}': residual '{node.residual}' differs in shape from the output")


def _check_precision(node: Node, graph: Graph) -> None:
    """Bit patterns are the weights of bfloat16 layers (whose weights are float32 until they are stored)."""
    assert node.weight is not None
    precision, dtype = node.attrs.get("precision"), graph.constants[node.weight].dtype
    if precision is not None and precision not in PRECISIONS:
        raise GraphError(f"node '{node.name}': precision {precision!r:.40} is not one of {', '.join(PRECISIONS)}")
    if dtype == STORED and precision != "bfloat16":
        raise GraphError(f"node '{node.name}': weights of {dtype} do not go with precision {precision or 'float32'}")
    if dtype == STORED and not finite(graph.constants[node.weight]):
        raise GraphError(f"node '{node.name}': its bfloat16 weights hold NaN or infinity")


def infer_shape(node: Node, graph: Graph) -> Shape | None:
    """Output shape from the operands, or None for operators without a rule (aten.*).

    Raises ValueError, KeyError or IndexError where operands and attributes do not fit.
    """
    operator = OPERATORS.get(node.op)
    return None if operator is None else operator.shape(node, [value_shape(graph, v) for v in node.inputs], graph)
