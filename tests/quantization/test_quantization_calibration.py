"""Streaming statistics, ranges, domains and settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitdial.errors import BitdialError, CalibrationError, ConfigError
from bitdial.graph.capture import capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.passes import optimize
from bitdial.quantization.build import eligibility, statistics_plan
from bitdial.quantization.calibration import BINS, TensorStatistics, choose_range, rows_of, spread
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.domains import eight_bit_values, integer_layers, non_negative_values
from bitdial.quantization.equalize import equalize, find_sites
from bitdial.quantization.weights import quantize_weight, weight_scales


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_streaming_is_the_same_as_all_at_once(seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    data = (rng.normal(size=(24, 5, 3)) * 10.0 ** rng.uniform(-6, 4, (24, 1, 1))).astype(np.float32)
    data[rng.integers(0, 24)] = 0.0
    streamed = TensorStatistics(axis=1)
    for piece in np.array_split(data, parts):
        streamed.update(torch.from_numpy(piece), "x")
    assert streamed.largest == np.abs(data).max() and streamed.smallest == min(0.0, data.min())
    assert streamed.channel_max is not None and (streamed.channel_max == np.abs(data).max(axis=(0, 2))).all()
    assert streamed.histogram.shape == (BINS,) and streamed.histogram.sum() == data.size
    assert streamed.limit >= streamed.largest and np.log2(streamed.limit) % 1 == 0


@settings(max_examples=40)
@given(rows=st.integers(1, 4000), columns=st.integers(1, 40), count=st.integers(1, 5000))
def test_a_spread_of_rows_is_in_step_with_nothing(rows: int, columns: int, count: int) -> None:
    """As many values as asked for, give or take; of images, all columns of pixels turn up where that many rows are taken."""
    x = torch.arange(rows)[:, None].expand(rows, columns)
    found = spread(x, count)
    assert found.shape[1] == columns and 1 <= len(found) <= rows
    assert len(found) == rows or found.numel() <= 2 * count + columns
    for width in (w for w in range(2, 12) if rows % w == 0 and len(found) >= w):
        assert len({int(i) % width for i in found[:width, 0]}) == width


@pytest.mark.parametrize("axis", [1, -1, 2, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_do_not_depend_on_the_memory_format(axis: int | None, channels_last: bool) -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    made = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    plain, other = TensorStatistics(axis), TensorStatistics(axis)
    plain.update(x, "x")
    other.update(made, "x")
    assert (plain.histogram == other.histogram).all() and plain.smallest == float(x.min())
    assert plain.largest == other.largest == float(x.abs().max())
    if axis is not None:
        expected = x.abs().movedim(axis, 0).flatten(1).amax(dim=1).numpy()
        assert plain.channel_max is not None and other.channel_max is not None
        assert (plain.channel_max == expected).all() and (other.channel_max == expected).all()
    elif channels_last:
        assert rows_of(made, None).data_ptr() == made.data_ptr()  # not copied


def test_memory_does_not_grow_with_the_data() -> None:
    statistics = TensorStatistics(axis=-1)
    for i in range(50):
        statistics.update(torch.full((100, 4), float(2**i)), "x")
    assert statistics.histogram.nbytes == 8 * BINS and statistics.channel_max is not None
    assert statistics.histogram.sum() == 50 * 400


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    with pytest.raises(CalibrationError, match="'layer1.conv' is not finite"):
        TensorStatistics().update(torch.tensor([1.0, bad]), "layer1.conv")


def test_ranges() -> None:
    rng = np.random.default_rng(0)
    data = torch.from_numpy(np.append(rng.normal(size=100_000), [60.0]).astype(np.float32))
    statistics = TensorStatistics()
    statistics.update(data, "x")
    assert choose_range(statistics, 127, "minmax") == 60.0
    percentile = choose_range(statistics, 127, "percentile", 99.9)
    assert abs(percentile - float(np.quantile(data.abs().numpy(), 0.999))) < 2 * statistics.limit / BINS
    assert choose_range(statistics, 127, "percentile", 100.0) == 60.0

    def error(top: float) -> float:
        step = top / 127
        q = (data.double() / step).round().clamp(-127, 127)
        return float((q * step - data).pow(2).sum())

    best = choose_range(statistics, 127, "mse")
    assert error(best) <= min(error(60.0), error(percentile)) and best < 60.0
    assert choose_range(TensorStatistics(), 255, "mse") == 0.0


class Net(nn.Module):
    """conv relu conv relu6 (+ residual) sigmoid gate, mean, head: signs that the graph can and cannot prove."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.dw, self.mid, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        y = torch.nn.functional.relu6(self.b(x)) * torch.sigmoid(self.gate(x))
        y = self.dw(torch.nn.functional.max_pool2d(y + x, 2))
        out: torch.Tensor = self.head(torch.tanh(self.mid(y.mean((2, 3)))))
        return out


@pytest.fixture(scope="module")
def graph() -> Any:
    torch.manual_seed(0)
    return optimize(capture(Net().eval(), (torch.randn(2, 3, 8, 8),)))


def by_source(graph: Any, path: str) -> Any:
    return next(n for n in graph.nodes if n.source == path and n.op in ("conv", "linear"))


