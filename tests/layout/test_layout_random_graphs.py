"""Random small convolutional graphs: folding changes nothing but the order of channels."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_support import (
    BOUNDED,
    RELU,
    Build,
    check_exact,
    check_layers,
    check_sorted,
    feature_channels,
    fold,
    layers,
    random_ranges,
)

from bitdial.graph import Graph

CLAMP = {"lo": 0.0, "hi": 15.0}
KINDS = ["conv", "grouped", "depthwise", "add", "concat", "residual", "pad", "mul", "slice", "pool", "relu", "shuffle"]
KINDS += ["add", "concat", "residual", "pad", "shared", "select", "se", "offset", "roll", "aten", "permuted"]
EXTRAS = ["slice", "concat", "second pad", "other pad", "build", "grouped", "depthwise", "flatten", "output"]


@st.composite
def conv_graphs(draw: st.DrawFn) -> Graph:
    b = Build(3, 4, 4, seed=draw(st.integers(0, 99)))
    values = [b.conv("x", draw(st.integers(1, 8)), draw(st.sampled_from([1, 3])))]
    if draw(st.booleans()):
        values.append("x")
    shared: dict[int, str] = {}

    def pick(other: str | None = None) -> str:
        fitting = values if other is None else [v for v in values if b.shape(v) == b.shape(other)]
        return draw(st.sampled_from(fitting))

    def channels(value: str) -> int:
        return int(b.shape(value)[1])

    def activation() -> dict[str, object]:
        return draw(st.sampled_from([BOUNDED, {"kind": "clamp", "lo": -7.0, "hi": 9.0}, {**BOUNDED, "lo": 1.0}]))

    for _ in range(draw(st.integers(2, 12))):
        kind = draw(st.sampled_from(KINDS))
        x = pick()
        c, size = channels(x), int(b.shape(x)[2])
        if kind == "conv":
            y = b.conv(x, draw(st.integers(1, 10)), draw(st.sampled_from([1, 3])), activation=activation())
        elif kind == "grouped":
            groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
            y = b.conv(x, groups * draw(st.integers(1, 3)), groups=groups, activation=activation())
        elif kind == "depthwise":
            y = b.conv(x, c * draw(st.integers(1, 2)), 3, groups=c, activation=activation())
        elif kind == "residual":
            same = [v for v in values if b.shape(v)[2] == size]
            y = b.conv(draw(st.sampled_from(same)), c, residual=x, activation=activation())
        elif kind == "add":
            y = b.add(x, pick(x))
        elif kind == "mul":
            y = b.node("clamp", [b.node("mul", [x, pick(x)])], CLAMP)
        elif kind == "concat":
            same = [v for v in values if b.shape(v)[2] == size and channels(v) <= 12]
            parts = draw(st.lists(st.sampled_from(same), min_size=1, max_size=3)) if same else [x]
            y = b.node("concat", [x, *parts], {"axis": 1})
        elif kind == "slice":
            start = draw(st.integers(0, c - 1))
            y = b.slice(x, 1, start, draw(st.integers(start + 1, c)), draw(st.sampled_from([1, 1, 2])))
        elif kind == "pad":
            # an option A shortcut and a main path of the same width
            before, after = draw(st.integers(0, 4)), draw(st.integers(0, 4))
            y = b.pad_channels(x, before, after)
            if draw(st.booleans()):
                y = b.node("relu", [y])
            if draw(st.booleans()):
                y = b.conv(x, before + c + after, 1, residual=y)
        elif kind == "pool":
            if size == 1:
                continue
            y = b.pool(x, draw(st.sampled_from(["max_pool", "avg_pool"])))
        elif kind == "relu":
            y = b.node("relu", [x])
        elif kind == "shuffle":
            groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
            y = b.permute(b.reshape(x, groups, c // groups, size, size), 0, 2, 1, 3, 4)
            y = b.reshape(y, c, size, size)
        elif kind == "shared":
            weight = shared.setdefault(c, b.constant(draw(st.integers(1, 6)), c, 1, 1))
            y = b.conv(x, len(b.graph.constants[weight]), weight=weight)
        elif kind == "select":
            one = b.node("select", [x], {"axis": 1, "index": draw(st.integers(0, c - 1))})
            y = b.reshape(one, 1, size, size)
        elif kind == "se":
            scale = b.node("mean", [x], {"axes": [2, 3], "keepdim": True})
            y = b.node("clamp", [b.node("mul", [x, b.conv(scale, c)])], CLAMP)
        elif kind == "offset":
            y = b.add(x, b.constant(*draw(st.sampled_from([(1, c, 1, 1), (c, 1, 1), (1,), (c, size, size)]))))
        elif kind == "roll":
            y = b.node("roll", [x], {"shifts": [1], "axes": [draw(st.sampled_from([1, 2]))]})
        elif kind == "aten":
            y = f"flip_{len(b.graph.nodes)}"
            attrs = {"args": [{"value": 0}, [1]], "kwargs": {}}
            b.graph.nodes.append(type(b.graph.nodes[0])(y, "aten.flip.default", [x], attrs))
            b.graph.types[y] = b.graph.types[x]
        else:  # a linear layer over the last axis, channels last
            y = b.permute(b.linear(b.permute(x, 0, 2, 3, 1), draw(st.integers(1, 6))), 0, 3, 1, 2)
        if channels(y) <= 40:
            values.append(y)
    last = values[-1] if values[-1] != "x" else values[0]
    flat = b.reshape(last, int(np.prod([int(d) for d in b.shape(last)[1:]])))
    outputs = [b.linear(b.linear(flat, 6, activation=RELU), 3, activation=None)]
    outputs += draw(st.lists(st.sampled_from([v for v in values if v != "x"] or values), max_size=2))
    return b.done(*outputs)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(graph=conv_graphs(), seed=st.integers(0, 9), data=st.data())
def test_folding_is_exact(graph: Graph, seed: int, data: st.DataObject) -> None:
    names = [n.name for n in layers(graph)]
    eligible = set(names) if data.draw(st.booleans()) else set(data.draw(st.lists(st.sampled_from(names))))
    ranges = random_ranges(graph, seed)
    allow = data.draw(st.booleans())
    plan, folded, report = fold(graph, ranges, eligible=eligible, allow_reorders=allow)
    check_exact(graph, plan, folded, seed)
    check_layers(graph, plan, folded)
    check_sorted(plan)
    if not allow:
        assert report.n_reorders == 0
    # applying it twice is the same as once: ranges, permuted along, are sorted already
    moved = {v: r if plan.permutation(v) is None else r[plan.permutation(v)] for v, r in ranges.items()}
    if report.n_reorders == 0 and not report.pads:
        moved = {n.inputs[0]: moved[n.inputs[0]] for n in layers(folded)}
        again, _, _ = fold(folded, moved, eligible=eligible, allow_reorders=allow)
        assert again.orders == {}


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 30), min_size=2, max_size=5), seed=st.integers(0, 99), size=st.sampled_from([4, 8])
)
def test_chains_are_sorted_outright(widths: list[int], seed: int, size: int) -> None:
    b = Build(3, 2, 2, seed=seed)
    x = "x"
    for width in widths:
        x = b.conv(x, width)
    graph = b.done(x)
    ranges = random_ranges(graph, seed)
    plan, folded, report = fold(graph, ranges, group_size=size)
    check_exact(graph, plan, folded)
    for node in layers(graph)[1:]:
        value = node.inputs[0]
        permutation = plan.permutation(value)
        ordered = ranges[value] if permutation is None else ranges[value][permutation]
        floor = ordered.max() / 256
        assert (np.diff(np.maximum(ordered, floor)) >= 0).all()
        assert len(ordered) == feature_channels(graph, node)
    assert report.n_reorders == 0 and not report.frozen


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pads=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=3),
    extras=st.lists(st.sampled_from(EXTRAS), max_size=2),
    seed=st.integers(0, 9),
    allow=st.booleans(),
)
def test_padded_shortcuts_with_other_readers(
    pads: list[tuple[int, int]], extras: list[str], seed: int, allow: bool
) -> None:
    """Option A stages, with readers that may forbid moving the inner channels to the front."""
    b = Build(3, 4, 4, seed=seed)
    x = b.conv("x", 4)
    stages, outputs, fresh = [x], [], []
    for before, after in pads:
        width = before + int(b.shape(x)[1]) + after
        shortcut = b.pad_channels(x, before, after) if before + after else x
        x = b.conv(b.conv(x, width), width, residual=shortcut)
        stages.append(x)
    for extra in extras:
        before, after = pads[0]
        low, high = stages[0], stages[1]
        if extra == "slice":
            fresh.append(b.add(b.slice(high, 1, before, before + 4), low))
        elif extra == "concat":
            fresh.append(b.node("concat", [high, low], {"axis": 1}))
        elif extra == "second pad":
            fresh.append(b.add(b.node("relu", [b.pad_channels(low, before, after)]), high))
        elif extra == "other pad":
            fresh.append(b.add(b.pad_channels(low, after, before), high))
        elif extra == "build":
            parts = [b.conv(low, n) for n in (before, after) if n]
            fresh.append(b.add(b.node("concat", [*parts[: before > 0], low, *parts[before > 0 :]], {"axis": 1}), high))
        elif extra == "grouped":
            fresh.append(b.conv(high, int(b.shape(high)[1]), groups=2 - int(b.shape(high)[1]) % 2))
        elif extra == "depthwise":
            fresh.append(b.add(b.conv(high, int(b.shape(high)[1]), 3, groups=int(b.shape(high)[1])), high))
        elif extra == "flatten":
            outputs.append(b.linear(b.reshape(high, int(b.shape(high)[1]) * 16), 2, activation=None))
        else:
            outputs.append(high)
    outputs += [b.conv(v, 2) for v in [*fresh, x]]
    graph = b.done(*outputs)
    plan, folded, report = fold(graph, random_ranges(graph, seed), allow_reorders=allow)
    check_exact(graph, plan, folded, seed)
    check_layers(graph, plan, folded)
    check_sorted(plan)
    if not extras:
        assert len(report.pads) == sum(a > 0 and c > 0 for a, c in pads)
