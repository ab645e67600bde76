"""The training loop: two passes a step, one update every `accumulation` steps, evaluation, checkpoints, early stop.

Source: FlexiQ (EuroSys 2026), finetuning (dual forward pass, cross-entropy and distillation); where the paper is silent,
`FinetuneConfig` names the choice. The state after every update is a function of the seed, the data and the processor, so that
a run that was interrupted and resumed ends with the same weights, bit for bit, as one that was not (tested).
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.errors import BitdialError, DataError
from bitdial.finetuning.checkpoint import flatten_optimizer, load_checkpoint, restore_optimizer, save_checkpoint
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, Batches
from bitdial.finetuning.loss import check_targets, loss
from bitdial.finetuning.network import TrainableNetwork
from bitdial.finetuning.optimizer import make_optimizer
from bitdial.finetuning.schedule import derivation_updates, evaluation_updates, passes, rate
from bitdial.quantization.program import Program

WINDOW = 20  # updates whose mean loss is reported and judged

Derive = Callable[[TrainableNetwork, bool], Program]  # (network, choose shifts anew?) -> program of its present weights
Teacher = Callable[[Sequence[Tensor]], Tensor]


class Interrupted(BitdialError):
    """Training was asked to stop before its end; the checkpoint has its state."""


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training run stands.

    update, updates     updates done and in all; epoch: from 0
    loss                mean over the last updates; scores: validation accuracy per ratio index, when last evaluated
    seconds             of this and the interrupted runs before it; remaining: estimate, None before it can be made
    """

    update: int
    updates: int
    epoch: int
    epochs: int
    loss: float
    seconds: float
    remaining: float | None
    accuracies: tuple[float, ...]


