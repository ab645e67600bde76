"""Mean outputs of a program's layers at ratio 0: what the bias table of a finetuned network restores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channel_sums
from bitdial.engines.reference.executor import Executor, Setting
from bitdial.quantization.instructions import Contract, MatMul
from bitdial.quantization.program import Program


class _MeanExecutor(Executor):
    """Sums the accumulators of every layer on its way."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def accumulators(
        self, step: Contract | MatMul, values: Mapping[str, Tensor], setting: Setting | None, batch: int
    ) -> Tensor:
        acc = super().accumulators(step, values, setting, batch)
        if isinstance(step, Contract):
            total, count = channel_sums(acc, step.axis)
            self.sums[step.name] = self.sums.get(step.name, torch.zeros_like(total)) + total
            self.counts[step.name] = self.counts.get(step.name, 0) + count
        return acc


def program_output_means(
    program: Program, layers: Sequence[str], batches: Sequence[Sequence[Tensor]]
) -> dict[str, npt.NDArray[np.float64]]:
    """float64 [O] per layer: mean of its outputs at ratio index 0 with its bias, before residual and activation, in real
    units (the counterpart of `float_output_means`)."""
    executor = _MeanExecutor(program)
    settings = executor.settings(0)
    with torch.no_grad():
        for batch in batches:
            executor.run(batch, settings)
    result = {}
    for name in layers:
        layer = program.layers[name]
        unit = layer.weight_scale.astype(np.float64) * program.qparams[program.instruction(name).inputs[0]].scale
        mean = executor.sums[name].cpu().numpy() / executor.counts[name]
        result[name] = (mean + layer.bias[0]) * unit
    return result
