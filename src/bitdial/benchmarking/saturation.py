"""How many activations saturate when their channel runs low: the sign of a distribution that calibration did not see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitdial.engines.reference.executor import Executor, Setting
from bitdial.quantization.instructions import Contract
from bitdial.quantization.program import Program


class _Counter(Executor):
    """Counts, per layer, low activations seen and those clipped by the low range."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.clipped: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def extracted(self, step: Contract, x: Tensor, setting: Setting, batch: int) -> Tensor:
        y = super().extracted(step, x, setting, batch)
        if setting.low_channels is not None:
            layer = self.layers[step.name].layer
            channels = self.layers[step.name].axis % x.dim()
            _, power = self.scales(step, x, setting, batch)
            clipped = ((x.abs() / power).round_() > layer.amax).movedim(channels, 0)[setting.low_channels]
            self.clipped[step.name] = self.clipped.get(step.name, 0) + int(clipped.sum())
            self.total[step.name] = self.total.get(step.name, 0) + clipped.numel()
        return y


def count_saturation(program: Program, batches: Iterable[Any], ratio_index: int) -> list[dict[str, Any]]:
    """One row per layer with low groups at a ratio: layer, ratio, saturated, total (activations read at low precision)."""
    counter = _Counter(program)
    settings: Mapping[str, Setting] = counter.settings(ratio_index)
    with torch.no_grad():
        for inputs in batches:
            counter.run([inputs] if isinstance(inputs, Tensor) else list(inputs), settings)
    return [
        {"layer": name, "ratio": program.ratios[ratio_index], "saturated": counter.clipped[name], "total": total}
        for name, total in counter.total.items()
    ]
