"""Capture and passes on tricky modules: the graph computes what the module does, at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

import bitdial
from bitdial.api import QuantizedModel
from bitdial.artifact import from_bytes, to_bytes
from bitdial.errors import CaptureError
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.passes import PASSES, optimize
from bitdial.graph.verify import verify


def close(got: list[Tensor], model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    with torch.no_grad():
        expected = [v for v in _pytree.tree_leaves(model(*(x.clone() for x in inputs))) if isinstance(v, Tensor)]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_module(case: str, case_maker: Callable[[str], Any]) -> None:
    """Captured (every other one from a single sample), after every pass, and optimized: outputs as the module's at
    batches of 1, 3 and 7."""
    make_model, make_inputs = case_maker(case)
    torch.manual_seed(0)
    model = make_model().eval()
    graph = capture(model, make_inputs(1 + len(case) % 2))
    assert len(str(graph).splitlines()) == len(graph.nodes) + 3
    stages: list[Graph] = [graph]
    for rewrite in PASSES:
        before = str(stages[-1])
        stages.append(rewrite(stages[-1]))
        verify(stages[-1])
        assert str(stages[-2]) == before, f"{rewrite.__name__} changed its input"
    assert str(optimize(graph)) == str(stages[-1])
    assert str(optimize(stages[-1])) == str(stages[-1]), "a second round of the passes changes something"
    for n in (1, 3, 7):
        inputs = make_inputs(n)
        for stage in stages:
            with torch.no_grad():
                close(run_graph(stage, inputs), model, inputs, 1e-6 if stage is graph else 1e-4)


@pytest.mark.parametrize("name", ["in-place", "shared conv, two norms", "torch attention", "shifted windows"])
def test_text_form_is_stable(name: str, case_maker: Callable[[str], Any]) -> None:
    """Captured again, from one sample or from five, the graph reads the same."""
    make_model, make_inputs = case_maker(name)
    texts = []
    for n in (1, 5):
        torch.manual_seed(0)
        texts.append(str(capture(make_model().eval(), make_inputs(n))))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("pads", "value", "folds"), [
    ((1, 1, 2, 2), 0.0, True), ((1, 2, 2, 2), 0.0, False), ((1, 1, 2, 2), 0.5, False), ((1, 1, 1, 1, 1, 1), 0.0, False),
])  # fmt: skip
def test_padding_before_a_convolution_becomes_its_own(pads: tuple[int, ...], value: float, folds: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3 + (2 if len(pads) == 6 else 0), 4, 3, stride=2, padding=(0, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.conv(nn.functional.pad(x, pads, value=value)))

    model, x = Padded().eval(), torch.randn(2, 3, 9, 8)
    graph = optimize(capture(model, (x,)))
    assert [n.op for n in graph.nodes] == (["conv"] if folds else ["pad", "conv"])
    torch.testing.assert_close(run_graph(graph, [x])[0], model(x))
    if folds:
        assert graph.nodes[0].attrs["padding"] == [2, 2]


def test_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(inplace=True))
    model(torch.randn(4, 3, 6, 6))  # running statistics that are not the initial ones
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    flags = [(name, m.training) for name, m in model.named_modules()]
    grads = [(name, p.requires_grad) for name, p in model.named_parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids = [id(p) for p in model.parameters()]
    example = torch.randn(2, 3, 6, 6)
    copy = example.clone()
    optimize(capture(model, (example,)))
    assert flags == [(name, m.training) for name, m in model.named_modules()]
    assert grads == [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert ids == [id(p) for p in model.parameters()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(example, copy) and torch.is_grad_enabled()


def test_model_is_left_as_it_was_after_a_failure() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Branch()).train()
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(2, 4),))
    assert all(m.training for m in model.modules())


def test_capture_is_of_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9)).train()
    graph = optimize(capture(model, (torch.randn(2, 4),)))
    assert [n.op for n in graph.nodes] == ["linear"]


def test_graph_does_not_share_memory_with_the_model() -> None:
    model = nn.Linear(4, 4)
    graph = capture(model, (torch.randn(2, 4),))
    weight = graph.node(graph.nodes[0].name).weight
    assert weight is not None
    before = graph.constants[weight].copy()
    with torch.no_grad():
        model.weight.zero_()
    assert (graph.constants[weight] == before).all()


def test_shared_weights_are_stored_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    graph = optimize(capture(model, (torch.randn(2, 6),)))
    assert len(graph.constants) == 1


def test_reused_module_keeps_its_path() -> None:
    """Name patterns must meet every call of a reused module."""

    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(torch.relu(self.body(x)))
            return out

    graph = capture(Reuse(), (torch.randn(2, 6),))
    assert [n.source for n in graph.nodes if n.op == "linear"] == ["body.0", "body.0"]


def test_keyword_inputs_in_any_order(case_maker: Callable[[str], Any]) -> None:
    make_model, make_inputs = case_maker("two inputs")
    model = make_model()
    left, right = make_inputs(2)
    for kwargs in ({"left": left, "right": right}, {"right": right, "left": left}):
        graph = capture(model, (), kwargs)
        by_name = {"left": left, "right": right}
        close(run_graph(graph, [by_name[v] for v in graph.inputs]), model, (left, right), 1e-6)
    graph = capture(model, (left,), {"right": right})
    assert graph.inputs == ["left", "right"]


def test_variable_arguments_and_nested_inputs() -> None:
    class Variable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair: list[Tensor], *more: Tensor) -> Tensor:
            out: Tensor = self.linear(pair[0]) + pair[1] * more[0] - more[1]
            return out

    model, (a, b, c, d) = Variable(), torch.randn(4, 2, 4)
    graph = capture(model, ([a, b], c, d))
    e, f, g, h = torch.randn(4, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(run_graph(graph, [e, f, g, h])[0], model([e, f], g, h))


def test_inputs_that_do_not_fit_forward() -> None:
    with pytest.raises(CaptureError, match="do not fit forward"):
        capture(nn.Linear(4, 4), (torch.randn(2, 4), torch.randn(2, 4)))


# -- what cannot be captured --------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """The function sits in a submodule, so that messages have a path to name."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()

        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Any:
                return function(self, self.linear(x))

        self.blocks = nn.ModuleList([nn.Linear(4, 4), Inner()])

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def fails(function: Callable[[Any, Tensor], Any], batch: int = 2) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(Failing(function), (torch.randn(batch, 4),))
    return str(caught.value)


