"""Float and integer operators in every order: the CPU engine and the reference engine agree to the last bit all the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpu_networks import QUICK, UNARY, Floats, Network, outputs_of, quantized, same_bits, samples
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitdial.engines.cpu import native
from bitdial.engines.cpu.engine import CpuEngine
from bitdial.engines.reference.engine import ReferenceEngine
from bitdial.graph.ir import Graph
from bitdial.pipeline import prepare, quantize_prepared
from bitdial.quantization.program import Program

ISAS = native.isas() if not native.missing() else []
CONFIG = QUICK.updated(bias_correction=False, low_weights="derived", lower_first_last=True)


def check_mixed(program: Program, x: Floats, isa: str) -> None:
    """Every ratio, batches of one and all, inputs in either memory format and at an odd address."""
    reference, engine = ReferenceEngine(program), CpuEngine(program, isa=isa, kernels="fixed")
    for ratio in program.ratios:
        for n in (1, len(x)):
            want = outputs_of(reference.run(x[:n], ratio))
            strided = torch.from_numpy(x[:n]).contiguous(memory_format=torch.channels_last)
            shifted = np.zeros(x[:n].size + 1, np.float32)[1:].reshape(x[:n].shape)
            shifted[:] = x[:n]
            for own in (x[:n], strided, shifted):
                for other in (engine, reference):
                    for got, exact in zip(outputs_of(other.run(own, ratio)), want, strict=True):
                        wrong = f"{int((got != exact).sum())} of {exact.size} values differ"
                        assert same_bits(got, exact), f"{isa}, ratio {ratio}, batch {n}: {wrong}"


# ---- captured networks -----------------------------------------------------------------------------------------------------


class MeanReadTwice(nn.Module):
    """Statistics of channels in float between integer layers, and layers kept in float (`kept`)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.kept = (nn.Conv2d(c, 24, 3, padding=1) for c in (3, 24, 24))
        self.down, self.up, self.kept_head = nn.Linear(24, 9), nn.Linear(9, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        mean = x.mean((2, 3))
        x = x * torch.sigmoid(self.up(torch.relu(self.down(mean))) * mean)[:, :, None, None]
        x = torch.relu(self.kept(x - mean[:, :, None, None]))
        return self.kept_head(x.mean((2, 3))), torch.relu(self.second(x))


class Upsampling(nn.Module):
    """GroupNorm, SiLU and Upsample as in diffusion networks."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 24, 3, padding=1) for c in (3, 24, 24))
        self.norms = nn.ModuleList(nn.GroupNorm(g, 24) for g in (4, 8))
        self.kept = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.silu(self.norms[0](self.convs[0](x))), scale_factor=2.0)
        x = F.interpolate(F.silu(self.norms[1](self.convs[1](x))), scale_factor=2.0, mode="bilinear")
        return self.kept(torch.relu(self.convs[2](x)).mean((2, 3)))


@pytest.mark.parametrize("network", [MeanReadTwice, Upsampling])
def test_float_operators_inside_of_convolutional_nets(network: type[nn.Module], helpers: Any) -> None:
    torch.manual_seed(3)
    config = CONFIG.updated(ignored=("kept*",))
    program = quantize_prepared(prepare(network().eval(), [helpers.images(12, 7, seed=1)], config), config)
    assert program.float_reasons
    check_mixed(program, helpers.images(4, 7, seed=2).numpy(), ISAS[0])


# ---- random networks -------------------------------------------------------------------------------------------------------


class Mixed(Network):
    """Steps from [N, C, H, W] to the same; `kept` names layers to leave in float."""

    def __init__(self, *shape: int, seed: int) -> None:
        super().__init__(*shape, seed=seed)
        self.kept: list[str] = []

    def in_float(self, layer: str) -> str:
        self.kept.append(layer)
        return layer

    def permute(self, x: str, *axes: int) -> str:
        return self.node("permute", [x], {"axes": list(axes)})

    def step(self, kind: str, x: str) -> str:
        n, c, h, w = self.shape(x)
        if kind in ("conv", "residual", "depthwise"):
            groups = c if kind == "depthwise" else 1
            return self.conv(x, c, groups=groups, residual=x if kind == "residual" else None)
        if kind in ("float conv", "float pointwise"):
            return self.in_float(self.conv(x, c, 3 if kind == "float conv" else 1))
        if kind == "tokens":
            gamma, beta = (self.constant(self.rng.normal(1, 0.3, c)) for _ in range(2))
            y = self.permute(x, 0, 2, 3, 1)
            y = self.node("layer_norm", [y, gamma, beta], {"normalized_shape": [c], "eps": 1e-5})
            y = self.linear(self.unary("gelu", self.linear(y, 2 * c, None)), c, None)
            return self.node("add", [x, self.permute(y, 0, 3, 1, 2)])
        if kind == "float tokens":
            y = self.in_float(self.linear(self.permute(x, 0, 2, 3, 1), c, None))
            return self.node("add", [x, self.permute(y, 0, 3, 1, 2)])
        if kind == "attention":
            y = self.node("reshape", [x], {"shape": [["N", 1], c, h * w]})
            scores = self.node("matmul", [y, y], {"transpose_b": True, "scale": 0.1})
            y = self.node("matmul", [self.node("softmax", [scores], {"axis": 2}), y])
            return self.node("reshape", [y], {"shape": [["N", 1], c, h, w]})
        if kind == "gate":
            return self.squeeze_and_excite(x, 5)
        if kind == "float gate":  # axes of one element have strides too
            gate = self.in_float(self.conv(self.mean(x, keepdim=True), c, 3, activation=None))
            return self.node("mul", [x, self.unary("sigmoid", gate)])
        if kind == "mean read twice":
            mean = self.mean(x, keepdim=True)
            return self.node("add", [self.node("mul", [x, self.unary("sigmoid", mean)]), mean])
        if kind == "mean of channels":
            return self.node("add", [x, self.node("mean", [x], {"axes": [1], "keepdim": True})])
        if kind == "group norm":
            gamma, beta = (self.constant(self.rng.normal(1, 0.3, c)) for _ in range(2))
            return self.unary("silu", self.aten("group_norm.default", (n, c, h, w), x, 4, gamma, beta, 1e-5))
        if kind == "softmax":
            return self.node("mul", [x, self.node("softmax", [x], {"axis": int(self.rng.integers(1, 4))})])
        if kind == "spread":
            spread = self.aten("var.correction", (n, 1, h, w), x, [1], correction=0, keepdim=True)
            return self.node("mul", [x, self.aten("rsqrt.default", (n, 1, h, w), self.unary("softplus", spread))])
        if kind == "bilinear":
            y = self.aten("upsample_bilinear2d.vec", (n, c, 2 * h, 2 * w), x, None, False, [2.0, 2.0])
            return self.pool("max_pool", y)
        if kind == "nearest":
            y = self.aten("upsample_nearest2d.vec", (n, c, 2 * h, 2 * w), x, None, [2.0, 2.0])
            return self.pool("avg_pool", y)
        if kind == "roll":
            return self.node("roll", [x], {"shifts": [1, 1], "axes": [1, 3]})
        if kind == "concat":
            half = self.node("slice", [x], {"axis": 1, "start": 0, "stop": c // 2, "step": 1})
            rest = self.node("slice", [x], {"axis": 1, "start": c // 2, "stop": c, "step": 1})
            return self.node("concat", [self.unary("tanh", rest), half], {"axis": 1})
        return self.unary(kind, x)


KINDS = (
    "conv", "conv", "conv", "residual", "depthwise", "float conv", "float pointwise", "tokens", "float tokens", "attention",
    "gate", "float gate", "mean read twice", "mean of channels", "group norm", "softmax", "spread", "bilinear", "nearest",
    "roll", "concat", *UNARY[:5],
)  # fmt: skip


@dataclass
class MixedNetwork:
    """A network, and its layers to be kept in float."""

    graph: Graph = field(repr=False)
    kinds: list[str]
    kept: tuple[str, ...]


@st.composite
def mixed_networks(draw: st.DrawFn) -> MixedNetwork:
    b = Mixed(draw(st.integers(2, 4)), draw(st.integers(3, 7)), draw(st.integers(3, 7)), seed=draw(st.integers(0, 999)))
    width = 8 * draw(st.integers(1, 5))
    x = b.conv("x", width)
    if draw(st.booleans()):
        b.in_float(x)
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8))
    for kind in kinds:
        x = b.step(kind, x)
    head = b.linear(b.mean(x), 3, activation=None)
    if draw(st.booleans()):
        b.in_float(head)
    outputs = [head, x] if draw(st.booleans()) else [head]
    return MixedNetwork(b.done(*outputs), kinds, tuple(b.kept))


def run_mixed(network: MixedNetwork, isa: str) -> None:
    program = quantized(network.graph, CONFIG.updated(ignored=network.kept, sort_channels=False))
    check_mixed(program, samples(program.graph, 3), isa)


@settings(max_examples=10, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(network=mixed_networks(), isa=st.sampled_from(ISAS or [""]))
def test_random_mixed_networks(network: MixedNetwork, isa: str) -> None:
    run_mixed(network, isa)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(network=mixed_networks(), isa=st.sampled_from(ISAS or [""]))
def test_random_mixed_networks_at_length(network: MixedNetwork, isa: str) -> None:
    run_mixed(network, isa)