def test_signs_come_from_the_graph_alone(graph: Any) -> None:
    proven = non_negative_values(graph)
    for node in graph.nodes:
        positive = {"a": True, "b": True, "gate": False, "dw": False, "mid": False, "head": False}
        if node.op in ("conv", "linear"):
            assert (node.name in proven) == positive[node.source]
        elif node.op in ("sigmoid", "mul", "add", "max_pool"):
            assert node.name in proven, node
        elif node.op in ("mean", "tanh"):
            assert node.name not in proven
    layers = integer_layers(graph, ())
    eight = eight_bit_values(graph, layers)
    assert {n.name for n in graph.nodes} - eight == {by_source(graph, "head").name}


def test_eligibility_and_patterns(graph: Any) -> None:
    def reasons(**settings: Any) -> dict[str, str]:
        found = eligibility(graph, QuantizeConfig(**settings))
        return {graph.node(name).source: reason for name, reason in found.items()}

    assert reasons() == {"a": "first layer", "b": "", "gate": "", "dw": "depthwise", "mid": "", "head": "last layer"}
    free = reasons(lower_first_last=True, lower_depthwise=True)
    assert set(free.values()) == {""}
    kept = reasons(keep_8bit=("g*", "mi?"))
    assert "'g*'" in kept["gate"] and "'mi?'" in kept["mid"] and kept["b"] == ""
    assert reasons(keep_8bit="gate")["gate"] and "gate" not in reasons(ignored="gate")
    name = by_source(graph, "b").name
    assert reasons(keep_8bit=(name,))["b"]


def test_statistics_cover_what_the_program_needs(graph: Any) -> None:
    plan = statistics_plan(graph, QuantizeConfig())
    assert plan["x"].axis == 1 and set(eight_bit_values(graph, integer_layers(graph, ()))) <= set(plan)


def test_weight_pairs_hold_sums_of_one_sign_to_128() -> None:
    """Adjacent channels counted from each group's first, each tap for itself; scales no larger than that needs."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 13, 3, 3)).astype(np.float32)
    bounds = np.array([0, 5, 13], np.int32)
    plain, paired = weight_scales(weight, None, 1.0), weight_scales(weight, None, 1.0, bounds)
    w8 = quantize_weight(weight, paired).astype(int)
    sums = np.concatenate([np.maximum(s * (w8[:, 0:4:2] + w8[:, 1:4:2]) * (s * w8[:, 0:4:2] > 0) * (s * w8[:, 1:4:2] > 0), 0)
                           for s in (1, -1)] + [np.maximum(s * (w8[:, 5::2] + w8[:, 6::2]) * (s * w8[:, 5::2] > 0)
                           * (s * w8[:, 6::2] > 0), 0) for s in (1, -1)], axis=1)  # fmt: skip
    assert sums.max() <= 128 and (paired >= plain).all() and (paired < 2 * plain).all()
    largest = np.maximum(sums.max(axis=(1, 2, 3)), np.abs(w8).max(axis=(1, 2, 3)))
    assert (largest >= 126).all()
    assert (weight_scales(weight[:, :1], None, 1.0, np.array([0, 1], np.int32)) == weight_scales(weight[:, :1], None, 1.0)).all()


def test_equalization_leaves_the_float_network_unchanged(helpers: Any, conv_net: Any, transformer: Any) -> None:
    for model in (conv_net, transformer):
        x = helpers.images(8, seed=3)
        before = optimize(capture(model, (x[:2],)))
        statistics = statistics_plan(before, QuantizeConfig())

        def observe(name: str, x: torch.Tensor, statistics: dict[str, TensorStatistics] = statistics) -> None:
            if name in statistics:
                statistics[name].update(x, name)

        with torch.no_grad():
            expected = run_graph(before, [x], observe=observe)
            text = str(before)
            assert find_sites(before)
            after, sites = equalize(before, statistics, 0.5)
            assert str(before) == text and sites > 0
            got = run_graph(after, [x])
        assert helpers.snr(expected[0], got[0]) > 90.0
        changed = [n for n in after.nodes if n.weight is not None and n.weight != before.node(n.name).weight]
        assert changed


@pytest.mark.parametrize(
    ("settings_", "where"),
    [
        ({"ratios": (0.5, 1.5)}, "ratios"),
        ({"ratios": (-0.1,)}, "ratios"),
        ({"ratios": (float("nan"),)}, "ratios"),
        ({"ratios": ("half",)}, "ratios"),
        ({"selector": "best"}, "selector"),
        ({"group_size": 0}, "group_size"),
        ({"low_bits": 1}, "low_bits"),
        ({"low_bits": 8}, "low_bits"),
        ({"low_bits_weights": 9}, "low_bits_weights"),
        ({"extraction": "magic"}, "extraction"),
        ({"percentile": 101.0}, "percentile"),
        ({"calibration_images": 0}, "calibration_images"),
        ({"population": 1}, "population"),
        ({"seed": -1}, "seed"),
        ({"group_sizes": 16}, "group_sizes"),
    ],
)
def test_settings_out_of_range_are_named(settings_: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where) as caught:
        QuantizeConfig(**settings_)
    assert isinstance(caught.value, BitdialError) and isinstance(caught.value, ValueError)


def test_settings() -> None:
    assert QuantizeConfig(target="paper", ratios=(1.0, 0.5, 0.5)).ratios == (0.0, 0.5, 1.0)
    assert QuantizeConfig(keep_8bit="head*").keep_8bit == ("head*",)
    assert (
        QuantizeConfig(low_bits=5).weight_bits == 5 and QuantizeConfig(low_bits=5, low_bits_weights=4).weight_bits == 4
    )
    assert QuantizeConfig().updated(seed=3).seed == 3
    with pytest.raises(ConfigError):
        QuantizeConfig().updated(low_bits=12)
