"""What methods that train are given, the same for all: data, epochs, rates, losses; and plain training of a float graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.errors import CalibrationError, DataError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, Batches
from bitdial.finetuning.loss import FloatTeacher, check_targets, loss
from bitdial.finetuning.network import trained_constants
from bitdial.finetuning.optimizer import make_optimizer
from bitdial.finetuning.schedule import rate
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.graph.ir import Graph
from bitdial.pipeline.preparing import Prepared, calibrate
from bitdial.quantization.config import QuantizeConfig

Step = Callable[[list[Tensor], Tensor], Tensor]  # (inputs, targets) of a batch -> loss, its gradients accumulated
Penalty = Callable[[Mapping[str, Tensor]], Tensor]  # float weights by constant name -> scalar


@dataclass(frozen=True)
class Training:
    """Epochs, rate, weight decay, teacher and batch size are those of `config`, for bitdial and for every other method."""

    config: FinetuneConfig
    batches: Batches
    validation: tuple[Batch, ...] = ()


def optimize_parameters(
    parameters: Iterable[nn.Parameter], training: Training, step: Step, progress: Callable[[float], None] | None = None
) -> dict[str, float]:
    """Run `step` over all epochs, with the optimizer, warm-up and cosine, and clipping of bitdial's finetuning.

    Returns JSON-able figures: updates, seconds, mean loss of the first and last tenth. Raises DataError for a loss that is
    not finite.
    """
    config = training.config
    own = [p for p in parameters if p.requires_grad]
    optimizer = make_optimizer([p for p in own if p.dim() > 1], [p for p in own if p.dim() <= 1], config=config)
    total = training.batches.steps * config.epochs
    started = time.perf_counter()
    losses: list[float] = []
    for epoch in range(config.epochs):
        for inputs, targets in training.batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(len(losses), total, config)
            optimizer.zero_grad(set_to_none=True)
            value = float(step([channels_last(x) for x in inputs], targets))
            if not math.isfinite(value):
                raise DataError(
                    f"the loss is not finite at update {len(losses)}: train with a lower learning_rate than "
                    f"{config.learning_rate:g}"
                )
            torch.nn.utils.clip_grad_norm_(own, config.gradient_clip or math.inf)
            optimizer.step()
            losses.append(value)
            if progress is not None:
                progress(len(losses) / total)
    tenth = max(1, len(losses) // 10)
    return {
        "updates": float(len(losses)),
        "seconds": time.perf_counter() - started,
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
    }


def train_float(
    graph: Graph, training: Training, penalty: Penalty | None = None, progress: Callable[[float], None] | None = None
) -> tuple[Graph, dict[str, float]]:
    """Train a float graph with a penalty on its weights. Returns (a copy with trained constants, figures).

    The loss is that of bitdial's finetuning (cross-entropy and distillation from the network as it was) plus the penalty.
    """
    config = training.config
    constants = constant_tensors(graph)
    leaves = {n: nn.Parameter(constants[n].clone().float()) for n in trained_constants(graph, batch_norm=False)}
    constants.update(leaves)
    weights = {n: leaves[n] for n in leaves if leaves[n].dim() > 1}
    teacher = FloatTeacher(graph, "cpu", config.bfloat16) if config.distillation > 0.0 else None

    def step(inputs: list[Tensor], targets: Tensor) -> Tensor:
        # Without the cache: inside another autocast it would keep the first step's copies of the weights for good.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bfloat16, cache_enabled=False):
            logits = run_graph(graph, inputs, constants=constants)[0].float()
        check_targets(targets, logits.shape[-1])
        value = loss(logits, targets, teacher(inputs) if teacher is not None else None, config)
        if penalty is not None:
            value = value + penalty(weights)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    figures = optimize_parameters(leaves.values(), training, step, progress)
    result = graph.copy()
    for name, leaf in leaves.items():
        result.constants[name] = leaf.detach().numpy().copy()
    return result, figures


def recalibrated(prepared: Prepared, graph: Graph, config: QuantizeConfig) -> Prepared:
    """`prepared` with another graph of the same structure, its statistics taken anew on the same samples."""
    trained = replace(prepared, graph=graph, output_means={})
    trained.statistics = calibrate(trained, config)
    if any(s.largest == 0.0 and prepared.statistics[n].largest > 0.0 for n, s in trained.statistics.items()):
        raise CalibrationError("training silenced a whole tensor: lower the learning_rate or the penalty")
    return trained
