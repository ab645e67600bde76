"""One model truncated to any width at run time, trained at all of its widths together.

Source: Yu, Li, Shi, Huang, Hua, Shi, "Any-Precision Deep Neural Networks" (AAAI 2021), and its published code: in every step
the widest network learns from the labels, each narrower one from the soft answers of the next wider one; weights are shared,
normalization statistics and their affine vectors are each width's own.

Assumed, or changed: weights are symmetric with a scale per output channel, and narrower ones are their top bits (the
paper squashes weights with tanh and scales by their mean); training starts from the trained network with BatchNorm
folded, a normalization per width put behind every convolution (running averages serve in training too), biases per
width for linear layers; the widest network also has bitdial's distillation from the float network; ranges of activations
are of least squared error per width and fixed. Epochs count passes over the data: a step runs every width, bitdial's runs two.
Its widths are whole: at an average of 5 or 6 bits all layers have 5 or 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.finetuning.loss import FloatTeacher, check_targets, loss
from bitdial.graph.ir import Graph
from comparison.training import Training, optimize_parameters
from comparison.widths import SharedWidths


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over samples of -sum softmax(teacher) log softmax(logits); [n, classes] each, no gradient to the teacher."""
    return -(F.softmax(teacher.detach(), dim=-1) * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()


def train_widths(
    shared: SharedWidths, graph: Graph, training: Training, progress: Callable[[float], None] | None = None
) -> dict[str, float]:
    """Train all widths in place. graph: the float network, the widest width's teacher. Returns JSON-able figures."""
    config = training.config
    teacher = FloatTeacher(graph, "cpu", config.bfloat16) if config.distillation > 0.0 else None

    def step(inputs: list[Tensor], targets: Tensor) -> Tensor:
        total = torch.zeros(())
        above: Tensor | None = None
        for bits in shared.widths:
            network = shared.network(bits)
            network.train()
            network.observing = True
            logits = network(inputs, 0)[0]
            network.observing = False
            if above is None:
                check_targets(targets, logits.shape[-1])
                value = loss(logits, targets, teacher(inputs) if teacher is not None else None, config)
            else:
                value = soft_cross_entropy(logits, above)
            value.backward()  # type: ignore[no-untyped-call]
            above = logits.detach()
            total = total + value.detach()
        return total / len(shared.widths)

    return optimize_parameters(shared.parameters(), training, step, progress)
