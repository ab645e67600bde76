"""Run a graph on labels instead of data: which channels of which values must keep step when one of them moves.

`propagate(graph)` gives every value its `Labels` and collects what restricts a permutation:

  ties       two arrays of labels that must be permuted alike (residual adds, products, attention's contraction, ...)
  windows    rows of labels read piece by piece (the groups of a grouped convolution), and the value they belong to
  frozen     labels that must not move at all, with the reason
  soft       readers that want the original order of one operand; a reorder in front of them would free it
  flows      per node the values whose channels correspond position by position; contractions end a flow
  followers  constants that are read channel by channel and are permuted with a value

The batch size is taken as 2, so that heads or windows folded into the batch keep their place (in [heads, N] and [N,
heads] alike); nothing below depends on its value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitdial.graph.ir import BatchDim, Graph, Node
from bitdial.graph.operators import OPERATORS, UNARY
from bitdial.layout import labels as lb
from bitdial.layout.labels import FROZEN, ZERO, Ids, Labels

BATCH = 2


@dataclass(frozen=True)
class SoftRead:
    """Operand `slot` of `node` (index into inputs, or "residual"; for a graph output node == "" and its index)."""

    node: str
    slot: int | str
    value: str
    reason: str


@dataclass(frozen=True)
class Follower:
    """A constant read by `node` in `role` ("input 1", "weight", ...), permuted like `value`.

    axis_map: axis of the constant -> axis of the value.
    """

    node: str
    role: str
    value: str
    axis_map: tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """A conv or linear layer that sums over `axis` of `value`; `labels`: of that axis alone (one-axis Labels)."""

    node: str
    value: str
    axis: int
    labels: Labels


@dataclass
class Propagation:
    """See the module docstring. `labels` has an entry per value, and per constant that moves like a value."""

    labels: dict[str, Labels] = field(default_factory=dict)
    n_ids: int = 1
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    windows: list[tuple[str, Ids]] = field(default_factory=list)  # (value, rows of labels)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    soft: list[SoftRead] = field(default_factory=list)
    flows: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    contractions: dict[str, Contraction] = field(default_factory=dict)
    constant_values: set[str] = field(default_factory=set)

    def freeze(self, ids: Ids, reason: str) -> None:
        ids = np.unique(ids[ids > 0])
        if ids.size:
            self.frozen.append((ids, reason))

    def tie(self, a: Ids, b: Ids, reason: str) -> None:
        """Permute two broadcastable arrays alike. FROZEN freezes its partner; a ZERO ties with nothing."""
        a, b = (v.ravel() for v in np.broadcast_arrays(a, b))
        both = (a > 0) & (b > 0)
        if both.any():
            self.ties.append((a[both], b[both]))
        self.freeze(a[(b == FROZEN)], reason)
        self.freeze(b[(a == FROZEN)], reason)

    def fresh(self, count: int) -> Ids:
        self.n_ids += count
        return np.arange(self.n_ids - count, self.n_ids, dtype=np.int64)

    def tie_across(self, labels: Labels, keep: Sequence[int]) -> Labels:
        """Let labels vary along the axes `keep` only: positions elsewhere must be permuted alike."""
        kept = {i for axis in keep for i in labels.span(axis)}
        ids = labels.ids
        for i in labels.varying():
            if i not in kept:
                first = ids.take([0], axis=i)
                if ids.shape[i] > 1:
                    self.tie(np.broadcast_to(first, ids.shape), ids, "")
                ids = first
        return labels.with_ids(ids)


def concrete(graph: Graph, value: str) -> tuple[int, ...]:
    """Shape of a value for the batch size used here."""
    if value in graph.constants:
        return tuple(int(d) for d in graph.constants[value].shape)
    return tuple(BATCH * d.factor if isinstance(d, BatchDim) else d for d in graph.types[value].shape)


def propagate(graph: Graph) -> Propagation:
    """Run the graph on labels. The graph must be verified; it is not changed."""
    from bitdial.layout.rules import RULES  # the rules need this module's types

    run = Run(graph)
    for value in graph.inputs:
        run.state.labels[value] = lb.unlabelled(concrete(graph, value))
    for node in graph.nodes:
        rule = RULES.get(node.op, unknown)
        if node.op in UNARY:
            rule = unary
        result = rule(run, node)
        run.state.labels[node.name] = result if result.moving is not None else lb.unlabelled(run.shape(node.name))
    for index, value in enumerate(graph.outputs):
        if value not in graph.constants:
            run.soft("", index, value, f"graph output {index}")
    return run.state


class Run:
    """Access to graph and state for the rules."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.state = Propagation()
        self.shared: dict[tuple[str, str], Labels | None] = {}

    def shape(self, value: str) -> tuple[int, ...]:
        return concrete(self.graph, value)

    def unlabelled(self, node: Node) -> Labels:
        return lb.unlabelled(self.shape(node.name))

    def is_constant(self, value: str) -> bool:
        return value in self.graph.constants

    def value(self, value: str, axis: int | None = None) -> Labels:
        """Labels of an operand; a constant becomes a producer whose channels lie along `axis` (default: the last of
        size above 1, which is where embeddings and tokens have theirs)."""
        found = self.state.labels.get(value)
        if found is not None:
            return found
        shape = self.shape(value)
        wide = [i for i, n in enumerate(shape) if n > 1]
        if self.graph.constants[value].dtype.kind != "f" or not wide:
            return lb.unlabelled(shape)
        if axis is None or shape[axis] == 1:
            axis = wide[-1]
        result = lb.along(shape, axis, self.state.fresh(shape[axis]))
        self.state.labels[value] = result
        self.state.constant_values.add(value)
        return result

    def soft(self, node: str, slot: int | str, value: str, reason: str) -> None:
        """`node` reads `value` in its original order."""
        labels = self.state.labels.get(value)
        if labels is None or labels.moving is None or value in self.state.constant_values:
            return  # a constant is simply read as it was
        if labels.spans_one_axis():
            self.state.soft.append(SoftRead(node, slot, value, reason))
        else:
            self.state.freeze(labels.ids, reason)

    def give_up(self, node: Node, reason: str, values: Sequence[str] | None = None) -> Labels:
        """Read all data operands (or `values`) in their original order; the result does not move."""
        for slot, value in operand_slots(node):
            if values is None or value in values:
                self.soft(node.name, slot, value, reason)
        return self.unlabelled(node)

    def flow(self, node: Node, *values: str) -> None:
        """The channels of these values correspond position by position, or by the node's fixed movement."""
        self.state.flows.append((node.name, tuple(dict.fromkeys(values))))

    def tie_shared(self, constant: str, role: str, labels: Labels | None) -> None:
        """A constant read by several layers (reused modules): all of them permute it alike."""
        key = (constant, role)
        if key not in self.shared:
            self.shared[key] = labels
            return
        other = self.shared[key]
        reason = f"'{constant}' is shared by layers that arrange its channels differently"
        if labels is None or other is None or labels.axes != other.axes or labels.moving != other.moving:
            for one in (labels, other):
                if one is not None:
                    self.state.freeze(one.ids, reason)
            return
        self.state.tie(labels.ids, other.ids, reason)

    def no_zeros(self, labels: Labels, keep: bool) -> Labels:
        """Padded zeros that an operator turns into something else no longer change places."""
        if keep or labels.moving is None:
            return labels
        return labels.with_ids(np.where(labels.ids == ZERO, FROZEN, labels.ids))


