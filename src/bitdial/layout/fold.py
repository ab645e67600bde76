"""Fold a layout plan into a graph: permute weights, biases and constants, so that no data moves at run time.

New constants take the place of old ones; the graph handed in is not changed. A `gather` node appears only where a
reader needs the original order of a permuted value: a graph output that is also read by low-eligible layers, an
operator without a rule in `bitdial.layout.rules`, or one that reads channels across their segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitdial.errors import GraphError
from bitdial.graph.ir import Array, Graph, Node
from bitdial.graph.passes.edit import fresh_constant
from bitdial.layout.plan import FrozenSpace, LayoutPlan, ValueOrder
from bitdial.layout.segments import Order


@dataclass(frozen=True)
class LayoutReport:
    """What folding did.

    permuted_spaces   sets of tied tensors whose channels changed order
    segments          runs of channels that were sorted on their own
    frozen            channels of low-eligible layers that had to keep their order, with reasons
    reorders          names of the gather nodes inserted (0 on the networks that the tests name)
    pads              names of the zero-padded shortcuts rewritten
    """

    permuted_spaces: int
    segments: int
    frozen: tuple[FrozenSpace, ...]
    reorders: tuple[str, ...]
    pads: tuple[str, ...]

    @property
    def n_reorders(self) -> int:
        return len(self.reorders)

    def __str__(self) -> str:
        text = (
            f"{self.permuted_spaces} channel spaces permuted in {self.segments} segments, "
            f"{len(self.pads)} pads rewritten, {len(self.reorders)} reorders inserted"
        )
        lines = [f"  kept in order: {f.channels} channels of '{f.layer}': {f.reason}" for f in self.frozen]
        return "\n".join([text, *lines])


def apply_layout(graph: Graph, plan: LayoutPlan) -> tuple[Graph, LayoutReport]:
    """A new graph with the plan's permutations folded in, and the report.

    The new graph computes the same outputs in the same order. Raises GraphError if the plan was made for another
    graph.
    """
    names = {n.name for n in graph.nodes} | set(graph.constants)
    missing = [v for v in [*plan.orders, *plan.pads] if v not in names]
    if missing:
        raise GraphError(f"the layout plan names '{missing[0]}', which this graph lacks: plan again for this graph")
    new = graph.copy()
    writer = _Constants(new)
    for node in new.nodes:
        if node.op in ("conv", "linear"):
            _fold_layer(node, graph, plan, writer)
    nodes = new.producers()
    for follower in plan.followers:
        node = nodes[follower.node]
        order = plan.orders[follower.value]
        constant = _read(node, follower.role)
        array = follow(graph.constants[constant], order, follower.axis_map)
        writer.put(node, follower.role, constant, array)
    for constant, readers in plan.constant_values.items():
        array = permute_value(graph.constants[constant], plan.orders[constant])
        for name in readers:
            for i, value in enumerate(nodes[name].inputs):
                if value == constant:
                    writer.put(nodes[name], str(i), constant, array)
            if nodes[name].residual == constant:
                writer.put(nodes[name], "residual", constant, array)
    writer.finish()
    for name, axis in plan.pads.items():
        before, after = nodes[name].attrs["pads"][axis]
        nodes[name].attrs["pads"][axis] = [0, before + after]
    reorders = _insert_reorders(new, plan)
    return new, LayoutReport(
        plan.permuted_spaces, len(plan.segments), tuple(plan.frozen), tuple(reorders), tuple(plan.pads)
    )


def permute_value(array: Array, order: ValueOrder) -> Array:
    """The array as it looks under the order of its value (or of a value of the same axes)."""
    return follow(array, order, tuple(range(array.ndim)))


def follow(array: Array, order: ValueOrder, axis_map: tuple[int, ...]) -> Array:
    """Permute a constant that is read channel by channel with a value.

    axis_map: axis of the array -> axis of the value; an axis of size 1 is broadcast. Axes of the value that the array
    lacks are known to be permuted alike.
    """
    labels, index = order.labels, order.order
    assert labels.moving is not None
    moving_axis = labels.moving_axis
    if moving_axis not in axis_map or array.shape[axis_map.index(moving_axis)] == 1:
        return array
    for axis in range(len(labels.axes)):
        if axis not in axis_map:
            for i in labels.span(axis):
                index = index.take([0], axis=i)
    kept = [i for axis in axis_map for i in labels.span(axis)]
    index = index.reshape([index.shape[i] for i in kept])
    moving = kept.index(labels.moving)
    full: list[int] = []
    for i, axis in enumerate(axis_map):
        sub = labels.axes[axis]
        full += sub if array.shape[i] != 1 else [1] * len(sub)
    data = array.reshape(full)
    common = np.broadcast_shapes(
        tuple(1 if j == moving else n for j, n in enumerate(data.shape)),
        tuple(1 if j == moving else n for j, n in enumerate(index.shape)),
    )
    shape = tuple(index.shape[moving] if j == moving else n for j, n in enumerate(common))
    moved = np.take_along_axis(np.broadcast_to(data, shape), np.broadcast_to(index, shape), axis=moving)
    return np.ascontiguousarray(
        moved.reshape([int(np.prod([shape[kept.index(j)] for j in labels.span(a)])) for a in axis_map])
    )


def _fold_layer(node: Node, graph: Graph, plan: LayoutPlan, writer: _Constants) -> None:
    """Permute the rows of a layer's weight and its bias with the output, the columns with the input."""
    assert node.weight is not None
    rows = _axis_permutation(plan, node.name)
    columns = _axis_permutation(plan, plan.contracted[node.name]) if node.name in plan.contracted else None
    weight = graph.constants[node.weight]
    if columns is not None:
        weight = _permute_columns(weight, columns, int(node.attrs.get("groups", 1)))
    if rows is not None:
        weight = weight[rows]
        if node.bias is not None:
            writer.put(node, "bias", node.bias, graph.constants[node.bias][rows])
    if rows is not None or columns is not None:
        writer.put(node, "weight", node.weight, np.ascontiguousarray(weight))


