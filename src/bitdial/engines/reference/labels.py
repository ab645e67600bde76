"""What a network's outputs say: scores of classes, or numbers. The search, its prediction and the measured curves ask here.

Distances between soft labels say how much an answer changes. Outputs that are no scores (a sentence embedding, a regression)
have no soft labels: softmax over 384 coordinates of an embedding is nearly uniform whatever they are, and its differences follow
the largest coordinate. Distances of such outputs are those of the numbers themselves, as a share of their spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 32  # so many columns or fewer count as classes
DECIDED = 16.0  # with more, the largest share is so many times a uniform one, on the mean. Embeddings of unit variance: 12


def are_class_scores(outputs: Tensor) -> bool:
    """Whether outputs [N, ..., C] are scores of C classes: softmax over the last axis decides between them."""
    if outputs.dim() < 2 or outputs.shape[-1] < 2 or not outputs.is_floating_point():
        return False
    classes = outputs.shape[-1]
    return classes <= FEW or float(torch.softmax(outputs, dim=-1).amax(dim=-1).mean()) * classes >= DECIDED


@dataclass(frozen=True)
class Labels:
    """Callable: outputs -> what distances are measured between. classes: soft labels; else numbers over `spread`."""

    classes: bool
    spread: float = 1.0

    @classmethod
    def of(cls, outputs: Tensor) -> Labels:
        """By example: outputs [N, ...] of the exact network. spread: root of the mean square about the mean sample, summed
        over a sample, so that a distance of 1 is as good as another sample's output."""
        if are_class_scores(outputs):
            return cls(True)
        finite = torch.nan_to_num(outputs.double())
        about = (finite - finite.mean(dim=0, keepdim=True)).square().sum() / max(1, len(finite))
        return cls(False, max(float(about.sqrt()), 1e-30) if len(finite) > 1 and float(about) > 0.0 else 1.0)

    def __call__(self, outputs: Tensor) -> Tensor:
        return torch.softmax(outputs, dim=-1) if self.classes else outputs / self.spread
