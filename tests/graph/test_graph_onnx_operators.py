"""Every ONNX converter against ONNX Runtime: shapes and attributes drawn at random, files with an open batch and a batch of 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")
from onnx import helper
from onnx_models import check

from bitdial.errors import CaptureError
from bitdial.graph.onnx.table import CONVERTERS

FOLDER = Path(tempfile.mkdtemp(prefix="bitdial_onnx_"))
few = settings(max_examples=20, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
SEEN: set[str] = set()


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    if np.dtype(dtype).kind == "b":
        return rng.random(shape) > 0.5
    return rng.standard_normal(shape).astype(dtype) if np.dtype(dtype).kind == "f" else rng.integers(-4, 5, shape).astype(dtype)


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    SEEN.add(op)
    return helper.make_node(op, ["" if v == "-" else v for v in inputs.split()], outputs.split(), **attributes)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def draw_list(data: Any, low: int, high: int, n: int) -> list[int]:
    return data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))


# ---- layers


@few
@given(st.data(), st.booleans())
def test_conv(data: Any, fixed: bool) -> None:
    rank = data.draw(st.integers(1, 3))
    groups, each, out = (data.draw(st.integers(1, 2)) for _ in range(3))
    kernel, stride, dilation = (draw_list(data, 1, 3, rank) for _ in range(3))
    attributes: dict[str, Any] = {"group": groups, "strides": stride, "dilations": dilation}
    auto = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        attributes["pads"] = draw_list(data, 0, 2, 2 * rank)
    else:
        attributes |= {"auto_pad": auto, "dilations": dilation if auto == "VALID" else [1] * rank}
    x = numbers(2, groups * each, *draw_list(data, 7, 9, rank))
    constants = {"w": numbers(groups * out, each, *kernel, seed=1)}
    bias = data.draw(st.booleans())
    constants |= {"b": numbers(groups * out, seed=2)} if bias else {}
    graph = check(FOLDER, [node("Conv", "x w b" if bias else "x w", **attributes)], {"x": x}, constants, fixed=fixed)
    assert [n.op for n in graph.nodes if n.op != "pad"] == ["conv"]


@few
@given(st.data())
def test_conv_transpose(data: Any) -> None:
    rank = data.draw(st.integers(1, 3))
    groups, stride = data.draw(st.integers(1, 2)), draw_list(data, 1, 3, rank)
    kernel, dilation = draw_list(data, 2, 3, rank), draw_list(data, 1, 2, rank)
    attributes: dict[str, Any] = {"group": groups, "strides": stride, "dilations": dilation}
    kind = data.draw(st.sampled_from(["pads", "uneven", "output_padding", "same"]))
    if kind == "uneven":
        attributes["pads"] = draw_list(data, 0, 1, 2 * rank)
    elif kind == "same":
        attributes |= {"auto_pad": "SAME_UPPER", "strides": [1] * rank}
    else:
        attributes["pads"] = [1] * 2 * rank
        attributes["output_padding"] = [s - 1 if kind == "output_padding" else 0 for s in stride]
    x, w = numbers(2, 2 * groups, *draw_list(data, 4, 5, rank)), numbers(2 * groups, 3, *kernel, seed=1)
    check(FOLDER, [node("ConvTranspose", "x w", **attributes)], {"x": x}, {"w": w})


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@few
@given(data=st.data(), fixed=st.booleans())
def test_pools(data: Any, op: str, fixed: bool) -> None:
    rank = data.draw(st.integers(1, 3))
    kernel, stride = draw_list(data, 2, 3, rank), draw_list(data, 1, 3, rank)
    uneven = data.draw(st.booleans())
    pads = draw_list(data, 0, 1, 2 * rank) if uneven else draw_list(data, 0, 1, rank) * 2
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads}
    if not uneven:
        attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    if op == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    elif not uneven:
        attributes["dilations"] = draw_list(data, 1, 2, rank)
    x = numbers(2, 3, *draw_list(data, 6, 9, rank))
    check(FOLDER, [node(op, "x", **attributes)], {"x": x}, fixed=fixed, opset=19)


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pools(op: str) -> None:
    check(FOLDER, [node(op, "x")], {"x": numbers(2, 3, 4, 5)})


def test_max_pool_behind_relu_pads_with_zeros_and_stays_a_pool() -> None:
    nodes = [node("Relu", "x", "r"), node("MaxPool", "r", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")]
    graph = check(FOLDER, nodes, {"x": numbers(2, 3, 8, 8)})
    assert [n.op for n in graph.nodes] == ["relu", "pad", "max_pool"]


@few
@given(st.data())
def test_gemm(data: Any) -> None:
    turned = data.draw(st.booleans())
    c = data.draw(st.sampled_from([None, (5,), (1, 5), (1,), ()]))
    alpha, beta = data.draw(st.sampled_from([1.0, 0.5])), data.draw(st.sampled_from([1.0, 2.0]))
    attributes = {"transB": int(turned), "alpha": alpha, "beta": beta}
    constants = {"w": numbers(5, 6) if turned else numbers(6, 5)} | ({} if c is None else {"c": numbers(*c, seed=3)})
    graph = check(FOLDER, [node("Gemm", "x w" if c is None else "x w c", **attributes)], {"x": numbers(3, 6)}, constants)
    assert [n.op for n in graph.nodes] == ["linear"]


def test_matrix_products() -> None:
    x, y = numbers(2, 4, 6), numbers(2, 6, 3, seed=1)
    graph = check(FOLDER, [node("MatMul", "x z", "y")], {"x": x, "z": y})
    assert [n.op for n in graph.nodes] == ["matmul"]
    for shape in ((6, 5), (1, 6, 5)):
        nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "y")]
        graph = check(FOLDER, nodes, {"x": x}, {"w": numbers(*shape), "b": numbers(5)})
        assert [n.op for n in graph.nodes] == ["linear"] and graph.nodes[0].bias is not None
    check(FOLDER, [node("MatMul", "w x", "y")], {"x": x}, {"w": numbers(3, 4)})
    with pytest.raises(CaptureError, match="the batch with itself"):
        check(FOLDER, [node("Gemm", "x z c", "y", transB=1)], {"x": numbers(3, 6), "z": numbers(3, 6)}, {"c": numbers(3)})
    check(FOLDER, [node("Einsum", "x w", "y", equation="bij, jk -> bik")], {"x": x}, {"w": numbers(6, 5)})


def test_norms() -> None:
    x, vector = numbers(2, 6, 5), numbers(6, seed=1)
    four = {"s": vector, "b": vector[::-1].copy(), "m": vector * 2, "v": np.abs(vector) + 0.5}
    graph = check(FOLDER, [node("BatchNormalization", "x s b m v", epsilon=1e-3)], {"x": x}, four)
    assert [n.op for n in graph.nodes] == ["batch_norm"]
    check(FOLDER, [node("LayerNormalization", "x s", axis=-2)], {"x": x}, {"s": numbers(6, 5)}, opset=17)
    graph = check(FOLDER, [node("LayerNormalization", "x s b")], {"x": x}, {"s": numbers(5), "b": numbers(5, seed=2)}, opset=17)
    assert [n.op for n in graph.nodes] == ["layer_norm"]
    pair = {"s": vector, "b": four["b"]}
    check(FOLDER, [node("InstanceNormalization", "x s b")], {"x": x}, pair)
    check(FOLDER, [node("GroupNormalization", "x s b", num_groups=2)], {"x": x}, pair, opset=21)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@settings(max_examples=8)
@given(opset=st.sampled_from([11, 13]), axis=st.integers(1, 3), negative=st.booleans())
def test_softmax(opset: int, axis: int, negative: bool, op: str) -> None:
    check(FOLDER, [node(op, "x", axis=axis - 4 if negative else axis)], {"x": numbers(2, 3, 4, 5)}, opset=opset)


# ---- value by value

UNARY: list[tuple[str, dict[str, Any], int]] = [
    *((op, {}, 17) for op in "Relu Sigmoid Tanh Softplus Mish HardSwish Abs Neg Exp Erf Floor Ceil Round Sign Sin Cos Atan Sinh "
      "Cosh Softsign Tan Elu Selu Celu LeakyRelu HardSigmoid Identity".split()),
    ("LeakyRelu", {"alpha": 0.3}, 17), ("Elu", {"alpha": 0.7}, 17), ("Selu", {"alpha": 1.5, "gamma": 1.1}, 17),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, 17), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, 17),
    ("Celu", {"alpha": 0.7}, 17),
    ("Gelu", {}, 20), ("Gelu", {"approximate": "tanh"}, 20),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "opset"), UNARY)
def test_unary(op: str, attributes: dict[str, Any], opset: int) -> None:
    opset = 18 if op == "Mish" else opset
    check(FOLDER, [node(op, "x", **attributes)], {"x": 2 * numbers(2, 30)}, opset=opset)


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Reciprocal", "Asin", "Acos"])
def test_unary_on_part_of_the_numbers(op: str) -> None:
    check(FOLDER, [node(op, "x")], {"x": np.random.default_rng(1).uniform(0.1, 0.9, (2, 30)).astype(np.float32)})


@few
@given(st.sampled_from([None, -1.0, 0.0]), st.sampled_from([None, 0.5, 6.0]))
def test_clip(low: float | None, high: float | None) -> None:
    names = f"x {'-' if low is None else 'lo'} {'-' if high is None else 'hi'}"
    constants = {k: np.array(v, np.float32) for k, v in (("lo", low), ("hi", high)) if v is not None}
    check(FOLDER, [node("Clip", names)], {"x": 5 * numbers(2, 30)}, constants)


@pytest.mark.parametrize("first", ["Max", "Min", "Clip", "Relu"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 0.5), (0.0, 2.0)])
def test_bounds_one_by_one_are_a_clamp(first: str, low: float, high: float) -> None:
    low = 0.0 if first == "Relu" else low
    names = {"Max": "x lo", "Min": "hi x", "Clip": "x lo", "Relu": "x"}
    nodes = [node(first, names[first], "m"), node("Max", "m lo") if first == "Min" else node("Min", "m hi")]
    graph = check(FOLDER, nodes, {"x": 5 * numbers(2, 30)}, {"lo": np.array(low, np.float32), "hi": np.array(high, np.float32)})
    assert [n.op for n in graph.nodes] == ["relu6" if (low, high) == (0.0, 6.0) else "clamp"]


@pytest.mark.parametrize("op", "Add Sub Mul Div Pow Min Max PRelu".split())
@settings(max_examples=8)
@given(shape=st.sampled_from([(), (1,), (4,), (3, 1), (1, 3, 1), (2, 3, 4)]), swapped=st.booleans())
def test_of_two_operands(op: str, shape: tuple[int, ...], swapped: bool) -> None:
    x, c = numbers(2, 3, 4), np.abs(numbers(*shape, seed=1)) + np.float32(0.5)
    x = np.abs(x) + 0.1 if op in ("Pow", "Div") else x
    whole = shape == (2, 3, 4)
    names = "c x" if swapped and op != "PRelu" else "x c"
    check(FOLDER, [node(op, names)], {"x": x, "c": c} if whole else {"x": x}, {} if whole else {"c": c})


@pytest.mark.parametrize("op", "Equal Less LessOrEqual Greater GreaterOrEqual".split())
def test_comparisons(op: str) -> None:
    x = numbers(2, 30, dtype=np.int64)
    check(FOLDER, [node(op, "x c")], {"x": x}, {"c": ints(1)}, dtype="bool")


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op: str) -> None:
    x = numbers(2, 30, dtype=bool)
    check(FOLDER, [node(op, "x z", "t"), node("Not", "t")], {"x": x, "z": x[::-1].copy()}, dtype="bool")


def test_masks_integers_and_casts() -> None:
    x, i = numbers(2, 30), numbers(2, 30, dtype=np.int64)
    nodes = [node("Cast", "i", "b", to=9), node("Where", "b x c", "w"), node("Cast", "w", "d", to=1), node("Sum", "d x d", "y")]
    check(FOLDER, nodes, {"x": x, "i": i}, {"c": np.float32([-3.0])})
    check(FOLDER, [node("Div", "i c", "y")], {"i": i}, {"c": ints(3)}, dtype="int64")
    check(FOLDER, [node("Mod", "i c", "y")], {"i": i}, {"c": ints(3)}, dtype="int64")
    check(FOLDER, [node("IsNaN", "x")], {"x": x}, dtype="bool")
    check(FOLDER, [node("CumSum", "i a", "y")], {"i": i}, {"a": ints(1)}, dtype="int64")


@pytest.mark.parametrize("op", [f"Reduce{name}" for name in "Mean Sum Max Min L1 L2 LogSumExp SumSquare Prod".split()])
@settings(max_examples=6)
@given(
    axes=st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True), keepdims=st.integers(0, 1),
    opset=st.sampled_from([11, 18]), fixed=st.booleans(),
)  # fmt: skip
def test_reductions(op: str, axes: list[int], keepdims: int, opset: int, fixed: bool) -> None:
    as_input = opset >= 18 or (op == "ReduceSum" and opset >= 13)
    attributes = {"keepdims": keepdims} | ({} if as_input else {"axes": axes})
    reduced = node(op, "x a" if as_input else "x", **attributes)
    check(FOLDER, [reduced], {"x": numbers(2, 3, 4, 5)}, {"a": ints(*axes)} if as_input else {}, opset=opset, fixed=fixed)


def test_positions() -> None:
    x = numbers(2, 3, 7)
    for op in ("ArgMax", "ArgMin"):
        check(FOLDER, [node(op, "x", axis=2, keepdims=0)], {"x": x}, dtype="int64")
    check(FOLDER, [node("TopK", "x k", "y i", axis=-1)], {"x": x}, {"k": ints(3)})
    check(FOLDER, [node("GatherElements", "x i", axis=2)], {"x": x, "i": np.abs(numbers(2, 3, 4, dtype=np.int64))})


# ---- movement


@few
@given(st.permutations([1, 2, 3]), st.booleans())
def test_transpose(axes: list[int], fixed: bool) -> None:
    check(FOLDER, [node("Transpose", "x", perm=[0, *axes])], {"x": numbers(2, 3, 4, 5)}, fixed=fixed)


@few
@given(st.data(), st.booleans())
def test_slice(data: Any, fixed: bool) -> None:
    axes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3, unique=True))
    n = len(axes)
    steps = [data.draw(st.sampled_from([-2, -1, 1, 2])) for _ in axes]
    starts, ends = draw_list(data, -6, 6, n), [data.draw(st.sampled_from([-9, -3, 0, 2, 5, 2**31])) for _ in axes]
    constants = {"s": ints(*starts), "e": ints(*ends), "a": ints(*axes), "t": ints(*steps)}
    check(FOLDER, [node("Slice", "x s e a t")], {"x": numbers(2, 6, 7, 5)}, constants, fixed=fixed)


def test_a_reversed_slice_that_starts_before_the_axis_takes_its_first_place() -> None:
    ends = {"s": ints(-9), "e": ints(-12), "a": ints(1), "t": ints(-2)}
    check(FOLDER, [node("Slice", "x s e a t")], {"x": numbers(2, 6)}, ends)
    nodes = [node("Shape", "x", "n"), node("Slice", "n s e zero t", "first"), node("Cast", "first", "c", to=1)]
    nodes.append(node("Add", "x c"))
    check(FOLDER, nodes, {"x": numbers(2, 6)}, {**ends, "zero": ints(0), "s": ints(-1), "e": ints(-2), "t": ints(-1)})


@few
@given(st.lists(st.integers(1, 3), min_size=2, max_size=3), st.booleans())
def test_split_and_concat(lengths: list[int], fixed: bool) -> None:
    parts = " ".join(f"p{i}" for i in range(len(lengths)))
    nodes = [node("Split", "x l", parts, axis=1), node("Concat", " ".join([*parts.split()[::-1], "c"]), axis=1)]
    constants = {"l": ints(*lengths), "c": numbers(1, 2, 4, seed=9)}
    if not fixed:  # a constant of one sample goes with one sample only
        nodes[1] = node("Concat", " ".join(parts.split()[::-1]), axis=1)
    check(FOLDER, nodes, {"x": numbers(2, sum(lengths), 4)}, constants, fixed=fixed)


def test_split_without_lengths() -> None:
    check(FOLDER, [node("Split", "x", "y z", axis=2)], {"x": numbers(2, 3, 6)}, outputs=("y", "z"))
    split = node("Split", "x", "y z", axis=2, num_outputs=2)
    check(FOLDER, [split], {"x": numbers(2, 3, 7)}, outputs=("y", "z"), opset=18)


@pytest.mark.parametrize("indices", [np.array(1), np.array(-1), ints(0, 1), ints(2, 0, 0), ints(0, 2, 1, 1).reshape(2, 2)])
def test_gather(indices: np.ndarray) -> None:
    check(FOLDER, [node("Gather", "x i", axis=1)], {"x": numbers(2, 3, 4)}, {"i": indices.astype(np.int64)})


@pytest.mark.parametrize("table", [(9, 4), (9,), (9, 2, 3)])
def test_embedding(table: tuple[int, ...]) -> None:
    i = np.abs(numbers(2, 5, dtype=np.int64))
    check(FOLDER, [node("Gather", "t i")], {"i": i}, {"t": numbers(*table)})


@few
@given(st.data(), st.sampled_from(["constant", "reflect", "edge"]), st.booleans())
def test_pad(data: Any, mode: str, fixed: bool) -> None:
    before, after = draw_list(data, -1, 2, 2), draw_list(data, 0, 2, 2)
    pads = ints(0, 0, *before, 0, 0, *after)
    if mode != "constant" and min(before) < 0:
        pads = np.maximum(pads, 0)
    check(FOLDER, [node("Pad", "x p v", mode=mode)], {"x": numbers(2, 3, 6, 5)}, {"p": pads, "v": np.float32(0.5)}, fixed=fixed)


SHAPES = [(0, -1), (-1, 24), (0, 0, 24 // 4), (0, 2, 2, 6), (0, 24, 1)]


@pytest.mark.parametrize("target", SHAPES)
def test_reshape(target: tuple[int, ...]) -> None:
    check(FOLDER, [node("Reshape", "x s")], {"x": numbers(2, 4, 6)}, {"s": ints(*target)})


@pytest.mark.parametrize("target", [*SHAPES, (1, -1), (1, 24), (1, 2, 12), (1, 1, 24), (-1, 4, 6)])
def test_reshape_of_a_batch_of_one(target: tuple[int, ...]) -> None:
    check(FOLDER, [node("Reshape", "x s")], {"x": numbers(2, 4, 6)}, {"s": ints(*target)}, fixed=True)


def test_windows_of_a_batch_of_one_fold_into_any_batch() -> None:
    nodes = [
        node("Reshape", "x a", "r"), node("Transpose", "r", "t", perm=[0, 1, 3, 2, 4, 5]), node("Reshape", "t b", "w"),
        node("Softmax", "w", "v", axis=1), node("Reshape", "v c", "u"), node("Transpose", "u", "s", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "s d", "y"),
    ]  # fmt: skip
    constants = {"a": ints(1, 2, 2, 3, 2, 5), "b": ints(-1, 4, 5), "c": ints(1, 2, 3, 2, 2, 5), "d": ints(1, 4, 6, 5)}
    graph = check(FOLDER, nodes, {"x": numbers(3, 4, 6, 5)}, constants, fixed=True)
    assert "6N" in str(graph)


def test_small_movements() -> None:
    x = numbers(2, 1, 4, 1)
    for opset, form in ((11, "attribute"), (13, "input")):
        for op, axes in (("Squeeze", [1, -1]), ("Unsqueeze", [1, 5])):
            attributes, more = ({"axes": axes}, {}) if form == "attribute" else ({}, {"a": ints(*axes)})
            check(FOLDER, [node(op, "x a" if more else "x", **attributes)], {"x": x}, more, opset=opset)
    check(FOLDER, [node("Flatten", "x")], {"x": numbers(2, 3, 4)})
    check(FOLDER, [node("Flatten", "x", axis=2)], {"x": numbers(2, 3, 4)})
    for shape in ((1, 3, 4, 2), (3, 1, 1), (1,)):
        check(FOLDER, [node("Expand", "x s")], {"x": x}, {"s": ints(*shape)})
    check(FOLDER, [node("Tile", "x r")], {"x": x}, {"r": ints(1, 3, 1, 2)})
    check(FOLDER, [node("Tile", "x r")], {"x": x}, {"r": ints(1, 3, 2, 2)})
    check(FOLDER, [node("Trilu", "x", upper=0)], {"x": numbers(2, 4, 4)})
    check(FOLDER, [node("Dropout", "x")], {"x": x})
    for mode in ("DCR", "CRD"):
        check(FOLDER, [node("DepthToSpace", "x", blocksize=2, mode=mode)], {"x": numbers(2, 8, 3, 4)})
    check(FOLDER, [node("SpaceToDepth", "x", blocksize=2)], {"x": numbers(2, 3, 4, 6)})


@few
@given(
    st.sampled_from(["nearest", "linear", "cubic"]), st.integers(1, 3), st.booleans(),
    st.sampled_from(["asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]), st.sampled_from([2.0, 3.0, 0.5, 1.7]),
)  # fmt: skip
def test_resize(mode: str, rank: int, by_size: bool, place: str, rounding: str, scale: float) -> None:
    size, rank = 6, 2 if mode == "cubic" else rank
    attributes = {"mode": mode, "coordinate_transformation_mode": place}
    attributes |= {"nearest_mode": rounding} if mode == "nearest" else {}
    x = numbers(2, 2, *[size] * rank)
    if by_size:
        nodes = [
            node("Shape", "x", "all"), node("Slice", "all a b", "n"), node("Concat", "n size", "s", axis=0),
            node("Resize", "x - - s", **attributes),
        ]  # fmt: skip
        constants = {"a": ints(0), "b": ints(2), "size": ints(*[int(size * scale)] * rank)}
    else:
        nodes, constants = [node("Resize", "x - s", **attributes)], {"s": np.float32([1, 1, *[scale] * rank])}
    if mode != "nearest" and (place == "asymmetric" or rank > 2):
        with pytest.raises(CaptureError, match="interpolation"):
            check(FOLDER, nodes, {"x": x}, constants)
    else:
        check(FOLDER, nodes, {"x": x}, constants, tolerance=2e-4)


# ---- sizes


def test_sizes_of_the_batch_are_followed() -> None:
    """What exporters write between Shape and Reshape, Expand and ConstantOfShape."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s one", "c"), node("Mul", "n c", "nc"),
        node("Unsqueeze", "nc first", "ncs"), node("Concat", "ncs tail", "target", axis=0), node("Reshape", "x target", "flat"),
        node("Div", "nc c", "back"), node("Unsqueeze", "back first", "b"), node("Slice", "s sa sb", "rest"),
        node("Cast", "rest", "rest32", to=6), node("Cast", "rest32", "rest64", to=7), node("Concat", "b rest64", "whole", axis=0),
        node("Reshape", "flat whole", "same"), node("Size", "s", "rank"), node("Unsqueeze", "rank first", "ranks"),
        node("ConstantOfShape", "ranks", "ones", value=helper.make_tensor("v", 7, [1], [1])), node("Mul", "ones minus", "marks"),
        node("Equal", "whole marks", "open"), node("Where", "open ones whole", "full"),
        node("ReduceProd", "rest", "area", keepdims=0),
        node("Expand", "token full", "tokens"), node("Add", "same tokens", "sum"), node("Squeeze", "b first", "b0"),
        node("Sub", "b0 b0", "nothing"), node("Range", "nothing c one", "places"), node("Cast", "places", "shift", to=1),
        node("Reshape", "shift column", "shifts"), node("Add", "sum shifts", "moved"), node("Cast", "area", "areaf", to=1),
        node("Div", "moved areaf", "z"), node("ConstantOfShape", "whole", "nil"), node("Add", "z nil", "y"),
    ]  # fmt: skip
    constants = {
        "zero": np.array(0), "one": np.array(1), "first": ints(0), "tail": ints(5), "sa": ints(1), "sb": ints(2**31),
        "minus": ints(-1), "token": numbers(1, 1, 5), "column": ints(-1, 1),
    }  # fmt: skip
    check(FOLDER, nodes, {"x": numbers(3, 4, 5)}, constants)


