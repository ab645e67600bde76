"""The steps from a prepared network to a program with its dial, each reusable on its own (ablations repeat only some).

(capture -> calibrate -> lay out) -> 8-bit program -> shifts and scores -> selection -> bias table -> (tuning)
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitdial.engines.cpu import native
from bitdial.engines.reference.bias_table import correct_bias, live_bytes_per_sample
from bitdial.engines.reference.patches import PatchSampler
from bitdial.engines.reference.plane_fit import PlaneFit
from bitdial.engines.reference.prediction import Prediction, predict
from bitdial.engines.reference.search import CandidateEvaluator, SearchStatistics
from bitdial.engines.reference.statistics import (
    ValueStatistics,
    collect,
    group_mean_shifts,
)
from bitdial.layout import LayoutReport, group_bounds
from bitdial.pipeline.answers import AnswerComparison
from bitdial.pipeline.effort import tune_low_weights, tuning_checkpoint
from bitdial.pipeline.kept_memory import keeping_memory
from bitdial.pipeline.preparing import Prepared, Progress, silent
from bitdial.pipeline.walks import walk_of
from bitdial.quantization.build import build_program
from bitdial.quantization.calibration import summarize
from bitdial.quantization.config import QuantizeConfig
from bitdial.quantization.effective_bits import group_maximum, least_squares_shift, naive_shift, plain_shift
from bitdial.quantization.lengths import shorten
from bitdial.quantization.low_plane import provisional_plane
from bitdial.quantization.output_error import LayerSamples, activation_shifts, weight_shifts
from bitdial.quantization.predicted_latency import LatencyCurve, latency_curves, layerwise_seconds, predicted_latency
from bitdial.quantization.program import Program, QuantizedLayer
from bitdial.quantization.weights import bound_accumulators, plain_weight_shifts
from bitdial.selection import (
    LatencyGoal,
    SearchProgress,
    SelectionProblem,
    SelectionResult,
    get_selector,
    layer_sensitivity,
    rescale_scores,
)

CALIBRATION_MEMORY = 1 << 30  # bytes of activations held at once while the bias table is computed layer by layer
SEARCH_CACHE = 1 << 30  # bytes of values that the exact search remembers from candidate to candidate
# Samples that sets of groups are ranked by at most: more rank them no better (see `engines.reference.prediction`). By 32 some are
# chosen worse: EfficientNet-Lite0's distances on 64 others at 25, 50 and 75 % are 3, 0.4 and 1.2 % larger then.
PREDICTED_FROM = 64
PATCHES = 4096  # sampled rows of each layer's input, for low weights that the selection judges groups by
SHIFT_ROWS = 2048  # of them, for shifts of least output error


def bias_samples(prepared: Prepared, program: Program) -> int:
    """How many calibration samples the bias table can use within CALIBRATION_MEMORY (at least 8)."""
    return max(8, min(prepared.samples, CALIBRATION_MEMORY // max(1, live_bytes_per_sample(program))))


def restore_means(
    prepared: Prepared,
    program: Program,
    config: QuantizeConfig,
    indices: Sequence[int],
    progress: Progress = silent,
    outputs: Callable[[int, list[Tensor]], None] | None = None,
    stage: str = "bias",
    plane: bool = False,
) -> None:
    """Correct the bias rows of some ratios in place, in their order; `stage` is what progress is told.

    outputs: see `correct_bias`; not called where there is nothing to do. plane: solve the low weights of every group at the first
    of the ratios that makes it low, too.
    """
    if not indices or not (config.bias_correction or plane):
        return
    batches = prepared.batches(config.batch_size, bias_samples(prepared, program))
    names = [n for n, layer in program.layers.items() if layer.weight is not None]
    if config.bias_correction and not prepared.output_means:
        prepared.output_means = prepared.float_means(names, batches)
    means = prepared.output_means if config.bias_correction else {}
    walk, fit = walk_of(program), None
    if plane:
        layers = searched_layers(program)
        fit = PlaneFit(walk, layers, batches, centred=config.bias_correction, seed=config.seed,
                       counting=prepared.counting_rows(config.batch_size))  # fmt: skip
    with torch.no_grad():
        correct_bias(program, batches, means, indices, partial(progress, stage), outputs, fit, walk)


def searched_layers(program: Program) -> list[str]:
    """Layers with groups that may run low."""
    return [n for n, layer in program.layers.items() if layer.eligible and layer.n_groups]


def eight_bit_program(
    prepared: Prepared,
    config: QuantizeConfig,
    progress: Progress = silent,
    outputs: Callable[[int, list[Tensor]], None] | None = None,
) -> Program:
    """The 8-bit program with its corrected bias row (copied to all ratios; no group is low yet). outputs: see `restore_means`."""
    program = build_program(prepared.graph, prepared.statistics, config, group_bounds, machine=native.target())
    restore_means(prepared, program, config, [0], progress, outputs, stage="8-bit model")
    for layer in program.layers.values():
        layer.bias = np.repeat(layer.bias[:1], len(program.ratios), axis=0)
    return program


@dataclass
class LowTables:
    """Shifts are in the program; these are what selection needs beside them."""

    values: dict[str, ValueStatistics]
    scores: dict[str, npt.NDArray[np.float64]]
    mean_shifts: dict[str, npt.NDArray[np.float64]]


def low_tables(
    prepared: Prepared, program: Program, config: QuantizeConfig, progress: Progress = silent
) -> LowTables:
    """Choose every shift of the program in place; return error scores and first-order mean shifts per group."""
    names = searched_layers(program)
    batches = prepared.batches(config.batch_size)
    walk = walk_of(program)
    sampler = PatchSampler(walk.executor, names, len(batches), PATCHES, config.seed)
    progress("values", 0.0)
    with torch.no_grad():
        values = collect(walk, batches, sampler, partial(progress, "values"))
    progress("shifts", 0.0)
    patches = sampler.patches()
    samples = {
        n: LayerSamples(program.layers[n], patches[n], values[program.instruction(n).inputs[0]].signed, config.bias_correction)
        for n in names
    }
    counting = prepared.counting_rows(config.batch_size) if config.stores_plane else None
    scores = choose_shifts(program, samples, config, values, partial(progress, "shifts"), counting)
    mean_shifts = {}
    if config.bias_correction:
        for n in names:
            step = program.instruction(n)
            mean_shifts[n] = group_mean_shifts(step.as_node(), program.layers[n], values[step.inputs[0]])
    return LowTables(values, scores, mean_shifts)


def choose_shifts(
    program: Program,
    samples: Mapping[str, LayerSamples],
    config: QuantizeConfig,
    values: Mapping[str, ValueStatistics] | None = None,
    progress: Callable[[float], None] | None = None,
    counting: Mapping[str, float] | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Shifts and low weights of the layers that samples are given for, in place. Returns the error score of every group.

    values: of the 8-bit model; needed only where config.shift_choice is not "least_squares". progress: told the share done.
    counting: see `counting_rows`.
    """
    done, wanted = 0, 2 * sum(own.weight_size for own in samples.values())  # of activations, of weights

    def advance(own: Sequence[str]) -> None:
        nonlocal done
        done += sum(samples[n].weight_size for n in own)
        if progress is not None:
            progress(done / wanted)

    readers: dict[tuple[str, int, bytes], list[str]] = {}  # readers of other widths or groups need other shifts
    for n in samples:
        layer = program.layers[n]
        value = program.instruction(n).inputs[0]
        readers.setdefault((value, layer.amax, layer.group_bounds.tobytes()), []).append(n)
    for (value, _, _), own in readers.items():
        statistics = None if values is None else values[value]
        shift = _activation_shift([samples[n].thinned(SHIFT_ROWS) for n in own], config, statistics)
        for n in own:
            program.layers[n].activation_shift = shift
        advance(own)
    scores = {}
    for n in samples:
        layer = program.layers[n]
        scores[n] = _weight_shift(layer, samples[n].thinned(SHIFT_ROWS), config)
        if config.stores_plane:
            provisional_plane(samples[n], scores[n], (counting or {}).get(n, 1.0))
        bound_accumulators(layer, program.qparams[program.instruction(n).inputs[0]])
        advance([n])
    return scores