def test_unsupported_operator_is_named_with_its_module() -> None:
    message = fails(lambda m, x: torch.linalg.qr(x[:, :, None] @ x[:, None, :])[0])
    assert "linalg_qr" in message and "blocks.1" in message and "aten.py" in message


def test_random_operator_is_refused() -> None:
    message = fails(lambda m, x: x + torch.rand_like(x))
    assert "rand" in message and "blocks.1" in message


def test_dropout_that_stays_on_is_refused() -> None:
    message = fails(lambda m, x: F.dropout(x, 0.5, training=True))
    assert "dropout" in message and "blocks.1" in message


def test_batch_statistics_are_refused() -> None:
    message = fails(lambda m, x: F.batch_norm(x, None, None, training=True))
    assert "batch_norm" in message and "blocks.1" in message


def test_mean_over_the_batch_is_refused() -> None:
    message = fails(lambda m, x: x - x.mean(dim=0, keepdim=True))
    assert "mean" in message and "batch" in message


def test_one_sample_picked_from_the_batch_is_refused() -> None:
    assert "blocks.1" in fails(lambda m, x: x + x[0])
    assert "batch" in fails(lambda m, x: x[1:])


def test_data_dependent_control_flow_is_named() -> None:
    message = fails(lambda m, x: x * 2 if x.sum() > 0 else x)
    assert (
        "data-dependent" in message.lower() and "Failing in module 'blocks.1' (test_graph_capture.py, line" in message
    )
    assert "torch.export" in message


