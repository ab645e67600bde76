"""Functions that reach a little below zero are lifted above it, and the float network stays what it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.export.onnx import export_onnx
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import evaluate_node, run_graph
from bitdial.graph.ir import Graph, Node
from bitdial.graph.operators import OPERATORS
from bitdial.graph.passes import optimize
from bitdial.graph.verify import verify
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.domains import non_negative_values
from bitdial.quantization.lift import lift

ACTIVATIONS: dict[str, nn.Module] = {
    "gelu": nn.GELU(), "gelu, tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
}  # fmt: skip


def graph_of(model: nn.Module, *shape: int) -> tuple[Graph, Tensor]:
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)) * 3.0
    return optimize(capture(model.eval(), [x])), x


def raised(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if "raised" in node.attrs]


@pytest.mark.parametrize("op", [name for name, operator in OPERATORS.items() if operator.depth])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_depth_is_that_of_the_function(op: str, approximate: str) -> None:
    x = torch.linspace(-30.0, 30.0, 600_001)
    lowest = -float(evaluate_node(Node("f", op, ["x"], {"approximate": approximate}), [x], 1).min())
    assert 0.0 <= OPERATORS[op].depth - lowest < 2e-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_the_network_stays_what_it_is(kind: str, name: str, bias: bool) -> None:
    torch.manual_seed(1)
    if kind == "linear":
        graph, x = graph_of(nn.Sequential(nn.Linear(6, 12), ACTIVATIONS[name], nn.Linear(12, 5, bias=bias)), 4, 6)
    else:
        graph, x = graph_of(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ACTIVATIONS[name], nn.Conv2d(8, 6, 2, groups=2, bias=bias)), 3, 6, 6
        )
    before = [node.bias for node in graph.nodes]
    lifted = lift(graph)
    verify(lifted)
    assert raised(lifted) == [name.partition(",")[0]] and not raised(graph) and before == [node.bias for node in graph.nodes]
    function = next(node.name for node in lifted.nodes if "raised" in node.attrs)
    assert function in non_negative_values(lifted) and function not in non_negative_values(graph)
    torch.testing.assert_close(run_graph(lifted, [x])[0], run_graph(graph, [x])[0], rtol=1e-4, atol=1e-5)


class _Read(nn.Module):
    """A GELU that something else reads, or that a layer does not take back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1 if how == "padding" else 0)
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = nn.functional.gelu(self.first(x))
        if self.how == "output":
            return self.second(y), y
        if self.how == "residual":
            return self.third(y) + y
        return self.second(y.flip(2) if self.how == "another operator" else y)


@pytest.mark.parametrize("how", ["padding", "output", "residual", "another operator", "ignored"])
def test_where_it_stays(how: str) -> None:
    torch.manual_seed(2)
    graph, x = graph_of(_Read(how), 4, 6, 6)
    ignored = ("second",) if how == "ignored" else ()
    assert raised(lift(graph)) == (["gelu"] if how == "ignored" else [])
    lifted = lift(graph, ignored)
    assert not raised(lifted)
    for one, other in zip(run_graph(lifted, [x]), run_graph(graph, [x]), strict=True):
        assert torch.equal(one, other)


def test_it_halves_the_step_and_can_be_left_out(helpers: Any) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(4)) * 4.0
    with torch.no_grad():
        exact = model(x)
    found = {}
    for on in (False, True):
        config = QuantizeConfig(target="paper", group_size=8, calibration_images=64, selector="greedy", lift=on)
        program = quantize_prepared(prepare(model, [x], config), config)
        value = next(step for step in program.instructions if step.operation == "table")
        outputs = ReferenceEngine(program).run(x, 0.0)
        found[on] = program.qparams[value.name], helpers.snr(exact, torch.as_tensor(np.asarray(outputs)))
    (signed, without), (unsigned, with_it) = found[False], found[True]
    assert signed.signed and not unsigned.signed and unsigned.scale < 0.6 * signed.scale and with_it > without


def test_a_raised_function_in_float_is_exported(tmp_path: Any) -> None:
    """Functions between float operators are not lifted, but the graph may hold them: they are written as what they are."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(6))
    config = QuantizeConfig(target="paper", group_size=8, calibration_images=32, selector="greedy")
    prepared = prepare(model, [x], config)
    assert raised(prepared.graph) == ["gelu"]
    second = [node for node in prepared.graph.nodes if node.op == "linear"][-1]
    second.attrs["precision"] = "float32"
    program = quantize_prepared(prepared, config)
    path = tmp_path / "model.onnx"
    export_onnx(program, path, 0.0)
    session = onnxruntime.InferenceSession(str(path))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, np.asarray(ReferenceEngine(program).run(x, 0.0)), rtol=1e-3, atol=1e-3)
