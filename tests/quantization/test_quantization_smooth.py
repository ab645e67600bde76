"""SmoothQuant's migration leaves the float network as it is, scales every reader, and keeps off what it must not touch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.errors import ConfigError
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph, Node
from bitdial.graph.passes import optimize
from bitdial.graph.verify import verify
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.build import statistics_plan
from bitdial.quantization.calibration import TensorStatistics
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.smooth import migration_factors, smooth

Made = tuple[Graph, dict[str, TensorStatistics], Tensor]


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters whose channels differ in magnitude by factors of up to about a hundred."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
            p.mul_(torch.exp(torch.randn(p.shape[-1], generator=generator)))
    return model.eval()


def calibrated(graph: Graph, x: Tensor) -> dict[str, TensorStatistics]:
    statistics = statistics_plan(graph, QuantizeConfig())
    with torch.no_grad():
        run_graph(graph, [x], observe=lambda n, v: statistics[n].update(v, n) if n in statistics else None)
    return statistics


def made(model: nn.Module, *shape: int) -> Made:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(9))
    graph = optimize(capture(uneven(model), (x,)))
    return graph, calibrated(graph, x), x


def largest_difference(a: Graph, b: Graph, x: Tensor) -> float:
    """Of the outputs, relative to the largest output."""
    with torch.no_grad():
        before, after = run_graph(a, [x])[0].double(), run_graph(b, [x])[0].double()
    return float((before - after).abs().max() / before.abs().max())


def from_source(graph: Graph, source: str) -> Node:
    return next(n for n in graph.nodes if n.source == source and n.op in ("linear", "layer_norm"))


def column_maxima(graph: Graph, node: Node) -> np.ndarray:
    return np.abs(graph.constants[node.weight or ""]).max(axis=0)


class Readers(nn.Module):
    """One LayerNorm, three linear readers: directly, through a slice of tokens, and through ReLU and a reshape."""

    def __init__(self, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=affine, bias=bias) if affine else nn.LayerNorm(8, bias=False)
        if not affine:
            self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.a, self.b, self.c = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        n, t, d = y.shape
        late = self.c(torch.relu(y).reshape(n, t // 2, 2, d))
        return self.a(y).sum(1) + self.b(y[:, 1:3]).mean(1) + late.flatten(1, 2).sum(1)


def several(model: Callable[[], nn.Module] = Readers) -> Made:
    return made(model(), 16, 4, 6)


SEVERAL: list[Made] = []


def shared_case() -> Made:
    if not SEVERAL:
        SEVERAL.append(several())
    return SEVERAL[0]


@settings(max_examples=30)
@given(st.floats(0.0, 1.0))
def test_the_float_function_stays_and_every_reader_has_the_same_factors(alpha: float) -> None:
    graph, statistics, x = shared_case()
    before = {name: array.copy() for name, array in graph.constants.items()}
    smoothed, done = smooth(graph, statistics, alpha)
    verify(smoothed)
    assert largest_difference(graph, smoothed, x) < 1e-5
    assert [(len(m.readers), m.factors.shape) for m in done] == [(3, (8,))]
    s = done[0].factors
    for reader in done[0].readers:
        old, new = (g.constants[g.node(reader).weight or ""] for g in (graph, smoothed))
        np.testing.assert_allclose(new, old * s, rtol=1e-6)
    for position in (1, 2):
        old, new = (g.constants[from_source(g, "norm").inputs[position]] for g in (graph, smoothed))
        np.testing.assert_allclose(new * s, old, rtol=1e-6)
    for name, array in before.items():  # the graph handed in is not changed
        assert np.array_equal(graph.constants[name], array)


def test_factors_follow_the_papers_formula_over_all_readers() -> None:
    graph, statistics, x = shared_case()
    names = [from_source(graph, s).name for s in ("a", "b", "c")]
    activation = np.max([statistics[graph.node(n).inputs[0]].channel_max for n in names], axis=0)
    weight = np.max([column_maxima(graph, graph.node(n)) for n in names], axis=0)
    _, done = smooth(graph, statistics, 0.3)
    wanted = activation**0.3 / weight**0.7
    np.testing.assert_allclose(done[0].factors / done[0].factors[0], wanted / wanted[0], rtol=1e-6)
    flat, _ = smooth(graph, statistics, 1.0)
    after = calibrated(flat, x)[from_source(flat, "a").inputs[0]].channel_max
    assert after is not None and after.max() / after.min() < 1.0001
    even, _ = smooth(graph, statistics, 0.0)
    columns = np.max([column_maxima(even, even.node(n)) for n in names], axis=0)
    assert columns.max() / columns.min() < 1.0001


@pytest.mark.parametrize(("affine", "bias"), [(False, False), (True, False)])
def test_a_layer_norm_without_weight_or_bias_gets_them(affine: bool, bias: bool) -> None:
    graph, statistics, x = several(lambda: Readers(affine, bias))
    smoothed, done = smooth(graph, statistics, 0.5)
    verify(smoothed)
    assert len(done) == 1 and len(from_source(smoothed, "norm").inputs) == 3
    assert largest_difference(graph, smoothed, x) < 1e-5


class ReadByASum(nn.Module):
    """Post-norm: the residual sum reads the first LayerNorm beside the linear layer; the second is a graph output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.linear = nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6)
        self.norm2, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        z = self.norm2(y + self.linear(y))
        return self.head(z), z


class ReadByGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) + self.b(nn.functional.gelu(y)).sum(-1, keepdim=True)


@pytest.mark.parametrize(("model", "norms"), [(ReadByASum, 2), (ReadByGelu, 1)])
def test_linear_layers_read_a_copy_of_what_others_read_too(model: Callable[[], nn.Module], norms: int) -> None:
    """The others, graph outputs among them, get the very values that they got before."""
    graph, statistics, x = made(model(), 8, 4, 6)
    smoothed, done = smooth(graph, statistics, 0.5)
    verify(smoothed)
    assert len(done) == norms and all(m.layer_norm.endswith("_smoothed") for m in done)
    assert len([n for n in smoothed.nodes if n.op == "layer_norm"]) == 2 * norms
    assert all(np.ptp(m.factors) > 0.1 for m in done)
    assert largest_difference(graph, smoothed, x) < 1e-5
    before = {n.name: n for n in graph.nodes if n.op != "linear"}
    for node in smoothed.nodes:
        if node.name in before:
            assert node.inputs == before[node.name].inputs and node.residual == before[node.name].residual
    assert smoothed.outputs == graph.outputs


def test_a_layer_norm_that_no_linear_layer_reads_is_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))
    graph, statistics, _ = made(model, 8, 4, 6)
    smoothed, done = smooth(graph, statistics, 0.5)
    assert done == () and str(smoothed) == str(graph)
    same = {k: v.tobytes() for k, v in graph.constants.items()}
    assert {k: v.tobytes() for k, v in smoothed.constants.items()} == same


class TwiceUsed(nn.Module):
    """One LayerNorm module and one linear module at two places: constants are shared, factors must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.norm(x))
        x = x + nn.functional.gelu(self.linear(self.norm(3.0 * x[..., :1] - x)))
        return self.head(self.norm(x))


def test_modules_used_twice_get_factors_of_each_place() -> None:
    graph, statistics, x = made(TwiceUsed(), 8, 4, 6)
    smoothed, done = smooth(graph, statistics, 0.5)
    verify(smoothed)
    assert len(done) == 3 and not np.allclose(done[0].factors, done[1].factors, rtol=1e-2)
    assert largest_difference(graph, smoothed, x) < 1e-5


def test_layers_without_statistics_are_left_alone() -> None:
    graph, _, _ = shared_case()
    assert smooth(graph, {}, 0.5)[1] == ()


def test_dead_channels_keep_factor_one_and_alpha_is_checked() -> None:
    factors = migration_factors(np.array([0.0, 1.0, 4.0, 2.0]), np.array([1.0, 1.0, 1.0, 0.0]), 0.5)
    np.testing.assert_allclose(factors, [1.0, 2**-0.5, 2**0.5, 1.0])
    assert np.array_equal(migration_factors(np.zeros(3), np.ones(3), 0.5), np.ones(3))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="strength"):
            migration_factors(np.ones(2), np.ones(2), alpha)


def test_config_refuses_bad_strengths_and_both_migrations() -> None:
    for alpha in (-0.1, 1.5, "much"):
        with pytest.raises(ConfigError, match="smooth"):
            QuantizeConfig(smooth=alpha)
    with pytest.raises(ConfigError, match="equalize"):
        QuantizeConfig(smooth=0.5, equalize=0.5)
    assert QuantizeConfig().updated(smooth=0.5).smooth == 0.5


def test_prepare_smooths_a_vision_transformer_and_calibrates_anew(transformer: nn.Module, helpers) -> None:
    torch.manual_seed(3)
    model = uneven(type(transformer)(), 3)
    x = helpers.images(16)
    config = QuantizeConfig(target="paper", smooth=0.5, selector="greedy", ratios=(0.0, 1.0), group_size=8, search_images=8)
    prepared = prepare(model, [x], config)
    plain = prepare(model, [x], config.updated(smooth=None))
    with torch.no_grad():
        torch.testing.assert_close(run_graph(prepared.graph, [x])[0], model(x), rtol=1e-4, atol=1e-4)
    # 2 blocks with 2 LayerNorms each, and the last one, which the head reads through a select
    changed = [
        n.name
        for n in prepared.graph.nodes
        if n.op == "linear"
        and not np.array_equal(
            np.sort(column_maxima(prepared.graph, n)), np.sort(column_maxima(plain.graph, plain.graph.node(n.name)))
        )
    ]
    assert len(changed) == 5
    again = calibrated(prepared.graph, x)
    for name in changed:
        value = prepared.graph.node(name).inputs[0]
        np.testing.assert_allclose(prepared.statistics[value].channel_max, again[value].channel_max, rtol=1e-4)
    program = quantize_prepared(prepared, config)
    engine = ReferenceEngine(program)
    with torch.no_grad():
        exact = model(x)
    assert helpers.snr(exact, engine.run(x, 0.0)) > 8.0  # random weights, very uneven channels
    assert torch.isfinite(engine.run(x, 1.0)).all()
    assert program.provenance["config"]["smooth"] == 0.5
