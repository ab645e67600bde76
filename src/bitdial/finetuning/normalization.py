"""Running statistics of a convolution's outputs, taken out and put back: BatchNorm re-estimated while weights move.

The graph has its BatchNorms folded, so a layer's outputs have the mean and spread that BatchNorm gave them. Training moves
both. An `OutputNorm` watches them (running mean and deviation over batches, at high precision) and folds the layer's weights
so that they stay what two trained vectors, `gain` and `shift`, say: y = gain * (conv(x) - mean) / deviation + shift, with
statistics that are averages, never the batch's own (as BatchNorm in evaluation mode, with statistics that follow).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.05


class OutputNorm(nn.Module):
    """gain, shift: parameters [O]; mean, deviation: buffers [O], of the outputs before normalization.

    Until `start` has been told the first statistics it is the identity.
    """

    mean: Tensor
    deviation: Tensor
    started: Tensor

    def __init__(self, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(outputs, device=device))
        self.shift = nn.Parameter(torch.zeros(outputs, device=device))
        self.register_buffer("mean", torch.zeros(outputs, device=device))
        self.register_buffer("deviation", torch.ones(outputs, device=device))
        self.register_buffer("started", torch.zeros((), device=device))

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [O, ..] and bias [O] with the normalization folded in."""
        mean, deviation = self.mean.clone(), self.deviation.clone()  # `observe` may change them before the backward pass
        gain = self.gain / deviation
        return weight * gain.reshape(-1, *[1] * (weight.dim() - 1)), (bias - mean) * gain + self.shift

    @torch.no_grad()
    def observe(self, acc: Tensor, unit: Tensor, bias: Tensor) -> None:
        """Take in a batch: accumulators [N, O, ..] of the folded layer, their real value, its folded bias."""
        others = [0, *range(2, acc.dim())]
        spread, mean = torch.var_mean(acc.float(), dim=others, correction=0)
        mean, spread = mean * unit + bias, spread.sqrt() * unit  # of the normalized outputs
        gain = torch.where(self.gain.abs() > 1e-8, self.gain, 1e-8)
        raw_mean = (mean - self.shift) / gain * self.deviation + self.mean
        raw_deviation = (spread / gain.abs() * self.deviation).clamp_min(1e-12)
        if not bool(self.started):  # first statistics: normalize by them, and give back what they took
            self.mean.copy_(raw_mean)
            self.deviation.copy_(raw_deviation)
            self.gain.copy_(raw_deviation)
            self.shift.copy_(raw_mean)
            self.started.fill_(1.0)
            return
        self.mean.lerp_(raw_mean, MOMENTUM)
        self.deviation.lerp_(raw_deviation, MOMENTUM)
