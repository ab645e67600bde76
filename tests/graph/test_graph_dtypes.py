"""Values of every dtype keep it: what torch.export recorded is what the graph says, what runs, and what is stored."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from float_operators import Operands, calls, function
from torch import Tensor, nn
from torch.utils import _pytree

import bitdial
from bitdial.api import QuantizedModel
from bitdial.artifact import from_bytes, to_bytes
from bitdial.engines.base import create_engine
from bitdial.errors import CaptureError
from bitdial.graph.aten import ALLOWED
from bitdial.graph.capture import _Importer, capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.passes import optimize
from hand_built import program_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Fn(nn.Module):
    """A module around a function of its inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Network(nn.Module):
    """Two layers behind each of FRONTS, which makes float32 [N, 8] of whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.head(torch.relu(self.body(front(x)))) for name, front in FRONTS.items()}


def _halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return (a.float() - b.float()) / 255


def _rows(x: Tensor) -> Tensor:
    a, b = x.reshape(-1, 2, 8).unbind(1)
    return a.float() * b.float() / 255


FRONTS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": _halves,
    "split": lambda x: torch.mul(*(v.to(torch.float32) / 16 for v in x.split([8, 8], 1))),
    "unbind": _rows,
    "stack": lambda x: torch.stack([x[:, :8], x[:, 8:]], 1).float().prod(1) / 255,
    "mean": lambda x: x.reshape(-1, 2, 8).mean(1, dtype=torch.float32) / 255,
    "softmax": lambda x: (x[:, :8] // 32).softmax(-1, dtype=torch.float32),
    "sum": lambda x: x.reshape(-1, 2, 8).sum(1, dtype=torch.float32) / 255,
    "pool": lambda x: F.max_pool1d(x.float()[:, None], 2)[:, 0] / 255,
    "residual": lambda x: (x[:, :8].float() + x[:, 8:]) / 255,
    "division": lambda x: x[:, :8] / 256,
    "moved view": lambda x: x.reshape(-1, 2, 2, 4).transpose(1, 2).contiguous().view(-1, 16)[:, :8] / 255.0,
}


def test_integer_inputs(helpers: Any) -> None:
    """Captured to the bit, and quantized as well as any network, by both engines alike."""
    model = Network().eval()
    x = torch.randint(0, 256, (64, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(x)
        captured = run_graph(capture(model, (x,)), [x])
    config = bitdial.QuantizeConfig(target="paper", selector="greedy", ratios=(0.0, 1.0))
    qm = bitdial.quantize(model, x, config, engine="reference")
    quantized, compiled = qm(x), QuantizedModel(qm.program, "cpu")(x)
    for (name, want), own in zip(exact.items(), captured, strict=True):
        assert torch.equal(want, own), name
        assert helpers.snr(want, quantized[name]) > 35.0, name
        assert torch.equal(quantized[name], compiled[name]), name


def test_constants_keep_their_dtype() -> None:
    """float64 tables used to become float32, and the values computed from them with them."""
    table = torch.linspace(0, 1, 8, dtype=torch.float64) + 2**-40
    model = Fn(lambda x: (x + table, (x + table[0]), x * torch.arange(8), (x.long() + torch.arange(8)) / 4))
    x = torch.randn(3, 8)
    graph = capture(model, (x,))
    for got, want in zip(run_graph(optimize(graph), [x]), model(x), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    assert [graph.types[v].dtype for v in graph.outputs] == ["float64", "float32", "float32", "float32"]


def test_a_number_is_an_input_and_an_output_without_axes() -> None:
    model = Fn(lambda x, s: (x * s, s + 1.0))
    x, s = torch.randn(2, 3), torch.tensor(2.0)
    program = program_of(optimize(capture(model, (x, s))), [0.0])
    for engine in ("reference", "cpu"):
        scaled, number = create_engine(program, engine).run([x.numpy(), s.numpy()])
        assert number.shape == () and float(number) == 3.0 and scaled.shape == (2, 3)


def refused(function: Callable[[Tensor], Any], x: Tensor) -> str:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Fn(function)

        def forward(self, x: Tensor) -> Any:
            return self.block(x)

    with pytest.raises(CaptureError) as caught:
        capture(Outer(), (x,))
    return str(caught.value)


def test_what_cannot_be_stored_is_refused_with_its_module() -> None:
    def rotary(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(-1, 4, 2)) * torch.polar(torch.ones(4), torch.arange(4.0))
        return torch.view_as_real(turned).flatten(1)

    x = torch.randn(2, 8)
    message = refused(rotary, x)
    assert "view_as_complex" in message and "'block'" in message and "real numbers" in message
    message = refused(lambda x: torch.fft.rfft(x).abs(), x)
    assert "complex64" in message and "'block'" in message
    message = refused(lambda x: x.to(torch.bfloat16).float(), x)
    assert "bfloat16" in message and "'block'" in message and "float32" in message
    assert "complex64" in refused(lambda x: x.abs(), torch.randn(2, 8, dtype=torch.complex64))
    assert "NaN or +infinity" in refused(lambda x: torch.minimum(x, torch.tensor([float("inf")] * 8)), x)
    assert "batch" in refused(lambda x: torch.stack(x.chunk(2, 0)), torch.randn(4, 8))
    assert "batch size" in refused(lambda x: x + torch.full((x.shape[0], 8), x.shape[0]), x)
    assert "max_pool" in refused(lambda x: F.max_pool1d(x[:, None], 2, return_indices=True)[1] + 1, x)
    assert "averages over the batch" in refused(lambda x: x - x.mean(), x)


# -- every operator ------------------------------------------------------------------------------------------------------

# torch.export writes these otherwise, fixes their batch size, or they average over the batch: never captured as they are
REFUSED = {
    f"aten.{name}.default"
    for name in "conv_tbc mean native_channel_shuffle take_along_dim upsample_bicubic2d upsample_bilinear2d".split()
}


def operands(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    scale = 0.3 if dtype.is_floating_point else 1
    x = torch.randint(0, 3, (n, 4, 6, 6), generator=generator) * scale
    return x.to(dtype), torch.randint(1, 3, (n, 4, 6, 6), generator=generator).to(dtype)


def accepted(dtype: torch.dtype) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any], Any]]:
    """Every call that torch runs on a dtype: name, call, and the arguments and result of the operator."""
    parts, made = Operands(*operands(dtype, 3)), []
    for name, alternatives in calls().items():
        for call in alternatives:
            seen: list[Any] = []

            def record(*args: Any, name: str = name, seen: list[Any] = seen, **kwargs: Any) -> Any:
                seen.append((args, kwargs, function(name)(*args, **kwargs)))
                return seen[-1][-1]

            try:
                call(record, parts)
            except (RuntimeError, IndexError):
                continue
            made.append((name, call, *seen[-1]))
    return made


def exported(dtype: torch.dtype) -> tuple[Any, list[Tensor], list[Tensor]]:
    """As from torch.export, but in no time: a program of all calls on constant sizes, whose tensors are its inputs; these, and
    the outputs."""
    made, graph = accepted(dtype), torch.fx.Graph()
    places: dict[int, tuple[torch.fx.Node, Tensor]] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in places:
            node = graph.placeholder(f"in_{len(places)}")
            node.meta["val"] = value
            places[id(value)] = node, value
        return places[id(value)][0]

    lifted = [_pytree.tree_map(place, (args, kwargs)) for _, _, args, kwargs, _ in made]
    results: list[torch.fx.Node] = []
    for (name, _, _, _, value), (args, kwargs) in zip(made, lifted, strict=True):
        node = graph.call_function(function(name), args, kwargs)
        node.meta["val"] = value
        if isinstance(value, Tensor):
            results.append(node)
            continue
        for i, part in enumerate(value[:1] if "native_" in name else value):  # of norms only the result is at hand
            results.append(graph.call_function(operator.getitem, (node, i)))
            results[-1].meta["val"] = part
    graph.output(tuple(results))
    none: dict[str, str] = {}
    signature = SimpleNamespace(
        inputs_to_parameters=none, inputs_to_buffers=none, inputs_to_lifted_tensor_constants=none, buffers_to_mutate=none
    )
    spec = SimpleNamespace(out_spec=_pytree.tree_flatten(results)[1])
    program = SimpleNamespace(graph=graph, graph_signature=signature, state_dict={}, constants={}, call_spec=spec)
    return program, [tensor for _, tensor in places.values()], [node.meta["val"] for node in results]


def check(graph: Graph, batch: list[Tensor], expected: list[Tensor]) -> None:
    """Run with every value of its recorded dtype, stored, loaded, and run by every engine."""

    def recorded(name: str, value: Tensor) -> None:
        assert str(value.dtype) == f"torch.{graph.types[name].dtype}", name

    results = {"graph": run_graph(graph, batch, observe=recorded)}
    program = from_bytes(to_bytes(program_of(optimize(graph), [0.0])))
    for engine in ("reference", "cpu"):
        results[engine] = list(create_engine(program, engine).run(batch))
    for where, got in results.items():
        for value, want, have in zip(graph.outputs, expected, got, strict=True):
            assert (have.dtype, have.shape) == (want.dtype, want.shape), (where, value)
            torch.testing.assert_close(have, want, equal_nan=True, msg=lambda text, at=(where, value): f"{at}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_operator(dtype: torch.dtype) -> None:
    program, batch, expected = exported(dtype)
    check(_Importer(program).run(), batch, expected)


def test_every_float_operator_has_a_call() -> None:
    assert {name for dtype in (torch.float32, torch.int64) for name, *_ in accepted(dtype)} == ALLOWED


class Every(nn.Module):
    def __init__(self, chosen: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.chosen = chosen

    def forward(self, x: Tensor, y: Tensor) -> list[Any]:
        results = [(name, call(function(name), Operands(x, y))) for name, call in self.chosen]
        return [result[0] if "native_" in name else result for name, result in results]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16], ids=str)  # whose constants are refused
def test_every_float_operator_exported(dtype: torch.dtype) -> None:
    """Through torch.export itself, with a batch of any size."""
    model = Every([(name, call) for name, call, *_ in accepted(dtype) if name not in REFUSED])
    batch = list(operands(dtype, 5))
    check(capture(model, operands(dtype, 2)), batch, _pytree.tree_leaves(model(*batch)))
