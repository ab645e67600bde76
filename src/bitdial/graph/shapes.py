"""The shape that each operator gives: one rule per operator, for the table in `bitdial.graph.operators`. No torch.

A rule takes (node, shapes of its inputs, graph). It raises ValueError, KeyError, IndexError or TypeError where operands and
attributes do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bitdial.graph.ir import BatchDim, Dim, Graph, Node, Shape

Rule = Callable[[Node, list[Shape], Graph], Shape]


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


def conv(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
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


def linear(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    assert node.weight is not None
    w = value_shape(graph, node.weight)
    if len(w) != 2 or shapes[0][-1] != w[1]:
        raise ValueError(f"input {shapes[0]} does not fit weight {w}")
    return (*shapes[0][:-1], w[0])


def matmul(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, b = shapes
    if node.attrs.get("transpose_b"):
        b = (*b[:-2], b[-1], b[-2])
    if a[-1] != b[-2]:
        raise ValueError(f"{a} and {b} do not contract")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def pool(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, x = node.attrs, shapes[0]
    k = a["kernel"]
    dilation = a.get("dilation", [1] * len(k))
    spatial = [
        _window(_int(d), k[i], a["stride"][i], a["padding"][i], dilation[i], a["ceil_mode"])
        for i, d in enumerate(x[len(x) - len(k) :])
    ]
    return (*x[: len(x) - len(k)], *spatial)


def mean(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = set(node.attrs["axes"])
    if not all(0 <= i < len(shapes[0]) and isinstance(shapes[0][i], int) for i in axes):
        raise ValueError(f"axes {sorted(axes)} leave {shapes[0]} or hold the batch")
    if node.attrs["keepdim"]:
        return tuple(1 if i in axes else d for i, d in enumerate(shapes[0]))
    return tuple(d for i, d in enumerate(shapes[0]) if i not in axes)


def reshape(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    target = attr_to_shape(node.attrs["shape"])
    if _count(target) != _count(shapes[0]):
        raise ValueError(f"{shapes[0]} has another number of elements than {target}")
    return target


def slice_(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    a, x = node.attrs, list(shapes[0])
    size = _int(x[a["axis"]])
    if not 0 <= a["start"] <= a["stop"] <= size:
        raise ValueError(f"slice {a} leaves the axis of size {size}")
    x[a["axis"]] = max(0, -(-(a["stop"] - a["start"]) // a["step"]))
    return tuple(x)


def concat(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis = node.attrs["axis"]
    first = list(shapes[0])
    if any((*s[:axis], *s[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]) for s in shapes):
        raise ValueError(f"{shapes} differ beside axis {axis}")
    first[axis] = sum(_int(s[axis]) for s in shapes)
    return tuple(first)


def pad(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    pads = node.attrs["pads"]
    return tuple(
        d if before == after == 0 else _int(d) + before + after
        for d, (before, after) in zip(shapes[0], pads, strict=True)
    )


def select(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis = node.attrs["axis"]
    if not 0 <= node.attrs["index"] < _int(shapes[0][axis]):
        raise ValueError(f"select {node.attrs} leaves the axis")
    return (*shapes[0][:axis], *shapes[0][axis + 1 :])


def gather(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axis, indices = node.attrs["axis"], node.attrs["indices"]
    if not all(0 <= i < _int(shapes[0][axis]) for i in indices):
        raise ValueError(f"an index leaves axis {axis} of {shapes[0]}")
    return (*shapes[0][:axis], len(indices), *shapes[0][axis + 1 :])


def permute(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = node.attrs["axes"]
    if sorted(axes) != list(range(len(shapes[0]))):
        raise ValueError(f"axes {axes} are no permutation of the axes of {shapes[0]}")
    return tuple(shapes[0][i] for i in axes)


def expand(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    target = attr_to_shape(node.attrs["shape"])
    if broadcast(shapes[0], target) != target:
        raise ValueError(f"{shapes[0]} cannot be expanded to {target}")
    return target


def batch_norm(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    if len(shapes) != 5 or any(s != (shapes[0][1],) for s in shapes[1:]):
        raise ValueError(f"parameters {shapes[1:]} do not fit the channels of {shapes[0]}")
    return shapes[0]


def layer_norm(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    normalized = tuple(node.attrs["normalized_shape"])
    if shapes[0][len(shapes[0]) - len(normalized) :] != normalized or any(s != normalized for s in shapes[1:]):
        raise ValueError(f"normalized shape {normalized} does not fit {shapes}")
    return shapes[0]


def axes_inside(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    axes = node.attrs["axes"] if node.op == "roll" else [node.attrs["axis"]]
    if not all(0 <= i < len(shapes[0]) for i in axes):
        raise ValueError(f"axes {axes} leave {shapes[0]}")
    return shapes[0]


def same(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    return shapes[0]


def elementwise(node: Node, shapes: list[Shape], graph: Graph) -> Shape:
    return broadcast(shapes[0], shapes[1])


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
