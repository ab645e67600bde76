"""Operators outside the core set that treat every channel alike, so that permuted channels pass through them.

All others read their operands in the original order.
"""

from __future__ import annotations

import re

from bitdial.graph.aten import POINTWISE, SPATIAL
from bitdial.graph.ir import Node
from bitdial.layout import labels as lb
from bitdial.layout.labels import Labels
from bitdial.layout.propagate import Rule, Run, elementwise, operand_slots, unknown


def pointwise(run: Run, node: Node) -> Labels:
    """Value by value, with broadcasting between several operands."""
    result = elementwise(run, node, operand_slots(node))
    return run.no_zeros(result, keep=False)


def spatial(run: Run, node: Node) -> Labels:
    """Mixes the last axes of each channel only."""
    x = run.value(node.inputs[0])
    shape = run.shape(node.name)
    match = re.search(r"([123])d", node.op)
    assert match is not None
    rank = len(x.axes)
    window = range(rank - int(match[1]), rank)
    if x.moving is None:
        return x
    if (
        len(node.inputs) != 1
        or len(shape) != rank
        or x.moving_axis in window
        or shape[: window.start] != x.shape[: window.start]
    ):
        return unknown(run, node)
    run.flow(node, node.inputs[0], node.name)
    x = run.state.tie_across(x, range(window.start))
    for axis in window:
        resized = lb.resize_axis(x, axis, shape[axis])
        assert resized is not None  # the labels do not vary there any more
        x = resized
    return x


def embedding(run: Run, node: Node) -> Labels:
    """Rows of a table: its columns are the producer's channels, and a constant table is permuted like any weight."""
    table = node.inputs[0]
    if len(node.inputs) != 2 or not run.is_constant(table):
        return unknown(run, node)
    labels = run.value(table, 1)
    if labels.moving is None:
        return run.unlabelled(node)
    run.flow(node, table, node.name)
    shape = run.shape(node.name)
    return lb.along(shape, len(shape) - 1, labels.rows()[0])


ATEN_RULES: dict[str, Rule] = {
    "aten.embedding.default": embedding,
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(SPATIAL, spatial),
}