def _activation_shift(
    readers: Sequence[LayerSamples], config: QuantizeConfig, statistics: ValueStatistics | None
) -> npt.NDArray[np.uint8]:
    """One shift per (tensor, group), shared by all readers of the tensor that have one width."""
    layer = readers[0].layer
    if config.extraction == "naive":
        return np.full(layer.n_groups, naive_shift(readers[0].signed, layer.amax), np.uint8)
    if config.shift_choice == "least_squares":
        return activation_shifts(readers)
    assert statistics is not None
    if config.shift_choice == "plain":
        return plain_shift(group_maximum(statistics.channel_max, layer.group_bounds), layer.amax)
    importance = np.sum([_weight_energy(own.layer) for own in readers], axis=0)
    return least_squares_shift(
        statistics.histogram, importance, layer.group_bounds, layer.amax, statistics.signed, config.bias_correction
    )


def _weight_energy(layer: QuantizedLayer) -> npt.NDArray[np.float64]:
    """float64 [C]: sum over outputs and taps of the squared real weight of each feature channel."""
    assert layer.weight is not None
    w = layer.weight.reshape(layer.weight.shape[0], layer.weight.shape[1], -1).astype(np.float64)
    energy = (w**2).sum(axis=2) * (layer.weight_scale.astype(np.float64) ** 2)[:, None]
    per_channel: npt.NDArray[np.float64] = (
        energy.reshape(layer.conv_groups, -1, energy.shape[1]).sum(axis=1).reshape(-1)
    )
    return per_channel


