"""The dtype that an operator gives for the dtypes it reads, for the verifier. NumPy only; the rules are torch's.

Values that a quantized program holds in 8 bits ("encoded") are told from integers that the network itself computes with: the
former stand for real numbers and may be read by 8-bit operators only, the latter by none of those.
"""

from __future__ import annotations

from collections.abc import Set
from functools import reduce
from typing import Any

import numpy as np

from bitdial.graph.aten import BOOLEAN, INDICES, PROMOTED, SECOND_INDICES, SUMS, TRUE
from bitdial.graph.bfloat16 import STORED
from bitdial.graph.ir import VALUE_DTYPES, Graph, Node
from bitdial.graph.operators import CONTRACTIONS, MOVEMENT, kind_of, of_kind

_FLOATS = ("float16", "float32", "float64")  # in the order of promotion
_EITHER = of_kind("unary", "elementwise", "reduction")  # encoded throughout, or float32

def check_dtypes(node: Node, graph: Graph, encoded: Set[str]) -> None:
    """Compare the recorded dtype of a node with what its operands give. Raises ValueError, KeyError, TypeError, IndexError."""
    out = graph.types[node.name].dtype
    if node.name in encoded and out not in ("int8", "uint8"):
        raise ValueError(f"it is 8-bit, yet recorded as {out}")
    if node.op.startswith("aten."):
        if node.name in encoded or any(v in encoded for v in node.operands()):
            raise ValueError("a float operator reads or gives 8-bit values")
        expected = aten_dtype(node, graph)
        if out != expected:
            raise ValueError(f"it is recorded as {out}, but gives {expected}")
        return
    inputs = ["8-bit" if v in encoded else value_dtype(graph, v) for v in node.inputs]
    result = "8-bit" if node.name in encoded else out
    if node.op in MOVEMENT:
        fits = result == inputs[0] and out == value_dtype(graph, node.inputs[0])
    elif node.op == "quantize":
        fits = (inputs, result) == (["float32"], "8-bit")
    elif node.op == "dequantize":
        fits = (inputs, result) == (["8-bit"], "float32")
    elif node.op == "table":
        fits = (inputs, result) == (["8-bit"], "8-bit")
    elif node.op in CONTRACTIONS:
        fits = _compute(node, graph, encoded, inputs, result)
    elif {*inputs, result} == {"8-bit"}:
        fits = node.op in _EITHER
    elif "8-bit" in (*inputs, result) or result != "float32":
        fits = False
    elif kind_of(node.op) == "elementwise":  # capture writes them with float32 operands only, but torch promotes others
        fits = _promote([_type(v, graph) for v in node.inputs], []) == "float32"
    else:
        promotes = node.op in TRUE or node.op == "clamp"
        fits = all(v == "float32" or (promotes and v not in _FLOATS) for v in inputs)
    if not fits:
        reads = ["8-bit" if v in encoded else value_dtype(graph, v) for v in node.operands()]
        raise ValueError(f"it reads {', '.join(reads) or 'nothing'} and gives {result}, which does not go together")


def _compute(node: Node, graph: Graph, encoded: Set[str], inputs: list[str], result: str) -> bool:
    """conv, linear, matmul: integer layers read 8 bits and give 8 bits or float32, float layers are float32 throughout. A
    residual is what the result is."""
    if node.residual is not None:
        residual = "8-bit" if node.residual in encoded else value_dtype(graph, node.residual)
        if residual != result:
            return False
    if set(inputs) == {"8-bit"}:
        return result in ("8-bit", "float32")
    constants = {value_dtype(graph, v) for v in (node.weight, node.bias) if v is not None}
    return {*inputs, result} == {"float32"} and constants <= {"float32", STORED.name}


def value_dtype(graph: Graph, value: str) -> str:
    """dtype of a node, an input or a constant."""
    return graph.constants[value].dtype.name if value in graph.constants else graph.types[value].dtype