@dataclass
class TrainingRecord:
    """What happened.

    evaluations  rows {update, epoch, loss, accuracies, score, standard_error}
    best_update  the update after which the network had the state that is the result
    stopped      why training ended early, or ""; `diverged`: because of its loss
    """

    updates: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean of each tenth of an epoch
    best_update: int = 0
    best_score: float = -math.inf
    stopped: str = ""
    diverged: bool = False
    seconds: float = 0.0
    training_seconds: float = 0.0  # without evaluation, derivation and checkpoints
    derive_seconds: float = 0.0
    first_loss: float = math.nan
    since_best: int = 0

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Trainer:
    """Trains a `TrainableNetwork` in place.

    teacher     soft labels for distillation; None where `config.distillation` is 0
    derive      chooses shifts and bias table for the present weights
    validation  batches on which states are judged; empty: the last state is the best
    context     fingerprint of network, data and quantization, so that a checkpoint of another run is refused
    """

    def __init__(
        self,
        network: TrainableNetwork,
        batches: Batches,
        config: FinetuneConfig,
        *,
        teacher: Teacher | None,
        derive: Derive,
        validation: Sequence[Batch] = (),
        checkpoint: Path | None = None,
        context: str = "",
        progress: Callable[[TrainingProgress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.network, self.batches, self.config = network, batches, config
        self.teacher, self.derive, self.validation = teacher, derive, validation
        self.checkpoint, self.progress, self.stop = checkpoint, progress, stop
        self.per_epoch = max(1, batches.steps // config.accumulation)
        self.total = self.per_epoch * config.epochs
        settings = config.model_dump_json(exclude={"checkpoint_seconds", "device"})
        self.context = hashlib.sha256(f"{settings} {context} {torch.__version__} {self.total}".encode()).hexdigest()
        self.optimizer = self._make_optimizer()
        self.record = TrainingRecord()
        self.best: dict[str, Tensor] = {}
        self.update = 0
        self.recent: list[float] = []
        self._saved = time.perf_counter()
        self._started = time.perf_counter()
        self._before = 0.0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        scales: list[Tensor] = []
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith(("scales.", "weight_scales.")):
                scales.append(parameter)
            else:
                (decayed if parameter.dim() > 1 and name.startswith("weights.") else plain).append(parameter)
        return make_optimizer(decayed, plain, scales, config=self.config)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """The network's tensors and the shifts it uses now."""
        result = {f"network.{k}": v.detach() for k, v in self.network.state_dict().items()}
        for name, layer in self.network.program.layers.items():
            if layer.weight is not None:
                result[f"activation_shift.{name}"] = torch.from_numpy(layer.activation_shift.copy())
                result[f"weight_shift.{name}"] = torch.from_numpy(layer.weight_shift.copy())
        return result

    def _restore(self, state: dict[str, Tensor]) -> None:
        program = self.network.program
        program = program.with_layers({n: copy.copy(layer) for n, layer in program.layers.items()})
        for name, layer in program.layers.items():
            if layer.weight is not None:
                layer.activation_shift = state[f"activation_shift.{name}"].numpy().copy()
                layer.weight_shift = state[f"weight_shift.{name}"].numpy().copy()
        self.network.load_tables(program)
        prefix = "network."
        self.network.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})

    def save(self) -> None:
        """Write the checkpoint. Raises OutputError."""
        if self.checkpoint is None:
            return
        tensors = {f"now.{k}": v for k, v in self._state().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors |= {f"optimizer.{k}": v for k, v in flatten_optimizer(self.optimizer).items()}
        self._tick()
        state = {"context": self.context, "update": self.update, "recent": self.recent, "record": self.record.summary()}
        save_checkpoint(self.checkpoint, tensors, state)
        self._saved = time.perf_counter()

    def resume(self) -> bool:
        """Take up the checkpoint if there is one. Raises DataError if it belongs to another run."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        tensors, state = load_checkpoint(self.checkpoint)
        if state.get("context") != self.context:
            raise DataError(
                f"{self.checkpoint} belongs to a run with other settings, data or weights; delete it to train from the start"
            )
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self._restore(parts["now"])
        self.best = parts["best"]
        restore_optimizer(self.optimizer, parts["optimizer"])
        self.update, self.recent = int(state["update"]), list(state["recent"])
        self.record = TrainingRecord(**state["record"])
        self._before = self.record.seconds
        self._started = time.perf_counter()
        return True

    def _tick(self) -> None:
        self.record.seconds = self._before + time.perf_counter() - self._started

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> TrainingRecord:
        """Train to the end, an early stop or a divergence; the network then holds the best state.

        Raises Interrupted when `stop` says so (the checkpoint has been written), DataError for unusable data.
        """
        self._started = time.perf_counter()
        if not self.resume():
            self._evaluate()
        derivations = derivation_updates(self.total, self.config)
        evaluations = evaluation_updates(self.per_epoch, self.total, self.config)
        steps = self._steps()
        while self._going():
            if self.update in derivations:
                self._rederive(shifts=True)
            self._one_update(steps)
            if self.update in evaluations and not self.record.stopped:
                self._evaluate()
            self._report()
            if self._going():
                self._maybe_save()
        self._finish()
        return self.record

    def _going(self) -> bool:
        return self.update < self.total and not self.record.stopped

    def _steps(self) -> Iterator[Batch]:
        """Batches from where training stands to the last epoch's end; what an epoch has beyond its updates is left out."""
        first, done = divmod(self.update, self.per_epoch)
        for epoch in range(first, self.config.epochs):
            start = done * self.config.accumulation if epoch == first else 0
            batches = self.batches.epoch(epoch, start)
            for _ in range(self.per_epoch * self.config.accumulation - start):
                batch = next(batches, None)
                if batch is None:
                    raise DataError("the training data gave fewer batches than their length said; use data that repeat")
                yield batch

    def _maybe_save(self) -> None:
        """Write the checkpoint if it is time; stop if asked to."""
        if time.perf_counter() - self._saved >= self.config.checkpoint_seconds:
            self.save()
        if self.stop is not None and self.stop():
            self.save()
            raise Interrupted(
                f"training stopped after {self.update} of {self.total} updates; the same command goes on there"
            )

    def _one_update(self, steps: Iterator[Batch]) -> None:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.update, self.total, c)
        started = time.perf_counter()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(c.accumulation):
            total += self._accumulate(next(steps), self.update * c.accumulation + part)
        trained = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, c.gradient_clip or math.inf)
        if math.isfinite(total) and bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.network.bound_low_weights()
        self.update += 1
        self.record.updates = self.update
        self.record.training_seconds += time.perf_counter() - started
        self._note_loss(total / c.accumulation, float(norm))

    def _accumulate(self, batch: Batch, step: int) -> float:
        """Gradients of all passes over one batch; returns the mean loss of a pass."""
        device, c = self.network.device, self.config
        inputs = [channels_last(x.to(device)) for x in batch[0]]
        targets = batch[1].to(device)
        teacher = self.teacher(inputs) if self.teacher is not None and c.distillation > 0.0 else None
        total = 0.0
        todo = passes(step, len(self.network.program.ratios), c)
        for index, weight in todo:
            self.network.observing = index == 0 or len(todo) == 1
            value = self.pass_loss(inputs, targets, teacher, index, step)
            torch.autograd.backward(value * (weight / c.accumulation))
            total += float(value.detach())
        self.network.observing = False
        return total / len(todo)

    def pass_loss(self, inputs: list[Tensor], targets: Tensor, teacher: Tensor | None, index: int, step: int) -> Tensor:
        """What a pass at ratio index `index` minimizes. Raises DataError for targets that are no labels of the network."""
        logits = self.network(inputs, index)[0]
        if step == 0:
            check_targets(targets, logits.shape[-1])
        return loss(logits, targets, teacher, self.config)

    def _note_loss(self, value: float, norm: float) -> None:
        record = self.record
        self.recent.append(value)
        if not (math.isfinite(value) and math.isfinite(norm)):
            record.diverged = True
            record.stopped = f"the loss was not finite at update {self.update}; a smaller learning rate may help"
            return
        if self.update == 1:
            record.first_loss = value  # before anything has changed
        floor = max(record.first_loss, 0.3)  # losses near 0 may grow many times by chance
        mean = float(np.mean(self.recent[-WINDOW:]))
        if self.update >= WINDOW and mean > self.config.divergence * floor:
            record.diverged = True
            record.stopped = (
                f"the loss rose to {mean:.3g} from {record.first_loss:.3g} within {self.update} updates; a smaller learning "
                "rate may help"
            )
        every = max(WINDOW, self.per_epoch // 10)
        if self.update % every == 0:
            record.losses.append(float(np.mean(self.recent[-every:])))
            self.recent = self.recent[-every:]

    def _rederive(self, *, shifts: bool) -> None:
        started = time.perf_counter()
        self.network.load_tables(self.derive(self.network, shifts))
        self.record.derive_seconds += time.perf_counter() - started

    def accuracies(self) -> list[float]:
        """Top-1 accuracy on the validation data at every ratio, in float32."""
        network = self.network
        network.eval()
        kept, network.dtype = network.dtype, torch.float32
        n_ratios = len(network.program.ratios)
        right, count = np.zeros(n_ratios), 0
        with torch.no_grad():
            for inputs, targets in self.validation:
                at = [x.to(network.device) for x in inputs]
                valid = targets.to(network.device)
                for index in range(n_ratios):
                    right[index] += float((network(at, index)[0].argmax(dim=-1) == valid).sum())
                count += targets.numel()
        network.dtype = kept
        return [float(r / max(1, count)) for r in right]

    def judge(self) -> dict[str, Any]:
        """What an evaluation tells of the present state: accuracies, score, standard_error."""
        if not self.validation:
            return {"accuracies": [], "score": float(self.update), "standard_error": 0.0}  # the last is the best
        accuracies = self.accuracies()
        score = float(np.mean(accuracies))
        samples = sum(targets.numel() for _, targets in self.validation)
        error = math.sqrt(score * (1.0 - score) / samples)
        return {"accuracies": accuracies, "score": score, "standard_error": error}

    def _evaluate(self) -> None:
        record = self.record
        row: dict[str, Any] = {"update": self.update, "epoch": self.update / self.per_epoch}
        row["loss"] = float(np.mean(self.recent[-WINDOW:])) if self.recent else math.nan
        row |= self.judge()
        record.evaluations.append(row)
        # Scores of a few hundred samples are noisy, and the learning rate falls to 0: among equals the later state is better.
        record.since_best = 0 if row["score"] > record.best_score else record.since_best + 1
        if row["score"] > record.best_score - row["standard_error"]:
            record.best_score, record.best_update = max(record.best_score, row["score"]), self.update
            self.best = {k: v.clone() for k, v in self._state().items()}
        if self.config.patience and record.since_best >= self.config.patience:
            record.stopped = f"no better score in {record.since_best} evaluations"

    def _finish(self) -> None:
        """Take the best state (or the last, if asked); then the bias table for its weights, unless that is clearly worse."""
        if self.config.keep == "last" and not self.record.diverged:
            self.record.best_update = self.update
            self.best = {k: v.clone() for k, v in self._state().items()}
        if self.best:
            self._restore(self.best)
        if self.config.bias == "derived":
            before = self.accuracies() if self.validation else []
            self._rederive(shifts=False)
            if before and np.mean(self.accuracies()) < np.mean(before) - self.record.evaluations[-1]["standard_error"]:
                self._restore(self.best)
        self._tick()

    def _report(self) -> None:
        if self.progress is None:
            return
        self._tick()
        done = self.update
        accuracies = self.record.evaluations[-1]["accuracies"] if self.record.evaluations else []
        remaining = self.record.seconds / done * (self.total - done) if done >= 3 else None
        mean = float(np.mean(self.recent[-WINDOW:]))
        self.progress(
            TrainingProgress(
                done,
                self.total,
                (done - 1) // self.per_epoch,
                self.config.epochs,
                mean,
                self.record.seconds,
                remaining,
                tuple(accuracies),
            )
        )