def operand_slots(node: Node) -> list[tuple[int | str, str]]:
    slots: list[tuple[int | str, str]] = list(enumerate(node.inputs))
    if node.residual is not None:
        slots.append(("residual", node.residual))
    return slots


def keeps_zero(activation: dict[str, float | str] | None) -> bool:
    """Whether a fused activation maps 0 to 0."""
    if activation is None or activation["kind"] == "relu":
        return True
    return float(activation["lo"]) <= 0.0 <= float(activation["hi"])


def unary(run: Run, node: Node) -> Labels:
    x = run.value(node.inputs[0])
    run.flow(node, node.inputs[0], node.name)
    zero = OPERATORS[node.op].keeps_zero and "raised" not in node.attrs
    return run.no_zeros(x, zero or (node.op == "clamp" and keeps_zero({"kind": "clamp", **node.attrs})))


def unknown(run: Run, node: Node) -> Labels:
    return run.give_up(node, f"operator {node.op} reads it in '{node.name}'")


Rule = Callable[[Run, Node], Labels]


@dataclass(frozen=True)
class Operand:
    """An aligned operand of an elementwise operator: its name, aligned labels and shape before alignment."""

    value: str
    slot: int | str
    labels: Labels
    shape: tuple[int, ...]


def elementwise(run: Run, node: Node, operands: Sequence[tuple[int | str, str]], *, product: bool = False) -> Labels:
    """Combine values position by position with broadcasting: their channels are tied.

    An operand whose moving axis differs from the first one's is frozen. Constants read directly follow the result. In
    a product a padded zero stays a zero; in a sum it takes the other side's label.
    """
    out_shape = run.shape(node.name)
    rank = len(out_shape)
    values = [(s, v) for s, v in operands if not run.is_constant(v)]
    constants = [v for s, v in operands if run.is_constant(v)]
    if not values:
        return run.unlabelled(node)
    raw = [run.value(v) for _, v in values]
    aligned = lb.align([lb.unlabelled(out_shape), *raw])
    if aligned is None:
        for labels in raw:
            run.state.freeze(labels.ids, f"'{node.name}' combines values whose channels are arranged differently")
        return run.unlabelled(node)
    parts = [
        Operand(v, s, a, (1,) * (rank - len(r.axes)) + r.shape)
        for (s, v), a, r in zip(values, aligned[1:], raw, strict=True)
    ]
    lead = next((p for p in parts if p.labels.moving is not None), None)
    if lead is None:
        return run.unlabelled(node)
    assert lead.labels.moving is not None
    axis = lead.labels.moving_axis
    assert axis is not None
    ids = lead.labels.ids
    flowing = [lead.value]
    reason = f"'{node.name}' combines it with a value whose channels keep their order"
    for part in parts:
        if part is lead:
            continue
        if part.labels.moving not in (None, lead.labels.moving):
            run.state.freeze(part.labels.ids, reason)
            if part.shape[axis] != 1:
                run.state.freeze(ids, reason)
        elif part.shape[axis] != 1:
            run.state.tie(ids, part.labels.ids, reason)
            a, b = np.broadcast_arrays(ids, part.labels.ids)
            ids = np.where((a == ZERO) | (b == ZERO), ZERO, a) if product else np.where(a == ZERO, b, a)
            flowing.append(part.value)
        elif not product:  # a broadcast summand: zeros become something else
            ids = np.where(ids == ZERO, FROZEN, ids)
    for constant in constants:
        shape = (1,) * (rank - len(run.shape(constant))) + run.shape(constant)
        if not product:
            zeros = ids == ZERO
            if shape[axis] == 1:
                ids = np.where(zeros, FROZEN, ids)
            elif zeros.any():
                ids = ids.copy()
                ids[zeros] = run.state.fresh(int(zeros.sum()))
        follow(run, node, constant)
    run.flow(node, *flowing, node.name)
    axes = tuple(a for a in lead.labels.axes)
    return Labels(axes, np.ascontiguousarray(ids), lead.labels.moving)


def follow(run: Run, node: Node, constant: str) -> None:
    """Permute a constant operand like the node's output (axes aligned from the right)."""
    offset = len(run.shape(node.name)) - len(run.shape(constant))
    axis_map = tuple(range(offset, offset + len(run.shape(constant))))
    for slot, value in operand_slots(node):
        if value == constant:
            run.state.followers.append(Follower(node.name, str(slot), node.name, axis_map))