def test_a_size_that_is_no_multiple_of_the_batch_is_refused() -> None:
    nodes = [
        node("Shape", "x", "s"), node("Add", "s one", "more"), node("ConstantOfShape", "more", "c"), node("ReduceSum", "c", "y"),
    ]  # fmt: skip
    with pytest.raises(CaptureError, match="Add.*batch size"):
        check(FOLDER, nodes, {"x": numbers(3, 4)}, {"one": ints(1)})


@pytest.mark.parametrize(
    ("made", "constants"),
    [
        (lambda: node("ReduceMean", "x", axes=[0]), {}),
        (lambda: node("Softmax", "x", axis=0), {}),
        (lambda: node("Concat", "x x", axis=0), {}),
        (lambda: node("Gather", "x i"), {"i": np.array(0)}),
        (lambda: node("Slice", "x a b"), {"a": ints(0), "b": ints(1)}),
        (lambda: node("Squeeze", "x a"), {"a": ints(0)}),
        (lambda: node("Flatten", "x", axis=0), {}),
        (lambda: node("Pad", "x p"), {"p": ints(1, 0, 0, 0, 0, 0)}),
    ],
)
def test_what_mixes_samples_is_refused(made: Any, constants: Any) -> None:
    made = made()
    with pytest.raises(CaptureError, match=f"{made.op_type} 'y' cannot be read: .*batch"):
        check(FOLDER, [made], {"x": numbers(1, 3, 4)}, constants, fixed=True)


def test_every_converter_was_compared() -> None:
    """Runs last in this file: an operator that is read and compared with nothing is an omission here."""
    if len(SEEN) > 60:  # not where single tests were picked
        assert set(CONVERTERS) - SEEN == {"Constant", "Swish"}
