"""Channel equalization leaves the float network as it is and makes channel ranges alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitdial.graph.capture import capture
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph
from bitdial.graph.passes import optimize
from bitdial.graph.verify import verify
from bitdial.quantization.build import statistics_plan
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.equalize import equalize, factors, find_sites


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        y = torch.max_pool2d(torch.relu(self.b(x)), 2)
        y = torch.relu(self.c(y))
        return self.head(y.mean((2, 3)))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def calibrated(model: nn.Module, x: torch.Tensor) -> tuple[Graph, dict]:
    graph = optimize(capture(model.eval(), (x,)))
    return graph, measured(graph, x)


def measured(graph: Graph, x: torch.Tensor) -> dict:
    statistics = statistics_plan(graph, QuantizeConfig())
    with torch.no_grad():
        run_graph(graph, [x], observe=lambda n, v: statistics[n].update(v, n) if n in statistics else None)
    return statistics


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_float_network_stays_and_full_strength_makes_ranges_alike(strength: float) -> None:
    torch.manual_seed(0)
    for model, x, expected in ((Convs(), torch.randn(8, 3, 8, 8), 2), (Norms(), torch.randn(8, 5, 6), 1)):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(torch.exp(torch.randn(p.shape[0], *[1] * (p.dim() - 1))))
        graph, statistics = calibrated(model, x)
        changed, count = equalize(graph, statistics, strength)
        verify(changed)
        assert count == expected == len(find_sites(graph))
        with torch.no_grad():
            a, b = run_graph(graph, [x])[0], run_graph(changed, [x])[0]
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
        if strength == 1.0:
            after = measured(changed, x)
            for site in find_sites(changed):
                ranges = after[site.value].channel_max
                assert ranges is not None
                alive = ranges[ranges > 0]
                assert alive.max() / alive.min() < 1.001


def test_residual_conv_and_a_second_kind_of_reader_are_no_sites() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) + torch.sigmoid(y)

    graph = optimize(capture(Mixed().eval(), (torch.randn(2, 3, 4, 4),)))
    assert find_sites(graph) == []


def test_dead_channels_keep_their_factor_and_outliers_are_clipped() -> None:
    t = factors(np.array([0.0, 1.0, 1.0, 1e6]), np.ones(4), 1.0)
    assert t[0] == 1.0 and t[3] == 32.0 and np.isfinite(t).all()
