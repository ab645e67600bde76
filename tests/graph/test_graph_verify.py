"""The verifier finds planted faults: for every rule a graph that is right, and the same graph made wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitdial.errors import GraphError
from bitdial.export.onnx.floats import FLOAT_OPS
from bitdial.export.onnx.movement import MOVEMENT as MOVES_IN_ONNX
from bitdial.graph import shapes
from bitdial.graph.aten import ALLOWED, POINTWISE, SPATIAL
from bitdial.graph.batch_axis import BatchAxis, batch_axes
from bitdial.graph.convert import CONVERTERS
from bitdial.graph.interpreter import MEANING
from bitdial.graph.ir import BatchDim, Graph, Node, TensorType
from bitdial.graph.operators import MOVEMENT, OPERATORS, UNARY, kind_of, of_kind
from bitdial.graph.passes import PASSES
from bitdial.graph.text import format_graph
from bitdial.graph.verify import verify
from bitdial.layout.rules import RULES

N = BatchDim()


def build() -> Graph:
    """One node of every operator with a rule."""
    nodes: list[Node] = []
    types: dict[str, TensorType] = {"x": TensorType((N, 4, 6, 6)), "t": TensorType((N, 3, 8))}
    constants = {
        "w": np.ones((6, 2, 3, 3), np.float32),
        "b": np.ones(6, np.float32),
        "wl": np.ones((5, 8), np.float32),
        "c6": np.ones(6, np.float32),
        "c8": np.ones(8, np.float32),
    }

    def add(name: str, op: str, inputs: list[str], shape: tuple[Any, ...], attrs: dict[str, Any] | None = None) -> Node:
        nodes.append(Node(name, op, inputs, attrs or {}))
        types[name] = TensorType(shape)
        return nodes[-1]

    conv = {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2], "groups": 2}
    add("conv", "conv", ["x"], (N, 6, 3, 2), conv)
    nodes[-1].weight, nodes[-1].bias = "w", "b"
    add("conv2", "conv", ["x"], (N, 6, 3, 2), dict(conv))
    nodes[-1].weight, nodes[-1].residual = "w", "conv"
    add("norm", "batch_norm", ["conv2", "c6", "c6", "c6", "c6"], (N, 6, 3, 2), {"eps": 1e-5})
    add("linear", "linear", ["t"], (N, 3, 5))
    nodes[-1].weight = "wl"
    add("matmul", "matmul", ["t", "t"], (N, 3, 3), {"transpose_b": True})
    add("add", "add", ["t", "c8"], (N, 3, 8))
    add("mul", "mul", ["t", "t"], (N, 3, 8))
    add("concat", "concat", ["t", "linear"], (N, 3, 13), {"axis": 2})
    pool = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil_mode": False}
    add("max_pool", "max_pool", ["x"], (N, 4, 3, 3), {**pool, "dilation": [1, 1]})
    add("avg_pool", "avg_pool", ["x"], (N, 4, 3, 3), {**pool, "count_include_pad": True})
    add("mean", "mean", ["x"], (N, 4), {"axes": [2, 3], "keepdim": False})
    add("reshape", "reshape", ["t"], (BatchDim(3), 8), {"shape": [["N", 3], 8]})
    add("permute", "permute", ["t"], (N, 8, 3), {"axes": [0, 2, 1]})
    add("expand", "expand", ["c8"], (N, 3, 8), {"shape": [["N", 1], 3, 8]})
    add("slice", "slice", ["t"], (N, 3, 3), {"axis": 2, "start": 1, "stop": 7, "step": 2})
    add("select", "select", ["t"], (N, 8), {"axis": 1, "index": 2})
    add("pad", "pad", ["t"], (N, 4, 9), {"pads": [[0, 0], [1, 0], [0, 1]], "value": 0.0})
    add("roll", "roll", ["t"], (N, 3, 8), {"shifts": [1], "axes": [2]})
    add("gather", "gather", ["t"], (N, 3, 2), {"axis": 2, "indices": [7, 0]})
    add("layer_norm", "layer_norm", ["t", "c8", "c8"], (N, 3, 8), {"normalized_shape": [8], "eps": 1e-5})
    add("softmax", "softmax", ["t"], (N, 3, 8), {"axis": 2})
    add("relu", "relu", ["t"], (N, 3, 8))
    add("other", "aten.cos.default", ["t"], (N, 3, 8), {"args": [{"value": 0}], "kwargs": {}})
    return Graph(["x", "t"], ["norm", *(n.name for n in nodes[3:])], nodes, constants, types)


def attribute(node: str, **changes: Any) -> Callable[[Graph], None]:
    return lambda g: g.node(node).attrs.update(changes)


def field(node: str, **changes: Any) -> Callable[[Graph], None]:
    def change(g: Graph) -> None:
        for name, value in changes.items():
            setattr(g.node(node), name, value)

    return change


def typed(value: str, shape: tuple[Any, ...]) -> Callable[[Graph], None]:
    def change(g: Graph) -> None:
        g.types[value] = TensorType(shape)

    return change


def of_dtype(value: str, dtype: str) -> Callable[[Graph], None]:
    def change(g: Graph) -> None:
        g.types[value] = TensorType(g.types[value].shape, dtype)

    return change


def constant(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Callable[[Graph], None]:
    def change(g: Graph) -> None:
        g.constants[name] = np.zeros(shape, dtype)

    return change


FAULTS: dict[str, tuple[Callable[[Graph], Any], str]] = {
    "input named as a constant": (lambda g: g.inputs.append("w"), "'w' has the name of a constant"),
    "input without type": (lambda g: g.types.pop("x"), "'x' has no type"),
    "name taken twice": (field("relu", name="softmax"), "'softmax': the name is taken"),
    "node named as an input": (field("relu", name="x"), "'x': the name is taken"),
    "unknown operator": (field("relu", op="launch"), "unknown operator 'launch'"),
    "operator outside the fixed list": (field("other", op="aten.system.default"), "unknown operator"),
    "operand from nowhere": (field("relu", inputs=["y"]), "operand 'y' is not defined"),
    "operand from later": (
        lambda g: g.nodes.insert(0, g.nodes.pop()) or g.nodes[0].inputs.__setitem__(0, "relu"),
        "'relu' is not defined before",
    ),
    "node without type": (lambda g: g.types.pop("relu"), "'relu' has no type"),
    "output from nowhere": (lambda g: g.outputs.append("y"), "output 'y'"),
    "conv without weight": (field("conv", weight=None), "'conv': conv has no weight"),
    "weight that is computed": (field("linear", weight="t"), "must be constants, 't'"),
    "bias that is computed": (field("conv2", bias="conv"), "must be constants, 'conv'"),
    "conv with two inputs": (field("conv", inputs=["x", "x"]), "takes one input"),
    "relu with a weight": (field("relu", weight="w"), "only conv and linear"),
    "add with a residual": (field("add", residual="t"), "only conv and linear"),
    "residual of another shape": (field("conv2", residual="x"), "residual 'x' differs"),
    "residual that is a constant": (field("conv2", residual="b"), "residual 'b' is a constant"),
    "conv channels": (attribute("conv", groups=1), "does not fit weight"),
    "conv outputs not divisible": (constant("w", (5, 2, 3, 3)), "does not fit weight"),
    "conv bias": (constant("b", (5,)), "bias does not fit"),
    "conv stride": (attribute("conv", stride=[1, 1]), "recorded type"),
    "conv stride of another rank": (attribute("conv", stride=[2]), "malformed"),
    "conv window too large": (attribute("conv", dilation=[1, 9]), "larger than the padded input"),
    "conv without attributes": (field("conv", attrs={}), "malformed"),
    "linear width": (constant("wl", (5, 9)), "does not fit weight"),
    "matmul": (attribute("matmul", transpose_b=False), "do not contract"),
    "add": (constant("c8", (7,)), "do not broadcast"),
    "add, recorded type": (typed("add", (N, 3, 1)), "recorded type"),
    "mul": (field("mul", inputs=["t", "x"]), "do not broadcast"),
    "concat, other axes": (attribute("concat", axis=1), "differ beside axis"),
    "concat, size": (field("concat", inputs=["t", "t"]), "recorded type"),
    "max_pool": (attribute("max_pool", kernel=[3, 3]), "recorded type"),
    "avg_pool": (attribute("avg_pool", padding=[1, 1]), "recorded type"),
    "mean over the batch": (attribute("mean", axes=[0, 2]), "hold the batch"),
    "mean, axes": (attribute("mean", axes=[2, 4]), "leave"),
    "mean, keepdim": (attribute("mean", keepdim=True), "recorded type"),
    "reshape": (attribute("reshape", shape=[["N", 3], 7]), "another number of elements"),
    "reshape of the batch": (attribute("reshape", shape=[["N", 1], 8]), "another number of elements"),
    "permute, one axis twice": (attribute("permute", axes=[0, 1, 1]), "no permutation"),
    "permute, result": (attribute("permute", axes=[0, 1, 2]), "recorded type"),
    "expand": (attribute("expand", shape=[["N", 1], 3, 9]), "do not broadcast"),
    "slice": (attribute("slice", stop=9), "leaves the axis"),
    "slice, step": (attribute("slice", step=1), "recorded type"),
    "select": (attribute("select", index=3), "leaves the axis"),
    "pad": (attribute("pad", pads=[[0, 0], [1, 1], [0, 1]]), "recorded type"),
    "pad of the batch": (attribute("pad", pads=[[1, 0], [1, 0], [0, 1]]), "batch dimension"),
    "roll": (attribute("roll", axes=[3]), "leave"),
    "gather": (attribute("gather", indices=[8, 0]), "leaves axis"),
    "gather, size": (attribute("gather", indices=[0]), "recorded type"),
    "batch_norm": (constant("c6", (5,)), "do not fit the channels"),
    "batch_norm, parameters missing": (field("norm", inputs=["conv2", "c6"]), "do not fit the channels"),
    "layer_norm": (attribute("layer_norm", normalized_shape=[3]), "does not fit"),
    "softmax": (attribute("softmax", axis=3), "leave"),
    "relu, recorded type": (typed("relu", (N, 3, 9)), "recorded type"),
    "slice, dtype": (of_dtype("slice", "uint8"), "it reads float32 and gives uint8"),
    "reshape, dtype": (of_dtype("reshape", "int64"), "it reads float32 and gives int64"),
    "max_pool, dtype": (of_dtype("max_pool", "float64"), "it reads float32 and gives float64"),
    "conv, dtype": (of_dtype("x", "uint8"), "it reads uint8, float32, float32 and gives float32"),
    "conv, weights": (constant("w", (6, 2, 3, 3), "float64"), "it reads float32, float64, float32 and gives float32"),
    "linear, result": (of_dtype("linear", "float16"), "it reads float32, float32 and gives float16"),
    "mean, dtype": (of_dtype("mean", "int64"), "it reads float32 and gives int64"),
    "add of a wider constant": (constant("c8", (8,), "float64"), "it reads float32, float64 and gives float32"),
    "aten, dtype": (of_dtype("other", "int64"), "recorded as int64, but gives float32"),
    "aten, another one asked for": (attribute("other", kwargs={"dtype": {"dtype": "int64"}}), "but gives int64"),
    "aten, comparison": (field("other", op="aten.isnan.default"), "recorded as float32, but gives bool"),
    "dtype that cannot be stored": (of_dtype("other", "complex64"), "values of complex64 cannot be stored"),
    "template, value": (attribute("other", args=[{"value": 1}]), "means nothing"),
    "template, dtype": (attribute("other", kwargs={"dtype": {"dtype": "load"}}), "means nothing"),
    "template, mark": (attribute("other", args=[{"module": "os"}]), "means nothing"),
    "template, output": (attribute("other", output=-1), "number of an output"),
    "structure": (lambda g: setattr(g, "structure", ["tuple", [0]]), "structure of the outputs"),
}


def test_the_right_graph_passes() -> None:
    verify(build())


@pytest.mark.parametrize("name", list(FAULTS))
def test_planted_fault(name: str) -> None:
    plant, message = FAULTS[name]
    graph = build()
    plant(graph)
    with pytest.raises(GraphError, match=message):
        verify(graph)


def test_eight_bit_values_are_told_from_integers() -> None:
    """Encoded values go through 8-bit operators only; a uint8 input is no encoded value."""
    types = {"x": TensorType((N, 8)), "q": TensorType((N, 8), "int8"), "r": TensorType((N, 8), "uint8")}
    nodes = [Node("q", "quantize", ["x"]), Node("r", "relu", ["q"])]
    graph = Graph(["x"], ["r"], nodes, {}, types)
    verify(graph, {"q", "r"})
    for encoded in ({"q"}, {"r"}, set[str]()):
        with pytest.raises(GraphError, match="does not go together"):
            verify(graph, encoded)
    nodes[1] = Node("r", "aten.neg.default", ["q"], {"args": [{"value": 0}], "kwargs": {}})
    with pytest.raises(GraphError, match="float operator reads or gives 8-bit values"):
        verify(graph, {"q"})
    types["q"] = TensorType((N, 8))
    with pytest.raises(GraphError, match="8-bit, yet recorded as float32"):
        verify(graph, {"q", "r"})


def test_every_operator_whose_shape_is_not_its_inputs_is_in_the_right_graph() -> None:
    ruled = {name for name, operator in OPERATORS.items() if operator.shape is not shapes.same}
    assert ruled <= {n.op for n in build().nodes}


def test_every_pass_knows_every_operator() -> None:
    """Passes keep dictionaries of their own by operator; what they leave out they must have a default for, by kind."""
    moves_and_borders = MOVEMENT | of_kind("border")
    assert {*MEANING, *moves_and_borders} == set(OPERATORS) and not (MOVEMENT - {"max_pool"}) & set(MEANING)
    assert {*(op for op in RULES if kind_of(op) != "aten"), *UNARY, *of_kind("border")} == set(OPERATORS)
    assert {*FLOAT_OPS, *MOVES_IN_ONNX, *of_kind("border")} == set(OPERATORS)
    assert kind_of("conv") == "contraction" and kind_of("aten.sin.default") == "aten"
    assert {name for name in (*POINTWISE, *SPATIAL) if name in ALLOWED or name in CONVERTERS} == POINTWISE | SPATIAL


def test_passes_refuse_nothing_and_change_no_input() -> None:
    graph = build()
    before = format_graph(graph)
    for rewrite in PASSES:
        verify(rewrite(graph))
        assert format_graph(graph) == before


def test_text_form() -> None:
    text = format_graph(build())
    assert text.startswith("graph(%x: float32[N, 4, 6, 6], %t: float32[N, 3, 8]):\n")
    assert (
        "  %conv: float32[N, 6, 3, 2] = conv(%x; weight=$w; bias=$b) "
        '{"dilation": [1, 2], "groups": 2, "padding": [1, 0], "stride": [2, 1]}\n' in text
    )
    assert "%reshape: float32[3N, 8] = reshape(%t)" in text and str(build()) == text
    assert "23 nodes, 5 constants" in text


def test_copies_are_independent() -> None:
    graph = build()
    other = graph.copy()
    other.node("conv").attrs["stride"][0] = 7
    other.node("relu").inputs[0] = "linear"
    other.constants["new"] = np.zeros(1)
    assert format_graph(graph) == format_graph(build())


# -- where the batch lies -----------------------------------------------------------------------------------------------


def moves(*steps: tuple[str, dict[str, Any], tuple[Any, ...]], first: tuple[Any, ...]) -> BatchAxis | None:
    """Batch axis after a chain of movements of one input."""
    types = {"x": TensorType(first)}
    nodes, value = [], "x"
    for i, (op, attrs, shape) in enumerate(steps):
        nodes.append(Node(f"n{i}", op, [value], attrs))
        value = f"n{i}"
        types[value] = TensorType(shape)
    return batch_axes(Graph(["x"], [value], nodes, {}, types))[value]


def test_batch_axis_of_windows() -> None:
    windows = (
        ("reshape", {}, (N, 2, 4, 3, 4, 8)),
        ("permute", {"axes": [0, 1, 3, 2, 4, 5]}, (N, 2, 3, 4, 4, 8)),
        ("reshape", {}, (BatchDim(6), 16, 8)),
    )
    assert moves(*windows, first=(N, 8, 12, 8)) == BatchAxis(0, 1, 6)
    back = (("reshape", {}, (N, 2, 3, 4, 4, 8)),)
    assert moves(*windows, *back, first=(N, 8, 12, 8)) == BatchAxis(0, 1, 1)


def test_batch_axis_of_time_first_attention() -> None:
    steps = (
        ("permute", {"axes": [1, 0, 2]}, (5, N, 8)),
        ("reshape", {}, (BatchDim(5), 8)),
        ("relu", {}, (BatchDim(5), 8)),
    )
    assert moves(steps[0], first=(N, 5, 8)) == BatchAxis(1, 1, 1)
    assert moves(*steps, first=(N, 5, 8)) == BatchAxis(0, 5, 1)
    heads = (steps[0], ("reshape", {}, (5, BatchDim(2), 4)), ("permute", {"axes": [1, 0, 2]}, (BatchDim(2), 5, 4)))
    assert moves(*heads, first=(N, 5, 8)) == BatchAxis(0, 1, 2)


def test_batch_axis_that_cannot_be_told() -> None:
    step = ("aten.flip.default", {"args": [], "kwargs": {}}, (3, BatchDim(4), 2))
    assert moves(step, first=(BatchDim(4), 3, 2)) is None
    assert moves(("aten.flip.default", {"args": [], "kwargs": {}}, (N, 3)), first=(N, 3)) == BatchAxis(0)
