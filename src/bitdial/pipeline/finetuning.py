"""Finetuning a quantized network: the twin, its trainer, and the way back to a program that every engine runs.

quantized program -> twin -> training (shifts and bias table derived anew on the way) -> program of the trained weights
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdial.errors import ConfigError
from bitdial.finetuning.config import FinetuneConfig
from bitdial.finetuning.data import Batch, Batches
from bitdial.finetuning.loss import FloatTeacher
from bitdial.finetuning.network import TrainableNetwork
from bitdial.finetuning.trainer import Teacher, Trainer, TrainingProgress, TrainingRecord
from bitdial.graph.ir import Graph
from bitdial.layout import group_bounds
from bitdial.pipeline.answers import AnswerComparison
from bitdial.pipeline.output_means import program_output_means
from bitdial.pipeline.preparing import Prepared, silent
from bitdial.pipeline.quantizing import (
    apply_choice,
    bias_samples,
    choose,
    low_tables,
    restore_means,
)
from bitdial.pipeline.training_start import fingerprint, start_graph
from bitdial.quantization import answers
from bitdial.quantization.build import build_program
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.program import Program
from bitdial.quantization.weights import bound_accumulators

__all__ = ["Finetuned", "export_program", "finetune_prepared", "make_network", "start_graph"]


@dataclass
class Finetuned:
    """What training gave.

    program     of the trained weights, without a curve
    record      what happened
    seconds     of everything
    prepared    the trained float network with its calibration data, and `config`: for further steps (`reselect`)
    """

    program: Program
    record: TrainingRecord
    seconds: float
    prepared: Prepared
    config: QuantizeConfig


def finetune_prepared(
    prepared: Prepared,
    program: Program,
    config: QuantizeConfig,
    finetune: FinetuneConfig,
    batches: Batches,
    *,
    validation: Sequence[Batch] = (),
    progress: Callable[[TrainingProgress], None] | None = None,
    stage: Callable[[str, float], None] = silent,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> Finetuned:
    """Train a quantized network so that it is good at every ratio.

    prepared, program, config: of `quantize_prepared`. validation: held-out batches on which states are judged. Training moves
    8-bit weights and derives the low ones from them, rounded: low weights of the program's own are given up at its start, with
    shifts and bias table chosen anew, and the result has none.
    checkpoint: file from which an interrupted run resumes; removed by nobody. stop: asked after every update.
    Raises DataError, ConfigError, and `trainer.Interrupted` when `stop` said so.
    """
    if config.lengths:
        raise ConfigError("a network is finetuned at one length: leave lengths out")
    started = time.perf_counter()
    own = config.updated(low_weights="derived", effort="normal")  # trained weights are where they should be
    before = prepared.graph
    stored = any(layer.low_weight is not None for layer in program.layers.values())
    prepared, network = make_network(prepared, program, finetune)

    def derive(network: TrainableNetwork, shifts: bool) -> Program:
        return derive_tables(prepared, network, own, shifts)

    if stored:
        network.load_tables(derive(network, True))
    trainer = Trainer(
        network, batches, finetune, teacher=make_teacher(before, program, network, finetune), derive=derive,
        validation=validation, checkpoint=checkpoint, context=fingerprint(program, prepared, batches),
        progress=progress, stop=stop,
    )  # fmt: skip
    record = trainer.run()
    stage("export", 0.0)
    result, trained = export_program(prepared, network, own)
    if finetune.reselect and len(program.ratios) > 2:
        reselect(trained, result, own, stage)
    comparison = AnswerComparison(result, trained.batches(own.batch_size, bias_samples(trained, result)))
    kept = {k: v for k, v in program.provenance.items() if k != answers.KEY}
    result.provenance = {**kept, **comparison.provenance(own.keep_answers), "finetuning": summary(finetune, record)}
    result.curve = []
    stage("done", 1.0)
    return Finetuned(result, record, time.perf_counter() - started, trained, own)


def make_network(prepared: Prepared, program: Program, finetune: FinetuneConfig) -> tuple[Prepared, TrainableNetwork]:
    """(prepared with the graph that training starts from, the twin of the program, whose low weights follow its 8-bit ones)."""
    program = _with_derived(program)
    prepared = replace(prepared, graph=start_graph(prepared.graph, program), output_means={})
    network = TrainableNetwork(
        prepared.graph,
        program,
        learn_scales=finetune.scales == "learned",
        learn_bias=finetune.bias == "learned",
        normalize=finetune.batch_norm == "reestimated",
        dtype=torch.bfloat16 if finetune.bfloat16 else torch.float32,
        device=checked_device(finetune),
    )
    return prepared, network


def _with_derived(program: Program) -> Program:
    """A copy whose low weights are derived from the 8-bit ones."""
    return program.with_layers({name: replace(layer, low_weight=None) for name, layer in program.layers.items()})


def checked_device(finetune: FinetuneConfig) -> str:
    """The device's name. Raises ConfigError if torch cannot use it."""
    name = finetune.torch_device
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device '{name}' cannot be used here ({error}); use device='cpu'") from None
    return name


