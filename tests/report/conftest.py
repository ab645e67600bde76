"""An example report: the structure is ResNet-20's, the figures are invented and stand for nothing measured."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest

from bitdial.report.data import Ablation, Baseline, CurvePoint, FloatOp, LayerInfo, ReportData, Saturation, Search
from bitdial.report.page import render_html

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
GROUP = 8


def make_layer(
    name: str, source: str, inputs: int, outputs: int, size: int, rng: random.Random, **more: Any
) -> LayerInfo:
    """One 3x3 convolution with groups of GROUP channels, sorted by range as the layout pass leaves them."""
    n_groups = max(1, -(-inputs // GROUP))
    bounds = [min(g * GROUP, inputs) for g in range(n_groups + 1)]
    ranges = sorted((min(255.0, 255.0 * 2 ** (-abs(rng.gauss(0.0, 1.6)))) for _ in range(inputs)), reverse=True)
    ranges[0] = 255.0
    used = [round(max(ranges[a:b])).bit_length() for a, b in zip(bounds, bounds[1:], strict=False)]
    first_low = [rng.choice((1, 2, 3, 4)) for _ in range(n_groups)]
    unused = {bits: used.count(8 - bits) / n_groups for bits in sorted({8 - u for u in used})}
    return LayerInfo(
        name=name,
        source=source,
        kind="conv",
        shape=f"{outputs}x{inputs}x3x3",
        macs=inputs * outputs * 9 * size * size,
        eligible=True,
        n_groups=n_groups,
        low=[[index >= first for first in first_low] for index in range(len(RATIOS))],
        activation_shift=[max(0, u - 4 - (rng.random() < 0.3)) for u in used],
        weight_shift_histogram={2: 3 * outputs, 3: 9 * outputs, 4: 4 * outputs},
        channel_ranges=ranges,
        group_bounds=bounds,
        unused_bits_activations=unused,
        unused_bits_weights={0: 0.3, 1: 0.45, 2: 0.2, 3: 0.05},
        engine="reference",
        amax=15,
        wmax=7,
        **more,
    )


def build_example() -> ReportData:
    rng = random.Random(5)
    layers = [
        LayerInfo(
            name="conv1",
            source="conv1",
            kind="conv",
            shape="16x3x3x3",
            macs=442368,
            reason="first layer",
            engine="reference",
        ),
    ]
    channels = 16
    for stage, (width, size) in enumerate(((16, 32), (32, 16), (64, 8)), 1):
        for block in range(3):
            for half in (1, 2):
                source = f"layer{stage}.{block}.conv{half}"
                layers.append(make_layer(source.replace(".", "_"), source, channels, width, size, rng))
                channels = width
    layers.append(
        LayerInfo(
            name="fc", source="linear", kind="linear", shape="10x64", macs=640, reason="last layer", engine="reference"
        )
    )
    total = sum(layer.macs for layer in layers)
    eligible = sum(layer.macs for layer in layers if layer.eligible)
    curve = []
    for index, ratio in enumerate(RATIOS):
        low = sum(layer.macs * layer.low_fraction(index) for layer in layers)
        accuracy = (0.8784, 0.8779, 0.8752, 0.8691, 0.8655)[index]
        agreement = (1.0, 0.981, 0.969, 0.947, 0.931)[index]
        curve.append(
            CurvePoint(
                ratio=ratio,
                accuracy=accuracy,
                agreement=agreement,
                low_share=low / total,
                eligible_share=low / eligible,
                distance=0.02 * index**1.5,
            )
        )
    naive = ((0.25, 0.8702), (0.5, 0.8580), (0.75, 0.8391), (1.0, 0.8192))
    history = []
    for k, target in enumerate((0.25, 0.5, 0.75)):
        best = 1.6 * (k + 1)
        for generation in range(0, 50, 2):
            images = 64 if generation < 30 else 256
            best -= rng.random() * 0.05 * (k + 1)
            scale = 1.0 if images == 64 else 1.12
            mean = scale * best * (1.04 + 0.25 * 0.93**generation)
            history.append(
                {"target": target, "generation": generation, "best": scale * best, "mean": mean, "n_images": images}
            )
    return ReportData(
        title="ResNet-20 on CIFAR-10",
        model="resnet20",
        created="2026-01-31T12:00:00Z",
        provenance={
            "bitdial": "0.1.0",
            "torch": "2.13.0",
            "cpu": "Example CPU, 2 cores",
            "instruction_sets": ["avx2", "avx512f", "avx512vnni"],
            "threads": 2,
            "seed": 0,
            "config": {"selector": "evolutionary", "group_size": GROUP, "low_bits": 4, "bias_correction": True},
            "calibration": {"images": 256, "method": "mse", "seconds": 4.2},
        },
        ratios=RATIOS,
        curve=curve,
        baselines=[
            Baseline(label="float32", accuracy=0.8787, agreement=0.994),
            *(Baseline(label="naive 4-bit", accuracy=a, agreement=a + 0.05, ratio=r) for r, a in naive),
        ],
        n_images=10000,
        layers=layers,
        float_ops=[
            FloatOp(
                node="log_softmax", op="aten.log_softmax.int", source="head", reason="no integer form; 0 multiplies"
            )
        ],
        saturation=[
            Saturation(layer=layer.name, ratio=ratio, saturated=int(rng.random() * 900 * ratio), total=262144)
            for layer in layers[1:8]
            for ratio in RATIOS[1:]
        ],
        ablation=[
            Ablation(
                factor="baseline",
                setting="G = 16, evolutionary",
                accuracy={0.5: 0.8752, 0.75: 0.8691, 1.0: 0.8655},
                standard_error=0.0033,
                n_images=10000,
            ),
            Ablation(
                factor="selector",
                setting="greedy",
                accuracy={0.5: 0.8731, 0.75: 0.8660, 1.0: 0.8655},
                standard_error=0.0033,
                n_images=10000,
            ),
            Ablation(
                factor="selector",
                setting="random",
                accuracy={0.5: 0.8702, 0.75: 0.8610, 1.0: 0.8655},
                standard_error=0.0033,
                n_images=10000,
            ),
            Ablation(
                factor="bias correction",
                setting="off",
                accuracy={0.5: 0.8680, 0.75: 0.8440, 1.0: 0.8400},
                standard_error=0.0033,
                n_images=10000,
            ),
            Ablation(
                factor="low width",
                setting="5 bits",
                accuracy={0.5: 0.8779, 0.75: 0.8741, 1.0: 0.8751},
                standard_error=0.0033,
                n_images=10000,
            ),
        ],
        search=Search(
            history=history,
            statistics={
                "seconds": 252.4,
                "evaluations": 7500,
                "multiplies": 1.31e13,
                "cache_hits": 4211,
                "peak_memory_bytes": 812 * 2**20,
            },
        ),
        layout={"permuted_spaces": 9, "reorders": [], "spaces": {"layer1": "16 channels", "layer2": "32 channels"}},
    )


@pytest.fixture
def example() -> ReportData:
    return build_example()


@pytest.fixture(scope="session")
def example_page() -> str:
    """The example's page with all its charts, drawn once."""
    return render_html(build_example())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib: pages have no charts, and come a hundred times faster."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
