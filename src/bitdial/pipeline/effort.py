"""`effort="high"`: low weights and bias rows of a quantized program tuned on its calibration samples, without labels.

A fifth of the samples is held out. Nothing of the training is taken that does not measure better there than what was solved,
ratio by ratio, and the 8-bit end stays what it is to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.reference.arithmetic import channels_last
from bitdial.engines.reference.fast_conv import FastExecutor
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import generator
from bitdial.finetuning.low_tuning import CalibrationBatches, Distance, LowTrainer
from bitdial.finetuning.network import TrainableNetwork
from bitdial.finetuning.trainer import TrainingProgress
from bitdial.graph.interpreter import constant_tensors, run_graph
from bitdial.pipeline.answers import answers_differ
from bitdial.pipeline.preparing import Prepared, Progress
from bitdial.pipeline.training_start import fingerprint, start_graph
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import INT32_LIMIT, bound_accumulators, per_weight

UPDATES = 600
EVALUATIONS = 8  # on the held-out samples, beside the one before the first update
BATCH = 16
LEARNING_RATE = 3e-3  # of low weights in steps of their shift, of bias rows in about 8-bit steps of the outputs
TEMPERATURE = 4.0  # of soft labels
FEATURES = 1.0  # weight of the layers' outputs beside the network's
FEWEST = 10  # samples; of fewer, a fifth says nothing
HELD_OUT = 5  # one of so many
_SPLIT_STREAM = 13

Rows = dict[str, npt.NDArray[np.int64]]  # layer -> [n_ratios, O]
Restore = Callable[[Program, Sequence[int]], None]


def tuning_settings(seed: int) -> FinetuneConfig:
    """The training's settings. An epoch is a share of the updates; the held-out samples judge the state at its end."""
    return FinetuneConfig(
        epochs=EVALUATIONS, batch_size=BATCH, passes="low", low_ratio="mixed",
        learning_rate=LEARNING_RATE, gradient_clip=0.0, cross_entropy=0.0, distillation=1.0, temperature=TEMPERATURE,
        bias="learned", rederivations=0, keep="best", precision="float32", device="cpu", checkpoint_seconds=20.0, seed=seed,
        divergence=50.0,
    )  # fmt: skip


def tuning_checkpoint(search: Path) -> Path:
    """Where the tuning is kept, beside the search's checkpoint."""
    return search.with_name(search.name + ".tuning")


@dataclass
class Tuned:
    """The program that is better on the held-out samples, and what happened (JSON-able, for the provenance)."""

    program: Program
    summary: dict[str, Any]