def test_control_flow_operator_is_named() -> None:
    message = fails(lambda m, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)))
    assert "'cond'" in message


def test_half_precision_constants() -> None:
    """What float32 makes of them as it reads them; other readers are refused."""
    model = Failing(lambda m, x: x * m.linear.weight[0].to(torch.bfloat16))
    x = torch.randn(2, 4)
    torch.testing.assert_close(run_graph(capture(model, (x,)), [x])[0], model(x), rtol=0, atol=0)
    message = fails(lambda m, x: torch.maximum(x, m.linear.weight[0].to(torch.bfloat16)))
    assert "bfloat16" in message


@pytest.mark.parametrize("late", [False, True], ids=["constant", "run time"])
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
def test_queries_that_may_attend_to_nothing(additive: bool, late: bool, helpers: Any) -> None:
    """A row of the mask that bars every key: torch gives 0 for it, not the mean of the values, nor NaN."""

    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    allowed[2] = allowed[4, 1:] = False

    def barred(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
            self.register_buffer("mask", barred(allowed))

        def attend(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.first(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out: Tensor = self.last(y.transpose(1, 2).flatten(2))
            return out

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, self.mask)

    class Late(Attend):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return self.attend(x, barred(mask)[:, None])

    x = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))
    model: nn.Module = Late().eval() if late else Attend().eval()
    inputs = (x, allowed.expand(16, 5, 5)) if late else (x,)
    with torch.no_grad():
        exact = model(*inputs)
    assert not exact[:, 2].any() and exact[:, 3].any()
    torch.testing.assert_close(run_graph(optimize(capture(model, inputs)), inputs)[0], exact)
    config = bitdial.QuantizeConfig(target="paper", selector="greedy", ratios=(0.0, 1.0), group_size=4)
    qm = bitdial.quantize(model, [inputs], config, engine="reference")
    for engine in ("reference", "cpu"):
        got = QuantizedModel(from_bytes(to_bytes(qm.program)), engine)(inputs if late else x)
        assert float(got[:, 2].abs().max()) < 0.02 * float(exact.abs().max())  # 0 but for the correction of biases
        assert helpers.snr(exact, got) > 30.0


def test_data_dependent_shape_is_refused() -> None:
    message = fails(lambda m, x: m.linear(x[x[:, 0] > 0]))
    assert "batch" in message


@pytest.mark.parametrize("batch", [2, 4])
def test_model_that_fixes_its_batch_size(batch: int) -> None:
    message = fails(lambda m, x: m.linear(x.reshape(batch, 2, 2).flatten(1)), batch)
    assert "batch size" in message and "x.shape[0]" in message


def test_state_written_in_forward_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.linear(x) * self.calls
            return out

    model = Counter()
    with pytest.raises(CaptureError, match="calls"):
        capture(model, (torch.randn(2, 4),))
    assert float(model.calls) == 0.0


def test_output_that_is_no_tensor_is_refused() -> None:
    assert "return tensors only" in fails(lambda m, x: (x, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_parameter_dtypes_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    with pytest.raises(CaptureError, match=r"'0.weight' is torch.\w+: convert the model with model.float\(\)"):
        capture(model, (torch.randn(2, 4, dtype=dtype),))


def test_model_on_another_device() -> None:
    with pytest.raises(CaptureError, match=r"'0.weight' is on meta, the example inputs on cpu"):
        capture(nn.Sequential(nn.Linear(4, 4, device="meta")), (torch.randn(2, 4),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.float16])
def test_inputs_of_another_dtype_than_the_model(dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match=str(dtype)):
        capture(nn.Linear(4, 4), (torch.ones(2, 4).to(dtype),))


def test_inputs_of_the_wrong_shape() -> None:
    with pytest.raises(CaptureError, match="Linear"):
        capture(nn.Linear(4, 4), (torch.randn(2, 5),))
