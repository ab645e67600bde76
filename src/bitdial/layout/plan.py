"""Membership of groups: which permutation every value of a graph gets (design notes, section 3).

Channels of one tensor, and of all tensors tied to it, are sorted by range, jointly over their consumers, inside the
segments that slices, concats, heads, convolution groups and reshapes allow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bitdial.errors import CalibrationError, ConfigError
from bitdial.graph.ir import Graph, Node
from bitdial.layout.labels import FROZEN, Ids, Labels
from bitdial.layout.pads import lift_pads
from bitdial.layout.propagate import BATCH, Follower, Propagation, SoftRead, concrete, propagate
from bitdial.layout.rules import flat_ids
from bitdial.layout.segments import Order, Rows, Segments, apply_segments, components, find_segments, sort_segments

Ranges = Mapping[str, npt.NDArray[np.float64]]
SMALLEST = 2.0**-8  # of the widest channel; narrower ones count as this narrow, so that dead channels do not dominate


@dataclass(frozen=True)
class ValueOrder:
    """How one value is permuted.

    labels: its axes. order: int64, shaped like labels.ids: old position along the moving sub-axis per new position.
    """

    labels: Labels
    order: Order

    @property
    def is_identity(self) -> bool:
        assert self.labels.moving is not None
        shape = [1] * self.order.ndim
        shape[self.labels.moving] = -1
        return bool((self.order == np.arange(self.order.shape[self.labels.moving]).reshape(shape)).all())

    @property
    def axis(self) -> int:
        """The axis of the value that moves."""
        axis = self.labels.moving_axis
        assert axis is not None
        return axis

    def permutation(self) -> Order | None:
        """int64 [C], old channel per new one along the axis that moves; None if it differs along other axes."""
        labels, axis = self.labels, self.axis
        assert labels.moving is not None
        span = labels.span(axis)
        order = self.order
        for i in range(order.ndim):
            if i not in span and order.shape[i] > 1:
                if (order != order.take([0], axis=i)).any():
                    return None
                order = order.take([0], axis=i)
        sub = labels.axes[axis]
        order = order.reshape(order.shape[span.start : span.stop])
        positions = np.arange(int(np.prod(sub))).reshape(sub)
        moved = np.take_along_axis(positions, np.broadcast_to(order, sub), axis=labels.moving - span.start)
        return moved.reshape(-1)


@dataclass(frozen=True)
class Segment:
    """A sorted run of channels: `values` that hold it, its length, the sort keys (log2 of range) in the new order."""

    values: tuple[str, ...]
    length: int
    keys: npt.NDArray[np.float64]


@dataclass(frozen=True)
class FrozenSpace:
    """Channels that feed a low-eligible layer but must keep their order: an example layer, how many, and why."""

    layer: str
    channels: int
    reason: str


@dataclass
class LayoutPlan:
    """What `apply_layout` folds into a graph.

    group_size   the group size the plan was made for
    orders       value -> its order, where it is not the identity
    pads         pad node -> axis whose zeros all go behind the channels
    reorders     value -> readers that need its original order; one gather node serves all of them
    """

    group_size: int
    orders: dict[str, ValueOrder]
    pads: dict[str, int]
    reorders: dict[str, list[SoftRead]]
    segments: list[Segment]
    frozen: list[FrozenSpace]
    permuted_spaces: int
    followers: list[Follower] = field(default_factory=list)
    contracted: dict[str, str] = field(default_factory=dict)  # conv/linear -> value its weight columns follow
    # constant -> nodes that read it permuted
    constant_values: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def permutation(self, value: str) -> Order | None:
        """int64 [C]: old channel of each new position along the channel axis of `value`; None if the value keeps its
        order.

        Also for axes merged from several (flattened, heads). None as well for values inside attention whose heads, on
        an axis of their own, are permuted differently: no statistics per channel exist for those.
        """
        order = self.orders.get(value)
        return None if order is None else order.permutation()


def plan_layout(
    graph: Graph,
    channel_ranges: Ranges,
    group_size: int,
    eligible: Callable[[Node], bool] | Collection[str],
    *,
    allow_reorders: bool = True,
) -> LayoutPlan:
    """Plan the membership of groups.

    channel_ranges: per data input of a conv or linear layer, float64 [feature channels], the magnitude of each feature
    channel relative to the tensor's scale, along the axis that the layer contracts. group_size: channels per group.
    eligible: the layers that may run low, as names or as a predicate; only their inputs are worth sorting.
    allow_reorders: where one reader needs the original order (a graph output, an operator without a rule), permute all
    the same and put one fused reorder before that reader; False leaves those channels alone.
    Raises ConfigError for a group size below 1, CalibrationError for ranges of a wrong length or that are not finite.
    """
    if group_size < 1:
        raise ConfigError(f"group size {group_size} is below 1: use 8, 16, 32 or 64")
    wanted = {n.name for n in graph.nodes if n.op in ("conv", "linear") and _is_eligible(n, eligible)}
    state = propagate(graph)
    if not allow_reorders:
        for read in state.soft:
            state.freeze(state.labels[read.value].ids, read.reason)
        state.soft = []
    root = components(state.n_ids, state.ties)
    frozen = np.zeros(state.n_ids, bool)
    reasons: dict[int, str] = {}
    for ids, reason in state.frozen:
        frozen[root[ids]] = True
        for c in np.unique(root[ids]):
            reasons.setdefault(int(c), reason)
    keys = sort_keys(graph, state, root, channel_ranges, wanted)
    rows = {
        v: Rows.of(_classes(root, labels.rows())) for v, labels in state.labels.items() if labels.moving is not None
    }
    windows = [(v, Rows.of(_classes(root, ids))) for v, ids in state.windows]
    pads = lift_pads(graph, state, rows, windows, frozen, ~np.isnan(keys))
    segments = find_segments([b.classes for b in rows.values()] + [b.classes for _, b in windows], frozen)
    sorting = sort_segments(segments, keys)
    described = _describe(segments, sorting, keys, rows)
    spaces = _spaces(root, rows)
    orders: dict[str, ValueOrder] = {}
    for value, block in rows.items():
        apply_segments(block, segments, sorting)
        order = ValueOrder(state.labels[value], _unrow(block.order, state.labels[value]))
        if not order.is_identity:
            orders[value] = order
    reorders: dict[str, list[SoftRead]] = {}
    for read in state.soft:
        if read.value in orders:
            reorders.setdefault(read.value, []).append(read)
    permuted = {int(spaces[c]) for v in orders for c in np.unique(rows[v].classes) if c > 0}
    return LayoutPlan(
        group_size=group_size,
        orders=orders,
        pads=pads,
        reorders=reorders,
        segments=described,
        frozen=_frozen_spaces(state, root, frozen, reasons, wanted, channel_ranges),
        permuted_spaces=len(permuted),
        followers=[f for f in state.followers if f.value in orders],
        contracted={n: c.value for n, c in state.contractions.items() if c.value in orders},
        constant_values={
            c: tuple(n for n, values in state.flows if c in values) for c in state.constant_values if c in orders
        },
    )


def sort_keys(
    graph: Graph, state: Propagation, root: Ids, ranges: Ranges, wanted: Collection[str]
) -> npt.NDArray[np.float64]:
    """float64 [classes]: mean of log2(range) over the eligible layers that read a class, weighted by their multiplies;
    NaN where none does.

    A class read at several positions of one layer (flattened pixels, patch merging) counts with its widest position.
    """
    total, weight = np.zeros(len(root)), np.zeros(len(root))
    nodes = graph.producers()
    for name, contraction in state.contractions.items():
        found = ranges.get(contraction.value)
        if name not in wanted or found is None:
            continue
        size = contraction.labels.shape[0]
        values = check_ranges(contraction.value, found, size)
        classes = _classes(root, flat_ids(contraction.labels))
        valid = classes > 0
        unique, inverse, counts = np.unique(classes[valid], return_inverse=True, return_counts=True)
        widest = np.zeros(len(unique))
        np.maximum.at(widest, inverse, values[valid])
        floor = float(values.max(initial=0.0)) * SMALLEST or 1.0
        macs = counts * (_macs(graph, nodes[name]) / size)
        total[unique] += macs * np.log2(np.maximum(widest, floor))
        weight[unique] += macs
    return np.where(weight > 0, total / np.maximum(weight, 1e-300), np.nan)


def check_ranges(value: str, ranges: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """The ranges of one value as float64 [size]. Raises CalibrationError."""
    found = np.asarray(ranges, np.float64)
    if found.shape != (size,):
        raise CalibrationError(
            f"channel_ranges of '{value}' has shape {list(found.shape)}, its reader contracts {size} channels: "
            "calibrate on the same graph"
        )
    if not np.isfinite(found).all() or (found < 0).any():
        raise CalibrationError(
            f"channel_ranges of '{value}' has negative or non-finite entries: check the calibration data"
        )
    return found


def _is_eligible(node: Node, eligible: Callable[[Node], bool] | Collection[str]) -> bool:
    return eligible(node) if callable(eligible) else node.name in eligible


def _classes(root: Ids, ids: Ids) -> Ids:
    return np.where(ids > 0, root[np.maximum(ids, FROZEN)], ids)


def _macs(graph: Graph, node: Node) -> float:
    """Multiply-accumulates per sample of a conv or linear layer."""
    assert node.weight is not None
    per_output = float(np.prod(graph.constants[node.weight].shape[1:]))
    return per_output * float(np.prod(concrete(graph, node.name))) / BATCH


def _unrow(order: Order, labels: Labels) -> Order:
    """[rows, C] back to the shape of the value's labels."""
    assert labels.moving is not None
    shape = list(labels.ids.shape)
    size = shape.pop(labels.moving)
    return np.moveaxis(order.reshape([*shape, size]), -1, labels.moving)


