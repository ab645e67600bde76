"""Layout on conv nets: folded equals unfolded bit for bit, integers in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layout_support import (
    BOUNDED,
    Build,
    check_exact,
    check_layers,
    check_sorted,
    default_eligible,
    fold,
    layers,
    random_ranges,
)

from bitdial.errors import CalibrationError, ConfigError, GraphError
from bitdial.graph import Graph
from bitdial.layout import apply_layout, group_bounds, plan_layout


def resnet(widths: list[int], before_after: list[tuple[int, int]]) -> Graph:
    """Option A: two blocks per stage, zero-padded shortcuts between stages."""
    b = Build(3, 8, 8)
    x = b.conv("x", widths[0], 3)
    for stage, width in enumerate(widths):
        for block in range(2):
            stride = 2 if stage and not block else 1
            y = b.conv(x, width, 3, stride=stride)
            if stride == 2:
                x = b.slice(b.slice(x, 2, 0, b.shape(x)[2], 2), 3, 0, b.shape(x)[3], 2)
                x = b.pad_channels(x, *before_after[stage - 1])
            x = b.conv(y, width, 3, residual=x)
    x = b.node("mean", [x], {"axes": [2, 3], "keepdim": False})
    return b.done(b.linear(x, 5, activation=None))


def test_option_a_shortcuts_are_lifted() -> None:
    graph = resnet([8, 16, 32], [(4, 4), (8, 8)])
    plan, folded, report = fold(graph, group_size=8)
    assert check_exact(graph, plan, folded) > 10
    check_sorted(plan)
    assert check_layers(graph, plan, folded) == len(layers(graph)) - 1
    assert len(report.pads) == 2 and report.n_reorders == 0 and not report.frozen
    pads = [n.attrs["pads"][1] for n in folded.nodes if n.op == "pad"]
    assert pads == [[0, 8], [0, 16]]
    # stage 3 = [channels of stage 1][free of stage 2][free of stage 3]: three segments of 8, 8 and 16
    last = plan.permutation(layers(graph)[-1].inputs[0])
    assert last is not None
    stage1 = set(range(12, 20))
    assert set(last[:8]) == stage1
    assert set(last[8:16]) == set(range(8, 24)) - stage1
    lengths = sorted(s.length for s in plan.segments if layers(graph)[-1].inputs[0] in s.values)
    assert lengths == [8, 8, 16]


def test_one_sided_and_unequal_pads() -> None:
    for sides in [(0, 8), (8, 0), (2, 6)]:
        graph = resnet([8, 16], [sides])
        plan, folded, report = fold(graph)
        assert check_exact(graph, plan, folded) > 5
        assert len(report.pads) == (1 if min(sides) else 0) and report.n_reorders == 0


def test_pad_lift_refused_when_a_slice_takes_the_inner_channels_out_again() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    y = b.conv(x, 16, residual=b.pad_channels(x, 4, 4))
    inner = b.slice(y, 1, 4, 12)
    graph = b.done(b.conv(b.add(inner, x), 4), b.conv(b.conv(y, 8), 4))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) > 0
    assert report.pads == () and report.n_reorders == 0


def test_pad_lift_with_a_reader_of_the_old_order_gets_one_reorder() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    y = b.conv(x, 16, residual=b.pad_channels(x, 4, 4))
    graph = b.done(b.conv(b.conv(y, 8), 4), y)
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) > 0
    assert len(report.pads) == 1
    assert report.reorders == (f"{y}_reorder",)
    assert folded.outputs[1] == report.reorders[0]
    plan, folded, report = fold(graph, allow_reorders=False)
    check_exact(graph, plan, folded)
    assert report.reorders == () and report.pads == ()
    assert any("graph output 1" in f.reason for f in report.frozen)


def test_pad_with_another_value_than_zero_stays() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    pad = b.pad_channels(x, 4, 4)
    b.graph.node(pad).attrs["value"] = 1.0
    graph = b.done(b.conv(b.conv(x, 16, residual=pad), 4))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) > 0
    assert report.pads == ()


def test_activation_that_changes_zeros_forbids_moving_them() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    pad = b.pad_channels(x, 4, 4)
    for op, attrs in (("clamp", {"lo": 1.0, "hi": 9.0}), ("relu", {})):
        y = b.node(op, [pad], attrs)
        y = b.conv(x, 16, residual=y)
    graph = b.done(b.conv(y, 4))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) > 0


@pytest.mark.parametrize("change", ["scalar", "one channel", "sigmoid-like", "concat", "none"])
def test_zeros_that_become_something_else_stay_in_place(change: str) -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 4)
    pad = b.pad_channels(x, 4, 4)
    one = b.constant(1)
    b.graph.constants[one][:] = 1
    if change == "scalar":
        pad = b.node("add", [pad, one])
    elif change == "one channel":
        pad = b.node("add", [pad, b.conv("x", 1, activation={**BOUNDED, "lo": 1.0})])
    elif change == "sigmoid-like":
        pad = b.node("clamp", [pad], {"lo": 1.0, "hi": 15.0})
    elif change == "concat":
        pad = b.node("concat", [pad], {"axis": 1, "activation": {"kind": "clamp", "lo": 1.0, "hi": 15.0}})
    other = b.conv("x", 12)
    y = b.node("clamp", [b.node("mul", [pad, other])], {"lo": 0.0, "hi": 15.0})
    graph = b.done(b.conv(y, 3), b.conv(other, 3))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) > 0


@pytest.mark.parametrize("reads", ["wide", "padded"])
def test_pad_lift_refused_across_convolution_groups(reads: str) -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    pad = b.pad_channels(x, 4, 4)
    y = b.conv(x, 16, residual=pad)
    graph = b.done(b.conv(b.conv(y if reads == "wide" else pad, 4, groups=2), 3), b.conv(y, 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) > 0
    assert report.pads == ()


def test_slice_across_flattened_channels_reads_through_a_reorder() -> None:
    b = Build(3, 2, 2)
    x = b.conv("x", 6)
    flat = b.reshape(x, 24)
    aligned, across = b.slice(flat, 1, 8, 20), b.slice(flat, 1, 2, 11)
    graph = b.done(b.linear(aligned, 3), b.linear(across, 3), b.linear(flat, 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 3
    assert report.reorders == (f"{flat}_reorder",)
    assert folded.node(across).inputs == list(report.reorders)
    assert folded.node(aligned).inputs == [flat]


def test_concat_boundaries_slices_and_a_split() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 6)
    one, two, three = b.conv(x, 5, 3), b.conv(x, 7), b.conv(x, 4)
    joined = b.node("concat", [one, two, three], {"axis": 1})
    left, right = b.slice(joined, 1, 0, 8), b.slice(joined, 1, 8, 16)
    y = b.add(b.conv(left, 8), b.conv(right, 8))
    graph = b.done(b.conv(y, 3), b.conv(joined, 2))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) >= 6
    check_sorted(plan)
    assert report.n_reorders == 0
    held = sorted(s.length for s in plan.segments if joined in s.values)
    assert held == [3, 4, 4, 5]  # 5 | 3 + 4 | 4: the slice cuts the second part
    permutation = plan.permutation(joined)
    assert permutation is not None
    for low, high in [(0, 5), (5, 8), (8, 12), (12, 16)]:
        assert set(permutation[low:high]) == set(range(low, high))


def test_concat_of_a_tensor_with_itself_and_with_the_input() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 6)
    joined = b.node("concat", [x, "x", x], {"axis": 1})
    graph = b.done(b.conv(joined, 4))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) >= 2
    permutation = plan.permutation(joined)
    assert permutation is not None
    np.testing.assert_array_equal(permutation[9:], permutation[:6] + 9)
    np.testing.assert_array_equal(permutation[6:9], [6, 7, 8])


def test_strided_slice_of_channels() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    graph = b.done(b.conv(b.add(b.slice(x, 1, 0, 8, 2), b.slice(x, 1, 1, 8, 2)), 4), b.conv(x, 4))
    plan, folded, _ = fold(graph)
    check_exact(graph, plan, folded)


@pytest.mark.parametrize("spatial", [1, 4])
def test_flatten_into_linear(spatial: int) -> None:
    b = Build(3, spatial, spatial)
    x = b.conv(b.conv("x", 10, 3), 6, 3)
    flat = b.reshape(x, 6 * spatial * spatial)
    graph = b.done(b.linear(b.linear(flat, 9), 4, activation=None))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) >= 4
    check_sorted(plan)
    assert report.n_reorders == 0
    permutation = plan.permutation(flat)
    assert permutation is not None
    blocks = permutation.reshape(6, -1)
    assert (blocks // spatial**2 == blocks[:, :1] // spatial**2).all()  # whole blocks of a channel move
    assert (blocks % spatial**2 == np.arange(spatial**2)).all()


def test_grouped_conv_keeps_channels_in_their_group() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 12)
    y = b.conv(x, 8, 3, groups=4)
    graph = b.done(b.conv(y, 3))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) == 2
    check_layers(graph, plan, folded)
    for value, width in ((x, 3), (y, 2)):
        permutation = plan.permutation(value)
        assert permutation is not None
        assert (permutation // width == np.arange(len(permutation)) // width).all()


@pytest.mark.parametrize("multiplier", [1, 3])
def test_inverted_residual_with_a_depthwise_conv(multiplier: int) -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 6)
    wide = b.conv(x, 10)
    deep = b.conv(wide, 10 * multiplier, 3, groups=10)
    y = b.conv(deep, 6, residual=x)
    graph = b.done(b.conv(y, 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 4
    assert check_layers(graph, plan, folded) == 4
    assert report.n_reorders == 0
    a, d = plan.permutation(wide), plan.permutation(deep)
    assert a is not None and d is not None
    np.testing.assert_array_equal(d[::multiplier], a * multiplier)


def test_squeeze_and_excitation() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 10, 3)
    s = b.node("mean", [x], {"axes": [2, 3], "keepdim": True})
    s = b.conv(b.conv(s, 5), 10)
    y = b.node("clamp", [b.node("mul", [x, s])], {"lo": 0.0, "hi": 15.0})
    graph = b.done(b.conv(y, 3))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) == 6
    np.testing.assert_array_equal(plan.permutation(x), plan.permutation(y))


def test_channel_shuffle() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 12)
    y = b.permute(b.reshape(x, 3, 4, 4, 4), 0, 2, 1, 3, 4)
    y = b.reshape(y, 12, 4, 4)
    graph = b.done(b.conv(b.conv(y, 12, groups=3), 4), b.conv(b.conv(x, 6), 4))
    plan, folded, _ = fold(graph)
    check_exact(graph, plan, folded)
    # without the grouped conv after it, channels may move inside the groups that are shuffled
    b = Build(3, 4, 4)
    x = b.conv("x", 12)
    y = b.reshape(b.permute(b.reshape(x, 3, 4, 4, 4), 0, 2, 1, 3, 4), 12, 4, 4)
    graph = b.done(b.conv(y, 4))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 2 and report.n_reorders == 0
    assert sorted(s.length for s in plan.segments) == [4, 4, 4]


def test_reused_weights_tie_both_uses() -> None:
    b = Build(3, 4, 4)
    x, y = b.conv("x", 6), b.conv("x", 6, 3)
    shared = b.constant(8, 6, 1, 1)
    p, q = b.conv(x, 8, weight=shared), b.conv(y, 8, weight=shared)
    graph = b.done(b.conv(p, 3), b.conv(q, 3))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) == 4
    np.testing.assert_array_equal(plan.permutation(x), plan.permutation(y))
    np.testing.assert_array_equal(plan.permutation(p), plan.permutation(q))
    assert folded.node(p).weight == folded.node(q).weight  # stored once
    assert not np.array_equal(folded.constants[shared], graph.constants[shared])


def test_constant_shared_by_two_spaces_is_cloned() -> None:
    b = Build(3, 4, 4)
    x, y = b.conv("x", 6), b.conv("x", 6, 3)
    offset = b.constant(1, 6, 1, 1)
    graph = b.done(b.conv(b.add(x, offset), 3), b.conv(b.add(offset, y), 3), b.add(offset, offset))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) == 4
    assert not np.array_equal(plan.permutation(x), plan.permutation(y))
    np.testing.assert_array_equal(folded.constants[offset], graph.constants[offset])


def test_tails_and_joint_sorting_over_consumers() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 13)
    near, far = b.conv(x, 3), b.node("relu", [x])
    far = b.conv(far, 9)
    graph = b.done(b.conv(near, 2), b.conv(far, 2))
    ranges = random_ranges(graph, 3)
    plan, folded, _ = fold(graph, ranges, group_size=8)
    check_exact(graph, plan, folded)
    permutation = plan.permutation(x)
    assert permutation is not None
    key = (3 * np.log2(ranges[x]) + 9 * np.log2(ranges[b.graph.node(far).inputs[0]])) / 12  # weighted by multiplies
    assert (np.diff(key[permutation]) >= 0).all()
    assert list(group_bounds(13, 8)) == [0, 8, 13]


def test_spaces_without_eligible_layers_stay() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    y = b.conv(x, 8)
    graph = b.done(b.conv(y, 4))
    last = layers(graph)[-1].name
    for eligible in ({last}, lambda node: node.name == last):
        plan, folded, report = fold(graph, eligible=eligible)
        assert check_exact(graph, plan, folded) == 1
        assert plan.permutation(x) is None and plan.permutation(y) is not None
        assert report.permuted_spaces == 1 and report.segments == 1


def test_graph_outputs_and_inputs_keep_their_order() -> None:
    b = Build(8, 4, 4)
    y = b.add(b.conv("x", 8), "x")
    graph = b.done(b.conv(y, 8))
    plan, folded, report = fold(graph)
    check_exact(graph, plan, folded)
    assert plan.orders == {}
    assert len(report.frozen) == 1 and "keep their order" in report.frozen[0].reason
    assert "kept in order: 8 channels" in str(report)


def test_unknown_operator_reads_through_a_reorder() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    b.graph.nodes.append(
        type(b.graph.nodes[0])("flip", "aten.flip.default", [x], {"args": [{"value": 0}, [1]], "kwargs": {}})
    )
    b.graph.types["flip"] = b.graph.types[x]
    graph = b.done(b.conv("flip", 3), b.conv(x, 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 1
    assert report.n_reorders == 1
    assert folded.node("flip").inputs == list(report.reorders)


def test_channelwise_aten_operators_pass_permutations_on() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 8)
    node = type(b.graph.nodes[0])
    args = [{"value": 0}, [8, 8], None]
    b.graph.nodes.append(node("up", "aten.upsample_nearest2d.vec", [x], {"args": args, "kwargs": {}}))
    b.graph.types["up"] = type(b.graph.types[x])((*b.graph.types[x].shape[:2], 8, 8))
    c = b.constant(8, 1, 1)
    b.graph.nodes.append(
        node("sub", "aten.sub.Tensor", ["up", c], {"args": [{"value": 0}, {"value": 1}], "kwargs": {}})
    )
    b.graph.types["sub"] = b.graph.types["up"]
    graph = b.done(b.conv("sub", 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 3
    assert report.n_reorders == 0


def test_errors() -> None:
    b = Build(3, 4, 4)
    graph = b.done(b.conv(b.conv("x", 8), 4))
    ranges = random_ranges(graph)
    value = layers(graph)[1].inputs[0]
    with pytest.raises(ConfigError, match="group size 0"):
        plan_layout(graph, ranges, 0, default_eligible(graph))
    with pytest.raises(CalibrationError, match="contracts 8 channels"):
        plan_layout(graph, {value: np.ones(7)}, 4, default_eligible(graph))
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(CalibrationError, match="negative or non-finite"):
            plan_layout(graph, {value: np.full(8, bad)}, 4, default_eligible(graph))
    plan = plan_layout(graph, ranges, 4, default_eligible(graph))
    with pytest.raises(GraphError, match="plan again"):
        apply_layout(Build(3, 4, 4).done("x"), plan)
    with pytest.raises(ConfigError):
        group_bounds(10, 4, 3)
    with pytest.raises(ConfigError):
        group_bounds(10, 0)


def test_group_bounds_respect_convolution_groups() -> None:
    assert list(group_bounds(12, 4, 2)) == [0, 4, 6, 10, 12]
    assert list(group_bounds(4, 16, 4)) == [0, 1, 2, 3, 4]
    assert group_bounds(32, 16).dtype == np.int32 and list(group_bounds(32, 16)) == [0, 16, 32]


def test_dead_channels_do_not_dominate_the_joint_key() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", 4)
    r = b.node("relu", [x])
    graph = b.done(b.conv(x, 4), b.conv(r, 4))
    ranges = {"x": np.ones(3), x: np.array([0.0, 64.0, 32.0, 16.0]), r: np.array([100.0, 1.0, 1.0, 1.0])}
    plan, _, _ = fold(graph, ranges, eligible={n.name for n in layers(graph)[1:]})
    permutation = plan.permutation(x)
    assert permutation is not None
    assert list(permutation) == [3, 0, 2, 1] or list(permutation) == [0, 3, 2, 1]


def test_single_channels() -> None:
    b = Build(3, 4, 4)
    one = b.conv("x", 1)
    x = b.conv("x", 6)
    y = b.node("mul", [x, one])
    y = b.node("clamp", [y], {"lo": 0.0, "hi": 15.0})
    joined = b.node("concat", [one, y, b.slice(x, 1, 2, 3)], {"axis": 1})
    picked = b.node("select", [x], {"axis": 1, "index": 4})
    graph = b.done(b.conv(joined, 3), picked)
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) > 0
    assert torch.equal(torch.tensor(plan.permutation(joined)[[0, -1]]), torch.tensor([0, 7]))