def _weight_shift(layer: QuantizedLayer, samples: LayerSamples, config: QuantizeConfig) -> npt.NDArray[np.float64]:
    """Set the layer's weight shifts; return the error score of each group."""
    assert layer.weight is not None
    least, scores = weight_shifts(samples, config.weight_granularity)
    if config.extraction == "naive":
        layer.weight_shift[:] = naive_shift(True, layer.wmax)
    elif config.shift_choice == "plain":
        n_local = layer.weight_shift.shape[1]
        bounds = layer.group_bounds[: n_local + 1]
        layer.weight_shift = plain_weight_shifts(layer.weight, bounds, layer.wmax, config.weight_granularity)
    else:
        layer.weight_shift = least
    return scores


def search_samples(prepared: Prepared, config: QuantizeConfig) -> int:
    """How many calibration samples candidates are scored on."""
    limit = PREDICTED_FROM if config.search == "predicted" else prepared.samples
    return min(config.search_images, prepared.samples, limit)


@dataclass
class Chosen:
    """A selection and what it cost, with the processes that an interrupted search resumed from."""

    result: SelectionResult
    layers: list[str]
    statistics: dict[str, Any]


def choose(
    prepared: Prepared,
    program: Program,
    tables: LowTables,
    config: QuantizeConfig,
    *,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    curves: Mapping[str, LatencyCurve] | None = None,
) -> Chosen:
    """Select the low groups of every ratio (writes nothing into the program).

    curves: predicted times of the layers; needed for config.latency_gain only.
    """
    layers = searched_layers(program)
    targets = [r for r in program.ratios if r > 0.0]
    if not layers or not targets:
        empty = SelectionResult(
            config.selector, config.seed, tuple(targets), np.zeros((len(targets), 0), np.bool_),
            np.zeros(len(targets)), np.full(len(targets), np.nan), np.full(len(targets), np.nan),
        )  # fmt: skip
        return Chosen(empty, layers, {})
    problem = SelectionProblem(
        tuple(layers),
        tuple(tables.scores[n] for n in layers),
        tuple(program.layers[n].group_macs for n in layers),
    )
    n_images = search_samples(prepared, config)
    started = time.perf_counter()
    inputs = [x[:n_images] for x in prepared.inputs]
    evaluator: CandidateEvaluator | Prediction | None = None
    if config.selector != "random":
        progress("sensitivity", 0.0)
        told = partial(progress, "sensitivity")
        if config.search == "predicted":
            evaluator = predict(
                prepared.graph, program, layers, inputs, tables.mean_shifts, seed=config.seed, progress=told
            )  # fmt: skip
        else:
            evaluator = CandidateEvaluator(program, layers, inputs, tables.mean_shifts, cache_limit=0, progress=told)
        problem = rescale_scores(problem, layer_sensitivity(problem, evaluator, n_images))
        if isinstance(evaluator, CandidateEvaluator):
            evaluator.progress = None
            if config.selector == "evolutionary":  # the others score each of their few choices once
                evaluator.cache_limit = SEARCH_CACHE
    settings: dict[str, Any] = {}
    if config.selector == "evolutionary":
        settings = {
            "population": config.population,
            "generations": config.generations,
            "survivors": min(config.survivors, config.population - 1),
            "context": search_context(program, prepared.inputs, n_images),
        }

    def report(state: SearchProgress) -> None:
        within = (state.generation + 1) / (state.generations + 1) if state.generations else 1.0
        progress("search", (state.target_index + within) / state.n_targets)

    def spent_on(former: Mapping[str, float]) -> SearchStatistics:
        return (SearchStatistics() if evaluator is None else evaluator.statistics).plus(former)

    def costs(former: Mapping[str, float]) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            **spent_on(former).counts(),
            "seconds": former.get("seconds", 0.0) + time.perf_counter() - started,
            "peak_memory_bytes": max(peak, int(former.get("peak_memory_bytes", 0))),
        }

    result = get_selector(config.selector, **settings).select(
        problem,
        targets,
        evaluator,
        seed=config.seed,
        nested=config.nested,
        n_images=n_images if evaluator is not None else 0,
        progress=report,
        checkpoint=checkpoint,
        latency=latency_goal(config, layers, curves),
        costs=costs,
    )
    spent = costs(result.former)
    statistics: dict[str, Any] = {
        **spent_on(result.former).summary(),
        "seconds": spent["seconds"],
        "peak_memory_bytes": spent["peak_memory_bytes"],
        "remembered_candidates": result.cache_hits,
    }
    middle = result.masks[len(result.masks) // 2 : len(result.masks) // 2 + 1]
    if isinstance(evaluator, CandidateEvaluator):
        statistics["deviation"] = evaluator.deviation(middle)
    return Chosen(result, layers, statistics)


def latency_goal(
    config: QuantizeConfig, layers: Sequence[str], curves: Mapping[str, LatencyCurve] | None
) -> LatencyGoal | None:
    """What the selector has to gain in predicted time; None where accuracy alone counts."""
    if config.latency_gain == 0.0 or config.latency_table is None or curves is None:
        return None
    own = [curves[name] for name in layers]
    digest = hashlib.sha256(config.latency_table.digest.encode())
    for curve in own:  # the widths of the layers are in these
        digest.update(curve.shares.tobytes() + curve.seconds.tobytes())
    return LatencyGoal(layerwise_seconds(own), config.latency_gain, digest.hexdigest())


def search_context(program: Program, inputs: Sequence[Tensor], n_images: int) -> str:
    """Fingerprint of everything a candidate's score depends on, so that a checkpoint of another search is refused."""
    digest = hashlib.sha256(f"{program.extraction} {torch.__version__}".encode())
    for layer in program.layers.values():
        for array in (layer.weight, layer.multiplier, layer.activation_shift, layer.weight_shift, layer.bias):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(f"{layer.name} {layer.amax} {layer.wmax} {layer.eligible}".encode())
    for x in inputs:
        digest.update(x[:n_images].contiguous().numpy().tobytes())
    return digest.hexdigest()


def apply_choice(program: Program, chosen: Chosen) -> None:
    """Write the selected sets into the program's low masks."""
    start = 0
    rows = {i: j for j, i in enumerate(i for i, r in enumerate(program.ratios) if r > 0.0)}
    for name in chosen.layers:
        layer = program.layers[name]
        for index, row in rows.items():
            layer.low[index] = chosen.result.masks[row, start : start + layer.n_groups]
        start += layer.n_groups
    program.nested = all(
        bool((layer.low[:-1] <= layer.low[1:]).all()) for layer in program.layers.values() if layer.n_groups
    )


@keeping_memory
def quantize_prepared(
    prepared: Prepared,
    config: QuantizeConfig,
    *,
    progress: Progress = silent,
    checkpoint: Path | None = None,
) -> Program:
    """All steps after `prepare`. The config may differ from the one of `prepare` in everything but layout settings.

    checkpoint: file of the search; the tuning of `effort="high"` has one beside it (`effort.tuning_checkpoint`).
    """
    started = time.perf_counter()
    progress("8-bit model", 0.0)
    eight: list[list[Tensor]] = []  # the first output of every batch, where the bias table has walked to it
    program = eight_bit_program(prepared, config, progress, lambda index, found: eight.append(found))
    tables = low_tables(prepared, program, config, progress)
    latency = config.latency_table
    curves = latency_curves(program, latency) if latency is not None else None
    chosen = choose(prepared, program, tables, config, progress=progress, checkpoint=checkpoint, curves=curves)
    apply_choice(program, chosen)
    comparison = AnswerComparison(program, prepared.batches(config.batch_size, bias_samples(prepared, program)))
    for outputs in eight:
        comparison.compare(0, outputs)
    lowered = [i for i, r in enumerate(program.ratios) if r > 0.0]
    restore_means(  # their last values are the outputs
        prepared, program, config, lowered, progress, comparison.compare, plane=config.stores_plane
    )
    effort: dict[str, Any] = {}
    if config.effort == "high":
        tuned = tune_low_weights(
            prepared,
            program,
            lambda candidate, own: restore_means(prepared, candidate, config, own, progress),
            seed=config.seed,
            bias=config.bias_correction,
            progress=progress,
            checkpoint=None if checkpoint is None else tuning_checkpoint(checkpoint),
        )
        if tuned.program is not program:
            comparison = AnswerComparison(tuned.program, comparison.batches)
        program, effort = tuned.program, {"effort": tuned.summary}
    from bitdial._version import __version__

    program.provenance = {
        **program.provenance,  # the builder's: the target, and widths chosen for it
        **comparison.provenance(config.keep_answers),
        "bitdial": __version__,
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "calibration": {"samples": prepared.samples, "ranges": summarize(prepared.statistics)},
        "layout": layout_summary(prepared.layout),
        "search": {**chosen.result.summary(), **chosen.statistics},
        "search_history": chosen.result.history,
        **effort,
        "channel_ranges": {
            name: tables.values[program.instruction(name).inputs[0]].channel_max.tolist()
            for name, layer in program.layers.items()
            if layer.weight is not None
        },
        "seconds": {
            **prepared.seconds,
            "quantize": time.perf_counter() - started + chosen.result.former.get("seconds", 0.0),
        },
        "threads": torch.get_num_threads(),
        **({"warnings": list(prepared.warnings)} if prepared.warnings else {}),
    }
    for length, graph in prepared.shorter.items():
        other = build_program(graph, prepared.statistics, config, group_bounds, machine=native.target())
        program.lengths[length] = shorten(program, other, length)
    if latency is not None and curves is not None:
        program.provenance["latency"] = predicted_latency(program, latency, curves)
    progress("done", 1.0)
    return program


def layout_summary(report: LayoutReport | None) -> dict[str, Any]:
    """JSON-able form of what the layout pass did."""
    if report is None:
        return {"sorted": False, "reorders": 0}
    from dataclasses import asdict

    return {"sorted": True, **asdict(report)}


__all__ = ["Chosen", "LowTables", "quantize_prepared"]
