"""Tuning of low weights and bias rows: the twin is trained on its float network's answers to the calibration samples.

There are no labels and few samples, so the float network's outputs are the targets, and those of its layers too: they say far
more of a sample than its output does. 8-bit weights, scales and shifts stay. Sources: outputs of blocks as targets: BRECQ (Li et
al. 2021), here of all layers at once, through the quantized network; activations left at 8 bits one by one and at random: QDrop
(Wei et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, generator
from bitdial.finetuning.network import TrainableNetwork
from bitdial.finetuning.trainer import Trainer, TrainingProgress
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph

_DROP_STREAM = 11  # apart from the streams of order and ratios


@dataclass(frozen=True)
class CalibrationBatches:
    """Calibration samples, shuffled for every pass over them, with the float network's first outputs as targets. Samples are few,
    so that an epoch is as many batches as it is told to be; a short batch at a pass's end is left out.

    inputs: one tensor per model input, batch first. targets: [N, ..]. size: samples per batch, at most N.
    """

    inputs: Sequence[Tensor]
    targets: Tensor
    size: int
    steps: int
    seed: int = 0

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        per_pass = len(self.targets) // self.size
        for step in range(number * self.steps + start, (number + 1) * self.steps):
            done, place = divmod(step, per_pass)
            order = torch.randperm(len(self.targets), generator=generator(self.seed, done))
            at = order[place * self.size : (place + 1) * self.size]
            yield [x[at] for x in self.inputs], self.targets[at]


@dataclass(frozen=True)
class Distance:
    """How far outputs are from the float network's: by Kullback-Leibler of soft labels where they are answers, else by squares.

    spread: mean square of the float outputs about their mean sample; 1 where they are answers.
    """

    answers: bool
    spread: float = 1.0
    temperature: float = 1.0

    def __call__(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Mean over the samples. Both [N, ..]."""
        if self.answers:
            t = self.temperature
            own, theirs = F.log_softmax(outputs / t, dim=-1), F.log_softmax(wanted / t, dim=-1)
            return t * t * F.kl_div(own, theirs, reduction="batchmean", log_target=True)
        return (outputs - wanted).square().mean() / self.spread


class LowTrainer(Trainer):
    """Trains low weights and bias rows of a `TrainableNetwork` made with `tune_low`; targets of its batches are float outputs.

    graph: the float network. distance: of the outputs. features: weight of the layers' outputs in the loss; 0: none.
    """

    def __init__(
        self,
        network: TrainableNetwork,
        batches: CalibrationBatches,
        config: FinetuneConfig,
        *,
        graph: Graph,
        distance: Distance,
        features: float,
        validation: Sequence[Batch],
        checkpoint: Path | None = None,
        context: str = "",
        progress: Callable[[TrainingProgress], None] | None = None,
    ) -> None:
        super().__init__(
            network, batches, config, teacher=None, derive=lambda network, shifts: network.program, validation=validation,
            checkpoint=checkpoint, context=f"{context} {distance} {features}", progress=progress,
        )  # fmt: skip
        self.graph, self.distance, self.features = graph, distance, features
        self.constants = constant_tensors(graph)
        program = network.program
        self.layers = {n for n in program.layers if n in program.qparams and program.layers[n].weight is not None}

    def pass_loss(self, inputs: list[Tensor], targets: Tensor, teacher: Tensor | None, index: int, step: int) -> Tensor:
        network = self.network
        network.dropping = generator(self.config.seed, _DROP_STREAM, step)
        wanted: dict[str, Tensor] = {}
        if self.features:
            with torch.no_grad():
                run_graph(self.graph, inputs, constants=self.constants, observe=self._keeper(wanted))
        parts: list[Tensor] = []
        network.watching = None if not self.features else lambda name, x: self._compare(name, x, wanted, parts)
        value = self.distance(network(inputs, index)[0], targets)
        network.watching = network.dropping = None
        return value + self.features * torch.stack(parts).mean() if parts else value

    def _keeper(self, kept: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
        def keep(name: str, x: Tensor) -> None:
            if name in self.layers:
                kept[name] = x

        return keep

    def _compare(self, name: str, x: Tensor, wanted: Mapping[str, Tensor], parts: list[Tensor]) -> None:
        """Squared error of a layer's outputs, as a share of their variance."""
        if name in wanted:
            target = wanted[name]
            error = (x.float() * self.network.scale(name) - target).square().mean()
            parts.append(error / target.var().clamp_min(1e-12))

    def distances(self) -> list[float]:
        """On the held-out samples, at every ratio index from 1."""
        network = self.network
        network.eval()
        total, count = np.zeros(len(network.program.ratios) - 1), 0
        with torch.no_grad():
            for inputs, targets in self.validation:
                for index in range(1, len(network.program.ratios)):
                    total[index - 1] += len(targets) * float(self.distance(network(inputs, index)[0], targets))
                count += len(targets)
        return [float(t) / count for t in total]

    def judge(self) -> dict[str, Any]:
        """accuracies (none), distances at every ratio, score: how much smaller they are than at the start, on the mean."""
        distances = self.distances()
        first = self.record.evaluations[0]["distances"] if self.record.evaluations else distances
        pairs = zip(distances, first, strict=True)
        score = -float(np.mean([np.log(max(own, 1e-12) / max(before, 1e-12)) for own, before in pairs]))
        return {"accuracies": [], "distances": distances, "score": score, "standard_error": 0.0}
