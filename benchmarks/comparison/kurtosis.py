"""Kurtosis regularization: weights trained towards a uniform distribution, which every width quantizes well.

Source: Chmiel, Banner, Shomron, Nahshan, Bronstein, Weiser and others, "Robust Quantization: One Model to Rule Them All"
(NeurIPS 2020): loss + (lambda / layers) * sum over layers of (kurtosis(W) - 1.8)^2, where 1.8 is the kurtosis of a uniform
distribution; quantized after training at any width.

Assumed: the target is for the weights of every low-eligible layer together, after each output channel was divided by its
root mean square: BatchNorm is folded here, whose scales would make any tensor heavy-tailed, and scales are per channel
anyway. lambda is a setting (`ground.Settings.kurtosis_weight`). The network starts from its trained
weights with BatchNorm folded and is trained as many epochs as bitdial's finetuning, with the same loss beside the penalty;
afterwards each width is uniform quantization with ranges of least squared error and corrected biases (`uniform`).
Its widths are whole: at an average of 5 or 6 bits all layers have 5 or 6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

UNIFORM_KURTOSIS = 1.8


def kurtosis(weight: Tensor) -> Tensor:
    """Fourth central moment over the squared variance of all entries (a normal distribution: 3, a uniform one: 1.8).

    weight: [n], or [O, ..], whose output channels are first divided by their root mean square.
    """
    x = weight.float().flatten(1) if weight.dim() > 1 else weight.float()
    if weight.dim() > 1:
        x = x / x.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    square = (x - x.mean()).square()
    return square.square().mean() / square.mean().square().clamp_min(1e-24)


def kurtosis_penalty(weights: Mapping[str, Tensor], target: float = UNIFORM_KURTOSIS) -> Tensor:
    """Mean over the tensors of the squared distance of their kurtosis to `target`; zero without tensors."""
    if not weights:
        return torch.zeros(())
    return torch.stack([(kurtosis(w) - target).square() for w in weights.values()]).mean()