def make_teacher(graph: Graph, program: Program, network: TrainableNetwork, finetune: FinetuneConfig) -> Teacher | None:
    """Soft labels for distillation; None where its weight is 0. graph: the float network."""
    if finetune.distillation == 0.0:
        return None
    if finetune.teacher == "float":
        return FloatTeacher(graph, str(network.device), finetune.bfloat16)
    frozen = TrainableNetwork(network.source, program, dtype=network.dtype, device=network.device).eval()

    def teach(inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = frozen(inputs, 0)[0]
            return logits

    return teach


def export_program(
    prepared: Prepared, network: TrainableNetwork, config: QuantizeConfig, *, corrections: bool = True
) -> tuple[Program, Prepared]:
    """(the program that computes what the twin computes, `prepared` with the trained weights).

    corrections=False: the bias table has the row of ratio 0 only, repeated.
    """
    trained = replace(prepared, graph=network.trained_graph(), output_means={})
    scales, weight_scale = network.learned_scales()
    program = build_program(
        trained.graph, prepared.statistics, config, group_bounds, scales=scales, weight_scale=weight_scale
    )
    source = network.program
    program.nested = source.nested
    learned = network.learned_corrections()
    for name, layer in program.layers.items():
        old = source.layers[name]
        layer.low = old.low.copy()
        if layer.weight is None:
            continue
        layer.amax, layer.wmax = old.amax, old.wmax
        layer.activation_shift, layer.weight_shift = old.activation_shift.copy(), old.weight_shift.copy()
        bound_accumulators(layer, program.qparams[program.instruction(layer.name).inputs[0]])
        if corrections:
            unit = layer.weight_scale.astype(np.float64) * program.qparams[program.instruction(name).inputs[0]].scale
            room = 2**31 - 1 - layer.accumulator_bound
            rows = layer.bias + np.rint(learned[name].astype(np.float64) / unit)
            layer.bias = np.clip(rows, -room, room).astype(np.int32)
    return program, trained


def derive_tables(prepared: Prepared, network: TrainableNetwork, config: QuantizeConfig, shifts: bool) -> Program:
    """The program of the twin's present weights with its bias table (and shifts, if asked) chosen anew."""
    program, trained = export_program(prepared, network, config, corrections=False)
    if shifts:
        kept = {name: layer.low.copy() for name, layer in program.layers.items()}
        low_tables(trained, program, config)
        for name, layer in program.layers.items():
            layer.low, layer.low_weight = kept[name], None
    correct_to_eight_bit(trained, program, config)
    return program


def correct_to_eight_bit(trained: Prepared, program: Program, config: QuantizeConfig) -> None:
    """Bias rows that restore the means of the program at ratio 0 (after training, there is no float network to follow)."""
    names = [n for n, layer in program.layers.items() if layer.weight is not None]
    trained.output_means = program_output_means(program, names, trained.batches(config.batch_size))
    restore_means(trained, program, config, range(1, len(program.ratios)))


def reselect(trained: Prepared, program: Program, config: QuantizeConfig, stage: Callable[[str, float], None]) -> None:
    """Choose the low groups of the ratios between anew, for the trained weights and the shifts they were trained with."""
    names = [n for n, layer in program.layers.items() if layer.weight is not None]
    if not trained.output_means:
        trained.output_means = program_output_means(program, names, trained.batches(config.batch_size))
    shifts = {n: (program.layers[n].activation_shift.copy(), program.layers[n].weight_shift.copy()) for n in names}
    tables = low_tables(trained, program, config)
    for n in names:  # the network was trained with its shifts and derived low weights: only the scores are wanted
        program.layers[n].activation_shift, program.layers[n].weight_shift = shifts[n]
        program.layers[n].low_weight = None
        bound_accumulators(program.layers[n], program.qparams[program.instruction(n).inputs[0]])
    highest = {n: program.layers[n].bias[-1].copy() for n in names}
    apply_choice(program, choose(trained, program, tables, config, progress=stage))
    between = range(1, len(program.ratios) - (1 if program.ratios[-1] == 1.0 else 0))
    restore_means(trained, program, config, between)
    for n in names:
        if program.ratios[-1] == 1.0:  # nothing was chosen there
            program.layers[n].bias[-1] = highest[n]


def summary(finetune: FinetuneConfig, record: TrainingRecord) -> Mapping[str, Any]:
    """JSON-able, for the provenance of an artifact."""
    rows = [{k: (None if v != v else v) for k, v in row.items()} for row in record.evaluations]  # no NaN in JSON
    done = record.summary()
    return {
        "config": finetune.model_dump(mode="json", exclude={"device"}),
        "evaluations": rows,
        "losses": record.losses,
        "updates": record.updates,
        "best_update": record.best_update,
        "stopped": record.stopped,
        "diverged": record.diverged,
        "seconds": {k: done[k] for k in ("seconds", "training_seconds", "derive_seconds")},
    }
