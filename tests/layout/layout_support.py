"""Small graphs with integer weights, and the checks that every layout test uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bitdial.graph import Graph, Node, TensorType, verify
from bitdial.graph.interpreter import evaluate_node
from bitdial.graph.ir import BatchDim
from bitdial.graph.verify import infer_shape
from bitdial.layout import LayoutPlan, LayoutReport, apply_layout, plan_layout

RELU = {"kind": "relu"}
BOUNDED = {"kind": "clamp", "lo": 0.0, "hi": 15.0}  # keeps integers small, so that every sum is exact


class Build:
    """Builds a graph node by node; weights are small integers, so that sums are exact in any order."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = Graph(["x"], [], [], {}, {"x": TensorType((BatchDim(1), *shape))})

    def node(self, op: str, inputs: list[str], attrs: dict[str, Any] | None = None, **roles: str | None) -> str:
        node = Node(f"{op.replace('.', '_')}_{len(self.graph.nodes)}", op, inputs, attrs or {}, **roles)
        shape = infer_shape(node, self.graph)
        assert shape is not None
        self.graph.types[node.name] = TensorType(shape)
        self.graph.nodes.append(node)
        return node.name

    def constant(self, *shape: int) -> str:
        name = f"c{len(self.graph.constants)}"
        self.graph.constants[name] = self.rng.integers(-2, 3, shape).astype(np.float32)
        return name

    def shape(self, value: str) -> tuple[Any, ...]:
        return self.graph.types[value].shape

    def conv(
        self,
        x: str,
        out: int,
        kernel: int = 1,
        *,
        groups: int = 1,
        stride: int = 1,
        residual: str | None = None,
        weight: str | None = None,
        activation: dict[str, Any] | None = BOUNDED,
    ) -> str:
        attrs: dict[str, Any] = {
            "stride": [stride] * 2,
            "padding": [kernel // 2] * 2,
            "dilation": [1, 1],
            "groups": groups,
        }
        if activation is not None:
            attrs["activation"] = dict(activation)
        weight = weight or self.constant(out, self.shape(x)[1] // groups, kernel, kernel)
        return self.node("conv", [x], attrs, weight=weight, bias=self.constant(out), residual=residual)

    def linear(self, x: str, out: int, activation: dict[str, Any] | None = BOUNDED, residual: str | None = None) -> str:
        attrs = {} if activation is None else {"activation": dict(activation)}
        weight = self.constant(out, self.shape(x)[-1])
        return self.node("linear", [x], attrs, weight=weight, bias=self.constant(out), residual=residual)

    def reshape(self, x: str, *shape: Any) -> str:
        return self.node("reshape", [x], {"shape": [["N", 1], *shape]})

    def permute(self, x: str, *axes: int) -> str:
        return self.node("permute", [x], {"axes": list(axes)})

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        return self.node("slice", [x], {"axis": axis, "start": start, "stop": stop, "step": step})

    def pad_channels(self, x: str, before: int, after: int) -> str:
        rank = len(self.shape(x))
        return self.node("pad", [x], {"pads": [[0, 0], [before, after]] + [[0, 0]] * (rank - 2), "value": 0.0})

    def add(self, a: str, b: str) -> str:
        return self.node("add", [a, b], {"activation": dict(BOUNDED)})

    def pool(self, x: str, op: str = "max_pool") -> str:
        attrs: dict[str, Any] = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil_mode": False}
        attrs |= {"dilation": [1, 1]} if op == "max_pool" else {"count_include_pad": True}
        return self.node(op, [x], attrs)

    def done(self, *outputs: str) -> Graph:
        self.graph.outputs = list(outputs)
        verify(self.graph)
        return self.graph


def layers(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op in ("conv", "linear")]


def feature_channels(graph: Graph, node: Node) -> int:
    shape = graph.types[node.inputs[0]].shape
    return int(shape[1] if node.op == "conv" else shape[-1])  # type: ignore[arg-type]


def random_ranges(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n.inputs[0]: np.exp2(rng.uniform(0, 7, feature_channels(graph, n))) for n in layers(graph)}


def default_eligible(graph: Graph) -> set[str]:
    """All conv and linear layers but the first."""
    return {n.name for n in layers(graph)[1:]}


def integers(graph: Graph, seed: int = 0, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = [batch, *graph.types[graph.inputs[0]].shape[1:]]
    return torch.randint(-3, 4, shape, generator=generator).double()  # type: ignore[arg-type]


def values_of(graph: Graph, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Values by name and outputs, computed in float64 as x is: constants of float32 are widened."""
    seen: dict[str, torch.Tensor] = {
        k: torch.from_numpy(v.astype(np.float64) if v.dtype == np.float32 else np.array(v)) for k, v in graph.constants.items()
    }
    seen[graph.inputs[0]] = x
    with torch.no_grad():
        for node in graph.nodes:
            seen[node.name] = evaluate_node(node, [seen[v] for v in node.operands()], len(x))
    return {k: v for k, v in seen.items() if k not in graph.constants}, [seen[v] for v in graph.outputs]


def fold(
    graph: Graph, ranges: dict[str, np.ndarray] | None = None, **kwargs: Any
) -> tuple[LayoutPlan, Graph, LayoutReport]:
    """Plan and fold; checks that the graph handed in stays as it was and that the result verifies."""
    before, constants = str(graph), {k: v.copy() for k, v in graph.constants.items()}
    kwargs.setdefault("eligible", default_eligible(graph))
    plan = plan_layout(graph, ranges or random_ranges(graph), kwargs.pop("group_size", 4), **kwargs)
    folded, report = apply_layout(graph, plan)
    assert str(graph) == before
    for name, array in constants.items():
        np.testing.assert_array_equal(graph.constants[name], array)
    verify(folded)
    return plan, folded, report


def check_exact(graph: Graph, plan: LayoutPlan, folded: Graph, seed: int = 0) -> int:
    """Original and folded graph agree bit for bit: outputs as they are, every value under its permutation.

    Returns the number of values that really are permuted.
    """
    x = integers(graph, seed)
    old, old_outputs = values_of(graph, x)
    new, new_outputs = values_of(folded, x)
    for a, b in zip(old_outputs, new_outputs, strict=True):
        assert torch.equal(a, b)
    moved = 0
    for name, tensor in old.items():
        if name not in plan.orders:
            assert torch.equal(tensor, new[name]), name
            continue
        permutation = plan.permutation(name)
        if permutation is None:
            continue  # heads on an axis of their own
        axis = plan.orders[name].labels.moving_axis
        assert axis is not None
        assert sorted(permutation) == list(range(tensor.shape[axis]))
        assert torch.equal(tensor.index_select(axis, torch.from_numpy(permutation)), new[name]), name
        moved += 1
    return moved


def check_sorted(plan: LayoutPlan) -> None:
    for segment in plan.segments:
        keys = segment.keys[~np.isnan(segment.keys)]
        assert (np.diff(keys) >= 0).all()


def check_layers(graph: Graph, plan: LayoutPlan, folded: Graph) -> int:
    """Each layer alone, with integer weights and inputs: permuted inputs give exactly the permuted accumulators.

    Returns the number of layers whose inputs are permuted.
    """
    generator = torch.Generator().manual_seed(1)
    new_nodes = folded.producers()
    count = 0
    for node in layers(graph):
        batch = 2
        shape = [d.factor * batch if isinstance(d, BatchDim) else d for d in graph.types[node.inputs[0]].shape]
        x = torch.randint(-127, 128, shape, generator=generator).double()
        columns, rows = plan.permutation(node.inputs[0]), plan.permutation(node.name)
        contracted = 1 if node.op == "conv" else x.dim() - 1
        new_x = x
        reordered = new_nodes[node.name].inputs[0] != node.inputs[0]
        if columns is not None and not reordered:
            new_x = x.index_select(contracted, torch.from_numpy(columns))
            count += 1
        outputs = []
        for g, n, data in ((graph, node, x), (folded, new_nodes[node.name], new_x)):
            alone = Node(
                n.name, n.op, n.inputs, {k: v for k, v in n.attrs.items() if k != "activation"}, n.weight, n.bias
            )
            operands = [data]
            for role in (n.weight, n.bias):
                if role is not None:
                    operands.append(torch.from_numpy(np.rint(g.constants[role].astype(np.float64) * 256)))
            outputs.append(evaluate_node(alone, operands, batch))
        if rows is not None:
            outputs[0] = outputs[0].index_select(contracted, torch.from_numpy(rows))
        assert torch.equal(*outputs), node.name
    return count
