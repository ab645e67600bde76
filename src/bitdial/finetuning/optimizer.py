"""The optimizer of a training run, from its settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bitdial.finetuning.config import FinetuneConfig

MOMENTUM = 0.9


def make_optimizer(
    decayed: Iterable[Tensor], *others: Iterable[Tensor], config: FinetuneConfig
) -> torch.optim.Optimizer:
    """AdamW or SGD, as `config` says, with a group of parameters for each argument that is not empty.

    Weight decay is for the first alone. Checkpoints number the parameters in the order given here.
    """
    groups = [{"params": list(decayed), "weight_decay": config.weight_decay}]
    groups += [{"params": list(parameters), "weight_decay": 0.0} for parameters in others]
    groups = [g for g in groups if g["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=config.learning_rate)
