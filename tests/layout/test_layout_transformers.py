"""Layout on attention: heads, windows, patch merging, tokens. Exact on integers, bounded where sums are rounded."""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import tracemalloc

import numpy as np
import pytest
import torch
from layout_support import (
    BOUNDED,
    Build,
    check_exact,
    check_layers,
    check_sorted,
    fold,
    layers,
    random_ranges,
    values_of,
)

from bitdial.graph import BatchDim, Graph, TensorType
from bitdial.graph.capture import capture
from bitdial.graph.passes import optimize
from bitdial.layout import plan_layout

HEADS, WIDTH, TOKENS = 2, 12, 4
DEPTH = WIDTH // HEADS


def attend(b: Build, q: str, k: str, v: str) -> str:
    """Attention without softmax, so that everything stays an integer; [.., T, d] each."""
    scores = b.node("matmul", [q, k], {"transpose_b": True, "activation": {"kind": "clamp", "lo": 0.0, "hi": 3.0}})
    return b.node("matmul", [scores, v], {"transpose_b": False, "activation": dict(BOUNDED)})


def stacked_qkv(b: Build, x: str) -> str:
    """timm: one layer for q, k and v, [N, T, 3, heads, d]."""
    y = b.reshape(b.linear(x, 3 * WIDTH), TOKENS, 3, HEADS, DEPTH)
    y = b.permute(y, 2, 0, 3, 1, 4)
    q, k, v = (b.node("select", [y], {"axis": 0, "index": i}) for i in range(3))
    k = b.node("mul", [k, b.constant(1)])
    return b.reshape(b.permute(attend(b, q, k, v), 0, 2, 1, 3), TOKENS, WIDTH)


def heads_in_the_batch(b: Build, x: str) -> str:
    """torch.nn.MultiheadAttention: tokens first, heads folded into the batch."""
    qkv = b.permute(b.linear(x, 3 * WIDTH), 1, 0, 2)  # [T, N, 3 * WIDTH]
    parts = []
    for i in range(3):
        part = b.slice(qkv, 2, i * WIDTH, (i + 1) * WIDTH)
        part = b.node("reshape", [part], {"shape": [TOKENS, ["N", HEADS], DEPTH]})
        parts.append(b.permute(part, 1, 0, 2))
    y = b.permute(attend(b, *parts), 1, 0, 2)  # [T, N * heads, d]
    y = b.node("reshape", [y], {"shape": [TOKENS, ["N", 1], WIDTH]})
    return b.permute(y, 1, 0, 2)


def separate_qkv(b: Build, x: str) -> str:
    """Hugging Face: three layers."""
    q, k, v = (b.permute(b.reshape(b.linear(x, WIDTH), TOKENS, HEADS, DEPTH), 0, 2, 1, 3) for _ in range(3))
    return b.reshape(b.permute(attend(b, q, k, v), 0, 2, 1, 3), TOKENS, WIDTH)


@pytest.mark.parametrize("attention", [stacked_qkv, heads_in_the_batch, separate_qkv])
def test_attention_moves_channels_inside_heads(attention) -> None:  # type: ignore[no-untyped-def]
    b = Build(TOKENS, 5)
    x = b.linear("x", WIDTH)
    x = b.node("add", [x, b.constant(1, TOKENS, WIDTH)], {"activation": dict(BOUNDED)})
    y = attention(b, x)
    x = b.linear(y, WIDTH, residual=x)
    x = b.linear(b.linear(x, 20), WIDTH, residual=x)
    graph = b.done(b.linear(b.node("mean", [x], {"axes": [1], "keepdim": False}), 3, activation=None))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) >= 8
    check_sorted(plan)
    assert check_layers(graph, plan, folded) == len(layers(graph)) - 1
    assert report.n_reorders == 0 and not report.frozen
    merged = plan.permutation(y)
    assert merged is not None
    assert (merged // DEPTH == np.arange(WIDTH) // DEPTH).all()
    assert any(s.length == DEPTH and y in s.values for s in plan.segments)


def test_keys_that_feed_a_layer_as_well_move_with_the_queries() -> None:
    b = Build(TOKENS, 5)
    q, k, v = (b.linear("x", WIDTH) for _ in range(3))
    split = [b.permute(b.reshape(y, TOKENS, HEADS, DEPTH), 0, 2, 1, 3) for y in (q, k, v)]
    y = b.reshape(b.permute(attend(b, *split), 0, 2, 1, 3), TOKENS, WIDTH)
    graph = b.done(b.linear(y, 3), b.linear(k, 3))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) == 4
    np.testing.assert_array_equal(plan.permutation(q), plan.permutation(k))
    assert report.n_reorders == 0 and not report.frozen
    # plain key of another source than a layer: nothing may move
    b = Build(TOKENS, WIDTH)
    q = b.linear("x", WIDTH)
    y = attend(b, q, "x", q)
    graph = b.done(b.linear(y, 3))
    plan, folded, report = fold(graph)
    check_exact(graph, plan, folded)
    assert plan.orders == {} and report.frozen


