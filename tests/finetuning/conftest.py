"""Small quantized networks to train, and a training set they can learn."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from bitdial.pipeline import Prepared, prepare, quantize_prepared
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program

QUICK = QuantizeConfig(target="paper", selector="greedy", calibration_images=32, search_images=16, batch_size=16, group_size=8)


class Subject(NamedTuple):
    """A network, prepared and quantized, and the calibration images."""

    prepared: Prepared
    program: Program
    config: QuantizeConfig
    images: Tensor


def quantized(model: nn.Module, images: Tensor, config: QuantizeConfig = QUICK) -> Subject:
    prepared = prepare(model, [images], config)
    return Subject(prepared, quantize_prepared(prepared, config), config, images)


class ConcatNet(nn.Module):
    """Concat, tables (SiLU, sigmoid), a product of two branches, pools, a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 1, bias=False)
        self.right = nn.Conv2d(16, 16, 3, padding=1)
        self.gate = nn.Conv2d(32, 32, 1)
        self.hidden = nn.Linear(32, 24, bias=False)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        x = x * torch.sigmoid(self.gate(x))
        x = nn.functional.avg_pool2d(x, 2).mean(dim=(2, 3))
        out: Tensor = self.head(torch.relu(self.hidden(x)))
        return out


@pytest.fixture(scope="session")
def conv_subject(conv_net: nn.Module, helpers: Any) -> Subject:
    return quantized(conv_net, helpers.images(32, seed=5))


@pytest.fixture(scope="session")
def transformer_subject(transformer: nn.Module, helpers: Any) -> Subject:
    return quantized(transformer, helpers.images(32, seed=6))


@pytest.fixture(scope="session")
def concat_subject(helpers: Any) -> Subject:
    torch.manual_seed(3)
    return quantized(ConcatNet().eval(), helpers.images(32, seed=7))


@pytest.fixture(scope="session")
def lessons(conv_subject: Subject, helpers: Any) -> tuple[Tensor, Tensor]:
    """96 images with the labels that the float network gives them."""
    from bitdial.graph.interpreter import run_graph

    images = helpers.images(96, seed=8)
    with torch.no_grad():
        labels = run_graph(conv_subject.prepared.graph, [images])[0].argmax(dim=1)
    return images, labels
