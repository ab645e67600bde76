"""The accuracy curve: one pass over the data per ratio, and the baselines beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitdial.engines.reference.labels import Labels
from bitdial.errors import DataError

Run = Callable[[Any], Any]
Metric = Callable[[Tensor, Any], float]
Batch = tuple[Any, Any]  # (inputs, targets or None)


def top1(outputs: Tensor, targets: Any) -> float:
    """Share of samples whose largest output is the target class."""
    labels = torch.as_tensor(targets, device=outputs.device)
    return float((outputs.argmax(dim=-1) == labels).double().mean())


def _tensor(outputs: Any) -> Tensor:
    """The first output of a network, whatever it returns them in."""
    while isinstance(outputs, (tuple, list, Mapping)):
        outputs = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    return torch.as_tensor(outputs)


def evaluate_curve(
    run: Callable[[Any, float], Any],
    ratios: Sequence[float],
    batches: Iterable[Batch],
    metric: Metric | None = None,
    progress: Callable[[float], None] | None = None,
    total: int | None = None,
) -> list[dict[str, Any]]:
    """Accuracy, agreement with the first ratio, and soft-label distance to it, per ratio, in one pass over the data.

    run: (inputs, ratio) -> outputs; ratios[0] is what agreement is measured against (0: the 8-bit model). batches:
    (inputs, targets); targets None leaves the accuracy out. metric: (outputs, targets) -> mean over the batch; default
    top-1. Returns one row per ratio: ratio, accuracy, standard_error, agreement (share of samples with the same top answer;
    None for outputs without classes), distance, samples. Raises DataError on empty data.
    """
    metric = metric or top1
    scores = [0.0] * len(ratios)
    agree = [0.0] * len(ratios)
    squares = [0.0] * len(ratios)
    samples, labelled, classes = 0, False, True
    labels: Labels | None = None
    with torch.no_grad():
        for number, (inputs, targets) in enumerate(batches):
            base: Tensor | None = None
            for i, ratio in enumerate(ratios):
                outputs = _tensor(run(inputs, ratio))
                base = outputs if base is None else base
                labels = Labels.of(base.double()) if labels is None else labels
                n = outputs.shape[0]
                classes = classes and labels.classes
                if classes:
                    agree[i] += float((outputs.argmax(-1) == base.argmax(-1)).double().mean()) * n
                difference = labels(outputs.double()) - labels(base.double())
                squares[i] += float(difference.pow(2).sum())
                if targets is not None:
                    labelled = True
                    scores[i] += float(metric(outputs, targets)) * n
            assert base is not None
            samples += base.shape[0]
            if progress is not None and total:
                progress((number + 1) / total)
    if samples == 0:
        raise DataError("there are no samples to evaluate on")
    rows = []
    for i, ratio in enumerate(ratios):
        accuracy = scores[i] / samples if labelled else None
        bounded = accuracy is not None and 0.0 <= accuracy <= 1.0
        rows.append(
            {
                "ratio": ratio,
                "accuracy": accuracy,
                "standard_error": math.sqrt(accuracy * (1 - accuracy) / samples)
                if bounded and accuracy is not None
                else None,
                "agreement": agree[i] / samples if classes else None,
                "distance": math.sqrt(squares[i] / samples),
                "samples": samples,
            }
        )
    return rows