def test_layers_shared_by_all_heads_tie_them() -> None:
    b = Build(TOKENS, 5)
    x = b.linear("x", WIDTH)
    heads = b.reshape(x, TOKENS, HEADS, DEPTH)
    graph = b.done(b.linear(heads, 3), b.node("mean", [b.linear(x, 4)], {"axes": [1], "keepdim": False}))
    plan, folded, _ = fold(graph)
    assert check_exact(graph, plan, folded) >= 2
    permutation = plan.permutation(x)
    assert permutation is not None
    np.testing.assert_array_equal(permutation[DEPTH:], permutation[:DEPTH] + DEPTH)
    for axes, op in (([2], "mean"), ([3], "norm")):
        b = Build(TOKENS, 5)
        x = b.linear("x", WIDTH)
        heads = b.reshape(x, TOKENS, HEADS, DEPTH)
        if op == "mean":
            y = b.node("mean", [heads], {"axes": axes, "keepdim": False})
        else:
            ones = b.constant(DEPTH)
            y = b.node("layer_norm", [heads, ones, b.constant(DEPTH)], {"normalized_shape": [DEPTH], "eps": 1.0})
            y = b.reshape(y, TOKENS, WIDTH)
        graph = b.done(b.linear(y, 3, activation=None), b.linear(x, 3, activation=None))
        plan, folded, _ = fold(graph)
        old, _ = values_of(graph, torch.ones(2, TOKENS, 5).double().cumsum(1))
        new, _ = values_of(folded, torch.ones(2, TOKENS, 5).double().cumsum(1))
        for output in graph.outputs:
            assert torch.allclose(old[output], new[output], rtol=1e-12, atol=1e-12)
        permutation = plan.permutation(x)
        assert permutation is not None
        np.testing.assert_array_equal(permutation[DEPTH:], permutation[:DEPTH] + DEPTH)


def test_class_token_and_position_table_follow() -> None:
    b = Build(3, 4, 4)
    x = b.conv("x", WIDTH, 1, stride=2)
    x = b.permute(b.reshape(x, WIDTH, 4), 0, 2, 1)
    token = b.constant(1, 1, WIDTH)
    b.graph.nodes.append(type(b.graph.nodes[0])("token", "expand", [token], {"shape": [["N", 1], 1, WIDTH]}))
    b.graph.types["token"] = TensorType((BatchDim(1), 1, WIDTH))
    x = b.node("concat", ["token", x], {"axis": 1})
    x = b.add(x, b.constant(1, 5, WIDTH))
    first = b.node("select", [x], {"axis": 1, "index": 0})
    graph = b.done(b.linear(first, 3), b.linear(x, 2))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) >= 5
    assert report.n_reorders == 0 and not report.frozen
    assert plan.permutation("token") is not None


def windows(b: Build, x: str, side: int, window: int, width: int, shift: int) -> str:
    """[N, side, side, width] -> windows folded into the batch -> a linear layer -> back."""
    if shift:
        x = b.node("roll", [x], {"shifts": [-shift, -shift], "axes": [1, 2]})
    n = side // window
    y = b.permute(b.reshape(x, n, window, n, window, width), 0, 1, 3, 2, 4, 5)
    y = b.node("reshape", [y], {"shape": [["N", n * n], window * window, width]})
    q, k, v = (b.linear(y, width) for _ in range(3))
    y = b.linear(attend(b, q, k, v), width)
    y = b.permute(b.node("reshape", [y], {"shape": [["N", 1], n, n, window, window, width]}), 0, 1, 3, 2, 4, 5)
    y = b.reshape(y, side, side, width)
    return b.node("roll", [y], {"shifts": [shift, shift], "axes": [1, 2]}) if shift else y


