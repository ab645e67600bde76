"""What every update does, as pure functions of its number: learning rate, ratios of its passes, moments of derivation."""

from __future__ import annotations

import math

import torch

from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import generator

_RATIO_STREAM = 7  # apart from the streams of order and augmentation


def rate(update: int, total: int, config: FinetuneConfig) -> float:
    """Learning rate of an update: linear warm-up, then half a cosine to 0."""
    warm = max(1, round(config.warmup * total))
    if update < warm:
        return config.learning_rate * (update + 1) / warm
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (update - warm) / max(1, total - warm)))


def low_index(step: int, n_ratios: int, config: FinetuneConfig) -> int:
    """Ratio index of a step's low pass (1 .. n_ratios - 1)."""
    highest = n_ratios - 1
    if config.low_ratio == "highest" or highest == 1 or (config.low_ratio == "mixed" and step % 2 == 0):
        return highest
    last = highest if config.low_ratio == "uniform" else highest - 1
    return 1 + int(torch.randint(0, last, (), generator=generator(config.seed, _RATIO_STREAM, step)))


def passes(step: int, n_ratios: int, config: FinetuneConfig) -> list[tuple[int, float]]:
    """(ratio index, weight of its loss) of every pass of a step."""
    if config.passes == "sampled":
        drawn = int(torch.randint(0, n_ratios, (), generator=generator(config.seed, _RATIO_STREAM, step)))
        return [(drawn, config.low_weight if drawn else 1.0)]
    low = (low_index(step, n_ratios, config), config.low_weight)
    return [low] if config.passes == "low" else [(0, 1.0), low]


def derivation_updates(total: int, config: FinetuneConfig) -> frozenset[int]:
    """Updates before which shifts and bias table are derived anew; none in the last fifth, which settles on the last."""
    n = config.rederivations
    return frozenset(round(total * 0.8 * (i + 1) / n) for i in range(n)) - {0, total} if n else frozenset()


def evaluation_updates(per_epoch: int, total: int, config: FinetuneConfig) -> frozenset[int]:
    """Updates after which the network is evaluated on the validation data; the last always is."""
    distance = max(1, per_epoch // config.evaluations)
    return frozenset(range(distance, total + 1, distance)) | {total}