def aten_dtype(node: Node, graph: Graph) -> str:
    """dtype of an `aten.*` node. Raises ValueError, KeyError, TypeError or IndexError if its template is malformed."""
    _, name, overload = node.op.split(".")
    args, kwargs = list(node.attrs["args"]), dict(node.attrs["kwargs"])
    output = node.attrs.get("output", 0)
    if type(output) is not int or output < 0:
        raise ValueError(f"its output {output!r:.40} is no number of an output")
    _check_template([args, list(kwargs.values())], len(node.inputs))
    if output == 1 and name in SECOND_INDICES:
        return "int64"
    for value in (*args, *kwargs.values()):
        if isinstance(value, dict) and "dtype" in value:
            return str(value["dtype"])
    if name == "scalar_tensor":
        return "float32"
    first = _tensors(args, node, graph)[0][0]
    if name in BOOLEAN:
        return "uint8" if name in ("all", "any") and first == "uint8" else "bool"
    if name in INDICES:
        return "int64"
    if name in SUMS:
        return first if first in _FLOATS else "int64"
    divides = name == "div" and kwargs.get("rounding_mode", args[2] if len(args) > 2 else None) is None
    if name in TRUE or divides:
        promoted = _promoted(args[:2], node, graph)
        return promoted if promoted in _FLOATS else "float32"
    if name in PROMOTED:
        return _promoted(_promoted_arguments(name, args, kwargs), node, graph)
    if name == "square" and first == "bool":
        return "int64"  # the power of a number
    return first


def _promoted_arguments(name: str, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    if name in ("cat", "stack"):
        return list(args[0])
    if name == "where":
        return args[1:3]
    if name in ("addcdiv", "addcmul"):
        return args[:3]
    if name == "clamp":
        return [*args[:3], *(kwargs[k] for k in ("min", "max") if k in kwargs)]
    return args[:2]


def _tensors(value: Any, node: Node, graph: Graph) -> list[tuple[str, int]]:
    """(dtype, rank) of the tensors in a template, in order."""
    if isinstance(value, list):
        return [found for v in value for found in _tensors(v, node, graph)]
    return [_type(node.inputs[value["value"]], graph)] if isinstance(value, dict) and "value" in value else []


def _type(value: str, graph: Graph) -> tuple[str, int]:
    rank = graph.constants[value].ndim if value in graph.constants else graph.types[value].ndim
    return value_dtype(graph, value), rank


def _promoted(operands: list[Any], node: Node, graph: Graph) -> str:
    """The result type of tensors and numbers in a template."""
    found = [t for v in operands for t in _tensors(v, node, graph)]
    numbers: list[str] = []
    for value in operands:
        if isinstance(value, bool):
            numbers.append("bool")
        elif isinstance(value, int) or (isinstance(value, dict) and "batch" in value):
            numbers.append("int64")
        elif isinstance(value, float) or (isinstance(value, dict) and "float" in value):
            numbers.append("float32")
    return _promote(found, numbers)


def _promote(found: list[tuple[str, int]], numbers: list[str]) -> str:
    """torch's result type of tensors (dtype, rank) and numbers: numbers, and tensors without axes, count by their kind alone
    (bool, integer, float) where others are of that kind or a higher one."""
    groups = [d for d, rank in found if rank], [d for d, rank in found if not rank], numbers
    result = ""
    for lower in (reduce(_wider, group, "") for group in groups):
        if _kind(result) == 0:
            result = _wider(result, lower)
        elif _kind(lower) > _kind(result):
            result = lower
    if not result:
        raise ValueError("it reads no tensor and no number")
    return result


def _kind(dtype: str) -> int:
    return 0 if dtype in ("", "bool") else 2 if dtype in _FLOATS else 1


def _wider(a: str, b: str) -> str:
    if not a or not b:
        return a or b
    floats = [d for d in (a, b) if d in _FLOATS]
    if floats:
        return max(floats, key=_FLOATS.index)
    return np.promote_types(a, b).name


def _check_template(value: Any, n_inputs: int) -> None:
    """Marked dicts of a template hold what their mark says. Raises ValueError."""
    if isinstance(value, list):
        for v in value:
            _check_template(v, n_inputs)
    elif isinstance(value, dict):
        (mark, content), *more = value.items()
        good = {
            "value": type(content) is int and 0 <= content < n_inputs,
            "batch": type(content) is int and content > 0,
            "dtype": isinstance(content, str) and content in VALUE_DTYPES,
            "float": isinstance(content, str) and content in ("inf", "-inf", "nan"),
        }
        if more or not good.get(mark, False):
            raise ValueError(f"its argument {value!r:.60} means nothing")