def tune_low_weights(
    prepared: Prepared,
    program: Program,
    restore: Restore,
    settings: FinetuneConfig | None = None,
    *,
    updates: int = UPDATES,
    seed: int = 0,
    bias: bool = True,
    progress: Progress,
    checkpoint: Path | None = None,
) -> Tuned:
    """Tune a program with low weights of its own.

    restore: restores the means of a program at some ratio indices, in place. settings: of the training, by default
    `tuning_settings`. updates: of the training. bias: learn bias rows too. checkpoint: file from which an interrupted training
    resumes; removed by nobody.
    The program given is not changed. Raises DataError for a checkpoint of another run, OutputError.
    """
    started = time.perf_counter()
    low_indices = [i for i in range(1, len(program.ratios)) if any(layer.low[i].any() for layer in program.layers.values())]
    outputs = _float_outputs(prepared)
    refusal = _refusal(prepared, program, low_indices, outputs)
    if refusal:
        return Tuned(program, {"kept": "solved", "reason": refusal})
    order = torch.randperm(prepared.samples, generator=generator(seed, _SPLIT_STREAM))
    held = max(1, prepared.samples // HELD_OUT)
    judged, learned = order[:held].sort().values, order[held:].sort().values
    settings = settings or tuning_settings(seed)
    size = min(settings.batch_size, len(learned))
    spread = float((outputs - outputs.mean(dim=0, keepdim=True)).square().mean())
    distance = Distance(answers_differ(outputs), max(spread, 1e-30), settings.temperature)
    batches = CalibrationBatches(
        [x[learned] for x in prepared.inputs], outputs[learned], size, max(1, updates // settings.epochs), settings.seed
    )
    validation = [([x[part] for x in prepared.inputs], outputs[part]) for part in torch.split(judged, settings.batch_size)]
    network = TrainableNetwork(start_graph(prepared.graph, program), program, tune_low=True, learn_bias=bias)
    trainer = LowTrainer(
        network, batches, settings, graph=prepared.graph, distance=distance, features=FEATURES, validation=validation,
        checkpoint=checkpoint, context=fingerprint(program, prepared, batches), progress=partial(_told, progress),
    )  # fmt: skip
    progress("tune", 0.0)
    record = trainer.run()
    progress("tune", 1.0)

    def measure(candidate: Program, index: int) -> float:
        executor = FastExecutor(candidate)
        setting = executor.settings(index)
        with torch.no_grad():
            total = sum(len(t) * float(distance(executor.run(list(x), setting)[0].float(), t)) for x, t in validation)
        return total / held

    result, judgement = _better(program, network, low_indices, measure, restore if bias else None)
    changed, weights = _changes(program, result)
    return Tuned(
        result,
        {
            **judgement,
            "distance": "soft labels" if distance.answers else "outputs",
            "held_out": held,
            "samples": len(learned),
            "updates": record.updates,
            "best_update": record.best_update,
            "stopped": record.stopped,
            "changed_weights": changed / max(1, weights),
            "seconds": time.perf_counter() - started,
        },
    )


def _refusal(prepared: Prepared, program: Program, low_indices: Sequence[int], outputs: Tensor) -> str:
    """Why there is nothing to tune; "" where there is."""
    if not low_indices or all(layer.low_weight is None for layer in program.layers.values()):
        return "no layer has low weights of its own"
    if prepared.samples < FEWEST:
        return f"{prepared.samples} calibration samples are too few: a fifth is held out of at least {FEWEST}"
    if not outputs.is_floating_point() or outputs.dim() == 0 or len(outputs) != prepared.samples:
        return "the first output is not one of real numbers per sample"
    return ""


def _float_outputs(prepared: Prepared) -> Tensor:
    constants = constant_tensors(prepared.graph)
    with torch.no_grad():
        batches = ([channels_last(x) for x in batch] for batch in prepared.batches(BATCH))
        found = [run_graph(prepared.graph, batch, constants=constants)[0] for batch in batches]
    return torch.cat(found) if found[0].dim() else found[0]


def _told(progress: Progress, at: TrainingProgress) -> None:
    progress("tune", at.update / at.updates)


def _better(
    program: Program,
    network: TrainableNetwork,
    low_indices: Sequence[int],
    measure: Callable[[Program, int], float],
    restore: Restore | None,
) -> tuple[Program, dict[str, Any]]:
    """The best of: what was solved; what was tuned; tuned low weights of the groups alone that are low above some ratio.

    Candidates that are worse than the solved program at any ratio are none.
    """
    solved = {i: measure(program, i) for i in low_indices}
    rows, low = _learned_rows(program, network), network.learned_low_weights()
    best, best_gain, found = 0, 0.0, dict(solved)
    for below in (0, *low_indices[:-1]):  # ratio indices up to this one stay as they were solved
        own = [i for i in low_indices if i > below]
        candidate = _with(program, low, rows, below, own)
        distances = {**solved, **{i: measure(candidate, i) for i in own}}
        if any(not distances[i] <= solved[i] for i in own):
            continue
        gain = sum(math.log(max(solved[i], 1e-12) / max(distances[i], 1e-12)) for i in own)
        if gain > best_gain:
            best, best_gain, found = below, gain, distances
    told: dict[str, Any] = {
        "ratios": [program.ratios[i] for i in low_indices],
        "solved": [solved[i] for i in low_indices],
    }
    if best_gain == 0.0:
        return program, {"kept": "solved", **told}
    own = [i for i in low_indices if i > best]
    result = _with(program, low, rows, best, own)
    taken = ["solved" if i <= best else "learned" for i in low_indices]
    if restore is not None:
        restored = _with(program, low, rows, best, own)
        restore(restored, own)
        for i in own:
            value = measure(restored, i)
            if value < found[i]:
                found[i], taken[low_indices.index(i)] = value, "restored"
                for name, layer in restored.layers.items():
                    result.layers[name].bias[i] = layer.bias[i]
    return result, {"kept": "tuned", **told, "tuned": [found[i] for i in low_indices], "bias": taken}


def _with(program: Program, low: Mapping[str, Any], rows: Rows, below: int, own: Sequence[int]) -> Program:
    """A copy with tuned low weights in the groups that are first low above ratio index `below`, and bias rows at `own`."""
    layers: dict[str, QuantizedLayer] = {}
    for name, layer in program.layers.items():
        copied = replace(layer, bias=layer.bias.copy())
        if name in low and layer.low_weight is not None:
            tuned = layer.low.any(axis=0) & ~layer.low[: below + 1].any(axis=0)
            mask = per_weight(layer, np.asarray(tuned))
            copied.low_weight = np.where(mask, low[name], layer.low_weight).astype(np.int8)
            bound_accumulators(copied, program.qparams[program.instruction(name).inputs[0]])
        if name in rows:
            room = INT32_LIMIT - copied.accumulator_bound
            copied.bias[list(own)] = np.clip(rows[name][list(own)], -room, room)
        layers[name] = copied
    return program.with_layers(layers)


def _learned_rows(program: Program, network: TrainableNetwork) -> Rows:
    """Bias tables with the learned corrections."""
    rows = {}
    for name, real in network.learned_corrections().items():
        layer = program.layers[name]
        unit = layer.weight_scale.astype(np.float64) * program.qparams[program.instruction(name).inputs[0]].scale
        rows[name] = layer.bias[:1] + np.rint(real.astype(np.float64) / unit).astype(np.int64)
    return rows


def _changes(before: Program, after: Program) -> tuple[int, int]:
    """(low weights that differ, low weights in groups that are low at some ratio)."""
    changed = total = 0
    for name, layer in before.layers.items():
        if layer.low_weight is not None:
            mask = per_weight(layer, np.asarray(layer.low.any(axis=0)))
            other = after.layers[name].low_weight
            changed += int((layer.low_weight != other).sum())
            total += int(np.broadcast_to(mask, layer.low_weight.shape).sum())
    return changed, total
