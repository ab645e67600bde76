"""What training minimizes: cross-entropy against the labels and distance to a teacher's soft labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.errors import DataError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.graph.interpreter import run_graph
from bitdial.graph.ir import Graph


class FloatTeacher:
    """The network before quantization, frozen."""

    def __init__(self, graph: Graph, device: str, bfloat16: bool) -> None:
        from bitdial.graph.interpreter import constant_tensors

        self.graph, self.device, self.bfloat16 = graph, device, bfloat16
        self.constants = constant_tensors(graph, device)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """float32 logits [N, .., classes]."""
        kind = self.device.split(":")[0]
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bfloat16):
            return run_graph(self.graph, inputs, constants=self.constants)[0].float()


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise DataError for targets that are no class indices of the network."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(f"targets are {targets.dtype}: give class indices as int64")
    largest, smallest = int(targets.max()), int(targets.min())
    if largest >= classes or smallest < -100:
        raise DataError(
            f"the training data have labels from {smallest} to {largest}, the network tells {classes} classes apart; "
            "give the data it was trained for, or a network with as many outputs"
        )


def loss(logits: Tensor, targets: Tensor, teacher: Tensor | None, config: FinetuneConfig) -> Tensor:
    """Weighted cross-entropy plus distillation, mean over samples.

    logits, teacher: [N, .., classes]; targets: [N, ..] class indices. Distillation is KL(teacher || network) at
    `temperature`, times its square (Hinton et al. 2015).
    """
    flat = logits.flatten(0, -2)
    total = torch.zeros((), device=logits.device)
    if config.cross_entropy > 0.0:
        total = total + config.cross_entropy * F.cross_entropy(flat, targets.reshape(-1))
    if config.distillation > 0.0 and teacher is not None:
        t = config.temperature
        student = F.log_softmax(flat / t, dim=1)
        wanted = F.log_softmax(teacher.flatten(0, -2) / t, dim=1)
        divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
        total = total + config.distillation * t * t * divergence
    return total
