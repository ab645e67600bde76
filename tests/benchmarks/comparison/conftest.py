"""The digits network, with BatchNorm statistics of its data but untrained, as the common ground of all methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitdial.pipeline import Prepared, prepare
from bitdial.quantization.config import QuantizeConfig
from bitdial.zoo.digits_data import load_digits_split
from bitdial.zoo.digits_net import digits
from comparison import Ground

QUICK = QuantizeConfig(target="paper", selector="greedy", calibration_images=16, search_images=8, batch_size=8, group_size=16)


@pytest.fixture(scope="session")
def digits_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Training images, at half their size to save time, and labels."""
    images, labels, _, _ = load_digits_split(0)
    return torch.from_numpy(images)[:, :, ::2, ::2].contiguous(), torch.from_numpy(labels)


@pytest.fixture(scope="session")
def prepared(digits_data: tuple[torch.Tensor, torch.Tensor], helpers: Any) -> Prepared:
    torch.manual_seed(4)
    model = helpers.estimate(digits(), digits_data[0][:128])
    return prepare(model, [digits_data[0][:16]], QUICK)


@pytest.fixture(scope="session")
def config() -> QuantizeConfig:
    return QUICK


@pytest.fixture(scope="session")
def ground(prepared: Prepared, digits_data: tuple[torch.Tensor, torch.Tensor]) -> Ground:
    return Ground(prepared, QUICK, digits_data[1][:16].numpy())
