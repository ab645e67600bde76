"""The checker that runs between passes: structure, dtypes, and shapes inferred again wherever the rule is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from typing import Any

from bitdial.errors import GraphError
from bitdial.graph.bfloat16 import PRECISIONS, STORED, finite
from bitdial.graph.dtypes import check_dtypes
from bitdial.graph.float_ops import ALLOWED
from bitdial.graph.ir import UNARY_OPS, VALUE_DTYPES, BatchDim, Dim, Graph, Node, Shape
from bitdial.graph.structure import check_structure

QUANTIZED_OPS = frozenset({"quantize", "dequantize", "table"})
KNOWN_OPS = (
    UNARY_OPS
    | QUANTIZED_OPS
    | frozenset(
        "conv linear matmul batch_norm add mul concat max_pool avg_pool mean reshape permute expand slice select pad roll "
        "gather layer_norm softmax".split()
    )
)


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
        if node.op not in KNOWN_OPS and node.op not in ALLOWED:
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


def value_shape(graph: Graph, value: str) -> Shape:
    """Shape of a node, an input or a constant."""
    if value in graph.constants:
        return tuple(int(d) for d in graph.constants[value].shape)
    return graph.types[value].shape


def shape_to_attr(shape: Shape) -> list[Any]:
    """Shape -> reshape/expand attribute (["N", k] for BatchDim(k))."""
    return [["N", d.factor] if isinstance(d, BatchDim) else d for d in shape]


def attr_to_shape(attr: Sequence[Any]) -> Shape:
    """Reshape/expand attribute -> shape."""
    return tuple(d if isinstance(d, int) else BatchDim(int(d[1])) for d in attr)


def infer_shape(node: Node, graph: Graph) -> Shape | None:
    """Output shape from the operands, or None for operators without a rule here (aten.*).

    Raises ValueError, KeyError or IndexError where operands and attributes do not fit.
    """
    shapes = [value_shape(graph, v) for v in node.inputs]
    rule = _RULES.get(node.op)
    if rule is not None:
        return rule(node, shapes, graph)
    return shapes[0] if node.op in _SAME_SHAPE else None


_SAME_SHAPE = UNARY_OPS | QUANTIZED_OPS


def _conv(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    assert node.weight is not None
    x, w, a = shapes[0], value_shape(graph, node.weight), node.attrs
    if len(x) != len(w) or x[1] != _int(w[1]) * a["groups"] or _int(w[0]) % a["groups"]:
        raise ValueError(f"input {x} does not fit weight {w} in {a['groups']} group(s)")
    if node.bias is not None and value_shape(graph, node.bias) != (w[0],):
        raise ValueError("bias does not fit the weight")
    spatial = [
        _window(_int(d), _int(k), s, p, dil, False)
        for d, k, s, p, dil in zip(x[2:], w[2:], a["stride"], a["padding"], a["dilation"], strict=True)
    ]
    return (x[0], w[0], *spatial)


def _linear(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    assert node.weight is not None
    w = value_shape(graph, node.weight)
    if len(w) != 2 or shapes[0][-1] != w[1]:
        raise ValueError(f"input {shapes[0]} does not fit weight {w}")
    return (*shapes[0][:-1], w[0])


def _matmul(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, b = shapes
    if node.attrs.get("transpose_b"):
        b = (*b[:-2], b[-1], b[-2])
    if a[-1] != b[-2]:
        raise ValueError(f"{a} and {b} do not contract")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def _pool(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, x = node.attrs, shapes[0]
    k = a["kernel"]
    dilation = a.get("dilation", [1] * len(k))
    spatial = [
        _window(_int(d), k[i], a["stride"][i], a["padding"][i], dilation[i], a["ceil_mode"])
        for i, d in enumerate(x[len(x) - len(k) :])
    ]
    return (*x[: len(x) - len(k)], *spatial)


def _mean(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = set(node.attrs["axes"])
    if not all(0 <= i < len(shapes[0]) and isinstance(shapes[0][i], int) for i in axes):
        raise ValueError(f"axes {sorted(axes)} leave {shapes[0]} or hold the batch")
    if node.attrs["keepdim"]:
        return tuple(1 if i in axes else d for i, d in enumerate(shapes[0]))
    return tuple(d for i, d in enumerate(shapes[0]) if i not in axes)


def _reshape(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    target = attr_to_shape(node.attrs["shape"])
    if _count(target) != _count(shapes[0]):
        raise ValueError(f"{shapes[0]} has another number of elements than {target}")
    return target


def _slice(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, x = node.attrs, list(shapes[0])
    size = _int(x[a["axis"]])
    if not 0 <= a["start"] <= a["stop"] <= size:
        raise ValueError(f"slice {a} leaves the axis of size {size}")
    x[a["axis"]] = max(0, -(-(a["stop"] - a["start"]) // a["step"]))
    return tuple(x)


def _concat(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis = node.attrs["axis"]
    first = list(shapes[0])
    if any((*s[:axis], *s[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]) for s in shapes):
        raise ValueError(f"{shapes} differ beside axis {axis}")
    first[axis] = sum(_int(s[axis]) for s in shapes)
    return tuple(first)


def _pad_shape(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    pads = node.attrs["pads"]
    return tuple(
        d if before == after == 0 else _int(d) + before + after
        for d, (before, after) in zip(shapes[0], pads, strict=True)
    )


def _select(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis = node.attrs["axis"]
    if not 0 <= node.attrs["index"] < _int(shapes[0][axis]):
        raise ValueError(f"select {node.attrs} leaves the axis")
    return (*shapes[0][:axis], *shapes[0][axis + 1 :])


def _gather(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis, indices = node.attrs["axis"], node.attrs["indices"]
    if not all(0 <= i < _int(shapes[0][axis]) for i in indices):
        raise ValueError(f"an index leaves axis {axis} of {shapes[0]}")
    return (*shapes[0][:axis], len(indices), *shapes[0][axis + 1 :])


def _permute(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = node.attrs["axes"]
    if sorted(axes) != list(range(len(shapes[0]))):
        raise ValueError(f"axes {axes} are no permutation of the axes of {shapes[0]}")
    return tuple(shapes[0][i] for i in axes)


def _expand(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    target = attr_to_shape(node.attrs["shape"])
    if broadcast(shapes[0], target) != target:
        raise ValueError(f"{shapes[0]} cannot be expanded to {target}")
    return target


def _batch_norm(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    if len(shapes) != 5 or any(s != (shapes[0][1],) for s in shapes[1:]):
        raise ValueError(f"parameters {shapes[1:]} do not fit the channels of {shapes[0]}")
    return shapes[0]


def _layer_norm(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    normalized = tuple(node.attrs["normalized_shape"])
    if shapes[0][len(shapes[0]) - len(normalized) :] != normalized or any(s != normalized for s in shapes[1:]):
        raise ValueError(f"normalized shape {normalized} does not fit {shapes}")
    return shapes[0]


def _axes_inside(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = node.attrs["axes"] if node.op == "roll" else [node.attrs["axis"]]
    if not all(0 <= i < len(shapes[0]) for i in axes):
        raise ValueError(f"axes {axes} leave {shapes[0]}")
    return shapes[0]


_RULES: dict[str, Callable[[Node, list[Shape], Graph], Shape]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _matmul,
    "add": lambda node, shapes, graph: broadcast(shapes[0], shapes[1]),
    "mul": lambda node, shapes, graph: broadcast(shapes[0], shapes[1]),
    "concat": _concat,
    "max_pool": _pool,
    "avg_pool": _pool,
    "mean": _mean,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "softmax": _axes_inside,
    "roll": _axes_inside,
    "slice": _slice,
    "select": _select,
    "pad": _pad_shape,
    "gather": _gather,
}


def broadcast(a: Shape, b: Shape) -> Shape:
    """Broadcast two shapes as torch does. Raises ValueError."""
    result: list[Dim] = []
    for i in range(max(len(a), len(b))):
        x: Dim = a[len(a) - 1 - i] if i < len(a) else 1
        y: Dim = b[len(b) - 1 - i] if i < len(b) else 1
        if x != y and x != 1 and y != 1:
            raise ValueError(f"{a} and {b} do not broadcast")
        result.append(y if x == 1 else x)
    return tuple(reversed(result))


def _window(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if span < 0:
        raise ValueError("the window is larger than the padded input")
    if not ceil_mode:
        return span // stride + 1
    out = math.ceil(span / stride) + 1
    return out - 1 if (out - 1) * stride >= size + padding else out  # the last window must start inside, as in torch


def _count(shape: Shape) -> tuple[int, int]:
    """Elements as (factor, power of N)."""
    factor, power = 1, 0
    for d in shape:
        if isinstance(d, BatchDim):
            factor, power = factor * d.factor, power + 1
        else:
            factor *= d
    return factor, power


def _int(d: Dim) -> int:
    if isinstance(d, BatchDim):
        raise ValueError("the batch dimension stands where a fixed one is needed")
    return d