def _permute_columns(weight: Array, columns: Order, groups: int) -> Array:
    """Columns of each convolution group among themselves; `columns` [I] keeps every channel in its group."""
    width = weight.shape[1]
    local = columns.reshape(groups, width) - np.arange(groups)[:, None] * width
    if (local < 0).any() or (local >= width).any():
        raise GraphError("a layout plan moves channels between convolution groups: plan again for this graph")
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    index = local.reshape(groups, 1, width, *[1] * (weight.ndim - 2))
    return np.take_along_axis(blocks, np.broadcast_to(index, blocks.shape), axis=2).reshape(weight.shape)


def _axis_permutation(plan: LayoutPlan, value: str) -> Order | None:
    order = plan.orders.get(value)
    if order is None:
        return None
    permutation = order.permutation()
    if permutation is None:
        raise GraphError(
            f"the layout plan permutes '{value}' differently along several axes: plan again for this graph"
        )
    return permutation


def _read(node: Node, role: str) -> str:
    value = node.inputs[int(role)] if role.isdigit() else getattr(node, role)
    assert isinstance(value, str)
    return value


class _Constants:
    """Collects permuted constants; equal versions are stored once, and a constant with one version keeps its name."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pending: dict[str, list[tuple[Node, str, Array]]] = {}

    def put(self, node: Node, role: str, constant: str, array: Array) -> None:
        """`node` reads `array` in `role` in place of `constant`."""
        self.pending.setdefault(constant, []).append((node, role, array))

    def finish(self) -> None:
        for constant, entries in self.pending.items():
            versions: dict[bytes, str] = {}
            for node, role, array in entries:
                key = repr(array.shape).encode() + array.tobytes() if len(entries) > 1 else b""
                if key not in versions:
                    versions[key] = fresh_constant(self.graph, constant, array)
                _write(node, role, versions[key])
            used = {v for n in self.graph.nodes for v in n.operands()} | set(self.graph.outputs)
            if constant not in used:
                first = next(iter(versions.values()))
                self.graph.constants[constant] = self.graph.constants.pop(first)
                for node, role, _ in entries:
                    if _read(node, role) == first:
                        _write(node, role, constant)


def _write(node: Node, role: str, value: str) -> None:
    if role.isdigit():
        node.inputs[int(role)] = value
    else:
        setattr(node, role, value)


def _insert_reorders(graph: Graph, plan: LayoutPlan) -> list[str]:
    """One gather per permuted value that some reader needs in its original order."""
    names: list[str] = []
    for value, reads in plan.reorders.items():
        order = plan.orders[value]
        permutation = _axis_permutation(plan, value)
        assert permutation is not None
        name = graph.fresh_name(f"{value}_reorder")
        attrs = {"axis": order.labels.moving_axis, "indices": [int(i) for i in np.argsort(permutation)]}
        producer = graph.node(value)
        node = Node(name, "gather", [value], attrs, source=producer.source)
        graph.nodes.insert(graph.nodes.index(producer) + 1, node)
        graph.types[name] = graph.types[value]
        readers = graph.producers()
        for read in reads:
            if read.node == "":
                graph.outputs[int(read.slot)] = name
            else:
                _write(readers[read.node], str(read.slot), name)
        names.append(name)
    return names