@pytest.mark.parametrize("style", ["slices", "reshape"])
def test_swin_windows_and_patch_merging(style: str) -> None:
    b = Build(4, 4, 3)
    width = 6
    x = b.linear("x", width)
    for shift in (0, 1):
        x = b.add(x, windows(b, x, 4, 2, width, shift))
    if style == "slices":  # torchvision
        parts = [b.slice(b.slice(x, 1, i, 4, 2), 2, j, 4, 2) for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        merged = b.node("concat", parts, {"axis": 3})
    else:  # timm
        merged = b.permute(b.reshape(x, 2, 2, 2, 2, width), 0, 1, 3, 4, 2, 5)
        merged = b.reshape(merged, 2, 2, 4 * width)
    y = b.linear(merged, 2 * width)
    graph = b.done(b.linear(b.node("mean", [y], {"axes": [1, 2], "keepdim": False}), 3, activation=None))
    plan, folded, report = fold(graph)
    assert check_exact(graph, plan, folded) >= 10
    check_sorted(plan)
    assert report.n_reorders == 0 and not report.frozen
    permutation = plan.permutation(merged)
    assert permutation is not None
    blocks = permutation.reshape(4, width) - np.arange(4)[:, None] * width
    assert (blocks == plan.permutation(x)).all()  # the four neighbours carry the same channels


def test_swin_merging_cannot_leave_its_place_through_other_axes() -> None:
    """Labels that vary over tokens as well as channels: a token-mixing layer in between keeps everything in place."""
    b = Build(4, 3)
    x = b.linear("x", 6)
    mixed = b.permute(b.linear(b.permute(x, 0, 2, 1), 4), 0, 2, 1)
    y = b.add(x, mixed)
    graph = b.done(b.linear(y, 5))
    plan, folded, report = fold(graph)
    check_exact(graph, plan, folded)
    assert report.frozen


def check_bounded(model: torch.nn.Module, side: int) -> None:
    """A captured network in float64: outputs within 1e-11 of their size; each layer exact given equal inputs."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.dim() == 1 else None
    graph = optimize(capture(model, (torch.randn(2, 3, side, side),)))
    ranges = random_ranges(graph)
    eligible = {n.name for n in layers(graph)[1:]}
    plan, folded, report = fold(graph, ranges, group_size=16, eligible=eligible)
    assert report.n_reorders == 0 and not report.frozen
    assert check_layers(graph, plan, folded) == len(eligible)  # every eligible layer's channels are sorted
    check_sorted(plan)
    x = torch.randn(3, 3, side, side, dtype=torch.float64)
    old, outputs = values_of(graph, x)
    new, new_outputs = values_of(folded, x)
    for a, c in zip(outputs, new_outputs, strict=True):
        assert a.abs().max() > 0 and (a - c).abs().max() <= 1e-11 * a.abs().max()
    for name in plan.orders:
        permutation = plan.permutation(name)
        if permutation is not None and name in old:
            axis = plan.orders[name].labels.moving_axis
            a = old[name].index_select(axis, torch.from_numpy(permutation))
            assert (a - new[name]).abs().max() <= 1e-11 * max(1.0, float(a.abs().max())), name


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, 32),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 4, "depths": (2, 1, 1), "num_heads": (3, 6, 12)},
            32,
        ),
    ],
)
def test_timm_networks(name: str, options: dict[str, object], side: int) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: real transformer architectures not checked")
    check_bounded(timm.create_model(name, num_classes=10, **options), side)


def test_torchvision_transformers() -> None:
    with contextlib.suppress(
        RuntimeError
    ):  # stock binaries do not load beside every torch; the models need no operators
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed: its networks not checked")
    vit = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=3, hidden_dim=96, mlp_dim=128, num_classes=10
    )
    torch.nn.init.normal_(vit.heads.head.weight)
    check_bounded(vit, 32)
    swin = models.SwinTransformer([4, 4], 48, [2, 1], [3, 6], [4, 4], num_classes=10)
    check_bounded(swin, 32)


def vision_transformer(blocks: int) -> Graph:
    """ViT-B, whose blocks of width 768 are 12; weights are views of one zero."""
    b = Build(3, 224, 224)
    b.constant = lambda *shape: _zeros(b, *shape)  # type: ignore[method-assign]
    width, tokens, heads = 768, 196, 12
    x = b.conv("x", width, 16, stride=16)
    b.graph.nodes[-1].attrs["padding"] = [0, 0]
    b.graph.types[x] = TensorType((BatchDim(1), width, 14, 14))
    x = b.permute(b.reshape(x, width, tokens), 0, 2, 1)
    for _ in range(blocks):
        y = b.node("layer_norm", [x, b.constant(width), b.constant(width)], {"normalized_shape": [width], "eps": 1e-6})
        y = b.permute(b.reshape(b.linear(y, 3 * width), tokens, 3, heads, width // heads), 2, 0, 3, 1, 4)
        q, k, v = (b.node("select", [y], {"axis": 0, "index": i}) for i in range(3))
        s = b.node("softmax", [b.node("matmul", [q, k], {"transpose_b": True})], {"axis": 3})
        y = b.node("matmul", [s, v], {"transpose_b": False})
        x = b.linear(b.reshape(b.permute(y, 0, 2, 1, 3), tokens, width), width, residual=x)
        y = b.node("layer_norm", [x, b.constant(width), b.constant(width)], {"normalized_shape": [width], "eps": 1e-6})
        x = b.linear(b.linear(y, 4 * width), width, residual=x)
    return b.done(b.linear(b.node("mean", [x], {"axes": [1], "keepdim": False}), 1000))


def test_the_work_of_planning_grows_with_the_depth_alone() -> None:
    """Function calls and memory: planning looks at shapes only, and at every node a few times."""
    calls, peaks = [], []
    for blocks in (3, 12):
        graph = vision_transformer(blocks)
        ranges, eligible = random_ranges(graph), {n.name for n in layers(graph)[1:]}
        with cProfile.Profile() as profile:
            plan = plan_layout(graph, ranges, 16, eligible)
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
        tracemalloc.start()
        plan_layout(graph, ranges, 16, eligible)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert not plan.frozen and len(plan.segments) == 1 + blocks * (12 + 1)
        assert all(plan.permutation(n.inputs[0]) is not None for n in layers(graph)[1:])
    print(calls, peaks)
    assert calls[1] < 5 * calls[0] and peaks[1] < 5 * peaks[0]


def _zeros(b: Build, *shape: int) -> str:
    name = f"c{len(b.graph.constants)}"
    b.graph.constants[name] = np.broadcast_to(np.zeros(1, np.float32), shape)
    return name