def _spaces(root: Ids, rows: dict[str, Rows]) -> Ids:
    """Classes that share a value belong to one space: int64 [classes]."""
    pairs = []
    for block in rows.values():
        classes = np.unique(block.classes[block.classes > 0])
        pairs.append((np.full(len(classes), classes[0] if len(classes) else 0), classes))
    return components(len(root), pairs)


def _describe(
    segments: Segments, sorting: list[Order], keys: npt.NDArray[np.float64], rows: dict[str, Rows]
) -> list[Segment]:
    holders: list[list[str]] = [[] for _ in segments.members]
    for value, block in rows.items():
        classes = block.classes[block.classes > 0]
        for s in np.unique(segments.of[classes]):
            if s >= 0:
                holders[s].append(value)
    return [
        Segment(tuple(holders[i]), len(members), keys[members][sorting[i]])
        for i, members in enumerate(segments.members)
        if not np.isnan(keys[members]).all()
    ]


def _frozen_spaces(
    state: Propagation,
    root: Ids,
    frozen: npt.NDArray[np.bool_],
    reasons: dict[int, str],
    wanted: Collection[str],
    ranges: Ranges,
) -> list[FrozenSpace]:
    result: dict[tuple[int, str], FrozenSpace] = {}
    for name, contraction in state.contractions.items():
        if name not in wanted or contraction.value not in ranges:
            continue
        classes = np.unique(_classes(root, flat_ids(contraction.labels)))
        stuck = [int(c) for c in classes if c > 0 and frozen[c]]
        for reason in dict.fromkeys(reasons[c] for c in stuck):
            members = [c for c in stuck if reasons[c] == reason]
            result.setdefault((members[0], reason), FrozenSpace(name, len(members), reason))
    return list(result.values())
