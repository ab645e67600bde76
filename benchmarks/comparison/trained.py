"""The methods that change weights: bitdial's own finetuning, RobustQuant, AnyPrecision, PTMQ (which needs no labels)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitdial.pipeline import quantize_prepared
from bitdial.pipeline.finetuning import finetune_prepared
from comparison import switching
from comparison.any_precision import train_widths
from comparison.budget import HIGH_BITS, low_share
from comparison.ground import Ground, Settings
from comparison.kurtosis import kurtosis, kurtosis_penalty
from comparison.methods import Built, Method, describe, point, register
from comparison.ptmq import reconstruct
from comparison.training import recalibrated, train_float
from comparison.uniform import uniform_program
from comparison.widths import SharedWidths


def _bitdial_finetuned(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    """Quantize as bitdial does, then train with a high and a low pass."""
    training = ground.need_training("bitdial_finetuned")
    started = time.perf_counter()
    config = ground.config.updated(ratios=tuple(sorted(low_share(b) for b in averages)))
    program = quantize_prepared(ground.prepared, config, progress=ground.progress)
    done = finetune_prepared(
        ground.prepared, program, config, training.config, training.batches, validation=training.validation,
        progress=lambda state: ground.progress("finetune", state.update / state.updates),
    )  # fmt: skip
    points = tuple(point(done.program, b, low_share(b)) for b in averages)
    details = {"updates": done.record.updates, "stopped": done.record.stopped, "training_seconds": done.record.seconds}
    return Built(
        "bitdial_finetuned", points, time.perf_counter() - started, switching.dial(done.program), details
    )  # fmt: skip


def _robust(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    """Float training with the kurtosis penalty, then uniform quantization at every width."""
    training = ground.need_training("robust")
    started = time.perf_counter()
    source = ground.prepared.graph
    eligible = {v for n in ground.layers if (v := source.node(n).weight) is not None}

    def penalty(weights: Mapping[str, Tensor]) -> Tensor:
        return settings.kurtosis_weight * kurtosis_penalty({n: w for n, w in weights.items() if n in eligible})

    graph, figures = train_float(source, training, penalty, lambda share: ground.progress("train", share))
    own = Ground(recalibrated(ground.prepared, graph, ground.config), ground.config)
    points = []
    for bits in averages:
        program = (
            own.eight
            if bits == HIGH_BITS
            else uniform_program(own.prepared, own.config, own.full_masks(), int(bits), settings.rounding)
        )
        describe(program, "robust", ground, bits)
        points.append(point(program, bits))
    figures["kurtosis"] = sum(float(kurtosis(torch.from_numpy(graph.constants[n]))) for n in eligible) / len(eligible)
    seconds = time.perf_counter() - started
    programs = [p.program for p in points]
    cost = switching.copies(programs) if len(programs) > 1 else switching.one_model()
    return Built("robust", tuple(points), seconds, cost, dict(figures))


_PER_WIDTH = "scales and biases per output channel and a table per activation tensor for every further width"


def _any_precision(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    """All widths trained together over shared weights."""
    training = ground.need_training("any_precision")
    started = time.perf_counter()
    widths = [int(b) for b in averages]
    shared = SharedWidths(ground, widths, normalize=True, bfloat16=training.config.bfloat16)
    figures = train_widths(
        shared, ground.prepared.graph, training, lambda share: ground.progress("train", share)
    )  # fmt: skip
    points = []
    for bits in averages:
        program = shared.export(int(bits))
        describe(program, "any_precision", ground, bits)
        points.append(point(program, bits))
    cost = switching.tables([p.program for p in points], 2, 65, _PER_WIDTH)
    return Built("any_precision", tuple(points), time.perf_counter() - started, cost, dict(figures))


def _ptmq(ground: Ground, settings: Settings, averages: Sequence[float]) -> Built:
    """Blocks reconstructed for all widths together on calibration data."""
    started = time.perf_counter()
    widths = [int(b) for b in averages]
    shared = SharedWidths(ground, widths, normalize=False)
    figures = reconstruct(
        shared, ground.prepared.inputs[0], iterations=settings.iterations, batch_size=settings.reconstruction_batch,
        rate=settings.reconstruction_rate, seed=ground.config.seed,
        progress=lambda share: ground.progress("reconstruct", share),
    )  # fmt: skip
    points = []
    for bits in averages:
        program = shared.export(int(bits), correct=True)
        describe(program, "ptmq", ground, bits)
        points.append(point(program, bits))
    cost = switching.tables([p.program for p in points], 1, 65, _PER_WIDTH.replace("scales and biases", "biases"))
    return Built("ptmq", tuple(points), time.perf_counter() - started, cost, dict(figures))


register(Method("ptmq", "PTMQ", "Xu et al. 2024", False, "uniform", _ptmq))
register(Method("bitdial_finetuned", "bitdial, finetuned", "Kim et al. 2026", True, "any", _bitdial_finetuned))
register(Method("robust", "RobustQuant", "Chmiel et al. 2020", True, "uniform", _robust))
register(Method("any_precision", "AnyPrecision", "Yu et al. 2021", True, "uniform", _any_precision))
